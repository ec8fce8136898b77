"""The simulated vLLM front end on the wire: what was seen of the real binaries, release by release."""

from __future__ import annotations

from typing import Any

import pytest

from gaie_codec import ModelInfo
from gaie_codec.snapshots import SNAPSHOTS
from sim_wire import EOS, FOREVER, Wire, ask, cancelled, encode, has_side_services, play, scripted, until

ALL = SNAPSHOTS["vllm.inference"]
NEW, OLD = ALL[-1], ALL[0]


def request(wire: Wire, script: dict[str, Any] | None = None, *, prompt: Any = None, **fields: Any) -> Any:
    message = wire.message("GenerateRequest", request_id="r1", **fields)
    message.token_ids.ids.extend(encode(scripted(script)) if prompt is None else prompt)
    return message


def generate(script: dict[str, Any] | None = None, *, snapshot: str = NEW, method: str = "GenerateStream", **fields: Any) -> Any:
    options = fields.pop("options", {})
    return ask("vllm.inference", snapshot, method, lambda wire: request(wire, script, **fields), **options)


def texts(messages: list[Any]) -> list[str]:
    return [message.outputs.text for message in messages[1:]]


@pytest.mark.parametrize("snapshot", ALL)
def test_the_prompt_comes_first_and_the_end_with_the_last_token(snapshot):
    messages, code, _ = generate({"text": "one two", "cached_tokens": 3}, snapshot=snapshot, response={"output_token_ids": True})
    assert code == "OK"
    assert not messages[0].HasField("outputs")
    assert messages[0].prompt_info.num_prompt_tokens == len(encode(scripted({"text": "one two", "cached_tokens": 3})))
    assert [list(message.outputs.token_ids) for message in messages[1:]] == [[token_id] for token_id in (*encode("one two"), EOS)]
    assert "".join(texts(messages)) == "one two"
    finish = messages[-1].outputs.finish_info
    assert (finish.num_output_tokens, finish.finish_reason, finish.WhichOneof("stop_reason"), finish.eos_token_id) == (
        len(encode("one two")) + 1, 2, "eos_token_id", EOS,
    )  # fmt: skip
    assert not any(message.HasField("prompt_info") or message.outputs.HasField("finish_info") for message in messages[1:-1])


def test_unary_is_one_message():
    (message,), code, _ = generate({"text": "one two"}, method="Generate", response={"output_token_ids": True})
    assert code == "OK"
    assert message.prompt_info.num_prompt_tokens
    assert message.outputs.text == "one two"
    assert list(message.outputs.token_ids) == [*encode("one two"), EOS]
    assert message.outputs.num_tokens == message.outputs.finish_info.num_output_tokens == len(encode("one two")) + 1


def test_only_what_is_asked_for():
    messages, _, _ = generate({"text": "one"})
    assert {len(message.outputs.token_ids) for message in messages} == {0}
    assert sum(message.outputs.num_tokens for message in messages) == len(encode("one")) + 1
    messages, _, _ = generate({"text": "one"}, response={"output_text": False, "output_token_ids": True})
    assert set(texts(messages)) == {""}


@pytest.mark.parametrize(("snapshot", "top_n", "width"), [(NEW, 0, 0), (NEW, 2, 2), ("0.30.0", 0, 0), ("0.27.1", 0, 1), ("0.27.1", 3, 3)])
def test_log_probabilities(snapshot, top_n, width):
    response = {"output_logprobs": True, "output_token_ids": True, "output_candidates": {"top_n": top_n}}
    messages, _, _ = generate({"tokens": [[7, 40], [41, EOS]]}, snapshot=snapshot, response=response)
    first = messages[1].outputs
    assert list(first.logprobs) == [-7 / 16, -8 / 16]
    assert [len(row.tokens) for row in first.candidate_tokens] == [width, width]
    assert [row.tokens[0].id for row in first.candidate_tokens if row.tokens] == [7, 40][: 2 * bool(width)]
    assert len(messages[-1].outputs.logprobs) == 2, "the end token has one too"


