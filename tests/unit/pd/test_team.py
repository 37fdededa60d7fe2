"""A leader's effects on several ranks, and their answers as one."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from pd.engine.batch import RowStart, StepCommand, StepResult
from pd.events import (
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
from pd.messages import SamplingParams
from pd.rank import (
    Connect,
    Flush,
    Flushed,
    HostOpened,
    OpenHost,
    RankEffect,
    RankEvent,
    RankFailed,
    decode,
    encode,
)
from pd.team import Team
from transfer.transport import PagePart

PAGES = np.array([3, 1], np.int32)


class Ranks:
    """A team whose orders are noted."""

    def __init__(self, count: int) -> None:
        self.orders: list[tuple[int, RankEffect]] = []
        self.team = Team(count, lambda rank, effect: self.orders.append((rank, effect)))

    def answers(self, *events: RankEvent) -> list[RankEvent | None]:
        """One from each rank, the last rank first."""
        return [self.team.answered(r, event) for r, event in reversed([*enumerate(events)])]


def command(tokens: list[int]) -> StepCommand:
    numbers = np.array([len(tokens)], np.int32)
    row = RowStart(0, SamplingParams(max_tokens=4, seed=2**64 - 1), np.array(tokens, np.int32), 2)
    table = np.array([[0, 0, 5]], np.int32)
    every = np.array(tokens, np.int32)
    return StepCommand([row], numbers * 0, numbers * 0, numbers, numbers > 0, every, [table, table])


def test_a_step_is_done_when_the_slowest_rank_has_done_it() -> None:
    ranks = Ranks(3)
    for _ in range(2):
        ranks.team.carry_out(RunStep(command([1, 2])))
    assert [rank for rank, _ in ranks.orders] == [0, 1, 2] * 2
    none = StepResult([], [], 0.5)
    tokens = StepResult([7], [None], 0.25)
    # Rank 2 is two steps ahead of the others.
    assert ranks.team.answered(2, StepDone(tokens)) is None
    assert ranks.team.answered(2, StepDone(dataclasses.replace(tokens, tokens=[8]))) is None
    assert ranks.team.answered(0, StepDone(none)) is None
    assert ranks.team.answered(1, StepDone(none)) == StepDone(StepResult([7], [None], 0.5))
    assert ranks.team.answered(1, StepDone(none)) is None
    assert ranks.team.answered(0, StepDone(none)) == StepDone(StepResult([8], [None], 0.5))


def test_a_write_concerns_its_source_alone() -> None:
    ranks = Ranks(3)
    write = Write(4, "decode-0", 0, PAGES, PAGES, None, 1, 2, 5)
    ranks.team.carry_out(write)
    ranks.team.carry_out(CancelWrite(4))
    ranks.team.carry_out(CancelWrite(5))  # unknown
    assert ranks.orders == [(2, write), (2, CancelWrite(4))]
    written = Written(4, None, 10, 1, 0.5)
    assert ranks.team.answered(2, written) is written
    ranks.team.carry_out(CancelWrite(4))
    assert len(ranks.orders) == 2


def test_digests_add_up_modulo_2_64() -> None:
    ranks = Ranks(2)
    ranks.team.carry_out(Digest(1, 0, PAGES))
    parts = [np.array([2**64 - 1, 5], np.uint64), np.array([3, 0], np.uint64)]
    first, merged = ranks.answers(*(Digested(1, part) for part in parts))
    assert first is None
    assert isinstance(merged, Digested)
    assert merged.digests.tolist() == [2, 5]


def test_one_rank_s_error_is_the_copy_s() -> None:
    ranks = Ranks(2)
    ranks.team.carry_out(CopyPages(1, (PAGES,), (PAGES,), True))
    good, bad = PagesCopied(1, None, 10, 0.5), PagesCopied(1, "no room", 0, 0.25)
    assert ranks.answers(bad, good) == [None, PagesCopied(1, "no room", 10, 0.5)]
    opened, refused = HostOpened("cache-0", None), HostOpened("cache-0", "another host")
    assert ranks.answers(opened, refused) == [None, refused]
    assert ranks.answers(opened, opened) == [None, opened]


def test_rounds_of_one_name_are_told_apart() -> None:
    """A peer leaves twice before the slow rank has answered once."""
    ranks = Ranks(2)
    for _ in range(2):
        ranks.team.carry_out(Flush("decode-0"))
    flushed = Flushed("decode-0")
    assert [ranks.team.answered(0, flushed) for _ in range(2)] == [None, None]
    assert [ranks.team.answered(1, flushed) for _ in range(2)] == [flushed, flushed]
    bad, good = HostOpened("cache-0", "it is gone"), HostOpened("cache-0", None)
    assert [ranks.team.answered(0, each) for each in (good, good)] == [None, None]
    assert [ranks.team.answered(1, each) for each in (bad, good)] == [bad, good]


def test_what_comes_of_one_rank_is_told_at_once() -> None:
    failed = RankFailed("it broke")
    assert Ranks(2).team.answered(1, failed) is failed


@pytest.mark.parametrize(
    "message",
    [
        RunStep(command([1, 2, 3])),
        Write(4, "decode-0", 1, PAGES, PAGES, PagePart(1, 2, 3, 4, 5, 6), 1, 2, 5),
        CopyPages(1, (PAGES, PAGES[:0]), (PAGES, PAGES[:0]), False),
        Connect("decode-0", (b"a", b"b"), ((0, 1, 0, None), (1, 1, 0, PagePart(0, 0, 8)))),
        OpenHost("cache-0", b"x"),
        Flush("decode-0"),
        Flushed("decode-0"),
        StepDone(StepResult([1, 2], [None, None], 0.5)),
        Digested(3, np.array([2**64 - 1], np.uint64)),
    ],
    ids=lambda message: type(message).__name__,
)
def test_orders_and_reports_survive_the_wire(message: RankEffect | RankEvent) -> None:
    again = decode(encode(message))
    assert type(again) is type(message)
    # Arrays do not compare as dataclasses want.
    assert encode(again) == encode(message)
    assert str(again) == str(message)
