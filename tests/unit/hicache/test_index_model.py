"""PageIndex against a model that has no runs, counters, links or queues: a million random steps in
small worlds, all of which is compared after every step.

Requests and asynchronous copies begin by taking references or room, and are inserted and released
later, in any order, or given up; between, others evict, pin, clear and change quotas. Where the
index has a choice, the model checks that what it chose was legal.
"""

import random
from collections import Counter
from dataclasses import dataclass
from itertools import product

import pytest
from sampling import a_fifth_of

from hicache import index as index_module
from hicache.index import Cleared, PageIndex, Removed, Stored
from hicache.keys import page_hashes, root_hash
from hicache.policy import order_names, prefix_cost
from transfer.layout import LayerGroup

PAGE_TOKENS = 2
ROOT = root_hash("model")
FULL = LayerGroup("full", (0,), kv_heads=1, head_dim=8)
LATENT = LayerGroup("latent", (0,), kv_heads=1, head_dim=8)


def sliding(window: int) -> LayerGroup:
    return LayerGroup("sliding", (1,), kv_heads=1, head_dim=8, window=window)


POOLS: tuple[tuple[tuple[LayerGroup, int], ...], ...] = (
    ((FULL, 9),),
    ((FULL, 10), (sliding(4), 8)),
    ((FULL, 9), (sliding(3), 8), (FULL, 10)),
    ((LATENT, 8), (sliding(4), 8)),
    ((LATENT, 8), (FULL, 10)),
    ((sliding(2), 7), (sliding(5), 8)),
)
TENANTS = (None, "x", "y")

# A sequence is a string, one character a page; its last page is named by all of it.
NAMES = ["".join(pages) for count in range(1, 6) for pages in product("ab", repeat=count)]
CHAINS = {
    name: page_hashes([ord(c) for c in name for _ in range(PAGE_TOKENS)], PAGE_TOKENS, ROOT)
    for name in NAMES
}
CHAINS[""] = []
NAME_OF = {CHAINS[name][-1]: name for name in NAMES}


@dataclass(slots=True)
class Entry:
    tenant: str | None
    slots: list[int]
    last_use: int = 0
    hits: int = 0
    floor: int = 0
    """`cost`: the most that an evicted page was worth, at the last use."""


@dataclass(slots=True, eq=False)
class Holder:
    """A request, or a copy in flight."""

    pages: str
    slots: list[list[int]]
    tenant: str | None = None
    first: int = 0
    """The next page to insert."""


@dataclass(slots=True)
class Pin:
    until: int
    pages: str
    slots: list[list[int]]


