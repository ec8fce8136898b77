"""Deltas -> the answers of SGLang's own OpenAI server (observed on 0.5.23): what of vLLM's form is different in them.

Reasoning is `reasoning_content`, which every delta has; `matched_stop` stands for `stop_reason`, and names EOS too; a choice begins with
its role when it first gains something, ends with a chunk of its own, and no chunk is empty; usage has `reasoning_tokens` of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import msgspec

from .. import _sse
from .._choices import Delta
from .._errors import CodecError
from .._events import Usage
from .._logprob_texts import PromptToken, TextLogprob
from . import chat_response
from .chat import ChatOptions
from .chat_response import raw_json
from .completions import CompletionOptions
from .endpoint import ResponseMeta
from .errors import encode_error, encode_error_event
from .logprobs import encode_logprob

_encode = msgspec.json.Encoder().encode
_METADATA: Final = {"weight_version": "default"}  # SGLang's name for the weights that it was started with
_CHAT_TAIL: Final = b'},"logprobs":null,"finish_reason":null,"matched_stop":null}]}' + _sse.END
_TEXT_TAIL: Final = b',"logprobs":null,"finish_reason":null,"matched_stop":null}],"usage":null}' + _sse.END
_NO_DELTA: Final = {"role": None, "content": None, "reasoning_content": None}  # what SGLang writes around tool calls


class StreamEncoder(chat_response.StreamEncoder):
    """Server-sent events of a chat."""

    before_text = b'"delta":{"reasoning_content":null,"content":'
    tail = _CHAT_TAIL

    def opening(self, indexes: range, prompt_token_ids: list[list[int]], usage: Usage) -> bytes:
        self._unopened = set(indexes)
        self._prompt_token_ids = prompt_token_ids
        self._last_ids: dict[int, int] = {}
        return b""

    def text(self, index: int, text: str) -> bytes:
        chunk = b"%b%b%b" % (self._prefixes[index], _encode(text), self.tail)
        return chunk if index not in self._unopened else self._begin(index, None) + chunk

    def reasoning(self, index: int, text: str) -> bytes:
        chunk = b'%b,"choices":[{"index":%d,"delta":{"reasoning_content":%b%b' % (self._head, index, _encode(text), self.tail)
        return chunk if index not in self._unopened else self._begin(index, None) + chunk

    def delta(self, delta: Delta, usage: Usage | None) -> bytes:
        """A chunk for each thing that it says, and one for the end of the choice."""
        index, is_last = delta.index, delta.finish_reason is not None
        if delta.token_ids:
            self._last_ids[index] = delta.token_ids[-1]
        parts = [self._begin(index, usage)] if index in self._unopened else []
        told = list(_said(delta))
        shows_ids = self._options.return_token_ids and bool(delta.token_ids)
        if not (told or is_last) and (delta.logprobs or shows_ids):
            told.append({"reasoning_content": None, "content": ""})
        if is_last:
            told.append({"reasoning_content": None})
        for place, said in enumerate(told):
            ends = is_last and place == len(told) - 1
            choice: dict[str, Any] = {
                "index": index,
                "delta": said,
                # Entries come with the first chunk, so that none is lost where there is no text.
                "logprobs": encode_logprobs(delta.logprobs) if self._options.logprobs and place == 0 and delta.logprobs else None,
                "finish_reason": delta.finish_reason if ends else None,
                "matched_stop": matched_stop(delta, self._last_ids.get(index), self._meta) if ends else None,
            }
            if shows_ids and place == 0:
                choice["token_ids"] = delta.token_ids
            chunk: dict[str, Any] = {"choices": [choice]}
            if "tool_calls" in said:
                chunk["usage"] = None
            parts.append(self._chunk(chunk | self._running(usage) | (_kv_transfer(delta) if ends else {})))
        return b"".join(parts)

    def error(self, error: CodecError) -> bytes:
        return encode_error_event(error, "sglang")

    def _begin(self, index: int, usage: Usage | None) -> bytes:
        """The role of a choice, and what its content begins with."""
        self._unopened.discard(index)
        options = self._options
        prompt: dict[str, Any] = {"prompt_token_ids": self._prompt_token_ids[0]} if options.return_token_ids else {}
        deltas = [{"reasoning_content": None, "role": options.role, "content": ""}]
        if options.echo:
            deltas.append({"reasoning_content": None, "content": options.echo})
        rest = {"logprobs": None, "finish_reason": None, "matched_stop": None}
        return b"".join(
            self._chunk({"choices": [{"index": index, "delta": said, **rest}], **self._running(usage), **(prompt if place == 0 else {})})
            for place, said in enumerate(deltas)
        )

    def _running(self, usage: Usage | None) -> dict[str, Any]:
        return {"usage": self._usage(usage)} if self._options.continuous_usage and usage is not None else {}

    def _usage(self, usage: Usage) -> dict[str, Any]:
        return encode_usage(usage, self._meta)


class UnaryEncoder(chat_response.UnaryEncoder):
    """One JSON body of a chat."""

    def close(self, usage: Usage) -> bytes:
        body: dict[str, Any] = {
            "id": self._meta.id,
            "object": self.object_name,
            "created": self._meta.created,
            "model": self._options.model,
            "choices": [self._choice(index) for index in sorted(self._finishes)],
            "usage": encode_usage(usage, self._meta),
            "metadata": _METADATA,
        }
        body |= self.prompt_part(self._prompts)
        for finish in self._finishes.values():
            body |= _kv_transfer(finish)
        return _encode(body)

    def error(self, error: CodecError) -> bytes:
        return encode_error(error, "sglang")

    def part(self, index: int, text: str) -> dict[str, Any]:
        calls = self._tool_calls[index]
        message: dict[str, Any] = {
            "role": self._options.role,
            "content": self._options.echo + text,
            "reasoning_content": "".join(self._reasoning[index]) or None,
        }
        if calls:
            message["tool_calls"] = [{"index": number, **calls[number].encoded()} for number in sorted(calls)]
        return {"message": message}

    def _choice(self, index: int) -> dict[str, Any]:
        finish = self._finishes[index]
        choice: dict[str, Any] = {
            "index": index,
            **self.part(index, "".join(self._texts[index])),
            "logprobs": encode_logprobs(self._logprobs[index]) if self._options.logprobs else None,
            "finish_reason": finish.finish_reason,
            # Of a body, not of a stream, SGLang takes it away where there are tool calls.
            "matched_stop": None if finish.finish_reason == "tool_calls" else self._matched_stop(index),
        }
        if self._options.return_token_ids:
            choice |= {"token_ids": self._token_ids[index], "prompt_token_ids": self._prompts[0]}
        return choice

    def prompt_part(self, prompts: list[list[int]]) -> dict[str, Any]:
        said = super().prompt_part(prompts)
        said.pop("prompt_token_ids", None)  # the choices have them
        return said

    def _matched_stop(self, index: int) -> str | int | None:
        return matched_stop(self._finishes[index], next(reversed(self._token_ids[index]), None), self._meta)


class CompletionStream(StreamEncoder):
    """Server-sent events of a completion: no roles, and the end comes with the last text."""

    object_name = "text_completion"
    before_text = b'"text":'
    tail = _TEXT_TAIL
    _options: CompletionOptions

    def opening(self, indexes: range, prompt_token_ids: list[list[int]], usage: Usage) -> bytes:
        super().opening(indexes, prompt_token_ids, usage)
        self._per_prompt = len(indexes) // len(prompt_token_ids)
        if not (self._options.echoes or self._options.return_token_ids):
            self._unopened.clear()
        return b""

    def delta(self, delta: Delta, usage: Usage | None) -> bytes:
        options, index, is_last = self._options, delta.index, delta.finish_reason is not None
        if delta.token_ids:
            self._last_ids[index] = delta.token_ids[-1]
        if not (is_last or options.is_detailed):
            return self.text(index, delta.text) if delta.text else b""
        is_first = index in self._unopened
        self._unopened.discard(index)
        number = index // self._per_prompt
        text, entries = ("", ()) if options.hides_output else (delta.text, delta.logprobs)
        if not (is_first or is_last or text or entries or (options.return_token_ids and delta.token_ids)):
            return b""
        echoes = is_first and options.echoes
        choice: dict[str, Any] = {
            "index": index,
            "text": options.echo_of(number) + text if echoes else text,
            "logprobs": encode_columns(delta.prompt if echoes else (), entries, options.top_logprobs) if options.logprobs else None,
            "finish_reason": delta.finish_reason,
            "matched_stop": matched_stop(delta, self._last_ids.get(index), self._meta) if is_last else None,
        }
        if options.return_token_ids:
            choice |= {"token_ids": delta.token_ids} | ({"prompt_token_ids": self._prompt_token_ids[number]} if is_first else {})
        return self._chunk({"choices": [choice], "usage": None, **self._running(usage), **_kv_transfer(delta)})

    def close(self, usage: Usage) -> bytes:
        """The usage chunk when asked for, in which completions have no nulls, and `[DONE]`."""
        if not self._options.include_usage:
            return _sse.DONE
        told = {key: value for key, value in self._usage(usage).items() if value is not None}
        return self._chunk({"choices": [], "usage": told}) + _sse.DONE


class CompletionBody(UnaryEncoder):
    """One JSON body of a completion."""

    object_name = "text_completion"
    _options: CompletionOptions

    def prompt_part(self, prompts: list[list[int]]) -> dict[str, Any]:
        return {}

    def _choice(self, index: int) -> dict[str, Any]:
        options, finish = self._options, self._finishes[index]
        number = index * len(self._prompts) // len(self._texts)
        entries: Sequence[TextLogprob] = () if options.hides_output else self._logprobs[index]
        text = "" if options.hides_output else "".join(self._texts[index])
        choice: dict[str, Any] = {
            "index": index,
            "text": options.echo_of(number) + text,
            "logprobs": encode_columns(finish.prompt if options.echoes else (), entries, options.top_logprobs)
            if options.logprobs
            else None,
            "finish_reason": finish.finish_reason,
            "matched_stop": self._matched_stop(index),
        }
        if options.return_token_ids:
            choice |= {"token_ids": self._token_ids[index], "prompt_token_ids": self._prompts[number]}
        return choice


def matched_stop(delta: Delta, last_id: int | None, meta: ResponseMeta) -> str | int | None:
    """What ended the choice: a stop string, a stop token, or the EOS token, of which a delta says nothing."""
    if delta.stop_reason is not None or delta.finish_reason not in ("stop", "tool_calls"):
        return delta.stop_reason
    return last_id if last_id in meta.eos_token_ids else None


def encode_usage(usage: Usage, meta: ResponseMeta) -> dict[str, Any]:
    """The `usage` object."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "total_tokens": usage.total_tokens,
        "completion_tokens": usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens} if meta.prompt_tokens_details and usage.cached_tokens else None,
        "reasoning_tokens": usage.reasoning_tokens,
        "completion_tokens_details": None,
    }


