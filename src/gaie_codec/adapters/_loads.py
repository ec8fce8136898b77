"""GetLoads of the servers and what they tell of their size -> `Loads`, `Capacity`, and back.

Three ways to tell: the smg servicers have a typed message, alike for vLLM and SGLang; SGLang's native server sends JSON, without what is
zero; vLLM's own front end tells only what does not change. A count below zero is none, a share that is no number is a broken message.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import msgspec

from .._errors import MalformedMessageError
from .._events import Capacity, Loads, RankLoads
from .base import LoadsCoder
from .wire import decode_json_object, encode_struct

if TYPE_CHECKING:
    from ..snapshots import Snapshot

# Fields of SchedulerLoad, which are the keys of SGLang's JSON too.
_COUNTS = {
    "rank": "dp_rank",
    "running": "num_running_reqs",
    "waiting": "num_waiting_reqs",
    "used_tokens": "num_used_tokens",
    "total_tokens": "max_total_num_tokens",
    "waiting_tokens": "num_waiting_uncached_tokens",
    "max_running": "max_running_requests",
}
_NUMBERS = {"kv_cache_usage": "token_usage", "tokens_per_s": "gen_throughput", "cache_hit_rate": "cache_hit_rate"}
_ALWAYS = ("dp_rank", "num_running_reqs", "num_waiting_reqs")
# SGLang takes no section for all of them, which costs it more to tell.
_SECTION = "core"


def servicer_loads(snapshot: Snapshot, service: str, *, has_sections: bool) -> LoadsCoder:
    """GetLoads of the smg servicers, or nothing for a snapshot without it."""
    if not snapshot.has_method(service, "GetLoads"):
        return LoadsCoder()
    method = snapshot.method(service, "GetLoads")
    request: Any = method.request()
    if has_sections:
        request.include.append(_SECTION)
    known = snapshot.message("SchedulerLoad").DESCRIPTOR.fields_by_name
    counts = {name: field for name, field in _COUNTS.items() if field in known}

    def decode(message: Any) -> Loads:
        return Loads(
            ranks=tuple(_rank({field: getattr(one, field) for field in (*counts.values(), *_NUMBERS.values())}) for one in message.loads)
        )

    def encode(loads: Loads) -> Any:
        message: Any = method.response()
        for one in loads.ranks:
            message.loads.add(
                num_total_reqs=one.running + one.waiting,
                utilization=one.kv_cache_usage,
                **{field: getattr(one, name) for name, field in (*counts.items(), *_NUMBERS.items())},
            )
        message.dp_rank_count = len(loads.ranks)
        if "aggregate" in message.DESCRIPTOR.fields_by_name and loads.ranks:
            message.aggregate.total_running_reqs = loads.running
            message.aggregate.total_waiting_reqs = loads.waiting
            message.aggregate.total_reqs = loads.running + loads.waiting
            message.aggregate.avg_token_usage = message.aggregate.avg_utilization = loads.kv_cache_usage
            message.aggregate.avg_throughput = sum(one.tokens_per_s for one in loads.ranks) / len(loads.ranks)
        return message

    return LoadsCoder(path=method.path, request=request.SerializeToString(), decode=decode, encode=encode)


def vllm_engine_loads(snapshot: Snapshot, service: str) -> LoadsCoder:
    """GetLoads and the block size, each where the snapshot has it."""
    coder = servicer_loads(snapshot, service, has_sections=False)
    info_type: Any = snapshot.message("GetServerInfoResponse")
    if not snapshot.has_field("GetServerInfoResponse", "block_size"):
        return coder
    has_limit = snapshot.has_field("GetServerInfoResponse", "max_num_seqs")

    def decode_capacity(message: Any) -> Capacity:
        return Capacity(block_size=max(message.block_size, 0), max_running=max(message.max_num_seqs, 0) if has_limit else 0)

    def encode_capacity(capacity: Capacity) -> Any:
        message = info_type(block_size=capacity.block_size)
        if has_limit:
            message.max_num_seqs = capacity.max_running
        return message

    path = f"/{service}/GetServerInfo"
    return msgspec.structs.replace(coder, capacity_path=path, decode_capacity=decode_capacity, encode_capacity=encode_capacity)


def vllm_inference_loads(snapshot: Snapshot, path: str) -> LoadsCoder:
    """No loads: only ServerInfo, whose numbers are all there from the first release that has it."""
    info_type: Any = snapshot.method_at(path).response
    has_loras = snapshot.has_field("ServerInfo", "max_loras")

    def decode_capacity(message: Any) -> Capacity:
        return Capacity(
            block_size=message.kv_block_size,
            num_blocks=message.total_kv_blocks,
            max_running=message.max_running_requests,
            max_loras=message.max_loras if has_loras else 0,
        )

    def encode_capacity(capacity: Capacity) -> Any:
        message = info_type(
            kv_block_size=capacity.block_size, total_kv_blocks=capacity.num_blocks, max_running_requests=capacity.max_running
        )
        if has_loras:
            message.max_loras = capacity.max_loras
        return message

    return LoadsCoder(capacity_path=path, decode_capacity=decode_capacity, encode_capacity=encode_capacity)


def sglang_scheduler_loads(snapshot: Snapshot, service: str) -> LoadsCoder:
    """GetLoads where the snapshot has it, and the size of the cache from the server's arguments and the scheduler's word."""
    coder = servicer_loads(snapshot, service, has_sections=True)
    info_type: Any = snapshot.message("GetServerInfoResponse")

    def decode_capacity(message: Any) -> Capacity:
        # The Python servicer has the arguments as they were given, None where the scheduler chose; the Rust one only what it chose.
        names = ("page_size", "max_total_num_tokens", "max_running_requests")
        told = {name: _number_of(message.scheduler_info, name) or _number_of(message.server_args, name) for name in names}
        return _sglang_capacity(told)

    def encode_capacity(capacity: Capacity) -> Any:
        told = _sglang_facts(capacity)
        message = info_type()
        encode_struct({"max_total_num_tokens": told.pop("max_total_num_tokens")}, message.scheduler_info)
        encode_struct(told, message.server_args)
        return message

    path = f"/{service}/GetServerInfo"
    return msgspec.structs.replace(coder, capacity_path=path, decode_capacity=decode_capacity, encode_capacity=encode_capacity)


def sglang_runtime_loads(snapshot: Snapshot, service: str) -> LoadsCoder:
    """GetLoad, whose answer is a JSON list of ranks, and GetServerInfo, whose answer is a JSON object."""
    load, info = snapshot.method(service, "GetLoad"), snapshot.method(service, "GetServerInfo")

    def decode(message: Any) -> Loads:
        try:
            ranks = msgspec.json.decode(message.json_info or "[]", type=list[dict[str, Any]])
        except (msgspec.DecodeError, RecursionError):
            raise MalformedMessageError("json_info is not a JSON list of objects") from None
        return Loads(ranks=tuple(map(_rank, ranks)))

    def encode(loads: Loads) -> Any:
        message: Any = load.response()
        told = [{field: getattr(one, name) for name, field in (*_COUNTS.items(), *_NUMBERS.items())} for one in loads.ranks]
        rows = [{field: value for field, value in one.items() if value or field in _ALWAYS} for one in told]
        message.json_info = msgspec.json.encode(rows).decode()
        return message

    def encode_capacity(capacity: Capacity) -> Any:
        message: Any = info.response()
        message.json_info = msgspec.json.encode(_sglang_facts(capacity)).decode()
        return message

    return LoadsCoder(
        path=load.path,
        decode=decode,
        encode=encode,
        capacity_path=info.path,
        decode_capacity=lambda message: _sglang_capacity(decode_json_object(message.json_info, "json_info")),
        encode_capacity=encode_capacity,
    )


def _rank(told: Mapping[str, Any]) -> RankLoads:
    counts: dict[str, Any] = {name: _count(told.get(field)) for name, field in _COUNTS.items()}
    shares: dict[str, Any] = {name: _number(told.get(field), field) for name, field in _NUMBERS.items()}
    return RankLoads(**counts, **shares)


def _count(value: Any) -> int:
    return max(int(value), 0) if _is_number(value) else 0


def _number(value: Any, field: str) -> float:
    if value is None:
        return 0.0
    if not _is_number(value):
        raise MalformedMessageError(f"{field} is no number")
    return max(float(value), 0.0)


def _is_number(value: Any) -> bool:
    # The bound keeps out what a float cannot hold, infinity and NaN.
    return isinstance(value, int | float) and abs(value) <= sys.float_info.max


def _number_of(struct: Any, name: str) -> float:
    return float(struct.fields[name].number_value) if name in struct.fields else 0.0


def _sglang_capacity(told: Mapping[str, Any]) -> Capacity:
    page_size = _count(told.get("page_size"))
    return Capacity(
        block_size=page_size,
        num_blocks=_count(told.get("max_total_num_tokens")) // page_size if page_size else 0,
        max_running=_count(told.get("max_running_requests")),
    )


def _sglang_facts(capacity: Capacity) -> dict[str, int]:
    return {
        "page_size": capacity.block_size,
        "max_total_num_tokens": capacity.num_blocks * capacity.block_size,
        "max_running_requests": capacity.max_running,
    }
