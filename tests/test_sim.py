"""The simulated model server, driven by the published stubs: what it answers, how it ends, and what it notes."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys

import grpc
import pytest
from google.protobuf import descriptor_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from smg_grpc_proto.generated import common_pb2
from smg_grpc_proto.generated import vllm_engine_pb2 as pb
from smg_grpc_proto.generated.vllm_engine_pb2_grpc import VllmEngineStub

from gaie_codec import Constraint, MalformedRequestError, ModelInfo, SamplingParams, UsageError
from gaie_codec.sim import Script, SimServer, decode_script, run
from gaie_codec.snapshots import SNAPSHOTS
from gaie_codec.text.archive import TokenizerArchive
from gaie_codec.text.huggingface import HuggingFaceTokenizer
from gaie_codec.tokenizer_sources import load_tokenizer

SERVICE = "vllm.grpc.engine.VllmEngine"
NEW, OLD = "smg-0.4.28", "intree-0.14.0"
EOS = 2
TOKENIZER = load_tokenizer("builtin")
FOREVER = 3_600_000


def scenario(play, **options):
    """Run `play(server, channel)` against a fresh server in a fresh event loop."""

    async def main():
        server = SimServer(tokenizer=options.pop("tokenizer", TOKENIZER), **options)
        port = await server.start("127.0.0.1:0")
        try:
            limits = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=limits) as channel:
                return await play(server, channel)
        finally:
            await server.stop()

    return asyncio.run(main())


def request(prompt="Tell me something", *, script=None, request_id="r1", stream=True, **sampling):
    if script is not None:
        prompt += f" [[sim {script if isinstance(script, str) else json.dumps(script)}]]"
    ids = prompt if isinstance(prompt, list) else TOKENIZER.encode(prompt, add_special_tokens=False)
    return pb.GenerateRequest(
        request_id=request_id,
        tokenized=pb.TokenizedInput(input_ids=ids),
        stream=stream,
        sampling_params=pb.SamplingParams(**({"skip_special_tokens": True} | sampling)),
    )


def ask(*args, options=None, **kwargs):
    """The messages of one answer."""

    async def play(server, channel):
        message = args[0] if args and isinstance(args[0], pb.GenerateRequest) else request(*args, **kwargs)
        return [answer async for answer in VllmEngineStub(channel).Generate(message)]

    return scenario(play, **(options or {}))


def ask_for_error(*args, options=None, **kwargs):
    """The messages before the error, and the error."""

    async def play(server, channel):
        call = VllmEngineStub(channel).Generate(request(*args, **kwargs))
        seen = []
        try:
            async for answer in call:
                seen.append(answer)
        except grpc.aio.AioRpcError as error:
            return seen, error.code(), error.details()
        raise AssertionError("no error")

    return scenario(play, **(options or {}))


def kinds(messages):
    return [message.WhichOneof("response") for message in messages]


def ids_of(messages, index=0):
    return [token_id for message in messages if message.chunk.index == index for token_id in message.chunk.token_ids]


def complete_of(messages, index=0):
    (complete,) = [message.complete for message in messages if message.HasField("complete") and message.complete.index == index]
    return complete


def text_of(token_ids):
    return TOKENIZER.detokenizer((), skip_special_tokens=False).decode(list(token_ids))


def encode(text):
    return TOKENIZER.encode(text, add_special_tokens=False)


async def rest_of(call):
    """The messages to come. A call whose messages are read one by one cannot be iterated over as well."""
    messages = []
    while (message := await call.read()) is not grpc.aio.EOF:
        messages.append(message)
    return messages


async def until(claim):
    async with asyncio.timeout(30):
        while not claim():
            await asyncio.sleep(0.001)


# The answer when nothing is scripted


@pytest.mark.parametrize("snapshot", SNAPSHOTS["vllm.engine"])
def test_echoes_the_last_turn_token_by_token_and_ends(snapshot):
    prompt = "<|im_start|>system\nBe nice.<|im_end|>\n<|im_start|>user\nHow are you, sim?<|im_end|>\n<|im_start|>assistant\n"
    messages = ask(prompt, options={"snapshot": snapshot})
    ids = ids_of(messages)
    assert text_of(ids) == "Hello! You said: How are you sim.<|im_end|>"
    assert kinds(messages) == ["chunk"] * len(ids) + ["complete"]
    assert {message.chunk.prompt_tokens for message in messages[:-1]} == {len(encode(prompt))}
    assert messages == ask(prompt, options={"snapshot": snapshot})


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ("once upon a time", "Hello! You said: once upon a time."),
        ("?!", "Hello! How can I help you?"),
        (
            "<|start_header_id|>user<|end_header_id|>\n\nlook here<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
            "Hello! You said: look here.",
        ),
        ("[INST] it's well-known [/INST]", "Hello! You said: it's well-known."),
        (" ".join(str(number) for number in range(20)), "Hello! You said: 8 9 10 11 12 13 14 15 16 17 18 19."),
    ],
)
def test_echoes_prompts_of_any_template(prompt, text):
    assert text_of(ids_of(ask(prompt))) == text + "<|im_end|>"


def test_tokenizes_a_text_prompt():
    message = request()
    message.text = "as text"
    assert "as text" in text_of(ids_of(ask(message)))


def test_without_stream_only_completes_come():
    (message,) = ask(stream=False, script={"text": "one two", "cached_tokens": 3})
    complete = message.complete
    assert list(complete.output_ids) == [*encode("one two"), EOS]
    assert (complete.finish_reason, complete.completion_tokens, complete.cached_tokens) == ("stop", len(complete.output_ids), 3)
    assert complete.WhichOneof("matched_stop") is None


def test_the_old_snapshot_answers_without_what_it_lacks():
    messages = ask(script={"text": "a b c"}, stop=[" b"], logprobs=1, options={"snapshot": OLD})
    complete = messages[-1].complete
    assert complete.finish_reason == "stop"
    assert complete.WhichOneof("matched_stop") is None
    assert not messages[0].chunk.HasField("output_logprobs")


# How an answer ends


def test_max_tokens():
    messages = ask(script={"text": "one two three four"}, max_tokens=2)
    assert ids_of(messages) == encode("one two three four")[:2]
    assert complete_of(messages).finish_reason == "length"


def test_the_context_is_a_limit():
    messages = ask([7] * 60, ignore_eos=True, options={"model": ModelInfo(max_model_len=64)})
    assert len(ids_of(messages)) == 4
    assert complete_of(messages).finish_reason == "length"


def test_a_stop_string_ends_at_the_token_that_completes_it():
    messages = ask(script={"text": "one two three four"}, stop=["xyz", "two th"])
    complete = complete_of(messages)
    assert text_of(ids_of(messages)).startswith("one two th")
    assert "two th" not in text_of(ids_of(messages)[:-1])
    assert (complete.finish_reason, complete.matched_stop_str) == ("stop", "two th")


def test_a_stop_string_wins_over_the_length():
    ids = encode("one two three four")
    count = next(count for count in range(1, len(ids) + 1) if "two" in text_of(ids[:count]))
    complete = complete_of(ask(script={"text": "one two three four"}, stop=["two"], max_tokens=count))
    assert (complete.finish_reason, complete.matched_stop_str) == ("stop", "two")


def test_a_stop_string_within_min_tokens_is_passed_over():
    tokens = encode(" stop")
    script = {"tokens": [tokens, tokens, tokens, tokens, [EOS]]}
    messages = ask(script=script, stop=["stop"], min_tokens=2 * len(tokens))
    assert ids_of(messages) == tokens * 3
    assert complete_of(messages).matched_stop_str == "stop"


def test_a_stop_token_is_the_last_and_named():
    ids = encode("one two three four")
    messages = ask(script={"text": "one two three four"}, stop_token_ids=[ids[2]])
    assert ids_of(messages) == ids[:3]
    assert complete_of(messages).matched_token_id == ids[2]
    assert complete_of(messages).finish_reason == "stop"


def test_the_text_of_a_stop_token_is_no_stop_string_unless_shown():
    script = {"tokens": [[7], [EOS]]}
    for shown, matched in ((False, None), (True, "matched_stop_str")):
        sampling = {"stop": ["<|im_end|>"], "include_stop_str_in_output": shown, "skip_special_tokens": False}
        assert complete_of(ask(script=script, **sampling)).WhichOneof("matched_stop") == matched


def test_min_tokens_puts_the_end_off():
    messages = ask(script={"text": "so"}, min_tokens=5)
    assert len(encode("so")) < 5
    assert ids_of(messages) == encode("so") * (-(-5 // len(encode("so")))) + [EOS]
    ids = ids_of(ask(script={"tokens": [[7], [EOS], [8], [EOS], [9]]}, min_tokens=3))
    assert ids == [7, EOS, 8, EOS]


def test_ignore_eos_goes_on_to_the_limit():
    one = [*encode("so"), EOS]
    messages = ask(script={"text": "so"}, ignore_eos=True, max_tokens=2 * len(one) + 1)
    assert ids_of(messages) == [*one, *one, one[0]]
    assert complete_of(messages).finish_reason == "length"


@pytest.mark.parametrize("stream", [True, False])
def test_no_text_is_an_answer_too(stream):
    assert list(complete_of(ask(stream=stream, script={"text": ""}, min_tokens=1)).output_ids) == [EOS]
    messages = ask(stream=stream, script={"text": "", "finish": "length"})
    assert kinds(messages) == ["complete"]
    assert list(messages[0].complete.output_ids) == []


@pytest.mark.parametrize("reason", ["length", "abort", "error", "repetition"])
def test_a_scripted_reason_comes_without_the_end_token(reason):
    messages = ask(script={"text": "one two", "finish": reason})
    assert ids_of(messages) == encode("one two")
    assert complete_of(messages).finish_reason == reason


# Several choices


def test_choices_take_turns_and_end_on_their_own():
    messages = ask(n=3, script={"tokens": [[7], [8]]}, logprobs=0)
    assert [(m.chunk.index, list(m.chunk.token_ids)) if m.HasField("chunk") else m.complete.index for m in messages] == [
        (0, [7]), (1, [7]), (2, [7]), (0, [8]), 0, (1, [8]), 1, (2, [8]), 2,
    ]  # fmt: skip


def test_choices_differ_in_text_and_length():
    messages = ask(n=3, script={"text": ["a", "a b c"]})
    assert [text_of(ids_of(messages, index)) for index in range(3)] == [f"{text}<|im_end|>" for text in ("a", "a b c", "a")]
    positions = [place for place, message in enumerate(messages) if message.HasField("complete")]
    assert [messages[place].complete.index for place in positions] == [0, 2, 1]
    assert messages[positions[0] + 1 : positions[2]] != []


def test_choices_differ_unscripted():
    lengths = [len(ids_of(ask(n=3), index)) for index in range(3)]
    assert lengths == sorted(set(lengths))


def test_choices_without_stream_come_at_the_end_in_order():
    messages = ask(n=2, stream=False, script={"text": ["longer than that", "short"]})
    assert [(m.complete.index, text_of(m.complete.output_ids)) for m in messages] == [
        (0, "longer than that<|im_end|>"),
        (1, "short<|im_end|>"),
    ]


# Log probabilities


@pytest.mark.parametrize(("wanted", "width"), [(0, 1), (1, 1), (3, 3)])
def test_logprobs_have_the_sampled_token_first(wanted, width):
    messages = ask(script={"tokens": [[7, 40], [41]]}, logprobs=wanted)
    first, second, complete = messages[0].chunk.output_logprobs, messages[1].chunk.output_logprobs, messages[2].complete.output_logprobs
    assert list(first.token_ids) == [7, 40]
    assert list(first.token_logprobs) == [-7 / 16, -8 / 16]
    assert [top.token_ids[0] for top in first.top_logprobs] == [7, 40]
    assert [len(set(top.token_ids)) for top in first.top_logprobs] == [width, width]
    assert [list(top.values) for top in first.top_logprobs] == [sorted(top.values, reverse=True) for top in first.top_logprobs]
    assert second == complete


def test_logprobs_only_when_asked_for_and_as_scripted():
    assert not ask()[0].chunk.HasField("output_logprobs")
    (message,) = ask(stream=False, logprobs=2, script={"tokens": [[7], [8]], "logprob": -1.5})
    assert list(message.complete.output_logprobs.token_logprobs) == [-1.5, -1.5]
    assert [list(top.values) for top in message.complete.output_logprobs.top_logprobs] == [[-1.5, -2.5]] * 2


# Scripts


def test_counts_of_both_servicers():
    script = {"tokens": [[7, 8], [9]]}
    python, rust = ask(script=script, logprobs=0), ask(script=script | {"counts": "cumulative"}, logprobs=0)
    assert [m.chunk.completion_tokens for m in python[:2]] == [2, 1]
    assert [m.chunk.completion_tokens for m in rust[:2]] == [2, 3]
    assert ids_of(python) == ids_of(rust) == [7, 8, 9]
    assert (list(python[2].complete.output_ids), python[2].complete.completion_tokens) == ([9], 1)
    assert (list(rust[2].complete.output_ids), rust[2].complete.completion_tokens) == ([7, 8, 9], 3)
    assert list(rust[2].complete.output_logprobs.token_ids) == [7, 8, 9]


def test_step_is_the_number_of_tokens_in_a_chunk():
    sizes = [len(m.chunk.token_ids) for m in ask(script={"text": "one two three four five", "step": 3})]
    ids = encode("one two three four five")
    assert sizes == [len(ids[start : start + 3]) for start in range(0, len(ids), 3)] + [1, 0]


def test_a_character_can_be_split_over_chunks():
    messages = ask(script={"text": "ok 🏽 né"})
    pieces = TOKENIZER.detokenizer(())
    texts = [pieces.decode(list(m.chunk.token_ids)) for m in messages[:-1]]
    assert "".join(texts) == "ok 🏽 né"
    assert "" in texts[:-1]


def test_chunks_without_tokens_come_first():
    messages = ask(n=2, script={"tokens": [[7]], "empty_chunks": 2})
    assert [list(m.chunk.token_ids) for m in messages[:4]] == [[], [], [], []]
    assert kinds(messages) == ["chunk"] * 4 + ["chunk", "complete"] * 2
    assert kinds(ask(stream=False, script={"empty_chunks": 2})) == ["complete"]


@pytest.mark.parametrize("stream", [True, False])
def test_the_complete_can_be_missing(stream):
    messages = ask(stream=stream, script={"tokens": [[7], [8]], "complete": False})
    assert kinds(messages) == ["chunk", "chunk"] * stream


@pytest.mark.parametrize(("after", "seen"), [(0, 0), (2, 2), (3, 3), (99, 3)])
def test_a_scripted_error_comes_after_so_many_messages(after, seen):
    script = {"tokens": [[7], [8]], "error": {"code": "RESOURCE_EXHAUSTED", "message": "full", "after": after}}
    messages, code, details = ask_for_error(script=script)
    assert kinds(messages) == ["chunk", "chunk", "complete"][:seen]
    assert (code, details) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "full")


def test_an_error_before_the_first_message_waits_for_nothing():
    script = {"first_delay_ms": FOREVER, "error": {"code": "UNAVAILABLE"}}
    assert ask_for_error(script=script, stream=False)[:2] == ([], grpc.StatusCode.UNAVAILABLE)


def test_delays_are_waited_for():
    async def play(server, channel):
        loop = asyncio.get_running_loop()
        start = loop.time()
        script = {"tokens": [[7], [8], [9]], "first_delay_ms": 40, "delay_ms": 20}
        times = [loop.time() - start async for _ in VllmEngineStub(channel).Generate(request(script=script, n=2))]
        assert times[0] > 0.035
        assert times[-1] > 0.075

    scenario(play)


def test_the_last_script_of_the_prompt_counts_and_the_servers_own_is_for_the_rest():
    async def play(server, channel):
        async def text(prompt):
            return text_of(ids_of([m async for m in VllmEngineStub(channel).Generate(request(prompt))]))

        assert await text("plain") == "the server's<|im_end|>"
        assert await text('[[sim {"text": "first"}]] and [[sim {"text": "]] {second} [[sim {"}  ]] end') == "]] {second} [[sim {<|im_end|>"
        assert await text('[[sim {"tokens": [[7], [8]]}]]') == text_of([7, 8])
        assert await text("said [[sim {}]] twice") == "Hello! You said: said twice.<|im_end|>"

    scenario(play, script=Script(text="the server's"))


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ('{"txet": "typo"}', "unknown field `txet`"),
        ('{"step": 0}', "$.step"),
        ('{"step": "1"}', "Expected `int`, got `str` - at `$.step`"),
        ('{"delay_ms": -1}', "$.delay_ms"),
        ('{"tokens": [[7, -1]]}', "$.tokens[0][1]"),
        ('{"text": "a", "tokens": [[7]]}', "both `text` and `tokens`"),
        ('{"text": []}', "`text` is an empty list"),
        ('{"counts": "none"}', "$.counts"),
        ('{"error": {"code": "OK"}}', "`code` is not the name of a gRPC error code"),
        ('{"error": {"code": "E418"}}', "`code` is not the name of a gRPC error code"),
        ('{"text": "no end"', "truncated"),
        ('{"text": "no end"} ', "no ]] after it"),
        ('{"text": ' + "[" * 500, "sim script: "),
    ],
)
def test_a_malformed_script_is_refused_by_name(script, words):
    prompt = f"[[sim {script}" if "no end" in script else f"[[sim {script}]]"
    messages, code, details = ask_for_error(prompt)
    assert (messages, code) == ([], grpc.StatusCode.INVALID_ARGUMENT)
    assert details.startswith("sim script: ")
    assert words in details


def test_a_script_from_a_file():
    assert decode_script(b'{"text": ["a"], "delay_ms": 5}') == Script(text=["a"], delay_ms=5)
    for data in (b"", b"[]", b"\xff", b'{"step": null}'):
        with pytest.raises(MalformedRequestError, match=r"^sim script: "):
            decode_script(data)


# What is refused


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"prompt": []}, "cannot be empty"),
        ({"prompt": [7] * 2048}, "longer than the maximum model length of 2048"),
        ({"prompt": [7, 3072]}, "Token id 3072 is out of vocabulary"),
        ({"max_tokens": 0}, "max_tokens must be at least 1"),
        ({"max_tokens": 2, "min_tokens": 3}, "max_tokens must be at least"),
        ({"n": 2**32 - 1}, "n must be at most"),
        ({"logprobs": 21}, "logprobs must be between 0 and 20"),
        ({"logprobs": -1}, "logprobs must be between 0 and 20"),
        ({"stop": ["a", ""]}, "empty string"),
    ],
)
def test_refuses_what_vllm_refuses(fields, words):
    messages, code, details = ask_for_error(**fields)
    assert (messages, code) == ([], grpc.StatusCode.INVALID_ARGUMENT)
    assert words in details


def test_one_request_id_may_run_twice():
    async def play(server, channel):
        stub = VllmEngineStub(channel)
        first = stub.Generate(request(script={"first_delay_ms": FOREVER}))
        await until(lambda: server.running)
        assert [message async for message in stub.Generate(request())]
        assert server.running == ("r1",)
        first.cancel()
        await until(lambda: not server.running)

    scenario(play)


# What the server notes


@pytest.mark.parametrize("snapshot", SNAPSHOTS["vllm.engine"])
def test_requests_are_kept_as_received(snapshot):
    async def play(server, channel):
        message = request([7, 8], stop=["x"], max_tokens=3, temperature=0.0, n=1, top_k=4, json_schema="{}")
        assert [answer async for answer in VllmEngineStub(channel).Generate(message)]
        (seen,) = server.requests
        assert (seen.request_id, seen.prompt_token_ids, seen.stream) == ("r1", [7, 8], True)
        assert seen.sampling == SamplingParams(
            temperature=0.0, top_k=4, max_tokens=3, stop=("x",), spaces_between_special_tokens=False,
            constraint=Constraint(kind="json_schema", value="{}"),
        )  # fmt: skip
        assert (server.aborted, server.running) == ([], ())

    scenario(play, snapshot=snapshot)


@pytest.mark.parametrize("script", [{"first_delay_ms": FOREVER}, {"delay_ms": 1}, {}])
@pytest.mark.parametrize("stream", [True, False])
def test_a_cancelled_call_is_noted(script, stream):
    if not stream and not script.get("first_delay_ms"):
        script = {"delay_ms": FOREVER}

    async def play(server, channel):
        call = VllmEngineStub(channel).Generate(request(script=script, stream=stream, ignore_eos=True))
        await until(lambda: server.running)
        if stream and not script.get("first_delay_ms"):
            assert (await call.read()).chunk.token_ids
        call.cancel()
        await until(lambda: server.aborted)
        assert (server.aborted, server.running) == (["r1"], ())

    scenario(play, model=ModelInfo(max_model_len=10**6))


def test_a_deadline_is_a_cancellation():
    async def play(server, channel):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await VllmEngineStub(channel).Generate(request(script={"delay_ms": FOREVER}), timeout=0.2).read()
        assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        await until(lambda: server.aborted == ["r1"])

    scenario(play)


@pytest.mark.parametrize("snapshot", SNAPSHOTS["vllm.engine"])
def test_abort_ends_the_named_requests(snapshot):
    async def play(server, channel):
        stub = VllmEngineStub(channel)
        calls = [
            stub.Generate(request(request_id="a", script={"tokens": [[7], [8]], "first_delay_ms": 0, "delay_ms": FOREVER})),
            stub.Generate(request(request_id="b", script={"first_delay_ms": FOREVER}, stream=False)),
            stub.Generate(request(request_id="c", script={"first_delay_ms": FOREVER})),
        ]
        begun = await calls[0].read()
        await until(lambda: len(server.running) == 3)
        assert (await stub.GetServerInfo(pb.GetServerInfoRequest())).active_requests == 3
        await stub.Abort(pb.AbortRequest(request_ids=["a", "nobody", "b", "a"]))
        answers = [await rest_of(call) for call in calls[:2]]
        assert list(begun.chunk.token_ids) == [7]
        assert [[(m.complete.finish_reason, list(m.complete.output_ids)) for m in answer] for answer in answers] == [[("abort", [])]] * 2
        assert (server.aborted, server.running) == (["a", "b"], ("c",))

    scenario(play, snapshot=snapshot)


def test_abort_completes_the_choices_that_still_run():
    async def play(server, channel):
        stub = VllmEngineStub(channel)
        script = {"text": ["", "a b c"], "counts": "cumulative", "first_delay_ms": 0, "delay_ms": FOREVER}
        call = stub.Generate(request(n=2, script=script))
        messages = [await call.read() for _ in range(3)]
        await stub.Abort(pb.AbortRequest(request_ids=["r1"]))
        messages += await rest_of(call)
        assert kinds(messages) == ["chunk", "complete", "chunk", "complete"]
        assert (messages[3].complete.index, messages[3].complete.finish_reason) == (1, "abort")
        assert list(messages[3].complete.output_ids) == ids_of(messages, 1)

    scenario(play)


# The other methods


def test_model_info():
    info = ModelInfo(
        model_path="/models/m", served_model_name="m", max_model_len=99, eos_token_ids=(7,), default_sampling_params={"temperature": 0.6}
    )

    async def play(server, channel):
        return await VllmEngineStub(channel).GetModelInfo(pb.GetModelInfoRequest()), server.model

    told, model = scenario(play, model=info)
    assert told == pb.GetModelInfoResponse(
        model_path="/models/m", served_model_name="m", max_context_length=99, eos_token_ids=[7], is_generation=True, vocab_size=3072,
        default_sampling_params_json='{"temperature":0.6}',
    )  # fmt: skip
    assert model.vocab_size == 3072
    told, _ = scenario(play)
    assert (told.served_model_name, told.model_path, told.max_context_length) == ("sim-model", "sim-model", 2048)
    assert list(told.eos_token_ids) == [2, 0]
    told, _ = scenario(play, snapshot=OLD, model=info)
    assert told == pb.GetModelInfoResponse(model_path="/models/m", max_context_length=99, is_generation=True, vocab_size=3072)


def test_the_models_end_token_ends_and_is_emitted():
    assert ids_of(ask(script={"text": "so"}, options={"model": ModelInfo(eos_token_ids=(7, 9))})) == [*encode("so"), 7]
    assert ids_of(ask(script={"tokens": [[8], [9], [8]]}, options={"model": ModelInfo(eos_token_ids=(7, 9))})) == [8, 9]


@pytest.mark.parametrize("snapshot", SNAPSHOTS["vllm.engine"])
def test_health_and_server_info(snapshot):
    async def play(server, channel):
        stub, health = VllmEngineStub(channel), health_pb2_grpc.HealthStub(channel)
        assert (await stub.HealthCheck(pb.HealthCheckRequest())).healthy
        info = await stub.GetServerInfo(pb.GetServerInfoRequest())
        assert (info.active_requests, info.server_type) == (0, "vllm-grpc")
        for service in ("", SERVICE):
            assert (await health.Check(health_pb2.HealthCheckRequest(service=service))).status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await health.Check(health_pb2.HealthCheckRequest(service="other"))
        assert caught.value.code() == grpc.StatusCode.NOT_FOUND
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Embed(pb.EmbedRequest())
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT, "a prompt is missing"
        asked = pb.EmbedRequest(request_id="e", tokenized=pb.TokenizedInput(input_ids=[1, 2]))
        vector = await stub.Embed(asked)
        assert (vector.prompt_tokens, vector.embedding_dim) == (2, len(vector.embedding))
        assert vector == await stub.Embed(asked)

    scenario(play, snapshot=snapshot)


def test_a_health_watch_sees_the_end():
    async def play(server, channel):
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=SERVICE))
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        await server.stop()
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING

    scenario(play)


def tokenizer_chunks(**options):
    async def play(server, channel):
        return [chunk async for chunk in VllmEngineStub(channel).GetTokenizer(common_pb2.GetTokenizerRequest())]

    return scenario(play, **options)


def test_the_tokenizer_can_be_fetched(tmp_path):
    # Noise does not compress, so this makes several chunks.
    (tmp_path / "config.json").write_text(json.dumps({"noise": os.urandom(100_000).hex()}))
    builtin = tokenizer_chunks(tokenizer="builtin")
    archive = TokenizerArchive()
    for chunk in builtin:
        archive.receive(chunk.data, chunk.sha256)
    files = archive.files()
    assert HuggingFaceTokenizer.from_files(files).vocab_size == TOKENIZER.vocab_size
    for name, data in files.items():
        (tmp_path / name).write_bytes(data) if name != "config.json" else None

    chunks = tokenizer_chunks(tokenizer=str(tmp_path))
    assert len(chunks) > 1
    assert {len(chunk.data) for chunk in chunks[:-1]} == {64 * 1024}
    assert {chunk.sha256 for chunk in chunks[:-1]} == {""}
    archive = TokenizerArchive()
    for chunk in chunks:
        archive.receive(chunk.data, chunk.sha256)
    assert set(archive.files()) == set(files)
    assert tokenizer_chunks(tokenizer=str(tmp_path)) == chunks


@pytest.mark.parametrize(
    ("options", "code"),
    [({}, grpc.StatusCode.FAILED_PRECONDITION), ({"snapshot": OLD, "tokenizer": "builtin"}, grpc.StatusCode.UNIMPLEMENTED)],
)
def test_the_tokenizer_cannot_be_fetched(options, code):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        tokenizer_chunks(**options)
    assert caught.value.code() == code


@pytest.mark.parametrize(("snapshot", "has_tokenizer"), [(NEW, True), (OLD, False)])
def test_reflection_describes_the_snapshot_that_is_served(snapshot, has_tokenizer):
    async def play(server, channel):
        async def asked(**fields):
            call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(
                iter([reflection_pb2.ServerReflectionRequest(**fields)])
            )
            (answer,) = [answer async for answer in call]
            return answer

        listed = (await asked(list_services="")).list_services_response.service
        names = {service.name for service in listed}
        assert names == {SERVICE, "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}
        for name in names:
            files = (await asked(file_containing_symbol=name)).file_descriptor_response.file_descriptor_proto
            assert files, name
            if name == SERVICE:
                (service,) = descriptor_pb2.FileDescriptorProto.FromString(files[0]).service
                assert ("GetTokenizer" in {method.name for method in service.method}) is has_tokenizer
        assert (await asked(file_containing_symbol="no.Such")).HasField("error_response")

    scenario(play, snapshot=snapshot)


def test_messages_of_any_size_pass():
    long = " and so on" * 600_000
    message = request([7])
    message.tokenized.original_text = long
    assert message.ByteSize() > 5_000_000
    assert ids_of(ask(message))
    options = {"model": ModelInfo(max_model_len=3_000_000)}
    (answer,) = ask([7], stream=False, max_tokens=2_500_000, options={**options, "script": Script(tokens=[[3000] * 2_500_000])})
    assert answer.ByteSize() > 4 * 1024 * 1024


# The server itself


def test_stop_cancels_what_runs_and_the_server_starts_again():
    async def play(server, channel):
        call = VllmEngineStub(channel).Generate(request(script={"first_delay_ms": FOREVER}))
        await until(lambda: server.running)
        with pytest.raises(UsageError, match="started"):
            await server.start("127.0.0.1:0")
        await server.stop()
        with pytest.raises(grpc.aio.AioRpcError):
            await call.read()
        await until(lambda: server.aborted == ["r1"])
        await server.stop()
        port = await server.start("127.0.0.1:0")
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as again:
            assert [message async for message in VllmEngineStub(again).Generate(request())]

    scenario(play)


def test_an_address_in_use_is_refused():
    async def main():
        first, second = SimServer(tokenizer=TOKENIZER), SimServer(tokenizer=TOKENIZER)
        port = await first.start("127.0.0.1:0")
        try:
            with pytest.raises(UsageError, match="cannot listen on"):
                await second.start(f"127.0.0.1:{port}")
        finally:
            await first.stop()

    asyncio.run(main())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [({"dialect": "sglang"}, "no simulated server"), ({"snapshot": "none"}, "no snapshot"), ({"tokenizer": "./none"}, "no such directory")],
)
def test_what_does_not_exist_is_refused(arguments, words):
    with pytest.raises(UsageError, match=words):
        SimServer(**arguments)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_run_says_ready_and_ends_on_a_signal(number, capsys):
    async def main():
        server = SimServer(tokenizer=TOKENIZER)
        running = asyncio.create_task(run(server, "127.0.0.1:0"))
        line = ""
        async with asyncio.timeout(30):
            while not line and not running.done():
                await asyncio.sleep(0.001)
                line = capsys.readouterr().out
        start, _, address = line.strip().partition("=")
        assert start == "ready grpc"
        async with grpc.aio.insecure_channel(address) as channel:
            assert (await VllmEngineStub(channel).HealthCheck(pb.HealthCheckRequest())).healthy
        os.kill(os.getpid(), number)
        async with asyncio.timeout(30):
            await running

    asyncio.run(main())


def test_many_event_loops_in_one_process():
    for _ in range(20):
        assert kinds(ask(script={"tokens": [[7]]})) == ["chunk", "complete"]
    assert "grpc" in sys.modules
