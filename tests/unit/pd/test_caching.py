"""What a leader does with its node's host tier: every request goes on, pages are held while they
are copied and no longer, and nothing that the keeper says does harm."""

from __future__ import annotations

import itertools
from typing import Any, Literal

import numpy as np
import pytest

from hicache.index import PageIndex
from hicache.keys import page_hashes, root_hash
from hicache.messages import Close, Copied, Find, Found, Offer, Room, Take
from pd.caching import Caching
from pd.engine.scheduler import Scheduler, Tracked
from pd.engine.turns import NEVER
from pd.events import CopyPages, Effect, PagesCopied, Warn
from pd.messages import SamplingParams
from pd.spec import CacheSpec, HostCacheSpec, StorageCacheSpec
from transfer.layout import LayerGroup

PAGE = 4
PAGE_BYTES = 1000
ROOT = root_hash("caching")
FULL = LayerGroup("full", (0,), 1, 1)
SLIDING = LayerGroup("sliding", (1,), 1, 1, window=10)
KEEPER = "cache-0"

Write = Literal["write_through", "write_through_selective", "write_back"]
Policy = Literal["timeout", "best_effort", "wait_complete"]


def pack(slots: list[int]) -> bytes:
    return np.array(slots, "<i4").tobytes()


class Rig:
    def __init__(
        self,
        pages: int = 41,
        groups: tuple[LayerGroup, ...] = (FULL,),
        max_running: int = 4,
        write: Write = "write_through",
        prefetch: Policy = "timeout",
        keeper: str = KEEPER,
    ) -> None:
        self.groups = groups
        self.tenant = ""
        self.index = PageIndex(groups, [pages] * len(groups), PAGE)
        self.scheduler = Scheduler(self.index, groups, PAGE, 64, max_running)
        self.sent: list[Any] = []
        self.effects: list[Effect] = []
        self.ready: list[Tracked] = []
        spec = CacheSpec(
            host=HostCacheSpec(memory=1 << 20, write=write),
            storage=StorageCacheSpec(
                backend="memory",
                prefetch=prefetch,
                prefetch_timeout=10.0,
                prefetch_timeout_per_1k=1000.0,
            ),
        )
        self.caching = Caching(
            self.scheduler,
            self.index,
            groups,
            [PAGE_BYTES for _ in groups],
            PAGE,
            spec,
            itertools.count(1),
            self.ready.append,
            lambda to, message: self.sent.append(message),
            self.effects.append,
        )
        if keeper:
            self.caching.keeper_up(keeper)

    def track(self, num_tokens: int, number: int = 0, arrived_at: float = 0.0) -> Tracked:
        prompt = np.arange(number * 1000, number * 1000 + num_tokens, dtype=np.int32)
        hashes = page_hashes(prompt, PAGE, ROOT)
        params = SamplingParams(max_tokens=20, temperature=0.0)
        return Tracked(prompt, params, ROOT, hashes, len(self.groups), arrived_at, self.tenant)

    def compute(self, sequence: Tracked, num_pages: int) -> None:
        """Its first pages are in the index, and it holds them."""
        sequence.tables = [self.index.allocate(g, num_pages) or [] for g in range(len(self.groups))]
        hashes, tenant = sequence.hashes[:num_pages], sequence.tenant or None
        self.index.insert(ROOT, hashes, sequence.tables, 0, tenant)

    def let_go(self, sequence: Tracked) -> None:
        self.scheduler.release_pages(sequence)

    def say(self, message: Any, now: float = 0.0, sender: str = KEEPER) -> None:
        self.caching.receive(sender, message, now)
        self.advance(now)

    def advance(self, now: float = 0.0, tokens_per_s: float = 0.0) -> None:
        self.caching.advance(tokens_per_s, now)
        self.check()

    def tick(self, now: float) -> None:
        self.caching.tick(now)
        self.advance(now)

    def took(self) -> list[Any]:
        """Messages sent since it was last asked."""
        sent = list(self.sent)
        self.sent.clear()
        self.check()
        return sent

    def copy(self) -> CopyPages:
        """The only effect since it was last asked."""
        (effect,) = self.effects
        assert isinstance(effect, CopyPages)
        self.effects.clear()
        return effect

    def end(
        self, copy: CopyPages, error: str | None = None, seconds: float = 1.0, now: float = 0.0
    ) -> None:
        moved = sum(map(len, copy.host_pages)) * PAGE_BYTES
        self.caching.copied(PagesCopied(copy.copy_id, error, moved, seconds), now)
        self.check()

    def check(self) -> None:
        self.index.check_integrity()
        self.caching.check_integrity()

    def held(self) -> list[int]:
        return [self.index.num_used(group) for group in range(len(self.groups))]

    @property
    def is_idle(self) -> bool:
        return self.caching.is_idle and not any(self.held())


