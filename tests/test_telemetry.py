"""What the shims measure: records become metrics with bounded labels, loads get the protocol's names, spans lead on to the model server."""

from __future__ import annotations

import asyncio
import re
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import asynccontextmanager, closing
from pathlib import Path

import httpx
import msgspec
import pytest
from click.testing import CliRunner
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from opentelemetry.trace import NoOpTracerProvider, SpanKind, StatusCode
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from gaie_codec import (
    Capacity,
    Code,
    CodecError,
    Loads,
    MalformedRequestError,
    ModelInfo,
    RankLoads,
    Transcoder,
    UpstreamStatusError,
    Usage,
    UsageError,
    adapters,
    snapshots,
)
from gaie_codec.asgi.app import create_app
from gaie_codec.cli._commands import cli
from gaie_codec.ext_proc._accounting import EndpointsCollector
from gaie_codec.sim import Script, SimServer
from gaie_codec.telemetry import RequestMeter, RequestRecord, tracing
from gaie_codec.telemetry.exporting import Exporter
from gaie_codec.telemetry.loads import LoadsCollector, LoadsScraper
from gaie_codec.telemetry.metrics import Metrics, serve_metrics
from gaie_codec.telemetry.tracing import Tracing
from gaie_codec.tokenizer_sources import load_tokenizer
from gaie_codec.upstream import Upstream

ROOT = Path(__file__).parents[1]
TOKENIZER = load_tokenizer("builtin")
MODE = "http-in-grpc-out"
CHAT = "/v1/chat/completions"
TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def scraped(registry):
    """Samples by name: a list of (labels, value)."""
    samples = {}
    for family in text_string_to_metric_families(generate_latest(registry).decode()):
        for sample in family.samples:
            samples.setdefault(sample.name, []).append((sample.labels, sample.value))
    return samples


def value(samples, name, **labels):
    found = [amount for told, amount in samples.get(name, ()) if labels.items() <= told.items()]
    return found[0] if len(found) == 1 else found


# Metrics


def test_a_record_becomes_metrics():
    metrics = Metrics()
    started = metrics.started()
    assert value(scraped(metrics.registry), "gaie_codec_requests_in_flight") == 1
    record = RequestRecord(
        mode=MODE,
        path=CHAT,
        dialect="vllm.engine",
        upstream="10.0.0.1:50051",
        http_status=200,
        duration_s=2.0,
        ttft_s=1.0,
        usage=Usage(prompt_tokens=10, completion_tokens=6, cached_tokens=4, reasoning_tokens=2),
        frames_sent=1,
        frames_received=7,
        upstream_bytes_sent=100,
        upstream_bytes_received=700,
        client_bytes_received=50,
        client_bytes_sent=900,
        dropped=("logit_bias", "client's own", "another"),
    )
    metrics.ended(started, record)
    metrics.ended(started, record)  # only once
    told = scraped(metrics.registry)
    of_request = {"mode": MODE, "dialect": "vllm.engine", "path": CHAT}
    for name, expected in {
        "requests_total": 1,
        "request_duration_seconds_sum": 2,
        "time_to_first_token_seconds_sum": 1,
        "time_per_output_token_seconds_sum": 0.2,
        "prompt_tokens_total": 10,
        "completion_tokens_total": 6,
        "cached_prompt_tokens_total": 4,
        "reasoning_tokens_total": 2,
    }.items():
        assert value(told, f"gaie_codec_{name}", **of_request) == expected, name
    assert value(told, "gaie_codec_requests_in_flight") == 0
    assert value(told, "gaie_codec_frames_total", direction="sent") == 1
    assert value(told, "gaie_codec_frames_total", direction="received") == 7
    assert value(told, "gaie_codec_bytes_total", peer="client", direction="received") == 50
    assert value(told, "gaie_codec_bytes_total", peer="client", direction="sent") == 900
    assert value(told, "gaie_codec_bytes_total", peer="upstream", direction="sent") == 100
    assert value(told, "gaie_codec_bytes_total", peer="upstream", direction="received") == 700
    assert value(told, "gaie_codec_dropped_fields_total", field="logit_bias") == 1
    assert value(told, "gaie_codec_dropped_fields_total", field="other") == 2
    assert value(told, "gaie_codec_upstream_requests_total", upstream="10.0.0.1:50051", code="OK") == 1
    assert "gaie_codec_errors_total" not in told


