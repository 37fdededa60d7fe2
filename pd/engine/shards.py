"""A rank's part of a model: which tensors, and which slices of them. No rank reads or holds more
than its part.

The part is itself a smaller model of the same architecture: fewer heads, narrower feed-forward
layers and experts, fewer words, and other stages' layers left out. `transformers` builds and loads
it from the slices. What then has to be summed over the tensor-parallel ranks is summed by hooks:
the outputs of attention and feed-forward blocks, and the embeddings; logits are gathered.

Along which dimension a tensor is cut shows from its shape in the smaller model; where it is cut,
from its name. Queries, words and inner dimensions are dealt out evenly; KV heads by Topology, which
gives a head to several ranks where there are more ranks than heads.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

from pd.cost import RankParts, UnsupportedModelError
from pd.engine.ranks import Ranks
from transfer.topology import RankCoord, Topology

_LAYER = re.compile(r"^(?:model\.)?layers\.(\d+)\.")
_MULTIMODAL = re.compile(
    r"^(?:model\.)?language_model\.(?:model\.)?(?=(?:layers|embed_tokens|norm)\.)"
)
"""Before the names of the text model in a model of several kinds of input."""
_WIDTHS = ("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size")
"""Fields of a config that tp must divide."""
_CUT = (
    *("q_proj", "q_b_proj", "kv_b_proj", "k_proj", "v_proj", "o_proj", "sinks"),
    *("gate_proj", "up_proj", "down_proj", "gate_up_proj", "gate_up_proj_bias"),
    *("w1", "w2", "w3"),
    *("embed_tokens", "lm_head"),
)
"""Names of tensors, or of their modules, that are cut."""
_ADDED = ("o_proj.bias", "down_proj.bias", "down_proj_bias")
"""Added to sums over the ranks: one rank has them, the others zeros."""


def check_topology(config: Any, topology: Topology) -> None:
    """Raises UnsupportedModelError if the model cannot be split so."""
    tp, name = topology.tp, getattr(config, "model_type", "this model")
    if topology.num_ranks > 1 and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UnsupportedModelError(f"{name}: several ranks, expected one for this kind of model")
    if topology.pp > config.num_hidden_layers:
        raise UnsupportedModelError(
            f"{name}: pp is {topology.pp}, expected at most its {config.num_hidden_layers} layers"
        )
    if tp == 1:
        return
    if getattr(config, "is_heterogeneous", False):
        raise UnsupportedModelError(f"{name}: tp is {tp}; its layers differ, so expected tp 1")
    for field in ("num_attention_heads", *_WIDTHS):
        size = getattr(config, field, None)
        if size and size % tp:
            raise UnsupportedModelError(
                f"{name}: tp is {tp}, expected a divisor of its {field}, {size}"
            )
    kv_heads = getattr(config, "num_key_value_heads", None)
    if kv_heads and kv_heads % tp and tp % kv_heads:
        raise UnsupportedModelError(
            f"{name}: tp is {tp}, expected a divisor or a multiple of its {kv_heads} KV heads"
        )


def balanced(topology: Topology, config: Any) -> Topology:
    """With stages of layers that have as equal numbers of parameters as can be, the embeddings with
    the first stage and the head with the last. Raises UnsupportedModelError."""
    check_topology(config, topology)
    if topology.pp == 1:
        return topology
    with torch.device("meta"):
        model = _class_of(config)(copy.deepcopy(config))
    sizes = [sum(p.numel() for p in layer.parameters()) for layer in model.get_decoder().layers]
    head = model.get_output_embeddings().weight.numel()
    sizes[0] += model.get_input_embeddings().weight.numel()
    sizes[-1] += head
    return dataclasses.replace(topology, stage_ends=_even_ends(sizes, topology.pp))


def rank_parts(topology: Topology, config: Any) -> RankParts:
    """Raises UnsupportedModelError."""
    topology = balanced(topology, config)
    parameters = []
    for stage in range(topology.pp):
        ranks = Ranks(topology, topology.rank(RankCoord(0, 0, stage)))
        layers = topology.stage_layers(config.num_hidden_layers, stage)
        skeleton = _skeleton(config, layers, ranks)
        parameters.append(sum(p.numel() for p in skeleton.parameters()))
    return RankParts(topology, tuple(parameters))


def _skeleton(config: Any, layers: range, ranks: Ranks) -> Any:
    """A rank's part without its numbers."""
    with torch.device("meta"):
        return _part_class(_class_of(config), layers, ranks)(local_config(config, ranks))


def _even_ends(sizes: Sequence[int], stages: int) -> tuple[int, ...]:
    """Cut into runs of at least one, so that the largest sum is the least."""

    @functools.cache
    def best(first: int, left: int) -> tuple[int, tuple[int, ...]]:
        if left == 1:
            return sum(sizes[first:]), (len(sizes),)
        choices = []
        for end in range(first + 1, len(sizes) - left + 2):
            rest, ends = best(end, left - 1)
            choices.append((max(sum(sizes[first:end]), rest), (end, *ends)))
        return min(choices)

    return best(0, stages)[1]


