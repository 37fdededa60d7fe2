"""PageIndex: examples of each rule. test_index_model.py has random calls."""

import pytest

from hicache import index as index_module
from hicache.index import Cleared, PageIndex, Removed, Stored, TopPrefix
from hicache.keys import page_hashes, root_hash
from transfer.layout import LayerGroup

PAGE_TOKENS = 2
ROOT = root_hash("model")
FULL = LayerGroup("full", (0,), kv_heads=1, head_dim=8)


def sliding(window: int) -> LayerGroup:
    return LayerGroup("sliding", (1,), kv_heads=1, head_dim=8, window=window)


def chain(pages: str) -> list[bytes]:
    """Hashes of a sequence whose page i holds the character pages[i], repeated."""
    return page_hashes([ord(c) for c in pages for _ in range(PAGE_TOKENS)], PAGE_TOKENS, ROOT)


def fill(index: PageIndex, hashes: list[bytes]) -> list[list[int]]:
    """A request that computes and inserts what it cannot reuse; it still holds its pages."""
    hit = index.match(hashes)
    slots = index.acquire(hashes[:hit])
    for g in range(len(index.groups)):
        fresh = index.allocate(g, len(hashes) - hit)
        assert fresh is not None
        slots[g] += fresh
    index.insert(ROOT, hashes, slots, first_page=0)
    index.check_integrity()
    return slots


def release(index: PageIndex, slots: list[list[int]]) -> None:
    for g, group_slots in enumerate(slots):
        index.release(g, group_slots)
    index.check_integrity()


def test_slots_are_handed_out_once_and_never_the_null_page():
    index = PageIndex([FULL], [5], PAGE_TOKENS)
    slots = index.allocate(0, 4)
    assert slots is not None
    assert sorted(slots) == [1, 2, 3, 4]
    assert index.allocate(0, 1) is None
    assert index.allocate(0, 0) == []
    index.release(0, [-1, *slots])
    assert (index.num_free(0), index.num_used(0), index.num_cached(0)) == (4, 0, 0)
    index.check_integrity()


def test_a_fresh_pool_and_a_returned_sequence_give_ascending_runs():
    index = PageIndex([FULL], [9], PAGE_TOKENS)
    slots = index.allocate(0, 4)
    assert slots is not None
    assert slots == list(range(slots[0], slots[0] + 4))
    index.release(0, slots)
    assert index.allocate(0, 4) == slots


def test_a_second_request_uses_the_pages_of_the_first():
    index = PageIndex([FULL], [9], PAGE_TOKENS)
    first = fill(index, chain("abcd"))
    second = fill(index, chain("abxy"))
    assert second[0][:2] == first[0][:2]
    assert (index.num_free(0), index.num_used(0)) == (2, 6)
    release(index, first)
    assert (index.num_used(0), index.num_cached(0)) == (4, 2)
    assert index.match(chain("abcdz")) == 4


def test_without_reuse_nothing_is_cached():
    index = PageIndex([FULL], [9], PAGE_TOKENS, reuse=False)
    release(index, fill(index, chain("abcd")))
    assert index.match(chain("abcd")) == 0
    assert index.num_free(0) == 8


def test_a_private_duplicate_is_freed_and_does_not_pin_the_entry():
    index = PageIndex([FULL], [9], PAGE_TOKENS)
    first = fill(index, chain("ab"))
    copy = index.allocate(0, 3)
    assert copy is not None
    index.insert(ROOT, chain("abc"), [copy], first_page=0)
    release(index, first)
    # a and b have no reference, but c, which continues them, is in use: not evictable.
    assert (index.num_free(0), index.num_cached(0), index.num_used(0)) == (3, 2, 3)
    assert index.can_allocate([3])
    assert not index.can_allocate([4])
    assert index.allocate(0, 4) is None
    release(index, [copy])
    assert (index.num_free(0), index.num_cached(0)) == (5, 3)
    assert index.can_allocate([8])


def test_orphans_are_not_inserted():
    index = PageIndex([FULL], [5], PAGE_TOKENS)
    hashes = chain("abcd")
    slots = index.allocate(0, 4)
    assert slots is not None
    index.insert(hashes[1], hashes[2:], [slots[2:]], first_page=2)
    index.insert(ROOT, hashes, [[slots[0], -1, *slots[2:]]], first_page=0)
    assert index.match(hashes) == 1
    index.insert(hashes[0], hashes[1:], [slots[1:]], first_page=1)
    assert index.match(hashes) == 4
    release(index, [slots])


