"""fake_vllm_core.py ADDRESS [VERSION]: a stand-in for vLLM's EngineCore process, for a front end that waits for one remote engine.

The wire is ZMQ with msgpack. Handshake at ADDRESS: HELLO up, socket addresses down, READY up. Requests and outputs are positional
arrays in the order of the fields of `EngineCoreRequest` and `EngineCoreOutput`; stop strings and text are the front end's business.
"""

from __future__ import annotations

import asyncio
import struct
import sys
import time
from typing import Any

import msgspec
import script
import zmq
import zmq.asyncio
from model import CONTEXT

encode = msgspec.msgpack.Encoder().encode
decode = msgspec.msgpack.Decoder().decode

ADD, ABORT, UTILITY = 0, 1, 3  # the first byte of a request's first frame
FINISH = {"stop": 0, "length": 1, "abort": 2, "error": 3, "repetition": 4}
REQUEST = (
    "request_id prompt_token_ids mm_features sampling_params pooling_params arrival_time lora_request cache_salt data_parallel_rank "
    "prompt_embeds prompt_is_token_ids client_index current_wave priority trace_headers resumable external_req_id reasoning_ended "
    "reasoning_parser_kwargs abort_immediately session_id kv_hints"
).split()
UTILITIES = {
    "get_supported_tasks": ["generate"],
    "is_sleeping": False,
    "reset_prefix_cache": True,
    "wake_up": True,
    "list_loras": [],
    "is_scheduler_paused": False,
    "get_weight_version": "default",
}
HELLO = {"local": False, "headless": True, "parallel_config_hash": None}
READY = {
    "max_model_len": CONTEXT,
    "num_gpu_blocks": 100,
    "block_size": 16,
    "dp_stats_address": None,
    "dtype": "float32",
    "world_size": 1,
    "data_parallel_size": 1,
    "tensor_parallel_size": 1,
    "pipeline_parallel_size": 1,
    "decode_context_parallel_size": 1,
    "data_parallel_rank": 0,
    "max_num_seqs": 256,
    "max_num_batched_tokens": 8192,
    "instance_id": "mock",
    "supports_lora": False,
    "max_loras": 0,
    "kv_cache_size_tokens": 1600,
    "kv_cache_max_concurrency": 1.0,
}


def output_fields(version: tuple[int, ...]) -> list[str]:
    """The fields of an output. Readers accept an array that stops early, but not one with more than they know."""
    fields = "request_id new_token_ids new_logprobs new_prompt_logprobs_tensors pooling_output finish_reason stop_reason events"
    fields += " kv_transfer_params" + (" ec_transfer_params" if version >= (0, 26) else "")
    fields += " trace_headers prefill_stats routed_experts num_nans_in_logits"
    if version >= (0, 33):
        fields += " mm_cache_miss_hashes new_sampling_mask spec_decode_metrics prompt_token_id_logprobs error"
    return fields.split()


def tensors(rows: list[list[tuple[int, float]]]) -> list[Any]:
    """(id, logprob) pairs of each position, the sampled token first -> the tensors of ids, logprobs and the sampled tokens' ranks."""

    def tensor(dtype: str, code: str, shape: list[int], values: list[Any]) -> list[Any]:
        return [dtype, shape, msgspec.msgpack.Ext(3, struct.pack(f"<{len(values)}{code}", *values))]

    shape = [len(rows), len(rows[0]) if rows else 0]
    ranks = [1 + sum(logprob > row[0][1] for _, logprob in row[1:]) for row in rows]
    return [
        tensor("<i8", "q", shape, [token_id for row in rows for token_id, _ in row]),
        tensor("<f4", "f", shape, [logprob for row in rows for _, logprob in row]),
        tensor("<i8", "q", shape[:1], ranks),
        None,
    ]


