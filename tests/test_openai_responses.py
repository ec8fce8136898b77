"""`/v1/responses`, the request: vLLM's own answer, what becomes of every field and item, and what is refused by which name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gaie_codec import CodecError, Constraint, FinishEvent, ModelInfo, RequestError, TokenLogprob, Transcoder, UnsupportedEndpointError
from gaie_codec.openai import responses
from gaie_codec.openai.endpoint import Asked
from gaie_codec.openai.responses_input import decode_input
from gaie_codec.testing import ByteTokenizer
from gaie_codec.text.formats import TOOL_FORMATS
from gaie_codec.tokenizer_sources import load_tokenizer
from strategies import Piece, Script, ScriptedChoice, answer_to_all, streams_of

GOLDEN = Path(__file__).parent / "golden"
HELLO = json.loads((GOLDEN / "vllm-http-only" / "responses_hello.json").read_text())
TOKENIZER = load_tokenizer(str(GOLDEN / "model"))
MODEL = ModelInfo(max_model_len=2048, served_model_name="test-model")
WEATHER = {"type": "function", "name": "get_weather", "description": "d", "parameters": {"type": "object"}, "strict": True}
CALL = {"type": "function_call", "call_id": "call_1", "name": "get_weather", "arguments": '{"city":"Rome"}', "id": "fc_1"}
OUTPUT = {"type": "function_call_output", "call_id": "call_1", "output": "sunny"}
THOUGHT = {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]}
SAID = {
    "type": "message",
    "id": "msg_1",
    "role": "assistant",
    "status": "completed",
    "content": [{"type": "output_text", "text": "Hel", "annotations": []}, {"type": "output_text", "text": "lo", "annotations": []}],
}


class Recording(ByteTokenizer):
    """Remembers what it was given to render."""

    def render_chat(self, messages, **options):
        self.messages, self.options = messages, options
        return super().render_chat(messages, **options)


def decode(body, *, tokenizer=TOKENIZER, **asked):
    asked = {"request_id": "r1", "model": MODEL, "tokenizer": tokenizer, **asked}
    return responses.decode_request(json.dumps({"input": "Hi", **body}).encode(), Asked(**asked))


def rendered(body, **asked):
    tokenizer = Recording()
    decoded = decode(body, tokenizer=tokenizer, **asked)
    return decoded, tokenizer


def normalize(value):
    """Without what differs by nature, and without nulls: vLLM writes every key that it has."""
    if isinstance(value, dict):
        return {key: normalize(item) for key, item in value.items() if item is not None and key not in ("id", "created_at")}
    return [normalize(item) for item in value] if isinstance(value, list) else value


def hello(**fields):
    """Our answer to the golden's request, whose engine is scripted and whose server had no parsers."""
    transcoder = Transcoder("vllm.engine", tokenizer=TOKENIZER, model=MODEL, tool_call_parser="none", reasoning_parser="none")
    call = transcoder.request("POST", "/v1/responses", {}, json.dumps({**HELLO["request"], **fields}).encode(), request_id="unused")
    ids = [token for step in HELLO["engine"][0]["steps"] for token in step["token_ids"]]
    finish = FinishEvent(token_ids=ids, finish_reason="stop", prompt_tokens=15, completion_tokens=8, cached_tokens=3)
    response = call.response(created=1700000000)
    response.receive_headers()
    outputs = [
        *response.receive_message(transcoder.adapter.encode_response(finish).SerializeToString()),
        *response.receive_trailers({"grpc-status": "0"}),
    ]
    assert outputs[0].status == 200
    return call, b"".join(out.data for out in outputs[1:-1])


class TestGolden:
    def test_equal_to_vllm(self) -> None:
        call, body = hello()
        ours, theirs = normalize(json.loads(body)), normalize(json.loads(HELLO["body"]))
        assert ours.pop("store") is False, "the one key that vLLM has not: docs/differences.md"
        assert ours == theirs
        engine = HELLO["engine"][0]
        assert call.inference.prompt_token_ids == engine["prompt_token_ids"]
        assert call.inference.sampling.max_tokens == engine["sampling_params"]["max_tokens"]
        assert json.loads(body)["id"] == call.inference.request_id == "resp_golden"

    def test_every_key_of_vllms_that_is_no_null_of_its_own_is_there(self) -> None:
        _, body = hello()
        missing = json.loads(HELLO["body"]).keys() - json.loads(body).keys()
        assert missing == {"ec_transfer_params", "input_messages", "output_messages"}


