"""The keeper of a node's cache as a process: the host tier's memory, its index, and the storage
behind it, on one event loop.

It copies nothing itself: replicas copy to and from its memory, and a storage has threads of its
own. It may end at any time: replicas then do without.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import socket
import time
from collections import Counter
from collections.abc import Callable
from typing import assert_never

import msgspec
import numpy as np

from hicache.grid import ObjectGrid
from hicache.host import HostPools
from hicache.index import PageIndex
from hicache.keeper import Keeper
from hicache.messages import Close, Copied, Find, Offer, Take
from hicache.storage.backends import make_storage
from hicache.storage.storage import Outcome, Storage, StorageError
from hicache.storage_io import BreakerState, CancelOp, Effect, Exists, Get, PagesFreed, Put
from hicache.storage_tier import StorageTier
from pd import cost
from pd.messages import AnyMessage, CacheAnswer, CacheCommand, Heartbeat, Int32Array
from pd.node import Member, Node, NodeConfig
from pd.publishing import KvEvents, process_number
from pd.spec import EVERY_OTHER_TENANT, SpecError

log = logging.getLogger("pagerelay")

_POLL_S = 0.002
"""While the storage has something to do."""
_IDLE_POLL_S = 0.05
_CLEAR_S = 60.0
_SPARE_BYTES = 1 << 30
"""Of the host's memory, left to others."""
_TOP = 10
"""Prefixes and tenants in a report."""
_HASH_DIGITS = 16


class _Attached:
    """A storage and what is decided about it; used from the event loop only."""

    def __init__(
        self,
        storage: Storage,
        backend: str,
        index: PageIndex,
        num_pages: list[int],
        grid: ObjectGrid,
        wake: Callable[[], None],
    ) -> None:
        """`wake`: something was submitted, `poll` soon."""
        self._wake = wake
        self.backend = backend
        self.storage = storage
        self.tier = StorageTier(index, num_pages, grid, self._submit)
        self._operations: dict[int, int] = {}
        """The storage's numbers -> the tier's."""
        self._numbers: dict[int, int] = {}
        """The other way round."""
        self._last_error = ""
        self._lacks_room = False
        self._said = (False, False)
        """As the log has it: whether it failed again and again, and whether it is full."""

    @property
    def is_busy(self) -> bool:
        return bool(self._operations)

    def _submit(self, effect: Effect) -> None:
        storage = self.storage
        match effect:
            case Put(_, group, keys, slots, part, timeout_s):
                number = storage.submit_put(keys, group, _array(slots), timeout_s, part)
            case Get(_, group, keys, slots, part, timeout_s):
                number = storage.submit_get(keys, group, _array(slots), timeout_s, part)
            case Exists(_, keys, timeout_s):
                number = storage.submit_exists(keys, timeout_s)
            case CancelOp(op_id):
                if op_id in self._numbers:
                    storage.cancel(self._numbers[op_id])
                return
            case _:
                assert_never(effect)
        self._operations[number], self._numbers[effect.op_id] = effect.op_id, number
        self._wake()

    def poll(self, now: float) -> None:
        for result in self.storage.poll():
            self._last_error = result.error or self._last_error
            if Outcome.FULL in result.outcomes:
                self._lacks_room = True
            elif Outcome.STORED in result.outcomes:
                self._lacks_room = False
            op_id = self._operations.get(result.operation_id)
            if op_id is None:  # a clear: what was stored meanwhile may be gone
                self.tier.storage_cleared(now)
                continue
            if not result.pages_in_use:
                self._forget(result.operation_id)
            self.tier.handle(dataclasses.replace(result, operation_id=op_id), now)
        for number in self.storage.released():
            if number in self._operations:
                self.tier.handle(PagesFreed(self._forget(number)), now)
        self.tier.tick(now)

    def log_changes(self, keeper: str) -> None:
        is_left_alone = self.tier.stats().breaker is not BreakerState.CLOSED
        was_left_alone, was_full = self._said
        self._said = (is_left_alone, self._lacks_room)
        said = []
        if is_left_alone and not was_left_alone:
            said.append(f"keeps failing; it is left alone for a while ({self._last_error})")
        elif was_left_alone and not is_left_alone:
            said.append("works again")
        if self._lacks_room and not was_full:
            said.append("is full: what it has no room for is not kept")
        elif was_full and not self._lacks_room:
            said.append("has room again")
        for what in said:
            log.warning("%s: storage %s %s", keeper, self.backend, what)

    def _forget(self, number: int) -> int:
        op_id = self._operations.pop(number)
        del self._numbers[op_id]
        return op_id


