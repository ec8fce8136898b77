"""gRPC in one dialect, gRPC out in another: for every pair, the client sees a server of its own dialect."""

from __future__ import annotations

import itertools

import msgspec
import pytest

from gaie_codec import (
    BodyChunk,
    Bridge,
    CancelCall,
    Code,
    EndOfBody,
    FinishEvent,
    InferenceRequest,
    Limits,
    MalformedRequestError,
    Media,
    Observer,
    ResponseHead,
    SamplingParams,
    TokenLogprob,
    TokensEvent,
    Trailers,
    UnsupportedFieldError,
    UsageError,
    encode_frame,
    encode_grpc_error,
)
from gaie_codec._conventions import Teller
from gaie_codec.adapters import DIALECTS
from gaie_codec.tokenizer_sources import load_tokenizer

TOKENIZER = load_tokenizer("builtin")
PAIRS = list(itertools.product(DIALECTS, DIALECTS))
HELLO = TOKENIZER.encode("Hello STOP world", add_special_tokens=False)


def asked(bridge: Bridge, *, stream=True, **sampling) -> tuple[str, bytes, InferenceRequest]:
    """A client's call: path, frame, and what it means."""
    request = InferenceRequest(
        request_id="r", prompt_token_ids=[5, 6, 7], stream=stream, sampling=SamplingParams(**{"max_tokens": 50, **sampling})
    )
    return bridge.inbound.path_for(request), encode_frame(bridge.inbound.encode_request(request).SerializeToString()), request


def answered(adapter, request: InferenceRequest, ids=HELLO, *, reason="length", first_index=0) -> bytes:
    """The frames of a server that generates these ids, one a step, for each choice."""
    teller = Teller(adapter.convention, request, sends_text=adapter.sends_text)
    events = []
    for index in range(request.sampling.n):
        detokenizer = TOKENIZER.detokenizer(())
        for place, token_id in enumerate(ids):
            entry = TokenLogprob(token_id=token_id, logprob=-0.5, top=((token_id, -0.5),))
            gained = TokensEvent(
                index=index,
                token_ids=[token_id],
                text=detokenizer.decode((token_id,)),
                logprobs=(entry,) if request.sampling.logprobs is not None else (),
                prompt_tokens=3,
                cached_tokens=1,
                completion_tokens=1,
            )
            if place < len(ids) - 1:
                events += teller.gain(gained)
            else:
                events += teller.finish(FinishEvent(index=index, finish_reason=reason, prompt_tokens=3, cached_tokens=1), last=gained)
    return b"".join(encode_frame(adapter.encode_response(event).SerializeToString()) for event in events)


def play(call, bodies, *, size=5, framed=True, status=Code.OK):
    """The outputs, with the contract checked."""
    response = call.response(framed=framed)
    outputs = []
    for number, body in enumerate(bodies):
        outputs += response.receive_headers([("content-type", "application/grpc")], call=number)
        for start in range(0, len(body), size):
            outputs += response.receive_data(body[start : start + size], call=number)
        outputs += response.receive_status(status, "over there" if status else "", call=number)
    kinds = [type(output) for output in outputs if not isinstance(output, BodyChunk | CancelCall)]
    assert kinds == [ResponseHead, Trailers, EndOfBody]
    assert isinstance(outputs[-1], EndOfBody)
    return response, outputs


def seen_by_client(bridge: Bridge, path: str, frame: bytes, outputs):
    """What the client's own reader makes of the answer."""
    response = Observer(bridge.inbound).request(path, [], frame).response()
    events = []
    for output in outputs:
        if isinstance(output, ResponseHead):
            events += response.receive_headers(output.headers)
        elif isinstance(output, BodyChunk):
            events += response.receive_data(output.data)
        elif isinstance(output, Trailers):
            events += response.receive_trailers(output.headers)
    return response, events


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(("inbound", "outbound"), PAIRS, ids=[f"{one}-to-{other}" for one, other in PAIRS])
def test_every_dialect_to_every_other(inbound, outbound, stream):
    bridge = Bridge(inbound, outbound, tokenizer=TOKENIZER)
    path, frame, _ = asked(bridge, stream=stream, logprobs=1, temperature=0.5)
    call = bridge.request(path, [], frame)
    assert call.dropped == ()
    sent = bridge.outbound.decode_request(bridge.outbound.snapshot.method_at(call.calls[0].path).request.FromString(call.calls[0].message))
    assert (sent.prompt_token_ids, sent.sampling.max_tokens, sent.sampling.temperature) == ([5, 6, 7], 50, 0.5)
    response, outputs = play(call, [answered(bridge.outbound, call.calls[0].inference)])
    assert response.error is None
    client, events = seen_by_client(bridge, path, frame, outputs)
    assert client.error is None
    assert (client.usage.prompt_tokens, client.usage.completion_tokens) == (3, len(HELLO))
    assert client.finish_reasons == {0: "length"}
    said = [event for event in events if isinstance(event, TokensEvent | FinishEvent)]
    last = said[-1]
    if bridge.inbound.convention.is_cumulative or not stream:
        assert last.token_ids == HELLO
        assert [entry.token_id for entry in last.logprobs] == HELLO
    else:
        assert [token_id for event in said if isinstance(event, TokensEvent) for token_id in event.token_ids][:5] == HELLO[:5]
    if bridge.inbound.sends_text:
        text = last.text if bridge.inbound.convention.is_cumulative else "".join(event.text for event in said)
        assert text == "Hello STOP world"


