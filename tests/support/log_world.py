"""One leader and the ranks of its replica with a log of cache commands, and everything that can
happen to them, in seeded schedules that are small and fast: a hundred thousand run in 40 seconds.

Leader and ranks do with the machines of hicache/log.py what their owners do, and no more. Copies of
pages end in any order; some fail, on one rank only, some have no end until their process has. The
messages of both directions are lost, repeated, and overtake each other, also between processes of
the same rank; a process hangs, or dies and starts again, which the leader hears of later; commands
are cancelled at any time. Then the faults stop, and everything must come to its end.

What is checked: each command commits once, in order, with the longest prefix that a slow model
finds restorable from what the ranks' copies really did; every live rank applies the same commits;
no copy begins or runs in pages that may be reused; in the end no command is open or held anywhere.
"""

from __future__ import annotations

import functools
import random

from hicache.log import (
    Command,
    CommandLog,
    Commit,
    CopyState,
    Orders,
    Pages,
    RankLog,
    Snapshot,
    Status,
)
from transfer.layout import LayerGroup

PAGE_TOKENS = 2
GROUPS = (LayerGroup("full", (0,), 1, 1), LayerGroup("sliding", (1,), 1, 1, window=4))
MAX_PAGES = 6
MAX_OPEN = 3

Page = tuple[int, int]
"""Layer group, page."""


