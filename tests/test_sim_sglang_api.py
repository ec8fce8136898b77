"""The simulated all-Rust server of SGLang, on the wire."""

from __future__ import annotations

from typing import Any

import pytest

from gaie_codec import ModelInfo
from gaie_codec.snapshots import SNAPSHOTS
from sim_wire import EOS, FOREVER, Wire, ask, cancelled, encode, has_side_services, play, scripted, until

ALL = SNAPSHOTS["sglang.api"]
NEW, OLD = ALL[-1], ALL[0]
LETTERS = [encode(letter) for letter in "abcXYZdef"]


def request(wire: Wire, script: dict[str, Any] | None = None, *, prompt: Any = None, stream: bool = True, **sampling: Any) -> Any:
    message = wire.message("GenerateRequest", stream=stream)
    message.rid.one = "r1"
    message.input_ids.one.ids.extend(encode(scripted(script)) if prompt is None else prompt)
    one = message.sampling_params.one
    one.SetInParent()
    one.stop.many.items.extend(sampling.pop("stop", ()))
    one.stop_token_ids.items.extend(sampling.pop("stop_token_ids", ()))
    for name, value in sampling.items():
        setattr(one, name, value)
    return message


def generate(script: dict[str, Any] | None = None, *, snapshot: str = NEW, **fields: Any) -> Any:
    messages, code, details = ask("sglang.api", snapshot, "Generate", lambda wire: request(wire, script, **fields))
    assert code == "OK", details
    return messages


def texts(messages: list[Any]) -> list[str]:
    return [message.frame.text for message in messages]


@pytest.mark.parametrize("snapshot", ALL)
def test_frames_repeat_everything(snapshot):
    messages = generate({"text": "one two"}, snapshot=snapshot)
    ids = [*encode("one two"), EOS]
    frames = [message.frame for message in messages]
    assert [frame.meta_info.completion_tokens for frame in frames] == list(range(1, len(ids) + 1))
    assert [list(frame.output_ids.ids) for frame in frames[:-1]] == [ids[:end] for end in range(1, len(ids))]
    # 0.5.22 counts the end token and does not show it.
    assert list(frames[-1].output_ids.ids) == (ids[:-1] if snapshot == OLD else ids)
    assert frames[-1].text == "one two"
    assert frames[-1].meta_info.finish_reason.stop.matched.token == EOS
    assert {frame.meta_info.finish_reason.WhichOneof("kind") for frame in frames[:-1]} == {None}
    assert {(frame.meta_info.id, frame.HasField("index")) for frame in frames} == {("r1", False)}


def test_without_stream_one_frame():
    (message,) = generate({"text": "one two"}, stream=False)
    assert (message.frame.text, list(message.frame.output_ids.ids)) == ("one two", [*encode("one two"), EOS])


def test_stop_strings_are_held_back_by_the_scheduler_and_cut_by_the_front_end():
    messages = generate({"tokens": LETTERS}, stop=["XYZ"])
    assert texts(messages) == ["a", "ab", "abc", "abc"]
    last = messages[-1].frame
    assert (last.meta_info.finish_reason.stop.matched.str, last.meta_info.completion_tokens) == ("XYZ", 6)
    assert texts(generate({"tokens": LETTERS}, stop=["XYZ"], no_stop_trim=True))[-1] == "abcXYZ"
    assert texts(generate({"tokens": [encode(" hello"), encode(" world!")]}, stop=["wor"], no_stop_trim=True))[-1] == " hello wor"
    assert texts(generate({"tokens": LETTERS}, stop=[""]))[-1] == ""


def test_what_an_earlier_push_brought_is_not_cut():
    assert texts(generate({"tokens": LETTERS, "holds_stops": False}, stop=["XYZ"])) == ["a", "ab", "abc", "abcX", "abcXY", "abcXYZ"]
    # Without a stream 50 tokens are pushed at a time.
    tokens = [encode("a")] * 48 + LETTERS
    (message,) = generate({"tokens": tokens}, stream=False, stop=["bcX"])
    assert message.frame.text == "a" * 49 + "bcX"
    (message,) = generate({"tokens": tokens}, stream=False, stop=["XYZ"])
    assert message.frame.text == "a" * 49 + "bc"


