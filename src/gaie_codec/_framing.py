"""gRPC length-prefixed messages: bytes in any partition <-> payloads.

A frame is one flag byte (0 plain, 1 compressed), four bytes of big-endian length, then the payload. The decoder keeps one buffer and
one offset; a length is held against the limit before anything of that frame is buffered, and inflating stops at the same limit.
Spec: the gRPC project's PROTOCOL-HTTP2.md, section "Length-Prefixed-Message".
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from typing import Final

from ._errors import FramingError, MalformedMessageError, TruncatedResponseError, UsageError

HEADER_BYTES: Final = 5
# A unary answer with top_logprobs passes gRPC's default of 4 MiB easily, and servers send without a limit.
DEFAULT_MAX_MESSAGE_BYTES: Final = 256 * 1024 * 1024
ENCODINGS: Final = ("identity", "deflate", "gzip")

_HEADER: Final = struct.Struct(">BI")
_unpack = _HEADER.unpack_from
# zlib's wbits: 15 is the zlib format that gRPC calls deflate (not raw deflate); 16 more expects the gzip wrapper.
_WBITS: Final = {"deflate": zlib.MAX_WBITS, "gzip": 16 + zlib.MAX_WBITS}


def encode_frame(payload: bytes, *, encoding: str = "identity") -> bytes:
    """One frame. `encoding` "gzip" or "deflate" compresses the payload and sets the flag."""
    if encoding == "identity":
        return _HEADER.pack(0, len(payload)) + payload
    if encoding not in _WBITS:
        raise UsageError(f"unknown grpc-encoding {encoding!r}; known: {', '.join(ENCODINGS)}")
    compressor = zlib.compressobj(wbits=_WBITS[encoding])
    compressed = compressor.compress(payload) + compressor.flush()
    return _HEADER.pack(1, len(compressed)) + compressed


class FrameDecoder:
    """Bytes, cut anywhere, to payloads.

    `encoding` is the `grpc-encoding` of the headers; set it before the first compressed frame. Memory stays within one frame of at
    most `max_message_bytes`, compressed or not, plus the bytes of one `receive_data` call.
    """

    __slots__ = ("_buffer", "_consumed", "_wanted", "count", "encoding", "max_message_bytes")

    def __init__(self, *, max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES, encoding: str = "identity") -> None:
        self.max_message_bytes = max_message_bytes
        self.encoding = encoding
        self.count = 0
        """Frames that were decoded."""
        self._buffer = bytearray()
        self._consumed = 0  # offset in the stream of the first byte that is not yet decoded
        self._wanted = HEADER_BYTES  # how long the buffer must get before there is anything to do

    def receive_whole(self, data: bytes) -> bytes | None:
        """The payload, when `data` is one whole plain frame and no other is begun; else None, and `data` is for `receive_data`.

        Most calls are of this kind, and it takes a third of the time.
        """
        if self._buffer or len(data) < HEADER_BYTES:
            return None
        flag, length = _unpack(data, 0)
        if flag or length != len(data) - HEADER_BYTES or length > self.max_message_bytes:
            return None
        self._consumed += HEADER_BYTES + length
        self.count += 1
        return data[HEADER_BYTES:]

    def receive_data(self, data: bytes) -> Iterator[bytes]:
        """Yield the payload of each frame that is complete. Frames before a bad one are yielded before it raises.

        Iterate to the end before the next call. Raises FramingError (flag, length), MalformedMessageError (compression).
        """
        if self._buffer:
            self._buffer += data
            if len(self._buffer) < self._wanted:
                return
            data = bytes(self._buffer)
            self._buffer.clear()
        offset, size, wanted = 0, len(data), HEADER_BYTES
        while size - offset >= HEADER_BYTES:
            flag, length = _unpack(data, offset)
            if flag > 1:
                raise FramingError(f"frame at offset {self._consumed}: flag is {flag}, not 0 or 1")
            if length > self.max_message_bytes:
                raise FramingError(
                    f"frame at offset {self._consumed}: message of {length} bytes is over the limit of {self.max_message_bytes}"
                )
            end = offset + HEADER_BYTES + length
            if end > size:
                wanted = HEADER_BYTES + length
                break
            payload = data[offset + HEADER_BYTES : end]
            if flag:
                payload = self._inflate(payload)
            offset = end
            self._consumed += HEADER_BYTES + length
            self.count += 1
            yield payload
        self._wanted = wanted
        if offset < size:
            self._buffer += data[offset:]

    def receive_eof(self) -> None:
        """Raise TruncatedResponseError when the stream ended inside a frame."""
        if self._buffer:
            raise TruncatedResponseError(
                f"frame at offset {self._consumed}: the stream ended after {len(self._buffer)} of "
                f"{'at least ' if len(self._buffer) < HEADER_BYTES else ''}{self._wanted} bytes"
            )

    def _inflate(self, payload: bytes) -> bytes:
        where = f"frame at offset {self._consumed}"
        wbits = _WBITS.get(self.encoding)
        if wbits is None:
            raise MalformedMessageError(f"{where}: compressed, but grpc-encoding is {self.encoding[:40]!r}")
        inflater = zlib.decompressobj(wbits=wbits)
        try:
            plain = inflater.decompress(payload, self.max_message_bytes + 1)
        except zlib.error:
            raise MalformedMessageError(f"{where}: not valid {self.encoding}") from None
        if len(plain) > self.max_message_bytes:
            raise FramingError(f"{where}: inflates to more than the limit of {self.max_message_bytes} bytes")
        if not inflater.eof or inflater.unused_data:
            fault = "followed by stray bytes" if inflater.eof else "cut short"
            raise MalformedMessageError(f"{where}: {self.encoding} data is {fault}")
        return plain
