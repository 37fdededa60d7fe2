"""Sampling written down plainly, one token at a time: what the batched sampler is compared with.

The order is that of `SamplingParams`: penalties and bias, temperature, top_k, top_p, min_p, one
number. The number's generator is not written twice: `uniform` is tested for itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from pd.engine.sampler import uniform
from pd.messages import SamplingParams

Floats = npt.NDArray[np.float64]


def adjusted_logits(
    logits: torch.Tensor, params: SamplingParams, prompt: Sequence[int], output: Sequence[int]
) -> Floats:
    """Penalties, bias and the minimum length applied to one position's logits."""
    result = logits.double().numpy().copy()
    for token in {*map(int, prompt), *map(int, output)}:
        factor = params.repetition_penalty
        result[token] = result[token] / factor if result[token] > 0 else result[token] * factor
    for token in {*output}:
        result[token] -= params.frequency_penalty * list(output).count(token)
        result[token] -= params.presence_penalty
    for token, bias in params.logit_bias.items():
        result[token] += bias
    if len(output) < params.min_tokens:
        result[list(params.stop_token_ids)] = -np.inf
    return result


def kept_probabilities(logits: Floats, params: SamplingParams) -> Floats:
    """After temperature, top_k, top_p and min_p; not normalised."""
    scaled = logits / params.temperature
    probs = np.exp(scaled - scaled.max())
    probs /= probs.sum()
    order = np.argsort(-probs, kind="stable")
    if params.top_k:
        probs[order[params.top_k :]] = 0
    if params.top_p < 1:
        mass, kept = params.top_p * probs.sum(), 0.0
        for token in order:
            if kept >= mass:
                probs[token] = 0
            kept += probs[token]
    probs[probs < params.min_p * probs.max()] = 0
    return probs


def choose_token(
    logits: torch.Tensor, params: SamplingParams, prompt: Sequence[int], output: Sequence[int]
) -> int:
    adjusted = adjusted_logits(logits, params, prompt, output)
    if params.temperature == 0:
        return int(adjusted.argmax())
    probs = kept_probabilities(adjusted, params)
    position = np.array([len(prompt) + len(output)], np.uint64)
    number = uniform(np.array([params.seed], np.uint64), position)[0]
    cumulative = probs.cumsum()
    return int(np.searchsorted(cumulative, number * cumulative[-1], side="right"))
