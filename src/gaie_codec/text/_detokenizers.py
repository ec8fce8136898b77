"""Token ids -> text, one choice at a time, in two ways with the same output.

`ByteLevelDetokenizer` is for the decoder that most current models have: each token is a fixed run of bytes, so text is a table
look-up per token (a tenth of a DecodeStream step) and the cost stays linear whatever the model says. `StreamDetokenizer` is for
every other decoder and leaves the work to tokenizers' DecodeStream, as vLLM does (vllm/v1/engine/detokenizer.py).

Both follow DecodeStream's rule for text: it is held while it ends with U+FFFD, and what is held at the end never comes out.
"""

from __future__ import annotations

import copy
from codecs import utf_8_decode
from collections.abc import Mapping, Sequence
from typing import Final

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

_REPLACEMENT: Final = "\ufffd"
_LONGEST_INCOMPLETE: Final = 3  # bytes, and so tokens, of a character that still lacks its last byte
_SEED_LENGTH: Final = 5  # vLLM's INITIAL_INCREMENTAL_DETOKENIZATION_OFFSET
_INVALID_PREFIX: Final = "Invalid prefix encountered"
# A DecodeStream decodes again, at each step, everything it holds. No character takes this many tokens.
_MAX_HELD_TOKENS: Final = 256


