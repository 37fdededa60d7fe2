"""A virtual clock: what is to happen, in order of time, and of being said where times are equal."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Any


class VirtualClock:
    def __init__(self) -> None:
        self.now = 0.0
        """Seconds."""
        self._queue: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._order = 0

    def at(self, when: float, action: Callable[..., None], *arguments: Any) -> None:
        self._order += 1
        heapq.heappush(self._queue, (when, self._order, action, arguments))

    @property
    def num_waiting(self) -> int:
        return len(self._queue)

    def step(self) -> bool:
        """The next one happens; False: there is none."""
        if not self._queue:
            return False
        self.now, _, action, arguments = heapq.heappop(self._queue)
        action(*arguments)
        return True
