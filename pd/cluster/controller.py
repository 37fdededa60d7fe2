"""Brings a spec's processes up on Ray, watches them, starts what has died again, and takes them
down.

One placement group per replica, in which a bundle, and so a node, has all tensor-parallel ranks of
a stage and context-parallel rank; one actor per process, one namespace per cluster
(`pagerelay/NAME`). The controller tells every node who is a member; a process that dies, fails or
does not answer for the heartbeat time-out is ended, with all ranks of its replica, taken off the
list, and started again as another process of that name. All waits have deadlines.
"""

from __future__ import annotations

import dataclasses
import enum
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
import zmq
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import (
    NodeAffinitySchedulingStrategy,
    PlacementGroupSchedulingStrategy,
)

from pd.cluster.actor import NodeActor, ProcessId, end_process
from pd.models import resolve_model
from pd.node import Member, NodeConfig
from pd.rank import endpoint
from pd.spec import ClusterSpec, MemberRole, RoleSpec, SpecError, replica_role

_WATCH_S = 0.5
_POLL_S = 0.1
_PAUSE_S, _MAX_PAUSE_S = 1.0, 60.0
"""Before a unit is started again: none at first, then doubling while it fails..."""
_MOST_FAILURES = 10
"""That are counted."""
_STABLE_S = 20.0
"""... until it has run so long."""
_CAUSE_S = 2.0
"""So long a rank's death may come after the errors that it makes in other ranks."""
_DIED = "its process died"
_PROCESS_ENVIRONMENT = {
    # Compute threads that wait must sleep, not spin: the cores are shared.
    "OMP_WAIT_POLICY": "PASSIVE",
    # A step's activations are freed and wanted again: keep the memory, do not fault it in anew.
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**32),
}

Progress = Callable[[str], None]


class StartError(RuntimeError):
    """The cluster did not come up; the message says what and why."""


class Interrupted(Exception):
    """SIGINT or SIGTERM."""


@dataclasses.dataclass(slots=True, eq=False)
class _Process:
    name: str
    rank: int = 0
    actor: Any = None
    meeting: Any = None
    """Reference to where a replica's ranks find each other; the first rank's."""
    starting: Any = None
    """Reference to what its `start` returns."""
    member: Member | None = None
    process_id: ProcessId | None = None
    ended: Any = None
    """Reference that fails when the process dies."""
    report: Any = None
    report_asked: float = 0.0

    def where(self) -> str:
        """For people: which rank of its replica; empty where there is no other."""
        rank = self.member.facts.get("rank") if self.member else None
        return f"rank {rank}" if rank else ""


class _Phase(enum.Enum):
    ABSENT = enum.auto()
    PLACING = enum.auto()
    """Waits for resources."""
    STARTING = enum.auto()
    RUNNING = enum.auto()


@dataclasses.dataclass(slots=True, eq=False)
class _Unit:
    """What lives and dies together: a replica with all its ranks, a keeper, an API server.

    ABSENT -> PLACING -> STARTING -> RUNNING -> ABSENT; from each back to ABSENT when it fails.
    """

    name: str
    role: MemberRole | None
    """None: an API server."""
    node: str = ""
    """Ray's id of the node that a keeper belongs to."""
    phase: _Phase = _Phase.ABSENT
    group: PlacementGroup | None = None
    """Only of a replica."""
    processes: list[_Process] = dataclasses.field(default_factory=list)
    """By rank."""
    deadline: float = 0.0
    """Of placing and starting."""
    problem: StartError | None = None
    """Why a rank could not meet the others: another one's reason is better."""
    retry_at: float = 0.0
    failures: int = 0
    """In a row."""
    since: float = 0.0
    """It has been running, or missing."""

    @property
    def is_replica(self) -> bool:
        return self.role not in (None, "cache")


