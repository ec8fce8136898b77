"""fake_sglang_api.py FOLDER VERSION HTTP_PORT GRPC_PORT MODEL: SGLang's Rust server, from FOLDER, with a stand-in for its scheduler.

In SGLang the server is a Python extension inside the scheduler's process. Requests come from it as msgpack arrays; answers go back as
columns, a batch at a time. The scheduler matches stop strings, the server cuts the text at them.
"""

from __future__ import annotations

import array
import importlib.util
import json
import sys
import threading
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import model
import msgspec
import script
from sglang_wire import SAMPLING_PARAMS

FORCED_OUTPUT_TOKENS = 50  # of a request that does not stream the scheduler sends that many at a time


def load_extension(folder: Path) -> ModuleType:
    library = next(folder.rglob("_server.*.so"))
    spec = importlib.util.spec_from_file_location("_server", library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def settings(extension: Any, version: str, http_port: int, grpc_port: int, folder: str) -> dict[str, Any]:
    """What the server wants to know. All of it is required, and 0.5.22 refuses what came later."""
    found: dict[str, Any] = {
        "model_path": folder,
        "served_model_name": model.NAME,
        "tokenizer_path": folder,
        "revision": None,
        "load_format": "auto",
        "weight_version": "default",
        "host": "127.0.0.1",
        "port": http_port,
        "grpc_port": grpc_port,
        "log_level": "info",
        "log_level_http": None,
        "chat_template": None,
        "tool_call_parser": None,
        "reasoning_parser": None,
        "stream_response_default_include_usage": False,
        "tokenizer_worker_num": 1,
        "detokenizer_worker_num": 1,
        "skip_tokenizer_init": False,
        "skip_server_warmup": True,
        "incremental_streaming_output": False,
        "disaggregation_mode": extension.DisaggregationMode.Null,
        "preferred_sampling_params": None,
        "limit_mm_data_per_request": {},
        "allow_auto_truncate": False,
        "model_config": extension.ModelConfig(
            context_len=model.CONTEXT,
            vocab_size=model.VOCAB_SIZE,
            is_multimodal=False,
            model_type="qwen2",
            default_sampling_params=extension.DefaultSamplingParams(**model.SAMPLING_DEFAULTS),
        ),
        "enable_return_hidden_states": False,
        "num_reserved_tokens": 0,
        "version": version,
        "max_total_num_tokens": 100000,
    }
    if is_new(version):
        found |= {
            "limit_mm_data_per_request": [],
            "hicache_storage_backend": None,
            "hicache_storage_backend_extra_config": None,
            "hicache_storage_prefetch_policy": "best_effort",
            "hicache_write_policy": "write_through",
            "default_chat_template_kwargs": "{}",
            "health_generate_headers": {},
            "default_priority_value": None,
            "enable_request_header_overrides": False,
            "default_max_new_tokens": 128,
            "lora_ids": {},
            "enable_strict_thinking": False,
            "tokenizer_model_max_length": model.CONTEXT,
            "deployment_info": json.dumps(DEPLOYMENT),
            "launch_server_info": "{}",
            "load_snapshot_path": None,
            "load_snapshot_dp_size": 0,
            "load_snapshot_dp_rank": 0,
            "accelerator": "cpu",
            "num_accelerators": 1,
            "metrics": None,
        }
    return found


DEPLOYMENT: dict[str, Any] = {
    "disaggregation_bootstrap_port": None,
    "node_rank": 0,
    "nnodes": 1,
    "dp_size": 1,
    "dp_rank": None,
    "dist_init_addr": None,
    "base_gpu_id": 0,
    "page_size": 1,
    "dcp_size": 1,
    "max_running_requests": None,
    "max_prefill_tokens": 16384,
    "enable_dp_attention": False,
    "speculative_algorithm": None,
    "enable_hierarchical_cache": False,
    "hicache_ratio": 2.0,
    "hicache_size": 0,
    "hicache_write_policy": "write_through",
    "hicache_host_total_tokens": None,
    "kv_event_sources": [],
}


def is_new(version: str) -> bool:
    return tuple(int(part) for part in version.split(".")[:3]) >= (0, 5, 23)


def columns(rows: list[list[tuple[int, float]]] | None) -> tuple[list[Any], list[bytes]]:
    """Header and data columns of the families of logprobs: output and top output logprobs are filled, five families stay empty.

    `rows` are (id, logprob) pairs of each new token, the token itself first; SGLang's top logprobs may or may not include it.
    """
    if rows is None:
        return [], []
    chosen = [row[0] for row in rows]
    top = [pair for row in rows for pair in row[1:]]

    def data(pairs: list[tuple[int, float]]) -> list[bytes]:
        return [
            array.array("f", [logprob for _, logprob in pairs]).tobytes(),
            array.array("i", [token_id for token_id, _ in pairs]).tobytes(),
        ]

    # A flat family has one column of lengths, a ragged one two: positions of each request, entries of each position.
    header: list[Any] = [[len(chosen)], [], [len(rows)], [len(row) - 1 for row in rows], *([[]] * 8)]
    return header, [*data(chosen), b"", b"", *data(top), *([b""] * 7)]


class Scheduler:
    """The other side of the server's rings; one thread for each request."""

    def __init__(self, server: Any, version: str) -> None:
        self._server = server
        self._is_new = is_new(version)
        self._aborted: set[str] = set()

    def run(self) -> None:
        while True:
            self._server.wait_request(100)
            for request in self._server.recv_requests(64):
                self._receive(msgspec.msgpack.decode(request.header), dict(request.buffers))

    def _receive(self, header: list[Any], buffers: dict[str, Any]) -> None:
        kind, rid = header[:2]
        if kind == "AbortReq":
            script.log("abort", rid=rid)
            self._aborted.add(rid)
        elif kind == "GetInternalStateReq":
            self._server.push_control_result(rid, msgspec.msgpack.encode({"internal_state": {}}))
        elif "input_ids" in buffers:
            ids = [int(token_id) for token_id in buffers["input_ids"]]
            # The fields around the sampling parameters have kept their order: sampling, return_logprob, logprob_start_len,
            # top_logprobs_num, token_ids_logprob, stream.
            at = next(at for at, value in enumerate(header) if isinstance(value, list) and len(value) > 20)
            values, return_logprob, _, top, _, stream = header[at : at + 6]
            sampling = dict(zip(SAMPLING_PARAMS, values, strict=False))
            if not rid.startswith("HEALTH_CHECK"):
                script.log("request", rid=rid, ids=ids, sampling=sampling, return_logprob=return_logprob, top_logprobs=top, stream=stream)
            count = int(top or 0) if return_logprob else None
            threading.Thread(target=self._generate, args=(rid, ids, sampling, count, bool(stream)), daemon=True).start()
        else:
            script.log("other", header=header)

    def _generate(self, rid: str, prompt: list[int], sampling: dict[str, Any], logprobs: int | None, stream: bool) -> None:
        custom = sampling["custom_params"]
        custom = json.loads(custom) if isinstance(custom, str) else custom or {}
        answer = script.find(prompt, custom.get("mock"))
        limit, stops, eos = sampling["max_new_tokens"], sampling["stop_strs"] or [], () if sampling["ignore_eos"] else model.END_TOKENS
        steps = script.steps(answer, limit=limit, eos=eos, stop_ids=sampling["stop_token_ids"] or (), stops=stops)
        held: list[int] = []
        for step in script.hold(steps, stops) if stream else steps:
            time.sleep(answer.get("delay", 0.002))
            if rid in self._aborted:
                self._push(rid, held, {"type": "abort", "message": "Abort"}, prompt, answer, None)
                return
            held += step.ids
            if not (stream or step.finish or len(held) >= FORCED_OUTPUT_TOKENS):
                continue
            rows = None if logprobs is None else [script.logprobs(answer, token_id, logprobs) for token_id in held]
            self._push(rid, held, self._reason(step, limit, answer), prompt, answer, rows)
            held = []

    @staticmethod
    def _reason(step: script.Step, limit: int, answer: dict[str, Any]) -> dict[str, Any] | None:
        if step.finish == "error":
            status, message = script.failure(answer)
            return {"type": "abort", "message": message, "status_code": status, "err_type": "MockError"}
        reasons: dict[str, dict[str, Any]] = {
            "stop": {"type": "stop", "matched": step.matched},
            "length": {"type": "length", "length": limit or 0},
            "abort": {"type": "abort", "message": "Abort"},
        }
        return reasons.get(step.finish)

    def _push(
        self,
        rid: str,
        ids: list[int],
        finish: dict[str, Any] | None,
        prompt: list[int],
        answer: dict[str, Any],
        rows: list[list[tuple[int, float]]] | None,
    ) -> None:
        header: list[Any] = [[rid], [finish], [len(prompt)], [len(ids)]]
        if self._is_new:
            header += [[int(answer.get("cached", 0))], [0]]
        more, data = columns(rows)
        self._server.push_decode_result_batch(msgspec.msgpack.encode(header + more), [array.array("q", ids).tobytes(), *data])


def main() -> None:
    folder, version, http_port, grpc_port, model_folder = sys.argv[1:]
    extension = load_extension(Path(folder))
    server = extension.Server(extension.ServerArgs(**settings(extension, version, int(http_port), int(grpc_port), model_folder)))
    script.ready()
    Scheduler(server, version).run()


if __name__ == "__main__":
    main()
