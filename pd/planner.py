"""How many replicas of each role are wanted. Pure: loads and the time come in, numbers come out.

Replicas are added at once, as many as the load needs (pd/demand.py), when all looks of `up_after`
seconds agree, and taken away slowly, by the largest need of `down_after` seconds, counted with a
lower load for each: a steady load does not move the number back and forth. When `max_replicas` are
there, a role takes replicas from one that is distinctly less loaded even without them.

Silence is not idleness: a role of which no replica reports keeps its number. Replicas that are
starting are not asked for again: until they are there, what waits adds none.
"""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from collections.abc import Callable, Mapping

from pd.demand import NO_PROMPTS, Meter, Need, Prompts, replicas_for_ttft
from pd.messages import ReplicaLoad
from pd.spec import ClusterSpec, ObjectivesSpec, PlannerSpec, Role

_REFUSED_S = 10.0
"""So long refused requests count."""
_START_S = 10.0
"""Until added replicas are there, as long as that has not been measured."""
_MOST_START_S = 300.0
"""Believed: more is a wait for a node that was not to be had."""
_MOST_GROWTH = 4.0
"""Of load that is not seen yet: of requests that are refused or held up."""


@dataclasses.dataclass(frozen=True, slots=True)
class RoleBounds:
    minimum: int
    maximum: int
    batch: int = 64
    """The most requests in a replica's batch."""
    stages: int = 1
    """Of its pipeline: steps in flight, each with its share of the batch."""


@dataclasses.dataclass(frozen=True, slots=True)
class Observed:
    """A running replica."""

    role: Role
    load: ReplicaLoad
    draining: bool = False


def bounds_of(spec: ClusterSpec) -> dict[Role, RoleBounds]:
    return {
        role: RoleBounds(each.replicas.min, each.replicas.max, each.max_running, each.topology.pp)
        for role, each in spec.roles.items()
    }


