"""One suite over every storage: what `Storage` promises, checked byte by byte."""

import contextlib
import importlib.metadata
import itertools
import random
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from storage_world import (
    CANARY,
    DEADLINE_S,
    NUM_PAGES,
    PAGE_BYTES,
    End,
    content,
    keys_of,
    make_end,
    running_master,
)

from hicache.storage.backends import BACKENDS, ENTRY_POINTS, backend_names, make_storage
from hicache.storage.memory import MemoryStorage
from hicache.storage.storage import (
    MAX_KEY_BYTES,
    ObjectPart,
    Outcome,
    StorageConfigurationError,
    StorageError,
)
from transfer.transport import Region

HIT, MISS, STORED, PRESENT = Outcome.HIT, Outcome.MISS, Outcome.STORED, Outcome.PRESENT
FILES = ("file", "nixl")


def skip_if_missing(backend: str) -> None:
    """Skip when the backend's library is not there, and for no other reason."""
    try:
        make_storage(backend, "probe", {"no such option": ""}).close()
    except StorageConfigurationError as error:
        cause = error.__cause__
        name = getattr(cause, "name", None) or ""
        ours = name.startswith(("transfer.", "hicache.")) and name != f"hicache.storage.{backend}"
        if (
            isinstance(cause, ImportError | OSError)
            and not ours
            and backend in ("mooncake", "nixl")
        ):
            pytest.skip(str(error))


