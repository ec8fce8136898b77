"""The model server's GetTokenizer stream -> the files in it.

The stream is one ZIP in chunks, with the SHA-256 of all of it on the last. It comes from another process, so nothing in it is
believed: each rule below has its own sentence in the MalformedMessageError. Source: `common.proto` GetTokenizerChunk and the
servicer's bundle of flat, deflated files; the caps are those of the SMG gateway.
"""

from __future__ import annotations

import hashlib
import io
import stat
import zipfile
import zlib
from typing import Final

from .._errors import MalformedMessageError

MEBIBYTE: Final = 1024 * 1024
_END_RECORD: Final = b"PK\x05\x06"
_END_RECORD_BYTES: Final = 22
_ZIP64_LOCATOR: Final = b"PK\x06\x07"
_ZIP64_LOCATOR_BYTES: Final = 20
_ENCRYPTED: Final = 0x1
# Directory bytes to allow for one entry: 46, a name, some extra fields. zipfile reads the whole directory before it can be counted.
_DIRECTORY_BYTES_PER_ENTRY: Final = 1024
_READ_BYTES: Final = 64 * 1024


class TokenizerArchive:
    """Collects the chunks, then checks and unpacks them. Caps in bytes: of the stream, and of all files unpacked."""

    def __init__(self, *, max_stream_bytes: int = 200 * MEBIBYTE, max_entries: int = 50, max_unpacked_bytes: int = 500 * MEBIBYTE) -> None:
        self._max_stream_bytes = max_stream_bytes
        self._max_entries = max_entries
        self._max_unpacked_bytes = max_unpacked_bytes
        self._data = bytearray()
        self._hash = hashlib.sha256()
        self._is_complete = False

    def receive(self, data: bytes, sha256: str) -> None:
        """One chunk; `sha256` is "" on all but the last. Raises MalformedMessageError."""
        if self._is_complete:
            raise MalformedMessageError("tokenizer archive: a chunk after the one with the sha256")
        if len(self._data) + len(data) > self._max_stream_bytes:
            raise MalformedMessageError(f"tokenizer archive: the stream is longer than {self._max_stream_bytes} bytes")
        self._data += data
        self._hash.update(data)
        if sha256:
            if sha256.lower() != self._hash.hexdigest():
                raise MalformedMessageError("tokenizer archive: the sha256 is not that of the stream")
            self._is_complete = True

    def files(self) -> dict[str, bytes]:
        """The files by name, once the stream has ended. Raises MalformedMessageError."""
        if not self._is_complete:
            raise MalformedMessageError("tokenizer archive: the stream ended without a sha256")
        self._check_directory()
        try:
            with zipfile.ZipFile(io.BytesIO(self._data)) as archive:
                return self._unpack(archive)
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, UnicodeDecodeError, ValueError, OverflowError):
            raise MalformedMessageError("tokenizer archive: not a sound ZIP") from None

    def _check_directory(self) -> None:
        """Bound what zipfile will read. A comment or ZIP64 would let the archive hold a second end record, so neither is taken."""
        end = self._data[-_END_RECORD_BYTES:]
        if len(end) != _END_RECORD_BYTES or not end.startswith(_END_RECORD) or end[-2:] != b"\0\0":
            raise MalformedMessageError("tokenizer archive: no ZIP, or one with a comment")
        before = self._data[:-_END_RECORD_BYTES][-_ZIP64_LOCATOR_BYTES:]
        if before.startswith(_ZIP64_LOCATOR):
            raise MalformedMessageError("tokenizer archive: ZIP64")
        entries, size = int.from_bytes(end[10:12], "little"), int.from_bytes(end[12:16], "little")
        if entries > self._max_entries or size > self._max_entries * _DIRECTORY_BYTES_PER_ENTRY:
            raise MalformedMessageError(f"tokenizer archive: more than {self._max_entries} entries")

    def _unpack(self, archive: zipfile.ZipFile) -> dict[str, bytes]:
        entries = archive.infolist()
        if len(entries) > self._max_entries:
            raise MalformedMessageError(f"tokenizer archive: more than {self._max_entries} entries")
        files: dict[str, bytes] = {}
        left = self._max_unpacked_bytes
        for entry in entries:
            _check_entry(entry)
            if entry.filename in files:
                raise MalformedMessageError("tokenizer archive: two entries with one name")
            content = bytearray()
            with archive.open(entry) as stream:
                while block := stream.read(_READ_BYTES):
                    left -= len(block)
                    if left < 0:
                        raise MalformedMessageError(f"tokenizer archive: unpacks to more than {self._max_unpacked_bytes} bytes")
                    content += block
            files[entry.filename] = bytes(content)
        return files


def _check_entry(entry: zipfile.ZipInfo) -> None:
    name = entry.orig_filename  # `filename` is cut at a NUL
    if name in ("", ".", "..") or any(char in name for char in "/\\\0:"):
        raise MalformedMessageError("tokenizer archive: an entry whose name is not a plain file name")
    if entry.flag_bits & _ENCRYPTED:
        raise MalformedMessageError("tokenizer archive: an encrypted entry")
    if stat.S_IFMT(entry.external_attr >> 16) not in (0, stat.S_IFREG):
        raise MalformedMessageError("tokenizer archive: an entry that is a link or no regular file")
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise MalformedMessageError("tokenizer archive: an entry that is neither stored nor deflated")
