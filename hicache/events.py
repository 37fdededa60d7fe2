"""KV events: what enters and leaves a page index, told to routers in the format of vLLM and SGLang.

Three frames on a PUB socket: topic, sequence number (8 bytes, big-endian, from 0 on), a msgpack
batch [time, events, data-parallel rank]. A client of the ROUTER socket sends a sequence number and
gets the batches from there on that are still kept, as (sequence number, batch), then (-1, empty).
`EventLog` encodes, numbers and keeps batches and is pure; `EventPublisher` owns the sockets.

Read off vllm/distributed/kv_events.py and sglang/srt/disaggregation/kv_events.py as of September
2026 and off their readers (Dynamo lib/kv-router zmq_wire, llm-d-kv-cache vllm_adapter.go, AIBrix
msgpack_decoder.go), none of them at run time:

  events  were arrays in field order with the tag first until vLLM #42892 (0.24) and SGLang #37271,
          and are maps with the tag as `type` since. All three readers take both, older ones and
          others only arrays, so ours are. They have vLLM's positions, of which those after
          `lora_name` are left out.
  batch   an array in both, whose third field Dynamo must find, and AIBrix as a number.
  hash    an unsigned number of 64 bits: the last 8 bytes, big-endian, of our 32, as vLLM cuts its
          own. Whole byte strings would be taken too, but AIBrix keeps the first 8 bytes of them,
          and older readers none.
  medium  GPU, CPU, STORAGE in vLLM; SGLang says CPU_PINNED, and DISK or EXTERNAL. Dynamo knows all.
  topic   llm-d expects kv@<pod>@<model>; the others subscribe to any.

Nothing is lost silently. A subscriber that does not keep up misses batches, sees it by the sequence
numbers and can ask for them; `overruns` counts how often one fell behind. Batches that were asked
for when they were gone are counted by the log. A sliding page that goes alone is no event, so that
a router may take a prefix for present that has to be computed again in part.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import TypeAlias, assert_never

import msgspec
import zmq
import zmq.asyncio

from hicache.index import Change, Cleared, Removed, Stored

MEDIA = {"device": "GPU", "host": "CPU", "storage": "STORAGE"}
"""By tier, as vLLM names them."""

_END = (-1).to_bytes(8, "big", signed=True)
_REPLAY_BURST = 64
"""Batches sent before others get the event loop."""


class BlockStored(
    msgspec.Struct, array_like=True, tag=True, omit_defaults=True, frozen=True, gc=False
):
    block_hashes: list[int]
    parent_block_hash: int | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    """Given up for `lora_name`, but it keeps its place."""
    medium: str | None
    lora_name: str | None


class BlockRemoved(
    msgspec.Struct, array_like=True, tag=True, omit_defaults=True, frozen=True, gc=False
):
    block_hashes: list[int]
    medium: str | None


class AllBlocksCleared(msgspec.Struct, array_like=True, tag=True, frozen=True, gc=False):
    pass


Event: TypeAlias = BlockStored | BlockRemoved | AllBlocksCleared


class EventBatch(msgspec.Struct, array_like=True, frozen=True, gc=False):
    ts: float
    events: list[Event]
    data_parallel_rank: int = 0
    """Each replica is an engine of its own to a router."""


@dataclasses.dataclass(frozen=True, slots=True)
class Content:
    """What pages hold."""

    tokens: Sequence[int]
    """Empty: they are not known here."""
    adapter: str | None = None


def block_hash(page_hash: bytes) -> int:
    return int.from_bytes(page_hash[-8:], "big")


def block_events(
    changes: Iterable[Change],
    content_of: Callable[[Stored], Content | None],
    page_tokens: int,
    medium: str,
) -> list[Event]:
    """The events that tell of an index's changes.

    `content_of` gives the tokens of exactly the pages stored, or none (as vLLM's offloading tells
    of pages in host memory), or None where routers should not know of them: they hash tokens, and
    would send others to pages under a cache salt.
    """
    events: list[Event] = []
    for change in changes:
        match change:
            case Stored():
                content = content_of(change)
                if content is None:
                    continue
                if len(content.tokens) not in (0, len(change.hashes) * page_tokens):
                    raise ValueError(
                        f"{len(content.tokens)} tokens for {len(change.hashes)} pages of "
                        f"{page_tokens}"
                    )
                events.append(
                    BlockStored(
                        block_hashes=[block_hash(page) for page in change.hashes],
                        parent_block_hash=block_hash(change.parent) if change.first_page else None,
                        token_ids=list(content.tokens),
                        block_size=page_tokens,
                        lora_id=None,
                        medium=medium,
                        lora_name=content.adapter,
                    )
                )
            case Removed():
                hashes = [block_hash(page) for page in change.hashes]
                events.append(BlockRemoved(block_hashes=hashes, medium=medium))
            case Cleared():
                events.append(AllBlocksCleared())
            case _:
                assert_never(change)
    return events


class EventLog:
    """Numbers batches and keeps the last ones, for those who missed them."""

    def __init__(
        self,
        topic: str = "",
        max_batches: int = 10_000,
        max_bytes: int = 64 << 20,
    ) -> None:
        self.max_batches = max_batches
        self.batches = 0
        """Added so far; the next one's number."""
        self.asked_too_late = 0
        """Batches that a replay was asked for when they were kept no longer."""
        self._topic = topic.encode()
        self._max_bytes = max_bytes
        self._encoder = msgspec.msgpack.Encoder()
        self._kept: deque[tuple[bytes, bytes]] = deque()
        self._bytes = 0

    def add(self, events: Sequence[Event], now: float) -> tuple[bytes, bytes, bytes]:
        """The frames to publish. `now`: seconds since 1970."""
        payload = self._encoder.encode(EventBatch(now, list(events)))
        sequence = self.batches.to_bytes(8, "big")
        self.batches += 1
        self._kept.append((sequence, payload))
        self._bytes += len(payload)
        while len(self._kept) > self.max_batches or self._bytes > self._max_bytes:
            self._bytes -= len(self._kept.popleft()[1])
        return self._topic, sequence, payload

    def replay(self, start: int) -> list[tuple[bytes, bytes]]:
        """(number, batch) of those from `start` on that are kept, and the end marker."""
        first = self.batches - len(self._kept)
        self.asked_too_late += max(0, first - start)
        kept = list(self._kept)[max(0, start - first) :]
        return [*kept, (_END, b"")]


