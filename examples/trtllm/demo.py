"""A sixth server, live: an HTTP client -> the library's ASGI application -> gRPC -> a fake TensorRT-LLM made of the published stubs.

    python examples/trtllm/demo.py

All in one process. The library is as installed: the dialect is `adapter.py` and the schema beside it. Needs `pip install httpx
smg-grpc-proto==0.4.28`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

import grpc.aio
import httpx
import schema
from adapter import adapter
from google.protobuf import text_format
from smg_grpc_proto.generated import trtllm_service_pb2 as pb
from smg_grpc_proto.generated import trtllm_service_pb2_grpc as rpc

from gaie_codec import Transcoder
from gaie_codec.asgi.app import create_app
from gaie_codec.text import Tokenizer
from gaie_codec.tokenizer_sources import load_tokenizer
from gaie_codec.upstream import Upstream, fetch_model_info

ANSWER = "A gateway stands before servers. \N{EARTH GLOBE EUROPE-AFRICA} STOP It knows all of them."
QUESTION = {"messages": [{"role": "user", "content": "What does a gateway do?"}], "max_tokens": 64, "stop": " STOP"}


class FakeTrtllm(rpc.TrtllmServiceServicer):
    """Says one text, and fills messages as TensorRT-LLM's servicer does: deltas first, all of it in the end."""

    def __init__(self, tokenizer: Tokenizer, answer: str) -> None:
        self._tokenizer = tokenizer
        self._token_ids = [*self._encode(answer), min(tokenizer.eos_token_ids)]

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)

    async def Generate(self, request: Any, context: Any) -> AsyncIterator[Any]:
        """One choice after the other; the servicer interleaves them."""
        print(f"--- {pb.DESCRIPTOR.package}.GenerateRequest, as the server got it")
        print(text_format.MessageToString(request, use_short_repeated_primitives=True))
        if not request.max_tokens:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "max_tokens is required")
        for index in range(max(request.sampling_config.num_return_sequences, 1)):
            for message in self._choice(request, index):
                yield message

    def _choice(self, request: Any, index: int) -> Iterator[Any]:
        words: list[tuple[str | int | None, list[int]]] = [(token_id, [token_id]) for token_id in request.stop_token_ids]
        words += [(text, self._encode(text)) for text in request.stop]
        facts = {"sequence_index": index, "prompt_tokens": len(request.tokenized.input_token_ids)}
        said: list[int] = []
        sent = 0
        complete = pb.GenerateComplete(finish_reason="length", **facts)
        matched: str | int | None = None
        for token_id in self._token_ids[: request.max_tokens]:
            said.append(token_id)
            matched, word = next((pair for pair in words if said[-len(pair[1]) :] == pair[1]), (None, []))
            if word and not request.include_stop_token_in_output:
                del said[-len(word) :]  # the first of these may have been sent
            if request.streaming and said[sent:]:
                chunk = pb.GenerateStreamChunk(token_ids=said[sent:], completion_tokens=len(said), **facts)
                yield pb.GenerateResponse(request_id=request.request_id, chunk=chunk)
                sent = len(said)
            if word or (token_id in self._tokenizer.eos_token_ids and not request.ignore_eos):
                complete.finish_reason = "stop"
                break
        if isinstance(matched, str):
            complete.matched_stop_str = matched
        elif matched is not None:
            complete.matched_token_id = matched
        complete.output_token_ids.extend(said)
        complete.completion_tokens = len(said)
        yield pb.GenerateResponse(request_id=request.request_id, complete=complete)

    async def GetModelInfo(self, request: Any, context: Any) -> Any:
        """The model, as far as this server knows it."""
        return pb.GetModelInfoResponse(model_id="demo-model", max_seq_len=2048, vocab_size=self._tokenizer.vocab_size)


async def answers(bodies: Sequence[dict[str, Any]]) -> None:
    """Start the server, ask it for its model, and print what an HTTP client gets for each body."""
    tokenizer = load_tokenizer("builtin")
    server = grpc.aio.server()
    rpc.add_TrtllmServiceServicer_to_server(FakeTrtllm(tokenizer, ANSWER), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    upstream = Upstream(f"grpc://127.0.0.1:{port}")
    ours = adapter(schema.load())
    transcoder = Transcoder(ours, tokenizer=tokenizer, model=await fetch_model_info(upstream, ours))
    transport = httpx.ASGITransport(create_app(upstream, transcoder))  # uvicorn.run(create_app(...)) serves the same on a port
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
        for body in bodies:
            response = await client.post("/v1/chat/completions", json=body)
            print(f"--- HTTP {response.status_code} {response.headers['content-type']}")
            print(response.text, end="\n\n")
    await upstream.close()
    await server.stop(None)


if __name__ == "__main__":
    refused = {"logit_bias": {"5": 1.0}}
    asyncio.run(answers([{**QUESTION, "stream": True}, QUESTION, QUESTION | refused]))
