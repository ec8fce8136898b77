"""What one streamed token costs: gRPC frame in, SSE bytes out, against the floor of what has to be done anyhow.

The floor is upb's parse of the message, one `DecodeStream.step` of the tokenizers package, and the JSON encoding of one string, measured
in the same run. Ratios travel between machines, nanoseconds do not. Run with `make bench`.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from importlib import resources
from pathlib import Path

import msgspec
from tokenizers import Tokenizer as RawTokenizer
from tokenizers.decoders import DecodeStream

from gaie_codec import Call, EndOfBody, ModelInfo, TokensEvent, Transcoder, encode_frame
from gaie_codec._conventions import Teller
from gaie_codec._events import FinishEvent
from gaie_codec.adapters import DIALECTS
from gaie_codec.tokenizer_sources import load_tokenizer

TOKENS = 2000
ROUNDS = 25
CUMULATIVE_TOKENS = 200
FLOOR = "floor: parse + DecodeStream.step + JSON of one string"
TEXT = "The quick brown fox jumps over the lazy dog, and then it rests for a while in the shade of an old tree. "


def measure(works: dict[str, Callable[[], object]], count: int) -> dict[str, list[float]]:
    """Nanoseconds per item of each work in each round. The works take turns, so that a slow moment of the machine hits all of them."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(ROUNDS):
        for name, work in works.items():
            start = time.perf_counter_ns()
            work()
            times[name].append((time.perf_counter_ns() - start) / count)
    return times


def show(times: dict[str, list[float]], floor: str) -> None:
    """One line for each work: nanoseconds, and the ratio to the floor."""
    for name, rounds in times.items():
        ratio = statistics.median(mine / floors for mine, floors in zip(rounds, times[floor], strict=True))
        print(f"{name:56s} {statistics.median(rounds):7.0f} ns   {ratio:4.2f}")


def every_dialect() -> None:
    """`receive_message` of each dialect as its servers speak, against the parse of its messages and the JSON of one string.

    Cumulative answers are short here: a message that repeats everything costs as much as it is long.
    """
    tokenizer = load_tokenizer("builtin")
    ids = (tokenizer.encode(TEXT, add_special_tokens=False) * CUMULATIVE_TOKENS)[:CUMULATIVE_TOKENS]
    body = json.dumps({"model": "", "messages": [{"role": "user", "content": "hi"}], "stream": True, "temperature": 1}).encode()
    for dialect in DIALECTS:
        transcoder = Transcoder(dialect, tokenizer=tokenizer, model=ModelInfo(max_model_len=1 << 20), passthrough=False)
        adapter = transcoder.adapter
        call = transcoder.request("POST", "/v1/chat/completions", (), body, request_id="bench")
        teller = Teller(adapter.convention, call.inference, sends_text=adapter.sends_text)
        detokenizer = tokenizer.detokenizer(())
        gained = [TokensEvent(token_ids=[token_id], text=detokenizer.decode((token_id,)), prompt_tokens=9) for token_id in ids]
        events = [event for one in gained for event in teller.gain(one)]
        payloads = [adapter.encode_response(event).SerializeToString() for event in events]
        parse = adapter.response_type.FromString

        def floor(payloads: list[bytes] = payloads, parse: Callable[[bytes], object] = parse) -> None:
            for payload in payloads:
                parse(payload)
                msgspec.json.encode("text")

        def stream(payloads: list[bytes] = payloads, call: Call = call) -> None:
            response = call.response(created=0)
            response.receive_headers()
            for payload in payloads:
                response.receive_message(payload)
            assert response.error is None

        show(measure({f"{dialect}: parse + JSON": floor, f"{dialect}: receive_message": stream}, len(payloads)), f"{dialect}: parse + JSON")


