"""Copies between device and host tier: into the pools that were there when they were asked for."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from hicache.host import HostPools
from pd.engine.copier import Copier
from pd.engine.pool import PagePool
from pd.events import CopyPages
from transfer.layout import LayerGroup, PageLayout
from transfer.topology import ReplicaLayout, Topology
from transfer.transport import PeerError

LAYOUT = PageLayout(LayerGroup("full", (0, 1), 2, 4), 4, 4)


def make_pool() -> PagePool:
    pool = PagePool(LAYOUT, 5, torch.float32, torch.device("cpu"))
    pool.data.copy_(torch.arange(pool.data.numel()).view(pool.data.shape))
    return pool


def make_host() -> HostPools:
    return HostPools.allocate([7], [LAYOUT.page_bytes])


def page_of(host: HostPools, page: int) -> bytes:
    size = LAYOUT.page_bytes
    return bytes(host.pools[0].buffer[page * size : (page + 1) * size])


def copy(copy_id: int, device: list[int], host: list[int], to_host: bool) -> CopyPages:
    return CopyPages(copy_id, (np.array(device, np.int32),), (np.array(host, np.int32),), to_host)


def test_pages_go_there_and_back() -> None:
    pool, host = make_pool(), make_host()
    before = pool.data.clone()
    copier = Copier([pool], ReplicaLayout(Topology(), (LAYOUT,)))
    copier.open(host.describe()).result(10)
    done = copier.submit(copy(1, [1, 3], [6, 2], to_host=True)).result(10)
    assert (done.copy_id, done.error, done.bytes_moved) == (1, None, 2 * LAYOUT.page_bytes)
    assert page_of(host, 6) == before[1].numpy().tobytes()
    assert page_of(host, 2) == before[3].numpy().tobytes()
    assert not any(any(page_of(host, page)) for page in (0, 1, 3, 4, 5))
    assert copier.submit(copy(2, [4], [6], to_host=False)).result(10).error is None
    assert torch.equal(pool.data[4], before[1])
    assert torch.equal(pool.data[:4], before[:4])
    copier.close()


def test_a_copy_that_waits_does_not_go_to_the_next_keeper() -> None:
    pool, old, new = make_pool(), make_host(), make_host()
    copier = Copier([pool], ReplicaLayout(Topology(), (LAYOUT,)))
    copier.open(old.describe()).result(10)
    gate = threading.Event()
    copier._to_host.submit(gate.wait, 10)
    waiting = copier.submit(copy(1, [1], [5], to_host=True))
    copier.open(new.describe()).result(10)
    gate.set()
    assert waiting.result(10).error is None
    assert page_of(old, 5) == pool.data[1].numpy().tobytes()
    assert not any(page_of(new, 5))
    copier.close()


def test_what_cannot_be_is_refused() -> None:
    pool, host = make_pool(), make_host()
    copier = Copier([pool], ReplicaLayout(Topology(), (LAYOUT,)))
    assert "not mapped" in str(copier.submit(copy(1, [1], [1], to_host=True)).result(10).error)
    copier.open(host.describe()).result(10)
    for page in (-1, 7):
        error = copier.submit(copy(2, [1], [page], to_host=False)).result(10).error
        assert "does not have" in str(error)
    other = HostPools.allocate([7], [LAYOUT.page_bytes + 8])
    assert isinstance(copier.open(other.describe()).exception(10), PeerError)
    assert isinstance(copier.open(b"nonsense").exception(10), PeerError)
    copier.close()


def test_of_pools_that_cannot_all_be_pinned_none_stays_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for CUDA, which pins one pool and no more."""
    pinned: list[int] = []

    class Cudart:
        def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
            if pinned:
                return 2
            pinned.append(address)
            return 0

        def cudaHostUnregister(self, address: int) -> int:
            pinned.remove(address)
            return 0

    monkeypatch.setattr(torch.cuda, "cudart", Cudart)
    other = PageLayout(LayerGroup("full", (2, 3), 2, 4), 4, 4)
    copier = Copier([make_pool(), make_pool()], ReplicaLayout(Topology(), (LAYOUT, other)))
    copier._streams = {True: None}  # type: ignore[dict-item]
    host = HostPools.allocate([7, 7], [LAYOUT.page_bytes] * 2)
    error = copier.open(host.describe()).exception(10)
    assert isinstance(error, PeerError)
    assert "error 2" in str(error)
    assert pinned == []
    copier.close()
