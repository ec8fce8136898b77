"""`conformance`: green for an EPP that keeps the rules, and red for one that breaks any single one of them."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable
from typing import Any
from unittest import mock

import grpc
import pytest

from conformance_epp import HEALTH, KEY, POOL, Abort, GoodEpp, Silent, Stream, body, header, immediate, serving
from gaie_codec import BodyChunk, MalformedRequestError, ResponseHead, Transcoder, UsageError, adapters, snapshots
from gaie_codec.adapters import DIALECTS
from gaie_codec.cli import main
from gaie_codec.conformance import RULES, Line, RuleOutcome, StreamEnd, StreamStart, Transcript, check, decode_transcript, encode_line
from gaie_codec.conformance.addresses import normal, split
from gaie_codec.conformance.answers import answer
from gaie_codec.conformance.driver import Options, drive
from gaie_codec.conformance.exchange import Exchange
from gaie_codec.conformance.transcript import brief
from gaie_codec.ext_proc.messages import ProcessingRequest, ProcessingResponse
from gaie_codec.tokenizer_sources import load_tokenizer

UNSEEN = {"G3", "G12", "G20"}
FORCED = {"P9", "P10"}
Doctor = Callable[[Stream, Any, list[Any]], list[Any]]


def driven(epp: GoodEpp, **options: Any) -> Transcript:
    """What is said between the checker and an EPP that runs in this process."""

    async def main() -> Transcript:
        async with serving(epp) as address:
            given = {"ext_proc": address, "endpoints": POOL, "timeout_s": 0.25} | options
            return await drive(Options(**given))

    return asyncio.run(main())


def failed(transcript: Transcript, pool: Iterable[str] = POOL) -> dict[str, RuleOutcome]:
    return {outcome.id: outcome for outcome in check(transcript, pool=pool) if outcome.outcome == "fail"}


def skipped(transcript: Transcript, pool: Iterable[str] = POOL) -> set[str]:
    return {outcome.id for outcome in check(transcript, pool=pool) if outcome.outcome == "skipped"}


@pytest.fixture(scope="module")
def good() -> Transcript:
    return driven(GoodEpp(), timeout_s=10.0)


def test_an_epp_that_keeps_all_rules_is_all_green(good):
    assert not failed(good)
    assert skipped(good) == UNSEEN | FORCED


def test_without_a_named_pool_only_what_needs_it_is_skipped():
    transcript = driven(GoodEpp(pool=POOL[:1]), endpoints=(), timeout_s=10.0)
    assert not failed(transcript, ())
    assert skipped(transcript, ()) == UNSEEN | FORCED | {"P8", "G16"}


def test_the_table_has_every_rule_once():
    expected = [*(f"P{n}" for n in range(1, 15)), *(f"E{n}" for n in range(1, 6)), *(f"G{n}" for n in range(1, 21))]
    assert [rule.id for rule in RULES] == expected
    assert {rule.id for rule in RULES if rule.judge is None} == UNSEEN
    assert all(rule.title and rule.source and rule.unseen for rule in RULES)


# How each rule is broken: a hook on what is sent, or another kind of stream, or arguments of the EPP; and options of the checker.


def on(kind: str, change: Callable[[Stream, Any, list[Any]], list[Any] | None]) -> Doctor:
    """Doctors the answers to one kind of message."""

    def doctor(stream: Stream, message: Any, answers: list[Any]) -> list[Any]:
        if message.WhichOneof("request") != kind:
            return answers
        changed = change(stream, getattr(message, kind), answers)
        return answers if changed is None else changed

    return doctor


def every(kind: str, change: Callable[[Any], Any]) -> Doctor:
    """Doctors each answer of one kind."""

    def doctor(stream: Stream, message: Any, answers: list[Any]) -> list[Any]:
        for sent in answers:
            if sent.WhichOneof("response") == kind:
                change(getattr(sent, kind) if kind != "request_headers" else sent)
        return answers

    return doctor


def picking(value: str, metadata: str | None = None) -> Doctor:
    def change(sent: Any) -> None:
        sent.request_headers.response.header_mutation.set_headers[0].header.raw_value = value.encode()
        sent.dynamic_metadata["envoy.lb"][KEY] = metadata or value

    return every("request_headers", change)


def setting(name: str, value: str = "x", action: int = 2) -> Doctor:
    return every(
        "request_headers", lambda sent: sent.request_headers.response.header_mutation.set_headers.add(**header(name, value, action))
    )


def echoing(name: str) -> Doctor:
    def change(stream: Stream, part: Any, answers: list[Any]) -> None:
        for given in part.headers.headers:
            if given.key == name:
                answers[0].response_headers.response.header_mutation.set_headers.add(**header(name, "chunked"))

    return on("response_headers", change)


def aborting(code: grpc.StatusCode, when: Callable[[Stream, Any], object]) -> Doctor:
    def doctor(stream: Stream, message: Any, answers: list[Any]) -> list[Any]:
        if when(stream, message):
            raise Abort(code)
        return answers

    return doctor


def silent(when: Callable[[Stream, Any], object]) -> Doctor:
    def doctor(stream: Stream, message: Any, answers: list[Any]) -> list[Any]:
        if when(stream, message):
            raise Silent
        return answers

    return doctor


def refusing(status: int, reason: str = "") -> Doctor:
    """Refuses all, instead of going on."""

    def doctor(stream: Stream, message: Any, answers: list[Any]) -> list[Any]:
        if not answers:
            return []
        refusal = immediate(status)
        if reason:
            refusal.immediate_response.headers.set_headers.add(**header("x-llm-d-request-dropped-reason", reason))
        return [refusal]

    return doctor


def drops_metadata(sent: Any) -> None:
    sent.ClearField("dynamic_metadata")


def drops_header(sent: Any) -> None:
    sent.request_headers.ClearField("response")


def drops_both(sent: Any) -> None:
    drops_metadata(sent)
    drops_header(sent)


def unstreamed(part: Any) -> None:
    data = part.response.body_mutation.streamed_response.body
    part.response.body_mutation.body = data


def emptied(part: Any) -> None:
    part.response.ClearField("body_mutation")


def held_back(stream: Stream, message: Any, answers: list[Any]) -> list[Any]:
    kept = stream.__dict__.setdefault("kept", [])
    if message.WhichOneof("request") == "response_body" and not message.response_body.end_of_stream:
        kept += answers
        return []
    if message.WhichOneof("request") in ("response_body", "response_trailers"):
        answers = [*kept, *answers]
    return answers


def torn(stream: Stream, part: Any, answers: list[Any]) -> list[Any] | None:
    return [*answers[:1], *answers[-1:]] if len(answers) > 2 else None


def eager_end(stream: Stream, part: Any, answers: list[Any]) -> None:
    for sent in answers:
        sent.response_body.response.body_mutation.streamed_response.end_of_stream = True


def no_end(part: Any) -> None:
    part.response.body_mutation.streamed_response.end_of_stream = False


def after_refusal(stream: Stream, message: Any, answers: list[Any]) -> list[Any]:
    if answers and answers[0].WhichOneof("response") == "immediate_response":
        return [*answers, body("request", b"", end=True)]
    return answers


def answers_end_twice(stream: Stream, part: Any, answers: list[Any]) -> list[Any]:
    return answers or ([body("request", b"", end=True)] if part.end_of_stream else [])


def overriding_mode(sent: Any) -> None:
    sent.mode_override.response_body_mode = 4


def hides_failure(stream: Stream, part: Any, answers: list[Any]) -> None:
    answers[0].response_headers.response.header_mutation.set_headers.add(**header(":status", "200"))


def loses_odd_cuts(stream: Stream, part: Any, answers: list[Any]) -> list[Any]:
    return answers if part.body.startswith(b"data:") or part.end_of_stream else [body("response", b"", end=False)]


def loses_answer_to_get(stream: Stream, part: Any, answers: list[Any]) -> list[Any] | None:
    return [body("response", b"", end=part.end_of_stream)] if stream.headers[":method"] == "GET" else None


def trailers_first(stream: Stream, part: Any, answers: list[Any]) -> list[Any]:
    return answers[::-1]


def twice(stream: Stream, part: Any, answers: list[Any]) -> list[Any]:
    return answers * 2


def without_te(sent: Any) -> None:
    sent.request_headers.response.header_mutation.remove_headers.append("te")


def empty_refused_with(status: int) -> Doctor:
    def doctor(stream: Stream, message: Any, answers: list[Any]) -> list[Any]:
        for sent in answers:
            if sent.WhichOneof("response") == "immediate_response":
                sent.immediate_response.status.code = status
        return answers

    return doctor


def unavailable(stream: Stream, message: Any, answers: list[Any]) -> list[Any]:
    if answers and answers[0].WhichOneof("response") == "immediate_response":
        raise Abort(grpc.StatusCode.UNAVAILABLE)
    return answers


class PicksFirst(Stream):
    def eligible(self) -> list[str]:
        return list(self.epp.pool) if super().eligible() else []


class IgnoresSubset(Stream):
    def eligible(self) -> list[str]:
        return list(self.epp.pool)


class RefusesSubset(Stream):
    def eligible(self) -> list[str]:
        return [] if self.subset is not None else super().eligible()


class MatchesAddress(Stream):
    def eligible(self) -> list[str]:
        if self.subset is None or isinstance(self.subset, str):
            return super().eligible()
        hosts = {endpoint.rpartition(":")[0] for endpoint in self.subset}
        return [endpoint for endpoint in self.epp.pool if endpoint.rpartition(":")[0] in hosts]


class CutsIpv6(Stream):
    def eligible(self) -> list[str]:
        found = super().eligible()
        return found if self.subset is None else [endpoint for endpoint in found if not endpoint.startswith("[")]


class TakesTextForUnset(Stream):
    def eligible(self) -> list[str]:
        if isinstance(self.subset, str):
            self.subset = None
        return super().eligible()


class SharesSubset(Stream):
    shared: Any = None

    def receive(self, message: Any) -> list[Any]:
        hint = message.metadata_context.filter_metadata
        if message.HasField("request_headers"):
            SharesSubset.shared = hint["envoy.lb.subset_hint"][f"{KEY}-subset"] if "envoy.lb.subset_hint" in hint else None
        message.metadata_context.Clear()
        self.subset = SharesSubset.shared
        return super().receive(message)


class LargePieces(Stream):
    def cut(self, side: str, data: bytes, *, end: bool) -> list[Any]:
        return [body(side, data, end=end)] if data or end else []


class NeverSeesTrailers(Stream):
    def on_request_trailers(self, part: Any) -> list[Any]:
        return []


class LosesTrailers(Stream):
    def on_response_trailers(self, part: Any) -> list[Any]:
        return []


def ends_early(stream: Stream, part: Any, answers: list[Any]) -> list[Any]:
    return [*answers, None]


def is_kind(kind: str) -> Callable[[Stream, Any], bool]:
    return lambda stream, message: message.WhichOneof("request") == kind


def reports_served(message: Any) -> bool:
    return message.WhichOneof("request") == "response_headers" and "envoy.lb" in message.metadata_context.filter_metadata


def reports_no_served(message: Any) -> bool:
    return message.WhichOneof("request") == "response_headers" and not message.metadata_context.filter_metadata


def is_large_repeat(stream: Stream, message: Any) -> bool:
    if message.WhichOneof("request") != "request_body" or not message.request_body.end_of_stream or len(stream.body) < 1_000_000:
        return False
    stream.large_end += 1
    return stream.large_end > 1


def is_overlong(stream: Stream, message: Any) -> bool:
    return message.WhichOneof("request") == "request_body" and message.request_body.body.startswith(b"\x00\xff\xff\xff\xff")


def has_query(stream: Stream, message: Any) -> bool:
    return "?" in stream.headers.get(":path", "")


def is_head_alone(stream: Stream, message: Any) -> bool:
    return message.WhichOneof("request") == "response_headers" and message.response_headers.end_of_stream


def is_answer_to_get(stream: Stream, message: Any) -> bool:
    return message.WhichOneof("request") == "response_headers" and stream.headers[":method"] == "GET"


def refuses_query(stream: Stream, message: Any, answers: list[Any]) -> list[Any]:
    return [immediate(404)] if answers and has_query(stream, message) else answers


BROKEN: list[tuple[str, str, dict[str, Any], dict[str, Any]]] = [
    ("P1", "no such service", {"path": "/envoy.service.ext_proc.v2.ExternalProcessor/Process"}, {}),
    ("P1", "an error ends it", {"doctor": aborting(grpc.StatusCode.INTERNAL, is_kind("request_body"))}, {}),
    ("P1", "it leaves early", {"doctor": on("response_headers", ends_early)}, {}),
    ("P1", "it hangs", {"doctor": silent(is_kind("response_body"))}, {}),
    ("P2", "a body instead of a stream", {"doctor": every("response_body", unstreamed)}, {}),
    ("P2", "the answer is held back", {"doctor": held_back}, {}),
    ("P2", "the request loses its middle", {"doctor": on("request_body", torn)}, {}),
    ("P2", "502 for a good answer", {"doctor": on("response_body", lambda *_: [immediate(502)])}, {}),
    ("P3", "no metadata", {"doctor": every("request_headers", drops_metadata)}, {}),
    ("P3", "no header", {"doctor": every("request_headers", drops_header)}, {}),
    ("P3", "all is refused", {"doctor": refusing(404)}, {}),
    ("P4", "two values", {"doctor": picking("10.0.0.1:8000", "10.0.0.2:8000")}, {}),
    ("P5", "a space", {"doctor": picking("10.0.0.1:8000, 10.0.0.2:8000")}, {}),
    ("P5", "no brackets", {"doctor": picking("fd00::1:8000")}, {}),
    ("P5", "a name", {"doctor": picking("model-server:8000")}, {}),
    ("P5", "no port", {"doctor": picking("10.0.0.1:0")}, {}),
    ("P5", "nothing", {"doctor": picking("")}, {}),
    ("P6", "another of the pool", {"stream": PicksFirst}, {}),
    ("P6", "refused", {"stream": RefusesSubset}, {}),
    ("P7", "all of the pool", {"stream": IgnoresSubset}, {}),
    ("P7", "another status", {"doctor": empty_refused_with(500)}, {}),
    ("P8", "a stranger", {"doctor": picking("10.9.9.9:8000")}, {}),
    ("P9", "500", {"pool": (), "doctor": empty_refused_with(500)}, {"expects": "no-endpoint"}),
    (
        "P9",
        "500 for what has no body",
        {"pool": (), "doctor": on("request_headers", lambda *_: [immediate(500)])},
        {"expects": "no-endpoint"},
    ),
    ("P9", "500 and its own reason", {"doctor": refusing(500, "rejected-no-endpoints")}, {}),
    ("P10", "503", {"doctor": refusing(503)}, {"expects": "shed"}),
    ("P10", "503 and its own reason", {"doctor": refusing(503, "rejected-saturated")}, {}),
    ("P10", "a gRPC status", {"doctor": aborting(grpc.StatusCode.RESOURCE_EXHAUSTED, is_kind("request_body"))}, {}),
    ("P11", "no endpoint", {"doctor": every("request_headers", drops_both)}, {}),
    (
        "P11",
        "a success of its own",
        {"doctor": on("request_body", lambda stream, part, answers: [immediate(200)] if answers else None)},
        {},
    ),
    ("P12", "fails where it is reported", {"doctor": aborting(grpc.StatusCode.UNKNOWN, lambda _, message: reports_served(message))}, {}),
    ("P12", "fails where it is not", {"doctor": aborting(grpc.StatusCode.UNKNOWN, lambda _, message: reports_no_served(message))}, {}),
    ("P13", "one subset for all", {"stream": SharesSubset}, {}),
    ("P14", "not alive", {"health": {**HEALTH, "liveness": 2}.get}, {}),
    ("P14", "no readiness", {"health": {key: 1 for key in HEALTH if key != "readiness"}.get}, {}),
    ("E1", "the wrong way round", {"doctor": on("request_body", trailers_first)}, {}),
    ("E1", "headers twice", {"doctor": on("response_headers", twice)}, {}),
    ("E1", "body after its end", {"doctor": on("response_body", twice)}, {}),
    ("E1", "trailers twice", {"doctor": on("response_trailers", twice)}, {}),
    ("E1", "trailers that were not", {"doctor": on("response_headers", lambda *_: [ProcessingResponse(response_trailers={})])}, {}),
    ("E2", "an end before trailers", {"doctor": on("response_body", eager_end)}, {}),
    ("E2", "no end", {"doctor": every("request_body", no_end)}, {}),
    ("E2", "trailers without an answer", {"stream": LosesTrailers}, {}),
    ("E3", "as large as it came", {"stream": LargePieces}, {}),
    ("E4", "more after a refusal", {"doctor": after_refusal}, {}),
    ("E4", "the second end is answered", {"doctor": on("request_body", answers_end_twice)}, {}),
    ("E5", ":authority", {"doctor": setting(":authority")}, {}),
    ("E5", "x-envoy-", {"doctor": setting("x-envoy-upstream-rq-timeout-ms")}, {}),
    ("E5", "connection", {"doctor": setting("Connection", "close")}, {}),
    ("E5", "no action", {"doctor": setting("x-mine", action=0)}, {}),
    ("E5", ":status of a request", {"doctor": setting(":status", "200")}, {}),
    ("G1", "trailers are passed over", {"stream": NeverSeesTrailers}, {}),
    ("G2", "fails at the second end", {"doctor": aborting(grpc.StatusCode.INTERNAL, is_large_repeat)}, {}),
    ("G4", "mode_override", {"doctor": every("request_headers", overriding_mode)}, {}),
    ("G5", "echo", {"doctor": echoing("transfer-encoding")}, {}),
    ("G6", "200 for a failure", {"doctor": on("response_headers", hides_failure)}, {}),
    ("G7", "hangs", {"doctor": silent(is_head_alone)}, {}),
    ("G8", "whole events only", {"doctor": on("response_body", loses_odd_cuts)}, {}),
    ("G9", "not found", {"doctor": refuses_query}, {}),
    ("G9", "fails", {"doctor": aborting(grpc.StatusCode.UNKNOWN, has_query)}, {}),
    ("G10", "panics", {"doctor": aborting(grpc.StatusCode.UNAVAILABLE, is_overlong)}, {}),
    ("G11", "echo", {"doctor": echoing("trailer")}, {}),
    ("G13", "an empty answer", {"doctor": every("request_body", emptied)}, {}),
    ("G13", "a gRPC status", {"doctor": unavailable}, {}),
    ("G14", "no te", {"doctor": every("request_headers", without_te)}, {}),
    ("G14", "a GET", {"doctor": setting(":method", "GET")}, {}),
    ("G15", "any port", {"stream": MatchesAddress}, {}),
    ("G16", "cut at the last colon", {"stream": CutsIpv6}, {}),
    ("G17", "as if unset", {"stream": TakesTextForUnset}, {}),
    ("G18", "the answer is lost", {"doctor": on("response_body", loses_answer_to_get)}, {}),
    ("G18", "hangs", {"doctor": silent(is_answer_to_get)}, {}),
    ("G19", "serving", {"health": lambda service: 1}, {}),
]


@pytest.mark.parametrize(("rule", "how", "epp", "options"), BROKEN, ids=[f"{rule}-{how}" for rule, how, *_ in BROKEN])
def test_a_doctored_epp_is_red(rule, how, epp, options):
    outcome = failed(driven(GoodEpp(**epp), **options)).get(rule)
    assert outcome is not None
    fault = outcome.faults[0]
    assert fault.reason == outcome.reason
    if rule not in ("P14", "G19"):
        assert fault.stream
        if "gRPC status" not in how and "no such service" not in how:
            assert fault.number > 0
            assert json.loads(fault.message)


def test_an_epp_that_says_nothing_passes_nothing_but_health():
    transcript = driven(GoodEpp(silent(lambda *_: True)), timeout_s=0.1)
    outcomes = check(transcript, pool=POOL)
    assert {outcome.id for outcome in outcomes if outcome.outcome == "pass"} == {"P14", "G19"}
    assert {"P1", "P3", "P11"} <= {outcome.id for outcome in outcomes if outcome.outcome == "fail"}
    assert sum(line.end is not None for line in transcript) == 5


def test_where_the_service_is_missing_nothing_is_played():
    transcript = driven(GoodEpp(path="/another/Path"))
    assert [line.stream for line in transcript if line.health is None] == ["nothing at all"]
    assert "UNIMPLEMENTED" in failed(transcript)["P1"].reason


def test_every_rule_that_can_be_judged_is_broken_once():
    assert {rule for rule, *_ in BROKEN} == {rule.id for rule in RULES if rule.judge is not None}


# Transcripts.


def lines(transcript: Transcript) -> list[bytes]:
    return [encode_line(line) for line in transcript]


def test_a_recording_is_judged_as_the_run_was(good):
    assert check(decode_transcript(lines(good)), pool=POOL) == check(good, pool=POOL)


def test_a_recording_of_a_bad_run_names_the_same_messages():
    transcript = driven(GoodEpp(setting(":authority")))
    assert check(decode_transcript(lines(transcript)), pool=POOL) == check(transcript, pool=POOL)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b"{", "truncated"),
        (b"[]", "object"),
        (b"\xff", "transcript line 2"),
        (b'{"stream": "a"}', "is none"),
        (b'{"stream": "a", "from": "epp", "message": {}, "end": {"by": "epp"}}', "message and end"),
        (b'{"from": "epp", "message": {}}', "no stream is named"),
        (b'{"stream": "a", "health": {"service": "liveness", "status": "SERVING"}}', "belong to no stream"),
        (b'{"stream": "a", "message": {}}', "from whom"),
        (b'{"stream": "a", "from": "client", "message": {}}', "client"),
        (b'{"stream": "a", "from": "epp", "message": {"requestBody": {"response": 1}}}', "transcript line 2"),
        (b'{"stream": "a", "start": {"expects": "everything"}}', "everything"),
        (b'{"stream": "a", "says": 1}', "says"),
        (b"[" * 100_000, "transcript line 2"),
    ],
)
def test_a_line_that_cannot_be_read_is_named(line, says):
    with pytest.raises(MalformedRequestError, match="transcript line 2") as caught:
        decode_transcript([b"\n", line])
    assert says in str(caught.value)


def test_envoys_own_json_is_read():
    said = {"futureField": 1, "immediateResponse": {"status": {"code": "ServiceUnavailable"}}}
    (line,) = decode_transcript([json.dumps({"stream": "a", "from": "epp", "message": said}).encode()])
    assert line.message.immediate_response.status.code == 503


def test_what_is_shown_has_header_values_but_no_bodies_and_no_credentials():
    message = ProcessingRequest(
        request_headers={"headers": {"headers": [{"key": "Authorization", "value": "Bearer abc"}, {"key": ":path", "raw_value": b"/v1"}]}}
    )
    assert brief(message) == '{"request_headers":{"headers":{"Authorization":"<10 characters>",":path":"/v1"}}}'
    assert brief(body("request", b"secret", end=True)) == (
        '{"request_body":{"response":{"body_mutation":{"streamed_response":{"body":"<6 bytes>","end_of_stream":true}}}}}'
    )


def recorded(*messages: tuple[str, dict[str, Any]], end: StreamEnd | None = None, start: StreamStart | None = None) -> Transcript:
    classes = {"envoy": ProcessingRequest, "epp": ProcessingResponse}
    said = [Line(stream="s", sender=sender, message=classes[sender](**fields)) for sender, fields in messages]  # type: ignore[arg-type]
    told = [Line(stream="s", start=start)] if start is not None else []
    return (*told, *said, *([Line(stream="s", end=end)] if end is not None else []))


HEAD = ("envoy", {"request_headers": {"headers": {"headers": [{"key": ":path", "value": "/v1/chat/completions"}]}}})
END = ("envoy", {"request_body": {"body": b"{}", "end_of_stream": True}})
PICKED = ("epp", {"request_headers": {"response": {"header_mutation": {"set_headers": [header(KEY, POOL[0])]}}}})


def test_a_data_plane_that_reports_another_endpoint_is_told_so():
    response = ProcessingRequest(response_headers={})
    response.metadata_context.filter_metadata["envoy.lb"].update({f"{KEY}-served": "10.9.9.9:1"})
    transcript = (*recorded(HEAD, END, PICKED), Line(stream="s", sender="envoy", message=response))
    assert "10.9.9.9:1" in failed(transcript)["P12"].reason


def test_a_client_that_goes_away_is_not_the_epps_fault():
    transcript = recorded(HEAD, END, end=StreamEnd(by="envoy", status="CANCELLED"))
    assert not failed(transcript)


def test_real_traffic_may_be_refused_for_reasons_of_its_own():
    transcript = recorded(HEAD, END, ("epp", {"immediate_response": {"status": {"code": 400}}}), end=StreamEnd(by="epp"))
    assert not failed(transcript)
    assert "P3" in skipped(transcript)


def test_rules_of_full_duplex_are_not_for_buffered_bodies():
    head = ("envoy", {**HEAD[1], "protocol_config": {"request_body_mode": 2, "response_body_mode": 2}})
    answered = ("epp", {"request_body": {"response": {}}})
    transcript = recorded(head, END, PICKED, answered, end=StreamEnd(by="envoy", status="CANCELLED"))
    assert {"P2", "E2", "G13"} & set(failed(transcript)) == set()
    assert "G13" in failed(recorded(HEAD, END, PICKED, answered, end=StreamEnd(by="envoy", status="CANCELLED")))


def test_an_empty_transcript_says_nothing():
    assert {outcome.outcome for outcome in check(())} == {"skipped"}


def test_a_pool_of_something_else_is_refused_by_name():
    with pytest.raises(UsageError, match="endpoint model-server:80"):
        check((), pool=["model-server:80"])


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("10.0.0.1:80", ("10.0.0.1", 80)),
        ("[FD00:0::1]:65535", ("fd00::1", 65535)),
        ("fd00::1:80", None),
        ("[10.0.0.1]:80", None),
        ("10.0.0.1", None),
        ("10.0.0.1:65536", None),
        ("10.0.0.256:80", None),
        (" 10.0.0.1:80", None),
        ("", None),
    ],
)
def test_endpoints_are_ip_and_port(text, parts):
    assert split(text) == parts


def test_two_ways_to_write_an_endpoint_are_one():
    assert normal("[FD00:0::1]:80") == normal(" [fd00::1]:80") == "[fd00::1]:80"
    assert normal(" what: ever ") == "what: ever"


# What is answered to an EPP that transcodes.

CHAT = {"model": "m", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 16}


def transcoded(dialect: str, kind: str, **fields: Any) -> tuple[int, bytes, Any]:
    """The status and body that a client gets of an answer of that kind, by our own transcoder in the place of an EPP."""
    transcoder = Transcoder(dialect, tokenizer=load_tokenizer("builtin"))
    call = transcoder.request("POST", "/v1/chat/completions", {}, json.dumps(CHAT | fields).encode(), request_id="r")
    sets = [header(":path", call.path), header("content-type", "application/grpc")]
    transcript = recorded(
        HEAD,
        END,
        ("epp", {"request_headers": {"response": {"header_mutation": {"set_headers": sets}}}}),
        ("epp", {"request_body": {"response": {"body_mutation": {"streamed_response": {"body": call.frame, "end_of_stream": True}}}}}),
    )
    exchange = Exchange("s", list(enumerate(transcript)))
    reply = answer(kind, exchange, adapters.get(snapshots.load("vllm.engine")))  # type: ignore[arg-type]
    response = call.response(created=1)
    outputs = list(response.receive_headers(reply.headers))
    for piece in reply.body:
        outputs += response.receive_data(piece)
    outputs += response.receive_trailers(reply.trailers) if reply.trailers is not None else response.receive_eof()
    head = next(out for out in outputs if isinstance(out, ResponseHead))
    return head.status, b"".join(out.data for out in outputs if isinstance(out, BodyChunk)), response.error


@pytest.mark.parametrize("dialect", DIALECTS)
def test_the_answer_is_in_the_dialect_that_the_epp_speaks(dialect):
    status, text, error = transcoded(dialect, "unary")
    assert (status, error) == (200, None)
    assert json.loads(text)["choices"][0]["finish_reason"] == "stop"
    for kind in ("stream", "odd_cuts"):
        status, text, error = transcoded(dialect, kind, stream=True, stream_options={"include_usage": True})
        assert (status, error) == (200, None)
        assert b'"usage":{' in text
        assert text.endswith(b"data: [DONE]\n\n")
    assert transcoded(dialect, "head_alone")[0] == 503
    assert transcoded(dialect, "local_reply")[0] >= 500
    assert len(transcoded(dialect, "large")[1]) > 62_000
    assert transcoded(dialect, "cut_short")[0] >= 500


# The driver, and the command.


def cli_run(*args: str) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["gaie-codec", "conformance", *args]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as ended,
    ):
        main()
    return int(ended.value.code or 0), out.getvalue(), err.getvalue()


class Running:
    """An EPP that runs in a thread of its own, as the command has a loop of its own."""

    def __init__(self, epp: GoodEpp, tls: tuple[bytes, bytes] | None = None) -> None:
        self._epp = epp
        self._tls = tls

    def __enter__(self) -> str:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self._context = serving(self._epp, tls=self._tls)
        return asyncio.run_coroutine_threadsafe(self._context.__aenter__(), self._loop).result(10)

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._context.__aexit__(None, None, None), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()


POOL_ARGS = [word for endpoint in POOL for word in ("--endpoint", endpoint)]


def test_the_command_is_green_records_and_reads_its_recording(tmp_path):
    file = tmp_path / "recording.jsonl"
    with Running(GoodEpp()) as address:
        code, out, _ = cli_run("--ext-proc", address, *POOL_ARGS, "--record", str(file), "--header", "x-one: 1", "--model", "m1")
    assert code == 0
    assert "P3   pass     endpoint in header and in dynamic metadata" in out
    assert "0 failed" in out.splitlines()[-1]
    again, replayed, _ = cli_run("--transcript", str(file), *POOL_ARGS)
    assert again == 0
    assert replayed.splitlines()[:-1] == out.splitlines()[:-1]
    first = json.loads(file.read_text().splitlines()[1])
    assert {"key": "x-one", "rawValue": "MQ=="} in first["message"]["requestHeaders"]["headers"]["headers"]


def test_the_command_shows_the_message_that_broke_a_rule():
    with Running(GoodEpp(setting("x-envoy-mine"))) as address:
        code, out, _ = cli_run("--ext-proc", address)
        json_code, report, _ = cli_run("--ext-proc", address, "--format", "json")
    assert code == json_code == 1
    lines = out.splitlines()
    at = next(number for number, line in enumerate(lines) if line.startswith("E5   fail"))
    assert lines[at + 2].strip() == "sets x-envoy-mine, which is Envoy's own"
    assert "stream 'chat', message 4 from epp: {" in lines[at + 3]
    (rule,) = [rule for rule in json.loads(report)["rules"] if rule["id"] == "E5"]
    assert rule["outcome"] == "fail"
    assert rule["faults"][0]["stream"] == "chat"


def test_an_empty_and_a_saturated_pool_are_tried_on_demand():
    with Running(GoodEpp(pool=())) as address:
        code, out, _ = cli_run("--ext-proc", address, "--expect-no-endpoint")
    assert code == 0
    assert "P9   pass" in out
    with Running(GoodEpp(refusing(429))) as address:
        code, out, _ = cli_run("--ext-proc", address, "--expect-shed")
    assert code == 0
    assert "P10  pass" in out
    with Running(GoodEpp()) as address:
        for option, rule in (("--expect-no-endpoint", "P9"), ("--expect-shed", "P10")):
            code, out, _ = cli_run("--ext-proc", address, option)
            assert code == 1
            assert f"{rule:4} fail" in out


def test_health_may_be_elsewhere():
    with Running(GoodEpp(health={"liveness": 2}.get)) as wrong, Running(GoodEpp()) as address:
        assert cli_run("--ext-proc", address, *POOL_ARGS, "--health", wrong)[0] == 1


def test_an_epp_behind_tls_is_driven_whatever_its_certificate(tmp_path):
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subject = ["-subj", "/O=Inference Ext"]
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", str(key), "-out", str(certificate), *subject]
    subprocess.run(command, check=True, capture_output=True)
    with Running(GoodEpp(), tls=(key.read_bytes(), certificate.read_bytes())) as address:
        assert cli_run("--ext-proc", address, *POOL_ARGS, "--tls")[0] == 0
        code, _, err = cli_run("--ext-proc", address, "--timeout", "1")
        assert code == 2
        assert "TLS" in err
    code, _, err = cli_run("--ext-proc", address, "--tls", "--timeout", "1")
    assert code == 2
    assert len(err.splitlines()) == 1


def test_where_there_is_no_epp_the_status_is_2():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
        code, out, err = cli_run("--ext-proc", address, "--timeout", "1")
    assert (code, out) == (2, "")
    assert address in err


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ((), "--ext-proc and --transcript"),
        (("--ext-proc", "localhost"), "HOST:PORT"),
        (("--ext-proc", "localhost:99999"), "HOST:PORT"),
        (("--ext-proc", "localhost:1", "--health", "x"), "health x"),
        (("--ext-proc", "localhost:1", "--endpoint", "model:80"), "endpoint model:80"),
        (("--ext-proc", "localhost:1", "--header", "x"), "NAME:VALUE"),
        (("--ext-proc", "localhost:1", "--header", "a b:x"), "no name"),
        (("--ext-proc", "localhost:1", "--expect-shed", "--expect-no-endpoint"), "exclude"),
        (("--ext-proc", "localhost:1", "--snapshot", "none"), "snapshot"),
        (("--transcript", "/no/such/file"), "No such file"),
    ],
)
def test_wrong_arguments_are_refused_in_a_line(args, says):
    code, _, err = cli_run(*args)
    assert code == 2
    assert says in err


def test_recordings_that_say_nothing_or_nothing_readable_are_refused(tmp_path):
    file = tmp_path / "recording.jsonl"
    file.write_bytes(b"\n")
    assert cli_run("--transcript", str(file))[0] == 2
    file.write_bytes(b'{"stream": "a", "start": {}}\nnonsense\n')
    code, _, err = cli_run("--transcript", str(file))
    assert code == 2
    assert "transcript line 2" in err


def test_a_pool_that_is_not_told_is_learned_from_the_first_answers():
    transcript = driven(GoodEpp(pool=POOL[1:2]), endpoints=(), timeout_s=10.0)
    assert f"subset of {POOL[1]}" in {line.stream for line in transcript}


def test_a_peer_that_speaks_something_else_is_red_and_not_a_crash():
    class Garbage(GoodEpp):
        async def process(self, requests, context):
            async for _ in requests:
                yield b"\xff\xff\xff"

    outcome = failed(driven(Garbage()))["P1"]
    assert "no ProcessingResponse" in outcome.reason


def test_what_json_has_no_word_for_is_shown_and_recorded_all_the_same():
    message = ProcessingResponse(request_headers={"response": {"header_mutation": {"set_headers": [header("x", "1", 9)]}}})
    message.dynamic_metadata.update({"score": float("nan"), "list": [float("inf"), None, {"a": 1.5}]})
    assert json.loads(brief(message))["dynamic_metadata"] == {"score": "nan", "list": ["inf", None, {"a": 1.5}]}
    assert '{"x":"1","append_action":9}' in brief(message)
    (line,) = decode_transcript([encode_line(Line(stream="s", sender="epp", message=message))])
    assert line.message.dynamic_metadata["score"] == "nan"


def test_a_subset_of_odd_values_is_judged():
    request = ProcessingRequest(**HEAD[1])
    request.metadata_context.filter_metadata["envoy.lb.subset_hint"].update({f"{KEY}-subset": [1.5, None, {}]})
    answered = recorded(PICKED)
    assert "P6" in failed((Line(stream="s", sender="envoy", message=request), *answered))


def streaming(*order: str) -> Transcript:
    """A paced gRPC answer to a request that was transcoded: pieces in (i) and out (o) in that order."""
    sets = [header(":path", "/a.B/C"), header("content-type", "application/grpc"), header("te", "trailers"), header(KEY, POOL[0])]
    piece = ("envoy", {"response_body": {"body": b"\x00\x00\x00\x00\x00"}})
    out = {"response": {"body_mutation": {"streamed_response": {"body": b"data: 1\n\n"}}}}
    messages = [
        HEAD,
        END,
        ("epp", {"request_headers": {"response": {"header_mutation": {"set_headers": sets}}}}),
        ("epp", {"request_body": {"response": {"body_mutation": {"streamed_response": {"body": b"{}", "end_of_stream": True}}}}}),
        ("envoy", {"response_headers": {}}),
        ("epp", {"response_headers": {}}),
        *(piece if what == "i" else ("epp", {"response_body": out}) for what in order),
    ]
    return recorded(*messages, start=StreamStart(paced=True))


def test_an_epp_that_transcodes_may_hold_a_piece_but_not_all():
    assert "P2" not in failed(streaming("i", "o", "i", "o", "i", "o"))
    assert "P2" not in failed(streaming("i", "i", "o", "i", "o"))
    assert "P2" in failed(streaming("i", "i", "i", "o"))


def test_the_body_may_come_with_the_headers_and_then_nothing_else():
    replaced = {"status": 1, "body_mutation": {"body": b"{}"}, "header_mutation": {"set_headers": [header(":method", "POST")]}}
    head = ("envoy", {"request_headers": {"end_of_stream": True}})
    whole = recorded(head, ("epp", {"request_headers": {"response": replaced}}), end=StreamEnd(by="envoy", status="DEADLINE_EXCEEDED"))
    assert "E5" not in failed(whole)
    (exchange,) = [Exchange("s", list(enumerate(whole)))]
    assert exchange.request.is_complete
    assert exchange.request.body_out == b"{}"
    more = recorded(head, END, ("epp", {"request_headers": {"response": replaced}}), ("epp", {"request_body": {}}))
    assert "CONTINUE_AND_REPLACE" in failed(more)["E1"].reason


def test_headers_of_a_connection_may_not_be_set_but_te_trailers_may():
    def of(*sets: dict[str, Any], remove: tuple[str, ...] = ()) -> set[str]:
        change = {"set_headers": list(sets), "remove_headers": list(remove)}
        return set(failed(recorded(HEAD, END, ("epp", {"request_headers": {"response": {"header_mutation": change}}})))) & {"E5"}

    assert of(header("te", "trailers"), remove=("connection", "transfer-encoding")) == set()
    assert of(header("te", "gzip")) == of(header("Keep-Alive", "1")) == of(remove=(":path",)) == of(remove=("Host",)) == {"E5"}


def test_judging_needs_no_grpc():
    code = "import sys; import gaie_codec.conformance; print(*{name.split('.')[0] for name in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"grpc", "asyncio"} & set(loaded)