@pytest.mark.parametrize(
    ("record", "error_type", "code"),
    [
        (RequestRecord(mode=MODE, error=MalformedRequestError("no")), "MalformedRequestError", "INVALID_ARGUMENT"),
        (RequestRecord(mode=MODE, error=UpstreamStatusError(Code.UNAVAILABLE, "gone")), "UpstreamStatusError", "UNAVAILABLE"),
        (RequestRecord(mode=MODE, error=type("Foreign", (CodecError,), {})("?")), "other", "INTERNAL"),
        (RequestRecord(mode=MODE, error=ValueError("?")), "bug", "INTERNAL"),
        (RequestRecord(mode=MODE, is_cancelled=True), "cancelled", "CANCELLED"),
    ],
)
def test_errors_are_counted_by_their_class_and_code(record, error_type, code):
    metrics = Metrics()
    metrics.ended(metrics.started(), record)
    assert value(scraped(metrics.registry), "gaie_codec_errors_total", error_type=error_type, code=code) == 1


def test_a_client_cannot_add_series():
    metrics = Metrics()
    for number in range(2000):
        record = RequestRecord(
            mode=f"mode-{number}",
            path=f"/v1/{number}",
            dialect=f"dialect-{number}",
            upstream=f"10.0.0.1:{number}",
            http_status=number,
            dropped=(f"field {number}",),
        )
        metrics.ended(metrics.started(), record)
    told = scraped(metrics.registry)
    assert {labels["path"] for labels, _ in told["gaie_codec_requests_total"]} == {"other"}
    assert {labels["mode"] for labels, _ in told["gaie_codec_requests_total"]} == {"other"}
    assert {labels["field"] for labels, _ in told["gaie_codec_dropped_fields_total"]} == {"other"}
    assert len({labels["dialect"] for labels, _ in told["gaie_codec_requests_total"]}) == 33
    assert len({labels["upstream"] for labels, _ in told["gaie_codec_upstream_requests_total"]}) == 1001
    assert value(told, "gaie_codec_upstream_requests_total", upstream="other") == 1000


def test_a_host_can_name_paths_of_its_own():
    metrics = Metrics()
    path = "/vllm.grpc.engine.VllmEngine/Generate"
    metrics.add_paths([path])
    metrics.ended(metrics.started(), RequestRecord(mode="grpc-in-grpc-out", path=path))
    assert value(scraped(metrics.registry), "gaie_codec_requests_total", path=path, status="none") == 1


def test_two_metrics_do_not_meet():
    first, second = Metrics(), Metrics()
    first.ended(first.started(), RequestRecord(mode=MODE))
    assert "gaie_codec_requests_total" not in scraped(second.registry)
    with pytest.raises(ValueError, match="Duplicated"):
        Metrics(first.registry)


def test_metrics_are_served_over_http_until_the_server_is_closed():
    metrics = Metrics()
    metrics.ended(metrics.started(), RequestRecord(mode=MODE, path=CHAT, http_status=200))
    server = serve_metrics("127.0.0.1:0", metrics.registry)
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics", timeout=5) as answer:
            names = {family.name for family in text_string_to_metric_families(answer.read().decode())}
        assert {"gaie_codec_requests", "gaie_codec_build_info"} <= names
    finally:
        server.close()
    with closing(socket.socket()) as again:
        assert again.connect_ex(("127.0.0.1", server.port)) != 0


@pytest.mark.parametrize("listen", ["9090", "127.0.0.1:", "127.0.0.1:70000", "::1:9090", "127.0.0.1:x", "", "127.0.0.1:\u0664"])
def test_a_bad_address_is_refused_by_name(listen):
    with pytest.raises(UsageError, match=r"metrics-listen .*HOST:PORT"):
        serve_metrics(listen, CollectorRegistry())


def test_a_port_that_is_taken_is_refused_by_name():
    with closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UsageError, match=r"metrics-listen 127.0.0.1:[0-9]+: "):
            serve_metrics(f"127.0.0.1:{taken.getsockname()[1]}", CollectorRegistry())


