"""Requests of one API process: submitted to decode leaders, answered as streams of `Output`.

Knows messages and the router; no HTTP, no text, no socket. `send` must not block. Everything runs
on one event loop; no locks.

Every stream ends in exactly one `Output` with a finish reason, whatever happens: the leader's last
output, an error because a replica is gone, because the deadline has passed or because the leader
broke the protocol, or "abort" because the stream was closed. Ending a request early sends `Abort`
to the decode leader, which owns all that the request holds elsewhere. What still arrives for an
ended request is counted and dropped.

A stream holds what was not read yet, merged into one `Output`; `max_tokens` bounds it.
"""

from __future__ import annotations

import asyncio
import enum
import secrets
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import msgspec
import numpy as np

from hicache.keys import page_hashes, root_hash
from pd.api.caches import Caches
from pd.messages import (
    Abort,
    AnyMessage,
    CacheAnswer,
    FinishReason,
    Generate,
    Heartbeat,
    Output,
    Outputs,
    PagesChanged,
    PagesHeld,
    PagesWanted,
    RequestStats,
    SamplingParams,
    pack_ints,
    unpack_ints,
)
from pd.router import NoReplica, Placement, ReplicaState, Router
from pd.spec import Role

_MAX_REPLAYS = 3
"""A request that has seen more replicas die may be the cause."""
LEADER_HEAD_START = 0.05
"""The client's deadline is this fraction later than the leader's, whose error says more."""


class Failure(enum.Enum):
    """Why a request ended with finish_reason "error"."""

    ENGINE = "engine_error"
    REPLICA_LOST = "replica_lost"
    TIMEOUT = "timeout"


class _Replica(NamedTuple):
    cohort: str
    fingerprint: str
    max_context: int


@dataclass(slots=True)
class ClientCounters:
    late_outputs: int = 0
    unexpected_messages: int = 0
    """Like late outputs, they changed nothing."""
    replays: int = 0
    """Requests that went on elsewhere after their decode replica was lost."""
    refused: int = 0
    """Requests that were not let in, or for which there was no replica."""
    moves: int = 0
    """Requests that went on elsewhere because theirs is draining."""


class OutputStream:
    """One request's outputs, merged as far as they were not read; iterate, or `merge` several.

    Closing is idempotent and immediate. Times are the event loop's, in seconds.
    """

    def __init__(
        self,
        owner: EngineClient,
        generate: Generate,
        wake: asyncio.Event,
        deadline_s: float,
        cache_salt: str,
    ) -> None:
        self._owner = owner
        self._pending: list[Output] = []
        self._wake = wake
        self._taken_last = False
        self.generate = generate
        self.cache_salt = cache_salt
        self.placement: Placement | None = None
        """None: not submitted yet, or again without a replica (`lost`)."""
        self.lost = ""
        """Why it has to go on elsewhere, until it does."""
        self.takeover: asyncio.TimerHandle | None = None
        """Ends it while it is lost."""
        self.num_replays = 0
        self.delivered: list[int] = []
        """Tokens that came, also those that were not read yet; the first `generate.num_delivered`
        of them from replicas that were lost."""
        self.siblings: list[OutputStream] = []
        """Not submitted before this stream's first token has come."""
        self.timer: asyncio.TimerHandle | None = None
        self.submitted_s = asyncio.get_running_loop().time()
        self.deadline_s = deadline_s
        self.first_token_s: float | None = None
        self.ended_s: float | None = None
        self.stats: RequestStats | None = None
        """The latest that came with an output."""
        self.failure: Failure | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.delivered)

    @property
    def is_ended(self) -> bool:
        return self.ended_s is not None

    def close(self) -> None:
        """End the request with finish_reason "abort", unless it has ended."""
        self._owner.end(self, "abort", tell_leader=True)

    def __aiter__(self) -> AsyncIterator[Output]:
        return self

    async def __anext__(self) -> Output:
        if self._taken_last:
            raise StopAsyncIteration
        while (output := self.try_take()) is None:
            self._wake.clear()
            await self._wake.wait()
        return output

    def try_take(self) -> Output | None:
        """All that arrived since the last call as one Output; None when nothing did."""
        if not self._pending:
            return None
        outputs, self._pending = self._pending, []
        last = outputs[-1]
        self._taken_last = last.finish_reason is not None
        if len(outputs) == 1:
            return last
        return msgspec.structs.replace(
            last,
            token_ids=tuple(token for output in outputs for token in output.token_ids),
            logprobs=tuple(entry for output in outputs for entry in output.logprobs),
        )

    def put(self, output: Output) -> None:
        """For the client only."""
        self._pending.append(output)
        self._wake.set()


