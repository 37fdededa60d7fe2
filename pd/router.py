"""Which replicas serve a request, and whether it is admitted at all.

Pure: no clock, no socket. One API process owns one router; it sees only what leaders tell, in
reports of their load and of their pages, and what it placed itself since the last report, so two
API processes may choose alike between two reports. The router never waits: a request is placed now,
refused (`Overloaded`) because the queue is full (pd/admission.py) or it would miss its objectives,
or cannot be served (`NoReplica`).

By the policy `cost` a request goes where it is expected to take the least time:

    prefill    (tokens waiting there + its own that are not cached there + those of others that
               will have to be computed again, for their pages are evicted) / measured speed
    transfer   its tokens that the decode replica lacks x measured seconds for each
    decode     requests there x the seconds by which each makes a step longer (its own or the mean,
               whichever is more) x steps of a request, and as much of a request's time as its
               tokens and those that wait before it lack pages, of those in use

Of what is evicted as much is needed again as of all prompts was cached; free pages cost nothing, so
that requests with a common beginning do not crowd where that is while other caches are empty.
Waiting are tokens of its class and of those before it. The first is of the prefill replica, the
others of the decode replica, so that the cheapest of each are the cheapest pair; where there are
several cohorts, which cannot hand over to each other, of each. Against that pair stands a replica
that does both: one with the role `both`, or a decode replica that lacks so little that it prefills
itself. A replica that has not measured something is taken for the mean of the others. What none has
measured counts as nothing, and without any speed a token is the unit of time.

A request's first token is expected when what waits and what it lacks is computed, and its pages are
moved; further tokens as fast as steps were, and as each request more makes them longer. Where this
is more than its class's slack times an objective, it goes where its first token comes soonest, of
the decode replicas that meet the other objective. If that is too late as well, it is refused. What
none has measured refuses nobody, nor does a replica where nothing waits, or for further tokens
nothing is: it will never be faster.

Of replicas that are equal by a policy, the one takes the request on which the fewest tokens were
placed lately: its cache loses the oldest pages. What was placed counts for less and less, to 1/e
when as many tokens were placed as all caches of that role have room for. What is still equal is
settled by a hash that is each router's own, so that several do not all choose alike.

All replicas are looked at for each decision, as vectors (`pd bench router`).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from pd.admission import Admission
from pd.admission import Overloaded as Overloaded
from pd.messages import PagesChanged, PagesHeld, PagesWanted, ReplicaLoad
from pd.page_map import PageMap
from pd.spec import ClusterSpec, ObjectivesSpec, PrioritySpec, Role

Policy: TypeAlias = Literal["cost", "prefix", "least_loaded", "round_robin"]
_Floats: TypeAlias = npt.NDArray[np.float64]
_Ints: TypeAlias = npt.NDArray[np.int64]
_Rows: TypeAlias = tuple[int, int | None]
"""The one that decodes, and the one that prefills, if it is another."""

_NO_PREFILL = -1
_LEAST_S = 1e-9
_EQUAL = 1e-9
"""Costs that differ by less, in proportion, are equal."""
_MEAN_OF = 64
_HEAVY = 1e12
"""Weights of recent placements are scaled down before they get larger."""


class NoReplica(Exception):
    """No replica of a role that the request needs is up."""

    def __init__(self, role: Role) -> None:
        super().__init__(f"no {role} replica is up")
        self.role = role


@dataclass(frozen=True, slots=True)
class Placement:
    decode: str
    prefill: str
    """Empty: the decode replica prefills."""


@dataclass(slots=True)
class ReplicaState:
    """One replica as the router sees it: its last report, and what was placed on it since."""

    name: str
    role: Role
    row: int
    """Its place in the router's vectors."""
    load: ReplicaLoad = ReplicaLoad()  # noqa: RUF009 (frozen)
    draining: bool = False
    """Nothing new is placed here."""
    cohort: str = ""
    """Prefill and decode replicas of one cohort can hand over to each other."""
    placed_requests: int = 0
    placed_tokens: int = 0
    """Those to be computed."""

    def num_requests(self) -> int:
        load = self.load
        return load.waiting + load.running + load.handovers_in + self.placed_requests


