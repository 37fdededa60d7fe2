"""A rank's model: weights from a local folder, page pools, and the forward pass of one step.

Model code is `transformers`'; attention, cache and batching are ours (`attention.py`, `pool.py`,
`batch.py`). One thread uses a ModelRunner. It obeys commands and decides nothing.
"""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

from pd.cost import layer_groups
from pd.engine import attention
from pd.engine.batch import RowStart, StepCommand, StepResult
from pd.engine.pool import PagePool
from pd.engine.sampler import Sampler
from pd.messages import SamplingParams
from pd.spec import ModelSpec
from transfer.layout import PageLayout

LAYOUT_VERSION = 1
"""Of rule 1's byte order; part of the compatibility check and of every page hash."""

AttentionInterface.register(attention.IMPLEMENTATION, attention.paged_attention)


class ModelRunner:
    """`layouts` are known once the config is read; `allocate` must be called before `step`."""

    def __init__(
        self, folder: Path, spec: ModelSpec, page_tokens: int, device: torch.device
    ) -> None:
        self.device = device
        self.dtype: torch.dtype = getattr(torch, spec.dtype)
        self.compute_dtype = compute_dtype(spec, device)
        config = AutoConfig.from_pretrained(folder)
        self.groups = layer_groups(config)
        self.layouts = [
            PageLayout(group, page_tokens, self.dtype.itemsize) for group in self.groups
        ]
        self.vocab_size: int = config.get_text_config().vocab_size
        self.max_positions: int | None = getattr(
            config.get_text_config(), "max_position_embeddings", None
        )
        self.model = self._load(folder, spec, config)
        ends = self.model.generation_config.eos_token_id
        self.end_tokens: tuple[int, ...] = (
            () if ends is None else tuple(ends) if isinstance(ends, list) else (ends,)
        )
        self.pools: list[PagePool] = []
        self._place = {
            layer: (number, place)
            for number, group in enumerate(self.groups)
            for place, layer in enumerate(group.layers)
        }

    def _load(self, folder: Path, spec: ModelSpec, config: Any) -> Any:
        config._attn_implementation = attention.IMPLEMENTATION
        if spec.load == "random":
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(
                config, dtype=self.dtype, attn_implementation=attention.IMPLEMENTATION
            )
        else:
            model = AutoModelForCausalLM.from_pretrained(
                folder,
                config=config,
                dtype=self.dtype,
                attn_implementation=attention.IMPLEMENTATION,
            )
        return model.to(device=self.device, dtype=self.compute_dtype).eval()

    def allocate(self, num_pages: list[int], max_rows: int, max_context: int) -> None:
        """Create the pools (page 0 of each is the null page) and the rows of the running batch."""
        self.pools = [
            PagePool(layout, count, self.dtype, self.device)
            for layout, count in zip(self.layouts, num_pages, strict=True)
        ]
        width = -(-max_context // self.layouts[0].page_tokens) + 1
        self._tables = [np.zeros((max_rows, width), np.int32) for _ in self.pools]
        self._sampler = Sampler(max_rows, self.vocab_size, self.device)

    def warm_up(self, num_tokens: int) -> None:
        """Run a chunk and a single token through the null page, so that the first request does not
        pay for what libraries set up on first use."""
        params = SamplingParams(max_tokens=1, temperature=0.0)
        for count in (num_tokens, 1):
            tokens = np.zeros(count, np.int32)
            start = RowStart(0, params, tokens, count)
            zero, counts = np.zeros(1, np.int32), np.array([count], np.int32)
            pages = [np.zeros((0, 3), np.int32) for _ in self.pools]
            self.step(StepCommand([start], zero, zero, counts, np.ones(1, np.bool_), tokens, pages))
        for pool in self.pools:
            pool.data[0].zero_()

    @torch.inference_mode()
    def step(self, command: StepCommand) -> StepResult:
        """Run one command; writes the pools' pages named in it."""
        begin = time.perf_counter()
        for start in command.starts:
            self._sampler.start_row(start)
        for table, update in zip(self._tables, command.pages, strict=True):
            table[update[:, 0], update[:, 1]] = update[:, 2]
        plan = attention.plan_attention(command, self.pools, self._tables, self._place)
        ends = np.cumsum(command.counts)
        positions = np.arange(len(command.tokens)) + np.repeat(
            command.positions - (ends - command.counts), command.counts
        )
        with attention.use_plan(plan):
            logits = self.model(
                input_ids=self._tensor(command.tokens)[None],
                position_ids=self._tensor(positions)[None],
                use_cache=False,
                logits_to_keep=self._tensor(ends[command.sample] - 1),
            ).logits[0]
        tokens, logprobs = self._sampler.sample(logits, command) if len(logits) else ([], [])
        if self.device.type == "cuda":
            # The pages are sent next, by somebody who knows nothing of this stream.
            torch.cuda.current_stream(self.device).synchronize()
        return StepResult(tokens, logprobs, time.perf_counter() - begin)

    def _tensor(self, values: np.ndarray[Any, Any]) -> torch.Tensor:
        return torch.from_numpy(values.astype(np.int64)).to(self.device)


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
