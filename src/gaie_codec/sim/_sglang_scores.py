"""The unary OpenAI endpoints of SGLang: made-up vectors and scores, the same for the same input."""

from __future__ import annotations

import base64
import struct
import time
from typing import TYPE_CHECKING, Any, Final

from .. import CodecError
from ._sglang_bodies import decode_object, encode_error, encode_inputs
from ._vectors import DIMENSIONS, make_vector

if TYPE_CHECKING:
    from ._engine import Engine


def answer_body(kind: str, body: bytes, engine: Engine, request_id: str) -> tuple[int, Any]:
    """The HTTP status and the JSON value of the answer to a body."""
    try:
        fields = decode_object(body, kind)
    except ValueError as error:
        return 400, {"error": {"message": str(error), "type": "BadRequest"}}
    try:
        return 200, _ANSWERS[kind](fields, engine, request_id)
    except CodecError as error:
        refused = encode_error(error)
        return refused["code"], refused


def _embed(fields: dict[str, Any], engine: Engine, _: str) -> dict[str, Any]:
    inputs = encode_inputs(fields["input"], engine.tokenizer)
    data = []
    for index, token_ids in enumerate(inputs):
        vector = make_vector(token_ids, int(fields.get("dimensions") or DIMENSIONS))
        encoded: Any = vector
        if fields.get("encoding_format") == "base64":
            encoded = base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
        data.append({"embedding": encoded, "index": index, "object": "embedding"})
    return {"data": data, "model": fields.get("model", "default"), "object": "list", "usage": _usage(inputs)}


def _classify(fields: dict[str, Any], engine: Engine, request_id: str) -> dict[str, Any]:
    inputs = encode_inputs(fields["input"], engine.tokenizer)
    data = []
    for index, token_ids in enumerate(inputs):
        likely = _score(token_ids)
        label = "LABEL_1" if likely >= 0.5 else "LABEL_0"
        data.append({"index": index, "label": label, "probs": [1 - likely, likely], "num_classes": 2})
    head = {"id": f"classify-{request_id}", "object": "list", "created": int(time.time()), "model": fields.get("model", "default")}
    return {**head, "data": data, "usage": _usage(inputs)}


def _rank(fields: dict[str, Any], engine: Engine, _: str) -> list[dict[str, Any]]:
    documents = encode_inputs(fields["documents"], engine.tokenizer)
    ranked: list[dict[str, Any]] = []
    for index, token_ids in enumerate(documents):
        document = {"document": fields["documents"][index]} if fields.get("return_documents", True) else {}
        ranked.append({"score": _score(token_ids), **document, "index": index, "meta_info": {"prompt_tokens": len(token_ids)}})
    ranked.sort(key=lambda one: -one["score"])
    return ranked[: fields.get("top_n") or None]


def _judge(fields: dict[str, Any], engine: Engine, _: str) -> dict[str, Any]:
    items = encode_inputs(fields.get("items"), engine.tokenizer)
    labels = fields.get("label_token_ids") or [0, 1]
    scores = [[_score([*token_ids, label]) for label in labels] for token_ids in items]
    return {"scores": scores, "model": fields.get("model", "default"), "usage": _usage(items), "object": "scoring"}


_ANSWERS: Final = {"embeddings": _embed, "classify": _classify, "score": _judge, "rerank": _rank}


def _score(token_ids: list[int]) -> float:
    return sum((place + 1) * token_id for place, token_id in enumerate(token_ids)) % 64 / 64


def _usage(inputs: list[list[int]]) -> dict[str, Any]:
    tokens = sum(map(len, inputs))
    return {"prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0, "prompt_tokens_details": None, "reasoning_tokens": 0}
