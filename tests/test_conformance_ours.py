"""Our own endpoint picker, held against the protocol by `gaie_codec.conformance`: whatever its model servers speak, no rule is broken."""

from __future__ import annotations

import asyncio

import pytest

from ext_proc_stream import FakeServer, gateway
from gaie_codec.adapters import DIALECTS
from gaie_codec.conformance import check
from gaie_codec.conformance.driver import Options, drive
from gaie_codec.ext_proc import RequestShedError, round_robin
from gaie_codec.ext_proc.server import ExtProcServer

POOL = ("10.0.0.1:50051", "10.0.0.2:50051", "[fd00::1]:50051")
# What no peer can see, or only under conditions that it does not make.
NEVER_SEEN = {"G3", "G12", "G20"}


def outcomes(*servers: FakeServer, picker=None, expects="endpoint", dialect="vllm.engine", **options) -> dict[str, str]:
    async def run() -> dict[str, str]:
        shared = gateway(*servers, picker=picker or round_robin(), **options)
        server = ExtProcServer(shared)
        port = await server.start("127.0.0.1:0")
        await server.set_ready()
        told = Options(ext_proc=f"127.0.0.1:{port}", endpoints=POOL, model="m", dialect=dialect, expects=expects)
        try:
            found = check(await drive(told), pool=POOL)
        finally:
            await server.stop(0)
        assert [(one.id, one.reason, one.faults) for one in found if one.outcome == "fail"] == []
        return {one.id: one.outcome for one in found}

    return asyncio.run(run())


@pytest.mark.parametrize("dialect", [*DIALECTS, "http"])
def test_no_rule_is_broken(dialect: str):
    asked = dialect if dialect != "http" else "vllm.engine"
    found = outcomes(*(FakeServer(address, dialect) for address in POOL), dialect=asked)
    skipped = {name for name, outcome in found.items() if outcome == "skipped"}
    # A server that speaks HTTP takes no gRPC; one that speaks gRPC has no bodyless request that goes on.
    assert skipped == {"P9", "P10", *NEVER_SEEN} | ({"G7", "G14"} if dialect == "http" else {"G18"})


def test_no_rule_is_broken_where_the_models_are_listed_here():
    assert outcomes(*map(FakeServer, POOL), models=lambda: b'{"object":"list","data":[]}')["P11"] == "pass"


def test_a_pool_without_a_ready_server_is_503():
    assert outcomes(expects="no-endpoint")["P9"] == "pass"


def test_what_is_shed_is_429():
    def shed(*_):
        raise RequestShedError("full")

    assert outcomes(*map(FakeServer, POOL), picker=shed, expects="shed")["P10"] == "pass"
