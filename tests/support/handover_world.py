"""One sender and one receiver of handovers, with everything that can happen to them, in seeded
schedules that are small and fast: a hundred thousand run in half a minute.

Both sides do with the machines of transfer/handover.py what leaders do, and no more. Messages are
lost, repeated, and overtake each other; writes fail, or have no end until their link is broken;
either side gives up at any time, or dies and starts again under the same name, which the other
hears of later. Then the faults stop, and everything must come to its end.

What is checked: no write is in flight to a page that is released, and none is posted to one that
is not the handover's; pages said to have landed have, for good; a sender is closed only without
writes; in the end nothing is left in any table, and all pages are free.
"""

from __future__ import annotations

import random

import numpy as np

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
)

NUM_PAGES = 4
MAX_HANDOVERS = 4
PATIENCE_S = 40.0
_SOURCES = [list(range(10, 10 + NUM_PAGES))]

Message = tuple[str, int, int, tuple[int, ...]]
"""Kind, serial, floor (to the sender) or 1 for complete (to the receiver), target pages or how many
have landed."""


class Receiver:
    """One incarnation."""

    def __init__(self) -> None:
        self.ledger = ReceiverLedger()
        self.free = list(range(NUM_PAGES))
        self.owner = [0] * NUM_PAGES
        """Serial of the handover that may write to the page; 0: none."""
        self.content = [0] * NUM_PAGES
        """Serial of the handover whose bytes have landed in it."""
        self.pages: dict[int, list[int]] = {}
        """By serial: target pages that are not free yet."""
        self.alive = True


class Sender:
    """One incarnation."""

    def __init__(self) -> None:
        self.ledger = SenderLedger()
        self.live: dict[SenderHandover, tuple[int, Receiver, int]] = {}
        """Serial, target, pages; until closed."""
        self.computed: dict[SenderHandover, int] = {}
        self.peer: Receiver
        self.alive = True


class Write:
    __slots__ = ("batch", "handover", "is_stuck", "number", "pages", "sender", "serial", "target")

    def __init__(
        self,
        number: int,
        sender: Sender,
        handover: SenderHandover,
        pages: ReadyPages,
        batch: list[bool],
        stuck: bool,
    ) -> None:
        self.number = number
        self.sender = sender
        self.handover = handover
        self.serial, self.target, _ = sender.live[handover]
        self.pages: list[int] = pages.target_slots.tolist()
        self.batch = batch
        """How those of the same pages ended that have."""
        self.is_stuck = stuck