@pytest.mark.parametrize("snapshot", [NEW, "0.26.0"])
def test_stop_strings_are_cut_and_held_back_by_bytes(snapshot):
    stop = ["XYZ"]
    letters = [encode(letter) for letter in "abcXYZdef"]
    assert {len(one) for one in letters} == {1}
    messages, _, _ = generate({"tokens": letters}, snapshot=snapshot, stopping={"stop_strings": stop}, response={"output_token_ids": True})
    assert texts(messages) == ["", "", "a", "b", "c", ""]
    assert len(messages[-1].outputs.token_ids) == 1
    finish = messages[-1].outputs.finish_info
    assert (finish.stop_string, finish.num_output_tokens) == ("XYZ", 6)
    messages, _, _ = generate({"tokens": letters}, stopping={"stop_strings": stop, "include_stop_strings": True})
    assert texts(messages) == list("abcXYZ")
    messages, _, _ = generate({"tokens": [[token for one in letters for token in one]]}, stopping={"stop_strings": stop})
    assert texts(messages) == ["abc"]
    assert messages[-1].outputs.num_tokens == 6
    messages, _, _ = generate({"tokens": letters[:5]}, stopping={"stop_strings": stop, "max_new_tokens": 5})
    assert texts(messages) == ["", "", "a", "b", "cXY"], "what was held goes out at another end"


def test_a_broken_character_is_shown():
    ids = encode("a你b")
    assert len(ids) > 3
    messages, _, _ = generate({"text": "a你b"}, stopping={"max_new_tokens": 2})
    assert texts(messages) == ["a", "\ufffd"]


def test_stop_tokens_and_the_second_end_token():
    messages, _, _ = generate({"tokens": [[7], [8], [9]]}, stopping={"stop_token_ids": [8]})
    assert messages[-1].outputs.finish_info.stop_token_id == 8
    messages, _, _ = generate({"tokens": [[8], [0], [9]]})
    assert messages[-1].outputs.finish_info.stop_token_id == 0


@pytest.mark.parametrize(
    ("snapshot", "fields", "code", "words"),
    [
        (NEW, {"sampling": {"num_sequences": 2}}, "INVALID_ARGUMENT", "num_sequences > 1 is not supported"),
        (OLD, {"sampling": {"num_sequences": 2}}, "INVALID_ARGUMENT", "num_sequences > 1 is not supported"),
        (NEW, {"model": "nope"}, "NOT_FOUND", "model `nope` not found"),
        (NEW, {"stopping": {"stop_strings": [""]}}, "INVALID_ARGUMENT", "stop strings cannot be empty"),
        ("0.28.0", {"stopping": {"stop_strings": [""]}}, "INVALID_ARGUMENT", "stop strings cannot be empty"),
        ("0.27.1", {"stopping": {"stop_strings": [""]}}, "UNAVAILABLE", "Socket closed"),
        (NEW, {"prompt": []}, "INVALID_ARGUMENT", "cannot be empty"),
        (NEW, {"prompt": [7] * 2048}, "INVALID_ARGUMENT", "maximum model length"),
        (NEW, {"prompt": [5000]}, "INVALID_ARGUMENT", "out of vocabulary"),
        (NEW, {"temperature": 3}, "INVALID_ARGUMENT", "temperature must be in [0, 2], got 3"),
        (NEW, {"temperature": float("nan")}, "INVALID_ARGUMENT", "finite number"),
        ("0.26.0", {"temperature": 3}, "OK", ""),
        (NEW, {"sampling": {"top_p": 0}}, "INVALID_ARGUMENT", "top_p must be in (0, 1], got 0"),
        ("0.31.0", {"sampling": {"top_p": 0}}, "OK", ""),
        (NEW, {"stopping": {"max_new_tokens": 2, "min_new_tokens": 3}}, "INVALID_ARGUMENT", "min_tokens"),
        (NEW, {"stopping": {"max_new_tokens": 1 << 30}}, "OK", ""),
        (NEW, {"lora_name": "l"}, "FAILED_PRECONDITION", "not started with LoRA"),
        (NEW, {"response": {"output_logprobs": True, "output_candidates": {"top_n": 21}}}, "INVALID_ARGUMENT", "max allowed: 20"),
    ],
)
@pytest.mark.parametrize("method", ["GenerateStream", "Generate"])
def test_what_is_refused(snapshot, fields, code, words, method):
    messages, got, details = generate({"text": "a"} if "prompt" not in fields else None, snapshot=snapshot, method=method, **fields)
    assert got == code
    assert words in details
    assert bool(messages) == (code == "OK")


