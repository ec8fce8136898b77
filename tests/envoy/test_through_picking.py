"""Which of several model servers Envoy sends a request to, and what clients see where there is none."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from harness import Envoy
from stack import ExtProc, Proxy, Stack, arguments, envoy_of, ext_proc_of, make_sim, send, stack_of, wait_until
from test_through_grpc import call, encoded

from gaie_codec.ext_proc.picking import DESTINATION
from test_e2e import SimThread, ask, connect

CHAT = "v1/chat/completions"
FOREVER = 3_600_000
DROPPED = "x-llm-d-request-dropped-reason"
PATH, CALL = encoded("vllm.engine", "g")


@pytest.fixture(scope="module")
def sims() -> Iterator[list[SimThread]]:
    made = [make_sim(), make_sim()]
    yield made
    for sim in made:
        sim.stop()


def listed(sims: Sequence[SimThread]) -> list[str]:
    return arguments(*(f"127.0.0.1:{sim.port},dialect=vllm.engine" for sim in sims))


def counts(sims: Sequence[SimThread]) -> list[int]:
    return [len(sim.server.requests) for sim in sims]


def post(url: str, text: str = "Hi", **more: Any) -> httpx.Response:
    return httpx.post(f"{url}/{CHAT}", json={"messages": ask({"text": "one"}, text)}, timeout=20, **more)


class TestBothWaysToNameIt:
    """By the header, and by the metadata."""

    @pytest.fixture(scope="class")
    @classmethod
    def ext_proc(cls, sims: list[SimThread], tmp_path_factory: pytest.TempPathFactory) -> Iterator[ExtProc]:
        with ext_proc_of(tmp_path_factory.mktemp("ext_proc"), *listed(sims), "--picker", "round-robin") as made:
            yield made

    @pytest.fixture(scope="class", params=["header", "metadata"])
    @classmethod
    def url(cls, request: pytest.FixtureRequest, ext_proc: ExtProc, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
        with envoy_of(tmp_path_factory.mktemp("envoy"), ext_proc.address, destination=request.param) as envoy:
            yield envoy.url

    def test_each_in_turn(self, sims: list[SimThread], url: str):
        before = counts(sims)
        where = []
        for _ in range(6):
            assert post(url).status_code == 200
            after = counts(sims)
            where.append([new - old for new, old in zip(after, before, strict=True)].index(1))
            before = after
        assert where in ([0, 1] * 3, [1, 0] * 3)

    def test_a_grpc_call_and_a_get_have_a_destination_too(self, sims: list[SimThread], url: str):
        before = counts(sims)
        for _ in range(4):
            assert call(url.removeprefix("http://"), PATH, CALL).code == "OK"
        assert [new - old for new, old in zip(counts(sims), before, strict=True)] == [2, 2]
        assert call(url.removeprefix("http://"), "/vllm.grpc.engine.VllmEngine/GetModelInfo", b"").code == "OK"

    def test_what_a_client_names_is_without_effect(self, sims: list[SimThread], url: str):
        before = counts(sims)
        for name in ("127.0.0.1:1", "10.255.255.1:80", f"127.0.0.1:{sims[0].port}", "junk"):
            for _ in range(2):
                assert post(url, headers={DESTINATION: name}).status_code == 200
        assert [new - old for new, old in zip(counts(sims), before, strict=True)] == [4, 4]


def keep_the_clients_header(settings: Any) -> None:
    manager = settings["static_resources"]["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"]
    del manager["early_header_mutation_extensions"]


def test_a_destination_of_the_client_is_overwritten_where_envoy_lets_it_through(sims: list[SimThread], tmp_path: Path):
    with ExitStack() as stack:
        ext_proc = stack.enter_context(ext_proc_of(tmp_path, *listed(sims), "--picker", "round-robin"))
        envoy = stack.enter_context(envoy_of(tmp_path, ext_proc.address, change=keep_the_clients_header))
        before = counts(sims)
        for _ in range(2):
            assert post(envoy.url, headers=[(DESTINATION, f"127.0.0.1:{sims[0].port}")] * 2).status_code == 200
        assert [new - old for new, old in zip(counts(sims), before, strict=True)] == [1, 1]


@contextmanager
def picking(directory: Path, sims: Sequence[SimThread], *more: str, **options: Any) -> Iterator[Stack]:
    """Model servers that stay, an ext_proc server with more arguments, and an Envoy."""
    with ExitStack() as stack:
        ext_proc = stack.enter_context(ext_proc_of(directory, *listed(sims), *more))
        yield Stack(stack.enter_context(envoy_of(directory, ext_proc.address, **options)), ext_proc, sims)


def test_the_least_busy_one_is_chosen(sims: list[SimThread], tmp_path: Path):
    with picking(tmp_path, sims) as stack:
        with closing(send(stack.envoy.port, {"first_delay_ms": FOREVER})):
            wait_until(lambda: any(sim.server.running for sim in sims))
            idle = [not sim.server.running for sim in sims]
            before = counts(sims)
            for _ in range(4):
                assert post(stack.url).status_code == 200
            assert [new - old for new, old in zip(counts(sims), before, strict=True)] == [4 * one for one in idle]
        wait_until(lambda: not any(sim.server.running for sim in sims))
        wait_until(lambda: len(stack.ext_proc.requests()) == 5)
        before = counts(sims)
        for done in range(6, 10):
            assert post(stack.url).status_code == 200
            wait_until(lambda done=done: len(stack.ext_proc.requests()) == done)
        assert [new - old for new, old in zip(counts(sims), before, strict=True)] == [2, 2]


def test_prompts_that_begin_alike_go_to_the_same_one(sims: list[SimThread], tmp_path: Path):
    with picking(tmp_path, sims, "--picker", "prefix") as stack:
        chosen = []
        for turn in range(4):
            for topic in ("apples ", "pears "):
                before = counts(sims)
                assert post(stack.url, topic * 100 + f"turn {turn}").status_code == 200
                chosen.append([new - old for new, old in zip(counts(sims), before, strict=True)].index(1))
                wait_until(lambda: len(stack.ext_proc.requests()) == len(chosen))
        assert chosen in ([0, 1] * 4, [1, 0] * 4)


def hinting(value: Any) -> Callable[[Any], None]:
    """Envoy sets the subset hint before it asks the endpoint picker."""

    def change(settings: Any) -> None:
        manager = settings["static_resources"]["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"]
        config = {
            "@type": "type.googleapis.com/envoy.extensions.filters.http.set_metadata.v3.Config",
            "metadata": [{"metadata_namespace": "envoy.lb.subset_hint", "value": {"x-gateway-destination-endpoint-subset": value}}],
        }
        manager["http_filters"].insert(0, {"name": "envoy.filters.http.set_metadata", "typed_config": config})

    return change


class TestASubset:
    @pytest.fixture(scope="class")
    @classmethod
    def ext_proc(cls, sims: list[SimThread], tmp_path_factory: pytest.TempPathFactory) -> Iterator[ExtProc]:
        with ext_proc_of(tmp_path_factory.mktemp("ext_proc"), *listed(sims), "--picker", "round-robin") as made:
            yield made

    @pytest.mark.parametrize("form", ["list", "string", "bare address"])
    def test_only_those_in_it_are_chosen(self, sims: list[SimThread], ext_proc: ExtProc, form: str, tmp_path: Path):
        one = f"127.0.0.1:{sims[1].port}"
        hints: dict[str, Any] = {"list": [one, "10.0.0.1:80"], "string": f"10.0.0.1:80, {one}", "bare address": ["127.0.0.1"]}
        with envoy_of(tmp_path, ext_proc.address, change=hinting(hints[form])) as envoy:
            before = counts(sims)
            for _ in range(2):
                assert post(envoy.url).status_code == 200
                assert call(envoy.authority, PATH, CALL).code == "OK"
            assert [new - old for new, old in zip(counts(sims), before, strict=True)] == ([2, 2] if form == "bare address" else [0, 4])

    @pytest.mark.parametrize("hint", [[], "127.0.0.1:1", [7]])
    def test_nobody_is_chosen_where_nobody_is_in_it(self, ext_proc: ExtProc, hint: Any, tmp_path: Path):
        with envoy_of(tmp_path, ext_proc.address, change=hinting(hint)) as envoy:
            check_that_nobody_is_there(envoy)


def check_that_nobody_is_there(envoy: Envoy) -> None:
    for stream in (False, True):
        answer = httpx.post(f"{envoy.url}/{CHAT}", json={"messages": ask(), "stream": stream}, timeout=20)
        assert (answer.status_code, answer.json()["error"]["type"]) == (503, "Service Unavailable")
        assert answer.headers["content-type"] == "application/json"
        assert answer.headers[DROPPED] == "rejected-no-endpoints"
    with connect(envoy.url) as client, pytest.raises(openai.InternalServerError):
        client.chat.completions.create(model="", messages=ask())
    seen = call(envoy.authority, PATH, CALL)
    assert (seen.code, seen.messages) == ("UNAVAILABLE", [])
    assert (DROPPED, "rejected-no-endpoints") in seen.trailing
    assert seen.details
    assert "{" not in seen.details


def test_a_model_server_that_is_not_there_yet_gets_requests_when_it_is(sims: list[SimThread], tmp_path: Path):
    proxy = Proxy(1)
    try:
        settings = [*arguments(f"127.0.0.1:{proxy.port},dialect=vllm.engine"), "--check-interval", "0.2"]
        with ext_proc_of(tmp_path, *settings) as ext_proc, envoy_of(tmp_path, ext_proc.address) as envoy:
            check_that_nobody_is_there(envoy)
            proxy.target = sims[0].port
            wait_until(lambda: post(envoy.url).status_code == 200)
    finally:
        proxy.stop()


def test_whoever_can_answer_is_asked(tmp_path: Path):
    """Of two kinds of model servers only one has n."""
    kinds = [make_sim("vllm.inference"), make_sim("sglang.scheduler")]
    with stack_of(tmp_path, "--picker", "round-robin", sims=kinds) as stack, connect(stack.url) as client:
        for _ in range(4):
            client.chat.completions.create(model="", messages=ask())
        assert counts(kinds) == [2, 2]
        for _ in range(3):
            assert len(client.chat.completions.create(model="", messages=ask(), n=2).choices) == 2
        assert counts(kinds) == [2, 5]
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.create(model="", messages=ask(), n=0)
        before = counts(kinds)
        for dialect in ("vllm.inference", "sglang.scheduler", "vllm.inference", "sglang.scheduler", "vllm.inference"):
            assert call(stack.envoy.authority, *encoded(dialect, "g")).code == "OK"
        assert [new - old for new, old in zip(counts(kinds), before, strict=True)] == [3, 2], "nothing is bridged where it need not be"


PICKER = """
import asyncio, sys
from gaie_codec.ext_proc.app import run_ext_proc
from gaie_codec.ext_proc.endpoints import TranscoderOptions
from gaie_codec.ext_proc.picking import RequestShedError

