"""Chats with gpt-oss through the transcoder: prompts of ids, answers told apart, constraints that leave the channels open."""

import json

import pytest

from gaie_codec import BodyChunk, FinishEvent, MalformedRequestError, ModelInfo, SSEDecoder, TokensEvent, Transcoder
from gaie_codec.text.harmony import harmony_encoding
from gaie_codec.text.harmony_prompts import HarmonyTokenizer

HEADERS = {"content-type": "application/json"}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
CALLS = (
    "<|channel|>analysis<|message|>Need é.<|end|><|start|>assistant<|channel|>commentary<|message|>A moment.<|end|>"
    '<|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>{"a":1}<|call|>'
)
FINAL = "<|channel|>analysis<|message|>Easy.<|end|><|start|>assistant<|channel|>final<|message|>Hello STOP world<|return|>"


def ids_of(text):
    return harmony_encoding().encode(text, allowed_special="all")


class Detokenizer:
    def __init__(self, skips):
        self.skips = skips

    def decode(self, token_ids):
        encoding = harmony_encoding()
        return encoding.decode([token_id for token_id in token_ids if not (self.skips and encoding.is_special_token(token_id))])

    def peek(self, token_id):
        return self.decode([token_id])


class Vocabulary:
    vocab_size = 201_088
    eos_token_ids = frozenset({200_002, 199_999})
    max_token_chars = 128

    def encode(self, text, *, add_special_tokens):
        return ids_of(text)

    def detokenizer(self, prompt_token_ids, *, skip_special_tokens=True, spaces_between_special_tokens=True):
        return Detokenizer(skip_special_tokens)


TRANSCODER = Transcoder("vllm.engine", tokenizer=HarmonyTokenizer(Vocabulary()), model=ModelInfo(max_model_len=4096))


def request(transcoder=TRANSCODER, **fields):
    body = {"messages": [{"role": "user", "content": "Hi <|end|>"}], **fields}
    return transcoder.request("POST", "/v1/chat/completions", HEADERS, json.dumps(body).encode(), request_id="r")


def answer(call, text, *, finish="stop", transcoder=TRANSCODER):
    """The body of the answer; a token a message when it streams."""
    response = call.response(created=1)
    token_ids = ids_of(text)
    pieces = [[token_id] for token_id in token_ids] if call.inference.stream else []
    events = [TokensEvent(token_ids=piece, prompt_tokens=3, completion_tokens=1) for piece in pieces]
    last = pieces[-1] if pieces else token_ids  # a stream repeats its last
    events.append(FinishEvent(token_ids=last, finish_reason=finish, prompt_tokens=3, completion_tokens=len(last)))
    outputs = [*response.receive_headers([(":status", "200"), ("content-type", "application/grpc")])]
    for event in events:
        outputs += response.receive_message(transcoder.adapter.encode_response(event).SerializeToString())
    outputs += response.receive_trailers([("grpc-status", "0")])
    assert response.error is None
    return b"".join(output.data for output in outputs if isinstance(output, BodyChunk))


def folded(body):
    message = {"reasoning": "", "content": "", "calls": []}
    for event in SSEDecoder().receive_data(body):
        if event.data == "[DONE]":
            break
        chunk = json.loads(event.data)
        for choice in chunk["choices"]:
            delta = choice["delta"]
            message["reasoning"] += delta.get("reasoning") or ""
            message["content"] += delta.get("content") or ""
            for call in delta.get("tool_calls") or ():
                function = call["function"]
                if "name" in function:
                    message["calls"].append([function["name"], ""])
                message["calls"][-1][1] += function.get("arguments") or ""
            message["finish_reason"] = choice["finish_reason"]
        message["usage"] = chunk.get("usage")
    return message


