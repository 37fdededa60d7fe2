"""The ranks of a replica as its leader's process sees them: an effect goes to the ranks that have a
part in it, and their answers come back as one event, when the slowest has answered (rule 4).

Pure. Orders to a rank are carried out in order; so those of one name are told apart by counting.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np

from pd.events import (
    BreakLink,
    CancelWrite,
    CopyPages,
    Digest,
    Digested,
    PagesCopied,
    RunStep,
    StepDone,
    Write,
    Written,
)
from pd.rank import (
    Connect,
    Disconnect,
    Expect,
    Flush,
    Flushed,
    HostOpened,
    OpenHost,
    RankEffect,
    RankEvent,
    merge_steps,
)


class Team:
    def __init__(self, num_ranks: int, order: Callable[[int, RankEffect], None]) -> None:
        """`order` tells a rank."""
        self._num_ranks = num_ranks
        self._order = order
        self._num_answers: Counter[tuple[int, str, Any]] = Counter()
        """By rank, of what may be ordered again under the same name before all have answered."""
        self._open: dict[tuple[str, Any, int], list[RankEvent]] = {}
        """Answers so far."""
        self._writers: dict[int, int] = {}
        """By write, its rank."""

    def carry_out(self, effect: RankEffect) -> None:
        match effect:
            case Write():
                self._writers[effect.write_id] = effect.source_rank
                self._order(effect.source_rank, effect)
            case CancelWrite(write_id):
                if write_id in self._writers:
                    self._order(self._writers[write_id], effect)
            case (
                RunStep()
                | BreakLink()
                | Digest()
                | CopyPages()
                | Connect()
                | Disconnect()
                | Flush()
                | Expect()
                | OpenHost()
            ):
                for rank in range(self._num_ranks):
                    self._order(rank, effect)

    def answered(self, rank: int, event: RankEvent) -> RankEvent | None:
        """The event that all ranks' answers make, once they are there."""
        if isinstance(event, Written):
            self._writers.pop(event.write_id, None)
            return event
        key = self._key(rank, event)
        if key is None:
            return event
        answers = self._open.setdefault(key, [])
        answers.append(event)
        if len(answers) < self._num_ranks:
            return None
        del self._open[key]
        return _merge(answers)

    def _key(self, rank: int, event: RankEvent) -> tuple[str, Any, int] | None:
        """What is answered; None: nothing that others answer too."""
        match event:
            case Digested(digest_id, _):
                return "digest", digest_id, 0
            case PagesCopied(copy_id, _, _, _):
                return "copy", copy_id, 0
            case StepDone():
                what: tuple[str, Any] = "step", None
            case Flushed(peer):
                what = "flush", peer
            case HostOpened(keeper, _):
                what = "host", keeper
            case _:
                return None
        self._num_answers[rank, *what] += 1
        return *what, self._num_answers[rank, *what]


def _merge(answers: list[Any]) -> RankEvent:
    first = answers[0]
    match first:
        case StepDone():
            return StepDone(merge_steps([answer.result for answer in answers]))
        case Digested():
            with np.errstate(over="ignore"):
                return Digested(first.digest_id, sum(a.digests for a in answers))
        case PagesCopied():
            return PagesCopied(
                first.copy_id,
                next((answer.error for answer in answers if answer.error), None),
                sum(answer.bytes_moved for answer in answers),
                max(answer.seconds for answer in answers),
            )
        case HostOpened():
            error = next((answer.error for answer in answers if answer.error), None)
            return dataclasses.replace(first, error=error)
        case _:
            return first  # type: ignore[no-any-return]
