"""InferencePool manifests -> what they declare, what is wrong with them, and whether to transcode for such a pool.

    pools, findings = decode_pools(text)                    every finding names its path
    pool = load_pool("pool.yaml")                           one pool, or the first error
    transcodes(pool, speaks_grpc=True)                      (True, "why")
    WatchedPool("pool.yaml").current()                      the same file, re-read when it changes

The rules are those of the CRD of `inference.networking.k8s.io/v1` in the Gateway API Inference Extension (GAIE), by release.
docs/inferencepool.md has them in a table. Needs PyYAML: the extra `pool`.
"""

try:
    import yaml as _yaml  # noqa: F401
except ImportError as error:
    raise ImportError("gaie_codec.inferencepool needs the package pyyaml: pip install gaie-codec[pool]", name=error.name) from error

from ._decision import ENVIRONMENT_VARIABLE, Override, transcode_override, transcodes
from ._documents import MAX_BYTES
from ._files import WatchedPool, load_pool
from ._pool import RELEASES, AppProtocol, EndpointPickerRef, Finding, InferencePool
from ._rules import decode_pools

__all__ = [
    "ENVIRONMENT_VARIABLE",
    "MAX_BYTES",
    "RELEASES",
    "AppProtocol",
    "EndpointPickerRef",
    "Finding",
    "InferencePool",
    "Override",
    "WatchedPool",
    "decode_pools",
    "load_pool",
    "transcode_override",
    "transcodes",
]
