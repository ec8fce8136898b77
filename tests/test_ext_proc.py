"""The ext_proc processor, without any server: OpenAI's clients before servers that speak gRPC, and what holds for all streams."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from uuid import uuid4

import pytest

from ext_proc_stream import (
    ANSWER,
    BUFFERED,
    CHAT,
    EVENTS,
    GENERATE,
    GRPC,
    GRPC_HEAD,
    HI,
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
    grpc_request,
    headers_message,
)
from gaie_codec import (
    Code,
    FinishEvent,
    Limits,
    Transcoder,
    Usage,
)
from gaie_codec.adapters import DIALECTS
from gaie_codec.ext_proc.messages import ProcessingMode, ProcessingResponse
from gaie_codec.ext_proc.processor import Processor

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
    stream = Stream().ask(chat()).answer([frames(EVENTS[:1])], trailers=[("grpc-status", "8"), ("grpc-message", "the queue is full")])
    assert stream.immediate.status.code == 429
    assert json.loads(stream.immediate.body)["error"]["message"] == "the queue is full"
    assert stream.processor.is_over
    assert stream.processor.error.code is Code.RESOURCE_EXHAUSTED


@pytest.mark.parametrize("mode", [None, BUFFERED])
def test_errors_are_in_the_flavor_of_answers(mode):
    here = gateway(FakeServer(flavor="sglang"), flavor="sglang")
    of_mode = {} if mode is None else {"mode": mode}
    refused = Stream(here, **of_mode).ask(b"{")
    assert json.loads(refused.immediate.body)["object"] == "error"
    failed = Stream(here, **of_mode).ask(chat()).answer([frames(EVENTS[:1])], trailers=[("grpc-status", "8")])
    assert json.loads(failed.immediate.body)["object"] == "error"
    streamed = Stream(here, **of_mode).ask(chat(stream=True)).answer([], trailers=[("grpc-status", "8")])
    assert json.loads(streamed.immediate.body)["object"] == "error"


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
    assert json.loads(stream.immediate.body)["error"]["type"] == "Service Unavailable"
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
    stream = Stream(gateway(server)).ask(chat(no_such_field=1, use_beam_search=True, bad_words=["x"])).answer([ANSWER])
    assert stream.response.headers["x-gaie-codec-dropped"] == "bad_words, no_such_field, use_beam_search"


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
    stream = Stream(mode=BUFFERED).ask(chat()).answer([frames(EVENTS[:1])], trailers=[("grpc-status", "8")])
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
        (Stream().ask(request, path=path, content_type=GRPC), 200),  # and a grpc-status
        (Stream(gateway(FakeServer(dialect="http"))).ask(chat()), 504),
    ):
        stream.take(stream.processor.too_late())
        assert stream.processor.error.code is Code.DEADLINE_EXCEEDED
        assert stream.processor.status == status
    observed = Stream().ask(request, path=path, content_type=GRPC)
    observed.send(headers_message("response_headers", GRPC_HEAD))
    observed.send(body_message("response_body", ANSWER[:5]))
    observed.take(observed.processor.too_late())
    assert observed.processor.error.code is Code.DEADLINE_EXCEEDED


def test_the_id_at_the_model_server_is_unique_and_the_client_has_its_own():
    sent = set()
    for own_id in ("11111111aaaa", "22222222bbbb"):
        server = FakeServer(dialect="sglang.scheduler")
        stream = Stream(gateway(server), own_id=own_id).ask(chat(), headers=[("x-request-id", "mine")])
        message = server.transcoder.adapter.request_type.FromString(stream.request.body[5:])
        assert message.request_id.startswith("chatcmpl-mine-")
        assert message.request_id.encode() in stream.processor.abort[1]
        sent.add(message.request_id)
        stream.answer(answer_frames("Hi", "sglang.scheduler"))
        assert json.loads(stream.response.body)["id"] == "chatcmpl-mine"
        assert stream.response.headers["x-request-id"] == "mine"
    assert len(sent) == 2
    chosen = Stream(gateway(FakeServer(dialect="sglang.scheduler"))).ask(chat(request_id="theirs"))
    assert chosen.processor.abort is None, "who knows whose else it is"


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


def test_the_messages_are_those_of_the_proto():
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parent.parent / "tools/ext_proc.py"), "--check"], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
