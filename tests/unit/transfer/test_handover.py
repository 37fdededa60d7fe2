"""The handover's two state machines: each transition, then seeded runs of both over a bad
network."""

import random
from collections.abc import Callable

import numpy as np
import pytest

from transfer.handover import ReceiverHandover, ReceiverState, SenderHandover, SenderState


def int32(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int32)


def taken(handover: SenderHandover, *arguments: object) -> list[tuple[int, list[int], list[int]]]:
    return [
        (group, sources.tolist(), targets.tolist())
        for group, sources, targets in handover.take(*arguments)  # type: ignore[arg-type]
    ]


TABLES = [int32(10, 11, 12, 13, 14), [20, -1, -1, 23, 24]]


def make_sender() -> SenderHandover:
    """Pages 1..4 of group 0 and the last two of group 1."""
    return SenderHandover([(1, int32(5, 6, 7, 8)), (3, int32(31, 32))])


# ------------------------------------------------------------------------------------------- sender


def test_pages_are_taken_once_as_they_become_complete():
    sender = make_sender()
    assert sender.num_pages == 6
    assert taken(sender, 1, TABLES) == []
    assert taken(sender, 3, TABLES) == [(0, [11, 12], [5, 6])]
    assert taken(sender, 3, TABLES) == []
    assert taken(sender, 4, TABLES) == [(0, [13], [7]), (1, [23], [31])]
    # The last page is partial: complete only when the prefill has ended.
    assert taken(sender, 4, TABLES, True) == [(0, [14], [8]), (1, [24], [32])]


def test_a_sender_is_complete_when_the_last_write_has_ended():
    sender = make_sender()
    sender.take(5, TABLES)
    assert sender.write_submitted(1)
    assert sender.write_submitted(2)
    assert sender.outstanding == 2
    assert sender.write_done(2, True, 100, 3, 0.5)
    assert not sender.is_closed
    assert sender.write_done(1, True, 10, 1, 0.25)
    assert sender.is_complete
    assert (sender.bytes_moved, sender.descriptors, sender.transfer_s) == (110, 4, 0.75)


def test_all_written_early_is_not_complete_while_pages_are_missing():
    sender = make_sender()
    sender.take(3, TABLES)
    sender.write_submitted(1)
    sender.write_done(1, True, 1, 1, 0.0)
    assert sender.state is SenderState.OPEN


def test_a_handover_of_no_pages_is_complete_at_the_first_take():
    sender = SenderHandover([(5, int32()), (5, int32())])
    assert sender.take(5, TABLES, True) == []
    assert sender.is_complete


@pytest.mark.parametrize("cause", ["cancel", "failure"])
def test_a_draining_sender_takes_nothing_and_waits_for_writes_in_flight(cause):
    sender = make_sender()
    sender.take(4, TABLES)
    sender.write_submitted(1)
    sender.write_submitted(2)
    if cause == "cancel":
        assert sender.cancel("client left")
    else:
        sender.write_submitted(3)
        assert sender.write_done(3, False, 0, 0, 0.1)
    assert sender.state is SenderState.DRAINING
    assert sender.take(5, TABLES, True) == []
    assert sender.write_done(1, True, 7, 1, 0.1)
    assert sender.state is SenderState.DRAINING
    assert sender.write_done(2, False, 0, 0, 0.1)
    assert sender.is_closed
    assert not sender.is_complete
    assert sender.reason == ("client left" if cause == "cancel" else "a write failed")
    assert sender.bytes_moved == 7


def test_a_failed_last_write_is_not_complete():
    sender = make_sender()
    sender.take(5, TABLES, True)
    sender.write_submitted(1)
    sender.write_done(1, False, 0, 0, 0.1)
    assert sender.is_closed
    assert not sender.is_complete


def test_a_write_posted_while_draining_is_still_waited_for():
    sender = make_sender()
    sender.take(5, TABLES)
    sender.write_submitted(1)
    sender.cancel("late")
    assert sender.write_submitted(2)
    sender.write_done(1, True, 1, 1, 0.0)
    assert not sender.is_closed
    sender.write_done(2, True, 1, 1, 0.0)
    assert sender.is_closed


