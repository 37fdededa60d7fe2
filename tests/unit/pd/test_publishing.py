"""KV events of a process: its index, its publisher and a subscriber; no replica, no model."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import numpy as np
import pytest
import zmq
import zmq.asyncio

from hicache.events import block_hash
from hicache.index import PageIndex
from hicache.keys import page_hashes, root_hash
from pd.engine.scheduler import Tracked
from pd.messages import SamplingParams
from pd.publishing import KnownTokens, KvEvents, plan_address, process_number
from pd.spec import CacheEventsSpec, ClusterSpec, SpecError
from transfer.layout import LayerGroup

PAGE_TOKENS = 2
ROOT = root_hash("model")
PROMPT = list(range(10, 20))


# As vLLM declares them, with all that a reader need not know left to defaults.
class ReaderStored(msgspec.Struct, array_like=True, omit_defaults=True, tag="BlockStored"):
    block_hashes: list[int | bytes]
    parent_block_hash: int | bytes | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    medium: str | None
    lora_name: str | None = None


class ReaderRemoved(msgspec.Struct, array_like=True, omit_defaults=True, tag="BlockRemoved"):
    block_hashes: list[int | bytes]
    medium: str | None


class ReaderCleared(msgspec.Struct, array_like=True, tag="AllBlocksCleared"):
    pass


class ReaderBatch(msgspec.Struct, array_like=True, omit_defaults=True):
    ts: float
    events: list[ReaderStored | ReaderRemoved | ReaderCleared]
    data_parallel_rank: int | None = None


def make_index(pages: int = 20) -> PageIndex:
    group = LayerGroup("full", (0,), kv_heads=1, head_dim=4)
    return PageIndex([group], [pages], PAGE_TOKENS, feed=True)


def make_sequence(root: bytes = ROOT) -> Tracked:
    hashes = page_hashes(PROMPT, PAGE_TOKENS, root)
    prompt = np.array(PROMPT, np.int32)
    return Tracked(prompt, SamplingParams(4), root, hashes, 1, 0.0)


def insert(index: PageIndex, sequence: Tracked, begin: int, end: int) -> None:
    slots = index.allocate(0, end - begin)
    assert slots is not None
    parent = sequence.hashes[begin - 1] if begin else sequence.root
    index.insert(parent, sequence.hashes[begin:end], [slots], begin)
    index.release(0, slots)


def parse(**events: Any) -> CacheEventsSpec:
    return CacheEventsSpec.model_validate({"publish": "tcp://127.0.0.1:*", **events})


def test_a_subscriber_hears_what_enters_and_leaves() -> None:
    async def scenario() -> None:
        index, known = make_index(), KnownTokens(PAGE_TOKENS, ROOT)
        events = KvEvents(
            parse(topic="kv", replay="tcp://127.0.0.1:0"),
            0,
            PAGE_TOKENS,
            "device",
            known.content_of,
        )
        context = zmq.asyncio.Context()
        subscriber = context.socket(zmq.SUB)
        subscriber.connect(events.facts["events"])
        subscriber.subscribe("kv")
        replay = context.socket(zmq.DEALER)
        replay.connect(events.facts["replay"])
        while not await subscriber.poll(20):  # what is published to nobody is lost
            events._publisher._publish.send_multipart([b"kv", b"", b"ready?"])
        await asyncio.sleep(0.1)
        while await subscriber.poll(0):
            await subscriber.recv_multipart()

        async def receive() -> ReaderBatch:
            topic, _, payload = await asyncio.wait_for(subscriber.recv_multipart(), 10)
            assert topic == b"kv"
            return msgspec.msgpack.decode(payload, type=ReaderBatch)

        sequence = make_sequence()
        hashes = [block_hash(page) for page in sequence.hashes]
        insert(index, sequence, 0, 2)
        known.stored(sequence, 0, 2)
        events.publish(index.take_changes(), 1.5)
        known.forget()
        # Who subscribes late asks for what it missed.
        await replay.send((0).to_bytes(8, "big"))
        _, payload = await asyncio.wait_for(replay.recv_multipart(), 10)
        first = msgspec.msgpack.decode(payload, type=ReaderBatch)
        assert first.ts == 1.5
        assert first.events == [
            ReaderStored(hashes[:2], None, PROMPT[:4], PAGE_TOKENS, None, "GPU")
        ]
        assert (await asyncio.wait_for(replay.recv_multipart(), 10))[1] == b""

        insert(index, sequence, 2, 4)
        known.stored(sequence, 0, 5)
        events.publish(index.take_changes(), 2.0)
        known.forget()
        events.publish(index.take_changes(), 2.5)  # nothing
        insert(index, sequence, 4, 5)
        events.publish(index.take_changes(), 3.0)  # nobody said whose it was
        insert(index, make_sequence(root_hash("model", "salt")), 0, 5)
        known.stored(make_sequence(root_hash("model", "salt")), 0, 5)
        events.publish(index.take_changes(), 3.5)
        index.clear()
        events.publish(index.take_changes(), 4.0)
        assert (await receive()).ts == 1.5
        heard = [await receive() for _ in range(3)]
        assert [(batch.ts, batch.events) for batch in heard] == [
            (2.0, [ReaderStored(hashes[2:4], hashes[1], PROMPT[4:8], PAGE_TOKENS, None, "GPU")]),
            (3.0, [ReaderStored(hashes[4:], hashes[3], [], PAGE_TOKENS, None, "GPU")]),
            (4.0, [ReaderCleared()]),
        ]
        await events.close()
        context.destroy(linger=0)

    asyncio.run(scenario())


def test_a_keeper_publishes_hashes_alone() -> None:
    async def scenario() -> None:
        index = make_index()
        events = KvEvents(parse(replay="tcp://127.0.0.1:*", buffer=1), 3, PAGE_TOKENS, "host")
        sequence = make_sequence()
        insert(index, sequence, 0, 5)
        events.publish(index.take_changes(), 1.0)
        (_, payload), _ = events._publisher.log.replay(0)
        (event,) = msgspec.msgpack.decode(payload, type=ReaderBatch).events
        hashes = [block_hash(page) for page in sequence.hashes]
        assert event == ReaderStored(hashes, None, [], PAGE_TOKENS, None, "CPU")
        await events.close()

    asyncio.run(scenario())


def test_numbers_and_ports() -> None:
    roles = {"prefill": {"replicas": {"min": 1, "max": 3}}, "decode": {"replicas": 2}}
    spec = ClusterSpec.model_validate({"model": {"path": "x"}, "roles": roles})
    names = ["prefill-0", "prefill-2", "decode-0", "decode-1", "cache-0", "cache-1"]
    assert [process_number(spec, name) for name in names] == [0, 2, 4, 5, 7, 8]
    assert plan_address("tcp://127.0.0.1:5557", 4) == "tcp://127.0.0.1:5561"
    assert plan_address("tcp://[::1]:0", 4) == "tcp://[::1]:*"
    assert plan_address("tcp://*:*", 4) == "tcp://*:*"


def test_an_address_in_use_is_named() -> None:
    async def scenario() -> None:
        first = KvEvents(parse(), 0, PAGE_TOKENS, "device")
        host, _, port = first.facts["events"].rpartition(":")
        spec = parse(publish=f"{host}:{int(port) - 1}")
        with pytest.raises(SpecError, match=rf"cache.events: cannot listen on {host}:{port}: "):
            KvEvents(spec, 1, PAGE_TOKENS, "device")
        await first.close()

    asyncio.run(scenario())
