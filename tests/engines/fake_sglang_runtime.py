"""fake_sglang_runtime.py FOLDER GRPC_PORT MODEL: SGLang's gRPC server that runs inside the process of its tokenizer manager.

Real, and from FOLDER: the compiled server, grpc_bridge.py, openai/protocol.py. Every other sglang.* module is a stub; the tokenizer
manager is the fake below, the OpenAI handlers are in `fake_sglang_openai`.
"""

from __future__ import annotations

import asyncio
import dataclasses
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import inspect
import json
import signal
import sys
import threading
import types
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import model
import script
from fake_sglang_openai import KINDS, Handler, text_after
from fastapi import HTTPException

SERVER_ARGS = {
    "tokenizer_mode": "auto",
    "skip_tokenizer_init": False,
    "host": "127.0.0.1",
    "port": 1,
    "weight_version": "default",
    "load_format": "auto",
    "reasoning_parser": None,
    "tool_call_parser": None,
    "disaggregation_mode": "null",
    "preferred_sampling_params": None,
    "served_model_name": model.NAME,
    "context_length": model.CONTEXT,
}


class Record:
    """Stands for any request class: keeps its keyword arguments, every other attribute is None."""

    batch_size = 1
    parallel_sample_num = property(lambda self: int((self.fields.get("sampling_params") or {}).get("n") or 1))

    def __init__(self, **fields: Any) -> None:
        self.__dict__.update(fields, fields=fields)

    def __getattr__(self, name: str) -> Any:
        return None


def known(folder: str) -> dict[str, Any]:
    """What grpc_bridge.py takes from other modules and means by value; releases differ in what they take."""
    return {
        "resolving_view": lambda args: args,
        "resolved_embedding_plan": lambda *args, **fields: {},
        "get_lora": lambda: SimpleNamespace(enable_lora=False),
        "get_serving": lambda: SimpleNamespace(tokenizer_path=folder, incremental_streaming_output=False),
        "redact_watermark_secrets": lambda value: value,
        "describe_kv_events_publisher": lambda *args, **fields: None,
        "build_server_info": lambda args, info: dict(info or {}),
        "msgspec_to_builtins": lambda value: value,
        "convert_json_schema_to_str": lambda value: value if isinstance(value, str) else json.dumps(value),
        "ServerStatus": SimpleNamespace(Starting="Starting", UnHealthy="UnHealthy", Up="Up"),
    }


class Stub(types.ModuleType):
    """A module in which a name with a capital is a `Record`, any other a function that gives an empty object."""

    known: dict[str, Any] = {}  # noqa: RUF012 - filled once, for all

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        found = self.known.get(name) or (type(name, (Record,), {}) if name[0].isupper() else lambda *args, **fields: SimpleNamespace())
        setattr(self, name, found)
        return found


