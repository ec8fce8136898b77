"""Options in, a bootstrap for Envoy out: a dict of plain values, as its YAML or JSON would have them.

One listener, the ext_proc filter, the router, and the cluster of model servers: whatever endpoint the ext_proc server names, unless the
caller names one. A value is set where ext_proc needs it or where Envoy's default would break long streams; docs/envoy.md says what for.
"""

from __future__ import annotations

import copy
import ipaddress
import re
from typing import Any, Final, Literal, TypeAlias

from .. import Limits, UsageError

Settings: TypeAlias = dict[str, Any]

DESTINATION: Final = "x-gateway-destination-endpoint"
"""The header, and the key in the metadata, in which an endpoint picker names the model server."""

NAMESPACE: Final = "envoy.lb"
"""Where that metadata is."""

_ADDRESS: Final = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([A-Za-z0-9._-]*)):([0-9]{1,5})")
_TYPE: Final = "type.googleapis.com/envoy.extensions"
_CLIENT: Final = "gaie_codec.client"
_MIB: Final = 1024 * 1024
_NO_BOUND: Final = 1_000_000_000
_CONNECTIONS: Final = 50_000


def envoy_config(
    *,
    listen: str,
    ext_proc: str,
    behind: str | None = None,
    upstream: str | None = None,
    destination: Literal["header", "metadata"] = "header",
    upstream_protocol: Literal["h2c", "http"] = "h2c",
    body_mode: Literal["full-duplex", "buffered"] = "full-duplex",
    ext_proc_tls: bool = False,
    behind_tls: bool = False,
    admin: str | None = None,
    timeout_s: float = 0.0,
    stream_idle_timeout_s: float = 3600.0,
    access_log: bool = False,
) -> Settings:
    """A bootstrap that listens on `listen` and asks the ext_proc server at `ext_proc` about every request.

    Addresses are HOST:PORT, an IPv6 address in brackets; those that Envoy listens on (`listen`, `admin`) need an IP address, and port 0
    takes a free one. `behind` is another ext_proc endpoint picker which sees requests first, as they came, and answers last.
    `upstream` is the one place where requests go; without it the ext_proc server chooses, in the header or in the metadata as
    `destination` says. `upstream_protocol` is "http" for model servers that speak HTTP/1.1. `ext_proc_tls` and `behind_tls` are for
    servers with TLS, whose certificates are not checked, as endpoint pickers sign their own. `timeout_s` bounds a whole answer and
    `stream_idle_timeout_s` the silence in it, such as that before a long answer which is not streamed; 0 is no bound. Raises UsageError.
    """
    if body_mode not in ("full-duplex", "buffered"):
        raise UsageError(f"body mode {body_mode!r}: it is full-duplex or buffered")
    if destination not in ("header", "metadata"):
        raise UsageError(f"destination {destination!r}: it is header or metadata")
    if behind_tls and behind is None:
        raise UsageError("behind TLS: there is nobody behind")
    clusters = [_server_cluster("ext_proc", ext_proc, "ext-proc", ext_proc_tls)]
    filters = [_ext_proc_filter("ext_proc", body_mode, may_route=True)]
    if behind is not None:
        clusters.append(_server_cluster("behind", behind, "behind", behind_tls))
        filters.insert(0, _ext_proc_filter("behind", "full-duplex", may_route=False))
    clusters.append(_model_servers(upstream, destination, upstream_protocol))
    # Where whole bodies are held, this is their limit (for an HTTP/2 client it is the window): above it is 413, on the way back 500.
    window = Limits().max_request_bytes if body_mode == "buffered" else _MIB
    manager = _connection_manager(filters, window, timeout_s, stream_idle_timeout_s, access_log)
    settings: Settings = {
        "static_resources": {
            "listeners": [
                {
                    "name": "http",
                    "address": _socket("listen", listen, is_own=True),
                    "per_connection_buffer_limit_bytes": window,
                    "filter_chains": [{"filters": [manager]}],
                }
            ],
            "clusters": clusters,
        },
        # Without a bound Envoy takes connections until it has no file descriptor left for the model servers.
        "overload_manager": {
            "resource_monitors": [
                {
                    "name": "envoy.resource_monitors.global_downstream_max_connections",
                    "typed_config": {
                        "@type": f"{_TYPE}.resource_monitors.downstream_connections.v3.DownstreamConnectionsConfig",
                        "max_active_downstream_connections": _CONNECTIONS,
                    },
                }
            ]
        },
    }
    if admin is not None:
        settings["admin"] = {"address": _socket("admin", admin, is_own=True)}
    return settings


