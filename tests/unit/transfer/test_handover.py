"""The handover's machines and ledgers, transition by transition. What they do together, over a bad
network, is explored in test_handover_exploration.py."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from transfer.handover import (
    ReadyPages,
    ReceiverHandover,
    ReceiverLedger,
    ReceiverNeed,
    ReceiverState,
    SenderAnswer,
    SenderHandover,
    SenderLedger,
    SenderState,
    WritesStuckError,
)


def int32(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int32)


TABLES = [int32(10, 11, 12, 13, 14), [20, -1, -1, 23, 24]]
DEADLINE, PATIENCE = 100.0, 20.0


def make_sender(verify: bool = False) -> SenderHandover:
    """Pages 1..4 of group 0 and the last two of group 1."""
    return SenderHandover([(1, int32(5, 6, 7, 8)), (3, int32(31, 32))], DEADLINE, PATIENCE, verify)


def as_lists(ready: list[ReadyPages]) -> list[tuple[int, int, list[int], list[int]]]:
    return [(g, first, sources.tolist(), targets.tolist()) for g, first, sources, targets in ready]


class Driver:
    """Takes and posts; each batch is as many writes as asked for, numbered from 1."""

    def __init__(self, sender: SenderHandover) -> None:
        self.sender = sender
        self.now = 0.0
        self.last = 0

    def take(self, num_complete: int, final: bool = False, parts: int = 1) -> None:
        self.post(self.sender.take(num_complete, TABLES, final), parts)

    def post(self, ready: list[ReadyPages], parts: int = 1) -> None:
        for pages in ready:
            numbers = range(self.last + 1, self.last + 1 + parts)
            self.last += parts
            self.sender.posted(pages, numbers, self.now)

    def end(self, *numbers: int, error: str | None = None) -> None:
        for number in numbers:
            assert self.sender.write_done(number, error, 10, 2, 0.5, self.now)


# ------------------------------------------------------------------------------------------- sender


def test_pages_are_taken_once_as_they_become_complete() -> None:
    sender = make_sender()
    assert sender.num_pages == 6
    assert as_lists(sender.take(1, TABLES)) == []
    assert as_lists(sender.take(3, TABLES)) == [(0, 1, [11, 12], [5, 6])]
    assert as_lists(sender.take(3, TABLES)) == []
    ready = sender.take(4, TABLES)
    assert as_lists(ready) == [(0, 3, [13], [7]), (1, 3, [23], [31])]
    # The last page is partial: complete only when the prefill has ended.
    ready = sender.take(4, TABLES, True)
    assert as_lists(ready) == [(0, 4, [14], [8]), (1, 4, [24], [32])]


def test_a_sender_is_complete_when_the_last_write_has_ended() -> None:
    driver = Driver(make_sender())
    driver.take(5, parts=2)
    driver.end(1, 2, 3, 4)
    assert driver.sender.landed == [4, 2]
    # More might become ready: only the prefill's end says that this was all.
    assert driver.sender.state is SenderState.OPEN
    driver.take(5, final=True)
    assert driver.sender.is_complete
    assert driver.sender.has_last_word
    sender = driver.sender
    assert (sender.bytes_moved, sender.descriptors, sender.transfer_s) == (40, 8, 2.0)


def test_landed_pages_are_counted_up_to_the_first_gap() -> None:
    driver = Driver(make_sender())
    for num_complete in (2, 3, 4):
        driver.take(num_complete)
    driver.end(2)
    assert driver.sender.landed == [0, 0]
    driver.end(1)
    assert driver.sender.landed == [2, 0]
    driver.end(4)
    assert driver.sender.landed == [2, 1]
    driver.end(3)
    assert driver.sender.landed == [3, 1]


def test_a_page_has_landed_when_all_writes_of_its_parts_have() -> None:
    driver = Driver(make_sender())
    driver.take(3, parts=3)
    driver.end(1, 3)
    assert driver.sender.landed == [0, 0]
    driver.end(2)
    assert driver.sender.landed == [2, 0]


def test_a_handover_of_no_pages_is_complete_with_the_prefill() -> None:
    sender = SenderHandover([(5, int32()), (5, int32())], DEADLINE, PATIENCE)
    assert sender.take(4, TABLES) == []
    assert not sender.is_closed
    assert sender.take(5, TABLES, True) == []
    assert sender.is_complete


def test_a_verified_handover_has_its_last_word_with_the_digests() -> None:
    driver = Driver(make_sender(verify=True))
    driver.take(5, final=True)
    driver.end(1, 2)
    assert driver.sender.is_complete
    assert not driver.sender.has_last_word
    driver.sender.digests = (b"", b"")
    assert driver.sender.has_last_word


def test_pages_whose_write_failed_are_posted_again_once() -> None:
    driver = Driver(make_sender())
    driver.take(5, final=True, parts=2)
    driver.end(1, error="lost")
    driver.end(3, 4)
    # The other part of the same pages is still in flight.
    assert driver.sender.take_retries(9.0) == []
    driver.end(2)
    assert driver.sender.state is SenderState.OPEN
    assert driver.sender.landed == [0, 2]
    assert driver.sender.take_retries(1.0) == []
    ready = driver.sender.take_retries(1.3)
    assert as_lists(ready) == [(0, 1, [11, 12, 13, 14], [5, 6, 7, 8])]
    driver.post(ready)
    assert driver.sender.take_retries(9.0) == []
    driver.end(5)
    assert driver.sender.is_complete


def test_pages_that_fail_twice_end_the_handover() -> None:
    driver = Driver(make_sender())
    driver.take(5, final=True)
    driver.end(1, error="lost")
    driver.post(driver.sender.take_retries(2.0))
    driver.end(3, error="lost again")
    assert driver.sender.state is SenderState.DRAINING
    driver.end(2)
    assert driver.sender.is_closed
    assert not driver.sender.is_complete
    assert driver.sender.reason == "a write failed: lost again"
    assert driver.sender.landed == [0, 2]


def test_a_failure_just_before_the_deadline_is_final() -> None:
    driver = Driver(make_sender())
    driver.take(3)
    driver.now = DEADLINE - 1.0
    driver.end(1, error="lost")
    assert driver.sender.is_closed


def test_a_draining_sender_takes_nothing_and_waits_for_writes_in_flight() -> None:
    driver = Driver(make_sender())
    driver.take(4)
    driver.end(1, error="lost")
    assert driver.sender.cancel("client left", 0.0)
    assert driver.sender.state is SenderState.DRAINING
    assert driver.sender.take(5, TABLES, True) == []
    assert driver.sender.take_retries(9.0) == []
    assert driver.sender.outstanding == [2]
    driver.end(2)
    assert driver.sender.is_closed
    assert driver.sender.reason == "client left"
    assert driver.sender.landed == [0, 1]


def test_a_deadline_cancels_and_writes_without_an_end_break_the_link_then_the_process() -> None:
    driver = Driver(make_sender())
    driver.now = DEADLINE - 1.0
    driver.take(4)
    assert not driver.sender.tick(DEADLINE)
    assert driver.sender.state is SenderState.OPEN
    assert not driver.sender.tick(DEADLINE + 1)
    assert driver.sender.state is SenderState.DRAINING
    assert driver.sender.reason == "timed out"
    assert not driver.sender.tick(DEADLINE + 31)
    assert driver.sender.tick(DEADLINE + 32)
    assert not driver.sender.tick(DEADLINE + 33)
    with pytest.raises(WritesStuckError, match="2 writes do not end: timed out"):
        driver.sender.tick(DEADLINE + 63)


def test_a_write_that_hangs_is_not_waited_for_until_the_deadline() -> None:
    driver = Driver(make_sender())
    driver.sender.tick(PATIENCE + 1)
    assert driver.sender.state is SenderState.OPEN
    driver.now = PATIENCE + 2
    driver.take(4)
    driver.now = 2 * PATIENCE
    driver.end(1)
    driver.sender.tick(3 * PATIENCE)
    assert driver.sender.state is SenderState.OPEN
    driver.sender.tick(3 * PATIENCE + 1)
    assert driver.sender.state is SenderState.DRAINING


def test_a_sender_ignores_what_is_late_repeated_or_unknown() -> None:
    driver = Driver(make_sender())
    assert not driver.sender.write_done(9, None, 1, 1, 0.0, 0.0)
    driver.take(5, final=True)
    driver.end(1, 2)
    assert not driver.sender.write_done(1, None, 1, 1, 0.0, 0.0)
    assert not driver.sender.cancel("too late", 0.0)
    assert not driver.sender.tick(10 * DEADLINE)
    assert driver.sender.is_complete
    assert driver.sender.bytes_moved == 20


@pytest.mark.parametrize(
    "tables",
    [[int32(10, 11, 12), [0] * 5], [int32(*range(5)), [0, 0, 0, -1, 0]]],
)
def test_a_missing_source_page_is_an_error_and_takes_nothing(tables: list[object]) -> None:
    sender = make_sender()
    with pytest.raises(ValueError, match="no source"):
        sender.take(5, tables)  # type: ignore[arg-type]
    assert len(sender.take(5, TABLES)) == 2


# ------------------------------------------------------------------------------------ sender ledger


def test_a_sender_starts_a_handover_once() -> None:
    ledger = SenderLedger()
    assert ledger.ask(1, 1) is SenderAnswer.UNKNOWN
    assert ledger.reserve(1, 1) is SenderAnswer.START
    ledger.records[1] = make_sender()
    assert ledger.reserve(1, 1) is SenderAnswer.REPORT
    assert ledger.ask(1, 1) is SenderAnswer.REPORT


def test_a_cancel_that_overtakes_its_reserve_is_remembered() -> None:
    ledger = SenderLedger()
    assert ledger.cancel(1, 1, 0.0) is SenderAnswer.REPORT
    assert ledger.records[1].has_last_word
    assert ledger.reserve(1, 1) is SenderAnswer.REPORT


def test_what_is_below_the_floor_is_forgotten_and_ignored() -> None:
    ledger = SenderLedger()
    for serial in (1, 2, 3):
        ledger.cancel(serial, 1, 0.0)
    ledger.settled(3)
    assert list(ledger.records) == [3]
    assert ledger.reserve(2, 1) is SenderAnswer.NOTHING
    assert ledger.ask(1, 1) is SenderAnswer.NOTHING
    assert ledger.cancel(2, 2, 0.0) is SenderAnswer.NOTHING
    ledger.settled(2)
    assert ledger.floor == 3
    assert ledger.ask(5, 5) is SenderAnswer.UNKNOWN
    assert ledger.records == {}


def test_a_floor_does_not_pass_what_goes_on() -> None:
    ledger = SenderLedger()
    for serial in (1, 3):
        ledger.cancel(serial, 1, 0.0)
    ledger.records[2] = SenderHandover([(0, np.array([1], np.int32))], 100.0, PATIENCE)
    ledger.settled(60)
    assert ledger.floor == 2
    assert list(ledger.records) == [3, 2]
    ledger.cancel(2, 2, 0.0)
    ledger.settled(60)
    assert ledger.floor == 60
    assert ledger.records == {}


# ----------------------------------------------------------------------------------------- receiver


def make_receiver() -> ReceiverHandover:
    return ReceiverHandover(1, 2, 0.0, PATIENCE)


EVENTS: dict[str, Callable[[ReceiverHandover], bool]] = {
    "prefill_done": lambda receiver: receiver.prefill_done(0.0),
    "progress": lambda receiver: receiver.pages_written((1, 0), False, 0.0),
    "complete": lambda receiver: receiver.pages_written((4, 2), True, 0.0),
    "cancel": lambda receiver: receiver.cancel("cancelled", 0.0),
    "handover_closed": lambda receiver: receiver.handover_closed((2, 0), "closed"),
    "peer_dead": lambda receiver: receiver.peer_dead("dead"),
}


@pytest.mark.parametrize(
    ("events", "state", "landed"),
    [
        ("", ReceiverState.RESERVED, (0, 0)),
        ("prefill_done", ReceiverState.RESERVED, (0, 0)),
        ("progress", ReceiverState.RESERVED, (1, 0)),
        ("complete", ReceiverState.RESERVED, (4, 2)),
        ("prefill_done complete", ReceiverState.LANDED, (4, 2)),
        ("progress complete prefill_done", ReceiverState.LANDED, (4, 2)),
        ("cancel", ReceiverState.CLOSING, (0, 0)),
        ("prefill_done cancel", ReceiverState.CLOSING, (0, 0)),
        ("complete cancel", ReceiverState.CLOSED, (4, 2)),
        # Its pages are in quarantine: what lands there now comes too late.
        ("progress cancel complete", ReceiverState.CLOSED, (1, 0)),
        ("cancel handover_closed", ReceiverState.CLOSED, (0, 0)),
        ("cancel peer_dead", ReceiverState.CLOSED, (0, 0)),
        ("handover_closed", ReceiverState.CLOSED, (2, 0)),
        ("progress peer_dead", ReceiverState.CLOSED, (1, 0)),
        ("complete peer_dead", ReceiverState.CLOSED, (4, 2)),
    ],
)
def test_receiver_transitions(events: str, state: ReceiverState, landed: tuple[int, int]) -> None:
    receiver = make_receiver()
    for event in events.split():
        assert EVENTS[event](receiver)
    assert receiver.state is state
    assert receiver.may_reuse_targets == (state in (ReceiverState.LANDED, ReceiverState.CLOSED))
    assert receiver.landed == landed


@pytest.mark.parametrize(
    ("events", "ignored"),
    [
        ("prefill_done", "prefill_done"),
        ("progress", "progress"),
        ("complete", "progress complete"),
        ("cancel", "cancel prefill_done progress"),
        ("prefill_done complete", " ".join(EVENTS)),
        ("cancel handover_closed", " ".join(EVENTS)),
        ("peer_dead", " ".join(EVENTS)),
    ],
)
def test_a_receiver_ignores_what_is_late_or_repeated(events: str, ignored: str) -> None:
    receiver = make_receiver()
    for event in events.split():
        EVENTS[event](receiver)
    before = vars(receiver).copy()
    for event in ignored.split():
        assert not EVENTS[event](receiver)
        assert vars(receiver) == before


def test_progress_never_goes_back() -> None:
    receiver = make_receiver()
    assert receiver.pages_written((3, 1), False, 0.0)
    assert not receiver.pages_written((2, 1), False, 0.0)
    assert receiver.pages_written((2, 2), False, 0.0)
    assert receiver.landed == (3, 2)


def test_the_first_reason_stands() -> None:
    receiver = make_receiver()
    receiver.cancel("deadline", 0.0)
    receiver.handover_closed((), "cancelled by decode")
    assert receiver.reason == "deadline"


def needs(receiver: ReceiverHandover, until: int) -> list[tuple[int, ReceiverNeed]]:
    found = [(second, receiver.tick(float(second))) for second in range(1, until)]
    return [(second, need) for second, need in found if need is not ReceiverNeed.NOTHING]


def test_a_silent_sender_is_asked_ever_more_rarely_and_then_given_up() -> None:
    receiver = make_receiver()
    assert needs(receiver, 21) == [(second, ReceiverNeed.ASK) for second in (1, 2, 4, 8, 16)]
    assert receiver.tick(21.0) is ReceiverNeed.GIVE_UP


def test_an_answer_keeps_the_handover_and_news_make_asking_quick_again() -> None:
    receiver = make_receiver()
    assert needs(receiver, 5) == [(second, ReceiverNeed.ASK) for second in (1, 2, 4)]
    assert receiver.is_unknown(4.5)
    assert receiver.tick(24.0) is ReceiverNeed.ASK
    assert receiver.tick(25.0) is ReceiverNeed.GIVE_UP
    assert receiver.pages_written((1, 1), False, 25.0)
    assert receiver.tick(25.9) is ReceiverNeed.NOTHING
    assert receiver.tick(26.0) is ReceiverNeed.ASK


def test_cancel_is_repeated_until_it_is_answered_and_said_to_be_overdue() -> None:
    receiver = make_receiver()
    receiver.cancel("client left", 0.0)
    assert needs(receiver, 5) == [(second, ReceiverNeed.CANCEL) for second in (1, 2, 3, 4)]
    assert not receiver.is_unknown(5.0)
    assert not receiver.is_overdue
    receiver.tick(PATIENCE + 1)
    assert receiver.is_overdue
    assert not receiver.may_reuse_targets
    receiver.handover_closed((), "cancelled")
    assert receiver.tick(PATIENCE + 9) is ReceiverNeed.NOTHING


# ---------------------------------------------------------------------------------- receiver ledger


def test_the_floor_is_the_lowest_serial_not_settled() -> None:
    ledger = ReceiverLedger()
    assert ledger.floor == 1
    assert [ledger.start(1, 0.0, PATIENCE).serial for _ in range(3)] == [1, 2, 3]
    ledger.settle(2)
    assert ledger.floor == 1
    ledger.settle(1)
    assert ledger.floor == 3
    ledger.settle(3)
    assert ledger.floor == 4


def test_a_floor_is_told_until_it_is_confirmed() -> None:
    ledger = ReceiverLedger()
    assert not ledger.must_tell_floor(0.0)
    ledger.start(1, 0.0, PATIENCE)
    ledger.settle(1)
    told = [ledger.must_tell_floor(when) for when in (0.0, 0.5, 1.0)]
    assert told == [True, False, True]
    ledger.settled_heard(1)
    assert ledger.must_tell_floor(2.0)
    ledger.settled_heard(2)
    assert not ledger.must_tell_floor(3.0)


def test_another_handovers_write_is_a_sign_of_life_of_the_link() -> None:
    slots = np.arange(1, 5, dtype=np.int32)
    handover = SenderHandover([(0, slots)], deadline=1000.0, patience_s=30.0)
    (pages,) = handover.take(4, [slots], final=True)
    handover.posted(pages, [1], 0.0)
    handover.tick(29.0)
    handover.link_lives(29.0)
    handover.tick(58.0)
    assert handover.state is SenderState.OPEN
    handover.tick(60.0)
    assert handover.state is SenderState.DRAINING
    assert "30 s" in handover.reason


def test_ready_pages_are_cut_without_loss() -> None:
    slots = np.arange(1, 8, dtype=np.int32)
    whole = ReadyPages(1, 5, slots, slots + 10)
    parts = whole.cut(3)
    assert [part.first_page for part in parts] == [5, 8, 11]
    assert np.concatenate([part.source_slots for part in parts]).tolist() == slots.tolist()
    assert np.concatenate([part.target_slots for part in parts]).tolist() == (slots + 10).tolist()
    assert {part.group for part in parts} == {1}
