"""Keeps what runs on Ray what the spec and the load ask for, as an operator would.

The controller watches all processes, twice a second. One that dies, fails or does not answer for
the heartbeat time-out is ended, with all ranks of its replica, and started again as another process
of that name. Every node is told who is a member. How many replicas of each role there are is the
planner's word (pd/planner.py), and which are started and which are drained is planned in
pd/rollout.py: replicas that the load no longer needs, or whose part of the spec has changed, are
drained: they get nothing new, their requests go on elsewhere with their pages, and then they end.

On a Ray cluster that outlives the controller, so do its processes. The next controller of a spec of
that name adopts them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import ray

from pd.cluster.actor import Report
from pd.cluster.launcher import CAUSE_S, Launcher, Network, Progress, is_alive
from pd.cluster.unit import Phase, Process, StartError, Unit
from pd.node import Order
from pd.planner import Observed, Planner, bounds_of
from pd.rollout import Drain, Replica, Start, Turn, plan_rollout, version_of
from pd.spec import ClusterSpec, Role, SpecError, parse_spec, replica_role

_WATCH_S = 0.5
_POLL_S = 0.1
_PAUSE_S, _MAX_PAUSE_S = 1.0, 60.0
"""Before a unit is started again: none at first, then doubling while it fails..."""
_MOST_FAILURES = 10
"""That are counted."""
_STABLE_S = 20.0
"""... until it has run so long."""
_NO_ROOM_S = 10.0
"""Waiting for resources for so long, there seem to be none."""
_IDLE_REPORTS = 2
"""Of a draining replica, one after the other: what was on its way to it has come."""
_FIRST_API = "api-0"
_DIED = "its process died"
_FIXED = (
    *("name", "page_tokens", "network"),
    *("model.path", "model.name", "model.chat_template", "api.replicas"),
)
"""What a reload cannot change; nor where the API listens, which the command line may have said."""


class TakenOverError(Exception):
    """Another controller has adopted the processes."""


class Controller:
    """Use as: `connect`, `start`, `watch_once` again and again, `stop` always."""

    def __init__(
        self, spec: ClusterSpec, progress: Progress, check: Callable[[], None] = lambda: None
    ) -> None:
        """`check` is called twice a second while waiting, and may raise to end the wait."""
        self.spec = spec
        self._check = check
        self._progress = progress
        self._launcher = Launcher(progress, outlives=bool(os.environ.get("RAY_ADDRESS")))
        self._units: list[Unit] = []
        self._is_starting = True
        self._has_joined = False
        """A unit that the others have not been told of."""
        self._is_connected = False
        self._by_hand: set[str] = set()
        """Replicas that somebody wants replaced."""
        self._state: dict[str, Any] = {}
        """As it was last told."""
        self._planned_at = 0.0
        self._refused: dict[str, int] = {}
        """By API server, as it was last heard."""
        self._use(spec, {})

    @property
    def url(self) -> str:
        return self._launcher.url

    def _use(self, spec: ClusterSpec, counts: dict[Role, int]) -> None:
        """`counts`: replicas that there are."""
        self.spec = spec
        self._versions = {role: version_of(spec, role) for role, _ in spec.roles.items()}
        self._planner = Planner(spec.planner, bounds_of(spec), spec.objectives, counts)
        self._desired = self._planner.desired(time.monotonic())

    # ---------------------------------------------------------------------------------------- start

    def connect(self, replace: bool = False) -> None:
        """To the Ray cluster that this process was started in, else to a local one of its own.
        `replace`: end processes of a controller that is gone, instead of adopting them. Raises
        StartError where another controller lives."""
        address = os.environ.get("RAY_ADDRESS", "")
        namespace = f"pagerelay/{self.spec.name}"
        self._progress(
            f"ray: {'connecting to ' + address if address else 'starting a local cluster'}"
        )
        options: dict[str, Any] = {"address": address or "local"}
        if not address:
            options |= {"include_dashboard": False}
        ray.init(namespace=namespace, log_to_driver=False, logging_level="ERROR", **options)
        self._is_connected = True
        self._launcher.connected()
        self._adopt(namespace, replace)

    def _adopt(self, namespace: str, replace: bool) -> None:
        limit = self.spec.timeouts.heartbeat
        found = self._launcher.find(namespace, limit)
        known = [each for each in found.values() if each is not None]
        if any(is_alive(controller, limit) for controller in {each.controller for each in known}):
            raise StartError(
                f"name: a cluster {self.spec.name!r} is already running on this Ray cluster; "
                "stop it, or choose another name"
            )
        if known and not replace and (problems := _fixed_problems(known[0].config.spec, self.spec)):
            raise StartError(f"{problems}; --replace ends what an earlier controller has left")
        self._units = self._launcher.adopt(found, self.spec, limit)
        if replace and self._units:
            self._progress(f"ending {len(found)} processes that an earlier controller has left")
            self._end_all()
            for unit in self._units:
                if not self._launcher.end(unit, limit):
                    raise StartError(f"{unit.name}: not known to be dead yet")
            self._units = []
            self._launcher.network.clean()
            self._launcher.network = Network.choose(self.spec)
        if self._units:
            names = ", ".join(unit.name for unit in self._units)
            self._progress(f"adopted {names} of an earlier controller")

    def start(self, folder: Path) -> None:
        """Bring up what is missing, with the model in `folder`, and introduce all processes to each
        other. Raises StartError and SpecError for what cannot."""
        self._launcher.folder = folder
        kept = [u.role for u in self._units if u.is_replica and not u.is_draining]
        self._use(self.spec, {role: kept.count(role) for role in self._desired})
        # What serves already is not ended because something else cannot start.
        self._is_starting = not self._units
        there = {unit.name for unit in self._units}
        apis = [f"api-{number}" for number in range(self.spec.api.replicas)]
        self._units += [Unit(name, None) for name in apis if name not in there]
        self._reconcile()
        adopted = self._api_processes()
        while not self._is_ready():
            self.watch_once()
        self._is_starting = False
        self._announce("")
        for process in adopted:
            process.actor.set_spec.remote(self.spec)

    def _is_ready(self) -> bool:
        """All that the spec wants runs; of a cluster that was adopted, an API server."""
        wanted = [unit for unit in self._units if unit.role is None or self._is_starting]
        return all(unit.is_running for unit in wanted if self._is_wanted(unit))

    def _is_wanted(self, unit: Unit) -> bool:
        """For a start to be complete."""
        if not unit.is_replica:
            return True
        return not unit.is_draining and unit.version == self._versions.get(replica_role(unit.role))

    # ---------------------------------------------------------------------------------------- watch

    def watch_once(self) -> None:
        """Look after the processes for half a second: end units of which something has died, start
        what is missing, drain what is too much."""
        self._check()
        self._watch()
        self._plan()
        self._reconcile()
        for unit in list(self._units):
            if unit.is_draining:
                self._drain_further(unit)
            elif not unit.is_running:
                self._restore(unit)
        if self._has_joined:
            self._announce("")
        self._tell_state()

    def _watch(self) -> None:
        running = [unit for unit in self._units if unit.is_running]
        references = [process.ended for unit in running for process in unit.processes]
        ended: list[Any] = []
        wait_s = _POLL_S if self._is_starting else _WATCH_S
        if references:
            ended, _ = ray.wait(references, num_returns=len(references), timeout=wait_s)
        else:
            time.sleep(wait_s)
        for unit in running:
            for process in unit.processes:
                has_died = process.ended in ended and self._has_died(process)
                reason = _DIED if has_died else self._health(unit, process)
                if reason:
                    self._remove(unit, *self._culprit(unit, process, reason))
                    break

    def _culprit(self, unit: Unit, process: Process, reason: str) -> tuple[Process, str]:
        """Where ranks fail because another one has died, that one."""
        if reason != _DIED and len(unit.processes) > 1:
            dead, _ = ray.wait([each.ended for each in unit.processes], timeout=CAUSE_S)
            for each in unit.processes:
                if each.ended in dead:
                    return each, _DIED
        return process, reason

    def _has_died(self, process: Process) -> bool:
        """Raises TakenOverError."""
        try:
            ray.get(process.ended)
        except ray.exceptions.RayError:
            return True
        raise self._taken_over()

    def _taken_over(self) -> TakenOverError:
        self.leave()
        return TakenOverError("another controller has taken over")

    def _ask(self, process: Process) -> None:
        process.report = process.actor.report.remote(self._launcher.id)
        process.report_asked = time.monotonic()

    def _health(self, unit: Unit, process: Process) -> str:
        """Why the process must end, or nothing."""
        now = time.monotonic()
        if process.report is None:
            self._ask(process)
            return ""
        ready, _ = ray.wait([process.report], timeout=0)
        if not ready:
            silent = now - process.report_asked
            limit = self.spec.timeouts.heartbeat
            return f"it has not answered for {silent:.0f} s" if silent > limit else ""
        reference = process.report
        self._ask(process)
        try:
            report: Report = ray.get(reference)
        except ray.exceptions.RayTaskError as error:
            if type(error.cause).__name__ == "Superseded":
                raise self._taken_over() from error
            return f"it cannot say how it is: {error.cause}"
        except ray.exceptions.RayError as error:
            return f"its process died: {type(error).__name__}"
        process.last_report = report
        if process.rank == 0:
            unit.idle_reports = unit.idle_reports + 1 if report.is_idle else 0
        if report.silent:
            self._progress(f"{process.name}: hears nothing from {', '.join(report.silent)}")
        for order in report.orders:
            self._obey(process, order)
        return report.failure

    def _remove(self, unit: Unit, process: Process, reason: str) -> None:
        where = process.where()
        if where and not reason.startswith("rank "):
            reason = f"{where}: {reason}"
        self._progress(f"{unit.name}: gone: {reason}")
        if self._is_starting:
            raise StartError(f"{unit.name}: gone: {reason}")
        if time.monotonic() - unit.since > _STABLE_S:
            unit.failures = 0
        if self._end(unit):
            self._announce(reason)

    def _end(self, unit: Unit) -> bool:
        """Its processes; it is started again after a while, unless it drains. False: try again."""
        was_running = unit.is_running
        if not self._launcher.end(unit, self.spec.timeouts.heartbeat):
            return False
        now = time.monotonic()
        if was_running:
            unit.since = now  # an attempt that fails does not make it missing for less long
        unit.retry_at = now + min(_MAX_PAUSE_S, _PAUSE_S * (2**unit.failures - 1))
        unit.failures = min(unit.failures + 1, _MOST_FAILURES)
        if unit.is_draining:
            self._units.remove(unit)
        return True

    def _restore(self, unit: Unit) -> None:
        """Bring a unit that is missing one step further."""
        now = time.monotonic()
        try:
            if unit.phase is Phase.ABSENT and now >= unit.retry_at and self._knows_port(unit):
                self._launcher.begin_placing(unit, self.spec)
            if unit.phase is Phase.PLACING and self._is_placed(unit):
                self._launcher.begin_starting(unit, self.spec)
            if unit.phase is Phase.STARTING:
                missing = now - unit.since
                if self._launcher.has_started(unit, self.spec.timeouts.start):
                    self._check_compatible(unit)
                    self._joined(unit, missing)
        except (StartError, SpecError, ValueError, ray.exceptions.RayError) as error:
            if self._is_starting and isinstance(error, StartError | SpecError):
                raise
            if self._is_starting:
                raise StartError(f"{unit.name}: {error}") from error
            self._progress(f"{unit.name}: cannot be started: {error}")
            self._end(unit)

    def _knows_port(self, unit: Unit) -> bool:
        """API processes listen where the first one does."""
        return unit.role is not None or unit.name == _FIRST_API or bool(self.url)

    def _joined(self, unit: Unit, missing_s: float) -> None:
        what = f"back after {missing_s:.1f} s" if unit.was_running else "joined"
        unit.phase, unit.was_running = Phase.RUNNING, True
        if self._is_starting:
            return
        self._has_joined = True
        self._progress(f"{unit.name}: {what}")
        if unit.role is None:
            for process in unit.processes:
                process.actor.set_spec.remote(self.spec)
            self._state = {}

    def _is_placed(self, unit: Unit) -> bool:
        """Raises StartError where a start takes too long; else the autoscaler may take its time."""
        if self._launcher.is_placed(unit):
            return True
        limit = self.spec.timeouts.start
        if self._is_starting and time.monotonic() > unit.began + limit:
            assert unit.group is not None
            raise StartError(
                f"{unit.name}: no node offers {unit.group.bundle_specs[0]} within {limit:g} s "
                f"(timeouts.start); the cluster has {_amounts(ray.cluster_resources())}, and free "
                f"are {_amounts(ray.available_resources())}"
            )
        return False

    def _check_compatible(self, unit: Unit) -> None:
        """Replicas of one version must agree on everything that a page's bytes depend on. Raises
        StartError."""
        if not unit.is_replica:
            return
        mine = unit.members[0]
        for each in self._units:
            if each is unit or not each.is_replica or not each.is_running:
                continue
            if each.version != self._versions.get(replica_role(each.role)):
                continue
            other = each.members[0]
            problems = [
                f"{key}: {other.name} has {other.compat[key]}, {mine.name} has "
                f"{mine.compat.get(key)}"
                for key in other.compat
                if other.compat[key] != mine.compat.get(key)
            ]
            if problems and each.name not in self._by_hand:
                raise StartError("replicas do not fit together: " + "; ".join(problems))

    def _announce(self, reason: str) -> None:
        """Tell every live process who is a member: replicas first, since an API server sends them
        requests as soon as it knows them; where one is gone the API first, which moves its requests
        elsewhere. A replica's further ranks hear of it before, and know their leader alone."""
        if self._is_starting:
            return
        self._has_joined = False
        running = [unit for unit in self._units if unit.is_running]
        firsts_of_all = ray.put(
            [
                msgspec.structs.replace(unit.members[0], draining=unit.is_draining)
                for unit in running
            ]
        )
        apis = [unit for unit in running if unit.role is None]
        others = [unit for unit in running if unit.role is not None]
        ranks = [(unit, process) for unit in others for process in unit.processes[1:]]
        firsts = [(unit, unit.processes[0]) for unit in others]
        turns = [ranks, firsts, [(unit, unit.processes[0]) for unit in apis]]
        for turn in reversed(turns) if reason else turns:
            told = [
                process.actor.set_members.remote(unit.members[:1], [], reason)
                if process.rank
                else process.actor.set_members.remote(unit.members[1:], firsts_of_all, reason)
                for unit, process in turn
            ]
            if told:
                # A node that fails, hangs or dies over it is seen by the watch.
                ray.wait(told, num_returns=len(told), timeout=self.spec.timeouts.heartbeat)

    # --------------------------------------------------------------------- how many, and which ones

    def _plan(self) -> None:
        """Have the planner look at the load."""
        now = time.monotonic()
        if self._is_starting or now < self._planned_at + self.spec.planner.interval:
            return
        self._planned_at = now
        seen = {}
        for unit in self._units:
            report = unit.processes[0].last_report if unit.is_running else None
            role = replica_role(unit.role) if unit.is_replica else None
            if role in self._desired and report is not None and report.load is not None:
                seen[unit.name] = Observed(role, report.load, unit.is_draining)
        self._planner.observe(seen, now, self._newly_refused())
        wanted = self._planner.desired(now)
        if wanted != self._desired:
            for role, reason in self._planner.reasons().items():
                if wanted[role] != self._desired.get(role):
                    text = f"{role}: {wanted[role]} wanted, not {self._desired[role]}: {reason}"
                    self._progress(text)
            self._desired = dict(wanted)

    def _newly_refused(self) -> int:
        total = 0
        for process in self._api_processes():
            if process.last_report is not None:
                now = process.last_report.refused
                total += max(now - self._refused.get(process.name, now), 0)
                self._refused[process.name] = now
        return total

    def _reconcile(self) -> None:
        now = time.monotonic()
        replicas = [self._as_replica(unit, now) for unit in self._units if unit.is_replica]
        for action in plan_rollout(replicas, self._desired, self._versions):
            match action:
                case Start(role, name):
                    unit = Unit(name, role, version=self._versions[role], since=now)
                    self._units.append(unit)
                case Drain(name, reason):
                    self._begin_draining(self._unit(name), reason)
                case Turn(name, role):
                    self._begin_draining(self._unit(name), f"{role} needs it")
                    self._unit(name).becomes = role
        self._place_keepers()

    def _unit(self, name: str) -> Unit:
        return next(each for each in self._units if each.name == name)

    def _as_replica(self, unit: Unit, now: float) -> Replica:
        role = replica_role(unit.role)
        report = unit.processes[0].last_report if unit.is_running else None
        load = report.load if report is not None else None
        return Replica(
            unit.name,
            role,
            "" if unit.name in self._by_hand else unit.version,
            unit.is_running,
            unit.is_draining,
            unit.phase is Phase.PLACING and now > unit.began + _NO_ROOM_S,
            load.running + load.waiting + load.handovers_in if load is not None else 0,
            unit.becomes,
        )

    def _place_keepers(self) -> None:
        """One for each node that has replicas, of this version once no replica is of another."""
        replicas = [unit for unit in self._units if unit.is_replica]
        placed = [unit for unit in replicas if unit.phase in (Phase.STARTING, Phase.RUNNING)]
        nodes: dict[str, None] = {}
        wanted: dict[str, None] = {}
        if self.spec.cache.host is not None:
            # A replica that is away comes back where it was, if it can.
            nodes = {node: None for unit in replicas for node in unit.nodes}
            wanted = {node: None for unit in placed for node in unit.nodes}
        version = version_of(self.spec, None)
        keepers = {unit.nodes[0]: unit for unit in self._units if unit.role == "cache"}
        if not all(keeper.is_running for keeper in keepers.values()):
            alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
            nodes = {node: None for node in nodes if node in alive}
        for node, keeper in list(keepers.items()):
            is_stale = keeper.version != version and all(map(self._is_wanted, replicas))
            if node not in nodes or is_stale:
                keeper.draining_since = time.monotonic()
                reason = "its spec has changed" if is_stale else "its node has no replica any more"
                self._progress(f"{keeper.name}: ends: {reason}")
                if self._end(keeper):
                    self._announce("it was ended")
                    del keepers[node]
        taken = {unit.name for unit in self._units}
        for node in wanted:
            if node not in keepers:
                number = next(n for n in range(len(taken) + 1) if f"cache-{n}" not in taken)
                taken.add(f"cache-{number}")
                self._units.append(Unit(f"cache-{number}", "cache", (node,), version))

    # --------------------------------------------------------------------------------------- drains

    def _begin_draining(self, unit: Unit, reason: str) -> None:
        if unit.is_draining:
            unit.becomes = None  # but ends
            return
        if unit.name in self._by_hand:
            self._by_hand.discard(unit.name)
            unit.version = ""
        is_running = unit.is_running
        unit.draining_since, unit.idle_reports = time.monotonic(), 0
        self._progress(f"{unit.name}: {'drains' if is_running else 'ends'}: {reason}")
        if is_running:
            self._announce("")
            self._ask(unit.processes[0])  # what it was asked for before does not count
            unit.idle_reports = 0
        else:
            self._end(unit)

    def _drain_further(self, unit: Unit) -> None:
        """End it when nothing of it is needed any more."""
        if not unit.is_running:
            self._end(unit)  # again
            return
        assert unit.draining_since is not None
        took = time.monotonic() - unit.draining_since
        is_done = unit.idle_reports >= _IDLE_REPORTS and not self._is_source(unit.name)
        if not is_done and took < self.spec.timeouts.drain:
            return
        if not is_done:
            self._progress(f"{unit.name}: is still busy after {took:.0f} s (timeouts.drain)")
        if is_done and unit.becomes is not None and self._turn(unit, unit.becomes, took):
            return
        stopping = [each.actor.stop.remote() for each in unit.processes]
        ray.wait(stopping, num_returns=len(stopping), timeout=self.spec.timeouts.stop)
        if self._end(unit):
            self._announce("it was drained")
            self._progress(f"{unit.name}: ended, drained after {took:.1f} s")

    def _turn(self, unit: Unit, role: Role, took_s: float) -> bool:
        """Another step: it comes to rest, leaves, and is known again as one of the other role.
        False: it cannot."""
        if unit.resting is None:
            unit.resting = unit.processes[0].actor.rest.remote()
        if not ray.wait([unit.resting], timeout=0)[0]:
            return took_s < self.spec.timeouts.drain
        try:
            ray.get(unit.resting)
        except ray.exceptions.RayError as error:
            self._progress(f"{unit.name}: cannot become {role}: {error}")
            return False
        self._progress(f"{unit.name}: drained after {took_s:.1f} s, becomes {role}")
        unit.phase = Phase.STARTING
        self._announce("it changes its role")
        self._launcher.begin_turning(unit, role, self.spec)
        return True

    def _is_source(self, name: str) -> bool:
        """Whether pages there are still wanted elsewhere."""
        reports = (unit.processes[0].last_report for unit in self._units if unit.is_running)
        return any(name in report.sources for report in reports if report is not None)

    # --------------------------------------------------------------------------------------- orders

    def _api_processes(self) -> list[Process]:
        return [
            process
            for unit in self._units
            if unit.role is None and unit.is_running
            for process in unit.processes
        ]

    def _obey(self, process: Process, order: Order) -> None:
        """What people ask for through an API server, which waits for the answer."""
        error, result = "", {}
        try:
            if order.action == "drain":
                self._replace(order.argument)
            else:
                result = {"changes": self._reload(order.argument)}
        except SpecError as problem:
            error = str(problem)
        self._tell_state()  # first, for who asks then
        process.actor.answer.remote(order.serial, error, result)

    def _replace(self, name: str) -> None:
        """Raises SpecError."""
        replicas = [unit for unit in self._units if unit.is_replica and unit.is_running]
        names = sorted(unit.name for unit in replicas if not unit.is_draining)
        if name not in names:
            raise SpecError(f"replica: found {name!r}, expected one of {', '.join(names)}")
        self._by_hand.add(name)

    def _reload(self, text: str) -> list[str]:
        """Take a changed spec. What it changes, for people. Raises SpecError, and then nothing has
        changed."""
        spec = parse_spec(text, "spec")
        kept = {key: getattr(self.spec.api, key) for key in ("host", "port")}
        spec = spec.model_copy(update={"api": spec.api.model_copy(update=kept)})
        if problems := _fixed_problems(self.spec, spec):
            raise SpecError(problems)
        before, after = self.spec.model_dump(mode="json"), spec.model_dump(mode="json")
        changes = sorted(_differences(before, after))
        old = self._versions
        self._use(spec, self._desired)
        rolled = [role for role in self._versions if self._versions[role] != old.get(role)]
        self._progress(
            f"reload: {', '.join(changes) or 'nothing has changed'}"
            + (f"; {' and '.join(rolled)} replicas are replaced" if rolled else "")
        )
        for process in self._api_processes():
            process.actor.set_spec.remote(spec)
        return changes

    def _tell_state(self) -> None:
        """To the API servers, for people."""
        state = {
            "desired": dict(self._desired),
            "reasons": self._planner.reasons(),
            "units": [
                {
                    "name": unit.name,
                    "role": unit.role or "api",
                    "phase": "draining" if unit.is_draining else unit.phase.value,
                    "version": unit.version,
                    "failures": unit.failures,
                }
                for unit in sorted(self._units, key=lambda unit: unit.name)
            ],
        }
        state["settled"] = self._is_settled()
        if state != self._state and not self._is_starting:
            self._state = state
            for process in self._api_processes():
                process.actor.set_state.remote(state)

    def _is_settled(self) -> bool:
        """Nothing is missing, stale or draining."""
        if any(unit.is_draining or not unit.is_running for unit in self._units) or self._by_hand:
            return False
        version = version_of(self.spec, None)
        if any(unit.role == "cache" and unit.version != version for unit in self._units):
            return False
        roles = [unit.role for unit in self._units if unit.is_replica]
        is_complete = all(roles.count(role) == count for role, count in self._desired.items())
        return is_complete and all(map(self._is_wanted, self._units))

    # ----------------------------------------------------------------------------------------- stop

    def stop(self) -> None:
        """End everything that was started; safe at any time, and idempotent."""
        if self._is_connected:
            self._end_all()
            ray.shutdown()
            self._is_connected = False
        self._units = []
        self._launcher.network.clean()

    def leave(self) -> None:
        """Without ending anything; another controller may adopt it."""
        self._units, self._launcher.network = [], Network()

    @property
    def is_serving(self) -> bool:
        """On a cluster that outlives this process, so that another controller can go on."""
        return self._launcher.outlives and not self._is_starting

    def _end_all(self) -> None:
        actors = [p.actor for unit in self._units for p in unit.processes if p.actor is not None]
        stopping = [actor.stop.remote() for actor in actors]
        if stopping:
            ray.wait(stopping, num_returns=len(stopping), timeout=self.spec.timeouts.stop)
        for unit in self._units:
            self._launcher.kill(unit)


def _fixed_problems(before: ClusterSpec, after: ClusterSpec) -> str:
    """What differs and must not; empty: nothing."""
    old, new = before.model_dump(mode="json"), after.model_dump(mode="json")
    return "; ".join(
        f"{path}: found {_at(new, path)!r}, expected {_at(old, path)!r}: it cannot change while "
        "the cluster runs"
        for path in _FIXED
        if _at(old, path) != _at(new, path)
    )


def _at(spec: dict[str, Any], path: str) -> Any:
    value: Any = spec
    for key in path.split("."):
        value = value[key]
    return value


def _differences(before: Any, after: Any, path: str = "") -> list[str]:
    """Paths of what differs."""
    if isinstance(before, dict) and isinstance(after, dict):
        return [
            each
            for key in {*before, *after}
            for each in _differences(
                before.get(key), after.get(key), f"{path}.{key}" if path else str(key)
            )
        ]
    return [] if before == after else [path]


def _amounts(resources: dict[str, float]) -> dict[str, float]:
    """Without what no spec asks for."""
    return {k: v for k, v in resources.items() if not k.startswith(("node:", "memory", "object_"))}