def _connection_manager(filters: list[Settings], window: int, timeout_s: float, idle_s: float, access_log: bool) -> Settings:
    settings: Settings = {
        "@type": f"{_TYPE}.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "http",
        "codec_type": "AUTO",
        "use_remote_address": True,
        "preserve_external_request_id": True,
        "request_headers_timeout": "60s",
        "stream_idle_timeout": _duration("stream idle timeout", idle_s),
        "http2_protocol_options": {
            "max_concurrent_streams": 4096,
            "initial_stream_window_size": window,
            "initial_connection_window_size": 16 * window,
        },
        # Nobody but an endpoint picker says where requests go.
        "early_header_mutation_extensions": [
            {
                "name": "envoy.http.early_header_mutation.header_mutation",
                "typed_config": {
                    "@type": f"{_TYPE}.http.early_header_mutation.header_mutation.v3.HeaderMutation",
                    "mutations": [{"remove": DESTINATION}],
                },
            }
        ],
        "local_reply_config": {"mappers": [_json_reply(*row) for row in _OWN_ERRORS]},
        "route_config": {
            "name": "all",
            "virtual_hosts": [
                {
                    "name": "all",
                    "domains": ["*"],
                    "routes": [
                        {
                            "match": {"prefix": "/"},
                            "route": {"cluster": "model_servers", "timeout": _duration("timeout", timeout_s)},
                        }
                    ],
                }
            ],
        },
        "http_filters": [
            copy.deepcopy(_NOTE_CONTENT_TYPE),
            *filters,
            {
                "name": "envoy.filters.http.router",
                "typed_config": {"@type": f"{_TYPE}.filters.http.router.v3.Router", "suppress_envoy_headers": True},
            },
        ],
    }
    if access_log:
        settings["access_log"] = [copy.deepcopy(_ACCESS_LOG)]
    return {"name": "envoy.filters.network.http_connection_manager", "typed_config": settings}


# Whether the client speaks gRPC: an ext_proc server changes the header, and errors for gRPC clients stay text.
_NOTE_CONTENT_TYPE: Final[Settings] = {
    "name": "envoy.filters.http.header_to_metadata",
    "typed_config": {
        "@type": f"{_TYPE}.filters.http.header_to_metadata.v3.Config",
        "request_rules": [
            {
                "header": "content-type",
                "on_header_present": {"metadata_namespace": _CLIENT, "key": "content_type", "type": "STRING"},
                "remove": False,
            }
        ],
    },
}

# What Envoy answers by itself is plain text or nothing. Who answers through it in JSON says so, and is left alone.
_IS_PLAIN: Final = (
    "response.code >= 400"
    " && (!('content-type' in response.headers) || response.headers['content-type'].startsWith('text/plain'))"
    f" && !('{_CLIENT}' in metadata.filter_metadata"
    f" && metadata.filter_metadata['{_CLIENT}']['content_type'].startsWith('application/grpc'))"
)

# Of these Envoy says nothing to the client; what it notes may hold the text of an exception.
_FAILED: Final = "response.code_details.startsWith('ext_proc_error')"
_MISUSED: Final = "response.code_details.matches('^(spurious_message|header_mutation_|mismatch_between_)')"

_BODY: Final = "%LOCAL_REPLY_BODY%"

