"""The simulated gRPC server beside SGLang's Python front end, on the wire: OpenAI JSON, and the typed methods."""

from __future__ import annotations

import base64
import json
import struct
from typing import Any

import grpc
import pytest

from gaie_codec import ModelInfo
from gaie_codec.snapshots import SNAPSHOTS
from sim_wire import EOS, FOREVER, Wire, ask, cancelled, encode, has_side_services, play, scripted, until

ALL = SNAPSHOTS["sglang.runtime"]
NEW, OLD = ALL[-1], ALL[0]


def body_request(wire: Wire, body: Any) -> Any:
    return wire.message("OpenAIRequest", json_body=body if isinstance(body, bytes) else json.dumps(body).encode())


def complete(body: Any, *, method: str = "ChatComplete", snapshot: str = NEW) -> tuple[list[Any], str, str]:
    return ask("sglang.runtime", snapshot, method, lambda wire: body_request(wire, body))


def chat(script: dict[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": scripted(script)}], **fields}


def chunks_of(messages: list[Any]) -> list[dict[str, Any]]:
    return [json.loads(message.json_chunk) for message in messages if message.json_chunk]


# OpenAI JSON


@pytest.mark.parametrize("snapshot", ALL)
def test_a_unary_chat_is_one_finished_chunk(snapshot):
    (message,), code, _ = complete(chat({"text": "one two", "cached_tokens": 3}), snapshot=snapshot)
    assert (code, message.finished) == ("OK", True)
    if snapshot >= "0.5.22":
        assert message.status_code == 200
    body = json.loads(message.json_chunk)
    (choice,) = body["choices"]
    assert choice["message"] == {"role": "assistant", "content": "one two", "reasoning_content": None}
    assert (choice["finish_reason"], choice["matched_stop"]) == ("stop", EOS)
    assert (body["object"], body["model"], body["usage"]["completion_tokens"]) == ("chat.completion", "m", len(encode("one two")) + 1)
    assert body["usage"]["prompt_tokens_details"] == {"cached_tokens": 3}


@pytest.mark.parametrize("snapshot", ALL)
def test_a_chat_stream_ends_with_an_empty_chunk(snapshot):
    body = chat({"text": "one two"}, stream=True, stream_options={"include_usage": True})
    messages, code, _ = complete(body, snapshot=snapshot)
    assert code == "OK"
    assert [message.finished for message in messages] == [False] * (len(messages) - 1) + [True]
    assert not messages[-1].json_chunk
    if snapshot >= "0.5.22":
        assert not any(message.HasField("status_code") for message in messages)
    first, *middle, end, usage = chunks_of(messages)
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": "", "reasoning_content": None}
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in middle) == "one two"
    assert end["choices"][0]["finish_reason"] == "stop"
    assert (usage["choices"], usage["usage"]["completion_tokens"]) == ([], len(encode("one two")) + 1)
    assert "model" in complete(chat(), snapshot=snapshot)[0][0].json_chunk.decode()


def test_choices_and_stop_strings():
    (message,), _, _ = complete(chat({"text": ["one STOP", "two"]}, n=2, stop="STOP"))
    choices = json.loads(message.json_chunk)["choices"]
    assert [(one["index"], one["message"]["content"], one["matched_stop"]) for one in choices] == [(0, "one ", "STOP"), (1, "two", EOS)]
    messages, _, _ = complete(chat({"text": ["one STOP", "two and more"]}, n=2, stop=["STOP"], stream=True))
    told = [choice for chunk in chunks_of(messages) for choice in chunk["choices"]]
    assert "".join(one["delta"]["content"] or "" for one in told if one["index"] == 0) == "one "
    assert [(one["index"], one["finish_reason"]) for one in told[-2:]] == [(0, "stop"), (1, "stop")], "all ends come together"
    messages, _, _ = complete(chat({"text": "a b c"}, max_tokens=1))
    assert json.loads(messages[0].json_chunk)["choices"][0]["finish_reason"] == "length"


def test_completions_of_several_prompts():
    prompts = [scripted({"text": ["a0", "a1"]}, "a"), scripted({"text": ["b0", "b1"]}, "b")]
    for prompt in (prompts, [encode(one) for one in prompts]):
        (message,), _, _ = complete({"prompt": prompt, "n": 2}, method="Complete")
        body = json.loads(message.json_chunk)
        assert [(one["index"], one["text"]) for one in body["choices"]] == [(0, "a0"), (1, "a1"), (2, "b0"), (3, "b1")]
        assert (body["model"], body["usage"]["prompt_tokens"]) == ("default", sum(map(len, map(encode, prompts))))
    messages, _, _ = complete({"prompt": scripted({"text": "word " * 30}), "stream": True}, method="Complete")
    told = [choice for chunk in chunks_of(messages) for choice in chunk["choices"]]
    assert (told[-1]["finish_reason"], len(told)) == ("length", 16)


def test_log_probabilities():
    (message,), _, _ = complete(chat({"tokens": [[7, 40]]}, logprobs=True, top_logprobs=2))
    found = json.loads(message.json_chunk)["choices"][0]["logprobs"]["content"]
    assert [(entry["logprob"], len(entry["top_logprobs"])) for entry in found] == [(-7 / 16, 2), (-8 / 16, 2)]
    body = {"prompt": scripted({"tokens": [[7, 40]]}), "logprobs": 2}
    (message,), _, _ = complete(body, method="Complete")
    assert json.loads(message.json_chunk)["choices"][0]["logprobs"]["token_logprobs"] == [-7 / 16, -8 / 16]


@pytest.mark.parametrize(
    ("method", "body", "words"),
    [
        ("ChatComplete", b"{no", "Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
        ("ChatComplete", b"\xff", "can't decode"),
        ("ChatComplete", b"[]", "Request body must be a JSON object, got list"),
        ("ChatComplete", {}, "1 validation error for ChatCompletionRequest\nmessages\n  Field required [type=missing"),
        ("Complete", {"stream": True}, "1 validation error for CompletionRequest\nprompt\n"),
        ("ChatComplete", {"messages": [], "temperature": "x"}, "1 validation error for ChatCompletionRequest\ntemperature\n"),
        ("Complete", {"prompt": "x", "max_tokens": -1}, "1 validation error for CompletionRequest\nmax_tokens\n"),
    ],
)
@pytest.mark.parametrize("snapshot", [NEW, OLD])
def test_what_the_request_models_refuse(snapshot, method, body, words):
    messages, code, details = complete(body, method=method, snapshot=snapshot)
    assert (messages, code) == ([], "INTERNAL")
    assert words in details


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("snapshot", ["0.5.23", "0.5.22", "0.5.21", "0.5.16"])
def test_what_the_serving_layer_refuses(snapshot, stream):
    script = {"error": {"code": "RESOURCE_EXHAUSTED", "message": "boom"}}
    for body, status, words in ((chat(script), 429, "boom"), (chat(max_tokens=1 << 30), 400, "Requested token count exceeds")):
        (message,), code, _ = complete(body | {"stream": stream}, snapshot=snapshot)
        error = json.loads(message.json_chunk)
        assert (code, message.finished, error["object"], error["code"], error["param"]) == ("OK", True, "error", status, None)
        assert words in error["message"]
        if snapshot >= "0.5.22":
            assert message.status_code == status


def test_an_error_amid_the_stream_is_a_chunk():
    script = {"text": "one two three", "error": {"code": "INTERNAL", "message": "boom", "after": 2}}
    messages, code, _ = complete(chat(script, stream=True))
    assert (code, len(messages), messages[-1].finished, messages[-1].json_chunk) == ("OK", 4, True, b"")
    assert json.loads(messages[2].json_chunk)["error"]["code"] == 500
    (message,), _, _ = complete(chat(script))
    assert (message.status_code, json.loads(message.json_chunk)["message"]) == (500, "boom")


def test_headers_and_the_rid_are_noted():
    async def scene(wire):
        message = body_request(wire, chat(rid="mine"))
        message.trace_headers["x-data-parallel-rank"] = "2"
        await wire.all("ChatComplete", message)
        (seen,) = wire.server.requests
        assert (seen.request_id, seen.data_parallel_rank, seen.model) == ("mine", 2, "m")

    play("sglang.runtime", NEW, scene)


@pytest.mark.parametrize("snapshot", ALL)
def test_embeddings_and_scores(snapshot):
    def answer(method, body):
        (message,), code, _ = complete(body, method=method, snapshot=snapshot)
        assert code == "OK"
        return message.status_code, json.loads(message.json_body)

    status, body = answer("OpenAIEmbed", {"input": ["a", "b c"], "dimensions": 4})
    assert (status, [len(one["embedding"]) for one in body["data"]]) == (200, [4, 4])
    assert body["data"][0]["embedding"] != body["data"][1]["embedding"]
    _, packed = answer("OpenAIEmbed", {"input": "a", "dimensions": 4, "encoding_format": "base64"})
    floats = struct.unpack("<4f", base64.b64decode(packed["data"][0]["embedding"]))
    assert floats == pytest.approx(body["data"][0]["embedding"])
    assert answer("OpenAIEmbed", {})[0] == 400
    assert answer("OpenAIEmbed", b"{no")[1]["error"]["type"] == "BadRequest"
    assert answer("OpenAIClassify", {"input": "a"})[1]["data"][0]["num_classes"] == 2
    assert len(answer("Score", {"query": "q", "items": ["a", "b"], "label_token_ids": [1]})[1]["scores"]) == 2
    status, body = answer("Rerank", {"query": "q", "documents": ["a", "b", "c"], "top_n": 2})
    if snapshot < "0.5.22":
        assert (status, "not JSON serializable" in body["error"]["message"]) == (500, True)
    else:
        assert [one["score"] for one in body] == sorted((one["score"] for one in body), reverse=True)
        assert len(body) == 2


# Typed


def request(wire: Wire, script: dict[str, Any] | None = None, *, stream: bool = True, name: str = "GenerateRequest", **fields: Any) -> Any:
    sampling = fields.pop("sampling_params", {})
    message = wire.message(name, stream=stream, rid="r1", **fields)
    if name == "GenerateRequest":
        message.input_ids.extend(encode(scripted(script)))
    else:
        message.text = scripted(script)
    message.sampling_params.SetInParent()
    message.sampling_params.stop.extend(sampling.pop("stop", ()))
    for key, value in sampling.items():
        setattr(message.sampling_params, key, value)
    return message


def generate(script: dict[str, Any] | None = None, *, snapshot: str = NEW, method: str = "Generate", **fields: Any) -> Any:
    return ask("sglang.runtime", snapshot, method, lambda wire: request(wire, script, name=f"{method}Request", **fields))


def meta(message: Any) -> dict[str, Any]:
    return {key: json.loads(value) for key, value in message.meta_info.items()}


@pytest.mark.parametrize("snapshot", ALL)
def test_typed_messages_repeat_everything(snapshot):
    messages, code, _ = generate({"tokens": [[7, 8], [9], [EOS]]}, snapshot=snapshot)
    assert code == "OK"
    assert [list(message.output_ids) for message in messages] == [[7, 8], [7, 8, 9], [7, 8, 9, EOS]]
    assert [meta(message)["completion_tokens"] for message in messages] == [2, 3, 4]
    assert [message.finished for message in messages] == [False, False, True]
    assert [meta(message)["finish_reason"] for message in messages] == [None, None, {"type": "stop", "matched": EOS}]
    assert {meta(message)["id"] for message in messages} == {"r1"}
    if snapshot >= "0.5.22":
        assert not any(message.HasField("text") for message in messages)


def test_incremental_streaming_output():
    messages, _, _ = generate({"tokens": [[7, 8], [9], [EOS]], "counts": "delta"})
    assert [list(message.output_ids) for message in messages] == [[7, 8], [9], [EOS]]
    assert [meta(message)["completion_tokens"] for message in messages] == [2, 3, 4]


def test_text():
    script = {"text": "one two STOP"}
    messages, _, _ = generate(script, return_text=True, sampling_params={"stop": ["STOP"]})
    assert (messages[-1].text, meta(messages[-1])["finish_reason"]) == ("one two ", {"type": "stop", "matched": "STOP"})
    assert all("one two ".startswith(message.text) for message in messages)
    messages, _, _ = generate(script, method="TextGenerate")
    assert (messages[-1].text, messages[-1].finished) == ("one two STOP", True)
    (message,), _, _ = generate(script, method="TextGenerate", stream=False)
    assert message.text == "one two STOP"
    messages, _, _ = generate({"text": "word " * 200})
    assert meta(messages[-1])["finish_reason"] == {"type": "length", "length": 128}, "what an unset limit means"


def test_several_choices_are_told_apart_by_their_ids():
    script = {"text": ["a", "a b c"]}
    messages, _, _ = generate(script, sampling_params={"n": 2})
    assert {meta(message)["id"] for message in messages} == {"r1_0", "r1_1"}
    assert [message.finished for message in messages] == [False] * (len(messages) - 1) + [True]
    messages, _, _ = generate(script, stream=False, sampling_params={"n": 2})
    assert [(meta(message)["id"], message.finished) for message in messages] == [("r1_0", False), ("r1_1", True)]


def test_0_5_16_takes_the_first_end_for_the_last():
    script = {"text": ["a", "a b c"]}
    messages, code, _ = generate(script, snapshot=OLD, sampling_params={"n": 2})
    assert (code, messages[-1].finished, meta(messages[-1])["id"]) == ("OK", True, "r1_0")

    async def scene(wire):
        _, code, _ = await wire.all("Generate", request(wire, script, stream=False, sampling_params={"n": 2}), timeout=0.2)
        assert code == "DEADLINE_EXCEEDED"
        await until(lambda: wire.server.aborted == ["r1"])

    play("sglang.runtime", OLD, scene)


@pytest.mark.parametrize(
    ("code", "text"), [("INVALID_ARGUMENT", "boom"), ("RESOURCE_EXHAUSTED", "429: boom"), ("UNAVAILABLE", "503: boom")]
)
@pytest.mark.parametrize("stream", [True, False])
def test_exceptions_are_internal(code, text, stream):
    script = {"tokens": [[7], [8], [9]], "error": {"code": code, "message": "boom", "after": 0}}
    assert generate(script, stream=stream) == ([], "INTERNAL", text)


def test_an_error_amid_the_stream_is_an_aborted_choice():
    messages, code, _ = generate({"tokens": [[7], [8], [9]], "error": {"code": "INTERNAL", "message": "boom", "after": 2}})
    assert (code, len(messages), messages[-1].finished) == ("OK", 3, True)
    assert meta(messages[-1])["finish_reason"] == {"type": "abort", "message": "boom", "status_code": 500}


def test_an_error_amid_an_answer_that_is_not_streamed_is_all_there_is():
    script = {"tokens": [[7], [8], [9]], "error": {"code": "INTERNAL", "message": "boom", "after": 2}}
    assert generate(script, stream=False) == ([], "INTERNAL", "500: boom")


def test_a_limit_over_the_context_is_refused():
    messages, code, details = generate({"text": "a"}, sampling_params={"max_new_tokens": 1 << 30})
    assert (messages, code) == ([], "INTERNAL")
    assert details.startswith("Requested token count exceeds")


def test_a_missing_end():
    messages, code, _ = generate({"tokens": [[7]], "complete": False})
    assert (code, [message.finished for message in messages], dict(messages[-1].meta_info)) == ("OK", [False, True], {})


@pytest.mark.parametrize("method", ["Generate", "ChatComplete"])
def test_cancel_and_abort(method):
    async def scene(wire):
        def make(stream=True):
            script = {"first_delay_ms": FOREVER}
            return (
                request(wire, script, stream=stream) if method == "Generate" else body_request(wire, chat(script, rid="r1", stream=stream))
            )

        for stream in (True, False):
            await cancelled(wire, method, make(stream))
        call = wire.call(method, make())
        await until(lambda: wire.server.running)
        assert (await wire.one("Abort", wire.message("AbortRequest", rid="r1"))).success
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        assert (caught.value.code().name, caught.value.details()) == ("CANCELLED", "Request aborted: r1")
        assert wire.server.aborted == ["r1"] * 3

    play("sglang.runtime", NEW, scene)


@pytest.mark.parametrize("snapshot", ALL)
def test_the_other_methods(snapshot):
    async def scene(wire):
        info = await wire.one("GetModelInfo")
        assert json.loads(info.json_info)["served_model_name"] == "m"
        assert json.loads((await wire.one("GetServerInfo")).json_info)["incremental_streaming_output"] is False
        (card,) = (await wire.one("ListModels")).models
        assert (card.id, card.max_model_len) == ("m", 99)
        assert await has_side_services(wire) == (False, False)
        assert (await wire.one("HealthCheck")).healthy
        tokens = await wire.one("Tokenize", wire.message("TokenizeRequest", text="hi you"))
        assert (list(tokens.tokens), tokens.count, tokens.max_model_len) == (encode("hi you"), len(encode("hi you")), 99)
        assert (await wire.one("Detokenize", wire.message("DetokenizeRequest", tokens=tokens.tokens))).text == "hi you"
        assert (await wire.all("Detokenize", wire.message("DetokenizeRequest", tokens=[-1])))[1] == "INVALID_ARGUMENT"
        assert json.loads((await wire.one("GetLoad")).json_info)[0]["num_running_reqs"] == 0
        if snapshot >= "0.5.20":
            watch = wire.call("WatchEngineState")
            state = await watch.read()
            assert (state.healthy, json.loads(state.model_info.json_info)["served_model_name"]) == (True, "m")
            watch.cancel()
        assert not wire.server.requests

    play("sglang.runtime", snapshot, scene, model=ModelInfo(served_model_name="m", max_model_len=99))
