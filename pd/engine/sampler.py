"""From logits to tokens: penalties and bias, temperature, top-k, top-p, min-p, one random number
each.

The random number is a hash of the request's seed and the token's position, so that a request's
tokens depend neither on the batch nor on the replica, and a request continued elsewhere goes on
unchanged. Rows are places in the running batch; a row's settings are set by `start_row` and valid
until the next one.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from pd.engine.batch import RowStart, StepCommand
from pd.messages import SamplingParams, TokenLogprob

_NUCLEUS_GUESS = 1024
"""Most likely tokens looked at for top-p before sorting the whole vocabulary."""


def uniform(
    seeds: npt.NDArray[np.uint64], positions: npt.NDArray[np.uint64]
) -> npt.NDArray[np.float64]:
    """One number in [0, 1) per (seed, position): splitmix64 (Steele et al., 2014) over the mixed
    seed."""
    with np.errstate(over="ignore"):
        golden = np.uint64(0x9E3779B97F4A7C15)
        bits = _mix(_mix(seeds) + (positions + np.uint64(1)) * golden) >> np.uint64(11)
        return bits.astype(np.float64) * 2.0**-53


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class _RowState:
    """What a row with penalties, bias or a minimum length carries along."""

    __slots__ = ("bias_ids", "bias_values", "counts", "params", "prompt_len", "seen")

    def __init__(self, start: RowStart, vocab_size: int, device: torch.device) -> None:
        params = start.sampling
        self.params = params
        self.prompt_len = start.prompt_len
        self.bias_ids = torch.tensor(list(params.logit_bias), dtype=torch.long, device=device)
        self.bias_values = torch.tensor(list(params.logit_bias.values()), device=device)
        output = torch.from_numpy(start.tokens[start.prompt_len :].astype(np.int64))
        self.counts = torch.bincount(output, minlength=vocab_size).float().to(device)
        self.seen = self.counts > 0
        if params.repetition_penalty != 1.0:
            prompt = torch.from_numpy(start.tokens[: start.prompt_len].astype(np.int64))
            self.seen[prompt.to(device)] = True

    def adjust(self, logits: torch.Tensor, num_output: int) -> torch.Tensor:
        params = self.params
        if params.repetition_penalty != 1.0:
            scaled = torch.where(
                logits > 0, logits / params.repetition_penalty, logits * params.repetition_penalty
            )
            logits = torch.where(self.seen, scaled, logits)
        if params.frequency_penalty or params.presence_penalty:
            logits = logits - params.frequency_penalty * self.counts
            logits = logits - params.presence_penalty * (self.counts > 0)
        if len(self.bias_ids):
            logits = logits.index_add(0, self.bias_ids, self.bias_values)
        if num_output < params.min_tokens:
            logits = logits.index_fill(
                0,
                torch.tensor(params.stop_token_ids, dtype=torch.long, device=logits.device),
                -torch.inf,
            )
        return logits

    def append(self, token: int) -> None:
        self.counts[token] += 1
        self.seen[token] = True


def _is_plain(params: SamplingParams) -> bool:
    return (
        params.repetition_penalty == 1.0
        and not params.frequency_penalty
        and not params.presence_penalty
        and not params.logit_bias
        and not (params.min_tokens and params.stop_token_ids)
    )


class Sampler:
    def __init__(self, max_rows: int, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._temperature = np.zeros(max_rows, np.float32)
        self._top_k = np.zeros(max_rows, np.int64)
        self._top_p = np.ones(max_rows, np.float32)
        self._min_p = np.zeros(max_rows, np.float32)
        self._seed = np.zeros(max_rows, np.uint64)
        self._logprobs = np.full(max_rows, -1, np.int64)
        self._state: dict[int, _RowState] = {}

    def start_row(self, start: RowStart) -> None:
        row, params = start.row, start.sampling
        self._temperature[row] = params.temperature
        self._top_k[row] = min(params.top_k, self._vocab_size)
        self._top_p[row] = params.top_p
        self._min_p[row] = params.min_p
        self._seed[row] = params.seed
        self._logprobs[row] = -1 if params.logprobs is None else params.logprobs
        self._state.pop(row, None)
        if not _is_plain(params):
            self._state[row] = _RowState(start, self._vocab_size, self._device)

    def sample(
        self, logits: torch.Tensor, command: StepCommand
    ) -> tuple[list[int], list[TokenLogprob | None]]:
        """logits (sampled items, vocabulary) of the command's sampling items -> a token and perhaps
        logprobs for each."""
        rows = command.rows[command.sample]
        position = (command.positions + command.counts)[command.sample]
        raw = logits = logits.float()
        adjusted = [i for i, row in enumerate(rows) if int(row) in self._state]
        if adjusted:
            logits = logits.clone()
            for i in adjusted:
                state = self._state[int(rows[i])]
                logits[i] = state.adjust(logits[i], int(position[i]) - state.prompt_len)
        tokens = logits.argmax(-1)
        random = np.flatnonzero(self._temperature[rows] > 0)
        if len(random):
            tokens[random] = self._draw(logits[random], rows[random], position[random])
        chosen: list[int] = tokens.tolist()
        for i in adjusted:
            self._state[int(rows[i])].append(chosen[i])
        return chosen, self._token_logprobs(raw, rows, chosen)

    def _draw(
        self, logits: torch.Tensor, rows: npt.NDArray[np.int32], position: npt.NDArray[np.int32]
    ) -> torch.Tensor:
        temperature = torch.from_numpy(self._temperature[rows]).to(self._device)
        # Divided after the maximum is taken off, so that no temperature makes an infinity.
        logits = logits - logits.amax(-1, keepdim=True)
        probs = torch.softmax(logits / temperature[:, None], -1)
        top_k, top_p, min_p = self._top_k[rows], self._top_p[rows], self._min_p[rows]
        for i in np.flatnonzero(top_k):
            probs[i].masked_fill_(probs[i] < probs[i].topk(int(top_k[i])).values[-1], 0)
        for i in np.flatnonzero(top_p < 1):
            probs[i].masked_fill_(probs[i] < _nucleus_threshold(probs[i], float(top_p[i])), 0)
        for i in np.flatnonzero(min_p):
            probs[i].masked_fill_(probs[i] < float(min_p[i]) * probs[i].max(), 0)
        cumulative = probs.double().cumsum(-1)
        numbers = uniform(self._seed[rows], position.astype(np.uint64))
        target = torch.from_numpy(numbers).to(self._device)[:, None] * cumulative[:, -1:]
        index = torch.searchsorted(cumulative, target, right=True)[:, 0]
        return index.clamp(max=self._vocab_size - 1)

    def _token_logprobs(
        self, logits: torch.Tensor, rows: npt.NDArray[np.int32], chosen: list[int]
    ) -> list[TokenLogprob | None]:
        wanted = self._logprobs[rows]
        result: list[TokenLogprob | None] = [None] * len(rows)
        for i in np.flatnonzero(wanted >= 0):
            logprobs = torch.log_softmax(logits[i], -1)
            values, ids = logprobs.topk(min(int(wanted[i]), self._vocab_size))
            result[i] = TokenLogprob(
                float(logprobs[chosen[i]]), tuple(ids.tolist()), tuple(values.tolist())
            )
        return result


def _nucleus_threshold(probs: torch.Tensor, top_p: float) -> torch.Tensor:
    """Least probability in the smallest set of most likely tokens with mass top_p (of what is
    left)."""
    mass = top_p * probs.sum()
    values = probs.topk(min(_NUCLEUS_GUESS, len(probs))).values
    if values.sum() < mass:
        values = probs.sort(descending=True).values
    before = values.cumsum(0) - values
    return values[(before < mass).sum().clamp(min=1) - 1]
