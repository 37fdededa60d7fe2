"""From logits to tokens: penalties and bias, temperature, top-k, top-p, min-p, one random number
each.

The random number is a hash of the request's seed and the token's position, so that a request's
tokens depend neither on the batch nor on the replica, and a request continued elsewhere goes on
unchanged. Sums whose order may differ with the batch are in double precision. Rows are places in
the running batch; a row's settings are set by `start_row` and valid until the next one.

All rows are sampled at once, and the device is waited for when the tokens are read; again for
logprobs, and where top-p keeps very many.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from pd.engine.batch import RowStart, StepCommand
from pd.messages import SamplingParams, TokenLogprob

_NUCLEUS_GUESS = 1024
"""Most likely tokens looked at for top-p before sorting the whole vocabulary."""
_UNDECIDED = -1
_SETTINGS = np.dtype(
    [
        ("temperature", "f4"),
        ("top_k", "i8"),
        ("top_p", "f8"),
        ("min_p", "f8"),
        ("seed", "u8"),
        ("logprobs", "i8"),
        ("is_adjusted", "?"),
    ]
)
_Settings = npt.NDArray[np.void]
"""Of some rows."""


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


class Sampler:
    def __init__(self, max_rows: int, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._settings = np.zeros(max_rows, _SETTINGS)
        self._history = _History(vocab_size, device)

    def start_row(self, start: RowStart) -> None:
        params = start.sampling
        is_adjusted = not _is_plain(params)
        self._settings[start.row] = (
            params.temperature,
            min(params.top_k, self._vocab_size),
            params.top_p,
            params.min_p,
            params.seed,
            -1 if params.logprobs is None else params.logprobs,
            is_adjusted,
        )
        if is_adjusted:
            self._history.start_row(start)

    def sample(
        self, logits: torch.Tensor, command: StepCommand
    ) -> tuple[list[int], list[TokenLogprob | None]]:
        """logits (sampled items, vocabulary) of the command's sampling items -> a token and perhaps
        logprobs for each."""
        rows = command.rows[command.sample]
        position = (command.positions + command.counts)[command.sample]
        settings = self._settings[rows]
        raw = logits = logits.float()
        adjusted = np.flatnonzero(settings["is_adjusted"])
        if len(adjusted):
            places = self._tensor(adjusted)
            others = self._history.adjust(logits[places], rows[adjusted], position[adjusted])
            logits = logits.index_copy(0, places, others)
        tokens = logits.argmax(-1)
        random = np.flatnonzero(settings["temperature"] > 0)
        if len(random):
            numbers = uniform(settings["seed"], position.astype(np.uint64))
            guess = min(_NUCLEUS_GUESS, self._vocab_size)
            places = self._tensor(random)
            tokens[places] = _draw(logits[places], settings[random], numbers[random], guess)
        chosen: list[int] = tokens.tolist()
        if _UNDECIDED in chosen:
            again = np.flatnonzero(np.array(chosen) == _UNDECIDED)
            places = self._tensor(again)
            drawn = _draw(logits[places], settings[again], numbers[again], self._vocab_size)
            for place, token in zip(again, drawn.tolist(), strict=True):
                chosen[place] = token
        if len(adjusted):
            self._history.append(rows[adjusted], np.array(chosen)[adjusted])
        return chosen, self._token_logprobs(raw, settings["logprobs"], chosen)

    def _token_logprobs(
        self, logits: torch.Tensor, wanted: npt.NDArray[np.int64], chosen: list[int]
    ) -> list[TokenLogprob | None]:
        """`wanted`: how many of the most likely tokens', for each; negative: none at all."""
        result: list[TokenLogprob | None] = [None] * len(chosen)
        places = np.flatnonzero(wanted >= 0)
        if not len(places):
            return result
        counts = np.minimum(wanted[places], self._vocab_size)
        logprobs = torch.log_softmax(logits[self._tensor(places)], -1)
        values, ids = logprobs.topk(int(counts.max()))
        own = logprobs.gather(1, self._tensor(np.array(chosen)[places])[:, None])
        found = zip(places, counts, own[:, 0].tolist(), ids.tolist(), values.tolist(), strict=True)
        for place, count, logprob, top_ids, top_logprobs in found:
            result[place] = TokenLogprob(
                logprob, tuple(top_ids[:count]), tuple(top_logprobs[:count])
            )
        return result

    def _tensor(self, values: npt.NDArray[Any]) -> torch.Tensor:
        return _on_device(values, self._device)