class Planner:
    """Use as: `observe`, then `desired`, again and again. Times are monotonic, in seconds."""

    def __init__(
        self,
        spec: PlannerSpec,
        bounds: dict[Role, RoleBounds],
        objectives: ObjectivesSpec = ObjectivesSpec(),  # noqa: B008 (frozen)
        counts: Mapping[Role, int] | None = None,
    ) -> None:
        """`counts`: to start from, as far as within bounds; default: the minimum of each role."""
        self._spec = spec
        self._objectives = objectives
        self._meters = {role: Meter() for role in bounds}
        self._counts = {
            role: _Count(each, spec, (counts or {}).get(role, 0)) for role, each in bounds.items()
        }
        self._last: dict[str, Observed] = {}
        """Also of replicas that are gone: they may come back, with their counters or without."""
        self._refused: deque[tuple[float, int]] = deque()

    def observe(self, replicas: dict[str, Observed], now: float, refused: int = 0) -> None:
        """The running replicas by name, and the requests refused since the last call, those
        included for which there was no replica."""
        self._refused.append((now, refused))
        while self._refused[0][0] <= now - _REFUSED_S:
            self._refused.popleft()
        for name, seen in replicas.items():
            before = self._last.get(name)
            if before is not None:
                self._meters[seen.role].add(before.load, seen.load)
            self._last[name] = seen
        for role, count in self._counts.items():
            present = [each for each in replicas.values() if each.role == role]
            self._meters[role].note([each.load for each in present], now)
            count.note(sum(not each.draining for each in present), now)
        for role, count in self._counts.items():
            if count.num_running or not count.desired:
                count.look(self._need(role), now)

    def desired(self, now: float) -> dict[Role, int]:
        """How many replicas of each role there should be."""
        counts = self._counts
        for count in counts.values():
            count.shrink(now)
        while wanting := [role for role, count in counts.items() if count.wants_more(now)]:
            role = max(wanting, key=lambda each: counts[each].load(now))
            if not self._make_room(role, now):
                break
            counts[role].grow(now)
        return {role: count.desired for role, count in counts.items()}

    def reasons(self) -> dict[Role, str]:
        """For people: why so many."""
        return {role: count.reason for role, count in self._counts.items()}

    def _make_room(self, role: Role, now: float) -> bool:
        """For another replica of this role, if need be at the cost of another role."""
        most = self._spec.max_replicas
        if most is None or sum(count.desired for count in self._counts.values()) < most:
            return True
        others = [
            count
            for other, count in self._counts.items()
            if other != role and count.desired > count.bounds.minimum
        ]
        donor = min(others, key=lambda count: count.load_with_one_less(now), default=None)
        distinct = self._spec.down / self._spec.up * self._counts[role].load(now)
        if donor is None or donor.load_with_one_less(now) > distinct:
            return False
        donor.give(role, now)
        return True

    # ----------------------------------------------------------------------------------------- need

    def _need(self, role: Role) -> Need:
        spec, count, meter = self._spec, self._counts[role], self._meters[role]
        prompts = self._prompts(role)
        refused = sum(number for _, number in self._refused)
        unseen = self._unseen(refused)
        work = prompts.work * unseen
        soon_s = max(count.start_s, self._wait_s(prompts, 1.0))
        waiting = meter.waiting(soon_s) if role == "decode" else 0.0

        def needs(load: float, waiting: float, backlog_s: float) -> list[tuple[float, str]]:
            """Replicas with this load, and what takes them."""
            found = [
                (work / load, f"prompts keep {work:.2f} busy"),
                (work + backlog_s / soon_s, f"{backlog_s:.1f} s of prompts wait"),
                (float(refused > 0 and role != "prefill"), "requests are refused"),
            ]
            wait_s = self._wait_s(prompts, load / spec.up)
            if wait_s:
                enough = replicas_for_ttft(work, prompts.each_s, wait_s, count.bounds.maximum)
                found.append((float(enough), f"prompts may wait {wait_s:.3g} s for TTFT"))
            if role != "prefill":
                found += self._decode_needs(role, work, unseen, load, waiting)
            return found

        up = needs(spec.up, *((0.0, 0.0) if count.is_starting else (waiting, prompts.backlog_s)))
        down = needs(spec.down, waiting, prompts.backlog_s)
        most, why = max(up, key=lambda need: need[0])
        return Need(most, max(need for need, _ in down), why)

    def _decode_needs(
        self, role: Role, work: float, unseen: float, load: float, waiting: float
    ) -> list[tuple[float, str]]:
        meter, bounds = self._meters[role], self._counts[role].bounds
        places, what = meter.places(bounds.batch)
        requests = meter.in_batches() + waiting
        by_place = requests / (load * places), f"{requests:.0f} requests, {places:.0f} {what} each"
        if self._objectives.tpot is not None:
            for_tpot = meter.places_for_tpot(bounds.stages, self._objectives.tpot)
            places, what = min((places, what), (for_tpot, "for TPOT"))
        growth = min(unseen * self._held_up(role), _MOST_GROWTH)
        decode = growth * meter.decoding(load * places, bounds.stages)
        why = f"prompts keep {work:.2f} busy, decode {decode:.2f} (batches of {load * places:.1f}"
        return [by_place, (work / load + decode, f"{why}: {what})")]

    def _prompts(self, role: Role) -> Prompts:
        """Without a running prefill replica the decode replicas compute those that it should."""
        has_none = "prefill" in self._counts and not self._counts["prefill"].num_running
        if role == "prefill" and has_none and "decode" in self._meters:
            return self._meters["decode"].prompts()
        if role == "decode":
            return NO_PROMPTS if has_none else self._meters["decode"].busy_with_prompts()
        return self._meters[role].prompts()

    def _wait_s(self, prompts: Prompts, share: float) -> float:
        """A share of what `objectives.ttft` leaves for waiting; 0: nothing, or no objective."""
        ttft = self._objectives.ttft
        return max(0.0, (ttft - prompts.each_s) * share) if ttft is not None else 0.0

    def _unseen(self, refused: int) -> float:
        """By how much more load there would be if no request were refused."""
        arrived = sum(self._meters[role].arrived for role in self._meters if role != "prefill")
        return min(1 + refused / arrived, _MOST_GROWTH) if arrived else 1.0

    def _held_up(self, role: Role) -> float:
        """By how much more decode load there would be if no request had to wait."""
        if role == "decode" and "prefill" in self._meters:
            prefill = self._meters["prefill"].prompts().held_up
            return prefill * self._meters[role].held_up
        return self._meters[role].prompts().held_up


