"""A host of one page: embed the codec in your own asyncio program, with grpcio moving the bytes.

    python examples/grpcio_host.py 127.0.0.1:50051 '{"messages": [{"role": "user", "content": "Hi"}], "stream": true}'

It asks the server for its model and tokenizer, sends one chat completion, and prints what an HTTP client would get. A host without a
gRPC library sends `call.frame` with `call.headers` instead, and feeds `receive_headers`, `receive_data` and `receive_trailers`.
"""

from __future__ import annotations

import asyncio
import sys
import time
import uuid
from collections.abc import AsyncIterator

import grpc.aio

from gaie_codec import BodyChunk, Code, CodecError, Output, ResponseHead, Transcoder, adapters, encode_error_response, snapshots
from gaie_codec.text.archive import TokenizerArchive
from gaie_codec.text.huggingface import HuggingFaceTokenizer

SNAPSHOT = snapshots.load("vllm.engine", "smg-0.4.28")


async def ask(channel: grpc.aio.Channel, path: str, message: bytes = b"") -> AsyncIterator[bytes]:
    """The messages of one call, in bytes. A unary call is a stream of one."""
    async for answer in channel.unary_stream(path, request_serializer=None, response_deserializer=None)(message):
        yield answer


async def connect(channel: grpc.aio.Channel) -> Transcoder:
    """Learn from the server what has to be known of it."""
    adapter = adapters.get(SNAPSHOT)
    info = {path: SNAPSHOT.method_at(path).response.FromString(await anext(ask(channel, path))) for path in adapter.info_paths}
    model = adapter.decode_model_info(info)
    archive = TokenizerArchive()
    assert adapter.tokenizer_path is not None  # intree-0.14.0 has none: load_tokenizer("path/to/model") then
    chunk = SNAPSHOT.method_at(adapter.tokenizer_path).response
    async for answer in ask(channel, adapter.tokenizer_path):
        piece = chunk.FromString(answer)
        archive.receive(piece.data, piece.sha256)  # type: ignore[attr-defined]  # made from descriptors
    return Transcoder("vllm.engine", snapshot=SNAPSHOT.name, tokenizer=HuggingFaceTokenizer.from_files(archive.files()), model=model)


async def answer(channel: grpc.aio.Channel, transcoder: Transcoder, body: bytes) -> AsyncIterator[Output]:
    """What to send to the HTTP client, piece by piece."""
    try:
        call = transcoder.request("POST", "/v1/chat/completions", {}, body, request_id=uuid.uuid4().hex)
    except CodecError as error:
        for out in encode_error_response(error):
            yield out
        return
    response = call.response(created=int(time.time()))
    upstream = channel.unary_stream(call.path, request_serializer=None, response_deserializer=None)(call.message, metadata=call.metadata)
    outputs = list(response.receive_headers())
    try:
        async for message in upstream:
            outputs += response.receive_message(message)
            for out in outputs:
                yield out
            outputs = []
        outputs += response.receive_status(Code.OK)
    except grpc.aio.AioRpcError as error:
        outputs += response.receive_status(Code(error.code().value[0]), error.details() or "")
    finally:
        upstream.cancel()  # when the client has gone, so should the work
    for out in outputs:
        yield out


async def main(target: str, body: str) -> None:
    """Answer one request on stdout."""
    options = [("grpc.max_receive_message_length", -1)]
    async with grpc.aio.insecure_channel(target, options=options) as channel:
        transcoder = await connect(channel)
        async for out in answer(channel, transcoder, body.encode()):
            if isinstance(out, ResponseHead):
                print("HTTP", out.status, dict(out.headers), end="\n\n")
            elif isinstance(out, BodyChunk):
                print(out.data.decode(), end="", flush=True)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
