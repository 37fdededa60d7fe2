"""Operators of `transformers` in one kernel each.

A norm of theirs is eight operators, each of which reads and writes the hidden states; torch has one
for all. Families have classes of their own, some of which calculate something else (Gemma adds one
to the weights): a class's norms are replaced if an example of it gives what torch's does. Likewise
the function of a family that rotates queries and keys, on a GPU: it is ten operators.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from pd.engine import attention

_EXAMPLE_SIZE = 64


def fuse_norms(model: nn.Module) -> int:
    """How many there are now; the hooks of the replaced ones stay."""
    count = 0
    for module in model.modules():
        epsilon = _epsilon(module)
        if epsilon is not None and _is_plain(type(module), epsilon):  # type: ignore[arg-type]
            module.forward = functools.partial(_normed, module, epsilon)
            count += 1
    return count


def _normed(module: Any, epsilon: float, hidden_states: torch.Tensor) -> torch.Tensor:
    weight = module.weight
    return functional.rms_norm(hidden_states, weight.shape, weight, epsilon)


def _epsilon(module: nn.Module) -> float | None:
    """Of what may be such a norm: its one parameter is a vector called weight."""
    parameters = dict(module.named_parameters())
    epsilon = vars(module).get("variance_epsilon")
    if list(parameters) != ["weight"] or parameters["weight"].dim() != 1:
        return None
    return epsilon if isinstance(epsilon, float) else None


@functools.cache
def _is_plain(kind: type[nn.Module], epsilon: float) -> bool:
    random = torch.Generator().manual_seed(0)
    example = kind(_EXAMPLE_SIZE, epsilon).float()
    weight = torch.rand(_EXAMPLE_SIZE, generator=random)
    hidden = torch.randn(3, _EXAMPLE_SIZE, generator=random) * (epsilon**0.5)
    with torch.no_grad():
        example.get_parameter("weight").copy_(weight)
        found = example(hidden)
    return torch.allclose(found, functional.rms_norm(hidden, weight.shape, weight, epsilon), 1e-5)


def fuse_rotary(model: nn.Module) -> None:
    """For a model on a GPU: functions of its families that rotate queries and keys."""
    for name in {type(module).__module__ for module in model.modules()}:
        family = vars(sys.modules[name])
        plain = family.get("apply_rotary_pos_emb")
        if plain is not None and plain not in _fused and _rotates_halves(plain):
            family["apply_rotary_pos_emb"] = _fused_rotary(plain)
            _fused.add(family["apply_rotary_pos_emb"])


_fused: set[Callable[..., Any]] = set()


def _fused_rotary(plain: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(plain)
    def rotate_both(q: Any, k: Any, cos: Any, sin: Any, *more: Any, **named: Any) -> Any:
        # The family may have other models in this process: they are not ours to change.
        if more or named or not attention.is_active() or not _fits(q, k, cos):
            return plain(q, k, cos, sin, *more, **named)
        from pd.engine.kernels import rotate

        return rotate(q[0], k[0], cos[0], sin[0])

    return rotate_both


def _fits(query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor) -> bool:
    return (
        query.is_cuda
        and query.shape[0] == cos.shape[0] == 1
        and query.shape[-1] == key.shape[-1] == cos.shape[-1]
        and query.stride(-1) == key.stride(-1) == cos.stride(-1) == 1
    )


def _rotates_halves(plain: Callable[..., Any]) -> bool:
    random = torch.Generator().manual_seed(0)
    query, key, cos, sin = (
        torch.randn(1, *shape, generator=random) for shape in ((2, 3, 8), (1, 3, 8), (3, 8), (3, 8))
    )
    try:
        found = plain(query, key, cos, sin)
    except (RuntimeError, TypeError, ValueError):
        return False
    expected = (_rotated(each[0], cos[0], sin[0]) for each in (query, key))
    return all(
        ours.shape == theirs[0].shape and torch.allclose(ours, theirs[0], 1e-5)
        for ours, theirs in zip(expected, found, strict=True)
    )


def _rotated(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = states.chunk(2, -1)
    return states * cos + torch.cat((-second, first), -1) * sin