class _Count:
    """The number of replicas of one role."""

    def __init__(self, bounds: RoleBounds, spec: PlannerSpec, start: int) -> None:
        self.bounds = bounds
        self.desired = min(max(start, bounds.minimum), bounds.maximum)
        self.num_running = 0
        self.start_s = _START_S
        self.reason = "as before" if self.desired == start else "replicas.min"
        self._spec = spec
        self._looks: deque[tuple[float, Need]] = deque()
        self._changed_at = -math.inf
        self._grown_at: float | None = None

    @property
    def is_starting(self) -> bool:
        return self.num_running < self.desired

    def note(self, num_running: int, now: float) -> None:
        self.num_running = num_running
        if self._grown_at is not None and not self.is_starting:
            self.start_s, self._grown_at = min(now - self._grown_at, _MOST_START_S), None

    def look(self, need: Need, now: float) -> None:
        self._looks.append((now, need))
        oldest = now - max(self._spec.up_after, self._spec.down_after)
        while len(self._looks) > 1 and self._looks[1][0] <= oldest:
            self._looks.popleft()

    def wants_more(self, now: float) -> bool:
        least = self._recent(now, min).up
        return min(_whole(least), self.bounds.maximum) > self.desired

    def load(self, now: float) -> float:
        """The least of late, of each replica; 1: `up`."""
        return self._recent(now, min).up / self.desired if self.desired else math.inf

    def load_with_one_less(self, now: float) -> float:
        """Likewise, the most."""
        most = self._recent(now, max).up
        return most / (self.desired - 1) if self.desired > 1 else math.inf if most else 0.0

    def grow(self, now: float) -> None:
        self._change(self.desired + 1, self._recent(now, min).why, now)
        self._grown_at = now

    def give(self, role: Role, now: float) -> None:
        self._change(self.desired - 1, f"one goes to {role}, which needs it more", now)

    def shrink(self, now: float) -> None:
        """By a quarter at most, if few have sufficed for long."""
        needs = self._since(now - self._spec.down_after)
        if not needs or now - self._changed_at < self._spec.down_after:
            return
        most = max(needs, key=lambda need: need.down)
        fewer = self.desired - max(1, self.desired // 4)
        number = max(_whole(most.down), fewer, self.bounds.minimum)
        if number < self.desired:
            self._change(number, f"at most {most.down:.2f} are needed: {most.why}", now)

    def _change(self, number: int, why: str, now: float) -> None:
        self.desired, self.reason = number, why
        self._changed_at = now

    def _recent(self, now: float, which: Callable[..., Need]) -> Need:
        """The least or greatest need of `up_after`; while that is not known, what there is."""
        there = Need(self.desired, self.desired, self.reason)
        needs = self._since(now - self._spec.up_after) or [there]
        return which(needs, key=lambda need: need.up)

    def _since(self, begin: float) -> list[Need]:
        """The looks from then on; none, if they do not reach back so far."""
        if not self._looks or self._looks[0][0] > begin:
            return []
        return [need for at, need in self._looks if at >= begin] or [self._looks[-1][1]]


def _whole(replicas: float) -> int:
    return math.ceil(replicas - 1e-9) if math.isfinite(replicas) else 2**31