def _byte_of_char() -> dict[str, int]:
    """GPT-2's table: printable Latin-1 stands for itself, the other bytes for the characters from U+0100 on, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + place): byte for place, byte in enumerate(others)}


_BYTE_OF_CHAR: Final = _byte_of_char()


class Pieces(dict[int, str | bytes]):
    """What each id adds, filled as ids are seen: str when that is text by itself, bytes when its neighbours must be known.

    One table serves all detokenizers of a tokenizer that agree on `skip_special_tokens`.
    """

    def __init__(self, tokenizer: Tokenizer, *, vocab_size: int, skipped: frozenset[int]) -> None:
        super().__init__()
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._skipped = skipped

    def __missing__(self, token_id: int) -> str | bytes:
        if not 0 <= token_id < self._vocab_size:
            return ""  # not stored: a server may send any number
        piece = self[token_id] = self._piece(token_id)
        return piece

    def _piece(self, token_id: int) -> str | bytes:
        token = self._tokenizer.id_to_token(token_id)
        if token is None or token_id in self._skipped:
            return ""
        try:
            data = bytes([_BYTE_OF_CHAR[char] for char in token])
        except KeyError:  # an added token with characters outside the table stands for itself
            data = token.encode()
        try:
            text = data.decode()
        except UnicodeDecodeError:
            return data
        return data if text.endswith(_REPLACEMENT) else text


class ByteLevelDetokenizer:
    """A Detokenizer for tokenizers whose decoder is ByteLevel and nothing else."""

    __slots__ = ("_held", "_pending", "_pieces", "_tail")

    def __init__(self, pieces: Pieces, prompt_token_ids: Sequence[int]) -> None:
        self._pieces = pieces
        self._held: list[str] = []  # text that ends with U+FFFD
        self._tail = self._incomplete_end(prompt_token_ids)
        self._pending = bool(self._tail)  # is anything held at all

    def decode(self, token_ids: Sequence[int]) -> str:
        if not self._pending and len(token_ids) == 1:
            piece = self._pieces[token_ids[0]]
            if piece.__class__ is str:  # half the time of isinstance
                return piece
        return "".join([self._advance(self._pieces[token_id]) for token_id in token_ids])

    def peek(self, token_id: int) -> str:
        piece = self._pieces[token_id]
        if isinstance(piece, str):
            if not self._pending or not piece:
                return piece
            piece = piece.encode()
        text, tail = self._join(piece)
        return "" if tail or text.endswith(_REPLACEMENT) else "".join(self._held) + text

    def _advance(self, piece: str | bytes) -> str:
        if isinstance(piece, str):
            if not self._pending or not piece:
                return piece
            piece = piece.encode()
        text, self._tail = self._join(piece)
        self._pending = bool(self._tail) or text.endswith(_REPLACEMENT)
        if self._pending:
            self._held.append(text)
            return ""
        if self._held:
            text = "".join(self._held) + text
            self._held.clear()
        return text

    def _join(self, piece: bytes) -> tuple[str, bytes]:
        """Text of the held bytes and these, and the bytes at the end that may still become a character."""
        data = self._tail + piece
        text, used = utf_8_decode(data, "replace", False)
        return text, data[used:]

    def _incomplete_end(self, prompt_token_ids: Sequence[int]) -> bytes:
        """Bytes of a character that the prompt begins and the output is to finish."""
        data = b""
        for token_id in reversed(prompt_token_ids[-2 * _LONGEST_INCOMPLETE :]):
            piece = self._pieces[token_id]
            if isinstance(piece, bytes):
                data = piece + data
            elif piece:  # complete; skipped tokens may stand between
                break
        return data[utf_8_decode(data, "replace", False)[1] :]


class StreamDetokenizer:
    """A Detokenizer for any decoder, around DecodeStream.

    The stream is seeded with the end of the prompt only: all of it would change nothing but cost 10 ms at 20,000 ids. `raw_tokens`
    are the added tokens by id when `spaces_between_special_tokens` is off: one that follows another comes out as it is.
    """

    __slots__ = (
        "_after_raw",
        "_held_tokens",
        "_raw_tokens",
        "_skip_special_tokens",
        "_skipped",
        "_stream",
        "_tokenizer",
        "_vocab_size",
    )

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_token_ids: Sequence[int],
        *,
        vocab_size: int,
        skip_special_tokens: bool,
        skipped: frozenset[int],
        raw_tokens: Mapping[int, str],
    ) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._skip_special_tokens = skip_special_tokens
        self._skipped = skipped
        self._raw_tokens = raw_tokens
        self._after_raw = False
        self._held_tokens = 0
        context, begun = self._seed(prompt_token_ids)
        self._stream = DecodeStream(context, skip_special_tokens)
        for token_id in begun:
            self._stream.step(tokenizer, token_id)

    def decode(self, token_ids: Sequence[int]) -> str:
        return "".join([self._decode_one(token_id) for token_id in token_ids])

    def peek(self, token_id: int) -> str:
        state = self._stream, self._held_tokens, self._after_raw
        self._stream = copy.copy(self._stream)
        try:
            return self._decode_one(token_id)
        finally:
            self._stream, self._held_tokens, self._after_raw = state

    def _decode_one(self, token_id: int) -> str:
        # Neither adds text, and the stream would decode them again and again until the next text comes.
        if not 0 <= token_id < self._vocab_size or token_id in self._skipped:
            return ""
        text = self._step(token_id)
        if self._raw_tokens:
            raw = self._raw_tokens.get(token_id)
            if raw is not None and self._after_raw:
                text = raw
            self._after_raw = raw is not None
        return text

    def _step(self, token_id: int) -> str:
        if self._held_tokens >= _MAX_HELD_TOKENS:
            self._restart()
        try:
            text = self._stream.step(self._tokenizer, token_id)
        except Exception as error:  # tokenizers raises nothing narrower
            if not str(error).startswith(_INVALID_PREFIX):
                raise
            # Some decoders turn earlier text into other text when an invalid byte comes (vLLM issue 17448).
            self._restart()
            text = self._stream.step(self._tokenizer, token_id)
        if text is None:
            self._held_tokens += 1
            return ""
        self._held_tokens = 0
        return text

    def _restart(self) -> None:
        self._stream = DecodeStream([], self._skip_special_tokens)
        self._held_tokens = 0

    def _seed(self, prompt_token_ids: Sequence[int]) -> tuple[list[int], list[int]]:
        """The end of the prompt that has text, and after it the tokens of a character that the output is to finish.

        They are apart because a DecodeStream seeded with an incomplete character returns the whole seed as new text. Without any
        text before it the decoder would take the first token for the beginning of a text and strip its space.
        """
        size = _SEED_LENGTH
        while True:
            ids = [token_id for token_id in prompt_token_ids[-size:] if 0 <= token_id < self._vocab_size]
            for end in range(len(ids), max(0, len(ids) - _LONGEST_INCOMPLETE - 1), -1):
                text = self._tokenizer.decode(ids[:end], skip_special_tokens=self._skip_special_tokens)
                if text and not text.endswith(_REPLACEMENT):
                    return ids[:end], ids[end:]
            if size >= len(prompt_token_ids):
                return [], []
            size *= 2