def test_eviction_takes_leaves_first_and_the_least_recently_used():
    index = PageIndex([FULL], [7], PAGE_TOKENS)
    release(index, fill(index, chain("abc")))
    release(index, fill(index, chain("xyz")))
    release(index, [index.acquire(chain("ab"))[0]])
    # Last used: c, then x y z, then a b. z goes before y and x, which it continues.
    lengths = []
    held = []
    for _ in range(6):
        held += index.allocate(0, 1) or []
        index.check_integrity()
        lengths.append((index.match(chain("abc")), index.match(chain("xyz"))))
    assert lengths == [(2, 3), (2, 2), (2, 1), (2, 0), (1, 0), (0, 0)]
    assert index.evictions == 6
    assert sorted(held) == [1, 2, 3, 4, 5, 6]


def test_a_page_used_again_is_evicted_by_its_later_use():
    index = PageIndex([FULL], [4], PAGE_TOKENS)
    for pages in "abc":
        release(index, fill(index, chain(pages)))
    release(index, index.acquire(chain("a")))
    held = index.acquire(chain("b"))
    assert index.allocate(0, 1) is not None
    assert [index.match(chain(pages)) for pages in "abc"] == [1, 1, 0]
    assert index.allocate(0, 1) is not None
    assert [index.match(chain(pages)) for pages in "abc"] == [0, 1, 0]
    assert index.allocate(0, 1) is None
    release(index, held)


def test_an_allocation_that_cannot_succeed_evicts_nothing():
    index = PageIndex([FULL], [7], PAGE_TOKENS)
    release(index, fill(index, chain("abc")))
    fill(index, chain("xy"))
    assert index.allocate(0, 5) is None
    assert index.match(chain("abc")) == 3
    assert index.evictions == 0


def test_a_match_needs_only_the_last_window():
    index = PageIndex([FULL, sliding(3)], [9, 9], PAGE_TOKENS)
    slots = fill(index, chain("abcdef"))
    index.release(1, slots[1][:4], cold=True)
    slots[1][:4] = [-1] * 4
    assert index.allocate(1, 6) is not None  # 2 free, and the 4 cold ones are evicted
    index.check_integrity()
    assert index.match(chain("abcdef")) == 6
    assert index.match(chain("abcdefg")) == 6
    # A match of 4 pages would need page 3, of 5 page 4 (there) alone: positions 8.. and 10..
    assert index.match(chain("abcdex")) == 5
    assert index.match(chain("abcdxx")) == 0
    acquired = index.acquire(chain("abcdef"))
    assert acquired[1] == [-1, -1, -1, -1, -1, slots[1][5]]
    release(index, acquired)


def test_cold_pages_are_evicted_before_older_ones():
    index = PageIndex([FULL, sliding(64)], [9, 5], PAGE_TOKENS)
    release(index, fill(index, chain("ab")))
    slots = fill(index, chain("xy"))
    index.release(1, slots[1], cold=True)
    assert index.allocate(1, 2) is not None
    assert index.match(chain("ab")) == 2
    assert index.match(chain("xy")) == 0


def test_a_tombstone_is_filled_by_the_next_who_computes_the_page():
    index = PageIndex([FULL, sliding(64)], [9, 5], PAGE_TOKENS)
    release(index, fill(index, chain("ab")))
    taken = index.allocate(1, 4)
    assert taken is not None
    index.release(1, taken)
    assert index.match(chain("ab")) == 0
    release(index, fill(index, chain("ab")))
    assert index.match(chain("ab")) == 2
    assert (index.num_cached(0), index.num_cached(1)) == (2, 2)


def test_evicting_an_entry_frees_its_pages_in_all_groups():
    index = PageIndex([FULL, sliding(64)], [5, 9], PAGE_TOKENS)
    release(index, fill(index, chain("abcd")))
    assert index.can_allocate([4, 8])
    assert not index.can_allocate([5, 0])
    assert index.allocate(0, 1) is not None
    assert (index.num_free(1), index.evictions) == (5, 2)
    assert index.match(chain("abcd")) == 3


def test_an_entry_whose_sliding_page_is_used_stays_whole():
    index = PageIndex([FULL, sliding(64)], [3, 9], PAGE_TOKENS)
    slots = fill(index, chain("ab"))
    index.release(0, slots[0])
    assert not index.can_allocate([1, 0])
    assert index.allocate(0, 1) is None
    index.release(1, slots[1])
    assert index.allocate(0, 1) is not None
    index.check_integrity()


