"""fake_smg_scheduler.py ADDRESS: a stand-in for SGLang's scheduler on the ZMQ and msgpack wire of smg's Rust servicer.

Stop strings do not come this far: the servicer sends ids alone, and leaves stop strings to whoever makes text of them.
"""

from __future__ import annotations

import asyncio
import struct
import sys
from typing import Any

import msgspec
import script
import zmq
import zmq.asyncio
from model import CONTEXT, END_TOKENS
from sglang_wire import SAMPLING_PARAMS

encode, decode = msgspec.msgpack.encode, msgspec.msgpack.decode

ADD, ABORT = 0, 1  # the first byte of a request's first frame
# Requests are positional arrays. The engine announces the order it wants, and gets it.
LAYOUTS = {
    "TokenizedGenerateReqInput": (
        "rid http_worker_ipc input_text input_ids input_embeds mm_inputs token_type_ids sampling_params return_logprob logprob_start_len "
        "top_logprobs_num token_ids_logprob stream return_sampling_mask return_flat_raw_top_logprobs return_hidden_states "
        "return_routed_experts routed_experts_start_len return_indexer_topk session_id session_params lora_id custom_logit_processor "
        "positional_embed_overrides bootstrap_host bootstrap_port bootstrap_room bootstrap_pair_key decode_tp_size routed_dp_rank "
        "disagg_prefill_dp_rank routing_key require_reasoning priority extra_key no_logs return_bytes return_entropy "
        "need_wait_for_mm_inputs num_items_assigned encoder_urls multi_item_delimiter_indices token_indices_to_pool time_stats cache_salt "
        "kv_hints pp_prefetch_ticketed sampling_logprobs_mode lora_name"
    ).split(),
    "TokenizedEmbeddingReqInput": (
        "rid http_worker_ipc input_text input_ids mm_inputs token_type_ids sampling_params lora_id positional_embed_overrides "
        "routed_dp_rank priority dimensions return_pooled_hidden_states multi_item_delimiter_indices token_indices_to_pool decision_layout "
        "time_stats lora_name"
    ).split(),
    "SamplingParams": list(SAMPLING_PARAMS),
}
HELLO = {"local": True, "headless": True, "parallel_config_hash": None}
READY = {
    "max_model_len": CONTEXT,
    "num_gpu_blocks": 100,
    "block_size": 1,
    "dp_stats_address": None,
    "dtype": "float32",
    "multimodal_encoder_dtype": None,
    "vllm_version": "sglang-0.5.23",
    "world_size": 1,
    "data_parallel_size": 1,
    "tensor_parallel_size": 1,
    "pipeline_parallel_size": 1,
    "decode_context_parallel_size": 1,
    "data_parallel_rank": 0,
    "max_num_seqs": 64,
    "max_num_batched_tokens": 8192,
    "instance_id": "mock",
    "kv_cache_size_tokens": 1000,
    "kv_cache_max_concurrency": None,
    "kv_events_config": None,
    "positional_layouts": LAYOUTS,
}


class Scheduler:
    """The engine behind one servicer."""

    def __init__(self) -> None:
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
        addresses = decode((await handshake.recv_multipart())[-1])["addresses"]
        await handshake.send(encode(HELLO | {"status": "READY"}))
        inputs = self._connect(zmq.DEALER, addresses["inputs"][0])
        self._outputs = self._connect(zmq.PUSH, addresses["outputs"][0])
        await inputs.send(encode(READY))
        script.ready()
        while True:
            kind, body, *_ = await inputs.recv_multipart()
            self._receive(kind[0], decode(body))

    def _receive(self, kind: int, body: list[Any]) -> None:
        if kind == ADD:
            request = dict(zip(["type", *LAYOUTS.get(body[0], [])], body, strict=False))
            sampling = dict(zip(LAYOUTS["SamplingParams"], request.get("sampling_params") or [], strict=False))
            script.log("request", **(request | {"sampling_params": sampling}))
            self._tasks[request["rid"]] = asyncio.create_task(self._generate(request, sampling))
        elif kind == ABORT:
            script.log("abort", request_ids=body)
            for rid in body:
                if rid in self._tasks:
                    self._tasks[rid].cancel()

    async def _generate(self, request: dict[str, Any], sampling: dict[str, Any]) -> None:
        rid, prompt = request["rid"], list(request.get("input_ids") or [])
        custom = sampling.get("custom_params")
        answer = script.find(prompt, custom.get("mock") if isinstance(custom, dict) else None)
        eos = () if sampling.get("ignore_eos") else END_TOKENS
        steps = script.steps(answer, limit=sampling.get("max_new_tokens"), eos=eos, stop_ids=sampling.get("stop_token_ids") or ())
        used, counts = 0, (len(prompt), int(answer.get("cached", 0)))
        try:
            for step in steps:
                await asyncio.sleep(answer.get("delay", 0))
                used += len(step.ids)
                rows = [script.logprobs(answer, token_id, 0)[0] for token_id in step.ids] if request.get("return_logprob") else []
                status, message = script.failure(answer) if step.finish == "error" else (None, None)
                await self._send(rid, step, counts, used, rows, message, status)
        except asyncio.CancelledError:
            await self._send(rid, script.Step([], "abort"), counts, used, [], "Abort", 499)
        finally:
            self._tasks.pop(rid, None)

    async def _send(
        self,
        rid: str,
        step: script.Step,
        counts: tuple[int, int],
        used: int,
        rows: list[tuple[int, float]],
        message: str | None,
        status: int | None,
    ) -> None:
        finish = "abort" if step.finish == "error" else step.finish
        prompt, cached = counts
        values, ids = [logprob for _, logprob in rows], [token_id for token_id, _ in rows]
        columns = [
            [rid],
            [step.ids],
            [finish],
            [message],
            [step.matched],
            [prompt],
            [used],
            [cached],
            [values],
            [ids],
            0,
            1,
            0,
            1,
            1000,
            [status],
        ]
        await self._outputs.send(encode(["BatchTokenIDSlimOutput", *columns]))


if __name__ == "__main__":
    asyncio.run(Scheduler().run(sys.argv[1]))
