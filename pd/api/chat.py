"""Messages of a chat to prompt text: the model's template, the spec's, or a minimal one."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import jinja2

from pd.api.text import Tokenizer

log = logging.getLogger(__name__)

PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
"""For base models: lines of "role: content", then "assistant:"."""


class ChatTemplateError(ValueError):
    """The template refuses these messages; the message is the template's."""


class ChatTemplate:
    def __init__(self, tokenizer: Tokenizer, path: str = "") -> None:
        """`path` names a Jinja file that replaces the tokenizer's template; empty: none."""
        self._tokenizer = tokenizer
        self._template: str | None = None
        self._adds_special_tokens = False
        if path:
            self._template = Path(path).read_text(encoding="utf-8")
        elif not tokenizer.chat_template:
            log.warning(
                "the model has no chat template: chats are rendered as lines of 'role: content' "
                "(model.chat_template in the spec names another)"
            )
            self._template = PLAIN_TEMPLATE
            self._adds_special_tokens = True

    def encode(self, messages: list[dict[str, Any]]) -> list[int]:
        """Token ids of the prompt that asks for the assistant's next message. Raises
        ChatTemplateError."""
        try:
            text = self._tokenizer.apply_chat_template(
                messages,
                chat_template=self._template,
                tokenize=False,
                add_generation_prompt=True,
            )
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise ChatTemplateError(str(error)) from error
        return self._tokenizer.encode(text, add_special_tokens=self._adds_special_tokens)