@pytest.mark.parametrize(
    ("snapshot", "scripted_code", "code"),
    [
        (NEW, "UNAVAILABLE", "UNAVAILABLE"),
        (NEW, "INVALID_ARGUMENT", "INVALID_ARGUMENT"),
        (NEW, "RESOURCE_EXHAUSTED", "INTERNAL"),
        ("0.32.0", "UNAVAILABLE", "INTERNAL"),
        ("0.29.0", "UNAVAILABLE", "OK"),
        (OLD, "INTERNAL", "OK"),
    ],
)
@pytest.mark.parametrize("after", [0, 2])
def test_engine_errors(snapshot, scripted_code, code, after):
    script = {"tokens": [[7], [8], [9]], "error": {"code": scripted_code, "message": "boom", "after": after}}
    messages, got, details = generate(script, snapshot=snapshot)
    assert got == code
    assert messages[0].HasField("prompt_info"), "the prompt was announced all the same"
    assert len(messages) == 1 + after + (code == "OK")
    if code == "OK":
        finish = messages[-1].outputs.finish_info
        assert (finish.finish_reason, finish.num_output_tokens) == (3, after)
    elif code == "INTERNAL":
        assert details == "engine failed during generation"
    else:
        assert details == "boom"


def test_prompt_text_for_an_answer_without_text():
    assert "".join(texts(generate({"text": ""}, snapshot=OLD)[0])) == scripted({"text": ""})
    assert "".join(texts(generate({"text": ""}, snapshot="0.26.0")[0])) == ""


def test_a_missing_end():
    for method in ("GenerateStream", "Generate"):
        messages, code, _ = generate({"text": "a b", "complete": False}, method=method)
        assert code == "OK"
        assert not any(message.outputs.HasField("finish_info") for message in messages)


def test_what_the_server_notes():
    async def scene(wire):
        messages, _, _ = await wire.all("GenerateStream", request(wire, {"text": "a"}), metadata=(("x-data-parallel-rank", "3"),))
        assert messages
        (seen,) = wire.server.requests
        assert (seen.request_id, seen.stream, seen.data_parallel_rank, seen.sampling.temperature) == ("r1", True, 3, 0.0)
        for method in ("GenerateStream", "Generate"):
            await cancelled(wire, method, request(wire, {"first_delay_ms": FOREVER}))
        assert wire.server.aborted == ["r1", "r1"]

    play("vllm.inference", NEW, scene)


@pytest.mark.parametrize("method", ["GenerateStream", "Generate"])
def test_abort(method):
    async def scene(wire):
        call = wire.call(method, request(wire, {"tokens": [[7], [8]], "first_delay_ms": 0, "delay_ms": FOREVER}))
        await until(lambda: wire.server.running)
        if method == "GenerateStream":
            for _ in range(2):
                await call.read()
        await wire.one("/vllm.Control/Abort", wire.message("vllm.AbortRequest", request_ids=["r1", "nobody"]))
        message = await (call.read() if method == "GenerateStream" else call)
        assert message.outputs.finish_info.finish_reason == 3
        assert wire.server.aborted == ["r1"]

    play("vllm.inference", NEW, scene)


@pytest.mark.parametrize("snapshot", ALL)
def test_control_health_and_reflection(snapshot):
    async def scene(wire):
        has_control = snapshot >= "0.27"
        assert wire.service == ("vllm.Inference" if has_control else "vllm.Generate")
        assert await has_side_services(wire) == (has_control, False)
        if not has_control:
            return
        info = await wire.one("/vllm.Control/GetServerInfo")
        assert (info.engine_version, info.api_version, info.max_model_len) == (snapshot, "vllm", 99)
        model = await wire.one("/vllm.Control/GetModelInfo")
        assert (model.model_id, model.served_model_name) == ("/m", "m")
        if snapshot >= "0.29":
            assert (await wire.all("/vllm.Control/ListLoras"))[1] == "FAILED_PRECONDITION"

    play("vllm.inference", snapshot, scene, model=ModelInfo(model_path="/m", served_model_name="m", max_model_len=99))


def test_loras():
    async def scene(wire):
        assert [one.lora_name for one in (await wire.one("/vllm.Control/ListLoras")).adapters] == ["l"]
        assert (await wire.all("Generate", request(wire, lora_name="l")))[1] == "OK"
        assert (await wire.all("Generate", request(wire, lora_name="x")))[1] == "NOT_FOUND"

    play("vllm.inference", NEW, scene, model=ModelInfo(lora_adapters={"l": "l"}))
