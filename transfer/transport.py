"""The transport interface: bytes between registered regions, nothing else.

A transport knows no request, no model and no cache. A process registers its page pools as regions;
its description goes to peers, which connect and then write pages, or the same part of many pages,
into them, one-sidedly. One thread owns a transport: no method is called from two threads. A write
is over when `poll` has returned its result, and only then may its source or target pages be reused;
`cancel` asks for an early end, but the result is still to be waited for. Some backends need the
target to call `poll` as well (`Capabilities.passive_target`).

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
class PagePart:
    """Which bytes of a source page go where in a target page: `count` runs of `length` bytes, run k
    from `source_offset + k * source_stride` to `target_offset + k * target_stride`."""

    source_offset: int
    target_offset: int
    length: int
    count: int = 1
    source_stride: int = 0
    target_stride: int = 0

    @property
    def page_bytes(self) -> int:
        """Bytes that move per page."""
        return self.length * self.count

    @property
    def source_end(self) -> int:
        return self.source_offset + (self.count - 1) * self.source_stride + self.length

    @property
    def target_end(self) -> int:
        return self.target_offset + (self.count - 1) * self.target_stride + self.length


@dataclasses.dataclass(frozen=True, slots=True)
class Capabilities:
    """What a backend can do, where that differs."""

    host: bool = True
    """It moves host memory."""
    device: bool = False
    """It moves GPU memory."""
    remote: bool = False
    """It reaches other hosts."""
    ordered: bool = False
    """Writes to one peer land in the order in which they were posted."""
    passive_target: bool = True
    """The target need not call `poll` for a write to end."""
    poll_s: float = 0.0005
    """How often to poll while writes are in flight."""
    write_bytes: int = 16 << 20
    """A write should not have much more, so that others get their turn; nor much less, if there is
    more to write, so that the link is full."""


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

    capabilities: Capabilities

    @abc.abstractmethod
    def register(self, regions: list[Region]) -> None:
        """Make `regions` readable and writable by transfers, once, before `describe`."""

    @abc.abstractmethod
    def describe(self) -> bytes:
        """What a peer needs for `connect`: opaque, valid while this process lives."""

    @abc.abstractmethod
    def connect(self, peer: str, description: bytes) -> None:
        """Prepare writing to `peer`. Raises PeerError when its description does not fit."""

    @abc.abstractmethod
    def disconnect(self, peer: str) -> None:
        """Forget `peer`, which has ended or will be connected no more; writes to it end with an
        error, and what it wrote here without our help lands no more. Unknown peers are ignored."""

    def reset(self, peer: str) -> None:
        """Break the connection to a peer that may live on; writes to it end with an error once no
        byte of them can follow. `connect` makes a new one."""
        self.disconnect(peer)

    @abc.abstractmethod
    def write(
        self,
        peer: str,
        region: int,
        source_pages: Int32Array,
        target_pages: Int32Array,
        part: PagePart | None = None,
    ) -> int:
        """Post source_pages[i] of our region -> target_pages[i] of the peer's; returns the write's
        id. `part` None: whole pages, which must then have one size on both sides.

        Returns quickly or copies inline, as the backend does. Raises PeerError when `peer` is not
        connected, IndexError when a page is out of range, ValueError when the arrays differ in
        length or `part` does not lie within both pages.
        """

    @abc.abstractmethod
    def cancel(self, write_id: int) -> None:
        """The result is no longer wanted: the write may end early, with an error. Unknown ids are
        ignored."""

    @abc.abstractmethod
    def poll(self) -> list[WriteResult]:
        """Drive progress, also of inbound writes, and return the writes that ended since the last
        call."""

    @abc.abstractmethod
    def close(self) -> None:
        """Release everything. Idempotent."""
