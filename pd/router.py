"""Which replicas serve a request, and whether it is admitted at all.

Pure: no clock, no socket. One API process owns one router; it sees only what leaders tell, in
reports of their load and of their pages, and what it placed itself since the last report, so two
API processes may choose alike between two reports. The router never waits: a request is placed now,
refused because its queue is full (`Overloaded`), or cannot be served (`NoReplica`).

By the policy `cost` a request goes where it is expected to take the least time:

    prefill    (tokens waiting there + its own that are not cached there + those of others that
               will have to be computed again, for their pages are evicted) / measured speed
    transfer   its tokens that the decode replica lacks x measured seconds for each
    decode     requests there x the seconds by which each makes a step longer x steps of a request

Of what is evicted as much is needed again as of all prompts was cached; free pages cost nothing, so
that requests with a common beginning do not crowd where that is while other caches are empty.
The first is of the prefill replica, the others of the decode replica, so that the cheapest of each
are the cheapest pair. Against that pair stands a replica that does both: one with the role `both`,
or a decode replica that lacks so little that it prefills itself. A replica that has not measured
something is taken for the mean of the others. What none has measured counts as nothing, and without
any speed a token is the unit of time.

Of replicas that are equal by a policy, the one takes the request on which the fewest tokens were
placed lately: its cache loses the oldest pages. What was placed counts for less and less, to 1/e
when as many tokens were placed as all caches of that role have room for. What is still equal is
settled by a hash that is each router's own, so that several do not all choose alike.

All replicas are looked at for each decision, as vectors (`pd bench router`).
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from pd.messages import PagesChanged, PagesHeld, PagesWanted, ReplicaLoad
from pd.page_map import PageMap
from pd.spec import ClusterSpec, Role

Policy: TypeAlias = Literal["cost", "prefix", "least_loaded", "round_robin"]
_Floats: TypeAlias = npt.NDArray[np.float64]
_Ints: TypeAlias = npt.NDArray[np.int64]

RETRY_AFTER_S = 1
"""Of a refused request, in whole seconds, as HTTP's Retry-After wants them."""
_EQUAL = 1e-9
"""Costs that differ by less, in proportion, are equal."""
_HEAVY = 1e12
"""Weights of recent placements are scaled down before they get larger."""


class NoReplica(Exception):
    """No replica of a role that the request needs is up."""

    def __init__(self, role: Role) -> None:
        super().__init__(f"no {role} replica is up")
        self.role = role


class Overloaded(Exception):
    """Too many requests are admitted and unfinished; nothing was done for this one."""

    def __init__(self, in_flight: int, max_queue: int, retry_after_s: int) -> None:
        super().__init__(
            f"{in_flight} requests are queued or running, of at most {max_queue}; try again in "
            f"{retry_after_s} s"
        )
        self.retry_after_s = retry_after_s


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
    placed_requests: int = 0
    placed_tokens: int = 0
    """Those to be computed."""

    def num_requests(self) -> int:
        load = self.load
        return load.waiting + load.running + load.handovers_in + self.placed_requests

    def num_waiting_tokens(self) -> int:
        return self.load.waiting_tokens + self.placed_tokens


