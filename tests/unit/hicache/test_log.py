"""The log's rules one by one. What leader and ranks do together, over a bad network, is explored in
test_log_exploration.py."""

from __future__ import annotations

import pytest

from hicache.log import (
    Ack,
    Command,
    CommandLog,
    Commit,
    CopyState,
    Orders,
    Pages,
    RankLog,
    Snapshot,
    Status,
    restorable_length,
)
from transfer.layout import LayerGroup

FULL = LayerGroup("full", (0,), 1, 1)
LATENT = LayerGroup("latent", (0,), 1, 1)
SLIDING = LayerGroup("sliding", (1,), 1, 1, window=32)
PAGE_TOKENS = 16


def pages(*runs: range) -> int:
    """As a set of the log."""
    return sum(1 << page for run in runs for page in run)


class Replica:
    """A leader with its ranks; nothing is lost or late unless the test says so."""

    def __init__(self, num_ranks: int = 2, groups: tuple[LayerGroup, ...] = (FULL,)) -> None:
        self.now = 0.0
        self.leader = CommandLog(
            groups,
            PAGE_TOKENS,
            [1] * num_ranks,
            max_open=3,
            timeout_s=10.0,
            silence_s=20.0,
            repeat_s=1.0,
        )
        self.ranks = [RankLog(1) for _ in range(num_ranks)]
        self.silent: set[int] = set()

    def issue(self, *share: int, resident: Pages = (0,)) -> int:
        """The same share on all ranks."""
        return self.leader.issue("copy", [share] * len(self.ranks), resident, self.now)

    def exchange(self, seconds: float = 0.0) -> list[Command]:
        """Messages both ways; the commands to be started on the first rank."""
        self.now += seconds
        for rank, orders in self.leader.tick(self.now):
            if rank not in self.silent:
                self.ranks[rank].orders(orders)
        started = [log.take_commands() for log in self.ranks]
        self.answer()
        return started[0]

    def answer(self) -> None:
        for rank, log in enumerate(self.ranks):
            status = log.take_status() if rank not in self.silent else None
            if status is not None:
                self.leader.status(rank, status)
            log.check_integrity()
        self.leader.check_integrity()

    def end(self, rank: int, number: int, *done: int) -> None:
        self.ranks[rank].pages_done(number, done)
        assert self.ranks[rank].ended(number)
        self.answer()


def test_forty_pages_of_which_one_rank_completes_37_are_37_on_all() -> None:
    replica = Replica(3)
    number = replica.issue(pages(range(40)))
    assert replica.exchange() == [Command(1, "copy", (pages(range(40)),))]
    replica.end(0, number, pages(range(40)))
    replica.end(1, number, pages(range(37)))
    assert replica.leader.take_commits() == [], "a rank has not acknowledged"
    assert not replica.leader.may_reuse_pages(number)
    replica.end(2, number, pages(range(40)))
    commit = Commit(1, 37, (pages(range(37)),))
    assert replica.leader.take_commits() == [commit]
    replica.exchange()
    for log in replica.ranks:
        assert log.take_commits() == [Snapshot(0, 1), commit]
        assert log.num_open == 0
    assert replica.leader.num_open == 0
    assert replica.leader.may_reuse_pages(number)


def test_the_pages_that_all_have_done_count_not_the_least_maximum() -> None:
    replica = Replica()
    number = replica.issue(pages(range(8)))
    replica.exchange()
    replica.end(0, number, pages(range(2), range(3, 8)))
    replica.end(1, number, pages(range(5), range(6, 8)))
    assert replica.leader.take_commits() == [Commit(1, 2, (pages(range(2)),))]


def test_only_ranks_that_share_a_page_decide_about_it() -> None:
    replica = Replica()
    even, odd = pages(range(0, 6, 2)), pages(range(1, 6, 2))
    number = replica.leader.issue("copy", [(even,), (odd,)], (0,), 0.0)
    replica.exchange()
    replica.end(0, number, even)
    replica.end(1, number, pages(range(1, 4, 2)))
    assert replica.leader.take_commits() == [Commit(1, 5, (pages(range(5)),))]


def test_sliding_and_full_groups_commit_together() -> None:
    replica = Replica(groups=(FULL, SLIDING))
    # A window of two pages; the next token's begins one token into a page.
    share = (pages(range(4, 10)), pages(range(4, 10)))
    number = replica.issue(*share, resident=(pages(range(4)), pages(range(2, 4))))
    replica.exchange()
    replica.end(0, number, *share)
    replica.end(1, number, pages(range(4, 10)), pages(range(4, 6), range(7, 9)))
    expected = Commit(1, 9, (pages(range(4, 9)), pages(range(4, 6), range(7, 9))))
    assert replica.leader.take_commits() == [expected]


