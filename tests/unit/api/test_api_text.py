"""Incremental text equals the whole text, whatever the chunks."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pd.api.text import ChoiceText, Detokenizer, StopStrings, Vocabulary
from pd.messages import Output, SamplingParams, TokenLogprob


def train_byte_fallback() -> Any:
    """Spaces as in sentencepiece, bytes for all that has no token of its own (Llama 2, Gemma)."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for byte in range(256):
        vocabulary[f"<0x{byte:02X}>"] = len(vocabulary)
    for piece in ["▁", "a", "b", "c", "▁a", "▁b", "é", "ab", "▁ab", "."]:
        vocabulary[piece] = len(vocabulary)
    model = models.BPE(
        vocabulary, [("a", "b"), ("▁", "a"), ("▁", "b"), ("▁", "ab")], byte_fallback=True
    )
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


BYTE_FALLBACK = train_byte_fallback()
_vocabularies: dict[int, Vocabulary] = {}


def vocabulary_of(tokenizer: Any) -> Vocabulary:
    return _vocabularies.setdefault(id(tokenizer), Vocabulary(tokenizer))


def whole(tokenizer: Any, token_ids: list[int]) -> str:
    text: str = tokenizer.decode(
        token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return text


def split(items: list[Any], cuts: list[int]) -> list[list[Any]]:
    bounds = [0, *sorted(cut % (len(items) + 1) for cut in cuts), len(items)]
    return [items[a:b] for a, b in itertools.pairwise(bounds)]


def byte_level_ids(size: int) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(0, size - 1), max_size=60)


# Runs of bytes that begin and continue characters are what goes wrong.
FALLBACK_IDS = st.lists(
    st.one_of(
        st.integers(0, len(BYTE_FALLBACK) - 1),
        st.sampled_from([3 + byte for byte in b"\xc3\xa9\xe2\x82\xac\xf0\x9f\x98\x80"]),
    ),
    max_size=60,
)
CUTS = st.lists(st.integers(0, 60), max_size=40)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), cuts=CUTS)
def test_byte_level_text_equals_the_whole(tokenizer: Any, data: Any, cuts: list[int]) -> None:
    ids = data.draw(byte_level_ids(len(tokenizer)))
    detokenizer = Detokenizer(vocabulary_of(tokenizer))
    parts = [detokenizer.push(part) for part in split(ids, cuts)]
    assert "".join(parts) + detokenizer.flush() == whole(tokenizer, ids)


@settings(max_examples=150, deadline=None)
@given(ids=FALLBACK_IDS, cuts=CUTS)
def test_byte_fallback_text_equals_the_whole(ids: list[int], cuts: list[int]) -> None:
    detokenizer = Detokenizer(vocabulary_of(BYTE_FALLBACK))
    parts = [detokenizer.push(part) for part in split(ids, cuts)]
    assert "".join(parts) + detokenizer.flush() == whole(BYTE_FALLBACK, ids)


@settings(max_examples=100, deadline=None)
@given(prompt=st.text("ab é€c.", min_size=1, max_size=30), text=st.text("ab é€c.", max_size=30))
def test_text_continues_its_context(prompt: str, text: str) -> None:
    prompt_ids = BYTE_FALLBACK.encode(prompt, add_special_tokens=False)
    ids = BYTE_FALLBACK.encode(text, add_special_tokens=False)
    detokenizer = Detokenizer(vocabulary_of(BYTE_FALLBACK), prompt_ids)
    got = "".join(detokenizer.push([token]) for token in ids) + detokenizer.flush()
    assert got == whole(BYTE_FALLBACK, prompt_ids + ids)[len(whole(BYTE_FALLBACK, prompt_ids)) :]


@settings(max_examples=100, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd")))
def test_no_half_character_is_emitted(tokenizer: Any, text: str) -> None:
    for some in (tokenizer, BYTE_FALLBACK):
        detokenizer = Detokenizer(vocabulary_of(some))
        ids = some.encode(text, add_special_tokens=False)
        parts = [detokenizer.push([token]) for token in ids]
        if whole(some, ids) == text:  # not so where the decoder strips or normalises
            assert "\ufffd" not in "".join(parts)


def test_the_window_stays_small(tokenizer: Any) -> None:
    incomplete = tokenizer.convert_tokens_to_ids("â")  # the byte 0xE2
    detokenizer = Detokenizer(vocabulary_of(tokenizer))
    text = "".join(detokenizer.push([incomplete]) for _ in range(500))
    assert text == "\ufffd" * 499
    assert len(detokenizer._window) < 32


def naive_cut(text: str, stops: list[str]) -> tuple[str, bool]:
    """At the first character where some stop string is complete, cut before the longest one."""
    for end in range(1, len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)], True
    return text, False