def encode_logprobs(entries: Sequence[TextLogprob]) -> dict[str, Any]:
    """The `logprobs` of a chat."""
    return {"content": [encode_logprob(entry) for entry in entries]}


def encode_columns(prompt: Sequence[PromptToken], entries: Sequence[TextLogprob], top: int) -> dict[str, Any]:
    """The `logprobs` of a completion: no offsets, and of the likeliest what the server told, without the sampled token where it is
    none. `top` is how many were asked for."""
    return {
        "text_offset": [-1] * (len(prompt) + len(entries)),
        "token_logprobs": [*(one.logprob for one in prompt), *(one.logprob for one in entries)],
        "tokens": [*(one.token for one in prompt), *(one.token for one in entries)],
        "top_logprobs": [
            *({text: value for _, text, value, _ in one.top} if one.top else None for one in prompt),
            *(dict(one.top) for one in entries),
        ]
        if top
        else [],
    }


def _said(delta: Delta) -> Sequence[dict[str, Any]]:
    """What a delta says, one thing at a time."""
    said: list[dict[str, Any]] = []
    if delta.reasoning:
        said.append({"reasoning_content": delta.reasoning})
    if delta.text:
        said.append({"reasoning_content": None, "content": delta.text})
    for call in delta.tool_calls:
        function = {"name": call.name or None, "arguments": call.arguments}
        piece = {"id": call.id if call.name else None, "index": call.index, "type": "function", "function": function}
        said.append({**_NO_DELTA, "tool_calls": [piece]})
    return said


def _kv_transfer(delta: Delta) -> dict[str, Any]:
    return {"kv_transfer_params": raw_json(delta.kv_transfer_params)} if delta.kv_transfer_params else {}


def make_chat_encoder(options: ChatOptions, meta: ResponseMeta) -> StreamEncoder | UnaryEncoder:
    """What the options ask for."""
    return StreamEncoder(options, meta) if options.stream else UnaryEncoder(options, meta)


def make_completion_encoder(options: CompletionOptions, meta: ResponseMeta) -> CompletionStream | CompletionBody:
    """Likewise of a completion."""
    return CompletionStream(options, meta) if options.stream else CompletionBody(options, meta)
