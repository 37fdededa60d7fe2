"""What replicas and the keeper of their node say to each other (hicache/keeper.py).

The replica opens an exchange under a `serial` that it never uses twice for one keeper, by `Find` or
`Offer`, and closes it. Each of its messages carries its `floor`, the lowest serial that is open:
what is below is closed, even if the message that said so was lost. Page hashes are 32-byte digests
laid end to end, always those of all pages from the first of the sequence on; slots are host pages,
raw little-endian int32, by layer group; -1 is a page that is not there, or not wanted.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
import numpy.typing as npt

from hicache.keys import HASH_BYTES

Int32Array = npt.NDArray[np.int32]


class CacheMessage(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Base; encoded as arrays, so fields may only be appended."""

    serial: int


# ------------------------------------------------------------------------------------ to the keeper


class Find(CacheMessage, frozen=True, tag="find"):
    """Which of these pages are there? Answered by `Found`, at once and, where storage has more,
    again when that has come. What was found stays until `Close`."""

    floor: int
    page_hashes: bytes
    tokens_per_s: float = 0.0
    """How fast the replica computes what it has not found; 0: unknown."""
    have: int = 0
    """The first so many pages are in its device tier."""


class Take(CacheMessage, frozen=True, tag="take"):
    """Waiting for storage is over: answered by the last `Found`."""

    floor: int


class Offer(CacheMessage, frozen=True, tag="offer"):
    """The replica has these pages. Answered by `Room`."""

    floor: int
    first: int
    """It has offered the pages before."""
    page_hashes: bytes
    have: tuple[int, ...]
    """By layer group, the first page that it can copy."""
    tenant: str = ""


class Copied(CacheMessage, frozen=True, tag="copied"):
    """The first `num_pages` of those that room was given for are in their slots; the rest will not
    be. Closes the `Offer`."""

    floor: int
    num_pages: int


class Close(CacheMessage, frozen=True, tag="close"):
    """No copy from or to what was found or given is under way, and none will follow."""

    floor: int


# ----------------------------------------------------------------------------------- to the replica


class Found(CacheMessage, frozen=True, tag="found"):
    num_pages: int
    """From page 0 on."""
    slots: tuple[bytes, ...]
    """Of all these pages; -1 outside a sliding group's last window."""
    is_last: bool
    num_read: int = 0
    """The last so many of them were brought by storage."""


class Room(CacheMessage, frozen=True, tag="room"):
    first: int
    slots: tuple[bytes, ...]
    """Where pages from `first` on are to be copied to; empty: nowhere."""


ToKeeper = Find | Take | Offer | Copied | Close
FromKeeper = Found | Room


# -------------------------------------------------------------------------------------------- bytes


def pack_ints(values: Int32Array | Sequence[int]) -> bytes:
    return np.asarray(values, dtype="<i4").tobytes()


def unpack_ints(data: bytes) -> Int32Array:
    return np.frombuffer(data, dtype="<i4")


def split_hashes(data: bytes) -> list[bytes]:
    return [data[i : i + HASH_BYTES] for i in range(0, len(data), HASH_BYTES)]
