"""What a gpt-oss model writes (harmony) -> reasoning, content and tool calls, by the library of the format, oss-harmony.

The format is a row of messages, `<|channel|>analysis<|message|>...<|end|><|start|>assistant<|channel|>final<|message|>...`. Analysis is
reasoning, final and commentary are content, a message to a function is a call of it, as in vLLM's `parser/harmony.py`. The library's
StreamableParser reads the headers and says what is in a message. It reads token ids; text gives the same parts, but where the model spells
out a special token in ordinary ones.

What the library refuses is content here, as it stands: a header that it cannot read, text between messages. A header that the end cuts off
before it has named a function says nothing yet, and is left out.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Any, Final

import msgspec

from . import BrokenToolCall, Content, Part, Reasoning, ToolCall

try:
    import openai_harmony
except ModuleNotFoundError as error:
    if error.name != "openai_harmony":
        raise
    raise ImportError("gaie_codec.text.harmony needs the package oss-harmony: pip install gaie-codec[harmony]", name=error.name) from error

# The ids of o200k_harmony, which every gpt-oss model has.
START: Final = 200006
END: Final = 200007
MESSAGE: Final = 200008
CHANNEL: Final = 200005
RETURN: Final = 200002
CALL: Final = 200012
_IDS: Final = {
    "<|start|>": START,
    "<|end|>": END,
    "<|message|>": MESSAGE,
    "<|channel|>": CHANNEL,
    "<|constrain|>": 200003,
    "<|return|>": RETURN,
    "<|call|>": CALL,
    "<|endoftext|>": 199999,
    "<|startoftext|>": 199998,
}
STOP_TOKEN_IDS: Final = (RETURN, CALL)
"""What ends an answer. No server knows of them by itself: a gateway adds them to the `stop_token_ids` of each request."""

_ENDS: Final = frozenset((END, RETURN, CALL))
_NOTHING: Final = frozenset((199998, 199999))  # around a text, not in it; the library would show them
_STEPS: Final = _ENDS | _NOTHING | {START}  # what may end a message
_FIRST_SPECIAL: Final = 199998
_VOCAB_SIZE: Final = 201_089  # the library's; after an id beyond it, it shows nothing more of a message
_SPECIAL: Final = re.compile("(" + "|".join(map(re.escape, _IDS)) + ")")
_LONGEST_SPECIAL: Final = max(map(len, _IDS))
_SLICE: Final = 256  # characters; the library's time to encode grows with the square of a word
_CHANNELS: Final = ("analysis", "commentary", "final")
_CUT_HEADER: Final = re.compile(r"(?:<\|start\|>(\w*))?( [\w=.]*)?(?:<\|channel\|>(\w*))?( [\w=.]*)?(?:<\|constrain\|>\w*)?")
# Recipients that are no function: vLLM's built-in tools, which only its Responses API has, and roles.
_BUILTIN_TOOLS: Final = ("browser", "container", "python")
_ROLES: Final = ("assistant", "user", "system", "developer", "tool")


@functools.cache
def harmony_encoding() -> Any:
    """The library's HarmonyEncoding. Loading it takes 0.2 s, once in a process; the vocabulary is in the package."""
    return openai_harmony.load_harmony_encoding("HarmonyGptOss")


