"""A rank's model: weights from a local folder, page pools, and the forward pass of one step.

Model code is `transformers`'; attention, cache and batching are ours (`attention.py`, `pool.py`,
`batch.py`). One thread uses a ModelRunner. It obeys commands and decides nothing.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, GenerationConfig

from pd.cost import layer_groups
from pd.engine import attention
from pd.engine.batch import LAST_SAMPLED, RowStart, StepCommand, StepResult
from pd.engine.fused import fuse_norms, fuse_rotary, merge_products
from pd.engine.pool import PagePool
from pd.engine.ranks import Ranks
from pd.engine.sampler import Sampler
from pd.engine.shards import load_part
from pd.messages import SamplingParams
from pd.spec import ModelSpec
from transfer.layout import PageLayout
from transfer.topology import ReplicaLayout

if TYPE_CHECKING:
    from pd.engine.graphs import StepGraphs

LAYOUT_VERSION = 1
"""Of rule 1's byte order; part of the compatibility check and of every page hash."""

_loading = threading.Lock()
"""transformers changes global settings meanwhile, and a process may have several ranks."""

AttentionInterface.register(attention.IMPLEMENTATION, attention.paged_attention)


class ModelRunner:
    """The model of one rank. `layouts` are known once the config is read; `allocate` must be called
    before `step`. With several ranks, all of them run the same steps in the same order."""

    def __init__(
        self,
        folder: Path,
        spec: ModelSpec,
        page_tokens: int,
        device: torch.device,
        ranks: Ranks | None = None,
    ) -> None:
        """Raises UnsupportedModelError."""
        self.device = device
        if device.type == "cuda":
            # Where its plans pay, `attention.py` calls it by name.
            torch.backends.cuda.enable_cudnn_sdp(False)
        self.ranks = ranks = ranks or Ranks(device=device)
        self.dtype: torch.dtype = getattr(torch, spec.dtype)
        self.compute_dtype = compute_dtype(spec, device)
        config = AutoConfig.from_pretrained(folder)
        text_config = config.get_text_config(decoder=True)
        self.groups = layer_groups(text_config)
        self.layouts = [
            PageLayout(group, page_tokens, self.dtype.itemsize) for group in self.groups
        ]
        """Of whole pages, with all heads and layers."""
        self.replica_layout = whole = ReplicaLayout(ranks.topology, tuple(self.layouts))
        self.rank_layouts = [whole.rank_layout(g, ranks.rank) for g in range(len(self.groups))]
        """Of this rank's part of them."""
        self.vocab_size: int = text_config.vocab_size
        self.max_positions: int | None = getattr(text_config, "max_position_embeddings", None)
        self._hidden_size: int = text_config.hidden_size
        self._layers = ranks.topology.stage_layers(whole.num_layers, ranks.coord.pp)
        self._place = {
            layer: (number, place)
            for number, layout in enumerate(self.rank_layouts)
            for place, layer in enumerate(layout.group.layers)
        }
        with _loading:
            self.model = self._load(folder, spec, config)
        self.end_tokens = _end_tokens(folder, self.model)
        self.pools: list[PagePool] = []
        self.graphs: StepGraphs | None = None
        """Of small steps, where they can be captured."""

    def _load(self, folder: Path, spec: ModelSpec, config: Any) -> Any:
        config._attn_implementation = attention.IMPLEMENTATION
        options: dict[str, Any] = {"attn_implementation": attention.IMPLEMENTATION}
        is_random = spec.load == "random"
        if self.ranks.topology.num_ranks > 1:
            config = config.get_text_config(decoder=True)
            config._attn_implementation = attention.IMPLEMENTATION
            model = load_part(
                folder, config, self._layers, self.ranks, self.dtype, is_random, **options
            )
        elif is_random:
            torch.manual_seed(0)
            with self.device:
                model = AutoModelForCausalLM.from_config(config, dtype=self.dtype, **options)
        else:
            options |= {"config": config, "dtype": self.dtype}
            model = AutoModelForCausalLM.from_pretrained(folder, **options)
        layers = model.get_decoder().layers
        for layer, (group, _) in self._place.items():
            if self.groups[group].kind == "latent":
                attention.keep_latent(layers[layer].self_attn)
        if self.ranks.cp.size > 1 and self.ranks.is_last_stage:
            model.lm_head.register_forward_pre_hook(self._collect_samples)
        fuse_norms(model)
        model = model.to(device=self.device, dtype=self.compute_dtype).eval()
        if attention.has_kernels(self.device):
            fuse_rotary(model)
            merge_products(model)
        return model

    def allocate(self, num_pages: list[int], max_rows: int, max_context: int) -> None:
        """Create the pools (page 0 of each is the null page) and the rows of the running batch."""
        self.pools = [
            PagePool(layout, count, self.dtype, self.device)
            for layout, count in zip(self.rank_layouts, num_pages, strict=True)
        ]
        width = -(-max_context // self.layouts[0].page_tokens) + 1
        self._tables = [np.zeros((max_rows, width), np.int32) for _ in self.pools]
        self._sampler = Sampler(max_rows, self.vocab_size, self.device)
        self._last_sampled = np.zeros(max_rows, np.int32)
        self.graphs = None
        self._max_context = max_context
        if self.ranks.topology.num_ranks == 1 and all(map(attention.can_page, self.pools)):
            from pd.engine.graphs import StepGraphs

            self.graphs = StepGraphs(self._forward, self.pools, self._place, max_rows, width)

    def warm_up(self, max_tokens: int) -> None:
        """Run a chunk and a single token through the null page, so that the first request does not
        pay for what libraries set up on first use. `max_tokens`: of a step."""
        # Before the largest step, so that what does not fit does not fit now.
        if self.graphs is not None and not self.graphs.capture_all(max_tokens):
            self.graphs = None
        graphs, self.graphs = self.graphs, None
        params = SamplingParams(max_tokens=1, temperature=0.0)
        for count in (min(max_tokens, self._max_context), 1):
            tokens = np.zeros(count, np.int32)
            start = RowStart(0, params, tokens, count)
            zero, counts = np.zeros(1, np.int32), np.array([count], np.int32)
            pages = [np.zeros((0, 3), np.int32) for _ in self.pools]
            self.step(StepCommand([start], zero, zero, counts, np.ones(1, np.bool_), tokens, pages))
        for pool in self.pools:
            pool.data[0].zero_()
        self.graphs = graphs

    def step(self, command: StepCommand) -> StepResult:
        """Run one command; writes the pools' pages named in it. Only the rank that samples has
        tokens to tell. Raises RankError."""
        return self.begin(command)()

    @torch.inference_mode()
    def begin(self, command: StepCommand) -> Callable[[], StepResult]:
        """`step`, in two parts: this one takes little time, and launches what is one launch; the
        returned function, called before the next command, does the rest and waits."""
        began_at = time.perf_counter()
        if self.ranks.samples:
            for start in command.starts:
                self._sampler.start_row(start)
        for table, update in zip(self._tables, command.pages, strict=True):
            table[update[:, 0], update[:, 1]] = update[:, 2]
        command = self._with_sampled(command)
        if self.graphs is not None:
            logits = self.graphs.step(command, self._tables)
            if logits is not None:
                return lambda: self._done(self._sample(logits, command), began_at)
        return lambda: self._done(self._compute(command), began_at)

    @torch.inference_mode()
    def _compute(self, command: StepCommand) -> StepResult:
        """Without a graph."""
        ranks = self.ranks
        plan = attention.plan_attention(command, self.pools, self._tables, self._place, ranks.cp)
        ends = np.cumsum(command.counts)
        positions = command.token_positions()
        padding = plan.own < 0
        inputs: dict[str, Any] = {
            "position_ids": self._tensor(np.where(padding, 0, positions[plan.own]))[None],
            "use_cache": False,
        }
        if ranks.is_first_stage:
            tokens = np.where(padding, 0, command.tokens[plan.own])
            inputs["input_ids"] = self._tensor(tokens)[None]
        else:
            shape = (1, len(plan.own), self._hidden_size)
            hidden = torch.empty(shape, dtype=self.compute_dtype, device=self.device)
            hidden = ranks.pp.receive(hidden, ranks.coord.pp - 1)
            inputs["inputs_embeds"] = self.model.get_decoder().layers[0].hidden = hidden
        result = StepResult([], [], 0.0)
        with attention.use_plan(plan):
            if not ranks.is_last_stage:
                hidden = self.model.get_decoder()(**inputs).last_hidden_state
                ranks.pp.send(hidden, ranks.coord.pp + 1)
            elif command.sample.any():
                result = self._finish(command, inputs, plan.own, ends)
            else:
                self.model.get_decoder()(**inputs)
        return result

    def _done(self, result: StepResult, began_at: float) -> StepResult:
        if self.device.type == "cuda":
            # The pages are sent next, by somebody who knows nothing of this stream.
            torch.cuda.current_stream(self.device).synchronize()
        return dataclasses.replace(result, seconds=time.perf_counter() - began_at)

    def _forward(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        samples: torch.Tensor,
        plan: attention.AttentionPlan,
    ) -> torch.Tensor:
        """-> logits, (samples, vocabulary)."""
        with attention.use_plan(plan):
            found = self.model(
                input_ids=tokens.long()[None],
                position_ids=positions.long()[None],
                logits_to_keep=samples.long(),
                use_cache=False,
            )
        logits: torch.Tensor = found.logits[0]
        return logits

    def _finish(
        self,
        command: StepCommand,
        inputs: dict[str, Any],
        own: np.ndarray[Any, Any],
        ends: np.ndarray[Any, Any],
    ) -> StepResult:
        """The last stage's part: logits of the items that sample, and their tokens."""
        last = ends[command.sample] - 1
        local = np.full(len(command.tokens), -1)
        local[own[own >= 0]] = np.arange((own >= 0).sum())
        self._sampled = np.flatnonzero(local[last] >= 0), len(last)
        keep = self._tensor(local[last[self._sampled[0]]])
        logits = self.model(logits_to_keep=keep, **inputs).logits[0]
        return self._sample(logits, command) if self.ranks.samples else StepResult([], [], 0.0)

    @torch.inference_mode()
    def _sample(self, logits: torch.Tensor, command: StepCommand) -> StepResult:
        if not len(logits):
            return StepResult([], [], 0.0)
        tokens, logprobs = self._sampler.sample(logits, command)
        self._last_sampled[command.rows[command.sample]] = tokens
        return StepResult(tokens, logprobs, 0.0)

    def _with_sampled(self, command: StepCommand) -> StepCommand:
        """Tokens in place of LAST_SAMPLED."""
        unknown = command.tokens == LAST_SAMPLED
        if not unknown.any():
            return command
        last = np.repeat(self._last_sampled[command.rows], command.counts)
        return dataclasses.replace(command, tokens=np.where(unknown, last, command.tokens))

    def _collect_samples(self, _: Any, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        """(1, own samples, hidden) -> (1, samples, hidden): each context-parallel rank has the
        hidden states of its own tokens."""
        places, count = self._sampled
        hidden = args[0].new_zeros(count, args[0].shape[-1])
        hidden[self._tensor(places)] = args[0][0]
        return (self.ranks.cp.all_reduce(hidden)[None],)

    def _tensor(self, values: np.ndarray[Any, Any]) -> torch.Tensor:
        return torch.from_numpy(values.astype(np.int64)).to(self.device)


def _end_tokens(folder: Path, model: Any) -> tuple[int, ...]:
    try:
        ends = GenerationConfig.from_pretrained(folder).eos_token_id
    except OSError:  # it has none of its own
        ends = model.generation_config.eos_token_id
    return () if ends is None else tuple(ends) if isinstance(ends, list) else (ends,)


def compute_dtype(spec: ModelSpec, device: torch.device) -> torch.dtype:
    """`auto`: the model's dtype where the device calculates in it, float32 on a CPU that would
    emulate it (a bfloat16 matrix product is then 5 times slower than a float32 one)."""
    dtype: torch.dtype = getattr(
        torch, spec.dtype if spec.compute_dtype == "auto" else spec.compute_dtype
    )
    if spec.compute_dtype == "auto" and device.type == "cpu":
        native = (
            torch.cpu._is_avx512_bf16_supported()
            if dtype == torch.bfloat16
            else torch.cpu._is_amx_fp16_supported()
        )
        return dtype if native else torch.float32
    return dtype


def weights_digest(folder: Path, spec: ModelSpec) -> str:
    """Of what decides a page's content: config and weights (of each file its size, its header and
    256 blocks of 4 KiB, evenly spaced)."""
    digest = hashlib.sha256(spec.load.encode())
    config = json.loads((folder / "config.json").read_text())
    config.pop("transformers_version", None)
    digest.update(json.dumps(config, sort_keys=True).encode())
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            size = path.stat().st_size
            header_bytes = int.from_bytes(file.read(8), "little")
            digest.update(f"{path.name}:{size}:".encode() + file.read(header_bytes))
            for number in range(256):
                file.seek(size * number // 256)
                digest.update(file.read(4096))
    return digest.hexdigest()[:16]
