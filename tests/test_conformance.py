"""`conformance`: green for an EPP that keeps the rules, and red for one that breaks any single one of them."""

from __future__ import annotations

import asyncio
import json
import ssl
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import grpc
import msgspec
import pytest
from click.testing import CliRunner
from conformance_epp import HEALTH, KEY, POOL, Abort, GoodEpp, Silent, Stream, body, header, immediate, serving

from gaie_codec import BodyChunk, CodecError, MalformedRequestError, ResponseHead, Transcoder, UsageError, adapters, snapshots
from gaie_codec.adapters import DIALECTS
from gaie_codec.cli._commands import cli
from gaie_codec.conformance import RULES, HealthAnswer, Line, RuleOutcome, StreamEnd, StreamStart, Transcript, check, decode_transcript
from gaie_codec.conformance import encode_line as encode
from gaie_codec.conformance.addresses import normal, split
from gaie_codec.conformance.answers import answer
from gaie_codec.conformance.driver import Options, run
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
        from gaie_codec.conformance.driver import drive

        async with serving(epp) as address:
            given = {"ext_proc": address, "endpoints": POOL, "timeout_s": 0.4} | options
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


def test_every_rule_that_can_be_judged_is_broken_once():
    assert {rule for rule, *_ in BROKEN} == {rule.id for rule in RULES if rule.judge is not None}
