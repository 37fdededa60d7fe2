"""Operators of `transformers` in one kernel each.

A norm of theirs is eight operators, each of which reads and writes the hidden states; torch has one
for all. Families have classes of their own, some of which calculate something else (Gemma adds one
to the weights): a class's norms are replaced if an example of it gives what torch's does. Likewise,
on a GPU, the function of a family that rotates queries and keys, which is ten operators, and gated
MLPs. Products of the same input become one there.
"""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers.activations import SiLUActivation

from pd.engine import attention

_EXAMPLE_SIZE = 64
_QUERY_KEY_VALUE = ("q_proj", "k_proj", "v_proj")
_GATED = ("gate_proj", "up_proj", "down_proj")
_SILUS = (nn.SiLU, SiLUActivation)


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
    if attention.has_kernels(hidden_states.device):
        from pd.engine.kernels import norm

        return norm(hidden_states, weight, epsilon)
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


def merge_products(model: nn.Module) -> None:
    """Of queries, keys and values, and of the gate and what it is for. For a model on a GPU, where
    small matrices take longer than to be read; each is copied."""
    names = {_QUERY_KEY_VALUE[0], _GATED[0]}
    for module in [each for each in model.modules() if names & each._modules.keys()]:
        if parts := _linears(module, _QUERY_KEY_VALUE):
            merged = _Shared(parts)
            for number, name in enumerate(_QUERY_KEY_VALUE):
                setattr(module, name, _Part(merged, number))
        elif (parts := _linears(module, _GATED)) and _is_gated(module):
            module.gate_up_proj = _merged(parts[:2])
            del module.gate_proj, module.up_proj
            module.forward = functools.partial(_gated, module)
        else:
            continue
        del parts
        # What was copied has no size that is asked for again.
        torch.cuda.empty_cache()


def _linears(module: nn.Module, names: Sequence[str]) -> list[nn.Linear]:
    """Those of these names, if they are plain, and all there."""
    found = [module._modules.get(name) for name in names]
    linears = [
        each
        for each in found
        if type(each) is nn.Linear and not each._forward_hooks and not each._forward_pre_hooks
    ]
    of_biases = {each.bias is None for each in linears}
    return linears if len(linears) == len(names) and len(of_biases) == 1 else []


def _merged(parts: Sequence[nn.Linear]) -> nn.Linear:
    has_bias = parts[0].bias is not None
    outs = [part.out_features for part in parts]
    merged = nn.Linear(parts[0].in_features, sum(outs), has_bias, device="meta")
    for name in ("weight", "bias") if has_bias else ("weight",):
        values = torch.cat([part.get_parameter(name) for part in parts])
        setattr(merged, name, nn.Parameter(values, requires_grad=False))
    return merged


class _Shared(nn.Module):
    """One product instead of several of the same input, which are all asked for, one after the
    other: what was not asked for is kept until the next input."""

    def __init__(self, parts: Sequence[nn.Linear]) -> None:
        super().__init__()
        self.linear = _merged(parts)
        self._sizes = [part.out_features for part in parts]
        self._input: torch.Tensor | None = None
        self._parts: dict[int, torch.Tensor] = {}

    def part(self, number: int, hidden_states: torch.Tensor) -> torch.Tensor:
        if hidden_states is not self._input or number not in self._parts:
            self._input = hidden_states
            self._parts = dict(enumerate(self.linear(hidden_states).split(self._sizes, -1)))
        part = self._parts.pop(number)
        if not self._parts:
            self._input = None
        return part


class _Part(nn.Module):
    def __init__(self, shared: _Shared, number: int) -> None:
        super().__init__()
        self.shared = shared
        self._number = number

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.shared.part(self._number, hidden_states)


def _gated(module: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    both = module.gate_up_proj(hidden_states)
    if isinstance(module.act_fn, _SILUS) and attention.has_kernels(both.device):
        from pd.engine.kernels import gate

        product = gate(both)
    else:
        gates, ups = both.chunk(2, -1)
        product = module.act_fn(gates) * ups
    found: torch.Tensor = module.down_proj(product)
    return found


def _is_gated(module: Any) -> bool:
    """It calculates what `_gated` does: tried with small matrices in the place of its own."""
    activation = getattr(module, "act_fn", None)
    if activation is None or module.gate_proj.out_features != module.up_proj.out_features:
        return False
    random = torch.Generator().manual_seed(0)
    sizes = ((8, 12), (8, 12), (12, 8))
    gates, ups, downs = (nn.Linear(each, other, device="cpu") for each, other in sizes)
    example = copy.copy(module)
    small = dict(zip(_GATED, (gates, ups, downs), strict=True))
    example.__dict__["_modules"] = {**module._modules, **small}
    hidden = torch.randn(3, 8, generator=random)
    with torch.no_grad():
        for linear in (gates, ups, downs):
            for parameter in linear.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=random))
        expected = downs(activation(gates(hidden)) * ups(hidden))
        try:
            found = type(module).forward(example, hidden)  # without hooks
        except (AttributeError, RuntimeError, TypeError, ValueError):
            return False  # something else has its size
        return torch.allclose(found, expected, 1e-5)
