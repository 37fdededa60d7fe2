"""How many replicas of a role its load needs. Pure.

Needs are measured in replicas, and so that they do not depend on how many there are now:

prompts   tokens that come to be computed, by the measured speed of prefill; what waits must be gone
          by the time that more replicas could be there; and with `objectives.ttft`, as many as keep
          queueing and prefill together below it, in the mean
decode    tokens that steps give, by what a replica gives with the largest batch that its rows, its
          pages and `objectives.tpot` permit; and the requests that are there must fit

Replicas that do both need the sum.
"""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np

from pd.messages import ReplicaLoad

_RATE_S = 10.0
"""Over which rates are measured."""

_Counters = np.ndarray[Any, np.dtype[np.float64]]


@dataclasses.dataclass(frozen=True, slots=True)
class Need:
    """So many replicas or more..."""

    up: float
    """... with each loaded to `planner.up`;"""
    down: float
    """... to `planner.down`: never fewer than those."""
    why: str


@dataclasses.dataclass(frozen=True, slots=True)
class Prompts:
    """To be computed by the replicas of a role."""

    work: float
    """Replicas that computing them takes, as they come."""
    backlog_s: float
    """Seconds that one replica would take for those that wait."""
    each_s: float
    """Seconds for one, in the mean; 0: unknown."""
    held_up: float
    """What comes, by what is computed: 1 or more."""


NO_PROMPTS = Prompts(0.0, 0.0, 0.0, 1.0)


class Meter:
    """What the replicas of one role did lately, and what they have to do."""

    def __init__(self) -> None:
        self._totals = np.zeros(6)
        self._history: deque[tuple[float, _Counters, int, int]] = deque()
        """(now, counters, tokens and requests that wait) of the last `_RATE_S`."""
        self._loads: Sequence[ReplicaLoad] = ()
        self._speed = self._prompt_len = 0.0
        """Tokens a second while prompts are computed; tokens of a prompt. 0: unknown, as below."""
        self._step_s = self._step_size = self._slope = 0.0

    def add(self, before: ReplicaLoad, after: ReplicaLoad) -> None:
        """What one replica did between two reports; its counters may have started again."""
        old, new = _counters(before), _counters(after)
        self._totals += new if (new < old).any() else new - old

    def note(self, loads: Sequence[ReplicaLoad], now: float) -> None:
        """Reports of those that are running now; what was added until now belongs to this time."""
        self._loads = loads
        waiting = sum(x.waiting_tokens for x in loads), sum(x.waiting for x in loads)
        self._history.append((now, self._totals.copy(), *waiting))
        while len(self._history) > 2 and self._history[1][0] <= now - _RATE_S:
            self._history.popleft()
        arrived, tokens, prompt_s, steps, step_tokens, decode_s = self._change().tolist()
        if prompt_s > 0:
            self._speed = tokens / prompt_s
        if arrived > 0:
            self._prompt_len = (self._came() or tokens) / arrived
        if steps > 0:
            self._step_s, self._step_size = decode_s / steps, step_tokens / steps
        if slopes := [x.decode_s_per_request for x in loads if x.decode_s_per_request > 0]:
            self._slope = sum(slopes) / len(slopes)

    def _change(self) -> _Counters:
        return self._history[-1][1] - self._history[0][1]

    def _came(self) -> float:
        """Tokens of prompts: what was computed, and what waits more than before."""
        return max(0.0, float(self._change()[1]) + self._history[-1][2] - self._history[0][2])

    @property
    def _seconds(self) -> float:
        return self._history[-1][0] - self._history[0][0]

    @property
    def arrived(self) -> float:
        """Requests, in the window."""
        return float(self._change()[0])

    def prompts(self) -> Prompts:
        if not self._speed or not self._seconds:
            return NO_PROMPTS
        tokens, came = float(self._change()[1]), self._came()
        return Prompts(
            came / self._seconds / self._speed,
            self._history[-1][2] / self._speed,
            self._prompt_len / self._speed,
            max(1.0, came / tokens) if tokens else 1.0,
        )

    def busy_with_prompts(self) -> Prompts:
        """Without those that wait: others will compute them."""
        work = float(self._change()[2]) / self._seconds if self._seconds else 0.0
        return Prompts(work, 0.0, 0.0, 1.0)

    def in_batches(self) -> int:
        """Requests."""
        return sum(x.running for x in self._loads)

    def waiting(self, within_s: float) -> float:
        """Places for requests that wait, if these are to come to their turn within so many seconds:
        fewer where requests are done sooner. Those that wait for pages count as far as requests in
        batches hold them, not others whose prompts are being computed elsewhere."""
        running = self.in_batches()
        begun = self.arrived - self._history[-1][3] + self._history[0][3]
        stay_s = running * self._seconds / begun if begun > 0 else math.inf
        waiting = self._history[-1][3] * min(1.0, stay_s / within_s)
        holders = running + sum(x.handovers_in for x in self._loads)
        return waiting * running / holders if holders else waiting

    @property
    def held_up(self) -> float:
        """Requests that came, by those that came to their turn: 1 or more."""
        begun = self.arrived - self._history[-1][3] + self._history[0][3]
        return max(1.0, self.arrived / begun) if begun > 0 else 1.0

    def places(self, batch: int) -> tuple[float, str]:
        """Requests that a replica has room for, and what limits it."""
        limits = [(float(batch), "rows")]
        holders = self.in_batches() + sum(x.handovers_in for x in self._loads)
        for group in range(max((len(x.pages_used) for x in self._loads), default=0)):
            used = sum(x.pages_used[group] for x in self._loads)
            pages = used + sum(x.pages_free[group] + x.pages_cached[group] for x in self._loads)
            if used and holders:
                limits.append((holders * pages / used / len(self._loads), "pages"))
        return min(limits)

    def places_for_tpot(self, stages: int, tpot: float) -> float:
        """The largest batch that gives each request a token in so many seconds; infinite, if that
        is unknown, or if none would."""
        fixed = self._fixed_s(stages)
        if not self._slope or not self._step_s or fixed >= tpot:
            return math.inf
        return (tpot - fixed) / self._slope

    def decoding(self, batch: float, stages: int) -> float:
        """Replicas with this batch that give as many tokens."""
        if not self._step_s or not self._seconds:
            return 0.0
        rate = float(self._change()[4]) / self._seconds
        return rate * (self._fixed_s(stages) + self._slope * batch) / batch

    def _fixed_s(self, stages: int) -> float:
        """Of the time from a request's token to its next, what does not depend on the batch."""
        return max(0.0, stages * (self._step_s - self._slope * self._step_size))


def _counters(load: ReplicaLoad) -> _Counters:
    return np.array(
        (
            load.arrived,
            load.prompt_step_tokens,
            load.prompt_step_s,
            load.decode_steps,
            load.decode_step_tokens,
            load.decode_step_s,
        ),
        np.float64,
    )


def mean_wait_s(replicas: int, work: float, each_s: float) -> float:
    """Of a request before its prefill begins: M/M/n, as H. Sakasegawa approximates it (1977).
    `work`: replicas that are busy in the mean."""
    load = work / replicas
    if load >= 1:
        return math.inf
    power = math.sqrt(2 * (replicas + 1)) - 1
    return each_s * math.pow(load, power) / (replicas * (1 - load))


def replicas_for_ttft(work: float, each_s: float, wait_s: float, most: int) -> int:
    """The fewest, `most` at most, with a mean wait of no more than `wait_s`."""
    enough = (n for n in range(1, most) if mean_wait_s(n, work, each_s) <= wait_s)
    return next(enough, most)