@pytest.mark.parametrize(
    ("full", "sliding", "length"),
    [
        (pages(range(10)), pages(range(10)), 10),
        (pages(range(10)), pages(range(8, 10)), 10),
        (pages(range(9)), pages(range(8, 10)), 0),
        (pages(range(9)), pages(range(7, 10)), 9),
        (pages(range(3), range(4, 10)), pages(range(10)), 3),
        (pages(range(10)), pages(range(6), range(9, 10)), 6),
        (0, pages(range(4)), 0),
        (pages(range(4)), 0, 0),
        (pages(range(1)), pages(range(1)), 1),
    ],
)
def test_what_can_be_restored(full: int, sliding: int, length: int) -> None:
    assert restorable_length((FULL, SLIDING), PAGE_TOKENS, (full, sliding)) == length
    assert restorable_length((LATENT, SLIDING), PAGE_TOKENS, (full, sliding)) == length


def test_commits_come_in_order_whatever_ends_first() -> None:
    replica = Replica()
    first, second = replica.issue(1), replica.issue(3)
    assert [command.number for command in replica.exchange()] == [first, second]
    for rank in (0, 1):
        replica.end(rank, second, 3)
    assert replica.leader.take_commits() == []
    for rank in (0, 1):
        replica.end(rank, first, 1)
    assert [commit.number for commit in replica.leader.take_commits()] == [first, second]


def test_what_is_open_is_bounded() -> None:
    replica = Replica()
    for _ in range(3):
        replica.issue(1)
    assert not replica.leader.can_issue
    with pytest.raises(ValueError, match="3 commands are open"):
        replica.issue(1)
    replica.exchange()
    for rank in (0, 1):
        replica.end(rank, 1, 1)
    assert not replica.leader.can_issue, "its commit has not been heard"
    replica.exchange()
    assert replica.leader.can_issue


def test_orders_are_sent_at_once_and_repeated_until_confirmed() -> None:
    replica = Replica(1)
    leader = replica.leader
    replica.exchange()
    assert leader.tick(5.0) == []
    replica.issue(1)
    [(_, orders)] = leader.tick(5.0)
    assert [command.number for command in orders.commands] == [1]
    assert leader.tick(5.9) == []
    leader.cancel(1)
    [(_, orders)] = leader.tick(5.9)
    assert (orders.commands, orders.cancelled) == ((), (1,))
    [(_, orders)] = leader.tick(6.0)
    assert ([command.number for command in orders.commands], orders.cancelled) == ([1], (1,))


def test_a_rank_takes_nothing_out_of_order_or_twice() -> None:
    log = RankLog(1)
    one, two = Command(1, "a", (1,)), Command(2, "b", (1,))
    done = Commit(1, 1, (1,)), Commit(2, 1, (1,))
    snapshot = Snapshot(0, 1)
    assert log.orders(Orders(1, 1, snapshot, commands=(two,)))
    assert log.take_commands() == []
    for _ in range(2):
        assert log.orders(Orders(1, 1, snapshot, commands=(one, two)))
    assert log.take_commands() == [one, two]
    assert log.ended(1)
    assert not log.ended(1)
    assert log.ended(2)
    log.orders(Orders(1, 1, snapshot, commits=done[1:]))
    assert log.take_commits() == [snapshot]
    for _ in range(2):
        log.orders(Orders(1, 1, snapshot, commits=done))
    assert log.take_commits() == [*done]
    assert log.num_open == 0
    log.check_integrity()


def test_a_late_rank_gives_up_and_holds_the_pages_until_its_copies_have_ended() -> None:
    replica = Replica()
    leader = replica.leader
    number = replica.issue(pages(range(4)))
    replica.exchange()
    replica.end(0, number, pages(range(4)))
    replica.ranks[1].pages_done(number, (pages(range(2)),))
    replica.exchange(10.0)
    assert leader.take_commits() == []
    replica.exchange(0.1)
    assert replica.ranks[1].take_stops() == [number]
    assert leader.take_commits() == [Commit(1, 2, (pages(range(2)),))]
    assert not replica.ranks[1].pages_done(number, (pages(range(4)),)), "it has had its say"
    for _ in range(100):
        replica.exchange(1.0)
    assert leader.held == [number]
    assert not leader.may_reuse_pages(number)
    assert leader.broken == [], "it answers"
    replica.end(1, number)
    assert leader.held == []
    assert leader.may_reuse_pages(number)