class Model:
    def __init__(
        self, groups: list[LayerGroup], num_pages: list[int], order: str, cp: int = 1
    ) -> None:
        self.cp = cp
        self.groups = groups
        self.num_pages = num_pages
        self.order = order
        self.full = [g for g, group in enumerate(groups) if group.kind != "sliding"]
        self.sliding = [g for g, group in enumerate(groups) if group.kind == "sliding"]
        self.entries: dict[str, Entry] = {}
        self.references: list[dict[int, int]] = [{} for _ in groups]
        self.lines: list[list[int]] = [[] for _ in groups]  # cached sliding slots, first out first
        self.pins: list[Pin] = []
        self.quotas: dict[str, int] = {}
        self.evicted_worth = 0
        self.now = 0

    # What there is.

    def first_needed(self, g: int, count: int) -> int:
        return self.groups[g].first_needed_page(count * PAGE_TOKENS, PAGE_TOKENS)

    def slot(self, g: int, name: str) -> int:
        return self.entries[name].slots[g] if name in self.entries else -1

    def match(self, pages: str) -> int:
        for count in range(len(pages), 0, -1):
            if all(
                self.slot(g, pages[: i + 1]) >= 0
                for g in range(len(self.groups))
                for i in range(self.first_needed(g, count), count)
            ):
                return count
        return 0

    def resident(self, pages: str, first: int) -> list[list[int]]:
        known = [end for end in range(1, len(pages) + 1) if pages[:end] in self.entries]
        ends = range(first + 1, max(known, default=0) + 1)
        return [[self.slot(g, pages[:end]) for end in ends] for g in range(len(self.groups))]

    def is_kept(self, g: int, slot: int) -> bool:
        return any(slot in pin.slots[g] for pin in self.pins)

    def staying(self) -> set[str]:
        """Entries that may not go: used or pinned, or continued by such."""
        last = [pin.pages for pin in self.pins]
        for name, entry in self.entries.items():
            if any(slot in self.references[g] for g, slot in enumerate(entry.slots)):
                last.append(name)
        return {name[:end] for name in last for end in range(1, len(name) + 1)}

    def leaves(self) -> set[str]:
        return self.entries.keys() - {name[:-1] for name in self.entries}

    def tenant_pages(self) -> dict[str, int]:
        tenants = [entry.tenant for entry in self.entries.values() if entry.tenant is not None]
        return dict(Counter(tenants)) if self.full else {}

    def excess(self) -> dict[str, int]:
        """Of tenants over their quotas."""
        pages = self.tenant_pages()
        over = {tenant: pages.get(tenant, 0) - quota for tenant, quota in self.quotas.items()}
        return {tenant: count for tenant, count in over.items() if count > 0}

    def stripe(self, name: str) -> int:
        return (len(name) - 1) % self.cp

    def cached(self, g: int) -> set[int]:
        slots = {entry.slots[g] for entry in self.entries.values()}
        return slots - self.references[g].keys() - {-1}

    def num_free(self, g: int, stripe: int) -> int:
        taken = self.cached(g) | self.references[g].keys()
        num_slots = self.num_pages[g] // self.cp - 1
        return num_slots - sum(slot % self.cp == stripe for slot in taken)

    def num_available(self, g: int, stripe: int) -> int:
        if g in self.sliding:
            evictable = sum(slot % self.cp == stripe for slot in self.lines[g])
        else:
            may_go = self.entries.keys() - self.staying()
            evictable = sum(self.stripe(name) == stripe for name in may_go)
        return self.num_free(g, stripe) + evictable

    def has_room(self, g: int, pages: list[int]) -> bool:
        """For these pages of sequences."""
        wanted = Counter(page % self.cp for page in pages)
        return all(count <= self.num_available(g, stripe) for stripe, count in wanted.items())

    # What calls do.

    def retain(self, g: int, slots: list[int]) -> None:
        for slot in slots:
            if slot >= 0:
                self.references[g][slot] = self.references[g].get(slot, 0) + 1
                if slot in self.lines[g]:
                    self.lines[g].remove(slot)

    def release(self, g: int, slots: list[int], cold: bool = False) -> None:
        self.now += 1
        for slot in slots:
            if slot < 0:
                continue
            self.references[g][slot] -= 1
            if self.references[g][slot]:
                continue
            del self.references[g][slot]
            for entry in self.entries.values():
                if entry.slots[g] != slot:
                    continue
                if g in self.full:
                    entry.last_use, entry.floor = self.now, self.evicted_worth
                elif not self.is_kept(g, slot):
                    self.lines[g].insert(0 if cold else len(self.lines[g]), slot)

    def acquire(self, pages: str, slots: list[list[int]]) -> None:
        for g, group_slots in enumerate(slots):
            self.retain(g, group_slots)
        for end in range(1, len(pages) + 1):
            if pages[:end] in self.entries:
                self.entries[pages[:end]].hits += 1

    def insert(self, pages: str, slots: list[list[int]], first: int, tenant: str | None) -> None:
        """slots[g][i] is of page i, also before `first`."""
        for i in range(first, len(pages)):
            name = pages[: i + 1]
            given = [group_slots[i] for group_slots in slots]
            entry = self.entries.get(name)
            if entry is not None:
                for g in self.sliding:
                    if entry.slots[g] < 0:
                        entry.slots[g] = given[g]
            elif self.full and (
                (i and pages[:i] not in self.entries) or min(given[g] for g in self.full) < 0
            ):
                return
            elif max(given) >= 0:
                self.entries[name] = Entry(tenant, given)

    def pin(self, pages: str, until: int) -> None:
        slots: list[list[int]] = [[] for _ in self.groups]
        for g in self.sliding:
            ends = range(self.first_needed(g, len(pages)) + 1, len(pages) + 1)
            slots[g] = [self.slot(g, pages[:end]) for end in ends]
            self.lines[g] = [slot for slot in self.lines[g] if slot not in slots[g]]
        self.pins.append(Pin(until, pages if self.full else "", slots))

    def expire(self, now: int) -> int:
        ended = sorted((pin for pin in self.pins if pin.until <= now), key=lambda pin: pin.until)
        for pin in ended:
            self.pins.remove(pin)
            for g, slots in enumerate(pin.slots):
                free = [slot for slot in slots if slot not in self.references[g]]
                self.lines[g] += [slot for slot in free if not self.is_kept(g, slot)]
        return len(ended)

    def clear(self) -> None:
        self.entries.clear()
        self.pins.clear()
        for line in self.lines:
            line.clear()

    def evict_pages(self, g: int, stripe: int, count: int) -> None:
        for slot in [slot for slot in self.lines[g] if slot % self.cp == stripe][:count]:
            for name, entry in list(self.entries.items()):
                if entry.slots[g] == slot:
                    entry.slots[g] = -1
                    if max(entry.slots) < 0:
                        del self.entries[name]
            self.lines[g].remove(slot)

    def remove(self, gone: set[str]) -> None:
        for name in gone:
            for g, slot in enumerate(self.entries.pop(name).slots):
                if slot in self.lines[g]:
                    self.lines[g].remove(slot)

    # What was legal.

    def worth(self, name: str) -> tuple[int, ...]:
        """The smallest goes first; all are equal where an order's choice is not followed here, but
        in test_policy.py."""
        entry = self.entries[name]
        match self.order:
            case "lru":
                return (entry.last_use,)
            case "lfu":
                return (entry.hits, entry.last_use)
            case "cost":
                depth = len(name)
                cost = prefix_cost(depth, PAGE_TOKENS) - prefix_cost(depth - 1, PAGE_TOKENS)
                return (entry.floor + cost,)
        return ()

    def check_gone(self, gone: set[str]) -> None:
        assert not gone & self.staying(), "evicted what is used or pinned, or continued by such"
        assert not {name[:-1] for name in self.entries.keys() - gone} & gone, (
            "a page lost its parent"
        )

    def evict(self, gone: set[str], within: dict[str, set[str]]) -> None:
        """Remove what the index chose. `within`: for each that went, the leaves among which it had
        to be the best."""
        self.check_gone(gone)
        for name in gone:
            for other in within[name] - gone:
                assert self.worth(name) <= self.worth(other), f"{name} went before {other}"
        if self.order == "cost" and gone:
            self.evicted_worth = max(self.evicted_worth, *(self.worth(name)[0] for name in gone))
        self.remove(gone)

    def evict_for_room(self, gone: set[str]) -> None:
        excess = self.excess()
        leaves = self.leaves() - self.staying()
        owned = {
            tenant: {n for n in leaves if self.entries[n].tenant == tenant} for tenant in excess
        }
        tenants = Counter(self.entries[name].tenant for name in gone)
        if any(count > excess.get(str(tenant), 0) for tenant, count in tenants.items()):
            for tenant, count in excess.items():
                still_over = tenants[tenant] < count
                assert not (still_over and owned[tenant] - gone), (
                    f"{tenant} kept more than its quota"
                )
        self.evict(gone, {name: owned.get(str(self.entries[name].tenant), leaves) for name in gone})

    def evict_for_quota(self, gone: set[str], tenant: str | None) -> None:
        excess = self.excess().get(str(tenant), 0)
        assert len(gone) <= excess, "more went than the quota asks for"
        assert all(self.entries[name].tenant == tenant for name in gone), "others had to go"
        leaves = {n for n in self.leaves() - self.staying() if self.entries[n].tenant == tenant}
        self.evict(gone, dict.fromkeys(gone, leaves))
        if len(gone) < excess:
            left = {n for n in self.leaves() - self.staying() if self.entries[n].tenant == tenant}
            assert not left, f"{tenant} keeps more than its quota"

    def clear_tenant(self, gone: set[str], tenant: str) -> None:
        staying = self.staying()
        expected: set[str] = set()
        for name in sorted(self.entries, key=len, reverse=True):
            children = {name + "a", name + "b"} & self.entries.keys()
            if self.entries[name].tenant == tenant and name not in staying and children <= expected:
                expected.add(name)
        assert gone == expected
        self.remove(gone)