class TestInput:
    def test_text_and_instructions(self) -> None:
        conversation = decode_input({"input": "Hi", "instructions": "Be brief."})
        assert conversation.messages == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
        assert decode_input({"input": "Hi", "instructions": ""}).messages == [{"role": "user", "content": "Hi"}]

    def test_what_the_assistant_did_in_a_row_is_one_message(self) -> None:
        other = {**CALL, "call_id": "call_2"}
        items = [{"role": "user", "content": "?"}, THOUGHT, SAID, CALL, other, OUTPUT, {**OUTPUT, "call_id": "call_2"}, SAID]
        user, said, first, second, last = decode_input({"input": items}).messages
        assert user == {"role": "user", "content": "?"}
        assert (said["reasoning"], said["content"], [call["id"] for call in said["tool_calls"]]) == ("hm", "Hello", ["call_1", "call_2"])
        assert said["tool_calls"][0]["function"] == {"name": "get_weather", "arguments": '{"city":"Rome"}'}
        assert first == {"role": "tool", "tool_call_id": "call_1", "content": "sunny"}
        assert second["tool_call_id"] == "call_2"
        assert last == {"role": "assistant", "content": "Hello"}

    def test_what_an_assistant_message_has_already_begins_another(self) -> None:
        assert [message["content"] for message in decode_input({"input": [SAID, SAID]}).messages] == ["Hello", "Hello"]
        assert [message["reasoning"] for message in decode_input({"input": [THOUGHT, THOUGHT]}).messages] == ["hm", "hm"]

    @pytest.mark.parametrize(
        ("item", "expected"),
        [
            ({"type": "reasoning", "summary": [{"type": "summary_text", "text": "short"}]}, [{"role": "assistant", "reasoning": "short"}]),
            ({"type": "reasoning", "summary": [], "encrypted_content": None}, []),
            ({"role": "assistant", "content": None}, [{"role": "assistant", "content": ""}]),
            ({"type": None, "role": "developer", "content": "x"}, [{"role": "developer", "content": "x"}]),
            ({"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}, [{"role": "assistant", "content": "no"}]),
            (
                {
                    "role": "user",
                    "content": [{"type": "input_text", "text": "t"}, {"type": "input_image", "image_url": "u", "detail": "low"}],
                },
                [
                    {
                        "role": "user",
                        "content": [{"type": "text", "text": "t"}, {"type": "image_url", "image_url": {"url": "u", "detail": "low"}}],
                    }
                ],
            ),
            (
                {**OUTPUT, "output": [{"type": "input_text", "text": "t"}]},
                [{"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "t"}]}],
            ),
        ],
    )
    def test_items(self, item, expected) -> None:
        assert decode_input({"input": [item]}).messages == expected

    @pytest.mark.parametrize("status", ["incomplete", "in_progress", "completed", None])
    def test_a_last_message_that_is_not_complete_is_continued(self, status) -> None:
        _, tokenizer = rendered({"input": [{"role": "user", "content": "?"}, {**SAID, "status": status}]})
        continues = status in ("incomplete", "in_progress")
        assert tokenizer.options["continue_final_message"] is continues
        assert tokenizer.options["add_generation_prompt"] is not continues
        assert not decode_input({"input": [{**SAID, "status": status}, {"role": "user", "content": "?"}]}).continues

    @pytest.mark.parametrize(
        ("item", "param"),
        [
            (5, "body.input.1"),
            ({"type": 5}, "body.input.1.type"),
            ({"type": "web_search_call"}, "input.1.type"),
            ({"type": "item_reference", "id": "msg_1"}, "input.1.id"),
            ({"content": "x"}, "body.input.1.role"),
            ({"role": "user"}, "body.input.1.content"),
            ({"role": "user", "content": 5}, "body.input.1.content"),
            ({"role": "user", "content": [5]}, "body.input.1.content.0.type"),
            ({"role": "user", "content": [{"type": "input_file", "file_id": "f"}]}, "input.1.content.0.type"),
            ({"role": "user", "content": [{"type": "input_image", "file_id": "f"}]}, "input.1.content.0.file_id"),
            ({"role": "user", "content": [{"type": "input_image"}]}, "body.input.1.content.0.image_url"),
            ({"role": "user", "content": [{"type": "input_image", "image_url": "http://x/"}]}, "input.1.content.0"),
            ({"role": "user", "content": [{"type": "nonsense"}]}, "input.1.content.0"),
            ({"role": "user", "content": [{"type": "input_text"}]}, "body.input.1.content.0.text"),
            ({"role": "assistant", "content": [{"type": "input_image"}]}, "input.1.content.0.type"),
            ({"role": "assistant", "content": 5}, "body.input.1.content"),
            ({**CALL, "arguments": {}}, "body.input.1.arguments"),
            ({**CALL, "name": None}, "body.input.1.name"),
            ({**CALL, "arguments": "{"}, "input.1.tool_calls.0.function.arguments"),
            ({"type": "function_call_output", "output": "x"}, "body.input.1.call_id"),
            ({"type": "function_call_output", "call_id": "x"}, "body.input.1.output"),
            ({"type": "reasoning", "encrypted_content": "gAAA"}, "input.1.encrypted_content"),
            ({"type": "reasoning", "content": "x"}, "body.input.1.content"),
        ],
    )
    def test_what_is_wrong_has_its_items_name(self, item, param) -> None:
        with pytest.raises(RequestError) as caught:
            decode({"instructions": "a message before", "input": [{"role": "user", "content": "?"}, item]})
        assert caught.value.param == param
        assert "messages" not in caught.value.message

    @pytest.mark.parametrize("body", [{"input": None}, {"input": {}}, {"input": []}, {"instructions": 5}])
    def test_no_conversation_at_all(self, body) -> None:
        with pytest.raises(RequestError) as caught:
            decode(body)
        assert caught.value.param.removeprefix("body.") == next(iter(body))


class TestFields:
    def test_what_is_sampled(self) -> None:
        body = {
            "max_output_tokens": 7,
            "temperature": 0.5,
            "top_p": 0.25,
            "top_k": 3,
            "stop": "x",
            "seed": 4,
            "presence_penalty": 0.5,
            "include": [responses.LOGPROBS],
            "top_logprobs": 2,
            "priority": 3,
            "cache_salt": "s",
        }
        decoded = decode(body)
        sampling = decoded.inference.sampling
        assert (sampling.max_tokens, sampling.temperature, sampling.top_p, sampling.top_k) == (7, 0.5, 0.25, 3)
        assert (sampling.stop, sampling.seed, sampling.presence_penalty, sampling.logprobs) == (("x",), 4, 0.5, 2)
        assert (decoded.inference.priority, decoded.inference.cache_salt) == (3, "s")
        assert decoded.options.logprobs
        assert decoded.ignored == ()

    @pytest.mark.parametrize(
        ("form", "constraint"),
        [
            (None, None),
            ({"type": "text"}, None),
            ({"type": "json_object"}, Constraint(kind="json_object")),
            (
                {"type": "json_schema", "name": "n", "schema": {"type": "object"}, "strict": True},
                Constraint(kind="json_schema", value='{"type": "object"}'),
            ),
        ],
    )
    def test_text_format(self, form, constraint) -> None:
        assert decode({"text": {"format": form}}).inference.sampling.constraint == constraint

    def test_tools_are_a_chats(self) -> None:
        decoded, tokenizer = rendered({"tools": [WEATHER], "tool_choice": "auto"}, tool_format=TOOL_FORMATS["hermes"])
        function = {"name": "get_weather", "description": "d", "parameters": {"type": "object"}, "strict": True}
        assert tokenizer.options["tools"] == [{"type": "function", "function": function}]
        assert decoded.output.id_style == "responses"
        assert not decoded.options.shows_empty
        echo = {name: json.loads(bytes(value)) for name, value in decoded.options.echo.items()}
        assert (echo["tools"], echo["tool_choice"]) == ([WEATHER], "auto")

    def test_a_named_function(self) -> None:
        choice = {"type": "function", "name": "get_weather"}
        decoded = decode({"tools": [WEATHER], "tool_choice": choice}, tool_format=TOOL_FORMATS["hermes"])
        assert not decoded.output.finishes_with_tool_calls
        assert json.loads(bytes(decoded.options.echo["tool_choice"])) == choice
        with pytest.raises(RequestError) as caught:
            decode({"tools": [WEATHER], "tool_choice": {"type": "function", "name": "other"}})
        assert caught.value.param == "tool_choice"

    def test_no_tools(self) -> None:
        for body in ({"tools": []}, {"tools": None, "tool_choice": "auto"}, {"tool_choice": "none"}):
            assert decode(body).output is None
        with pytest.raises(RequestError):
            decode({"tool_choice": "required"})

    def test_reasoning_effort_is_told_to_the_template(self) -> None:
        decoded, tokenizer = rendered({"reasoning": {"effort": "low", "summary": "auto"}})
        assert tokenizer.options["template_kwargs"]["reasoning_effort"] == "low"
        assert decoded.ignored == ("reasoning.summary",)

    def test_truncation(self) -> None:
        text = "word " * 3000
        with pytest.raises(RequestError):
            decode({"input": text})
        assert len(decode({"input": text, "truncation": "auto"}).inference.prompt_token_ids) == 2047
        inference = decode({"input": text, "truncation": "auto", "max_output_tokens": 48}).inference
        assert (len(inference.prompt_token_ids), inference.sampling.max_tokens) == (2000, 48)
        unknown = decode({"input": text, "truncation": "auto"}, model=ModelInfo())
        assert len(unknown.inference.prompt_token_ids) > 3000

    def test_what_has_no_effect_is_said(self) -> None:
        body = {
            "store": True,
            "include": ["reasoning.encrypted_content"],
            "top_logprobs": 3,
            "text": {"verbosity": "low"},
            "stream_options": {"include_obfuscation": False},
            "nonsense": 1,
            "user": "me",
            "metadata": {"a": "b"},
            "chat_template_kwargs": {"messages": 1},
        }
        assert decode(body).ignored == (
            "chat_template_kwargs.messages",
            "include.reasoning.encrypted_content",
            "nonsense",
            "store",
            "stream_options",
            "text.verbosity",
            "top_logprobs",
        )
        assert decode({"store": False, "include": None}).ignored == ()

    @pytest.mark.parametrize(
        ("body", "param"),
        [
            ({"background": True}, "background"),
            ({"previous_response_id": "resp_1"}, "previous_response_id"),
            ({"conversation": "conv_1"}, "conversation"),
            ({"prompt": {"id": "p"}}, "prompt"),
            ({"enable_response_messages": True}, "enable_response_messages"),
            ({"max_output_tokens": 0}, "max_output_tokens"),
            ({"max_output_tokens": 99_999}, "max_output_tokens"),
            ({"max_output_tokens": "x"}, "body.max_output_tokens"),
            ({"include": [responses.LOGPROBS], "top_logprobs": 21}, "top_logprobs"),
            ({"include": [responses.LOGPROBS], "top_logprobs": "x"}, "body.top_logprobs"),
            ({"include": [5]}, "body.include.0"),
            ({"include": "x"}, "body.include"),
            ({"reasoning": {"effort": 5}}, "body.reasoning.effort"),
            ({"text": {"format": 5}}, "body.text.format"),
            ({"text": {"format": {"type": "grammar"}}}, "body.text.format.type"),
            ({"text": {"format": {"type": "json_schema", "schema": {}}}}, "body.text.format.name"),
            ({"text": {"format": {"type": "json_schema", "name": "n"}}}, "body.text.format.schema"),
            ({"truncation": "sometimes"}, "body.truncation"),
            ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
            ({"tools": [5]}, "body.tools.0.type"),
            ({"tools": [{"type": "function"}]}, "body.tools.0.name"),
            ({"tools": [{"type": "function", "name": "f", "parameters": 5}]}, "body.tools.0.parameters"),
            ({"tools": [WEATHER], "tool_choice": {"type": "allowed_tools"}}, "tool_choice.type"),
            ({"tools": [WEATHER], "tool_choice": {"type": "function"}}, "body.tool_choice.name"),
            ({"metadata": []}, "body.metadata"),
            ({"user": 5}, "body.user"),
            ({"service_tier": 5}, "body.service_tier"),
            ({"temperature": 3}, "temperature"),
            ({"model": "nope"}, "model"),
        ],
    )
    def test_what_is_refused_is_named(self, body, param) -> None:
        with pytest.raises(RequestError) as caught:
            decode(body)
        assert caught.value.param == param
        assert caught.value.http_status == (404 if param == "model" else 400)
        assert "max_tokens" not in caught.value.message

    @pytest.mark.parametrize(
        ("body", "fixed", "expected"),
        [({}, None, "resp_r1"), ({"request_id": "resp_x"}, None, "resp_x"), ({"request_id": "x"}, "header", "resp_header")],
    )
    def test_ids(self, body, fixed, expected) -> None:
        decoded = decode(body, fixed_id=fixed)
        assert decoded.options.id == decoded.inference.request_id == expected


class TestPaths:
    @pytest.mark.parametrize("method", ["GET", "DELETE", "POST"])
    @pytest.mark.parametrize("rest", ["", "/cancel", "/input_items"])
    def test_nothing_is_stored(self, method: str, rest: str) -> None:
        transcoder = Transcoder("vllm.engine", tokenizer=TOKENIZER, model=MODEL)
        with pytest.raises(UnsupportedEndpointError) as caught:
            transcoder.request(method, f"/v1/responses/resp_1{rest}", {}, b"", request_id="r")
        assert (caught.value.http_status, caught.value.param) == (404, "response_id")
        assert caught.value.message == "Response with id 'resp_1' not found: responses are not stored here."

    def test_other_paths_are_no_ids(self) -> None:
        with pytest.raises(UnsupportedEndpointError, match="does not exist"):
            Transcoder("vllm.engine", tokenizer=TOKENIZER).request("POST", "/v1/responses/input_tokens", {}, b"{}", request_id="r")

    def test_get(self) -> None:
        with pytest.raises(UnsupportedEndpointError) as caught:
            Transcoder("vllm.engine", tokenizer=TOKENIZER).request("GET", "/v1/responses", {}, b"", request_id="r")
        assert caught.value.http_status == 405


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
PARTS = st.fixed_dictionaries(
    {},
    optional={
        "type": st.sampled_from(["input_text", "output_text", "input_image", "input_audio", "refusal"]) | JSON,
        "text": st.text(max_size=3) | JSON,
        "image_url": st.just("http://x/") | JSON,
        "input_audio": JSON,
    },
)
ITEMS = st.fixed_dictionaries(
    {},
    optional={
        "type": st.sampled_from(["message", "function_call", "function_call_output", "reasoning", "item_reference"]) | JSON,
        "role": st.sampled_from(["user", "assistant", "system"]) | JSON,
        "content": st.text(max_size=3) | st.lists(PARTS, max_size=2) | JSON,
        "summary": st.lists(PARTS, max_size=2) | JSON,
        "status": st.sampled_from(["completed", "incomplete"]) | JSON,
        "call_id": st.just("c") | JSON,
        "name": st.just("f") | JSON,
        "arguments": st.sampled_from(["{}", "{", "1"]) | JSON,
        "output": st.just("o") | st.lists(PARTS, max_size=2) | JSON,
    },
)
FIELDS = sorted(responses.READ | responses.ADVISORY)
BODIES = st.fixed_dictionaries(
    {"input": st.just("Hi") | st.lists(ITEMS, max_size=3) | JSON},
    optional={name: JSON for name in FIELDS if name != "input"},
) | st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=3)


@given(BODIES)
@example({"input": [{"role": "user", "content": ""}], "metadata": {"a": 10**30}})
@example({"input": "x", "metadata": float("nan")})
def test_arbitrary_bodies_raise_only_codec_errors(body) -> None:
    transcoder = Transcoder("vllm.engine", tokenizer=ByteTokenizer(), model=MODEL)
    try:
        call = transcoder.request("POST", "/v1/responses", {}, json.dumps(body).encode(), request_id="r")
    except CodecError:
        return
    response = call.response(created=1)
    response.receive_headers()
    events = [FinishEvent(token_ids=[104, 105], finish_reason="stop", prompt_tokens=1, completion_tokens=2)]
    outputs = [out for event in events for out in response.receive_message(transcoder.adapter.encode_response(event).SerializeToString())]
    outputs += response.receive_trailers({"grpc-status": "0"})
    assert outputs[0].status == 200


def test_bytes_raise_only_codec_errors() -> None:
    for body in (b"", b"[]", b"{", b"\xff", b'{"input": "\\ud800"}', b'{"input": "x", "metadata": ' + b"[" * 2000 + b"]" * 2000 + b"}"):
        with pytest.raises(CodecError):
            responses.decode_request(body, Asked(request_id="r", model=MODEL, tokenizer=TOKENIZER))


def test_log_probabilities_of_a_message_are_not_those_of_what_was_thought_before() -> None:
    tokenizer = TOKENIZER
    transcoder = Transcoder("vllm.engine", tokenizer=tokenizer, model=ModelInfo(max_model_len=4096), reasoning_parser="deepseek_r1")
    answers = []
    for stream in (False, True):
        body = {"input": "x", "include": ["message.output_text.logprobs"], "stream": stream}
        call = transcoder.request("POST", "/v1/responses", {}, json.dumps(body).encode(), request_id="r")
        assert call.calls[0].inference.stream
        pieces = tuple(
            Piece(token_ids=(token_id,), logprobs=(TokenLogprob(token_id=token_id, logprob=-0.5),))
            for token_id in tokenizer.encode("so </think>Hello", add_special_tokens=False)
        )
        script = Script(choices=(ScriptedChoice(pieces=pieces, finish_reason="length"),), turns=(0,) * (len(pieces) + 1))
        answer = answer_to_all(call, [[data] for data in streams_of(script, call, tokenizer)])
        answers.append(answer.events[-1]["response"] if stream else answer.json)
    assert answers[0] == answers[1]
    (part,) = answers[0]["output"][1]["content"]
    assert part["text"] == "Hello"
    assert "".join(entry["token"] for entry in part["logprobs"]) == "</think>Hello", "the tag has no text, and is of what it leads to"
