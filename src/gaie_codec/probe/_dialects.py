"""For each dialect: by which services it is known, what may be asked, and what the answers tell.

Every method here is read-only and cheap, and its request is empty; no other method of a model server is ever called. What is left
out although its name sounds harmless: HealthCheck of `sglang.scheduler` and of `sglang.api` generates a token (seen with SGLang 0.5.23).

Two methods are called with bytes that no server can decode. The refusal tells that a method is there, and its handler never runs:
Generate of vLLM before 0.27, whose native server has nothing else, and SGLang's WatchEngineState, an endless stream.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Final, Literal, TypeAlias

import msgspec

UNDECODABLE: Final = b"\xff"
"""Not a protobuf message of any type: a tag that does not end."""


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """What a server says of itself."""

    engine_version: str = ""
    proto_version: str = ""
    model: str = ""
    aliases: tuple[str, ...] = ()
    model_path: str = ""
    max_model_len: int = 0
    tokenizer_path: str = ""


Answers: TypeAlias = Mapping[str, Any]
"""Decoded messages by the method's name."""


class Known(msgspec.Struct, frozen=True, kw_only=True):
    """One dialect as a prober sees it."""

    dialect: str
    engine: Literal["vllm", "sglang"]
    services: tuple[str, ...]
    """Any of them marks the dialect."""

    asks_all: tuple[str, ...]
    """Paths to ask of a server that has not been recognized."""

    asks_recognized: tuple[str, ...] = ()
    """Paths to ask besides, once it has been."""

    asks_undecodable: tuple[str, ...] = ()
    """Paths to call with `UNDECODABLE`, to see whether they are there."""

    tokenizer: str = ""
    """The path of GetTokenizer. It is asked for the first chunk."""

    health: str = ""
    """The path of a HealthCheck that costs nothing and knows more than grpc.health.v1."""

    no_health: str = ""
    """Why there is none."""

    read: Callable[[Answers], Facts]


def _read_vllm_engine(answers: Answers) -> Facts:
    model, loads = answers.get("GetModelInfo"), answers.get("GetLoads")
    return Facts(
        engine_version=loads.version if loads else "",
        model=model.served_model_name or model.model_path if model else "",
        model_path=model.model_path if model else "",
        max_model_len=model.max_context_length if model else 0,
        tokenizer_path=model.tokenizer_path if model else "",
    )


def _read_vllm_inference(answers: Answers) -> Facts:
    model, server = answers.get("GetModelInfo"), answers.get("GetServerInfo")
    return Facts(
        engine_version=server.engine_version if server else "",
        proto_version=server.proto_version if server else "",
        model=model.served_model_name or model.model_id if model else "",
        aliases=tuple(model.served_model_aliases) if model else (),
        model_path=model.model_id if model else "",
        max_model_len=server.max_model_len if server else 0,
    )


def _read_sglang_scheduler(answers: Answers) -> Facts:
    model, server, loads = (answers.get(name) for name in ("GetModelInfo", "GetServerInfo", "GetLoads"))
    return Facts(
        engine_version=(server.sglang_version if server else "") or (loads.version if loads else ""),
        model=model.served_model_name or model.model_path if model else "",
        model_path=model.model_path if model else "",
        max_model_len=model.max_context_length if model else 0,
        tokenizer_path=model.tokenizer_path if model else "",
    )


def _read_sglang_runtime(answers: Answers) -> Facts:
    model, server, models = (answers.get(name) for name in ("GetModelInfo", "GetServerInfo", "ListModels"))
    told = _json_object(model.json_info) if model else {}
    resolved = _json_object(server.json_info) if server else {}
    cards = list(models.models) if models else []
    return Facts(
        engine_version=_text(resolved, "version") or _text(resolved, "sglang_version"),
        model=_text(told, "served_model_name") or (cards[0].id if cards else "") or (model.model_path if model else ""),
        aliases=tuple(card.id for card in cards[1:]),
        model_path=model.model_path if model else "",
        max_model_len=cards[0].max_model_len if cards else 0,
        tokenizer_path=_text(told, "tokenizer_path") or _text(resolved, "tokenizer_path"),
    )


