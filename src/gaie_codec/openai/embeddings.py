"""`POST /v1/embeddings`: a JSON body -> one InferenceRequest a prompt, and their vectors -> one body.

A model server embeds one prompt a call; the answer has all of them in the order of `input`, as numbers, as base64 of their bytes, or as
bytes alone.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final

import msgspec

from .._errors import MalformedRequestError, UnsupportedFieldError, UsageError
from .._events import EmbeddingEvent, ModelInfo, Usage
from . import policy
from .endpoint import Asked, Decoded, ResponseMeta
from .fields import decode_json_object, int_field, literal_fault, type_error, type_errors
from .inputs import decode_embedded_model, encode_chat, encode_inputs, make_requests
from .vectors import Vectors, encode_usage

PATH: Final = "/v1/embeddings"
ID_PREFIX: Final = "embd-"

READ: Final = frozenset(
    (
        "model input messages request_id encoding_format dimensions embed_dtype endianness truncate_prompt_tokens truncation_side"
        " add_special_tokens add_generation_prompt continue_final_message chat_template_kwargs priority cache_salt"
    ).split()
)
ADVISORY: Final = policy.ADVISORY
# Field -> the values that ask for nothing. Any other value is refused.
REFUSED: Final[Mapping[str, tuple[Any, ...]]] = MappingProxyType(
    {
        "chat_template": (None,),
        "media_io_kwargs": (None,),
        "mm_processor_kwargs": (None,),
        "normalize": (None, True),
        "padding": (None, "do_not_pad"),
        "use_activation": (None, True),
    }
)
_FORMATS: Final = ("float", "base64", "bytes", "bytes_only")
# By the names of vLLM: `struct`'s letter for one number. bfloat16 is the upper half of float32.
_LETTERS: Final = MappingProxyType({"float32": "f", "float16": "e", "bfloat16": "H"})
_OTHER_DTYPES: Final = ("fp8_e4m3", "fp8_e5m2")
# "native" is what every machine that runs models is.
_ORDERS: Final = MappingProxyType({"native": "<", "little": "<", "big": ">"})
_LARGEST_FLOAT16: Final = 65520.0  # from here on it rounds to infinity


class EmbeddingOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What the answer has to look like."""

    id: str
    model: str
    encoding_format: str = "float"
    embed_dtype: str = "float32"
    endianness: str = "native"
    dimensions: int | None = None


def decode_request(body: bytes, asked: Asked) -> Decoded:
    """Decode an embedding request. Raises RequestError."""
    tokenizer = asked.tokenizer
    if tokenizer is None:
        raise UsageError("a prompt has to be tokenized, and there is no tokenizer")
    fields = decode_json_object(body)
    lost = policy.refuse_values(fields, REFUSED, drops=asked.drops)
    given, name = decode_embedded_model(fields, asked)
    encoding_format = _choice(fields, "encoding_format", _FORMATS)
    dtype = _choice(fields, "embed_dtype", (*_LETTERS, *_OTHER_DTYPES))
    if dtype in _OTHER_DTYPES and encoding_format != "float":
        raise UnsupportedFieldError(f"`embed_dtype` {dtype} is not supported by this gateway (parameter=embed_dtype)", param="embed_dtype")
    endianness = _choice(fields, "endianness", tuple(_ORDERS))
    dimensions = int_field(fields, "dimensions")
    _check_dimensions(dimensions, asked.model, given)
    if fields.get("input") is not None:
        prompts = encode_inputs(fields, fields["input"], "input", asked, tokenizer)
    elif "messages" in fields:
        prompts = [encode_chat(fields, asked, tokenizer)]
    else:
        raise type_error("input", "missing", "Field required")
    request_id, requests, ignored = make_requests(fields, prompts, asked, name=name, prefix=ID_PREFIX)
    options = EmbeddingOptions(
        id=request_id,
        model=given or requests[0].model,
        encoding_format=encoding_format,
        embed_dtype=dtype,
        endianness=endianness,
        dimensions=dimensions,
    )
    return Decoded(prompts=requests, options=options, ignored=(*ignored, *lost, *policy.unknown(fields, READ | REFUSED.keys())))