def found(serial: int, slots: list[list[int]], is_last: bool = True, num_read: int = 0) -> Found:
    return Found(serial, len(slots[0]), tuple(map(pack, slots)), is_last, num_read)


# ----------------------------------------------------------------------------------------- fetching


def test_pages_of_the_host_tier_are_in_the_device_tier_when_the_request_is_ready() -> None:
    rig = Rig()
    sequence = rig.track(22)
    assert rig.caching.fetch(sequence, 7.0, 0.0)
    assert sequence in rig.caching
    assert rig.took() == [Find(1, 1, b"".join(sequence.hashes[:5]), 7.0)]
    rig.say(found(1, [[11, 12, 13, 14]], num_read=1))
    copy = rig.copy()
    assert not copy.to_host
    assert copy.host_pages[0].tolist() == [11, 12, 13, 14]
    assert rig.held() == [4]
    assert not rig.ready
    assert rig.index.match(sequence.hashes) == 0
    rig.end(copy)
    assert rig.ready == [sequence]
    assert rig.index.match(sequence.hashes) == 4
    assert rig.index.resident(sequence.hashes)[0] == copy.device_pages[0].tolist()
    assert (sequence.host_tokens, sequence.storage_tokens) == (16, 4)
    assert rig.took() == [Close(1, 2)]
    assert rig.is_idle


def test_what_the_device_tier_has_is_not_copied_again_and_stays() -> None:
    rig = Rig(pages=7)
    sequence = rig.track(22)
    rig.compute(sequence, 2)
    there = rig.index.resident(sequence.hashes)[0]
    rig.let_go(sequence)
    rig.caching.fetch(sequence, 0.0, 0.0)
    assert rig.took() == [Find(1, 1, b"".join(sequence.hashes[:5]), 0.0, have=2)]
    rig.say(found(1, [[11, 12, 13, 14, 15]]))
    copy = rig.copy()
    assert copy.host_pages[0].tolist() == [13, 14, 15]
    assert rig.held() == [5]
    rig.end(copy)
    assert rig.index.resident(sequence.hashes)[0][:2] == there
    assert rig.index.match(sequence.hashes) == 5
    assert rig.is_idle


def test_of_a_sliding_group_only_the_window_is_copied() -> None:
    rig = Rig(groups=(FULL, SLIDING))
    sequence = rig.track(25)
    rig.caching.fetch(sequence, 0.0, 0.0)
    rig.say(found(1, [[1, 2, 3, 4, 5, 6], [-1, -1, -1, 4, 5, 6]]))
    copy = rig.copy()
    assert [pages.tolist() for pages in copy.host_pages] == [[1, 2, 3, 4, 5, 6], [4, 5, 6]]
    rig.end(copy)
    assert rig.index.match(sequence.hashes) == 6
    assert rig.is_idle


def test_there_is_nothing_to_wait_for_without_a_keeper_or_whole_pages_or_when_all_is_there(
) -> None:  # fmt: skip
    rig = Rig(keeper="")
    assert not rig.caching.fetch(rig.track(22), 0.0, 0.0)
    rig = Rig()
    assert not rig.caching.fetch(rig.track(4), 0.0, 0.0)  # its last token must be computed
    sequence = rig.track(22)
    rig.compute(sequence, 5)
    assert not rig.caching.fetch(sequence, 0.0, 0.0)
    assert rig.took() == []


def test_what_has_no_hashes_is_not_asked_for() -> None:
    """A prompt of less than a page, and more with what has been generated."""
    rig = Rig()
    sequence = rig.track(3)
    for token in range(3):
        sequence.append(token)
    assert not rig.caching.fetch(sequence, 0.0, 0.0)


def test_when_nothing_is_found_the_request_goes_on() -> None:
    rig = Rig()
    sequence = rig.track(22)
    rig.caching.fetch(sequence, 0.0, 0.0)
    rig.say(found(1, [[]]))
    assert rig.ready == [sequence]
    assert rig.effects == []
    assert rig.is_idle


