"""The storage tier: an example of each rule, then random calls and faults."""

import dataclasses
import json
import random

import pytest
from sampling import a_fifth_of
from storage_tier_world import FULL, LATENT, PAGE_TOKENS, ROOT, World, sliding

from hicache.index import PageIndex
from hicache.storage.storage import Outcome, StorageResult
from hicache.storage_io import (
    Breaker,
    BreakerState,
    CancelOp,
    Exists,
    Get,
    OpKind,
    PagesFreed,
    Put,
    StorageLimits,
)
from hicache.storage_tier import StorageTier
from transfer.layout import LayerGroup

SEEDS = 2000
LATENT_BEHIND = LayerGroup("latent", (2,), kv_heads=1, head_dim=4)


def make(groups=(FULL,), pool=40, heads=None, **limits):
    return World(groups, pool, heads, StorageLimits(**limits))


def put_pages(world):
    """By put under way: (group, the pages' places in their chain)."""
    return [pages_of(world, op_id) for op_id in world.ops(Put)]


def get_pages(world):
    return [pages_of(world, op_id) for op_id in world.ops(Get)]


def pages_of(world, op_id):
    effect = world.pending[op_id].effect
    hashes = [world.names[key][0] for key in effect.keys]
    places = {page_hash: i for chain in world.chains for i, page_hash in enumerate(chain)}
    return effect.group, [places[page_hash] for page_hash in hashes]


def fail(key):
    return Outcome.FAILED


def fail_page(world, page_hash, outcome=Outcome.FAILED, group=None):
    def fate(key):
        name, g = world.names[key]
        return outcome if name == page_hash and group in (None, g) else None

    return fate


def end_all(world, kind, fate=lambda key: None):
    for op_id in world.ops(kind):
        world.end(op_id, fate)
        world.check()


def later(world, seconds):
    world.now += seconds
    world.tier.tick(world.now)
    world.check()


# ---------------------------------------------------------------------------------------- writing


def test_what_enters_the_host_tier_is_written_batch_after_batch():
    world = make(batch_pages=3, heads=1)
    hashes = world.add_chain("abcdefg")
    world.cache(hashes)
    assert put_pages(world) == [(0, [0, 1, 2])] * 2  # two cells
    first, second = world.ops(Put)
    world.end(first)
    assert put_pages(world) == [(0, [0, 1, 2])]
    world.end(second)
    assert put_pages(world) == [(0, [3, 4, 5])] * 2
    world.settle()
    assert all(map(world.has_stored, hashes))
    stats = world.tier.stats()
    assert (stats.pages_written, stats.queued_pages) == (7, 0)
    assert stats.bytes_written == 7 * world.page_bytes[0]
    assert not world.index.references(0)


def test_a_failed_put_is_repeated_after_growing_pauses_and_then_given_up():
    world = make(batch_pages=2, put_attempts=3, put_pause_s=1.0)
    hashes = world.add_chain("abcd")
    world.cache(hashes)
    for pause_s in (1.0, 2.0):
        end_all(world, Put, fail_page(world, hashes[1]))
        later(world, pause_s - 0.01)
        assert not world.pending
        later(world, 0.01)
        assert put_pages(world) == [(0, [1, 2])]
    end_all(world, Put, fail)
    later(world, 100.0)
    assert not world.pending
    # Page 2 was put in the same batch; page 3 never was.
    assert [world.has_stored(page_hash) for page_hash in hashes] == [True, False, True, False]
    assert world.tier.stats().abandoned_pages == 3
    world.tier.pages_hit(hashes, world.now)
    world.settle()
    assert all(map(world.has_stored, hashes))


def test_pages_before_the_first_failure_count_and_it_has_all_its_attempts():
    world = make(batch_pages=2, put_attempts=2, put_pause_s=1.0)
    hashes = world.add_chain("abcd")
    world.cache(hashes)
    for page in (1, 2):
        end_all(world, Put, fail_page(world, hashes[page]))
        later(world, 1.0)
    assert put_pages(world) == [(0, [2, 3])]


@pytest.mark.parametrize("outcome", [Outcome.REFUSED, Outcome.FULL, Outcome.FAILED])
def test_pages_after_a_failed_one_are_not_published(outcome):
    world = make(batch_pages=8, put_pause_s=1.0)
    hashes = world.add_chain("abcd")
    world.cache(hashes)
    end_all(world, Put, fail_page(world, hashes[1], outcome))
    more = world.add_chain("abcdXY")
    world.cache(more)
    assert put_pages(world) == []  # it continues the chain that waits
    later(world, 1.0)
    assert put_pages(world) == [(0, [1, 2, 3, 4, 5])]


def test_a_storage_that_is_attached_later_gets_the_pages_before_as_well():
    world = make()
    hashes = world.add_chain("abcdef")
    tier = world.tier
    world.tier = StorageTier(world.index, world.num_pages, world.grid, lambda effect: None)
    world.cache(hashes[:4])
    for g in range(len(world.groups)):
        world.index.release(g, world.tier.slots_in_use(g))
    world.tier = tier
    world.cache(hashes)
    assert put_pages(world) == [(0, [0, 1, 2, 3, 4, 5])]


def test_a_hit_writes_what_is_not_known_to_be_stored_and_nothing_else():
    world = make()
    hashes = world.add_chain("abcd")
    world.cache(hashes)
    world.settle()
    world.tier.pages_hit(hashes, world.now)
    assert not world.pending
    world.tier.storage_cleared(world.now)
    world.tier.pages_hit(hashes[:3], world.now)
    assert put_pages(world) == [(0, [0, 1, 2])]


def test_pages_that_wait_are_not_held_and_are_skipped_when_they_are_gone():
    world = make(pool=7, batch_pages=2)
    hashes = world.add_chain("abcdef")
    world.cache(hashes)
    assert sorted(world.index.references(0)) == sorted(world.tier.slots_in_use(0))
    slots = world.allocate(0, 3)  # evicts the last pages
    assert slots is not None
    world.check()
    world.settle()
    assert [world.has_stored(page_hash) for page_hash in hashes] == [True] * 3 + [False] * 3
    assert world.tier.stats().evicted_pages == 3
    world.drop(0, slots)


def test_the_queue_is_bounded_and_drops_tails():
    world = make(pool=60, batch_pages=2, max_queued_pages=5)
    one, two = world.add_chain("abcdefgh"), world.add_chain("ijk")
    world.cache(one)
    world.cache(two)
    stats = world.tier.stats()
    assert (stats.queued_pages, stats.overflowed_pages) == (5, 6)
    world.settle()
    assert [world.has_stored(page_hash) for page_hash in one] == [True] * 5 + [False] * 3
    for hashes in (one, two):
        world.tier.pages_hit(hashes, world.now)
        world.settle()
    assert all(map(world.has_stored, one + two))


