"""What the types of a message do not say, and a leader relies on. Pure.

A message that does not keep to it is dropped before it has changed anything: nothing that a peer
sends may end a replica. Not checked is what only the model knows: token ids against the vocabulary,
and that page hashes are those of the prompt.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from pd.messages import AnyMessage, Generate, PrefillDone, Reserve
from pd.spec import MAX_PRIORITIES
from transfer.layout import LayerGroup

_HASH_BYTES = 32
_TOKEN_BYTES = 4
_MAX_TENANT_LENGTH = 128
_MOST_TOKENS = 1 << 28
"""That a request may generate; a buffer for them is reserved, though not filled."""


def is_sound(message: AnyMessage, groups: Sequence[LayerGroup], page_tokens: int) -> bool:
    match message:
        case Generate():
            return _is_prompt_sound(message, page_tokens)
        case Reserve():
            return _is_prompt_sound(message, page_tokens) and _are_targets_sound(
                message, groups, page_tokens
            )
        case PrefillDone():
            return 0 <= message.token < 1 << 31
    return True


def _is_prompt_sound(message: Generate | Reserve, page_tokens: int) -> bool:
    num_tokens, rest = divmod(len(message.prompt), _TOKEN_BYTES)
    return (
        num_tokens > 0
        and not rest
        and len(message.root) == _HASH_BYTES
        and len(message.page_hashes) == num_tokens // page_tokens * _HASH_BYTES
        and 1 <= message.sampling.max_tokens <= _MOST_TOKENS
        and math.isfinite(message.timeout_s)
        and len(message.tenant) <= _MAX_TENANT_LENGTH
        and 0 <= message.num_delivered < num_tokens
        and 0 <= message.priority < MAX_PRIORITIES
    )


def _are_targets_sound(message: Reserve, groups: Sequence[LayerGroup], page_tokens: int) -> bool:
    """They are the last pages of the prompt, and those still needed where its last page is
    computed; or none."""
    if len(message.targets) != len(groups):
        return False
    num_tokens = len(message.prompt) // _TOKEN_BYTES
    total = -(-num_tokens // page_tokens)
    for group, target in zip(groups, message.targets, strict=True):
        num_pages, rest = divmod(len(target.pages), _TOKEN_BYTES)
        needed = group.first_needed_page((total - 1) * page_tokens, page_tokens)
        is_end = target.first_page >= needed and target.first_page + num_pages == total
        if rest or target.first_page < 0 or (num_pages and not is_end):
            return False
    return True
