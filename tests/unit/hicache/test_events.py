"""KV events as a router reads them: with structs written after vLLM's, and over real sockets."""

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import pytest
import zmq
import zmq.asyncio

from hicache.events import (
    MEDIA,
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    Content,
    EventLog,
    EventPublisher,
    block_events,
    block_hash,
)
from hicache.index import Cleared, PageIndex, Removed, Stored
from hicache.keys import page_hashes, root_hash
from transfer.layout import LayerGroup

PAGE_TOKENS = 2
ROOT = root_hash("model")
TOKENS = [5, 6, 7, 8, 70_000, 0]
HASHES = tuple(page_hashes(TOKENS, PAGE_TOKENS, ROOT))


# What vLLM's own subscriber example declares.
class ReaderEvent(msgspec.Struct, array_like=True, omit_defaults=True, gc=False, tag=True):
    pass


class ReaderStored(ReaderEvent, tag="BlockStored"):
    block_hashes: list[int | bytes]
    parent_block_hash: int | bytes | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    medium: str | None
    lora_name: str | None = None


class ReaderRemoved(ReaderEvent, tag="BlockRemoved"):
    block_hashes: list[int | bytes]
    medium: str | None


class ReaderCleared(ReaderEvent, tag="AllBlocksCleared"):
    pass


class ReaderBatch(msgspec.Struct, array_like=True, omit_defaults=True, gc=False):
    ts: float
    events: list[ReaderStored | ReaderRemoved | ReaderCleared]
    data_parallel_rank: int | None = None


# SGLang before it had media.
class OldStored(ReaderEvent, tag="BlockStored"):
    block_hashes: list[int]
    parent_block_hash: int | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None


class OldBatch(msgspec.Struct, array_like=True, omit_defaults=True, gc=False):
    ts: float
    events: list[OldStored]


def stored(first_page: int = 0, count: int = 3) -> Stored:
    parent = HASHES[first_page - 1] if first_page else ROOT
    return Stored(parent, HASHES[first_page : first_page + count], first_page)


def content_of(change: Stored) -> Content:
    begin = change.first_page * PAGE_TOKENS
    return Content(TOKENS[begin : begin + len(change.hashes) * PAGE_TOKENS], "french")


def some_events(number: int) -> list[Any]:
    return [BlockRemoved(block_hashes=[number], medium="GPU")]


def test_a_hash_is_cut_as_vllm_cuts_its_own():
    for page_hash in HASHES:
        assert block_hash(page_hash) == int.from_bytes(page_hash, "big") & ((1 << 64) - 1)
    assert block_hash(b"\0" * 24 + b"\xff" * 8) == 2**64 - 1


def test_changes_become_events():
    removed = Removed(HASHES[1:])
    changes = [stored(1, 1), removed, Cleared(), stored(0, 2)]
    events = block_events(changes, content_of, PAGE_TOKENS, MEDIA["host"])
    hashes = [block_hash(page) for page in HASHES]
    assert events == [
        BlockStored([hashes[1]], hashes[0], [7, 8], 2, None, "CPU", "french"),
        BlockRemoved(hashes[1:], "CPU"),
        AllBlocksCleared(),
        BlockStored(hashes[:2], None, [5, 6, 7, 8], 2, None, "CPU", "french"),
    ]


def test_what_routers_should_not_know_is_left_out():
    assert block_events([stored()], lambda change: None, PAGE_TOKENS, "GPU") == []


def test_tokens_of_other_pages_are_refused():
    with pytest.raises(ValueError, match="3 tokens for 2 pages of 2"):
        block_events([stored(0, 2)], lambda change: Content([1, 2, 3]), PAGE_TOKENS, "GPU")


def test_a_batch_is_read_by_the_structs_of_vllm_and_of_older_readers():
    log = EventLog(topic="kv@pod@model")
    events = block_events([stored()], content_of, PAGE_TOKENS, "GPU")
    topic, sequence, payload = log.add([*events, *some_events(9), AllBlocksCleared()], 12.5)
    assert (topic, sequence) == (b"kv@pod@model", bytes(8))
    batch = msgspec.msgpack.decode(payload, type=ReaderBatch)
    assert (batch.ts, batch.data_parallel_rank) == (12.5, 0)
    hashes = [int.from_bytes(page[24:], "big") for page in HASHES]
    assert batch.events == [
        ReaderStored(hashes, None, TOKENS, 2, None, "GPU", "french"),
        ReaderRemoved([9], "GPU"),
        ReaderCleared(),
    ]
    payload = log.add(events, 12.5)[2]
    assert msgspec.msgpack.decode(payload, type=OldBatch).events == [
        OldStored(hashes, None, TOKENS, 2, None)
    ]


