"""One process's KV events: the changes of its page index, published as hicache/events.py says.

A replica tells of its device tier, a keeper of its node's host tier, each at addresses of its own:
with port `*` or 0 at any free port, else at `port + process_number`.

Tokens are published where the process knows them: a replica does for pages that its sequences
filled or took, the keeper never does, for it is told hashes only. Pages of unknown tokens are
published without, as vLLM's own offloading does: a router has their tokens from the replica that
computed them. A replica does not tell of pages under a cache salt, unless nothing but their hash is
known, which no router can match.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence

import zmq

from hicache.events import MEDIA, Content, EventLog, EventPublisher, block_events
from hicache.index import Change, Stored
from pd.engine.scheduler import Tracked
from pd.spec import CacheEventsSpec, ClusterSpec, SpecError


def process_number(spec: ClusterSpec, name: str) -> int:
    """Of a replica or keeper, counted over the whole cluster: prefill replicas first, then decode,
    both, and the keepers, each role with `replicas.max` numbers and one for a successor that starts
    beside them."""
    role, _, number = name.rpartition("-")
    before = 0
    for each, role_spec in spec.roles.items():
        if each == role:
            break
        before += role_spec.replicas.max + 1
    return before + int(number)


def plan_address(address: str, number: int) -> str:
    """Where process `number` binds."""
    host, _, port = address.rpartition(":")
    return f"{host}:*" if port in ("*", "0") else f"{host}:{int(port) + number}"


class KvEvents:
    """To be used on one event loop's thread."""

    def __init__(
        self,
        spec: CacheEventsSpec,
        number: int,
        page_tokens: int,
        tier: str,
        content_of: Callable[[Stored], Content | None] = lambda change: Content(()),
    ) -> None:
        """Needs a running event loop. Raises SpecError when an address cannot be bound."""
        self._page_tokens = page_tokens
        self._medium = MEDIA[tier]
        self._content_of = content_of
        publish = plan_address(spec.publish, number)
        replay = plan_address(spec.replay, number) if spec.replay else None
        try:
            events = EventLog(spec.topic, max_batches=spec.buffer)
            self._publisher = EventPublisher(events, publish, replay, max_queued=spec.buffer)
        except zmq.ZMQError as error:
            places = publish if replay is None else f"{publish} and {replay}"
            raise SpecError(f"cache.events: cannot listen on {places}: {error}") from error
        self.facts = {"events": self._publisher.address}
        if replay is not None:
            self.facts["replay"] = self._publisher.replay_address
        self._replays = asyncio.get_running_loop().create_task(self._publisher.serve_replays())

    def publish(self, changes: Sequence[Change], now: float) -> None:
        """Changes of the index, if any, as one batch. `now`: seconds since 1970."""
        if changes:
            events = block_events(changes, self._content_of, self._page_tokens, self._medium)
            self._publisher.publish(events, now)

    @property
    def counters(self) -> dict[str, int]:
        return {
            "event_overruns": self._publisher.overruns,
            "events_asked_too_late": self._publisher.log.asked_too_late,
        }

    async def close(self) -> None:
        self._replays.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._replays
        self._publisher.close()


class KnownTokens:
    """The tokens of pages that entered a replica's index since the last `forget`."""

    def __init__(self, page_tokens: int, root: bytes) -> None:
        """`root`: of sequences without a cache salt."""
        self._page_tokens = page_tokens
        self._root = root
        self._sequences: dict[bytes, Tracked] = {}

    def stored(self, sequence: Tracked, begin: int, end: int) -> None:
        """These pages of a sequence may have entered the index."""
        self._sequences |= dict.fromkeys(sequence.hashes[begin:end], sequence)

    def content_of(self, change: Stored) -> Content | None:
        sequence = self._sequences.get(change.hashes[-1])
        if sequence is None:
            return Content(())
        if sequence.root != self._root:
            return None
        begin = change.first_page * self._page_tokens
        end = begin + len(change.hashes) * self._page_tokens
        return Content(sequence.buffer[begin:end].tolist())

    def forget(self) -> None:
        self._sequences.clear()
