"""The OpenAI HTTP API: one module an endpoint, bodies <-> the neutral vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Final, TypeAlias

from . import chat, chat_response, completions, completions_response, embeddings, responses, responses_response, scores, sglang_response
from .endpoint import Endpoint, ResponseEncoder, ResponseMeta

_MakeEncoder: TypeAlias = Callable[[Any, ResponseMeta], ResponseEncoder]


def _by_flavor(vllm: _MakeEncoder, sglang: _MakeEncoder) -> _MakeEncoder:
    """Whichever the answer's flavor asks for."""
    return lambda options, meta: (vllm if meta.flavor == "vllm" else sglang)(options, meta)


ENDPOINTS: Final[Mapping[str, Endpoint]] = MappingProxyType(
    {
        endpoint.path: endpoint
        for endpoint in (
            Endpoint(
                path=chat.PATH,
                decode_request=chat.decode_request,
                make_encoder=_by_flavor(chat_response.make_encoder, sglang_response.make_chat_encoder),
            ),
            Endpoint(
                path=completions.PATH,
                decode_request=completions.decode_request,
                make_encoder=_by_flavor(completions_response.make_encoder, sglang_response.make_completion_encoder),
            ),
            Endpoint(path=responses.PATH, decode_request=responses.decode_request, make_encoder=responses_response.make_encoder),
            Endpoint(
                path=embeddings.PATH,
                decode_request=embeddings.decode_request,
                make_encoder=embeddings.make_encoder,
                embeds=True,
                prompts_field="input",
            ),
            *(
                Endpoint(path=path, decode_request=decode, make_encoder=make_encoder, embeds=True, prompts_field="documents")
                for paths, decode, make_encoder in (
                    (scores.SCORE_PATHS, scores.decode_score, scores.make_score_encoder),
                    (scores.RERANK_PATHS, scores.decode_rerank, scores.make_rerank_encoder),
                )
                for path in paths
            ),
        )
    }
)
"""What generates or embeds, for servers that take token ids, by path."""