@settings(max_examples=500, deadline=None)
@given(
    text=st.text("abc", max_size=40),
    stops=st.lists(st.text("abc", min_size=1, max_size=5), max_size=5),
    cuts=st.lists(st.integers(0, 40), max_size=30),
)
def test_stop_strings_equal_the_naive_cut(text: str, stops: list[str], cuts: list[int]) -> None:
    matcher = StopStrings(stops)
    got, found = "", False
    for part in split(list(text), cuts):
        new, found = matcher.push("".join(part))
        got += new
        assert text.startswith(got)
        if found:
            break
    else:
        got += matcher.flush()
    assert (got, found) == naive_cut(text, stops)


def test_text_is_held_back_only_while_it_could_become_a_stop_string() -> None:
    matcher = StopStrings(["END.", "ENOUGH"])
    assert matcher.push("the EN") == ("the ", False)
    assert matcher.push("D") == ("", False)
    assert matcher.push("!") == ("END!", False)
    assert matcher.push("x") == ("x", False)


def run_choice(
    tokenizer: Any,
    ids: list[int],
    stops: list[str],
    group: int,
    finish: Any = "length",
    **sampling: Any,
) -> tuple[str, Any, ChoiceText, list[int]]:
    params = SamplingParams(max_tokens=100, **sampling)
    choice = ChoiceText(vocabulary_of(tokenizer), params, stops)
    text, offsets = "", []
    for start in range(0, len(ids), group):
        part = tuple(ids[start : start + group])
        last = start + group >= len(ids)
        logprobs = tuple(TokenLogprob(-1.0) for _ in part) if params.logprobs is not None else ()
        delta = choice.push(Output("r", part, logprobs, finish if last else None))
        text += delta.text
        offsets += [entry.text_offset for entry in delta.logprobs]
        # What was released together belongs together.
        assert all(offset <= len(text) for offset in offsets)
        if delta.finish_reason:
            return text, delta.finish_reason, choice, offsets
    raise AssertionError("the choice did not end")


@pytest.mark.parametrize("group", [1, 2, 3, 100])
def test_what_counts_does_not_depend_on_how_tokens_are_grouped(tokenizer: Any, group: int) -> None:
    ids = tokenizer.encode("one two! three four", add_special_tokens=False)
    text, reason, choice, offsets = run_choice(tokenizer, ids, ["! th"], group, logprobs=0)
    assert (text, reason) == ("one two", "stop")
    alone = run_choice(tokenizer, ids, ["! th"], 1, logprobs=0)
    assert choice.num_tokens == alone[2].num_tokens < len(ids)
    assert offsets == alone[3]


def test_a_stop_token_has_no_text_but_counts(tokenizer: Any) -> None:
    ids = tokenizer.encode("the fox.", add_special_tokens=False)
    text, reason, choice, offsets = run_choice(
        tokenizer, ids, [], 2, "stop", stop_token_ids=(ids[-1],), logprobs=0
    )
    assert (text, reason) == ("the fox", "stop")
    assert choice.num_tokens == len(ids)
    assert len(offsets) == len(ids) - 1


def test_stop_strings_do_not_count_before_min_tokens(tokenizer: Any) -> None:
    ids = tokenizer.encode("abababab", add_special_tokens=False)
    assert run_choice(tokenizer, ids, ["b"], 1)[0] == "a"
    assert run_choice(tokenizer, ids, ["b"], 1, min_tokens=4)[0] == "ababa"


def test_pieces_have_their_exact_bytes(tokenizer: Any) -> None:
    vocabulary = vocabulary_of(tokenizer)
    ids = tokenizer.encode("x漢", add_special_tokens=False)
    assert b"".join(vocabulary.piece(token)[1] for token in ids) == "x漢".encode()
    fallback = vocabulary_of(BYTE_FALLBACK)
    ids = BYTE_FALLBACK.encode("a€ b", add_special_tokens=False)
    assert b"".join(fallback.piece(token)[1] for token in ids).strip() == "a€ b".encode()
    assert vocabulary.piece(tokenizer.eos_token_id)[0] == "<|end|>"