def test_a_model_without_full_attention_needs_no_prefix():
    index = PageIndex([sliding(3)], [5], PAGE_TOKENS)
    slots = fill(index, chain("abcd"))
    index.release(0, slots[0][:3], cold=True)
    assert index.allocate(0, 3) is not None
    index.check_integrity()
    assert index.match(chain("abcd")) == 4
    assert index.acquire(chain("abcd")) == [[-1, -1, -1, slots[0][3]]]
    index.check_integrity()


def test_resident_pages_are_seen_without_being_used():
    index = PageIndex([FULL, sliding(3)], [9, 9], PAGE_TOKENS)
    slots = fill(index, chain("abcd"))
    index.release(1, slots[1][:2], cold=True)
    assert index.allocate(1, 6) is not None  # 4 free, and the cold ones are evicted
    assert index.resident(chain("abcdef")) == [slots[0], [-1, -1, *slots[1][2:]]]
    assert index.resident(chain("abcdef"), first=3) == [slots[0][3:], slots[1][3:]]
    assert index.resident(chain("abxy"), first=1) == [slots[0][1:2], [-1]]
    for nowhere in (index.resident(chain("x")), index.resident(chain("ab"), 2)):
        assert nowhere == [[], []]
    assert index.resident(chain("ab"), 9) == [[], []]
    assert index.num_used(0) == 4


def test_without_full_attention_a_page_may_be_resident_alone():
    index = PageIndex([sliding(3)], [5], PAGE_TOKENS)
    slots = fill(index, chain("abcd"))
    index.release(0, slots[0][:1], cold=True)
    assert index.allocate(0, 1) is not None
    assert index.resident(chain("abcde")) == [[-1, *slots[0][1:]]]
    assert index.resident(chain("axy")) == [[]]


def test_retain_and_clear():
    index = PageIndex([FULL], [9], PAGE_TOKENS)
    slots = fill(index, chain("abcd"))
    index.retain(0, [-1, *slots[0][:2]])
    index.release(0, slots[0])
    assert (index.num_used(0), index.num_cached(0)) == (2, 2)
    index.clear()
    index.check_integrity()
    assert (index.num_used(0), index.num_cached(0), index.num_free(0)) == (2, 0, 6)
    assert index.match(chain("abcd")) == 0
    index.release(0, slots[0][:2])
    assert index.num_free(0) == 8


def test_a_callers_bug_is_an_error_and_changes_nothing():
    index = PageIndex([FULL, sliding(4)], [5, 5], PAGE_TOKENS)
    slots = fill(index, chain("ab"))
    spare = index.allocate(0, 1)
    assert spare is not None
    with pytest.raises(ValueError, match="not resident"):
        index.acquire(chain("abx"))
    with pytest.raises(ValueError, match="free"):
        index.retain(0, [slots[0][0], index.num_free(0) and 1])
    with pytest.raises(ValueError, match="another page"):
        index.insert(chain("ab")[1], chain("abc")[2:], [spare, slots[1][:1]], first_page=2)
    index.check_integrity()
    release(index, slots)
    index.release(0, spare)
    with pytest.raises(ValueError, match="no reference"):
        index.release(0, spare)
    index.check_integrity()


def runs_of(index: PageIndex) -> list[int]:
    """Pages of each run, in order of insertion."""
    return [run.num_pages for run in dict.fromkeys(index._runs.values())]


def test_a_sequence_that_grows_page_by_page_is_one_run():
    index = PageIndex([FULL], [9], PAGE_TOKENS)
    hashes = chain("abcdefgh")
    slots = index.allocate(0, 8)
    assert slots is not None
    for i, slot in enumerate(slots):
        index.insert(hashes[i - 1] if i else ROOT, hashes[i : i + 1], [[slot]], i)
        index.check_integrity()
    assert runs_of(index) == [8]
    index.release(0, slots[6:])
    release(index, [slots[:6]])
    assert runs_of(index) == [6, 2]