def parsed() -> None:
    """`receive_message` where reasoning and tool calls are told apart, against the same text where nothing is looked for."""
    tokenizer = load_tokenizer(str(Path(__file__).parents[1] / "tests" / "golden" / "model"))
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    begun = '<tool_call>\n{"name": "f", "arguments": {"text": "'
    rows = {
        "no parser": ("", "none", "none"),
        "hermes: content, where a call could begin": ("", "hermes", "none"),
        "hermes: arguments of a call": (begun, "hermes", "none"),
        "qwen3: reasoning": ("<think>", "none", "qwen3"),
        "qwen3: content after it": ("<think></think>", "none", "qwen3"),
    }
    works = {}
    for name, (before, tools, reasoning) in rows.items():
        transcoder = Transcoder(
            "vllm.engine",
            tokenizer=tokenizer,
            model=ModelInfo(max_model_len=1 << 20),
            tool_call_parser=tools,
            reasoning_parser=reasoning,
        )
        body = {"messages": [{"role": "user", "content": "hi"}], "stream": True, **({"tools": [tool]} if tools != "none" else {})}
        call = transcoder.request("POST", "/v1/chat/completions", (), json.dumps(body).encode(), request_id="bench")
        ids = tokenizer.encode(before + TEXT * TOKENS, add_special_tokens=False)[:TOKENS]
        events = [TokensEvent(token_ids=[token_id], prompt_tokens=9, completion_tokens=1) for token_id in ids]
        payloads = [transcoder.adapter.encode_response(event).SerializeToString() for event in events]

        def stream(payloads: list[bytes] = payloads, call: Call = call) -> None:
            response = call.response(created=0)
            response.receive_headers()
            for payload in payloads:
                response.receive_message(payload)
            assert response.error is None

        works[name] = stream
    show(measure(works, TOKENS), "no parser")


def main() -> None:
    """Print the tables."""
    tokenizer = load_tokenizer("builtin")
    raw = RawTokenizer.from_str((resources.files("gaie_codec") / "_builtin_tokenizer" / "tokenizer.json").read_text())
    ids = (tokenizer.encode(TEXT, add_special_tokens=False) * TOKENS)[:TOKENS]
    transcoder = Transcoder("vllm.engine", tokenizer=tokenizer, model=ModelInfo(max_model_len=1 << 20))
    adapter = transcoder.adapter
    events = [TokensEvent(token_ids=[token_id], prompt_tokens=9, completion_tokens=1) for token_id in ids]
    payloads = [adapter.encode_response(event).SerializeToString() for event in events]
    frames = [encode_frame(payload) for payload in payloads]
    last = encode_frame(adapter.encode_response(FinishEvent(token_ids=ids[-1:], finish_reason="length")).SerializeToString())

    def call(**extra: object) -> Call:
        body = {"model": "", "messages": [{"role": "user", "content": "hi"}], "stream": True, **extra}
        return transcoder.request("POST", "/v1/chat/completions", (), json.dumps(body).encode(), request_id="bench")

    def floor() -> None:
        parse, stream, encode = adapter.response_type.FromString, DecodeStream(skip_special_tokens=True), msgspec.json.encode
        for payload, token_id in zip(payloads, ids, strict=True):
            parse(payload)
            encode(stream.step(raw, token_id))

    def floor_without_detokenizing() -> None:
        parse, encode = adapter.response_type.FromString, msgspec.json.encode
        for payload in payloads:
            parse(payload)
            encode("text")

    def run(prepared: Call, chunks: list[bytes]) -> Callable[[], None]:
        def stream() -> None:
            response = prepared.response(created=0)
            response.receive_headers()
            for chunk in chunks:
                response.receive_data(chunk)
            response.receive_data(last)
            assert isinstance(response.receive_trailers([("grpc-status", "0")])[-1], EndOfBody)

        return stream

    def run_messages(prepared: Call) -> Callable[[], None]:
        def stream() -> None:
            response = prepared.response(created=0)
            response.receive_headers()
            for payload in payloads:
                response.receive_message(payload)
            response.receive_data(last)
            response.receive_trailers([("grpc-status", "0")])

        return stream

    plain = call()
    batched = [b"".join(frames[start : start + 16]) for start in range(0, TOKENS, 16)]
    times = measure(
        {
            FLOOR: floor,
            "floor without detokenizing": floor_without_detokenizing,
            "receive_data, one frame a call": run(plain, frames),
            "receive_data, 16 frames a call": run(plain, batched),
            "receive_message (the gRPC library took the frames)": run_messages(plain),
            "receive_data with a stop string": run(call(stop=["\n\nHuman:"]), frames),
            "receive_data with continuous usage": run(call(stream_options={"include_usage": True, "continuous_usage_stats": True}), frames),
            "unary fold of the same frames": run(call(stream=False), frames),
        },
        TOKENS,
    )
    show(times, FLOOR)
    every_dialect()
    parsed()


if __name__ == "__main__":
    main()
