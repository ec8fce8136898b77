"""GetLoads of every snapshot that has it: what is written is read again, what is broken is named, and `sim` tells the truth."""

from __future__ import annotations

import asyncio
import json

import grpc
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gaie_codec import Capacity, CodecError, Loads, MalformedMessageError, RankLoads, adapters, snapshots
from gaie_codec.sim import Script, SimServer
from gaie_codec.testing import messages

EVERY = [
    adapters.get(snapshots.load(dialect, name))
    for dialect in adapters.DIALECTS
    for name in snapshots.SNAPSHOTS[dialect]
    if not snapshots.load(dialect, name).refused
]
WITH_LOADS = [one for one in EVERY if one.loads_path is not None]
WITH_CAPACITY = [one for one in EVERY if one.capacity_path is not None]
RUNTIME = adapters.get(snapshots.load("sglang.runtime"))


def name_of(adapter):
    return str(adapter.snapshot).replace(" ", "-")


COUNT = st.integers(0, 2**28)  # sums are int32 on the wire too
SHARE = st.floats(0, 1)
RANKS = st.builds(
    RankLoads,
    rank=st.integers(0, 7),
    running=COUNT,
    waiting=COUNT,
    kv_cache_usage=SHARE,
    used_tokens=COUNT,
    total_tokens=COUNT,
    waiting_tokens=COUNT,
    max_running=COUNT,
    tokens_per_s=st.floats(0, 1e6),
    cache_hit_rate=SHARE,
)


def has_method(snapshot, name):
    return any(snapshot.has_method(service, name) for service in snapshot.services)


@pytest.mark.parametrize("adapter", EVERY, ids=name_of)
def test_an_adapter_reads_loads_just_where_its_snapshot_has_the_method(adapter):
    assert (adapter.loads_path is not None) == (has_method(adapter.snapshot, "GetLoads") or has_method(adapter.snapshot, "GetLoad"))
    assert (adapter.decode_loads is None) == (adapter.encode_loads is None) == (adapter.loads_path is None)
    assert (adapter.decode_capacity is None) == (adapter.encode_capacity is None) == (adapter.capacity_path is None)
    if adapter.loads_path is not None:
        adapter.snapshot.method_at(adapter.loads_path).request.FromString(adapter.loads_request)


@pytest.mark.parametrize("adapter", WITH_LOADS, ids=name_of)
@settings(max_examples=20)
@given(loads=st.builds(Loads, ranks=st.lists(RANKS, max_size=3).map(tuple)))
def test_loads_come_back(adapter, loads):
    response = adapter.snapshot.method_at(adapter.loads_path).response
    again = adapter.decode_loads(response.FromString(adapter.encode_loads(loads).SerializeToString()))
    if adapter.dialect != "sglang.runtime" and not adapter.snapshot.has_field("SchedulerLoad", "num_waiting_uncached_tokens"):
        loads = Loads(ranks=tuple(msgspec.structs.replace(one, waiting_tokens=0) for one in loads.ranks))
    assert again == loads
    assert (again.running, again.waiting) == (sum(one.running for one in loads.ranks), sum(one.waiting for one in loads.ranks))


@pytest.mark.parametrize("adapter", WITH_CAPACITY, ids=name_of)
@settings(max_examples=20)
@given(block_size=st.integers(1, 512), num_blocks=st.integers(0, 2**20), max_running=st.integers(0, 2**20), max_loras=st.integers(0, 64))
def test_a_capacity_comes_back_as_far_as_the_wire_has_fields_for_it(adapter, block_size, num_blocks, max_running, max_loras):
    capacity = Capacity(block_size=block_size, num_blocks=num_blocks, max_running=max_running, max_loras=max_loras)
    response = adapter.snapshot.method_at(adapter.capacity_path).response
    again = adapter.decode_capacity(response.FromString(adapter.encode_capacity(capacity).SerializeToString()))
    unknown = {field for field in capacity.__struct_fields__ if getattr(again, field) == 0 != getattr(capacity, field)}
    assert (
        unknown
        <= {
            "vllm.engine": {"num_blocks", "max_running", "max_loras"},
            "vllm.inference": {"max_loras"},
            "sglang.scheduler": {"max_loras"},
            "sglang.runtime": {"max_loras"},
        }[adapter.dialect]
    )
    assert msgspec.structs.replace(capacity, **dict.fromkeys(unknown, 0)) == again


@pytest.mark.parametrize("adapter", [one for one in EVERY if one.loads_path or one.capacity_path], ids=name_of)
@settings(max_examples=20)
@given(data=st.data())
def test_any_message_decodes_or_is_refused_by_name(adapter, data):
    for path, decode in ((adapter.loads_path, adapter.decode_loads), (adapter.capacity_path, adapter.decode_capacity)):
        if path is not None:
            name = adapter.snapshot.method_at(path).response.DESCRIPTOR.full_name
            message = data.draw(messages(adapter.snapshot, name))
            try:
                told = decode(message)
            except CodecError:
                continue
            assert all(value >= 0 for one in getattr(told, "ranks", (told,)) for value in msgspec.structs.astuple(one))


