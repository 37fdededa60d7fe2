"""Which requests are let in while others are unfinished, and when a refused one may come again.
Pure.

A class is let in while no more than its share of the queue is in use, by whichever class: lower
ones are refused first. A tenant beside others, or with a name, may have `_GREED` times what would
be left (dynamic thresholds: Choudhury and Hahne, Dynamic Queue Length Thresholds for Shared-Memory
Packet Switches, 1998): one alone gets 7/8 of the queue, several that want more than there is get
equal parts, and there is always room for one that has nothing in it.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

_GREED = 7
_MAX_RETRY_AFTER_S = 60
_NUM_ENDS = 256


class Overloaded(Exception):
    """Nothing was done for this request."""

    def __init__(self, reason: str, retry_after_s: float) -> None:
        self.retry_after_s = min(max(math.ceil(retry_after_s), 1), _MAX_RETRY_AFTER_S)
        """Whole seconds, as HTTP's Retry-After wants them."""
        super().__init__(f"{reason}; try again in {self.retry_after_s} s")


class Admission:
    """`now`: seconds of any clock that does not go back."""

    def __init__(self, max_queue: int, shares: Sequence[float] = (1.0,)) -> None:
        """`shares`: of the queue, by class."""
        self.max_queue = max_queue
        self.in_flight = 0
        self._most = [max(1, int(max_queue * share)) for share in shares]
        self._by_tenant: dict[str, int] = {}
        """Requests in flight; never 0."""
        self._ends: deque[float] = deque(maxlen=_NUM_ENDS)
        """Since there was nothing in flight, or the last ones: the first is where it begins."""

    def most(self, priority: int) -> int:
        """Requests of this class that fit, where there are no others."""
        return self._most[priority]

    def check_room(self, num_requests: int, tenant: str, priority: int, now: float) -> None:
        """Raises Overloaded where `admit` would."""
        total, most = self.in_flight + num_requests, self._most[priority]
        if total > most:
            of_class = f" of {self.max_queue} for its class" if most < self.max_queue else ""
            raise Overloaded(
                f"{self.in_flight} requests are queued or running, of at most {most}{of_class}",
                self.seconds_for(total - most, now),
            )
        own = self._by_tenant.get(tenant, 0)
        if own and (tenant or own < self.in_flight):
            excess = own + num_requests - _GREED * (most - total)
            if excess > 0:
                whose = f"of tenant {tenant}" if tenant else "without a tenant"
                raise Overloaded(
                    f"{own} of the {self.in_flight} requests that are queued or running are "
                    f"{whose}, which is its part of {most}",
                    self.seconds_for(math.ceil(excess / (1 + _GREED)), now),
                )

    def admit(self, num_requests: int, tenant: str, priority: int, now: float) -> None:
        """Count them until they are released, or raise Overloaded and count none."""
        self.check_room(num_requests, tenant, priority, now)
        if not self.in_flight:
            self._ends.clear()
            self._ends.append(now)
        self.in_flight += num_requests
        self._by_tenant[tenant] = self._by_tenant.get(tenant, 0) + num_requests

    def release(self, tenant: str, now: float) -> None:
        """One admitted request has ended."""
        assert self._by_tenant.get(tenant, 0) > 0
        self.in_flight -= 1
        self._by_tenant[tenant] -= 1
        if not self._by_tenant[tenant]:
            del self._by_tenant[tenant]
        self._ends.append(now)

    def take_over(self, other: Admission) -> None:
        """Count what that one has let in; it is not used any more."""
        self.in_flight, self._by_tenant, self._ends = other.in_flight, other._by_tenant, other._ends

    def seconds_for(self, num_requests: int, now: float) -> float:
        """How long so many of those in flight take to end, as they did of late."""
        if not self._ends:
            return 0.0
        return num_requests * (now - self._ends[0]) / max(len(self._ends) - 1, 1)
