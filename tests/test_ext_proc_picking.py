"""The ext_proc processor: who is picked, what is said of it, and codecs behind another endpoint picker."""

from __future__ import annotations

import json

import pytest

from ext_proc_stream import (
    ANSWER,
    CHAT,
    EVENTS,
    GENERATE,
    GRPC,
    GRPC_HEAD,
    SERVER,
    FakeServer,
    Stream,
    body_message,
    chat,
    first,
    frames,
    gateway,
    grpc_request,
    headers_message,
)
from gaie_codec import (
    InferenceRequest,
    UsageError,
)
from gaie_codec.ext_proc.picking import NoEndpointError, RequestShedError

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
    late = Stream(behind).ask(chat()).answer([frames(EVENTS[:1])], trailers=status)
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


def test_a_server_that_goes_while_a_long_prompt_is_decoded_is_not_picked():
    servers = [FakeServer("10.0.0.1:1"), FakeServer("10.0.0.2:2")]
    stream = Stream(gateway(picker=first, servers=lambda: tuple(servers)), defers_over=1).ask(chat())
    prepared = stream.processor.prepare()
    del servers[0]
    stream.take(stream.processor.resume(prepared))
    assert stream.request.headers["x-gateway-destination-endpoint"] == "10.0.0.2:2"
    last = Stream(gateway(picker=first, servers=lambda: tuple(servers)), defers_over=1).ask(chat())
    prepared = last.processor.prepare()
    servers.clear()
    last.take(last.processor.resume(prepared))
    assert last.immediate.status.code == 503
