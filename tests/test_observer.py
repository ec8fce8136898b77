"""grpc-in-grpc-out: what a call says, from bytes cut anywhere, without touching them."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gaie_codec import (
    BodyEvent,
    Code,
    ErrorEvent,
    FinishEvent,
    InferenceRequest,
    Limits,
    MalformedRequestError,
    Observer,
    SamplingParams,
    State,
    TokenLogprob,
    TokensEvent,
    TruncatedResponseError,
    UnsupportedEndpointError,
    UpstreamStatusError,
    UsageError,
    encode_frame,
    snapshots,
)
from gaie_codec._conventions import Teller
from gaie_codec.adapters import DIALECTS

ALL = [(dialect, name) for dialect in DIALECTS for name in snapshots.SNAPSHOTS[dialect] if not snapshots.load(dialect, name).refused]
OK = [("grpc-status", "0")]


def observed(dialect: str, snapshot: str | None = None, *, n: int = 1, stream: bool = True, **sampling):
    """An observer's call, asked as a client of the dialect asks."""
    observer = Observer(dialect, snapshot=snapshot)
    adapter = observer.adapter
    request = InferenceRequest(
        request_id="r", prompt_token_ids=[1, 2, 3], stream=stream, sampling=SamplingParams(n=n, max_tokens=99, **sampling)
    )
    message = adapter.encode_request(request)
    return observer, observer.request(adapter.path_for(request), [], encode_frame(message.SerializeToString()))


def told(adapter, request, steps, *, prompt_tokens=3, cached_tokens=0):
    """The frames of a server that generates these steps, (index, ids, is_last) in order."""
    teller = Teller(adapter.convention, request, sends_text=adapter.sends_text)
    prompt = {"prompt_tokens": prompt_tokens, "cached_tokens": cached_tokens}
    events = []
    for index, ids, is_last in steps:
        gained = TokensEvent(index=index, token_ids=ids, text="x" * len(ids), completion_tokens=len(ids), **prompt)
        events += teller.finish(FinishEvent(index=index, finish_reason="length", **prompt), last=gained) if is_last else teller.gain(gained)
    messages = [adapter.encode_response(event) for event in events]
    if adapter.dialect == "vllm.inference":  # ids are sent to those who ask for them; the counts have to do
        for message in messages:
            message.outputs.ClearField("token_ids")
    return b"".join(encode_frame(message.SerializeToString()) for message in messages)


@pytest.mark.parametrize(("dialect", "snapshot"), ALL, ids=["-".join(key) for key in ALL])
@settings(max_examples=8)
@given(data=st.data())
def test_usage_is_exact_however_the_bytes_are_cut(dialect, snapshot, data):
    adapter = Observer(dialect, snapshot=snapshot).adapter
    n = data.draw(st.integers(1, 3)) if "n" in adapter.carries else 1
    stream = data.draw(st.booleans())
    _, call = observed(dialect, snapshot, n=n, stream=stream)
    steps = []
    for index in range(n):
        pieces = data.draw(st.lists(st.lists(st.integers(1, 99), min_size=1, max_size=3), min_size=1, max_size=4))
        steps += [(index, ids, place == len(pieces) - 1) for place, ids in enumerate(pieces)]
    body = told(adapter, call.inference, steps, cached_tokens=2)
    total = sum(len(ids) for _, ids, _ in steps)
    seen = set()
    for size in (1, 2, 7, len(body)):
        response = call.response()
        response.receive_headers([("content-type", "application/grpc")])
        for start in range(0, len(body), size):
            response.receive_data(body[start : start + size])
        response.receive_trailers(OK)
        assert response.error is None
        seen.add((response.usage, tuple(response.finish_reasons.items()), response.state))
    assert len(seen) == 1
    usage, reasons, state = seen.pop()
    assert (usage.prompt_tokens, usage.completion_tokens) == (3, total)
    assert dict(reasons) == dict.fromkeys(range(n), "length")
    assert state is State.CLOSED


