"""Live model servers: simulated ones on real ports come, go, and come back as others."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket

import pytest

from gaie_codec import ModelInfo, UsageError
from gaie_codec.ext_proc import _watching
from gaie_codec.ext_proc import endpoints as endpoints_module
from gaie_codec.ext_proc.endpoints import Endpoints, TranscoderOptions, decode_endpoint
from gaie_codec.ext_proc.picking import MalformedDestinationError, NoEndpointError
from gaie_codec.sim import SimServer
from gaie_codec.tokenizer_sources import load_tokenizer
from gaie_codec.upstream import discovery

LIMIT_S = 20.0
BUILTIN = TranscoderOptions(tokenizer="builtin")
TOKENIZER = load_tokenizer("builtin")


@pytest.fixture(autouse=True)
def _impatience(monkeypatch):
    monkeypatch.setattr(discovery, "_RETRY_S", 0.02)
    monkeypatch.setattr(_watching, "_ASK_TIMEOUT_S", 2.0)


async def until(holds):
    async with asyncio.timeout(LIMIT_S):
        while not holds():
            await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def sim(dialect="vllm.engine", address="127.0.0.1:0", **options):
    server = SimServer(dialect, **options)
    port = await server.start(address)
    try:
        yield server, f"{address.rpartition(':')[0]}:{port}"
    finally:
        await server.stop()


@contextlib.asynccontextmanager
async def started(*texts, check_interval_s=0.05, file_interval_s=0.02, options=BUILTIN, **more):
    specs = map(decode_endpoint, texts)
    made = await Endpoints.start(specs, options=options, check_interval_s=check_interval_s, file_interval_s=file_interval_s, **more)
    try:
        yield made
    finally:
        await made.close()


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return taken.getsockname()[1]


def test_servers_of_every_dialect_become_ready_by_themselves():
    dialects = ["vllm.engine", "vllm.inference", "sglang.scheduler", "sglang.runtime", "sglang.api"]

    async def main():
        async with contextlib.AsyncExitStack() as stack:
            targets = [(await stack.enter_async_context(sim(dialect)))[1] for dialect in dialects]
            endpoints = await stack.enter_async_context(started(*targets))
            await until(lambda: len(endpoints.ready()) == len(dialects))
            for dialect, target, endpoint in zip(dialects, targets, endpoints.ready(), strict=True):
                assert (endpoint.address, endpoint.dialect) == (target, dialect)
                assert endpoint.transcoder.adapter is endpoint.adapter is endpoint.observer.adapter
                assert endpoint.transcoder.limits.max_calls == 1
                candidate = endpoint.candidate()
                assert (candidate.address, candidate.dialect, candidate.snapshot) == (target, dialect, endpoint.adapter.snapshot.name)
                assert candidate.model in endpoint.model.names or not endpoint.model.names
            assert list(endpoints) == endpoints.ready()

    asyncio.run(main())


def test_servers_that_are_alike_share_a_transcoder():
    async def main():
        async with (
            sim() as (_, one),
            sim() as (_, two),
            sim(snapshot="smg-0.4.20") as (_, older),
            sim(model=ModelInfo(served_model_name="other")) as (_, other),
        ):
            for options in (BUILTIN, TranscoderOptions()):
                async with started(one, two, older, other, options=options) as endpoints:
                    await until(lambda: len(endpoints.ready()) == 4)
                    first, second, third, fourth = endpoints.ready()
                    assert first.transcoder is second.transcoder
                    assert first.observer is second.observer
                    assert len({first.transcoder, third.transcoder, fourth.transcoder}) == 3
                    assert third.snapshot == "smg-0.4.20"
                    assert fourth.model.names == ("other",)
                    if options is BUILTIN:
                        assert first.tokenizer is third.tokenizer is fourth.tokenizer
                    else:
                        assert first.tokenizer is second.tokenizer is fourth.tokenizer, "the same files, though from another server"

    asyncio.run(main())


def test_starting_waits_for_nobody_and_late_servers_come_in():
    async def main():
        port = free_port()
        async with sim() as (_, there), asyncio.timeout(LIMIT_S), started(f"127.0.0.1:{port}", there) as endpoints:
            await until(lambda: len(endpoints.ready()) == 1)
            late = endpoints.get(f"127.0.0.1:{port}")
            assert not late.is_ready
            assert late.reason == "it has not answered yet"
            with pytest.raises(NoEndpointError, match=f"127.0.0.1:{port} is not known: it has not answered yet"):
                await late.wait_until_known(0.01)
            async with sim(address=f"127.0.0.1:{port}"):
                await late.wait_until_known(LIMIT_S)
                await until(lambda: late.is_ready)
                assert endpoints.ready()[0] is late, "in the order of the configuration"

    asyncio.run(main())


def test_a_server_that_goes_is_not_ready_and_one_that_comes_back_as_another_is_asked_anew(caplog):
    caplog.set_level(logging.INFO, "gaie_codec.ext_proc")

    async def main():
        port = free_port()
        target = f"127.0.0.1:{port}"
        async with started(target) as endpoints:
            async with sim("vllm.engine", target, model=ModelInfo(served_model_name="first")):
                await until(endpoints.ready)
                (endpoint,) = endpoints.ready()
                transcoder = endpoint.transcoder
                assert endpoint.model.names == ("first",)
                endpoints.set_load(target, waiting=3, running=4, kv_cache_usage=0.5)
                candidate = endpoint.candidate()
                assert (candidate.waiting, candidate.running, candidate.kv_cache_usage) == (3, 4, 0.5)
            await until(lambda: not endpoints.ready())
            assert endpoint.reason.startswith("UNAVAILABLE")
            assert endpoint.candidate().waiting == 0
            assert endpoint.transcoder is transcoder, "for what is still in flight"
            async with sim("sglang.api", target, model=ModelInfo(served_model_name="second")):
                await until(endpoints.ready)
                assert (endpoint.dialect, endpoint.model.names) == ("sglang.api", ("second",))
                assert endpoint.transcoder is not transcoder

    asyncio.run(main())
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING" and record.name == "gaie_codec.ext_proc"]
    assert len(warnings) == len(set(warnings)) <= 2, "one line for a reason, not one for every check"
    assert "is ready" in caplog.text


def test_one_failure_is_none(monkeypatch):
    real = _watching.check_health
    failing = []

    async def check_health(*arguments, **options):
        if failing:
            raise failing.pop()
        await real(*arguments, **options)

    monkeypatch.setattr(_watching, "check_health", check_health)

    async def main():
        async with sim() as (_, target), started(target) as endpoints:
            await until(endpoints.ready)
            (endpoint,) = endpoints.ready()
            falls = []
            monkeypatch.setattr(endpoint, "fall", falls.append)
            failing.append(NoEndpointError("lost"))
            await until(lambda: not failing)
            await asyncio.sleep(0.2)
            assert not falls
            failing.extend([NoEndpointError("lost")] * 2)
            await until(lambda: falls)
            assert falls == ["lost"]

    asyncio.run(main())


def test_a_model_that_changes_while_the_server_is_well_is_noticed(monkeypatch):
    monkeypatch.setattr(_watching, "_CHECKS_PER_QUESTION", 2)

    async def main():
        async with sim() as (server, target), started(target) as endpoints:
            await until(endpoints.ready)
            (endpoint,) = endpoints.ready()
            transcoder = endpoint.transcoder
            await asyncio.sleep(0.3)
            assert endpoint.transcoder is transcoder
            server._engine.model = ModelInfo(served_model_name="renamed", max_model_len=100)
            await until(lambda: endpoint.model.names == ("renamed",))
            assert endpoint.is_ready
            assert endpoint.transcoder is not transcoder

    asyncio.run(main())


@pytest.mark.parametrize(
    ("settings", "options", "said"),
    [
        ("dialect=vllm.engine", BUILTIN, "no vllm.engine model server: it speaks sglang.api"),
        ("dialect=sglang.runtime", TranscoderOptions(), "no sglang.runtime model server: it speaks sglang.api"),
        ("model=other", BUILTIN, "it serves sim-model, not other"),
        ("dialect=auto", TranscoderOptions(), "no tokenizer from the model server"),
    ],
)
def test_a_wrong_configuration_is_one_warning_and_never_ready(caplog, settings, options, said):
    async def main():
        async with sim("sglang.api") as (_, target), started(f"{target},{settings}", options=options) as endpoints:
            (endpoint,) = endpoints
            await until(lambda: said in endpoint.reason)
            await asyncio.sleep(0.2)
            assert not endpoints.ready()

    asyncio.run(main())
    (warning,) = (record for record in caplog.records if record.name == "gaie_codec.ext_proc")
    assert warning.levelname == "WARNING"
    assert said in warning.getMessage()
    assert "\n" not in warning.getMessage()
    assert warning.exc_info is None


def test_what_is_configured_is_spoken_without_being_found_out():
    async def main():
        async with sim(snapshot="smg-0.4.28") as (_, target):
            async with started(f"{target},dialect=vllm.engine,snapshot=smg-0.4.20") as endpoints:
                await until(endpoints.ready)
                assert endpoints.ready()[0].candidate().snapshot == "smg-0.4.20"
            async with started(f"{target},snapshot=smg-0.4.20,model=sim-model") as endpoints:
                await until(endpoints.ready)
                assert endpoints.ready()[0].candidate().snapshot == "smg-0.4.20"

    asyncio.run(main())


def test_an_http_server_is_ready_while_it_takes_connections():
    async def main():
        port = free_port()
        target = f"127.0.0.1:{port}"
        async with started(f"{target},dialect=http,model=m", options=TranscoderOptions()) as endpoints:
            (endpoint,) = endpoints
            await until(lambda: "no connection: Connect" in endpoint.reason)
            assert endpoint.is_known
            await endpoint.wait_until_known(0)
            server = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", port)
            await until(endpoints.ready)
            assert (endpoint.transcoder, endpoint.observer, endpoint.tokenizer, endpoint.upstream) == (None,) * 4
            candidate = endpoint.candidate()
            assert (candidate.dialect, candidate.snapshot, candidate.model) == ("http", "", "m")
            server.close()
            await server.wait_closed()
            await until(lambda: not endpoints.ready())

    asyncio.run(main())


def test_ipv6():
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("no IPv6 here")

    async def main():
        async with sim(address="[::1]:0") as (_, target), started(target.replace("::1", "0:0::1")) as endpoints:
            await until(endpoints.ready)
            assert endpoints.ready()[0].address == target
            assert endpoints.get(target) is endpoints.for_address(target.replace("::1", "0::1")) is endpoints.ready()[0]
        server = await asyncio.start_server(lambda _, writer: writer.close(), "::1", 0)
        async with server, started(f"[::1]:{server.sockets[0].getsockname()[1]},dialect=http") as endpoints:
            await until(endpoints.ready)

    asyncio.run(main())


def test_requests_in_flight_are_counted():
    async def main():
        async with started("127.0.0.1:1,dialect=http") as endpoints:
            (endpoint,) = endpoints
            endpoints.acquire(endpoint)
            endpoints.acquire(endpoint)
            assert endpoint.candidate().in_flight == 2
            endpoints.release(endpoint)
            assert endpoint.candidate().in_flight == 1
            endpoints.release(endpoint)
            with pytest.raises(UsageError, match=r"127\.0\.0\.1:1 has no request in flight"):
                endpoints.release(endpoint)

    asyncio.run(main())


def test_a_server_that_somebody_saw_fail_is_checked_at_once():
    async def main():
        async with sim() as (server, target), started(target, check_interval_s=1000) as endpoints:
            await until(endpoints.ready)
            (endpoint,) = endpoints
            await server.stop()
            await asyncio.sleep(0.1)
            assert endpoint.is_ready
            endpoint.check_now()
            await until(lambda: not endpoint.is_ready)

    asyncio.run(main())


def test_a_mistake_of_ours_does_not_end_the_watch(monkeypatch, caplog):
    async def main():
        async with sim() as (_, target), started(target) as endpoints:
            await until(endpoints.ready)
            with monkeypatch.context() as patch:
                patch.setattr(_watching, "check_health", None)
                await until(lambda: not endpoints.ready())
            await until(endpoints.ready)

    asyncio.run(main())
    assert "a bug of gaie-codec" in caplog.text
    assert "TypeError" in caplog.text


# What is configured changes


def test_a_file_is_read_again_when_it_changes(tmp_path, caplog):
    path = tmp_path / "endpoints"

    async def main():
        async with sim() as (_, one), sim() as (_, two), sim() as (_, fixed):
            path.write_text(f"{one}\n")
            async with started(fixed, path=path) as endpoints:
                await until(lambda: len(endpoints.ready()) == 2)
                stays, goes = endpoints.ready()
                assert (stays.address, goes.address) == (fixed, one)
                endpoints.acquire(goes)

                path.write_text(f"{two}\n")
                await until(lambda: [endpoint.address for endpoint in endpoints.ready()] == [fixed, two])
                assert endpoints.ready()[0] is stays
                assert endpoints.get(one) is None
                assert not goes.is_ready
                assert goes.reason == "it was taken out of the configuration"
                assert goes.transcoder is not None, "for what is in flight"
                endpoints.release(goes)

                for wrong in ("nonsense", f"{two}\n{fixed}"):
                    caplog.clear()
                    path.write_text(wrong)
                    await until(lambda: caplog.records)
                    await asyncio.sleep(0.2)
                    (record,) = caplog.records
                    assert "what was read before stays" in record.getMessage()
                    assert [endpoint.address for endpoint in endpoints.ready()] == [fixed, two]
                path.unlink()
                await until(lambda: "No such file" in caplog.text)
                assert len(endpoints.ready()) == 2

                path.write_text(f"{two},dialect=vllm.engine\n")
                await until(lambda: endpoints.get(two).spec.dialect == "vllm.engine")
                await until(lambda: len(endpoints.ready()) == 2)
                path.write_text("# nobody\n")
                await until(lambda: endpoints.ready() == [stays])

    asyncio.run(main())


def test_a_file_in_a_config_map_changes_by_a_link(tmp_path):
    for name, text in (("first", "127.0.0.1:1\n"), ("second", "127.0.0.1:2\n")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "endpoints").write_text(text)
    (tmp_path / "data").symlink_to("first")
    (tmp_path / "endpoints").symlink_to("data/endpoints")

    async def main():
        async with started(path=tmp_path / "endpoints") as endpoints:
            assert [endpoint.address for endpoint in endpoints] == ["127.0.0.1:1"]
            (tmp_path / "new").symlink_to("second")
            (tmp_path / "new").rename(tmp_path / "data")
            await until(lambda: [endpoint.address for endpoint in endpoints] == ["127.0.0.1:2"])

    asyncio.run(main())


def test_a_name_is_looked_up_again(monkeypatch, caplog):
    leads_to = ["127.0.0.1"]

    async def look_up(loop, host, port, **_):
        if not leads_to:
            raise OSError("no such host")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in leads_to]

    monkeypatch.setattr("asyncio.base_events.BaseEventLoop.getaddrinfo", look_up)

    async def run():
        async with started("pods.test:9,dialect=http") as endpoints:
            first = endpoints.get("127.0.0.1:9")
            leads_to.append("127.0.0.2")
            await until(lambda: endpoints.get("127.0.0.2:9") is not None)
            assert endpoints.get("127.0.0.1:9") is first, "who stays is not asked anew"
            leads_to.clear()
            await until(lambda: "its addresses from before stay" in caplog.text)
            leads_to.append("127.0.0.2")
            await until(lambda: endpoints.get("127.0.0.1:9") is None)
            assert [endpoint.address for endpoint in endpoints] == ["127.0.0.2:9"]

    with caplog.at_level("INFO"):
        asyncio.run(run())


def test_a_name_that_is_lost_does_not_keep_the_others(monkeypatch, caplog):
    leads_to = {"a.test": "127.0.0.1", "b.test": "127.0.0.2"}

    async def look_up(loop, host, port, **_):
        if host not in leads_to:
            raise OSError("no such host")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (leads_to[host], port))]

    monkeypatch.setattr("asyncio.base_events.BaseEventLoop.getaddrinfo", look_up)

    async def run():
        async with started("a.test:9,dialect=http", "b.test:9,dialect=http") as endpoints:
            del leads_to["a.test"]
            leads_to["b.test"] = "127.0.0.3"
            await until(lambda: endpoints.get("127.0.0.3:9") is not None)
            assert {endpoint.address for endpoint in endpoints} == {"127.0.0.1:9", "127.0.0.3:9"}
            leads_to.update({"a.test": "127.0.0.3", "b.test": "127.0.0.1"})
            await until(lambda: endpoints.get("127.0.0.1:9").spec.target == "b.test:9")

    asyncio.run(run())


def test_settings_that_change_leave_a_ready_server_ready(caplog):
    async def run():
        async with sim() as (_, address), started(address) as endpoints:
            await until(lambda: endpoints.ready())
            await endpoints.replace([decode_endpoint(f"{address},dialect=vllm.engine")])
            for _ in range(40):
                assert endpoints.ready()
                await asyncio.sleep(0.01)

    asyncio.run(run())
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_replacement_that_is_wrong_changes_nothing():
    async def main():
        async with started("127.0.0.1:1") as endpoints:
            (endpoint,) = endpoints
            with pytest.raises(UsageError, match="there twice"):
                await endpoints.replace([decode_endpoint("127.0.0.1:2")] * 2)
            await endpoints.replace([decode_endpoint("127.0.0.1:2"), decode_endpoint("127.0.0.1:1")])
            assert [one.address for one in endpoints] == ["127.0.0.1:2", "127.0.0.1:1"]
            assert endpoints.get("127.0.0.1:1") is endpoint

    asyncio.run(main())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"specs": [decode_endpoint("127.0.0.1:1")], "options": TranscoderOptions(tokenizer="./nowhere")}, "tokenizer ./nowhere: no such"),
        ({"specs": [decode_endpoint("127.0.0.1:1")] * 2}, "there twice"),
        ({"path": "./nowhere"}, "endpoints file ./nowhere: No such file"),
        ({"default_dialect": "vllm"}, "no dialect 'vllm'"),
        ({"default_dialect": "vllm.engine", "default_snapshot": "x"}, "no snapshot 'x'"),
    ],
)
def test_what_is_wrong_at_the_start_is_said_at_the_start(arguments, said):
    with pytest.raises(UsageError, match=said):
        asyncio.run(Endpoints.start(**arguments))


# Behind another endpoint picker


def test_an_address_that_another_picker_named_is_of_use_at_once_and_learnt_of_later():
    async def main():
        async with sim(model=ModelInfo(served_model_name="told")) as (_, target), started(default_dialect="vllm.engine") as endpoints:
            endpoint = endpoints.for_address(f"{target},10.0.0.1:80")
            assert endpoint.is_known
            assert endpoint.is_assigned
            assert not endpoint.model.names
            assert endpoint.transcoder.model.max_model_len
            other = endpoints.for_address("127.0.0.1:1")
            assert other.transcoder is endpoint.transcoder
            await until(lambda: endpoint.is_ready)
            assert endpoint.model.names == ("told",)
            assert endpoints.for_address(target) is endpoints.get(target) is endpoint
            assert endpoints.ready() == [], "which are to be picked from"
            assert list(endpoints) == [other, endpoint]

    asyncio.run(main())


def test_what_another_picker_named_has_to_be_asked_where_nothing_is_assumed():
    async def main():
        async with sim() as (_, target):
            for options, dialect in ((TranscoderOptions(), "vllm.engine"), (BUILTIN, "auto")):
                async with started(options=options, default_dialect=dialect) as endpoints:
                    endpoint = endpoints.for_address(target)
                    assert not endpoint.is_known
                    await endpoint.wait_until_known(LIMIT_S)
                    assert endpoint.transcoder.model.names == ("sim-model",)
            async with started(default_dialect="http") as endpoints:
                assert endpoints.for_address(target).is_known

    asyncio.run(main())


def test_addresses_that_cannot_be_are_refused():
    async def main():
        async with started() as endpoints:
            with pytest.raises(NoEndpointError, match="no default dialect"):
                endpoints.for_address("127.0.0.1:1")
            with pytest.raises(MalformedDestinationError):
                endpoints.for_address("localhost:1")

    asyncio.run(main())


def test_addresses_that_were_named_are_forgotten_when_there_are_too_many(monkeypatch):
    monkeypatch.setattr(endpoints_module, "_MAX_ASSIGNED", 2)

    async def main():
        async with started(default_dialect="http") as endpoints:
            one, two = (endpoints.for_address(f"127.0.0.1:{port}") for port in (1, 2))
            endpoints.acquire(one)
            three = endpoints.for_address("127.0.0.1:3")
            assert set(endpoints) == {one, three}, "the oldest without a request"
            endpoints.acquire(three)
            four = endpoints.for_address("127.0.0.1:4")
            assert set(endpoints) == {one, three, four}
            assert two.in_flight == 0

    asyncio.run(main())
