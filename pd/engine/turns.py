"""Whose turn it is among requests that wait. Pure.

The order is: the class with the lowest `priority`; of that the tenant that was served the fewest
tokens lately; of that the request that came first. Tokens are counted as by the Virtual Token
Counter (Sheng et al., Fairness in Serving Large Language Models, OSDI 2024): those of a prompt when
it is served, then those generated; a tenant that had nothing waiting is lifted to the least of
those that had, so that idle time is no credit. Requests without a tenant are those of one tenant.

Nobody starves: the request that has waited the longest, if for `PATIENCE_S`, goes before all others
once in that time, and keeps that turn until it is served.
"""

from __future__ import annotations

import bisect
import heapq
import math
from collections.abc import Iterator
from typing import Generic, Protocol, TypeAlias, TypeVar

PATIENCE_S = 10.0
_MOST_TENANTS = 1000
"""That are not waiting and are remembered, if others were served as much."""

Turn: TypeAlias = tuple[float, float, float]
"""The least is the first. Those of different moments do not compare."""
NEVER: Turn = (math.inf, 0.0, 0.0)


class Waiter(Protocol):
    priority: int
    tenant: str
    arrived_at: float


W = TypeVar("W", bound=Waiter)


class Turns:
    """Shared by all queues in which a tenant's requests may wait."""

    def __init__(self) -> None:
        self._served: dict[str, float] = {}
        """Virtual tokens by tenant."""
        self._num_waiting: dict[str, int] = {}
        """By tenant; never 0."""
        self._last = 0.0
        """What the tenant has been served whose turn it was last."""
        self._next_exception_at = -math.inf
        self._purge_at = _MOST_TENANTS

    def of(self, who: Waiter, now: float) -> Turn:
        if self._is_exception(who, now):
            return (-1, 0.0, who.arrived_at)
        return (who.priority, self._served.get(who.tenant, 0.0), who.arrived_at)

    def _is_exception(self, who: Waiter, now: float) -> bool:
        return now >= self._next_exception_at and now >= who.arrived_at + PATIENCE_S

    def begin_waiting(self, tenant: str) -> None:
        num_waiting = self._num_waiting.get(tenant, 0)
        if not num_waiting:
            self._served[tenant] = max(self._served.get(tenant, 0.0), self._least())
        self._num_waiting[tenant] = num_waiting + 1
        if len(self._served) > self._purge_at:
            self._purge()

    def end_waiting(self, tenant: str) -> None:
        self._num_waiting[tenant] -= 1
        if not self._num_waiting[tenant]:
            del self._num_waiting[tenant]

    def serve(self, who: Waiter, num_tokens: int, now: float) -> None:
        """It was its turn."""
        if self._is_exception(who, now):
            self._next_exception_at = now + PATIENCE_S
        self.charge(who.tenant, num_tokens)
        self._last = self._served[who.tenant]

    def charge(self, tenant: str, num_tokens: int) -> None:
        self._served[tenant] = self._served.get(tenant, 0.0) + num_tokens

    def _least(self) -> float:
        return min(map(self._served.__getitem__, self._num_waiting), default=self._last)

    def _purge(self) -> None:
        """Forget those that would be lifted anyway."""
        least, waiting = self._least(), self._num_waiting
        self._served = {t: n for t, n in self._served.items() if n > least or t in waiting}
        self._purge_at = 2 * len(self._served) + _MOST_TENANTS


class WaitingQueue(Generic[W]):
    """Of one kind of waiting."""

    def __init__(self, turns: Turns) -> None:
        self._turns = turns
        self._queues: dict[tuple[int, str], list[W]] = {}
        """By class and tenant, in order of arrival; none is empty."""
        self._len = 0

    def __len__(self) -> int:
        return self._len

    def __contains__(self, who: W) -> bool:
        return who in self._queues.get((who.priority, who.tenant), ())

    def __iter__(self) -> Iterator[W]:
        """By class and tenant."""
        for queue in self._queues.values():
            yield from queue

    def add(self, who: W, is_back: bool = False) -> None:
        """`is_back`: before others that came at the same moment."""
        queue = self._queues.setdefault((who.priority, who.tenant), [])
        insort = bisect.insort_left if is_back else bisect.insort_right
        insort(queue, who, key=lambda other: other.arrived_at)
        self._turns.begin_waiting(who.tenant)
        self._len += 1

    def remove(self, who: W) -> None:
        key = who.priority, who.tenant
        self._queues[key].remove(who)
        if not self._queues[key]:
            del self._queues[key]
        self._turns.end_waiting(who.tenant)
        self._len -= 1

    def first(self, now: float) -> W | None:
        heads = [queue[0] for queue in self._queues.values()]
        if len(heads) <= 1:
            return heads[0] if heads else None
        return min(heads, key=lambda who: self._turns.of(who, now))

    def in_turn(self, now: float) -> Iterator[W]:
        """The queue is not to be changed meanwhile."""
        return heapq.merge(*self._queues.values(), key=lambda who: self._turns.of(who, now))
