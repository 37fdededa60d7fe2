"""What is the folder's own, for both backends that use it: crashes, damage, full disks, eviction,
several processes."""

import contextlib
import os
import random
import resource
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from storage_world import NUM_PAGES, PAGE_BYTES, End, fill_up, keys_of, make_end
from storage_world import small_disk as mounted

import hicache.storage.folder
from hicache.storage.folder import ObjectFolder, object_name
from hicache.storage.storage import Outcome, StorageConfigurationError

HIT, MISS, STORED, PRESENT = Outcome.HIT, Outcome.MISS, Outcome.STORED, Outcome.PRESENT
CORRUPT, FULL = Outcome.CORRUPT, Outcome.FULL
ON_DISK = -(-(PAGE_BYTES + 64) // 4096) * 4096
"""Of an object of one page."""


@pytest.fixture(params=["file", "nixl"])
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "nixl":
        pytest.importorskip("nixl", reason="pip install 'nixl>=1.5,<2'")
    return str(request.param)


Make = Callable[..., End]


@pytest.fixture
def make(backend: str, tmp_path: Path) -> Iterator[Make]:
    with contextlib.ExitStack() as stack:

        def made(limit: int = 100 << 20, path: Path = tmp_path / "objects", **options: str) -> End:
            end = make_end(backend, {"path": str(path), "limit": str(limit), **options})
            stack.callback(end.storage.close)
            return end

        yield made


def file_of(tmp_path: Path, key: str) -> Path:
    name = object_name(key)
    return tmp_path / "objects" / name[:2] / name


HEADER = {"magic": 0, "version": 8, "key length": 12, "length": 16, "checksum": 24, "key": 28}


@pytest.mark.parametrize("field", [*HEADER, "first byte", "middle", "last byte"])
def test_a_damaged_byte_anywhere_is_a_miss(make: Make, tmp_path: Path, field: str) -> None:
    end = make()
    end.put(["a", "b"], [0, 1])
    file = file_of(tmp_path, "a")
    data = bytearray(file.read_bytes())
    assert struct.unpack_from("<8sIIQ", data) == (b"PRELAYKV", 1, 1, PAGE_BYTES)
    places = {"first byte": 29, "middle": 29 + PAGE_BYTES // 2, "last byte": len(data) - 1}
    data[{**HEADER, **places}[field]] ^= 0x10
    file.write_bytes(data)
    assert end.get(["a", "b"], [5, 6]) == [CORRUPT, HIT]
    assert end.get(["a"], [5]) == [MISS], "it is removed, so that it can be stored again"
    assert end.put(["a"], [0]) == [STORED]
    assert end.get(["a"], [5]) == [HIT]


@pytest.mark.parametrize("damage", ["short", "empty", "long", "swapped"])
def test_a_file_that_is_not_what_was_stored_is_a_miss(
    make: Make, tmp_path: Path, damage: str
) -> None:
    end = make()
    end.put(["a", "b"], [0, 1])
    file = file_of(tmp_path, "a")
    data = file.read_bytes()
    changed = {
        "short": data[:-1],
        "empty": b"",
        "long": data + b"\0",
        "swapped": file_of(tmp_path, "b").read_bytes(),
    }
    file.write_bytes(changed[damage])
    assert end.get(["a", "b"], [5, 6]) == [CORRUPT, HIT]
    assert end.put(["a"], [0]) == [STORED]
    assert end.get(["a"], [5]) == [HIT]


def test_a_file_that_cannot_be_read_fails_alone(make: Make, tmp_path: Path) -> None:
    end = make()
    end.put(["a", "b"], [0, 1])
    file = file_of(tmp_path, "a")
    file.unlink()
    file.symlink_to(file)
    assert end.get(["a", "b"], [5, 6]) == [Outcome.FAILED, HIT]


WRITER = """
import glob, os, random, signal, sys, time
from storage_world import NUM_PAGES, make_end
backend, path, kills = sys.argv[1], sys.argv[2], int(sys.argv[3])
chance = random.Random(5)
cut = 0
for life in range(kills):
    here, there = os.pipe()
    pid = os.fork()
    if pid == 0:
        end = make_end(backend, {"path": path, "limit": "1G"}, 1 << 18)
        keys = [f"page-{life}-{number}" for number in range(NUM_PAGES)]
        end.put(keys, range(NUM_PAGES))
        os.write(there, b"x")
        while True:
            end.remove(keys[8:])
            end.do("put", keys, range(NUM_PAGES))
    os.close(there)
    os.read(here, 1)
    time.sleep(chance.uniform(0.0, 0.03))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    os.close(here)
    cut += bool(glob.glob(path + "/tmp/*/[0-9]*"))
print(cut)
"""


def run_script(script: str, *arguments: str, check: bool = True) -> str:
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env={**os.environ, "PYTHONPATH": f"{root}:{root / 'tests' / 'support'}"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert not check or done.returncode == 0, done.stderr
    return done.stdout


def test_kill_9_of_writers_leaves_whole_objects_only(
    backend: str, make: Make, tmp_path: Path
) -> None:
    kills = 20 if backend == "file" else 3  # NIXL takes a second to start
    path = tmp_path / "objects"
    cut = int(run_script(WRITER, backend, str(path), str(kills)).splitlines()[-1])
    assert cut >= kills // 5, "hardly any was killed in the middle of a write"
    end = make_end(backend, {"path": str(path), "limit": "1G"}, 1 << 18)
    with contextlib.closing(end.storage):
        assert not list(path.glob("tmp/*/[0-9]*")), "what the last one left is still there"
        for life in range(kills):
            keys = [f"page-{life}-{number}" for number in range(NUM_PAGES)]
            outcomes = end.get(keys, range(NUM_PAGES))
            assert outcomes[:8] == [HIT] * 8
            assert set(outcomes) <= {HIT, MISS}
        assert end.put(["new"], [0]) == [STORED]
        assert end.get(["new"], [1]) == [HIT]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with contextlib.ExitStack() as stack:
        try:
            path = stack.enter_context(mounted(tmp_path / "disk", "1300k"))
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"a small file system cannot be mounted here ({error})")
        yield path


def test_a_full_disk_evicts_and_service_goes_on(small_disk: Path, make: Make) -> None:
    end = make(path=small_disk / "objects")
    outcomes = []
    for step in range(20):
        outcomes += end.put(keys_of(*range(step * 8, step * 8 + 8)), range(8))
    assert set(outcomes) <= {STORED, FULL}
    assert outcomes[:8] == [STORED] * 8
    assert STORED in outcomes[-16:]
    stats = end.storage.stats()
    assert stats.evicted_objects > 0
    found = end.get(keys_of(*range(140, 160)), range(20))
    assert found.count(HIT) >= 5
    # Others fill it up: nothing can be stored, what is there is found or missed, never wrong.
    filler = small_disk / "filler"
    fill_up(filler)
    # Removing an object here and there makes room for a few.
    outcomes = end.put(keys_of(*range(500, 520)), range(20))
    assert set(outcomes) <= {STORED, FULL}
    filler.unlink()
    assert end.put(keys_of(1000), [0]) == [STORED]
    assert end.get(keys_of(1000), [1]) == [HIT]
    assert not list((small_disk / "objects" / "tmp").glob("*/[0-9]*")), "files are left behind"


LIMITED = """
import resource, sys
from storage_world import make_end
end = make_end(sys.argv[1], {"path": sys.argv[2], "limit": "1G"})
resource.setrlimit(resource.RLIMIT_FSIZE, (6000, resource.RLIM_INFINITY))
first = end.put(["a", "b"], [0, 1])
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print([outcome.value for outcome in first + end.put(["a"], [0]) + end.get(["a", "b"], [2, 3])])
end.storage.close()
"""


def test_a_write_that_ends_early_is_no_object(backend: str, tmp_path: Path) -> None:
    """A limit on the size of files cuts writes short, on any file system."""
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    said = run_script(LIMITED, backend, str(tmp_path / "objects"))
    assert said.splitlines()[-1] == str(["full", "full", "stored", "hit", "miss"])


def test_the_least_recently_used_make_room(make: Make) -> None:
    end = make(limit=4 * ON_DISK)
    for number in range(4):
        assert end.put(keys_of(number), [0]) == [STORED]
    assert end.get(keys_of(0), [1]) == [HIT]
    assert end.put(keys_of(1), [0]) == [PRESENT]
    end.put(keys_of(4, 5), [0, 1])
    assert end.exists(keys_of(*range(6))) == [PRESENT, PRESENT, MISS, MISS, PRESENT, PRESENT]
    stats = end.storage.stats()
    assert (stats.objects, stats.object_bytes, stats.evicted_objects) == (4, 4 * ON_DISK, 2)
    end.remove(keys_of(0))
    assert end.put(keys_of(6), [0]) == [STORED]
    assert end.storage.stats().evicted_objects == 2


def wait_for_scan(end: End) -> None:
    deadline = time.monotonic() + 10
    while end.storage.stats().scanned < 1:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_the_order_of_use_and_the_limit_survive_a_restart(make: Make) -> None:
    end = make()
    for number in range(8):
        end.put(keys_of(number), [0])
        time.sleep(0.012)  # the kernel's clock for files ticks every 4 ms, or 10
    end.get(keys_of(0), [1])
    end.storage.close()
    end = make(limit=5 * ON_DISK)
    wait_for_scan(end)
    assert end.storage.stats().objects == 5
    assert end.exists(keys_of(*range(8))) == [PRESENT] + [MISS] * 3 + [PRESENT] * 4
    end.put(keys_of(9), [0])
    assert end.exists(keys_of(0, 4, 5)) == [PRESENT, MISS, PRESENT]


def test_the_limit_is_held_while_scanning(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = 10 * ON_DISK
    end = make(limit=limit)
    end.put(keys_of(*range(10)), range(10))
    end.storage.close()
    read = hicache.storage.folder._list

    def read_slowly(path: str) -> list[tuple[str, int, int]]:
        time.sleep(0.002)
        return read(path)

    monkeypatch.setattr(hicache.storage.folder, "_list", read_slowly)
    end = make(limit=limit)
    seen_while_scanning = 0
    for number in range(100, 130):
        assert set(end.put(keys_of(number), [0])) <= {STORED, FULL}
        used = sum(ON_DISK for shard in (tmp_path / "objects").glob("??/*") if shard.is_file())
        assert used <= limit
        seen_while_scanning += end.storage.stats().scanned < 1
    assert seen_while_scanning > 0
    wait_for_scan(end)
    stats = end.storage.stats()
    assert stats.object_bytes is not None
    assert stats.object_bytes <= limit
    assert end.put(keys_of(200), [0]) == [STORED]


def test_foreign_files_are_left_alone(make: Make, tmp_path: Path) -> None:
    make().storage.close()
    foreign = tmp_path / "objects" / "00" / "README"
    foreign.write_text("mine")
    end = make()
    end.clear()
    assert foreign.read_text() == "mine"
    assert end.storage.stats().objects == 0


SHARING = """
import random, sys
from storage_world import NUM_PAGES, make_end
from hicache.storage.storage import Outcome
end = make_end(sys.argv[1], {"path": sys.argv[2], "limit": "400K"})
chance = random.Random(int(sys.argv[3]))
hits = 0
for _ in range(40):
    keys = [f"page-{n}" for n in chance.sample(range(40), 6)]
    pages = chance.sample(range(NUM_PAGES), 6)
    puts = end.put(keys, pages)
    assert set(puts) <= {Outcome.STORED, Outcome.PRESENT, Outcome.FULL}, puts
    gets = end.get(keys, pages)
    assert set(gets) <= {Outcome.HIT, Outcome.MISS}, gets
    hits += gets.count(Outcome.HIT)
    if chance.random() < 0.1:
        end.remove(keys[:1])
assert hits > 60, hits
end.storage.close()
"""


def test_processes_share_a_folder(backend: str, tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": f"{root}:{root / 'tests' / 'support'}"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SHARING, backend, str(tmp_path / "objects"), str(seed)],
            env=environment,
            stderr=subprocess.PIPE,
        )
        for seed in range(2)
    ]
    for process in processes:
        _, said = process.communicate(timeout=40)
        assert process.returncode == 0, said.decode()
    assert not list((tmp_path / "objects" / "tmp").glob("*/*"))


def test_each_process_learns_what_others_did_to_the_folder(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hicache.storage.folder, "RESCAN_S", 0.05)
    first, second = make(), make()
    wait_for_scan(first)
    wait_for_scan(second)
    second.put(keys_of(*range(6)), range(6))

    def first_knows(objects: int) -> bool:
        stats = first.storage.stats()
        return (stats.objects, stats.object_bytes) == (objects, objects * ON_DISK)

    deadline = time.monotonic() + 10
    while not first_knows(6):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    second.remove(keys_of(0, 1))
    while not first_knows(4):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert first.put(keys_of(7), [0]) == [STORED]


def test_the_accounts_of_a_folder_add_up(tmp_path: Path) -> None:
    """Room, entries and files agree after any sequence of calls."""
    limit = 20 * 4096
    folder = ObjectFolder(str(tmp_path), limit)
    chance = random.Random(3)
    with contextlib.closing(folder):
        while folder.stats().scanned < 1:
            time.sleep(0.001)
        for _ in range(400):
            name = object_name(str(chance.randrange(30)))
            step = chance.random()
            if step < 0.6:
                size = chance.randint(1, 3 * 4096)
                fd, path = folder.create(size)
                os.truncate(fd, size)
                if chance.random() < 0.9:
                    folder.publish(fd, path, name, size)
                else:
                    folder.discard(path, size)
                os.close(fd)
            elif step < 0.8:
                folder.touch(name)
            elif step < 0.9:
                folder.remove(name)
            else:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(folder.path(name))  # another process
            stats = folder.stats()
            files = [file for file in tmp_path.glob("??/*") if file.is_file()]
            used = sum(-(-file.stat().st_size // 4096) * 4096 for file in files)
            assert stats.object_bytes is not None
            assert used <= stats.object_bytes <= limit
            assert folder._room + stats.object_bytes == limit
        folder.clear()
        folder.evict(limit)
        assert folder._room == limit


def test_a_folder_that_cannot_be_made_is_named(backend: str) -> None:
    with pytest.raises(StorageConfigurationError, match="/proc/none"):
        make_end(backend, {"path": "/proc/none", "limit": "1G"})


@pytest.mark.parametrize("fsync", ["never", "always"])
def test_fsync_is_a_setting(make: Make, monkeypatch: pytest.MonkeyPatch, fsync: str) -> None:
    synced = []
    monkeypatch.setattr(os, "fdatasync", synced.append)
    end = make(fsync=fsync)
    assert end.put(keys_of(*range(4)), range(4)) == [STORED] * 4
    assert len(synced) == (4 if fsync == "always" else 0)
    assert NUM_PAGES >= 4