class World:
    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed).random
        self.now = 0.0
        self.num_started = 0
        self.receiver = Receiver()
        self.sender = Sender()
        self.sender.peer = self.receiver
        self.receiver_peer = self.sender
        """The sender that the receiver knows."""
        self.to_sender: list[tuple[Receiver, Sender, Message]] = []
        self.to_receiver: list[tuple[Sender, Receiver, Message]] = []
        self.writes: list[Write] = []
        self.last_write = 0
        self.has_faults = True
        # A schedule has some kinds of faults, and others not: alone they reach further.
        self.loss = 0.25 * (self.random() < 0.5)
        self.repeat = 0.25 * (self.random() < 0.5)
        self.failure = 0.3 * (self.random() < 0.4)
        self.stuck = 0.1 * (self.random() < 0.15)
        self.abort = 0.08 * (self.random() < 0.6)
        self.death = 0.03 * (self.random() < 0.3)

    def run(self) -> None:
        for _ in range(10 + int(self.random() * 40)):
            self.step()
        self.loss = self.repeat = self.failure = self.stuck = self.abort = self.death = 0.0
        self.has_faults = False
        idle = 0
        for _ in range(400):
            if self.to_sender or self.to_receiver or any(not w.is_stuck for w in self.writes):
                self.step()
            else:
                self.notice_deaths()
                for handover in list(self.sender.live):
                    self.compute(handover)
                self.tick(1.3 if idle < 6 else 9.0)
                idle += 1
                if self.is_quiet():
                    break
        self.check_end()

    # ---------------------------------------------------------------------------------- one action

    def step(self) -> None:
        pick = self.random()
        if pick < self.abort:
            self.give_up()
        elif self.random() < self.death:
            self.die()
        elif pick < 0.2 and self.writes:
            self.end_write(self.writes[int(self.random() * len(self.writes))])
        elif pick < 0.5 and self.to_receiver:
            self.deliver_to_receiver()
        elif pick < 0.72 and self.to_sender:
            self.deliver_to_sender()
        elif pick < 0.84 and self.sender.live:
            live = list(self.sender.live)
            self.compute(live[int(self.random() * len(live))])
        elif pick < 0.92 and self.num_started < MAX_HANDOVERS and self.receiver.free:
            self.start()
        elif pick < 0.93:
            self.notice_deaths()
        elif pick < 0.97 or not self.writes:
            self.tick(0.9)
        else:
            self.end_write(self.writes[0])

    def start(self) -> None:
        receiver = self.receiver
        if not self.receiver_peer.alive:
            return
        self.num_started += 1
        handover = receiver.ledger.start(1, self.now, PATIENCE_S)
        count = 1 + int(self.random() * len(receiver.free))
        pages = [receiver.free.pop() for _ in range(count)]
        receiver.pages[handover.serial] = pages
        for page in pages:
            receiver.owner[page] = handover.serial
        self.ask("reserve", handover.serial)

    def ask(self, kind: str, serial: int) -> None:
        pages = tuple(self.receiver.pages[serial]) if kind == "reserve" else ()
        message = (kind, serial, self.receiver.ledger.floor, pages)
        self.to_sender.append((self.receiver, self.receiver_peer, message))

    def give_up(self) -> None:
        """Either side, any handover."""
        if self.random() < 0.6:
            for handover in list(self.receiver.ledger.open.values()):
                if self.random() < 0.6:
                    self.cancel(handover)
        else:
            for sending in list(self.sender.live):
                sending.cancel("enough", self.now)
                self.follow(self.sender, sending)

    def cancel(self, handover: ReceiverHandover) -> None:
        if handover.cancel("client left", self.now):
            self.check_landed(handover)
            if handover.state is ReceiverState.CLOSING:
                self.ask("cancel", handover.serial)
            self.settle(handover)

    def die(self) -> None:
        """A process ends, and its writes with it; another one takes its name."""
        if self.random() < 0.5:
            self.sender.alive = False
            self.writes = [write for write in self.writes if write.sender is not self.sender]
            self.sender = Sender()
            self.sender.peer = self.receiver
        else:
            self.receiver.alive = False
            self.receiver = Receiver()
            self.receiver_peer = self.sender

    def notice_deaths(self) -> None:
        if not self.receiver_peer.alive:
            for handover in list(self.receiver.ledger.open.values()):
                handover.peer_dead("it died")
                self.settle(handover)
            self.receiver.ledger = ReceiverLedger()
            self.receiver_peer = self.sender
        sender = self.sender
        if not sender.peer.alive:
            sender.peer = self.receiver
            sender.ledger = SenderLedger()
            for handover in list(sender.live):
                handover.cancel("it died", self.now)
                self.follow(sender, handover)

    # ---------------------------------------------------------------------------------- the sender

    def deliver_to_sender(self) -> None:
        place = int(self.random() * len(self.to_sender))
        receiver, sender, message = self.to_sender[place]
        if self.random() >= self.repeat:
            self.to_sender[place] = self.to_sender[-1]
            self.to_sender.pop()
        if self.random() < self.loss or sender is not self.sender or sender.peer is not receiver:
            return
        kind, serial, floor, pages = message
        ledger = sender.ledger
        if kind == "settled":
            ledger.settled(floor)
            self.tell(sender, ("heard", 0, ledger.floor, ()))
            return
        if kind == "reserve":
            answer = ledger.reserve(serial, floor)
        elif kind == "ask":
            answer = ledger.ask(serial, floor)
        else:
            answer = ledger.cancel(serial, floor, self.now)
        if answer is SenderAnswer.START:
            targets = [(0, np.array(pages, np.int32))]
            handover = SenderHandover(targets, self.now + 100.0, PATIENCE_S)
            ledger.records[serial] = handover
            sender.live[handover] = (serial, receiver, len(pages))
            sender.computed[handover] = 0
        elif answer is SenderAnswer.REPORT:
            handover = ledger.records[serial]
            if handover in sender.live:
                self.follow(sender, handover)
            self.report(sender, serial, handover)
        elif answer is SenderAnswer.UNKNOWN:
            self.tell(sender, ("unknown", serial, 0, ()))

    def tell(self, sender: Sender, message: Message) -> None:
        self.to_receiver.append((sender, sender.peer, message))

    def report(self, sender: Sender, serial: int, handover: SenderHandover) -> None:
        if handover.first_token:
            self.tell(sender, ("token", serial, 0, ()))
        landed = tuple(handover.landed)
        if not handover.has_last_word:
            self.tell(sender, ("written", serial, 0, landed))
        elif handover.is_complete:
            self.tell(sender, ("written", serial, 1, landed))
        else:
            self.tell(sender, ("closed", serial, 0, landed))

    def compute(self, handover: SenderHandover) -> None:
        """One page more, and the first token with the last."""
        sender = self.sender
        if handover.state is not SenderState.OPEN or handover.first_token:
            return
        computed = sender.computed[handover] = sender.computed[handover] + 1
        serial, _, num_pages = sender.live[handover]
        final = computed >= num_pages
        if final:
            handover.first_token = True
            self.tell(sender, ("token", serial, 0, ()))
        for ready in handover.take(computed, _SOURCES, final):
            self.post(sender, handover, ready)
        self.follow(sender, handover)

    def post(self, sender: Sender, handover: SenderHandover, ready: ReadyPages) -> None:
        """As one write or as two, each of which has a part of each page."""
        numbers = []
        batch: list[bool] = []
        for _ in range(1 if self.random() < 0.7 else 2):
            number = self.last_write = self.last_write + 1
            stuck = self.random() < self.stuck
            write = Write(number, sender, handover, ready, batch, stuck)
            numbers.append(number)
            self.writes.append(write)
            for page in write.pages if write.target.alive else ():
                assert write.target.owner[page] == write.serial, "a write to another's page"
                assert write.target.content[page] != write.serial, "a write to a landed page"
        handover.posted(ready, numbers, self.now)

    def end_write(self, write: Write, error: str | None = None) -> None:
        if write.is_stuck and error is None:
            return
        self.writes.remove(write)
        if error is None and self.random() < self.failure:
            error = "failed"
        write.batch.append(error is None)
        is_last = not any(other.batch is write.batch for other in self.writes)
        for page in write.pages if write.target.alive else ():
            assert write.target.owner[page] == write.serial, "a byte in another's page"
            if is_last and all(write.batch):
                write.target.content[page] = write.serial
        sender, handover = write.sender, write.handover
        landed = handover.landed[0]
        assert handover.write_done(write.number, error, 1, 1, 0.1, self.now)
        is_news = handover.state is SenderState.OPEN and handover.landed[0] > landed
        if is_news and sender.live[handover][1] is sender.peer:
            self.report(sender, write.serial, handover)
        self.follow(sender, handover)

    def follow(self, sender: Sender, handover: SenderHandover) -> None:
        if handover.is_closed and handover in sender.live:
            serial, target, _ = sender.live.pop(handover)
            assert not any(w.handover is handover for w in self.writes), "closed with writes"
            del sender.computed[handover]
            if target is sender.peer:
                self.report(sender, serial, handover)

    # -------------------------------------------------------------------------------- the receiver

    def deliver_to_receiver(self) -> None:
        place = int(self.random() * len(self.to_receiver))
        sender, receiver, message = self.to_receiver[place]
        if self.random() >= self.repeat:
            self.to_receiver[place] = self.to_receiver[-1]
            self.to_receiver.pop()
        known = receiver is self.receiver and sender is self.receiver_peer
        if self.random() < self.loss or not known:
            return
        kind, serial, flag, landed = message
        if kind == "heard":
            receiver.ledger.settled_heard(flag)
            return
        handover = receiver.ledger.open.get(serial)
        if handover is None:
            return
        if kind == "token":
            handover.prefill_done(self.now)
        elif kind == "written":
            handover.pages_written(landed, bool(flag), self.now)
        elif kind == "closed":
            handover.handover_closed(landed, "closed")
        elif handover.is_unknown(self.now):
            self.ask("reserve", serial)
        self.settle(handover)

    def settle(self, handover: ReceiverHandover) -> None:
        if not handover.may_reuse_targets:
            return
        self.check_landed(handover)
        receiver, serial = self.receiver, handover.serial
        receiver.ledger.settle(serial)
        pages = receiver.pages.pop(serial)
        if handover.state is ReceiverState.LANDED:
            assert handover.landed[0] == len(pages)
        for write in self.writes:
            if write.target is receiver and write.serial == serial:
                raise AssertionError("pages are released while a write is in flight")
        for page in pages:
            receiver.owner[page] = receiver.content[page] = 0
        receiver.free += pages

    def check_landed(self, handover: ReceiverHandover) -> None:
        """Pages said to have landed can be used from now on."""
        landed = self.receiver.pages[handover.serial][: handover.landed[0]]
        for page in landed:
            assert self.receiver.content[page] == handover.serial, "not landed"
        for write in self.writes:
            if write.target is self.receiver and write.serial == handover.serial:
                assert not set(write.pages) & set(landed), "landed, and still written"

    # ----------------------------------------------------------------------------- time and the end

    def tick(self, seconds: float) -> None:
        self.now += seconds
        now, sender = self.now, self.sender
        for handover in list(sender.live):
            if handover.tick(now):
                for write in [w for w in self.writes if w.sender is sender]:
                    self.end_write(write, "the link was broken")
            for ready in handover.take_retries(now):
                self.post(sender, handover, ready)
            self.follow(sender, handover)
        for receiving in list(self.receiver.ledger.open.values()):
            need = receiving.tick(now)
            if need is ReceiverNeed.ASK:
                self.ask("ask", receiving.serial)
            elif need is ReceiverNeed.CANCEL:
                self.ask("cancel", receiving.serial)
            elif need is ReceiverNeed.GIVE_UP:
                assert self.has_faults, "given up although asking is answered"
                self.cancel(receiving)
        if self.receiver.ledger.must_tell_floor(now):
            self.ask("settled", 0)

    def is_quiet(self) -> bool:
        return not (
            self.receiver.ledger.open
            or self.sender.live
            or self.sender.ledger.records
            or self.writes
            or self.to_sender
            or self.to_receiver
            or self.receiver.ledger.must_tell_floor(self.now + 10.0)
        )

    def check_end(self) -> None:
        receiver, sender = self.receiver, self.sender
        assert not receiver.ledger.open, "a handover has no end"
        assert sorted(receiver.free) == list(range(NUM_PAGES)), "pages are lost"
        assert not receiver.pages
        assert not any(receiver.owner)
        assert not sender.live, "a handover has no end at the sender"
        assert not self.writes, "a write has no end"
        assert not sender.computed
        assert not sender.ledger.records, "how a handover ended is kept for ever"
