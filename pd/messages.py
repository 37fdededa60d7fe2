"""Every message between PageRelay processes, grouped by receiver.

A message travels one way, as two ZMQ frames: a fixed header (magic, protocol version, the sender's
incarnation and the addressee's, the sender's name) and a msgpack body. The version is checked
before the body is decoded; what is addressed to another incarnation is not for this process. Token
ids and page numbers travel as raw little-endian int32, page hashes as 32-byte
digests laid end to end, and as their first 8 bytes where routers are told of them.

Protocol versions:
6  requests have a priority: Generate, Reserve; loads say what waits of each class, and how long
   steps take.
5  leaders tell API processes of their pages: PagesWanted, PagesHeld, PagesChanged.
4  requests have a tenant: Generate, Reserve.
3  a node's keeper: Find, Take, Offer, Copied, Close, Found, Room (hicache/messages.py); how many
   cached tokens came from which tier.
2  the header has the addressee's incarnation; handovers are named by a serial, and every message to
   a sender carries the receiver's floor; Ask, Settled, SettledHeard, Unknown; PagesWritten is
   cumulative.
1  the first.
"""

from __future__ import annotations

import struct
from typing import Literal

import msgspec

from hicache.messages import Close, Copied, Find, Found, Offer, Room, Take
from hicache.messages import Int32Array as Int32Array
from hicache.messages import pack_ints as pack_ints
from hicache.messages import split_hashes as split_hashes
from hicache.messages import unpack_ints as unpack_ints

PROTOCOL_VERSION = 7
PAGE_KEY_BYTES = 8
"""Of a page hash, in what leaders tell of their pages."""
_MAGIC = b"PRLY"
_HEADER = struct.Struct("<4sHQQ")

FinishReason = Literal["stop", "length", "abort", "error"]