def pick(request, candidates):
    limit = request.sampling.max_tokens
    if limit == 1:
        raise RequestShedError("too much is waiting")
    if limit == 2:
        return []
    if limit == 3:
        raise ValueError("secret")
    port = 0 if request.stream else 1
    return [one for one in candidates if one.address == sys.argv[1 + port]]

options = TranscoderOptions(tokenizer="builtin")
endpoints = [f"{one},dialect=vllm.engine" for one in sys.argv[1:]]
asyncio.run(run_ext_proc(listen="127.0.0.1:0", endpoints=endpoints, picker=pick, options=options))
"""


def test_a_picker_of_your_own_chooses_and_refuses(sims: list[SimThread], tmp_path: Path):
    addresses = [f"127.0.0.1:{sim.port}" for sim in sims]
    ext_proc = ExtProc(tmp_path, *addresses, program=("-c", PICKER))
    try:
        with envoy_of(tmp_path, ext_proc.address) as envoy:
            before = counts(sims)
            for stream in (True, True, False):
                assert httpx.post(f"{envoy.url}/{CHAT}", json={"messages": ask(), "stream": stream}).status_code == 200
            assert [new - old for new, old in zip(counts(sims), before, strict=True)] == [2, 1]
            for limit, status, reason in ((1, 429, "rejected-saturated"), (2, 503, "rejected-no-endpoints"), (3, 500, None)):
                answer = httpx.post(f"{envoy.url}/{CHAT}", json={"messages": ask(), "max_tokens": limit})
                assert (answer.status_code, answer.json()["error"]["code"]) == (status, status)
                assert answer.headers.get(DROPPED) == reason
                assert "secret" not in answer.text
            with connect(envoy.url) as client, pytest.raises(openai.RateLimitError):
                client.chat.completions.create(model="", messages=ask(), max_tokens=1)
            path, request = encoded("vllm.engine", "shed", max_tokens=1)
            seen = call(envoy.authority, path, request)
            assert (seen.code, seen.details) == ("RESOURCE_EXHAUSTED", "too much is waiting")
            assert (DROPPED, "rejected-saturated") in seen.trailing
        assert ext_proc.log().count("Traceback") == 1, "of the ValueError"
    finally:
        ext_proc.end()
