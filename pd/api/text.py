"""Tokens to text, while they come: incremental decoding, stop strings, one choice's visible text.

Pure: no socket, no clock. `Detokenizer` gives exactly what the tokenizer gives for the whole
sequence with special tokens skipped, and never half a character. `StopStrings` holds text back only
while it could still become a stop string. `ChoiceText` joins both and keeps logprobs in step with
the text that was released.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from pd.messages import FinishReason, Output, SamplingParams, TokenLogprob

_WINDOW = 16
"""Tokens decoded again at each step before the window is shortened."""
_KEPT = 8
"""Tokens kept as context; more than the four bytes of the longest character."""
_REPLACEMENT = "\ufffd"


class Tokenizer(Protocol):
    """What the API needs of a tokenizer; those of transformers are ones."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...

    def decode(
        self,
        token_ids: list[int],
        *,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool = False,
    ) -> str: ...

    def convert_ids_to_tokens(self, ids: int) -> str | None: ...

    def convert_tokens_to_ids(self, tokens: str) -> int | None: ...

    @property
    def chat_template(self) -> Any: ...

    def apply_chat_template(self, conversation: list[dict[str, Any]], **options: Any) -> Any: ...


class Vocabulary:
    """A tokenizer's decoding side, with what is looked up per token kept. Shared by all
    requests."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._pieces: dict[int, tuple[str, bytes]] = {}
        self._silent: dict[int, bool] = {}
        self._byte_tokens = frozenset(self._find_byte_tokens())
        anchor = tokenizer.encode("a", add_special_tokens=False)[-1:]
        self._anchor = anchor, self.decode(anchor)

    def decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(
            token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def is_open(self, token_id: int) -> bool:
        """Whether text that ends with this token may change when more tokens follow.

        A run of byte-fallback tokens becomes characters, or a U+FFFD for each, when it has ended;
        tokens without text do not end it.
        """
        if not self._byte_tokens:
            return False
        silent = self._silent.get(token_id)
        if silent is None:
            anchor, anchor_text = self._anchor
            silent = self._silent[token_id] = self.decode([*anchor, token_id]) == anchor_text
        return silent or token_id in self._byte_tokens

    def piece(self, token_id: int) -> tuple[str, bytes]:
        """One token's text as it stands after other text, and its bytes; special tokens are
        shown."""
        known = self._pieces.get(token_id)
        if known is None:
            known = self._pieces[token_id] = self._find_piece(token_id)
        return known

    def _find_piece(self, token_id: int) -> tuple[str, bytes]:
        anchor, anchor_text = self._anchor
        text = self._tokenizer.decode(
            [*anchor, token_id], skip_special_tokens=False, clean_up_tokenization_spaces=False
        ).removeprefix(anchor_text)
        token = self._tokenizer.convert_ids_to_tokens(token_id) or ""
        if token_id in self._byte_tokens:
            return text, bytes([int(token[3:5], 16)])
        if _REPLACEMENT in text and all(character in _BYTE_OF for character in token):
            return text, bytes(_BYTE_OF[character] for character in token)
        return text, text.encode("utf-8", "replace")

    def _find_byte_tokens(self) -> list[int]:
        found = []
        for value in range(256):
            name = f"<0x{value:02X}>"
            token_id = self._tokenizer.convert_tokens_to_ids(name)
            if token_id is not None and self._tokenizer.convert_ids_to_tokens(token_id) == name:
                found.append(token_id)
        return found


def _byte_level_alphabet() -> dict[str, int]:
    """Character to byte, as byte-level BPE vocabularies write bytes (GPT-2, `bytes_to_unicode`)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    other = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {
        chr(256 + i): byte for i, byte in enumerate(other)
    }


_BYTE_OF = _byte_level_alphabet()


