"""Invariant tested: bodies where nothing is generated, and bytes of a server that embeds, end in a CodecError or one whole answer.

python fuzz/fuzz_embeddings.py --seconds 60 --seed 1
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from dialects import TOKENIZER, transcoders
from harness import ACCEPTED, Cut, run

from gaie_codec import BodyChunk, Call, CodecError, EmbeddingEvent, EndOfBody, ResponseHead, Transcoder, encode_error_response, encode_frame

WAYS = [transcoder for transcoder in transcoders().values() if transcoder.adapter.embed is not None and transcoder.passthrough is None]
PATHS = ("/v1/embeddings", "/v1/score", "/v1/rerank", "/tokenize", "/detokenize")
VECTOR = [0.5, -0.25, 1.0]
OK = {"grpc-status": "0"}
ENDINGS = (OK, OK, {"grpc-status": "3", "grpc-message": "no"}, {}, None)
USER = {"role": "user", "content": "Hi"}


def _frame(transcoder: Transcoder) -> bytes:
    coder = transcoder.adapter.embed
    assert coder is not None
    event = EmbeddingEvent(values=VECTOR, dimensions=len(VECTOR), prompt_tokens=2)
    return encode_frame(coder.encode_response(event).SerializeToString())


def _calls(transcoder: Transcoder) -> list[Call]:
    bodies = (
        ("/v1/embeddings", {"input": "Hi"}),
        ("/v1/embeddings", {"input": ["Hi", [5]], "encoding_format": "base64", "embed_dtype": "float16"}),
        ("/v1/embeddings", {"input": "Hi", "encoding_format": "bytes"}),
        ("/v1/rerank", {"query": "a", "documents": ["b", "c"]}),
    )
    return [transcoder.request("POST", path, (), json.dumps(fields).encode(), request_id="r") for path, fields in bodies]


CALLS = [_calls(transcoder) for transcoder in WAYS]
CORPUS = [
    json.dumps({**fields, "model": "", "tokens": TOKENIZER.encode("Hi", add_special_tokens=False)}).encode()
    for fields in (
        {"input": "Hi", "prompt": "Hi", "text_1": "a", "text_2": ["b"], "query": "a", "documents": ["b"]},
        {"input": [5, 6], "queries": ["a", "b"], "items": ["c", "d"], "truncate_prompt_tokens": 1, "truncation_side": "left"},
        {"input": [[5], [6, 7]], "encoding_format": "base64", "embed_dtype": "bfloat16", "endianness": "big", "dimensions": 2},
        {"input": ["a", "b"], "encoding_format": "bytes", "priority": 1, "user": "u", "request_id": "r", "top_n": 1},
        {"messages": [USER], "add_generation_prompt": True, "chat_template_kwargs": {"a": 1}, "add_special_tokens": True, "tools": None},
    )
] + [bytes((number,)) + _frame(transcoder) for number, transcoder in enumerate(WAYS)]


def target(data: bytes, cut: Cut) -> tuple[object, ...]:
    """The input is tried as a body at every endpoint, and as what a server answers to each of a dialect's calls."""
    transcoder = WAYS[sum(data) % len(WAYS)]
    asked = [_ask(transcoder, path, data, cut) for path in PATHS]
    calls = CALLS[data[0] % len(CALLS)] if data else CALLS[0]
    ending = ENDINGS[len(data) % len(ENDINGS)]
    answers = [_answer(call, cut(stream), ending) for stream in (data[1:], encode_frame(data[1:])) for call in calls]
    outcomes = [one[0] for one in (*asked, *answers)]
    return (ACCEPTED if ACCEPTED in outcomes else outcomes[0], *asked, *answers)


def _ask(transcoder: Transcoder, path: str, data: bytes, cut: Cut) -> tuple[object, ...]:
    try:
        local = transcoder.answer("POST", path, (), data, created=1)
        if local is not None:
            return ACCEPTED, local
        call = transcoder.request("POST", path, (), data, request_id="r")
    except CodecError as error:
        head, chunk, _ = encode_error_response(error)
        assert isinstance(head, ResponseHead)
        assert isinstance(chunk, BodyChunk)
        assert 400 <= head.status < 500
        json.loads(chunk.data)
        return type(error).__name__, error.param
    return _answer(call, cut(_frame(transcoder)), OK)


def _answer(call: Call, pieces: Sequence[bytes], trailers: dict[str, str] | None) -> tuple[object, ...]:
    response = call.response(created=1)
    outputs = []
    for place in range(len(call.calls)):
        outputs += [*response.receive_headers(call=place)]
        for piece in pieces:
            outputs += response.receive_data(piece, call=place)
        outputs += response.receive_eof(call=place) if trailers is None else response.receive_trailers(trailers, call=place)
    head, body, end = outputs
    assert isinstance(head, ResponseHead)
    assert isinstance(body, BodyChunk)
    assert isinstance(end, EndOfBody)
    assert response.ended
    if response.error is not None:
        assert head.status != 200
        assert "error" in json.loads(body.data)
        return type(response.error).__name__, str(response.error), head.status
    assert head.status == 200
    if dict(head.headers)["content-type"] == "application/json":
        json.loads(body.data)
    return ACCEPTED, body.data, head.headers, response.usage


if __name__ == "__main__":
    sys.exit(run(__doc__, target, CORPUS))
