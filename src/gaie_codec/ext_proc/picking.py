"""Which model server answers a request: candidates in, the ones to use out, best first; and how the choice is said on the wire.

A picker is a plain function `picker(request, candidates) -> candidates`. It is only ever given candidates that may be chosen: ready ones,
inside the subset that the data plane asked for, whose model server can be told what the request says. Without a picker (None) the shim is
a codec behind another endpoint picker, whose choice it takes. Pickers remember what they chose: each shim has its own, called on the event
loop only, for they have no locks.

The wire is the Endpoint Picker Protocol's (GAIE proposal 004), with its addresses read strictly as destinations and in any spelling as
a subset.
"""

from __future__ import annotations

import hashlib
import ipaddress
import re
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import msgspec

from .. import Code, CodecError, InferenceRequest, UpstreamError, UsageError

if TYPE_CHECKING:
    from google.protobuf.struct_pb2 import Value

DESTINATION: Final = "x-gateway-destination-endpoint"
"""The header, and the key below "envoy.lb" in the dynamic metadata, of the choice."""

_SUBSET: Final = ("envoy.lb.subset_hint", "x-gateway-destination-endpoint-subset")
_SERVED: Final = ("envoy.lb", "x-gateway-destination-endpoint-served")

_ADDRESS: Final = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([0-9.]+)):([1-9][0-9]{0,4})")


class Candidate(msgspec.Struct, frozen=True, kw_only=True):
    """One model server, as it is at the moment of the choice. Numbers that the server does not tell are 0."""

    address: str
    """IP:PORT, an IPv6 address in brackets."""

    dialect: str
    """One of ours, or "http" for a model server that speaks OpenAI HTTP itself."""

    snapshot: str = ""
    model: str = ""
    in_flight: int = 0
    """Requests that this process has sent to it and that have not ended."""

    waiting: int = 0
    """Requests in its queue, as it tells (GetLoads)."""

    running: int = 0
    kv_cache_usage: float = 0.0
    """From 0 to 1."""


class PickRequest(InferenceRequest, frozen=True, kw_only=True, omit_defaults=True):
    """The request as a picker sees it: an `InferenceRequest`, and what only the choice depends on."""

    objective: str = ""
    """`x-llm-d-inference-objective`, or its older name."""

    fairness_id: str = ""
    """`x-llm-d-inference-fairness-id`, or its older name."""

    headers: dict[str, str] = msgspec.field(default_factory=dict)
    """All of the client's, names in lower case."""

    generates: bool = True
    """False for what has no prompt: health, reflection, lists of models."""


Picker: TypeAlias = Callable[[PickRequest, Sequence[Candidate]], Sequence[Candidate]]
"""Chooses; an empty answer is 503. Raises `RequestShedError` for 429."""


class NoEndpointError(CodecError):
    """No model server is there for the request: 503."""

    code = Code.UNAVAILABLE
    http_status = 503
    error_type = "Service Unavailable"
    reason = "rejected-no-endpoints"
    """Of `x-llm-d-request-dropped-reason`."""


class RequestShedError(CodecError):
    """A picker drops the request rather than let it wait: 429."""

    code = Code.RESOURCE_EXHAUSTED
    http_status = 429
    error_type = "RateLimitError"
    reason = "rejected-saturated"
    """Of `x-llm-d-request-dropped-reason`."""


class MalformedDestinationError(UpstreamError):
    """Text that is no list of destinations, from whoever chose before us."""


# Destinations


def encode_destination(candidates: Iterable[Candidate]) -> str:
    """The value of `DESTINATION`: the addresses, best first, joined by commas. Raises UsageError for none: an error is due then."""
    text = ",".join(candidate.address for candidate in candidates)
    if not text:
        raise UsageError("no candidate: there is no destination to tell")
    return text


def decode_destinations(text: str) -> tuple[str, ...]:
    """The addresses in it, each in its one spelling. Raises MalformedDestinationError for all that is not `IP:PORT[,IP:PORT...]`."""
    found = []
    for place, part in enumerate(text.split(",")):
        address = _decode_address(part)
        if address is None:
            raise MalformedDestinationError(
                f"destination {place} of the endpoint picker before this one is not IP:PORT (an IPv6 address goes in brackets)",
                detail=f"{part[:60]!r}",
            )
        found.append(address)
    return tuple(found)