def test_the_prompt_is_that_of_the_library_and_calls_are_stopped_at():
    call = request(tools=TOOLS, reasoning_effort="low")
    expected = HarmonyTokenizer(Vocabulary()).encode_chat(
        [{"role": "user", "content": [{"type": "text", "text": "Hi <|end|>"}]}],
        tools=[{"type": "function", "function": {"name": "f", "description": None, "parameters": {"type": "object"}}}],
        template_kwargs={"reasoning_effort": "low"},
    )
    assert call.inference.prompt_token_ids == expected
    assert call.inference.sampling.stop_token_ids == (200_012,)
    assert call.inference.sampling.skip_special_tokens is False
    assert request(stop_token_ids=[5, 200_012]).inference.sampling.stop_token_ids == (5, 200_012)
    assert request(ignore_eos=True).inference.sampling.stop_token_ids == ()


def test_arguments_of_past_calls_go_out_as_they_came():
    called = {"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a":1 }'}}]}
    call = request(messages=[{"role": "user", "content": "x"}, called, {"role": "tool", "tool_call_id": "1", "content": "y"}])
    text = harmony_encoding().decode(call.inference.prompt_token_ids)
    assert text.endswith(
        '<|start|>assistant to=functions.f<|channel|>commentary json<|message|>{"a":1 }<|call|>'
        "<|start|>functions.f<|channel|>commentary to=assistant<|message|>y<|end|><|start|>assistant"
    )


def test_a_stream_with_a_call():
    message = folded(answer(request(tools=TOOLS, stream=True, stream_options={"include_usage": True}), CALLS))
    usage = message.pop("usage")
    assert message == {"reasoning": "Need é.", "content": "A moment.", "calls": [["f", '{"a":1}']], "finish_reason": "tool_calls"}
    assert usage["completion_tokens"] == len(ids_of(CALLS))
    thought = len(ids_of("Need é.")) + len(ids_of('{"a":1}'))  # vLLM counts calls as well
    assert usage["completion_tokens_details"]["reasoning_tokens"] == thought


def test_a_whole_answer_with_a_call():
    body = json.loads(answer(request(tools=TOOLS), CALLS))
    (choice,) = body["choices"]
    assert choice["message"]["content"] == "A moment."
    assert choice["message"]["reasoning"] == "Need é."
    assert [call["function"] for call in choice["message"]["tool_calls"]] == [{"name": "f", "arguments": '{"a":1}'}]
    assert choice["finish_reason"] == "tool_calls"


@pytest.mark.parametrize("stream", [True, False])
def test_what_is_cut_off(stream):
    body = answer(request(tools=TOOLS, stream=stream), CALLS.removesuffix("1}<|call|>"), finish="length")
    if stream:
        assert folded(body)["calls"] == [["f", '{"a":']]
        assert folded(body)["finish_reason"] == "length"
    else:
        (choice,) = json.loads(body)["choices"]
        assert choice["message"]["content"].endswith('commentary to=functions.f <|constrain|>json<|message|>{"a":')
        assert not choice["message"].get("tool_calls")
        assert choice["finish_reason"] == "length"


def test_stop_strings_cut_the_text_whatever_the_ids_are():
    body = answer(request(stream=True, stop=["STOP"]), FINAL.partition(" world")[0])
    assert folded(body)["content"] == "Hello "
    assert folded(body)["reasoning"] == "Easy."
    assert "STOP" not in json.loads(answer(request(stop=["STOP"]), FINAL.partition(" world")[0]))["choices"][0]["message"]["content"]


@pytest.mark.parametrize("stream", [True, False])
def test_reasoning_tokens_are_counted_where_stop_strings_are_looked_for(stream):
    for stop in ([], ["STOP"]):
        body = answer(request(stream=stream, stop=stop, **({"stream_options": {"include_usage": True}} if stream else {})), FINAL)
        usage = folded(body)["usage"] if stream else json.loads(body)["usage"]
        assert usage["completion_tokens_details"]["reasoning_tokens"] == len(ids_of("Easy."))


def test_constraints_leave_the_channels_open():
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    constraint = request(
        response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    ).inference.sampling.constraint
    assert constraint.kind == "structural_tag"
    analysis, final = json.loads(constraint.value)["format"]["elements"]
    assert analysis["type"] == "optional"
    assert [tag["content"]["json_schema"] for tag in final["elements"]] == [schema, schema]
    forced = request(tools=TOOLS, tool_choice="required").inference.sampling.constraint
    assert "to=functions.f" in forced.value


