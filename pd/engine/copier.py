"""Copies of whole pages between the device tier and the node's host tier.

Two threads, one for each direction, so that what a request waits for is not behind what is merely
kept; on a GPU each has a stream of its own, and the host pools are pinned. A copy is whole pages at
once, in the layout that both tiers share.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from hicache.host import HostPool, HostPools
from pd.engine.pool import PagePool
from pd.events import CopyPages, PagesCopied
from transfer.transport import PeerError


class Copier:
    def __init__(self, pools: Sequence[PagePool]) -> None:
        self._pools = pools
        self._host: HostPools | None = None
        self._streams = {
            to_host: torch.cuda.Stream(pool.device)  # type: ignore[no-untyped-call]
            for pool in pools[:1]
            if pool.device.type == "cuda"
            for to_host in (True, False)
        }
        self._to_host = ThreadPoolExecutor(1, "copies out")
        self._to_device = ThreadPoolExecutor(1, "copies in")

    def open(self, description: bytes) -> Future[None]:
        """Map the keeper's pools, in place of those before; fails with PeerError."""
        return self._to_device.submit(self._open, description)

    def after_open(self) -> Future[None]:
        """Done when all `open` calls so far are."""
        return self._to_device.submit(lambda: None)

    def submit(self, copy: CopyPages) -> Future[PagesCopied]:
        """The result says whether it succeeded; only a defect raises."""
        executor = self._to_host if copy.to_host else self._to_device
        # The pools of now: a copy that waits must not go to those of the next keeper.
        return executor.submit(self._copy, copy, self._host)

    def close(self) -> None:
        for executor in (self._to_host, self._to_device):
            executor.shutdown(wait=False, cancel_futures=True)

    # ---------------------------------------------------------------------------------- the threads

    def _open(self, description: bytes) -> None:
        sizes = [pool.layout.page_bytes for pool in self._pools]
        host = HostPools.open(description, sizes)
        if self._streams:
            for pool in host.pools:
                region = pool.region
                size = region.num_pages * region.page_bytes
                status = torch.cuda.cudart().cudaHostRegister(region.address, size, 0)  # type: ignore[no-untyped-call]
                if int(status):
                    raise PeerError(f"cudaHostRegister of {size} bytes: error {int(status)}")
        before, self._host = self._host, host
        if before is not None and self._streams:
            self._to_host.submit(_unpin, before)  # after the copies that use it

    def _copy(self, copy: CopyPages, host: HostPools | None) -> PagesCopied:
        begin = time.perf_counter()
        error, moved = None, 0
        if host is None:
            error = "the host tier is not mapped"
        elif any(
            pages.size and (pages.min() < 0 or pages.max() >= pool.num_pages)
            for pages, pool in zip(copy.host_pages, host.pools, strict=True)
        ):
            error = "the keeper named a page that the host tier does not have"
        else:
            stream = self._streams.get(copy.to_host)
            parts = zip(self._pools, host.pools, copy.device_pages, copy.host_pages, strict=True)
            for pool, host_pool, device_pages, host_pages in parts:
                pairs = list(zip(device_pages.tolist(), host_pages.tolist(), strict=True))
                if stream is None:
                    _copy_on_cpu(pool, host_pool, pairs, copy.to_host)
                else:
                    _copy_on_gpu(pool, host_pool, pairs, copy.to_host, stream)
                moved += len(pairs) * host_pool.page_bytes
            if stream is not None:
                stream.synchronize()
        return PagesCopied(copy.copy_id, error, moved, time.perf_counter() - begin)


def _unpin(host: HostPools) -> None:
    for pool in host.pools:
        torch.cuda.cudart().cudaHostUnregister(pool.region.address)  # type: ignore[no-untyped-call]


def _copy_on_cpu(
    pool: PagePool, host: HostPool, pages: list[tuple[int, int]], to_host: bool
) -> None:
    size = host.page_bytes
    device, there = pool.region.address, host.region.address
    for page, host_page in pages:
        ours, theirs = device + page * size, there + host_page * size
        target, source = (theirs, ours) if to_host else (ours, theirs)
        ctypes.memmove(target, source, size)  # lets other threads run


def _copy_on_gpu(
    pool: PagePool,
    host: HostPool,
    pages: list[tuple[int, int]],
    to_host: bool,
    stream: torch.cuda.Stream,
) -> None:
    rows = torch.frombuffer(host.buffer, dtype=torch.uint8, count=host.num_pages * host.page_bytes)
    rows = rows.view(host.num_pages, host.page_bytes)
    device = pool.data.view(torch.uint8).view(len(pool.data), host.page_bytes)
    with torch.cuda.stream(stream):
        for page, host_page in pages:
            if to_host:
                rows[host_page].copy_(device[page], non_blocking=True)
            else:
                device[page].copy_(rows[host_page], non_blocking=True)