def decode_subset(metadata_context: Any) -> frozenset[str] | None:
    """What the data plane restricts the choice to (a `Metadata` message): IP:PORT, and an IP alone for all of its ports.

    None if it restricts nothing. What cannot be read matches nothing, so that a hint which nobody understands restricts to nothing.
    """
    value = _find(metadata_context, *_SUBSET)
    if value is None:
        return None
    values = value.list_value.values if value.HasField("list_value") else (value,)
    entries = (entry for each in values for entry in each.string_value.split(","))
    return frozenset(filter(None, map(_decode_entry, entries)))


def is_in_subset(address: str, subset: frozenset[str] | None) -> bool:
    """Whether a candidate's address may be chosen."""
    return subset is None or address in subset or address.rpartition(":")[0].strip("[]") in subset


def served_endpoint(metadata_context: Any) -> str | None:
    """Which model server has answered, as the data plane says with the response headers; None if it does not."""
    value = _find(metadata_context, *_SERVED)
    return _decode_address(value.string_value) if value is not None else None


def encode_address(host: str, port: int) -> str:
    """IP:PORT in the one spelling that addresses have here. Raises UsageError if `host` is no IP address, or one with a zone."""
    address = _decode_host(host)
    if address is None or "%" in host:
        raise UsageError(f"{host!r} is not an IP address that a gateway could be told")
    return f"[{address}]:{port}" if address.version == 6 else f"{address}:{port}"


def _find(metadata_context: Any, namespace: str, key: str) -> Value | None:
    # `in` first: to ask a message map for what it does not have makes it.
    if namespace not in metadata_context.filter_metadata:
        return None
    fields = metadata_context.filter_metadata[namespace].fields
    if key not in fields or fields[key].WhichOneof("kind") in (None, "null_value"):
        return None
    value: Value = fields[key]
    return value


def _decode_address(text: str) -> str | None:
    match = _ADDRESS.fullmatch(text)
    host = _decode_host(match[1] or match[2]) if match is not None else None
    if match is None or host is None or (host.version == 6) != (match[1] is not None) or int(match[3]) > 65535:
        return None
    return encode_address(str(host), int(match[3]))


def _decode_entry(text: str) -> str | None:
    text = text.strip()
    host = _decode_host(text.removeprefix("[").removesuffix("]"))
    if host is not None:
        return str(host)
    # Some join IP and port without brackets (llm-d's fallback), which can be told apart only where the whole is no address itself.
    before, _, port = text.rpartition(":")
    host = _decode_host(before.removeprefix("[").removesuffix("]"))
    return _decode_address(f"[{host}]:{port}" if host is not None and host.version == 6 else text)


