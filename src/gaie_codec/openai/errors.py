"""OpenAI error bodies, in the shape that vLLM gives them: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import msgspec

from .._errors import CodecError


def encode_error(error: CodecError) -> bytes:
    """The JSON body, the same alone in an HTTP answer and as an event in a stream. `code` is the HTTP status, as vLLM has it."""
    return msgspec.json.encode(
        {
            "error": {
                "message": error.message,
                "type": error.error_type,
                "param": error.param,
                "code": error.http_status,
            }
        }
    )
