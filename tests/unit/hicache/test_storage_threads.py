"""Queue, deadlines and cancelling of `ThreadedStorage`, over a store whose calls end when told."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest

import hicache.storage.threaded
from hicache.storage.blocking import Answer, BlockingStore, Limits, plan_batches
from hicache.storage.objects import StoredObject
from hicache.storage.storage import Outcome, Storage, StorageError, StorageResult, StorageStats
from hicache.storage.threaded import ThreadedStorage
from transfer.memory import allocate_host
from transfer.transport import Region

PAGE_BYTES = 64
NUM_PAGES = 32
SOON_S = 10.0


class GatedStore(BlockingStore):
    """Calls wait until `gate` is open."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.begun: list[tuple[str, list[str]]] = []
        self.fault: Exception | None = None
        self.is_closed = False

    def put(self, objects: Sequence[StoredObject]) -> list[Answer]:
        return self._call("put", objects, Outcome.STORED)

    def get(self, objects: Sequence[StoredObject]) -> list[Answer]:
        return self._call("get", objects, Outcome.HIT)

    def exists(self, objects: Sequence[StoredObject]) -> list[Answer]:
        return self._call("exists", objects, Outcome.MISS)

    def remove(self, objects: Sequence[StoredObject]) -> list[Answer]:
        return self._call("remove", objects, Outcome.REMOVED)

    def clear(self) -> None:
        self._call("clear", [], Outcome.REMOVED)

    def stats(self) -> StorageStats:
        return StorageStats(None, None, None)

    def close(self) -> None:
        self.is_closed = True

    def _call(self, what: str, objects: Sequence[StoredObject], outcome: Outcome) -> list[Answer]:
        self.begun.append((what, [stored.key for stored in objects]))
        assert self.gate.wait(SOON_S)
        if self.fault is not None:
            raise self.fault
        return [outcome] * len(objects)


@pytest.fixture
def store() -> GatedStore:
    return GatedStore()


Make = Callable[[Limits], Storage]


@pytest.fixture
def make(store: GatedStore) -> Iterator[Make]:
    made = []
    memory = allocate_host(NUM_PAGES * PAGE_BYTES)

    def make(limits: Limits) -> Storage:
        storage = ThreadedStorage("test", store, limits)
        storage.register([Region(memory.address, NUM_PAGES, PAGE_BYTES)])
        made.append(storage)
        return storage

    yield make
    store.gate.set()
    for storage in made:
        storage.close()


def put(storage: Storage, *names: str, timeout_s: float = SOON_S) -> int:
    return storage.submit_put(names, 0, np.arange(len(names), dtype=np.int32), timeout_s)


def get(storage: Storage, *names: str, timeout_s: float = SOON_S) -> int:
    return storage.submit_get(names, 0, np.arange(len(names), dtype=np.int32), timeout_s)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SOON_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.0005)


def wait(storage: Storage, count: int = 1) -> list[StorageResult]:
    results: list[StorageResult] = []
    until(lambda: results.extend(storage.poll()) or len(results) >= count)
    assert len(results) == count
    return results


def test_a_hanging_call_ends_by_its_deadline_and_its_pages_are_in_use(
    store: GatedStore, make: Make
) -> None:
    storage = make(Limits(threads=1, batch_objects=1))
    store.gate.clear()
    number = get(storage, "a", "b", timeout_s=0.05)
    until(lambda: len(store.begun) == 1)
    (result,) = wait(storage)
    assert result.outcomes == (Outcome.FAILED, Outcome.FAILED)
    assert result.pages_in_use
    assert result.error == "not done by its deadline"
    assert 0.05 <= result.seconds < SOON_S / 2
    assert storage.stats().hanging_operations == 1
    assert storage.released() == []
    store.gate.set()
    until(lambda: storage.stats().hanging_operations == 0)
    assert storage.released() == [number]
    assert storage.released() == storage.poll() == []
    assert store.begun == [("get", ["a"])], "what was late has been begun"


def test_what_has_not_begun_by_its_deadline_holds_no_pages(store: GatedStore, make: Make) -> None:
    storage = make(Limits(threads=1))
    store.gate.clear()
    put(storage, "a")
    until(lambda: len(store.begun) == 1)
    late = put(storage, "b", timeout_s=0.01)
    (result,) = wait(storage)
    assert result.operation_id == late
    assert not result.pages_in_use


