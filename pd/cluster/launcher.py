"""Brings a unit's processes up on Ray, finds them again, and ends them.

One placement group per replica, in which a bundle, and so a node, has all tensor-parallel ranks of
a stage and context-parallel rank; one actor per process, one namespace per cluster
(`pagerelay/NAME`). No call waits for longer than moments but `end`, whose wait has a deadline.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
import zmq
from ray.util.placement_group import (
    PlacementGroup,
    get_placement_group,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import (
    NodeAffinitySchedulingStrategy,
    PlacementGroupSchedulingStrategy,
)

import pd
from pd.api.node import listen
from pd.cluster.actor import (
    Description,
    NodeActor,
    ProcessId,
    end_process,
    has_ended,
    own_id,
)
from pd.cluster.unit import Phase, Process, StartError, Unit
from pd.node import NodeConfig
from pd.rank import endpoint
from pd.rollout import version_of
from pd.spec import ClusterSpec, Role, RoleSpec, SpecError, replica_role

CAUSE_S = 2.0
"""So long a rank's death may come after the errors that it makes in other ranks."""
_PROCESS_ENVIRONMENT = {
    # Compute threads that wait must sleep, not spin: the cores are shared.
    "OMP_WAIT_POLICY": "PASSIVE",
    # A step's activations are freed and wanted again: keep the memory, do not fault it in anew.
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**32),
}

Progress = Callable[[str], None]


@dataclasses.dataclass(slots=True)
class Network:
    """How a cluster's processes reach each other; one that is adopted keeps it."""

    socket_folder: str = ""
    """ipc; empty: tcp."""
    curve: tuple[bytes, bytes] | None = None

    @classmethod
    def choose(cls, spec: ClusterSpec) -> Network:
        """ipc if all processes share this host, and always will."""
        nodes = [node for node in ray.nodes() if node["Alive"]]
        grows = bool(os.environ.get("RAY_ADDRESS")) and any(
            role.labels or role.replicas.min < role.replicas.max for _, role in spec.roles.items()
        )
        if spec.network == "ipc" or (spec.network == "auto" and len(nodes) == 1 and not grows):
            return cls(tempfile.mkdtemp(prefix="pagerelay-"))
        return cls(curve=zmq.curve_keypair())

    def clean(self) -> None:
        if self.socket_folder:
            shutil.rmtree(self.socket_folder, ignore_errors=True)