def test_a_copy_that_failed_is_not_used() -> None:
    rig = Rig()
    sequence = rig.track(22)
    rig.caching.fetch(sequence, 0.0, 0.0)
    rig.say(found(1, [[11, 12, 13]]))
    rig.end(rig.copy(), "a bad day")
    assert rig.index.match(sequence.hashes) == 0
    assert rig.ready == [sequence]
    assert sequence.host_tokens == 0
    assert isinstance(rig.effects[0], Warn)
    assert rig.is_idle


def test_a_keeper_that_does_not_answer_is_not_waited_for() -> None:
    rig = Rig()
    sequence = rig.track(22)
    rig.caching.fetch(sequence, 0.0, 0.0)
    rig.took()
    rig.tick(4.0)
    assert not rig.ready
    rig.tick(6.0)
    assert rig.ready == [sequence]
    assert rig.took() == [Close(1, 2)]
    rig.say(found(1, [[11, 12, 13]]))
    assert rig.effects == []
    assert rig.is_idle


def test_a_request_that_leaves_closes_its_search() -> None:
    rig = Rig()
    sequence = rig.track(22)
    rig.caching.fetch(sequence, 0.0, 0.0)
    rig.caching.leave(sequence)
    assert rig.took()[1:] == [Close(1, 2)]
    rig.caching.leave(sequence)
    assert rig.took() == []
    assert not rig.ready
    assert rig.is_idle


def test_a_request_that_leaves_while_its_pages_are_copied_leaves_them_until_that_has_ended() -> (
    None
):
    rig = Rig()
    sequence = rig.track(22)
    rig.caching.fetch(sequence, 0.0, 0.0)
    rig.say(found(1, [[11, 12, 13]]))
    copy = rig.copy()
    rig.took()
    rig.caching.leave(sequence)
    assert rig.took() == []
    assert rig.held() == [3]
    rig.tick(1000.0)
    assert rig.held() == [3]
    assert not rig.caching.is_idle
    rig.end(copy)
    assert rig.took() == [Close(1, 2)]
    assert not rig.ready
    assert rig.index.match(sequence.hashes) == 3
    assert rig.is_idle


def test_when_the_keeper_ends_copies_go_on_and_nothing_else_is_waited_for() -> None:
    rig = Rig()
    one, other, third = (rig.track(22, number, number) for number in range(3))
    for sequence in (one, other):
        rig.caching.fetch(sequence, 0.0, 0.0)
    rig.say(found(1, [[11, 12, 13]]))
    copy = rig.copy()
    rig.caching.keeper_down("another")
    assert not rig.ready
    rig.caching.keeper_down(KEEPER)
    assert rig.ready == [other]
    assert not rig.caching.fetch(third, 0.0, 0.0)
    rig.caching.keeper_up(KEEPER)
    assert rig.caching.fetch(third, 0.0, 0.0)
    rig.end(copy)
    assert rig.ready == [other, one]
    assert rig.index.match(one.hashes) == 3
    rig.caching.leave(third)
    assert rig.is_idle


@pytest.mark.parametrize(
    "message",
    [
        Found(1, 9, (pack([1] * 9),), True),
        Found(1, -1, (b"",), True),
        Found(1, 2, (pack([1]),), True),
        Found(1, 2, (), True),
        Found(1, 2, (pack([1, 2]), pack([1, 2])), True),
        Found(1, 2, (pack([1, 2]),), True, 3),
        Found(1, 1, (b"abc",), True),
        Room(1, 0, (pack([1, 2]),)),
        Found(7, 2, (pack([1, 2]),), True),
    ],
)
def test_an_unsound_answer_is_as_none(message: Found | Room) -> None:
    rig = Rig()
    sequence = rig.track(22)
    rig.caching.fetch(sequence, 0.0, 0.0)
    rig.say(message)
    assert rig.effects == []
    rig.say(found(1, [[11, 12]]), sender="somebody")
    assert rig.effects == []
    rig.say(found(1, [[11, 12]]))
    rig.end(rig.copy())
    assert rig.ready == [sequence]


def test_a_repeated_answer_changes_nothing() -> None:
    rig = Rig()
    rig.caching.fetch(rig.track(22), 0.0, 0.0)
    rig.say(found(1, [[11, 12]]))
    rig.say(found(1, [[11, 12]]))
    rig.end(rig.copy())
    rig.say(found(1, [[11, 12]]))
    assert rig.effects == []
    assert rig.is_idle