class EmbeddingBody(Vectors):
    """Vectors -> one JSON body, or their bytes."""

    def __init__(self, options: EmbeddingOptions, meta: ResponseMeta) -> None:
        super().__init__()
        self._options = options
        self._meta = meta
        if options.encoding_format.startswith("bytes"):
            self.content_type = "application/octet-stream"

    def embedding(self, place: int, event: EmbeddingEvent) -> None:
        """As of all vectors; shortened, where that was asked for. Raises MalformedRequestError for more than there is."""
        super().embedding(place, event)
        wanted = self._options.dimensions
        if wanted is not None:
            if wanted > len(event.values):
                raise MalformedRequestError(f"dimensions must be at most {len(event.values)}, got {wanted}.", param="dimensions")
            self._by_place[place] = _shortened(event.values, wanted)

    def close(self, usage: Usage) -> bytes:
        """The whole answer."""
        options = self._options
        if options.encoding_format.startswith("bytes"):
            return self._bytes(usage)
        vectors: Sequence[Any] = self.vectors
        if options.encoding_format == "base64":  # msgspec writes bytes as base64
            vectors = [_packed(vector, options) for vector in vectors]
        data = [{"index": place, "object": "embedding", "embedding": vector} for place, vector in enumerate(vectors)]
        head = {"id": self._meta.id, "object": "list", "created": self._meta.created, "model": options.model}
        return msgspec.json.encode({**head, "data": data, "usage": encode_usage(usage)})

    def _bytes(self, usage: Usage) -> bytes:
        options = self._options
        parts = [_packed(vector, options) for vector in self.vectors]
        data, end = [], 0
        for place, (vector, part) in enumerate(zip(self.vectors, parts, strict=True)):
            start, end = end, end + len(part)
            how = {"embed_dtype": options.embed_dtype, "endianness": options.endianness}
            data.append({"index": place, **how, "start": start, "end": end, "shape": [len(vector)]})
        if options.encoding_format == "bytes":
            head = {"id": self._meta.id, "created": self._meta.created, "model": options.model}
            counted = {"prompt_tokens": usage.prompt_tokens, "total_tokens": usage.total_tokens}
            self.headers = (("metadata", json.dumps({**head, "data": data, "usage": counted}).replace("\x7f", "\\u007f")),)
        return b"".join(parts)


def make_encoder(options: EmbeddingOptions, meta: ResponseMeta) -> EmbeddingBody:
    """What the options ask for."""
    return EmbeddingBody(options, meta)


def _choice(fields: Mapping[str, Any], name: str, known: tuple[str, ...]) -> str:
    value = fields.get(name)
    if value is None and name not in fields:
        return known[0]
    if not isinstance(value, str) or value not in known:
        raise type_errors(literal_fault(name, *known))
    return value


def _check_dimensions(dimensions: int | None, model: ModelInfo, given: str) -> None:
    if dimensions is None:
        return
    name = next(iter(model.names), given)[:200]
    if not (model.is_matryoshka or model.matryoshka_dimensions):
        raise MalformedRequestError(
            f"Model '{name}' does not support Matryoshka embeddings; dimensions must be unset (received dimensions={_number(dimensions)})."
        )
    known = model.matryoshka_dimensions
    if dimensions < 1 or (known and dimensions not in known):
        allowed = f"one of {list(known)}" if known else "greater than 0"
        raise MalformedRequestError(f"Model '{name}': dimensions must be {allowed}, got {_number(dimensions)}.", param="dimensions")


def _number(value: int) -> str:
    return str(value) if abs(value) < 2**63 else "a number of many digits"


def _shortened(values: Sequence[float], dimensions: int) -> list[float]:
    """The beginning of a vector, of length 1 again."""
    kept = values[:dimensions]
    length = math.hypot(*kept)
    return [value / length for value in kept] if length else list(kept)


def _packed(values: Sequence[float], options: EmbeddingOptions) -> bytes:
    """The bytes of a vector; in a narrower type numbers are rounded, and what is too large is infinite, as in torch."""
    order, letter = _ORDERS[options.endianness], _LETTERS[options.embed_dtype]
    if letter == "H":
        bits = struct.unpack(f"<{len(values)}I", struct.pack(f"<{len(values)}f", *values))
        return struct.pack(f"{order}{len(values)}H", *map(_upper_half, bits))
    if letter == "e":
        values = [value if abs(value) < _LARGEST_FLOAT16 else math.copysign(math.inf, value) for value in values]
    return struct.pack(f"{order}{len(values)}{letter}", *values)


def _upper_half(bits: int) -> int:
    """Of a finite float32, rounded to even."""
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