class HarmonyParser:
    """The OutputParser of gpt-oss. It wants all ids or all text of a choice, from the first after the prompt, special tokens too.

    A call is broken whose arguments are not JSON, unless the model ended it and named another type for them. Without `parallel` only the
    first call is told.
    """

    takes_ids: Final = True
    """There is `feed_ids`, and it is more exact than `feed`."""

    def __init__(self, *, parallel: bool = True) -> None:
        self.reasoning_tokens = 0
        """Of the ids fed so far, those that vLLM counts: of analysis, and of commentary that is for somebody."""
        self._encoding = harmony_encoding()
        self._inner: Any = None  # made with the first token, which may be that of a header the prompt has not begun
        self._held = ""  # of fed text: maybe the beginning of a special token
        self._header: list[int] | None = []  # None between messages
        self._message: _Message | None = None  # that content belongs to
        self._calls = 0
        self._parallel = parallel
        self._texts: list[str] = []  # of the message, not yet in a part
        self._parts: list[Part] = []

    def feed_ids(self, token_ids: Sequence[int]) -> list[Part]:
        """Like `feed`, for token ids. Those outside the vocabulary add nothing."""
        if self._held:
            self._feed_piece(self._held)
            self._held = ""
        for token_id in token_ids:
            message = self._message
            if message is None or token_id in _STEPS:
                self._step(token_id)
            elif 0 <= token_id < _VOCAB_SIZE:
                self._gain(message, token_id)
        return self._take()

    def feed(self, text: str) -> list[Part]:
        """What more text makes certain, in order."""
        *pieces, last = _SPECIAL.split(self._held + text)
        place = last.rfind("<", -_LONGEST_SPECIAL)
        if place < 0 or not any(special.startswith(last[place:]) for special in _IDS):
            place = len(last)
        self._held = last[place:]
        for piece in pieces:
            self._feed_piece(piece)
        self._feed_piece(last[:place])
        return self._take()

    def finish(self) -> list[Part]:
        """What was held back, after the last text or ids."""
        self._feed_piece(self._held)
        self._held = ""
        if self._message is not None:
            self._end_message(self._message, is_ended=False)
        elif self._header is not None:
            self._tell_cut_header(self._header)
        return self._take()

    def _feed_piece(self, piece: str) -> None:
        """Text that has no special token in it, or is one. In a message, text is what the library would make of its tokens."""
        message = self._message
        token_id = _IDS.get(piece)
        if token_id is not None and (message is None or token_id in _STEPS):
            self._step(token_id)
        elif piece and message is None and self._header is not None:
            for place in range(0, len(piece), _SLICE):
                for token_id in self._encoding.encode(piece[place : place + _SLICE], disallowed_special=()):
                    self._gain_header(self._header, token_id)
        elif piece:
            self._show(message or self._begin_stray(), piece)

    def _step(self, token_id: int) -> None:
        """A token outside of messages, or one that may end its message."""
        if token_id in _NOTHING or not 0 <= token_id < _VOCAB_SIZE:
            return
        message = self._message
        if message is not None:
            if token_id == START and not message.is_stray:
                self._gain(message, token_id)  # a header in the middle of a message is text of it
                return
            self._end_message(message, is_ended=True)
        if token_id in _ENDS:
            if self._header is not None:
                self._break_header(self._header)
        elif self._header is not None:
            self._gain_header(self._header, token_id)
        elif token_id == START:
            self._inner.process(START)
            self._header = [START]
        elif token_id in (CHANNEL, MESSAGE):  # the model forgot to start it
            self._gain_header(self._begin_header(), token_id)
        else:
            self._gain(self._begin_stray(), token_id)

    def _gain(self, message: _Message, token_id: int) -> None:
        """A token in a message."""
        self._inner.process(token_id)
        message.is_read = True
        text = self._inner.last_content_delta
        if text:
            message.given += len(text)
            self._show(message, text)
        if message.is_counted and token_id < _FIRST_SPECIAL:
            self.reasoning_tokens += 1

    def _gain_header(self, header: list[int], token_id: int) -> None:
        if self._inner is None:
            self._inner = self._make_inner(token_id)
        header.append(token_id)
        try:
            self._inner.process(token_id)
        except openai_harmony.HarmonyError:  # at its end; the library expects a start again
            self._tell(Content(self._encoding.decode(header)))
            self._begin_stray().spaces = None
        else:
            if token_id == MESSAGE:
                self._header = None
                self._message = self._begin_message(self._encoding.decode(header))

    def _make_inner(self, first_id: int) -> Any:
        """The library's parser: in the header that a prompt for an answer begins, unless the answer begins it."""
        role = None if first_id == START else openai_harmony.Role.ASSISTANT
        return openai_harmony.StreamableParser(self._encoding, role)

    def _break_header(self, header: list[int]) -> None:
        """An end where a message has not begun."""
        self._tell_cut_header(header)
        if self._inner is None:
            self._inner = self._make_inner(END)
        try:
            self._inner.process(MESSAGE)
            self._inner.process(END)
        except openai_harmony.HarmonyError:
            pass
        self._header = None

    def _tell_cut_header(self, header: list[int]) -> None:
        text = self._encoding.decode(header).removesuffix("\N{REPLACEMENT CHARACTER}")
        cut = _CUT_HEADER.fullmatch(text)
        if cut is None or not (
            "assistant".startswith(cut[1] or "")
            and any(name.startswith(cut[3] or "") for name in _CHANNELS)
            and all(" to=functions.".startswith(recipient or "") for recipient in cut.group(2, 4))
        ):
            self._tell(Content(text))

    def _begin_header(self) -> list[int]:
        """One of ours, which the model does not see."""
        for token_id in (START, *self._encoding.encode("assistant", disallowed_special=())):
            self._inner.process(token_id)
        self._header = []
        return self._header

    def _begin_stray(self) -> _Message:
        """A message of ours, around text that is in none."""
        self._begin_header()
        self._inner.process(MESSAGE)
        self._header = None
        self._message = _Message(kind=Content, is_stray=True, spaces=[])
        return self._message

    def _begin_message(self, header: str) -> _Message:
        inner = self._inner
        channel, recipient = inner.current_channel, inner.current_recipient
        if recipient is not None:  # the library takes a type without a recipient before it for one
            recipient = recipient.partition("<|constrain|>")[0].rstrip() if f"to={recipient}" in header else None
        message = _Message(
            kind=Reasoning if channel == "analysis" else Content,
            header=header.removeprefix("<|start|>assistant"),
            is_json="json" in (inner.current_content_type or "json"),
            is_counted=channel == "analysis" or (channel == "commentary" and recipient is not None),
        )
        if inner.current_role != openai_harmony.Role.ASSISTANT:
            message.kind = None
        elif recipient:
            name = recipient.removeprefix("functions.")
            known = recipient.partition(".")[0]
            if name != recipient or (channel != "final" and known not in (*_BUILTIN_TOOLS, *_ROLES)):
                if self._calls and not self._parallel:
                    message.kind = None
                    return message
                message.kind, message.call = ToolCall, self._calls
                self._calls += 1
                self._tell(ToolCall(message.call, name))
            elif known in _BUILTIN_TOOLS:
                message.kind = Reasoning
        return message

    def _end_message(self, message: _Message, *, is_ended: bool) -> None:
        inner = self._inner
        last = inner.last_content_delta
        inner.process(END)
        if message.is_read and (last is None or "\N{REPLACEMENT CHARACTER}" in last):
            # After bytes that are no UTF-8 the library is one token late. A character that is still incomplete is nothing.
            rest = inner.messages[-1].content[0].text[message.given :].removesuffix("\N{REPLACEMENT CHARACTER}")
            if rest:
                self._show(message, rest)
        self._flush(message)
        if message.kind is ToolCall:
            arguments = "".join(message.arguments)
            if not _is_json(arguments) and (message.is_json or not is_ended):
                self._parts.append(BrokenToolCall(message.call, message.header + arguments))
        self._message = None

    def _show(self, message: _Message, text: str) -> None:
        if message.spaces is not None:  # stray ones are nothing, if nothing follows
            message.spaces.append(text)
            if text.isspace():
                return
            text, message.spaces = "".join(message.spaces), None
        self._texts.append(text)

    def _flush(self, message: _Message) -> None:
        if self._texts:
            text = "".join(self._texts)
            self._texts.clear()
            if message.kind is ToolCall:
                message.arguments.append(text)
                self._tell(ToolCall(message.call, arguments=text))
            elif message.kind is not None:
                self._tell(Reasoning(text) if message.kind is Reasoning else Content(text))

    def _tell(self, part: Content | Reasoning | ToolCall) -> None:
        last = self._parts[-1] if self._parts else None
        if isinstance(part, ToolCall):
            if isinstance(last, ToolCall) and last.index == part.index:
                part = ToolCall(part.index, last.name, last.arguments + part.arguments)
                self._parts.pop()
        elif isinstance(last, Content | Reasoning) and type(last) is type(part):
            part = type(part)(last.text + part.text)
            self._parts.pop()
        self._parts.append(part)

    def _take(self) -> list[Part]:
        if self._message is not None:
            self._flush(self._message)
        parts, self._parts = self._parts, []
        return parts


class _Message(msgspec.Struct):
    """The message that content belongs to. One without a kind is shown to nobody: it is of another role, or one call too many."""

    kind: type[Content] | type[Reasoning] | type[ToolCall] | None
    header: str = ""
    call: int = 0
    arguments: list[str] = []
    is_json: bool = True
    is_counted: bool = False
    is_read: bool = False  # by the library, token by token
    given: int = 0  # characters that the library gave
    is_stray: bool = False
    spaces: list[str] | None = None  # of stray text, until something follows


def _is_json(text: str) -> bool:
    try:
        msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError):
        return False
    return True
