"""A chat -> the prompt of a gpt-oss model, as token ids, rendered by oss-harmony as in vLLM.

The system message has the date, the reasoning effort and the channels; a developer message has the instructions (the client's first system
message) and the tools; then comes the history. Past calls have the header that vLLM writes, `assistant to=functions.NAME`, which is that
of the models' own chat template and not the library's. What messages say is never more than text: special tokens spelled out there stay
ordinary tokens, which is why this gives ids and the chat template, which gives text, does not do.

The library's time to encode grows with the square of a word; where that is felt, the model's own tokenizer encodes.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from openai_harmony import (
    Author,
    DeveloperContent,
    Message,
    ReasoningEffort,
    RenderOptions,
    Role,
    SystemContent,
    TextContent,
    ToolDescription,
)

from .._errors import MalformedRequestError, UsageError
from . import NO_TEMPLATE_KWARGS, Detokenizer, Tokenizer
from .harmony import CALL, CHANNEL, END, MESSAGE, START, STOP_TOKEN_IDS, harmony_encoding

_EFFORTS: Final = {"high": ReasoningEffort.HIGH, "medium": ReasoningEffort.MEDIUM, "low": ReasoningEffort.LOW}
_SHORT: Final = 1024  # characters
_RUNS: Final = re.compile(r"\S+|\s+")
# Squared bytes of a run that the library encodes as fast as a tokenizer a byte, and what is not worth the trouble, 0.1 s.
_SQUARES_PER_BYTE: Final = 2500
_FEW_SQUARES: Final = 250_000_000
_SPECIAL: Final = re.compile(r"(<\|[a-z0-9_]+\|>)")


class HarmonyTokenizer:
    """A `Tokenizer` of a gpt-oss model that renders chats with oss-harmony. What it does not do is done by `tokenizer`, the model's own.

    `strftime_now` is the clock that tells the date; without it the prompt has none. Raises UsageError for a tokenizer of another
    vocabulary.
    """

    accepts_content_parts: Final = True
    chat_template: Final = "<|channel|>analysis<|message|>"
    """Not of use as a template; it shows what the answers look like."""

    def __init__(self, tokenizer: Tokenizer, *, strftime_now: Callable[[str], str] | None = None) -> None:
        self._encoding = harmony_encoding()
        self._tokenizer = tokenizer
        self._strftime_now = strftime_now
        sample = "<|start|>assistant<|channel|>final<|message|>It's 2024: ça va?<|end|><|call|><|return|>"
        if tokenizer.encode(sample, add_special_tokens=False) != self._encoding.encode(sample, allowed_special="all"):
            raise UsageError("the tokenizer is not that of a gpt-oss model, which harmony is for")
        self.vocab_size = tokenizer.vocab_size
        self.eos_token_ids = tokenizer.eos_token_ids.union(STOP_TOKEN_IDS)

    def __getattr__(self, name: str) -> Any:
        """What tokenizers may have besides."""
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._tokenizer, name)

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens)

    def detokenizer(
        self, prompt_token_ids: Sequence[int], *, skip_special_tokens: bool = True, spaces_between_special_tokens: bool = True
    ) -> Detokenizer:
        return self._tokenizer.detokenizer(
            prompt_token_ids, skip_special_tokens=skip_special_tokens, spaces_between_special_tokens=spaces_between_special_tokens
        )

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: Mapping[str, Any] = NO_TEMPLATE_KWARGS,
    ) -> str:
        """The text of `encode_chat`, in which special tokens and their spelling look the same."""
        ids = self.encode_chat(
            messages,
            tools=tools,
            documents=documents,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            template_kwargs=template_kwargs,
        )
        return str(self._encoding.decode(ids))

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: Mapping[str, Any] = NO_TEMPLATE_KWARGS,
    ) -> list[int]:
        """The prompt's token ids. Of `template_kwargs` only `reasoning_effort` is read. A call's arguments are best left as their text.

        Raises MalformedRequestError for what harmony has no place for: documents, a message to continue, roles of other kinds.
        """
        if documents:
            raise MalformedRequestError("harmony has no place for documents", param="documents")
        if continue_final_message:
            raise MalformedRequestError("harmony does not continue a message", param="continue_final_message")
        try:
            prompt = _Prompt(self._encoding, self._tokenizer)
            prompt.add_preamble(self._date(), template_kwargs.get("reasoning_effort"), messages, tools)
            prompt.add_history(messages)
        except UnicodeEncodeError:
            raise MalformedRequestError("text with a lone surrogate is not Unicode and cannot be tokenized") from None
        if add_generation_prompt:
            prompt.ids += [START, *self._encoding.encode("assistant", disallowed_special=())]
        return prompt.ids

    def _date(self) -> str | None:
        return self._strftime_now("%Y-%m-%d") if self._strftime_now is not None else None


class _Prompt:
    """A prompt that grows, message by message."""

    def __init__(self, encoding: Any, tokenizer: Tokenizer) -> None:
        self.ids: list[int] = []
        self._encoding = encoding
        self._tokenizer = tokenizer

    def add_preamble(
        self, date: str | None, effort: object, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None
    ) -> None:
        self.ids += _system_message(date, _effort(effort), bool(tools))
        instructions = _text(messages[0]) if messages and _is_system(messages[0]) else None
        if instructions or tools:
            self._add_developer(instructions, tools)

    def add_history(self, messages: Sequence[Mapping[str, Any]]) -> None:
        calls = [call for message in messages for call in message.get("tool_calls") or ()]
        names = {call["id"]: call["function"].get("name") or "" for call in calls if isinstance(call.get("id"), str)}
        # What was thought before the last answer is not shown again.
        answered = max((place for place, message in enumerate(messages) if _is_answer(message)), default=-1)
        for place, message in enumerate(messages):
            role = message["role"]
            if role == "assistant":
                self._add_assistant(message, thinks=place > answered)
            elif role == "tool":
                name = names.get(message.get("tool_call_id"), "")
                self._add_text(self._result_frame(name), [_text(message) or ""])
            elif _is_system(message):
                instructions = _text(message)
                if place and instructions is not None:
                    self._add_developer(instructions, None)
            elif role == "user":
                self._add_text(_frame("user"), _texts(message))
            else:
                raise MalformedRequestError("harmony has no messages of this role", param=f"messages.{place}.role")

    def _add_assistant(self, message: Mapping[str, Any], *, thinks: bool) -> None:
        calls = message.get("tool_calls") or ()
        texts = _texts(message)
        reasoning = message.get("reasoning") if thinks else None
        if calls and any(texts):
            self._add_text(_frame("assistant", "commentary"), ["".join(texts)])
        if reasoning:
            self._add_text(_frame("assistant", "analysis"), [reasoning])
        for call in calls:
            function = call["function"]
            arguments = function.get("arguments") or ""
            if not isinstance(arguments, str):
                arguments = json.dumps(arguments, ensure_ascii=False)
            self._add_text(self._call_frame(function.get("name") or ""), [arguments], CALL)
        if not calls and texts and texts[0]:
            self._add_text(_frame("assistant", "final"), texts)

    def _add_developer(self, instructions: str | None, tools: Sequence[Mapping[str, Any]] | None) -> None:
        try:
            content = DeveloperContent(instructions=instructions)
            if tools:
                content = content.with_function_tools([_description(tool["function"]) for tool in tools])
            message = Message.from_role_and_content(Role.DEVELOPER, content)
            if not _is_quick(message.to_json(), _FEW_SQUARES):
                raise MalformedRequestError("the instructions or tools have words that are too long to be tokenized", param="messages")
            self.ids += self._encoding.render(message)
        except (MalformedRequestError, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # lone surrogates, schemas that are none; or a panic, which is no Exception
            raise MalformedRequestError("the instructions or tools cannot be rendered for the model", param="messages") from error

    def _add_text(self, frame: tuple[int, ...], texts: Sequence[str], end: int = END) -> None:
        self.ids += frame
        for text in texts:
            self.ids += self._encode(text)
        self.ids.append(end)

    def _call_frame(self, name: str) -> tuple[int, ...]:
        return (START, *self._encode(f"assistant to=functions.{name}"), CHANNEL, *self._encode("commentary json"), MESSAGE)

    def _result_frame(self, name: str) -> tuple[int, ...]:
        """What the library puts before the result of a call, but for a name that it would take long to encode."""
        return (START, *self._encode(f"functions.{name}"), CHANNEL, *self._encode("commentary to=assistant"), MESSAGE)

    def _encode(self, text: str) -> list[int]:
        """Ordinary tokens, whatever the text spells out."""
        text.encode()  # the library would replace lone surrogates
        if _is_quick(text, 0):
            return list(self._encoding.encode(text, disallowed_special=()))
        ids: list[int] = []
        for piece in _SPECIAL.split(text):
            if _SPECIAL.fullmatch(piece):
                ids += self._encoding.encode(piece, disallowed_special=())
            elif piece:
                ids += self._tokenizer.encode(piece, add_special_tokens=False)
        return ids


@functools.lru_cache(maxsize=64)
def _system_message(date: str | None, effort: ReasoningEffort, has_tools: bool) -> tuple[int, ...]:
    content = SystemContent(conversation_start_date=date, reasoning_effort=effort)
    options = RenderOptions(conversation_has_function_tools=has_tools)
    return tuple(harmony_encoding().render(Message.from_role_and_content(Role.SYSTEM, content), options))


@functools.lru_cache(maxsize=16)
def _frame(role: str, channel: str | None = None) -> tuple[int, ...]:
    """What the library puts before the text of such a message."""
    message = Message(author=Author(role=Role(role)), content=[TextContent(text="")], channel=channel)
    return tuple(harmony_encoding().render(message)[:-1])


def _is_quick(text: str, few_squares: int) -> bool:
    """Will the library encode it in time that grows with its length?"""
    if len(text) <= _SHORT:
        return True
    runs = [len(run.encode()) for run in _RUNS.findall(text)]
    return sum(size * size for size in runs) <= max(few_squares, _SQUARES_PER_BYTE * sum(runs))


def _effort(effort: object) -> ReasoningEffort:
    if effort is None:
        return ReasoningEffort.MEDIUM
    if effort == "none":
        raise MalformedRequestError("Harmony does not support reasoning_effort='none'", param="reasoning_effort")
    if not isinstance(effort, str) or effort not in _EFFORTS:
        raise MalformedRequestError(
            f"reasoning_effort={str(effort)[:20]!r} is not supported by Harmony. Supported values are: {', '.join(_EFFORTS)}.",
            param="reasoning_effort",
        )
    return _EFFORTS[effort]


def _description(function: Mapping[str, Any]) -> ToolDescription:
    return ToolDescription(name=function["name"], description=function.get("description") or "", parameters=function.get("parameters"))


def _is_system(message: Mapping[str, Any]) -> bool:
    return message["role"] in ("system", "developer")


def _is_answer(message: Mapping[str, Any]) -> bool:
    return message["role"] == "assistant" and not message.get("tool_calls") and any(_texts(message)[:1])


def _text(message: Mapping[str, Any]) -> str | None:
    texts = _texts(message)
    return "".join(texts) if texts else None


def _texts(message: Mapping[str, Any]) -> list[str]:
    content = message.get("content")
    if content is None:
        return []
    if isinstance(content, str):
        return [content]
    if any(not isinstance(part.get("text"), str) for part in content):
        raise MalformedRequestError("gpt-oss models read text only", param="messages")
    return [part["text"] for part in content]
