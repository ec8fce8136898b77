"""Transcode between the OpenAI HTTP API and the gRPC protocols of model servers. A pure core: no I/O, clocks or randomness.

Start with `Transcoder`. Public calls raise only `CodecError` (the input is at fault) or `UsageError` (the caller is).
"""

from ._bridge import Bridge, BridgedCall, BridgedResponse, GrpcOutput, Trailers, encode_grpc_error
from ._calls import Call, UpstreamCall
from ._errors import (
    Code,
    CodecError,
    FramingError,
    MalformedMessageError,
    MalformedRequestError,
    ModelNotFoundError,
    OutOfOrderError,
    RequestError,
    RequestTooLargeError,
    TruncatedResponseError,
    UnsupportedEndpointError,
    UnsupportedFieldError,
    UpstreamError,
    UpstreamStatusError,
    UsageError,
)
from ._events import (
    BodyEvent,
    Capacity,
    Constraint,
    ErrorEvent,
    Event,
    FinishEvent,
    InferenceRequest,
    Loads,
    Media,
    ModelInfo,
    PromptEvent,
    PromptLogprob,
    RankLoads,
    SamplingParams,
    TokenLogprob,
    TokensEvent,
    Usage,
)
from ._framing import FrameDecoder, encode_frame
from ._observer import ObservedCall, ObservedResponse, Observer
from ._outputs import (
    BodyChunk,
    CancelCall,
    EndOfBody,
    Output,
    ResponseHead,
    encode_answer_headers,
    encode_error_response,
    encode_json_response,
)
from ._response import Response
from ._sse import ServerSentEvent, SSEDecoder
from ._state import State
from ._transcoder import Limits, Transcoder

__version__ = "0.1.0"

__all__ = [
    "BodyChunk",
    "BodyEvent",
    "Bridge",
    "BridgedCall",
    "BridgedResponse",
    "Call",
    "CancelCall",
    "Capacity",
    "Code",
    "CodecError",
    "Constraint",
    "EndOfBody",
    "ErrorEvent",
    "Event",
    "FinishEvent",
    "FrameDecoder",
    "FramingError",
    "GrpcOutput",
    "InferenceRequest",
    "Limits",
    "Loads",
    "MalformedMessageError",
    "MalformedRequestError",
    "Media",
    "ModelInfo",
    "ModelNotFoundError",
    "ObservedCall",
    "ObservedResponse",
    "Observer",
    "OutOfOrderError",
    "Output",
    "PromptEvent",
    "PromptLogprob",
    "RankLoads",
    "RequestError",
    "RequestTooLargeError",
    "Response",
    "ResponseHead",
    "SSEDecoder",
    "SamplingParams",
    "ServerSentEvent",
    "State",
    "TokenLogprob",
    "TokensEvent",
    "Trailers",
    "Transcoder",
    "TruncatedResponseError",
    "UnsupportedEndpointError",
    "UnsupportedFieldError",
    "UpstreamCall",
    "UpstreamError",
    "UpstreamStatusError",
    "Usage",
    "UsageError",
    "encode_answer_headers",
    "encode_error_response",
    "encode_frame",
    "encode_grpc_error",
    "encode_json_response",
]
