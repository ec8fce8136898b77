"""Prompts of completions: which values are prompts, and what is wrong with the others, as pydantic has it of vLLM's union."""

from __future__ import annotations

from typing import Annotated, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, TypeAdapter, ValidationError

from gaie_codec import MalformedRequestError, ModelInfo, RequestError, UnsupportedFieldError
from gaie_codec.openai.prompts import MAX_PROMPTS, decode_prompts
from gaie_codec.testing import ByteTokenizer

TOKENIZER = ByteTokenizer()
TokenIds = list[Annotated[int, Field(ge=0)]]
PROMPT = TypeAdapter(TokenIds | list[TokenIds] | str | list[str])

SCALARS = st.one_of(st.integers(-2, 5), st.sampled_from(("a", "7", 1.5, 2.0, None, True)), st.just({}))
VALUES = st.one_of(SCALARS, st.lists(st.one_of(SCALARS, st.lists(SCALARS, max_size=2)), min_size=1, max_size=3))


def decode(value: Any, most: int = MAX_PROMPTS) -> tuple[list[str | None], list[list[int]]]:
    return decode_prompts({"prompt": value, "add_special_tokens": False}, TOKENIZER, ModelInfo(), most)


@given(value=VALUES)
def test_faults_are_those_of_each_form(value: Any) -> None:
    try:
        expected = PROMPT.validate_python(value)
    except ValidationError as error:
        if value is None:
            return
        lines = [f"{error.error_count()} validation errors:"]
        for fault in error.errors():
            loc = ".".join(["body.prompt", *(str(part) for part in fault["loc"] if not isinstance(part, str))])
            context = f", 'ctx': {fault['ctx']!r}" if "ctx" in fault else ""
            lines.append(f"  {{'type': {fault['type']!r}, 'loc': {loc!r}, 'msg': {fault['msg']!r}{context}}}")
        with pytest.raises(MalformedRequestError) as caught:
            decode(value)
        assert caught.value.message == "\n".join(lines)
        return
    texts, ids = decode(value)
    if isinstance(expected, str):
        assert texts == [expected]
    elif all(isinstance(one, str) for one in expected):
        assert texts == expected
    else:
        assert ids == (expected if isinstance(expected[0], list) else [expected])
        assert texts == [None] * len(ids)


@pytest.mark.parametrize(
    ("value", "most", "kind", "param", "words"),
    [
        (None, 5, MalformedRequestError, None, "Either prompt or prompt_embeds must be provided"),
        ("", 5, MalformedRequestError, None, "Either prompt or prompt_embeds must be provided"),
        ([], 5, MalformedRequestError, "prompt", "You must pass at least one prompt"),
        ([[TOKENIZER.vocab_size]], 5, MalformedRequestError, None, f"Token id {TOKENIZER.vocab_size} is out of vocabulary"),
        (["a"] * 6, 5, UnsupportedFieldError, "prompt", "takes 6 calls, and this gateway makes at most 5"),
        (["a"] * 1025, 2000, MalformedRequestError, "prompt", "exceeds the maximum allowed count of 1024"),
    ],
)
def test_what_is_refused(value: Any, most: int, kind: type[RequestError], param: str | None, words: str) -> None:
    with pytest.raises(kind) as caught:
        decode(value, most)
    assert caught.value.param == param
    assert words in caught.value.message


def test_ids_of_a_padded_vocabulary_are_taken_and_a_long_one_is_not_told_whole() -> None:
    padded = ModelInfo(vocab_size=TOKENIZER.vocab_size + 8)
    assert decode_prompts({"prompt": [TOKENIZER.vocab_size]}, TOKENIZER, padded, 1)[1] == [[TOKENIZER.vocab_size]]
    with pytest.raises(MalformedRequestError, match="Token id 1000") as caught:
        decode([10**4000])
    assert len(caught.value.message) < 600


def test_not_every_fault_of_many_is_told() -> None:
    with pytest.raises(MalformedRequestError, match="100 validation errors") as caught:
        decode([[None] * 100_000])
    assert len(caught.value.message) < 20_000


def test_many_ids_are_one_prompt() -> None:
    assert decode([1] * 2000, 5)[1] == [[1] * 2000]