class Launcher:
    def __init__(self, progress: Progress, outlives: bool) -> None:
        """`outlives`: processes stay when the controller's process dies, to be adopted."""
        self.id = ProcessId("", 0, "")
        """By which processes know their controller, once it is connected."""
        self.url = ""
        """Of the API server, once it has been up."""
        self.network = Network()
        self.folder = Path()
        """Of the model."""
        self._progress = progress
        self.outlives = outlives
        self._lifetime = "detached" if outlives else None

    def connected(self) -> None:
        """This process is connected to Ray."""
        self.id = own_id()

    # -------------------------------------------------------------------------------------- placing

    def begin_placing(self, unit: Unit, spec: ClusterSpec) -> None:
        unit.phase, unit.began, unit.problem = Phase.PLACING, time.monotonic(), None
        if unit.is_replica:
            role = role_spec(unit, spec)
            count = role.topology.num_ranks // role.topology.tp
            bundle = {kind: each * role.topology.tp for kind, each in role.rank_resources().items()}
            labels = dict(role.labels)
            if self.network.socket_folder:
                labels["ray.io/node-id"] = ray.get_runtime_context().get_node_id()
            self._progress(f"{unit.name}: waiting for resources")
            name = _group_name(spec, unit.name)
            with contextlib.suppress(ValueError):  # of one that died while there was no controller
                remove_placement_group(get_placement_group(name))
            unit.group = placement_group(
                [bundle] * count,
                strategy="PACK",
                name=name,
                lifetime=self._lifetime,
                **({"bundle_label_selector": [labels] * count} if labels else {}),
            )

    def is_placed(self, unit: Unit) -> bool:
        return unit.group is None or unit.group.wait(0)

    # ------------------------------------------------------------------------------------- starting

    def begin_starting(self, unit: Unit, spec: ClusterSpec) -> None:
        unit.phase, unit.began = Phase.STARTING, time.monotonic()
        if unit.role is None and not self.url:
            try:  # several share it among themselves, but not with another cluster's
                listen(spec.api, is_shared=False).close()
            except OSError as error:
                raise StartError(f"{unit.name}: {error}") from error
        if unit.group is not None:
            unit.nodes = _nodes_of(unit.group)
        count = role_spec(unit, spec).topology.num_ranks if unit.is_replica else 1
        unit.processes = [Process(endpoint(unit.name, rank), rank) for rank in range(count)]
        for process in unit.processes:
            process.actor = self._create(unit, process, spec)
        first = unit.processes[0]
        if count > 1:
            first.meeting = first.actor.meet.remote()
        for process in unit.processes:
            process.starting = process.actor.start.remote(*([first.meeting] if count > 1 else []))

    def begin_turning(self, unit: Unit, role: Role, spec: ClusterSpec) -> None:
        """Of a replica that is at rest, and that no other process knows any more."""
        unit.phase, unit.began, unit.problem = Phase.STARTING, time.monotonic(), None
        unit.role = role
        unit.draining_since = unit.becomes = unit.resting = None
        unit.was_running = False
        leader = None
        for process in unit.processes:
            process.member = process.report = process.last_report = None
            process.starting = process.actor.turn.remote(role, spec, *([leader] if leader else []))
            leader = leader or process.starting

    def _create(self, unit: Unit, process: Process, spec: ClusterSpec) -> Any:
        config = NodeConfig(
            process.name,
            unit.role,
            self._spec_for(unit, spec),
            str(self.folder),
            self.network.socket_folder,
            self.network.curve,
            rank=process.rank,
            replica=unit.name,
        )
        options: dict[str, Any] = {"name": process.name, "max_concurrency": 16}
        threads = 1
        if unit.is_replica:
            role = role_spec(unit, spec)
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
            is_keeper = unit.role == "cache"
            node = unit.nodes[0] if is_keeper else ray.get_runtime_context().get_node_id()
            options |= {"num_cpus": 0, "scheduling_strategy": _on_node(node)}
        environment = {**_PROCESS_ENVIRONMENT, "OMP_NUM_THREADS": str(threads)}
        if self.network.socket_folder:
            # One host: UCX needs no network but the loopback, and should listen on no other.
            environment["UCX_NET_DEVICES"] = os.environ.get("UCX_NET_DEVICES", "lo")
        options |= {"runtime_env": {"env_vars": environment}, "lifetime": self._lifetime}
        return ray.remote(**options)(NodeActor).remote(config, self.id)

    def _spec_for(self, unit: Unit, spec: ClusterSpec) -> ClusterSpec:
        """An API server that is started again listens where clients know it."""
        if unit.role is not None or not self.url:
            return spec
        port = int(self.url.rpartition(":")[2])
        return spec.model_copy(update={"api": spec.api.model_copy(update={"port": port})})

    def has_started(self, unit: Unit, limit_s: float) -> bool:
        """Raises StartError, and SpecError where the spec does not fit the model."""
        now = time.monotonic()
        for process in unit.processes:
            if process.member is None and ray.wait([process.starting], timeout=0)[0]:
                self._take_member(unit, process)
        pending = [process.name for process in unit.processes if process.member is None]
        if unit.problem is not None and now > unit.problem_until:
            raise unit.problem
        if pending and now > unit.began + limit_s:
            raise StartError(
                f"{', '.join(pending)}: not ready within {limit_s:g} s (timeouts.start)"
            )
        if pending:
            return False
        unit.since = now
        return True

    def _take_member(self, unit: Unit, process: Process) -> None:
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
                unit.problem_until = time.monotonic() + CAUSE_S
            return
        except ray.exceptions.RayActorError as error:
            cause = str(error).strip().splitlines()[-1].strip()
            raise StartError(f"{process.name}: its process died while starting: {cause}") from error
        if process.ended is None:
            process.ended = process.actor.ended.remote()
        facts = ", ".join(f"{k} {v}" for k, v in process.member.facts.items())
        self._progress(f"{process.name}: ready ({facts})")
        if unit.role is None:
            self.url = process.member.facts["url"]

    # ------------------------------------------------------------------------------------- adoption

    def find(self, namespace: str, limit_s: float) -> dict[str, Description | None]:
        """The processes of this namespace by name; None for one that does not answer."""
        names = [
            each["name"]
            for each in ray.util.list_named_actors(all_namespaces=True)
            if each["namespace"] == namespace
        ]
        asked: dict[str, Any] = {}
        for name in names:
            try:
                asked[name] = ray.get_actor(name).describe.remote()
            except (ValueError, AttributeError):  # gone meanwhile; or not one of ours
                continue
        if asked:
            ray.wait(list(asked.values()), num_returns=len(asked), timeout=limit_s)
        found: dict[str, Description | None] = {}
        for name, reference in asked.items():
            try:
                found[name] = ray.get(reference, timeout=0)
            except ray.exceptions.RayActorError:
                continue
            except (ray.exceptions.RayError, TimeoutError):
                found[name] = None
        return found

    def adopt(
        self, found: dict[str, Description | None], spec: ClusterSpec, limit_s: float
    ) -> list[Unit]:
        """What can be taken over runs on; the rest is ended. Raises StartError."""
        network = None
        by_unit: dict[str, dict[int, tuple[str, Description]]] = {}
        for name, described in found.items():
            if described is None:
                with contextlib.suppress(ValueError):
                    ray.kill(ray.get_actor(name))
                continue
            unit_name = described.config.replica or name
            by_unit.setdefault(unit_name, {})[described.config.rank] = name, described
        units = []
        for unit_name, processes in sorted(by_unit.items()):
            first = processes[min(processes)][1].config
            network = Network(first.socket_folder, first.curve)
            unit = Unit(unit_name, first.role)
            role = replica_role(unit.role) if unit.is_replica else None
            unit.version = version_of(first.spec, role)
            for rank, (name, described) in sorted(processes.items()):
                try:
                    process = Process(name, rank, ray.get_actor(name))
                except ValueError:  # it has died since it was found
                    continue
                process.member, process.process_id = described.member, described.process_id
                unit.processes.append(process)
                if described.is_draining:
                    unit.draining_since = time.monotonic()
                unit.nodes = (described.process_id.node,)
            if unit.is_replica:
                with contextlib.suppress(ValueError):  # it is gone, and its processes will be
                    unit.group = get_placement_group(_group_name(spec, unit_name))
                    unit.nodes = _nodes_of(unit.group)
            builds = {described.build for _, described in processes.values()}
            roles = {described.config.role for _, described in processes.values()}  # in mid-turn?
            fits = builds == {pd.__version__} and len(roles) == 1
            if fits and self._take_over(unit, first.spec, limit_s):
                units.append(unit)
            elif not self.end(unit, limit_s):
                raise StartError(f"{unit_name}: not known to be dead yet")
        self.network = network if units and network is not None else Network.choose(spec)
        self._remove_groups(spec, {_group_name(spec, unit.name) for unit in units})
        return units

    def _remove_groups(self, spec: ClusterSpec, kept: set[str]) -> None:
        """Of replicas that died, or were not there yet, while there was no controller."""
        for each in placement_group_table().values():
            name = each["name"]
            if name.startswith(_group_name(spec, "")) and name not in kept:
                with contextlib.suppress(ValueError):
                    remove_placement_group(get_placement_group(name))

    def _take_over(self, unit: Unit, spec: ClusterSpec, limit_s: float) -> bool:
        count = role_spec(unit, spec).topology.num_ranks if unit.is_replica else 1
        if len(unit.members) != count or (unit.is_replica and unit.group is None):
            return False
        try:
            ray.get([p.actor.adopt.remote(self.id) for p in unit.processes], timeout=limit_s)
        except (ray.exceptions.RayError, TimeoutError):
            return False
        for process in unit.processes:
            process.ended = process.actor.ended.remote()
        unit.phase, unit.since, unit.was_running = Phase.RUNNING, time.monotonic(), True
        if unit.role is None:
            self.url = unit.members[0].facts["url"]
        return True

    # --------------------------------------------------------------------------------------- ending

    def end(self, unit: Unit, limit_s: float) -> bool:
        """Kill its processes and give its resources back; False if it has to be tried again."""
        self.kill(unit)
        # Members reuse the pages that it could have written to: it must be dead by then.
        for process in unit.processes:
            if process.process_id is not None and not _is_dead(process.process_id, limit_s):
                self._progress(f"{process.name}: not known to be dead yet, trying again")
                return False
        unit.group, unit.processes = None, []
        unit.phase = Phase.ABSENT
        return True

    def kill(self, unit: Unit) -> None:
        """Without making sure."""
        for process in unit.processes:
            if process.actor is not None:
                ray.kill(process.actor)
        if unit.group is not None:
            remove_placement_group(unit.group)