def test_a_run_does_not_grow_once_its_history_is_another():
    index = PageIndex([FULL], [20], PAGE_TOKENS, order="lfu")
    slots = index.allocate(0, 3)
    assert slots is not None
    index.insert(ROOT, chain("ab"), [slots[:2]], 0)
    release(index, index.acquire(chain("ab")))  # a hit, which c has not had
    index.insert(chain("ab")[1], chain("abc")[2:], [slots[2:]], 2)
    assert runs_of(index) == [2, 1]
    release(index, [slots])
    release(index, fill(index, chain("xy")))
    assert index.allocate(0, 15) is not None
    assert (index.match(chain("abc")), index.match(chain("xy"))) == (2, 2)
    assert index.allocate(0, 1) is not None
    assert (index.match(chain("abc")), index.match(chain("xy"))) == (2, 1)


def test_a_run_with_a_branch_or_other_references_does_not_grow():
    index = PageIndex([FULL], [20], PAGE_TOKENS)
    slots = index.allocate(0, 3)
    copies = index.allocate(0, 3)
    assert slots is not None
    assert copies is not None
    index.retain(0, copies)
    index.insert(ROOT, chain("ab"), [slots[:2]], 0)
    index.insert(ROOT, chain("abc"), [copies], 0)  # c has two references, a and b have one
    index.check_integrity()
    index.insert(chain("ab")[1], chain("abd")[2:], [slots[2:]], 2)
    index.check_integrity()
    assert runs_of(index) == [2, 1, 1]
    release(index, [slots])
    release(index, [copies])
    release(index, [copies])
    assert (index.num_cached(0), index.num_free(0)) == (4, 15)


def test_long_sequences_are_cut_into_runs():
    index = PageIndex([FULL], [1001], PAGE_TOKENS)
    hashes = page_hashes(list(range(2000)), PAGE_TOKENS, ROOT)
    release(index, fill(index, hashes))
    assert max(runs_of(index)) <= index_module._MAX_RUN_PAGES
    release(index, index.acquire(hashes[:700]))
    assert index.match(hashes) == 1000
    assert index.allocate(0, 301) is not None
    index.check_integrity()
    assert index.match(hashes) == 699


def test_eviction_stops_at_a_sliding_page_in_use():
    index = PageIndex([FULL, sliding(64)], [7, 9], PAGE_TOKENS)
    slots = fill(index, chain("abcd"))
    index.release(0, slots[0])
    index.release(1, slots[1][2:])
    release(index, fill(index, chain("xy")))
    assert not index.can_allocate([5, 0])
    assert index.allocate(0, 4) is not None
    index.check_integrity()
    assert (index.match(chain("abcd")), index.match(chain("xy"))) == (2, 0)


def test_a_partly_kept_run_can_be_used_again():
    index = PageIndex([FULL, sliding(64)], [7, 9], PAGE_TOKENS)
    release(index, fill(index, chain("ab")))
    slots = fill(index, chain("abcd"))
    index.release(0, slots[0])
    index.release(1, slots[1][3:])
    index.check_integrity()
    assert index.can_allocate([3, 0])
    again = index.acquire(chain("abcd"))
    index.check_integrity()
    assert not index.can_allocate([3, 0])
    release(index, again)
    index.release(1, slots[1][:3])
    index.check_integrity()
    assert index.can_allocate([6, 8])


def test_a_pin_keeps_a_prefix_until_its_time():
    index = PageIndex([FULL], [7], PAGE_TOKENS)
    slots = index.allocate(0, 3)
    assert slots is not None
    index.insert(ROOT, chain("ab"), [slots[:2]], 0)
    index.pin(chain("ab"), until=10.0)
    index.insert(chain("ab")[1], chain("abc")[2:], [slots[2:]], 2)  # not part of the pin
    release(index, [slots])
    assert (index.num_used(0), index.num_cached(0)) == (0, 3)
    index.pin(chain("a"), until=20.0)
    index.check_integrity()
    assert index.can_allocate([4])
    assert not index.can_allocate([5])
    assert index.expire(9.9) == 0
    assert index.expire(10.0) == 1
    index.check_integrity()
    assert index.can_allocate([5])
    assert index.allocate(0, 6) is None
    assert index.allocate(0, 5) is not None
    assert index.match(chain("abc")) == 1
    assert index.expire(20.0) == 1
    assert index.allocate(0, 1) is not None
    index.check_integrity()


