"""What a model and a spec cost together: layer groups, pages per pool, memory, the longest context.

Pure, apart from `load_config` and `weights_bytes`, which read a model folder's headers; weights are
never loaded. The engine sizes its pools with the same functions that `pd check` prints, so what is
printed is what will be.
"""

from __future__ import annotations

import dataclasses
import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pd.spec import ClusterSpec, Role, RoleSpec, SpecError
from transfer.layout import LayerGroup, PageLayout
from transfer.topology import RankCoord, ReplicaLayout, Topology

_MOST_PAGES = 2**30
"""Of a pool: page numbers have 32 bits. A stage may have no layer of the group that is sized."""
ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


class UnsupportedModelError(ValueError):
    """The model's attention is of a kind that PageRelay does not serve."""


# --------------------------------------------------------------------------------------- the model


def load_config(folder: Path) -> Any:
    """The `transformers` config of the text model in `folder`. Raises UnsupportedModelError."""
    from transformers import AutoConfig  # imports torch, about three seconds

    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UnsupportedModelError(f"{folder / 'config.json'}: {reason}") from error
    return config.get_text_config(decoder=True)


def layer_groups(config: Any) -> tuple[LayerGroup, ...]:
    """Group the layers by attention kind, window and KV shape; full attention first.

    `layer_types` decides where the config has it. Elsewhere all layers slide if `sliding_window` is
    set (configs with `use_sliding_window` clear it themselves). This is the rule by which
    transformers chooses its caches (`cache_utils.get_layer_types_and_kwargs`). Raises
    UnsupportedModelError.
    """
    _refuse_unsupported(config)
    num_layers = int(config.num_hidden_layers)
    layer_configs = getattr(config, "per_layer_config", None) or [config] * num_layers
    layer_types = getattr(config, "layer_types", None) or [None] * num_layers
    if len(layer_types) != num_layers:
        raise UnsupportedModelError(
            f"config.json: {len(layer_types)} layer_types for {num_layers} num_hidden_layers"
        )
    if latent_rank := getattr(config, "kv_lora_rank", None):
        # One latent for all heads, and the rotary part of the keys.
        dim = int(latent_rank) + int(config.qk_rope_head_dim)
        return (LayerGroup("latent", tuple(range(num_layers)), kv_heads=1, head_dim=dim),)
    groups: dict[tuple[Literal["full", "sliding"], int, int, int], list[int]] = {}
    for layer, (layer_config, layer_type) in enumerate(
        zip(layer_configs, layer_types, strict=True)
    ):
        kind, window = _attention_kind(layer, layer_config, layer_type)
        heads = int(layer_config.num_attention_heads)
        kv_heads = int(getattr(layer_config, "num_key_value_heads", None) or heads)
        head_dim = int(getattr(layer_config, "head_dim", None) or layer_config.hidden_size // heads)
        groups.setdefault((kind, window, kv_heads, head_dim), []).append(layer)
    order = sorted(groups.items(), key=lambda item: (item[0][0] != "full", item[1][0]))
    return tuple(
        LayerGroup(
            kind=kind, layers=tuple(layers), kv_heads=kv_heads, head_dim=head_dim, window=window
        )
        for (kind, window, kv_heads, head_dim), layers in order
    )


def _refuse_unsupported(config: Any) -> None:
    name = getattr(config, "model_type", "this model")
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{name}: expected a decoder, found an encoder-decoder")
    if getattr(config, "use_bidirectional_attention", False):
        raise UnsupportedModelError(f"{name}: expected causal attention, found bidirectional")
    if any(mode == "reuse" for mode in getattr(config, "kv_sharing_modes", None) or ()):
        raise UnsupportedModelError(f"{name}: layers that share their KV cache are not served yet")
    head_dim, value_dim = getattr(config, "head_dim", None), getattr(config, "v_head_dim", None)
    is_latent = bool(getattr(config, "kv_lora_rank", None))
    if head_dim and value_dim and head_dim != value_dim and not is_latent:
        raise UnsupportedModelError(
            f"{name}: keys of {head_dim} and values of {value_dim} dimensions are not served yet"
        )


def _attention_kind(
    layer: int, config: Any, layer_type: str | None
) -> tuple[Literal["full", "sliding"], int]:
    """(kind, window) of one layer; `layer_type` None: the config does not say."""
    window = getattr(config, "sliding_window", None)
    if layer_type is None:
        if window is not None:
            layer_type = "sliding_attention"
        elif getattr(config, "attention_chunk_size", None) is not None:
            layer_type = "chunked_attention"
        else:
            layer_type = "full_attention"
    if layer_type == "full_attention":
        return "full", 0
    if layer_type == "sliding_attention" and window:
        return "sliding", int(window)
    raise UnsupportedModelError(
        f"layer {layer} is {layer_type!r} with a window of {window}; expected full_attention, or "
        "sliding_attention with a window"
    )


def page_layouts(
    groups: Sequence[LayerGroup], page_tokens: int, dtype: str
) -> tuple[PageLayout, ...]:
    return tuple(PageLayout(group, page_tokens, ELEMENT_BYTES[dtype]) for group in groups)


def weights_bytes(folder: Path, dtype: str) -> int | None:
    """Size of the weights once loaded as `dtype`, from the safetensors headers, if any."""
    files = sorted(folder.glob("*.safetensors"))
    elements = 0
    for file in files:
        with file.open("rb") as stream:
            (header_bytes,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(header_bytes))
        for name, tensor in header.items():
            if name != "__metadata__":
                size = 1
                for extent in tensor["shape"]:
                    size *= extent
                elements += size
    return elements * ELEMENT_BYTES[dtype] if files else None


# --------------------------------------------------------------------------------------- the pools


def plan_pools(
    layouts: Sequence[PageLayout], role: RoleSpec, memory_bytes: int | None = None
) -> list[int]:
    """Pages of each layer group's pool on one rank; page 0 of each is reserved and counted.

    Full groups get N pages, and so do sliding ones where there is no full group. Beside a full
    group, a sliding one gets min(N, enough for everything that can run and be handed over at once):
    more could only hold older prefixes. N is `pool.pages`, or the largest that fits `pool.memory`,
    or `pool.memory_fraction` of `memory_bytes` (what is free once the weights are loaded).

    Raises SpecError when not even two pages fit; the message starts with the key below the role's.
    """
    pool = role.pool
    if pool.pages is not None:
        return _pages(layouts, role, pool.pages)
    if pool.memory is not None:
        key, budget = "pool.memory", pool.memory
    else:
        assert pool.memory_fraction is not None
        if memory_bytes is None:
            raise ValueError("pool.memory_fraction needs memory_bytes")
        key, budget = "pool.memory_fraction", int(max(0, memory_bytes) * pool.memory_fraction)

    def needed(num_pages: int) -> int:
        return _pool_bytes(layouts, _pages(layouts, role, num_pages))

    if needed(2) > budget:
        raise SpecError(
            f"{key}: found {format_bytes(budget)}, expected at least {format_bytes(needed(2))} "
            "(two pages of each layer group)"
        )
    low, high = 2, 4
    while needed(high) <= budget and high < _MOST_PAGES:
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        if needed(middle) <= budget:
            low = middle
        else:
            high = middle
    return _pages(layouts, role, low)


def plan_host(layouts: Sequence[PageLayout], memory_bytes: int) -> list[int]:
    """Pages of each layer group in a node's host tier, the reserved page 0 counted.

    Beside a full group, a sliding one gets a quarter as many: of a sequence only the last window is
    used again, unless another one branches off before. Raises SpecError when not even two fit.
    """
    is_mixed = any(layout.group.kind != "sliding" for layout in layouts)
    shares = [4 if is_mixed and layout.group.kind == "sliding" else 1 for layout in layouts]

    def pages(count: int) -> list[int]:
        return [max(2, _ceil(count, share)) for share in shares]

    if _pool_bytes(layouts, pages(2)) > memory_bytes:
        raise SpecError(
            f"cache.host.memory: found {format_bytes(memory_bytes)}, expected at least "
            f"{format_bytes(_pool_bytes(layouts, pages(2)))} (two pages of each layer group)"
        )
    each = sum(layout.page_bytes / share for layout, share in zip(layouts, shares, strict=True))
    count = max(2, int(memory_bytes / each))
    while _pool_bytes(layouts, pages(count)) > memory_bytes:
        count -= 1
    return pages(count)


def host_warnings(layouts: Sequence[PageLayout], memory_bytes: int) -> tuple[str, ...]:
    """What a node's host tier of this size will not do.

    Beside a full group, a prefix comes back only with the last window of each sliding group, and
    while one is copied in another one is found: a pool with fewer pages than two windows has hardly
    a whole one at any time. Raises SpecError as `plan_host`.
    """
    pages = plan_host(layouts, memory_bytes)
    if all(layout.group.kind == "sliding" for layout in layouts):
        return ()
    found = []
    for layout, num_pages in zip(layouts, pages, strict=True):
        if layout.group.kind != "sliding":
            continue
        windows = 2 * (_ceil(layout.group.window, layout.page_tokens) + 1)
        if num_pages - 1 < windows:
            wanted = [
                windows + 1 if each.group.kind == "sliding" else 4 * (windows + 1)
                for each in layouts
            ]
            found.append(
                f"cache.host.memory: {format_bytes(memory_bytes)} hold {num_pages - 1} pages of "
                f"{layout.page_tokens} tokens with sliding window {layout.group.window}, fewer "
                f"than two windows ({windows}): next to nothing will be found there; expected at "
                f"least {format_bytes(_pool_bytes(layouts, wanted))}"
            )
    return tuple(found)


def max_context(
    layouts: Sequence[PageLayout],
    pages: Sequence[int],
    role: RoleSpec,
    limit: int | None = None,
    cp: int = 1,
) -> int | None:
    """Longest prompt and output together that one request can have, alone in these pools, of which
    each of `cp` ranks has some.

    `limit` is the model's own. None: there is no limit, as all groups slide and have room for a
    window.
    """
    bounds = [] if limit is None else [limit]
    for layout, num_pages in zip(layouts, pages, strict=True):
        group, usable = layout.group, (num_pages - 1) * cp
        if group.kind != "sliding" or usable < _window_pages(layout, role.max_batch_tokens):
            bounds.append(usable * layout.page_tokens)
    return min(bounds, default=None)


def check_context(role: Role, longest: int | None, wanted: int | None) -> None:
    """Raise SpecError if the spec wants more than a role's pools hold."""
    if wanted is not None and longest is not None and longest < wanted:
        raise SpecError(
            f"model.max_context: found {wanted}, but roles.{role}.pool holds a request of at most "
            f"{longest} tokens"
        )


def _pages(layouts: Sequence[PageLayout], role: RoleSpec, num_pages: int) -> list[int]:
    if all(layout.group.kind == "sliding" for layout in layouts):
        return [num_pages] * len(layouts)
    return [
        num_pages
        if layout.group.kind != "sliding"
        else min(num_pages, _sliding_pages(layout, role.max_running, role.max_batch_tokens))
        for layout in layouts
    ]


def _sliding_pages(layout: PageLayout, max_running: int, max_batch_tokens: int) -> int:
    """Enough for `max_running` requests in a batch, sharing its token budget, as many that are
    being handed over or cached, and the reserved page. L consecutive tokens touch at most ceil(L /
    page) + 1 pages; one more each is for pages that are freed a step later.
    """
    each = _ceil(layout.group.window, layout.page_tokens) + 2
    return 2 * max_running * each + _ceil(max_batch_tokens, layout.page_tokens) + 1


def _window_pages(layout: PageLayout, max_batch_tokens: int) -> int:
    """Pages that one request of any length can hold: its window and a chunk."""
    window, page_tokens = layout.group.window, layout.page_tokens
    return _ceil(window, page_tokens) + _ceil(max_batch_tokens, page_tokens) + 2


def _pool_bytes(layouts: Sequence[PageLayout], pages: Sequence[int]) -> int:
    return sum(
        layout.page_bytes * num_pages for layout, num_pages in zip(layouts, pages, strict=True)
    )


def _ceil(value: int, divisor: int) -> int:
    return -(-value // divisor)


# ---------------------------------------------------------------------------------------- the cost


@dataclasses.dataclass(frozen=True, slots=True)
class RankParts:
    """How the ranks of a replica share a model (pd/engine/shards.py)."""

    topology: Topology
    """With its stages."""
    parameters: tuple[int, ...]
    """Of one rank, by stage."""


@dataclasses.dataclass(frozen=True, slots=True)
class RoleCost:
    """One role; sizes are of one rank, the largest."""

    role: Role
    device: str
    min_replicas: int
    max_replicas: int
    ranks: int
    """Of one replica."""
    weights_bytes: int | None
    resources: Mapping[str, float]
    pages: tuple[int, ...] | None
    """By layer group; None: decided on the worker, from its free memory."""
    kv_bytes: int | None
    max_context: int | None


@dataclasses.dataclass(frozen=True, slots=True)
class Cost:
    architecture: str
    dtype: str
    weights_bytes: int | None
    layouts: tuple[PageLayout, ...]
    roles: tuple[RoleCost, ...]
    max_context: int | None
    """Of a request that passes through all roles; None: unknown until the workers have started."""
    warnings: tuple[str, ...] = ()

    @property
    def token_bytes(self) -> int:
        """KV of one token in all layer groups."""
        return sum(layout.token_bytes for layout in self.layouts)


def estimate_cost(
    spec: ClusterSpec,
    config: Any,
    weights: int | None,
    free_memory: Mapping[str, int | None],
    parts: Mapping[Role, RankParts] = {},
) -> Cost:
    """Join spec and model. `free_memory` has bytes by device before loading; None where unknown.
    `parts` are those of the roles with several ranks.

    Raises UnsupportedModelError, and SpecError where the spec asks for what the model or the pools
    cannot.
    """
    layouts = page_layouts(layer_groups(config), spec.page_tokens, spec.model.dtype)
    limit = getattr(config, "max_position_embeddings", None)
    wanted = spec.model.max_context
    if wanted is not None and limit is not None and wanted > limit:
        raise SpecError(
            f"model.max_context: found {wanted}, expected at most {limit} "
            "(the model's max_position_embeddings)"
        )
    roles = []
    for role, role_spec in spec.roles.items():
        free = free_memory.get(role_spec.device)
        stages = _stages(layouts, weights, parts.get(role), ELEMENT_BYTES[spec.model.dtype])
        pages: list[int] | None = None
        if role_spec.pool.memory_fraction is None or free is not None:
            try:
                fitting = [
                    plan_pools(held, role_spec, None if free is None else free - (size or 0))
                    for held, size in stages
                ]
            except SpecError as error:
                raise SpecError(f"roles.{role}.{error}") from None
            pages = [min(counts) for counts in zip(*fitting, strict=True)]
        cp = role_spec.topology.cp
        longest = limit if pages is None else max_context(layouts, pages, role_spec, limit, cp)
        check_context(role, longest, wanted)
        sizes = [size for _, size in stages if size is not None]
        roles.append(
            RoleCost(
                role=role,
                device=role_spec.device,
                min_replicas=role_spec.replicas.min,
                max_replicas=role_spec.replicas.max,
                ranks=role_spec.topology.num_ranks,
                weights_bytes=max(sizes, default=None),
                resources=role_spec.rank_resources(),
                pages=None if pages is None else tuple(pages),
                kv_bytes=None
                if pages is None
                else max(_pool_bytes(held, pages) for held, _ in stages),
                max_context=None if pages is None else longest,
            )
        )
    host = spec.cache.host
    known = all(role.pages is not None for role in roles)
    bounds = [role.max_context for role in roles if role.max_context is not None]
    longest = wanted or (min(bounds, default=limit) if known else None)
    return Cost(
        architecture=str(getattr(config, "model_type", "unknown")),
        dtype=spec.model.dtype,
        weights_bytes=weights,
        layouts=layouts,
        roles=tuple(roles),
        max_context=longest,
        warnings=() if host is None else host_warnings(layouts, host.memory),
    )


def _stages(
    layouts: Sequence[PageLayout], weights: int | None, parts: RankParts | None, element_bytes: int
) -> list[tuple[list[PageLayout], int | None]]:
    """(layouts of its pages, bytes of weights) of the first rank of each stage."""
    if parts is None:
        return [(list(layouts), weights)]
    replica = ReplicaLayout(parts.topology, tuple(layouts))
    ranks = [parts.topology.rank(RankCoord(0, 0, pp)) for pp in range(parts.topology.pp)]
    return [
        ([replica.rank_layout(group, rank) for group in range(len(layouts))], count * element_bytes)
        for rank, count in zip(ranks, parts.parameters, strict=True)
    ]


def describe(cost: Cost) -> dict[str, Any]:
    """`cost` as JSON; the device tier is the only one so far."""
    return {
        "architecture": cost.architecture,
        "dtype": cost.dtype,
        "weights_bytes": cost.weights_bytes,
        "token_bytes": cost.token_bytes,
        "max_context": cost.max_context,
        "groups": [
            {
                "kind": layout.group.kind,
                "window": layout.group.window or None,
                "layers": list(layout.group.layers),
                "kv_heads": layout.group.kv_heads,
                "head_dim": layout.group.head_dim,
                "page_tokens": layout.page_tokens,
                "token_bytes": layout.token_bytes,
                "page_bytes": layout.page_bytes,
            }
            for layout in cost.layouts
        ],
        "roles": [
            {
                "role": role.role,
                "device": role.device,
                "replicas": {"min": role.min_replicas, "max": role.max_replicas},
                "ranks_per_replica": role.ranks,
                "weights_bytes_per_rank": role.weights_bytes,
                "resources_per_rank": dict(role.resources),
                "pages": {"device": None if role.pages is None else list(role.pages)},
                "kv_bytes": role.kv_bytes,
                "max_context": role.max_context,
            }
            for role in cost.roles
        ],
        "warnings": list(cost.warnings),
    }


def format_bytes(size: int) -> str:
    """1536 -> 1.5 KiB."""
    value = float(size)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.4g} {unit}"
        value /= 1024
    return f"{value:.4g} TiB"