def test_the_hashes_that_the_queue_keeps_are_bounded():
    world = make(pool=60, max_queued_hashes=10)
    base = world.add_chain("abcdefg")
    world.cache(base)
    world.settle()
    tails = [world.add_chain("abcdefg" + tail) for tail in ("hi", "j", "k")]
    world.tier._operations.breaker.state = BreakerState.OPEN  # they wait
    world.tier._operations.breaker._until = world.now + 1.0
    for hashes in tails:
        world.cache(hashes)
        world.check()
    stats = world.tier.stats()
    assert (stats.queued_pages, stats.overflowed_pages) == (2, 2)
    world.settle(1.0)
    assert [world.has_stored(hashes[-1]) for hashes in tails] == [True, False, False]
    for hashes in tails:
        world.tier.pages_hit(hashes, world.now)
        world.settle()
    assert all(world.has_stored(hashes[-1]) for hashes in tails)


def test_bytes_of_puts_in_flight_are_bounded():
    page = World().page_bytes[0]
    world = make(pool=60, batch_pages=2, max_put_bytes=4 * page)
    for pages in ("abc", "def", "ghi"):
        world.cache(world.add_chain(pages))
    assert put_pages(world) == [(0, [0, 1])] * 2
    world.end(world.ops(Put)[0])
    assert put_pages(world) == [(0, [0, 1])] * 2  # chains take turns
    world.settle()
    assert all(world.has_stored(page_hash) for hashes in world.chains for page_hash in hashes)


def test_one_batch_is_put_however_large_a_page_is():
    world = make(max_put_bytes=1, max_get_bytes=1)
    hashes = world.add_chain("ab")
    world.cache(hashes)
    assert put_pages(world) == [(0, [0])]
    world.settle()
    world.evict_all()
    prefetch = world.prefetch(hashes)
    world.settle()
    assert prefetch.num_pages == 2


def test_pages_that_a_put_still_reads_are_not_free():
    world = make(put_attempts=1)
    hashes = world.add_chain("ab")
    world.cache(hashes)
    (op_id,) = world.ops(Put)
    world.end(op_id, fail, pages_in_use=True)
    world.check()
    assert world.tier.stats().operations_hanging == 1
    world.index.clear()
    assert len(world.index.references(0)) == 2
    world.free(op_id)
    world.check()
    assert not world.index.references(0)
    world.tier.handle(PagesFreed(op_id), world.now)  # once more
    world.check()


def test_an_operation_without_an_end_is_given_up_and_its_pages_stay_its_own():
    world = make(put_timeout_s=3.0, grace_s=1.0, put_pause_s=1.0)
    hashes = world.add_chain("ab")
    world.cache(hashes)
    (op_id,) = world.ops(Put)
    later(world, 3.9)
    assert world.effects[-1].op_id == op_id
    later(world, 0.1)
    assert world.effects[-1] == CancelOp(op_id)
    later(world, 1.0)
    assert len(world.ops(Put)) == 2  # tried again
    assert world.tier.stats().operations_given_up == 1
    world.end(op_id, fail)
    world.check()
    world.settle()
    assert all(map(world.has_stored, hashes))
    assert not world.index.references(0)


def test_chains_with_the_same_beginning_do_not_write_it_twice():
    world = make()
    one, two = world.add_chain("abcd"), world.add_chain("abXY")
    world.cache(one)
    world.cache(two)
    assert put_pages(world) == [(0, [0, 1, 2, 3])]
    world.settle()
    puts = [effect for effect in world.effects if isinstance(effect, Put)]
    assert [len(effect.keys) for effect in puts] == [4, 2]


def test_a_chain_that_grows_page_by_page_is_one_in_the_queue():
    world = make(batch_pages=8)
    hashes = world.add_chain("abcdefgh")
    for end in range(1, 9):
        world.cache(hashes[:end])
        world.check()
    assert put_pages(world) == [(0, [0])]
    world.end(world.ops(Put)[0])
    assert put_pages(world) == [(0, [1, 2, 3, 4, 5, 6, 7])]
    assert len(world.tier._writer._chains) == 1


def test_a_sliding_page_that_comes_later_is_written_later():
    world = make((FULL, sliding(4)))
    hashes = world.add_chain("abcd")
    world.cache(hashes, lacking=[0, 2])
    assert put_pages(world) == [(0, [0, 1, 2, 3]), (1, [2, 3])]
    world.settle()
    world.cache(hashes[:2])
    assert put_pages(world) == [(1, [0, 1])]
    world.settle()
    assert all(map(world.has_stored, hashes))


def test_a_sliding_page_that_came_unseen_is_written_at_a_hit():
    world = make((FULL, sliding(4)))
    hashes = world.add_chain("abcd")
    world.cache(hashes, lacking=[0, 2])
    world.settle()
    slots = world.allocate(1, 2)
    for slot, page_hash in zip(slots, hashes, strict=False):
        world.fill(1, slot, page_hash)
    world.index.insert(ROOT, hashes[:2], [[-1, -1], slots], 0)
    world.drop(1, slots)
    world.tier.pages_hit(hashes, world.now)
    assert put_pages(world) == [(1, [0, 1])]


# ---------------------------------------------------------------------------------------- reading


def test_what_storage_has_is_read_in_order_and_becomes_cache():
    world = make(batch_pages=2, heads=1)
    hashes = world.add_chain("abcdef")
    world.put_objects(hashes[:5])
    prefetch = world.prefetch(hashes)
    assert (prefetch.num_pages, prefetch.is_done) == (0, False)
    (op_id,) = world.ops(Exists)
    assert len(world.pending[op_id].effect.keys) == 12
    world.end(op_id)
    assert prefetch.target == 5
    assert get_pages(world) == [(0, [0, 1])] * 2 + [(0, [2, 3])] * 2 + [(0, [4])] * 2
    one, two = world.ops(Get)[:2]
    world.end(one)
    world.check()
    assert prefetch.num_pages == 0
    world.end(two)
    world.check()
    assert prefetch.num_pages == world.index.match(hashes) == 2
    world.settle()
    assert (prefetch.num_pages, prefetch.is_done) == (5, True)
    assert not world.index.references(0)
    assert len([effect for effect in world.effects if isinstance(effect, Exists)]) == 1
    world.tier.pages_hit(hashes[:4], world.now)
    assert not world.pending  # they are known to be stored
    stats = world.tier.stats()
    assert (stats.pages_restored, stats.pages_used, stats.pages_wasted) == (5, 4, 0)


def test_batches_that_land_out_of_order_are_inserted_in_order():
    world = make(batch_pages=2)
    hashes = world.add_chain("abcdef")
    world.put_objects(hashes)
    prefetch = world.prefetch(hashes)
    end_all(world, Exists)
    first, second, third = world.ops(Get)
    for op_id, num_pages in ((third, 0), (first, 2), (second, 6)):
        world.end(op_id)
        world.check()
        assert prefetch.num_pages == num_pages


