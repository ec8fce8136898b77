"""G3 of tests/test_gotchas.py, which takes a real Envoy: two full-duplex filters in a row, and bodies that need many messages."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import httpx
from stack import envoy_of, ext_proc_of, make_sim, wait_until
from test_through_behind import JsonPicker

from test_e2e import ask


def test_g3_two_full_duplex_filters_lose_nothing_of_long_bodies(tmp_path: Path):
    with ExitStack() as stack:
        sim = make_sim(max_model_len=4_000_000)
        stack.callback(sim.stop)
        picker = JsonPicker()
        stack.callback(picker.server.stop)
        picker.address = f"127.0.0.1:{sim.port}"
        own = ("--listen", "127.0.0.1:0", "--picker", "none", "--dialect", "vllm.engine", "--tokenizer", "builtin")
        ext_proc = stack.enter_context(ext_proc_of(tmp_path, *own))
        envoy = stack.enter_context(envoy_of(tmp_path, ext_proc.address, behind=picker.server.address))
        said = " ".join(map(str, range(2_000)))
        messages = [{"role": "user", "content": "many words " * 40_000}, *ask({"text": said})]

        def post(stream: bool) -> httpx.Response:
            return httpx.post(f"{envoy.url}/v1/chat/completions", json={"messages": messages, "stream": stream}, timeout=60)

        # Until the server has told of its context, that of the tokenizer's model counts.
        wait_until(lambda: post(stream=False).status_code == 200)
        for stream in (False, True):
            answer = post(stream)
            assert len(picker.requests[-1]["messages"][0]["content"]) == 440_000
            if stream:
                assert answer.text.endswith("data: [DONE]\n\n")
            else:
                assert answer.json()["choices"][0]["message"]["content"] == said
            assert picker.answers[-1][2] == answer.content
        assert picker.server.errors == []
