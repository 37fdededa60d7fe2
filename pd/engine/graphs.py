"""Decode steps as CUDA graphs: one launch instead of a thousand.

What differs between steps of as many requests (tokens, lengths, pages) is a record of integers for
each, copied to where the graph reads it. Batches are padded to the next of some sizes, whose graphs
are captured when first needed; padding writes to the null page and is not looked at.
"""

from __future__ import annotations

import bisect
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch

from pd.engine import attention
from pd.engine.batch import StepCommand
from pd.engine.pool import PagePool
from pd.messages import Int32Array

log = logging.getLogger("pagerelay")

Array = TypeVar("Array", torch.Tensor, Int32Array)
Forward = Callable[[torch.Tensor, torch.Tensor, attention.AttentionPlan], torch.Tensor]
"""(tokens, positions, what to attend to) -> logits, (requests, vocabulary)."""


class DecodeGraphs:
    """Used by one thread."""

    def __init__(
        self,
        forward: Forward,
        pools: Sequence[PagePool],
        place: dict[int, tuple[int, int]],
        max_requests: int,
        num_pages: int,
    ) -> None:
        """`num_pages`: of a request, at most."""
        self.sizes = _sizes(max_requests)
        self._forward = forward
        self._pools = pools
        self._place = place
        width = 2 + len(pools) * (2 + num_pages)
        self._records = torch.zeros(self.sizes[-1], width, dtype=torch.int32).pin_memory()
        self._numbers = self._records.numpy()
        self._inputs = torch.zeros_like(self._records, device=pools[0].device)
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._logits: torch.Tensor | None = None
        self._memory: Any = None

    def step(self, command: StepCommand, tables: Sequence[Int32Array]) -> torch.Tensor | None:
        """The logits of a step in which every request has one token, (requests, vocabulary), valid
        until the next step; None: it is to be done without a graph."""
        count = len(command.rows)
        if not self.sizes or count > self.sizes[-1]:
            return None
        size = self.sizes[bisect.bisect_left(self.sizes, count)]
        if size not in self._graphs and not self.capture(size):
            return None
        numbers = self._numbers[:size]
        numbers[:count, 0], numbers[:count, 1] = command.tokens, command.positions
        numbers[count:] = 0
        for pool, table, (bounds, slots) in zip(
            self._pools, tables, _columns(numbers, len(self._pools)), strict=True
        ):
            attention.find_bounds(command.positions, pool, bounds[:count])
            slots[:count] = table[command.rows]
            bounds[count:, 1] = 1
        self._inputs[:size].copy_(self._records[:size], non_blocking=True)
        self._graphs[size].replay()
        assert self._logits is not None
        return self._logits[:count]

    def capture_all(self) -> None:
        """The largest first: others find room in its memory."""
        for size in reversed(self.sizes):
            if not self.capture(size):
                return

    @torch.inference_mode()
    def capture(self, size: int) -> bool:
        """False: this model's steps cannot be captured, and there will be none."""
        inputs = self._inputs[:size]
        inputs.zero_()
        keys = []
        for bounds, slots in _columns(inputs, len(self._pools)):
            bounds[:, 1] = 1
            keys.append(attention.PagedKeys(slots, bounds))
        plan = attention.plan_decode(self._pools, self._place, keys)
        tokens, positions = inputs[:, 0], inputs[:, 1]
        graph = torch.cuda.CUDAGraph()
        try:
            # Once before, for what libraries set up on first use.
            logits = self._forward(tokens, positions, plan)
            if self._logits is None:
                self._logits = logits.new_empty(self.sizes[-1], logits.shape[1])
            torch.cuda.synchronize(inputs.device)
            with torch.cuda.graph(graph, pool=self._memory, capture_error_mode="thread_local"):
                # Results of all graphs go to one place, as only one of them is in use.
                self._logits[:size] = self._forward(tokens, positions, plan)
        except RuntimeError as error:
            reason = str(error).strip().partition("\n")[0]
            log.warning("decode steps run without CUDA graphs: %s", reason)
            self.sizes, self._graphs = [], {}
            return False
        self._memory = graph.pool()
        self._graphs[size] = graph
        return True


def _sizes(most: int) -> list[int]:
    """Of batches: apart by an eighth to a quarter."""
    sizes, size = [1, 2, 4], 8
    while sizes[-1] < most:
        sizes.append(size)
        size += max(8, 1 << size.bit_length() - 3)
    return [each for each in sizes[:-1] if each < most] + [most]


def _columns(records: Array, num_groups: int) -> Iterator[tuple[Array, Array]]:
    """By layer group, of its records: (bounds, slots)."""
    width = (records.shape[1] - 2) // num_groups
    for first in range(2, records.shape[1], width):
        yield records[:, first : first + 2], records[:, first + 2 : first + width]