@pytest.mark.parametrize("dialect", DIALECTS)
def test_the_request_is_understood(dialect):
    observer, call = observed(dialect, stop=("a",), temperature=0.5)
    assert call.inference.prompt_token_ids == [1, 2, 3]
    assert call.inference.sampling.max_tokens == 99
    assert call.inference.sampling.temperature == 0.5
    assert call.inference.stream
    assert call.path in observer.paths
    assert (call.inference.sampling.stop == ()) == (dialect == "sglang.scheduler"), "which our own adapter never sends"


def test_a_request_may_come_in_pieces_and_compressed():
    observer, call = observed("vllm.engine")
    message = observer.adapter.encode_request(call.inference).SerializeToString()
    compressed = encode_frame(message, encoding="gzip")
    again = observer.request(call.path, {"grpc-encoding": "gzip"}, [compressed[:3], compressed[3:9], compressed[9:]])
    assert again.inference == call.inference


@pytest.mark.parametrize(
    "body", [b"", b"\0\0\0\0\5ab", encode_frame(b"") * 2, encode_frame(b"\xff"), b"\7\0\0\0\0"], ids=["none", "cut", "two", "bytes", "flag"]
)
def test_a_body_that_is_no_request_is_the_clients_fault(body):
    with pytest.raises(MalformedRequestError):
        Observer("vllm.engine").request("/vllm.grpc.engine.VllmEngine/Generate", [], body)


def test_other_calls_have_nothing_to_observe():
    with pytest.raises(UnsupportedEndpointError, match="Generate"):
        Observer("vllm.engine").request("/vllm.grpc.engine.VllmEngine/HealthCheck", [], encode_frame(b""))
    with pytest.raises(UsageError):
        Observer("vllm.none")


def test_metadata_belongs_to_the_request():
    observer = Observer("vllm.inference")
    adapter = observer.adapter
    request = InferenceRequest(
        request_id="r", prompt_token_ids=[1], stream=True, data_parallel_rank=3, trace_headers={"traceparent": "00-a"}
    )
    assert adapter.encode_metadata(request) == (("traceparent", "00-a"), ("x-data-parallel-rank", "3"))
    body = encode_frame(adapter.encode_request(request).SerializeToString())
    call = observer.request(adapter.generate_path, adapter.encode_metadata(request), body)
    assert (call.inference.data_parallel_rank, call.inference.trace_headers) == (3, {"traceparent": "00-a"})
    unary = next(path for path in adapter.generate_paths if path != adapter.generate_path)
    assert (call.inference.stream, observer.request(unary, [], body).inference.stream) == (True, False)
    with pytest.raises(MalformedRequestError):
        observer.request(adapter.generate_path, {"x-data-parallel-rank": "x"}, body)


def test_unary_choices_that_all_say_index_0_are_told_apart():
    _, call = observed("sglang.scheduler", n=3, stream=False)
    adapter = Observer("sglang.scheduler").adapter
    completes = [FinishEvent(index=0, token_ids=[5] * count, finish_reason="stop", prompt_tokens=3) for count in (1, 2, 3)]
    response = call.response()
    response.receive_headers()
    for event in completes:
        response.receive_message(adapter.encode_response(event).SerializeToString())
    response.receive_status(Code.OK)
    assert response.error is None
    assert (response.usage.completion_tokens, response.finish_reasons) == (6, {0: "stop", 1: "stop", 2: "stop"})


@pytest.mark.parametrize("dialect", DIALECTS)
def test_faults_are_told_and_never_raised(dialect):
    adapter = Observer(dialect).adapter
    _, call = observed(dialect)
    whole = told(adapter, call.inference, [(0, [5], False), (0, [6], True)])

    def play(body, end):
        response = call.response()
        response.receive_headers()
        response.receive_data(body)
        end(response)
        return response

    cut = play(whole[:-1], lambda response: response.receive_trailers(OK))
    assert isinstance(cut.error, TruncatedResponseError)
    gone = play(whole[:5], lambda response: response.receive_eof())
    assert isinstance(gone.error, TruncatedResponseError)
    refused = play(b"", lambda response: response.receive_status(Code.RESOURCE_EXHAUSTED, "full"))
    assert isinstance(refused.error, UpstreamStatusError)
    assert refused.error.code is Code.RESOURCE_EXHAUSTED
    noise = play(b"\xff" * 20, lambda response: response.receive_eof())
    assert noise.error is not None
    assert noise.ended
    with pytest.raises(UsageError):
        noise.receive_data(b"")