def make_router(spec: ClusterSpec, seed: str, num_routers: int = 1) -> Router:
    """One of so many that share the queue."""
    router = spec.router
    return Router(
        -(-router.max_queue // num_routers),
        router.policy,
        spec.page_tokens,
        router.local_prefill_tokens,
        seed,
        spec.cache.device,
        router.classes(),
        spec.objectives,
        num_routers,
    )


class Router:
    def __init__(
        self,
        max_queue: int,
        policy: Policy = "cost",
        page_tokens: int = 64,
        local_prefill_tokens: int = 0,
        seed: str = "",
        has_pages: bool = True,
        classes: Sequence[PrioritySpec] = (PrioritySpec(share=1.0),),
        objectives: ObjectivesSpec = ObjectivesSpec(),  # noqa: B008 (frozen)
        num_routers: int = 1,
    ) -> None:
        """`local_prefill_tokens`: with at most so many missing, leaders prefill where they decode.
        `seed`: another one for each router. `has_pages`: leaders tell what they have cached.
        `classes`: by priority. `num_routers`: that have equal parts of the requests."""
        self.admission = Admission(max_queue, [each.share or 1.0 for each in classes])
        self.policy: Policy = policy
        self.pages = PageMap() if has_pages and policy in ("cost", "prefix") else None
        self._page_tokens = page_tokens
        self._local_prefill_tokens = local_prefill_tokens
        self._seed = seed
        self._replicas: dict[str, ReplicaState] = {}
        self._by_row: list[ReplicaState | None] = []
        self._slack = [each.slack for each in classes]
        self._objectives = objectives
        self._num_routers = num_routers
        self._table = _Table(0, len(classes))
        self._transfers = _Sum()
        """Seconds for each token, by what the replicas have reported since they started."""
        self._outputs = _Sum()
        """Tokens for each request, likewise."""
        self._hits = _Sum()
        """Of the prompts' tokens, those that were cached."""
        self._prefilling, self._decoding, self._both = (_Candidates() for _ in range(3))
        self._prefills: list[_Ints] = []
        """Rows of prefill replicas, by cohort that has some."""
        self._pairs = self._alone = np.zeros(0, np.int64)
        """Rows that decode: with a prefill replica of their cohort, and by themselves."""
        self._turn = 0

    # ----------------------------------------------------------------------- what the replicas tell

    def update(
        self,
        replica: str,
        role: Role,
        load: ReplicaLoad | None,
        now: float = 0.0,
        *,
        cohort: str | None = None,
        draining: bool | None = None,
    ) -> PagesWanted | None:
        """A replica is up; `load` is its report, None when it has not sent one yet; None for the
        others is what was said before, at first "" and False. What is returned is to be sent to it.
        `now`: seconds of any clock that does not go back."""
        wanted = None
        known = self._replicas.get(replica)
        if known is None or known.role != role or (cohort is not None and known.cohort != cohort):
            self.remove(replica)
            known = self._add(replica, role, cohort or "")
            if self.pages is not None:
                wanted = self.pages.join(replica, known.row, now)
        elif load is not None and self.pages is not None:
            wanted = self.pages.reported(replica, load.pages_told, now)
        if draining is not None and draining != known.draining:
            known.draining = draining
            self._find_candidates()
        if load is not None:
            known.load = load
            known.placed_requests = known.placed_tokens = 0
            self._reported(known)
        return wanted

    def receive_pages(
        self, replica: str, message: PagesChanged | PagesHeld, now: float
    ) -> PagesWanted | None:
        """What is returned is to be sent to the replica."""
        return self.pages.receive(replica, message, now) if self.pages is not None else None

    def drain(self, replica: str) -> None:
        """Nothing new is placed on `replica`; unknown names are ignored."""
        known = self._replicas.get(replica)
        if known is not None:
            self.update(replica, known.role, None, draining=True)

    def remove(self, replica: str) -> None:
        """Nothing is placed on `replica` until the next `update`; unknown names are ignored."""
        known = self._replicas.pop(replica, None)
        if known is None:
            return
        if self.pages is not None:
            self.pages.leave(replica)
        self._by_row[known.row] = None
        self._transfers.forget(replica)
        self._outputs.forget(replica)
        self._hits.forget(replica)
        self._table.clear(known.row)
        self._find_candidates()

    def _add(self, replica: str, role: Role, cohort: str) -> ReplicaState:
        if None not in self._by_row:
            self._by_row += [None] * max(len(self._by_row), 8)
            self._table = self._table.grown(len(self._by_row))
        row = self._by_row.index(None)
        state = ReplicaState(replica, role, row, cohort=cohort)
        self._replicas[replica] = self._by_row[row] = state
        digest = hashlib.sha256(f"{self._seed}/{replica}".encode()).digest()
        self._table.tie[row] = int.from_bytes(digest[:6], "little")
        self._find_candidates()
        return state

    def _find_candidates(self) -> None:
        table = self._table
        lists: dict[Role, list[int]] = {"prefill": [], "decode": [], "both": []}
        prefills: dict[str, list[int]] = {}
        for state in self.replicas():
            if not state.draining:
                lists[state.role].append(state.row)
                if state.role == "prefill":
                    prefills.setdefault(state.cohort, []).append(state.row)
        for role, rows in lists.items():
            candidates = self._candidates(role)
            candidates.rows = np.array(rows, np.int64)
            candidates.room = float(table.room[candidates.rows].sum())
        self._prefills = [np.array(rows, np.int64) for rows in prefills.values()]
        numbers = {cohort: number for number, cohort in enumerate(prefills)}
        table.cohort[:] = _NO_PREFILL
        for row in lists["decode"]:
            table.cohort[row] = numbers.get(self._state(row).cohort, _NO_PREFILL)
        decoding = np.array(lists["decode"] + lists["both"], np.int64)
        has_prefill = table.cohort[decoding] != _NO_PREFILL
        self._pairs, self._alone = decoding[has_prefill], decoding[~has_prefill]

    def _reported(self, state: ReplicaState) -> None:
        load, table, row = state.load, self._table, state.row
        table.requests[row] = state.num_requests()
        table.tokens[:, row] = load.waiting_tokens
        if load.waiting_tokens_by_priority:
            by_class = load.waiting_tokens_by_priority
            for priority in range(len(self._slack) - 1):
                table.tokens[priority, row] = sum(by_class[: priority + 1])
        table.speed.put(row, load.prefill_tokens_per_s)
        table.slowdown.put(row, load.decode_s_per_request)
        if load.decode_steps:
            others_s = load.decode_s_per_request * load.decode_step_tokens
            table.step.put(row, max(load.decode_step_s - others_s, _LEAST_S) / load.decode_steps)
        pages = zip(load.pages_free, load.pages_cached, load.pages_used, strict=False)
        room = float(max(map(sum, pages), default=0) * self._page_tokens)
        table.free[row] = max(load.pages_free, default=0) * self._page_tokens
        unused = map(sum, zip(load.pages_free, load.pages_cached, strict=False))
        table.available[row] = max(unused, default=0) * self._page_tokens if room else math.inf
        if not state.draining:
            self._candidates(state.role).room += room - table.room[row]
        table.room[row] = room
        self._transfers.put(state.name, load.kv_seconds, load.kv_pages * self._page_tokens)
        self._outputs.put(state.name, load.decode_tokens, load.finished)
        cached = load.cached_tokens
        self._hits.put(state.name, cached, cached + load.prefill_tokens)

    def _candidates(self, role: Role) -> _Candidates:
        return {"prefill": self._prefilling, "decode": self._decoding, "both": self._both}[role]

    def replicas(self) -> list[ReplicaState]:
        """By name; live objects, for reading."""
        return sorted(self._replicas.values(), key=lambda replica: replica.name)

    def role_of(self, replica: str) -> Role | None:
        """None: that replica is not up."""
        known = self._replicas.get(replica)
        return known.role if known else None

    # ------------------------------------------------------------------------------------ admission

    @property
    def in_flight(self) -> int:
        return self.admission.in_flight

    @property
    def max_queue(self) -> int:
        return self.admission.max_queue

    def check_room(
        self, num_requests: int, tenant: str = "", priority: int = 0, now: float = 0.0
    ) -> None:
        """Raise Overloaded where `admit` would, so that no work is done for what it will refuse."""
        self.admission.check_room(num_requests, tenant, self._class(priority), now)

    def admit(
        self, num_requests: int, tenant: str = "", priority: int = 0, now: float = 0.0
    ) -> None:
        """Count `num_requests` as in flight until `release`, or raise Overloaded and count none."""
        self.admission.admit(num_requests, tenant, self._class(priority), now)

    def release(self, tenant: str = "", now: float = 0.0) -> None:
        """One admitted request has ended."""
        self.admission.release(tenant, now)

    def _check_objectives(
        self, missing: _Floats, priority: int, rows: _Rows, now: float
    ) -> Overloaded | None:
        """Why a request that is placed there is to be refused."""
        table, (decode, prefill) = self._table, rows
        limit = self._limit(self._objectives.ttft, priority)
        if limit is not None and table.speed.num_known:
            row = decode if prefill is None else prefill
            speed = float(table.speed.or_mean(1.0)[row])
            waiting_s = float(table.tokens[priority, row]) / speed
            first_s = waiting_s + float(missing[row]) / speed
            if prefill is not None:
                first_s += float(missing[decode]) * self._transfers.mean(0.0)
            if waiting_s > 0 and first_s > limit:
                text = f"the first token is expected after {first_s:.3g} s, of at most {limit:.3g}"
                return Overloaded(text, min(first_s - limit, waiting_s))
        limit = self._limit(self._objectives.tpot, priority)
        if limit is not None and table.step.num_known:
            token_s, num_requests = float(self._token_s()[decode]), float(table.requests[decode])
            if num_requests > 0 and token_s > limit:
                text = f"a token is expected every {token_s:.3g} s, of at most {limit:.3g}"
                slowdown = float(table.slowdown.or_mean(0.0)[decode])
                excess = min(num_requests, (token_s - limit) / max(slowdown, _LEAST_S))
                num_ends = math.ceil(excess) * (len(self._pairs) + len(self._alone))
                own = math.ceil(num_ends / self._num_routers)
                return Overloaded(text, self.admission.seconds_for(own, now))
        return None

    def _limit(self, objective: float | None, priority: int) -> float | None:
        slack = self._slack[priority]
        return None if objective is None or slack is None else slack * objective

    def _token_s(self) -> _Floats:
        """By row, from one token to the next, with one request more."""
        table = self._table
        return table.step.or_mean(0.0) + table.slowdown.or_mean(0.0) * (table.requests + 1)

    # ------------------------------------------------------------------------------------ placement

    def place(
        self,
        num_prompt_tokens: int,
        page_hashes: bytes = b"",
        beside: Placement | None = None,
        priority: int = 0,
        *,
        may_refuse: bool = False,
        now: float = 0.0,
    ) -> Placement:
        """Where a prompt goes, which counts there until the next report; `page_hashes` of its full
        pages lie end to end.

        `beside` is chosen again while both its replicas take requests: the same prompt's pages are
        cached there. Without a prefill replica the decode replica prefills. Raises NoReplica and,
        if it `may_refuse`, Overloaded.
        """
        if not len(self._pairs) and not len(self._alone):
            raise NoReplica("decode")
        priority = self._class(priority)
        missing = self._missing(num_prompt_tokens, page_hashes)
        if beside is not None and self._takes_requests(beside):
            decode = self._replicas[beside.decode].row
            prefill = self._replicas[beside.prefill].row if beside.prefill else None
        else:
            decode, prefill = self._plan_placement(missing, priority)
        if may_refuse and self._check_objectives(missing, priority, (decode, prefill), now):
            decode, prefill = self._plan_soonest(missing, priority)
            if refusal := self._check_objectives(missing, priority, (decode, prefill), now):
                raise refusal
        self._count(decode, priority, float(missing[decode]), prefill is None)
        if prefill is not None:
            self._count(prefill, priority, float(missing[prefill]), True)
        return Placement(self._name(decode), self._name(prefill) if prefill is not None else "")

    def _class(self, priority: int) -> int:
        """Of one that was known before a reload the lowest."""
        return min(priority, len(self._slack) - 1)

    def most(self, priority: int) -> int:
        """Requests of this class that fit, where there are no others."""
        return self.admission.most(self._class(priority))

    def _takes_requests(self, placement: Placement) -> bool:
        states = map(self._replicas.get, filter(None, (placement.decode, placement.prefill)))
        return all(state is not None and not state.draining for state in states)

    def _missing(self, num_tokens: int, page_hashes: bytes) -> _Floats:
        """By row, how many tokens of the prompt are not cached there; at least the last one, whose
        logits are needed."""
        if self.pages is None:
            return np.full(len(self._by_row), float(num_tokens))
        num_pages = (num_tokens - 1) // self._page_tokens
        matched = self.pages.match(page_hashes, num_pages, len(self._by_row))
        return num_tokens - matched * self._page_tokens

    def _plan_placement(self, missing: _Floats, priority: int) -> _Rows:
        table = self._table
        match self.policy:
            case "cost":
                return self._plan_by_cost(missing, priority)
            case "round_robin":
                self._turn += 1
                decoding = np.concatenate((self._decoding.rows, self._both.rows))
                decode = int(decoding[self._turn % len(decoding)])
                rows = self._prefills_for(decode)
                return decode, int(rows[self._turn % len(rows)]) if len(rows) else None
        loads = (table.requests, table.tokens[priority])
        by_prefix = (missing,) if self.policy == "prefix" else ()
        decoding = np.concatenate((self._decoding.rows, self._both.rows))
        decode = self._least(decoding, *by_prefix, *loads)
        rows = self._prefills_for(decode)
        if not len(rows):
            return decode, None
        return decode, self._least(rows, *by_prefix, *reversed(loads))

    def _prefills_for(self, decode: int) -> _Ints:
        cohort = int(self._table.cohort[decode])
        return self._prefills[cohort] if cohort != _NO_PREFILL else np.zeros(0, np.int64)

    def _plan_by_cost(self, missing: _Floats, priority: int) -> _Rows:
        table = self._table
        queued = table.tokens[priority] + missing
        evicted = missing - table.free
        work = queued + self._hits.mean(0.0) * np.maximum(evicted, 0.0, out=evicted)
        outputs = self._outputs.mean(1.0)
        # A replica's own is noisy: one near 0 would make it look free, however many are there.
        slowdown = table.requests * table.slowdown.at_least_mean()
        slowdown *= outputs
        # Others must end before there are pages for it.
        (full,) = (queued > table.available).nonzero()
        if len(full):
            available = table.available[full]
            in_use = np.maximum(table.room[full] - available, 1.0)
            slowdown[full] += (queued[full] - available) / in_use * self._token_s()[full] * outputs
        compute = work / table.speed.or_mean(1.0)
        return self._cheapest(self._pairs, self._alone, missing, compute, slowdown)

    def _plan_soonest(self, missing: _Floats, priority: int) -> _Rows:
        """Where the first token is expected first, of those that meet the objective for further
        ones, if any do."""
        table, pairs, alone = self._table, self._pairs, self._alone
        limit = self._limit(self._objectives.tpot, priority)
        if limit is not None and table.step.num_known:
            is_fast = (self._token_s() <= limit) | (table.requests == 0)
            if is_fast[pairs].any() or is_fast[alone].any():
                pairs, alone = pairs[is_fast[pairs]], alone[is_fast[alone]]
        compute = (table.tokens[priority] + missing) / table.speed.or_mean(1.0)
        return self._cheapest(pairs, alone, missing, compute, np.zeros_like(compute))

    def _cheapest(
        self, pairs: _Ints, alone: _Ints, missing: _Floats, compute: _Floats, slowdown: _Floats
    ) -> _Rows:
        """`pairs` and `alone`: rows that decode. The others, in seconds by row."""
        table = self._table
        if len(pairs):
            lacking = missing[pairs]
            if lacking[lacking.argmin()] <= self._local_prefill_tokens:
                is_local = lacking <= self._local_prefill_tokens
                alone = np.concatenate((pairs[is_local], alone))
                pairs = pairs[~is_local]
        best, decode, prefill = math.inf, -1, None
        if len(pairs):
            prefills = [self._least(rows, compute) for rows in self._prefills]
            later = missing * self._transfers.mean(0.0) + slowdown
            total = later + compute[prefills][table.cohort] if len(prefills) > 1 else later
            decode = self._least(pairs, total, table.requests, missing)
            prefill = prefills[table.cohort[decode]]
            best = float(compute[prefill] + later[decode])
        if len(alone):
            total = compute + slowdown
            candidate = self._least(alone, total, table.requests)
            if total[candidate] <= best:
                return candidate, None
        return decode, prefill

    def _least(self, rows: _Ints, *keys: _Floats) -> int:
        """Of some rows the one with the least first key, of those equal in that the one with the
        least second key, and so on."""
        table = self._table
        for key in (*keys, table.recent, table.tie):
            if len(rows) == 1:
                break
            values = key[rows]
            least = values[values.argmin()]  # half the time of min()
            rows = rows[values <= least + abs(least) * _EQUAL]
        return int(rows[0])

    def _state(self, row: int) -> ReplicaState:
        state = self._by_row[row]
        assert state is not None
        return state

    def _name(self, row: int) -> str:
        return self._state(row).name

    def _count(self, row: int, priority: int, missing: float, computes: bool) -> None:
        """A request was placed here. Its pages will be cached, wherever they are computed."""
        state, table = self._state(row), self._table
        state.placed_requests += 1
        table.requests[row] += 1
        table.free[row] -= missing
        table.available[row] -= missing
        if computes:
            state.placed_tokens += int(missing)
            table.tokens[priority:, row] += missing
        candidates = self._candidates(state.role)
        if candidates.room:
            candidates.weight *= math.exp(missing / candidates.room)
        table.recent[row] += missing * candidates.weight
        if candidates.weight > _HEAVY:
            table.recent[candidates.rows] /= candidates.weight
            candidates.weight = 1.0


class _Candidates:
    """The replicas of a role, by name."""

    def __init__(self) -> None:
        self.rows: _Ints = np.zeros(0, np.int64)
        self.room = 0.0
        """Tokens for which all of them have pages."""
        self.weight = 1.0
        """Of tokens placed now; those placed before have less."""


class _Sum:
    """What each replica has counted of two things; how much of the first for each of the second."""

    def __init__(self) -> None:
        self._of: dict[str, tuple[float, float]] = {}
        self._first = self._second = 0.0

    def put(self, replica: str, first: float, second: float) -> None:
        self.forget(replica)
        self._of[replica] = first, second
        self._first += first
        self._second += second

    def forget(self, replica: str) -> None:
        first, second = self._of.pop(replica, (0.0, 0.0))
        self._first -= first
        self._second -= second

    def mean(self, unknown: float) -> float:
        return self._first / self._second if self._second > 0 and self._first > 0 else unknown


class _Table:
    """What is known of the replicas, by row."""

    def __init__(self, num_rows: int, num_classes: int) -> None:
        self.requests = np.zeros(num_rows)
        self.tokens = np.zeros((num_classes, num_rows))
        """To be computed, by class; of a class and those before it."""
        self.speed = _Measured(num_rows)
        """Of prefill, in tokens a second."""
        self.slowdown = _Measured(num_rows)
        """Seconds by which a request makes a step longer."""
        self.step = _Measured(num_rows)
        """Seconds that a step would take without requests."""
        self.room = np.zeros(num_rows)
        """Tokens."""
        self.available = np.full(num_rows, math.inf)
        """Of them, those that are free or cached, less what was placed since; no end where nothing
        was told."""
        self.free = np.zeros(num_rows)
        """Of them, where nothing is cached; below 0 where it will be evicted."""
        self.recent = np.zeros(num_rows)
        """Tokens placed, by their weights."""
        self.tie = np.zeros(num_rows)
        self.cohort = np.zeros(num_rows, np.int64)
        """Of a decode replica, its number among those that have prefill replicas."""

    def grown(self, num_rows: int) -> _Table:
        """With more rows, of zeros."""
        table = _Table(num_rows, len(self.tokens))
        for ours, theirs in zip(self._vectors(), table._vectors(), strict=True):
            theirs[: len(ours)] = ours
        for mine, other in zip(self._measured(), table._measured(), strict=True):
            for row, value in enumerate(mine.values):
                other.put(row, value)
        return table

    def clear(self, row: int) -> None:
        for measured in self._measured():
            measured.put(row, 0.0)
        for values in self._vectors():
            values[row] = 0.0
        self.available[row] = math.inf

    def _vectors(self) -> list[_Floats]:
        of_pages = [self.room, self.free, self.available]
        return [self.requests, *self.tokens, *of_pages, self.recent, self.tie]

    def _measured(self) -> list[_Measured]:
        return [self.speed, self.slowdown, self.step]


class _Measured:
    """A positive quantity by row, 0 where it is unknown.

    Means are as they were when a replica's became known or unknown, or when one in `_MEAN_OF` had
    told theirs anew."""

    def __init__(self, num_rows: int) -> None:
        self.values = np.zeros(num_rows)
        self.num_known = 0
        self._mean = 0.0
        self._filled = self._at_least_mean = self.values
        self._is_stale = True
        """The mean and these two are to be made anew."""
        self._num_told = 0

    def put(self, row: int, value: float) -> None:
        was_known = self.values[row] > 0
        self.values[row] = value
        self.num_known += (value > 0) - int(was_known)
        self._num_told += 1
        if was_known and value > 0 and self._num_told * _MEAN_OF < self.num_known:
            if not self._is_stale:
                self._filled[row] = value
                self._at_least_mean[row] = max(value, self._mean)
        elif was_known or value > 0:
            self._is_stale = True

    def mean(self, unknown: float) -> float:
        if self._is_stale:
            self._fill()
        return self._mean if self.num_known else unknown

    def or_mean(self, unknown: float) -> _Floats:
        """For unknown ones the mean of the others, or `unknown` if there is none. Not to be written
        to."""
        if self._is_stale:
            self._fill()
        return self._filled if self.num_known else np.full(len(self.values), unknown)

    def at_least_mean(self) -> _Floats:
        """Not to be written to."""
        if self._is_stale:
            self._fill()
        return self._at_least_mean

    def _fill(self) -> None:
        self._num_told, self._is_stale = 0, False
        self._mean = float(self.values.sum() / self.num_known) if self.num_known else 0.0
        self._filled = np.where(self.values > 0, self.values, self._mean)
        self._at_least_mean = np.maximum(self._filled, self._mean)