def test_a_pin_keeps_the_window_of_sliding_groups():
    index = PageIndex([FULL, sliding(3)], [9, 5], PAGE_TOKENS)
    release(index, fill(index, chain("abcd")))
    index.pin(chain("abcd"), until=1.0)
    assert not index.can_allocate([0, 4])
    assert index.allocate(1, 3) is not None
    index.check_integrity()
    assert index.match(chain("abcd")) == 4
    with pytest.raises(ValueError, match="not resident"):
        index.pin(chain("abc"), until=1.0)
    index.expire(1.0)
    assert index.allocate(1, 1) is not None
    assert index.match(chain("abcd")) == 0


def test_clear_ends_pins():
    index = PageIndex([FULL, sliding(3)], [9, 5], PAGE_TOKENS)
    release(index, fill(index, chain("abcd")))
    index.pin(chain("abcd"), until=1.0)
    index.clear()
    index.check_integrity()
    assert index.expire(1.0) == 0
    assert index.can_allocate([8, 4])


def test_latent_pages_follow_the_rules_of_full_ones():
    latent = LayerGroup("latent", (0,), kv_heads=1, head_dim=8)
    index = PageIndex([latent], [7], PAGE_TOKENS)
    release(index, fill(index, chain("abcd")))
    assert index.allocate(0, 4) is not None
    assert index.match(chain("abcd")) == 2


def test_an_unknown_order_is_refused():
    with pytest.raises(ValueError, match="found 'best', expected one of lru"):
        PageIndex([FULL], [7], PAGE_TOKENS, order="best")


def test_pages_out_of_place_are_refused():
    index = PageIndex([FULL], [9], PAGE_TOKENS)
    hashes = chain("abcd")
    slots = fill(index, hashes[:2])
    spare = index.allocate(0, 2)
    assert spare is not None
    with pytest.raises(ValueError, match="not page 2"):
        index.insert(hashes[1], hashes[2:], [spare], first_page=3)
    with pytest.raises(ValueError, match="not page 0"):
        index.insert(ROOT, hashes[1:3], [spare], first_page=0)
    with pytest.raises(ValueError, match="two pages in one slot"):
        index.insert(hashes[1], hashes[2:], [spare[:1] * 2], first_page=2)
    index.check_integrity()
    release(index, [[*slots[0], *spare]])


def test_the_heap_does_not_grow_with_use():
    index = PageIndex([FULL], [65], PAGE_TOKENS)
    hashes = chain("abcdefgh")
    for _ in range(100):
        release(index, fill(index, hashes))
    assert len(index._order.leaves) <= len(hashes)


def insert_as(index: PageIndex, pages: str, tenant: str | None) -> list[list[int]]:
    """As `fill`, for a tenant, in one full group."""
    hashes = chain(pages)
    hit = index.match(hashes)
    (slots,) = index.acquire(hashes[:hit])
    fresh = index.allocate(0, len(hashes) - hit)
    assert fresh is not None
    index.insert(ROOT, hashes, [slots + fresh], first_page=0, tenant=tenant)
    index.check_integrity()
    return [slots + fresh]


def test_entries_belong_to_who_inserted_them_first():
    index = PageIndex([FULL], [9], PAGE_TOKENS)
    release(index, insert_as(index, "ab", "x"))
    release(index, insert_as(index, "abcd", "y"))
    release(index, insert_as(index, "e", None))
    assert index.tenant_pages() == {"x": 2, "y": 2}
    assert index.allocate(0, 4) is not None  # d is the last leaf of those first released
    index.clear()
    assert index.tenant_pages() == {}


def test_a_tenant_over_its_quota_loses_its_own():
    index = PageIndex([FULL], [12], PAGE_TOKENS)
    index.set_quota("greedy", 3)
    release(index, insert_as(index, "ab", "modest"))
    release(index, insert_as(index, "uvw", "greedy"))
    held = insert_as(index, "xyz", "greedy")
    assert index.tenant_pages() == {"modest": 2, "greedy": 3}
    assert index.match(chain("uvw")) == 0
    release(index, held)
    # What it uses counts beyond its quota, and is the first to go once it is not used.
    release(index, insert_as(index, "pqrst", "greedy"))
    assert index.tenant_pages() == {"modest": 2, "greedy": 5}
    assert index.allocate(0, 6) is not None
    assert index.tenant_pages() == {"modest": 2, "greedy": 3}
    assert index.match(chain("ab")) == 2


