"""The transport interface: bytes between registered regions, nothing else.

A transport knows no request, no model and no cache. A process registers its page pools as regions;
its description goes to peers, which connect and then write whole pages into them, one-sidedly. One
thread owns a transport: no method is called from two threads. A write is over when `poll` has
returned its result, and only then may its source or target pages be reused; there is no way to take
a posted write back, so `cancel` does not exist: who wants out waits for the result. Some backends
need the target to call `poll` as well.

Errors are `TransportError`, with the backend's own as the cause.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import Literal

import numpy as np
import numpy.typing as npt

Int32Array = npt.NDArray[np.int32]


class TransportError(Exception):
    """Base; `scope` says what it puts in doubt."""

    scope: Literal["transfer", "peer", "configuration"] = "transfer"


class PeerError(TransportError):
    """The peer is unknown, gone, or described itself in a way that does not fit."""

    scope = "peer"


class ConfigurationError(TransportError):
    """The backend is not installed or cannot work with these settings."""

    scope = "configuration"


@dataclasses.dataclass(frozen=True, slots=True)
class Region:
    """A page pool: `num_pages` blocks of `page_bytes`, end to end from `address`."""

    address: int
    num_pages: int
    page_bytes: int
    device: int | None = None
    """CUDA device index, or None for host memory."""


@dataclasses.dataclass(frozen=True, slots=True)
class WriteResult:
    write_id: int
    error: str | None
    """None: every byte has landed at the target. Else why not, and any part of the pages may have
    been written; no further byte will be."""
    bytes_moved: int
    descriptors: int
    seconds: float
    """From `write` to the result."""


class Transport(abc.ABC):
    """One process's end. Regions are numbered in the order given; peers number theirs alike."""

    @abc.abstractmethod
    def register(self, regions: list[Region]) -> None:
        """Make `regions` readable and writable by transfers, once, before `describe`."""

    @abc.abstractmethod
    def describe(self) -> bytes:
        """What a peer needs for `connect`: opaque, valid while this process lives."""

    @abc.abstractmethod
    def connect(self, peer: str, description: bytes) -> None:
        """Prepare writing to `peer`. Raises PeerError when regions differ in number or page
        size."""

    @abc.abstractmethod
    def disconnect(self, peer: str) -> None:
        """Forget `peer`; its writes in flight end with an error. Unknown peers are ignored."""

    @abc.abstractmethod
    def write(
        self, peer: str, region: int, source_pages: Int32Array, target_pages: Int32Array
    ) -> int:
        """Post source_pages[i] of our region -> target_pages[i] of the peer's; returns the write's
        id.

        Returns quickly or copies inline, as the backend does. Raises PeerError when `peer` is not
        connected, IndexError when a page is out of range.
        """

    @abc.abstractmethod
    def poll(self) -> list[WriteResult]:
        """Drive progress, also of inbound writes, and return the writes that ended since the last
        call."""

    @abc.abstractmethod
    def close(self) -> None:
        """Release everything. Idempotent."""