def test_a_sender_ignores_what_is_late_repeated_or_unknown():
    sender = make_sender()
    assert not sender.write_done(9, True, 1, 1, 0.0)
    sender.take(5, TABLES)
    assert sender.write_submitted(1)
    assert not sender.write_submitted(1)
    assert sender.write_done(1, True, 1, 1, 0.0)
    assert not sender.write_done(1, True, 1, 1, 0.0)
    assert not sender.cancel("too late")
    assert not sender.write_submitted(2)
    assert sender.is_complete
    assert sender.bytes_moved == 1


@pytest.mark.parametrize(
    "tables",
    [[int32(10, 11, 12), [0] * 5], [int32(*range(5)), [0, 0, 0, -1, 0]]],
)
def test_a_missing_source_page_is_an_error_and_takes_nothing(tables):
    sender = make_sender()
    with pytest.raises(ValueError, match="no source"):
        sender.take(5, tables)
    assert len(sender.take(5, TABLES)) == 2


# ----------------------------------------------------------------------------------------- receiver


EVENTS: dict[str, Callable[[ReceiverHandover], bool]] = {
    "prefill_done": ReceiverHandover.prefill_done,
    "pages_written": ReceiverHandover.pages_written,
    "cancel": lambda receiver: receiver.cancel("cancelled"),
    "handover_closed": lambda receiver: receiver.handover_closed("closed"),
    "peer_dead": lambda receiver: receiver.peer_dead("dead"),
}


@pytest.mark.parametrize(
    ("events", "state"),
    [
        ("", ReceiverState.RESERVED),
        ("prefill_done", ReceiverState.RESERVED),
        ("pages_written", ReceiverState.RESERVED),
        ("prefill_done pages_written", ReceiverState.LANDED),
        ("pages_written prefill_done", ReceiverState.LANDED),
        ("cancel", ReceiverState.CLOSING),
        ("prefill_done cancel", ReceiverState.CLOSING),
        ("pages_written cancel", ReceiverState.CLOSED),
        ("cancel pages_written", ReceiverState.CLOSED),
        ("cancel handover_closed", ReceiverState.CLOSED),
        ("cancel peer_dead", ReceiverState.CLOSED),
        ("handover_closed", ReceiverState.CLOSED),
        ("prefill_done handover_closed", ReceiverState.CLOSED),
        ("pages_written peer_dead", ReceiverState.CLOSED),
    ],
)
def test_receiver_transitions(events, state):
    receiver = ReceiverHandover()
    for event in events.split():
        assert EVENTS[event](receiver)
    assert receiver.state is state
    assert receiver.may_reuse_targets == (state in (ReceiverState.LANDED, ReceiverState.CLOSED))
    assert receiver.has_pages == ("pages_written" in events)
    assert receiver.has_first_token == ("prefill_done" in events)


@pytest.mark.parametrize(
    ("events", "ignored"),
    [
        ("prefill_done", "prefill_done"),
        ("pages_written", "pages_written"),
        ("cancel", "cancel prefill_done"),
        ("prefill_done pages_written", " ".join(EVENTS)),
        ("cancel handover_closed", " ".join(EVENTS)),
        ("peer_dead", " ".join(EVENTS)),
    ],
)
def test_a_receiver_ignores_what_is_late_or_repeated(events, ignored):
    receiver = ReceiverHandover()
    for event in events.split():
        EVENTS[event](receiver)
    before = vars(receiver).copy()
    for event in ignored.split():
        assert not EVENTS[event](receiver)
        assert vars(receiver) == before


def test_the_first_reason_stands():
    receiver = ReceiverHandover()
    receiver.cancel("deadline")
    receiver.handover_closed("cancelled by decode")
    assert receiver.reason == "deadline"


# ----------------------------------------------------------------- both, over a network with faults