def test_the_document_names_every_metric():
    registry = Metrics().registry
    collector = LoadsCollector()
    registry.register(collector)
    families = [*registry.collect(), *collector.describe(), *EndpointsCollector(()).describe()]
    ours = {family.name + ("_total" if family.type == "counter" else "_info" if family.type == "info" else "") for family in families}
    types = {family.name: family.type for family in families}
    rows = re.findall(r"^\| `([a-z_:]+)` \| ([a-z]+) \|", (ROOT / "docs" / "metrics.md").read_text(), re.MULTILINE)
    assert {name for name, _ in rows} == ours
    for name, kind in rows:
        assert kind == types.get(name, types.get(name.removesuffix("_total").removesuffix("_info"))), name


# Loads


LOADS = Loads(
    ranks=(RankLoads(running=2, waiting=3, kv_cache_usage=0.5, total_tokens=160), RankLoads(rank=1, running=1, kv_cache_usage=0.25))
)


def test_loads_have_the_names_of_their_family():
    collector = LoadsCollector()
    registry = CollectorRegistry()
    registry.register(collector)
    collector.update("10.0.0.1:1", "vllm.engine", "m", LOADS, Capacity(block_size=16))
    collector.update("10.0.0.2:1", "sglang.runtime", "s", LOADS, Capacity(block_size=1, num_blocks=99))
    collector.update("10.0.0.3:1", "vllm.inference", "i", None, Capacity(block_size=16, num_blocks=7, max_loras=4))
    collector.update("10.0.0.4:1", "trtllm.service", "t", LOADS)
    told = scraped(registry)
    assert told["vllm:num_requests_waiting"] == [({"model_name": "m", "endpoint": "10.0.0.1:1"}, 3)]
    assert value(told, "vllm:num_requests_running") == 3
    assert value(told, "vllm:kv_cache_usage_perc") == 0.375
    assert value(told, "vllm:cache_config_info", endpoint="10.0.0.1:1", block_size="16", num_gpu_blocks="10") == 1
    assert value(told, "vllm:cache_config_info", endpoint="10.0.0.3:1", block_size="16", num_gpu_blocks="7") == 1
    assert value(told, "sglang:num_queue_reqs") == 3
    assert value(told, "sglang:num_running_reqs") == 3
    assert value(told, "sglang:token_usage") == 0.375
    assert value(told, "sglang:cache_config_info", page_size="1", num_pages="99") == 1
    assert "t" not in {labels.get("model_name") for rows in told.values() for labels, _ in rows}


def test_a_registry_takes_one_collector_of_loads():
    registry = CollectorRegistry()
    registry.register(LoadsCollector())
    with pytest.raises(ValueError, match="Duplicated"):
        registry.register(LoadsCollector())


def test_old_loads_vanish_and_so_do_those_of_an_endpoint_that_is_gone():
    now = [100.0]
    collector = LoadsCollector(stale_s=5.0, clock=lambda: now[0])
    registry = CollectorRegistry()
    registry.register(collector)
    collector.update("a:1", "vllm.engine", "m", LOADS)
    collector.update("b:1", "vllm.engine", "m", LOADS)
    collector.fail("a:1")
    assert collector.latest("a:1") is LOADS
    collector.forget("b:1")
    assert collector.latest("b:1") is None
    assert [labels["endpoint"] for labels, _ in scraped(registry)["vllm:num_requests_waiting"]] == ["a:1"]
    now[0] += 5.1
    told = scraped(registry)
    assert "vllm:num_requests_waiting" not in told
    assert collector.latest("a:1") is None
    assert value(told, "gaie_codec_loads_failures_total", endpoint="a:1") == 1


class Asked:
    """Answers by path, or an error."""

    def __init__(self, **answers):
        self.answers = answers
        self.paths = []

    async def unary(self, path, message, *, timeout_s):
        self.paths.append(path.rpartition("/")[2])
        answer = self.answers[self.paths[-1]]
        if isinstance(answer, Exception):
            raise answer
        return answer


ENGINE = adapters.get(snapshots.load("vllm.engine"))


def test_a_size_that_no_one_tells_is_not_missed_and_a_failure_asks_for_it_again():
    async def play():
        asked = Asked(GetServerInfo=UpstreamStatusError(Code.UNIMPLEMENTED, ""), GetLoads=ENGINE.encode_loads(LOADS).SerializeToString())
        collector = LoadsCollector()
        scraper = LoadsScraper(asked, ENGINE, collector, endpoint="a:1")
        assert await scraper.scrape() == collector.latest("a:1") == LOADS
        await scraper.scrape()
        assert asked.paths == ["GetServerInfo", "GetLoads", "GetLoads"]
        asked.answers["GetLoads"] = b"\xff"
        with pytest.raises(CodecError, match="are no vllm"):
            await scraper.scrape()
        asked.answers["GetLoads"] = b""
        assert await scraper.scrape() == Loads()
        assert asked.paths[4:] == ["GetServerInfo", "GetLoads"]

    asyncio.run(play())