# The first that fits: its condition, the type and the message of the error.
_OWN_ERRORS: Final = (
    (f"response.code == 503 && {_FAILED}", "Service Unavailable", "The endpoint picker did not answer"),
    (f"response.code == 504 && {_FAILED}", "GatewayTimeoutError", "The endpoint picker did not answer in time"),
    (f"response.code == 503 && {_MISUSED}", "Service Unavailable", "The endpoint picker gave an answer that cannot be used"),
    ("response.code == 503", "Service Unavailable", _BODY),
    ("response.code == 504", "GatewayTimeoutError", _BODY),
    ("response.code >= 500", "InternalServerError", _BODY),
    ("response.code == 429", "RateLimitError", _BODY),
    ("response.code == 404", "NotFoundError", _BODY),
    ("response.code_details != ''", "BadRequestError", "The proxy refused the request: %RESPONSE_CODE_DETAILS%"),
    ("true", "BadRequestError", _BODY),
)


def _json_reply(condition: str, error_type: str, message: str) -> Settings:
    cel = {
        "@type": f"{_TYPE}.access_loggers.filters.cel.v3.ExpressionFilter",
        "expression": f"{_IS_PLAIN} && {condition}",
    }
    error = {"message": message, "type": error_type, "param": None, "code": "%RESPONSE_CODE%"}
    return {
        "filter": {"extension_filter": {"name": "envoy.access_loggers.extension_filters.cel", "typed_config": cel}},
        "body_format_override": {"json_format": {"error": error}},
    }


_ACCESS_LOG: Final[Settings] = {
    "name": "envoy.access_loggers.stdout",
    "typed_config": {
        "@type": f"{_TYPE}.access_loggers.stream.v3.StdoutAccessLog",
        "log_format": {
            "json_format": {
                "time": "%START_TIME%",
                "client": "%DOWNSTREAM_REMOTE_ADDRESS%",
                "request_id": "%REQ(X-REQUEST-ID)%",
                "method": "%REQ(:METHOD)%",
                "path": "%PATH(NQ:ORIG_OR_PATH)%",
                "status": "%RESPONSE_CODE%",
                "flags": "%RESPONSE_FLAGS%",
                "details": "%RESPONSE_CODE_DETAILS%",
                "upstream": "%UPSTREAM_HOST%",
                "upstream_failure": "%UPSTREAM_TRANSPORT_FAILURE_REASON%",
                "bytes_received": "%BYTES_RECEIVED%",
                "bytes_sent": "%BYTES_SENT%",
                "duration_ms": "%DURATION%",
            }
        },
    },
}


def _ext_proc_filter(cluster: str, body_mode: str, *, may_route: bool) -> Settings:
    mode = "BUFFERED" if body_mode == "buffered" else "FULL_DUPLEX_STREAMED"
    settings: Settings = {
        "@type": f"{_TYPE}.filters.http.ext_proc.v3.ExternalProcessor",
        "grpc_service": {"envoy_grpc": {"cluster_name": cluster}},
        "processing_mode": {
            "request_header_mode": "SEND",
            "response_header_mode": "SEND",
            "request_body_mode": mode,
            "response_body_mode": mode,
            "request_trailer_mode": "SEND",
            "response_trailer_mode": "SEND",
        },
        "metadata_options": {
            "forwarding_namespaces": {"untyped": [NAMESPACE, f"{NAMESPACE}.subset_hint"]},
            "receiving_namespaces": {"untyped": [NAMESPACE]},
        },
        "failure_mode_allow": False,
        "status_on_error": {"code": "ServiceUnavailable"},
        # Envoy's default of 200 ms counts where bodies are buffered, and a request may wait in a queue.
        "message_timeout": "1000s",
    }
    if may_route:
        # A GET which becomes a call needs :method.
        settings["mutation_rules"] = {"allow_all_routing": True}
    return {"name": f"envoy.filters.http.ext_proc/{cluster}", "typed_config": settings}


