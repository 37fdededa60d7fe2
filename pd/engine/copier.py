"""Copies of pages between a rank's device tier and the node's host tier.

Two threads, one for each direction, so that what a request waits for is not behind what is merely
kept; on a GPU each has a stream of its own, and the host pools are pinned. A host page has all
heads and layers: a rank copies its part of it, in as few runs as there can be, and of what several
ranks hold the first one writes.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import torch

from hicache.host import HostPool, HostPools
from pd.engine.pool import PagePool
from pd.events import CopyPages, PagesCopied, on_rank
from transfer.topology import ReplicaLayout
from transfer.transport import PeerError


class _Run(NamedTuple):
    """Bytes of a page, from these offsets on."""

    device: int
    host: int
    size: int


class _Share(NamedTuple):
    """What a rank has of the pages of one group."""

    host_bytes: int
    """Of a whole page."""
    device_bytes: int
    runs: dict[bool, list[_Run]]
    """By direction; True: to the host tier."""


def _share(layout: ReplicaLayout, group: int, rank: int) -> _Share:
    whole, own = layout.layouts[group], layout.rank_layout(group, rank)
    heads, places = layout.held(group, rank)
    size = whole.run_bytes
    num_layers = len(whole.group.layers)

    def runs(of: range) -> list[_Run]:
        if not places:
            return []
        if len(places) == num_layers:
            each = num_layers * size
            return [_Run((of.start - heads.start) * each, of.start * each, len(of) * each)][
                : len(of)
            ]
        return [
            _Run(
                (head - heads.start) * len(places) * size,
                (head * num_layers + places.start) * size,
                len(places) * size,
            )
            for head in of
        ]

    by_direction = {True: runs(layout.answered_heads(group, rank)), False: runs(heads)}
    return _Share(whole.page_bytes, own.page_bytes, by_direction)


class Copier:
    def __init__(self, pools: Sequence[PagePool], layout: ReplicaLayout, rank: int = 0) -> None:
        self._pools = pools
        self._topology, self._coord = layout.topology, layout.topology.coord(rank)
        self._shares = [_share(layout, group, rank) for group in range(len(pools))]
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
        host = HostPools.open(description, [share.host_bytes for share in self._shares])
        if self._streams:
            _pin(host)
        before, self._host = self._host, host
        if before is not None and self._streams:
            self._to_host.submit(_unpin, before.pools)  # after the copies that use it

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
            for group, share in enumerate(self._shares):
                own, device_pages = on_rank(copy.device_pages[group], self._topology, self._coord)
                pairs = list(
                    zip(device_pages.tolist(), copy.host_pages[group][own].tolist(), strict=True)
                )
                part = (self._pools[group], host.pools[group], pairs, share, copy.to_host)
                if stream is None:
                    _copy_on_cpu(*part)
                else:
                    _copy_on_gpu(*part, stream)
                moved += len(pairs) * sum(run.size for run in share.runs[copy.to_host])
            if stream is not None:
                stream.synchronize()
        return PagesCopied(copy.copy_id, error, moved, time.perf_counter() - begin)


def _pin(host: HostPools) -> None:
    """All pools or, with PeerError, none."""
    for number, pool in enumerate(host.pools):
        region = pool.region
        size = region.num_pages * region.page_bytes
        status = torch.cuda.cudart().cudaHostRegister(region.address, size, 0)  # type: ignore[no-untyped-call]
        if int(status):
            _unpin(host.pools[:number])
            raise PeerError(f"cudaHostRegister of {size} bytes: error {int(status)}")


def _unpin(pools: Sequence[HostPool]) -> None:
    for pool in pools:
        torch.cuda.cudart().cudaHostUnregister(pool.region.address)  # type: ignore[no-untyped-call]


def _copy_on_cpu(
    pool: PagePool, host: HostPool, pages: list[tuple[int, int]], share: _Share, to_host: bool
) -> None:
    device, there = pool.region.address, host.region.address
    for page, host_page in pages:
        for run in share.runs[to_host]:
            ours = device + page * share.device_bytes + run.device
            theirs = there + host_page * share.host_bytes + run.host
            target, source = (theirs, ours) if to_host else (ours, theirs)
            ctypes.memmove(target, source, run.size)  # lets other threads run


def _copy_on_gpu(
    pool: PagePool,
    host: HostPool,
    pages: list[tuple[int, int]],
    share: _Share,
    to_host: bool,
    stream: torch.cuda.Stream,
) -> None:
    if not share.device_bytes:
        return
    rows = torch.frombuffer(host.buffer, dtype=torch.uint8, count=host.num_pages * host.page_bytes)
    rows = rows.view(host.num_pages, host.page_bytes)
    device = pool.data.view(torch.uint8).view(len(pool.data), share.device_bytes)
    with torch.cuda.stream(stream):
        for page, host_page in pages:
            for run in share.runs[to_host]:
                theirs = rows[host_page, run.host : run.host + run.size]
                ours = device[page, run.device : run.device + run.size]
                if to_host:
                    theirs.copy_(ours, non_blocking=True)
                else:
                    ours.copy_(theirs, non_blocking=True)