def test_only_the_last_window_of_sliding_groups_is_read():
    world = make((FULL, sliding(4)), batch_pages=3)
    hashes = world.add_chain("abcdef")
    world.put_objects(hashes[:5])
    world.forget(hashes[:1], [1])
    prefetch = world.prefetch(hashes)
    end_all(world, Exists)
    assert prefetch.target == 5
    assert get_pages(world) == [(0, [0, 1, 2]), (0, [3, 4]), (1, [3, 4])]
    world.settle()
    assert prefetch.num_pages == 5


def test_a_window_may_be_there_already_or_make_the_prefix_shorter():
    world = make((FULL, sliding(4)))
    hashes = world.add_chain("abcdef")
    world.put_objects(hashes)
    world.forget(hashes[4:5], [1])
    prefetch = world.prefetch(hashes)
    end_all(world, Exists)
    assert prefetch.target == 4
    world.settle()
    assert prefetch.num_pages == 4
    assert world.index.resident(hashes)[1][:2] == [-1, -1]
    # Page 4 ends no window, and page 5 needs it.
    world.put_objects(hashes[4:5])
    prefetch = world.prefetch(hashes[:5])
    end_all(world, Exists)
    assert get_pages(world) == [(0, [4]), (1, [4])]  # the window's other page is there
    world.settle()
    assert prefetch.num_pages == 5


@pytest.mark.parametrize("groups", [(FULL, sliding(4)), (FULL, sliding(2), sliding(4, layer=3))])
def test_a_shorter_prefix_needs_its_own_window(groups):
    world = make(groups)
    hashes = world.add_chain("abcdef")
    world.put_objects(hashes)
    for page in (2, 4):
        world.forget(hashes[page : page + 1], [len(groups) - 1])
    prefetch = world.prefetch(hashes)
    end_all(world, Exists)
    assert prefetch.target == 2
    world.settle()
    assert prefetch.num_pages == 2


def test_full_pages_that_are_there_are_not_read_again_for_a_window():
    world = make((FULL, sliding(4)))
    hashes = world.add_chain("abcd")
    world.cache(hashes, lacking=[0, 4])
    world.put_objects(hashes)
    world.settle()
    assert world.index.match(hashes) == 0
    prefetch = world.prefetch(hashes)
    end_all(world, Exists)
    assert get_pages(world) == [(1, [2, 3])]
    world.settle()
    assert prefetch.num_pages == 4


@pytest.mark.parametrize(
    "outcome", [Outcome.MISS, Outcome.CORRUPT, Outcome.FAILED, Outcome.REFUSED]
)
def test_a_page_that_cannot_be_read_ends_the_prefix_on_all_groups(outcome):
    world = make((FULL, LATENT_BEHIND), batch_pages=2)
    hashes = world.add_chain("abcdef")
    world.put_objects(hashes)
    prefetch = world.prefetch(hashes)
    end_all(world, Exists)
    end_all(world, Get, fail_page(world, hashes[3], outcome, group=1))
    assert (prefetch.num_pages, prefetch.is_done) == (3, True)
    assert [len(slots) for slots in world.index.resident(hashes)] == [3, 3]
    assert not world.index.references(0)
    assert not world.index.references(1)


def test_after_a_cut_the_window_of_the_shorter_prefix_is_read():
    world = make((FULL, sliding(4)), batch_pages=2)
    hashes = world.add_chain("abcdef")
    world.put_objects(hashes)
    prefetch = world.prefetch(hashes)
    end_all(world, Exists)
    assert get_pages(world) == [(0, [0, 1]), (0, [2, 3]), (0, [4, 5]), (1, [4, 5])]
    world.end(world.ops(Get)[1], fail_page(world, hashes[3]))
    world.end(world.ops(Get)[0])
    world.check()
    assert prefetch.target == 3
    assert CancelOp(world.ops(Get)[0]) in world.effects
    assert get_pages(world)[2:] == [(1, [1, 2])]
    world.settle()
    assert (prefetch.num_pages, prefetch.is_done) == (3, True)


def test_two_prefetches_of_a_page_share_one_read():
    world = make(batch_pages=2)
    one, two = world.add_chain("abcd"), world.add_chain("abcXY")
    world.put_objects(one + two)
    first = world.prefetch(one)
    second = world.prefetch(two)
    end_all(world, Exists)
    assert get_pages(world) == [(0, [0, 1]), (0, [2, 3])]
    world.tier.cancel_prefetch(first, world.now)
    third = world.prefetch(one)
    end_all(world, Exists)
    world.tier.cancel_prefetch(third, world.now)
    assert third.is_done
    world.check()
    end_all(world, Get)
    assert get_pages(world) == [(0, [3, 4])]
    world.settle()
    assert (first.num_pages, second.num_pages) == (4, 5)
    reads = [key for effect in world.effects if isinstance(effect, Get) for key in effect.keys]
    assert len(reads) == len(set(reads)) == 6


def test_a_second_prefetch_does_not_ask_for_what_the_first_has_just_missed():
    world = make(batch_pages=2)
    hashes = world.add_chain("abcd")
    world.put_objects(hashes)
    first, second = world.prefetch(hashes), world.prefetch(hashes)
    end_all(world, Exists)
    world.forget(hashes[1:2])
    world.settle()
    assert (first.num_pages, second.num_pages) == (1, 1)
    reads = [key for effect in world.effects if isinstance(effect, Get) for key in effect.keys]
    assert len(reads) == len(set(reads))


def test_with_little_room_less_is_read():
    world = make(pool=9, pool_share=1.0, batch_pages=2)
    hashes = world.add_chain("abcdefgh")
    world.put_objects(hashes)
    slots = world.allocate(0, 3)
    prefetch = world.prefetch(hashes)
    world.settle()
    assert (prefetch.num_pages, prefetch.is_done) == (5, True)
    world.drop(0, slots)


def test_prefetches_together_fill_a_share_of_the_pool():
    world = make(pool=21, pool_share=0.5, batch_pages=2)
    one, two = world.add_chain("abcdefg"), world.add_chain("hijklmn")
    world.put_objects(one + two)
    first, second = world.prefetch(one), world.prefetch(two)
    third = world.prefetch(two)
    end_all(world, Exists)
    assert (first.target, second.target, third.target) == (7, 3, 0)
    assert third.is_done
    world.settle()
    again = world.prefetch(two)
    world.settle()
    assert again.num_pages == 7


def test_prefetches_together_fill_a_share_of_a_sliding_pool():
    world = make((FULL, sliding(8)), pool=[40, 9])
    one, two = world.add_chain("abcdef"), world.add_chain("ghijkl")
    world.put_objects(one + two)
    first, second = world.prefetch(one), world.prefetch(two)
    end_all(world, Exists)
    assert (first.target, second.target) == (6, 0)
    world.settle()
    assert first.num_pages == 6
    third = world.prefetch(two)
    world.settle()
    assert third.num_pages == 6


