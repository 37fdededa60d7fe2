"""What every backend does alike: describe its end, check a peer's description, check what is
to be written."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np

from transfer.transport import Int32Array, PagePart, PeerError, Region

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

    Pools may differ in their size and in that of their pages, not in number: whether two replicas'
    pages mean the same is for `PairPlan` to say.
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
    return description


def check_write(
    peer: str,
    number: int,
    regions: Sequence[Region],
    peer_regions: Sequence[Region],
    source_pages: Int32Array,
    target_pages: Int32Array,
    part: PagePart | None,
) -> PagePart:
    """The part to write, if all that `Transport.write` is given fits; else raises as it says."""
    source, target = regions[number], peer_regions[number]
    if len(source_pages) != len(target_pages):
        raise ValueError(f"{len(source_pages)} source and {len(target_pages)} target pages")
    _check_pages(source_pages, source, f"our region {number}")
    _check_pages(target_pages, target, f"region {number} of {peer}")
    if part is None:
        if source.page_bytes != target.page_bytes:
            raise ValueError(
                f"pages of region {number} have {target.page_bytes} bytes at {peer}, "
                f"{source.page_bytes} here"
            )
        return PagePart(0, 0, source.page_bytes)
    if min(part.source_offset, part.target_offset, part.length, part.count) < 0 or (
        part.source_end > source.page_bytes or part.target_end > target.page_bytes
    ):
        raise ValueError(
            f"{part} is not within pages of {source.page_bytes} bytes here and "
            f"{target.page_bytes} at {peer}"
        )
    return part


def _check_pages(pages: Int32Array, region: Region, where: str) -> None:
    # Read as unsigned, a negative number is too large as well.
    if pages.size and pages.view(np.uint32).max() >= region.num_pages:
        raise IndexError(
            f"pages {pages.min()} to {pages.max()} of {where}, which has {region.num_pages}"
        )
