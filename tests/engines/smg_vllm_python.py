"""smg_vllm_python.py GRPC_PORT MODEL: the Python servicer of smg-grpc-servicer on a stand-in for vLLM's AsyncLLM.

vllm, torch and transformers are stubs: any name of theirs is a class that takes anything. What the servicer really uses is set below.
"""

from __future__ import annotations

import asyncio
import enum
import importlib
import importlib.abc
import importlib.machinery
import logging
import sys
import time
import types
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import grpc
import model
import script

OutputKind = enum.Enum("OutputKind", "CUMULATIVE DELTA FINAL_ONLY", start=0)


class Record:
    """Keeps its keyword arguments; every other attribute is None."""

    def __init__(self, *arguments: Any, **fields: Any) -> None:
        self.__dict__.update(fields)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)


class SamplingParams(Record):
    """vLLM's, without its checks."""

    n, max_tokens = 1, 16

    @classmethod
    def from_optional(cls, **fields: Any) -> SamplingParams:
        return cls(**fields)


class Stub(types.ModuleType):
    """A module in which every name is a class."""

    __path__: list[str] = []  # noqa: RUF012 - a module's attribute, as packages have it

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        found = sys.modules.get(f"{self.__name__}.{name}") or type(name, (Record,), {"__module__": self.__name__})
        setattr(self, name, found)
        return found