def test_of_sliding_groups_only_the_last_window_is_held():
    world = make((FULL, sliding(4)))
    hashes = world.add_chain("abcdefgh")
    world.cache(hashes[:6])
    world.put_objects(hashes)
    world.settle()
    world.prefetch(hashes)
    assert len(world.index.references(1)) == 2
    end_all(world, Exists)
    assert get_pages(world) == [(0, [6, 7]), (1, [6, 7])]
    assert sorted(world.index.references(1)) == sorted(world.pending[world.ops(Get)[1]].slots)


def test_bytes_of_gets_in_flight_are_bounded_over_all_prefetches():
    page = World().page_bytes[0]
    world = make(pool=60, batch_pages=2, max_get_bytes=5 * page)
    one, two = world.add_chain("abcdef"), world.add_chain("ghijkl")
    world.put_objects(one + two)
    first, second = world.prefetch(one), world.prefetch(two)
    end_all(world, Exists)
    assert get_pages(world) == [(0, [0, 1]), (0, [2, 3])]
    world.end(world.ops(Get)[0])
    assert get_pages(world) == [(0, [2, 3]), (0, [4, 5])]
    world.settle()
    assert (first.num_pages, second.num_pages) == (6, 6)


def test_what_a_prefetch_continues_is_not_evicted_meanwhile():
    world = make((FULL, sliding(4)), pool=9, pool_share=1.0, batch_pages=2)
    hashes = world.add_chain("abcdef")
    world.cache(hashes[:3])
    world.put_objects(hashes)
    world.settle()
    prefetch = world.prefetch(hashes[:4])
    world.evict_all()
    world.check()
    assert world.index.match(hashes) == 3
    world.settle()
    assert prefetch.num_pages == 4
    world.evict_all()
    assert world.index.match(hashes) == 0


def test_what_has_landed_is_not_evicted_before_the_rest_has():
    page = World().page_bytes[0]
    world = make(batch_pages=2, max_get_bytes=2 * page)
    hashes = world.add_chain("abcdef")
    world.put_objects(hashes)
    prefetch = world.prefetch(hashes)
    end_all(world, Exists)
    end_all(world, Get)
    world.evict_all()
    assert world.index.match(hashes) == 2
    world.settle()
    assert prefetch.num_pages == 6
    world.evict_all()
    assert world.index.match(hashes) == 0


def test_pages_of_the_window_that_are_there_are_not_evicted_meanwhile():
    world = make((FULL, sliding(4)))
    hashes = world.add_chain("abcdef")
    world.cache(hashes, lacking=[0, 5])
    world.put_objects(hashes)
    world.settle()
    prefetch = world.prefetch(hashes)
    end_all(world, Exists)
    assert get_pages(world) == [(1, [4])]
    world.evict_all()
    world.settle()
    assert prefetch.num_pages == 6


def test_an_index_that_is_cleared_meanwhile_ends_the_prefetch():
    world = make(batch_pages=2)
    hashes = world.add_chain("abcdef")
    world.put_objects(hashes)
    prefetch = world.prefetch(hashes)
    end_all(world, Exists)
    world.end(world.ops(Get)[0])
    world.index.clear()
    world.settle()
    assert (prefetch.num_pages, prefetch.is_done) == (0, True)
    assert not world.index.references(0)
    assert world.tier.stats().pages_wasted == 4


def test_a_cancelled_prefetch_reads_no_more_and_what_lands_counts():
    page = World().page_bytes[0]
    world = make(batch_pages=2, max_get_bytes=2 * page)
    hashes = world.add_chain("abcdef")
    world.put_objects(hashes)
    prefetch = world.prefetch(hashes)
    end_all(world, Exists)
    world.tier.cancel_prefetch(prefetch, world.now)
    assert not prefetch.is_done
    world.settle()
    assert (prefetch.num_pages, prefetch.is_done) == (2, True)
    prefetch = world.prefetch(hashes)
    world.tier.cancel_prefetch(prefetch, world.now)
    assert prefetch.is_done
    assert world.effects[-1] == CancelOp(world.ops(Exists)[0])
    world.tier.cancel_prefetch(prefetch, world.now)
    world.settle()
    assert not world.index.references(0)


def test_a_prefetch_ends_at_its_deadline_with_what_has_landed():
    world = make(batch_pages=2, prefetch_timeout_s=5.0, get_timeout_s=60.0)
    hashes = world.add_chain("abcd")
    world.put_objects(hashes)
    prefetch = world.prefetch(hashes)
    end_all(world, Exists)
    first, second = world.ops(Get)
    world.end(first)
    later(world, 5.0)
    assert world.effects[-1] == CancelOp(second)
    assert not prefetch.is_done
    world.end(second, fail)
    assert (prefetch.num_pages, prefetch.is_done) == (2, True)


def test_a_get_that_hangs_keeps_its_pages_and_not_the_prefetch():
    world = make(pool=9, batch_pages=2)
    hashes = world.add_chain("abcd")
    world.put_objects(hashes)
    prefetch = world.prefetch(hashes)
    end_all(world, Exists)
    first, second = world.ops(Get)
    world.end(first)
    world.end(second, fail, pages_in_use=True)
    world.check()
    assert (prefetch.num_pages, prefetch.is_done) == (2, True)
    assert len(world.index.references(0)) == 2
    world.evict_all()
    world.write_late(second)
    world.check()
    world.free(second)
    assert not world.index.references(0)


def test_what_is_known_to_be_absent_is_not_asked_for():
    world = make(absent_s=10.0)
    hashes = world.add_chain("abcd")
    world.put_objects(hashes[:2])
    prefetch = world.prefetch(hashes)
    world.settle()
    assert prefetch.num_pages == 2
    asked = len(world.effects)
    assert world.prefetch(hashes) is None
    assert len(world.effects) == asked
    world.cache(hashes[:3])
    world.settle()
    assert world.prefetch(hashes) is None  # the page after it is not there either
    world.now += 10.0
    world.put_objects(hashes)
    assert world.prefetch(hashes) is not None
    world.settle()
    assert world.index.match(hashes) == 4


def test_what_this_host_stores_is_not_absent_any_more():
    world = make()
    hashes = world.add_chain("ab")
    world.prefetch(hashes)
    world.settle()
    assert world.prefetch(hashes) is None
    world.cache(hashes)
    world.settle()
    world.evict_all()
    assert world.prefetch(hashes) is not None
    world.settle()
    assert world.index.match(hashes) == 2


def test_a_page_that_was_lost_is_written_again_with_those_after_it():
    world = make()
    hashes = world.add_chain("abcd")
    world.cache(hashes)
    world.settle()
    world.forget(hashes[1:2])
    world.evict_all()
    world.prefetch(hashes)
    world.settle()
    assert world.index.match(hashes) == 1
    world.cache(hashes)
    assert put_pages(world) == [(0, [1, 2, 3])]