@pytest.fixture(scope="module", params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    skip_if_missing(request.param)
    return str(request.param)


@pytest.fixture(scope="module")
def master(backend: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    if backend != "mooncake":
        yield ""
        return
    with running_master(tmp_path_factory.mktemp("master") / "log") as address:
        yield address


@pytest.fixture
def options(backend: str, master: str, tmp_path: Path) -> dict[str, str]:
    if backend == "mooncake":
        return {"master": master, "segment": "64M", "prefix": uuid.uuid4().hex}
    return {"path": str(tmp_path / "objects"), "limit": "100M"} if backend in FILES else {}


@pytest.fixture
def make(backend: str, options: dict[str, str]) -> Iterator[Callable[[], End]]:
    with contextlib.ExitStack() as stack:

        def made(page_bytes: int = PAGE_BYTES) -> End:
            end = make_end(backend, options, page_bytes)
            stack.callback(end.storage.close)
            return end

        yield made


@pytest.fixture(scope="module")
def shared(backend: str, master: str) -> Iterator[list[End]]:
    """Mooncake takes two seconds to close."""
    ends: list[End] = []
    yield ends
    for end in ends:
        end.storage.close()


@pytest.fixture
def end(backend: str, options: dict[str, str], make: Callable[[], End], shared: list[End]) -> End:
    if backend != "mooncake":
        return make()
    if not shared:
        shared.append(make_end(backend, options))
    (end,) = shared
    end.clear()
    end.memory[:] = CANARY
    return end


def test_what_was_put_is_got_into_any_pages_and_nowhere_else(end: End) -> None:
    sources = random.Random(1).sample(range(NUM_PAGES), 9)
    targets = random.Random(2).sample(range(NUM_PAGES), 9)
    keys = keys_of(*range(9))
    assert end.put(keys, sources) == [STORED] * 9
    end.pages[:] = 0
    result = end.wait(end.submit("get", keys, targets))
    assert result.outcomes == (HIT,) * 9
    assert (result.error, result.pages_in_use) == (None, False)
    assert result.bytes_moved == 9 * PAGE_BYTES
    assert result.seconds >= 0
    expected = np.zeros_like(end.pages)
    for key, target in zip(keys, targets, strict=True):
        expected[target] = content(key, PAGE_BYTES)
    np.testing.assert_array_equal(end.pages, expected)
    assert end.storage.poll() == []
    assert end.storage.released() == []


def test_each_key_has_its_own_outcome(end: End) -> None:
    assert end.put(keys_of(1, 3, 5), [0, 1, 2]) == [STORED] * 3
    assert end.put(keys_of(1, 2, 3), [3, 4, 5]) == [PRESENT, STORED, PRESENT]
    assert end.exists(keys_of(1, 9, 2, 5)) == [PRESENT, MISS, PRESENT, PRESENT]
    assert end.get(keys_of(7, 1, 2, 8, 5), [6, 7, 8, 9, 10]) == [MISS, HIT, HIT, MISS, HIT]
    assert end.remove(keys_of(2, 8)) == [Outcome.REMOVED, MISS]
    assert end.get(keys_of(1, 2, 3), [1, 2, 3]) == [HIT, MISS, HIT]
    assert end.put(keys_of(2), [0]) == [STORED]
    assert end.get(keys_of(2), [1]) == [HIT]


def test_clear_removes_all_and_service_goes_on(end: End) -> None:
    end.put(keys_of(*range(20)), list(range(20)))
    end.clear()
    assert end.exists(keys_of(*range(20))) == [MISS] * 20
    assert end.put(keys_of(1), [0]) == [STORED]
    assert end.get(keys_of(1), [1]) == [HIT]


def test_what_one_process_end_stores_another_one_finds(
    backend: str, make: Callable[[], End]
) -> None:
    if backend == "memory":
        pytest.skip("its objects are its own")
    first, second = make(), make()
    first.put(keys_of(1, 2), [0, 1])
    assert second.get(keys_of(2, 1), [5, 6]) == [HIT, HIT]


def test_parts_of_a_page_are_objects_of_their_own(end: End) -> None:
    """What a rank with all heads has stored per two heads and half of the layers is read by one
    that holds only those, and the other way round."""
    heads, layers, run = 4, 6, PAGE_BYTES // 24
    page = np.random.default_rng(3).integers(0, 256, PAGE_BYTES, dtype=np.uint8)
    end.pages[2] = page
    cells = [(head, layer) for head in (0, 2) for layer in (0, 3)]
    for head, layer in cells:
        part = ObjectPart((head * layers + layer) * run, 3 * run, 2, layers * run)
        assert part.object_bytes == 6 * run
        assert end.do("put", [f"{head}.{layer}"], [2], part) == [STORED]
    before = end.memory.copy()
    narrow = ObjectPart(run, 3 * run, 2, 4 * run)
    assert end.do("get", ["2.3"], [7], narrow) == [HIT]
    by_head = page.reshape(heads, layers, run)
    expected = before[PAGE_BYTES:-PAGE_BYTES].reshape(NUM_PAGES, PAGE_BYTES)
    expected[7, run : 4 * run] = by_head[2, 3:].ravel()
    expected[7, 5 * run : 8 * run] = by_head[3, 3:].ravel()
    np.testing.assert_array_equal(end.memory, before)
    end.pages[9] = 0
    for head, layer in cells:
        part = ObjectPart((head * layers + layer) * run, 3 * run, 2, layers * run)
        assert end.do("get", [f"{head}.{layer}"], [9], part) == [HIT]
    np.testing.assert_array_equal(end.pages[9], page)


@pytest.mark.parametrize("length", [PAGE_BYTES - 1, 1])
def test_an_object_of_another_size_is_never_a_hit(end: End, length: int) -> None:
    end.fill([0], ["key"])
    assert end.do("put", ["key"], [0], ObjectPart(0, length)) == [STORED]
    assert end.get(["key"], [1])[0] in (Outcome.CORRUPT, MISS)
    assert end.put(["key"], [0]) == [STORED]
    assert end.do("get", ["key"], [1], ObjectPart(0, length))[0] in (Outcome.CORRUPT, MISS)


def test_keys_are_any_text(end: End) -> None:
    keys = [
        "a",
        "A",
        "a/b",
        "../../etc/passwd",
        ".",
        "a\0b",
        "ключ",
        "%s $(x) '",
        "k" * MAX_KEY_BYTES,
    ]
    pages = list(range(len(keys)))
    assert end.put(keys, pages) == [STORED] * len(keys)
    assert end.get(keys, pages[::-1]) == [HIT] * len(keys)


def test_no_keys_is_an_operation_like_another(end: End) -> None:
    assert end.put([], []) == []
    assert end.get([], []) == []
    assert end.exists([]) == end.remove([]) == []


def test_several_operations_at_once_end_once_each(end: End) -> None:
    keys = [keys_of(*range(n * 3, n * 3 + 3)) for n in range(8)]
    pages = [list(range(n * 3, n * 3 + 3)) for n in range(8)]
    for some, places in zip(keys, pages, strict=True):
        end.fill(places, some)
    for kind, outcome in (("put", STORED), ("get", HIT)):
        submitted = {
            end.submit(kind, some, places) for some, places in zip(keys, pages, strict=True)
        }
        ended: list[int] = []
        for _ in range(10_000):
            ended += [r.operation_id for r in end.storage.poll() if set(r.outcomes) == {outcome}]
            if len(ended) >= len(submitted):
                break
            time.sleep(0.001)
        assert sorted(ended) == sorted(submitted)


def test_an_operation_past_its_deadline_fails(end: End) -> None:
    end.put(keys_of(0), [0])
    result = end.wait(end.submit("get", keys_of(0), [1], timeout_s=0.0))
    assert result.outcomes in ((Outcome.FAILED,), (HIT,))
    assert (result.error is None) == (result.outcomes == (HIT,))


def test_a_cancelled_operation_has_a_result(end: End) -> None:
    end.fill(range(NUM_PAGES), keys_of(*range(NUM_PAGES)))
    number = end.submit("put", keys_of(*range(NUM_PAGES)), range(NUM_PAGES))
    end.storage.cancel(number)
    end.storage.cancel(9999)
    result = end.wait(number)
    assert set(result.outcomes) <= {STORED, Outcome.FAILED}
    found = end.exists(keys_of(*range(NUM_PAGES)))
    for outcome, is_there in zip(result.outcomes, found, strict=True):
        assert outcome is Outcome.FAILED or is_there is PRESENT


@pytest.mark.parametrize(
    ("keys", "pages", "part", "error"),
    [
        (["a", "b"], [1], None, ValueError),
        (["a"], [NUM_PAGES], None, IndexError),
        (["a"], [-1], None, IndexError),
        ([""], [1], None, ValueError),
        (["k" * (MAX_KEY_BYTES + 1)], [1], None, ValueError),
        (["a"], [1], ObjectPart(1, PAGE_BYTES), ValueError),
        (["a"], [1], ObjectPart(-1, 5), ValueError),
        (["a"], [1], ObjectPart(0, 0), ValueError),
        (["a"], [1], ObjectPart(0, 100, 3, 50), ValueError),
        (["a"], [1], ObjectPart(0, 100, 2, PAGE_BYTES), ValueError),
    ],
)
@pytest.mark.parametrize("kind", ["put", "get"])
def test_what_does_not_fit_is_refused(
    end: End, kind: str, keys: list[str], pages: list[int], part: ObjectPart | None, error: type
) -> None:
    with pytest.raises(error):
        end.submit(kind, keys, pages, part=part)
    assert end.storage.poll() == []


def test_regions_are_registered_once_and_lie_in_host_memory(
    backend: str, end: End, options: dict[str, str]
) -> None:
    with pytest.raises(StorageError, match="once"):
        end.storage.register([Region(4096, 1, 4096)])
    with (
        contextlib.closing(make_storage(backend, "device", options)) as other,
        pytest.raises(StorageConfigurationError, match="host memory only"),
    ):
        other.register([Region(4096, 1, 4096, device=0)])


def test_close_ends_what_is_under_way_and_can_be_repeated(make: Callable[[], End]) -> None:
    end = make()
    end.fill(range(NUM_PAGES), keys_of(*range(NUM_PAGES)))
    end.submit("put", keys_of(*range(NUM_PAGES)), range(NUM_PAGES))
    end.storage.close()
    end.storage.close()
    assert end.storage.poll() == []


def apply(end: End, step: str, keys: list[str], pages: list[int]) -> list[Outcome]:
    match step:
        case "put":
            return end.put(keys, pages)
        case "get":
            return end.get(keys, pages)
        case "exists":
            return end.exists(keys)
        case "remove":
            return end.remove(keys)
    end.clear()
    return []


@pytest.mark.parametrize("seed", range(6))
def test_it_behaves_as_the_reference_does(end: End, seed: int) -> None:
    reference = make_end("memory", {})
    chance = random.Random(seed)
    for _ in range(40):
        count = chance.randint(1, 8)
        keys = [f"{seed}-{chance.randrange(24)}" for _ in range(count)]
        keys = list(dict.fromkeys(keys))
        pages = chance.sample(range(NUM_PAGES), len(keys))
        step = chance.choice(("put", "put", "get", "get", "exists", "remove", "clear"))
        if step == "clear" and chance.random() < 0.7:
            continue
        found, expected = (apply(each, step, keys, pages) for each in (end, reference))
        assert found == expected, (step, keys)
    stats = end.storage.stats()
    assert stats.objects in (None, reference.storage.stats().objects)


@pytest.mark.parametrize("seed", range(3))
def test_with_little_room_what_hits_is_right_and_the_limit_is_held(
    backend: str, options: dict[str, str], seed: int
) -> None:
    if backend == "mooncake":
        pytest.skip("its room is the store's")
    limit = 8 * 4 * 4096
    with contextlib.closing(make_end(backend, {**options, "limit": str(limit)}).storage):
        pass
    end = make_end(backend, {**options, "limit": str(limit)})
    chance = random.Random(seed)
    hits = 0
    with contextlib.closing(end.storage):
        for step in itertools.count():
            keys = list(dict.fromkeys(keys_of(*(chance.randrange(14) for _ in range(3)))))
            pages = chance.sample(range(NUM_PAGES), len(keys))
            assert set(end.put(keys, pages)) <= {STORED, PRESENT}
            hits += end.get(keys, pages).count(HIT)
            stats = end.storage.stats()
            assert stats.object_bytes is not None
            assert stats.object_bytes <= limit
            if step >= 40:
                break
        assert end.storage.stats().evicted_objects > 10
        assert hits > 100


def test_an_object_larger_than_the_limit_does_not_fit(
    backend: str, options: dict[str, str]
) -> None:
    if backend == "mooncake":
        pytest.skip("its room is the store's")
    end = make_end(backend, {**options, "limit": "8192"})
    with contextlib.closing(end.storage):
        assert end.put(["large"], [0]) == [Outcome.FULL]
        assert end.get(["large"], [0]) == [MISS]


# ------------------------------------------------------------------ names and options


def test_an_unknown_option_is_named(backend: str, options: dict[str, str]) -> None:
    with pytest.raises(StorageConfigurationError, match="'speed'"):
        make_storage(backend, "name", {**options, "speed": "9"})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "needs option 'path'"),
        ({"path": "x"}, "needs option 'limit'"),
        ({"path": "x", "limit": "much"}, "limit: expected a size"),
        ({"path": "x", "limit": "1G", "threads": "0"}, "threads: expected a number"),
        ({"path": "x", "limit": "1G", "fsync": "maybe"}, "never or always"),
        ({"path": "/proc/none", "limit": "1G"}, "storage in /proc/none"),
    ],
)
def test_a_wrong_option_is_named(options: dict[str, str], message: str) -> None:
    with pytest.raises(StorageConfigurationError, match=message):
        make_storage("file", "name", options)