@pytest.mark.parametrize(("inbound", "outbound"), [("vllm.engine", "vllm.inference"), ("sglang.scheduler", "sglang.api")])
def test_choices_that_the_server_has_not_are_several_calls(inbound, outbound):
    bridge = Bridge(inbound, outbound, tokenizer=TOKENIZER)
    path, frame, _ = asked(bridge, n=3, temperature=1.0)
    call = bridge.request(path, [], frame)
    assert len(call.calls) == 3
    _, outputs = play(call, [answered(bridge.outbound, one.inference, HELLO[: place + 1]) for place, one in enumerate(call.calls)])
    client, _ = seen_by_client(bridge, path, frame, outputs)
    assert (client.error, client.usage.completion_tokens, client.usage.prompt_tokens) == (None, 6, 3)
    assert client.finish_reasons == dict.fromkeys(range(3), "length")
    with pytest.raises(UnsupportedFieldError) as refused:
        Bridge(inbound, outbound, tokenizer=TOKENIZER, limits=Limits(max_calls=2)).request(path, [], frame)
    assert refused.value.param == "n"


def test_a_stop_string_that_the_server_does_not_know_ends_the_answer_and_the_call():
    bridge = Bridge("vllm.engine", "sglang.scheduler", tokenizer=TOKENIZER)
    path, frame, _ = asked(bridge, stop=("STOP",))
    call = bridge.request(path, [], frame)
    response = call.response()
    outputs = [*response.receive_headers(), *response.receive_data(answered(bridge.outbound, call.calls[0].inference))]
    assert response.ended
    client, events = seen_by_client(bridge, path, frame, outputs)
    assert client.error is None
    (finish,) = [event for event in events if isinstance(event, FinishEvent)]
    assert (finish.finish_reason, finish.matched_stop) == ("stop", "STOP")
    upto = next(count for count in range(len(HELLO)) if "STOP" in TOKENIZER.detokenizer(()).decode(HELLO[:count]))
    assert client.usage.completion_tokens == upto
    with pytest.raises(UnsupportedFieldError) as refused:
        Bridge("vllm.engine", "sglang.scheduler").request(path, [], frame)
    assert refused.value.param == "stop"


def test_nothing_is_lost_in_silence():
    bridge = Bridge("sglang.scheduler", "vllm.engine", tokenizer=TOKENIZER)
    message = bridge.inbound.encode_request(InferenceRequest(request_id="r", prompt_token_ids=[5]))
    message.return_hidden_states = True
    message.log_metrics = True  # changes nothing that is generated
    frame = encode_frame(message.SerializeToString())
    with pytest.raises(UnsupportedFieldError) as refused:
        bridge.request(bridge.inbound.generate_path, [], frame)
    assert refused.value.param == "return_hidden_states"
    message.sampling_params.stream_interval = 3
    dropping = Bridge("sglang.scheduler", "vllm.engine", tokenizer=TOKENIZER, unsupported="drop")
    call = dropping.request(dropping.inbound.generate_path, [], encode_frame(message.SerializeToString()))
    assert set(call.dropped) == {"return_hidden_states", "stream_interval"}


def test_what_the_other_wire_cannot_carry_is_refused_by_name():
    bridge = Bridge("vllm.engine", "sglang.scheduler", tokenizer=TOKENIZER)
    for fields, name in (({"seed": 5}, "seed"),):
        path, frame, _ = asked(bridge, **fields)
        with pytest.raises(UnsupportedFieldError) as refused:
            bridge.request(path, [], frame)
        assert refused.value.param == name
        answer = encode_grpc_error(refused.value)
        assert ("grpc-status", "3") in answer[0].headers
        assert isinstance(answer[-1], EndOfBody)
    with pytest.raises(MalformedRequestError):
        bridge.request(bridge.inbound.generate_path, [], b"\1")