def test_a_damaged_page_is_written_again():
    world = make()
    hashes = world.add_chain("abc")
    world.cache(hashes)
    world.settle()
    world.evict_all()
    world.prefetch(hashes)
    end_all(world, Exists)
    end_all(world, Get, fail_page(world, hashes[2], Outcome.CORRUPT))
    assert world.tier.stats().corrupt_objects == 1
    world.cache(hashes)
    assert put_pages(world) == [(0, [2])]


def test_a_sliding_page_that_was_lost_is_written_again():
    world = make((FULL, sliding(4)))
    hashes = world.add_chain("abcd")
    world.cache(hashes)
    world.settle()
    world.forget(hashes[3:], [1])
    world.evict_all()
    world.prefetch(hashes)
    world.settle()
    assert world.index.match(hashes) == 3
    world.cache(hashes)
    assert put_pages(world) == [(1, [3])]


def test_a_chain_that_waits_behind_a_lost_page_is_not_written():
    world = make(pool=60, put_pause_s=5.0)
    hashes = world.add_chain("abcd")
    world.cache(hashes[:2])
    world.settle()
    world.cache(hashes)
    end_all(world, Put, fail)
    # Another host's request for the same pages finds that the first is gone.
    world.forget(hashes[:1])
    world.index.clear()
    world.prefetch(hashes[:2])
    world.settle()
    world.cache(hashes)
    assert put_pages(world) == [(0, [0, 1, 2, 3])]


# ------------------------------------------------------------------------------- load or recompute


def test_what_is_computed_sooner_is_not_read_until_storage_is_fast_again():
    world = make(pool=200, pool_share=1.0, probe_s=10.0, probe_pages=2, absent_s=0.0)
    hashes = world.add_chain("abcdefghijklmnop")
    world.put_objects(hashes)
    world.prefetch(hashes[:2], tokens_per_s=1e9)  # not known: read, and measured
    end_all(world, Exists)
    world.now += 4.0
    world.settle()
    assert world.tier.stats().read_bytes_per_s == pytest.approx(2 * world.page_bytes[0] / 4.0)
    assert world.prefetch(hashes) is not None  # not known how fast prefill is
    world.tier.cancel_prefetch(world.prefetches[-1], world.now)
    world.settle()
    probe = world.prefetch(hashes, tokens_per_s=1000.0)
    assert probe.is_probe
    end_all(world, Exists)
    assert get_pages(world) == [(0, [2, 3])]
    world.now += 4.0
    world.settle()
    assert world.prefetch(hashes, tokens_per_s=1000.0) is None
    assert world.tier.stats().prefetches_judged_slow == 1
    later(world, 10.0)
    probe = world.prefetch(hashes, tokens_per_s=1000.0)
    assert probe.is_probe
    world.now += 1e-6
    end_all(world, Exists)
    world.now += 1e-6
    world.settle()
    prefetch = world.prefetch(hashes, tokens_per_s=1000.0)
    world.settle()
    assert not prefetch.is_probe
    assert prefetch.num_pages == 16


def test_little_that_is_there_may_not_be_worth_another_trip():
    world = make(pool=60)
    hashes = world.add_chain("abcdefghij")
    world.put_objects(hashes[:3])
    cost = world.tier._operations.cost
    cost.add_trip(0.5)
    cost.reads.add(10**9, 0.0, 1.0)
    # 10 pages take 2 s to compute, 3 pages 0.6 s, 1 page 0.2 s; a trip takes 0.5 s.
    prefetch = world.prefetch(hashes, tokens_per_s=10.0)
    end_all(world, Exists)
    assert get_pages(world) == [(0, [0, 1, 2])]
    world.settle()
    world.forget(hashes[1:])
    world.evict_all()
    world.now += 100.0
    cost.judge(10**12, 1, 1, 10.0, world.now)  # a probe has just been
    cost.add_trip(0.5)
    prefetch = world.prefetch(hashes, tokens_per_s=10.0)
    end_all(world, Exists)
    assert prefetch.is_done
    assert prefetch.num_pages == 0


def test_pages_that_the_request_has_are_not_what_reading_gains():
    world = make(pool=60)
    hashes = world.add_chain("abcdefghij")
    world.put_objects(hashes)
    cost = world.tier._operations.cost
    cost.reads.add(10 * world.page_bytes[0], 0.0, 1.0)
    cost.judge(10**12, 1, 1, 10.0, world.now)  # a probe has just been
    # 10 pages take 1 s to read and 2 s to compute, the last of them 0.2 s.
    assert world.prefetch(hashes, tokens_per_s=10.0, have=9) is None
    assert world.prefetch(hashes, have=10) is None
    assert world.tier.stats().prefetches_judged_slow == 1
    prefetch = world.prefetch(hashes, tokens_per_s=10.0)
    assert prefetch is not None
    world.settle()
    assert prefetch.num_pages == 10


def test_no_more_is_read_than_the_request_has_when_storage_lacks_the_rest():
    world = make(pool=60)
    hashes = world.add_chain("abcdefghij")
    world.put_objects(hashes[:4])
    prefetch = world.prefetch(hashes, have=4)
    end_all(world, Exists)
    assert prefetch.is_done
    assert get_pages(world) == []


def test_reads_that_take_too_long_count_before_they_have_ended_and_when_they_fail():
    world = make(pool=200, get_timeout_s=50.0)
    one, two = world.add_chain("abcdefghij"), world.add_chain("klmnopqrst")
    world.put_objects(one + two)
    world.tier._operations.cost.reads.add(10 * world.page_bytes[0], 0.0, 1.0)  # 10 pages a second
    assert world.prefetch(one, tokens_per_s=10.0) is not None  # 20 tokens: 2 s
    end_all(world, Exists)
    assert world.prefetch(two[:5], tokens_per_s=5.0) is not None
    world.now += 40.0
    assert world.prefetch(two, tokens_per_s=10.0) is None
    end_all(world, Get, fail)
    probe = world.prefetch(two, tokens_per_s=10.0)
    assert probe.is_probe
    assert world.tier.stats().read_bytes_per_s < world.page_bytes[0]


def test_a_request_waits_for_a_slow_answer_only_where_pages_are_known_to_be_stored():
    world = make(pool=60)
    ours, others = world.add_chain("abcdefghij"), world.add_chain("klmnopqrst")
    world.cache(ours)
    world.settle()
    world.evict_all()
    world.put_objects(others)
    cost = world.tier._operations.cost
    cost.add_trip(0.06)
    cost.reads.add(10**9, 0.0, 1.0)
    # 20 tokens take 2 s to compute, an answer 0.06 s: 3 %.
    assert not world.prefetch(ours, tokens_per_s=10.0).is_probe
    assert world.prefetch(others, tokens_per_s=10.0).is_probe
    assert not world.prefetch(others, tokens_per_s=5.0).is_probe


