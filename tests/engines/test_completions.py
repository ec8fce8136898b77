"""POST /v1/completions through gaie-codec to every engine, with the real openai SDK."""

from __future__ import annotations

import json
from typing import Any

import model
import openai
import pytest

from conftest import Served


def prompt(script: dict[str, Any], text: str = " x") -> str:
    return f"{text} [[mock {json.dumps(script, ensure_ascii=False)}]]"


def complete(served: Served, **request: Any) -> Any:
    return served.client.completions.create(**({"model": model.NAME} | request))


class TestCompletions:
    @pytest.mark.parametrize(
        ("script", "request_", "text", "finish", "tokens"),
        [
            ({"text": "né 你好"}, {}, "né 你好", "stop", 11),
            ({"text": "abcdef"}, {"max_tokens": 3}, "abc", "length", 3),
            ({"text": "abcXYZdef", "delay": 0.01}, {"stop": ["XYZ"]}, "abc", "stop", 6),
            ({"text": ""}, {}, "", "stop", 1),
        ],
        ids=["plain", "length", "stop string", "empty"],
    )
    def test_unary_is_stream(
        self, served: Served, script: dict[str, Any], request_: dict[str, Any], text: str, finish: str, tokens: int
    ) -> None:
        request = {"prompt": prompt(script), "max_tokens": 50} | request_
        unary = complete(served, **request)
        assert (unary.choices[0].text, unary.choices[0].finish_reason) == (text, finish)
        assert unary.usage.prompt_tokens == len(model.encode(request["prompt"]))
        assert unary.usage.completion_tokens == tokens
        chunks = list(complete(served, stream=True, stream_options={"include_usage": True}, **request))
        assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == text
        assert [choice.finish_reason for chunk in chunks for choice in chunk.choices if choice.finish_reason] == [finish]
        assert chunks[-1].usage.model_dump(exclude_none=True) == unary.usage.model_dump(exclude_none=True)

    def test_default_limit(self, served: Served) -> None:
        if served.traits.passthrough:
            pytest.skip("the default is the model server's own")
        answer = complete(served, prompt=prompt({"text": "x" * 30}))
        assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("x" * 16, "length")

    def test_token_ids(self, served: Served) -> None:
        if served.traits.passthrough:
            pytest.skip("the handlers that would decode them are not here")
        answer = complete(served, prompt=model.encode(prompt({"text": "ok"})), max_tokens=9)
        assert answer.choices[0].text == "ok"

    def test_prompts_and_n(self, served: Served) -> None:
        if served.traits.passthrough:
            pytest.skip("the handlers here know one prompt")
        answer = complete(served, prompt=[prompt({"text": "one"}), prompt({"text": "two"})], n=2, max_tokens=9)
        assert [(choice.index, choice.text) for choice in answer.choices] == [(0, "one"), (1, "one"), (2, "two"), (3, "two")]
        assert answer.usage.completion_tokens == 16

    def test_log_probabilities_of_an_echo(self, served: Served) -> None:
        if not served.traits.logprobs:
            pytest.skip("the model server has none, or passes its own on")
        asked = prompt({"text": "né", "delay": 0.01})
        request: dict[str, Any] = {"prompt": asked, "max_tokens": 9, "logprobs": 1, "echo": True}
        unary = complete(served, **request).choices[0]
        assert unary.text == f"{asked}né"
        known = unary.logprobs
        assert "".join(known.tokens).startswith(unary.text)
        assert known.text_offset == [sum(map(len, known.tokens[:place])) for place in range(len(known.tokens))]
        assert known.token_logprobs[0] is None
        if served.engine.name in ("vllm-native", "smg-vllm-python"):  # the other fakes tell none of the prompt
            assert None not in known.token_logprobs[1:]
        pieces = [choice for chunk in complete(served, stream=True, **request) for choice in chunk.choices]
        assert "".join(piece.text for piece in pieces) == unary.text
        for name in ("tokens", "token_logprobs", "text_offset", "top_logprobs"):
            assert [item for piece in pieces if piece.logprobs for item in getattr(piece.logprobs, name)] == getattr(known, name)

    def test_log_probabilities_of_the_prompt(self, served: Served) -> None:
        if served.engine.name not in ("vllm-native", "smg-vllm-python"):
            pytest.skip("the fake tells none")
        asked = prompt({"text": "ok"})
        (choice,) = complete(served, prompt=asked, max_tokens=9, extra_body={"prompt_logprobs": 2}).choices
        first, *places = choice.prompt_logprobs
        assert first is None
        ids = model.encode(asked)
        assert [next(iter(place)) for place in places] == [str(token_id) for token_id in ids[1:]]
        assert {len(place) for place in places} == {2}
        assert {next(iter(place.values()))["rank"] for place in places} == {1}

    def test_a_suffix_is_refused_by_name(self, served: Served) -> None:
        if served.traits.passthrough:
            pytest.skip("refused or not by the model server")
        with pytest.raises(openai.BadRequestError) as refused:
            complete(served, prompt=" x", suffix="!")
        assert refused.value.param == "suffix"

    def test_error(self, served: Served) -> None:
        with pytest.raises(openai.APIStatusError) as raised:
            complete(served, prompt=prompt({"error": {"status": 400, "message": "no"}}), max_tokens=9)
        assert raised.value.status_code == served.traits.statuses[400]
