"""A whole request -> the model server that gets it: who may answer, what each would be sent, and whom the picker takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import msgspec

from .. import Output, RequestError, UsageError, __version__
from ..openai import models
from ._headers import FAIRNESS_ID, OBJECTIVE, first_of
from ._plans import Incoming, Plan, is_native, make_plan
from .gateway import Gateway
from .picking import DESTINATION, Candidate, NoEndpointError, PickRequest, decode_destinations, encode_destination, is_in_subset
from .servers import Server, Spoken

Offer: TypeAlias = tuple[Server, Plan]


def find_eligible(gateway: Gateway, headers: Mapping[str, str], subset: frozenset[str] | None) -> Sequence[Spoken]:
    """The model servers that may answer: those that are ready in the subset, or the one that another picker named.

    Raises NoEndpointError.
    """
    if gateway.picker is None and DESTINATION in headers:
        server = gateway.find(decode_destinations(headers[DESTINATION])[0])
        if server is None:
            raise NoEndpointError("the model server that was picked is not known here, or not ready")
        return (Spoken.of(server),)
    servers = gateway.servers()
    if not servers:
        raise NoEndpointError(f"no {DESTINATION} names a model server" if gateway.picker is None else "no model server is ready")
    if gateway.picker is None:  # Envoy has its own way to one of them, and each takes what the others do
        if len({(server.transcoder, server.observer) for server in servers}) > 1:
            raise NoEndpointError(f"{DESTINATION} names no model server, and they are not alike")
        return (Spoken.of(servers[0]),)
    found = [server for server in servers if is_in_subset(server.address, subset)]
    if not found:
        raise NoEndpointError("no model server of the requested subset is ready")
    return [Spoken.of(server) for server in found]


class Local(msgspec.Struct, frozen=True):
    """A whole answer that needs no model server."""

    outputs: tuple[Output, ...]


def answer_locally(request: Incoming, servers: Sequence[Spoken], *, created: int) -> Local | None:
    """What is answered by what the model servers told of themselves; None for all else, and where one of them speaks HTTP and answers
    such itself. The list of models is not for one server to tell. Raises RequestError where none of them can be meant."""
    transcoders = dict.fromkeys(server.transcoder for server in servers)
    if request.is_grpc or not request.transcodes or None in transcoders or request.path.startswith(models.PATH):
        return None
    error: RequestError | None = None
    for transcoder in transcoders:
        assert transcoder is not None
        try:
            outputs = transcoder.answer(request.method, request.path, request.headers, request.body, created=created, version=__version__)
        except RequestError as refused:
            error = error or refused
            continue
        return Local(outputs) if outputs is not None else None
    if error is not None:
        raise error
    return None


def make_offers(request: Incoming, servers: Sequence[Spoken]) -> list[Offer]:
    """Each server with what it would be sent; servers that are alike share a plan. A gRPC call is for servers of its dialect, where there
    are such. Raises what is wrong with the request if none can be asked."""
    if request.is_grpc:
        servers = [server for server in servers if is_native(request, server)] or servers
    plans: dict[Any, Plan | RequestError] = {}
    offers = []
    for server in servers:
        kind = (server.transcoder, server.observer)
        if kind not in plans:
            try:
                plans[kind] = make_plan(request, server)
            except RequestError as error:
                plans[kind] = error
        plan = plans[kind]
        if isinstance(plan, Plan):
            offers.append((server.server, plan))
    if not offers:
        raise next(error for error in plans.values() if isinstance(error, RequestError))
    return offers


def choose(gateway: Gateway, headers: Mapping[str, str], offers: Sequence[Offer]) -> tuple[Server, Plan, str]:
    """The server, its plan, and the destination to name; "" where another picker did. Raises NoEndpointError, and what pickers raise."""
    if gateway.picker is None:
        return *offers[0], ""
    ready = gateway.servers()  # a long prompt takes a while to decode
    offers = [offer for offer in offers if offer[0] in ready]
    if not offers:
        raise NoEndpointError("no model server is ready any more")
    by_address = {server.address: (server, plan) for server, plan in offers}
    chosen = gateway.picker(_pick_request(offers[0][1], headers), [server.candidate() for server, _ in offers])
    if chosen is not None and not (isinstance(chosen, Sequence) and all(isinstance(one, Candidate) for one in chosen)):
        raise UsageError(f"the picker returned a {type(chosen).__name__}, not a sequence of candidates")
    if not chosen:
        raise NoEndpointError("no model server was picked")
    if any(one.address not in by_address for one in chosen):
        raise UsageError("the picker chose what was not offered to it")
    server, plan = by_address[chosen[0].address]
    # What is sent is encoded for the first; whoever takes over has to understand it.
    alike = {one.address: one for one in chosen if by_address[one.address][1] is plan}
    return server, plan, encode_destination([*alike.values()][: 1 + gateway.fallbacks])


def _pick_request(plan: Plan, headers: Mapping[str, str]) -> PickRequest:
    inference = plan.inference
    return PickRequest(
        **{name: getattr(inference, name) for name in inference.__struct_fields__},
        objective=first_of(OBJECTIVE, headers),
        fairness_id=first_of(FAIRNESS_ID, headers),
        headers=dict(headers),
        generates=plan.generates,
    )
