"""Brings a spec's processes up on Ray, watches them, and takes them down.

One placement group per replica, in which a bundle, and so a node, has all tensor-parallel ranks of
a stage and context-parallel rank; one actor per process, one namespace per cluster
(`pagerelay/NAME`). The controller tells every node who is a member; a process that dies, fails or
does not answer for the heartbeat time-out is ended, with all ranks of its replica, and taken off
the list, which makes the others end the requests that need it. It is not replaced yet. All waits
have deadlines.
"""

from __future__ import annotations

import dataclasses
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


class _RankStartError(StartError):
    """A rank could not meet the others."""


class Interrupted(Exception):
    """SIGINT or SIGTERM."""


@dataclasses.dataclass(slots=True, eq=False)
class _Process:
    name: str
    role: MemberRole | None
    group: PlacementGroup | None
    """None: an API server, or a keeper."""
    rank: int = 0
    replica: str = ""
    """Whose rank it is; empty: its own."""
    node: str = ""
    """Ray's id of the node that a keeper belongs to."""
    actor: Any = None
    meeting: Any = None
    """Reference to where a replica's ranks find each other; the first rank's."""
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
        self._processes: list[_Process] = []
        self._socket_folder = ""
        self._curve: tuple[bytes, bytes] | None = None

    # ---------------------------------------------------------------------------------------- start

    def start(self, folder: Path) -> None:
        """Bring all processes up, with the model in `folder`, and introduce them to each other."""
        spec = self.spec
        deadline = time.monotonic() + spec.timeouts.start
        for role, role_spec in spec.roles.items():
            for number in range(role_spec.replicas.min):
                name = f"{role}-{number}"
                group = self._place(name, role_spec)
                self._processes += [
                    _Process(endpoint(name, rank), role, group, rank, name)
                    for rank in range(role_spec.topology.num_ranks)
                ]
        self._processes.append(_Process("api-0", None, None))
        self._wait_placed(deadline)
        if spec.cache.host is not None:
            self._add_keepers()
        self._choose_network()
        for process in self._processes:
            self._create(process, folder)
        self._wait_started(deadline)
        self._check_compatible()
        self._announce("")
        self.url = next(
            p.member.facts["url"] for p in self._processes if p.member and p.role is None
        )

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
        nodes = {
            node: None for process in self._processes for node in sorted(_nodes_of(process.group))
        }
        for number, node in enumerate(nodes):
            self._processes.append(_Process(f"cache-{number}", "cache", None, node=node))

    def _choose_network(self) -> None:
        """ipc if all processes share this host."""
        nodes = {ray.get_runtime_context().get_node_id()}
        for process in self._processes:
            nodes |= _nodes_of(process.group)
        if self.spec.network == "ipc" or (self.spec.network == "auto" and len(nodes) == 1):
            self._socket_folder = tempfile.mkdtemp(prefix="pagerelay-")
        else:
            self._curve = zmq.curve_keypair()

    def _place(self, name: str, role: RoleSpec) -> PlacementGroup:
        count = role.topology.num_ranks // role.topology.tp
        bundle = {kind: each * role.topology.tp for kind, each in role.rank_resources().items()}
        labels = {"bundle_label_selector": [role.labels] * count} if role.labels else {}
        return placement_group([bundle] * count, strategy="PACK", name=name, **labels)

    def _create(self, process: _Process, folder: Path) -> None:
        config = NodeConfig(
            process.name,
            process.role,
            self.spec,
            str(folder),
            self._socket_folder,
            self._curve,
            rank=process.rank,
            replica=process.replica,
        )
        options: dict[str, Any] = {"name": process.name, "max_concurrency": 16}
        threads = 1
        if process.role is None or process.role == "cache":
            # An API server goes beside the controller: its port is on this host.
            node = process.node or ray.get_runtime_context().get_node_id()
            options |= {"num_cpus": 0, "scheduling_strategy": _on_node(node)}
        else:
            role = dict(self.spec.roles.items())[replica_role(process.role)]
            threads = role.threads
            resources = role.rank_resources()
            options |= {
                "num_cpus": resources.pop("CPU", 0),
                "num_gpus": resources.pop("GPU", 0),
                "resources": resources,
                "scheduling_strategy": PlacementGroupSchedulingStrategy(
                    process.group, process.rank // role.topology.tp
                ),
            }
        environment = {**_PROCESS_ENVIRONMENT, "OMP_NUM_THREADS": str(threads)}
        if self._socket_folder:
            # One host: UCX needs no network but the loopback, and should listen on no other.
            environment["UCX_NET_DEVICES"] = os.environ.get("UCX_NET_DEVICES", "lo")
        options["runtime_env"] = {"env_vars": environment}
        process.actor = ray.remote(**options)(NodeActor).remote(config)

    def _wait_placed(self, deadline: float) -> None:
        for process in self._processes:
            if process.group is None or process.rank:
                continue
            self._progress(f"{process.name}: waiting for resources")
            while not process.group.wait(_WATCH_S):
                self._check()
                if time.monotonic() < deadline:
                    continue
                wants = process.group.bundle_specs[0]
                raise StartError(
                    f"{process.name}: no node offers {wants} within "
                    f"{self.spec.timeouts.start:g} s (timeouts.start); the cluster has "
                    f"{_amounts(ray.cluster_resources())}, and free are "
                    f"{_amounts(ray.available_resources())}"
                )

    def _wait_started(self, deadline: float) -> None:
        pending = {self._begin(process): process for process in self._processes}
        problem: StartError | None = None
        while pending:
            left = deadline - time.monotonic()
            if problem is not None and left <= 0:
                raise problem
            if left <= 0:
                names = ", ".join(process.name for process in pending.values())
                raise StartError(
                    f"{names}: not ready within {self.spec.timeouts.start:g} s (timeouts.start)"
                )
            self._check()
            ready, _ = ray.wait(list(pending), timeout=min(left, _WATCH_S))
            for reference in ready:
                process = pending.pop(reference)
                try:
                    process.member, process.process_id = self._started(process, reference)
                except _RankStartError as error:
                    # It waited for another rank: that one's reason is the better one.
                    problem = problem or error
                    deadline = min(deadline, time.monotonic() + _CAUSE_S)
                    continue
                process.ended = process.actor.ended.remote()
                facts = ", ".join(f"{k} {v}" for k, v in process.member.facts.items())
                self._progress(f"{process.name}: ready ({facts})")
        if problem is not None:
            raise problem

    def _begin(self, process: _Process) -> Any:
        """A reference to what its `start` returns."""
        ranks = self._ranks(process)
        if len(ranks) == 1:
            return process.actor.start.remote()
        if process.rank == 0:
            process.meeting = process.actor.meet.remote()
        return process.actor.start.remote(ranks[0].meeting)

    def _ranks(self, process: _Process) -> list[_Process]:
        """All processes of its replica, by rank."""
        if not process.replica:
            return [process]
        return [other for other in self._processes if other.replica == process.replica]

    def _started(self, process: _Process, reference: Any) -> tuple[Member, ProcessId]:
        try:
            started: tuple[Member, ProcessId] = ray.get(reference)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, SpecError):
                raise SpecError(f"{process.name}: {error.cause}") from error
            kind = type(error.cause).__name__
            failed = _RankStartError if kind == "RankError" else StartError
            raise failed(f"{process.name}: {kind}: {error.cause}") from error
        except ray.exceptions.RayActorError as error:
            cause = str(error).strip().splitlines()[-1].strip()
            raise StartError(f"{process.name}: its process died while starting: {cause}") from error
        return started

    def _check_compatible(self) -> None:
        """Replicas must agree on everything that a page's bytes depend on."""
        members = [p.member for p in self._processes if p.member and p.member.is_replica]
        first = members[0]
        problems = [
            f"{key}: {first.name} has {first.compat[key]}, {other.name} has {other.compat.get(key)}"
            for other in members[1:]
            for key in first.compat
            if first.compat[key] != other.compat.get(key)
        ]
        if problems:
            raise StartError("replicas do not fit together: " + "; ".join(problems))

    def _announce(self, reason: str) -> None:
        """Tell every live process who is a member: replicas first, since an API server sends them
        requests as soon as it knows them; where one is gone the API first, whose error says so."""
        turns = (_is_api, _is_first, _is_further_rank)
        for is_next in turns if reason else reversed(turns):
            told = [
                process.actor.set_members.remote(self._known_to(process), reason)
                for process in self._processes
                if is_next(process)
            ]
            # A node that fails, hangs or dies over it is seen by the watch.
            ray.wait(told, num_returns=len(told), timeout=self.spec.timeouts.heartbeat)

    def _known_to(self, process: _Process) -> list[Member]:
        """Ranks know their leader; leaders their ranks, before all others, and everybody else."""
        ranks = self._ranks(process)
        if process.rank:
            known = ranks[:1]
        else:
            known = [*ranks[1:], *filter(lambda each: not each.rank, self._processes)]
        return [each.member for each in known if each.member is not None]

    # ---------------------------------------------------------------------------------------- watch

    def watch_once(self) -> None:
        """Look after the processes for half a second. Raises StartError when no API server is
        left."""
        self._check()
        references = [process.ended for process in self._processes]
        ended, _ = ray.wait(references, num_returns=len(references), timeout=_WATCH_S)
        for process in list(self._processes):
            if process not in self._processes:
                continue  # it went with another rank
            reason = _DIED if process.ended in ended else self._health(process)
            if reason:
                self._remove(*self._culprit(process, reason))
        if not any(process.role is None for process in self._processes):
            raise StartError("the API server is gone")

    def _culprit(self, process: _Process, reason: str) -> tuple[_Process, str]:
        """Where ranks fail because another one has died, that one."""
        ranks = self._ranks(process)
        if reason != _DIED and len(ranks) > 1:
            dead, _ = ray.wait([each.ended for each in ranks], timeout=_CAUSE_S)
            for each in ranks:
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

    def _remove(self, process: _Process, reason: str) -> None:
        ranks = self._ranks(process)
        if where := process.where():
            reason = f"{where}: {reason}"
        self._progress(f"{ranks[0].name}: gone: {reason}")
        for each in ranks:
            ray.kill(each.actor)
        # Members reuse the pages that it could have written to: it must be dead by then.
        for each in ranks:
            if not self._is_dead(each):
                self._progress(f"{each.name}: not known to be dead yet, trying again")
                return
        self._processes = [each for each in self._processes if each not in ranks]
        self._announce(reason)
        if process.group is not None:
            remove_placement_group(process.group)

    def _is_dead(self, process: _Process) -> bool:
        """Make sure of it on the process's own node: Ray reports an actor's death before its
        end."""
        assert process.process_id is not None
        limit = self.spec.timeouts.heartbeat
        node = process.process_id.node
        strategy = _on_node(node)
        task = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=strategy)(end_process)
        try:
            return bool(ray.get(task.remote(process.process_id, limit), timeout=limit * 2))
        except ray.exceptions.RayError:
            return all(not each["Alive"] for each in ray.nodes() if each["NodeID"] == node)

    # ----------------------------------------------------------------------------------------- stop

    def stop(self) -> None:
        """End everything that was started; safe at any time, and idempotent."""
        if ray.is_initialized():
            actors = [process.actor for process in self._processes if process.actor is not None]
            stopping = [actor.stop.remote() for actor in actors]
            if stopping:
                ray.wait(stopping, num_returns=len(stopping), timeout=self.spec.timeouts.stop)
            for actor in actors:
                ray.kill(actor)
            for process in self._processes:
                if process.group is not None and not process.rank:
                    remove_placement_group(process.group)
            ray.shutdown()
        self._processes = []
        if self._socket_folder:
            shutil.rmtree(self._socket_folder, ignore_errors=True)


def _is_api(process: _Process) -> bool:
    return process.role is None


def _is_further_rank(process: _Process) -> bool:
    return process.rank > 0


def _is_first(process: _Process) -> bool:
    return not (_is_api(process) or _is_further_rank(process))


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