def test_what_failed_is_tried_again_without_a_request_that_waits():
    world = make(pool=60, failures_to_open=1, breaker_pause_s=1.0, absent_s=0.0)
    hashes = world.add_chain("abcdefghij")
    world.put_objects(hashes)
    world.tier._operations.cost.reads.add(10**9, 0.0, 1.0)
    assert not world.prefetch(hashes, tokens_per_s=10.0).is_probe
    end_all(world, Exists, fail)
    assert world.tier.stats().breaker is BreakerState.OPEN
    later(world, 1.0)
    assert world.prefetch(hashes, tokens_per_s=10.0).is_probe
    world.settle()
    assert world.tier.stats().breaker is BreakerState.CLOSED


def test_what_is_queued_makes_reading_slower():
    page = World().page_bytes[0]
    world = make(pool=200, batch_pages=2, max_get_bytes=2 * page)
    one, two = world.add_chain("abcdefghij"), world.add_chain("klmno")
    world.put_objects(one + two)
    cost = world.tier._operations.cost
    cost.reads.add(20 * page, 0.0, 1.0)  # 20 pages a second, of 2 tokens
    cost.judge(10**12, 1, 1, 10.0, world.now)
    assert world.prefetch(two, tokens_per_s=25.0) is not None
    world.settle()
    world.evict_all()
    world.prefetch(one)
    end_all(world, Exists)
    assert world.prefetch(two, tokens_per_s=25.0) is None


# ----------------------------------------------------------------------------------------- health


def test_a_storage_that_fails_is_left_alone_and_tried_again():
    world = make(
        pool=100,
        failures_to_open=2,
        breaker_pause_s=10.0,
        breaker_max_pause_s=25.0,
        put_attempts=100,
        put_pause_s=0.0,
    )
    hashes = world.add_chain("abcd")
    world.cache(hashes)
    for _ in range(2):
        end_all(world, Put, fail)
        later(world, 0.001)
    assert not world.pending
    assert world.tier.stats().breaker is BreakerState.OPEN
    other = world.add_chain("xyz")
    assert world.prefetch(other) is None
    for pause_s in (10.0, 20.0, 25.0, 25.0):
        later(world, pause_s - 0.1)
        assert not world.pending
        later(world, 0.1)
        assert len(world.pending) == 1
        assert world.tier.stats().breaker is BreakerState.TRIAL
        world.cache(other)
        assert world.prefetch(world.add_chain("123")) is None
        assert len(world.pending) == 1  # one trial
        end_all(world, Put, fail)
    later(world, 25.0)
    end_all(world, Put)
    stats = world.tier.stats()
    assert (stats.breaker, stats.breaker_times_opened) == (BreakerState.CLOSED, 5)
    world.settle()
    assert all(map(world.has_stored, hashes))


def test_the_breaker_counts_failures_in_a_row_only():
    breaker = Breaker(2, 1.0, 8.0)
    for _ in range(3):
        breaker.failed(1, OpKind.PUT, 0.0)
        breaker.succeeded(2, OpKind.PUT)
    breaker.failed(3, OpKind.PUT, 0.0)
    breaker.told_nothing(4, 0.0)  # refused, or cancelled
    assert breaker.can_start(0.0)
    breaker.failed(5, OpKind.PUT, 0.0)
    assert not breaker.can_start(0.5)
    breaker.succeeded(6, OpKind.PUT)  # begun before
    assert not breaker.can_start(0.5)
    assert breaker.can_start(1.0)
    breaker.started(7)
    breaker.started(8)
    assert not breaker.can_start(9.0)
    breaker.told_nothing(7, 9.0)
    assert not breaker.can_start(99.0)
    breaker.told_nothing(8, 9.0)
    assert not breaker.can_start(9.5)
    assert breaker.can_start(10.0)
    breaker.started(9)
    breaker.failed(9, OpKind.PUT, 10.0)
    assert not breaker.can_start(11.9)
    breaker.started(10)
    breaker.succeeded(10, OpKind.PUT)
    assert breaker.can_start(12.0)
    for _ in range(2):
        breaker.failed(11, OpKind.PUT, 20.0)
    assert not breaker.can_start(20.9)
    assert breaker.can_start(21.0)  # the pause is short again


def test_the_breaker_counts_each_kind_of_operation_for_itself():
    breaker = Breaker(2, 1.0, 8.0)
    for _ in range(2):
        breaker.succeeded(1, OpKind.EXISTS)
        breaker.failed(2, OpKind.GET, 0.0)
    assert not breaker.can_start(0.5)
    breaker.started(3)
    breaker.succeeded(3, OpKind.EXISTS)
    assert breaker.can_start(1.0)
    breaker.failed(4, OpKind.GET, 1.0)  # as before: it answers, and does not read
    assert not breaker.can_start(2.5)
    assert breaker.can_start(3.0)


def test_a_storage_that_answers_and_does_not_read_is_left_alone():
    world = make(failures_to_open=3)
    for text in ("abc", "def", "ghi"):
        hashes = world.add_chain(text)
        world.put_objects(hashes)
        assert world.prefetch(hashes) is not None
        end_all(world, Exists)
        end_all(world, Get, fail)
    assert world.tier.stats().breaker is BreakerState.OPEN


@pytest.mark.parametrize("outcome", [Outcome.REFUSED, Outcome.MISS])
def test_refusals_and_misses_are_no_failures(outcome):
    world = make(failures_to_open=1)
    world.put_objects(world.add_chain("ab"))
    world.prefetch(world.chains[0])
    end_all(world, Exists)
    end_all(world, Get, lambda key: outcome)
    assert world.tier.stats().breaker is BreakerState.CLOSED


def test_what_was_cancelled_is_no_failure():
    world = make(failures_to_open=1)
    hashes = world.add_chain("ab")
    world.put_objects(hashes)
    prefetch = world.prefetch(hashes)
    world.tier.cancel_prefetch(prefetch, world.now)
    end_all(world, Exists, fail)
    assert world.tier.stats().breaker is BreakerState.CLOSED
    world.prefetch(hashes)
    end_all(world, Exists, fail)
    assert world.tier.stats().breaker is BreakerState.OPEN


def test_a_prefetch_stops_when_the_breaker_opens():
    page = World().page_bytes[0]
    world = make(batch_pages=1, max_get_bytes=2 * page, failures_to_open=1)
    hashes = world.add_chain("abcdef")
    world.put_objects(hashes)
    world.cache(world.add_chain("xy"))
    prefetch = world.prefetch(hashes)
    end_all(world, Exists)
    end_all(world, Put, fail)
    assert world.tier.stats().breaker is BreakerState.OPEN
    end_all(world, Get)
    assert (prefetch.num_pages, prefetch.is_done) == (2, True)


# ------------------------------------------------------------------------------- attach and detach


