"""The model server's tokenizer archive: sound ones come through, and every rule is broken once."""

from __future__ import annotations

import contextlib
import hashlib
import io
import stat
import struct
import warnings
import zipfile
from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gaie_codec._errors import MalformedMessageError
from gaie_codec.text.archive import TokenizerArchive

FILES = {"tokenizer.json": b"{}" * 50_000, "config.json": b"{}", "chat_template.jinja": "ü".encode()}


def zipped(files: dict[str, bytes] | list[tuple[str | zipfile.ZipInfo, bytes]], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(buffer, "w", compression) as archive:
        warnings.simplefilter("ignore")  # zipfile warns of duplicate names
        for name, data in files.items() if isinstance(files, dict) else files:
            archive.writestr(name, data)
    return buffer.getvalue()


def unpack(data: bytes, *, sha256: str | None = None, archive: TokenizerArchive | None = None) -> dict[str, bytes]:
    archive = archive or TokenizerArchive()
    archive.receive(data, hashlib.sha256(data).hexdigest() if sha256 is None else sha256)
    return archive.files()


def entry(name: str, *, mode: int = 0, compression: int = zipfile.ZIP_DEFLATED) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.compress_type = compression
    info.external_attr = mode << 16
    return info


@given(st.lists(st.integers(0, 400), max_size=5), st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]))
def test_any_partition(cuts: list[int], compression: int) -> None:
    data = zipped(FILES, compression)
    archive = TokenizerArchive()
    places = [0, *sorted(cuts), len(data)]
    for start, end in pairwise(places):
        archive.receive(data[start:end], hashlib.sha256(data).hexdigest().upper() if end == len(data) else "")
    assert archive.files() == FILES


def test_the_hash_may_come_alone() -> None:
    data = zipped(FILES)
    archive = TokenizerArchive()
    archive.receive(data, "")
    archive.receive(b"", hashlib.sha256(data).hexdigest())
    assert archive.files() == FILES


def encrypted() -> bytes:
    data = bytearray(zipped({"a": b"1"}))
    data[6] |= 1
    data[data.index(b"PK\x01\x02") + 8] |= 1
    return bytes(data)


def claims_to_be_small() -> bytes:
    """10 MB of zeros whose directory entry says 10 bytes."""
    data = bytearray(zipped({"a": b"\0" * 10_000_000}))
    place = data.index(b"PK\x01\x02") + 24
    data[place : place + 4] = struct.pack("<I", 10)
    return bytes(data)


def end_record(offset: int, data: bytes) -> bytes:
    broken = bytearray(zipped(FILES))
    place = len(broken) - 22 + offset
    broken[place : place + len(data)] = data
    return bytes(broken)


BROKEN: dict[str, tuple[Callable[[], bytes], str]] = {
    "path": (lambda: zipped({"a/b": b""}), "plain file name"),
    "backslash": (lambda: zipped({"a\\b": b""}), "plain file name"),
    "parent": (lambda: zipped({"..": b""}), "plain file name"),
    "absolute": (lambda: zipped({"/a": b""}), "plain file name"),
    "drive": (lambda: zipped({"c:a": b""}), "plain file name"),
    "directory": (lambda: zipped({"a/": b""}), "plain file name"),
    "twice": (lambda: zipped([("a", b"1"), ("a", b"2")]), "two entries"),
    "link": (lambda: zipped([(entry("a", mode=stat.S_IFLNK | 0o777), b"/etc/passwd")]), "link"),
    "fifo": (lambda: zipped([(entry("a", mode=stat.S_IFIFO), b"")]), "link"),
    "bzip2": (lambda: zipped([(entry("a", compression=zipfile.ZIP_BZIP2), b"1")]), "neither stored nor deflated"),
    "encrypted": (encrypted, "encrypted"),
    "entries": (lambda: zipped({str(n): b"" for n in range(51)}), "more than 50 entries"),
    "directory size": (lambda: end_record(12, b"\xff\xff\xff\x00"), "more than 50 entries"),
    "comment": (lambda: end_record(20, b"\1\0"), "no ZIP"),
    "not a ZIP": (lambda: b"hello", "no ZIP"),
    "empty": (lambda: b"", "no ZIP"),
    "wrong size": (claims_to_be_small, "not a sound ZIP"),
    "wrong offset": (lambda: end_record(16, b"\xff\xff\xff\x0f"), "not a sound ZIP"),
    "ZIP64": (lambda: b"PK\x06\x07" + b"\0" * 16 + zipped({}), "ZIP64"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_each_rule_is_named(name: str) -> None:
    make, message = BROKEN[name]
    with pytest.raises(MalformedMessageError, match=message):
        unpack(make())


def test_hash_rules() -> None:
    data = zipped(FILES)
    with pytest.raises(MalformedMessageError, match="not that of the stream"):
        unpack(data, sha256="0" * 64)
    with pytest.raises(MalformedMessageError, match="without a sha256"):
        unpack(data, sha256="")
    archive = TokenizerArchive()
    archive.receive(data, hashlib.sha256(data).hexdigest())
    with pytest.raises(MalformedMessageError, match="after the one"):
        archive.receive(b"", "")


def test_caps() -> None:
    data = zipped(FILES)
    total = sum(map(len, FILES.values()))
    assert unpack(data, archive=TokenizerArchive(max_stream_bytes=len(data), max_entries=3, max_unpacked_bytes=total)) == FILES
    with pytest.raises(MalformedMessageError, match=f"longer than {len(data) - 1} bytes"):
        unpack(data, archive=TokenizerArchive(max_stream_bytes=len(data) - 1))
    with pytest.raises(MalformedMessageError, match="more than 2 entries"):
        unpack(data, archive=TokenizerArchive(max_entries=2))
    with pytest.raises(MalformedMessageError, match=f"more than {total - 1} bytes"):
        unpack(data, archive=TokenizerArchive(max_unpacked_bytes=total - 1))


@given(st.integers(0, 10_000), st.binary(min_size=1, max_size=8))
@example(0, b"")
def test_damage_raises_only_codec_errors(place: int, patch: bytes) -> None:
    data = bytearray(zipped({"tokenizer.json": b"{}" * 20, "config.json": b"{}"}))
    place %= len(data)
    data[place : place + len(patch)] = patch
    with contextlib.suppress(MalformedMessageError):
        unpack(bytes(data))