class Controller:
    """Use as: `connect`, `start`, `watch_once` again and again, `stop` always."""

    def __init__(
        self, spec: ClusterSpec, progress: Progress, check: Callable[[], None] = lambda: None
    ) -> None:
        """`check` is called twice a second while waiting, and may raise to end the wait."""
        self.spec = spec
        self._check = check
        self.url = ""
        self._progress = progress
        self._units: list[_Unit] = []
        self._folder = Path()
        self._socket_folder = ""
        self._curve: tuple[bytes, bytes] | None = None

    # ---------------------------------------------------------------------------------------- start

    def start(self, folder: Path) -> None:
        """Bring all processes up, with the model in `folder`, and introduce them to each other."""
        spec = self.spec
        self._folder = folder
        for role, role_spec in spec.roles.items():
            self._units += [_Unit(f"{role}-{n}", role) for n in range(role_spec.replicas.min)]
        for unit in self._units:
            self._begin_placing(unit)
        self._bring_to(_Phase.STARTING, self._is_placed)
        if spec.cache.host is not None:
            self._add_keepers()
        self._units.append(_Unit("api-0", None))
        self._choose_network()
        for unit in self._units:
            self._begin_starting(unit)
        self._bring_to(_Phase.RUNNING, self._has_started)
        self._announce("")
        members = [process.member for unit in self._units for process in unit.processes]
        self.url = next(m.facts["url"] for m in members if m is not None and m.role is None)

    def _bring_to(self, phase: _Phase, has_come: Callable[[_Unit], bool]) -> None:
        """Wait until all units have come so far. Raises StartError for the first that cannot."""
        waiting = list(self._units)
        while waiting:
            self._check()
            waiting = [unit for unit in waiting if not has_come(unit)]
            if waiting:
                time.sleep(_POLL_S)
        for unit in self._units:
            unit.phase = phase

    def connect(self) -> None:
        """To the Ray cluster that this process was started in, else to a local one of its own."""
        address = os.environ.get("RAY_ADDRESS", "")
        namespace = f"pagerelay/{self.spec.name}"
        self._progress(
            f"ray: {'connecting to ' + address if address else 'starting a local cluster'}"
        )
        options: dict[str, Any] = {"address": address or "local"}
        if not address:
            options |= {"include_dashboard": False}
        ray.init(namespace=namespace, log_to_driver=False, logging_level="ERROR", **options)
        try:
            ray.get_actor("api-0")
        except ValueError:
            return
        raise StartError(
            f"name: a cluster {self.spec.name!r} is already running on this Ray cluster; stop it, "
            "or choose another name"
        )

    def _add_keepers(self) -> None:
        """One for each node that has replicas."""
        nodes = {node: None for unit in self._units for node in sorted(_nodes_of(unit.group))}
        for number, node in enumerate(nodes):
            self._units.append(_Unit(f"cache-{number}", "cache", node))

    def _choose_network(self) -> None:
        """ipc if all processes share this host."""
        nodes = {ray.get_runtime_context().get_node_id()}
        for unit in self._units:
            nodes |= _nodes_of(unit.group)
        if self.spec.network == "ipc" or (self.spec.network == "auto" and len(nodes) == 1):
            self._socket_folder = tempfile.mkdtemp(prefix="pagerelay-")
        else:
            self._curve = zmq.curve_keypair()

    # ------------------------------------------------------------------------------------- one unit

    def _role_spec(self, unit: _Unit) -> RoleSpec:
        return dict(self.spec.roles.items())[replica_role(unit.role)]

    def _begin_placing(self, unit: _Unit) -> None:
        unit.phase = _Phase.PLACING
        unit.deadline = time.monotonic() + self.spec.timeouts.start
        unit.problem = None
        if unit.is_replica:
            role = self._role_spec(unit)
            count = role.topology.num_ranks // role.topology.tp
            bundle = {kind: each * role.topology.tp for kind, each in role.rank_resources().items()}
            labels = {"bundle_label_selector": [role.labels] * count} if role.labels else {}
            self._progress(f"{unit.name}: waiting for resources")
            unit.group = placement_group(
                [bundle] * count, strategy="PACK", name=unit.name, **labels
            )

    def _is_placed(self, unit: _Unit) -> bool:
        """Raises StartError when the time is up."""
        if unit.group is None or unit.group.wait(0):
            return True
        if time.monotonic() < unit.deadline:
            return False
        wants = unit.group.bundle_specs[0]
        raise StartError(
            f"{unit.name}: no node offers {wants} within {self.spec.timeouts.start:g} s "
            f"(timeouts.start); the cluster has {_amounts(ray.cluster_resources())}, and free are "
            f"{_amounts(ray.available_resources())}"
        )

    def _begin_starting(self, unit: _Unit) -> None:
        unit.phase = _Phase.STARTING
        unit.deadline = time.monotonic() + self.spec.timeouts.start
        count = self._role_spec(unit).topology.num_ranks if unit.is_replica else 1
        unit.processes = [_Process(endpoint(unit.name, rank), rank) for rank in range(count)]
        for process in unit.processes:
            process.actor = self._create(unit, process)
        first = unit.processes[0]
        if count > 1:
            first.meeting = first.actor.meet.remote()
        for process in unit.processes:
            process.starting = process.actor.start.remote(*([first.meeting] if count > 1 else []))

    def _create(self, unit: _Unit, process: _Process) -> Any:
        config = NodeConfig(
            process.name,
            unit.role,
            self._spec_for(unit),
            str(self._folder),
            self._socket_folder,
            self._curve,
            rank=process.rank,
            replica=unit.name,
        )
        options: dict[str, Any] = {"name": process.name, "max_concurrency": 16}
        threads = 1
        if unit.is_replica:
            role = self._role_spec(unit)
            threads = role.threads
            resources = role.rank_resources()
            options |= {
                "num_cpus": resources.pop("CPU", 0),
                "num_gpus": resources.pop("GPU", 0),
                "resources": resources,
                "scheduling_strategy": PlacementGroupSchedulingStrategy(
                    unit.group, process.rank // role.topology.tp
                ),
            }
        else:
            # An API server goes beside the controller: its port is on this host.
            node = unit.node or ray.get_runtime_context().get_node_id()
            options |= {"num_cpus": 0, "scheduling_strategy": _on_node(node)}
        environment = {**_PROCESS_ENVIRONMENT, "OMP_NUM_THREADS": str(threads)}
        if self._socket_folder:
            # One host: UCX needs no network but the loopback, and should listen on no other.
            environment["UCX_NET_DEVICES"] = os.environ.get("UCX_NET_DEVICES", "lo")
        options["runtime_env"] = {"env_vars": environment}
        return ray.remote(**options)(NodeActor).remote(config)

    def _spec_for(self, unit: _Unit) -> ClusterSpec:
        """An API server that is started again listens where clients know it."""
        if unit.role is not None or not self.url:
            return self.spec
        port = int(self.url.rpartition(":")[2])
        return self.spec.model_copy(update={"api": self.spec.api.model_copy(update={"port": port})})

    def _has_started(self, unit: _Unit) -> bool:
        """Raises StartError, and SpecError where the spec does not fit the model."""
        for process in unit.processes:
            if process.member is None and ray.wait([process.starting], timeout=0)[0]:
                self._take_member(unit, process)
        pending = [process.name for process in unit.processes if process.member is None]
        if pending and time.monotonic() > unit.deadline:
            raise unit.problem or StartError(
                f"{', '.join(pending)}: not ready within {self.spec.timeouts.start:g} s "
                "(timeouts.start)"
            )
        if pending:
            return False
        self._check_compatible(unit)
        unit.since = time.monotonic()
        return True

    def _take_member(self, unit: _Unit, process: _Process) -> None:
        try:
            process.member, process.process_id = ray.get(process.starting)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, SpecError):
                raise SpecError(f"{process.name}: {error.cause}") from error
            kind = type(error.cause).__name__
            problem = StartError(f"{process.name}: {kind}: {error.cause}")
            if kind != "RankError":
                raise problem from error
            if unit.problem is None:
                unit.problem = problem
                unit.deadline = min(unit.deadline, time.monotonic() + _CAUSE_S)
            return
        except ray.exceptions.RayActorError as error:
            cause = str(error).strip().splitlines()[-1].strip()
            raise StartError(f"{process.name}: its process died while starting: {cause}") from error
        process.ended = process.actor.ended.remote()
        facts = ", ".join(f"{k} {v}" for k, v in process.member.facts.items())
        self._progress(f"{process.name}: ready ({facts})")

    def _check_compatible(self, unit: _Unit) -> None:
        """Replicas must agree on everything that a page's bytes depend on. Raises StartError."""
        mine = unit.processes[0].member
        others = [other.processes[0].member for other in self._units if other.processes]
        other = next((m for m in others if m and m is not mine and m.is_replica), None)
        if mine is None or other is None or not mine.is_replica:
            return
        problems = [
            f"{key}: {other.name} has {other.compat[key]}, {mine.name} has {mine.compat.get(key)}"
            for key in other.compat
            if other.compat[key] != mine.compat.get(key)
        ]
        if problems:
            raise StartError("replicas do not fit together: " + "; ".join(problems))

    def _announce(self, reason: str) -> None:
        """Tell every live process who is a member: replicas first, since an API server sends them
        requests as soon as it knows them; where one is gone the API first, which moves its requests
        elsewhere. A replica's further ranks hear of it before, and know their leader alone."""
        running = [unit for unit in self._units if unit.phase is _Phase.RUNNING]
        apis = [unit for unit in running if unit.role is None]
        others = [unit for unit in running if unit.role is not None]
        ranks = [(unit, process) for unit in others for process in unit.processes[1:]]
        firsts = [(unit, unit.processes[0]) for unit in others]
        turns = [ranks, firsts, [(unit, unit.processes[0]) for unit in apis]]
        for turn in reversed(turns) if reason else turns:
            told = [
                process.actor.set_members.remote(_known_to(unit, process, running), reason)
                for unit, process in turn
            ]
            if told:
                # A node that fails, hangs or dies over it is seen by the watch.
                ray.wait(told, num_returns=len(told), timeout=self.spec.timeouts.heartbeat)

    # ---------------------------------------------------------------------------------------- watch

    def watch_once(self) -> None:
        """Look after the processes for half a second: end units of which something has died, and
        start them again."""
        self._check()
        running = [unit for unit in self._units if unit.phase is _Phase.RUNNING]
        references = [process.ended for unit in running for process in unit.processes]
        ended: list[Any] = []
        if references:
            ended, _ = ray.wait(references, num_returns=len(references), timeout=_WATCH_S)
        else:
            time.sleep(_WATCH_S)
        for unit in running:
            for process in unit.processes:
                reason = _DIED if process.ended in ended else self._health(process)
                if reason:
                    self._remove(unit, *self._culprit(unit, process, reason))
                    break
        for unit in self._units:
            if unit.phase is not _Phase.RUNNING:
                self._restore(unit)

    def _restore(self, unit: _Unit) -> None:
        """Bring a unit that is missing one step further."""
        try:
            if unit.phase is _Phase.ABSENT and time.monotonic() >= unit.retry_at:
                self._begin_placing(unit)
            if unit.phase is _Phase.PLACING and self._is_placed(unit):
                self._begin_starting(unit)
            if unit.phase is _Phase.STARTING:
                missing = time.monotonic() - unit.since
                if self._has_started(unit):
                    unit.phase = _Phase.RUNNING
                    self._announce("")
                    self._progress(f"{unit.name}: back after {missing:.1f} s")
        except (StartError, SpecError, ValueError, ray.exceptions.RayError) as error:
            self._progress(f"{unit.name}: cannot be started again: {error}")
            self._end(unit)

    def _culprit(self, unit: _Unit, process: _Process, reason: str) -> tuple[_Process, str]:
        """Where ranks fail because another one has died, that one."""
        if reason != _DIED and len(unit.processes) > 1:
            dead, _ = ray.wait([each.ended for each in unit.processes], timeout=_CAUSE_S)
            for each in unit.processes:
                if each.ended in dead:
                    return each, _DIED
        return process, reason

    def _health(self, process: _Process) -> str:
        """Why the process must end, or nothing."""
        now = time.monotonic()
        if process.report is None:
            process.report, process.report_asked = process.actor.report.remote(), now
            return ""
        ready, _ = ray.wait([process.report], timeout=0)
        if not ready:
            silent = now - process.report_asked
            limit = self.spec.timeouts.heartbeat
            return f"it has not answered for {silent:.0f} s" if silent > limit else ""
        reference, process.report = process.report, None
        try:
            report = ray.get(reference)
        except ray.exceptions.RayError as error:
            return f"its process died: {type(error).__name__}"
        if report["silent"]:
            self._progress(f"{process.name}: hears nothing from {', '.join(report['silent'])}")
        return str(report["failure"])

    def _remove(self, unit: _Unit, process: _Process, reason: str) -> None:
        where = process.where()
        if where and not reason.startswith("rank "):
            reason = f"{where}: {reason}"
        self._progress(f"{unit.name}: gone: {reason}")
        if time.monotonic() - unit.since > _STABLE_S:
            unit.failures = 0
        if self._end(unit):
            self._announce(reason)

    def _end(self, unit: _Unit) -> bool:
        """End its processes, and have it started again after a while; False if that has to be
        tried again."""
        for process in unit.processes:
            if process.actor is not None:
                ray.kill(process.actor)
        # Members reuse the pages that it could have written to: it must be dead by then.
        for process in unit.processes:
            if process.process_id is not None and not self._is_dead(process.process_id):
                self._progress(f"{process.name}: not known to be dead yet, trying again")
                return False
        if unit.group is not None:
            remove_placement_group(unit.group)
        unit.group, unit.processes = None, []
        now = time.monotonic()
        if unit.phase is _Phase.RUNNING:
            unit.since = now  # an attempt that fails does not make it missing for less long
        unit.phase = _Phase.ABSENT
        unit.retry_at = now + min(_MAX_PAUSE_S, _PAUSE_S * (2**unit.failures - 1))
        unit.failures = min(unit.failures + 1, _MOST_FAILURES)
        return True

    def _is_dead(self, process_id: ProcessId) -> bool:
        """Make sure of it on the process's own node: Ray reports an actor's death before its
        end."""
        limit = self.spec.timeouts.heartbeat
        strategy = _on_node(process_id.node)
        task = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=strategy)(end_process)
        try:
            return bool(ray.get(task.remote(process_id, limit), timeout=limit * 2))
        except ray.exceptions.RayError:
            return all(not n["Alive"] for n in ray.nodes() if n["NodeID"] == process_id.node)

    # ----------------------------------------------------------------------------------------- stop

    def stop(self) -> None:
        """End everything that was started; safe at any time, and idempotent."""
        if ray.is_initialized():
            processes = [process for unit in self._units for process in unit.processes]
            actors = [process.actor for process in processes if process.actor is not None]
            stopping = [actor.stop.remote() for actor in actors]
            if stopping:
                ray.wait(stopping, num_returns=len(stopping), timeout=self.spec.timeouts.stop)
            for actor in actors:
                ray.kill(actor)
            for unit in self._units:
                if unit.group is not None:
                    remove_placement_group(unit.group)
            ray.shutdown()
        self._units = []
        if self._socket_folder:
            shutil.rmtree(self._socket_folder, ignore_errors=True)


