"""The ext_proc shim: an endpoint picker for Envoy that speaks gRPC to model servers. docs/ext-proc.md is its manual.

`picking`       who answers: candidates, pickers, the addresses of the Endpoint Picker Protocol
`servers`       a model server as the processor needs it
`gateway`       what all streams share
`processor`     one stream without I/O: ProcessingRequests in, ProcessingResponses out
`messages`      Envoy's messages, as classes of our own copy
`server`        the service over grpc.aio, with deadlines and health; needs the extra `ext-proc`, as `app` does
`app`           all of it with live endpoints: `run_ext_proc`
`envoy_config`  a bootstrap for Envoy that goes with it
"""

from .gateway import Declared, Gateway
from .picking import Candidate, NoEndpointError, Picker, PickRequest, RequestShedError, least_inflight, prefix_affinity, round_robin
from .processor import Processor
from .servers import Server, StaticServer

__all__ = [
    "Candidate",
    "Declared",
    "Gateway",
    "NoEndpointError",
    "PickRequest",
    "Picker",
    "Processor",
    "RequestShedError",
    "Server",
    "StaticServer",
    "least_inflight",
    "prefix_affinity",
    "round_robin",
]
