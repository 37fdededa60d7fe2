"""Leaders on a virtual clock: seeded delays, aborts and deaths, and page contents that name their
place.

A pool's page is a list of (token prefix hash) per offset, so that a step can check that every key
it attends to is the right one, and a byte in the wrong page is seen at once. The sampled token is a
function of the whole prefix. Messages between two nodes keep their order (as ZMQ does); everything
else may overtake.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from typing import Any

import numpy as np

from hicache.index import PageIndex
from hicache.keys import page_hashes, root_hash
from pd.engine.batch import StepCommand, StepResult
from pd.events import (
    Event,
    PeerDown,
    PeerUp,
    Received,
    RunStep,
    Send,
    StepDone,
    Tick,
    Write,
    Written,
)
from pd.leader import Leader
from pd.messages import Abort, Generate, Output, Outputs, SamplingParams, pack_ints
from transfer.layout import LayerGroup

PAGE = 4
VOCABULARY = 97
ROOT = root_hash("sim")
GROUPS = (
    LayerGroup("full", (0,), 1, 1),
    LayerGroup("sliding", (1,), 1, 1, window=10),
)


def prefix_key(tokens: Any) -> int:
    return hash(tuple(int(t) for t in tokens))


def next_token(tokens: Any) -> int:
    return prefix_key(tokens) % VOCABULARY


def reference(prompt: list[int], max_tokens: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(max_tokens):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


class SimReplica:
    """A leader with a rank whose KV are prefix hashes."""

    def __init__(
        self, name: str, pages: int, max_batch_tokens: int, max_running: int, local: int
    ) -> None:
        num_pages = [pages, pages]
        self.name = name
        self.alive = True
        self.index = PageIndex(GROUPS, num_pages, PAGE)
        self.leader = Leader(name, self.index, GROUPS, PAGE, max_batch_tokens, max_running, local)
        self.pools = [[[None] * PAGE for _ in range(pages)] for _ in GROUPS]
        self.tables: list[dict[tuple[int, int], int]] = [{} for _ in GROUPS]
        self.history: dict[int, list[int]] = {}

    def step(self, command: StepCommand) -> StepResult:
        for start in command.starts:
            self.history[start.row] = start.tokens.tolist()
        for table, update in zip(self.tables, command.pages, strict=True):
            for row, page, slot in update.tolist():
                table[row, page] = slot
        sampled = []
        offset = 0
        items = zip(command.rows, command.positions, command.counts, command.sample, strict=True)
        for row, position, count, sample in items:
            row, position, count = int(row), int(position), int(count)
            tokens = self.history[row]
            chunk = command.tokens[offset : offset + count].tolist()
            offset += count
            assert tokens[position : position + count] == chunk
            for p in range(position, position + count):
                for pool, table in zip(self.pools, self.tables, strict=True):
                    pool[table[row, p // PAGE]][p % PAGE] = prefix_key(tokens[: p + 1])
            for group, pool, table in zip(GROUPS, self.pools, self.tables, strict=True):
                for query in (position, position + count - 1):
                    first = 0 if group.kind == "full" else max(0, query - group.window + 1)
                    for p in range(first, query + 1):
                        found = pool[table[row, p // PAGE]][p % PAGE]
                        assert found == prefix_key(tokens[: p + 1]), (
                            f"{self.name}: {group.kind} key {p} of query {query} is wrong"
                        )
            if sample:
                token = next_token(tokens[: position + count])
                if position + count == len(tokens):
                    tokens.append(token)
                sampled.append(token)
        return StepResult(sampled, [None] * len(sampled), 0.0)


class Simulation:
    def __init__(
        self,
        seed: int,
        replicas: list[SimReplica],
        lose_writes: float = 0.0,
        lose_messages: float = 0.0,
    ) -> None:
        self.random = random.Random(seed)
        self.now = 0.0
        self.replicas = {replica.name: replica for replica in replicas}
        self.lose_writes = lose_writes
        self.lose_messages = lose_messages
        """Between leaders; the API's are counted by position and not lost here."""
        self.outputs: dict[str, list[Output]] = {}
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._tie = 0
        self._last_arrival: dict[tuple[str, str], float] = {}
        for replica in replicas:
            for other in replicas:
                if other is not replica:
                    self.deliver(replica, PeerUp(other.name))
            self.deliver(replica, PeerUp("api"))

    def at(self, when: float, action: Callable[[], None]) -> None:
        self._tie += 1
        heapq.heappush(self._queue, (when, self._tie, action))

    def after(self, longest: float, action: Callable[[], None]) -> None:
        self.at(self.now + self.random.random() * longest, action)

    def run(self, until: float = 1e9) -> None:
        while self._queue and self._queue[0][0] <= until:
            self.now, _, action = heapq.heappop(self._queue)
            action()

    # ----------------------------------------------------------------------------------- the client

    def generate(
        self,
        request_id: str,
        prompt: list[int],
        max_tokens: int,
        decode: str,
        prefill: str,
        timeout: float = 1e6,
    ) -> None:
        hashes = b"".join(page_hashes(np.array(prompt, np.int32), PAGE, ROOT))
        params = SamplingParams(max_tokens=max_tokens, temperature=0.0)
        message = Generate(request_id, pack_ints(prompt), ROOT, hashes, params, prefill, timeout)
        self.outputs[request_id] = []
        self.send("api", decode, message)

    def abort(self, request_id: str, decode: str) -> None:
        self.send("api", decode, Abort(request_id))

    # ---------------------------------------------------------------------------------- the machine

    def send(self, sender: str, to: str, message: Any) -> None:
        """In order per pair, after a random delay, if at all."""
        if "api" not in (sender, to) and self.random.random() < self.lose_messages:
            return
        arrival = max(
            self._last_arrival.get((sender, to), 0.0), self.now + self.random.random() * 3
        )
        self._last_arrival[sender, to] = arrival
        self.at(arrival, lambda: self._arrive(sender, to, message))

    def _arrive(self, sender: str, to: str, message: Any) -> None:
        if to == "api":
            assert isinstance(message, Outputs)
            for output in message.outputs:
                self.outputs[output.request_id].append(output)
        elif self.replicas[to].alive and (sender == "api" or self.replicas[sender].alive):
            self.deliver(self.replicas[to], Received(sender, message))

    def deliver(self, replica: SimReplica, event: Event) -> None:
        if not replica.alive:
            return
        for effect in replica.leader.handle(event, self.now):
            match effect:
                case Send(to, message):
                    self.send(replica.name, to, message)
                case RunStep(command):
                    self.after(5, lambda c=command: self._run_step(replica, c))
                case Write():
                    self.after(20, lambda w=effect: self._write(replica, w))
        replica.leader.check_integrity()

    def _run_step(self, replica: SimReplica, command: StepCommand) -> None:
        if replica.alive:
            self.deliver(replica, StepDone(replica.step(command)))

    def _write(self, replica: SimReplica, write: Write) -> None:
        """The bytes land now: the content is read and written at this very moment."""
        if not replica.alive:
            return
        target = self.replicas[write.peer]
        error = None
        if not target.alive:
            error = "peer is dead"
        elif self.random.random() < self.lose_writes:
            error = "lost"
        else:
            for source, destination in zip(write.source_pages, write.target_pages, strict=True):
                content = replica.pools[write.group][source]
                target.pools[write.group][destination] = list(content)
        self.after(
            2,
            lambda: self.deliver(
                replica, Written(write.write_id, error, 1, len(write.source_pages), 0.1)
            ),
        )

    def tick_all(self) -> None:
        for replica in self.replicas.values():
            self.deliver(replica, Tick())

    def kill(self, name: str) -> None:
        """The process ends; the others hear of it later."""
        self.replicas[name].alive = False
        for other in self.replicas.values():
            if other.alive:
                self.after(30, lambda o=other: self.deliver(o, PeerDown(name, "killed")))

    # -------------------------------------------------------------------------------------- results

    def tokens(self, request_id: str) -> list[int]:
        return [token for output in self.outputs[request_id] for token in output.token_ids]

    def reasons(self, request_id: str) -> list[str]:
        return [o.finish_reason for o in self.outputs[request_id] if o.finish_reason is not None]