def test_a_quota_for_each_tenant_that_has_none_of_its_own():
    index = PageIndex([FULL], [20], PAGE_TOKENS)
    index.set_quota("x", 3)
    index.set_quota(None, 2)
    assert (index.quota("x"), index.quota("y")) == (3, 2)
    for tenant in ("x", "y", "z"):
        slots = index.allocate(0, 4)
        assert slots is not None
        index.insert(ROOT, chain(f"{tenant}bcd"), [slots], 0, tenant)
        release(index, [slots])
        assert index.tenant_of(chain(f"{tenant}b")[-1]) == tenant
        index.keep_quota(tenant)
        index.check_integrity()
    assert index.tenant_of(chain("w")[0]) is None
    assert index.tenant_pages() == {"x": 3, "y": 2, "z": 2}
    index.keep_quota("x", coming=2)
    assert index.tenant_pages()["x"] == 1
    index.set_quota(None, 1)
    index.keep_quota("y")
    assert index.tenant_pages() == {"x": 1, "y": 1, "z": 2}
    index.check_integrity()
    index.set_quota(None, None)
    assert index.quota("y") is None
    index.check_integrity()


def test_a_quota_may_change_and_needs_full_attention():
    index = PageIndex([FULL], [5], PAGE_TOKENS)
    release(index, insert_as(index, "ab", "x"))
    release(index, insert_as(index, "yz", "y"))
    index.set_quota("y", 0)
    index.check_integrity()
    assert index.allocate(0, 1) is not None  # not of x, though older
    assert index.tenant_pages() == {"x": 2, "y": 1}
    index.set_quota("y", None)
    assert index.allocate(0, 1) is not None
    assert index.tenant_pages() == {"x": 1, "y": 1}
    with pytest.raises(ValueError, match="a quota of -1 pages"):
        index.set_quota("x", -1)
    with pytest.raises(ValueError, match="no tenants"):
        PageIndex([sliding(3)], [5], PAGE_TOKENS).set_quota("x", 1)


def test_clearing_a_tenant_keeps_what_others_continue_and_what_is_used():
    index = PageIndex([FULL], [12], PAGE_TOKENS)
    release(index, insert_as(index, "abc", "x"))
    release(index, insert_as(index, "abz", "y"))
    held = insert_as(index, "mn", "x")
    release(index, insert_as(index, "mno", "x"))
    index.clear("x")
    index.check_integrity()
    assert index.tenant_pages() == {"x": 4, "y": 1}  # a b under y's z, and m n, which are used
    assert [index.match(chain(pages)) for pages in ("abc", "abz", "mno")] == [2, 3, 2]
    release(index, held)
    index.clear("y")
    index.clear("x")
    assert (index.num_free(0), index.tenant_pages()) == (11, {})


def test_the_feed_tells_what_entered_and_what_left():
    index = PageIndex([FULL, sliding(64)], [5, 5], PAGE_TOKENS, feed=True)
    a, b, c, d = chain("abcd")
    release(index, fill(index, chain("ab")))
    slots = fill(index, chain("abcd"))
    assert index.take_changes() == [Stored(ROOT, (a, b), 0), Stored(b, (c, d), 2)]
    release(index, slots)
    assert index.allocate(1, 1) is not None  # leaves a tombstone: no change
    assert index.take_changes() == []
    assert index.allocate(0, 1) is not None
    assert index.allocate(0, 1) is not None
    index.clear()
    assert index.take_changes() == [Removed((d, c)), Cleared()]
    assert PageIndex([FULL], [5], PAGE_TOKENS).take_changes() == []


def test_top_prefixes_are_those_from_which_most_was_reused():
    index = PageIndex([FULL], [20], PAGE_TOKENS)
    release(index, insert_as(index, "abcd", "x"))
    release(index, insert_as(index, "mn", None))
    release(index, insert_as(index, "pqr", None))
    for _ in range(3):
        release(index, index.acquire(chain("ab")))
    release(index, index.acquire(chain("mn")))
    assert index.top_prefixes(3) == [
        TopPrefix(chain("ab")[1], 0, 2, 3, "x"),
        TopPrefix(chain("mn")[1], 0, 2, 1, None),
        TopPrefix(chain("pqr")[2], 0, 3, 0, None),
    ]


