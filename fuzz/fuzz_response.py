"""Invariant tested: whatever bytes a server sends, Response raises nothing and gives one whole answer, the same in any partition.

python fuzz/fuzz_response.py --seconds 60 --seed 1
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from dialects import TOKENIZER, answer, frames, message, transcoders
from harness import ACCEPTED, Cut, run

from gaie_codec import BodyChunk, Call, CancelCall, EndOfBody, FinishEvent, ResponseHead, SSEDecoder, Transcoder, encode_frame

HELLO = TOKENIZER.encode("Hello world STOP \N{SAUROPOD}", add_special_tokens=False)
FIELDS: tuple[dict[str, object], ...] = (
    {},
    {"stream": True},
    {"stream": True, "n": 2, "stop": ["STOP"], "max_tokens": 6, "stream_options": {"include_usage": True, "continuous_usage_stats": True}},
    {"stream": True, "logprobs": True, "top_logprobs": 2, "min_tokens": 2, "stop": ["o"]},
    {"stream": True, "input": "Hi", "max_output_tokens": 6},
    {"stream": True, "model": "m", "system": "s", "max_tokens": 6, "stop_sequences": ["STOP"]},
)
WHOLE = ("[DONE]", '{"type":"message_stop"', '{"type":"response.completed"', '{"type":"response.incomplete"')


def _call(transcoder: Transcoder, fields: dict[str, object]) -> Call:
    if "logprobs" in fields and "logprobs" not in transcoder.adapter.carries:
        fields = {name: value for name, value in fields.items() if "logprobs" not in name}
    path = "/v1/responses" if "input" in fields else "/v1/messages" if "system" in fields else "/v1/chat/completions"
    body = json.dumps({"messages": [{"role": "user", "content": "Hi"}], **fields}).encode()
    return transcoder.request("POST", path, (), body, request_id="r")


CALLS = [[_call(transcoder, fields) for fields in FIELDS] for transcoder in transcoders().values()]
OK = {"grpc-status": "0"}
ENDINGS = (OK, OK, OK, {"grpc-status": "14", "grpc-message": "gone%20%zz"}, {"grpc-status": "13", "grpc-message": "429: x"}, {}, None)


def _corpus() -> list[bytes]:
    """Each begins with the number of its dialect, so that a mutation may give it to another."""
    found = []
    for number, calls in enumerate(CALLS):
        start = bytes((number,))
        found.append(start)
        for place, call in enumerate(calls):
            transcoder, one = call.transcoder, call.calls[0]
            endings = (
                FinishEvent(),
                FinishEvent(finish_reason="length"),
                FinishEvent(matched_stop="STOP"),
                FinishEvent(finish_reason="abort"),
                FinishEvent(finish_reason="length"),
                FinishEvent(),
            )
            events = answer(transcoder, one, HELLO, finish=endings[place])
            found.append(start + frames(transcoder, one.path, events, encoding="gzip" if place == 1 else "identity"))
            found.append(start + message(transcoder, one.path, events[-1]))
    return found


CORPUS = _corpus()


def target(data: bytes, cut: Cut) -> tuple[object, ...]:
    """The answers to each of a dialect's calls, in the ending that the input's length chooses.

    The input is tried as a stream and as one message: faults inside a message seldom get past the frames otherwise.
    """
    calls = CALLS[data[0] % len(CALLS)] if data else CALLS[0]
    data = data[1:]
    ending = ENDINGS[len(data) % len(ENDINGS)]
    answers = [_answer(call, cut(stream), ending) for stream in (data, encode_frame(data)) for call in calls]
    outcomes = [answer[0] for answer in answers]
    return (ACCEPTED if ACCEPTED in outcomes else outcomes[0], *answers)


def _answer(call: Call, pieces: Sequence[bytes], trailers: dict[str, str] | None) -> tuple[object, ...]:
    """Every call gets the same, one after the other: the order of several is not what is tried here."""
    response = call.response(created=1)
    outputs = []
    for place in range(len(call.calls)):
        outputs += [*response.receive_headers({"grpc-encoding": "gzip"}, call=place)]
    for place in range(len(call.calls)):
        for piece in pieces:
            outputs += response.receive_data(piece, call=place)
        outputs += response.receive_eof(call=place) if trailers is None else response.receive_trailers(trailers, call=place)
    cancelled = [output.call for output in outputs if isinstance(output, CancelCall)]
    assert len(cancelled) == len(set(cancelled))
    outputs = [output for output in outputs if not isinstance(output, CancelCall)]
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
        assert events[-1].startswith(WHOLE) == (response.error is None)
        for event in events:
            if event != "[DONE]":
                json.loads(event)
    elif response.error is not None:
        assert "error" in json.loads(body)
        assert head.status != 200
    else:
        assert head.status == 200
        assert "error" not in json.loads(body) or call.is_passthrough
    outcome = ACCEPTED if response.error is None else type(response.error).__name__
    return outcome, str(response.error), head.status, head.headers, body, response.usage


if __name__ == "__main__":
    sys.exit(run(__doc__, target, CORPUS))
