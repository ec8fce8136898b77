"""OpenAI error bodies, in the shape that vLLM gives them: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import msgspec

from .._errors import CodecError


def encode_error(error: CodecError) -> bytes:
    """The JSON body, the same alone in an HTTP answer and as an event in a stream. `code` is the HTTP status, as vLLM has it."""
    return msgspec.json.encode(
        {
            "error": {
                # A host's gRPC library, or a chat template, may put lone surrogates into a text.
                "message": error.message.encode("utf-8", "replace").decode(),
                "type": error.error_type,
                "param": error.param and error.param.encode("utf-8", "replace").decode(),
                "code": error.http_status,
            }
        }
    )
