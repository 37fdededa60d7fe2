"""The log of cache commands between a replica's leader and its ranks: what is copied between tiers
has one outcome, the same on all ranks (rule 4).

Pure; time is an argument. The leader holds a `CommandLog`, each rank's process a `RankLog`; their
owners carry Orders one way and Status the other, copy the pages, and know which processes are dead.

A command covers pages of one sequence; a rank's share are those that it has a part of. Each rank
acknowledges, once and for good, which of its share it has done. When the slowest has, and all
earlier commands have committed, the command commits: the pages done by all that share them, cut to
the longest prefix that can be restored with what is resident already. Full and latent groups need
every page of it, sliding ones those of the last window. Ranks learn of commits in that order.

  on a rank   RUNNING -> ENDED              its copies have ended, with or without success
              RUNNING -> GIVEN_UP -> ENDED  cancelled: what is done by then is acknowledged, copies
                                            may still run
  of a rank   LIVE -> LOST -> LIVE          silent for `silence_s`: counts as having done nothing
                                            of what is open, until it asks for a snapshot
              LIVE, LOST -> DEAD -> LIVE    its process has ended; another takes its place

The leader cancels what is not acknowledged in `timeout_s`, or when told; it commits all the same.
A command's pages are held until each rank has said that its copies have ended, or is DEAD: no
timeout says so. While a rank is not LIVE, new commands count as not done by it.

Messages may be lost, repeated or overtaken. Both kinds are cumulative; the leader repeats what is
not confirmed, and a rank answers. A rank begins a session with a snapshot: what is numbered below
`next_number` is settled without it, commits follow from `committed` on. A new process
(incarnation), and one that was LOST, gets a new session; what belongs to an earlier one is ignored.
The owner knows what a rank lacks that has missed commits: a new process has no page at all.

Methods for events return whether they were accepted; what is late or repeated changes nothing.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Sequence
from typing import TypeAlias

from transfer.layout import LayerGroup

Pages: TypeAlias = tuple[int, ...]
"""By layer group a set of pages: bit p stands for page p of the sequence."""


class CopyState(enum.Enum):
    """Of one command on one rank."""

    RUNNING = "running"
    GIVEN_UP = "given_up"
    """What it has done is final, but copies may still run."""
    ENDED = "ended"
    """No copy runs or will."""


class RankState(enum.Enum):
    LIVE = "live"
    LOST = "lost"
    DEAD = "dead"


@dataclasses.dataclass(frozen=True, slots=True)
class Command:
    number: int
    content: object
    share: Pages
    """The receiving rank's."""


@dataclasses.dataclass(frozen=True, slots=True)
class Commit:
    number: int
    length: int
    """Pages of the sequence that can be restored in the target tier, from its first one on."""
    pages: Pages
    """Those below `length` that this command has brought there, on all ranks."""


@dataclasses.dataclass(frozen=True, slots=True)
class Snapshot:
    committed: int
    """Number of the last commit."""
    next_number: int


