"""Page hashes: names of content, never of ranks or places (rule 3).

A page's hash covers its tokens and, through its parent's hash, every token before them and the
namespace in which they mean something: model fingerprint, cache salt, adapter. Two pages with the
same hash hold the same KV bytes for the same heads and layers, on whatever replica. Only full pages
have a hash.
"""

from __future__ import annotations

import functools
import hashlib
import struct
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

HASH_BYTES = 32
_ROOT_VERSION = b"pagerelay root 1"
_OBJECT_VERSION = b"pagerelay object 1"


def root_hash(fingerprint: str, cache_salt: str = "", adapter: str = "") -> bytes:
    """The parent hash of a sequence's first page.

    `fingerprint` names everything else that KV bytes depend on: weights, revision, dtype. The parts
    are length-prefixed, so that no two different triples encode alike.
    """
    digest = hashlib.sha256(_ROOT_VERSION)
    for part in (fingerprint, cache_salt, adapter):
        # Client-supplied salts may hold lone surrogates, which plain UTF-8 refuses.
        data = part.encode("utf-8", "surrogatepass")
        digest.update(struct.pack("<Q", len(data)))
        digest.update(data)
    return digest.digest()


def page_hashes(
    tokens: npt.NDArray[np.int32] | Sequence[int], page_tokens: int, parent: bytes
) -> list[bytes]:
    """Digests of the full pages of `tokens`: sha256(parent || tokens as little-endian u32),
    chained.

    `tokens` starts at a page boundary, after the page with hash `parent` (or at the root).
    Raises ValueError when a token is not an unsigned 32-bit number.
    """
    if page_tokens < 1:
        raise ValueError(f"page_tokens must be positive, got {page_tokens}")
    data = _token_bytes(tokens)
    stride = 4 * page_tokens
    sha256 = hashlib.sha256
    hashes = []
    whole = data[: len(data) // stride * stride]
    for (page,) in struct.iter_unpack(f"{stride}s", whole):  # a tenth faster than slicing
        parent = sha256(parent + page).digest()
        hashes.append(parent)
    return hashes


def object_key(fingerprint: str, page_hash: bytes, group: int, heads: range, layers: range) -> str:
    """The name of a stored part of a page: that of these KV heads and of these of the layer group's
    layers, by their place in it.

    The fields are of fixed length or numbers between separators, so that no two different parts
    have the same name. All of printable ASCII without spaces.
    """
    if len(page_hash) != HASH_BYTES:
        raise ValueError(f"a page hash has {HASH_BYTES} bytes, got {len(page_hash)}")
    for part in (heads, layers):
        if part.step != 1 or part.start < 0 or not part:
            raise ValueError(f"expected a range of consecutive numbers from 0 on, got {part}")
    if group < 0:
        raise ValueError(f"a layer group has a number from 0 on, got {group}")
    return (
        f"{_model_name(fingerprint)}.{page_hash.hex()}.{group}"
        f".{heads.start}-{heads.stop}.{layers.start}-{layers.stop}"
    )


@functools.lru_cache(maxsize=64)
def _model_name(fingerprint: str) -> str:
    data = fingerprint.encode("utf-8", "surrogatepass")
    return hashlib.sha256(_OBJECT_VERSION + data).hexdigest()[:32]


def _token_bytes(tokens: npt.NDArray[np.int32] | Sequence[int]) -> bytes:
    array = np.asarray(tokens)
    if array.size == 0:
        return b""
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ValueError(f"tokens must be a row of integers, got {array.dtype} {array.shape}")
    if array.min() < 0 or (array.dtype.itemsize > 4 and array.max() > 0xFFFFFFFF):
        raise ValueError("token ids must lie between 0 and 2**32 - 1")
    return array.astype("<u4", copy=False).tobytes()