def test_a_request_waits_for_device_pages_and_whoever_came_later_is_told() -> None:
    rig = Rig(pages=6)
    sequence, other = rig.track(22, arrived_at=3.0), rig.track(22, 1)
    rig.compute(other, 3)
    rig.caching.fetch(sequence, 0.0, 0.0)
    rig.say(found(1, [[11, 12, 13]]))
    assert rig.effects == []
    assert rig.held() == [3]
    assert rig.caching.lacks_pages_since == (0, 0.0, 3.0)
    rig.let_go(other)
    rig.advance()
    rig.end(rig.copy())
    assert rig.caching.lacks_pages_since == NEVER
    assert rig.ready == [sequence]


def test_copies_begin_in_order_of_arrival_and_not_long_before_they_are_needed() -> None:
    rig = Rig(max_running=1)
    sequences = [rig.track(22, number, number) for number in range(4)]
    for sequence in sequences:
        rig.caching.fetch(sequence, 0.0, 0.0)
    for serial in (4, 3, 2, 1):
        rig.say(found(serial, [[11, 12]]))
    copies = list(rig.effects)
    rig.effects.clear()
    assert len(copies) == 2
    for copy in copies:
        assert isinstance(copy, CopyPages)
        rig.end(copy)
    assert {*rig.ready} == {*sequences[:2]}
    for sequence in sequences[:2]:
        rig.scheduler.add(sequence)
    rig.advance()
    assert rig.effects == []  # there is one row, and two wait for it


def test_who_came_first_is_copied_first_also_when_asked_for_last() -> None:
    """A request that was preempted has come before those that are looked for already."""
    rig = Rig(max_running=1)
    rig.scheduler.add(rig.track(22, 9, arrived_at=5.0))
    later = [rig.track(22, number, 10.0 + number) for number in range(3)]
    for sequence in (*later, rig.track(22, 8, arrived_at=0.0)):
        rig.caching.fetch(sequence, 0.0, 0.0)
    for serial in (1, 2, 3, 4):
        rig.caching.receive(KEEPER, found(serial, [[10 * serial, 10 * serial + 1]]), 0.0)
    rig.advance()
    assert rig.copy().host_pages[0].tolist() == [40, 41]


def test_those_that_wait_for_storage_keep_nobody_from_copying() -> None:
    rig = Rig(max_running=1, prefetch="wait_complete")
    for number in range(4):
        rig.caching.fetch(rig.track(22, number, number), 0.0, 0.0)
    for serial in (1, 2, 3):
        rig.say(found(serial, [[]], is_last=False))
    rig.say(found(4, [[11, 12]]))
    assert rig.copy().host_pages[0].tolist() == [11, 12]


def test_pages_that_a_request_waits_for_are_not_taken_by_a_later_one() -> None:
    rig = Rig(pages=11)
    large, small, other = (rig.track(22, number, number) for number in range(3))
    rig.compute(other, 7)
    rig.caching.fetch(large, 0.0, 0.0)
    rig.caching.fetch(small, 0.0, 0.0)
    rig.caching.receive(KEEPER, found(1, [[11, 12, 13, 14]]), 0.0)
    rig.say(found(2, [[21]]))
    assert rig.effects == []
    rig.let_go(other)
    rig.advance()
    copies = [effect.host_pages[0].tolist() for effect in rig.effects]  # type: ignore[union-attr]
    assert copies == [[11, 12, 13, 14], [21]]


def measured(rig: Rig) -> None:
    """Two pages were copied in two seconds."""
    rig.caching.fetch(rig.track(22), 0.0, 0.0)
    rig.say(found(1, [[11, 12]]))
    rig.end(rig.copy(), seconds=2.0, now=2.0)
    rig.ready.clear()


def find(rig: Rig, sequence: Tracked, serial: int, now: float, tokens_per_s: float) -> None:
    """The host tier has two pages of it."""
    rig.caching.fetch(sequence, tokens_per_s, now)
    rig.caching.receive(KEEPER, found(serial, [[10 * serial + 1, 10 * serial + 2]]), now)
    rig.advance(now, tokens_per_s)


