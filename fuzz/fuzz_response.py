"""Invariant tested: whatever bytes a server sends, Response raises nothing and gives one whole answer, the same in any partition.

python fuzz/fuzz_response.py --seconds 60 --seed 1
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from harness import ACCEPTED, Cut, run

from gaie_codec import (
    BodyChunk,
    Call,
    EndOfBody,
    FinishEvent,
    Limits,
    ResponseHead,
    SSEDecoder,
    TokenLogprob,
    TokensEvent,
    Transcoder,
    encode_frame,
)
from gaie_codec.tokenizer_sources import load_tokenizer

TOKENIZER = load_tokenizer("builtin")
TRANSCODER = Transcoder("vllm.engine", tokenizer=TOKENIZER, limits=Limits(max_message_bytes=4096))
HELLO = TOKENIZER.encode("Hello world STOP \N{SAUROPOD}", add_special_tokens=False)


def _call(**fields: object) -> Call:
    body = json.dumps({"messages": [{"role": "user", "content": "Hi"}], **fields}).encode()
    return TRANSCODER.request("POST", "/v1/chat/completions", (), body, request_id="r")


CALLS = [
    _call(),
    _call(stream=True),
    _call(stream=True, n=2, stop=["STOP"], max_tokens=6, stream_options={"include_usage": True, "continuous_usage_stats": True}),
    _call(stream=True, logprobs=True, top_logprobs=2, return_token_ids=True, min_tokens=2, stop=["o"]),
]


def _message(event: TokensEvent | FinishEvent) -> bytes:
    return bytes(TRANSCODER.adapter.encode_response(event).SerializeToString())


def _frames(*events: TokensEvent | FinishEvent, encoding: str = "identity") -> bytes:
    return b"".join(encode_frame(_message(event), encoding=encoding) for event in events)


def _chunks(index: int = 0) -> list[TokensEvent]:
    entries = [TokenLogprob(token_id=token_id, logprob=-0.5, top=((token_id, -0.5), (5, -2.0))) for token_id in HELLO]
    return [TokensEvent(index=index, token_ids=[entry.token_id], logprobs=(entry,), prompt_tokens=9) for entry in entries]


CORPUS = [
    b"",
    _frames(FinishEvent(token_ids=HELLO, prompt_tokens=9, kv_transfer_params='{"a":1}')),
    _frames(*_chunks(), FinishEvent(token_ids=HELLO[-1:], matched_stop="STOP")),
    _frames(*_chunks(), FinishEvent(token_ids=HELLO, finish_reason="length", matched_stop=5), encoding="gzip"),
    _frames(*_chunks(0), *_chunks(1), FinishEvent(index=1), FinishEvent(index=0)),
    _frames(TokensEvent(token_ids=[HELLO[0], 2]), FinishEvent(token_ids=[2], finish_reason="abort")),
    _message(FinishEvent(token_ids=HELLO, prompt_tokens=9, kv_transfer_params='{"a":1}', matched_stop="STOP")),
    _message(FinishEvent(token_ids=HELLO, logprobs=_chunks()[0].logprobs, finish_reason="length")),
]
OK = {"grpc-status": "0"}
ENDINGS = (OK, OK, OK, {"grpc-status": "14", "grpc-message": "gone%20%zz"}, {}, None)


def target(data: bytes, cut: Cut) -> tuple[object, ...]:
    """The answers to each of the calls, in the ending that the input's length chooses.

    The input is tried as a stream and as one message: faults inside a message seldom get past the frames otherwise.
    """
    ending = ENDINGS[len(data) % len(ENDINGS)]
    answers = [_answer(call, cut(stream), ending) for stream in (data, encode_frame(data)) for call in CALLS]
    outcomes = [answer[0] for answer in answers]
    return (ACCEPTED if ACCEPTED in outcomes else outcomes[0], *answers)


def _answer(call: Call, pieces: Sequence[bytes], trailers: dict[str, str] | None) -> tuple[object, ...]:
    response = call.response(created=1)
    outputs = [*response.receive_headers({"grpc-encoding": "gzip"})]
    for piece in pieces:
        outputs += response.receive_data(piece)
    outputs += response.receive_eof() if trailers is None else response.receive_trailers(trailers)
    head, end = outputs[0], outputs[-1]
    assert isinstance(head, ResponseHead)
    assert isinstance(end, EndOfBody)
    assert response.ended
    assert len([output for output in outputs if not isinstance(output, BodyChunk)]) == 2
    body = b"".join(output.data for output in outputs if isinstance(output, BodyChunk))
    is_stream = dict(head.headers)["content-type"] != "application/json"
    if is_stream:
        decoder = SSEDecoder()
        events = [event.data for event in decoder.receive_data(body)]
        decoder.receive_eof()
        assert (events[-1] == "[DONE]") == (response.error is None)
        for event in events[: None if response.error else -1]:
            json.loads(event)
    else:
        assert ("error" in json.loads(body)) == (response.error is not None) == (head.status != 200)
    outcome = ACCEPTED if response.error is None else type(response.error).__name__
    return outcome, str(response.error), head.status, head.headers, body, response.usage


if __name__ == "__main__":
    sys.exit(run(__doc__, target, CORPUS))