def local_config(config: Any, ranks: Ranks) -> Any:
    """Of the smaller model that a rank holds."""
    tp = ranks.topology.tp
    config = copy.deepcopy(config)
    if tp > 1:
        heads = config.num_attention_heads
        if not getattr(config, "kv_lora_rank", None):
            config.head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        config.num_attention_heads = heads // tp
        config.num_key_value_heads = len(ranks.topology.heads(kv_heads, ranks.coord.tp))
        for field in _WIDTHS:
            if getattr(config, field, None):
                setattr(config, field, getattr(config, field) // tp)
        config.vocab_size = -(-config.vocab_size // tp)
        config.pad_token_id = None
    if not ranks.is_last_stage:
        config.tie_word_embeddings = False
    return config


def load_part(
    folder: Path,
    config: Any,
    layers: range,
    ranks: Ranks,
    dtype: torch.dtype,
    is_random: bool,
    **options: Any,
) -> Any:
    """A rank's part of the model in `folder`, with its hooks; `layers` are the stage's. Raises
    UnsupportedModelError."""
    check_topology(config, ranks.topology)
    local = local_config(config, ranks)
    part_class = _part_class(_class_of(config), layers, ranks)
    state = _skeleton(config, layers, ranks).state_dict()
    shapes = {name: tensor.shape for name, tensor in state.items()}
    cut = _Cut(config, shapes, ranks, layers)
    if is_random:
        torch.manual_seed(0)
        with ranks.device:
            full = AutoModelForCausalLM.from_config(config, dtype=dtype, **options)
        tensors = {name: _Whole(tensor) for name, tensor in full.state_dict().items()}
        state = {name: cut(name, tensor) for name, tensor in tensors.items() if cut.wants(name)}
    else:
        state = dict(_read(folder, cut))
    model, info = part_class.from_pretrained(
        None,
        config=local,
        state_dict=state,
        dtype=dtype,
        output_loading_info=True,
        **options,
    )
    for what in ("missing_keys", "mismatched_keys"):
        if names := sorted(map(str, info[what])):
            raise UnsupportedModelError(
                f"rank {ranks.name}: {what.replace('_', ' ')} in {folder}: {', '.join(names[:5])}"
            )
    _add_hooks(model, layers, ranks, config.vocab_size)
    return model


def _class_of(config: Any) -> Any:
    return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]


class _Elsewhere(nn.Module):
    """In place of what another stage has: hands on what it is given."""

    def __init__(self, replaced: nn.Module) -> None:
        super().__init__()
        self.attention_type = getattr(replaced, "attention_type", None)

    def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return hidden_states


class _Arrived(_Elsewhere):
    """In place of the first layer, where another stage has it: what comes out is what that stage's
    neighbour has sent, whatever the model does to its inputs before the layers."""

    hidden: torch.Tensor

    def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return self.hidden


def _part_class(full: Any, layers: range, ranks: Ranks) -> Any:
    class Part(full):  # type: ignore[misc]
        def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
            super().__init__(config, *args, **kwargs)
            decoder = self.get_decoder()
            for number, layer in enumerate(decoder.layers):
                if number not in layers:
                    decoder.layers[number] = (_Elsewhere if number else _Arrived)(layer)
            is_tied = ranks.is_last_stage and config.tie_word_embeddings
            if not (ranks.is_first_stage or is_tied):
                decoder.embed_tokens = _Elsewhere(decoder.embed_tokens)
            if not ranks.is_last_stage:
                decoder.norm = _Elsewhere(decoder.norm)
                self.lm_head: nn.Module = _Elsewhere(self.lm_head)

    Part.__name__ = full.__name__
    return Part


class _Whole:
    """A tensor in memory, as safetensors gives one in a file."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor

    def get_shape(self) -> list[int]:
        return list(self._tensor.shape)

    def __getitem__(self, item: Any) -> torch.Tensor:
        return self._tensor[item].clone()


def _read(folder: Path, cut: _Cut) -> Iterator[tuple[str, torch.Tensor]]:
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for stored in file.keys():  # noqa: SIM118 (no mapping)
                name = _MULTIMODAL.sub("model.", stored).removeprefix("language_model.")
                if cut.wants(name):
                    yield name, cut(name, file.get_slice(stored))


class _Cut:
    """Takes a rank's slice of a tensor of the whole model."""

    def __init__(
        self, config: Any, shapes: dict[str, torch.Size], ranks: Ranks, layers: range
    ) -> None:
        self._config = config
        self._shapes = shapes
        self._tp, self._rank = ranks.topology.tp, ranks.coord.tp
        self._topology = ranks.topology
        self._layers = layers

    def wants(self, name: str) -> bool:
        """A name of a layer, or one that the part knows."""
        if match := _LAYER.search(name):
            return int(match[1]) in self._layers
        return any(known.endswith(name) or name.endswith(known) for known in self._shapes)

    def __call__(self, name: str, tensor: Any) -> torch.Tensor:
        """`tensor` has `get_shape` and takes slices; nothing else of it is read."""
        shape = tensor.get_shape()
        if self._tp == 1:
            return _read_part(tensor, len(shape))
        if name.endswith(_ADDED):
            whole = _read_part(tensor, len(shape))
            return whole if self._rank == 0 else torch.zeros_like(whole)
        dim = self._dim(name, shape)
        if dim is None:
            return _read_part(tensor, len(shape))
        parts = [
            _read_part(tensor, len(shape), dim, each) for each in self._ranges(name, shape[dim])
        ]
        result = torch.cat(parts, dim) if len(parts) > 1 else parts[0]
        if name.endswith(("embed_tokens.weight", "lm_head.weight")):
            lacking = -(-shape[0] // self._tp) - len(result)
            if lacking:
                result = torch.cat((result, result.new_zeros(lacking, shape[1])))
        return result

    def _dim(self, name: str, shape: list[int]) -> int | None:
        """Along which it is cut; None: not at all."""
        local = next((s for known, s in self._shapes.items() if known.endswith(name)), None)
        is_cut = any(part in _CUT for part in name.split("."))
        if local is None:
            # One expert's tensor, which is yet to be packed with the others'.
            if not is_cut or "experts" not in name:
                return None
            return 1 if {"down_proj", "w2"} & set(name.split(".")) else 0
        different = [d for d in range(len(shape)) if shape[d] != local[d]]
        if not different:
            return None
        if len(different) > 1 or not is_cut:
            raise UnsupportedModelError(
                f"{name}: tp is {self._tp}, expected 1, as it is not known how to split a "
                f"tensor of {shape}"
            )
        return different[0]

    def _ranges(self, name: str, size: int) -> list[range]:
        if ".k_proj." in name or ".v_proj." in name:
            config = self._config
            kv_heads = config.num_key_value_heads
            heads = self._topology.heads(kv_heads, self._rank)
            width = size // kv_heads
            return [range(heads.start * width, heads.stop * width)]
        if "gate_up_proj" in name.split(".") and self._config.model_type != "gpt_oss":
            # All gates, then all ups; in gpt-oss they alternate.
            half = size // 2
            own = self._even(half)
            return [own, range(half + own.start, half + own.stop)]
        return [self._even(size)]

    def _even(self, size: int) -> range:
        each = -(-size // self._tp)
        return range(min(size, self._rank * each), min(size, (self._rank + 1) * each))


def _read_part(tensor: Any, num_dims: int, dim: int = 0, part: range | None = None) -> torch.Tensor:
    index: list[slice] = [slice(None)] * num_dims
    if part is not None:
        index[dim] = slice(part.start, part.stop)
    result: torch.Tensor = tensor[tuple(index) if index else ...]
    return result


# -------------------------------------------------------------------------------------------- hooks


def _add_hooks(model: Any, layers: range, ranks: Ranks, vocab_size: int) -> None:
    if ranks.topology.tp == 1:
        return
    decoder = model.get_decoder()

    def summed(_: nn.Module, __: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (ranks.tp.all_reduce(output[0].contiguous()), *output[1:])
        return ranks.tp.all_reduce(output.contiguous())

    for number in layers:
        for block in ("self_attn", "mlp"):
            getattr(decoder.layers[number], block).register_forward_hook(summed)
    if ranks.is_first_stage:
        words = -(-vocab_size // ranks.topology.tp)
        _split_embeddings(decoder.embed_tokens, ranks.coord.tp * words, words, ranks)
    if ranks.is_last_stage:
        model.lm_head.register_forward_hook(_gather_words(ranks, vocab_size))


def _split_embeddings(embedding: nn.Module, first: int, count: int, ranks: Ranks) -> None:
    """Ranks have the rows of different words: what a rank lacks counts as nothing."""

    is_own = torch.empty(0)

    def to_own(_: nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        nonlocal is_own
        own = args[0] - first
        is_own = (own >= 0) & (own < count)
        return (own.where(is_own, 0),)

    def add(_: nn.Module, __: Any, output: torch.Tensor) -> torch.Tensor:
        return ranks.tp.all_reduce(output * is_own[..., None])

    embedding.register_forward_pre_hook(to_own)
    embedding.register_forward_hook(add)


def _gather_words(ranks: Ranks, vocab_size: int) -> Callable[..., torch.Tensor]:
    def gather(_: nn.Module, __: Any, logits: torch.Tensor) -> torch.Tensor:
        parts = ranks.tp.all_gather(logits)  # (tp, 1, items, words)
        whole = parts.permute(1, 2, 0, 3).flatten(2)
        return whole[..., :vocab_size]

    return gather
