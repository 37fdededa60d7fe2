"""What the keeper's process does when storages are changed, fail to start, and when it ends."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from hicache.messages import Copied, Offer
from hicache.storage import backends
from hicache.storage.memory import MemoryStorage
from hicache.storage.storage import StorageError
from pd.cache_node import CacheNode
from pd.messages import AnyMessage, CacheAnswer, CacheCommand
from pd.node import Member, NodeConfig
from pd.spec import ClusterSpec

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "hidden_size": 8,
    "intermediate_size": 8,
    "vocab_size": 16,
    "max_position_embeddings": 64,
}


class World:
    """A keeper that has met a replica. What it sends is kept."""

    def __init__(self, folder: Path, **cache: object) -> None:
        (folder / "config.json").write_text(json.dumps(CONFIG))
        role = {"device": "cpu", "pool": {"pages": 20}}
        spec = ClusterSpec.model_validate(
            {
                "model": {"path": str(folder), "dtype": "float32"},
                "roles": {"prefill": role, "decode": role},
                "cache": {"host": {"memory": "64KiB"}, **cache},
            }
        )
        self.node: Any = CacheNode(NodeConfig("cache-0", "cache", spec, str(folder), ""))
        self.answers: list[CacheAnswer] = []
        self.node.send = self._send

    def _send(self, to: str, message: AnyMessage) -> None:
        if isinstance(message, CacheAnswer):
            self.answers.append(message)

    async def start(self) -> None:
        await self.node.prepare()
        self.node.member_joined(Member("prefill-0", "prefill", 1, "", compat={"model": "x"}))

    def command(self, action: Any, **options: Any) -> None:
        message = CacheCommand(len(self.answers) + 1, action, **options)
        self.node.received("api-0", message)

    async def answer(self) -> str:
        """The next one's error."""
        count = len(self.answers)
        while len(self.answers) == count:
            assert not self.node.failure
            await asyncio.sleep(0.005)
        return self.answers[-1].error

    async def settle(self) -> None:
        """Its loops have had their turns."""
        await asyncio.sleep(0.15)
        assert not self.node.failure


def run(world: World, steps: Callable[[], Awaitable[None]]) -> None:
    async def everything() -> None:
        await world.start()
        await asyncio.wait_for(steps(), 20.0)
        assert not world.node.failure

    try:
        asyncio.run(everything())
    finally:
        world.node._context.term()


def test_a_report_does_not_let_two_changes_overlap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world, gate = World(tmp_path), threading.Event()

    class Slow(MemoryStorage):
        def register(self, regions: Any) -> None:
            gate.wait(10.0)
            super().register(regions)

    monkeypatch.setattr("hicache.storage.memory.MemoryStorage", Slow)

    async def steps() -> None:
        world.command("attach", backend="memory")
        await asyncio.sleep(0)
        world.command("report")
        assert await world.answer() == ""
        world.command("attach", backend="memory")
        assert "another change is under way" in await world.answer()
        gate.set()
        assert await world.answer() == ""
        world.command("detach")
        assert await world.answer() == ""

    run(world, steps)


def test_a_storage_that_cannot_be_made_is_an_answer(tmp_path: Path) -> None:
    world = World(tmp_path)

    async def steps() -> None:
        options = {"path": "/tmp/a\0b", "limit": "1MiB"}
        world.command("attach", backend="file", options=options)
        assert "storage 'file'" in await world.answer()

    run(world, steps)


def test_a_storage_that_does_not_take_the_memory_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world, closed = World(tmp_path), []

    class Choosy(MemoryStorage):
        def register(self, regions: Any) -> None:
            raise StorageError("not this")

        def close(self) -> None:
            closed.append(self)

    monkeypatch.setattr("hicache.storage.memory.MemoryStorage", Choosy)

    async def steps() -> None:
        world.command("attach", backend="memory")
        assert await world.answer() == "not this"
        assert len(closed) == 1

    run(world, steps)


def test_what_comes_while_it_ends_does_no_harm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(
        tmp_path,
        events={"publish": "tcp://127.0.0.1:*"},
        storage={"backend": "memory"},
    )

    class Strict(MemoryStorage):
        is_closed = False

        def close(self) -> None:
            self.is_closed = True

        def _submit(self, *arguments: Any) -> int:
            if self.is_closed:
                raise StorageError("closed")
            return super()._submit(*arguments)

    monkeypatch.setattr("hicache.storage.memory.MemoryStorage", Strict)

    async def steps() -> None:
        assert world.node.heartbeat().cache["event_overruns"] == 0
        await world.node.shut_down()
        hashes = b"".join(bytes([number]) * 32 for number in range(3))
        world.node.received("prefill-0", Offer(1, 1, 0, hashes, (0,)))
        world.node.received("prefill-0", Copied(1, 1, 3))
        await world.settle()
        assert world.node._keeper.stats.copied_pages == 3

    run(world, steps)


def test_the_factory_of_another_may_raise_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    def make(name: str, options: dict[str, str]) -> None:
        raise KeyError("host")

    monkeypatch.setattr(backends, "_factory", lambda backend: make)
    with pytest.raises(StorageError, match="storage 'tape' cannot be made: KeyError: 'host'"):
        backends.make_storage("tape", "name")
