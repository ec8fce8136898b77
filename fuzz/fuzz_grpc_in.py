"""Invariant tested: Observer and Bridge raise only CodecError, whatever bytes a gRPC client or a server sends; a bridged answer ends once.

The input is tried as a request to every dialect and, where that is accepted, as the answer of the server behind the bridge.

    python fuzz/fuzz_grpc_in.py --seconds 60 --seed 1
"""

from __future__ import annotations

import sys

from dialects import LIMITS, TOKENIZER
from harness import ACCEPTED, Cut, run

from gaie_codec import (
    BodyChunk,
    Bridge,
    BridgedCall,
    CodecError,
    Constraint,
    EndOfBody,
    FinishEvent,
    InferenceRequest,
    Observer,
    ResponseHead,
    SamplingParams,
    TokensEvent,
    Trailers,
    encode_frame,
)
from gaie_codec._conventions import Teller
from gaie_codec.adapters import DIALECTS

HELLO = TOKENIZER.encode("Hello STOP \N{SAUROPOD}", add_special_tokens=False)
NEXT = dict(zip(DIALECTS, (*DIALECTS[1:], DIALECTS[0]), strict=True))
OBSERVERS = {dialect: Observer(dialect, limits=LIMITS) for dialect in DIALECTS}
BRIDGES = {dialect: Bridge(dialect, NEXT[dialect], tokenizer=TOKENIZER, limits=LIMITS) for dialect in DIALECTS}
REQUESTS = [
    InferenceRequest(request_id="r", prompt_token_ids=HELLO, stream=True, sampling=SamplingParams(max_tokens=9)),
    InferenceRequest(request_id="r", prompt_token_ids=[5], sampling=SamplingParams(max_tokens=9, n=2, stop=("STOP",), logprobs=1)),
    InferenceRequest(
        request_id="r",
        prompt_token_ids=[5],
        sampling=SamplingParams(max_tokens=9, logit_bias={5: 1.0}, constraint=Constraint(kind="json_schema", value="{}")),
    ),
]


def _answer(dialect: str) -> bytes:
    adapter = OBSERVERS[dialect].adapter
    teller = Teller(adapter.convention, REQUESTS[0], sends_text=adapter.sends_text)
    events = [event for token_id in HELLO for event in teller.gain(TokensEvent(token_ids=[token_id], text="x", prompt_tokens=3))]
    events += teller.finish(FinishEvent(finish_reason="length", prompt_tokens=3), last=TokensEvent(token_ids=[5], text="y"))
    return b"".join(encode_frame(adapter.encode_response(event).SerializeToString()) for event in events)


CORPUS = [
    encode_frame(observer.adapter.encode_request(request).SerializeToString()) for observer in OBSERVERS.values() for request in REQUESTS
] + [_answer(dialect) for dialect in DIALECTS]
CALLS = {
    dialect: bridge.request(bridge.inbound.generate_path, {}, encode_frame(bridge.inbound.encode_request(REQUESTS[0]).SerializeToString()))
    for dialect, bridge in BRIDGES.items()
}


def target(data: bytes, cut: Cut) -> tuple[object, ...]:
    """What becomes of the input as a request, and as an answer, of every dialect."""
    outcomes = []
    for dialect in DIALECTS:
        outcomes += [_as_request(dialect, data, cut), _as_answer(dialect, data, cut), _observed(dialect, data, cut)]
    kinds = [outcome[0] for outcome in outcomes]
    return (ACCEPTED if ACCEPTED in kinds else kinds[0], *outcomes)


def _as_request(dialect: str, data: bytes, cut: Cut) -> tuple[object, ...]:
    bridge = BRIDGES[dialect]
    try:
        call: BridgedCall = bridge.request(bridge.inbound.generate_path, {}, data)
        call.response()
        OBSERVERS[dialect].request(bridge.inbound.generate_path, {}, cut(data)).response()
    except CodecError as error:
        return type(error).__name__, str(error)
    return ACCEPTED, call.calls


def _as_answer(dialect: str, data: bytes, cut: Cut) -> tuple[object, ...]:
    response = CALLS[dialect].response()
    outputs = [*response.receive_headers()]
    for piece in cut(data):
        outputs += response.receive_data(piece)
    outputs += response.receive_trailers({"grpc-status": "0"})
    ends = [type(output) for output in outputs if not isinstance(output, BodyChunk)]
    assert ends == [ResponseHead, Trailers, EndOfBody], ends
    body = b"".join(output.data for output in outputs if isinstance(output, BodyChunk))
    return ACCEPTED if response.error is None else type(response.error).__name__, str(response.error), body


def _observed(dialect: str, data: bytes, cut: Cut) -> tuple[object, ...]:
    observer = OBSERVERS[dialect]
    message = observer.adapter.encode_request(REQUESTS[0]).SerializeToString()
    response = observer.request_message(observer.adapter.generate_path, {}, message).response()
    response.receive_headers()
    for piece in cut(data):
        response.receive_data(piece)
    response.receive_trailers({"grpc-status": "0"})
    return type(response.error).__name__, str(response.error), response.usage, response.finish_reasons


if __name__ == "__main__":
    sys.exit(run(__doc__, target, CORPUS))
