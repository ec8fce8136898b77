"""What a streamed token costs in the endpoint picker: the processor alone, and a whole process behind a real Envoy.

The processor is held against the same floor as the codec (bench/per_chunk.py). The process is held against an ext_proc server that
echoes what it gets, on the same grpc.aio: that is what the seam itself costs in Python. CPU time, because it says more than clocks on a
shared machine. Run with `make bench`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import grpc.aio
import httpx
import msgspec
from per_chunk import FLOOR, TEXT, TOKENS, measure, show
from tokenizers import Tokenizer as RawTokenizer
from tokenizers.decoders import DecodeStream

from gaie_codec import InferenceRequest, SamplingParams, TokensEvent, adapters, encode_frame, snapshots
from gaie_codec.ext_proc.messages import ProcessingRequest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "envoy")]

from harness import Envoy  # noqa: E402

from ext_proc_stream import GRPC_HEAD, TOKENIZER, Stream, chat, headers_message  # noqa: E402  # the tests' own data plane

STREAMS = 16
TOKENS_A_STREAM = 400
ROUNDS = 3
TICKS_S = os.sysconf("SC_CLK_TCK")


def processor() -> None:
    """One ProcessingRequest in, one ProcessingResponse out, for each token."""
    adapter = adapters.get(snapshots.load("vllm.engine"))
    ids = (TOKENIZER.encode(TEXT, add_special_tokens=False) * TOKENS)[:TOKENS]
    payloads = [adapter.encode_response(TokensEvent(token_ids=[one], prompt_tokens=9)).SerializeToString() for one in ids]
    wire = []
    for payload in payloads:
        message = ProcessingRequest()
        message.response_body.body = encode_frame(payload)
        wire.append(message.SerializeToString())
    raw = RawTokenizer.from_str((ROOT / "src/gaie_codec/_builtin_tokenizer/tokenizer.json").read_text())

    def floor() -> None:
        parse, stream = adapter.response_type.FromString, DecodeStream(skip_special_tokens=True)
        for payload, token_id in zip(payloads, ids, strict=True):
            parse(payload)
            msgspec.json.encode(stream.step(raw, token_id))

    def streamed() -> None:
        receive = Stream().ask(chat(stream=True, max_tokens=TOKENS + 1)).processor.receive
        receive(headers_message("response_headers", GRPC_HEAD))
        for data in wire:
            for answer in receive(ProcessingRequest.FromString(data)):
                answer.SerializeToString()

    show(measure({FLOOR: floor, "ext_proc: ProcessingRequest to ProcessingResponse": streamed}, TOKENS), FLOOR)


@contextlib.contextmanager
def running(*command: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A program that says `ready KIND=ADDRESS`, and the address."""
    with subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        try:
            assert process.stdout is not None
            ready = re.match(r"ready \w+=(\S+)", process.stdout.readline())
            assert ready is not None
            yield process, ready[1]
        finally:
            process.terminate()


def cpu_s(process: int) -> float:
    """Seconds of CPU that a process has used."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS_S


async def load(url: str) -> None:
    """All streams at once, each read to its end."""
    body = json.dumps({"messages": [{"role": "user", "content": "Hi"}], "stream": True, "max_tokens": TOKENS_A_STREAM}).encode()

    async def one(client: httpx.AsyncClient) -> None:
        headers = {"content-type": "application/json"}
        async with client.stream("POST", f"{url}/v1/chat/completions", content=body, headers=headers) as answer:
            assert answer.status_code == 200
            async for _ in answer.aiter_raw():
                pass

    async with httpx.AsyncClient(timeout=60, limits=httpx.Limits(max_connections=STREAMS)) as client:
        await asyncio.gather(*(one(client) for _ in range(STREAMS)))


async def load_grpc(url: str) -> None:
    """The same by the model server's own gRPC."""
    adapter = adapters.get(snapshots.load("vllm.engine"))
    sampling = SamplingParams(max_tokens=TOKENS_A_STREAM)
    request = InferenceRequest(request_id="b", prompt_token_ids=[1, 2], stream=True, sampling=sampling)
    message = adapter.encode_request(request).SerializeToString()

    async def one(channel: grpc.aio.Channel) -> None:
        async for _ in channel.unary_stream(adapter.generate_path)(message):
            pass

    async with grpc.aio.insecure_channel(url.removeprefix("http://")) as channel:
        await asyncio.gather(*(one(channel) for _ in range(STREAMS)))


def behind_envoy() -> None:
    """CPU per token of the ext_proc process and of Envoy."""
    with tempfile.TemporaryDirectory() as scratch:
        script = Path(scratch) / "script.json"
        script.write_text(json.dumps({"text": "word " * TOKENS_A_STREAM, "delay_ms": 2}))
        with (
            running("-m", "gaie_codec.cli", "sim", "--listen", "127.0.0.1:0", "--script", str(script)) as (_, sim),
            running("-m", "gaie_codec.cli", "ext-proc", "--listen", "127.0.0.1:0", "--endpoint", sim) as (ours, address),
            running("bench/echo_ext_proc.py") as (echo, echo_address),
        ):
            before_echo = Envoy(Path(scratch, "e"), ext_proc=echo_address, upstream=sim)
            before_ours = Envoy(Path(scratch, "o"), ext_proc=address)
            print(f"\nCPU per token, {STREAMS} streams at once:")
            for name, process, envoy, clients in (
                ("an echo, gRPC clients", echo, before_echo, load_grpc),
                ("ext-proc, grpc-in-grpc-out", ours, before_ours, load_grpc),
                ("ext-proc, http-in-grpc-out", ours, before_ours, load),
            ):
                asyncio.run(clients(envoy.url))
                before = cpu_s(process.pid), cpu_s(envoy.process.pid)
                for _ in range(ROUNDS):
                    asyncio.run(clients(envoy.url))
                count = ROUNDS * STREAMS * TOKENS_A_STREAM
                after = cpu_s(process.pid), cpu_s(envoy.process.pid)
                ours_us, envoys_us = ((now - then) / count * 1e6 for now, then in zip(after, before, strict=True))
                print(f"{name:56s} {ours_us:5.1f} us ext_proc + {envoys_us:5.1f} us Envoy")
            before_echo.stop()
            before_ours.stop()


if __name__ == "__main__":
    processor()
    behind_envoy()
