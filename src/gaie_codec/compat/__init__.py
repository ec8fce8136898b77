"""Which of my servers can this library talk to, and what can it not say to them?

    resolve(server="vllm", version="0.31.0")        dialects and snapshots of a release, and how it behaves
    features("vllm.engine", "smg-0.4.8")            what such a server can be told, and what not, with reasons
    explain("logit_bias")                           what becomes of one request field

The matrix is compat_matrix.yaml at the root of the repository; here it is data in a module, and nothing is read from files.
"""

from ._features import NEUTRAL_FIELDS, Explanation, Features, Missing, Verdict, explain, features, since, speaks, used_by
from ._matrix import BadPair, Behaviour, Matrix, matrix
from ._resolve import Point, Resolution, Support, resolve, server_name, servers

__all__ = [
    "NEUTRAL_FIELDS",
    "BadPair",
    "Behaviour",
    "Explanation",
    "Features",
    "Matrix",
    "Missing",
    "Point",
    "Resolution",
    "Support",
    "Verdict",
    "explain",
    "features",
    "matrix",
    "resolve",
    "server_name",
    "servers",
    "since",
    "speaks",
    "used_by",
]