def _group_name(spec: ClusterSpec, unit: str) -> str:
    return f"pagerelay/{spec.name}/{unit}"


def role_spec(unit: Unit, spec: ClusterSpec) -> RoleSpec:
    return dict(spec.roles.items())[replica_role(unit.role)]


def _nodes_of(group: PlacementGroup) -> tuple[str, ...]:
    return tuple(sorted(set(placement_group_table(group)["bundles_to_node_id"].values())))


def is_alive(process_id: ProcessId, limit_s: float) -> bool:
    """Also where that cannot be known, while its node lives."""
    return not _ask_on_node(process_id, limit_s, has_ended, process_id)


def _is_dead(process_id: ProcessId, limit_s: float) -> bool:
    """Make sure of it on the process's own node: Ray reports an actor's death before its end."""
    return _ask_on_node(process_id, limit_s, end_process, process_id, limit_s)


def _ask_on_node(
    process_id: ProcessId, limit_s: float, function: Callable[..., bool], *arguments: Any
) -> bool:
    """True where the node is gone."""
    strategy = _on_node(process_id.node)
    task = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=strategy)(function)
    try:
        return bool(ray.get(task.remote(*arguments), timeout=limit_s * 2))
    except (ray.exceptions.RayError, TimeoutError):
        return all(not n["Alive"] for n in ray.nodes() if n["NodeID"] == process_id.node)


def _on_node(node_id: str) -> NodeAffinitySchedulingStrategy:
    return NodeAffinitySchedulingStrategy(node_id, soft=False)