class Message(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Base of all messages; encoded as arrays, so fields may only be appended."""


# -------------------------------------------------------------------------------------------- parts


class SamplingParams(msgspec.Struct, frozen=True, array_like=True):
    """How one request's tokens are chosen. The order is: penalties and bias, temperature, top_k,
    top_p, min_p.

    The random number for output position i is a pure function of (seed, i), so a request's tokens
    do not depend on the batch, on the replica, or on a restart.
    """

    max_tokens: int
    temperature: float = 1.0
    """0 means greedy."""
    top_k: int = 0
    """0 means all."""
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    seed: int = 0
    """Unsigned 64 bits; the API draws one where the client gave none."""
    stop_token_ids: tuple[int, ...] = ()
    """The model's end tokens (unless ignore_eos) and the client's."""
    min_tokens: int = 0
    """Stop tokens are masked until so many tokens are out."""
    logprobs: int | None = None
    """None: no logprobs. k: the chosen token's, and those of the k most likely tokens."""


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """Natural-log probabilities under the model's unmodified distribution."""

    logprob: float
    top_ids: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()


class RequestStats(msgspec.Struct, array_like=True):
    """Where one request's time and bytes went; durations in seconds, sent with its last output."""

    queue_s: float = 0.0
    """Waiting for pages and for a place in a batch, on decode and prefill side together."""
    prefill_s: float = 0.0
    """From the first chunk's start to the first token, on the replica that prefilled."""
    transfer_s: float = 0.0
    """Sum over the writes, each from posting to completion; overlaps prefill."""
    transfer_exposed_s: float = 0.0
    """From the first token's arrival at the decode leader until its pages had landed."""
    pages_moved: int = 0
    bytes_moved: int = 0
    descriptors: int = 0
    cached_tokens_decode: int = 0
    cached_tokens_prefill: int = 0
    preemptions: int = 0
    prefill_replica: str = ""
    decode_replica: str = ""
    cached_tokens_host: int = 0
    """Of those that the prefill found cached, how many came from the host tier..."""
    cached_tokens_storage: int = 0
    """... and of these, how many storage had brought there for this request."""

    def cached_by_tier(self) -> dict[str, int]:
        """Prompt tokens that were not computed, by the tier that had them: each counts once, though
        both sides may have had it."""
        total = max(self.cached_tokens_decode, self.cached_tokens_prefill)
        below = min(self.cached_tokens_host, total)
        storage = min(self.cached_tokens_storage, below)
        return {"device": total - below, "host": below - storage, "storage": storage}


class GroupPages(msgspec.Struct, frozen=True, array_like=True):
    """Target pages of one layer group: page i of the sequence goes to `pages[i - first_page]`, a
    slot of the receiver (hicache/index.py)."""

    first_page: int
    pages: bytes


class ReplicaLoad(msgspec.Struct, frozen=True, array_like=True):
    """A leader's gauges and counters (since its start), as they stood when it was sent."""

    waiting: int = 0
    running: int = 0
    handovers_in: int = 0
    handovers_out: int = 0
    waiting_tokens: int = 0
    pages_free: tuple[int, ...] = ()
    pages_cached: tuple[int, ...] = ()
    pages_used: tuple[int, ...] = ()
    """By layer group; free + cached + used is the pool, `pages_used` are referenced by requests."""
    steps: int = 0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    cached_tokens: int = 0
    preemptions: int = 0
    kv_bytes: int = 0
    kv_pages: int = 0
    kv_descriptors: int = 0
    kv_seconds: float = 0.0
    finished: int = 0
    aborted: int = 0
    failed: int = 0
    dropped_messages: int = 0
    pages_quarantined: tuple[int, ...] = ()
    """By layer group, among `pages_used`: of no request any more, but a peer may still write to
    them."""
    handovers_failed: int = 0
    """Received ones that ended early, whose requests went on elsewhere or locally."""
    handovers_overdue: int = 0
    """Whose pages were, or are, in quarantine for longer than `transfer.timeout`."""
    digest_mismatches: int = 0
    """Pages that differed from their source, with `transfer.verify`."""
    fetching: int = 0
    """Among `waiting`: for pages from the host tier or from storage."""
    host_pages_in: int = 0
    """Copied from the host tier..."""
    host_bytes_in: int = 0
    host_seconds_in: float = 0.0
    host_pages_out: int = 0
    """... and to it."""
    host_bytes_out: int = 0
    host_seconds_out: float = 0.0
    host_pages_not_offered: int = 0
    """Because too many were waiting to be copied."""
    pages_evicted: int = 0
    """Over all layer groups."""
    event_overruns: int = 0
    """Of KV events: times that a subscriber fell behind..."""
    events_asked_too_late: int = 0
    """... and batches that were asked for again when they were kept no longer."""
    prefill_tokens_per_s: float = 0.0
    """While prompts are computed, over some of the last steps; 0: unknown."""
    decode_s_per_request: float = 0.0
    """By which another request makes a step longer; 0: unknown."""
    pages_told: int = 0
    """Sequence number of the last `PagesChanged`; 0: it tells nothing of its pages."""
    arrived: int = 0
    """Requests, to be generated or to be prefilled for others."""
    prompt_step_tokens: int = 0
    """Of prompts, in steps that computed some..."""
    prompt_step_s: float = 0.0
    """... and how long these steps took together."""
    decode_steps: int = 0
    """Those without prompts, the tokens that they gave, and how long they took together."""
    decode_step_tokens: int = 0
    decode_step_s: float = 0.0
    waiting_tokens_by_priority: tuple[int, ...] = ()
    """`waiting_tokens`, by class."""


# ------------------------------------------------------------------------- to a leader, from an API


class Generate(Message, frozen=True, tag="generate"):
    request_id: str
    prompt: bytes
    """int32 token ids."""
    root: bytes
    """32 bytes: the parent hash of the first page (model fingerprint, cache salt, adapter)."""
    page_hashes: bytes
    """Hashes of the prompt's full pages."""
    sampling: SamplingParams
    prefill: str
    """Name of the prefill replica; empty: the receiving replica prefills."""
    timeout_s: float
    tenant: str = ""
    """Whose pages these will be in the caches; empty: nobody's."""
    num_delivered: int = 0
    """So many of the prompt's last tokens are output that the client has already."""
    priority: int = 0
    """Class: 0 is served first."""


class Abort(Message, frozen=True, tag="abort"):
    request_id: str


class PagesWanted(Message, frozen=True, tag="pages_wanted"):
    """Tell of all pages in the device tier, and from then on of what changes; answered by
    `PagesHeld` (pd/page_feed.py)."""

    serial: int


# ----------------------------------------------------------------- to a prefill leader, from decode
#
# A handover's `serial` is its name between the two processes; `floor` is the lowest one that the
# receiver has not settled (transfer/handover.py).


class Reserve(Message, frozen=True, tag="reserve"):
    """Pages are reserved on the sender: prefill this prompt and write its KV there."""

    serial: int
    floor: int
    request_id: str
    prompt: bytes
    root: bytes
    page_hashes: bytes
    sampling: SamplingParams
    targets: tuple[GroupPages, ...]
    """By layer group; pages before `first_page` are already there (or outside the last window)."""
    timeout_s: float
    verify: bool = False
    """Digests of the pages are wanted with the last `PagesWritten`."""
    tenant: str = ""
    num_delivered: int = 0
    priority: int = 0


class Ask(Message, frozen=True, tag="ask"):
    """How does it stand? Answered by all that was said before, or by `Unknown`."""

    serial: int
    floor: int


class Cancel(Message, frozen=True, tag="cancel"):
    """Stop writing; answered by the last word once no write is in flight."""

    serial: int
    floor: int


class Settled(Message, frozen=True, tag="settled"):
    """Forget everything below; answered by `SettledHeard`."""

    floor: int


# ----------------------------------------------------------------- to a decode leader, from prefill


class PrefillDone(Message, frozen=True, tag="prefill_done"):
    serial: int
    request_id: str
    token: int
    logprob: TokenLogprob | None
    cached_tokens: int
    queue_s: float
    prefill_s: float
    host_tokens: int = 0
    """Of `cached_tokens`: from the host tier, ..."""
    storage_tokens: int = 0
    """... and of these, brought there from storage."""


class PagesWritten(Message, frozen=True, tag="pages_written"):
    """By layer group, the first `landed` target pages have landed. `complete` is the last word: all
    of them have, and no write is in flight."""

    serial: int
    landed: tuple[int, ...]
    complete: bool = False
    pages: int = 0
    bytes_moved: int = 0
    descriptors: int = 0
    transfer_s: float = 0.0
    digests: tuple[bytes, ...] = ()
    """With `complete`, if `Reserve` asked for them: a uint64 per page, by layer group."""


class HandoverClosed(Message, frozen=True, tag="handover_closed"):
    """The last word: the handover ended early; no write is in flight and none will follow."""

    serial: int
    landed: tuple[int, ...]
    reason: str


class Unknown(Message, frozen=True, tag="unknown"):
    """No `Reserve` with this serial has come."""

    serial: int


class SettledHeard(Message, frozen=True, tag="settled_heard"):
    floor: int


# ------------------------------------------------------------------------- to an API, from a leader


class Output(msgspec.Struct, frozen=True, array_like=True):
    """New tokens of one request; the last one has a finish reason and statistics."""

    request_id: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    error: str = ""
    stats: RequestStats | None = None
    position: int = 0
    """Of the first token in the request's output: a gap shows that a message was lost."""


class Outputs(Message, frozen=True, tag="outputs"):
    """What one step gave, for the requests of one API process."""

    outputs: tuple[Output, ...]


class PagesHeld(Message, frozen=True, tag="pages_held"):
    """A part of all pages, as they were after the change `sequence`."""

    serial: int
    """Of what it answers."""
    sequence: int
    part: int
    """0, 1, ..."""
    is_last: bool
    pages: bytes
    """First bytes of their hashes, in no order."""


class PagesChanged(Message, frozen=True, tag="pages_changed"):
    sequence: int
    """One more than that of the change before."""
    stored: bytes
    removed: bytes


# --------------------------------------------------------------------------------------- to anybody


class Heartbeat(Message, frozen=True, tag="heartbeat"):
    load: ReplicaLoad | None = None
    cache: dict[str, float] = {}
    """A keeper's gauges and counters, by name."""


# ------------------------------------------------------------------------- between API processes


class ApiFigures(Message, frozen=True, tag="api_figures"):
    """So that any of those that listen at one address answers for all."""

    in_flight: int
    metrics: str
    """Its own, as Prometheus reads them."""


# ---------------------------------------------------------------- between API processes and keepers


class CacheCommand(Message, frozen=True, tag="cache_command"):
    """Answered by one `CacheAnswer`."""

    serial: int
    action: Literal["report", "clear", "attach", "detach", "clear_storage"]
    tenant: str = ""
    """clear: only this one's pages; empty: all."""
    backend: str = ""
    """attach: which storage, ..."""
    options: dict[str, str] = {}
    """... and its options."""


class CacheAnswer(Message, frozen=True, tag="cache_answer"):
    serial: int
    error: str
    """Empty: it was done."""
    report: bytes = b""
    """JSON."""


# ----------------------------------------------------------------------------------------- of ranks


class RankOrder(Message, frozen=True, tag="rank_order"):
    """A leader to another rank of its replica."""

    effect: bytes
    """pd/rank.py encodes and decodes it."""


class RankReport(Message, frozen=True, tag="rank_report"):
    """A rank to its leader."""

    event: bytes


AnyMessage = (
    Generate
    | Abort
    | PagesWanted
    | Reserve
    | Ask
    | Cancel
    | Settled
    | PrefillDone
    | PagesWritten
    | HandoverClosed
    | Unknown
    | SettledHeard
    | Find
    | Take
    | Offer
    | Copied
    | Close
    | Found
    | Room
    | Outputs
    | PagesHeld
    | PagesChanged
    | Heartbeat
    | ApiFigures
    | CacheCommand
    | CacheAnswer
    | RankOrder
    | RankReport
)


class ProtocolError(ValueError):
    """A frame that is not a message of this protocol version; the receiver counts and drops it."""


_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[AnyMessage] = msgspec.msgpack.Decoder(AnyMessage)


def encode(message: AnyMessage, sender: str, incarnation: int, addressee: int) -> list[bytes]:
    """Two frames: header and body. The incarnations of sender and addressee are unsigned 64
    bits."""
    header = _HEADER.pack(_MAGIC, PROTOCOL_VERSION, incarnation, addressee) + sender.encode()
    return [header, _encoder.encode(message)]


def decode(frames: list[bytes], addressee: int) -> tuple[str, int, AnyMessage]:
    """(sender, its incarnation, message). Raises ProtocolError, also when the message is for an
    incarnation other than `addressee`."""
    if len(frames) != 2 or len(frames[0]) < _HEADER.size:
        raise ProtocolError(
            f"expected a header and a body, got frames of {[len(f) for f in frames]} bytes"
        )
    magic, version, incarnation, to = _HEADER.unpack_from(frames[0])
    if magic != _MAGIC:
        raise ProtocolError(f"not a PageRelay message: it starts with {frames[0][:4]!r}")
    if version != PROTOCOL_VERSION:
        raise ProtocolError(f"protocol version {version}, this process speaks {PROTOCOL_VERSION}")
    if to != addressee:
        raise ProtocolError(f"it is for incarnation {to:x}, this is {addressee:x}")
    try:
        return frames[0][_HEADER.size :].decode(), incarnation, _decoder.decode(frames[1])
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ProtocolError(str(error)) from error
