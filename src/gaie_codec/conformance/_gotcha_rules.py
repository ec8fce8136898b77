"""G1 to G20: mistakes that EPPs, or what stands beside them, have made. Of each, what a peer of ext_proc can see."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final

from ..ext_proc.messages import ProcessingMode
from ._envoy_rules import second_end
from ._protocol_rules import UNKNOWN, UNKNOWN_STATES, outside_subset
from ._rule import Rule, each, each_in
from .addresses import split
from .exchange import Evidence, Exchange, Fault, Half
from .transcript import header_value

_LARGE_BYTES: Final = 1_000_000
_FRAME_HEADER: Final = 5  # more than 0xFFFFFFFF less this, and the length of the frame is no uint32


def _unfinished(exchange: Exchange) -> Fault | None:
    return exchange.unfinished()


def _ends_with_trailers(exchange: Exchange) -> bool:
    return exchange.request.trailers_in is not None and not exchange.request.ends_in


def _repeats_large_end(exchange: Exchange) -> bool:
    return len(exchange.request.ends_in) > 1 and len(exchange.request.body_in) >= _LARGE_BYTES and exchange.refusal is None


def _overrides_mode(exchange: Exchange) -> Fault | None:
    for entry in exchange.answers:
        if entry.message.HasField("mode_override"):
            mode = entry.message.mode_override
            if ProcessingMode.FULL_DUPLEX_STREAMED in (mode.request_body_mode, mode.response_body_mode):
                return exchange.fault("mode_override to FULL_DUPLEX_STREAMED, with which Envoy drops the first body message", entry)
    return None


def _answered_with(name: str) -> Callable[[Exchange], bool]:
    def applies(exchange: Exchange) -> bool:
        return any(name in half.headers and half.answer is not None for half in exchange.halves)

    return applies


def _never_sets(*names: str) -> Callable[[Exchange], Fault | None]:
    def check(exchange: Exchange) -> Fault | None:
        for half in exchange.halves:
            for entry, option in half.sets:
                if option.header.key.lower() in names:
                    return exchange.fault(f"sets {option.header.key} on the {half.side}", entry)
        return None

    return check


def _code(response: Half) -> int:
    status = response.headers.get(":status", "")
    return int(status) if status.isdigit() else 0


def _client_sees(exchange: Exchange) -> int:
    if exchange.immediate is not None:
        return int(exchange.immediate.part.status.code)
    status = exchange.response.changed.get(":status", "")
    return int(status) if status.isdigit() else 0


def _fails(exchange: Exchange) -> bool:
    return _code(exchange.response) >= 400


def _stays_an_error(exchange: Exchange) -> Fault | None:
    fault = exchange.unfinished()
    if fault is None and _client_sees(exchange) < 400:
        at = exchange.immediate or exchange.response.answer
        fault = exchange.fault(f"the model server failed, and the client sees :status {_client_sees(exchange)}", at)
    return fault


def _fails_in_head(exchange: Exchange) -> bool:
    return exchange.response.is_bodyless and exchange.response.headers.get("grpc-status", "0") != "0"


def _head_alone(exchange: Exchange) -> Fault | None:
    return exchange.unfinished() if exchange.is_grpc_in else _stays_an_error(exchange)


def _streams_events(exchange: Exchange) -> bool:
    response = exchange.response
    if exchange.immediate is not None or not response.is_complete or not response.bodies_in:
        return False
    if not response.changed.get("content-type", "").startswith("text/event-stream"):
        return False
    if exchange.is_grpc_out:
        return response.trailers_in is not None and _grpc_status(response) == "0"
    return b"[DONE]" in response.body_in


def _grpc_status(half: Half) -> str:
    trailers = half.trailers_in.part.trailers.headers if half.trailers_in is not None else ()
    return next((header_value(header) for header in trailers if header.key == "grpc-status"), "")


def _events_arrive(exchange: Exchange) -> Fault | None:
    response = exchange.response
    out = response.body_out
    wants_usage = b'"include_usage"' in exchange.request.body_in if exchange.is_grpc_out else b'"usage"' in response.body_in
    lost = [what for what, wanted in ((b"data: [DONE]", True), (b'"usage"', wants_usage)) if wanted and what not in out]
    if not lost:
        return None
    came = f"{len(response.body_in)} bytes came, {len(out)} went on"
    last = response.bodies_out[-1] if response.bodies_out else response.answer
    return exchange.fault(f"the event stream lost {lost[0].decode()}: {came}", last)


def _has_query(exchange: Exchange, _: Evidence) -> bool:
    return "?" in exchange.request.headers.get(":path", "")


def _query_is_no_matter(exchange: Exchange, evidence: Evidence) -> Fault | None:
    if exchange.refusal is None:
        return exchange.unfinished()
    path = exchange.request.headers[":path"].partition("?")[0]
    like = (other for other in evidence.exchanges if other.request.headers.get(":path") == path and other.subset is None)
    if exchange.start.expects == "endpoint" and any(other.picked for other in like):
        return exchange.fault(f"refused with {exchange.refusal.part.status.code}; without the query it is not", exchange.refusal)
    return None


def _overstates_frame(exchange: Exchange) -> bool:
    body = exchange.request.body_in
    return exchange.is_grpc_in and len(body) >= _FRAME_HEADER and int.from_bytes(body[1:_FRAME_HEADER]) >= 0xFFFFFFFB


def _answers_in_words(exchange: Exchange) -> Fault | None:
    if exchange.is_full_duplex:
        for half in exchange.halves:
            for entry in half.bodies_out:
                if not half.is_replaced and not entry.part.response.HasField("body_mutation"):
                    return exchange.fault("a body is answered with an empty CommonResponse: it is lost", entry)
    end = exchange.end
    if end is None or end.by != "epp" or exchange.is_complete or exchange.request.answer is not None:
        return None
    is_due = exchange.start.expects in ("503", "429") or exchange.subset_list == ()
    if end.status in ("UNAVAILABLE", "RESOURCE_EXHAUSTED") or (is_due and end.status != "OK"):
        return exchange.fault(f"refused with gRPC {end.status} ({end.details}) instead of an ImmediateResponse")
    return None


def _may_be_refused(exchange: Exchange) -> bool:
    return any(half.bodies_out for half in exchange.halves) or (exchange.end is not None and exchange.end.by == "epp")


def _calls_grpc(exchange: Exchange) -> bool:
    return exchange.request.answer is not None and exchange.is_grpc_out


def _core_takes_it(exchange: Exchange) -> Fault | None:
    changed = exchange.request.changed
    for name, wanted in (("te", "trailers"), (":method", "POST")):
        if changed.get(name) != wanted:
            return exchange.fault(f"goes on as gRPC with {name} {changed.get(name, 'missing')}, not {wanted}", exchange.request.answer)
    return None


def _shares_address(exchange: Exchange, evidence: Evidence) -> bool:
    """The subset has the address of an endpoint of the pool, with another port."""
    asked = exchange.subset_list or () if exchange.answers else ()
    hosts = {parts[0] for parts in map(split, evidence.known) if parts is not None}
    return any(endpoint not in evidence.known and (parts := split(endpoint)) is not None and parts[0] in hosts for endpoint in asked)


def _asks_for_ipv6(exchange: Exchange, evidence: Evidence) -> bool:
    return any(endpoint.startswith("[") and endpoint in evidence.known for endpoint in exchange.subset_list or ())


def _finds_ipv6(exchange: Exchange, _: Evidence) -> Fault | None:
    if exchange.refusal is not None:
        return exchange.fault(f"the subset {exchange.subset!r} names an endpoint of the pool", exchange.refusal)
    return exchange.unfinished() or outside_subset(exchange)


def _passes_answer(exchange: Exchange) -> Fault | None:
    response = exchange.response
    if (fault := exchange.unfinished()) is not None or exchange.immediate is not None:
        return fault
    if response.body_in and not response.body_out:
        return exchange.fault(f"{len(response.body_in)} bytes came in answer to a bodyless request, none go on", response.answer)
    return None


def _unknown_service(evidence: Evidence) -> Iterable[Fault] | None:
    answers = [answer for answer in evidence.health if answer.service == UNKNOWN]
    if not answers:
        return None
    return [
        Fault(reason=f"health of a service that does not exist is {answer.status}, not {' or '.join(UNKNOWN_STATES)}")
        for answer in answers
        if answer.status not in UNKNOWN_STATES
    ]


_TABLE: Final = (
    (
        "G1",
        "request trailers that end the stream",
        "llm-d server.go",
        each(_ends_with_trailers, _unfinished),
        "no request ended with trailers",
    ),
    (
        "G2",
        "a final body message that comes twice, on a body over 1 MB",
        "envoy #46237, GAIE #2988",
        each(_repeats_large_end, second_end),
        "no large body whose end came twice was accepted",
    ),
    ("G3", "two full-duplex filters in a chain", "envoy #43983, #41654", None, "not observable: needs an Envoy with two filters"),
    (
        "G4",
        "no mode_override to full duplex",
        "envoy #40340",
        each(lambda exchange: exchange.answers, _overrides_mode),
        "nothing came from the EPP",
    ),
    (
        "G5",
        "transfer-encoding is not echoed",
        "GAIE #2993",
        each(_answered_with("transfer-encoding"), _never_sets("transfer-encoding")),
        "no message had transfer-encoding",
    ),
    ("G6", "a failed answer stays one", "llm-d server.go", each(_fails, _stays_an_error), "no model server failed"),
    (
        "G7",
        "headers that end the response, with a grpc-status",
        "llm-d server.go",
        each(_fails_in_head, _head_alone),
        "no gRPC call failed so",
    ),
    ("G8", "usage and [DONE] in odd cuts", "GAIE #2026", each(_streams_events, _events_arrive), "no event stream was answered to its end"),
    ("G9", ":path with a query", "llm-d #1585", each_in(_has_query, _query_is_no_matter), "no path had a query"),
    ("G10", "a gRPC frame that says 4 GB", "llm-d #1916", each(_overstates_frame, _unfinished), "no such frame was sent"),
    (
        "G11",
        "trailer is not echoed",
        "llm-d 9fd15d22",
        each(_answered_with("trailer"), _never_sets("trailer", "trailers")),
        "no message had the header trailer",
    ),
    ("G12", "JSON is decoded once", "GAIE #2928", None, "not observable: a matter of load and time; measure it"),
    (
        "G13",
        "streamed_response and ImmediateResponse, not an empty answer and a gRPC status",
        "GAIE pkg/lwepp",
        each(_may_be_refused, _answers_in_words),
        "no body was answered, and nothing refused",
    ),
    (
        "G14",
        "te: trailers and POST towards gRPC",
        "grpc core http_server_filter",
        each(_calls_grpc, _core_takes_it),
        "no request went on as gRPC",
    ),
    (
        "G15",
        "ports count in a subset",
        "llm-d candidates.go",
        each_in(_shares_address, lambda exchange, _: outside_subset(exchange)),
        "no subset had another port of a known address",
    ),
    (
        "G16",
        "IPv6 in a subset",
        "llm-d candidates.go",
        each_in(_asks_for_ipv6, _finds_ipv6),
        "no IPv6 endpoint is known; --endpoint [IP]:PORT",
    ),
    (
        "G17",
        "a subset that is text",
        "llm-d candidates.go",
        each(lambda exchange: isinstance(exchange.subset, str) and exchange.answers, outside_subset),
        "no subset was text",
    ),
    (
        "G18",
        "the response to a request without a body",
        "llm-d server.go",
        each(lambda exchange: exchange.request.is_bodyless and exchange.response.head is not None, _passes_answer),
        "the EPP answered by itself, or no request was bodyless",
    ),
    ("G19", "health of an unknown service", "llm-d health.go", _unknown_service, "health was not asked for"),
    ("G20", "no parser error at the trailers", "llm-d server.go", None, "not observable: only a line in the EPP's log"),
)

GOTCHA_RULES: Final = tuple(
    Rule(id=id, title=title, source=source, judge=judge, unseen=unseen) for id, title, source, judge, unseen in _TABLE
)
