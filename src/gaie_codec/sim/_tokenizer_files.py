"""A model's tokenizer files -> the ZIP that GetTokenizer streams, as smg-grpc-servicer makes it."""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Iterator, Mapping
from typing import Final

CHUNK_BYTES: Final = 64 * 1024


def encode_archive(files: Mapping[str, bytes]) -> bytes:
    """The files as a ZIP, always the same bytes for the same files."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(zipfile.ZipInfo(name), data, zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def chunks(archive: bytes) -> Iterator[tuple[bytes, str]]:
    """The archive in pieces, each with its `sha256` field, which only the last one has."""
    for start in range(0, len(archive), CHUNK_BYTES):
        end = start + CHUNK_BYTES
        yield archive[start:end], hashlib.sha256(archive).hexdigest() if end >= len(archive) else ""
