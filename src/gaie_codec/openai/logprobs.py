"""Log probabilities: what requests ask for, and the forms that they have in answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from .._logprob_texts import PromptToken, TextLogprob, token_id_text
from .fields import bool_field, int_field, range_error
from .sampling import MAX_LOGPROBS, decode_token_ids


def decode_chat_logprobs(fields: Mapping[str, Any], vocab_size: int) -> int | None:
    """How many of the likeliest, 0 for the sampled token only, None for none at all. Raises MalformedRequestError."""
    top = int_field(fields, "top_logprobs")
    wanted = bool_field(fields, "logprobs")
    if top is not None and top < -1:
        raise range_error("top_logprobs", "`top_logprobs` must be a positive value or -1.", top)
    if top and not wanted:
        raise range_error("top_logprobs", "when using `top_logprobs`, `logprobs` must be set to true.")
    return _within(top or 0, "logprobs", "sample", vocab_size) if wanted else None


def decode_completion_logprobs(fields: Mapping[str, Any], vocab_size: int) -> int | None:
    """Likewise of a completion, where the number itself asks."""
    top = int_field(fields, "logprobs")
    if top is not None and top < -1:
        raise range_error("logprobs", "`logprobs` must be a positive value or -1.", top)
    return None if top is None else _within(top, "logprobs", "sample", vocab_size)


def decode_prompt_logprobs(fields: Mapping[str, Any], vocab_size: int, *, stream: bool) -> int | None:
    """How many of the likeliest at each place of the prompt, which no stream has room for."""
    top = int_field(fields, "prompt_logprobs")
    if top is None:
        return None
    if stream and (top > 0 or top == -1):
        raise range_error("prompt_logprobs", "`prompt_logprobs` are not available when `stream=True`.")
    if top < -1:
        raise range_error("prompt_logprobs", "`prompt_logprobs` must be a positive value or -1.", top)
    return _within(top, "prompt_logprobs", "prompt", vocab_size)


def decode_logprob_token_ids(fields: Mapping[str, Any], vocab_size: int, logprobs: int | None) -> tuple[int, ...]:
    """The tokens to show instead of the likeliest, none where the likeliest are wanted."""
    token_ids = decode_token_ids(fields, "logprob_token_ids", vocab_size)
    if token_ids and logprobs is None:
        raise range_error("logprob_token_ids", "when using `logprob_token_ids`, `logprobs` must be set.")
    return token_ids


def decode_shows_ids(fields: Mapping[str, Any]) -> bool | None:
    """Whether tokens are told by their ids; None for what the server was told."""
    name = "return_tokens_as_token_ids"
    return None if fields.get(name) is None else bool_field(fields, name)


def _within(top: int, name: str, kind: str, vocab_size: int) -> int:
    """-1 stands for the whole vocabulary, and hardly any is so small."""
    most = vocab_size if top == -1 and vocab_size else top
    if most == -1 or most > MAX_LOGPROBS:
        raise range_error(name, f"Requested {kind} logprobs of {most}, which is greater than max allowed: {MAX_LOGPROBS}", most)
    return most


class _Known(msgspec.Struct, gc=False):
    """What is told of one token. A prompt may have a million of them, of which the collector need not know."""

    logprob: float
    rank: int | None
    decoded_token: str


def encode_prompt_logprobs(tokens: Sequence[PromptToken]) -> list[dict[str, Any] | None] | None:
    """vLLM's form: by token id, the token of the prompt before the likeliest; null for the first, and a rank that is unknown is null.
    None where no server told any."""
    if len(tokens) != 1 and all(token.logprob is None for token in tokens):
        return None
    return [None if token.logprob is None else _encode_place(token, token.logprob) for token in tokens]


def _encode_place(token: PromptToken, logprob: float) -> dict[str, Any]:
    place = {str(token.token_id): _Known(logprob, token.rank or None, token.token)}
    for token_id, text, value, rank in token.top:
        if token_id != token.token_id:
            place[str(token_id)] = _Known(value, rank, text)
    return place


def sampled_first(entry: TextLogprob) -> list[tuple[str, float]]:
    """In vLLM's order: the sampled token, whether it is one of the likeliest or not, then the others. Of a dict's equal texts the last
    counts."""
    others = list(entry.top)
    sampled = (entry.token, entry.logprob)
    if sampled in others:
        others.remove(sampled)
    return [sampled, *others]


class Columns:
    """The log probabilities of one choice of a completion: what comes goes into the columns of a chunk, or of a whole body.

    `offset` is where the next token begins: in the texts of the tokens put together, as in vLLM, from chunk to chunk.
    """

    __slots__ = ("_shows_ids", "_top", "offset")

    def __init__(self, top: int, *, shows_ids: bool, offset: int = 0) -> None:
        self._top = top
        self._shows_ids = shows_ids
        self.offset = offset

    def encode(self, prompt: Sequence[PromptToken], entries: Sequence[TextLogprob]) -> dict[str, Any]:
        """The columns of these tokens, of the prompt first."""
        tokens = [token_id_text(one.token_id) if self._shows_ids else one.token for one in prompt] + [one.token for one in entries]
        offsets = []
        for token in tokens:
            offsets.append(self.offset)
            self.offset += len(token)
        return {
            "text_offset": offsets,
            "token_logprobs": [*(one.logprob for one in prompt), *(one.logprob for one in entries)],
            "tokens": tokens,
            "top_logprobs": [*(self._prompt_top(one) for one in prompt), *(dict(sampled_first(one)) for one in entries)],
        }

    def _prompt_top(self, token: PromptToken) -> dict[str, float] | None:
        if token.logprob is None:
            return None
        others = [one for one in token.top[: self._top] if one[0] != token.token_id]
        named = [(token.token_id, token.token, token.logprob), *((other, text, value) for other, text, value, _ in others)]
        return {token_id_text(token_id) if self._shows_ids else text: value for token_id, text, value in named}


def encode_logprob(entry: TextLogprob, top: Sequence[tuple[str, float]] | None = None) -> dict[str, Any]:
    """An entry of a chat's log probabilities, with its own likeliest tokens unless others are given."""
    shown = entry.top if top is None else top
    return {**_token(entry.token, entry.logprob), "top_logprobs": [_token(token, value) for token, value in shown]}


def _token(token: str, logprob: float) -> dict[str, Any]:
    return {"token": token, "logprob": logprob, "bytes": list(token.encode())}
