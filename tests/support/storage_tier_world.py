"""A host tier whose slots name their content, a storage that is a dict, and a storage tier between
them. Everything that the tier may do wrong to other people's pages raises AssertionError here."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from collections.abc import Callable, Sequence

from hicache.grid import ObjectGrid
from hicache.index import PageIndex
from hicache.keys import page_hashes, root_hash
from hicache.storage.storage import Outcome, StorageResult
from hicache.storage_io import (
    CancelOp,
    Effect,
    Exists,
    Get,
    PagesFreed,
    Put,
    StorageLimits,
)
from hicache.storage_prefetch import Prefetch
from hicache.storage_tier import StorageTier
from transfer.layout import LayerGroup, PageLayout

PAGE_TOKENS = 2
ROOT = root_hash("model")
FULL = LayerGroup("full", (0, 1), kv_heads=2, head_dim=4)
LATENT = LayerGroup("latent", (0, 1), kv_heads=1, head_dim=4)
GARBAGE = b"garbage"


def sliding(window: int, layer: int = 2) -> LayerGroup:
    return LayerGroup("sliding", (layer,), kv_heads=2, head_dim=4, window=window)


def chain(pages: str) -> list[bytes]:
    """Hashes of a sequence whose page i holds the character pages[i], repeated."""
    return page_hashes([ord(c) for c in pages for _ in range(PAGE_TOKENS)], PAGE_TOKENS, ROOT)


@dataclasses.dataclass
class Pending:
    """An operation that the tier has begun; `fate` is what the storage will say of each key."""

    effect: Put | Get | Exists
    started: float
    is_hanging: bool = False
    failed: list[int] = dataclasses.field(default_factory=list)
    """Of a get that hangs, the slots that it may write to."""

    @property
    def slots(self) -> tuple[int, ...]:
        return () if isinstance(self.effect, Exists) else self.effect.slots

    @property
    def group(self) -> int:
        return -1 if isinstance(self.effect, Exists) else self.effect.group


class World:
    def __init__(
        self,
        groups: Sequence[LayerGroup] = (FULL,),
        pool: int | Sequence[int] = 40,
        heads: int | None = None,
        limits: StorageLimits | None = None,
        order: str = "lru",
    ) -> None:
        self.groups = tuple(groups)
        self.num_pages = [pool] * len(groups) if isinstance(pool, int) else list(pool)
        self.index = PageIndex(groups, self.num_pages, PAGE_TOKENS, order=order)
        layouts = [PageLayout(group, PAGE_TOKENS, 1) for group in groups]
        self.page_bytes = [layout.page_bytes for layout in layouts]
        self.grid = ObjectGrid("model", layouts, heads, None)
        self.limits = limits or StorageLimits()
        self.effects: list[Effect] = []
        self.pending: dict[int, Pending] = {}
        self.cancelled: set[int] = set()
        self.tier = StorageTier(self.index, self.num_pages, self.grid, self._emit, self.limits)
        self.now = 100.0
        self.objects: dict[str, bytes] = {}
        """Key -> the hash of the page that its content is of."""
        self.ever: set[str] = set()
        """All keys that have been there at any time."""
        self.memory = [
            [[GARBAGE] * len(self.grid.cells(g)) for _ in range(count)]
            for g, count in enumerate(self.num_pages)
        ]
        self.parts = {
            (g, cell.part): number
            for g in range(len(groups))
            for number, cell in enumerate(self.grid.cells(g))
        }
        self.names: dict[str, tuple[bytes, int]] = {}
        """Key -> (page hash, group), of all chains."""
        self.parents: dict[bytes, bytes | None] = {}
        self.chains: list[list[bytes]] = []
        self.held: Counter[tuple[int, int]] = Counter()
        """(group, slot): references of others than the tier."""
        self.prefetches: list[Prefetch] = []

    def add_chain(self, pages: str) -> list[bytes]:
        hashes = chain(pages)
        self.chains.append(hashes)
        for i, page_hash in enumerate(hashes):
            self.parents[page_hash] = hashes[i - 1] if i else None
            for g in range(len(self.groups)):
                for key in self.keys(g, page_hash):
                    self.names[key] = (page_hash, g)
        return hashes

    def keys(self, group: int, page_hash: bytes) -> list[str]:
        return [
            self.grid.keys(group, cell, [page_hash])[0]
            for cell in range(len(self.grid.cells(group)))
        ]

    # ---- what others do with the host tier

    def hold(self, group: int, slots: Sequence[int]) -> None:
        self.held.update((group, slot) for slot in slots if slot >= 0)

    def drop(self, group: int, slots: Sequence[int]) -> None:
        self.index.release(group, slots)
        self.held.subtract((group, slot) for slot in slots if slot >= 0)

    def allocate(self, group: int, count: int) -> list[int] | None:
        """Somebody takes slots and writes to them."""
        slots = self.index.allocate(group, count)
        if slots is None:
            return None
        used = {(p.group, slot) for p in self.pending.values() for slot in p.slots}
        for slot in slots:
            assert (group, slot) not in used, f"slot {slot} of group {group} is reused while in use"
            self.memory[group][slot] = [GARBAGE] * len(self.memory[group][slot])
        self.hold(group, slots)
        return slots

    def store(self, hashes: Sequence[bytes], lacking: Sequence[int] = ()) -> list[list[int]] | None:
        """A replica's pages enter the host tier: those that it lacks, in sliding groups without the
        first `lacking[g]`. Returns the slots, to be dropped; None: no room."""
        resident = self.index.resident(hashes)
        first = len(resident[0])
        if any(g.kind == "sliding" for g in self.groups):
            first = min(
                (i for g in range(len(self.groups)) for i, s in enumerate(resident[g]) if s < 0),
                default=first,
            )
        slots: list[list[int]] = []
        for g, group in enumerate(self.groups):
            skipped = lacking[g] if lacking and group.kind == "sliding" else 0
            begin = max(first, skipped)
            got = self.allocate(g, max(0, len(hashes) - begin))
            if got is None:
                for other, of_group in enumerate(slots):
                    self.drop(other, of_group)
                return None
            slots.append([-1] * (len(hashes) - first - len(got)) + got)
        for g, of_group in enumerate(slots):
            for i, slot in enumerate(of_group):
                if slot >= 0:
                    self.fill(g, slot, hashes[first + i])
        parent = hashes[first - 1] if first else ROOT
        self.index.insert(parent, hashes[first:], slots, first)
        if len(self.index.resident(hashes)[0]) == len(hashes):
            self.tier.pages_stored(list(hashes), first, self.now)
        return slots

    def cache(self, hashes: Sequence[bytes], lacking: Sequence[int] = ()) -> None:
        slots = self.store(hashes, lacking)
        assert slots is not None
        for g, of_group in enumerate(slots):
            self.drop(g, of_group)

    def evict_all(self) -> None:
        for g in range(len(self.groups)):
            count = self.num_pages[g] - 1
            while count and not self.index.can_allocate(
                [count if g == other else 0 for other in range(len(self.groups))]
            ):
                count -= 1
            slots = self.allocate(g, count)
            assert slots is not None
            self.drop(g, slots)

    def fill(self, group: int, slot: int, page_hash: bytes) -> None:
        self.memory[group][slot] = [page_hash] * len(self.memory[group][slot])

    def prefetch(
        self,
        hashes: Sequence[bytes],
        tokens_per_s: float = 0.0,
        begin: int | None = None,
        have: int = 0,
    ) -> Prefetch | None:
        begin = self.index.match(hashes) if begin is None else begin
        prefetch = self.tier.prefetch(list(hashes), begin, self.now, tokens_per_s, have)
        if prefetch is not None:
            self.prefetches.append(prefetch)
        return prefetch

    # ---- the storage

    def put_objects(self, hashes: Sequence[bytes], groups: Sequence[int] | None = None) -> None:
        """Another host's keeper has stored them."""
        for page_hash in hashes:
            for g in range(len(self.groups)) if groups is None else groups:
                for key in self.keys(g, page_hash):
                    self.objects[key] = page_hash
                    self.ever.add(key)

    def forget(self, hashes: Sequence[bytes], groups: Sequence[int] | None = None) -> None:
        for page_hash in hashes:
            for g in range(len(self.groups)) if groups is None else groups:
                for key in self.keys(g, page_hash):
                    self.objects.pop(key, None)

    def has_stored(self, page_hash: bytes, groups: Sequence[int] | None = None) -> bool:
        return all(
            key in self.objects
            for g in (range(len(self.groups)) if groups is None else groups)
            for key in self.keys(g, page_hash)
        )

    def _emit(self, effect: Effect) -> None:
        self.effects.append(effect)
        if isinstance(effect, CancelOp):
            assert effect.op_id in self.pending, "an operation is cancelled that is not there"
            assert effect.op_id not in self.cancelled, "cancelled twice"
            self.cancelled.add(effect.op_id)
            return
        assert effect.op_id not in self.pending, "an id is used twice"
        assert effect.timeout_s > 0
        assert effect.keys, "an operation without keys"
        for key in effect.keys:
            assert key in self.names, "an unknown key"
        if isinstance(effect, Put):
            self._check_put(effect)
            self._check_order(effect)
        elif isinstance(effect, Get):
            assert len(set(effect.slots)) == len(effect.slots) == len(effect.keys)
            mine = {(p.group, slot) for p in self.pending.values() for slot in p.slots}
            cell = self.parts[effect.group, effect.part]
            for key, slot in zip(effect.keys, effect.slots, strict=True):
                assert not self.held[effect.group, slot] > 0, "a get into somebody's page"
                if (effect.group, slot) in mine:
                    assert cell, "a get into a page in use"
                for other in self.pending.values():
                    if isinstance(other.effect, Get) and not self.is_given_up(other):
                        assert key not in other.effect.keys, "a page is read twice at once"
            self._scribble(effect, effect.slots)
        self.pending[effect.op_id] = Pending(effect, self.now)

    def is_given_up(self, pending: Pending) -> bool:
        """The tier does not wait for it any more, only for its pages."""
        patience_s = pending.effect.timeout_s + self.limits.grace_s
        return pending.is_hanging or self.now >= pending.started + patience_s

    def _check_put(self, effect: Put) -> None:
        cell = self.parts[effect.group, effect.part]
        for key, slot in zip(effect.keys, effect.slots, strict=True):
            page_hash, group = self.names[key]
            assert group == effect.group
            assert self.memory[group][slot][cell] == page_hash, f"a put of wrong bytes, slot {slot}"

    def _check_order(self, effect: Put) -> None:
        """No page is put before those that it continues were stored, or are in the same batch."""
        full = [g for g, group in enumerate(self.groups) if group.kind != "sliding"]
        putting = {
            key
            for pending in self.pending.values()
            if isinstance(pending.effect, Put) and not pending.is_hanging
            for key in pending.effect.keys
        } | set(effect.keys)
        if effect.group not in full:
            return
        cell = self.parts[effect.group, effect.part]
        for key in effect.keys:
            parent = self.parents[self.names[key][0]]
            while parent is not None:
                needed = self.keys(effect.group, parent)[cell]
                assert needed in self.ever or needed in putting, "a hole in a stored chain"
                parent = self.parents[parent]

    def _scribble(self, effect: Get, slots: Sequence[int]) -> None:
        cell = self.parts[effect.group, effect.part]
        for slot in slots:
            self.memory[effect.group][slot][cell] = GARBAGE

    def end(
        self,
        op_id: int,
        fate: Callable[[str], Outcome | None] = lambda key: None,
        pages_in_use: bool = False,
        seconds: float | None = None,
    ) -> StorageResult:
        """The storage ends an operation. `fate` overrules what becomes of a key."""
        pending = self.pending[op_id]
        effect = pending.effect
        outcomes = []
        moved = 0
        if isinstance(effect, Put):
            self._check_put(effect)
        for i, key in enumerate(effect.keys):
            outcome = self._do(effect, i, key, fate(key))
            outcomes.append(outcome)
            if not isinstance(effect, Exists) and outcome in (Outcome.STORED, Outcome.HIT):
                moved += effect.part.object_bytes
        error = "some failed" if Outcome.FAILED in outcomes else None
        pages_in_use = pages_in_use and error is not None and not isinstance(effect, Exists)
        if pages_in_use:
            pending.is_hanging = True
            pending.failed = [
                slot
                for slot, outcome in zip(pending.slots, outcomes, strict=True)
                if outcome is Outcome.FAILED
            ]
        else:
            del self.pending[op_id]
        seconds = self.now - pending.started if seconds is None else seconds
        ended = StorageResult(op_id, tuple(outcomes), error, moved, seconds, pages_in_use)
        self.tier.handle(ended, self.now)
        return ended

    def _do(
        self, effect: Put | Get | Exists, place: int, key: str, forced: Outcome | None
    ) -> Outcome:
        if isinstance(effect, Exists):
            return forced or (Outcome.PRESENT if key in self.objects else Outcome.MISS)
        cell = self.parts[effect.group, effect.part]
        slot = effect.slots[place]
        if isinstance(effect, Put):
            if forced is not None:
                return forced
            if key in self.objects:
                return Outcome.PRESENT
            self.objects[key] = self.memory[effect.group][slot][cell]
            self.ever.add(key)
            return Outcome.STORED
        if forced is None and key in self.objects:
            self.memory[effect.group][slot][cell] = self.objects[key]
            return Outcome.HIT
        self.memory[effect.group][slot][cell] = GARBAGE
        if forced is Outcome.CORRUPT or forced is Outcome.MISS:
            self.objects.pop(key, None)
        return forced or Outcome.MISS

    def free(self, op_id: int) -> None:
        """Pages of an operation that has ended become free; until now it used them."""
        effect = self.pending[op_id].effect
        self.write_late(op_id)
        del self.pending[op_id]
        assert not isinstance(effect, Exists)
        self.tier.handle(PagesFreed(op_id), self.now)

    def write_late(self, op_id: int) -> None:
        pending = self.pending[op_id]
        if isinstance(pending.effect, Get):
            self._scribble(pending.effect, pending.failed)
        elif isinstance(pending.effect, Put):
            self._check_put(pending.effect)

    def settle(self, seconds: float = 0.0) -> None:
        """All operations end well, until there is nothing more to do; then time goes on."""
        while self.pending:
            for op_id, pending in list(self.pending.items()):
                if pending.is_hanging:
                    self.free(op_id)
                else:
                    self.end(op_id)
                self.check()
        if seconds:
            self.now += seconds
            self.tier.tick(self.now)
            self.settle()

    def ops(self, kind: type[Effect]) -> list[int]:
        return [op_id for op_id, p in self.pending.items() if isinstance(p.effect, kind)]

    # ---- checks

    def check(self) -> None:
        self.tier.check_integrity()
        self.index.check_integrity()
        for g in range(len(self.groups)):
            expected = Counter(self.tier.slots_in_use(g))
            for (group, slot), count in self.held.items():
                if group == g:
                    expected[slot] += count
            assert self.index.references(g) == +expected, f"references of group {g}"
        for hashes in self.chains:
            for g, slots in enumerate(self.index.resident(hashes)):
                for page_hash, slot in zip(hashes, slots, strict=False):
                    content = self.memory[g][slot]
                    assert slot < 0 or content.count(page_hash) == len(content), "wrong content"
        for kind, most in ((Put, self.limits.max_put_bytes), (Get, self.limits.max_get_bytes)):
            flying = [p.effect for p in self.pending.values() if isinstance(p.effect, kind)]
            batches = sum(e.part.object_bytes * len(e.keys) for e in flying)
            assert batches <= max(most, sum(self.page_bytes)), "too many bytes in flight"

    def longest(self, hashes: Sequence[bytes]) -> int:
        """The longest prefix that can be had from host tier and storage together, by trying all."""
        slots = self.index.resident(hashes)

        def is_there(g: int, page: int) -> bool:
            if page < len(slots[g]) and slots[g][page] >= 0:
                return True
            return all(key in self.objects for key in self.keys(g, hashes[page]))

        return max(
            n
            for n in range(len(hashes) + 1)
            if all(
                is_there(g, page)
                for g, group in enumerate(self.groups)
                for page in range(group.first_needed_page(n * PAGE_TOKENS, PAGE_TOKENS), n)
            )
        )


def pick_outcome(draw: random.Random, choices: Sequence[Outcome], rate: float) -> Outcome | None:
    return draw.choice(choices) if draw.random() < rate else None