def test_positions_and_the_rank_are_always_there():
    # Dynamo wants three fields of a batch, AIBrix a number as the third; llm-d eight of an event.
    payload = EventLog().add(
        [BlockStored([1], None, [2, 3], 2, None, "GPU", None), AllBlocksCleared()], 1.0
    )[2]
    assert msgspec.msgpack.decode(payload) == [
        1.0,
        [["BlockStored", [1], None, [2, 3], 2, None, "GPU", None], ["AllBlocksCleared"]],
        0,
    ]


def numbers_of(replay: list[tuple[bytes, bytes]]) -> list[int]:
    assert replay[-1] == (b"\xff" * 8, b"")
    return [int.from_bytes(sequence, "big") for sequence, _ in replay[:-1]]


def test_a_log_keeps_the_last_batches():
    log = EventLog(max_batches=3)
    assert numbers_of(log.replay(0)) == []
    for number in range(5):
        assert log.add(some_events(number), 0.0)[1] == number.to_bytes(8, "big")
    assert numbers_of(log.replay(3)) == [3, 4]
    assert numbers_of(log.replay(5)) == []
    assert numbers_of(log.replay(2**64 - 1)) == []
    assert log.asked_too_late == 0
    assert numbers_of(log.replay(0)) == [2, 3, 4]
    assert log.asked_too_late == 2


def test_a_log_keeps_so_many_bytes():
    size = len(EventLog().add(some_events(1), 0.0)[2])
    log = EventLog(max_bytes=3 * size)
    for _ in range(9):
        log.add(some_events(1), 0.0)
    assert numbers_of(log.replay(0)) == [6, 7, 8]


# ------------------------------------------------------------------------------- over real sockets


class Reader:
    """What a router has: a subscription and a replay socket."""

    def __init__(
        self, context: zmq.asyncio.Context, publisher: EventPublisher, max_queued: int = 1000
    ) -> None:
        self.sub = context.socket(zmq.SUB)
        self.sub.setsockopt(zmq.RCVHWM, max_queued)
        self.sub.connect(publisher.address)
        self.sub.subscribe(b"")
        self.dealer = context.socket(zmq.DEALER)
        self.dealer.connect(publisher.replay_address)

    def close(self) -> None:
        self.sub.close(linger=0)
        self.dealer.close(linger=0)

    async def receive(self) -> tuple[int, ReaderBatch]:
        _, sequence, payload = await asyncio.wait_for(self.sub.recv_multipart(), 10)
        batch = msgspec.msgpack.decode(payload, type=ReaderBatch)
        return int.from_bytes(sequence, "big"), batch

    async def replay(self, start: int, delimiter: tuple[bytes, ...] = (b"",)) -> list[int]:
        await self.dealer.send_multipart([*delimiter, start.to_bytes(8, "big")])
        numbers = []
        while True:
            frames = await asyncio.wait_for(self.dealer.recv_multipart(), 10)
            assert tuple(frames[:-2]) == delimiter
            if not frames[-1]:
                return numbers
            msgspec.msgpack.decode(frames[-1], type=ReaderBatch)
            numbers.append(int.from_bytes(frames[-2], "big"))


class Setup:
    """A publisher, and readers that have joined."""

    def __init__(self, log: EventLog) -> None:
        self.publisher = EventPublisher(log, "tcp://127.0.0.1:*", "tcp://127.0.0.1:*", max_queued=5)
        self.context = zmq.asyncio.Context()
        self.readers: list[Reader] = []

    async def join(self, max_queued: int = 1000) -> Reader:
        """Publish until the subscription has arrived."""
        reader = Reader(self.context, self.publisher, max_queued)
        self.readers.append(reader)
        while not await reader.sub.poll(10):
            self.publisher.publish(some_events(0), 0.0)
        return reader

    async def skip(self, reader: Reader) -> None:
        """Leave nothing to read."""
        while (await reader.receive())[0] < self.publisher.log.batches - 1:
            pass

    async def run(self, work: Callable[["Setup"], Awaitable[None]]) -> None:
        serving = asyncio.create_task(self.publisher.serve_replays())
        try:
            await work(self)
        finally:
            serving.cancel()
            await asyncio.gather(serving, return_exceptions=True)
            for reader in self.readers:
                reader.close()
            self.context.term()
            self.publisher.close()


def run(log: EventLog, work: Callable[[Setup], Awaitable[None]]) -> None:
    async def main() -> None:
        await Setup(log).run(work)

    asyncio.run(main())


