"""The main job, live: an OpenAI client -> `gaie-codec serve` -> gRPC -> `gaie-codec sim`, a simulated vLLM server.

Starts both on free loopback ports, asks once for JSON and once for a stream with the real openai SDK, shows what each side saw, and
stops everything. Run it with `make demo`.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

import openai
from google.protobuf import text_format

from gaie_codec import Transcoder
from gaie_codec.tokenizer_sources import load_tokenizer

WIDTH = 58
SCRIPT = Path(__file__).parent / "demo_script.json"
QUESTION = [
    {"role": "system", "content": "Answer briefly."},
    {"role": "user", "content": "What does a gateway do? 🌍"},
]


@contextlib.contextmanager
def program(*arguments: str) -> Iterator[str]:
    """Run `gaie-codec ARGUMENTS` until the block ends; gives the HOST:PORT that it says it is ready at."""
    process = subprocess.Popen([sys.executable, "-m", "gaie_codec.cli", *arguments], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line.startswith("ready "):
            raise SystemExit(f"gaie-codec {arguments[0]} did not start: {line!r}")
        yield line.split("=", 1)[1].strip()
    finally:
        process.terminate()
        process.wait(timeout=20)


def side_by_side(left_title: str, left: str, right_title: str, right: str) -> None:
    """Print two texts as two columns."""
    columns = []
    for title, text in ((left_title, left), (right_title, right)):
        lines = [title, "-" * WIDTH]
        for line in text.splitlines():
            lines += textwrap.wrap(line, WIDTH, subsequent_indent="    ", drop_whitespace=False) or [""]
        columns.append(lines)
    for first, second in zip_longest(*columns, fillvalue=""):
        print(f"{first:<{WIDTH}}  |  {second}".rstrip())
    print()


def main() -> None:
    """Run the demo."""
    simulated = ("sim", "--dialect", "vllm.engine", "--listen", "127.0.0.1:0", "--model", "demo-model", "--script", str(SCRIPT))
    with program(*simulated) as grpc:
        print(f"gaie-codec sim    speaks vllm.engine over gRPC at {grpc}")
        arguments = ("serve", "--upstream", f"grpc://{grpc}", "--dialect", "vllm.engine", "--listen", "127.0.0.1:0")
        with program(*arguments) as http:
            print(f"gaie-codec serve  speaks the OpenAI API over HTTP at {http}\n")
            client = openai.OpenAI(base_url=f"http://{http}/v1", api_key="none", max_retries=0)

            request = {"model": "demo-model", "messages": QUESTION, "temperature": 0.7, "stop": ["\n\n"], "max_tokens": 64}
            # The bytes that serve sends are made by this very call.
            transcoder = Transcoder("vllm.engine", tokenizer=load_tokenizer("builtin"))
            call = transcoder.request("POST", "/v1/chat/completions", (), json.dumps(request).encode(), request_id="demo")
            message = transcoder.adapter.request_type.FromString(call.message)
            side_by_side(
                "POST /v1/chat/completions",
                json.dumps(request, indent=2, ensure_ascii=False),
                f"{call.path}, {len(call.frame)} bytes",
                text_format.MessageToString(message, use_short_repeated_primitives=True),
            )

            print("The answer as JSON")
            print("-" * WIDTH)
            print(json.dumps(client.chat.completions.create(**request).model_dump(exclude_none=True), indent=2, ensure_ascii=False))

            print("\nThe answer as it streams")
            print("-" * WIDTH)
            start = time.monotonic()
            stream = client.chat.completions.create(**request, stream=True, stream_options={"include_usage": True})
            for chunk in stream:
                for choice in chunk.choices:
                    text = choice.delta.content or ""
                    note = f"   finish_reason={choice.finish_reason}" if choice.finish_reason else ""
                    print(f"{1000 * (time.monotonic() - start):6.1f} ms  {text!r}{note}")
                if chunk.usage:
                    print(f"{1000 * (time.monotonic() - start):6.1f} ms  usage {chunk.usage.model_dump(exclude_none=True)}")


if __name__ == "__main__":
    main()
