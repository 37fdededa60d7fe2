"""What `transformers` alone gives: the gold model that served tokens and logits are compared
with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM


class ReferenceModel:
    """A model in float32, one sequence at a time, with transformers' own attention and cache."""

    def __init__(self, folder: Path) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.vocab_size: int = self._model.config.get_text_config().vocab_size

    def generate(self, prompt: Sequence[int], max_tokens: int) -> list[int]:
        """Greedy tokens after the prompt; end tokens do not end them."""
        ids = torch.tensor([list(map(int, prompt))])
        with torch.inference_mode():
            out = self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_tokens,
                do_sample=False,
                top_k=None,
                top_p=None,
                eos_token_id=None,
                pad_token_id=0,
            )
        tokens: list[int] = out[0, len(prompt) :].tolist()
        return tokens

    def is_greedy(self, prompt: Sequence[int], tokens: Sequence[int]) -> bool:
        """Whether `generate` would give these tokens, in one forward pass."""
        logits = self.logits([*prompt, *tokens], len(tokens) + 1)
        return logits[:-1].argmax(-1).tolist() == list(tokens)

    def gap(self, prompt: Sequence[int], tokens: Sequence[int]) -> float:
        """How far a token's logit is below the best one, at most; 0: they are greedy."""
        logits = self.logits([*prompt, *tokens], len(tokens) + 1)[:-1]
        chosen = logits.gather(1, torch.tensor([list(tokens)]).T)[:, 0]
        return float((logits.amax(-1) - chosen).max())

    def logits(self, tokens: Sequence[int], last: int = 0) -> torch.Tensor:
        """(len(tokens), vocabulary): row i is what follows tokens[: i + 1]; `last`: so many rows
        from the end on only."""
        ids = torch.tensor([list(map(int, tokens))])
        with torch.inference_mode():
            output = self._model(ids, use_cache=False, logits_to_keep=last)
        logits: torch.Tensor = output.logits[0].float()
        return logits
