"""The bootstrap for Envoy as a value, and the command that prints it. tests/envoy holds it against the real Envoy."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from gaie_codec import UsageError
from gaie_codec.cli import main
from gaie_codec.cli._commands import cli
from gaie_codec.ext_proc.envoy_config import envoy_config

BASE = {"listen": "127.0.0.1:8080", "ext_proc": "127.0.0.1:9002"}


def listener(settings: dict[str, Any]) -> Any:
    return settings["static_resources"]["listeners"][0]


def manager(settings: dict[str, Any]) -> Any:
    return listener(settings)["filter_chains"][0]["filters"][0]["typed_config"]


def filters(settings: dict[str, Any]) -> dict[str, Any]:
    return {found["name"]: found["typed_config"] for found in manager(settings)["http_filters"]}


def cluster(settings: dict[str, Any], name: str) -> Any:
    (found,) = (found for found in settings["static_resources"]["clusters"] if found["name"] == name)
    return found


def address(settings: dict[str, Any], name: str) -> tuple[str, int]:
    endpoint = cluster(settings, name)["load_assignment"]["endpoints"][0]["lb_endpoints"][0]["endpoint"]
    socket = endpoint["address"]["socket_address"]
    return socket["address"], socket["port_value"]


def test_the_model_server_is_the_one_that_the_header_names():
    found = cluster(envoy_config(**BASE), "model_servers")
    assert found["type"] == "ORIGINAL_DST"
    assert found["original_dst_lb_config"] == {"use_http_header": True, "http_header_name": "x-gateway-destination-endpoint"}


def test_or_the_one_that_the_metadata_names():
    found = cluster(envoy_config(**BASE, destination="metadata"), "model_servers")
    assert found["original_dst_lb_config"]["metadata_key"] == {"key": "envoy.lb", "path": [{"key": "x-gateway-destination-endpoint"}]}


def test_or_a_fixed_one():
    assert address(envoy_config(**BASE, upstream="[::1]:50051"), "model_servers") == ("::1", 50051)


@pytest.mark.parametrize(("host", "kind"), [("10.0.0.1", "STATIC"), ("[::1]", "STATIC"), ("epp.default.svc", "STRICT_DNS")])
def test_names_are_resolved_and_addresses_are_not(host: str, kind: str):
    assert cluster(envoy_config(**BASE | {"ext_proc": f"{host}:9002"}), "ext_proc")["type"] == kind


def test_another_endpoint_picker_comes_before_ours():
    settings = envoy_config(**BASE, behind="127.0.0.1:9003", body_mode="buffered")
    names = [name for name in filters(settings) if "ext_proc" in name]
    assert names == ["envoy.filters.http.ext_proc/behind", "envoy.filters.http.ext_proc/ext_proc"]
    modes = [filters(settings)[name]["processing_mode"]["request_body_mode"] for name in names]
    assert modes == ["FULL_DUPLEX_STREAMED", "BUFFERED"]
    assert address(settings, "behind") == ("127.0.0.1", 9003)


def test_only_ours_may_change_the_method():
    settings = envoy_config(**BASE, behind="127.0.0.1:9003")
    assert "mutation_rules" not in filters(settings)["envoy.filters.http.ext_proc/behind"]
    assert filters(settings)["envoy.filters.http.ext_proc/ext_proc"]["mutation_rules"] == {"allow_all_routing": True}


@pytest.mark.parametrize("mode", ["full-duplex", "buffered"])
def test_without_an_answer_of_the_ext_proc_server_there_is_none(mode: Any):
    found = filters(envoy_config(**BASE, body_mode=mode))["envoy.filters.http.ext_proc/ext_proc"]
    assert found["failure_mode_allow"] is False
    assert found["status_on_error"] == {"code": "ServiceUnavailable"}


def test_tls_is_spoken_with_h2_to_whom_it_is_asked_for():
    settings = envoy_config(**BASE, behind="127.0.0.1:9003", behind_tls=True)
    assert "transport_socket" not in cluster(settings, "ext_proc")
    assert cluster(settings, "behind")["transport_socket"]["typed_config"]["common_tls_context"] == {"alpn_protocols": ["h2"]}


@pytest.mark.parametrize(("seconds", "text"), [(0, "0s"), (1.5, "1.5s"), (3600, "3600s"), (0.0004, "0s")])
def test_durations_are_envoys(seconds: float, text: str):
    settings = envoy_config(**BASE, timeout_s=seconds, stream_idle_timeout_s=seconds)
    assert manager(settings)["route_config"]["virtual_hosts"][0]["routes"][0]["route"]["timeout"] == text
    assert manager(settings)["stream_idle_timeout"] == text


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"listen": "localhost:8080"}, "listen localhost:8080: Envoy listens on an IP address"),
        ({"listen": "127.0.0.1"}, "listen 127.0.0.1: not of the form HOST:PORT"),
        ({"listen": "::1:8080"}, "listen ::1:8080: not of the form HOST:PORT"),
        ({"listen": "127.0.0.1:65536"}, "listen 127.0.0.1:65536: not of the form"),
        ({"listen": "[1.2.3.4.5]:80"}, "1.2.3.4.5 is no IPv6 address"),
        ({"listen": "[127.0.0.1]:80"}, "127.0.0.1 is no IPv6 address"),
        ({"admin": ":9901"}, "admin :9901: Envoy listens on an IP address"),
        ({"ext_proc": ":9002"}, "ext-proc :9002: it needs a host"),
        ({"ext_proc": "127.0.0.1:0"}, "ext-proc 127.0.0.1:0: it needs a host and a port that is not 0"),
        ({"ext_proc": "127.0.0.1:\u0661"}, "not of the form HOST:PORT"),
        ({"upstream": "http://127.0.0.1:80"}, "upstream http://127.0.0.1:80: not of the form"),
        ({"behind": "nowhere"}, "behind nowhere: not of the form"),
        ({"behind_tls": True}, "behind TLS: there is nobody behind"),
        ({"destination": "host"}, "destination 'host': it is header or metadata"),
        ({"upstream": "10.0.0.1:80", "destination": "host"}, "destination 'host': it is header or metadata"),
        ({"upstream_protocol": "h3"}, "upstream protocol 'h3': it is h2c or http"),
        ({"body_mode": "streamed"}, "body mode 'streamed': it is full-duplex or buffered"),
        ({"timeout_s": -1.0}, "timeout: -1.0 s is out of range"),
        ({"stream_idle_timeout_s": float("nan")}, "stream idle timeout: nan s is out of range"),
        ({"timeout_s": float("inf")}, "timeout: inf s is out of range"),
    ],
)
def test_what_envoy_could_not_use_is_refused_by_name(wrong: dict[str, Any], words: str):
    with pytest.raises(UsageError) as raised:
        envoy_config(**BASE | wrong)
    assert words in str(raised.value)


def test_no_two_configs_share_a_part():
    first = envoy_config(**BASE, access_log=True)
    kept = json.dumps(envoy_config(**BASE, access_log=True))
    manager(first)["access_log"][0]["typed_config"].clear()
    for found in manager(first)["http_filters"]:
        found["typed_config"].clear()
    manager(first)["local_reply_config"]["mappers"][0].clear()
    assert json.dumps(envoy_config(**BASE, access_log=True)) == kept


ARGUMENTS = ["envoy-config", "--listen", "0.0.0.0:8080", "--ext-proc", "epp:9002", "--behind", "[::1]:9003", "--behind-tls"]
OPTIONS: dict[str, Any] = {"listen": "0.0.0.0:8080", "ext_proc": "epp:9002", "behind": "[::1]:9003", "behind_tls": True}


@pytest.mark.parametrize(("form", "decode"), [("yaml", yaml.safe_load), ("json", json.loads)])
def test_the_command_prints_the_config(form: str, decode: Any):
    done = CliRunner().invoke(cli, [*ARGUMENTS, "--format", form])
    assert done.exit_code == 0, done.output
    assert decode(done.stdout) == envoy_config(**OPTIONS)
    assert "&id" not in done.stdout


def test_every_option_of_the_command_reaches_the_config():
    more = ["--upstream", "h:1", "--destination", "metadata", "--upstream-protocol", "http", "--body-mode", "buffered", "--ext-proc-tls"]
    more += ["--admin", "127.0.0.1:9901", "--timeout", "600", "--stream-idle-timeout", "60.5", "--access-log", "--format", "json"]
    done = CliRunner().invoke(cli, [*ARGUMENTS, *more])
    assert json.loads(done.stdout) == envoy_config(
        **OPTIONS,
        upstream="h:1",
        destination="metadata",
        upstream_protocol="http",
        body_mode="buffered",
        ext_proc_tls=True,
        admin="127.0.0.1:9901",
        timeout_s=600,
        stream_idle_timeout_s=60.5,
        access_log=True,
    )


def test_a_wrong_address_is_one_line_and_exit_status_2(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sys.argv", ["gaie-codec", "envoy-config", "--listen", "localhost:1", "--ext-proc", "epp:9002"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert capsys.readouterr().err == "gaie-codec: listen localhost:1: Envoy listens on an IP address, not on a name\n"