def test_ends():
    assert generate({"text": "word " * 200})[-1].frame.meta_info.finish_reason.length.length == 128
    (message,) = generate({"text": "a"}, max_new_tokens=0)
    assert (message.frame.text, message.frame.meta_info.finish_reason.length.length, list(message.frame.output_ids.ids)) == ("", 0, [])
    messages = generate({"text": "a你b"}, max_new_tokens=2)
    assert (messages[0].frame.text, messages[-1].frame.text) == ("a", "a\ufffd")
    messages = generate({"tokens": [[7], [265], [9]]}, stop_token_ids=[265])
    assert messages[-1].frame.meta_info.finish_reason.stop.matched.token == 265


def test_log_probabilities():
    def make(wire):
        message = request(wire, {"tokens": [[7], [40]]})
        message.return_logprob.one = True
        message.top_logprobs_num.one = 2
        return message

    messages, _, _ = ask("sglang.api", NEW, "Generate", make)
    meta = messages[-1].frame.meta_info
    assert [entry.token_id for entry in meta.output_token_logprobs.entries] == [7, 40]
    assert [len(top.row.entries) for top in meta.output_top_logprobs] == [2, 2]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"n": 2}, "n must be 1 (parallel sampling is not supported), got 2"),
        ({"temperature": -1}, "temperature must be a non-negative finite number, got -1"),
        ({"top_p": 0}, "top_p must be in (0, 1], got 0"),
        ({"max_new_tokens": 1 << 30}, "Requested token count exceeds the model's maximum context length of 2048 tokens"),
        ({"prompt": [7] * 2048}, "is longer than the model's context length"),
        ({"prompt": [9999]}, "out-of-vocabulary token id 9999"),
    ],
)
def test_validation_errors_are_items(fields, words):
    (message,) = generate(**fields)
    assert message.error.error.code == 400
    assert message.error.error.message.startswith("validation failed: ")
    assert words in message.error.error.message


def test_the_whole_context_is_accepted():
    assert generate(prompt=[7] * 2047, max_new_tokens=1)
    assert generate(prompt=[7] * 2047, max_new_tokens=2)[0].HasField("error")


def test_errors_of_shape_are_a_status():
    for change in ("text", "empty", "lora"):

        def make(wire, change=change):
            message = request(wire, prompt=[] if change == "empty" else None)
            if change == "text":
                message.text.one = "both"
            if change == "lora":
                message.lora_path.one.value = "nope"
            return message

        messages, code, details = ask("sglang.api", NEW, "Generate", make)
        assert (messages, code) == ([], "INVALID_ARGUMENT")
        assert details.startswith("validation failed: ")


@pytest.mark.parametrize("after", [0, 2])
@pytest.mark.parametrize("stream", [True, False])
def test_engine_errors_are_items(after, stream):
    script = {"tokens": [[7], [8], [9]], "error": {"code": "UNAVAILABLE", "message": "boom", "after": after}}
    messages = generate(script, stream=stream)
    assert (messages[-1].error.error.code, messages[-1].error.error.message) == (503, "boom")
    if stream:
        assert len(messages) == after + 1


@pytest.mark.parametrize("snapshot", ALL)
def test_the_other_methods(snapshot):
    async def scene(wire):
        info = await wire.one("GetModelInfo")
        assert (info.model_path, info.served_model_name) == ("/m", "m")
        assert (await wire.one("GetServerInfo")).max_context_length == 99
        assert await has_side_services(wire) == (False, False)
        assert (await wire.one("HealthCheck")).healthy
        assert len(wire.server.requests) == 1
        if snapshot == NEW:
            (card,) = (await wire.one("ListModels")).models
            assert (card.id, card.max_model_len) == ("m", 99)
            assert (await wire.one("Detokenize", wire.message("DetokenizeRequest", tokens=encode("hi you")))).text == "hi you"
        else:
            assert not wire.snapshot.has_method(wire.service, "ListModels")

    play("sglang.api", snapshot, scene, model=ModelInfo(model_path="/m", served_model_name="m", max_model_len=99))


@pytest.mark.parametrize("abort_all", [True, False])
def test_cancel_and_abort(abort_all):
    async def scene(wire):
        for stream in (True, False):
            await cancelled(wire, "Generate", request(wire, {"first_delay_ms": FOREVER}, stream=stream))
        call = wire.call("Generate", request(wire, {"first_delay_ms": FOREVER}))
        await until(lambda: wire.server.running)
        abort = wire.message("AbortRequest", rid="" if abort_all else "r1", abort_all=abort_all)
        assert (await wire.one("Abort", abort)).success
        (message,) = [message async for message in call]
        assert (message.error.error.code, message.error.error.message) == (499, "client disconnected")
        assert wire.server.aborted == ["r1"] * 3

    play("sglang.api", NEW, scene)