class Core:
    """The engine behind one front end."""

    def __init__(self, version: str) -> None:
        self.version = version
        self._fields = output_fields(tuple(int(part) for part in version.split(".")[:2]))
        self._context = zmq.asyncio.Context()
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def _connect(self, kind: int, address: str) -> Any:
        socket = self._context.socket(kind)
        if kind == zmq.DEALER:
            socket.setsockopt(zmq.IDENTITY, struct.pack("<H", 0))
        socket.connect(address)
        return socket

    async def run(self, address: str) -> None:
        handshake = self._connect(zmq.DEALER, address)
        await handshake.send(encode(HELLO | {"status": "HELLO"}))
        addresses = decode((await handshake.recv_multipart())[0])["addresses"]
        inputs = self._connect(zmq.DEALER, addresses["inputs"][0])
        self._outputs = self._connect(zmq.PUSH, addresses["outputs"][0])
        await inputs.send(encode(READY | {"vllm_version": self.version}))
        if addresses.get("coordinator_input"):
            coordinator = self._connect(zmq.SUB, addresses["coordinator_input"])
            coordinator.setsockopt(zmq.SUBSCRIBE, b"")
            await coordinator.recv_multipart()
        await handshake.send(encode(HELLO | {"status": "READY"}))
        script.ready()
        while True:
            kind, *rest = await inputs.recv_multipart()
            await self._receive(kind[0], decode(rest[0]) if rest and rest[0] else None)

    async def _receive(self, kind: int, body: Any) -> None:
        if kind == ADD:
            script.log("request", **dict(zip(REQUEST, body, strict=False)))
            request_id, prompt, _, sampling = body[:4]
            self._tasks[request_id] = asyncio.create_task(self._generate(request_id, prompt or [], sampling or {}))
        elif kind == ABORT:
            script.log("abort", request_ids=body)
            for request_id in body:
                if task := self._tasks.pop(request_id, None):
                    task.cancel()
                    await self._send(request_id, [], "abort")
        elif kind == UTILITY:
            _, call_id, method, _ = body
            await self._outputs.send(encode([0, [], None, time.time(), [call_id, None, [None, UTILITIES.get(method)]], None]))

    async def _generate(self, request_id: str, prompt: list[int], sampling: dict[str, Any]) -> None:
        answer = script.find(prompt, ((sampling.get("extra_args") or {}).get("kv_transfer_params") or {}).get("mock"))
        cached = int(answer.get("cached", 0))
        more: dict[str, Any] = {
            "prefill_stats": {
                "num_prompt_tokens": len(prompt),
                "num_computed_tokens": len(prompt) - cached,
                "num_cached_tokens": cached,
                "num_local_cached_tokens": 0,
                "num_external_cached_tokens": 0,
                "num_cache_creation_tokens": 0,
            }
        }
        if sampling.get("prompt_logprobs") is not None and len(prompt) > 1:
            rows = [script.logprobs(answer, token_id, sampling["prompt_logprobs"]) for token_id in prompt[1:]]
            more["new_prompt_logprobs_tensors"] = tensors(rows)
        eos = sampling.get("_eos_token_id")
        steps = script.steps(
            answer, limit=sampling.get("max_tokens"), eos=() if eos is None else (eos,), stop_ids=sampling.get("stop_token_ids") or ()
        )
        try:
            for step in steps:
                await asyncio.sleep(answer.get("delay", 0))
                if step.ids and sampling.get("logprobs") is not None:
                    more["new_logprobs"] = tensors([script.logprobs(answer, token_id, sampling["logprobs"]) for token_id in step.ids])
                if step.finish == "error":
                    more["error"] = self._error(answer)
                if step.finish:
                    more |= {"kv_transfer_params": answer.get("kv_out"), "stop_reason": step.matched if step.matched != eos else None}
                await self._send(request_id, step.ids, step.finish, **more)
                more = {}
        finally:
            self._tasks.pop(request_id, None)

    @staticmethod
    def _error(answer: dict[str, Any]) -> dict[str, Any]:
        status, message = script.failure(answer)
        code = {400: "validation_error", 503: "engine_paused"}.get(status, "internal_error")
        return {"code": code, "message": message, "type": "", "retryable": status == 503}

    async def _send(self, request_id: str, ids: list[int], finish: str = "", **more: Any) -> None:
        values = {"request_id": request_id, "new_token_ids": ids, "finish_reason": FINISH[finish] if finish else None, **more}
        row = [values.get(name) for name in self._fields]
        row = row[: 1 + max(at for at, value in enumerate(row) if value is not None)]
        if len(row) > (nans := self._fields.index("num_nans_in_logits")):
            row[nans] = 0
        await self._outputs.send(encode([0, [row], None, time.time(), None, [request_id] if finish else None]))


if __name__ == "__main__":
    asyncio.run(Core((sys.argv[2:] or ["0.33.0"])[0]).run(sys.argv[1]))