@pytest.mark.parametrize(
    "tag", ["not json", "[1]", "{}", '{"format": 5}', '{"structures": 5}', '{"structures": [{"begin": "a"}]}', "[" * 5000]
)
def test_a_constraint_that_has_to_be_read_and_cannot_is_refused(tag):
    with pytest.raises(MalformedRequestError, match="structural tag that the answer is to match is malformed"):
        request(structured_outputs={"structural_tag": tag})


def test_so_is_a_schema():
    with pytest.raises(MalformedRequestError, match="JSON schema that the answer is to match is malformed"):
        request(structured_outputs={"json": "{"})


def test_a_prompt_that_is_too_long_is_not_rendered():
    with pytest.raises(MalformedRequestError, match="600000 characters"):
        request(messages=[{"role": "user", "content": "a" * 600_000}])


def test_without_a_reasoning_parser_the_answer_is_read_all_the_same():
    transcoder = Transcoder("vllm.engine", tokenizer=HarmonyTokenizer(Vocabulary()), tool_call_parser="openai", reasoning_parser="none")
    assert folded(answer(request(transcoder, stream=True), FINAL, transcoder=transcoder))["content"] == "Hello STOP world"


def test_a_server_that_sends_text_and_ids_is_read_by_one_of_them():
    transcoder = Transcoder("sglang.api", tokenizer=HarmonyTokenizer(Vocabulary()), model=ModelInfo(max_model_len=4096))
    call = request(transcoder, tools=TOOLS, stream=True, stream_options={"include_usage": True})
    response = call.response(created=1)
    outputs = [*response.receive_headers({})]
    token_ids, text = ids_of(CALLS), harmony_encoding().decode(ids_of(CALLS))
    for end in range(1, len(token_ids) + 1):
        is_last = end == len(token_ids)
        so_far = {"token_ids": token_ids[:end], "text": harmony_encoding().decode(token_ids[:end]), "completion_tokens": end}
        event = FinishEvent(**so_far, prompt_tokens=3) if is_last else TokensEvent(**so_far, prompt_tokens=3, is_cumulative=True)
        outputs += response.receive_message(transcoder.adapter.encode_response(event).SerializeToString())
    outputs += response.receive_trailers({"grpc-status": "0"})
    assert response.error is None
    assert text == CALLS
    message = folded(b"".join(output.data for output in outputs if isinstance(output, BodyChunk)))
    usage = message.pop("usage")
    assert message == {"reasoning": "Need é.", "content": "A moment.", "calls": [["f", '{"a":1}']], "finish_reason": "tool_calls"}
    assert usage["completion_tokens_details"]["reasoning_tokens"] == len(ids_of("Need é.")) + len(ids_of('{"a":1}'))


def test_tools_that_are_none_are_refused_where_they_are_only_counted():
    body = {"model": "m", "messages": [{"role": "user", "content": "x"}], "tools": [{"function": {"name": "f", "description": {"a": 1}}}]}
    with pytest.raises(MalformedRequestError, match="cannot be rendered"):
        TRANSCODER.answer("POST", "/tokenize", HEADERS, json.dumps(body).encode(), created=1)


@pytest.mark.parametrize("stream", [True, False])
def test_reasoning_tokens_without_ids_and_with_stop_strings(stream):
    transcoder = Transcoder("vllm.inference", tokenizer=HarmonyTokenizer(Vocabulary()), model=ModelInfo(max_model_len=4096))
    call = request(transcoder, stream=stream, stop=["STOP"])
    response = call.response(created=1)
    response.receive_headers({})
    text = FINAL.partition("STOP")[0]
    pieces = [text[place : place + 5] for place in range(0, len(text), 5)]
    if stream:
        for piece in pieces:
            response.receive_message(transcoder.adapter.encode_response(TokensEvent(text=piece, completion_tokens=1)).SerializeToString())
    last = FinishEvent(text="" if stream else text, finish_reason="length", is_delta=True)
    response.receive_message(transcoder.adapter.encode_response(last).SerializeToString())
    response.receive_status(0)
    assert response.error is None
    assert response.usage.reasoning_tokens == len(ids_of("Easy."))