def test_what_is_not_sooner_than_computing_by_a_quarter_is_copied_beside_it() -> None:
    rig = Rig()
    measured(rig)
    fast, slow, other, again = (rig.track(22, number) for number in range(1, 5))
    find(rig, fast, 2, 2.0, tokens_per_s=3.1)  # 8 tokens: 2.6 s
    copy = rig.copy()
    assert fast not in rig.ready
    rig.end(copy, seconds=2.0, now=4.0)
    find(rig, slow, 3, 4.0, tokens_per_s=3.3)  # 2.4 s
    probe = rig.copy()
    assert rig.ready == [fast, slow]
    find(rig, other, 4, 5.0, tokens_per_s=3.3)
    assert rig.effects == []
    assert rig.ready == [fast, slow, other]
    rig.end(probe, seconds=1.0, now=5.0)
    assert rig.index.match(slow.hashes) == 2
    assert not slow.host_tokens
    find(rig, again, 5, 5.0, tokens_per_s=3.3)
    rig.end(rig.copy(), seconds=0.1, now=5.1)
    assert rig.is_idle


def test_copies_out_say_how_fast_the_first_copy_in_will_be() -> None:
    rig = Rig()
    unknown, known = rig.track(22, 1), rig.track(22, 2)
    find(rig, unknown, 1, 0.0, tokens_per_s=1.0)
    assert rig.ready == [unknown]
    rig.end(rig.copy(), error="it failed")
    rig.effects.clear()
    out = rig.track(22, 3)
    rig.compute(out, 2)
    rig.caching.published(out, 0, 2)
    rig.say(Room(2, 0, (pack([31, 32]),)))
    rig.end(rig.copy(), seconds=0.1, now=1.0)
    find(rig, known, 3, 1.0, tokens_per_s=1.0)
    assert known not in rig.ready
    rig.end(rig.copy(), seconds=0.1, now=1.1)
    rig.let_go(out)
    assert rig.is_idle


def test_a_copy_is_waited_for_no_longer_than_computing_takes() -> None:
    rig = Rig()
    measured(rig)
    late, next_one = rig.track(22, 1), rig.track(22, 2)
    find(rig, late, 2, 2.0, tokens_per_s=2.0)  # 8 tokens: 4 s
    copy = rig.copy()
    rig.tick(5.9)
    assert rig.ready == []
    rig.tick(6.0)
    assert rig.ready == [late]
    find(rig, next_one, 3, 6.0, tokens_per_s=2.0)
    assert rig.ready == [late, next_one]
    assert rig.effects == []
    rig.end(copy, seconds=10.0, now=12.0)
    assert rig.index.match(late.hashes) == 2
    assert rig.is_idle


def test_storage_is_waited_for_no_longer_than_computing_takes() -> None:
    rig = Rig(prefetch="wait_complete")
    rig.caching.fetch(rig.track(22), 2.0, 0.0)
    rig.took()
    rig.say(found(1, [[11]], is_last=False))
    rig.tick(7.9)  # 4 pages: 16 tokens
    assert rig.took() == []
    rig.tick(8.0)
    assert rig.took() == [Take(1, 1)]


# --------------------------------------------------------------------------------- what storage has


def test_storage_is_waited_for_as_long_as_the_policy_says() -> None:
    rig = Rig(prefetch="timeout")
    rig.caching.fetch(rig.track(22), 0.0, 0.0)
    rig.took()
    rig.say(found(1, [[11]], is_last=False))
    rig.tick(25.0)  # 10 s, and 1 s for each of 4 pages' 4 tokens
    assert rig.took() == []
    rig.tick(27.0)
    assert rig.took() == [Take(1, 1)]
    rig.say(found(1, [[11, 12]], num_read=1), 28.0)
    assert rig.copy().host_pages[0].tolist() == [11, 12]


def test_for_what_the_device_tier_has_storage_is_not_waited_for_longer() -> None:
    rig = Rig(prefetch="timeout")
    sequence = rig.track(22)
    rig.compute(sequence, 3)
    rig.caching.fetch(sequence, 0.0, 0.0)
    rig.took()
    rig.say(found(1, [[11]], is_last=False))
    rig.tick(17.0)  # 10 s, and 1 s for each of 2 pages' 4 tokens
    assert rig.took() == []
    rig.tick(19.0)
    assert rig.took() == [Take(1, 1)]