class World:
    """An index, its model, and those who use both."""

    def __init__(self, seed: int) -> None:
        self.rng = rng = random.Random(seed)
        pools = POOLS[seed % len(POOLS)]
        orders = order_names()
        order = orders[seed // len(POOLS) % len(orders)]
        index_module._MAX_RUN_PAGES = rng.choice((1, 2, 3, 256))
        self.cp = cp = rng.choice((1, 1, 2, 3))
        groups = [group for group, _ in pools]
        # With several stripes, about as many pages in all.
        num_pages = [cp * (1 + (count - 1 + rng.randrange(cp)) // cp) for _, count in pools]
        self.groups = range(len(groups))
        self.index = PageIndex(groups, num_pages, PAGE_TOKENS, order=order, feed=True, cp=cp)
        self.model = Model(groups, num_pages, order, cp)
        self.holders: list[Holder] = []
        self.reader: set[bytes] = set()
        self.time = 0
        self.seen: Counter[str] = Counter()
        self.steps = [
            *(self.start, self.start, self.begin_load, self.begin_copy, self.share),
            *(self.publish, self.publish, self.publish, self.insert, self.serve, self.serve),
            *(self.finish, self.finish, self.finish, self.finish_some, self.leave_window),
            *(self.squeeze, self.touch, self.pin, self.wait, self.wait),
        ]
        self.rare_steps = [self.clear, self.clear_tenant, self.set_quota, self.set_quota]
        if not self.model.full:
            self.rare_steps = [self.clear]
        elif rng.random() < 0.7:
            self.set_quota()

    def step(self) -> None:
        steps = self.rare_steps if self.rng.random() < 0.05 else self.steps
        self.rng.choice(steps)()
        self.check()

    def check(self) -> None:
        index, model, rng = self.index, self.model, self.rng
        index.check_integrity()
        assert index._runs.keys() == {CHAINS[name][-1] for name in model.entries}
        for g in self.groups:
            assert index.references(g) == model.references[g]
            used, cached = len(model.references[g]), len(model.cached(g))
            assert (index.num_used(g), index.num_cached(g)) == (used, cached)
            assert index.num_free(g) == model.num_pages[g] - self.cp - used - cached
        pages = rng.choice(NAMES)
        first = rng.randrange(len(pages) + 1)
        assert index.match(CHAINS[pages]) == model.match(pages)
        assert index.resident(CHAINS[pages], first) == model.resident(pages, first)
        assert index.tenant_pages() == model.tenant_pages()
        for change in index.take_changes():
            match change:
                case Stored():
                    assert not self.reader.intersection(change.hashes)
                    name = NAME_OF[change.hashes[-1]]
                    end = change.first_page + len(change.hashes)
                    assert CHAINS[name] == CHAINS[name][: change.first_page] + list(change.hashes)
                    assert change.parent == [ROOT, *CHAINS[name]][change.first_page]
                    assert len(name) == end
                    self.reader.update(change.hashes)
                case Removed():
                    assert self.reader.issuperset(change.hashes)
                    self.reader.difference_update(change.hashes)
                case Cleared():
                    self.reader.clear()
        assert self.reader == index._runs.keys()

    def gone(self) -> set[str]:
        return {name for name in self.model.entries if CHAINS[name][-1] not in self.index._runs}

    def allocate(self, g: int, count: int, first: int) -> list[int] | None:
        index, model, cp = self.index, self.model, self.cp
        pages = list(range(first, first + count))
        expected = model.has_room(g, pages)
        wanted = [sum(page % cp == stripe for page in pages) for stripe in range(cp)]
        missing = [need - model.num_free(g, stripe) for stripe, need in enumerate(wanted)]
        slots = index.allocate(g, count, first)
        assert (slots is not None) == expected
        if slots is None:
            self.seen["no room"] += 1
            self.seen["no room in a stripe"] += count <= sum(
                model.num_available(g, stripe) for stripe in range(cp)
            )
            assert not self.gone()
            return None
        assert len(set(slots)) == count
        assert [slot % cp for slot in slots] == [page % cp for page in pages]
        assert min(slots, default=cp) >= cp
        if max(missing) > 0 and g in model.sliding:
            for stripe, num_pages in enumerate(missing):
                self.seen["tombstones"] += max(0, num_pages)
                model.evict_pages(g, stripe, max(0, num_pages))
        elif max(missing) > 0:
            gone = self.gone()
            self.seen["evicted"] += len(gone)
            by_stripe = Counter(map(model.stripe, gone))
            left = [by_stripe[stripe] - num_pages for stripe, num_pages in enumerate(missing)]
            assert min(left) >= 0
            # The last one that went was needed, and went before what comes before it.
            last = {name for name in gone if name[:-1] not in gone}
            assert any(not left[model.stripe(name)] for name in last), "more went than was needed"
            assert cp > 1 or len(gone) == missing[0]
            model.evict_for_room(gone)
        else:
            assert not self.gone()
        assert not model.references[g].keys() & set(slots)
        assert not any(entry.slots[g] in slots for entry in model.entries.values())
        model.retain(g, slots)
        return slots

    def release(self, g: int, slots: list[int], cold: bool = False) -> None:
        self.index.release(g, slots, cold)
        self.model.release(g, slots, cold)

    def match(self) -> tuple[str, int]:
        pages = self.rng.choice(NAMES)
        return pages, self.index.match(CHAINS[pages])

    def acquire(self, pages: str) -> list[list[int]]:
        slots = self.index.acquire(CHAINS[pages])
        for g in self.groups:
            first = self.model.first_needed(g, len(pages))
            ends = range(first + 1, len(pages) + 1)
            assert slots[g] == [-1] * first + [self.model.slot(g, pages[:end]) for end in ends]
        self.model.acquire(pages, slots)
        return slots

    def hold(self, holder: Holder) -> Holder:
        self.holders.append(holder)
        if len(self.holders) > 3:
            self.finish()
        return holder

    def any_holder(self) -> Holder:
        return self.rng.choice(self.holders) if self.holders else self.start()

    # --------------------------------------------------------------------------------------- steps

    def start(self) -> Holder:
        """A request that reuses what it can, and computes the rest."""
        pages, hit = self.match()
        slots = self.acquire(pages[:hit])
        counts = [len(pages) - hit] * len(self.groups)
        firsts = [hit] * len(self.groups)
        possible = self.index.can_allocate(counts, firsts)
        own = list(range(hit, len(pages)))
        assert possible == all(self.model.has_room(g, own) for g in self.groups)
        spare = [self.rng.randrange(7) for _ in range(self.rng.randrange(4))]
        assert self.index.can_allocate(counts, firsts, spare) == all(
            self.model.has_room(g, own + spare) for g in self.groups
        )
        for g in self.groups:
            fresh = self.allocate(g, counts[g], hit) if possible else None
            assert (fresh is not None) == possible
            slots[g] += fresh or [-1] * counts[g]
        return self.hold(Holder(pages, slots, self.rng.choice(TENANTS)))

    def begin_load(self) -> None:
        """A copy from another tier: room for pages after those that are here, which nobody holds
        meanwhile."""
        pages = self.rng.choice(NAMES)
        first = len(self.index.resident(CHAINS[pages])[0])
        slots = [self.allocate(g, len(pages) - first, first) for g in self.groups]
        for g, fresh in enumerate(slots):
            if fresh is not None and None in slots:
                self.release(g, fresh)
        if None not in slots:
            given = [[-1] * first + (fresh or []) for fresh in slots]
            self.hold(Holder(pages, given, self.rng.choice(TENANTS), first))

    def begin_copy(self) -> None:
        """A copy to another tier: references on what is here of some pages."""
        pages = self.rng.choice(NAMES)
        slots = self.index.resident(CHAINS[pages], self.rng.randrange(len(pages)))
        for g in self.groups:
            self.index.retain(g, slots[g])
            self.model.retain(g, slots[g])
        self.hold(Holder("", slots))

    def share(self) -> None:
        holder = self.any_holder()
        for g in self.groups:
            self.index.retain(g, holder.slots[g])
            self.model.retain(g, holder.slots[g])
        copies = [list(slots) for slots in holder.slots]
        self.hold(Holder(holder.pages, copies, holder.tenant, holder.first))

    def publish(self) -> None:
        """The next pages are complete."""
        holder = self.any_holder()
        count = self.rng.randint(1, 3)
        self.insert_pages(holder, holder.first, count)
        holder.first += count

    def insert(self) -> None:
        self.insert_pages(self.any_holder(), self.rng.randrange(3), self.rng.randint(1, 5))

    def insert_pages(self, holder: Holder, first: int, count: int) -> None:
        pages = holder.pages[: first + count]
        if first >= len(pages):
            return
        hashes = CHAINS[pages]
        slots = [group_slots[first : len(pages)] for group_slots in holder.slots]
        parent = hashes[first - 1] if first else ROOT
        before = len(self.model.entries)
        self.index.insert(parent, hashes[first:], slots, first, holder.tenant)
        self.model.insert(pages, holder.slots, first, holder.tenant)
        num_new = len(self.model.entries) - before
        self.seen["inserted"] += num_new
        self.seen["orphans"] += first > 0 and pages[:first] not in self.model.entries
        gone = self.gone()
        self.seen["over quota"] += len(gone)
        assert num_new or not gone
        if num_new:
            self.model.evict_for_quota(gone, holder.tenant)

    def leave_window(self) -> None:
        holder = self.any_holder()
        count = self.rng.randint(1, 3)
        for g in self.model.sliding:
            gone = holder.slots[g][:count]
            self.release(g, gone, cold=True)
            holder.slots[g][: len(gone)] = [-1] * len(gone)

    def finish_some(self) -> None:
        """Give up some or all pages in one group."""
        holder = self.any_holder()
        g = self.rng.choice(self.groups)
        begin = self.rng.randrange(3)
        end = self.rng.choice((begin + 1, len(holder.slots[g])))
        gone = holder.slots[g][begin:end]
        self.release(g, gone)
        holder.slots[g][begin:end] = [-1] * len(gone)

    def finish(self) -> None:
        if self.holders:
            holder = self.holders.pop(self.rng.randrange(len(self.holders)))
            for g in self.groups:
                self.release(g, holder.slots[g])

    def serve(self) -> None:
        """A whole request at once: what fills the cache fastest."""
        holder = self.start()
        if holder in self.holders:
            self.insert_pages(holder, 0, len(holder.pages))
            self.holders.remove(holder)
            for g in self.groups:
                self.release(g, holder.slots[g])

    def squeeze(self) -> None:
        """Evict to make room, then give the room back."""
        g = self.rng.choice(self.groups)
        slots = self.allocate(g, self.rng.randint(1, 6), self.rng.randrange(self.cp))
        if slots is not None:
            self.release(g, slots)

    def touch(self) -> None:
        pages, hit = self.match()
        for g, slots in enumerate(self.acquire(pages[:hit])):
            self.release(g, slots)

    def pin(self) -> None:
        pages, hit = self.match()
        until = self.time + self.rng.randint(1, 4)
        self.index.pin(CHAINS[pages[:hit]], until)
        self.model.pin(pages[:hit], until)

    def wait(self) -> None:
        self.time += self.rng.randint(1, 4)
        assert self.index.expire(self.time) == self.model.expire(self.time)

    def clear(self) -> None:
        self.index.clear()
        self.model.clear()

    def clear_tenant(self) -> None:
        tenant = self.rng.choice(("x", "y", "nobody"))
        self.index.clear(tenant)
        gone = self.gone()
        self.seen["cleared"] += len(gone)
        self.model.clear_tenant(gone, tenant)

    def set_quota(self) -> None:
        tenant = self.rng.choice(("x", "y"))
        pages = self.rng.choice((None, 0, 1, 2, 4))
        self.index.set_quota(tenant, pages)
        self.model.quotas.pop(tenant, None)
        if pages is not None:
            self.model.quotas[tenant] = pages


STEPS = 250
WORLDS = 200
"""In each of the tests."""


@pytest.fixture
def run_length():
    usual = index_module._MAX_RUN_PAGES
    yield
    index_module._MAX_RUN_PAGES = usual


@pytest.mark.parametrize("part", a_fifth_of(range(20)))
def test_the_index_equals_its_model(part: int, run_length: None) -> None:
    seen: Counter[str] = Counter()
    for seed in range(part * WORLDS, (part + 1) * WORLDS):
        world = World(seed)
        for step in range(STEPS):
            try:
                world.step()
            except Exception as error:
                raise AssertionError(f"world {seed}, step {step}: {error!r}") from error
        seen += world.seen
    for what in (
        "evicted",
        "tombstones",
        "inserted",
        "orphans",
        "over quota",
        "cleared",
        "no room",
        "no room in a stripe",
    ):
        assert seen[what] > WORLDS // 2, seen
