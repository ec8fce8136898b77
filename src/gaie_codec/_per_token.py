"""The per-token path: a message in mid-stream that brings nothing but tokens -> the chunk with their text, in as few steps as there are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeAlias

from google.protobuf.message import DecodeError

from ._choices import Delta
from .text import Content, Reasoning, ToolCall

if TYPE_CHECKING:
    from ._choices import Choice
    from ._parts import PartsStage
    from ._reader import CallReader
    from ._text_choice import TextChoice
    from .openai.endpoint import ResponseEncoder

Plain: TypeAlias = Callable[[bytes], bytes | None]
"""The per-token path: what to send for a message in mid-stream that brings nothing but tokens whose text the client gets. Else None."""


Receive: TypeAlias = Callable[[Sequence[int]], str | None]


def plain_nothing(_: bytes) -> None:
    """For an answer in which every message says more."""
    return


def plain_tokens(
    reader: CallReader, choices: Sequence[Choice], encode: Callable[[int, str], bytes], first_index: int, stages: Sequence[PartsStage]
) -> Plain:
    """For a server that sends ids. Locals of a closure are what costs least, per token."""
    parse, decode = reader.parse, reader.adapter.decode_tokens
    is_cumulative = reader.adapter.convention.is_cumulative
    receive: list[Receive] = [choice.receive_plain_total if is_cumulative else choice.receive_plain for choice in choices]
    if stages:
        receive = [_counted(choice, one, stage) for choice, one, stage in zip(choices, receive, stages, strict=True)]
    count = len(receive)
    assert decode is not None

    def plain(payload: bytes) -> bytes | None:
        try:
            index, token_ids = decode(parse(payload))
        except DecodeError:
            return None
        if not token_ids or index >= count:
            return None
        text = receive[index](token_ids)
        if text:
            return encode(first_index + index, text)
        return None if text is None else b""

    return plain


def _counted(choice: Choice, receive: Receive, stage: PartsStage) -> Receive:
    """`receive` of a choice whose reasoning tokens are counted."""

    def counted(token_ids: Sequence[int]) -> str | None:
        before = choice.completion_tokens
        text = receive(token_ids)
        if text is not None:
            stage.count(token_ids[len(token_ids) - (choice.completion_tokens - before) :])
        return text

    return counted


def parsed(stages: Sequence[PartsStage], encoder: ResponseEncoder) -> Callable[[int, str], bytes]:
    """What encodes the text of choices that are parsed, by their places in the answer."""
    encode_text, encode_reasoning, encode_delta = encoder.text, encoder.reasoning, encoder.delta

    def encode(index: int, text: str) -> bytes:
        stage = stages[index]
        parts = stage.feed(text)
        if len(parts) == 1:
            part = parts[0]
            if isinstance(part, Content):
                return encode_text(index, part.text)
            if isinstance(part, Reasoning):
                return encode_reasoning(index, part.text)
            if isinstance(part, ToolCall):
                return encode_delta(Delta(index, "", tool_calls=(part,)), None)
        return b"".join([encode_delta(delta, None) for delta in stage.delta(parts)]) if parts else b""

    return encode


def plain_text(
    reader: CallReader, choices: Sequence[TextChoice], encode: Callable[[int, str], bytes], first_index: int, stages: Sequence[PartsStage]
) -> Plain:
    """For a server that sends pieces of text."""
    parse, decode = reader.parse, reader.adapter.decode_text
    receive = [choice.receive_plain for choice in choices]
    count = len(receive)
    assert decode is not None

    def plain(payload: bytes) -> bytes | None:
        try:
            piece = decode(parse(payload))
        except DecodeError:
            return None
        if piece is None or piece[0] >= count:
            return None
        if stages:
            stages[piece[0]].counts_text = True  # from here on: this path sees no ids
        text = receive[piece[0]](piece[1], piece[2])
        if text:
            return encode(first_index + piece[0], text)
        return None if text is None else b""

    return plain
