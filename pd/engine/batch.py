"""What a leader tells its ranks to do in one step, and what they answer.

Plain data, no torch. A rank keeps, per row (a place in the running batch), the page tables and the
sampling state; a command carries only what changed: rows that start, pages that were added, the
tokens to compute.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

from pd.messages import Int32Array, SamplingParams, TokenLogprob

LAST_SAMPLED = -1
"""In a command: the token that was last sampled for the row, by a step that may still run. For a
replica of one rank."""


@dataclasses.dataclass(frozen=True, slots=True)
class RowStart:
    """Row `row` now belongs to another request: forget what it held."""

    row: int
    sampling: SamplingParams
    tokens: Int32Array
    """All tokens so far; the first `prompt_len` are the client's prompt (penalties treat them
    apart)."""
    prompt_len: int


@dataclasses.dataclass(frozen=True, slots=True)
class StepCommand:
    """One forward pass over packed chunks; item i computes `counts[i]` tokens of row `rows[i]`.

    Items of one token come first. `tokens` holds all chunks end to end; an item's only token may be
    LAST_SAMPLED. Where `sample[i]`, a token is sampled after the item's last position.
    """

    starts: list[RowStart]
    rows: Int32Array
    positions: Int32Array
    """Of each item's first token in its sequence."""
    counts: Int32Array
    sample: npt.NDArray[np.bool_]
    tokens: Int32Array
    pages: list[Int32Array]
    """By layer group, (k, 3): row, page index in the sequence, slot in the pool."""

    def token_positions(self) -> npt.NDArray[np.int64]:
        """Of each token in its sequence."""
        starts: npt.NDArray[np.int64] = self.positions - (np.cumsum(self.counts) - self.counts)
        return np.arange(len(self.tokens)) + np.repeat(starts, self.counts)


@dataclasses.dataclass(frozen=True, slots=True)
class StepResult:
    """Sampled tokens, in the order of the command's sampling items."""

    tokens: list[int]
    logprobs: list[TokenLogprob | None]
    seconds: float
