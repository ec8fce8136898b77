"""P1 to P14: what the Endpoint Picker Protocol asks of an EPP (proposal 004 of the Gateway API Inference Extension)."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import Final

import msgspec

from ._rule import Rule, each, each_in
from .addresses import split
from .exchange import Evidence, Exchange, Fault, streamed
from .transcript import header_value

LIVENESS: Final = "liveness"
READINESS: Final = "readiness"
EXT_PROC: Final = "envoy.service.ext_proc.v3.ExternalProcessor"
UNKNOWN: Final = "gaie-codec.conformance.no-such-service"
"""What health checks ask for besides the three that the protocol names."""

UNKNOWN_STATES: Final = ("SERVICE_UNKNOWN", "NOT_FOUND")
"""What Check says of a name that it does not know: grpc.health.v1 has a gRPC status for it, and a ServingStatus for Watch."""

_DROPPED: Final = "x-llm-d-request-dropped-reason"
_NO_ENDPOINTS: Final = "rejected-no-endpoints"
_SHED: Final = frozenset(("rejected-saturated", "rejected-ttl-expired", "evicted", "evicted-queue-pressure", "evicted-priority"))


def _status(exchange: Exchange) -> int:
    return exchange.refusal.part.status.code if exchange.refusal is not None else 0


def _ended(exchange: Exchange, status: str) -> bool:
    return exchange.end is not None and exchange.end.by == "epp" and exchange.end.status == status


def _refuses_with(exchange: Exchange, status: int, why: str) -> Fault | None:
    """The fault of an exchange which deserved an ImmediateResponse of that status."""
    if _status(exchange) == status:
        return None
    if exchange.refusal is not None:
        return exchange.fault(f"{why}: ImmediateResponse {status} is due, not {_status(exchange)}", exchange.refusal)
    if exchange.request.answer is not None:
        return exchange.fault(f"{why}: ImmediateResponse {status} is due, but the request goes on", exchange.request.answer)
    return exchange.unfinished() or exchange.fault(f"{why}: ImmediateResponse {status} is due, nothing came")


def _is_there(exchange: Exchange) -> bool:
    return exchange.end is not None or bool(exchange.answers)


def _serves(exchange: Exchange) -> Fault | None:
    if _ended(exchange, "UNIMPLEMENTED"):
        return exchange.fault(f"no such service or method: UNIMPLEMENTED ({exchange.end.details if exchange.end else ''})")
    return exchange.unfinished() if exchange.is_plain else None


def _streams(exchange: Exchange) -> Fault | None:
    for half in exchange.halves:
        for entry in half.bodies_out:
            if not half.is_replaced and entry.part.response.body_mutation.WhichOneof("mutation") != "streamed_response":
                return exchange.fault("a body is answered without streamed_response", entry)
    return _torn(exchange) or _spoiled(exchange) or _held_back(exchange)


def _torn(exchange: Exchange) -> Fault | None:
    """A JSON request that goes on as JSON, but no longer whole."""
    request = exchange.request
    if exchange.immediate is not None or not request.is_complete or exchange.is_grpc_out or not _is_json(request.body_in):
        return None
    if _is_json(request.body_out):
        return None
    last = request.bodies_out[-1] if request.bodies_out else request.answer
    sizes = f"{len(request.body_in)} bytes came, {len(request.body_out)} go on"
    return exchange.fault(f"the request body is JSON no longer: {sizes}", last)


def _spoiled(exchange: Exchange) -> Fault | None:
    """A good answer that the EPP puts an error in the place of. In recordings that may be an eviction."""
    if exchange.immediate is None or exchange.refusal is not None or exchange.start.expects != "endpoint" or not exchange.is_plain:
        return None
    status = exchange.immediate.part.status.code
    return (
        exchange.fault(f"a good answer of the model server became an ImmediateResponse {status}", exchange.immediate)
        if status >= 400
        else None
    )


def _is_json(body: bytes) -> bool:
    try:
        msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False
    return True


def _held_back(exchange: Exchange) -> Fault | None:
    """Pieces of a paced answer that were not answered while it was still coming."""
    response = exchange.response
    pieces = [entry for entry in response.bodies_in if entry.part.body]
    if not exchange.start.paced or len(pieces) < 2 or exchange.immediate is not None:
        return None
    answers = [entry.number for entry in response.bodies_out if streamed(entry).body]
    if exchange.is_grpc_out and not exchange.is_grpc_in:
        # Text may be held for the next piece, by a detokenizer or for a stop string; all of the answer may not.
        held = pieces[:-1] if not any(number < pieces[-1].number for number in answers) else []
    else:
        held = [piece for piece, after in pairwise(pieces) if not _between(answers, piece.number, after.number)]
    if not held:
        return None
    return exchange.fault("this piece of a streaming answer was held back: no body came for it before the next piece", held[0])


def _between(numbers: Iterable[int], low: int, high: int) -> bool:
    return any(low < number < high for number in numbers)


def _picks(exchange: Exchange) -> bool:
    return exchange.said_endpoint != (None, None)


def _says_twice(exchange: Exchange) -> Fault | None:
    if exchange.request.answer is None:
        why = "the request should be given an endpoint"
        if exchange.refusal is not None:
            return exchange.fault(f"{why}, not an ImmediateResponse {_status(exchange)}", exchange.refusal)
        return exchange.unfinished() or exchange.fault(f"{why}; nothing came")
    header, metadata = exchange.said_endpoint
    missing = [where for where, value in (("in the header", header), ("in dynamic_metadata[envoy.lb]", metadata)) if value is None]
    return exchange.fault(f"no endpoint {' and none '.join(missing)}", exchange.request.answer) if missing else None


def _says_the_same(exchange: Exchange) -> Fault | None:
    header, metadata = exchange.said_endpoint
    if header == metadata:
        return None
    return exchange.fault(f"the header says {header!r}, the metadata {metadata!r}", exchange.request.answer)


def _well_formed(exchange: Exchange) -> Fault | None:
    for value in exchange.said_endpoint:
        for endpoint in (value or "").split(","):
            if value is not None and split(endpoint) is None:
                reason = f"{endpoint!r} of {value!r} is not IP:PORT (an IPv6 address in brackets, a port from 1 to 65535, no spaces)"
                return exchange.fault(reason, exchange.request.answer)
    return None


def outside_subset(exchange: Exchange) -> Fault | None:
    """The fault of an exchange whose endpoints are not all in its subset, in whatever form that was given."""
    asked = exchange.subset.split(",") if isinstance(exchange.subset, str) else exchange.subset_list or ()
    stray = [endpoint for endpoint in exchange.picked if endpoint not in {one.strip() for one in asked}]
    return exchange.fault(f"{stray[0]} is not in the subset {exchange.subset!r}", exchange.request.answer) if stray else None


def _in_subset(exchange: Exchange) -> Fault | None:
    if exchange.start.expects == "endpoint" and exchange.refusal is not None:
        return exchange.fault(f"the subset {exchange.subset!r} names an endpoint of the pool", exchange.refusal)
    return outside_subset(exchange) or exchange.unfinished()


def _none_eligible(exchange: Exchange, evidence: Evidence) -> bool:
    asked = exchange.subset_list
    if asked is None or _is_local(exchange):
        return False
    return not asked or exchange.start.expects == "503" or bool(evidence.pool and not evidence.pool & set(asked))


def _in_pool(exchange: Exchange, evidence: Evidence) -> Fault | None:
    stray = [endpoint for endpoint in exchange.picked if endpoint not in evidence.pool]
    return exchange.fault(f"{stray[0]} is not in the pool", exchange.request.answer) if stray else None


def _reason(exchange: Exchange) -> str:
    options = exchange.refusal.part.headers.set_headers if exchange.refusal is not None else ()
    return next((header_value(option.header) for option in options if option.header.key.lower() == _DROPPED), "")


def _lacks_endpoint(exchange: Exchange) -> bool:
    if exchange.subset is not None:
        return False
    return exchange.start.expects == "503" or _status(exchange) == 503 or _reason(exchange) == _NO_ENDPOINTS


def _no_endpoint(exchange: Exchange) -> Fault | None:
    return None if _is_local(exchange) else _refuses_with(exchange, 503, "no endpoint is ready")


def _is_local(exchange: Exchange) -> bool:
    """What the EPP knows by itself, such as the list of models, needs no endpoint."""
    return exchange.request.is_bodyless and 200 <= _status(exchange) < 300


def _is_shed(exchange: Exchange) -> bool:
    if exchange.start.expects == "429" or _status(exchange) == 429 or _reason(exchange) in _SHED:
        return True
    return exchange.request.answer is None and _ended(exchange, "RESOURCE_EXHAUSTED")


def _is_answered(exchange: Exchange) -> bool:
    return exchange.request.answer is not None or exchange.refusal is not None


def _had_its_chance(exchange: Exchange) -> bool:
    return _is_answered(exchange) or _ended(exchange, "OK") or exchange.hung


def _never_without(exchange: Exchange) -> Fault | None:
    if exchange.refusal is not None:
        if _status(exchange) >= 400 or _is_local(exchange):
            return None
        return exchange.fault(f"no endpoint, and no error either: ImmediateResponse {_status(exchange)}", exchange.refusal)
    if exchange.request.answer is None:
        return exchange.unfinished()
    if _picks(exchange):
        return None
    return exchange.fault("the request goes on, but no endpoint was named", exchange.request.answer)


def _served(evidence: Evidence) -> Iterable[Fault] | None:
    answered = [exchange for exchange in evidence.exchanges if exchange.response.head is not None]
    faults = [fault for fault in map(_served_fault, answered) if fault is not None]
    return faults if faults or any(exchange.served for exchange in answered) else None


def _served_fault(exchange: Exchange) -> Fault | None:
    if exchange.served is not None:
        entry, endpoint = exchange.served
        if exchange.picked and endpoint not in exchange.picked:
            return exchange.fault(f"the data plane reports {endpoint}, which is none of {', '.join(exchange.picked)}", entry)
    fault = exchange.unfinished() if exchange.is_plain else None
    if fault is None:
        return None
    return msgspec.structs.replace(fault, reason=f"served endpoint {'' if exchange.served else 'not '}reported: {fault.reason}")


def _keeps_apart(exchange: Exchange, evidence: Evidence) -> Fault | None:
    fault = outside_subset(exchange)
    if fault is None and exchange.refusal is not None and exchange.start.expects == "endpoint":
        fault = exchange.fault(f"the subset {exchange.subset!r} names an endpoint of the pool", exchange.refusal)
    if fault is None:
        return None
    others = ", ".join(repr(other.name) for other in evidence.overlapping(exchange))
    return msgspec.structs.replace(fault, reason=f"with {others} open beside it: {fault.reason}")


def _in_parallel(exchange: Exchange, evidence: Evidence) -> bool:
    return bool(exchange.subset_list) and _is_answered(exchange) and bool(evidence.overlapping(exchange))


def _health(evidence: Evidence) -> Iterable[Fault] | None:
    answers = {answer.service: answer.status for answer in evidence.health}
    if not answers:
        return None
    allowed = {LIVENESS: ("SERVING",), READINESS: ("SERVING", "NOT_SERVING"), EXT_PROC: ("SERVING", "NOT_SERVING"), UNKNOWN: UNKNOWN_STATES}
    return [
        Fault(reason=f"health of {service!r} is {answers[service]}, not {' or '.join(states)}")
        for service, states in allowed.items()
        if service in answers and answers[service] not in states
    ]


def _has_bodies(exchange: Exchange) -> bool:
    answered = any(half.bodies_out for half in exchange.halves) or (exchange.immediate is not None and exchange.refusal is None)
    return exchange.is_full_duplex and answered


def _wants_endpoint(exchange: Exchange) -> bool:
    expected = exchange.start.expects == "endpoint" and exchange.subset is None and not _is_local(exchange)
    return _picks(exchange) or expected


PROTOCOL_RULES: Final = tuple(
    Rule(id=id, title=title, source="proposal 004, endpoint picker protocol", judge=judge, unseen=unseen)
    for id, title, judge, unseen in (
        ("P1", "streams of ext_proc open, and last until all is answered", each(_is_there, _serves), "nothing came from the EPP"),
        ("P2", "bodies are streamed, both ways", each(_has_bodies, _streams), "no body was answered"),
        ("P3", "endpoint in header and in dynamic metadata", each(_wants_endpoint, _says_twice), "no endpoint was named"),
        (
            "P4",
            "both say the same",
            each(lambda exchange: None not in exchange.said_endpoint, _says_the_same),
            "no endpoint was named twice",
        ),
        ("P5", "a list of IP:PORT", each(_picks, _well_formed), "no endpoint was named"),
        (
            "P6",
            "a subset limits the choice",
            each(lambda exchange: exchange.subset_list and (exchange.picked or exchange.start.expects == "endpoint"), _in_subset),
            "no endpoint was chosen from a subset; --endpoint names those of the pool",
        ),
        (
            "P7",
            "503 where the subset is empty, or nothing of it eligible",
            each_in(
                _none_eligible, lambda exchange, _: _refuses_with(exchange, 503, f"of the subset {exchange.subset!r} nothing is eligible")
            ),
            "no subset was asked for that has nothing eligible",
        ),
        (
            "P8",
            "without a subset the whole pool is eligible, and nothing else",
            each_in(lambda exchange, evidence: evidence.pool and exchange.subset is None and exchange.picked, _in_pool),
            "the pool is not known; --endpoint names its endpoints",
        ),
        (
            "P9",
            "503 where no endpoint is ready",
            each(_lacks_endpoint, _no_endpoint),
            "endpoints were ready all the time; empty the pool and use --expect-no-endpoint",
        ),
        (
            "P10",
            "429 for what is shed",
            each(_is_shed, lambda exchange: _refuses_with(exchange, 429, "the request is shed")),
            "nothing was shed; saturate the pool and use --expect-shed",
        ),
        ("P11", "an endpoint or an error", each(_had_its_chance, _never_without), "no request was answered"),
        ("P12", "the served endpoint may be reported, or not", _served, "no response reported the endpoint that served it"),
        ("P13", "each stream is for itself", each_in(_in_parallel, _keeps_apart), "no streams with subsets overlapped"),
        ("P14", "health of liveness, readiness and ext_proc", _health, "health was not asked for"),
    )
)