def test_detach_cancels_drains_and_begins_nothing():
    world = make(pool=60, batch_pages=2)
    one, two = world.add_chain("abcd"), world.add_chain("xyzw")
    world.put_objects(two)
    world.cache(one)
    prefetch = world.prefetch(two)
    asked = world.prefetch(world.add_chain("123"))
    world.end(world.ops(Exists)[0])
    under_way = set(world.pending)
    world.tier.detach(world.now)
    world.check()
    assert world.cancelled == under_way
    assert asked.is_done
    assert not prefetch.is_done
    assert world.tier.stats().queued_pages == 0
    assert not world.tier.is_drained
    for op_id in list(world.pending):
        world.end(op_id, fail, pages_in_use=True)
        world.check()
    assert prefetch.is_done
    assert not world.tier.is_drained
    emitted = len(world.effects)
    world.cache(world.add_chain("567"))
    world.tier.pages_hit(one, world.now)
    assert world.prefetch(two) is None
    later(world, 1000.0)
    assert len(world.effects) == emitted
    for op_id in list(world.pending):
        world.free(op_id)
    assert world.tier.is_drained
    assert not world.index.references(0)


def test_what_was_put_before_the_storage_was_emptied_says_nothing():
    world = make(batch_pages=2)
    hashes = world.add_chain("abcd")
    world.cache(hashes)
    world.tier.storage_cleared(world.now)
    world.settle()
    world.objects.clear()
    world.tier.pages_hit(hashes, world.now)
    world.settle()
    assert all(map(world.has_stored, hashes))


def test_what_was_seen_before_the_storage_was_emptied_says_nothing():
    world = make()
    hashes = world.add_chain("ab")
    world.put_objects(hashes)
    prefetch = world.prefetch(hashes)
    world.tier.storage_cleared(world.now)
    world.tier.cancel_prefetch(prefetch, world.now)
    end_all(world, Exists)
    world.objects.clear()
    world.cache(hashes)
    assert put_pages(world) == [(0, [0, 1])]


def test_pages_that_are_hit_stay_known():
    world = make(max_hints=4)
    for pages in ("ab", "xy"):
        world.cache(world.add_chain(pages))
        world.settle()
    one, two = world.chains
    world.tier.pages_hit(one, world.now)
    world.cache(world.add_chain("k"))
    world.settle()
    world.tier.pages_hit(one, world.now)
    assert not world.pending
    world.tier.pages_hit(two, world.now)
    assert put_pages(world) == [(0, [0])]


def test_hints_are_bounded_and_the_least_used_go_first():
    world = World(limits=StorageLimits(max_hints=3, max_absent=2))
    hashes = world.add_chain("abcde")
    hints = world.tier._hints
    for page_hash in hashes[:3]:
        hints.add_stored(page_hash, 1)
    hints.touch(hashes[:3])
    hints.add_stored(hashes[3], 1)
    assert [hints.groups(page_hash) for page_hash in hashes] == [1, 1, 0, 1, 0]
    for page_hash in (hashes[2], hashes[4], hashes[3]):
        hints.add_absent(page_hash, 0.0)
    assert [hints.first_absent(hashes, i, i + 1, 1.0) == i for i in (2, 3, 4)] == [
        False,
        True,
        True,
    ]


def test_statistics_are_plain_values():
    world = make()
    world.cache(world.add_chain("ab"))
    world.settle()
    fields = dataclasses.asdict(world.tier.stats())
    assert json.loads(json.dumps(fields)) == fields


def test_pages_read_again_before_they_were_used_were_read_in_vain():
    world = make()
    hashes = world.add_chain("ab")
    world.put_objects(hashes)
    for _ in range(2):
        world.prefetch(hashes)
        world.settle()
        world.evict_all()
    stats = world.tier.stats()
    assert (stats.pages_restored, stats.pages_wasted, stats.pages_used) == (4, 2, 0)


def test_unknown_events_are_ignored():
    world = make()
    world.tier.handle(PagesFreed(77), world.now)
    world.tier.handle(StorageResult(77, (), None, 0, 0.0), world.now)
    world.cache(world.add_chain("ab"))
    world.tier.handle(PagesFreed(world.ops(Put)[0]), world.now)  # it has not ended
    world.check()
    assert len(world.index.references(0)) == 2


def test_a_grid_of_other_groups_is_refused():
    world = make()
    with pytest.raises(ValueError, match="different layer groups"):
        StorageTier(PageIndex([LATENT], [4], PAGE_TOKENS), [4], world.grid, lambda effect: None)


# ------------------------------------------------------------------------------------- simulation

CONFIGURATIONS = [
    (FULL,),
    (LATENT,),
    (FULL, sliding(3)),
    (FULL, sliding(5)),
    (FULL, sliding(3), sliding(8, layer=3)),
    (sliding(5),),
]
PUT_FAULTS = [Outcome.FAILED, Outcome.REFUSED, Outcome.FULL]
GET_FAULTS = [Outcome.FAILED, Outcome.MISS, Outcome.CORRUPT, Outcome.REFUSED]
EXISTS_FAULTS = [Outcome.FAILED, Outcome.MISS]