def test_with_best_effort_storage_is_waited_for_until_the_request_could_start() -> None:
    rig = Rig(prefetch="best_effort", max_running=1)
    first, second, third = (rig.track(22, number, number) for number in range(3))
    rig.scheduler.add(first)
    rig.scheduler.add(second)
    rig.caching.fetch(third, 0.0, 0.0)
    rig.took()
    rig.say(found(1, [[11]], is_last=False))
    rig.tick(20.0)
    assert rig.took() == []
    rig.scheduler.drop(first)
    rig.advance(20.0)
    assert rig.took() == [Take(1, 1)]
    rig.advance(20.0)
    assert rig.took() == []


def test_with_wait_complete_storage_is_waited_for_but_not_for_ever() -> None:
    rig = Rig(prefetch="wait_complete")
    rig.caching.fetch(rig.track(22), 0.0, 0.0)
    rig.took()
    rig.say(found(1, [[11]], is_last=False))
    rig.tick(59.0)
    assert rig.took() == []
    rig.tick(61.0)
    assert rig.took() == [Take(1, 1)]


def test_what_was_found_first_is_used_where_the_keeper_says_no_more() -> None:
    rig = Rig(prefetch="best_effort")
    sequence = rig.track(22)
    rig.caching.fetch(sequence, 0.0, 0.0)
    rig.say(found(1, [[11]], is_last=False))
    rig.tick(4.0)
    assert rig.effects == []
    rig.tick(6.0)
    assert rig.copy().host_pages[0].tolist() == [11]


# ----------------------------------------------------------------------------------------- offering


def offered(rig: Rig, num_pages: int = 4, begin: int = 0, number: int = 0) -> Tracked:
    sequence = rig.track(4 * num_pages + 2, number)
    rig.compute(sequence, num_pages)
    rig.caching.published(sequence, begin, num_pages)
    return sequence


def test_what_is_computed_is_offered_and_copied_to_the_room_that_is_given() -> None:
    rig = Rig()
    sequence = offered(rig, begin=1)
    device = list(sequence.tables[0])
    assert rig.took() == [Offer(1, 1, 1, b"".join(sequence.hashes[:4]), (0,))]
    rig.let_go(sequence)
    assert rig.held() == [4]
    rig.say(Room(1, 2, (pack([21, 22]),)))
    copy = rig.copy()
    assert copy.to_host
    assert copy.host_pages[0].tolist() == [21, 22]
    assert copy.device_pages[0].tolist() == device[2:]
    assert rig.took() == []
    rig.tick(1000.0)
    rig.tick(2000.0)
    assert rig.held() == [4]
    rig.end(copy)
    assert rig.took() == [Copied(1, 1, 2), Close(1, 2)]
    assert rig.is_idle


def test_pages_that_have_left_the_window_are_not_offered() -> None:
    rig = Rig(groups=(FULL, SLIDING))
    sequence = rig.track(26)
    rig.compute(sequence, 6)
    rig.index.release(1, sequence.tables[1][:2])
    sequence.tables[1][:2] = [-1, -1]
    rig.caching.published(sequence, 0, 6)
    (offer,) = rig.took()
    assert offer.have == (0, 2)
    device = [list(table) for table in sequence.tables]
    rig.let_go(sequence)
    rig.say(Room(1, 0, (pack([1, 2, 3, 4, 5, 6]), pack([-1, -1, 3, 4, 5, 6]))))
    copy = rig.copy()
    assert [pages.tolist() for pages in copy.device_pages] == [device[0], device[1][2:]]
    rig.end(copy)
    assert rig.is_idle


@pytest.mark.parametrize(
    "room",
    [
        Room(1, 0, (b"",)),
        Room(1, 0, ()),
        Room(1, 3, (pack([1, 2]),)),
        Room(1, 9, (pack([1]),)),
        Room(1, -1, (pack([1]),)),
        Room(1, 0, (pack([1]), pack([1]))),
    ],
)
def test_without_room_or_with_some_that_was_not_asked_for_nothing_is_copied(room: Room) -> None:
    rig = Rig()
    rig.let_go(offered(rig))
    rig.took()
    rig.say(room)
    assert rig.effects == []
    assert rig.took() == [Close(1, 2)]
    assert rig.is_idle


def test_room_for_a_page_that_was_not_offered_is_not_used() -> None:
    rig = Rig(groups=(FULL, SLIDING))
    sequence = rig.track(26)
    rig.compute(sequence, 6)
    rig.index.release(1, sequence.tables[1][:2])
    sequence.tables[1][:2] = [-1, -1]
    rig.caching.published(sequence, 0, 6)
    rig.let_go(sequence)
    rig.say(Room(1, 0, (pack([1, 2, 3, 4, 5, 6]), pack([1, 2, 3, 4, 5, 6]))))
    assert rig.effects == []
    assert rig.is_idle