def make_router(spec: ClusterSpec, seed: str) -> Router:
    router = spec.router
    return Router(
        router.max_queue,
        router.policy,
        spec.page_tokens,
        router.local_prefill_tokens,
        seed,
        spec.cache.device,
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
    ) -> None:
        """`local_prefill_tokens`: with at most so many missing, leaders prefill where they decode.
        `seed`: another one for each router. `has_pages`: leaders tell what they have cached."""
        self.max_queue = max_queue
        self.in_flight = 0
        self.policy: Policy = policy
        self.pages = PageMap() if has_pages and policy in ("cost", "prefix") else None
        self._page_tokens = page_tokens
        self._local_prefill_tokens = local_prefill_tokens
        self._seed = seed
        self._replicas: dict[str, ReplicaState] = {}
        self._by_row: list[ReplicaState | None] = []
        self._table = _Table(0)
        self._transfers = _Sum()
        """Seconds for each token, by what the replicas have reported since they started."""
        self._outputs = _Sum()
        """Tokens for each request, likewise."""
        self._hits = _Sum()
        """Of the prompts' tokens, those that were cached."""
        self._prefilling, self._decoding, self._both = (_Candidates() for _ in range(3))
        self._turn = 0

    # ----------------------------------------------------------------------- what the replicas tell

    def update(
        self, replica: str, role: Role, load: ReplicaLoad | None, now: float = 0.0
    ) -> PagesWanted | None:
        """A replica is up; `load` is its report, None when it has not sent one yet. What is
        returned is to be sent to it. `now`: seconds of any clock that does not go back."""
        wanted = None
        known = self._replicas.get(replica)
        if known is None or known.role != role:
            self.remove(replica)
            known = self._add(replica, role)
            if self.pages is not None:
                wanted = self.pages.join(replica, known.row, now)
        elif load is not None and self.pages is not None:
            wanted = self.pages.reported(replica, load.pages_told, now)
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

    def _add(self, replica: str, role: Role) -> ReplicaState:
        if None not in self._by_row:
            self._by_row += [None] * max(len(self._by_row), 8)
            self._table = self._table.grown(len(self._by_row))
        row = self._by_row.index(None)
        state = ReplicaState(replica, role, row)
        self._replicas[replica] = self._by_row[row] = state
        digest = hashlib.sha256(f"{self._seed}/{replica}".encode()).digest()
        self._table.tie[row] = int.from_bytes(digest[:6], "little")
        self._find_candidates()
        return state

    def _find_candidates(self) -> None:
        lists: dict[Role, list[int]] = {"prefill": [], "decode": [], "both": []}
        for state in self.replicas():
            lists[state.role].append(state.row)
        for role, rows in lists.items():
            candidates = self._candidates(role)
            candidates.rows = np.array(rows, np.int64)
            candidates.room = float(self._table.room[candidates.rows].sum())

    def _reported(self, state: ReplicaState) -> None:
        load, table, row = state.load, self._table, state.row
        table.requests[row] = state.num_requests()
        table.tokens[row] = state.num_waiting_tokens()
        table.speed.put(row, load.prefill_tokens_per_s)
        table.slowdown.put(row, load.decode_s_per_request)
        pages = zip(load.pages_free, load.pages_cached, load.pages_used, strict=False)
        room = float(max(map(sum, pages), default=0) * self._page_tokens)
        table.free[row] = max(load.pages_free, default=0) * self._page_tokens
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

    def check_room(self, num_requests: int) -> None:
        """Raise Overloaded where `admit` would, so that no work is done for what it will refuse."""
        if self.in_flight + num_requests > self.max_queue:
            raise Overloaded(self.in_flight, self.max_queue, RETRY_AFTER_S)

    def admit(self, num_requests: int) -> None:
        """Count `num_requests` as in flight until `release`, or raise Overloaded and count none."""
        self.check_room(num_requests)
        self.in_flight += num_requests

    def release(self) -> None:
        """One admitted request has ended."""
        assert self.in_flight > 0
        self.in_flight -= 1

    # ------------------------------------------------------------------------------------ placement

    def place(
        self, num_prompt_tokens: int, page_hashes: bytes = b"", beside: Placement | None = None
    ) -> Placement:
        """Where a prompt goes, which counts there until the next report; `page_hashes` of its full
        pages lie end to end.

        `beside` is chosen again while both its replicas are up: the same prompt's pages are cached
        there. Without a prefill replica the decode replica prefills. Raises NoReplica.
        """
        if not len(self._decoding.rows) and not len(self._both.rows):
            raise NoReplica("decode")
        missing = self._missing(num_prompt_tokens, page_hashes)
        if beside is not None and all(
            name in self._replicas for name in (beside.decode, beside.prefill) if name
        ):
            decode = self._replicas[beside.decode].row
            prefill = self._replicas[beside.prefill].row if beside.prefill else None
        else:
            decode, prefill = self._plan_placement(missing)
        self._count(decode, float(missing[decode]), prefill is None)
        if prefill is not None:
            self._count(prefill, float(missing[prefill]), True)
        return Placement(self._name(decode), self._name(prefill) if prefill is not None else "")

    def _missing(self, num_tokens: int, page_hashes: bytes) -> _Floats:
        """By row, how many tokens of the prompt are not cached there; at least the last one, whose
        logits are needed."""
        if self.pages is None:
            return np.full(len(self._by_row), float(num_tokens))
        num_pages = (num_tokens - 1) // self._page_tokens
        matched = self.pages.match(page_hashes, num_pages, len(self._by_row))
        return num_tokens - matched * self._page_tokens

    def _plan_placement(self, missing: _Floats) -> tuple[int, int | None]:
        """(the row that decodes, the one that prefills)"""
        match self.policy:
            case "cost":
                return self._plan_by_cost(missing)
            case "round_robin":
                self._turn += 1
                first = len(self._decoding.rows)
                turn = self._turn % (first + len(self._both.rows))
                if turn >= first:
                    return int(self._both.rows[turn - first]), None
                rows = self._prefilling.rows
                return int(self._decoding.rows[turn]), (
                    int(rows[self._turn % len(rows)]) if len(rows) else None
                )
        table = self._table
        loads = (table.requests, table.tokens)
        by_prefix = (missing,) if self.policy == "prefix" else ()
        decoding = np.concatenate((self._decoding.rows, self._both.rows))
        decode = self._least(decoding, *by_prefix, *loads)
        if decode in self._both.rows or not len(self._prefilling.rows):
            return decode, None
        return decode, self._least(self._prefilling.rows, *by_prefix, *reversed(loads))

    def _plan_by_cost(self, missing: _Floats) -> tuple[int, int | None]:
        table = self._table
        work = table.tokens + missing + self._hits.mean(0.0) * np.maximum(missing - table.free, 0.0)
        compute = work / table.speed.or_mean(1.0)
        slowdown = table.requests * (table.slowdown.or_mean(0.0) * self._outputs.mean(1.0))
        pairs = self._decoding.rows
        alone = self._both.rows
        if not len(self._prefilling.rows):
            alone = np.concatenate((pairs, alone))
            pairs = pairs[:0]
        elif len(pairs):
            is_local = missing[pairs] <= self._local_prefill_tokens
            if is_local.any():
                alone = np.concatenate((pairs[is_local], alone))
                pairs = pairs[~is_local]
        best, prefill = math.inf, None
        decode = -1
        if len(pairs):
            transfer = missing * self._transfers.mean(0.0)
            prefill = self._least(self._prefilling.rows, compute)
            decode = self._least(pairs, transfer + slowdown, table.requests, missing)
            best = float(compute[prefill] + transfer[decode] + slowdown[decode])
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
            least = values.min()
            rows = rows[values <= least + abs(least) * _EQUAL]
        return int(rows[0])

    def _name(self, row: int) -> str:
        state = self._by_row[row]
        assert state is not None
        return state.name

    def _count(self, row: int, missing: float, computes: bool) -> None:
        """A request was placed here. Its pages will be cached, wherever they are computed."""
        state, table = self._by_row[row], self._table
        assert state is not None
        state.placed_requests += 1
        table.requests[row] += 1
        table.free[row] -= missing
        if computes:
            state.placed_tokens += int(missing)
            table.tokens[row] += missing
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

    def __init__(self, num_rows: int) -> None:
        self.requests = np.zeros(num_rows)
        self.tokens = np.zeros(num_rows)
        """To be computed."""
        self.speed = _Measured(num_rows)
        """Of prefill, in tokens a second."""
        self.slowdown = _Measured(num_rows)
        """Seconds by which a request makes a step longer."""
        self.room = np.zeros(num_rows)
        """Tokens."""
        self.free = np.zeros(num_rows)
        """Of them, where nothing is cached; below 0 where it will be evicted."""
        self.recent = np.zeros(num_rows)
        """Tokens placed, by their weights."""
        self.tie = np.zeros(num_rows)

    def grown(self, num_rows: int) -> _Table:
        """With more rows, of zeros."""
        table = _Table(num_rows)
        for ours, theirs in zip(self._vectors(), table._vectors(), strict=True):
            theirs[: len(ours)] = ours
        return table

    def clear(self, row: int) -> None:
        self.speed.put(row, 0.0)
        self.slowdown.put(row, 0.0)
        for values in self._vectors():
            values[row] = 0.0

    def _vectors(self) -> list[_Floats]:
        of_reports = [self.requests, self.tokens, self.speed.values, self.slowdown.values]
        return [*of_reports, self.room, self.free, self.recent, self.tie]


class _Measured:
    """A positive quantity by row, 0 where it is unknown."""

    def __init__(self, num_rows: int) -> None:
        self.values = np.zeros(num_rows)
        self._filled: _Floats | None = None
        """With means; None: to be made anew."""

    def put(self, row: int, value: float) -> None:
        was_known = self.values[row] > 0
        self.values[row] = value
        if self._filled is not None and was_known and value > 0:
            self._filled[row] = value
        elif was_known or value > 0:
            self._filled = None

    def or_mean(self, unknown: float) -> _Floats:
        """For unknown ones the mean of the others, as it was when one became known or unknown; or
        `unknown` if there is none. Not to be written to."""
        if self._filled is None:
            is_known = self.values > 0
            count = np.count_nonzero(is_known)
            mean = self.values.sum() / count if count else unknown
            self._filled = np.where(is_known, self.values, mean)
        return self._filled
