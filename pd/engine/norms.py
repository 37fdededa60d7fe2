"""RMS norms in one kernel.

A norm of `transformers` is eight operators, each of which reads and writes the hidden states; torch
has one for all. Families have classes of their own, some of which calculate something else (Gemma
adds one to the weights): a class's norms are replaced if an example of it gives what torch's does.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from torch.nn import functional

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