def test_the_loop_goes_on_after_failures_and_logs_the_first_of_them(caplog):
    async def play():
        asked = Asked(GetServerInfo=b"", GetLoads=UpstreamStatusError(Code.UNAVAILABLE, "starting"))
        collector = LoadsCollector()
        task = asyncio.create_task(LoadsScraper(asked, ENGINE, collector, endpoint="a:1", interval_s=0.001).run())
        while asked.paths.count("GetLoads") < 3:
            await asyncio.sleep(0.001)
        asked.answers["GetLoads"] = ENGINE.encode_loads(LOADS).SerializeToString()
        while collector.latest("a:1") is None:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(asyncio.wait_for(play(), 10))
    assert len([record for record in caplog.records if "no loads from a:1" in record.message]) == 1


@pytest.mark.parametrize("dialect", adapters.DIALECTS)
def test_a_real_server_of_each_dialect_is_scraped(dialect):
    async def play():
        server = SimServer(dialect, script=Script(waiting=7, kv_cache_usage=0.25))
        port = await server.start("127.0.0.1:0")
        upstream = Upstream(f"127.0.0.1:{port}")
        exporter = Exporter("127.0.0.1:0", interval_s=0.05)
        try:
            async with exporter:
                exporter.scrape(upstream, server.adapter, endpoint=upstream.target, model="m")
                await asyncio.sleep(0.5)
                async with httpx.AsyncClient() as client:
                    text = (await client.get(f"http://{exporter.address}/metrics")).text
                exporter.forget(upstream.target)
                assert exporter.loads.latest(upstream.target) is None
        finally:
            await upstream.close()
            await server.stop()
        return {sample.name: sample for family in text_string_to_metric_families(text) for sample in family.samples}

    told = asyncio.run(play())
    names = {name for name in told if name.startswith(("vllm:", "sglang:"))}
    family, _, _ = dialect.partition(".")
    cache = {f"{family}:cache_config_info"}
    everything = {
        "vllm": cache | {"vllm:num_requests_waiting", "vllm:num_requests_running", "vllm:kv_cache_usage_perc"},
        "sglang": cache | {"sglang:num_queue_reqs", "sglang:num_running_reqs", "sglang:token_usage"},
    }[family]
    assert names == {"vllm.inference": cache, "sglang.api": set()}.get(dialect, everything)
    if names == everything:
        waiting, usage = ("num_requests_waiting", "kv_cache_usage_perc") if family == "vllm" else ("num_queue_reqs", "token_usage")
        assert told[f"{family}:{waiting}"].value == 7
        assert told[f"{family}:{usage}"].value == 0.25
        assert told[f"{family}:{waiting}"].labels["model_name"] == "m"
    if names:
        assert {"16", "1024"} <= set(told[f"{family}:cache_config_info"].labels.values())


def test_an_exporter_has_an_address_only_while_it_listens():
    with pytest.raises(UsageError, match="not entered"):
        _ = Exporter("127.0.0.1:0").address


# Traces


def provider(**options):
    exporter = InMemorySpanExporter()
    made = TracerProvider(**options)
    made.add_span_processor(SimpleSpanProcessor(exporter))
    return made, exporter


