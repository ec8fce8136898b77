"""smg_rust.py vllm|sglang GRPC_PORT ADDRESS MODEL: the Rust gRPC servicer of the smg wheel, for an engine that shakes hands at ADDRESS."""

from __future__ import annotations

import signal
import sys
import tempfile
import time
from typing import Any

import model
import script
from smg import servicer

ENGINE_SECONDS = 30


def main() -> None:
    kind, port, address, folder = sys.argv[1:]
    servicer.init_servicer_tracing("info")
    sockets = tempfile.mkdtemp(prefix="ipc-", dir=".")  # the work folder of this run
    where = (f"127.0.0.1:{port}", f"ipc://{sockets}/e", address, folder)
    facts: dict[str, Any] = {
        "engine_count": 1,
        "tokenizer_dir": folder,
        "tokenizer_path": folder,
        "served_model_name": model.NAME,
        "max_context_length": model.CONTEXT,
        "vocab_size": model.VOCAB_SIZE,
        "eos_token_ids": [model.EOS],
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "engine_startup_timeout_secs": ENGINE_SECONDS,
    }
    if kind == "vllm":
        server = servicer.VllmGrpcServer(*where, **facts)
    else:
        facts |= {"max_req_input_len": model.CONTEXT - 1, "server_args_json": "{}", "scheduler_info_json": "{}", "sglang_version": "0.5.23"}
        server = servicer.SglangGrpcServer(*where, **facts)
    deadline = time.monotonic() + ENGINE_SECONDS
    while not _value(server, "engine_ready"):
        if time.monotonic() > deadline:
            sys.exit(f"no engine: {_value(server, 'last_error')}")
        time.sleep(0.05)
    server.set_serving(True)
    script.ready()
    signal.pause()


def _value(server: Any, name: str) -> Any:
    """A method in some releases, an attribute in others."""
    found = getattr(server, name)
    return found() if callable(found) else found


if __name__ == "__main__":
    main()