class Stubs(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Answers for the packages that are not installed."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name.split(".")[0] in ("vllm", "torch", "transformers"):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return Stub(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        """Nothing to run."""


def fill_stubs() -> None:
    """Set what the servicer takes from vLLM by name and means by value."""
    vllm = importlib.import_module("vllm")
    sampling = importlib.import_module("vllm.sampling_params")
    vllm.SamplingParams = sampling.SamplingParams = SamplingParams
    sampling.RequestOutputKind = OutputKind
    vllm.TokensPrompt = lambda **fields: fields
    inputs = importlib.import_module("vllm.inputs.engine")
    inputs.tokens_input = lambda prompt_token_ids=None, **fields: {**fields, "type": "token", "prompt_token_ids": prompt_token_ids}
    importlib.import_module("vllm.logger").init_logger = logging.getLogger
    importlib.import_module("vllm.version").__version__ = "0.33.0"
    exceptions = importlib.import_module("vllm.exceptions")
    engine = importlib.import_module("vllm.v1.engine.exceptions")
    for module, name, base in (
        (exceptions, "VLLMNotFoundError", Exception),
        (exceptions, "VLLMValidationError", ValueError),
        (exceptions, "VLLMClientError", ValueError),
        (exceptions, "GracefulHTTPError", Exception),
        (engine, "EngineGenerateError", Exception),
        (engine, "EngineDeadError", Exception),
    ):
        setattr(module, name, type(name, (base,), {}))


class Engine:
    """AsyncLLM as far as the servicer looks."""

    errored, is_running, is_stopped, tokenizer, logger_manager = False, True, False, None, None

    def __init__(self, folder: str) -> None:
        hf = SimpleNamespace(
            model_type="qwen2",
            architectures=["Qwen2ForCausalLM"],
            eos_token_id=model.EOS,
            pad_token_id=0,
            bos_token_id=0,
            vocab_size=model.VOCAB_SIZE,
            to_dict=dict,
        )
        self.model_config = SimpleNamespace(
            model=folder,
            served_model_name=model.NAME,
            tokenizer=folder,
            hf_config=hf,
            hf_text_config=hf,
            max_model_len=model.CONTEXT,
            is_multimodal_model=False,
            runner_type="generate",
            dtype="float32",
            multimodal_config=None,
            pooler_config=None,
            get_vocab_size=lambda: model.VOCAB_SIZE,
            get_diff_sampling_param=dict,
            try_get_generation_config=dict,
        )
        self.vllm_config = SimpleNamespace(
            model_config=self.model_config,
            kv_transfer_config=None,
            kv_events_config=None,
            lora_config=None,
            speculative_config=None,
            parallel_config=SimpleNamespace(
                data_parallel_size=1,
                tensor_parallel_size=1,
                pipeline_parallel_size=1,
                data_parallel_rank=0,
                world_size=1,
                data_parallel_size_local=1,
                data_parallel_index=0,
            ),
            cache_config=SimpleNamespace(block_size=16, num_gpu_blocks=100, cache_dtype="auto", enable_prefix_caching=True),
            scheduler_config=SimpleNamespace(max_num_seqs=256, max_num_batched_tokens=8192),
            attention_config=SimpleNamespace(backend=None),
            structured_outputs_config=SimpleNamespace(backend="auto", reasoning_parser=""),
        )
        self.renderer = SimpleNamespace(process_for_engine=lambda prompt, arrival_time=None: prompt)
        self.engine_core = SimpleNamespace(engine_ranks_managed=[0])
        self.output_processor = SimpleNamespace(request_states={})

    async def check_health(self) -> None:
        """It is well."""

    async def abort(self, request_id: Any, *arguments: Any, **fields: Any) -> None:
        script.log("abort", request_id=request_id)

    async def get_supported_tasks(self) -> tuple[str, ...]:
        return ("generate",)

    async def generate(self, prompt: Any, sampling_params: Any, request_id: str, **fields: Any) -> AsyncIterator[Any]:
        script.log("request", prompt=prompt, sampling_params=vars(sampling_params), request_id=request_id)
        ids = prompt if isinstance(prompt, str) else prompt.get("prompt_token_ids") or prompt.get("prompt")
        extra = sampling_params.extra_args if isinstance(sampling_params.extra_args, dict) else {}
        answer = script.find(ids, (extra.get("kv_transfer_params") or {}).get("mock"))
        finished = False
        try:
            async for output in self._outputs(ids, answer, sampling_params, request_id):
                finished = output.finished
                yield output
        except (asyncio.CancelledError, GeneratorExit):
            # AsyncLLM aborts in its engine core whatever its caller no longer reads.
            if not finished:
                script.log("abort", request_id=request_id)
            raise

    async def _outputs(self, prompt: Any, answer: dict[str, Any], params: Any, request_id: str) -> AsyncIterator[Any]:
        eos = () if params.ignore_eos else model.END_TOKENS
        found = script.steps(answer, limit=params.max_tokens, eos=eos, stop_ids=params.stop_token_ids or (), stops=params.stop or ())
        so_far: list[int] = []
        for step in found:
            await asyncio.sleep(answer.get("delay", 0))
            if step.finish == "error":
                raise self._error(answer)
            so_far += step.ids
            if params.output_kind == OutputKind.FINAL_ONLY and not step.finish:
                continue
            ids = step.ids if params.output_kind == OutputKind.DELTA else list(so_far)
            choice = {
                "text": "",
                "token_ids": ids,
                "cumulative_logprob": None,
                "logprobs": self._logprobs(answer, ids, params.logprobs),
                "finish_reason": step.finish or None,
                "stop_reason": step.matched if step.matched != model.EOS else None,
                "lora_request": None,
                "routed_experts": None,
            }
            yield SimpleNamespace(
                request_id=request_id,
                prompt=None,
                prompt_token_ids=prompt if isinstance(prompt, list) else model.encode(prompt),
                prompt_logprobs=self._prompt_logprobs(answer, prompt, params.prompt_logprobs),
                outputs=[SimpleNamespace(index=index, **choice) for index in range(params.n or 1)],
                finished=bool(step.finish),
                metrics=None,
                num_cached_tokens=int(answer.get("cached", 0)),
                kv_transfer_params=answer.get("kv_out"),
            )

    def _prompt_logprobs(self, answer: dict[str, Any], prompt: Any, count: int | None) -> Any:
        ids = prompt if isinstance(prompt, list) else model.encode(prompt)
        return [None, *self._logprobs(answer, ids[1:], count)] if count is not None else None

    @staticmethod
    def _logprobs(answer: dict[str, Any], ids: list[int], count: int | None) -> Any:
        """A dict for each token, the sampled one first, as vLLM builds them."""
        if count is None:
            return None
        rows = [dict(script.logprobs(answer, token_id, count)) for token_id in ids]
        return [{i: SimpleNamespace(logprob=logprob, rank=1, decoded_token=None) for i, logprob in row.items()} for row in rows]

    @staticmethod
    def _error(answer: dict[str, Any]) -> Exception:
        status, message = script.failure(answer)
        if status == 400:
            return ValueError(message)
        return importlib.import_module("vllm.v1.engine.exceptions").EngineGenerateError(message)


async def main() -> None:
    port, folder = sys.argv[1:]
    logging.basicConfig(level=logging.INFO)
    sys.meta_path.insert(0, Stubs())
    fill_stubs()
    stubs = importlib.import_module("smg_grpc_proto").vllm_engine_pb2_grpc
    servicer = importlib.import_module("smg_grpc_servicer.vllm.servicer").VllmEngineServicer
    server = grpc.aio.server()
    stubs.add_VllmEngineServicer_to_server(servicer(Engine(folder), time.time()), server)
    server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    script.ready()
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(main())
