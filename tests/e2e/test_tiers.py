"""The served path with a host tier and storage behind it, on real parts: tokens stay exact and
bytes the same with every tier cold, warm, evicting and failing."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from node_world import DEADLINE_S, cluster, collect, tokens_of, wait_until
from reference_model import ReferenceModel
from storage_world import running_master

from hicache.index import PageIndex
from pd.messages import SamplingParams
from pd.node import Node
from pd.spec import ClusterSpec

PAGE = 8
WRITES = ("write_through", "write_through_selective", "write_back")
NUM_CONVERSATIONS, NUM_TURNS = 6, 3
GREEDY = SamplingParams(max_tokens=12, temperature=0.0)


def make_spec(folder: Path, pages: int = 40, device: str = "cpu", **cache: Any) -> ClusterSpec:
    """Replicas that hold one or two of the conversations; the host tier holds all."""
    role = {"device": device, "pool": {"pages": pages}, "max_batch_tokens": 24, "max_running": 4}
    return ClusterSpec.model_validate(
        {
            "model": {"path": str(folder), "dtype": "float32", "max_context": 250},
            "page_tokens": PAGE,
            "roles": {"prefill": role, "decode": role},
            "transfer": {"backend": "ipc" if device == "cuda" else "shm"},
            "router": {"local_prefill_tokens": 0},
            "cache": {"host": {"memory": "64MiB"}, "load": "always", **cache},
        }
    )


def make_conversations(vocab_size: int) -> list[list[int]]:
    """Two that begin alike, four that do not."""
    rng = np.random.default_rng(3)
    prompts = [rng.integers(0, vocab_size, 30 + 7 * i).tolist() for i in range(NUM_CONVERSATIONS)]
    prompts[1] = prompts[0][:25] + prompts[1]
    return prompts


async def converse(nodes: list[Node], reference: ReferenceModel) -> dict[str, int]:
    """All conversations, turn by turn; every token is checked. Cached tokens by where they came
    from."""
    found = {"any": 0, "host": 0, "storage": 0}
    rng = np.random.default_rng(4)
    prompts = make_conversations(reference.vocab_size)
    for _ in range(NUM_TURNS):
        answers = await asyncio.gather(*(collect(nodes[0], prompt, GREEDY) for prompt in prompts))
        for prompt, outputs in zip(prompts, answers, strict=True):
            stats = outputs[-1].stats
            assert stats is not None, outputs[-1].error
            tokens = tokens_of(outputs)
            assert tokens == reference.generate(prompt, GREEDY.max_tokens)
            found["any"] += stats.cached_tokens_prefill
            found["host"] += stats.cached_tokens_host
            found["storage"] += stats.cached_tokens_storage
            prompt += tokens + rng.integers(0, reference.vocab_size, 9).tolist()
    await wait_until(lambda: all(node.check().get("idle", True) for node in nodes[1:]))
    return found


def resident_bytes(index: PageIndex, pools: list[np.ndarray]) -> dict[tuple[int, bytes], bytes]:
    """By group and hash, the content of every page that an index has."""
    found = {}
    for page_hash, run in index._runs.items():
        for group, pool in enumerate(pools):
            slot = run.slots[group][run.hashes.index(page_hash)]
            if slot >= 0:
                found[group, page_hash] = pool[slot].tobytes()
    return found


def device_bytes(node: Any) -> dict[tuple[int, bytes], bytes]:
    pools = [
        pool.data.cpu().numpy().view(np.uint8).reshape(len(pool.data), -1)
        for pool in node._worker.runner.pools
    ]
    return resident_bytes(node.leader.index, pools)


def host_bytes(node: Any) -> dict[tuple[int, bytes], bytes]:
    pools = [
        np.frombuffer(pool.buffer, np.uint8, pool.num_pages * pool.page_bytes).reshape(
            pool.num_pages, -1
        )
        for pool in node._pools.pools
    ]
    return resident_bytes(node._keeper.index, pools)


def assert_same(one: dict[tuple[int, bytes], bytes], other: dict[tuple[int, bytes], bytes]) -> None:
    common = one.keys() & other.keys()
    assert common
    assert all(one[key] == other[key] for key in common)


@pytest.fixture(params=["file", "nixl", "mooncake"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[dict[str, Any]]:
    """Of a spec; it outlives the keepers that use it."""
    folder = tmp_path / "store"
    folder.mkdir()
    options = {"path": str(folder), "limit": "1GiB"}
    with contextlib.ExitStack() as stack:
        if request.param == "mooncake":
            pytest.importorskip("mooncake.store")
            master = stack.enter_context(running_master(tmp_path / "master.log"))
            options = {"master": master, "segment": "64M"}
        yield {"backend": request.param, "options": options, "prefetch": "wait_complete"}


async def prefill(nodes: list[Node], reference: ReferenceModel) -> int:
    """Prompts of their own, one after the other, that are not decoded: each page is computed once.
    Cached tokens that storage brought."""
    params = SamplingParams(max_tokens=1, temperature=0.0)
    found = 0
    for seed, length in enumerate((30, 65, 104, 140, 199)):
        prompt = np.random.default_rng(seed).integers(0, reference.vocab_size, length).tolist()
        outputs = await collect(nodes[0], prompt, params)
        assert tokens_of(outputs) == reference.generate(prompt, 1)
        assert outputs[-1].stats is not None
        found += outputs[-1].stats.cached_tokens_storage
    await wait_until(lambda: all(node.check().get("idle", True) for node in nodes[1:]))
    return found


@pytest.mark.parametrize("family", ["gemma3_text", "qwen3"])
def test_bytes_go_through_every_tier_and_back(
    storage: dict[str, Any],
    family: str,
    tiny_folder: Callable[[str], Path],
    reference: Callable[[str], ReferenceModel],
    tmp_path: Path,
) -> None:
    """Device to host to storage; to the host of a second cluster, and to its device."""

    async def run() -> None:
        spec = make_spec(tiny_folder(family), storage=storage)
        async with contextlib.AsyncExitStack() as stack:
            first = await stack.enter_async_context(cluster(spec, str(tmp_path)))
            await prefill(first, reference(family))
            before = host_bytes(first[3])
            assert_same(device_bytes(first[1]), before)
            if storage["backend"] != "mooncake":  # whose objects lie in the memory of its clients
                await stack.aclose()
            async with cluster(spec, str(tmp_path)) as second:
                assert await prefill(second, reference(family)) > 0
                after = host_bytes(second[3])
                assert_same(after, before)
                assert_same(device_bytes(second[1]), after)

    asyncio.run(run())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("family", ["gemma3_text", "qwen3"])
def test_on_a_gpu(
    family: str,
    tiny_folder: Callable[[str], Path],
    reference: Callable[[str], ReferenceModel],
    tmp_path: Path,
) -> None:
    """Bytes and tokens, with storage in files."""
    folder = tmp_path / "store"
    folder.mkdir()
    storage = {"backend": "file", "options": {"path": str(folder), "limit": "1GiB"}}

    async def run() -> None:
        spec = make_spec(tiny_folder(family), device="cuda", storage=storage)
        async with cluster(spec, str(tmp_path)) as nodes:
            await prefill(nodes, reference(family))
            assert_same(device_bytes(nodes[1]), host_bytes(nodes[3]))
            assert (await converse(nodes, reference(family)))["host"] > 0
        async with cluster(spec, str(tmp_path)) as nodes:
            assert await prefill(nodes, reference(family)) > 0
            assert_same(device_bytes(nodes[1]), host_bytes(nodes[3]))

    asyncio.run(run())


def test_conversations_over_storage(
    storage: dict[str, Any],
    tiny_folder: Callable[[str], Path],
    reference: Callable[[str], ReferenceModel],
    tmp_path: Path,
) -> None:
    async def run() -> None:
        spec = make_spec(tiny_folder("gemma3_text"), storage=storage)
        for _ in range(2):
            async with cluster(spec, str(tmp_path)) as nodes:
                found = await converse(nodes, reference("gemma3_text"))
                assert found["host"] > 0
        if storage["backend"] != "mooncake":
            assert found["storage"] > 0

    asyncio.run(run())


@pytest.mark.parametrize(
    ("family", "write"),
    [
        each if number in (0, 4, 8) else pytest.param(*each, marks=pytest.mark.long)
        for number, each in enumerate(itertools.product(("qwen3", "mistral", "gpt_oss"), WRITES))
    ],
)
def test_every_write_policy(
    family: str,
    write: str,
    tiny_folder: Callable[[str], Path],
    reference: Callable[[str], ReferenceModel],
    tmp_path: Path,
) -> None:
    async def run() -> None:
        spec = make_spec(tiny_folder(family), host={"memory": "16MiB", "write": write})
        async with cluster(spec, str(tmp_path)) as nodes:
            first = await converse(nodes, reference(family))
            again = await converse(nodes, reference(family))
            assert first["host"] + again["host"] > 0
            assert again["any"] >= first["any"]

    asyncio.run(run())


def test_a_host_tier_that_evicts(
    tiny_folder: Callable[[str], Path], reference: Callable[[str], ReferenceModel], tmp_path: Path
) -> None:
    """It has room for a few pages more than a request."""

    async def run() -> None:
        folder = tiny_folder("gemma3_text")
        spec = make_spec(folder, host={"memory": "256KiB"})
        async with cluster(spec, str(tmp_path)) as nodes:
            await converse(nodes, reference("gemma3_text"))
            assert nodes[3]._keeper.index.evictions > 0  # type: ignore[attr-defined]

    asyncio.run(run())


def test_a_storage_that_goes_away(
    tiny_folder: Callable[[str], Path], reference: Callable[[str], ReferenceModel], tmp_path: Path
) -> None:
    """Its folder is removed, and made unusable, between two rounds."""
    folder = tmp_path / "store"
    folder.mkdir()
    storage = {"backend": "file", "options": {"path": str(folder), "limit": "1GiB"}}

    async def run() -> None:
        spec = make_spec(tiny_folder("qwen3"), storage=storage)
        async with cluster(spec, str(tmp_path)) as nodes:
            await converse(nodes, reference("qwen3"))
            shutil.rmtree(folder)
            folder.write_text("not a folder")
            nodes[3]._keeper.index.clear()  # type: ignore[attr-defined]
            await converse(nodes, reference("qwen3"))

    asyncio.run(run())


def test_a_request_that_is_preempted_goes_on_from_the_host_tier(
    tiny_folder: Callable[[str], Path], reference: Callable[[str], ReferenceModel], tmp_path: Path
) -> None:
    """Four that grow beyond the decode pool: their pages come back, but for a few tokens each."""
    model = reference("qwen3")
    rng = np.random.default_rng(5)
    prompts = [rng.integers(0, model.vocab_size, 40).tolist() for _ in range(4)]
    params = SamplingParams(max_tokens=120, temperature=0.0)

    async def run() -> None:
        spec = make_spec(tiny_folder("qwen3"), pages=42)
        async with cluster(spec, str(tmp_path)) as nodes:
            answers = await asyncio.gather(*(collect(nodes[0], p, params) for p in prompts))
            for prompt, outputs in zip(prompts, answers, strict=True):
                assert tokens_of(outputs) == model.generate(prompt, params.max_tokens)
            load = nodes[2].leader.load()  # type: ignore[attr-defined]
            assert load.preemptions > 0
            assert load.host_pages_in > 0

    asyncio.run(run())


def test_the_keeper_is_killed_and_another_one_comes(
    tiny_folder: Callable[[str], Path], reference: Callable[[str], ReferenceModel], tmp_path: Path
) -> None:
    """Requests go on without it, and with the next one."""
    model = reference("gemma3_text")

    async def run() -> None:
        spec = make_spec(tiny_folder("gemma3_text"))
        async with cluster(spec, str(tmp_path)) as nodes:
            await converse(nodes, model)
            keeper, others = nodes[3], nodes[:3]
            members = list((others[0]._members | others[1]._members).values())
            rest = [member for member in members if member.role != "cache"]
            for node in others:
                node.set_members(rest, "killed")
            await asyncio.wait_for(keeper.stop(), DEADLINE_S)
            assert (await converse(others, model))["host"] == 0
            new = type(keeper)(keeper.config)
            members = [*rest, await asyncio.wait_for(new.start(), DEADLINE_S)]
            try:
                for node in (new, *others):
                    node.set_members(members)
                await wait_until(lambda: others[1].leader._caching.keeper != "")  # type: ignore[attr-defined]
                await converse([*others, new], model)
                assert (await converse([*others, new], model))["host"] > 0
            finally:
                await asyncio.wait_for(new.stop(), DEADLINE_S)

    asyncio.run(run())
