"""JSON that says how to answer -> `Script`. The keys are described in the package's docstring."""

from __future__ import annotations

import json
import re
from typing import Annotated, Final, Literal, TypeAlias

import msgspec

from .. import Code, MalformedRequestError

_OPENING: Final = "[[sim {"
_CLOSING: Final = re.compile(r"\s*\]\]")

_Count: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=2**32 - 1)]
_Milliseconds: TypeAlias = Annotated[float, msgspec.Meta(ge=0)]


class Failure(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The gRPC status that ends the call instead of OK. `code` is a name such as "UNAVAILABLE"."""

    code: str
    message: str = ""
    after: _Count = 0

    def __post_init__(self) -> None:
        if self.code not in Code.__members__ or self.code == Code.OK.name:
            raise ValueError("`code` is not the name of a gRPC error code")


class Script(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How to answer one request."""

    text: str | list[str] | None = None
    tokens: list[list[_Count]] | None = None
    step: Annotated[int, msgspec.Meta(ge=1)] = 1
    delay_ms: _Milliseconds = 0
    first_delay_ms: _Milliseconds | None = None
    finish: str = "stop"
    counts: Literal["delta", "cumulative"] | None = None
    complete: bool = True
    empty_chunks: _Count = 0
    holds_stops: bool = True
    cached_tokens: _Count = 0
    logprob: float | None = None
    error: Failure | None = None
    waiting: _Count = 0
    kv_cache_usage: Annotated[float, msgspec.Meta(ge=0, le=1)] | None = None

    def __post_init__(self) -> None:
        if self.text is not None and self.tokens is not None:
            raise ValueError("both `text` and `tokens`")
        if self.text == []:
            raise ValueError("`text` is an empty list")


def decode_script(data: bytes | str) -> Script:
    """A script from JSON. Raises MalformedRequestError, which names what is wrong with it."""
    try:
        return msgspec.json.decode(data, type=Script)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise MalformedRequestError(f"sim script: {error}") from None


def take_script(prompt: str) -> tuple[str, Script | None]:
    """The prompt without its `[[sim {...}]]`, and the last of these. Raises MalformedRequestError."""
    kept = []
    script = None
    position = 0
    while (start := prompt.find(_OPENING, position)) >= 0:
        body = start + len(_OPENING) - 1
        try:  # the JSON itself may hold the closing brackets, so only a JSON decoder knows where it ends
            end = json.JSONDecoder().raw_decode(prompt, body)[1]
        except (ValueError, RecursionError):
            end = len(prompt)
        script = decode_script(prompt[body:end])
        closing = _CLOSING.match(prompt, end)
        if closing is None:
            raise MalformedRequestError("sim script: no ]] after it")
        kept.append(prompt[position:start])
        position = closing.end()
    return "".join(kept) + prompt[position:], script
