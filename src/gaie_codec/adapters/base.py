"""What an adapter is: one model-server dialect at one snapshot, as a frozen record of plain functions and facts.

An adapter module offers `adapter(snapshot) -> Adapter`. It asks the snapshot's descriptors which fields exist; the host of the adapter
refuses by name what `carries` leaves out, so no adapter ever drops a field.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import msgspec
from google.protobuf.message import Message

from .._events import Event, InferenceRequest, ModelInfo
from ..snapshots import Snapshot


class Adapter(msgspec.Struct, frozen=True, kw_only=True):
    """One dialect at one snapshot."""

    dialect: str
    snapshot: Snapshot

    generate_path: str
    """The gRPC path of the call, such as `/vllm.grpc.engine.VllmEngine/Generate`."""

    model_info_path: str
    """The path that answers what `decode_model_info` takes; its request has no fields."""

    tokenizer_path: str | None
    """The path of the server's GetTokenizer stream, None where the snapshot has none."""

    request_type: type[Message]
    response_type: type[Message]

    carries: frozenset[str]
    """Fields of InferenceRequest and SamplingParams that reach the wire, and kinds of constraint as `constraint.<kind>`."""

    ranges: Mapping[str, tuple[float, float]]
    """Lowest and highest value of sampling fields whose type on the wire is narrower than OpenAI's."""

    encode_request: Callable[[InferenceRequest], Message]
    decode_request: Callable[[Message], InferenceRequest]
    decode_response: Callable[[Any], Event | None]
    """One message to one event; None for a message that says nothing."""
    decode_tokens: Callable[[Any], tuple[int, list[int]]]
    """The per-token path: index and ids of a message that brings tokens, no ids for any other. The rest of it is not looked at."""
    encode_response: Callable[[Event], Message]
    decode_model_info: Callable[[Any], ModelInfo]
    encode_model_info: Callable[[ModelInfo], Message]
