"""The ext_proc processor, without any server: each way a request can go, in the order that Envoy has it."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from uuid import uuid4

import pytest

from ext_proc_stream import (
    CHAT,
    GRPC,
    GRPC_HEAD,
    OK,
    SERVER,
    TOKENIZER,
    FakeServer,
    Stream,
    answer_frames,
    body_message,
    chat,
    frames,
    gateway,
    headers_message,
)
from gaie_codec import (
    Code,
    FinishEvent,
    InferenceRequest,
    Limits,
    SamplingParams,
    TokensEvent,
    Transcoder,
    Usage,
    UsageError,
    adapters,
    encode_frame,
    snapshots,
)
from gaie_codec.adapters import DIALECTS
from gaie_codec.ext_proc.gateway import Declared
from gaie_codec.ext_proc.messages import ProcessingMode, ProcessingResponse
from gaie_codec.ext_proc.picking import NoEndpointError, RequestShedError
from gaie_codec.ext_proc.processor import Processor

HI = TOKENIZER.encode("Hi there", add_special_tokens=False)
EVENTS = (
    TokensEvent(token_ids=HI[:1], prompt_tokens=10),
    TokensEvent(token_ids=HI[1:], prompt_tokens=10),
    FinishEvent(token_ids=HI[1:], finish_reason="stop", prompt_tokens=10),
)
ANSWER = frames(EVENTS)
GENERATE = "/vllm.grpc.engine.VllmEngine/Generate"
BUFFERED = ProcessingMode.BUFFERED


def grpc_request(dialect: str = "vllm.engine", **fields: object) -> tuple[str, bytes]:
    adapter = adapters.get(snapshots.load(dialect))
    request = InferenceRequest(request_id="c1", prompt_token_ids=[1, 2, 3], sampling=SamplingParams(temperature=0.5), **fields)
    return adapter.path_for(request), encode_frame(adapter.encode_request(request).SerializeToString())


# http-in-grpc-out


def test_a_request_waits_until_it_is_whole_and_becomes_one_grpc_call():
    stream = Stream()
    body = chat(stream=True)
    assert stream.ask([body[:10], body[10:], b""]).immediate is None
    assert stream.request.headers == {
        ":path": GENERATE,
        "content-type": GRPC,
        "te": "trailers",
        "grpc-accept-encoding": "identity,deflate,gzip",
        "x-gateway-destination-endpoint": "10.0.0.1:50051",
    }
    assert stream.metadata == {"envoy.lb": {"x-gateway-destination-endpoint": "10.0.0.1:50051"}}
    assert stream.request.ended
    assert stream.request.reroutes
    sent = SERVER.transcoder.adapter.request_type.FromString(stream.request.body[5:])
    assert sent.stream
    assert stream.processor.plan.inference.prompt_token_ids


def test_nothing_is_said_before_the_end_of_the_request():
    stream = Stream()
    body = chat()
    assert (
        stream.send(headers_message("request_headers", [(":method", "POST"), (":path", CHAT), ("content-type", "application/json")])) == []
    )
    assert stream.send(body_message("request_body", body)) == []
    assert [answer.WhichOneof("response") for answer in stream.send(body_message("request_body", end=True))] == [
        "request_headers",
        "request_body",
    ]


def test_a_stream_is_released_with_its_first_message_and_ends_with_the_trailers():
    stream = Stream().ask(chat(stream=True))
    assert stream.send(headers_message("response_headers", GRPC_HEAD)) == []
    first, rest = frames(EVENTS[:1]), frames(EVENTS[1:])
    assert stream.send(body_message("response_body", first[:3])) == []
    stream.send(body_message("response_body", first[3:]))
    assert stream.response.headers[":status"] == "200"
    assert stream.response.headers["content-type"].startswith("text/event-stream")
    assert b'"content":"H"' in stream.response.body
    stream.send(body_message("response_body", rest))
    stream.send(headers_message("response_trailers", [("grpc-status", "0"), ("x-other", "1")]))
    assert stream.response.body.endswith(b"data: [DONE]\n\n")
    assert not stream.response.ended
    assert stream.response.removed_trailers == {"grpc-status", "x-other"}
    assert stream.processor.is_answer_complete
    assert stream.processor.usage == Usage(prompt_tokens=10, completion_tokens=len(HI))


def test_a_unary_answer_waits_for_the_status_in_the_trailers():
    stream = Stream().ask(chat())
    stream.send(headers_message("response_headers", GRPC_HEAD))
    assert stream.send(body_message("response_body", ANSWER)) == []
    stream.send(headers_message("response_trailers", OK))
    assert stream.response.headers[":status"] == "200"
    assert stream.response.headers["content-type"] == "application/json"
    assert "content-length" not in stream.response.headers
    assert json.loads(stream.response.body)["choices"][0]["message"]["content"] == "Hi there"


@pytest.mark.parametrize("cut", [1, 2, 3, 5, 7, 11])
def test_the_cuts_of_data_planes_change_nothing(cut: int):
    whole = Stream().ask(chat(stream=True)).answer([ANSWER])
    body = chat(stream=True)
    stream = Stream().ask([body[place : place + cut] for place in range(0, len(body), cut)])
    assert stream.request.body == whole.request.body
    stream.answer([ANSWER[place : place + cut] for place in range(0, len(ANSWER), cut)])
    assert (stream.response.headers, stream.response.body) == (whole.response.headers, whole.response.body)


def test_a_late_failure_of_a_unary_answer_still_has_its_status():
    stream = Stream().ask(chat()).answer([ANSWER], trailers=[("grpc-status", "8"), ("grpc-message", "the queue is full")])
    assert stream.immediate.status.code == 429
    assert json.loads(stream.immediate.body)["error"]["message"] == "the queue is full"
    assert stream.processor.is_over
    assert stream.processor.error.code is Code.RESOURCE_EXHAUSTED


def test_a_failure_amid_a_stream_is_an_event_and_no_done():
    stream = Stream().ask(chat(stream=True)).answer([frames(EVENTS[:1])], trailers=[("grpc-status", "13")])
    assert b'"error"' in stream.response.body
    assert b"[DONE]" not in stream.response.body
    assert stream.response.trailers is not None


@pytest.mark.parametrize("stream_it", [False, True])
def test_headers_and_trailers_without_data_are_one_whole_answer(stream_it: bool):
    stream = Stream().ask(chat(stream=stream_it)).answer(trailers=[("grpc-status", "3"), ("grpc-message", "no%20such%20token")])
    assert stream.immediate.status.code == 400
    assert stream.response.headers is None
    assert json.loads(stream.immediate.body)["error"]["message"] == "no such token"


def test_an_answer_of_something_that_is_no_grpc_is_an_openai_error():
    head = [(":status", "503"), ("content-type", "text/plain"), ("content-length", "19")]
    stream = Stream().ask(chat()).answer([b"no healthy upstream"], headers=head, trailers=None)
    assert stream.immediate.status.code == 503
    assert json.loads(stream.immediate.body)["error"]["type"] == "ServiceUnavailableError"
    assert b"no healthy" not in stream.immediate.body


def test_a_body_that_ends_without_trailers_mirrors_the_end():
    stream = Stream().ask(chat(stream=True)).answer([frames(EVENTS[:1]), b""], trailers=None)
    assert b'"error"' in stream.response.body
    assert stream.response.ended


def test_a_broken_frame_amid_the_stream_ends_the_answer_and_the_rest_is_swallowed():
    stream = Stream().ask(chat(stream=True))
    stream.send(headers_message("response_headers", GRPC_HEAD))
    stream.send(body_message("response_body", frames(EVENTS[:1])))
    stream.send(body_message("response_body", b"\x07\x00\x00\x00\x00"))
    assert b'"error"' in stream.response.body
    assert stream.processor.goes_on
    assert stream.send(body_message("response_body", frames(EVENTS[1:]))) == []
    stream.send(headers_message("response_trailers", OK))
    assert stream.response.removed_trailers == {"grpc-status"}
    assert not stream.response.ended, "the trailers are the end"
    assert not stream.processor.goes_on


@pytest.mark.parametrize("stream_it", [False, True])
def test_a_stop_string_that_the_server_does_not_know_ends_the_call(stream_it: bool):
    stream = Stream(gateway(FakeServer(dialect="sglang.scheduler"))).ask(chat(stream=stream_it, stop=["there"]))
    stream.send(headers_message("response_headers", GRPC_HEAD))
    pieces = answer_frames("Hi there you", "sglang.scheduler")
    for piece in pieces[:4]:
        stream.send(body_message("response_body", piece))
    assert stream.processor.error is None
    if not stream_it:  # nothing was sent yet: the whole answer goes at once, which cancels the call
        assert stream.immediate.status.code == 200
        assert json.loads(stream.immediate.body)["choices"][0]["finish_reason"] == "stop"
        assert stream.processor.is_over
        return
    assert stream.response.body.endswith(b"data: [DONE]\n\n")
    assert stream.processor.goes_on
    path, message = stream.processor.plan.abort
    assert path == "/sglang.grpc.scheduler.SglangScheduler/Abort"
    assert b"chatcmpl-own" in message
    assert not stream.response.ended
    stream.take(stream.processor.cut())
    assert stream.response.ended
    assert stream.processor.is_over


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_dialect_is_transcoded(dialect: str):
    stream = Stream(gateway(FakeServer(dialect=dialect, passthrough=False))).ask(chat())
    stream.answer(answer_frames("Hi there", dialect))
    assert json.loads(stream.response.body)["choices"][0]["message"]["content"] == "Hi there"


def test_credentials_control_and_client_grpc_headers_do_not_reach_the_model_server():
    given = [
        ("authorization", "Bearer s"),
        ("cookie", "a=b"),
        ("grpc-timeout", "1S"),
        ("grpc-encoding", "gzip"),
        ("x-gateway-inference-objective", "fast"),
        ("x-llm-d-inference-fairness-id", "t"),
        ("x-llm-d-of-tomorrow", "t"),
        ("accept-encoding", "gzip"),
        ("content-length", "12"),
        ("transfer-encoding", "chunked"),
        ("x-mine", "1"),
        ("x-forwarded-for", "1.2.3.4"),
        ("x-request-id", "r1"),
        ("traceparent", "00-1-2-01"),
        ("x-kept", "1"),
    ]
    stream = Stream(gateway(SERVER, forwarded=frozenset(("x-kept",)))).ask(chat(), headers=given)
    kept = {"x-forwarded-for", "x-request-id", "traceparent", "x-kept"}
    assert stream.request.removed | set(stream.request.headers) >= {name for name, _ in given} - kept
    assert not stream.request.removed & (kept | {":method", ":path"})
    assert stream.request.headers["traceparent"] == "00-1-2-01"


def test_the_deadline_goes_to_the_model_server():
    assert Stream(gateway(SERVER, timeout_s=1.5)).ask(chat()).request.headers["grpc-timeout"] == "1500m"
    assert Stream(gateway(SERVER, timeout_s=1e9)).ask(chat()).request.headers["grpc-timeout"] == "99999999m"


def test_a_wrong_request_is_answered_at_once_and_nothing_is_sent():
    stream = Stream().ask(chat(temperature=9), headers=[("x-request-id", "r1")])
    assert stream.immediate.status.code == 400
    assert json.loads(stream.immediate.body)["error"]["param"] == "temperature"
    headers = {option.header.key: option.header.raw_value for option in stream.immediate.headers.set_headers}
    assert headers["content-type"] == b"application/json"
    assert headers["x-request-id"] == b"r1"
    assert stream.request.headers is None
    assert stream.processor.is_over
    assert stream.send(body_message("request_body", end=True)) == []


def test_dropped_fields_are_named_in_the_answer():
    server = FakeServer(unsupported="drop")
    stream = Stream(gateway(server)).ask(chat(no_such_field=1)).answer([ANSWER])
    assert stream.response.headers["x-gaie-codec-dropped"] == "no_such_field"


def test_a_body_that_is_too_long_is_refused_before_it_is_whole():
    stream = Stream(gateway(SERVER, limits=Limits(max_request_bytes=10)))
    stream.ask([b"x" * 8, b"x" * 8, b""])
    assert stream.immediate.status.code == 413


def test_a_request_with_several_calls_is_refused_by_name():
    stream = Stream(gateway(FakeServer(dialect="vllm.inference"))).ask(chat(n=2))
    assert stream.immediate.status.code == 400
    assert json.loads(stream.immediate.body)["error"]["param"] == "n"


def test_who_embeds_it_need_not_know_that_envoy_makes_one_call():
    server = FakeServer(dialect="vllm.inference")
    server.transcoder = Transcoder("vllm.inference", tokenizer=TOKENIZER)
    body = json.dumps({"prompt": ["a", "b"], "max_tokens": 2}).encode()
    for stream, param in (
        (Stream(gateway(server)).ask(chat(n=2)), "n"),
        (Stream(gateway(server)).ask(body, path="/v1/completions"), "prompt"),
    ):
        assert stream.immediate.status.code == 400
        assert json.loads(stream.immediate.body)["error"]["param"] == param


def test_a_long_answer_goes_in_pieces():
    ids = TOKENIZER.encode("word " * 40_000, add_special_tokens=False)
    stream = Stream().ask(chat()).answer([frames([FinishEvent(token_ids=ids)])])
    assert len(json.loads(stream.response.body)["choices"][0]["message"]["content"]) > 150_000


def test_the_rewritten_model_is_asked_for_and_the_answer_has_the_clients_name():
    stream = Stream().ask(chat(model="alias"), headers=[("x-gateway-model-name-rewrite", "m")]).answer([ANSWER])
    assert json.loads(stream.response.body)["model"] == "alias"
    stream = Stream().ask(chat(model="m"), headers=[("x-gateway-model-name-rewrite", "m"), ("x-llm-d-model-name-rewrite", "other")])
    assert stream.immediate.status.code == 404


# Decoding a long request elsewhere


def test_a_long_request_is_decoded_where_the_host_likes():
    stream = Stream(defers_over=100).ask(chat(messages=[{"role": "user", "content": "word " * 100}]))
    assert stream.processor.deferred
    assert stream.request.headers is None
    stream.take(stream.processor.resume(stream.processor.prepare()))
    assert stream.request.ended
    assert not stream.processor.deferred


def test_a_long_request_that_is_wrong_is_refused_when_it_is_resumed():
    stream = Stream(defers_over=1).ask(chat(temperature=9))
    stream.take(stream.processor.resume(stream.processor.prepare()))
    assert stream.immediate.status.code == 400


# Picking


def test_the_picker_sees_the_request_and_every_server_that_may_be_chosen():
    seen = []

    def picker(request, candidates):
        seen.append((request.prompt_token_ids, [one.address for one in candidates]))
        return candidates[1:]

    servers = (FakeServer("10.0.0.1:1"), FakeServer("10.0.0.2:2"), FakeServer("10.0.0.3:3"))
    stream = Stream(gateway(*servers, picker=picker, fallbacks=1)).ask(chat())
    assert stream.request.headers["x-gateway-destination-endpoint"] == "10.0.0.2:2,10.0.0.3:3"
    assert seen[0][0]
    assert seen[0][1] == ["10.0.0.1:1", "10.0.0.2:2", "10.0.0.3:3"]
    assert stream.processor.server is servers[1]


def test_one_endpoint_is_named_unless_more_are_wanted():
    stream = Stream(gateway(FakeServer("10.0.0.1:1"), FakeServer("10.0.0.2:2"))).ask(chat())
    assert stream.request.headers["x-gateway-destination-endpoint"] == "10.0.0.1:1"


def test_a_fallback_speaks_what_the_first_speaks():
    servers = (FakeServer("10.0.0.1:1"), FakeServer("10.0.0.2:2", "sglang.scheduler"), FakeServer("10.0.0.3:3"))
    stream = Stream(gateway(*servers, fallbacks=5)).ask(chat())
    assert stream.request.headers["x-gateway-destination-endpoint"] == "10.0.0.1:1,10.0.0.3:3"


def test_a_server_that_cannot_be_told_is_not_offered():
    servers = (FakeServer("10.0.0.1:1", "sglang.scheduler"), FakeServer("10.0.0.2:2", "vllm.engine"))
    stream = Stream(gateway(*servers)).ask(chat(seed=7))
    assert stream.request.headers["x-gateway-destination-endpoint"] == "10.0.0.2:2"


def test_nobody_ready_and_nobody_picked_are_503():
    for empty in (gateway(), gateway(SERVER, picker=lambda *_: ())):
        stream = Stream(empty).ask(chat())
        assert stream.immediate.status.code == 503
        reasons = [option.header.raw_value for option in stream.immediate.headers.set_headers if "dropped-reason" in option.header.key]
        assert reasons == [b"rejected-no-endpoints"]
        assert isinstance(stream.processor.error, NoEndpointError)


def test_a_bodyless_request_without_a_ready_server_is_503():
    assert Stream(gateway()).ask(path="/v1/models", method="GET", content_type="").immediate.status.code == 503


def test_a_picker_may_shed():
    def shed(*_):
        raise RequestShedError("come back later")

    stream = Stream(gateway(SERVER, picker=shed)).ask(chat())
    assert stream.immediate.status.code == 429
    assert json.loads(stream.immediate.body)["error"]["message"] == "come back later"


def test_the_picker_sees_what_only_the_choice_depends_on():
    seen = []

    def picker(request, candidates):
        seen.append(request)
        return candidates

    given = [("x-llm-d-inference-objective", "fast"), ("x-gateway-inference-fairness-id", "team"), ("x-session", "s1")]
    Stream(gateway(SERVER, picker=picker)).ask(chat(), headers=given)
    path, request = grpc_request()
    Stream(gateway(SERVER, picker=picker)).ask(request, path=path, content_type=GRPC)
    Stream(gateway(SERVER, picker=picker)).ask(b"", path="/grpc.health.v1.Health/Check", content_type=GRPC)
    chatted, called, checked = seen
    assert isinstance(chatted, InferenceRequest)
    assert (chatted.objective, chatted.fairness_id, chatted.headers["x-session"]) == ("fast", "team", "s1")
    assert (called.prompt_token_ids, called.objective) == ([1, 2, 3], "")
    assert (chatted.generates, called.generates, checked.generates) == (True, True, False)


def test_a_picker_that_returns_something_else_is_told_so():
    for returned, said in (((one for one in ()), "generator"), ("10.0.0.1:1", "str"), (object(), "object"), (["10.0.0.1:1"], "list")):
        with pytest.raises(UsageError, match=f"the picker returned a {said}, not a sequence of candidates"):
            Stream(gateway(SERVER, picker=lambda *_, returned=returned: returned)).ask(chat())
    assert Stream(gateway(SERVER, picker=lambda *_: None)).ask(chat()).immediate.status.code == 503


def test_a_picker_that_invents_endpoints_is_a_bug():
    def wild(_, candidates):
        return [type(candidates[0])(address="6.6.6.6:6", dialect="vllm.engine")]

    with pytest.raises(UsageError, match="picker"):
        Stream(gateway(SERVER, picker=wild)).ask(chat())


def test_a_bug_is_500_without_its_words():
    stream = Stream()
    stream.send(headers_message("request_headers", [(":method", "POST"), (":path", CHAT)]))
    stream.take(stream.processor.fail())
    assert stream.immediate.status.code == 500
    assert json.loads(stream.immediate.body)["error"]["message"] == "Internal server error"


def test_the_served_endpoint_is_read_back():
    served = {"envoy.lb": {"x-gateway-destination-endpoint-served": "10.0.0.9:1"}}
    assert Stream().ask(chat()).answer([ANSWER], metadata=served).processor.served == "10.0.0.9:1"
    assert Stream().ask(chat()).answer([ANSWER]).processor.served == ""


# Behind another endpoint picker


def test_without_a_picker_the_destination_stays_and_names_the_server():
    servers = {"10.0.0.7:1": FakeServer("10.0.0.7:1", "sglang.scheduler")}
    behind = gateway(picker=None, find=servers.get)
    given = [("x-gateway-destination-endpoint", "10.0.0.7:1,10.0.0.8:1")]
    stream = Stream(behind).ask(chat(), headers=given)
    assert "x-gateway-destination-endpoint" not in {*stream.request.headers, *stream.request.removed}
    assert stream.metadata == {}
    assert stream.request.headers[":path"].startswith("/sglang.grpc.scheduler.")
    assert Stream(behind).ask(chat(), headers=[("x-gateway-destination-endpoint", "10.9.9.9:1")]).immediate.status.code == 503
    assert Stream(behind).ask(chat(), headers=[("x-gateway-destination-endpoint", "nonsense")]).immediate.status.code == 502


@pytest.mark.parametrize("stream_it", [False, True])
@pytest.mark.parametrize("status", [(("grpc-status", "3"), ("grpc-message", "no"))])
def test_behind_another_picker_every_answer_goes_through_its_filter(stream_it: bool, status: tuple[tuple[str, str], ...]):
    behind = gateway(SERVER, picker=None)

    def said(stream: Stream) -> tuple[str, object]:
        assert stream.immediate is None, "that would pass the other filter by"
        return stream.response.headers[":status"], json.loads(stream.response.body)["error"]["message"]

    request = chat(stream=stream_it)
    trailers_only = Stream(behind).ask(request).answer(headers=(*GRPC_HEAD, *status), trailers=None)
    assert said(trailers_only) == ("400", "no")
    assert said(Stream(behind).ask(request).answer(trailers=status)) == ("400", "no")
    late = Stream(behind).ask(chat()).answer([ANSWER], trailers=status)
    assert said(late) == ("400", "no")
    assert late.response.removed_trailers == {"grpc-status", "grpc-message"}
    own = Stream(behind).ask(request).answer([b"no healthy upstream"], headers=[(":status", "503")], trailers=None)
    assert said(own)[0] == "503"
    assert own.response.ended
    broken = Stream(behind).ask(request)
    broken.send(headers_message("response_headers", GRPC_HEAD))
    broken.send(body_message("response_body", b"\x07\x00\x00\x00\x00"))
    assert said(broken)[0] == "502"
    assert broken.processor.goes_on


def test_without_a_picker_and_a_destination_all_servers_must_be_alike():
    assert Stream(gateway(SERVER, picker=None)).ask(chat()).request.headers[":path"] == GENERATE
    mixed = gateway(SERVER, FakeServer(dialect="sglang.scheduler"), picker=None)
    assert Stream(mixed).ask(chat()).immediate.status.code == 503


# grpc-in-grpc-out


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_grpc_call_of_the_servers_dialect_goes_through_untouched_and_is_understood(dialect: str):
    path, request = grpc_request(dialect, stream=True)
    stream = Stream(gateway(FakeServer(dialect=dialect))).ask([request[:4], request[4:]], path=path, content_type=GRPC)
    assert stream.request.body == request
    assert set(stream.request.headers) == {"x-gateway-destination-endpoint"}
    assert not stream.request.removed
    assert stream.processor.plan.inference.prompt_token_ids == [1, 2, 3]
    pieces = answer_frames("Hi there", dialect, prompt_tokens=3)
    answer = b"".join(pieces)
    head = (*GRPC_HEAD, ("x-initial", "1"))
    trailers = (("grpc-status", "0"), ("x-late-bin", "AA=="))
    stream.answer([answer[:9], answer[9:]], headers=head, trailers=trailers)
    assert stream.response.headers == {}
    assert stream.response.body == answer
    assert stream.response.trailers == {}
    assert not stream.response.removed | stream.response.removed_trailers
    assert stream.processor.error is None
    assert stream.processor.usage == Usage(prompt_tokens=3, completion_tokens=len(HI))
    assert stream.processor.frames_received == len(pieces)


def test_grpc_errors_have_a_grpc_status_and_plain_words():
    path, request = grpc_request()
    stream = Stream().ask(request[:-1], path=path, content_type=GRPC)
    assert stream.immediate.grpc_status.status == Code.INVALID_ARGUMENT
    assert stream.immediate.body.startswith(b"the request body")
    stream = Stream(gateway()).ask(request, path=path, content_type=GRPC)
    assert stream.immediate.grpc_status.status == Code.UNAVAILABLE


def test_a_call_that_does_not_generate_goes_through_as_it_comes():
    stream = Stream()
    path = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"
    head = [(":method", "POST"), (":path", path), ("content-type", GRPC), ("te", "trailers"), ("x-gateway-inference-objective", "o")]
    answers = stream.send(headers_message("request_headers", head))
    assert [answer.WhichOneof("response") for answer in answers] == ["request_headers"]
    assert stream.request.removed == {"x-gateway-inference-objective"}
    stream.send(headers_message("response_headers", GRPC_HEAD))
    stream.send(body_message("request_body", b"abc"))
    stream.send(body_message("response_body", b"def"))
    stream.send(body_message("request_body", b"ghi", end=True))
    stream.send(headers_message("response_trailers", OK))
    assert stream.request.body == b"abcghi"
    assert stream.request.ended
    assert stream.response.body == b"def"


@pytest.mark.parametrize("method", ["Generate", "HealthCheck", "Abort"])
def test_a_grpc_call_is_for_servers_of_its_dialect_where_there_are_such(method: str):
    servers = (FakeServer("10.0.0.1:1", "sglang.scheduler"), FakeServer("10.0.0.2:2", "vllm.engine"))
    _, request = grpc_request()
    stream = Stream(gateway(*servers)).ask(request, path=f"/vllm.grpc.engine.VllmEngine/{method}", content_type=GRPC)
    assert stream.request.headers["x-gateway-destination-endpoint"] == "10.0.0.2:2"
    assert stream.processor.mode == "grpc-in-grpc-out"


def test_how_a_call_that_is_not_read_ended_is_known():
    def ended(trailers: list[tuple[str, str]], **how: object) -> object:
        stream = Stream().ask(b"", path="/grpc.health.v1.Health/Check", content_type=GRPC)
        stream.answer(trailers=trailers, **how) if trailers else stream.answer(trailers=None, **how)
        return stream.processor.error and stream.processor.error.code

    assert ended([("grpc-status", "0")]) is None
    assert ended([("grpc-status", "12"), ("grpc-message", "no")]) is Code.UNIMPLEMENTED
    assert ended([("grpc-status", "x" * 5000)]) is Code.UNKNOWN
    assert ended([], headers=(*GRPC_HEAD, ("grpc-status", "14"))) is Code.UNAVAILABLE


def test_a_call_of_another_dialect_is_bridged():
    path, request = grpc_request("vllm.engine", stream=True)
    stream = Stream(gateway(FakeServer(dialect="sglang.scheduler"))).ask(request, path=path, content_type=GRPC)
    assert stream.processor.mode == "grpc-bridged"
    assert stream.request.headers[":path"].startswith("/sglang.grpc.scheduler.")
    stream.answer(answer_frames("Hi there", "sglang.scheduler", prompt_tokens=3))
    assert stream.response.headers["content-type"] == GRPC
    assert stream.response.trailers == {"grpc-status": "0"}
    response = SERVER.transcoder.adapter.response_type
    size = int.from_bytes(stream.response.body[1:5], "big")
    assert list(response.FromString(stream.response.body[5 : 5 + size]).chunk.token_ids) == HI[:1]
    assert stream.processor.usage == Usage(prompt_tokens=3, completion_tokens=len(HI))


def test_a_bridged_call_that_fails_has_the_servers_status():
    path, request = grpc_request("vllm.engine")
    stream = Stream(gateway(FakeServer(dialect="sglang.scheduler"))).ask(request, path=path, content_type=GRPC)
    stream.answer(trailers=[("grpc-status", "8"), ("grpc-message", "full")])
    assert stream.immediate.grpc_status.status == Code.RESOURCE_EXHAUSTED
    assert stream.immediate.body == b"full"


def test_grpc_does_not_get_to_a_server_that_speaks_http_nor_through_a_pool_without_http2():
    path, request = grpc_request()
    stream = Stream(gateway(FakeServer(dialect="http"))).ask(request, path=path, content_type=GRPC)
    assert stream.immediate.grpc_status.status == Code.UNIMPLEMENTED
    stream = Stream(gateway(SERVER, declared=lambda: Declared(False, "appProtocol is http", False))).ask(
        request, path=path, content_type=GRPC
    )
    assert stream.immediate.grpc_status.status == Code.UNAVAILABLE
    assert b"appProtocol is http" in stream.immediate.body


@pytest.mark.parametrize(
    "kind", ["application/grpc-web", "application/grpc-web-text+proto", "application/connect+proto", "application/grpc+json"]
)
def test_relatives_of_grpc_are_not_spoken(kind: str):
    stream = Stream().ask(b"x", path=GENERATE, content_type=kind)
    assert stream.immediate.status.code == 415


# Passthrough


def test_a_server_that_speaks_http_gets_the_request_as_it_is():
    body = chat(model="m", stream=True, stream_options={"include_usage": True})
    stream = Stream(gateway(FakeServer(dialect="http"))).ask(
        [body[:5], body[5:]], headers=[("authorization", "Bearer s"), ("connection", "x")]
    )
    assert stream.request.body == body
    assert stream.request.headers == {"x-gateway-destination-endpoint": "10.0.0.1:50051"}
    assert stream.request.removed == {"connection"}
    inference = stream.processor.plan.inference
    assert (inference.model, inference.stream) == ("m", True)
    assert "Hi" in inference.prompt_text


def test_a_pool_without_http2_passes_json_through_to_any_server():
    stream = Stream(gateway(SERVER, declared=lambda: Declared(False, "appProtocol is http", False))).ask(chat())
    assert stream.processor.mode == "passthrough"
    assert stream.processor.plan.reason == "appProtocol is http"
    assert stream.request.body == chat()


@pytest.mark.parametrize("cut", [1, 10, 1000])
def test_the_usage_of_an_answer_that_passes_by_is_read_however_it_is_cut(cut: int):
    events = [{"choices": [], "usage": None}, {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12}}]
    data = b"".join(b"data: " + json.dumps(event).encode() + b"\r\n\r\n" for event in events) + b"data: [DONE]\n\n"
    stream = Stream(gateway(FakeServer(dialect="http"))).ask(chat(stream=True))
    head = [(":status", "200"), ("content-type", "text/event-stream; charset=utf-8")]
    stream.answer([data[place : place + cut] for place in range(0, len(data), cut)], headers=head, trailers=None)
    assert stream.response.body == data
    assert stream.response.ended
    assert stream.processor.usage == Usage(prompt_tokens=7, completion_tokens=5)


def test_json_that_passes_by_is_counted_and_what_is_none_is_not():
    head = [(":status", "200"), ("content-type", "application/json")]
    odd = [b"{", b"[]", b"\xff", b'{"x":' + b"[" * 100_000]
    odd += [b'{"usage":{"prompt_tokens":%b}}' % count for count in (b"-1", b"9" * 400, b"1.5", b'"1"')]
    for body, tokens in ((b'{"usage": {"prompt_tokens": 3, "completion_tokens": null}}', 3), *((one, 0) for one in odd)):
        stream = Stream(gateway(FakeServer(dialect="http"))).ask(chat()).answer([body[:1], body[1:]], headers=head, trailers=None)
        assert stream.response.body == body
        assert stream.processor.usage.prompt_tokens == tokens


def test_a_request_without_a_body_is_passed_on_by_its_headers():
    stream = Stream(gateway(FakeServer(dialect="http"))).ask(path="/v1/models", method="GET", content_type="")
    assert stream.request.headers == {"x-gateway-destination-endpoint": "10.0.0.1:50051"}
    assert stream.request.body == b""


def test_json_that_nobody_could_read_is_for_the_model_server_to_judge():
    for body in (b"{not json", b'{"x":' + b"[" * 100_000):
        assert Stream(gateway(FakeServer(dialect="http"))).ask(body).request.body == body
    odd = chat(model="m", stream=True, cache_salt=None)
    inference = Stream(gateway(FakeServer(dialect="http"))).ask(odd).processor.plan.inference
    assert (inference.model, inference.stream, inference.cache_salt) == ("m", True, "")


def test_the_picker_sees_the_prompt_of_a_chat_that_is_passed_through_as_its_json():
    stream = Stream(gateway(FakeServer(dialect="sglang.runtime"))).ask(chat())
    assert stream.processor.plan.inference.prompt_text == '[{"role": "user", "content": "Hi"}]'


# Answered here


def test_the_models_are_listed_here_when_that_is_wanted():
    stream = Stream(gateway(SERVER, models=lambda: b'{"data":[]}')).ask(path="/v1/models?x=1", method="GET", content_type="")
    assert stream.immediate.status.code == 200
    assert stream.immediate.body == b'{"data":[]}'
    assert stream.processor.mode == "local"
    assert Stream().ask(path="/v1/models", method="GET", content_type="").immediate.status.code == 404


# Body modes


@pytest.mark.parametrize("mode", [ProcessingMode.NONE, ProcessingMode.STREAMED, ProcessingMode.BUFFERED_PARTIAL, ProcessingMode.GRPC, 77])
@pytest.mark.parametrize("side", [0, 1])
def test_other_body_modes_are_refused_by_name_at_the_start(mode: int, side: int):
    modes = [ProcessingMode.FULL_DUPLEX_STREAMED] * 2
    modes[side] = mode
    stream = Stream(mode=modes[0], response_mode=modes[1])
    stream.ask(chat())
    assert stream.immediate.status.code == 500
    said = json.loads(stream.immediate.body)["error"]["message"]
    assert said.startswith(("request_body_mode is ", "response_body_mode is ")[side])
    assert "FULL_DUPLEX_STREAMED" in said
    path, request = grpc_request()
    called = Stream(mode=modes[0], response_mode=modes[1]).ask(request, path=path, content_type=GRPC)
    assert called.immediate.grpc_status.status == Code.INTERNAL


def test_a_data_plane_that_does_not_tell_its_mode_has_full_duplex():
    assert Stream(mode=None).ask(chat()).request.ended


def test_buffered_bodies_are_replaced_whole():
    stream = Stream(mode=BUFFERED).ask(chat(), headers=[("content-length", "5")])
    assert stream.request.headers[":path"] == GENERATE
    assert "content-length" in stream.request.removed
    assert stream.request.body[:1] == b"\0"
    assert stream.metadata
    stream.answer([ANSWER])
    assert stream.immediate.status.code == 200
    assert json.loads(stream.immediate.body)["choices"][0]["message"]["content"] == "Hi there"


def test_a_late_status_is_told_in_buffered_mode_too():
    stream = Stream(mode=BUFFERED).ask(chat()).answer([ANSWER], trailers=[("grpc-status", "8")])
    assert stream.immediate.status.code == 429


def test_a_buffered_body_with_trailers_after_it_does_not_wait_for_them():
    stream = Stream(mode=BUFFERED)
    stream.send(headers_message("request_headers", [(":method", "POST"), (":path", CHAT), ("content-type", "application/json")]))
    stream.send(body_message("request_body", chat()))
    assert stream.request.body
    stream.send(headers_message("request_trailers", [("x", "1")]))
    assert stream.request.trailers == {}


def test_buffered_grpc_goes_through_unchanged():
    path, request = grpc_request()
    stream = Stream(mode=BUFFERED).ask(request, path=path, content_type=GRPC)
    assert not any(answer.request_body.response.HasField("body_mutation") for answer in stream.answers)
    stream.answer([ANSWER])
    assert stream.processor.usage.completion_tokens == len(HI)
    assert stream.immediate is None


# Deadlines and the unexpected


def test_a_request_that_does_not_come_is_408():
    stream = Stream()
    stream.send(headers_message("request_headers", [(":method", "POST"), (":path", CHAT)]))
    stream.take(stream.processor.too_late())
    assert stream.immediate.status.code == 408
    assert stream.processor.too_late() == ()


def test_an_answer_that_does_not_come_is_504():
    stream = Stream().ask(chat())
    stream.take(stream.processor.too_late())
    assert stream.immediate.status.code == 504


def test_an_answer_that_stops_coming_ends_with_the_error():
    stream = Stream().ask(chat(stream=True))
    stream.send(headers_message("response_headers", GRPC_HEAD))
    stream.send(body_message("response_body", frames(EVENTS[:1])))
    stream.take(stream.processor.too_late())
    assert b'"code":504' in stream.response.body
    assert stream.response.ended


def test_envoys_own_answer_before_the_request_is_whole_passes():
    stream = Stream()
    stream.send(headers_message("request_headers", [(":method", "POST"), (":path", CHAT)]))
    stream.answer([b"slow"], headers=[(":status", "408")], trailers=None)
    assert (stream.response.headers, stream.response.body, stream.response.ended) == ({}, b"slow", True)


def test_a_request_whose_answer_is_envoys_own_is_not_routed_after_all():
    stream = Stream()
    stream.send(headers_message("request_headers", [(":method", "POST"), (":path", CHAT)]))
    stream.answer([b"slow"], headers=[(":status", "408")], trailers=None)
    assert stream.send(body_message("request_body", chat(), end=True)) == []
    assert stream.processor.server is None


def test_an_answer_that_failed_at_its_headers_and_never_had_a_body_is_told_at_the_deadline():
    stream = Stream(gateway(SERVER, picker=None)).ask(chat())
    assert stream.send(headers_message("response_headers", [(":status", "503")])) == []
    stream.take(stream.processor.too_late())
    assert stream.immediate.status.code == 503


def test_a_complete_answer_counts_as_complete_before_the_model_server_has_ended():
    stream = Stream(gateway(FakeServer(dialect="sglang.scheduler"))).ask(chat(stream=True, stop=["there"]))
    stream.send(headers_message("response_headers", GRPC_HEAD))
    for piece in answer_frames("Hi there you", "sglang.scheduler")[:4]:
        stream.send(body_message("response_body", piece))
    assert stream.processor.goes_on
    assert stream.processor.is_answer_complete


def test_headers_that_come_as_text_are_read_too():
    stream = Stream()
    message = headers_message("request_headers", [])
    for name, value in ((":method", "POST"), (":path", CHAT), ("Content-Type", "application/json")):
        message.request_headers.headers.headers.add(key=name, value=value)
    stream.send(message)
    stream.send(body_message("request_body", chat(), end=True))
    assert stream.request.headers[":path"] == GENERATE


def test_a_deadline_counts_as_a_failure_in_every_mode():
    path, request = grpc_request()
    for stream, status in (
        (Stream().ask(chat()), 504),
        (Stream().ask(request, path=path, content_type=GRPC), 504),
        (Stream(gateway(FakeServer(dialect="http"))).ask(chat()), 504),
    ):
        stream.take(stream.processor.too_late())
        assert stream.processor.error.code is Code.DEADLINE_EXCEEDED
        assert stream.processor.status == stream.immediate.status.code == status
    observed = Stream().ask(request, path=path, content_type=GRPC)
    observed.send(headers_message("response_headers", GRPC_HEAD))
    observed.send(body_message("response_body", ANSWER[:5]))
    observed.take(observed.processor.too_late())
    assert observed.processor.error.code is Code.DEADLINE_EXCEEDED


def test_a_status_that_is_none_is_none():
    for status in ("9" * 5000, "2000", "\N{SUPERSCRIPT TWO}00", ""):
        stream = Stream().ask(chat()).answer([b"x"], headers=[(":status", status)], trailers=None)
        assert stream.immediate.status.code in (500, 502)


def test_a_server_that_nobody_listens_to_does_not_pick():
    stream = Stream()
    message = headers_message("request_headers", [(":method", "POST"), (":path", CHAT)])
    message.observability_mode = True
    stream.send(message)
    assert b"observability_mode" in stream.immediate.body


def test_an_empty_message_is_passed_over():
    assert Processor(gateway(SERVER), own_id="1", created=1).receive(body_message("request_body", end=True)) == ()


def test_what_a_data_plane_says_out_of_turn_is_refused_and_what_it_says_twice_passed_over():
    for early in (body_message("response_body", b"x"), headers_message("response_trailers", OK)):
        stream = Stream().ask(chat())
        stream.send(early)
        assert stream.immediate.status.code == 500
        assert b"came before response_headers" in stream.immediate.body
    stream = Stream().ask(chat(stream=True)).answer(answer_frames("Hi"))
    assert stream.send(headers_message("response_trailers", OK)) == []
    assert stream.send(headers_message("response_headers", GRPC_HEAD)) == []
    assert stream.send(headers_message("request_headers", [])) == []


def test_the_manuals_snippet_answers_a_stream():
    page = (Path(__file__).parent.parent / "docs" / "ext-proc.md").read_text()
    (snippet,) = re.findall(r"```python\n(from gaie_codec\.ext_proc import .*?)```", page, re.DOTALL)
    names = {"Transcoder": Transcoder, "Limits": Limits, "tokenizer": TOKENIZER, "uuid4": uuid4, "time": time.time}
    exec(snippet, names)
    head = headers_message("request_headers", [(":method", "POST"), (":path", CHAT), ("content-type", "application/json")])
    messages = [head, body_message("request_body", chat(max_tokens=5), end=True)]
    answers = [*map(ProcessingResponse.FromString, names["process"](message.SerializeToString() for message in messages))]
    assert [answer.WhichOneof("response") for answer in answers] == ["request_headers", "request_body"]