class Simulation:
    """Random calls and faults, all drawn from one seed; everything is checked after each step."""

    def __init__(self, seed: int) -> None:
        self.draw = draw = random.Random(seed)
        groups = draw.choice(CONFIGURATIONS)
        self.world = World(
            groups,
            [draw.randint(6, 24) for _ in groups],
            heads=draw.choice([None, 1]),
            order=draw.choice(["lru", "slru"]),
            limits=StorageLimits(
                batch_pages=draw.randint(1, 5),
                max_put_bytes=draw.choice([1, 300, 1000, 1 << 20]),
                max_get_bytes=draw.choice([1, 300, 1000, 1 << 20]),
                max_queued_pages=draw.choice([3, 10, 1000]),
                max_queued_hashes=draw.choice([8, 1000]),
                put_attempts=draw.randint(1, 4),
                max_hints=draw.choice([4, 1000]),
                max_absent=draw.choice([2, 1000]),
                absent_s=draw.choice([0.5, 5.0]),
                max_prefetch_pages=draw.choice([4, 100]),
                prefetch_timeout_s=draw.choice([2.0, 60.0]),
                put_timeout_s=3.0,
                get_timeout_s=2.0,
                exists_timeout_s=1.0,
                grace_s=1.0,
                pool_share=draw.choice([0.3, 0.5, 1.0]),
                failures_to_open=draw.choice([2, 5, 1000]),
                probe_pages=draw.randint(1, 4),
            ),
        )
        for pages in (
            "abcdefghij",
            "abcdefgxyz",
            "abcuvw",
            "klmnopqr",
            "klmst",
            "abcdefghijKLMNOP",
        ):
            self.world.add_chain(pages)
        self.fault_rate = draw.choice([0.0, 0.05, 0.3])
        self.hang_rate = draw.choice([0.0, 0.1])
        self.can_forget = draw.random() < 0.5
        self.holding: list[list[list[int]]] = []
        """By holder, by group."""

    def run(self, steps: int) -> None:
        actions = [
            (self.store, 5),
            (self.hit, 3),
            (self.prefetch, 5),
            (self.end_some, 14),
            (self.free_some, 2),
            (self.write_late, 1),
            (self.cancel, 1),
            (self.press, 2),
            (self.let_go, 4),
            (self.wait, 4),
            (self.change_storage, 1),
            (self.clear, 0.3),
        ]
        calls, weights = zip(*actions, strict=True)
        for call in self.draw.choices(calls, weights, k=steps):
            call()
            self.world.check()
        self.end()

    def some_chain(self) -> list[bytes]:
        hashes = self.draw.choice(self.world.chains)
        return hashes[: self.draw.randint(1, len(hashes))]

    def store(self) -> None:
        hashes = self.some_chain()
        lacking = [self.draw.choice([0, 0, len(hashes) // 2]) for _ in self.world.groups]
        slots = self.world.store(hashes, lacking)
        if slots is not None:
            self.holding.append(slots)
            if self.draw.random() < 0.7:
                self.let_go()

    def hit(self) -> None:
        world, hashes = self.world, self.some_chain()
        hashes = hashes[: world.index.match(hashes)]
        world.tier.pages_hit(hashes, world.now)
        hashes = hashes[: world.index.match(hashes)]
        slots = world.index.acquire(hashes)
        for g, of_group in enumerate(slots):
            world.hold(g, of_group)
        self.holding.append(slots)

    def prefetch(self) -> None:
        self.world.prefetch(self.some_chain(), self.draw.choice([0.0, 0.0, 10.0, 1e6]))

    def end_some(self) -> None:
        running = [op_id for op_id, p in self.world.pending.items() if not p.is_hanging]
        if not running:
            return
        op_id = self.draw.choice(running)
        effect = self.world.pending[op_id].effect
        faults = {Put: PUT_FAULTS, Get: GET_FAULTS, Exists: EXISTS_FAULTS}[type(effect)]
        if self.world.is_given_up(self.world.pending[op_id]):
            faults = [Outcome.FAILED]  # nobody listens any more
        # Operations fail alone, or a key of them does.
        cancelled = 0.7 if op_id in self.world.cancelled else 0.0
        is_bad = self.draw.random() < max(self.fault_rate, cancelled)
        rate = self.draw.choice([0.3, 1.0]) if is_bad else 0.0
        self.world.end(
            op_id,
            lambda key: self.draw.choice(faults) if self.draw.random() < rate else None,
            pages_in_use=self.draw.random() < self.hang_rate,
        )

    def hanging(self) -> list[int]:
        return [op_id for op_id, p in self.world.pending.items() if p.is_hanging]

    def free_some(self) -> None:
        for op_id in self.hanging():
            if self.draw.random() < 0.5:
                self.world.free(op_id)

    def write_late(self) -> None:
        for op_id in self.hanging():
            self.world.write_late(op_id)

    def cancel(self) -> None:
        if self.world.prefetches:
            prefetch = self.draw.choice(self.world.prefetches)
            self.world.tier.cancel_prefetch(prefetch, self.world.now)

    def press(self) -> None:
        """Somebody needs pages for something else."""
        group = self.draw.randrange(len(self.world.groups))
        slots = self.world.allocate(group, self.draw.randint(1, 8))
        if slots is not None:
            others = [[] for _ in self.world.groups]
            others[group] = slots
            self.holding.append(others)

    def let_go(self) -> None:
        if self.holding:
            for g, slots in enumerate(self.holding.pop(self.draw.randrange(len(self.holding)))):
                self.world.drop(g, slots)

    def wait(self) -> None:
        self.world.now += self.draw.choice([0.01, 0.1, 1.0, 5.0])
        self.world.tier.tick(self.world.now)

    def change_storage(self) -> None:
        if self.draw.random() < 0.5:
            self.world.put_objects(self.some_chain())
        elif self.can_forget:
            self.world.forget([self.draw.choice(self.some_chain())])

    def clear(self) -> None:
        what = self.draw.randrange(3)
        if what == 0:
            self.world.index.clear()
        elif what == 1 and self.can_forget:
            self.world.objects.clear()
            self.world.tier.storage_cleared(self.world.now)
        elif what == 2 and self.draw.random() < 0.3:
            self.world.tier.detach(self.world.now)

    def end(self) -> None:
        """All go; the storage works from now on. Nothing may be left, and nothing be lost."""
        world = self.world
        while self.holding:
            self.let_go()
        for _ in range(30):
            world.settle(seconds=10.0)
        assert all(prefetch.is_done for prefetch in world.prefetches), "a prefetch without an end"
        assert world.tier.is_drained
        assert world.tier.stats().queued_pages == 0
        for g in range(len(world.groups)):
            assert not world.index.references(g), "a reference has leaked"
        if world.tier._operations.is_detached:
            return
        assert world.tier.stats().breaker is not BreakerState.TRIAL, "a trial without an end"
        for hashes in world.chains:
            # A chain needs the hints of its pages to get further than one filling of the queue.
            if not self.can_forget and world.limits.max_hints > len(hashes):
                self.check_healed(hashes[: len(world.index.resident(hashes)[0])])
            self.check_restored(hashes)

    def check_healed(self, hashes: list[bytes]) -> None:
        """What is in the host tier reaches storage, whatever went wrong before."""
        world = self.world
        for _ in range(3 * len(hashes) + 3):  # the queue may be short
            world.tier.pages_hit(hashes, world.now)
            world.settle(seconds=100.0)
        for g, slots in enumerate(world.index.resident(hashes)):
            for page_hash, slot in zip(hashes, slots, strict=True):
                assert slot < 0 or world.has_stored(page_hash, [g]), "a page is not stored"

    def check_restored(self, hashes: list[bytes]) -> None:
        """A prefetch that is alone brings all that can be had, and has room."""
        world = self.world
        world.now += 100.0  # nothing is known to be absent any more
        begin = world.index.match(hashes)
        hashes = hashes[: begin + world.limits.max_prefetch_pages]
        expected = world.longest(hashes)
        prefetch = world.prefetch(hashes)
        world.settle()
        if prefetch is None:
            assert expected == begin or world.limits.pool_share < 1
            return
        assert prefetch.is_done
        assert prefetch.num_pages == world.index.match(hashes)
        room = min(world.num_pages) * world.limits.pool_share - 2
        if len(hashes) <= room:
            assert prefetch.num_pages == expected, "less than what can be had"
        assert prefetch.num_pages <= expected


@pytest.mark.parametrize("part", a_fifth_of(range(10)))
def test_random_calls_and_faults(part):
    for seed in range(part * SEEDS // 10, (part + 1) * SEEDS // 10):
        try:
            Simulation(seed).run(steps=45)
        except Exception as error:
            raise AssertionError(f"seed {seed}: {error}") from error