def test_what_was_done_by_the_deadline_counts(store: GatedStore, make: Make) -> None:
    storage = make(Limits(threads=1, batch_objects=2))
    first = put(storage, "a", "b", "c", timeout_s=1.0)
    until(lambda: len(store.begun) == 2)
    (done,) = wait(storage)
    assert done.operation_id == first
    assert done.outcomes == (Outcome.STORED,) * 3
    assert done.bytes_moved == 3 * PAGE_BYTES
    assert [names for _, names in store.begun] == [["a", "b"], ["c"]]


def test_cancelling_waits_for_what_is_under_way(store: GatedStore, make: Make) -> None:
    storage = make(Limits(threads=1))
    store.gate.clear()
    number = put(storage, "a", "b")
    until(lambda: len(store.begun) == 1)
    storage.cancel(number)
    assert storage.poll() == []
    store.gate.set()
    (result,) = wait(storage)
    assert result.outcomes == (Outcome.STORED, Outcome.FAILED)
    assert (result.error, result.pages_in_use) == ("cancelled", False)
    assert store.begun == [("put", ["a"])]


@pytest.mark.parametrize(
    "limits", [Limits(threads=1, queue_operations=2), Limits(threads=1, queue_bytes=2 * PAGE_BYTES)]
)
def test_what_does_not_fit_is_refused_at_once(
    store: GatedStore, make: Make, limits: Limits
) -> None:
    storage = make(limits)
    store.gate.clear()
    put(storage, "a")
    put(storage, "b")
    third = put(storage, "c")
    (result,) = storage.poll()
    assert (result.operation_id, result.outcomes) == (third, (Outcome.REFUSED,))
    assert result.error
    assert storage.stats().queued_operations == 2
    assert storage.stats().queued_bytes == 2 * PAGE_BYTES
    store.gate.set()
    wait(storage, 2)
    assert storage.stats().queued_bytes == 0
    put(storage, "c")
    wait(storage)


def test_reads_go_first_and_writes_get_their_turn(store: GatedStore, make: Make) -> None:
    storage = make(Limits(threads=1, batch_objects=1))
    store.gate.clear()
    put(storage, "first")
    until(lambda: len(store.begun) == 1)
    put(storage, *(f"p{n}" for n in range(4)))
    get(storage, *(f"g{n}" for n in range(12)))
    store.gate.set()
    wait(storage, 3)
    kinds = [what for what, _ in store.begun[1:]]
    assert kinds.count("get") == 12
    assert kinds[:12].count("put") in (2, 3, 4)
    assert kinds[:8].count("get") >= 6


def test_a_small_operation_does_not_wait_for_a_large_one(store: GatedStore, make: Make) -> None:
    storage = make(Limits(threads=1, batch_objects=1))
    store.gate.clear()
    get(storage, *(f"large{n}" for n in range(20)))
    until(lambda: len(store.begun) == 1)
    get(storage, "small")
    store.gate.set()
    wait(storage, 2)
    assert [names for _, names in store.begun].index(["small"]) <= 3


@pytest.mark.parametrize("fault", [StorageError("gone"), OSError(5, "input/output"), KeyError("x")])
def test_what_a_call_raises_is_the_error_of_its_keys(
    store: GatedStore, make: Make, fault: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    storage = make(Limits(threads=1))
    store.fault = fault
    put(storage, "a")
    (result,) = wait(storage)
    assert result.outcomes == (Outcome.FAILED,)
    assert result.error
    storage.submit_clear(SOON_S)
    (result,) = wait(storage)
    assert (result.outcomes, bool(result.error)) == ((), True)
    store.fault = None
    put(storage, "a")
    assert wait(storage)[0].outcomes == (Outcome.STORED,)
    assert bool(caplog.records) == isinstance(fault, KeyError)


def test_close_does_not_wait_for_ever(
    store: GatedStore, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hicache.storage.threaded, "CLOSE_S", 0.05)
    storage = make(Limits(threads=2))
    store.gate.clear()
    put(storage, "a")
    until(lambda: len(store.begun) == 1)
    storage.close()
    assert not store.is_closed, "it is still in use"
    assert storage.poll() == []
    with pytest.raises(StorageError, match="closed"):
        put(storage, "b")


def test_batches_hold_every_object_once_and_no_more_than_they_may() -> None:
    limits = Limits(batch_objects=4, batch_bytes=100)
    rng = np.random.default_rng(0)
    for _ in range(200):
        sizes = rng.integers(1, 80, rng.integers(0, 30)).tolist()
        batches = plan_batches(sizes, limits)
        assert [n for first, end in batches for n in range(first, end)] == list(range(len(sizes)))
        for first, end in batches:
            assert 0 < end - first <= 4
            assert sum(sizes[first : end - 1]) < 100