class CacheNode(Node):
    def __init__(self, config: NodeConfig) -> None:
        super().__init__(config)
        self._attached: _Attached | None = None
        self._leaving: list[_Attached] = []
        """Detached, with operations under way."""
        self._first_storage: Storage | None = None
        """Made at the start; used when a replica has said what the pages are."""
        self._fingerprint = ""
        self._wake = asyncio.Event()
        self._is_changing = False
        self._events: KvEvents | None = None

    async def prepare(self) -> Member:
        await asyncio.to_thread(self._load)
        facts = {
            "pages": " + ".join(str(pool.num_pages) for pool in self._pools.pools),
            "pid": str(os.getpid()),
            "host": socket.gethostname(),
        }
        if self.spec.cache.storage is not None:
            facts["storage"] = self.spec.cache.storage.backend
        if self.spec.cache.events.publish:
            number = process_number(self.spec, self.name)
            page_tokens = self.spec.page_tokens
            self._events = KvEvents(self.spec.cache.events, number, page_tokens, "host")
            facts |= self._events.facts
        self.spawn(self._poll_loop())
        description = self._pools.describe()
        return Member(
            self.name, "cache", self.incarnation, "", transports=(description,), facts=facts
        )

    def _load(self) -> None:
        spec = self.spec
        assert spec.cache.host is not None
        groups = cost.layer_groups(cost.load_config(self.model_folder()))
        self._layouts = cost.page_layouts(groups, spec.page_tokens, spec.model.dtype)
        wanted = spec.cache.host.memory
        available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if wanted + _SPARE_BYTES > available:
            raise SpecError(
                f"cache.host.memory: found {cost.format_bytes(wanted)}, but this host has "
                f"{cost.format_bytes(available)} free, of which 1 GiB is left to others"
            )
        self._num_pages = cost.plan_host(self._layouts, wanted)
        page_bytes = [layout.page_bytes for layout in self._layouts]
        self._pools = HostPools.allocate(self._num_pages, page_bytes)
        index = PageIndex(
            groups,
            self._num_pages,
            spec.page_tokens,
            order=spec.cache.eviction,
            feed=bool(spec.cache.events.publish),
        )
        full = [g for g, group in enumerate(groups) if group.kind != "sliding"]
        most = min((self._num_pages[g] - 1 for g in full), default=0)
        self._quotas = spec.cache.host.quota_pages(most)
        try:
            quotas = {
                None if tenant == EVERY_OTHER_TENANT else tenant: pages
                for tenant, pages in self._quotas.items()
            }
            self._keeper = Keeper(index, groups, None, self.send, quotas)
        except ValueError as error:
            raise SpecError(f"cache.host.quotas: {error}") from error
        if spec.cache.storage is not None:
            storage = spec.cache.storage
            try:
                self._first_storage = self._make_storage(storage.backend, storage.options)
            except StorageError as error:
                raise SpecError(f"cache.storage: {error}") from error

    def _make_storage(self, backend: str, options: dict[str, str]) -> Storage:
        storage = make_storage(backend, self.name, options)
        try:
            storage.register([pool.region for pool in self._pools.pools])
        except Exception:
            storage.close()
            raise
        return storage

    def _attach(self, storage: Storage, backend: str) -> None:
        spec = self.spec.cache.storage
        heads, layers = (spec.heads_per_object, spec.layers_per_object) if spec else (None, None)
        grid = ObjectGrid(self._fingerprint, self._layouts, heads, layers)
        self._attached = _Attached(
            storage, backend, self._keeper.index, self._num_pages, grid, self._wake.set
        )
        self._keeper.storage = self._attached.tier

    def _detach(self) -> None:
        if self._attached is not None:
            self._keeper.detach(time.monotonic())
            self._leaving.append(self._attached)
            self._attached = None

    async def _poll_loop(self) -> None:
        while True:
            if any(each.is_busy for each in self._every_storage()):
                await asyncio.sleep(_POLL_S)
            else:
                self._wake.clear()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._wake.wait(), _IDLE_POLL_S)
            now = time.monotonic()
            for attached in self._every_storage():
                attached.poll(now)
            self._keeper.tick(now)
            self._publish()
            for attached in [each for each in self._leaving if each.tier.is_drained]:
                self._leaving.remove(attached)
                await asyncio.to_thread(attached.storage.close)

    def _every_storage(self) -> list[_Attached]:
        return [*self._leaving, *([self._attached] if self._attached is not None else [])]

    def _publish(self) -> None:
        if self._events is not None:
            self._events.publish(self._keeper.index.take_changes(), time.time())

    # ----------------------------------------------------------------------------------- operations

    async def _command(self, sender: str, message: CacheCommand) -> None:
        error = ""
        if message.action == "report":
            pass
        elif self._is_changing:
            error = "another change is under way; try again"
        else:
            self._is_changing = True
            try:
                await self._carry_out(message)
            except StorageError as reason:
                error = str(reason)
            finally:
                self._is_changing = False
        self._publish()
        report = msgspec.json.encode(self._report())
        self.send(sender, CacheAnswer(message.serial, error, report))

    async def _carry_out(self, message: CacheCommand) -> None:
        """Raises StorageError, with nothing changed."""
        match message.action:
            case "report":
                pass
            case "clear":
                self._keeper.index.clear(message.tenant or None)
            case "clear_storage":
                if self._attached is None:
                    raise StorageError("no storage is attached")
                self._attached.storage.submit_clear(_CLEAR_S)
                self._attached.tier.storage_cleared(time.monotonic())
            case "attach":
                if not self._fingerprint:
                    raise StorageError("no replica has told yet what the pages are")
                storage = await asyncio.to_thread(
                    self._make_storage, message.backend, message.options
                )
                self._detach()
                self._attach(storage, message.backend)
            case "detach":
                if self._attached is None:
                    raise StorageError("no storage is attached")
                self._detach()
            case _:
                assert_never(message.action)

    def _report(self) -> dict[str, object]:
        index = self._keeper.index
        groups = [
            {
                "kind": layout.group.kind,
                "page_bytes": layout.page_bytes,
                "free": index.num_free(g),
                "cached": index.num_cached(g),
                "used": index.num_used(g),
            }
            for g, layout in enumerate(self._layouts)
        ]
        storage: dict[str, object] | None = None
        if self._attached is not None:
            known = self._attached.storage.stats()
            storage = {
                "backend": self._attached.backend,
                **dataclasses.asdict(known),
                **dataclasses.asdict(self._attached.tier.stats()),
            }
        return {
            "name": self.name,
            "page_tokens": self.spec.page_tokens,
            "groups": groups,
            "evicted_pages": index.evictions,
            "open_exchanges": self._keeper.num_open,
            **dataclasses.asdict(self._keeper.stats),
            "storage": storage,
            "top_prefixes": [
                {
                    "hash": top.page_hash.hex()[:_HASH_DIGITS],
                    "first_page": top.first_page,
                    "pages": top.num_pages,
                    "matches": top.matches,
                    "tenant": top.tenant or "",
                }
                for top in index.top_prefixes(_TOP)
            ],
            "tenants": dict(Counter(index.tenant_pages()).most_common(_TOP)),
            "quotas": self._quotas,
        }

    # ------------------------------------------------------------------------------------- the node

    def received(self, sender: str, message: AnyMessage) -> None:
        match message:
            case Find() | Take() | Offer() | Copied() | Close():
                self._keeper.receive(sender, message, time.monotonic())
            case CacheCommand():
                self.spawn(self._command(sender, message))
            case _:
                pass

    def member_joined(self, member: Member) -> None:
        if member.role is None or member.role == "cache":
            return
        self._keeper.client_up(member.name)
        self._fingerprint = str(sorted(member.compat.items()))
        if self._first_storage is not None:
            assert self.spec.cache.storage is not None
            self._attach(self._first_storage, self.spec.cache.storage.backend)
            self._first_storage = None

    def member_left(self, member: Member, reason: str) -> None:
        self._keeper.client_down(member.name, time.monotonic())

    def heartbeat(self) -> Heartbeat:
        return Heartbeat(cache=self._figures())

    def _figures(self) -> dict[str, float]:
        index = self._keeper.index
        figures: dict[str, float] = {
            "evicted_pages": index.evictions,
            "open_exchanges": self._keeper.num_open,
            **dataclasses.asdict(self._keeper.stats),
        }
        pages = index.tenant_pages()
        for tenant, quota in self._quotas.items():  # only those that the spec names
            if tenant != EVERY_OTHER_TENANT:
                figures[f"tenant_pages:{tenant}"] = pages.get(tenant, 0)
                figures[f"tenant_quota:{tenant}"] = quota
        for g, pool in enumerate(self._pools.pools):
            figures |= {
                f"group_{g}_free_pages": index.num_free(g),
                f"group_{g}_cached_pages": index.num_cached(g),
                f"group_{g}_used_pages": index.num_used(g),
                f"group_{g}_page_bytes": pool.page_bytes,
            }
        if self._events is not None:
            figures |= self._events.counters
        if self._attached is not None:
            stats = self._attached.tier.stats()
            figures |= {
                f"storage_{key}": float(value)
                for key, value in dataclasses.asdict(stats).items()
                if isinstance(value, int | float)
            }
            figures["storage_breaker_open"] = float(stats.breaker is not BreakerState.CLOSED)
            self._attached.log_changes(self.name)
        return figures

    def check(self) -> dict[str, object]:
        self._keeper.check_integrity()
        if self._attached is not None:
            self._attached.tier.check_integrity()
        used = [self._keeper.index.num_used(g) for g in range(len(self._layouts))]
        return {"idle": not any(used) and not self._keeper.num_open, "figures": self._figures()}

    async def shut_down(self) -> None:
        # The loops still run, and what they see from now on must not be closed.
        self._detach()
        storages = [each.storage for each in self._leaving]
        self._leaving.clear()
        if self._first_storage is not None:
            storages.append(self._first_storage)
            self._first_storage = None
        events, self._events = self._events, None
        if events is not None:
            await events.close()
        for storage in storages:
            await asyncio.to_thread(storage.close)


def _array(slots: tuple[int, ...]) -> Int32Array:
    return np.asarray(slots, np.int32)
