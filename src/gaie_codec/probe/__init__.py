"""What is this server? A connection to any gRPC server -> a `ProbeReport`: dialect, snapshot, versions, model, health.

    report = await probe(upstream, timeout_s=5.0)

It asks only what cannot change the server; docs/probe.md lists every question.

`_connection`  a port -> HTTP/2, or the reason why not
`_reflection`  server reflection -> services and their descriptors; grpc.health.v1
`_dialects`    for each dialect: what to ask, and what the answers tell
`_schemas`     a schema, or methods and fields that were seen -> a snapshot
"""

from ._probe import probe
from ._report import ProbeReport

__all__ = ["ProbeReport", "probe"]