def _known_to(unit: _Unit, process: _Process, running: list[_Unit]) -> list[Member]:
    """Further ranks know their leader; leaders their ranks, before all others; and all know the
    other units."""
    if process.rank:
        known = unit.processes[:1]
    else:
        known = [*unit.processes[1:], *(other.processes[0] for other in running)]
    return [each.member for each in known if each.member is not None]


def _nodes_of(group: PlacementGroup | None) -> set[str]:
    if group is None:
        return set()
    return set(placement_group_table(group)["bundles_to_node_id"].values())


def _on_node(node_id: str) -> NodeAffinitySchedulingStrategy:
    return NodeAffinitySchedulingStrategy(node_id, soft=False)


def _amounts(resources: dict[str, float]) -> dict[str, float]:
    """Without what no spec asks for."""
    return {k: v for k, v in resources.items() if not k.startswith(("node:", "memory", "object_"))}


class _Signals:
    """Turns SIGINT and SIGTERM into Interrupted, raised by `check`: Ray's calls do not bear
    exceptions that come out of a signal handler. Restores what was there before."""

    def __init__(self) -> None:
        self._received = ""
        self._before = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}

    def install(self) -> None:
        for number in self._before:
            signal.signal(number, self._note)

    def restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: object) -> None:
        self._received = signal.Signals(number).name

    def check(self) -> None:
        if self._received:
            raise Interrupted(self._received)


def serve(spec: ClusterSpec, progress: Progress, ready: Callable[[str], None]) -> str:
    """Run a cluster until SIGINT or SIGTERM; returns the signal's name. Raises StartError."""
    weights = spec.model.load == "weights"
    folder = resolve_model(spec.model.path, progress=progress, weights=weights)
    signals = _Signals()
    controller = Controller(spec, progress, signals.check)
    try:
        signals.install()
        controller.connect()
        signals.install()  # Ray has put its own in their place
        controller.start(folder)
        ready(controller.url)
        while True:
            controller.watch_once()
    except Interrupted as name:
        progress(f"{name}: stopping")
        return str(name)
    finally:
        controller.stop()
        signals.restore()