def test_an_unknown_backend_names_the_known() -> None:
    with pytest.raises(StorageConfigurationError, match=r"no storage 'tape'; there are file"):
        make_storage("tape", "name")


@pytest.mark.parametrize(
    ("backend_name", "library"), [("mooncake", "mooncake.store"), ("nixl", "nixl._api")]
)
def test_a_missing_library_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, backend_name: str, library: str
) -> None:
    monkeypatch.delitem(sys.modules, f"hicache.storage.{backend_name}", raising=False)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(StorageConfigurationError, match="needs pip install"):
        make_storage(backend_name, "name")


def test_others_register_through_entry_points(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [
        importlib.metadata.EntryPoint("tape", "hicache.storage.memory:MemoryStorage", ENTRY_POINTS),
        importlib.metadata.EntryPoint("broken", "hicache.no_such_module:x", ENTRY_POINTS),
    ]

    def entry_points(group: str, name: str | None = None) -> list[importlib.metadata.EntryPoint]:
        assert group == ENTRY_POINTS
        return [entry for entry in entries if name in (None, entry.name)]

    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)
    assert backend_names() == [*BACKENDS, "broken", "tape"]
    assert isinstance(make_storage("tape", "name"), MemoryStorage)
    with pytest.raises(StorageConfigurationError, match=r"'broken' does not load"):
        make_storage("broken", "name")


def test_the_reference_has_delays_and_faults() -> None:
    end = make_end("memory", {"delay_polls": "2"})
    storage = end.storage
    assert isinstance(storage, MemoryStorage)
    end.fill([0], ["a"])
    number = end.submit("put", ["a"], [0])
    assert storage.poll() == storage.poll() == []
    assert [result.operation_id for result in storage.poll()] == [number]
    storage.damaged.add("a")
    assert end.get(["a"], [1]) == [Outcome.CORRUPT]
    assert end.get(["a"], [1]) == [MISS]
    storage.fail_next = 1
    result = end.wait(end.submit("get", ["a"], [1]), DEADLINE_S)
    assert (result.outcomes, result.error) == ((Outcome.FAILED,), "injected fault")
