"""A node's keeper on the virtual clock of cluster_sim.py, and a storage behind it that survives it.

Host pages and stored objects hold what the simulation's device pages hold: a hash of the token
prefix for each offset. The bytes of a copy may change at any moment until it has ended: its target
is garbage meanwhile, and its source is read at the end. A storage is a dict with random delays; it
forgets, fails, refuses, hangs, and leaves garbage in pages whose read was not a hit.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Sequence

from hicache.grid import ObjectGrid
from hicache.index import PageIndex
from hicache.keeper import Keeper
from hicache.messages import FromKeeper
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
from hicache.storage_tier import StorageTier
from transfer.layout import LayerGroup, PageLayout

GARBAGE = -1
Page = list[int | None]


@dataclasses.dataclass
class StorageFaults:
    """Probabilities, by operation or by key."""

    fail: float = 0.0
    forget: float = 0.0
    hang: float = 0.0
    """It ends by its timeout, with its pages still in use."""


class SimStorage:
    """Objects by key; shared by all keepers, and kept when one dies."""

    def __init__(self, faults: StorageFaults | None = None, longest: float = 2.0) -> None:
        self.faults = faults or StorageFaults()
        self.longest = longest
        self.objects: dict[str, Page] = {}
        self.num_hits = 0


class SimKeeper:
    """One incarnation of a node's keeper, with the host tier's memory."""

    def __init__(
        self,
        name: str,
        replicas: Sequence[str],
        groups: tuple[LayerGroup, ...],
        page_tokens: int,
        pages: int,
        storage: SimStorage | None = None,
    ) -> None:
        """`replicas`: those of its node."""
        self.arguments = (name, replicas, groups, page_tokens, pages, storage)
        self.name = name
        self.replicas = replicas
        self.storage = storage
        self.alive = True
        self.peers: dict[str, object] = {}
        """The incarnations of replicas that it knows of."""
        self.outbox: list[tuple[str, FromKeeper]] = []
        counts = [pages] * len(groups)
        self.index = PageIndex(groups, counts, page_tokens)
        self.pools: list[list[Page]] = [
            [[None] * page_tokens for _ in range(pages)] for _ in counts
        ]
        self.effects: list[Effect] = []
        self.tier: StorageTier | None = None
        if storage is not None:
            grid = ObjectGrid("sim", [PageLayout(group, page_tokens, 4) for group in groups])
            limits = StorageLimits(batch_pages=3, put_pause_s=2.0, breaker_max_pause_s=8.0)
            self.tier = StorageTier(self.index, counts, grid, self.effects.append, limits)
        self.keeper = Keeper(self.index, groups, self.tier, lambda *sent: self.outbox.append(sent))
        self._running: dict[int, Put | Get | Exists] = {}

    @property
    def is_idle(self) -> bool:
        used = any(self.index.num_used(group) for group in range(len(self.pools)))
        return not used and not self.keeper.num_open and (self.tier is None or self.tier.is_drained)

    def check_integrity(self) -> None:
        self.keeper.check_integrity()
        if self.tier is not None:
            self.tier.check_integrity()
        held = list(self.keeper.held())
        for group in range(len(self.pools)):
            expected: dict[int, int] = {}
            for slots in [
                *(slots for number, slots in held if number == group),
                self.tier.slots_in_use(group) if self.tier is not None else [],
            ]:
                for slot in slots:
                    if slot >= 0:
                        expected[slot] = expected.get(slot, 0) + 1
            found = self.index.references(group)
            assert found == expected, f"{self.name}: references {found}, holders {expected}"

    # -------------------------------------------------------------------------------------- storage

    def start(
        self,
        rng: random.Random,
        after: Callable[[float, Callable[[], None]], None],
        tell: Callable[[StorageResult | PagesFreed], None],
    ) -> None:
        """`after` calls after a random time, of that many seconds at most; `tell` is told of ends,
        and may be called when this incarnation is dead."""
        self._random, self._after, self._tell = rng, after, tell

    def run_effects(self) -> None:
        """What the tier has asked the storage for."""
        effects = list(self.effects)
        self.effects.clear()
        for effect in effects:
            if isinstance(effect, CancelOp):
                self._cancel(effect.op_id)
            else:
                self._begin(effect)

    def _begin(self, effect: Put | Get | Exists) -> None:
        assert self.storage is not None
        self._running[effect.op_id] = effect
        self._spoil(effect)
        if self._random.random() < self.storage.faults.hang:
            self._after(2 * effect.timeout_s, lambda: self._hang(effect))
        else:
            self._after(self.storage.longest, lambda: self._end(effect))

    def _cancel(self, op_id: int) -> None:
        operation = self._running.get(op_id)
        if operation is not None and self._random.random() < 0.5:
            del self._running[op_id]
            outcomes = (Outcome.FAILED,) * len(operation.keys)
            self._after(
                1.0, lambda: self._tell(StorageResult(op_id, outcomes, "cancelled", 0, 1.0))
            )

    def _spoil(self, effect: Put | Get | Exists) -> None:
        """Pages that are being read have any content."""
        if isinstance(effect, Get):
            pool = self.pools[effect.group]
            for slot in effect.slots:
                pool[slot] = [GARBAGE] * len(pool[slot])

    def _hang(self, effect: Put | Get | Exists) -> None:
        if self._running.pop(effect.op_id, None) is None or not self.alive:
            return
        in_use = not isinstance(effect, Exists)
        outcomes = (Outcome.FAILED,) * len(effect.keys)
        self._tell(StorageResult(effect.op_id, outcomes, "timed out", 0, effect.timeout_s, in_use))
        if in_use:
            self._after(effect.timeout_s, lambda: self._free(effect))

    def _free(self, effect: Put | Get | Exists) -> None:
        if self.alive:
            self._spoil(effect)  # its bytes may land even now
            self._tell(PagesFreed(effect.op_id))

    def _end(self, effect: Put | Get | Exists) -> None:
        storage = self.storage
        assert storage is not None
        if self._running.pop(effect.op_id, None) is None or not self.alive:
            return
        if self._random.random() < storage.faults.fail:
            failed = self._random.choice((Outcome.FAILED, Outcome.REFUSED))
            outcomes = (failed,) * len(effect.keys)
            self._tell(StorageResult(effect.op_id, outcomes, "failed", 0, 1.0))
            return
        outcomes = tuple(self._do(storage, effect, n, key) for n, key in enumerate(effect.keys))
        moved = sum(outcome in (Outcome.STORED, Outcome.HIT) for outcome in outcomes)
        self._tell(StorageResult(effect.op_id, outcomes, None, moved, 1.0))

    def _do(
        self, storage: SimStorage, effect: Put | Get | Exists, number: int, key: str
    ) -> Outcome:
        fails = self._random.random() < storage.faults.fail
        if self._random.random() < storage.faults.forget:
            storage.objects.pop(key, None)
        found = storage.objects.get(key)
        match effect:
            case Exists():
                return Outcome.MISS if found is None else Outcome.PRESENT
            case Put():
                if fails:
                    return Outcome.FAILED
                content = self.pools[effect.group][effect.slots[number]]
                if found is not None:
                    assert found == content, "two contents under one key"
                    return Outcome.PRESENT
                assert GARBAGE not in content
                assert None not in content
                storage.objects[key] = list(content)
                return Outcome.STORED
            case Get():
                if fails:
                    return Outcome.CORRUPT
                if found is None:
                    return Outcome.MISS
                storage.num_hits += 1
                self.pools[effect.group][effect.slots[number]] = list(found)
                return Outcome.HIT