def _read_sglang_api(answers: Answers) -> Facts:
    model, server, models = (answers.get(name) for name in ("GetModelInfo", "GetServerInfo", "ListModels"))
    info = model or server
    cards = list(models.models) if models else []
    return Facts(
        engine_version=server.version if server else "",
        model=info.served_model_name or info.model_path if info else "",
        aliases=tuple(card.id for card in cards if card.id != info.served_model_name) if info else (),
        model_path=info.model_path if info else "",
        max_model_len=server.max_context_length if server else 0,
        tokenizer_path=info.tokenizer_path if info else "",
    )


def _json_object(text: str) -> dict[str, Any]:
    try:
        return msgspec.json.decode(text, type=dict[str, Any])
    except (msgspec.DecodeError, RecursionError):
        return {}


def _text(told: Mapping[str, Any], key: str) -> str:
    value = told.get(key)
    return value if isinstance(value, str) else ""


def _paths(service: str, *methods: str) -> tuple[str, ...]:
    return tuple(f"/{service}/{method}" for method in methods)


_VLLM_ENGINE: Final = "vllm.grpc.engine.VllmEngine"
_SGLANG_SCHEDULER: Final = "sglang.grpc.scheduler.SglangScheduler"
_SGLANG_RUNTIME: Final = "sglang.runtime.v1.SglangService"
_SGLANG_API: Final = "sglang.api.v1.SglangService"
_GENERATES: Final = "HealthCheck was not asked, because it generates a token"

KNOWN: Final[Mapping[str, Known]] = MappingProxyType(
    {
        known.dialect: known
        for known in (
            Known(
                dialect="vllm.engine",
                engine="vllm",
                services=(_VLLM_ENGINE,),
                asks_all=_paths(_VLLM_ENGINE, "GetModelInfo", "GetServerInfo"),
                asks_recognized=_paths(_VLLM_ENGINE, "GetLoads"),
                tokenizer=f"/{_VLLM_ENGINE}/GetTokenizer",
                health=f"/{_VLLM_ENGINE}/HealthCheck",
                read=_read_vllm_engine,
            ),
            Known(
                dialect="vllm.inference",
                engine="vllm",
                services=("vllm.Inference", "vllm.Control", "vllm.Generate"),
                asks_all=_paths("vllm.Control", "GetServerInfo", "GetModelInfo"),
                asks_undecodable=_paths("vllm.Generate", "Generate"),
                read=_read_vllm_inference,
            ),
            Known(
                dialect="sglang.scheduler",
                engine="sglang",
                services=(_SGLANG_SCHEDULER,),
                asks_all=_paths(_SGLANG_SCHEDULER, "GetModelInfo", "GetServerInfo"),
                asks_recognized=_paths(_SGLANG_SCHEDULER, "GetLoads", "ListLoadedLoRAAdapters"),
                tokenizer=f"/{_SGLANG_SCHEDULER}/GetTokenizer",
                no_health=_GENERATES,
                read=_read_sglang_scheduler,
            ),
            Known(
                dialect="sglang.runtime",
                engine="sglang",
                services=(_SGLANG_RUNTIME,),
                asks_all=_paths(_SGLANG_RUNTIME, "GetModelInfo", "GetServerInfo"),
                asks_recognized=_paths(_SGLANG_RUNTIME, "ListModels", "GetLoad"),
                asks_undecodable=_paths(_SGLANG_RUNTIME, "WatchEngineState"),
                health=f"/{_SGLANG_RUNTIME}/HealthCheck",
                read=_read_sglang_runtime,
            ),
            Known(
                dialect="sglang.api",
                engine="sglang",
                services=(_SGLANG_API,),
                asks_all=_paths(_SGLANG_API, "GetModelInfo", "GetServerInfo"),
                asks_recognized=_paths(_SGLANG_API, "ListModels"),
                no_health=_GENERATES,
                read=_read_sglang_api,
            ),
        )
    }
)