def test_what_is_aborted_commits_once_and_what_was_not_started_never_starts() -> None:
    replica = Replica()
    number = replica.issue(1)
    assert replica.leader.cancel(number)
    assert not replica.leader.cancel(number)
    assert replica.exchange() == []
    assert replica.leader.take_commits() == [Commit(1, 0, (0,))]
    assert replica.leader.held == []
    replica.exchange()
    assert not replica.leader.cancel(number)
    assert [log.take_commits()[-1] for log in replica.ranks] == [Commit(1, 0, (0,))] * 2


def test_a_dead_rank_has_done_nothing_and_holds_nothing() -> None:
    replica = Replica()
    number = replica.issue(1)
    replica.exchange()
    replica.end(0, number, 1)
    replica.silent.add(1)
    assert replica.leader.rank_dead(1, 1)
    assert not replica.leader.rank_dead(1, 1)
    assert replica.leader.broken == [1]
    assert replica.leader.take_commits() == [Commit(1, 0, (0,))]
    assert replica.leader.may_reuse_pages(number)
    second = replica.issue(1)
    replica.exchange()
    replica.end(0, second, 1)
    assert replica.leader.take_commits() == [Commit(2, 0, (0,))]


def test_a_new_process_begins_with_a_snapshot_and_hears_nothing_of_the_old_ones() -> None:
    replica = Replica()
    leader = replica.leader
    for _ in range(2):
        replica.issue(1)
    stale = leader.tick(0.0)[1][1]
    replica.ranks[1].orders(stale)
    late = replica.ranks[1].take_status()
    assert late is not None
    replica.exchange(1.0)
    for rank in (0, 1):
        replica.end(rank, 1, 1)
    assert leader.rank_replaced(1, 2)
    assert not leader.rank_replaced(1, 2)
    assert not leader.status(1, late)
    assert leader.broken == []
    replica.ranks[1] = RankLog(2)
    assert not replica.ranks[1].orders(stale)
    assert replica.ranks[1].take_status() is None, "there is nothing to say yet"
    third = replica.issue(1)
    replica.exchange()
    replica.end(0, 2, 1)
    for rank in (0, 1):
        replica.end(rank, third, 1)
    replica.exchange()
    commits = [Commit(2, 0, (0,)), Commit(3, 1, (1,))]
    assert leader.take_commits() == [Commit(1, 1, (1,)), *commits]
    assert replica.ranks[1].take_commits() == [Snapshot(1, 3), *commits]


def test_a_silent_rank_is_left_behind_holds_its_pages_and_asks_for_a_snapshot() -> None:
    replica = Replica()
    leader = replica.leader
    number = replica.issue(1)
    replica.exchange()
    replica.end(0, number, 1)
    replica.silent.add(1)
    replica.exchange(11.0)
    replica.exchange(20.0)
    assert leader.broken == []
    replica.exchange(0.1)
    assert leader.broken == [1]
    assert leader.take_commits() == [Commit(1, 0, (0,))]
    assert leader.held == [number], "silence is no proof that copies have ended"
    second = replica.issue(1)
    replica.exchange(1.0)
    replica.end(0, second, 1)
    replica.silent.clear()
    replica.exchange(1.0)
    assert leader.broken == [], "it has asked"
    assert leader.held == [number]
    replica.exchange(1.0)
    assert replica.ranks[1].take_commits() == [Snapshot(0, 1), Snapshot(2, 3)]
    assert replica.ranks[1].take_stops() == [number]
    late = Orders(1, 1, Snapshot(0, 1), is_dropped=True)
    assert not replica.ranks[1].orders(late), "of an earlier session"
    assert leader.held == [number]
    replica.end(1, number, 1)
    assert leader.held == []
    assert leader.num_open == 0


def test_acknowledgements_do_not_change_and_those_of_other_sessions_are_ignored() -> None:
    leader = CommandLog((FULL,), PAGE_TOKENS, [7])
    number = leader.issue("copy", [(3,)], (0,), 0.0)
    given_up = Ack(number, CopyState.GIVEN_UP, (1,))
    assert not leader.status(0, Status(6, 1, False, 2, 0, (given_up,)))
    assert not leader.status(0, Status(7, 2, False, 2, 0, (given_up,)))
    assert leader.take_commits() == []
    assert leader.status(0, Status(7, 1, False, 2, 0, (Ack(number, CopyState.RUNNING, (3,)),)))
    assert leader.take_commits() == []
    assert leader.status(0, Status(7, 1, False, 2, 0, (given_up,)))
    assert leader.status(0, Status(7, 1, False, 2, 0, (Ack(number, CopyState.ENDED, (3,)),)))
    assert leader.take_commits() == [Commit(1, 1, (1,))]
    # An overtaken one from before the rank had received it says nothing about it.
    other = leader.issue("copy", [(1,)], (0,), 0.0)
    assert leader.status(0, Status(7, 1, False, 2, 1, ()))
    assert leader.held == [other]
