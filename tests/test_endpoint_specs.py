"""How model servers are named in configurations."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from unittest.mock import AsyncMock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gaie_codec import UsageError
from gaie_codec.adapters import DIALECTS
from gaie_codec.ext_proc.endpoint_specs import EndpointSpec, check_dialect, decode_endpoint, decode_endpoints, read_endpoints, resolve


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("10.0.0.1:50051", EndpointSpec(target="10.0.0.1:50051")),
        ("grpc://[::1]:1,dialect=http", EndpointSpec(target="[::1]:1", dialect="http")),
        (
            "name:1,snapshot=smg-0.4.28,model=org/a b,dialect=vllm.engine",
            EndpointSpec(target="name:1", dialect="vllm.engine", snapshot="smg-0.4.28", model="org/a b"),
        ),
        ("name:1,snapshot=0.5.23", EndpointSpec(target="name:1", snapshot="0.5.23")),
    ],
)
def test_an_endpoint_is_an_address_and_settings(text, spec):
    assert decode_endpoint(text) == spec
    assert decode_endpoint(str(spec)) == spec


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "not of the form HOST:PORT"),
        ("name", "not of the form HOST:PORT"),
        ("name:0", "not of the form HOST:PORT"),
        ("::1:80", "not of the form HOST:PORT"),
        ("https://name:1", "not of the form HOST:PORT"),
        ("name:1,", "'' is none of dialect=..., snapshot=..., model=..."),
        ("name:1,model=", "'model=' is none of"),
        ("name:1,weight=3", "'weight=3' is none of"),
        ("name:1,model=a,model=b", "model is there twice"),
        ("name:1,dialect=vllm", "no dialect 'vllm'; there are vllm.engine, "),
        ("name:1,dialect=vllm.engine,snapshot=1", "no snapshot '1'"),
        ("name:1,dialect=sglang.scheduler,snapshot=intree-0.5.3", "is not spoken"),
        ("name:1,dialect=http,snapshot=1", "dialect http has no snapshot"),
    ],
)
def test_what_is_no_endpoint_is_refused_by_name(text, said):
    with pytest.raises(UsageError) as caught:
        decode_endpoint(text)
    assert str(caught.value).startswith(f"endpoint {text}: ")
    assert said in str(caught.value)


@given(st.text())
def test_any_text_is_endpoints_or_a_usage_error(text):
    with contextlib.suppress(UsageError):
        decode_endpoints(text)


@pytest.mark.parametrize("dialect", [*DIALECTS, "http", "auto"])
def test_every_dialect_may_be_named(dialect):
    check_dialect(dialect, None)
    assert decode_endpoint(f"name:1,dialect={dialect}").dialect == dialect


def test_a_file_has_an_endpoint_a_line(tmp_path):
    path = tmp_path / "endpoints"
    path.write_text("# ours\na:1 # one\n\n  b:2,dialect=http\r\n")
    assert [str(spec) for spec in read_endpoints(path)] == ["a:1", "b:2,dialect=http"]


def test_what_is_wrong_with_a_file_is_said_with_its_name(tmp_path):
    path = tmp_path / "endpoints"
    for content, said in ((b"a:1\nb\n", "line 2: endpoint b: not of the form"), (b"\xff", "not UTF-8")):
        path.write_bytes(content)
        with pytest.raises(UsageError, match=f"endpoints file {path}: {said}"):
            read_endpoints(path)
    with pytest.raises(UsageError, match=f"endpoints file {tmp_path}: Is a directory"):
        read_endpoints(tmp_path)
    with pytest.raises(UsageError, match="No such file"):
        read_endpoints(tmp_path / "nothing")


def resolved(*texts):
    return asyncio.run(resolve(tuple(map(decode_endpoint, texts))))


def test_names_become_addresses_and_addresses_have_one_spelling():
    assert list(resolved("10.0.0.1:80", "[FD00:0::1]:80", "10.0.0.1:81")) == ["10.0.0.1:80", "[fd00::1]:80", "10.0.0.1:81"]
    (address,) = resolved("localhost:80")
    assert address in ("127.0.0.1:80", "[::1]:80")


def test_a_name_is_all_of_its_addresses_of_one_family(monkeypatch):
    def answer(*addresses):
        entries = [(socket.AF_INET6 if ":" in one else socket.AF_INET, socket.SOCK_STREAM, 6, "", (one, 80)) for one in addresses]
        monkeypatch.setattr("asyncio.base_events.BaseEventLoop.getaddrinfo", AsyncMock(return_value=entries))
        return list(resolved("pods.test:80"))

    assert answer("10.0.0.2", "10.0.0.1", "10.0.0.2", "fd00::1") == ["10.0.0.1:80", "10.0.0.2:80"]
    assert answer("fd00::2", "fd00::1") == ["[fd00::1]:80", "[fd00::2]:80"]
    hosts = {"pods.test:80": True, "localhost:80": True, "10.0.0.1:80": False, "[::1]:80": False}
    assert {text: decode_endpoint(text).is_name for text in hosts} == hosts


def test_a_name_that_leads_nowhere_and_a_place_that_is_named_twice_are_refused():
    with pytest.raises(UsageError, match=r"endpoint nowhere\.invalid:80: the host name cannot be resolved"):
        resolved("10.0.0.1:80", "nowhere.invalid:80")
    with pytest.raises(UsageError, match="cannot be resolved"):
        resolved(f"{'x' * 70}:80")
    with pytest.raises(UsageError, match=r"endpoint 10\.0\.0\.1:80: there twice"):
        resolved("10.0.0.1:80", "10.0.0.1:80")
    with pytest.raises(UsageError, match=r"endpoint 10\.0\.0\.1:80,dialect=http: the same place as 10\.0\.0\.1:80"):
        resolved("10.0.0.1:80", "10.0.0.1:80,dialect=http")
    with pytest.raises(UsageError, match="an address with a zone"):
        resolved("[fe80::1%lo]:80")