def _on_device(values: npt.NDArray[Any], device: torch.device) -> torch.Tensor:
    """Without waiting for what the device has yet to do."""
    tensor = torch.from_numpy(values)
    if device.type != "cuda":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def _draw(
    logits: torch.Tensor, settings: _Settings, numbers: npt.NDArray[np.float64], guess: int
) -> torch.Tensor:
    """logits (rows, vocabulary), a number in [0, 1) each -> tokens (rows); `_UNDECIDED` where top-p
    alone may keep more tokens than `guess`."""
    fields = [settings[name] for name in ("temperature", "top_k", "top_p", "min_p")]
    parameters = _on_device(np.stack([*fields, numbers]), logits.device)
    temperature, top_k, top_p, min_p, number = parameters[:, :, None]
    # Divided after the maximum is taken off, so that no temperature makes an infinity.
    logits = logits - logits.amax(-1, keepdim=True)
    probs = torch.softmax(logits / temperature.float(), -1)
    least = probs.new_zeros(len(probs), 1)
    undecided = None
    has_nucleus = settings["top_p"] < 1
    width = np.where(settings["top_k"] > 0, settings["top_k"], np.where(has_nucleus, guess, 0))
    if width.any():
        likeliest = _likeliest(probs, int(width.max()))
        last = likeliest.gather(-1, (top_k.long() - 1).clamp(min=0))
        least = torch.where(top_k > 0, last, least)
    if has_nucleus.any():
        mass = top_p * probs.where(probs >= least, 0).sum(-1, keepdim=True, dtype=torch.float64)
        values = likeliest.where(likeliest >= least, 0).double()
        until = values.cumsum(-1)
        # The smallest set of the most likely tokens that has the mass.
        size = (until - values < mass).sum(-1, keepdim=True).clamp(min=1)
        nucleus = likeliest.gather(-1, size - 1)
        least = torch.where(top_p < 1, torch.maximum(least, nucleus), least)
        undecided = (top_p < 1) & (top_k == 0) & (until[:, -1:] < mass)
    if settings["min_p"].any():
        least = torch.maximum(least, min_p.float() * probs.amax(-1, keepdim=True))
    cumulative = probs.where(probs >= least, 0).cumsum(-1, dtype=torch.float64)
    tokens = torch.searchsorted(cumulative, number * cumulative[:, -1:], right=True)
    tokens.clamp_(max=probs.shape[-1] - 1)
    if undecided is not None and likeliest.shape[-1] < probs.shape[-1]:
        tokens.masked_fill_(undecided, _UNDECIDED)
    return tokens[:, 0]


def _likeliest(probs: torch.Tensor, count: int) -> torch.Tensor:
    """(rows, count), the largest first."""
    if count == probs.shape[-1]:
        return probs.sort(descending=True).values
    return probs.topk(count).values


def _is_plain(params: SamplingParams) -> bool:
    return (
        params.repetition_penalty == 1.0
        and not params.frequency_penalty
        and not params.presence_penalty
        and not params.logit_bias
        and not (params.min_tokens and params.stop_token_ids)
    )


class _Past:
    """Of a row with penalties, bias or a minimum length."""

    def __init__(self, start: RowStart) -> None:
        self.params = params = start.sampling
        self.prompt_len = start.prompt_len
        self.bias_ids = np.fromiter(params.logit_bias, np.int64)
        self.bias_values = np.fromiter(params.logit_bias.values(), np.float32)
        self.stop_ids = np.array(params.stop_token_ids, np.int64)


class _History:
    """What rows with penalties have had, on the device; no memory is taken for rows above the
    highest such row so far."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._device = device
        self._pasts: dict[int, _Past] = {}
        """By row."""
        self._counts = torch.zeros(0, vocab_size, device=device)
        """(rows, vocabulary): how often a token was generated."""
        self._is_prompt = torch.zeros(0, vocab_size, dtype=torch.bool, device=device)
        """(rows, vocabulary): for repetition penalties."""

    def start_row(self, start: RowStart) -> None:
        row, more = start.row, start.row + 1 - len(self._counts)
        if more > 0:
            self._counts = functional.pad(self._counts, (0, 0, 0, more))
            self._is_prompt = functional.pad(self._is_prompt, (0, 0, 0, more))
        self._pasts[row] = past = _Past(start)
        tokens = _on_device(start.tokens.astype(np.int64), self._device)
        prompt, output = tokens[: start.prompt_len], tokens[start.prompt_len :]
        counts = torch.bincount(output, minlength=self._counts.shape[1])
        self._counts[row] = counts.float()
        self._is_prompt[row] = False
        if past.params.repetition_penalty != 1.0:
            self._is_prompt[row, prompt] = True

    def adjust(
        self,
        logits: torch.Tensor,
        rows: npt.NDArray[np.int32],
        positions: npt.NDArray[np.int32],
    ) -> torch.Tensor:
        """(rows, vocabulary); `positions`: of the tokens to come."""
        pasts = [self._pasts[int(row)] for row in rows]
        places = _on_device(rows.astype(np.int64), self._device)
        counts = self._counts[places]
        fields = ("repetition_penalty", "frequency_penalty", "presence_penalty")
        penalties = [[getattr(past.params, name) for past in pasts] for name in fields]
        of_rows = _on_device(np.array(penalties, np.float32), self._device)
        repetition, frequency, presence = of_rows[:, :, None]
        was_generated = counts > 0
        scaled = torch.where(logits > 0, logits / repetition, logits * repetition)
        logits = torch.where(was_generated | self._is_prompt[places], scaled, logits)
        logits = logits - frequency * counts - presence * was_generated
        biased = _entries([past.bias_ids for past in pasts])
        if biased is not None:
            values = np.concatenate([past.bias_values for past in pasts])
            logits[self._indices(biased)] += _on_device(values, self._device)
        stopped = _entries(
            [
                past.stop_ids if position - past.prompt_len < past.params.min_tokens else _NO_IDS
                for past, position in zip(pasts, positions, strict=True)
            ]
        )
        if stopped is not None:
            logits[self._indices(stopped)] = -torch.inf
        return logits

    def append(self, rows: npt.NDArray[np.int32], tokens: npt.NDArray[np.int64]) -> None:
        index = _on_device(np.stack((rows.astype(np.int64), tokens)), self._device)
        self._counts[index[0], index[1]] += 1

    def _indices(self, entries: npt.NDArray[np.int64]) -> tuple[torch.Tensor, torch.Tensor]:
        items, ids = _on_device(entries, self._device)
        return items, ids


_NO_IDS = np.zeros(0, np.int64)


def _entries(ids: list[npt.NDArray[np.int64]]) -> npt.NDArray[np.int64] | None:
    """(2, entries): the item and the id of each; None: there are none."""
    items = np.repeat(np.arange(len(ids)), [len(each) for each in ids])
    return np.stack((items, np.concatenate(ids))) if len(items) else None