class Stubs(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Asked last, for what the folder does not have."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if name.startswith("sglang.") else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return Stub(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        """Nothing to run."""


class TokenizerManager:
    """SGLang's, as far as grpc_bridge.py and the compiled server look."""

    is_pause, gracefully_exit, is_generation, incremental_streaming_output = False, False, True, False
    served_model_name, server_status, mm_processor = model.NAME, "Up", None

    def __init__(self, folder: str) -> None:
        self.event_loop: Any = None
        self.model_path = folder
        args = SERVER_ARGS | {"tokenizer_path": folder, "model_path": folder}
        methods = {
            "resolved_dict": lambda self: args,
            "resolved_config_dict": lambda self: args,
            "describe_kv_events_publisher": lambda self: None,
            "launch_command": "mock",
            "enable_lora": False,
        }
        self.server_args = dataclasses.make_dataclass("ServerArgs", list(args), namespace=methods)(**args)
        hf = SimpleNamespace(model_type="qwen2", architectures=["Qwen2ForCausalLM"])
        self.model_config = SimpleNamespace(context_len=model.CONTEXT, is_multimodal=False, hf_config=hf)
        self.tokenizer = SimpleNamespace(
            encode=lambda text, **options: model.encode(text), decode=lambda ids, **options: model.decode(ids, special=False)
        )
        self.lora_registry = SimpleNamespace(get_all_adapters=dict)
        self.aborted: set[str] = set()

    def auto_create_handle_loop(self) -> None:
        if self.event_loop is None:
            self.event_loop = asyncio.new_event_loop()
            threading.Thread(target=self.event_loop.run_forever, daemon=True).start()

    def set_engine_state_changed_callback(self, callback: Any) -> None:
        """Nothing changes."""

    def config_value(self, name: str) -> Any:
        return SERVER_ARGS.get(name)

    def resolved_config_dict(self, *args: Any, **fields: Any) -> dict[str, Any]:
        return dataclasses.asdict(self.server_args)

    def is_healthy(self) -> bool:
        return True

    async def get_loads(self, dp_rank: int | None = None, **fields: Any) -> list[Any]:
        load = {"dp_rank": dp_rank or 0, "num_running_reqs": 1, "num_waiting_reqs": 0, "token_usage": 0.5}
        return [SimpleNamespace(to_dict=lambda: load)]

    get_load = get_loads

    def abort_request(self, rid: str = "", abort_all: bool = False, **fields: Any) -> None:
        script.log("abort", rid=rid, abort_all=abort_all)
        self.aborted.add(rid)

    async def generate_request(self, asked: Any, request: Any = None) -> AsyncIterator[Any]:
        fields, rid = asked.fields, asked.rid
        script.log("request", kind=type(asked).__name__, **{key: value for key, value in fields.items() if key != "kind"})
        prompt = fields.get("input_ids") or model.encode(str(fields.get("text") or ""))
        if type(asked).__name__ == "EmbeddingReqInput":
            yield {"embedding": [0.5, -1.25, 3.0], "meta_info": {"id": rid, "prompt_tokens": len(prompt), "finish_reason": None}}
            return
        sampling = fields.get("sampling_params") or {}
        custom = sampling.get("custom_params")
        answer = script.find(prompt, custom.get("mock") if isinstance(custom, dict) else None)
        if "error" in answer and not ({"text", "tokens"} & answer.keys()):
            status, message = script.failure(answer)
            raise ValueError(message) if status == 400 else HTTPException(status_code=status, detail=message)
        n, stops = int(sampling.get("n") or 1), sampling.get("stop") or []
        steps = script.steps(
            answer,
            limit=sampling.get("max_new_tokens", 128),
            eos=() if sampling.get("ignore_eos") else model.END_TOKENS,
            stop_ids=sampling.get("stop_token_ids") or (),
            stops=[stops] if isinstance(stops, str) else stops,
        )
        taken: list[script.Step] = []
        for found in script.hold(steps, stops) if fields.get("stream") else steps:
            await asyncio.sleep(answer.get("delay", 0))
            step = script.Step([], "abort") if rid in self.aborted else found
            taken.append(step)
            # Choices have ids of their own, and nothing else that tells them apart.
            items = [self._item(fields, f"{rid}_{index}" if n > 1 else rid, prompt, taken, answer) for index in range(n)]
            if fields.get("stream"):
                for index, item in enumerate(items):
                    yield item | ({"index": index} if n > 1 else {})
            elif step.finish:
                yield items if n > 1 else items[0]
            if step.finish:
                return

    @staticmethod
    def _item(fields: dict[str, Any], rid: str, prompt: list[int], taken: list[script.Step], answer: dict[str, Any]) -> dict[str, Any]:
        ids = [token_id for step in taken for token_id in step.ids]
        last = taken[-1]
        limit = (fields.get("sampling_params") or {}).get("max_new_tokens", 128)
        meta = {
            "id": rid,
            "finish_reason": finish_reason(last, limit, answer),
            "prompt_tokens": len(prompt),
            "weight_version": "default",
            "num_retractions": 0,
            "reasoning_tokens": 0,
            "completion_tokens": len(ids),
            "cached_tokens": int(answer.get("cached", 0)),
            "dp_rank": None,
        }
        if fields.get("return_logprob"):
            rows = [script.logprobs(answer, token_id, int(fields.get("top_logprobs_num") or 0)) for token_id in ids]
            triples = [[(logprob, token_id, None) for token_id, logprob in row] for row in rows]
            meta["output_token_logprobs"] = [row[0] for row in triples]
            meta["output_top_logprobs"] = [row[1:] or None for row in triples]
            meta["input_token_logprobs"] = [(None, token_id, None) for token_id in prompt[:1]]
        if last.finish:
            meta["e2e_latency"] = 0.01
        return {"text": text_after(taken), "output_ids": ids, "meta_info": meta}


def finish_reason(step: script.Step, limit: int, answer: dict[str, Any]) -> dict[str, Any] | None:
    if step.finish == "error":
        status, message = script.failure(answer)
        return {"type": "abort", "message": message, "status_code": status, "err_type": "MockError"}
    reasons: dict[str, dict[str, Any]] = {
        "stop": {"type": "stop", "matched": step.matched},
        "length": {"type": "length", "length": limit},
        "abort": {"type": "abort", "message": "Abort", "status_code": 500, "err_type": "InternalServerError"},
    }
    return reasons.get(step.finish)


def load_extension(folder: Path) -> Any:
    library = next(path for pattern in ("_grpc.*.so", "_core.*.so") for path in folder.rglob(pattern))
    spec = importlib.util.spec_from_file_location(library.name.split(".")[0], library)
    assert spec is not None
    assert spec.loader is not None
    extension = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(extension)
    return extension


def main() -> None:
    folder, port, model_folder = sys.argv[1:]
    sys.path.insert(0, folder)
    Stub.known = known(model_folder)
    sys.meta_path.append(Stubs())
    bridge = importlib.import_module("sglang.srt.entrypoints.grpc_bridge")
    manager = TokenizerManager(model_folder)
    arguments: dict[str, Any] = {"tokenizer_manager": manager, "template_manager": None, "server_args": manager.server_args}
    if "scheduler_info" in inspect.signature(bridge.RuntimeHandle.__init__).parameters:
        arguments["scheduler_info"] = {"max_total_num_tokens": 1000}
    handle = bridge.RuntimeHandle(**arguments)
    try:
        handle.health_check()
    except Exception as error:  # some releases look at more of the manager
        script.log("health", stubbed=repr(error))
        bridge.RuntimeHandle.health_check = lambda self: True
    handle._openai_serving_classes = {kind: Handler(kind) for kind in KINDS}
    # Kept in a name: the server ends with its handle.
    server = load_extension(Path(folder)).start_server(
        host="127.0.0.1", port=int(port), runtime_handle=handle, worker_threads=2, response_timeout_secs=300
    )
    script.ready()
    signal.pause()
    del server


if __name__ == "__main__":
    main()
