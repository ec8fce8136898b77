"""The simulated smg servicers in front of SGLang, on the wire."""

from __future__ import annotations

from typing import Any

import pytest

from gaie_codec import ModelInfo
from gaie_codec.snapshots import SNAPSHOTS, load
from sim_wire import EOS, FOREVER, Wire, ask, cancelled, encode, has_side_services, play, scripted, until

ALL = tuple(name for name in SNAPSHOTS["sglang.scheduler"] if not load("sglang.scheduler", name).refused)
NEW, OLD = ALL[-1], "intree-0.5.8"


def request(wire: Wire, script: dict[str, Any] | None = None, *, prompt: Any = None, stream: bool = True, **fields: Any) -> Any:
    sampling = fields.pop("sampling_params", {})
    message = wire.message("GenerateRequest", request_id=fields.pop("request_id", "r1"), stream=stream, **fields)
    message.tokenized.input_ids.extend(encode(scripted(script)) if prompt is None else prompt)
    for name, value in sampling.items():
        getattr(message.sampling_params, name).extend(value) if isinstance(value, list) else setattr(message.sampling_params, name, value)
    return message


def generate(script: dict[str, Any] | None = None, *, snapshot: str = NEW, **fields: Any) -> Any:
    return ask("sglang.scheduler", snapshot, "Generate", lambda wire: request(wire, script, **fields))


@pytest.mark.parametrize("snapshot", ALL)
def test_deltas_with_totals_and_the_end_token_named(snapshot):
    messages, code, _ = generate({"tokens": [[7, 8], [9], [EOS]]}, snapshot=snapshot)
    assert code == "OK"
    chunks, complete = [message.chunk for message in messages[:-1]], messages[-1].complete
    assert [(list(chunk.token_ids), chunk.completion_tokens) for chunk in chunks] == [([7, 8], 2), ([9], 3), ([EOS], 4)]
    assert (list(complete.output_ids), complete.completion_tokens, complete.finish_reason) == ([EOS], 4, "stop")
    assert complete.matched_token_id == EOS
    assert {message.request_id for message in messages} == {"r1"}


def test_the_rust_servicer_repeats_everything():
    messages, _, _ = generate({"tokens": [[7, 8], [9], [EOS]], "counts": "cumulative"})
    assert list(messages[-1].complete.output_ids) == [7, 8, 9, EOS]


def test_stop_strings_end_nothing():
    messages, _, _ = generate({"text": "one two STOP three"}, sampling_params={"stop": ["STOP", ""]})
    assert [token_id for message in messages[:-1] for token_id in message.chunk.token_ids] == [*encode("one two STOP three"), EOS]
    messages, _, _ = generate({"tokens": [[7], [8], [9]]}, sampling_params={"stop_token_ids": [8]})
    assert messages[-1].complete.matched_token_id == 8


@pytest.mark.parametrize("token_id", [EOS, 8])
def test_the_length_goes_before_all_other_ends(token_id):
    messages, _, _ = generate({"tokens": [[7], [token_id]]}, sampling_params={"max_new_tokens": 2, "stop_token_ids": [8]})
    assert messages[-1].complete.finish_reason == "length"
    assert messages[-1].complete.WhichOneof("matched_stop") is None


def test_no_tokens_at_all():
    (message,), _, _ = generate({"text": "a"}, sampling_params={"max_new_tokens": 0})
    assert (message.complete.finish_reason, list(message.complete.output_ids)) == ("length", [])


def test_several_choices():
    script = {"text": ["a", "a b c"]}
    messages, _, _ = generate(script, sampling_params={"n": 2})
    assert {message.chunk.index for message in messages if message.HasField("chunk")} == {0, 1}
    assert [message.complete.index for message in messages if message.HasField("complete")] == [0, 1]
    messages, _, _ = generate(script, stream=False, sampling_params={"n": 2})
    assert [message.complete.index for message in messages] == [0, 0], "in order, but all say 0"
    assert [list(message.complete.output_ids) for message in messages] == [[*encode("a"), EOS], [*encode("a b c"), EOS]]


def test_log_probabilities():
    messages, _, _ = generate({"tokens": [[7, 40]]}, return_logprob=True, top_logprobs_num=2)
    assert [list(row.token_ids) for row in messages[0].chunk.output_logprobs.top_logprobs] == [[7, 8], [40, 41]]


@pytest.mark.parametrize("after", [0, 2])
@pytest.mark.parametrize("snapshot", [NEW, OLD])
def test_engine_errors(snapshot, after):
    script = {"tokens": [[7], [8], [9]], "error": {"code": "RESOURCE_EXHAUSTED", "message": "full", "after": after}}
    messages, code, details = generate(script, snapshot=snapshot)
    if snapshot == NEW:
        assert (len(messages), code, details) == (after, "RESOURCE_EXHAUSTED", "full")
        return
    assert (len(messages), code) == (after + 1, "OK")
    assert (messages[-1].error.message, messages[-1].error.http_status_code) == ("full", "429")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"prompt": []}, "tokenized.input_ids is required"),
        ({"request_id": ""}, "request_id"),
        ({"prompt": [7] * 2048}, "longer than the model's context length"),
    ],
)
def test_what_is_refused(fields, words):
    messages, code, details = generate(**fields)
    assert (messages, code) == ([], "INVALID_ARGUMENT")
    assert words in details
    (message,), code, _ = generate(snapshot=OLD, **fields)
    assert (code, message.error.http_status_code) == ("OK", "400")
    assert words in message.error.message


def test_a_limit_over_the_context_is_cut():
    messages, code, _ = generate({"text": "a"}, sampling_params={"max_new_tokens": 1 << 30})
    assert code == "OK"
    assert messages[-1].complete.finish_reason == "stop"


@pytest.mark.parametrize("snapshot", ALL)
def test_the_other_methods(snapshot):
    async def scene(wire):
        info = await wire.one("GetModelInfo")
        assert (info.served_model_name, info.max_context_length, info.max_req_input_len) == ("m", 99, 98)
        assert (await wire.one("GetServerInfo")).server_type == "grpc"
        assert await has_side_services(wire) == (True, True)
        assert not wire.server.requests
        assert (await wire.one("HealthCheck")).healthy
        assert len(wire.server.requests) == 1, "it generates a token"
        _, code, _ = await wire.all("GetTokenizer") if wire.snapshot.has_method(wire.service, "GetTokenizer") else (0, "", 0)
        assert code in ("FAILED_PRECONDITION", "")
        if wire.snapshot.has_method(wire.service, "ListLoadedLoRAAdapters"):
            (lora,) = (await wire.one("ListLoadedLoRAAdapters")).loaded_adapters
            assert (lora.lora_name, lora.lora_id) == ("l", "id1")

    model = ModelInfo(served_model_name="m", max_model_len=99, lora_adapters={"l": "id1"})
    play("sglang.scheduler", snapshot, scene, model=model)


def test_cancel_and_abort():
    async def scene(wire):
        for stream in (True, False):
            await cancelled(wire, "Generate", request(wire, {"first_delay_ms": FOREVER}, stream=stream))
        call = wire.call("Generate", request(wire, {"first_delay_ms": FOREVER}))
        await until(lambda: wire.server.running)
        assert (await wire.one("Abort", wire.message("AbortRequest", request_id="r1"))).success
        (message,) = [message async for message in call]
        assert (message.complete.finish_reason, list(message.complete.output_ids)) == ("abort", [])
        assert wire.server.aborted == ["r1"] * 3

    play("sglang.scheduler", NEW, scene)