class Run:
    """One handover between two leaders. Messages are delayed, repeated and overtaken by others."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        pages = self.random.randint(0, 6)
        first = self.random.randint(0, pages)
        self.pages = pages
        window = pages // 2
        self.sender: SenderHandover | None = SenderHandover(
            [(start, np.arange(start, pages, dtype=np.int32)) for start in (first, window)]
        )
        self.receiver = ReceiverHandover()
        self.computed = 0
        self.in_flight: set[int] = set()
        self.to_receiver: list[str] = []
        self.to_sender: list[str] = []
        self.last_id = 0
        self.sender_alive = True
        self.has_failed = False

    def steps(self) -> list[Callable[[], None]]:
        steps: list[Callable[[], None]] = []
        if self.sender_alive and self.sender is not None:
            steps += [self.compute, self.compute]
        if self.in_flight:
            steps += [self.end_write, self.end_write]
        if self.to_receiver:
            steps += [self.deliver_to_receiver, self.deliver_to_receiver]
        if self.to_sender and self.sender_alive:
            steps += [self.deliver_to_sender]
        return steps

    def compute(self) -> None:
        if self.sender is None or self.computed > self.pages:
            return
        self.computed += 1
        final = self.computed >= self.pages
        table = list(range(100, 100 + self.pages))
        ready = self.sender.take(self.computed, [table, table], final)
        for _ in ready:
            self.last_id += 1
            self.in_flight.add(self.last_id)
            assert self.sender.write_submitted(self.last_id)
        if final:
            self.computed = self.pages + 1
            self.to_receiver.append("prefill_done")
        self.report()

    def end_write(self) -> None:
        write_id = self.random.choice(sorted(self.in_flight))
        self.in_flight.remove(write_id)
        if self.sender is not None:
            ok = self.random.random() > 0.1
            self.has_failed |= not ok
            assert self.sender.write_done(write_id, ok, 1, 1, 0.0)
            self.report()

    def report(self) -> None:
        """The sender forgets a closed handover and says how it ended."""
        if self.sender is not None and self.sender.is_closed:
            assert not self.in_flight, "source pages released under a write"
            complete = self.sender.is_complete
            assert complete != (self.has_failed or bool(self.sender.reason))
            self.to_receiver.append("pages_written" if complete else "handover_closed")
            self.sender = None

    def deliver_to_receiver(self) -> None:
        message = self.random.choice(self.to_receiver)
        if self.random.random() > 0.2:
            self.to_receiver.remove(message)
        EVENTS[message](self.receiver)

    def deliver_to_sender(self) -> None:
        self.to_sender.pop()
        if self.sender is None:
            self.to_receiver.append("handover_closed")
        else:
            self.sender.cancel("cancelled by decode")
            self.report()

    def cancel(self) -> None:
        if self.receiver.cancel("deadline") and self.receiver.state is ReceiverState.CLOSING:
            self.to_sender += ["cancel", "cancel"]

    def kill_sender(self) -> None:
        """Its writes end with it; only then does the other side hear of it."""
        self.sender_alive = False
        self.sender = None
        self.in_flight.clear()
        self.receiver.peer_dead("process ended")

    def check(self) -> None:
        if self.receiver.may_reuse_targets:
            assert not self.in_flight, "target pages reused under a write"
            if self.sender is not None:
                assert self.sender.is_closed, "target pages reused before the sender was closed"
        if self.sender is not None:
            assert self.sender.outstanding == len(self.in_flight)


@pytest.mark.parametrize("block", range(8))
def test_no_page_is_reused_under_a_write_whatever_happens(block):
    for seed in range(block * 250, block * 250 + 250):
        run = Run(seed)
        faults = run.random.random() < 0.7
        while steps := run.steps():
            if faults and run.random.random() < 0.04:
                run.cancel()
            elif faults and run.random.random() < 0.01:
                run.kill_sender()
            else:
                run.random.choice(steps)()
            run.check()
            if run.receiver.may_reuse_targets and run.sender is None and not run.in_flight:
                break
        assert run.receiver.may_reuse_targets, f"seed {seed}: pages in quarantine for ever"
        # Without faults only a failed write ends a handover early.
        assert (
            faults or run.receiver.state is ReceiverState.LANDED or run.receiver.reason == "closed"
        )