def test_pages_lie_in_slots_of_their_stripe():
    index = PageIndex([FULL], [12], PAGE_TOKENS, cp=3)  # three pages a rank
    slots = index.allocate(0, 4, first_page=2)
    assert slots is not None
    assert [slot % 3 for slot in slots] == [2, 0, 1, 2]
    assert min(slots) >= 3
    assert index.can_allocate([5], [6])
    assert not index.can_allocate([6], [6])
    assert not index.can_allocate([1], [2], spare=[5])
    assert not index.can_allocate([2], [2], spare=[2])
    assert index.can_allocate([1], [2], spare=[0, 1, 3, 4])
    assert index.allocate(0, 2, first_page=2) is not None
    assert index.num_free(0) == 3
    assert index.allocate(0, 1, first_page=5) is None
    index.check_integrity()


def test_a_fresh_pool_gives_each_rank_ascending_pages():
    index = PageIndex([FULL], [18], PAGE_TOKENS, cp=2)
    slots = index.allocate(0, 6)
    assert slots is not None
    assert slots[::2] == list(range(slots[0], slots[0] + 6, 2))
    assert slots[1::2] == list(range(slots[1], slots[1] + 6, 2))


def test_eviction_goes_on_until_every_stripe_has_room():
    index = PageIndex([FULL], [10], PAGE_TOKENS, cp=2)  # four pages a rank
    release(index, fill(index, chain("abc")))
    release(index, fill(index, chain("xyz")))
    # Two pages are free, of stripe 1. The oldest leaf, page 2 of abc, is of stripe 0.
    assert index.allocate(0, 1, first_page=0) is not None
    assert (index.match(chain("abc")), index.match(chain("xyz"))) == (2, 3)
    assert index.allocate(0, 2, first_page=1) is not None
    # The next of stripe 0 is the first page, after the second one.
    assert (index.match(chain("abc")), index.match(chain("xyz"))) == (0, 3)
    index.check_integrity()


def test_sliding_pages_go_by_stripe():
    index = PageIndex([sliding(64)], [6], PAGE_TOKENS, cp=2)
    release(index, fill(index, chain("abc")))
    assert index.allocate(0, 1, first_page=1) is not None  # free
    assert index.allocate(0, 1, first_page=1) is not None  # page 1, not page 0, which is older
    assert index.allocate(0, 1, first_page=1) is None
    assert index.allocate(0, 2, first_page=0) is None
    assert index.resident(chain("abc"))[0][::2] != [-1, -1]
    index.check_integrity()


def test_a_page_in_a_slot_of_another_stripe_is_refused():
    index = PageIndex([FULL], [8], PAGE_TOKENS, cp=2)
    slots = index.allocate(0, 2, first_page=1)
    assert slots is not None
    with pytest.raises(ValueError, match="not of their pages' stripes"):
        index.insert(ROOT, chain("ab"), [slots], 0)
    with pytest.raises(ValueError, match="cp 2"):
        PageIndex([FULL], [9], PAGE_TOKENS, cp=2)


@pytest.mark.parametrize("order", ["lru", "lfu", "slru", "cost"])
def test_pages_that_were_held_for_no_request_were_last_used_as_before(order: str) -> None:
    index = PageIndex([FULL], [7], PAGE_TOKENS, order=order)
    for pages in ("ab", "cd", "ef"):
        release(index, fill(index, chain(pages)))
    oldest = index.resident(chain("ab"))[0]
    index.retain(0, oldest)
    index.release(0, oldest, is_use=False)
    index.check_integrity()
    assert index.next_evicted(1) == chain("ab")[-1:]
    # A request that uses them meanwhile does count.
    index.retain(0, oldest)
    release(index, index.acquire(chain("ab")))
    index.release(0, oldest, is_use=False)
    index.check_integrity()
    assert index.next_evicted(1) == chain("cd")[-1:]


def test_looking_at_what_is_next_to_be_evicted_does_not_pass_for_evicting_it() -> None:
    index = PageIndex([FULL], [9], PAGE_TOKENS, order="cost")
    release(index, fill(index, chain("abcd")))
    for _ in range(3):
        assert index.next_evicted(1) == chain("abcd")[-1:]
    release(index, fill(index, chain("ef")))  # worth less than a page at place 3
    assert index.next_evicted(1) == chain("ef")[-1:]


def test_the_chain_of_a_leaf_goes_through_what_others_continue_too() -> None:
    index = PageIndex([FULL], [9], PAGE_TOKENS)
    for pages in ("abcd", "abef"):
        release(index, fill(index, chain(pages)))
    leaves = index.next_evicted(8)
    assert [index.chain(last) for last in leaves] == [chain("abcd"), chain("abef")]