def test_a_copy_out_that_failed_is_not_told_as_done() -> None:
    rig = Rig()
    rig.let_go(offered(rig))
    rig.took()
    rig.say(Room(1, 0, (pack([1, 2, 3, 4]),)))
    rig.end(rig.copy(), "a bad day")
    assert rig.took() == [Close(1, 2)]
    assert rig.is_idle


def test_an_offer_without_an_answer_is_withdrawn() -> None:
    rig = Rig()
    rig.let_go(offered(rig))
    rig.took()
    rig.tick(0.0)
    rig.tick(6.0)
    assert rig.took() == [Close(1, 2)]
    rig.say(Room(1, 0, (pack([1, 2, 3, 4]),)))
    assert rig.effects == []
    assert rig.is_idle


def test_offers_take_a_part_of_the_device_pool_only() -> None:
    rig = Rig(pages=41)
    for number in range(4):
        rig.let_go(offered(rig, 4, number=number))
    assert [message.serial for message in rig.took()] == [1, 2]
    assert rig.held() == [8]
    assert rig.caching.dropped_offers == 8
    rig.caching.keeper_down(KEEPER)
    assert rig.is_idle
    rig.let_go(offered(rig, 4, number=9))
    assert rig.is_idle


def test_with_selective_writing_pages_are_offered_at_their_second_use() -> None:
    rig = Rig(write="write_through_selective")
    sequence = offered(rig)
    assert rig.took() == []
    rig.caching.reused(sequence, 3)
    (offer,) = rig.took()
    assert offer.page_hashes == b"".join(sequence.hashes[:3])
    rig.let_go(sequence)
    assert rig.held() == [3]
    rig.tick(0.0)
    rig.tick(6.0)
    assert rig.is_idle


def test_with_write_back_pages_are_offered_before_they_are_evicted() -> None:
    rig = Rig(pages=25, write="write_back")
    first = offered(rig, 10)
    rig.let_go(first)
    rig.tick(0.0)
    assert rig.took() == []
    second = offered(rig, 13, number=1)
    rig.tick(1.0)
    (offer,) = rig.took()
    assert offer.page_hashes == b"".join(first.hashes[:10])
    rig.let_go(second)
    rig.tick(2.0)
    rig.tick(8.0)
    assert rig.is_idle


def test_what_was_offered_because_it_is_next_to_be_evicted_still_is() -> None:
    rig = Rig(pages=25, write="write_back")
    for number in range(3):
        rig.let_go(offered(rig, 8, number=number))
    oldest = rig.index.next_evicted(1)
    rig.tick(0.0)
    (offer,) = rig.took()
    rig.say(Room(offer.serial, 0, (pack(list(range(1, 9))),)))
    rig.end(rig.copy())
    assert rig.is_idle
    assert rig.index.next_evicted(1) == oldest
    rig.tick(1.0)
    assert not any(isinstance(message, Offer) for message in rig.took())


def written_back(rig: Rig, now: float = 0.0) -> Offer:
    """What is next to be evicted is offered."""
    rig.took()
    rig.tick(now)
    (offer,) = (message for message in rig.took() if isinstance(message, Offer))
    return offer


def full_of(rig: Rig) -> Tracked:
    """The device tier is full of one sequence, which nobody uses, and another, which is in use."""
    first = offered(rig, 10)
    rig.let_go(first)
    offered(rig, 13, number=1)
    return first


@pytest.mark.parametrize("how", ["no answer", "no room", "some room", "copy failed", "no keeper"])
def test_with_write_back_what_was_not_taken_is_offered_again(how: str) -> None:
    rig = Rig(pages=25, write="write_back")
    full_of(rig)
    offer = written_back(rig)
    match how:
        case "no answer":
            rig.tick(0.0)
            rig.tick(5.0)
        case "no room":
            rig.say(Room(offer.serial, 0, (b"",)))
        case "some room":
            rig.say(Room(offer.serial, 0, (pack([1, 2, 3]),)))
            rig.end(rig.copy())
        case "copy failed":
            rig.say(Room(offer.serial, 0, (pack(list(range(1, 11))),)))
            rig.end(rig.copy(), "a bad day")
        case _:
            rig.say(Room(offer.serial, 0, (pack(list(range(1, 11))),)))
            rig.caching.keeper_down(KEEPER)
            rig.caching.keeper_up(KEEPER)
            rig.end(rig.copy())
            assert written_back(rig, 0.1).page_hashes == offer.page_hashes
            return
    rig.took()
    rig.tick(4.9)
    assert not any(isinstance(message, Offer) for message in rig.took())  # not at once
    assert written_back(rig, 11.0).page_hashes == offer.page_hashes