@pytest.mark.parametrize("framed", [True, False])
def test_an_error_of_the_server_is_the_clients_status(framed):
    bridge = Bridge("vllm.engine", "sglang.api", tokenizer=TOKENIZER)
    path, frame, _ = asked(bridge)
    call = bridge.request(path, [], frame)
    response, outputs = play(call, [b""], framed=framed, status=Code.RESOURCE_EXHAUSTED)
    assert response.error.code is Code.RESOURCE_EXHAUSTED
    trailers = next(output for output in outputs if isinstance(output, Trailers))
    assert trailers.headers == (("grpc-status", "8"), ("grpc-message", "over there"))
    whole = answered(bridge.outbound, call.calls[0].inference)
    response, outputs = play(call, [whole[: len(whole) // 2]], framed=framed)
    assert response.error.http_status == 502


def test_bare_messages_for_hosts_whose_library_frames():
    bridge = Bridge("vllm.engine", "sglang.scheduler", tokenizer=TOKENIZER)
    path, frame, _ = asked(bridge)
    call = bridge.request(path, [], frame)
    body = answered(bridge.outbound, call.calls[0].inference)
    _, bare = play(call, [body], framed=False, size=1)
    _, framed = play(call, [body], size=1)
    assert b"".join(encode_frame(one.data) for one in bare if isinstance(one, BodyChunk)) == b"".join(
        one.data for one in framed if isinstance(one, BodyChunk)
    )


def test_what_a_newer_client_says_is_not_lost():
    bridge = Bridge("vllm.engine", "sglang.scheduler", tokenizer=TOKENIZER)
    message = (
        bridge.inbound.encode_request(InferenceRequest(request_id="r", prompt_token_ids=[5])).SerializeToString() + b"\xba\x3e\x05hello"
    )
    with pytest.raises(UnsupportedFieldError) as refused:
        bridge.request_message(bridge.inbound.generate_path, [], message)
    assert refused.value.param == "field 999"


@pytest.mark.parametrize("n", [-2, 2**31 - 1])
@pytest.mark.parametrize("outbound", ["vllm.inference", "sglang.scheduler"])
def test_choices_beyond_measure_are_refused_before_they_cost_anything(outbound, n):
    bridge = Bridge("sglang.api", outbound, tokenizer=TOKENIZER)
    message = bridge.inbound.encode_request(InferenceRequest(request_id="r", prompt_token_ids=[5], sampling=SamplingParams(max_tokens=5)))
    message.sampling_params.one.n = n
    for door in (bridge, Observer("sglang.api")):
        with pytest.raises(MalformedRequestError) as refused:
            door.request_message(bridge.inbound.generate_path, [], message.SerializeToString())
        assert refused.value.param == "n"


def test_faults_of_a_client_are_the_clients():
    engine = Bridge("vllm.engine", "vllm.inference", tokenizer=TOKENIZER)
    request = InferenceRequest(request_id="r", prompt_token_ids=[5], sampling=SamplingParams(max_tokens=5))
    for faulty, param in (
        (msgspec.structs.replace(request, sampling=SamplingParams(max_tokens=5, stop=("",))), "stop"),
        (msgspec.structs.replace(request, kv_transfer_params="[1]"), "kv_transfer_params"),
        (msgspec.structs.replace(request, kv_transfer_params='{"a": 9007199254740993}'), "kv_transfer_params"),
        (msgspec.structs.replace(request, kv_transfer_params="nope"), "body"),
    ):
        with pytest.raises(MalformedRequestError) as refused:
            engine.request_message(engine.inbound.generate_path, [], engine.inbound.encode_request(faulty).SerializeToString())
        assert refused.value.param == param
    typed = Bridge("vllm.inference", "sglang.runtime", tokenizer=TOKENIZER)
    image = Media(kind="image", url="https://host/a.png")
    asked = InferenceRequest(request_id="r", prompt_text="an image", media=(image,), stream=True, sampling=SamplingParams(max_tokens=5))
    with pytest.raises(UnsupportedFieldError) as refused:
        typed.request_message(typed.inbound.generate_path, [], typed.inbound.encode_request(asked).SerializeToString())
    assert refused.value.param == "messages"


@pytest.mark.parametrize(
    ("inbound", "event"),
    [
        ("sglang.api", TokensEvent(token_ids=[2**32 - 1])),
        ("sglang.runtime", TokensEvent(token_ids=[2**31])),
        ("vllm.inference", FinishEvent(token_ids=[5], kv_transfer_params="[1]")),
    ],
)
def test_what_the_clients_wire_cannot_hold_is_a_broken_answer(inbound, event):
    bridge = Bridge(inbound, "vllm.engine", tokenizer=TOKENIZER)
    path, frame, _ = asked(bridge)
    call = bridge.request(path, [], frame)
    response = call.response()
    outputs = [*response.receive_headers(), *response.receive_message(bridge.outbound.encode_response(event).SerializeToString())]
    assert response.error.http_status == 502
    assert ("grpc-status", "13") in next(output for output in outputs if isinstance(output, Trailers)).headers
    assert response.ended


def test_text_needs_a_tokenizer_early():
    with pytest.raises(UsageError, match="tokenizer"):
        Bridge("sglang.api", "vllm.engine")
    assert Bridge("vllm.engine", "sglang.scheduler").tokenizer is None