@dataclasses.dataclass(frozen=True, slots=True)
class Orders:
    """Leader to rank."""

    incarnation: int
    session: int
    snapshot: Snapshot
    """That the session began with."""
    is_dropped: bool = False
    """What the rank has missed will not be repeated: it must ask for a snapshot."""
    commands: tuple[Command, ...] = ()
    cancelled: tuple[int, ...] = ()
    commits: tuple[Commit, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Ack:
    number: int
    state: CopyState
    done: Pages
    """Final unless RUNNING."""


@dataclasses.dataclass(frozen=True, slots=True)
class Status:
    """Rank to leader: all that is to say."""

    incarnation: int
    session: int
    needs_snapshot: bool
    next_number: int
    """Commands below have been received; those not in `acks` have ended."""
    committed: int
    acks: tuple[Ack, ...]


def restorable_length(groups: Sequence[LayerGroup], page_tokens: int, resident: Pages) -> int:
    """The most leading pages of a sequence after which it can go on with what is resident."""
    length = max((pages.bit_length() for pages in resident), default=0)
    is_cut = True
    while is_cut:
        is_cut = False
        for group, pages in zip(groups, resident, strict=True):
            first = group.first_needed_page(length * page_tokens, page_tokens)
            missing = ((1 << length) - (1 << first)) & ~pages
            if missing:
                # Every length above the lowest missing page, up to this one, needs that page too.
                length = (missing & -missing).bit_length() - 1
                is_cut = True
    return length


@dataclasses.dataclass(slots=True)
class _Part:
    """One rank's of a record."""

    share: Pages
    done: Pages
    state: CopyState


@dataclasses.dataclass(slots=True)
class _Record:
    content: object
    resident: Pages
    parts: list[_Part]
    deadline: float
    is_cancelled: bool = False
    commit: Commit | None = None

    @property
    def is_acknowledged(self) -> bool:
        return CopyState.RUNNING not in [part.state for part in self.parts]

    @property
    def has_ended(self) -> bool:
        return [part.state for part in self.parts].count(CopyState.ENDED) == len(self.parts)


class _Ledger:
    """What the leader knows of one rank."""

    def __init__(self, incarnation: int) -> None:
        self.incarnation = incarnation
        self.state = RankState.LIVE
        self.session = 0
        self.begin(Snapshot(0, 1))

    def begin(self, snapshot: Snapshot) -> None:
        """A session."""
        self.state = RankState.LIVE
        self.session += 1
        self.snapshot = snapshot
        self.has_answered = False
        """In this session."""
        self.next_number = self.sent_number = snapshot.next_number
        """Commands below have been received, or sent since the last repetition."""
        self.committed = self.sent_commit = snapshot.committed
        """Likewise, commits up to here."""
        self.must_cancel = False
        """Cancels have not been sent yet."""
        self.repeat_at = -math.inf
        self.unanswered_since = math.inf


class CommandLog:
    """The leader's side."""

    def __init__(
        self,
        groups: Sequence[LayerGroup],
        page_tokens: int,
        incarnations: Sequence[int],
        *,
        max_open: int = 64,
        timeout_s: float = 10.0,
        silence_s: float = 20.0,
        repeat_s: float = 1.0,
    ) -> None:
        """`incarnations` by rank; those of a rank's later processes are higher."""
        self.committed = 0
        """Number of the last commit."""
        self.next_number = 1
        self._groups = tuple(groups)
        self._page_tokens = page_tokens
        self._max_open = max_open
        self._timeout_s = timeout_s
        self._silence_s = silence_s
        self._repeat_s = repeat_s
        self._ledgers = [_Ledger(incarnation) for incarnation in incarnations]
        self._records: dict[int, _Record] = {}
        """By number, ascending; until committed, ended, and the commit heard by all live ranks."""
        self._commits: list[Commit] = []

    @property
    def num_open(self) -> int:
        """Commands that the log still keeps: something of them is awaited."""
        return len(self._records)

    @property
    def can_issue(self) -> bool:
        return len(self._records) < self._max_open

    @property
    def held(self) -> list[int]:
        """Commands that hold their pages: not committed, or a copy may still run on some rank."""
        return [
            number
            for number, record in self._records.items()
            if record.commit is None or not record.has_ended
        ]

    @property
    def broken(self) -> list[int]:
        """Ranks that are not LIVE."""
        return [r for r, each in enumerate(self._ledgers) if each.state is not RankState.LIVE]

    def may_reuse_pages(self, number: int) -> bool:
        """Pages that the command covers and its commit does not name may be written again."""
        record = self._records.get(number)
        if record is None:
            return 0 < number < self.next_number
        return record.commit is not None and record.has_ended

    def issue(self, content: object, shares: Sequence[Pages], resident: Pages, now: float) -> int:
        """A command's number. `shares` by rank; `resident` are the sequence's pages that are in the
        target tier already, on all ranks. Raises ValueError unless `can_issue`."""
        if not self.can_issue:
            raise ValueError(f"{len(self._records)} commands are open")
        nothing = (0,) * len(self._groups)
        parts = []
        for ledger, share in zip(self._ledgers, shares, strict=True):
            is_live = ledger.state is RankState.LIVE
            state = CopyState.RUNNING if is_live else CopyState.ENDED
            parts.append(_Part(share, nothing, state))
        number = self.next_number
        self.next_number += 1
        self._records[number] = _Record(content, resident, parts, now + self._timeout_s)
        self._settle()
        return number

    def cancel(self, number: int) -> bool:
        """Ranks give up what they have not done."""
        record = self._records.get(number)
        if record is None or record.is_cancelled or record.is_acknowledged:
            return False
        record.is_cancelled = True
        for ledger, part in zip(self._ledgers, record.parts, strict=True):
            ledger.must_cancel |= part.state is CopyState.RUNNING
        return True

    def status(self, rank: int, status: Status) -> bool:
        ledger = self._ledgers[rank]
        if status.incarnation != ledger.incarnation or ledger.state is RankState.DEAD:
            return False
        if status.needs_snapshot and ledger.state is RankState.LOST:
            ledger.begin(Snapshot(self.committed, self.next_number))
            self._settle()
            return True
        if status.session != ledger.session:
            return False
        ledger.has_answered = True
        ledger.unanswered_since = math.inf
        ledger.next_number = max(ledger.next_number, status.next_number)
        ledger.committed = max(ledger.committed, status.committed)
        acks = {ack.number: ack for ack in status.acks}
        for number, record in self._records.items():
            part = record.parts[rank]
            if number >= status.next_number or part.state is CopyState.ENDED:
                continue
            ack = acks.get(number)
            if ack is None:
                part.state = CopyState.ENDED
            elif ack.state is not CopyState.RUNNING:
                if part.state is CopyState.RUNNING:
                    part.done = ack.done
                part.state = ack.state
        self._settle()
        return True

    def rank_dead(self, rank: int, incarnation: int) -> bool:
        """The process is known to have ended, and with it its copies."""
        ledger = self._ledgers[rank]
        if incarnation != ledger.incarnation or ledger.state is RankState.DEAD:
            return False
        ledger.state = RankState.DEAD
        for record in self._records.values():
            record.parts[rank].state = CopyState.ENDED
        self._settle()
        return True

    def rank_replaced(self, rank: int, incarnation: int) -> bool:
        """A new process has taken the place of one that is known to have ended."""
        ledger = self._ledgers[rank]
        if incarnation <= ledger.incarnation:
            return False
        self.rank_dead(rank, ledger.incarnation)
        ledger.incarnation = incarnation
        ledger.begin(Snapshot(self.committed, self.next_number))
        return True

    def take_commits(self) -> list[Commit]:
        """Since the last call, in order."""
        commits, self._commits = self._commits, []
        return commits

    def tick(self, now: float) -> list[tuple[int, Orders]]:
        """Time has passed, or something has happened: what is to be sent, by rank. The caller first
        hands in every Status that has arrived: else a rank that has spoken may count as silent."""
        for number, record in self._records.items():
            if now > record.deadline and not record.is_cancelled:
                self.cancel(number)
        for rank, ledger in enumerate(self._ledgers):
            if ledger.state is RankState.LIVE and now > ledger.unanswered_since + self._silence_s:
                ledger.state = RankState.LOST
                for record in self._records.values():
                    if record.parts[rank].state is CopyState.RUNNING:
                        record.parts[rank].state = CopyState.GIVEN_UP
                self._settle()
        return [
            (rank, self._take_orders(rank, now))
            for rank, ledger in enumerate(self._ledgers)
            if self._must_send(rank, ledger, now)
        ]

    def _must_send(self, rank: int, ledger: _Ledger, now: float) -> bool:
        if ledger.state is RankState.LIVE and (
            ledger.must_cancel
            or ledger.sent_number < self.next_number
            or ledger.sent_commit < self.committed
        ):
            return True
        return now >= ledger.repeat_at and self._is_owed(rank, ledger)

    def _is_owed(self, rank: int, ledger: _Ledger) -> bool:
        """Whether the rank has something to say that the leader waits for."""
        if ledger.state is not RankState.LIVE:
            return ledger.state is RankState.LOST
        return (
            not ledger.has_answered
            or ledger.next_number < self.next_number
            or ledger.committed < self.committed
            or any(r.parts[rank].state is not CopyState.ENDED for r in self._records.values())
        )

    def _take_orders(self, rank: int, now: float) -> Orders:
        ledger = self._ledgers[rank]
        is_repetition = now >= ledger.repeat_at
        if is_repetition:
            ledger.repeat_at = now + self._repeat_s
        ledger.unanswered_since = min(ledger.unanswered_since, now)
        if ledger.state is RankState.LOST:
            return Orders(ledger.incarnation, ledger.session, ledger.snapshot, is_dropped=True)
        if is_repetition:
            ledger.sent_number, ledger.sent_commit = ledger.next_number, ledger.committed
        commands, cancelled, commits = [], [], []
        for number, record in self._records.items():
            part = record.parts[rank]
            if number >= ledger.sent_number:
                commands.append(Command(number, record.content, part.share))
            if record.is_cancelled and part.state is CopyState.RUNNING:
                cancelled.append(number)
            if record.commit is not None and number > ledger.sent_commit:
                commits.append(record.commit)
        ledger.sent_number, ledger.sent_commit = self.next_number, self.committed
        ledger.must_cancel = False
        return Orders(
            ledger.incarnation,
            ledger.session,
            ledger.snapshot,
            commands=tuple(commands),
            cancelled=tuple(cancelled),
            commits=tuple(commits),
        )

    def _settle(self) -> None:
        """Commit what can be, forget what nobody needs."""
        while (record := self._records.get(self.committed + 1)) and record.is_acknowledged:
            self.committed += 1
            record.commit = self._commit(self.committed, record)
            self._commits.append(record.commit)
        heard = self._heard_by_all()
        for number in [n for n in self._records if n <= heard]:
            if self._records[number].has_ended:
                del self._records[number]

    def _heard_by_all(self) -> int:
        """Live ranks have applied the commits up to here."""
        live = [each.committed for each in self._ledgers if each.state is RankState.LIVE]
        return min(live, default=self.committed)

    def _commit(self, number: int, record: _Record) -> Commit:
        done = []
        for g in range(len(self._groups)):
            covered = undone = 0
            for part in record.parts:
                covered |= part.share[g]
                undone |= part.share[g] & ~part.done[g]
            done.append(covered & ~undone)
        target = tuple(old | new for old, new in zip(record.resident, done, strict=True))
        length = restorable_length(self._groups, self._page_tokens, target)
        return Commit(number, length, tuple(pages & ((1 << length) - 1) for pages in done))

    def check_integrity(self) -> None:
        """Raises AssertionError."""
        assert len(self._records) <= self._max_open, "too many commands are open"
        running, live = CopyState.RUNNING, RankState.LIVE
        uncommitted = range(self.committed + 1, self.next_number)
        assert [n for n in self._records if n > self.committed] == [*uncommitted], "one is lost"
        heard = self._heard_by_all()
        for number, record in self._records.items():
            is_committed = number <= self.committed
            assert (record.commit is not None) == is_committed, f"{number}: out of order"
            assert number > heard or not record.has_ended, f"{number} is kept for nothing"
            if number == self.committed + 1:
                assert not record.is_acknowledged, f"{number} could be committed"
            for ledger, part in zip(self._ledgers, record.parts, strict=True):
                if part.state is running:
                    assert not is_committed, f"{number} was committed too early"
                    assert ledger.state is live, f"{number} waits for a broken rank"
                    assert number >= ledger.snapshot.next_number, f"{number} is not the session's"
                elif ledger.state is not live and part.state is not CopyState.ENDED:
                    assert ledger.state is RankState.LOST, f"{number} waits for a dead rank"
        for rank, ledger in enumerate(self._ledgers):
            if ledger.state is live:
                assert ledger.committed <= ledger.sent_commit <= self.committed, f"rank {rank}"
                assert ledger.next_number <= ledger.sent_number <= self.next_number, f"rank {rank}"
                for number in range(ledger.committed + 1, self.committed + 1):
                    assert number in self._records, f"rank {rank} cannot hear of {number}"


class _Entry:
    """A command on a rank."""

    __slots__ = ("done", "is_started", "share", "state")

    def __init__(self, share: Pages) -> None:
        self.share = share
        self.done = [0] * len(share)
        self.state = CopyState.RUNNING
        self.is_started = False


class RankLog:
    """The side of one process of a rank."""

    def __init__(self, incarnation: int) -> None:
        self.incarnation = incarnation
        self.session = 0
        """0: it has no snapshot yet."""
        self.committed = 0
        self.next_number = 0
        self._settled_before = 0
        """Commands below are settled without this rank."""
        self._needs_snapshot = False
        self._has_news = False
        self._entries: dict[int, _Entry] = {}
        """By number; until the copies have ended and the commit is known."""
        self._to_start: list[Command] = []
        self._to_stop: list[int] = []
        self._commits: list[Commit | Snapshot] = []

    @property
    def num_open(self) -> int:
        return len(self._entries)

    def orders(self, orders: Orders) -> bool:
        if orders.incarnation != self.incarnation or orders.session < self.session:
            return False
        self._has_news = True
        if orders.is_dropped:
            self._needs_snapshot = True
            return True
        if orders.session > self.session:
            self._begin(orders.session, orders.snapshot)
        for command in orders.commands:
            if command.number == self.next_number:
                self.next_number += 1
                self._entries[command.number] = _Entry(command.share)
                self._to_start.append(command)
        for number in orders.cancelled:
            self._give_up(number)
        for commit in orders.commits:
            if commit.number == self.committed + 1:
                self.committed += 1
                self._commits.append(commit)
                self._forget(commit.number)
        return True

    def _begin(self, session: int, snapshot: Snapshot) -> None:
        self.session = session
        self.committed = snapshot.committed
        self.next_number = self._settled_before = snapshot.next_number
        self._needs_snapshot = False
        self._commits.append(snapshot)
        for number in list(self._entries):
            self._give_up(number)
            self._forget(number)

    def _give_up(self, number: int) -> None:
        entry = self._entries.get(number)
        if entry is None or entry.state is not CopyState.RUNNING:
            return
        if entry.is_started:
            entry.state = CopyState.GIVEN_UP
            self._to_stop.append(number)
        else:
            entry.state = CopyState.ENDED
            self._to_start = [command for command in self._to_start if command.number != number]

    def _forget(self, number: int) -> None:
        """If nothing is left to say of it."""
        entry = self._entries.get(number)
        is_settled = number <= self.committed or number < self._settled_before
        if entry is not None and is_settled and entry.state is CopyState.ENDED:
            del self._entries[number]

    def take_commands(self) -> list[Command]:
        """To be started now, in order; the caller owes `ended` for each."""
        commands, self._to_start = self._to_start, []
        for command in commands:
            self._entries[command.number].is_started = True
        return commands

    def take_stops(self) -> list[int]:
        """Commands whose copies are no longer wanted; `ended` is still owed."""
        numbers, self._to_stop = self._to_stop, []
        return numbers

    def take_commits(self) -> list[Commit | Snapshot]:
        """Since the last call, in order. A snapshot stands for all commits up to its number: those
        between it and the one before have been missed."""
        commits, self._commits = self._commits, []
        return commits

    def pages_done(self, number: int, pages: Pages) -> bool:
        """Pages of a started command are complete."""
        entry = self._entries.get(number)
        if entry is None or entry.state is not CopyState.RUNNING:
            return False
        entry.done = [
            old | new & share
            for old, new, share in zip(entry.done, pages, entry.share, strict=True)
        ]
        return True

    def ended(self, number: int) -> bool:
        """No copy of a started command runs, and none will."""
        entry = self._entries.get(number)
        if entry is None or not entry.is_started or entry.state is CopyState.ENDED:
            return False
        entry.state = CopyState.ENDED
        self._has_news = True
        self._forget(number)
        return True

    def take_status(self) -> Status | None:
        """To be sent to the leader, if there is news or it has asked."""
        if not self._has_news:
            return None
        self._has_news = False
        acks = [Ack(n, each.state, tuple(each.done)) for n, each in self._entries.items()]
        return Status(
            self.incarnation,
            self.session,
            self._needs_snapshot,
            self.next_number,
            self.committed,
            tuple(acks),
        )

    def check_integrity(self) -> None:
        """Raises AssertionError."""
        assert self.committed < max(self.next_number, 1), "a commit without its command"
        to_start = []
        for number, entry in self._entries.items():
            assert number < self.next_number, f"{number} comes from nowhere"
            if entry.state is CopyState.RUNNING and not entry.is_started:
                to_start.append(number)
            if number <= self.committed or number < self._settled_before:
                assert entry.state is CopyState.GIVEN_UP, f"{number} is kept for nothing"
            for done, share in zip(entry.done, entry.share, strict=True):
                assert not done & ~share, f"{number}: another's pages are done"
        assert [command.number for command in self._to_start] == to_start, "lost before its start"
        for number in range(max(self.committed + 1, self._settled_before), self.next_number):
            assert number in self._entries, f"the acknowledgement of {number} is lost"