def test_a_subscriber_gets_what_is_published_and_what_it_asks_for():
    async def work(setup: Setup) -> None:
        publisher = setup.publisher
        reader = await setup.join()
        await setup.skip(reader)
        publisher.publish([], 1.0)
        first = publisher.log.batches
        for number in range(200):
            publisher.publish(some_events(number), 2.0)
            sequence, batch = await reader.receive()
            assert (sequence, batch.ts) == (first + number, 2.0)
            assert batch.events == [ReaderRemoved([number], "GPU")]
        assert await reader.replay(first) == list(range(first, first + 200))
        assert await reader.replay(first + 198, delimiter=()) == [first + 198, first + 199]
        assert await reader.replay(first + 200) == []
        await reader.dealer.send_multipart([b"", b"short"])
        await reader.dealer.send_multipart([b"a", b"b", bytes(8)])
        assert await reader.replay(first + 199) == [first + 199]
        assert publisher.bad_requests == 2
        assert (publisher.overruns, publisher.replays_cut) == (0, 0)

    run(EventLog(), work)


LARGE: list[Any] = [BlockRemoved(block_hashes=[2**63] * 30_000, medium="GPU")]


def test_a_slow_subscriber_sees_a_gap_and_holds_up_nobody():
    async def work(setup: Setup) -> None:
        publisher = setup.publisher
        slow = await setup.join(max_queued=5)
        quick = await setup.join()
        await setup.skip(quick)

        async def publish() -> None:
            publisher.publish(LARGE, 0.0)
            assert (await quick.receive())[0] == publisher.log.batches - 1

        while not publisher.overruns:
            await publish()
        for _ in range(20):
            await publish()
        seen = []
        while await slow.sub.poll(100):
            seen.append((await slow.receive())[0])
        await publish()
        seen.append((await slow.receive())[0])
        gap = next(i for i in range(1, len(seen)) if seen[i] > seen[i - 1] + 1)
        missed = await slow.replay(seen[gap - 1] + 1)
        assert missed == list(range(seen[gap - 1] + 1, publisher.log.batches))

    run(EventLog(max_bytes=1 << 30), work)


def test_a_client_that_does_not_read_its_replay_does_not_fill_the_memory():
    async def work(setup: Setup) -> None:
        reader = await setup.join()
        for _ in range(20):
            setup.publisher.publish(LARGE, 0.0)
        while not setup.publisher.replays_cut:
            await reader.dealer.send_multipart([b"", bytes(8)])
            await asyncio.sleep(0)

    run(EventLog(max_batches=20), work)


def test_an_address_in_use_is_an_error():
    publisher = EventPublisher(EventLog(), "tcp://127.0.0.1:*")
    with pytest.raises(zmq.ZMQError, match="in use"):
        EventPublisher(EventLog(), publisher.address)
    publisher.close()


def test_a_reader_that_follows_the_events_has_the_index():
    """Random work on an index; a reader that loses batches and asks for them again."""
    rng = random.Random(1)
    index = PageIndex([LayerGroup("full", (0,), 1, 8)], [13], PAGE_TOKENS, feed=True)
    log = EventLog()
    tokens_of: dict[bytes, list[int]] = {}

    def content(change: Stored) -> Content:
        return Content([token for page in change.hashes for token in tokens_of[page]])

    known: set[int | bytes] = set()
    next_number = 0
    for step in range(500):
        if rng.random() < 0.02:
            index.clear()
        tokens = [rng.randrange(2) for _ in range(rng.randint(1, 6) * PAGE_TOKENS)]
        hashes = page_hashes(tokens, PAGE_TOKENS, ROOT)
        for i, page in enumerate(hashes):
            tokens_of[page] = tokens[i * PAGE_TOKENS : (i + 1) * PAGE_TOKENS]
        (slots,) = index.acquire(hashes[: index.match(hashes)])
        slots += index.allocate(0, len(hashes) - len(slots)) or []
        index.insert(ROOT, hashes, [slots], 0)
        index.release(0, slots)
        log.add(block_events(index.take_changes(), content, PAGE_TOKENS, "GPU"), float(step))
        if rng.random() < 0.3:
            for _, payload in log.replay(next_number)[:-1]:
                for event in msgspec.msgpack.decode(payload, type=ReaderBatch).events:
                    match event:
                        case ReaderStored():
                            assert event.parent_block_hash is None or (
                                event.parent_block_hash in known
                            )
                            known.update(event.block_hashes)
                        case ReaderRemoved():
                            known.difference_update(event.block_hashes)
                        case ReaderCleared():
                            known.clear()
                next_number += 1
            assert known == {block_hash(page) for page in index._runs}
    assert next_number > 400