async def merge(streams: Sequence[OutputStream]) -> AsyncIterator[tuple[int, Output]]:
    """(index, output) of streams that were submitted together, until each has ended."""
    reading = dict(enumerate(streams))
    while reading:
        for index, stream in list(reading.items()):
            output = stream.try_take()
            if output is not None:
                if output.finish_reason is not None:
                    del reading[index]
                yield index, output
        wake = streams[0]._wake
        while reading and not any(stream._pending for stream in reading.values()):
            wake.clear()
            await wake.wait()


class EngineClient:
    def __init__(
        self,
        send: Callable[[str, AnyMessage], object],
        router: Router,
        page_tokens: int,
        takeover_s: float = 120.0,
    ) -> None:
        """`takeover_s`: so long a request whose decode replica was lost waits for another."""
        self._send = send
        self.takeover_s = takeover_s
        self._page_tokens = page_tokens
        self._fingerprint: str | None = None
        """That most of the replicas which decode have: of new requests, at first."""
        self._known: dict[str, _Replica] = {}
        self._streams: dict[str, OutputStream] = {}
        self._draining: set[str] = set()
        self.router = router
        self.caches = Caches(send)
        self.keepers = self.caches.keepers
        self.counters = ClientCounters()

    # ----------------------------------------------------------------------- what the node reports

    def use_router(self, router: Router) -> None:
        """Instead of the one so far, whose replicas and requests it takes over."""
        now = asyncio.get_running_loop().time()
        old, self.router = self.router, router
        router.admission.take_over(old.admission)
        for known in old.replicas():
            name, role, cohort, drains = known.name, known.role, known.cohort, known.draining
            wanted = router.update(name, role, None, now, cohort=cohort, draining=drains)
            self._ask(name, wanted)
            router.update(name, role, known.load, now)

    def on_peer_up(
        self,
        name: str,
        role: Role,
        fingerprint: str = "",
        cohort: str = "",
        max_context: int = 2**31,
    ) -> None:
        """`name` may be given requests; after a restart, report it down first. `fingerprint`: of
        the model that it serves; `cohort`: those that can hand over to each other; `max_context`:
        tokens of a request that it holds."""
        self._known[name] = _Replica(cohort, fingerprint, max_context)
        now = asyncio.get_running_loop().time()
        self._ask(name, self.router.update(name, role, None, now, cohort=cohort))
        self._replicas_changed()

    def _replicas_changed(self) -> None:
        decoding = [each for each in self.router.replicas() if each.role != "prefill"]
        serving = [each for each in decoding if not each.draining] or decoding
        found = Counter(self._known[each.name].fingerprint for each in serving)
        if found:
            self._fingerprint = max(found, key=lambda each: (found[each], each))
        self._go_on()

    def on_peer_down(self, name: str, reason: str = "its process is gone") -> None:
        """Requests that decode on `name` go on elsewhere, from what was delivered, if there is a
        replica in time. Where it was to prefill, the decode leader finds another."""
        self.router.remove(name)
        self._known.pop(name, None)
        self._draining.discard(name)
        for stream in self._streams.values():
            if stream.placement is not None and stream.placement.decode == name:
                stream.placement = None
                stream.lost = f"decode replica {name} was lost: {reason}"
                loop = asyncio.get_running_loop()
                stream.takeover = loop.call_later(self.takeover_s, self._give_up, stream)
        self._replicas_changed()

    def on_peer_draining(self, name: str) -> None:
        """`name` gets nothing new; requests that decode there go on elsewhere, with its pages."""
        if self.router.role_of(name) is not None:
            self._draining.add(name)
            self.router.drain(name)
            self._replicas_changed()

    def _go_on(self) -> None:
        """Place requests whose replica was lost or is draining, as far as can be."""
        for stream in list(self._streams.values()):
            placement = stream.placement
            if stream.lost or (placement is not None and placement.decode in self._draining):
                try:
                    self._move(stream)
                except NoReplica:
                    return

    def _move(self, stream: OutputStream) -> None:
        """Send the rest of a request: what was delivered becomes part of the prompt, so that not a
        token comes twice. A draining replica hands its pages over. Raises NoReplica."""
        source = stream.placement.decode if stream.placement is not None else ""
        if not source and stream.num_replays == _MAX_REPLAYS:
            text = f"{stream.lost}, as were {stream.num_replays} before it"
            self.end(stream, "error", text, Failure.REPLICA_LOST)
            return
        generate, new = stream.generate, stream.delivered[stream.generate.num_delivered :]
        longest = len(stream.generate.prompt) // 4 + stream.generate.sampling.max_tokens
        if source and not self._holds(longest):
            return  # it can still end where it is
        # Of the pages that were delivered, hardly any can be cached elsewhere.
        num_tokens = len(generate.prompt) // 4 + len(new)
        placement = self.router.place(num_tokens, generate.page_hashes, priority=generate.priority)
        if source:
            if longest > self._known[placement.decode].max_context:
                return
            self._send(source, Abort(generate.request_id))
            is_near = self._known[placement.decode].cohort == self._known[source].cohort
            if stream.num_tokens and is_near:
                placement = Placement(placement.decode, source)
        if new:
            prompt = np.concatenate((unpack_ints(generate.prompt), np.array(new, np.int32)))
            known = generate.page_hashes
            begin = len(known) // len(generate.root) * self._page_tokens
            parent = known[-len(generate.root) :] or generate.root
            hashes = page_hashes(prompt[begin:], self._page_tokens, parent)
            left = generate.sampling.max_tokens - len(new)
            stream.generate = msgspec.structs.replace(
                generate,
                prompt=pack_ints(prompt),
                page_hashes=b"".join((known, *hashes)),
                sampling=msgspec.structs.replace(generate.sampling, max_tokens=left),
                num_delivered=stream.num_tokens,
            )
        stream.lost = ""
        if stream.takeover is not None:
            stream.takeover.cancel()
        if source:
            self.counters.moves += 1
        else:
            stream.num_replays += 1
            self.counters.replays += 1
        self._start(stream, placement)

    def _holds(self, num_tokens: int) -> bool:
        """There is a replica for a request of so many, that is not draining."""
        return any(
            num_tokens <= self._known[each.name].max_context
            for each in self.router.replicas()
            if each.role != "prefill" and not each.draining
        )

    def on_message(self, sender: str, message: AnyMessage) -> None:
        match message:
            case Outputs():
                for output in message.outputs:
                    self._on_output(sender, output)
            case Heartbeat() if sender in self.keepers:
                self.keepers[sender] = message.cache
            case CacheAnswer() if self.caches.answered(sender, message):
                pass
            case Heartbeat():
                role = self.router.role_of(sender)
                if role is not None:
                    now = asyncio.get_running_loop().time()
                    self._ask(sender, self.router.update(sender, role, message.load, now))
            case PagesHeld() | PagesChanged():
                now = asyncio.get_running_loop().time()
                self._ask(sender, self.router.receive_pages(sender, message, now))
            case _:
                self.counters.unexpected_messages += 1

    def _ask(self, replica: str, wanted: PagesWanted | None) -> None:
        if wanted is not None:
            self._send(replica, wanted)

    # ------------------------------------------------------------------------------------ requests

    def replicas(self) -> list[ReplicaState]:
        return self.router.replicas()

    def submit(
        self,
        prompt_ids: Sequence[int],
        sampling: SamplingParams,
        cache_salt: str = "",
        timeout_s: float = 600.0,
        tenant: str = "",
        priority: int = 0,
    ) -> OutputStream:
        """Place and send one request. Raises Overloaded or NoReplica, and then nothing was sent."""
        prompts = [(prompt_ids, sampling)]
        return self.submit_all(prompts, 1, cache_salt, timeout_s, tenant, priority)[0]

    def submit_all(
        self,
        prompts: Sequence[tuple[Sequence[int], SamplingParams]],
        n: int = 1,
        cache_salt: str = "",
        timeout_s: float = 600.0,
        tenant: str = "",
        priority: int = 0,
    ) -> list[OutputStream]:
        """`n` streams per (token ids, sampling), prompt by prompt, all admitted or none.

        Choice i of a prompt has the seed `sampling.seed + i` (mod 2**64). Choices after the first
        are sent when the first one's first token has come, so that they find the prompt's pages in
        the cache; until then they end as the first one ends. Raises Overloaded or NoReplica, and
        then nothing was sent.
        """
        if self._fingerprint is None:
            raise NoReplica("decode")
        root = root_hash(self._fingerprint, cache_salt)
        hashes = [b"".join(page_hashes(prompt, self._page_tokens, root)) for prompt, _ in prompts]
        now = asyncio.get_running_loop().time()
        self.router.check_room(len(prompts) * n, tenant, priority, now)
        placements: list[Placement] = []
        for (prompt, _), of_prompt in zip(prompts, hashes, strict=True):
            # They are refused for what there was before them, not for each other.
            placement = self.router.place(
                len(prompt), of_prompt, None, priority, may_refuse=not placements, now=now
            )
            placements.append(placement)
        self.router.admit(len(prompts) * n, tenant, priority, now)
        wake = asyncio.Event()
        streams: list[OutputStream] = []
        for i, placement in enumerate(placements):
            prompt, sampling = prompts[i]
            tokens = pack_ints(list(prompt))
            choices = []
            for choice in range(n):
                seed = (sampling.seed + choice) % 2**64
                generate = Generate(
                    request_id=secrets.token_hex(16),
                    prompt=tokens,
                    root=root,
                    page_hashes=hashes[i],
                    sampling=msgspec.structs.replace(sampling, seed=seed),
                    prefill="",
                    timeout_s=timeout_s,
                    tenant=tenant,
                    priority=priority,
                )
                choices.append(self._open(generate, wake, timeout_s, cache_salt))
            choices[0].siblings = choices[1:]
            self._start(choices[0], placement)
            streams += choices
        return streams

    def _open(
        self, generate: Generate, wake: asyncio.Event, timeout_s: float, cache_salt: str
    ) -> OutputStream:
        loop = asyncio.get_running_loop()
        stream = OutputStream(self, generate, wake, loop.time() + timeout_s, cache_salt)
        stream.timer = loop.call_later(
            timeout_s * (1 + LEADER_HEAD_START), self._on_deadline, stream
        )
        self._streams[generate.request_id] = stream
        return stream

    def _start(self, stream: OutputStream, placement: Placement) -> None:
        stream.placement = placement
        generate = stream.generate
        root = root_hash(self._known[placement.decode].fingerprint, stream.cache_salt)
        if root != generate.root:
            hashes = page_hashes(unpack_ints(generate.prompt), self._page_tokens, root)
            stream.generate = msgspec.structs.replace(
                generate, root=root, page_hashes=b"".join(hashes)
            )
        remaining_s = max(stream.deadline_s - asyncio.get_running_loop().time(), 0.0)
        stream.generate = msgspec.structs.replace(
            stream.generate, prefill=placement.prefill, timeout_s=remaining_s
        )
        self._send(placement.decode, stream.generate)

    def _start_siblings(self, stream: OutputStream) -> None:
        siblings, stream.siblings = stream.siblings, []
        for sibling in siblings:
            if sibling.is_ended:
                continue
            try:
                generate, beside = sibling.generate, stream.placement
                num_tokens = len(generate.prompt) // 4
                placement = self.router.place(
                    num_tokens, generate.page_hashes, beside, generate.priority
                )
                self._start(sibling, placement)
            except NoReplica as error:
                self.end(sibling, "error", str(error), Failure.REPLICA_LOST)

    def _on_output(self, sender: str, output: Output) -> None:
        stream = self._streams.get(output.request_id)
        if stream is None or stream.placement is None or stream.placement.decode != sender:
            self.counters.late_outputs += 1
            return
        position = stream.generate.num_delivered + output.position
        if output.token_ids and position != stream.num_tokens:
            text = f"tokens {stream.num_tokens} to {position - 1} from {sender} were lost"
            self.end(stream, "error", text, Failure.ENGINE, tell_leader=True)
            return
        stream.delivered += output.token_ids
        if output.stats is not None:
            stream.stats = output.stats
        most = stream.generate.num_delivered + stream.generate.sampling.max_tokens
        if stream.num_tokens > most:
            text = f"replica {sender} sent {stream.num_tokens} tokens of at most {most}"
            self.end(stream, "error", text, Failure.ENGINE, tell_leader=True)
            return
        if output.token_ids and stream.first_token_s is None:
            stream.first_token_s = asyncio.get_running_loop().time()
            self._start_siblings(stream)
        if output.finish_reason is None:
            stream.put(output)
        else:
            failure = self._cause(stream) if output.finish_reason == "error" else None
            self._forget(stream, failure)
            stream.put(output)
            self._end_siblings(stream, output.finish_reason, output.error, failure)

    def _cause(self, stream: OutputStream) -> Failure:
        """Of a leader's error. It sees the deadline at the earliest when it has passed here."""
        is_late = asyncio.get_running_loop().time() >= stream.deadline_s
        return Failure.TIMEOUT if is_late else Failure.ENGINE

    def _give_up(self, stream: OutputStream) -> None:
        text = f"{stream.lost}, and no other has taken over in time"
        self.end(stream, "error", text, Failure.REPLICA_LOST)

    def _on_deadline(self, stream: OutputStream) -> None:
        if stream.lost:
            self._give_up(stream)
            return
        if stream.placement is None:
            stage = "waiting for the first choice's prompt to be prefilled"
        elif stream.num_tokens == 0:
            prefill = stream.placement.prefill or stream.placement.decode
            stage = (
                f"waiting for the first token (prefill on {prefill}, decode on "
                f"{stream.placement.decode})"
            )
        else:
            stage = (
                f"decoding on {stream.placement.decode}, {stream.num_tokens} of at most "
                f"{stream.generate.num_delivered + stream.generate.sampling.max_tokens} tokens done"
            )
        text = f"the request's time is up while {stage}"
        self.end(stream, "error", text, Failure.TIMEOUT, tell_leader=True)

    def end(
        self,
        stream: OutputStream,
        finish_reason: FinishReason,
        error: str = "",
        failure: Failure | None = None,
        *,
        tell_leader: bool = False,
    ) -> None:
        """End a request from this side, and its siblings that were not sent; nothing when it has
        ended."""
        if stream.is_ended:
            return
        self._forget(stream, failure)
        if tell_leader and stream.placement is not None:
            self._send(stream.placement.decode, Abort(stream.generate.request_id))
        stream.put(
            Output(
                stream.generate.request_id,
                (),
                finish_reason=finish_reason,
                error=error,
                stats=stream.stats,
            )
        )
        self._end_siblings(stream, finish_reason, error, failure)

    def _end_siblings(
        self, stream: OutputStream, finish_reason: FinishReason, error: str, failure: Failure | None
    ) -> None:
        siblings, stream.siblings = stream.siblings, []
        for sibling in siblings:
            self.end(sibling, finish_reason, error, failure)

    def _forget(self, stream: OutputStream, failure: Failure | None) -> None:
        stream.ended_s = asyncio.get_running_loop().time()
        stream.failure = failure
        for timer in (stream.timer, stream.takeover):
            if timer is not None:
                timer.cancel()
        del self._streams[stream.generate.request_id]
        self.router.release(stream.generate.tenant, stream.ended_s)

    def check_integrity(self) -> None:
        """Admission counts exactly the open streams, and none of them has ended."""
        assert self.router.in_flight == len(self._streams)
        assert not any(stream.is_ended for stream in self._streams.values())
