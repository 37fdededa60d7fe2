import hashlib
import itertools
import struct

import numpy as np
import pytest

from hicache.keys import HASH_BYTES, object_key, page_hashes, root_hash


def test_hashes_are_the_documented_chain():
    root = root_hash("model")
    tokens = list(range(7, 7 + 10))
    expected = []
    parent = root
    for first in (0, 4):
        packed = struct.pack("<4I", *tokens[first : first + 4])
        parent = hashlib.sha256(parent + packed).digest()
        expected.append(parent)
    assert page_hashes(tokens, 4, root) == expected


@pytest.mark.parametrize("length", [0, 1, 3, 4, 5, 8])
def test_only_full_pages_are_hashed(length):
    hashes = page_hashes(list(range(length)), 4, root_hash("model"))
    assert len(hashes) == length // 4
    assert all(len(digest) == HASH_BYTES for digest in hashes)


def test_the_kind_of_the_token_sequence_does_not_matter():
    root = root_hash("model")
    tokens = [1, 262_143, 0, 5] * 5
    expected = page_hashes(tokens, 4, root)
    for other in (
        tuple(tokens),
        np.array(tokens, dtype=np.int32),
        np.array(tokens, dtype=np.int64),
        np.array(tokens, dtype=">i4"),
        np.repeat(np.array(tokens, dtype=np.int32), 2)[::2],
    ):
        assert page_hashes(other, 4, root) == expected


def test_hashing_can_continue_from_any_page():
    tokens = np.arange(40, dtype=np.int32)
    root = root_hash("model")
    whole = page_hashes(tokens, 8, root)
    assert page_hashes(tokens[16:], 8, whole[1]) == whole[2:]


def test_a_changed_token_changes_its_page_and_all_later_ones_only():
    root = root_hash("model")
    tokens = np.arange(32, dtype=np.int32)
    changed = tokens.copy()
    changed[11] += 1
    pairs = list(zip(page_hashes(tokens, 8, root), page_hashes(changed, 8, root), strict=True))
    assert [a == b for a, b in pairs] == [True, False, False, False]


def test_namespaces_do_not_collide():
    parts = ["", "a", "b", "ab", "a\0b", "\0", "1a", "\ud800"]
    roots = {root_hash(*triple) for triple in itertools.product(parts, repeat=3)}
    assert len(roots) == len(parts) ** 3


def test_the_root_hash_is_stable():
    """A change here makes every stored cache unreachable: raise the version tag with it."""
    assert root_hash("m", "s", "a").hex() == (
        "e0de86bde51d492b9eb6dfebbe1079283c41846f952348756a7f03458f1a14d1"
    )


@pytest.mark.parametrize("tokens", [[-1, 0], [2**32, 0], [0.5, 1.0], [[1, 2], [3, 4]]])
def test_what_is_no_token_is_refused(tokens):
    with pytest.raises(ValueError, match="token"):
        page_hashes(tokens, 2, root_hash("model"))


def test_page_size_must_be_positive():
    with pytest.raises(ValueError, match="page_tokens"):
        page_hashes([1, 2], 0, root_hash("model"))


def test_object_keys_do_not_collide():
    hashes = [bytes([value]) * HASH_BYTES for value in (0, 1, 16)]
    ranges = [range(0, 1), range(0, 11), range(0, 12), range(1, 2), range(1, 12), range(11, 12)]
    fields = (["", "a", "a.0", "\ud800"], hashes, [0, 1, 11], ranges, ranges)
    keys = [object_key(*values) for values in itertools.product(*fields)]
    assert len(set(keys)) == len(keys)
    assert all(key.isascii() and key.isprintable() and " " not in key for key in keys)


def test_object_keys_are_stable():
    """A change here makes every stored cache unreachable: raise the version tag with it."""
    assert object_key("m", b"\x07" * HASH_BYTES, 1, range(2, 4), range(0, 18)) == (
        "2b7488c8b28514d9b7a315f43a152afb" + ".07" + "07" * 31 + ".1.2-4.0-18"
    )


@pytest.mark.parametrize(
    ("page_hash", "group", "heads"),
    [
        (b"short", 0, range(1)),
        (bytes(HASH_BYTES), -1, range(1)),
        (bytes(HASH_BYTES), 0, range(0)),
        (bytes(HASH_BYTES), 0, range(0, 4, 2)),
        (bytes(HASH_BYTES), 0, range(-1, 1)),
    ],
)
def test_what_names_no_part_is_refused(page_hash, group, heads):
    with pytest.raises(ValueError, match="got"):
        object_key("model", page_hash, group, heads, range(1))
