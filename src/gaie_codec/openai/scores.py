"""`/v1/score` and `/v1/rerank`, as vLLM answers them for a model that embeds: how alike two texts are is the cosine of their vectors.

Each text is embedded once, by a call of its own. No wire is for models that judge a pair of texts at once, but where JSON is passed
through.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final

import msgspec

from .._errors import MalformedRequestError, UnsupportedFieldError, UsageError
from .._events import Usage
from . import policy
from .endpoint import Asked, Decoded, ResponseMeta
from .fields import decode_json_object, int_field, type_error
from .inputs import check_count, decode_embedded_model, encode_inputs, make_requests
from .vectors import Vectors, encode_usage

SCORE_PATHS: Final = ("/v1/score", "/score")
RERANK_PATHS: Final = ("/v1/rerank", "/rerank", "/v2/rerank")
ID_PREFIX: Final = "score-"

# The pairs of names under which vLLM takes the two sides, in the order in which it looks.
_SIDES: Final = (("queries", "documents"), ("queries", "items"), ("data_1", "data_2"), ("text_1", "text_2"))
_COMMON: Final = "model request_id truncate_prompt_tokens truncation_side priority cache_salt".split()
READ: Final = frozenset((*_COMMON, *(name for sides in _SIDES for name in sides)))
RERANK_READ: Final = frozenset((*_COMMON, "query", "documents", "top_n"))
REFUSED: Final[Mapping[str, tuple[Any, ...]]] = MappingProxyType(
    {
        "activation": (None,),
        "mm_processor_kwargs": (None,),
        "padding": (None, "do_not_pad"),
        "softmax": (None,),
        "use_activation": (None, True),
    }
)


class ScoreOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What the answer has to look like: pairs of places among the texts, and for a ranking the documents."""

    id: str
    model: str
    pairs: tuple[tuple[int, int], ...]
    documents: tuple[str, ...] = ()
    top_n: int = 0


def decode_score(body: bytes, asked: Asked) -> Decoded:
    """Decode a request for scores: one text against each of several, or as many pairs as there are. Raises RequestError."""
    fields = decode_json_object(body)
    sides = next((sides for sides in _SIDES if all(fields.get(name) is not None for name in sides)), None)
    if sides is None:
        missing = next((two for one, two in _SIDES if fields.get(one) is not None), "queries")
        raise type_error(missing, "missing", "Field required")
    left, right = (_texts(fields, name) for name in sides)
    for texts, side in ((left, "text"), (right, "text_pair")):
        if not texts:
            raise MalformedRequestError(f"At least one {side} element must be given")
    if len(left) not in (1, len(right)):
        raise MalformedRequestError("Input lengths must be either 1:1, 1:N or N:N")
    check_count(len(left) + len(right), sides[1], asked)
    pairs = tuple((place if len(left) > 1 else 0, len(left) + place) for place in range(len(right)))
    return _decoded(fields, asked, [*left, *right], ScoreOptions(id="", model="", pairs=pairs), READ)


def decode_rerank(body: bytes, asked: Asked) -> Decoded:
    """Decode a request to rank documents by a query. Raises RequestError."""
    fields = decode_json_object(body)
    for name in ("query", "documents"):
        if fields.get(name) is None:
            raise type_error(name, "missing", "Field required")
    query = _texts(fields, "query")
    if len(query) != 1 or isinstance(fields["query"], list):
        raise type_error("query", "string_type", "Input should be a valid string")
    documents = _texts(fields, "documents")
    if not documents:
        raise MalformedRequestError("At least one text_pair element must be given")
    check_count(1 + len(documents), "documents", asked)
    pairs = tuple((0, place) for place in range(1, 1 + len(documents)))
    top_n = int_field(fields, "top_n") or 0
    options = ScoreOptions(id="", model="", pairs=pairs, documents=tuple(documents), top_n=top_n)
    return _decoded(fields, asked, [*query, *documents], options, RERANK_READ)


def _decoded(fields: Mapping[str, Any], asked: Asked, texts: list[str], options: ScoreOptions, read: frozenset[str]) -> Decoded:
    if asked.tokenizer is None:
        raise UsageError("a text has to be tokenized, and there is no tokenizer")
    lost = policy.refuse_values(fields, REFUSED, drops=asked.drops)
    given, name = decode_embedded_model(fields, asked)
    shared = {key: value for key, value in fields.items() if key != "add_special_tokens"}
    prompts = encode_inputs(shared, texts, "documents", asked, asked.tokenizer)
    request_id, requests, ignored = make_requests(fields, prompts, asked, name=name, prefix=ID_PREFIX)
    options = msgspec.structs.replace(options, id=request_id, model=given or requests[0].model)
    return Decoded(prompts=requests, options=options, ignored=(*ignored, *lost, *policy.unknown(fields, read | REFUSED.keys())))


def _texts(fields: Mapping[str, Any], name: str) -> list[str]:
    value = fields[name]
    values = value if isinstance(value, list) else [value]
    for place, one in enumerate(values):
        if isinstance(one, dict):
            raise UnsupportedFieldError(f"`{name}` with content parts is not supported: text only", param=f"body.{name}")
        if not isinstance(one, str):
            loc = f"{name}.{place}" if isinstance(value, list) else name
            raise type_error(loc, "string_type", "Input should be a valid string")
    return values


class ScoreBody(Vectors):
    """Vectors -> the scores of pairs, in the order in which they were asked for."""

    def __init__(self, options: ScoreOptions, meta: ResponseMeta) -> None:
        super().__init__()
        self._options = options
        self._meta = meta

    def close(self, usage: Usage) -> bytes:
        """The whole answer."""
        data = [{"index": place, "object": "score", "score": score} for place, score in enumerate(self._scores())]
        head = {"id": self._meta.id, "object": "list", "created": self._meta.created, "model": self._options.model}
        return msgspec.json.encode({**head, "data": data, "usage": encode_usage(usage)})

    def _scores(self) -> list[float]:
        vectors = self.vectors
        return [_cosine(vectors[one], vectors[two]) for one, two in self._options.pairs]


class RerankBody(ScoreBody):
    """Vectors -> the documents, those that are most like the query first."""

    def close(self, usage: Usage) -> bytes:
        """The whole answer."""
        options = self._options
        scores = self._scores()
        ranked = sorted(range(len(scores)), key=scores.__getitem__, reverse=True)  # of equals the first stays first
        results = [
            {"index": place, "document": {"text": options.documents[place], "multi_modal": None}, "relevance_score": scores[place]}
            for place in (ranked[: options.top_n] if options.top_n > 0 else ranked)
        ]
        counted = {"prompt_tokens": usage.prompt_tokens, "total_tokens": usage.total_tokens}
        return msgspec.json.encode({"id": self._meta.id, "model": options.model, "usage": counted, "results": results})


def _cosine(one: Sequence[float], two: Sequence[float]) -> float:
    """0 where one has no direction."""
    lengths = math.hypot(*one) * math.hypot(*two)
    return math.fsum(map(operator.mul, one, two)) / lengths if lengths else 0.0


def make_score_encoder(options: ScoreOptions, meta: ResponseMeta) -> ScoreBody:
    """What a request for scores gets."""
    return ScoreBody(options, meta)


def make_rerank_encoder(options: ScoreOptions, meta: ResponseMeta) -> RerankBody:
    """What a request to rank gets."""
    return RerankBody(options, meta)
