"""Deltas -> a text completion: what of `chat_response` is different for it."""

from __future__ import annotations

from typing import Any

from .._choices import Delta
from .._events import Usage
from . import chat_response
from .completions import CompletionOptions
from .endpoint import ResponseMeta
from .logprobs import Columns, encode_prompt_logprobs


class StreamEncoder(chat_response.StreamEncoder):
    """Server-sent events, without role chunks. The first chunk of a choice has its prompt: the text where it is to be echoed, and the ids
    then too, or where they were asked for."""

    object_name = "text_completion"
    before_text = b'"text":'
    after_text = b""
    _options: CompletionOptions

    def opening(self, indexes: range, prompt_token_ids: list[list[int]], usage: Usage) -> bytes:
        options = self._options
        per_prompt = len(indexes) // len(prompt_token_ids)
        shows_prompt = options.return_token_ids or options.echoes
        self._prompts = {index: index // per_prompt for index in indexes} if shows_prompt else {}
        self._prompt_token_ids = prompt_token_ids
        self._columns = {index: Columns(options.top_logprobs, shows_ids=self.shows_ids) for index in indexes}
        return b""

    def delta(self, delta: Delta, usage: Usage | None) -> bytes:
        options = self._options
        is_last = delta.finish_reason is not None
        if not (is_last or options.is_detailed):
            return self.text(delta.index, delta.text) if delta.text else b""
        number = self._prompts.pop(delta.index, None)
        text, logprobs = ("", ()) if options.hides_output else (delta.text, delta.logprobs)
        if number is None and not (is_last or text or logprobs or (delta.token_ids and options.return_token_ids)):
            return b""
        choice: dict[str, Any] = {"index": delta.index, "text": text, "logprobs": None, "finish_reason": delta.finish_reason}
        prompt = delta.prompt if number is not None and options.echoes else ()
        if number is not None:
            choice["text"] = options.echo_of(number) + text
            choice["prompt_token_ids"] = self._prompt_token_ids[number]
        if options.logprobs:
            choice["logprobs"] = self._columns[delta.index].encode(prompt, logprobs)
        if is_last:
            choice["stop_reason"] = delta.stop_reason
        if options.return_token_ids:
            choice["token_ids"] = delta.token_ids
        return self._choice_chunk(choice, delta, usage)


class UnaryEncoder(chat_response.UnaryEncoder):
    """One JSON body."""

    object_name = "text_completion"
    _options: CompletionOptions

    def prompt_part(self, prompts: list[list[int]]) -> dict[str, Any]:
        return {}

    def _choice(self, index: int) -> dict[str, Any]:
        options, finish = self._options, self._finishes[index]
        number = index * len(self._prompts) // len(self._texts)
        text = "" if options.hides_output else "".join(self._texts[index])
        choice: dict[str, Any] = {
            "index": index,
            "text": options.echo_of(number) + text,
            "logprobs": None,
            "finish_reason": finish.finish_reason,
            "stop_reason": finish.stop_reason,
        }
        if options.logprobs:
            columns = Columns(options.top_logprobs, shows_ids=self.shows_ids)
            entries = [] if options.hides_output else self._logprobs[index]
            choice["logprobs"] = columns.encode(finish.prompt if options.echoes else (), entries)
        if options.prompt_logprobs:
            choice["prompt_logprobs"] = encode_prompt_logprobs(finish.prompt)
        if options.return_token_ids:
            choice["token_ids"] = self._token_ids[index]
            choice["prompt_token_ids"] = self._prompts[number]
        return choice


def make_encoder(options: CompletionOptions, meta: ResponseMeta) -> StreamEncoder | UnaryEncoder:
    """What the options ask for."""
    return StreamEncoder(options, meta) if options.stream else UnaryEncoder(options, meta)
