"""What every backend does alike: describe its end, check a peer's description, check pages, count
runs."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np

from transfer.transport import Int32Array, PeerError, Region

DESCRIPTION_VERSION = 1


class Description(msgspec.Struct, frozen=True):
    """One process's end, as its peers need it."""

    version: int
    backend: str
    endpoint: str
    """Unique per process incarnation: a restarted process of the same name has another one."""
    regions: tuple[Region, ...]
    metadata: bytes = b""
    """The backend's own."""


class _Preamble(msgspec.Struct, frozen=True):
    """Decoded first: later versions may change the rest."""

    version: int
    backend: str


_encoder = msgspec.msgpack.Encoder()
_preamble_decoder = msgspec.msgpack.Decoder(_Preamble)
_decoder = msgspec.msgpack.Decoder(Description)


def encode_description(description: Description) -> bytes:
    return _encoder.encode(description)


def decode_description(
    data: bytes, peer: str, backend: str, own_regions: Sequence[Region]
) -> Description:
    """The peer's description. Raises PeerError, naming both values, when it does not fit our end.

    Pools may differ in their number of pages, not in number or in page size.
    """
    try:
        preamble = _preamble_decoder.decode(data)
        if preamble.version != DESCRIPTION_VERSION:
            raise PeerError(
                f"{peer} describes itself in version {preamble.version}, "
                f"we read version {DESCRIPTION_VERSION}"
            )
        if preamble.backend != backend:
            raise PeerError(f"{peer} uses transport {preamble.backend!r}, we use {backend!r}")
        description = _decoder.decode(data)
    except msgspec.MsgspecError as error:
        raise PeerError(f"{peer} sent something that is no description: {error}") from error
    ours, theirs = len(own_regions), len(description.regions)
    if ours != theirs:
        raise PeerError(f"{peer} has {theirs} regions, we have {ours}")
    for number, (own, other) in enumerate(zip(own_regions, description.regions, strict=True)):
        if own.page_bytes != other.page_bytes:
            raise PeerError(
                f"pages of region {number} have {other.page_bytes} bytes at {peer}, "
                f"{own.page_bytes} here"
            )
    return description


def check_pages(pages: Int32Array, region: Region, where: str) -> None:
    """Raises IndexError when a page is not in `region`; `where` names it."""
    if pages.size and (pages.min() < 0 or pages.max() >= region.num_pages):
        raise IndexError(
            f"pages {pages.min()} to {pages.max()} of {where}, which has {region.num_pages}"
        )


def adjacent_runs(source_pages: Int32Array, target_pages: Int32Array) -> list[tuple[int, int]]:
    """[start, end) of the maximal runs adjacent on both sides: each moves as one descriptor."""
    if not len(source_pages):
        return []
    breaks = (np.diff(source_pages) != 1) | (np.diff(target_pages) != 1)
    starts = [0, *(np.flatnonzero(breaks) + 1).tolist()]
    return list(zip(starts, [*starts[1:], len(source_pages)], strict=True))
