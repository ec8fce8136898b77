"""The same requests through gaie-codec to every engine, with the real openai SDK. `make engines` runs it."""

from __future__ import annotations

import concurrent.futures
import json
import time
from typing import Any

import httpx
import model
import openai
import pytest

from conftest import Served, ask

USAGE = {"include_usage": True}
EXCEPTIONS = {400: openai.BadRequestError, 429: openai.RateLimitError, 500: openai.InternalServerError, 503: openai.InternalServerError}
DELAY = 0.01  # between tokens, so that they are not merged on the way


def prompt_tokens(messages: list[Any]) -> int:
    text = "".join(f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n" for message in messages)
    return len(model.encode(f"{text}<|im_start|>assistant\n"))


def texts(chunks: list[Any]) -> list[str]:
    return [choice.delta.content for chunk in chunks for choice in chunk.choices if choice.delta.content]


def finishes(chunks: list[Any]) -> list[str]:
    return [choice.finish_reason for chunk in chunks for choice in chunk.choices if choice.finish_reason]


def same_both_ways(served: Served, text: str, finish: str, completion_tokens: int | None = None, **request: Any) -> None:
    """Unary and stream give that text, that finish_reason, and the same usage."""
    unary = served.chat(**request)
    chunks = served.stream(stream_options=USAGE, **request)
    assert unary.choices[0].message.content == text
    assert "".join(texts(chunks)) == text
    assert unary.choices[0].finish_reason == finish
    assert finishes(chunks) == [finish]
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.model_dump(exclude_none=True) == unary.usage.model_dump(exclude_none=True)
    if completion_tokens is not None:
        assert unary.usage.completion_tokens == completion_tokens


class TestAnswers:
    def test_models_and_health(self, served: Served) -> None:
        assert [card.id for card in served.client.models.list()] == ([model.NAME] if served.traits.names_model else [])
        assert served.http.get("/health").status_code == 200

    @pytest.mark.parametrize(
        "script",
        [
            {},
            {"text": "Emoji 🌍👋🏽 and 你好"},
            {"text": ["several tokens", " a", " step 你", "好"]},
            {"text": ""},
            {"tokens": [[*model.encode("a"), model.IDS[b"<think>"]], model.encode("b")]},
        ],
        ids=["default", "split characters", "steps", "empty", "special token"],
    )
    def test_unary_is_stream(self, served: Served, script: dict[str, Any]) -> None:
        steps = script.get("tokens") or [model.encode("".join(script.get("text", " hello world! é你")))]
        ids = [token_id for step in steps for token_id in step]
        same_both_ways(served, model.decode(ids, special=False), "stop", len(ids) + 1, messages=ask(script))

    def test_prompt_tokens(self, served: Served) -> None:
        messages = ask({"text": "a"}, "Grüße, 你好")
        answer = served.chat(messages=messages)
        if not served.traits.passthrough:
            assert answer.usage.prompt_tokens == prompt_tokens(messages)
        assert answer.usage.total_tokens == answer.usage.prompt_tokens + 2

    def test_no_broken_characters(self, served: Served) -> None:
        chunks = served.stream(messages=ask({"text": "né 你好 🌍", "delay": DELAY}))
        assert "".join(texts(chunks)) == "né 你好 🌍"
        assert all("\ufffd" not in text for text in texts(chunks))
        assert len(texts(chunks)) >= 7  # one for each character, none of them waits for the next

    def test_cut_in_a_character(self, served: Served) -> None:
        # Who makes the text decides: vLLM's and SGLang's Rust front ends say U+FFFD; our own text has vLLM's Python one as its model.
        messages = ask({"text": "a你b", "delay": DELAY})
        text = served.chat(messages=messages, max_tokens=3).choices[0].message.content
        assert text in ("a", "a\ufffd")
        same_both_ways(served, text, "length", 3, messages=messages, max_tokens=3)

    def test_n(self, served: Served) -> None:
        messages = ask({"text": ["one ", "two 你"]})
        tokens = len(model.encode("one two 你")) + 1
        unary = served.chat(messages=messages, n=2)
        assert [(choice.index, choice.message.content) for choice in unary.choices] == [(0, "one two 你"), (1, "one two 你")]
        assert unary.usage.completion_tokens == 2 * tokens
        assert unary.usage.total_tokens == unary.usage.prompt_tokens + 2 * tokens
        chunks = served.stream(messages=messages, n=2, stream_options=USAGE)
        for index in (0, 1):
            mine = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
            assert "".join(choice.delta.content or "" for choice in mine) == "one two 你"
            assert [choice.finish_reason for choice in mine if choice.finish_reason] == ["stop"]
        assert chunks[-1].usage.completion_tokens == 2 * tokens

    def test_many_at_once(self, served: Served) -> None:
        def one(number: int) -> str:
            messages = ask({"text": f"answer {number} 你", "delay": 0.002})
            return (
                "".join(texts(served.stream(messages=messages)))
                if number % 2
                else served.chat(messages=messages).choices[0].message.content
            )

        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            assert list(pool.map(one, range(32))) == [f"answer {number} 你" for number in range(32)]


class TestEndings:
    @pytest.mark.parametrize(
        ("text", "stop", "kept", "tokens"),
        [
            ("abcXYZdef", ["XYZ"], "abc", 6),
            (" hello world! x", "wor", " hello ", 2),
            # No count: of a step's tokens after the stop string, vLLM's Rust front end counts none, its Python one all.
            (["ab", "c Stop", " here and", " more"], ["Stop h"], "abc ", None),
            ("one two three", ["three", "two"], "one ", 7),
            ("né 你好", ["好"], "né 你", 10),
            ("XYabXYcX", ["XYZ"], "XYabXYcX", 9),
        ],
        ids=["spanning", "in a token", "steps", "first of two", "characters", "never"],
    )
    def test_stop_strings(self, served: Served, text: Any, stop: Any, kept: str, tokens: int | None) -> None:
        messages = ask({"text": text, "delay": DELAY})
        same_both_ways(served, kept, "stop", tokens, messages=messages, stop=stop)
        so_far = ""
        for chunk in texts(served.stream(messages=messages, stop=stop)):
            so_far += chunk
            assert kept.startswith(so_far)

    def test_length(self, served: Served) -> None:
        same_both_ways(served, "abc", "length", 3, messages=ask({"text": "abcdef"}), max_tokens=3)

    def test_max_completion_tokens(self, served: Served) -> None:
        same_both_ways(served, "ab", "length", 2, messages=ask({"text": "abcdef"}), max_completion_tokens=2)

    def test_no_limit_is_the_context(self, served: Served) -> None:
        long = "x" * 600  # more than SGLang's own default of 128
        same_both_ways(served, long, "stop", 601, messages=ask({"text": [long[:200]] * 3}))

    def test_stop_token_ids(self, served: Served) -> None:
        request = {"messages": ask({"text": "ab world cd"}), "extra_body": {"stop_token_ids": [model.IDS[b" world"]]}}
        same_both_ways(served, "ab", "stop", 3, **request)

    def test_second_end_token(self, served: Served) -> None:
        if served.traits.passthrough:
            pytest.skip("what ends an answer is the model server's business")
        same_both_ways(served, "a", "stop", 2, messages=ask({"tokens": [model.encode("a"), [model.SECOND_EOS], model.encode("b")]}))

    def test_ignore_eos(self, served: Served) -> None:
        same_both_ways(served, "abab", "length", 4, messages=ask({"text": "ab"}), max_tokens=4, extra_body={"ignore_eos": True})


class TestLogprobs:
    @pytest.mark.parametrize("unlikely", [False, True], ids=["likely", "unlikely"])
    @pytest.mark.parametrize("top", [0, 2])
    def test_chat(self, served: Served, top: int, unlikely: bool) -> None:
        if not served.traits.logprobs:
            pytest.skip(f"{served.traits.name} has none")
        if top and not served.traits.top_logprobs:
            pytest.skip(f"{served.traits.name} has no top_logprobs")
        request = {"messages": ask({"text": " hello é你", "unlikely": unlikely}), "logprobs": True, "top_logprobs": top}
        unary = served.chat(**request)
        found = unary.choices[0].logprobs.content
        assert b"".join(bytes(entry.bytes) for entry in found[:-1]).decode() == " hello é你"
        assert len(found) == len(model.encode(" hello é你")) + 1
        for entry in found:
            assert entry.logprob == (-9.0 if unlikely else -0.25)
            # vLLM puts the token itself before the candidates, likely or not; SGLang sends the candidates alone.
            assert top <= len(entry.top_logprobs) <= (top + 1 if unlikely and top else top)
            if top and not unlikely:
                assert [each.logprob for each in entry.top_logprobs] == [-0.25, -0.75]
                assert entry.top_logprobs[0].bytes == entry.bytes
        streamed = [
            entry
            for chunk in served.stream(**request)
            for choice in chunk.choices
            for entry in (choice.logprobs and choice.logprobs.content) or ()
        ]
        assert streamed == found


class TestFailures:
    @pytest.mark.parametrize("status", [400, 429, 503])
    @pytest.mark.parametrize("stream", [False, True], ids=["unary", "stream"])
    def test_before_the_first_token(self, served: Served, status: int, stream: bool) -> None:
        expected = served.traits.statuses[status]
        with pytest.raises(EXCEPTIONS[expected]) as raised:
            served.chat(messages=ask({"error": {"status": status, "message": "the engine says no"}}), stream=stream)
        assert raised.value.status_code == expected
        if expected < 500:
            assert "the engine says no" in raised.value.message

    def test_in_the_stream(self, served: Served) -> None:
        messages = ask({"text": ["ab", "cd"], "error": {"status": 500, "message": "boom"}, "delay": 0.05})
        found: list[Any] = []
        with pytest.raises(openai.APIError):
            found.extend(served.chat(messages=messages, stream=True))
        assert "".join(texts(found)) == "abcd"
        assert not finishes(found)
        body = {"model": model.NAME, "messages": messages, "stream": True}
        lines = served.http.post("/v1/chat/completions", json=body).text.split("\n\n")
        events = [line.removeprefix("data: ") for line in lines if line]
        assert "[DONE]" not in events
        assert json.loads(events[-1])["error"]["message"]

    def test_in_a_unary_answer(self, served: Served) -> None:
        with pytest.raises(openai.InternalServerError):
            served.chat(messages=ask({"text": ["ab", "cd"], "error": {"status": 500, "message": "boom"}}))

    def test_too_long(self, served: Served) -> None:
        if served.traits.passthrough:
            pytest.skip("the check is in SGLang's own handlers, which are not here")
        with pytest.raises(openai.BadRequestError):
            served.chat(messages=ask(text="x" * (model.CONTEXT + 1)))

    def test_malformed(self, served: Served) -> None:
        for body in (b"{no", b"[]", b"{}"):
            answer = served.http.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
            assert answer.status_code in (400, 422)
            assert answer.json()["error"]["message"]


class TestDisconnect:
    @pytest.mark.parametrize("stream", [True, False], ids=["stream", "unary"])
    def test_the_engine_stops(self, served: Served, stream: bool) -> None:
        time.sleep(0.3)  # the calls of the test before may just be ending
        before = len(served.engine.log("abort"))
        body = {"model": model.NAME, "messages": ask({"text": "x" * 200, "delay": 0.05}), "stream": stream}
        timeout = httpx.Timeout(30, read=30 if stream else 0.5)
        try:
            with (
                httpx.Client(trust_env=False, timeout=timeout) as http,
                http.stream("POST", f"{served.url}/v1/chat/completions", json=body) as answer,
            ):
                next(answer.iter_lines())
        except httpx.ReadTimeout:
            assert not stream
        deadline = time.monotonic() + 2
        while len(served.engine.log("abort")) == before and time.monotonic() < deadline:
            time.sleep(0.02)
        assert len(served.engine.log("abort")) == before + 1