@pytest.mark.parametrize("how", ["copied", "there"])
def test_with_write_back_what_the_host_tier_has_is_offered_once(how: str) -> None:
    rig = Rig(pages=25, write="write_back")
    first = full_of(rig)
    offer = written_back(rig)
    if how == "copied":
        rig.say(Room(offer.serial, 4, (pack(list(range(1, 7))),)))
        rig.end(rig.copy())
    else:
        rig.say(Room(offer.serial, 10, (b"",)))
    rig.took()
    rig.tick(1000.0)
    assert not any(isinstance(message, Offer) for message in rig.took())
    # Computed again, it may not be there either.
    rig.caching.published(first, 0, 10)
    assert written_back(rig, 1001.0).page_hashes == offer.page_hashes


def test_with_write_back_offers_of_one_moment_are_bounded() -> None:
    rig = Rig(pages=41, write="write_back")
    for number in range(40):
        rig.let_go(offered(rig, 1, number=number))
    rig.tick(0.0)
    offers = [message for message in rig.took() if isinstance(message, Offer)]
    assert len(offers) == 5  # an eighth of the pool
    assert rig.caching.dropped_offers == 0


def test_with_selective_writing_what_is_computed_again_was_used_twice() -> None:
    rig = Rig(write="write_through_selective")
    rig.let_go(offered(rig, 3))
    rig.index.clear()
    sequence = offered(rig, 3)
    (offer,) = rig.took()
    assert offer.page_hashes == b"".join(sequence.hashes[:3])
    rig.let_go(sequence)
    rig.caching.keeper_down(KEEPER)
    assert rig.is_idle


def test_offers_say_whose_pages_they_are() -> None:
    for write in ("write_through", "write_through_selective", "write_back"):
        rig = Rig(pages=17, write=write)  # type: ignore[arg-type]
        rig.tenant = "team-a"
        sequence = offered(rig, 16)
        rig.caching.reused(sequence, 16)
        rig.let_go(sequence)
        rig.tick(0.0)
        offers = [message for message in rig.took() if isinstance(message, Offer)]
        assert [offer.tenant for offer in offers] == ["team-a"]
        rig.caching.keeper_down(KEEPER)
        assert rig.is_idle


def test_what_comes_from_the_host_tier_is_the_tenants_on_the_device() -> None:
    rig = Rig()
    rig.tenant = "team-a"
    rig.caching.fetch(rig.track(22), 0.0, 0.0)
    rig.say(found(1, [[11, 12]]))
    rig.end(rig.copy())
    assert rig.index.tenant_pages() == {"team-a": 2}


# ---------------------------------------------------------------------------- what the keeper knows


def test_every_message_says_what_is_open() -> None:
    rig = Rig()
    sequences = [rig.track(22, number, number) for number in range(3)]
    for sequence in sequences:
        rig.caching.fetch(sequence, 0.0, 0.0)
    assert [message.floor for message in rig.took()] == [1, 1, 1]
    rig.caching.leave(sequences[1])
    assert rig.took() == [Close(2, 1)]
    rig.caching.leave(sequences[0])
    assert rig.took() == [Close(1, 3)]
    rig.caching.leave(sequences[2])
    assert rig.took() == [Close(3, 4)]


def test_the_last_message_may_be_lost_and_so_is_said_again() -> None:
    rig = Rig()
    one, other = rig.track(22), rig.track(22, 1)
    rig.caching.fetch(one, 0.0, 0.0)
    rig.caching.fetch(other, 0.0, 0.0)
    rig.tick(0.0)
    rig.caching.leave(other)
    rig.caching.leave(one)
    rig.took()
    for now in (20.0, 40.0, 60.0):
        rig.tick(now)
        assert rig.took() == [Close(2, 3)]
    rig.caching.keeper_down(KEEPER)
    rig.tick(80.0)
    assert rig.took() == []