@pytest.mark.parametrize("text", ["{}", "[1]", "[", "nonsense", '[{"token_usage": "high"}]', '[{"token_usage": 1e999}]', "[" * 100_000])
def test_json_that_is_no_list_of_loads_is_refused(text):
    message = snapshots.load("sglang.runtime").method_at(RUNTIME.loads_path).response(json_info=text)
    with pytest.raises(MalformedMessageError):
        RUNTIME.decode_loads(message)


def test_what_sglang_leaves_out_is_zero_and_odd_numbers_are_none():
    response = snapshots.load("sglang.runtime").method_at(RUNTIME.loads_path).response
    rows = [{"dp_rank": 1, "num_running_reqs": 3, "token_usage": 0.5}, {"num_waiting_reqs": -4, "num_used_tokens": None, "other": {}}]
    told = RUNTIME.decode_loads(response(json_info=json.dumps(rows)))
    assert told == Loads(ranks=(RankLoads(rank=1, running=3, kv_cache_usage=0.5), RankLoads()))
    assert (told.running, told.waiting, told.kv_cache_usage) == (3, 0, 0.25)
    assert RUNTIME.decode_loads(response()) == Loads(), "nothing told"
    assert Loads().kv_cache_usage == 0
    huge = RUNTIME.decode_loads(response(json_info='[{"num_running_reqs": 1%s}]' % ("0" * 400)))
    assert huge.running == 0


async def ask(adapter, port, path, request=b""):
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        answer = await channel.unary_unary(path)(request, timeout=5)
    return adapter.snapshot.method_at(path).response.FromString(answer)


@pytest.mark.parametrize("adapter", [one for one in WITH_LOADS if one.snapshot.name == snapshots.SNAPSHOTS[one.dialect][-1]], ids=name_of)
def test_the_simulated_server_tells_what_runs(adapter):
    async def run():
        server = SimServer(adapter.dialect, snapshot=adapter.snapshot.name, script=Script(waiting=4, delay_ms=200, tokens=[[5]] * 50))
        port = await server.start("127.0.0.1:0")
        try:
            idle = adapter.decode_loads(await ask(adapter, port, adapter.loads_path, adapter.loads_request))
            assert (idle.running, idle.waiting, idle.kv_cache_usage) == (0, 4, 0)
            assert idle.ranks[0].total_tokens > 0
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                request = adapter.decode_request(adapter.request_type())
                request = msgspec.structs.replace(request, request_id="r", prompt_token_ids=[5] * 64, stream=True)
                sampling = msgspec.structs.replace(request.sampling, max_tokens=50, n=1)
                message = adapter.encode_request(msgspec.structs.replace(request, sampling=sampling))
                call = channel.unary_stream(adapter.generate_path)(message.SerializeToString(), timeout=20)
                await call.read()
                busy = adapter.decode_loads(await ask(adapter, port, adapter.loads_path, adapter.loads_request))
                call.cancel()
            assert (busy.running, busy.waiting) == (1, 4)
            assert busy.ranks[0].used_tokens == 64
            assert busy.kv_cache_usage == pytest.approx(64 / busy.ranks[0].total_tokens)
        finally:
            await server.stop()

    asyncio.run(run())


@pytest.mark.parametrize(
    "adapter", [one for one in WITH_CAPACITY if one.snapshot.name == snapshots.SNAPSHOTS[one.dialect][-1]], ids=name_of
)
def test_the_simulated_server_tells_its_size(adapter):
    async def run():
        server = SimServer(adapter.dialect, snapshot=adapter.snapshot.name, script=Script(kv_cache_usage=0.25))
        port = await server.start("127.0.0.1:0")
        try:
            capacity = adapter.decode_capacity(await ask(adapter, port, adapter.capacity_path))
            assert (capacity.block_size, capacity.max_running) == (16, 256)
            assert capacity.num_blocks == (0 if adapter.dialect == "vllm.engine" else 1024)
            if adapter.loads_path is not None:
                loads = adapter.decode_loads(await ask(adapter, port, adapter.loads_path, adapter.loads_request))
                assert loads.kv_cache_usage == 0.25
                assert loads.ranks[0].total_tokens == 1024 * 16
        finally:
            await server.stop()

    asyncio.run(run())


@pytest.mark.parametrize("adapter", EVERY, ids=name_of)
def test_a_request_is_aborted_where_the_snapshot_can(adapter):
    assert (adapter.abort_path is not None) == has_method(adapter.snapshot, "Abort") == (adapter.encode_abort is not None)
    if adapter.abort_path is not None:
        request = adapter.snapshot.method_at(adapter.abort_path).request
        ((field, value),) = request.FromString(adapter.encode_abort("r1").SerializeToString()).ListFields()
        names = {"rid": "r1", "request_id": "r1", "request_ids": ["r1"]}
        assert (value if isinstance(value, str) else list(value)) == names[field.name]