@pytest.mark.parametrize(
    ("dialect", "snapshot"), [("sglang.api", "0.5.23"), ("sglang.scheduler", "intree-0.5.8"), ("sglang.runtime", "0.5.23")]
)
def test_an_error_inside_the_stream_is_an_error(dialect, snapshot):
    adapter = Observer(dialect, snapshot=snapshot).adapter
    _, call = observed(dialect, snapshot)
    if dialect == "sglang.runtime":
        message = adapter.response_type()
        message.finished = True
        message.meta_info["finish_reason"] = json.dumps({"type": "abort", "message": "too many", "status_code": 429})
    else:
        message = adapter.encode_response(ErrorEvent(code=Code.RESOURCE_EXHAUSTED, message="too many"))
    response = call.response()
    response.receive_headers()
    events = response.receive_message(message.SerializeToString())
    assert [type(event) for event in events] == [ErrorEvent]
    assert isinstance(response.error, UpstreamStatusError)
    assert (response.error.code, response.error.http_status) == (Code.RESOURCE_EXHAUSTED, 429)


@pytest.mark.parametrize("stream", [True, False])
def test_a_passed_through_body_tells_its_usage(stream):
    observer = Observer("sglang.runtime")
    way = observer.adapter.passthrough
    path = way.paths["chat"]
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "stream": stream, "max_tokens": 7, "unknown": 1}
    call = observer.request_message(path, [], way.encode_request(json.dumps(body).encode(), {"traceparent": "00-a"}).SerializeToString())
    assert (call.inference.stream, call.inference.sampling.max_tokens) == (stream, 7)
    assert call.inference.trace_headers == {"traceparent": "00-a"}
    usage = {"prompt_tokens": 9, "completion_tokens": 4, "total_tokens": 13, "prompt_tokens_details": {"cached_tokens": 2}}
    if stream:
        chunks = [
            {"choices": [{"index": 0, "delta": {"content": "a"}, "finish_reason": None}]},
            {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]},
            {"choices": [], "usage": usage},
        ]
        events = [*(BodyEvent(data=json.dumps(chunk).encode()) for chunk in chunks), BodyEvent(data=b"", is_last=True)]
    else:
        whole = {"choices": [{"index": 0, "message": {"content": "a"}, "finish_reason": "stop"}], "usage": usage}
        events = [BodyEvent(data=json.dumps(whole).encode(), http_status=200, is_last=True)]
    response = call.response()
    response.receive_headers()
    for event in events:
        response.receive_data(encode_frame(way.encode_response(event, path).SerializeToString()))
    response.receive_trailers(OK)
    assert response.error is None
    assert response.usage.prompt_tokens == 9
    assert (response.usage.completion_tokens, response.usage.cached_tokens) == (4, 2)
    assert response.finish_reasons == {0: "stop"}


def test_a_message_over_the_limit_is_not_read():
    observer = Observer("vllm.engine", limits=Limits(max_message_bytes=200))
    call = observer.request_message(
        observer.adapter.generate_path, [], observer.adapter.encode_request(InferenceRequest(request_id="r")).SerializeToString()
    )
    response = call.response()
    response.receive_headers()
    entry = TokenLogprob(token_id=5, logprob=-1.0)
    response.receive_message(observer.adapter.encode_response(TokensEvent(token_ids=[5] * 300, logprobs=(entry,))).SerializeToString())
    assert response.error is not None
    assert response.error.http_status == 502
