"""An ext_proc server that answers every message with the same, for bench/ext_proc.py: what the seam costs by itself."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import grpc.aio

from gaie_codec.ext_proc.messages import PROCESS_PATH, SERVICE, ProcessingRequest, ProcessingResponse


async def process(_: Any, context: Any) -> None:
    """One stream."""
    while (message := await context.read()) is not grpc.aio.EOF:
        kind = message.WhichOneof("request")
        answer = ProcessingResponse()
        part = getattr(answer, kind)
        part.SetInParent()
        if kind.endswith("_body"):
            body = getattr(message, kind)
            streamed = part.response.body_mutation.streamed_response
            streamed.body, streamed.end_of_stream = body.body, body.end_of_stream
        await context.write(answer)


async def main() -> None:
    """Serve until killed."""
    server = grpc.aio.server()
    handler = grpc.stream_stream_rpc_method_handler(process, ProcessingRequest.FromString, ProcessingResponse.SerializeToString)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {PROCESS_PATH.rpartition("/")[2]: handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(f"ready ext_proc=127.0.0.1:{port}", flush=True)
    await server.wait_for_termination()


asyncio.run(main())