class Detokenizer:
    """Text of one growing token sequence.

    `context` (the end of the prompt) is what the text continues, so that a first token's leading
    space is kept; without it the text is what the tokens decode to alone.
    """

    def __init__(self, vocabulary: Vocabulary, context: Sequence[int] = ()) -> None:
        self._vocabulary = vocabulary
        self._window = list(context[-_KEPT:])
        self._released = len(vocabulary.decode(self._window)) if self._window else 0
        """Characters of the window's text that were given out (or belong to the context)."""

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that is certain now, and was not before."""
        num_old = len(self._window)
        self._window += token_ids
        end = len(self._window)
        while end > num_old and self._vocabulary.is_open(self._window[end - 1]):
            end -= 1
        if end == num_old:
            return ""
        text = self._vocabulary.decode(self._window[:end])
        # At most the last character can be incomplete; it is decoded as one replacement character.
        certain = len(text) - text.endswith(_REPLACEMENT)
        new = text[self._released : certain]
        self._released = max(certain, self._released)
        if end == len(self._window) and end >= _WINDOW and end % _KEPT == 0:
            self._shorten(text)
        return new

    def flush(self) -> str:
        """The rest, when no token follows; incomplete characters become U+FFFD."""
        new = self._vocabulary.decode(self._window)[self._released :]
        self._released += len(new)
        return new

    def _shorten(self, text: str) -> None:
        kept = self._window[-_KEPT:]
        kept_text = self._vocabulary.decode(kept)
        held = len(text) - self._released
        # Where the text of the kept tokens depends on those before them, all stay.
        if len(kept_text) > held and text.endswith(kept_text):
            self._window = kept
            self._released = len(kept_text) - held


class StopStrings:
    """Cuts a text at the stop string whose last character comes first (of several, the longest)."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """(text that is certainly before any stop string, whether one was found)."""
        buffer = self._held + text
        found = [
            (buffer.find(stop) + len(stop), buffer.find(stop))
            for stop in self._stops
            if stop in buffer
        ]
        if found:
            self._held = ""
            return buffer[: min(found)[1]], True
        held = max((_overlap(buffer, stop) for stop in self._stops), default=0)
        self._held = buffer[len(buffer) - held :]
        return buffer[: len(buffer) - held], False

    def flush(self) -> str:
        """The text held back, when none follows."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`, and is not all of it."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0


@dataclass(frozen=True, slots=True)
class LogprobEntry:
    token_id: int
    logprob: TokenLogprob
    text_offset: int
    """Characters of the choice's text before this token's."""


@dataclass(slots=True)
class TextDelta:
    """What one `Output` adds to a choice."""

    text: str = ""
    logprobs: list[LogprobEntry] = field(default_factory=list)
    finish_reason: FinishReason | None = None


class ChoiceText:
    """The visible text of one choice.

    After a delta with a finish reason nothing may be pushed. When a stop string ends the choice,
    that is before the worker knows: the caller closes the stream.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        sampling: SamplingParams,
        stops: Sequence[str],
        context: Sequence[int] = (),
    ) -> None:
        self._detokenizer = Detokenizer(vocabulary, context)
        self._stops = StopStrings(stops) if stops else None
        self._sampling = sampling
        self._decoded = 0
        """Characters that the detokenizer gave, and those of them that were released."""
        self._released = 0
        self._entries: list[LogprobEntry] = []
        self.num_tokens = 0
        """Sampled tokens that count: up to the one that ended the choice, with it."""

    def push(self, output: Output) -> TextDelta:
        delta = TextDelta()
        token_ids = output.token_ids
        is_stop_token = (
            output.finish_reason == "stop"
            and bool(token_ids)
            and token_ids[-1] in self._sampling.stop_token_ids
        )
        visible = token_ids[:-1] if is_stop_token else token_ids
        if self._stops is None and not output.logprobs:
            self.num_tokens += len(visible)
            self._decode(visible, delta)
        else:
            # One by one, so that what counts does not depend on how the tokens were grouped.
            for i, token_id in enumerate(visible):
                self.num_tokens += 1
                if output.logprobs:
                    entry = LogprobEntry(token_id, output.logprobs[i], self._decoded)
                    self._entries.append(entry)
                if self._decode((token_id,), delta):
                    return self._finish(delta, "stop")
        if output.finish_reason is not None:
            self.num_tokens += is_stop_token
            rest = self._detokenizer.flush()
            if self._release(rest, delta):
                return self._finish(delta, "stop")
            if self._stops is not None:
                delta.text += self._stops.flush()
            self._released = self._decoded
            delta.logprobs += self._entries
            delta.finish_reason = output.finish_reason
            return delta
        self._release_entries(delta)
        return delta

    def _decode(self, token_ids: Sequence[int], delta: TextDelta) -> bool:
        return self._release(self._detokenizer.push(token_ids), delta)

    def _release(self, text: str, delta: TextDelta) -> bool:
        """Add what is certain to the delta; True when a stop string was found."""
        self._decoded += len(text)
        found = False
        if self._stops is not None and text and self.num_tokens > self._sampling.min_tokens:
            text, found = self._stops.push(text)
        delta.text += text
        self._released += len(text)
        return found

    def _release_entries(self, delta: TextDelta) -> None:
        num = sum(entry.text_offset < self._released for entry in self._entries)
        delta.logprobs += self._entries[:num]
        del self._entries[:num]

    def _finish(self, delta: TextDelta, reason: FinishReason) -> TextDelta:
        self._release_entries(delta)
        delta.finish_reason = reason
        return delta