def test_a_span_continues_the_clients_trace_and_its_context_goes_on():
    made, exporter = provider()
    handle = Tracing(made).start("POST", CHAT, {"traceparent": TRACEPARENT, "tracestate": "a=b", "accept": "x"})
    handle.end(
        RequestRecord(
            mode=MODE,
            path=CHAT,
            dialect="vllm.engine",
            model="m",
            http_status=503,
            error=UpstreamStatusError(Code.UNAVAILABLE, ""),
            usage=Usage(prompt_tokens=3, completion_tokens=2),
        )
    )
    handle.end(RequestRecord(mode=MODE))
    (span,) = exporter.get_finished_spans()
    assert span.name == f"POST {CHAT}"
    assert span.kind is SpanKind.SERVER
    assert f"{span.parent.span_id:016x}" == TRACEPARENT.split("-")[2]
    assert handle.headers == {
        "traceparent": f"00-{TRACEPARENT.split('-')[1]}-{span.context.span_id:016x}-01",
        "tracestate": "a=b",
    }
    assert handle.replace_in({"accept": "x", "tracestate": "old"}) == {"accept": "x", **handle.headers}
    assert span.status.status_code is StatusCode.ERROR
    assert dict(span.attributes) == {
        "http.request.method": "POST",
        "http.route": CHAT,
        "http.response.status_code": 503,
        "error.type": "UpstreamStatusError",
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "vllm",
        "gen_ai.request.model": "m",
        "gen_ai.usage.input_tokens": 3,
        "gen_ai.usage.output_tokens": 2,
        "gaie_codec.mode": MODE,
        "gaie_codec.dialect": "vllm.engine",
    }


def test_a_trace_begins_here_where_the_client_has_none():
    made, exporter = provider()
    handle = Tracing(made).start("BREW", "", {"traceparent": "nonsense"})
    handle.end(RequestRecord(mode=MODE, http_status=404, error=MalformedRequestError("")))
    (span,) = exporter.get_finished_spans()
    assert span.parent is None
    assert span.name == "HTTP"
    assert span.status.status_code is StatusCode.UNSET, "the client's fault is no error of the server's span"
    assert f"{span.context.trace_id:032x}" in handle.headers["traceparent"]


def test_a_trace_that_is_not_sampled_goes_on_unsampled():
    made, exporter = provider(sampler=ALWAYS_OFF)
    handle = Tracing(made).start("POST", CHAT, {"traceparent": TRACEPARENT})
    handle.end(RequestRecord(mode=MODE))
    assert exporter.get_finished_spans() == ()
    assert handle.headers["traceparent"].startswith("00-0af7651916cd43dd8448eb211c80319c-")
    assert handle.headers["traceparent"].endswith("-00")
    assert handle.headers["traceparent"] != TRACEPARENT


@pytest.mark.parametrize(("is_installed", "tracer_provider"), [(True, None), (True, NoOpTracerProvider()), (False, None)])
def test_without_an_sdk_the_clients_context_passes_unchanged(is_installed, tracer_provider, monkeypatch):
    monkeypatch.setattr(tracing, "IS_AVAILABLE", is_installed)
    for headers in ({"traceparent": TRACEPARENT, "tracestate": "a=b, c=d"}, {"traceparent": "nonsense"}, {}):
        handle = Tracing(tracer_provider).start("POST", CHAT, headers)
        assert handle.headers == headers
        handle.end(RequestRecord(mode=MODE))


