"""E1 to E5: what Envoy and other data planes take from an ext_proc server (processing_mode.proto, external_processor.proto)."""

from __future__ import annotations

from typing import Any, Final

from ._rule import Rule, each
from .exchange import Entry, Exchange, Fault, Half, mutation_of, streamed
from .transcript import header_value

MAX_BODY_BYTES: Final = 62_000
"""Of one streamed body: some data planes take messages below 64 KB only, and around the body is more."""

HOP_BY_HOP: Final = frozenset("connection keep-alive proxy-authenticate proxy-connection te trailer transfer-encoding upgrade".split())
_ROUTING: Final = frozenset((":method", ":authority", ":scheme", "host"))
_RANKS: Final = {"headers": 0, "body": 1, "trailers": 2}


def _in_order(exchange: Exchange) -> Fault | None:
    for half in exchange.halves:
        if (found := _out_of_order(half)) is not None:
            return exchange.fault(*found)
    return None


def _out_of_order(half: Half) -> tuple[str, Entry] | None:
    """Answers come as headers, body, trailers, each only to what was received."""
    received: set[str] = set()
    answered: list[str] = []
    ended = False
    for entry in half.entries:
        what = entry.kind.removeprefix(f"{half.side}_")
        if entry.sender == "envoy":
            received.add(what)
            continue
        if what not in received:
            return f"{half.side} {what} answered, but there was none", entry
        if what == "body" and "headers" not in answered:
            return f"{half.side} body before the headers are answered", entry
        if what == "trailers" and "headers" not in answered:
            return f"{half.side} trailers before the headers are answered", entry
        if answered and _RANKS[what] < _RANKS[answered[-1]]:
            return f"{half.side} {what} after {answered[-1]}", entry
        if what != "body" and what in answered:
            return f"{half.side} {what} answered twice", entry
        if what == "body" and ended:
            return f"{half.side} body after its end of stream", entry
        if half.is_replaced and what != "headers":
            return f"{half.side} {what} after CONTINUE_AND_REPLACE", entry
        ended = ended or (what == "body" and streamed(entry).end_of_stream)
        answered.append(what)
    return None


def _has_bodies(exchange: Exchange) -> bool:
    return exchange.is_full_duplex and any(half.bodies_out for half in exchange.halves)


def _mirrors_end(exchange: Exchange) -> Fault | None:
    for half in exchange.halves:
        ends_in, ends_out = half.ends_in, half.ends_out
        for end in ends_out[:1]:
            if not ends_in or ends_in[0].number > end.number:
                return exchange.fault(f"end_of_stream on a {half.side} body, which the data plane had not said", end)
        # A stream that simply hangs is the matter of other rules; here something was answered, and the end is missing.
        if not half.bodies_out or half.is_complete or exchange.unfinished() is None:
            continue
        if half.trailers_in is not None:
            return exchange.fault(f"the {half.side} trailers end the stream; they were not answered", half.trailers_in)
        if ends_in:
            return exchange.fault(f"end_of_stream of the {half.side} body is not mirrored", ends_in[0])
    return None


def _is_large(exchange: Exchange) -> bool:
    bodies = [len(streamed(entry).body) for half in exchange.halves for entry in half.bodies_out]
    return sum(bodies) > MAX_BODY_BYTES


def _in_chunks(exchange: Exchange) -> Fault | None:
    for half in exchange.halves:
        for entry in half.bodies_out:
            if (size := len(streamed(entry).body)) > MAX_BODY_BYTES:
                return exchange.fault(
                    f"{size} bytes in one message; {MAX_BODY_BYTES} are sure to stay below 64 KB with what is around", entry
                )
    return None


def _may_end_twice(exchange: Exchange) -> bool:
    return exchange.immediate is not None or len(exchange.request.ends_in) > 1


def _ends_once(exchange: Exchange) -> Fault | None:
    if exchange.immediate is not None:
        later = [entry for entry in exchange.answers if entry.number > exchange.immediate.number]
        return exchange.fault(f"{later[0].kind or 'a message'} after an ImmediateResponse", later[0]) if later else None
    return second_end(exchange)


def second_end(exchange: Exchange) -> Fault | None:
    """What a repeated end of stream did to the exchange."""
    if (fault := exchange.unfinished()) is not None:
        return fault
    ends = exchange.request.ends_out
    return exchange.fault("end_of_stream came twice and is answered twice", ends[1]) if len(ends) > 1 else None


def _changes(exchange: Exchange) -> bool:
    return any(mutation_of(entry) is not None for entry in exchange.answers)


def _allowed(exchange: Exchange) -> Fault | None:
    for half in exchange.halves:
        for entry, option in half.sets:
            if (reason := _forbidden(half, option)) is not None:
                return exchange.fault(reason, entry)
        for entry in half.entries:
            change = mutation_of(entry) if entry.sender == "epp" else None
            for name in change.remove_headers if change is not None else ():
                if name.startswith(":") or name.lower() == "host":
                    return exchange.fault(f"removes {name}", entry)
    return None


def _forbidden(half: Half, option: Any) -> str | None:
    name, value = option.header.key.lower(), header_value(option.header)
    if name in HOP_BY_HOP and (name, value) != ("te", "trailers"):
        return f"sets {name}, which is for one connection only"
    if name.startswith("x-envoy-"):
        return f"sets {name}, which is Envoy's own"
    if name in _ROUTING and not (name == ":method" and half.is_replaced):
        return f"sets {name}, which data planes ignore unless told otherwise"
    if name in ((":status",) if half.side == "request" else (":path", ":method")):
        return f"sets {name} on a {half.side}"
    if option.append_action == 0:
        return f"sets {name} with no append_action, which is APPEND_IF_EXISTS_OR_ADD: Envoy overwrites all the same, and others append"
    return None


ENVOY_RULES: Final = tuple(
    Rule(id=id, title=title, source="Envoy, processing_mode.proto and external_processor.proto", judge=judge, unseen=unseen)
    for id, title, judge, unseen in (
        ("E1", "headers, body, trailers, in this order", each(lambda exchange: exchange.answers, _in_order), "nothing came from the EPP"),
        ("E2", "end of stream is mirrored, and trailers end what has trailers", each(_has_bodies, _mirrors_end), "no body was answered"),
        ("E3", "body messages below 64 KB", each(_is_large, _in_chunks), "no large body went on"),
        (
            "E4",
            "nothing after an ImmediateResponse; a second end of stream changes nothing",
            each(_may_end_twice, _ends_once),
            "no ImmediateResponse, and no end of stream that came twice",
        ),
        ("E5", "headers that may be set, with an append_action", each(_changes, _allowed), "no header was changed"),
    )
)