@functools.cache
def restorable_pages(present: frozenset[Page]) -> int:
    """As the definition has it: of every key that the next token attends to, its page is there."""
    lengths = []
    for length in range(MAX_PAGES + 1):
        next_token = length * PAGE_TOKENS
        needed = {(0, token // PAGE_TOKENS) for token in range(next_token)}
        first = max(0, next_token - GROUPS[1].window + 1)
        needed |= {(1, token // PAGE_TOKENS) for token in range(first, next_token)}
        if needed <= present:
            lengths.append(length)
    return max(lengths)


def as_masks(pages: set[Page]) -> Pages:
    full = sliding = 0
    for group, page in pages:
        if group:
            sliding |= 1 << page
        else:
            full |= 1 << page
    return full, sliding


class Process:
    """One of a rank."""

    __slots__ = ("alive", "applied", "copies", "done", "final", "hangs", "log", "rank", "stuck")

    def __init__(self, rank: int, incarnation: int) -> None:
        self.rank = rank
        self.log = RankLog(incarnation)
        self.alive = True
        self.hangs = False
        self.copies: dict[int, list[Page]] = {}
        """By command: copies that run."""
        self.done: dict[int, set[Page]] = {}
        """By command: what its copies have brought."""
        self.final: dict[int, set[Page]] = {}
        """By command: what they had when it was acknowledged."""
        self.stuck: set[int] = set()
        """Commands with a copy that has no end."""
        self.applied: list[Commit | Snapshot] = []

    def is_done(self, num_commands: int) -> bool:
        return not self.alive or (self.log.committed == num_commands and not self.log.num_open)


class World:
    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed).random
        chance = self.random
        self.now = 0.0
        num_ranks = 2 + int(chance() ** 4 * 3)
        self.cp = 1 + (num_ranks % 2 == 0 and chance() < 0.4)
        self.num_commands = 2 + int(chance() ** 4 * 5)
        self.log = CommandLog(
            GROUPS,
            PAGE_TOKENS,
            [1] * num_ranks,
            max_open=MAX_OPEN,
            timeout_s=4.0,
            silence_s=7.0,
            repeat_s=2.0,
        )
        self.processes = [Process(rank, 1) for rank in range(num_ranks)]
        self.to_rank: list[tuple[int, Orders]] = []
        self.to_leader: list[tuple[int, Status]] = []
        self.num_issued = 0
        self.commits: list[Commit] = []
        self.covered: dict[int, set[Page]] = {}
        self.resident: dict[int, set[Page]] = {}
        self.counted: dict[int, dict[int, set[Page]]] = {}
        """By command and rank: what the rank has done as far as the leader can know."""
        self.has_faults = True
        # A schedule has some kinds of faults, and others not: alone they reach further.
        self.loss = 0.25 * (chance() < 0.5)
        self.repeat = 0.25 * (chance() < 0.5)
        self.failure = 0.15 * (chance() < 0.6)
        self.stuck = 0.15 * (chance() < 0.2)
        self.abort = 0.06 * (chance() < 0.5)
        self.hang = 0.06 * (chance() < 0.3)
        self.death = 0.04 * (chance() < 0.35)

    def run(self) -> None:
        for _ in range(3 + int(self.random() ** 3 * 25)):
            self.step()
        self.has_faults = False
        # One command more shows that there is room for it.
        self.num_commands = self.num_issued + (self.num_issued < 2 or self.random() < 0.1)
        self.loss = self.repeat = self.failure = self.stuck = self.abort = 0.0
        self.hang = self.death = 0.0
        for process in self.processes:
            process.hangs = process.hangs and self.random() < 0.3
        for turn in range(200):
            if self.is_quiet():
                break
            self.settle(turn)
        self.check_end()

    # ---------------------------------------------------------------------------------- one action

    def step(self) -> None:
        pick = self.random()
        if pick < 0.3 and self.to_rank:
            self.deliver_to_rank()
        elif pick < 0.55 and self.to_leader:
            self.deliver_to_leader()
        elif pick < 0.72 and (process := self.any_process()).copies:
            self.copy(process)
        elif pick < 0.86 and self.num_issued < self.num_commands and self.log.can_issue:
            self.issue()
        else:
            self.tick(0.5 if self.random() < 0.8 else 3.0)
        pick = self.random()
        if pick < self.abort and self.num_issued:
            self.log.cancel(1 + int(self.random() * self.num_issued))
        elif pick > 1 - self.hang:
            process = self.any_process()
            process.hangs = not process.hangs
        if self.death and self.random() < 5 * self.death:
            process = self.any_process()
            if self.random() < 0.2:
                process.alive = False
            elif not process.alive:
                self.notice_death(process, self.random() < 0.6)

    def any_process(self) -> Process:
        return self.processes[int(self.random() * len(self.processes))]

    def settle(self, turn: int) -> None:
        """Without faults: whatever is due."""
        while self.to_rank:
            self.deliver_to_rank()
        for process in self.processes:
            while process.alive and process.copies.keys() - process.stuck:
                self.copy(process)
            process.log.check_integrity()
            self.tell(process)
            if turn == 8:
                # Neither a copy without an end nor a silent rank holds up the others for longer.
                assert self.log.committed == self.num_issued, "a command has no end"
                process.alive &= not process.stuck
                process.hangs = False
            if not process.alive and turn in (1, 9):
                self.notice_death(process, self.random() < 0.7)
        while self.to_leader:
            self.deliver_to_leader()
        if self.num_issued < self.num_commands and self.log.can_issue:
            self.issue()
        self.tick(2.1)

    def issue(self) -> None:
        """Any run of pages after what is there; of the sliding group perhaps only the last ones."""
        chance = self.random
        end = 1 + int(chance() * MAX_PAGES)
        start = int(chance() * end) if chance() < 0.5 else 0
        sliding = start if chance() < 0.6 else max(start, end - 2)
        covered = {(0, page) for page in range(start, end)}
        covered |= {(1, page) for page in range(sliding, end)}
        resident = {(group, page) for group in (0, 1) for page in range(start)}
        shares = [as_masks(self.share(covered, process.rank)) for process in self.processes]
        number = self.log.issue("content", shares, as_masks(resident), self.now)
        self.num_issued += 1
        assert number == self.num_issued
        self.covered[number], self.resident[number] = covered, resident
        self.counted[number] = {}
        self.check()

    def share(self, pages: set[Page], rank: int) -> set[Page]:
        if self.cp == 1:
            return pages
        return {page for page in pages if page[1] % self.cp == rank % self.cp}

    def copy(self, process: Process) -> None:
        """Some copies of a command end."""
        if not process.copies or not process.alive:
            return
        numbers = list(process.copies)
        number = numbers[int(self.random() * len(numbers))]
        copies = process.copies[number]
        assert not self.log.may_reuse_pages(number), f"{number}: a copy runs in reusable pages"
        landed = set()
        while copies and (not self.has_faults or self.random() < 0.8):
            page = copies.pop(int(self.random() * len(copies)))
            if self.random() >= self.failure:
                landed.add(page)
        process.done[number] |= landed
        process.log.pages_done(number, as_masks(landed))
        if not copies and number not in process.stuck:
            del process.copies[number]
            process.final.setdefault(number, set(process.done[number]))
            assert process.log.ended(number)
            if self.has_faults:
                self.tell(process)

    # -------------------------------------------------------------------------------- the network

    def deliver_to_rank(self) -> None:
        place = int(self.random() * len(self.to_rank))
        rank, orders = self.to_rank[place]
        process = self.processes[rank]
        if not self.repeat or self.random() >= self.repeat:
            self.to_rank[place] = self.to_rank[-1]
            self.to_rank.pop()
        if (self.loss and self.random() < self.loss) or not process.alive or process.hangs:
            return
        log = process.log
        log.orders(orders)
        process.applied += log.take_commits()
        # The owner may be busy; what is cancelled before it looks, is never started.
        if not self.has_faults or self.random() < 0.8:
            self.start(process, log.take_commands())
        for number in log.take_stops():
            process.final[number] = set(process.done[number])
            if self.random() < 0.5:
                del process.copies[number][1:]
        if self.has_faults:
            log.check_integrity()
            self.tell(process)

    def start(self, process: Process, commands: list[Command]) -> None:
        for command in commands:
            number = command.number
            assert number not in process.done, f"{number} is started twice"
            assert not self.log.may_reuse_pages(number), f"{number} is started in reusable pages"
            copies = sorted(self.share(self.covered[number], process.rank))
            assert as_masks(set(copies)) == command.share
            process.copies[number] = copies
            process.done[number] = set()
            if self.random() < self.stuck:
                process.stuck.add(number)

    def tell(self, process: Process) -> None:
        if process.hangs or not process.alive:
            return
        status = process.log.take_status()
        if status is not None:
            self.to_leader.append((process.rank, status))
            assert process.log.num_open <= MAX_OPEN, "a rank keeps a history"

    def deliver_to_leader(self) -> None:
        place = int(self.random() * len(self.to_leader))
        rank, status = self.to_leader[place]
        if not self.repeat or self.random() >= self.repeat:
            self.to_leader[place] = self.to_leader[-1]
            self.to_leader.pop()
        if self.loss and self.random() < self.loss:
            return
        process = self.processes[rank]
        if self.log.status(rank, status):
            assert status.incarnation == process.log.incarnation, "of another process"
            for ack in status.acks:
                if ack.state is not CopyState.RUNNING:
                    really = process.final.get(ack.number, set())
                    assert ack.done == as_masks(really), f"{ack.number}: not what was done"
                    self.counted[ack.number].setdefault(rank, really)
            if self.has_faults:
                self.check()

    # ------------------------------------------------------------------------ deaths and the clock

    def notice_death(self, process: Process, is_replaced: bool) -> None:
        rank, incarnation = process.rank, process.log.incarnation
        self.log.rank_dead(rank, incarnation)
        self.check()
        if is_replaced:
            self.processes[rank] = Process(rank, incarnation + 1)
            assert self.log.rank_replaced(rank, incarnation + 1)
            assert not self.log.rank_dead(rank, incarnation), "that is long known"
            self.check()

    def tick(self, seconds: float) -> None:
        self.now += seconds
        self.to_rank += self.log.tick(self.now)
        self.check()

    # --------------------------------------------------------------------------------- the checks

    def check(self) -> None:
        """After whatever has happened to the leader."""
        self.log.check_integrity()
        for rank in self.log.broken:
            # What it has not acknowledged, it has not done.
            for number in range(len(self.commits) + 1, self.num_issued + 1):
                self.counted[number].setdefault(rank, set())
        for commit in self.log.take_commits():
            self.check_commit(commit)

    def check_commit(self, commit: Commit) -> None:
        number = commit.number
        assert number == len(self.commits) + 1, "out of order"
        self.commits.append(commit)
        done = set(self.covered[number])
        for rank in range(len(self.processes)):
            assert rank in self.counted[number], f"{number} did not wait for rank {rank}"
            done -= self.share(self.covered[number], rank) - self.counted[number][rank]
        present = self.resident[number] | done
        length = restorable_pages(frozenset(present))
        assert commit.length == length, f"{number}: {commit.length} pages, not {length}"
        assert commit.pages == as_masks({page for page in done if page[1] < length})

    def is_quiet(self) -> bool:
        return (
            not self.to_rank
            and not self.to_leader
            and self.num_issued == self.num_commands == self.log.committed
            and not self.log.num_open
            and all(process.is_done(self.num_commands) for process in self.processes)
        )

    def check_end(self) -> None:
        assert self.num_issued == self.num_commands, "no room for a command"
        assert [c.number for c in self.commits] == [*range(1, self.num_commands + 1)]
        assert not self.log.held, "pages are held for ever"
        assert not self.log.num_open, "a command is kept for ever"
        broken = self.log.broken
        for process in self.processes:
            if process.rank in broken:
                assert not process.alive, "given up for ever"
                continue
            assert not process.copies, "a copy has no end"
            assert not process.log.num_open, "a rank keeps a command for ever"
            committed = 0
            for item in process.applied:
                if isinstance(item, Snapshot):
                    assert item.committed >= committed, "back in time"
                    committed = item.committed
                else:
                    assert item == self.commits[committed], "a commit of its own"
                    committed += 1
            assert committed == self.num_commands, "a commit is missing"
            assert process.log.committed == committed
