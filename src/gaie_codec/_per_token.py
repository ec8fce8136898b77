"""The per-token path: a message in mid-stream that brings nothing but tokens -> the chunk with their text, in as few steps as there are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeAlias

from google.protobuf.message import DecodeError

if TYPE_CHECKING:
    from ._choices import Choice
    from ._reader import CallReader
    from ._text_choice import TextChoice

Plain: TypeAlias = Callable[[bytes], bytes | None]
"""The per-token path: what to send for a message in mid-stream that brings nothing but tokens whose text the client gets. Else None."""


def plain_nothing(_: bytes) -> None:
    """For an answer in which every message says more."""
    return


def plain_tokens(reader: CallReader, choices: Sequence[Choice], encode: Callable[[int, str], bytes], first_index: int) -> Plain:
    """For a server that sends ids. Locals of a closure are what costs least, per token."""
    parse, decode = reader.parse, reader.adapter.decode_tokens
    is_cumulative = reader.adapter.convention.is_cumulative
    receive = [choice.receive_plain_total if is_cumulative else choice.receive_plain for choice in choices]
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


def plain_text(reader: CallReader, choices: Sequence[TextChoice], encode: Callable[[int, str], bytes], first_index: int) -> Plain:
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
        text = receive[piece[0]](piece[1], piece[2])
        if text:
            return encode(first_index + piece[0], text)
        return None if text is None else b""

    return plain