class EventPublisher:
    """Sends batches to whoever subscribed, and replays those kept. To be used on one event loop's
    thread; no call blocks it. Addresses are bound."""

    def __init__(
        self,
        log: EventLog,
        address: str,
        replay_address: str | None = None,
        max_queued: int = 10_000,
    ) -> None:
        """`max_queued`: batches that wait for each subscriber. Raises zmq.ZMQError when an address
        cannot be bound."""
        self.log = log
        self.overruns = 0
        """Times that a subscriber's queue was full; it misses batches until it has read some."""
        self.replays_cut = 0
        """Replays without an end marker, for their client did not read, or had gone."""
        self.bad_requests = 0
        self._context = zmq.asyncio.Context()
        # Plain: what cannot be queued at once is not awaited.
        plain: zmq.Context[zmq.Socket[bytes]] = zmq.Context.shadow(self._context.underlying)
        self._publish = plain.socket(zmq.PUB)
        self._router = self._context.socket(zmq.ROUTER)
        self._replies: zmq.Socket[bytes] = zmq.Socket.shadow(self._router.underlying)
        try:
            self._publish.setsockopt(zmq.SNDHWM, max_queued)
            self._publish.setsockopt(zmq.XPUB_NODROP, 1)  # say so where one would miss a batch
            self._publish.bind(address)
            self._router.setsockopt(zmq.SNDHWM, log.max_batches + 1)  # one replay of all
            self._router.setsockopt(zmq.ROUTER_MANDATORY, 1)  # refuse, do not drop
            if replay_address is not None:
                self._router.bind(replay_address)
        except zmq.ZMQError:
            self.close()
            raise

    @property
    def address(self) -> str:
        return self._publish.getsockopt_string(zmq.LAST_ENDPOINT)

    @property
    def replay_address(self) -> str:
        return self._replies.getsockopt_string(zmq.LAST_ENDPOINT)

    def publish(self, events: Sequence[Event], now: float) -> None:
        """One batch, unless there are no events. `now`: seconds since 1970."""
        if not events:
            return
        frames = self.log.add(events, now)
        if self._is_sent(frames):
            return
        self._publish.getsockopt(zmq.EVENTS)  # hear what subscribers have read meanwhile
        if self._is_sent(frames):
            return
        self.overruns += 1
        self._publish.setsockopt(zmq.XPUB_NODROP, 0)
        self._publish.send_multipart(frames, zmq.NOBLOCK)  # to all others
        self._publish.setsockopt(zmq.XPUB_NODROP, 1)

    def _is_sent(self, frames: Sequence[bytes]) -> bool:
        try:
            self._publish.send_multipart(frames, zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    async def serve_replays(self) -> None:
        """Answer until cancelled."""
        while True:
            *envelope, start = await self._router.recv_multipart()
            # The client's identity, and an empty frame that REQ adds and DEALER may.
            if len(start) == 8 and envelope[1:] in ([], [b""]):
                await self._replay(envelope, int.from_bytes(start, "big"))
            else:
                self.bad_requests += 1

    async def _replay(self, envelope: list[bytes], start: int) -> None:
        for count, batch in enumerate(self.log.replay(start), 1):
            try:
                self._replies.send_multipart([*envelope, *batch], zmq.NOBLOCK)
            except zmq.ZMQError as error:
                if error.errno not in (zmq.EAGAIN, zmq.EHOSTUNREACH):
                    raise
                self.replays_cut += 1
                return
            if count % _REPLAY_BURST == 0:
                await asyncio.sleep(0)

    def close(self) -> None:
        """After `serve_replays` was cancelled. What has not been sent is dropped."""
        self._publish.close(linger=0)
        self._router.close(linger=0)
        self._context.term()