def _decode_host(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None


# Pickers


def round_robin() -> Picker:
    """Each in turn, also where subsets overlap: whoever was chosen longest ago is next."""
    turns = _Turns()

    def pick(_: InferenceRequest, candidates: Sequence[Candidate]) -> Sequence[Candidate]:
        return turns.take(sorted(candidates, key=turns.last))

    return pick


def least_inflight() -> Picker:
    """The fewest requests in flight and waiting; among equals each in turn."""
    turns = _Turns()

    def pick(_: InferenceRequest, candidates: Sequence[Candidate]) -> Sequence[Candidate]:
        return turns.take(sorted(candidates, key=lambda one: (_load(one), turns.last(one))))

    return pick


def prefix_affinity(*, block_tokens: int = 64, max_blocks: int = 131_072, max_prompt_blocks: int = 2048, max_lead: int = 16) -> Picker:
    """Whoever was last given the longest part of the prompt from its start, so that its KV cache has it; among equals as `least_inflight`.

    Unless it has over `max_lead` more requests in flight and waiting than the least loaded one. Of a prompt that is text, a token counts as
    4 bytes; of one that is neither (messages that are passed through) nothing is known. `max_blocks` bounds the memory, by about 300 bytes
    each, and `max_prompt_blocks` the time spent on a prompt. Raises UsageError.
    """
    bounds = {"block_tokens": block_tokens, "max_blocks": max_blocks, "max_prompt_blocks": max_prompt_blocks, "max_lead": max_lead + 1}
    for name, bound in bounds.items():
        if bound < 1:
            raise UsageError(f"{name} is too small")
    turns = _Turns()
    memory = _Memory(max_blocks)

    def pick(request: InferenceRequest, candidates: Sequence[Candidate]) -> Sequence[Candidate]:
        if not candidates:
            return ()
        blocks = _hash_blocks(request, block_tokens, max_prompt_blocks)
        matched = memory.match(blocks, {one.address for one in candidates})
        highest = min(map(_load, candidates)) + max_lead

        def rank(one: Candidate) -> tuple[bool, int, int, int]:
            load = _load(one)
            return load > highest, -matched.get(one.address, 0), load, turns.last(one)

        chosen = turns.take(sorted(candidates, key=rank))
        memory.add(blocks, chosen[0].address)
        return chosen

    return pick


PICKERS: Final[Mapping[str, Callable[[], Picker]]] = MappingProxyType(
    {"round-robin": round_robin, "least-inflight": least_inflight, "prefix": prefix_affinity}
)
"""By the names of the command line, with their defaults."""


def _load(one: Candidate) -> int:
    return one.in_flight + one.waiting


class _Turns:
    """When each address was chosen last. A counter modulo the number of candidates would starve some where subsets take turns."""

    _MAX: Final = 65_536

    def __init__(self) -> None:
        self._now = 0
        self._chosen: OrderedDict[str, int] = OrderedDict()

    def last(self, one: Candidate) -> int:
        return self._chosen.get(one.address, 0)

    def take(self, ranked: Sequence[Candidate]) -> Sequence[Candidate]:
        """Note that the first is chosen."""
        if ranked:
            self._now += 1
            self._chosen[ranked[0].address] = self._now
            self._chosen.move_to_end(ranked[0].address)
            if len(self._chosen) > self._MAX:
                self._chosen.popitem(last=False)
        return ranked


class _Memory:
    """Blocks of prompts -> the addresses that were given them; the longest unused are forgotten first."""

    _MAX_HOLDERS: Final = 64

    def __init__(self, max_blocks: int) -> None:
        self._max_blocks = max_blocks
        self._holders: OrderedDict[bytes, frozenset[str]] = OrderedDict()

    def match(self, blocks: Sequence[bytes], addresses: set[str]) -> dict[str, int]:
        """How many blocks from the start each address was given; those with none are left out."""
        matched: dict[str, int] = {}
        for number, block in enumerate(blocks, 1):
            holders = self._holders.get(block)
            addresses = addresses & holders if holders is not None else set()
            if not addresses:
                break
            matched.update(dict.fromkeys(addresses, number))
        return matched

    def add(self, blocks: Sequence[bytes], address: str) -> None:
        known = self._holders
        alone = frozenset((address,))
        for block in reversed(blocks):  # the start of a prompt is worth more than its end, so it has to be the last to go
            holders = known.get(block)
            if holders is None:
                known[block] = alone
            else:
                known.move_to_end(block)
                if address not in holders:
                    # A prompt that everybody sends would otherwise collect the addresses of all model servers that ever were.
                    known[block] = holders | alone if len(holders) < self._MAX_HOLDERS else alone
        while len(known) > self._max_blocks:
            known.popitem(last=False)


def _hash_blocks(request: InferenceRequest, block_tokens: int, max_blocks: int) -> list[bytes]:
    """A digest for every whole block of the prompt, each of all that is before its end and of what else a KV cache keeps apart.

    100 000 tokens take 2.5 ms, of which the hash itself takes 0.6 ms (blake2b with `digest` at every block).
    """
    text = request.prompt_text
    size = block_tokens * 4
    if text is not None:
        data = text[: size * max_blocks].encode("utf-8", "surrogatepass")
    else:
        try:
            data = array("I", request.prompt_token_ids[: block_tokens * max_blocks]).tobytes()
        except OverflowError:  # ids that no model server takes
            return []
        size = block_tokens * array("I").itemsize
    media = [(one.kind, one.url, one.uuid) for one in request.media]
    apart = (text is None, request.model, request.lora_name, request.cache_salt, media)
    rolling = hashlib.blake2b(repr(apart).encode(), digest_size=16)
    view = memoryview(data)
    blocks = []
    for end in range(size, min(len(data), size * max_blocks) + 1, size):
        rolling.update(view[end - size : end])
        blocks.append(rolling.digest())
    return blocks
