"""One model server over real gRPC, for every shim: the calls, the questions besides generation, and finding out what it is.

`connection`  messages in and out of one server, in raw bytes
`questions`   its model, its tokenizer, whether it is well
`discovery`   what it speaks, and its model, as soon as it answers
`transcoders` its transcoder, shared by servers that are alike; needs the packages of tokenizers too
`listen`      HOST:PORT -> the bound socket of a shim
"""

from .connection import Upstream, UpstreamCall, parse_target
from .questions import check_health, fetch_model_info, fetch_tokenizer

__all__ = ["Upstream", "UpstreamCall", "check_health", "fetch_model_info", "fetch_tokenizer", "parse_target"]
