"""Deltas -> a chat completion: as SSE chunks, or folded into one JSON body.

Chunks are vLLM's, without its always-null extras and without chunks that carry nothing. What is constant in a choice's chunk is encoded
once; per token only the text is (0.03 us instead of 0.5 us for the whole object). Both encoders take the same calls in the same
order: `open`, `delta` ..., then `close` or `error`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from .. import _sse
from .._choices import Delta
from .._errors import CodecError, UsageError
from .._events import BodyEvent, Usage
from .._logprob_texts import TextLogprob
from .chat import ChatOptions
from .endpoint import ResponseMeta
from .errors import encode_error, encode_error_event
from .logprobs import encode_logprob, encode_prompt_logprobs, sampled_first

if TYPE_CHECKING:
    from ..text import ToolCall

_encode = msgspec.json.Encoder().encode


class StreamEncoder:
    """Server-sent events. What differs between endpoints is in the attributes and methods that completions replace."""

    content_type = _sse.CONTENT_TYPE
    streams = True
    reported_usage = None
    object_name = "chat.completion.chunk"
    before_text = b'"delta":{"content":'
    after_text = b"}"

    def __init__(self, options: ChatOptions, meta: ResponseMeta) -> None:
        self._options = options
        self._meta = meta
        self.is_detailed = options.is_detailed
        self.shows_ids = _shows_ids(options, meta)
        self.wants_usage = options.continuous_usage
        # {"id":...,"object":...,"created":...,"model":... - without its closing brace, for what each chunk adds.
        self._head = _sse.DATA + _encode({"id": meta.id, "object": self.object_name, "created": meta.created, "model": options.model})[:-1]
        self._prefixes: dict[int, bytes] = {}
        self._reasoning_prefixes: dict[int, bytes] = {}
        self._arguments_prefixes: dict[int, bytes] = {}

    def open(self, indexes: range, prompt_token_ids: list[list[int]], usage: Usage) -> bytes:
        """What comes first, once the first upstream message is there."""
        for index in indexes:
            before = b'%b,"choices":[{"index":%d,' % (self._head, index)
            self._prefixes[index] = before + self.before_text
            self._reasoning_prefixes[index] = before + b'"delta":{"reasoning":'
            self._arguments_prefixes[index] = before + b'"delta":{"tool_calls":[{"index":'
        return self.opening(indexes, prompt_token_ids, usage)

    def opening(self, indexes: range, prompt_token_ids: list[list[int]], usage: Usage) -> bytes:
        """The role chunks of all choices, and what their content begins with."""
        options = self._options
        prompt: dict[str, Any] = {"prompt_token_ids": prompt_token_ids[0]} if options.return_token_ids else {}
        if options.prompt_text is not None:
            prompt["prompt_text"] = options.prompt_text
        continuous = {"usage": self._usage(usage)} if self._options.continuous_usage else {}
        chunks = []
        for index in indexes:
            choice = {"index": index, "delta": {"role": options.role, "content": ""}, "logprobs": None, "finish_reason": None}
            chunks.append(self._chunk({"choices": [choice], **continuous, **prompt}))
        for index in indexes if options.echo else ():
            choice = {"index": index, "delta": {"content": options.echo}, "logprobs": None, "finish_reason": None}
            chunks.append(self._chunk({"choices": [choice], **continuous}))
        return b"".join(chunks)

    def part(self, delta: Delta) -> dict[str, Any]:
        """What a choice says besides its logprobs and its end."""
        if not self._options.parses:
            return {"delta": {"content": delta.text}}
        said: dict[str, Any] = {}
        if delta.reasoning:
            said["reasoning"] = delta.reasoning
        if delta.text or (self._options.shows_empty and not said and not delta.tool_calls):
            said["content"] = delta.text
        if delta.tool_calls:
            said["tool_calls"] = [_tool_call_piece(call) for call in delta.tool_calls]
        return {"delta": said}

    def text(self, index: int, text: str) -> bytes:
        """The per-token path: the chunk of a delta that is nothing but text, for options without `is_detailed`."""
        return b'%b%b%b,"logprobs":null,"finish_reason":null}]}\n\n' % (self._prefixes[index], _encode(text), self.after_text)

    def reasoning(self, index: int, text: str) -> bytes:
        """Likewise of a delta that is nothing but reasoning."""
        return b'%b%b},"logprobs":null,"finish_reason":null}]}\n\n' % (self._reasoning_prefixes[index], _encode(text))

    def _arguments(self, index: int, piece: ToolCall) -> bytes:
        """Likewise of a delta that is nothing but arguments of a tool call that was begun."""
        return b'%b%d,"function":{"arguments":%b}}]},"logprobs":null,"finish_reason":null}]}\n\n' % (
            self._arguments_prefixes[index],
            piece.index,
            _encode(piece.arguments),
        )

    def delta(self, delta: Delta, usage: Usage | None) -> bytes:
        """One chunk; nothing for a delta that carries nothing."""
        if delta.finish_reason is None:
            is_plain = not (delta.reasoning or delta.tool_calls)
            if len(delta.tool_calls) == 1 and not (self._options.is_detailed or delta.reasoning or delta.text or delta.tool_calls[0].name):
                return self._arguments(delta.index, delta.tool_calls[0])
            if is_plain and not self._options.is_detailed:
                return self.text(delta.index, delta.text) if delta.text else b""
            if is_plain and not (delta.text or delta.logprobs or (delta.token_ids and self._options.return_token_ids)):
                return b""
        choice: dict[str, Any] = {
            "index": delta.index,
            **self.part(delta),
            "logprobs": {"content": [self._logprob(entry) for entry in delta.logprobs]} if self._options.logprobs else None,
            "finish_reason": delta.finish_reason,
        }
        if delta.finish_reason is not None:
            choice["stop_reason"] = delta.stop_reason
        if self._options.return_token_ids:
            choice["token_ids"] = delta.token_ids
        return self._choice_chunk(choice, delta, usage)

    def _logprob(self, entry: TextLogprob) -> dict[str, Any]:
        return encode_logprob(entry, sampled_first(entry)[: self._options.top_logprobs])

    def _choice_chunk(self, choice: dict[str, Any], delta: Delta, usage: Usage | None) -> bytes:
        chunk: dict[str, Any] = {"choices": [choice]}
        if self._options.continuous_usage and usage is not None:
            chunk["usage"] = self._usage(usage)
        if delta.finish_reason is not None and self._meta.system_fingerprint and not self._options.include_usage:
            chunk["system_fingerprint"] = self._meta.system_fingerprint
        if delta.kv_transfer_params:
            chunk["kv_transfer_params"] = raw_json(delta.kv_transfer_params)
        return self._chunk(chunk)

    def body(self, event: BodyEvent) -> bytes:
        """No server sends this to a decoded request."""
        raise UsageError("a passed-through body in an answer of deltas")

    def check_complete(self) -> None:
        """Deltas are counted before they come here."""

    def close(self, usage: Usage) -> bytes:
        """The usage chunk when asked for, and `[DONE]`."""
        if not self._options.include_usage:
            return _sse.DONE
        last: dict[str, Any] = {"choices": [], "usage": self._usage(usage)}
        if self._meta.system_fingerprint:
            last["system_fingerprint"] = self._meta.system_fingerprint
        return self._chunk(last) + _sse.DONE

    def error(self, error: CodecError) -> bytes:
        """An error event. No `[DONE]` follows: the stream did not end well."""
        return encode_error_event(error)

    def _chunk(self, rest: dict[str, Any]) -> bytes:
        return self._head + b"," + _encode(rest)[1:] + _sse.END

    def _usage(self, usage: Usage) -> dict[str, Any]:
        return encode_usage(usage, self._meta.prompt_tokens_details, self._options.counts_reasoning)


class UnaryEncoder:
    """One JSON body: the fold of what StreamEncoder would have sent."""

    content_type = "application/json"
    streams = False
    wants_usage = False
    reported_usage = None
    object_name = "chat.completion"

    def __init__(self, options: ChatOptions, meta: ResponseMeta) -> None:
        self._options = options
        self._meta = meta
        self.is_detailed = options.is_detailed
        self.shows_ids = _shows_ids(options, meta)
        self._texts: dict[int, list[str]] = {}
        self._reasoning: dict[int, list[str]] = {}
        self._tool_calls: dict[int, dict[int, _WholeCall]] = {}
        self._token_ids: dict[int, list[int]] = {}
        self._logprobs: dict[int, list[TextLogprob]] = {}
        self._finishes: dict[int, Delta] = {}
        self._prompts: list[list[int]] = []

    def open(self, indexes: range, prompt_token_ids: list[list[int]], usage: Usage) -> bytes:
        """Nothing yet: the body comes whole."""
        self._prompts = prompt_token_ids
        for index in indexes:
            self._texts[index], self._token_ids[index], self._logprobs[index] = [], [], []
            self._reasoning[index], self._tool_calls[index] = [], {}
        return b""

    def text(self, index: int, text: str) -> bytes:
        """Keep the text."""
        self._texts[index].append(text)
        return b""

    def reasoning(self, index: int, text: str) -> bytes:
        """Keep the reasoning."""
        self._reasoning[index].append(text)
        return b""

    def delta(self, delta: Delta, usage: Usage | None) -> bytes:
        """Keep the delta."""
        self._texts[delta.index].append(delta.text)
        if delta.reasoning:
            self._reasoning[delta.index].append(delta.reasoning)
        calls = self._tool_calls[delta.index]
        for call in delta.tool_calls:
            calls.setdefault(call.index, _WholeCall()).add(call)
        for broken in delta.broken:
            calls.pop(broken.index, None)
            self._texts[delta.index].append(broken.text)
        self._token_ids[delta.index] += delta.token_ids
        self._logprobs[delta.index] += delta.logprobs
        if delta.finish_reason is not None:
            self._finishes[delta.index] = delta
        return b""

    def body(self, event: BodyEvent) -> bytes:
        """No server sends this to a decoded request."""
        raise UsageError("a passed-through body in an answer of deltas")

    def check_complete(self) -> None:
        """Deltas are counted before they come here."""

    def close(self, usage: Usage) -> bytes:
        """The whole body."""
        body: dict[str, Any] = {
            "id": self._meta.id,
            "object": self.object_name,
            "created": self._meta.created,
            "model": self._options.model,
            "choices": [self._choice(index) for index in sorted(self._finishes)],
        }
        if self._meta.system_fingerprint:
            body["system_fingerprint"] = self._meta.system_fingerprint
        body["usage"] = encode_usage(usage, self._meta.prompt_tokens_details, self._options.counts_reasoning)
        body |= self.prompt_part(self._prompts)
        for finish in self._finishes.values():
            if finish.kv_transfer_params:
                body["kv_transfer_params"] = raw_json(finish.kv_transfer_params)
        return _encode(body)

    def error(self, error: CodecError) -> bytes:
        """The error body alone."""
        return encode_error(error)

    def part(self, index: int, text: str) -> dict[str, Any]:
        """What a choice says besides its logprobs and its end. Content that is not there is null where something else is."""
        calls, reasoning = self._tool_calls[index], "".join(self._reasoning[index])
        text = self._options.echo + text
        says_else = bool(calls) or (bool(reasoning) and not self._options.forces_call)
        message: dict[str, Any] = {"role": self._options.role, "content": None if says_else and not text else text, "refusal": None}
        if calls:
            message["tool_calls"] = [calls[number].encoded() for number in sorted(calls)]
        if reasoning:
            message["reasoning"] = reasoning
        return {"message": message}

    def _logprob(self, entry: TextLogprob) -> dict[str, Any]:
        return encode_logprob(entry, sampled_first(entry)[: self._options.top_logprobs])

    def prompt_part(self, prompts: list[list[int]]) -> dict[str, Any]:
        """What the body says of the prompt."""
        options = self._options
        said: dict[str, Any] = {"prompt_token_ids": prompts[0]} if options.return_token_ids else {}
        if options.prompt_text is not None:
            said["prompt_text"] = options.prompt_text
        if options.prompt_logprobs:
            said["prompt_logprobs"] = encode_prompt_logprobs(next(iter(self._finishes.values())).prompt)
        return said

    def _choice(self, index: int) -> dict[str, Any]:
        finish = self._finishes[index]
        choice: dict[str, Any] = {
            "index": index,
            **self.part(index, "".join(self._texts[index])),
            "logprobs": {"content": [self._logprob(entry) for entry in self._logprobs[index]]} if self._options.logprobs else None,
            "finish_reason": finish.finish_reason,
            "stop_reason": finish.stop_reason,
        }
        if self._options.return_token_ids:
            choice["token_ids"] = self._token_ids[index]
        return choice


def _shows_ids(options: ChatOptions, meta: ResponseMeta) -> bool:
    asked = options.return_tokens_as_token_ids
    return meta.return_tokens_as_token_ids if asked is None else asked


class _WholeCall:
    """A tool call whose pieces are put together."""

    __slots__ = ("_arguments", "_id", "_name")

    def __init__(self) -> None:
        self._id = self._name = ""
        self._arguments: list[str] = []

    def add(self, piece: ToolCall) -> None:
        self._id, self._name = self._id or piece.id, self._name or piece.name
        self._arguments.append(piece.arguments)

    def encoded(self) -> dict[str, Any]:
        return {"id": self._id, "type": "function", "function": {"name": self._name, "arguments": "".join(self._arguments)}}


def _tool_call_piece(piece: ToolCall) -> dict[str, Any]:
    """As vLLM has it: id, type and name with the first piece only."""
    if not piece.name:
        return {"index": piece.index, "function": {"arguments": piece.arguments}}
    function = {"name": piece.name, "arguments": piece.arguments} if piece.arguments else {"name": piece.name}
    return {"id": piece.id, "type": "function", "index": piece.index, "function": function}


def raw_json(text: str) -> msgspec.Raw:
    """JSON text as a value of an answer."""
    return msgspec.Raw(msgspec.json.format(text.encode(), indent=-1))  # on one line, as an event has to be


def encode_usage(usage: Usage, with_details: bool, counts_reasoning: bool = False) -> dict[str, Any]:
    """The `usage` object. `counts_reasoning` shows reasoning tokens also where there are none."""
    encoded: dict[str, Any] = {
        "prompt_tokens": usage.prompt_tokens,
        "total_tokens": usage.total_tokens,
        "completion_tokens": usage.completion_tokens,
    }
    if with_details:
        encoded["prompt_tokens_details"] = {"cached_tokens": usage.cached_tokens}
    if usage.reasoning_tokens or counts_reasoning:
        encoded["completion_tokens_details"] = {"reasoning_tokens": usage.reasoning_tokens}
    return encoded


def make_encoder(options: ChatOptions, meta: ResponseMeta) -> StreamEncoder | UnaryEncoder:
    """What the options ask for."""
    return StreamEncoder(options, meta) if options.stream else UnaryEncoder(options, meta)