def test_tracing_is_imported_without_its_package():
    code = (
        "import sys; sys.modules['opentelemetry'] = None; from gaie_codec.telemetry import tracing;"
        "print(tracing.Tracing().start('GET', '', {'traceparent': 't'}).headers)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "{'traceparent': 't'}\n"


# The meter


def test_a_meter_ends_once_and_tells_both():
    metrics = Metrics()
    made, exporter = provider()
    meter = RequestMeter(MODE, path=CHAT, headers={"traceparent": TRACEPARENT, "x": "y"}, metrics=metrics, tracing=Tracing(made))
    assert meter.headers["x"] == "y"
    assert meter.headers["traceparent"] != TRACEPARENT
    meter.http_status = 200
    record = meter.end()
    assert record.duration_s > 0
    meter.end()
    assert len(exporter.get_finished_spans()) == 1
    assert value(scraped(metrics.registry), "gaie_codec_requests_total", path=CHAT, status="200") == 1


def test_a_meter_has_every_field_of_the_record():
    meter = RequestMeter(MODE)
    assert {name for name in RequestRecord.__struct_fields__ if name != "duration_s"} <= set(RequestMeter.__slots__)
    assert msgspec.structs.replace(meter.end(), duration_s=0.0) == RequestRecord(mode=MODE)


# The ASGI shim


class Noting(SimServer):
    """Notes the trace context that comes with each call, as metadata or within the message."""

    def _handler(self, service, name, method):
        async def noting(message, context):
            told = dict(context.invocation_metadata()) | dict(getattr(message, "trace_headers", {}))
            self.contexts.append((name, told.get("traceparent"), told.get("tracestate")))
            return await method(message, context)

        self.contexts = []
        return super()._handler(service, name, noting)


@asynccontextmanager
async def shim(dialect="vllm.engine", script=None, **options):
    """A client of the application in front of a simulated server, and that."""
    server = Noting(dialect, script=script)
    port = await server.start("127.0.0.1:0")
    upstream = Upstream(f"127.0.0.1:{port}")
    try:
        transcoder = Transcoder(dialect, tokenizer=TOKENIZER, model=ModelInfo(max_model_len=2048), unsupported="drop")
        app = create_app(upstream, transcoder, **options)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as client:
            yield client, server, upstream
    finally:
        await upstream.close()
        await server.stop()


def chat(**fields):
    return {"model": "", "messages": [{"role": "user", "content": "Hello there"}], **fields}


def test_the_shim_measures_streams_and_bodies():
    metrics = Metrics()

    async def play():
        async with shim(metrics=metrics, script=Script(tokens=[[5], [6], [7]], delay_ms=20)) as (client, _, upstream):
            streamed = await client.post(CHAT, json=chat(stream=True, seed=2**40, user="u", foo=1))
            assert streamed.status_code == 400, "a seed is out of the range"
            streamed = await client.post(CHAT, json=chat(stream=True, bad_words=["x"], foo=1))
            assert streamed.text.endswith("data: [DONE]\n\n")
            body = await client.post(CHAT, json=chat(n=2))
            assert body.status_code == 200
            assert (await client.post("/v1/nonsense", json={})).status_code == 404
            assert (await client.get("/health")).status_code == 200
            return len(streamed.content) + len(body.content), body.json()["usage"], upstream.target

    answered, usage, target = asyncio.run(play())
    told = scraped(metrics.registry)
    of_chat = {"mode": MODE, "dialect": "vllm.engine", "path": CHAT}
    assert value(told, "gaie_codec_requests_total", **of_chat, status="200") == 2
    assert value(told, "gaie_codec_requests_total", **of_chat, status="400") == 1
    assert value(told, "gaie_codec_requests_total", path="other", status="404") == 1
    assert value(told, "gaie_codec_requests_total", path="/health", status="200") == 1
    assert value(told, "gaie_codec_errors_total", path=CHAT, code="INVALID_ARGUMENT") == 1
    assert value(told, "gaie_codec_errors_total", path="other", error_type="UnsupportedEndpointError") == 1
    assert value(told, "gaie_codec_time_to_first_token_seconds_count", **of_chat) == 1
    assert 0.02 <= value(told, "gaie_codec_time_to_first_token_seconds_sum", **of_chat) < 5
    assert value(told, "gaie_codec_time_per_output_token_seconds_count", **of_chat) == 1
    assert value(told, "gaie_codec_request_duration_seconds_count", **of_chat) == 3
    assert value(told, "gaie_codec_prompt_tokens_total", **of_chat) == 2 * usage["prompt_tokens"]
    assert value(told, "gaie_codec_completion_tokens_total", **of_chat) == 3 + usage["completion_tokens"] == 9
    assert value(told, "gaie_codec_frames_total", direction="sent") == 2
    assert value(told, "gaie_codec_frames_total", direction="received") == 3 + 1 + 2
    assert value(told, "gaie_codec_bytes_total", peer="client", direction="sent") > answered
    assert value(told, "gaie_codec_bytes_total", peer="upstream", direction="received") > 0
    assert value(told, "gaie_codec_dropped_fields_total", field="bad_words") == 1
    assert value(told, "gaie_codec_dropped_fields_total", field="other") == 1
    assert value(told, "gaie_codec_upstream_requests_total", upstream=target, code="OK") == 2
    assert value(told, "gaie_codec_requests_in_flight") == 0


def test_the_shim_counts_several_calls_and_a_failure_in_the_stream():
    metrics = Metrics()

    async def play():
        async with shim("vllm.inference", metrics=metrics, script=Script(tokens=[[5], [6]])) as (client, _, _):
            assert (await client.post(CHAT, json=chat(n=3, stream=True))).status_code == 200
        async with shim(metrics=metrics) as (client, _, _):
            broken = '[[sim {"tokens": [[5], [6], [7]], "error": {"code": "UNAVAILABLE", "after": 2}}]]'
            answer = await client.post(CHAT, json=chat(messages=[{"role": "user", "content": broken}], stream=True))
            assert answer.status_code == 200
            assert "[DONE]" not in answer.text

    asyncio.run(play())
    told = scraped(metrics.registry)
    assert value(told, "gaie_codec_frames_total", dialect="vllm.inference", direction="sent") == 3
    assert value(told, "gaie_codec_frames_total", dialect="vllm.inference", direction="received") >= 6
    assert value(told, "gaie_codec_errors_total", dialect="vllm.engine", error_type="UpstreamStatusError", code="UNAVAILABLE") == 1
    assert value(told, "gaie_codec_requests_total", dialect="vllm.engine", status="200") == 1


def test_a_client_that_goes_is_counted_as_cancelled():
    metrics = Metrics()

    async def play():
        async with shim(metrics=metrics, script=Script(tokens=[[5]] * 100, delay_ms=1000)) as (client, server, _):
            task = asyncio.create_task(client.post(CHAT, json=chat()))
            while not server.running:
                await asyncio.sleep(0.01)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    asyncio.run(play())
    told = scraped(metrics.registry)
    assert value(told, "gaie_codec_errors_total", error_type="cancelled", code="CANCELLED") == 1
    assert value(told, "gaie_codec_requests_total", status="none") == 1
    assert value(told, "gaie_codec_requests_in_flight") == 0


@pytest.mark.parametrize("dialect", ["vllm.engine", "sglang.scheduler", "sglang.runtime"])
def test_the_spans_context_reaches_the_model_server(dialect):
    made, exporter = provider()

    async def play():
        async with shim(dialect, tracing=Tracing(made)) as (client, server, _):
            answer = await client.post(CHAT, json=chat(max_tokens=3), headers={"traceparent": TRACEPARENT, "tracestate": "a=b"})
            assert answer.status_code == 200
            return server

    contexts = asyncio.run(play()).contexts
    (span,) = exporter.get_finished_spans()
    trace_id = TRACEPARENT.split("-")[1]
    assert [told for _, *told in contexts] == [[f"00-{trace_id}-{span.context.span_id:016x}-01", "a=b"]]
    assert span.attributes["gen_ai.usage.output_tokens"] > 0
    assert span.attributes["http.response.status_code"] == 200


def test_serve_is_scraped_with_the_loads_of_its_model_server():
    async def play():
        server = SimServer("vllm.engine", model=ModelInfo(served_model_name="demo"), script=Script(waiting=5))
        port = await server.start("127.0.0.1:0")
        command = [sys.executable, "-m", "gaie_codec.cli", "serve", "--upstream", f"127.0.0.1:{port}", "--listen", "127.0.0.1:0"]
        process = await asyncio.create_subprocess_exec(*command, "--metrics-listen", "127.0.0.1:0", stdout=subprocess.PIPE)
        try:
            line = (await asyncio.wait_for(process.stdout.readline(), 60)).decode()
            http, metrics = re.fullmatch(r"ready http=(\S+) metrics=(\S+)\n", line).groups()
            async with httpx.AsyncClient() as client:
                assert (await client.post(f"http://{http}{CHAT}", json=chat(model="demo", stream=True))).status_code == 200
                give_up = time.monotonic() + 20
                text = ""
                while "vllm:num_requests_waiting{" not in text and time.monotonic() < give_up:
                    text = (await client.get(f"http://{metrics}/metrics")).text
                    await asyncio.sleep(0.1)
            return text, f"127.0.0.1:{port}"
        finally:
            process.terminate()
            assert await asyncio.wait_for(process.wait(), 30) == 0
            await server.stop()

    text, target = asyncio.run(play())
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    (waiting,) = [sample for sample in samples if sample.name == "vllm:num_requests_waiting"]
    assert (waiting.labels, waiting.value) == ({"model_name": "demo", "endpoint": target}, 5)
    assert [sample.value for sample in samples if sample.name == "gaie_codec_requests_total"] == [1]


def test_serve_says_what_is_wrong_with_its_metrics_port():
    result = CliRunner().invoke(
        cli, ["serve", "--upstream", "127.0.0.1:1", "--listen", "127.0.0.1:0", "--dialect", "vllm.engine", "--metrics-listen", "nine"]
    )
    assert result.exit_code != 0
    assert "metrics-listen nine" in result.output