def _model_servers(upstream: str | None, destination: str, protocol: str) -> Settings:
    settings = _cluster("model_servers")
    if upstream is not None:
        settings |= _static("model_servers", "upstream", upstream)
    else:
        chosen: Settings = {"use_http_header": True, "http_header_name": DESTINATION}
        if destination == "metadata":
            chosen = {"metadata_key": {"key": NAMESPACE, "path": [{"key": DESTINATION}]}}
        settings |= {"type": "ORIGINAL_DST", "lb_policy": "CLUSTER_PROVIDED", "original_dst_lb_config": chosen}
    if protocol == "h2c":
        return settings | _http2()
    if protocol == "http":
        return settings
    raise UsageError(f"upstream protocol {protocol!r}: it is h2c or http")


def _server_cluster(name: str, address: str, option: str, tls: bool) -> Settings:
    settings = _cluster(name) | _static(name, option, address) | _http2()
    if tls:
        context = {
            "@type": f"{_TYPE}.transport_sockets.tls.v3.UpstreamTlsContext",
            "common_tls_context": {"alpn_protocols": ["h2"]},
        }
        settings["transport_socket"] = {"name": "envoy.transport_sockets.tls", "typed_config": context}
    return settings


def _cluster(name: str) -> Settings:
    bounds = dict.fromkeys(("max_connections", "max_pending_requests", "max_requests"), _NO_BOUND)
    return {
        "name": name,
        "connect_timeout": "5s",
        "per_connection_buffer_limit_bytes": _MIB,
        # Envoy stops at 1024 requests to a cluster, which streams reach soon; how many are too many is the endpoint picker's business.
        "circuit_breakers": {"thresholds": [bounds]},
        # A peer that is gone without a word is noticed in a minute, not after hours.
        "upstream_connection_options": {"tcp_keepalive": {"keepalive_probes": 3, "keepalive_time": 30, "keepalive_interval": 10}},
    }


def _static(name: str, option: str, address: str) -> Settings:
    socket = _socket(option, address)
    host = socket["socket_address"]["address"]
    # With ALL a name's two families would be two hosts that take turns, though a server may listen on one only, as on localhost.
    kind: Settings = {"type": "STATIC"} if _is_ip(host) else {"type": "STRICT_DNS", "dns_lookup_family": "V4_PREFERRED"}
    endpoints = [{"lb_endpoints": [{"endpoint": {"address": socket}}]}]
    return kind | {"load_assignment": {"cluster_name": name, "endpoints": endpoints}}


def _http2() -> Settings:
    options = {
        "@type": f"{_TYPE}.upstreams.http.v3.HttpProtocolOptions",
        "explicit_http_config": {
            # What a client that does not read may leave in Envoy: a window a stream, and never all of the connection's.
            "http2_protocol_options": {"initial_stream_window_size": 256 * 1024, "initial_connection_window_size": 64 * _MIB}
        },
    }
    return {"typed_extension_protocol_options": {"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": options}}


def _socket(option: str, address: str, *, is_own: bool = False) -> Settings:
    match = _ADDRESS.fullmatch(address)
    if match is None or int(match[3]) > 65535:
        raise UsageError(f"{option} {address}: not of the form HOST:PORT (an IPv6 address goes in brackets)")
    host = match[1] or match[2]
    if match[1] and not (":" in host and _is_ip(host)):
        raise UsageError(f"{option} {address}: {host} is no IPv6 address")
    if is_own and not _is_ip(host):
        raise UsageError(f"{option} {address}: Envoy listens on an IP address, not on a name")
    if not is_own and (not host or match[3].strip("0") == ""):
        raise UsageError(f"{option} {address}: it needs a host and a port that is not 0")
    return {"socket_address": {"address": host, "port_value": int(match[3])}}


def _is_ip(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _duration(option: str, seconds: float) -> str:
    if not 0 <= seconds <= 100 * 365 * 86400:
        raise UsageError(f"{option}: {seconds} s is out of range")
    return f"{seconds:.3f}".rstrip("0").rstrip(".") + "s"
