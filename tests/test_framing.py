"""Frames: any partition gives the same payloads, and nothing beyond the limits is ever kept."""

from __future__ import annotations

import gzip
import re
import struct
import zlib

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gaie_codec import CodecError, FrameDecoder, FramingError, MalformedMessageError, TruncatedResponseError, UsageError, encode_frame
from strategies import damaged, partitions, single_bytes

PAYLOADS = st.lists(st.binary(max_size=40), max_size=6)
ENCODINGS = ("identity", "deflate", "gzip")
LIMIT = 64


def header(flag: int, length: int) -> bytes:
    return struct.pack(">BI", flag, length)


def read(pieces, **options):
    """Payloads, then the error that ended them (with its words), or None after a clean end."""
    decoder = FrameDecoder(max_message_bytes=LIMIT, **options)
    payloads = []
    try:
        for piece in pieces:
            for payload in decoder.receive_data(piece):
                payloads.append(payload)
            assert len(decoder._buffer) < 5 + LIMIT, "more than one frame is kept"
        decoder.receive_eof()
    except CodecError as error:
        return payloads, type(error), str(error)
    return payloads, None, ""


@given(payloads=PAYLOADS, encoding=st.sampled_from(ENCODINGS), data=st.data())
def test_any_partition_gives_the_payloads(payloads, encoding, data):
    stream = b"".join(encode_frame(payload, encoding=encoding) for payload in payloads)
    assert read(data.draw(partitions(stream)), encoding=encoding) == (payloads, None, "")
    assert read(single_bytes(stream), encoding=encoding) == (payloads, None, "")


@given(payloads=PAYLOADS, encoding=st.sampled_from(ENCODINGS), data=st.data())
def test_any_partition_of_a_damaged_stream_gives_the_same_payloads_and_error(payloads, encoding, data):
    stream = data.draw(damaged(b"".join(encode_frame(payload, encoding=encoding) for payload in payloads)))
    whole = read([stream], encoding=encoding)
    assert read(data.draw(partitions(stream)), encoding=encoding) == whole
    assert read(single_bytes(stream), encoding=encoding) == whole


@given(stream=st.binary(max_size=60), data=st.data())
@example(stream=b"\0\0\0\0\0" * 3, data=None)
def test_arbitrary_bytes_raise_codec_errors_only(stream, data):
    whole = read([stream])
    assert read(single_bytes(stream) if data is None else data.draw(partitions(stream))) == whole


def test_the_bytes_of_a_frame():
    assert encode_frame(b"abc") == b"\x00\x00\x00\x00\x03abc"
    assert encode_frame(b"") == bytes(5)
    for encoding, inflate in (("gzip", gzip.decompress), ("deflate", zlib.decompress)):
        frame = encode_frame(b"abc", encoding=encoding)
        assert frame[:5] == header(1, len(frame) - 5)
        assert inflate(frame[5:]) == b"abc"
    with pytest.raises(UsageError, match="snappy"):
        encode_frame(b"", encoding="snappy")


def test_zero_length_frames_coalesced_and_apart():
    assert read([bytes(15)]) == ([b"", b"", b""], None, "")
    assert read([bytes(5), bytes(5)]) == ([b"", b""], None, "")
    assert read([b"", bytes(5), b""]) == ([b""], None, "")


@pytest.mark.parametrize("flag", range(2, 256))
def test_flags_beyond_1_are_refused(flag):
    payloads, error, text = read([encode_frame(b"good") + header(flag, 0)])
    assert (payloads, error) == ([b"good"], FramingError)
    assert "offset 9" in text
    assert f"flag is {flag}" in text


@pytest.mark.parametrize("flag", [0, 1])
def test_a_length_over_the_limit_is_refused_before_its_payload_comes(flag):
    at, over = header(flag, LIMIT), header(flag, LIMIT + 1)
    assert read([at])[1] is TruncatedResponseError
    payloads, error, text = read([*single_bytes(over)])
    assert (payloads, error) == ([], FramingError)
    assert str(LIMIT + 1) in text
    assert read([header(flag, 2**32 - 1)])[1] is FramingError


def test_a_frame_of_just_the_limit_passes():
    assert read([encode_frame(bytes(LIMIT))]) == ([bytes(LIMIT)], None, "")
    assert read([encode_frame(bytes(LIMIT + 1))])[1] is FramingError, "also when it comes whole"


def test_frames_before_a_bad_one_are_delivered():
    decoder = FrameDecoder()
    payloads = iter(decoder.receive_data(encode_frame(b"a") + encode_frame(b"b") + header(9, 0)))
    assert (next(payloads), next(payloads)) == (b"a", b"b")
    with pytest.raises(FramingError):
        next(payloads)


@pytest.mark.parametrize("cut", range(1, 8))
def test_an_end_inside_a_frame_says_where(cut):
    payloads, error, text = read([encode_frame(b"good") + encode_frame(b"xyz")[:cut]])
    assert (payloads, error) == ([b"good"], TruncatedResponseError)
    assert "offset 9" in text
    assert re.search(rf"after {cut} of {'at least 5' if cut < 5 else '8'} bytes", text)


def test_an_end_between_frames_is_clean():
    FrameDecoder().receive_eof()
    assert read([encode_frame(b"good")])[1] is None


def compressed(payload: bytes) -> bytes:
    return header(1, len(payload)) + payload


@pytest.mark.parametrize("encoding", ["identity", "snappy", "", "GZIP"])
def test_flag_1_needs_an_encoding_that_is_known(encoding):
    payloads, error, text = read([encode_frame(b"plain") + encode_frame(b"x", encoding="gzip")], encoding=encoding)
    assert (payloads, error) == ([b"plain"], MalformedMessageError)
    assert "grpc-encoding" in text
    assert repr(encoding) in text


def test_flag_0_is_plain_under_any_encoding():
    assert read([encode_frame(b"plain")], encoding="gzip") == ([b"plain"], None, "")


@pytest.mark.parametrize(
    ("payload", "words"),
    [
        (gzip.compress(b"hello")[:-1], "cut short"),
        (gzip.compress(b"hello")[:12], "cut short"),
        (b"", "cut short"),
        (gzip.compress(b"hello") + b"!", "stray bytes"),
        (gzip.compress(b"a") + gzip.compress(b"b"), "stray bytes"),
        (b"hello", "not valid gzip"),
        (zlib.compress(b"hello"), "not valid gzip"),
        (gzip.compress(b"hello")[:-8] + bytes(8), "not valid gzip"),
    ],
)
def test_bad_gzip_is_named(payload, words):
    payloads, error, text = read([encode_frame(b"good") + compressed(payload)], encoding="gzip")
    assert (payloads, error) == ([b"good"], MalformedMessageError)
    assert words in text
    assert "hello" not in text


def test_deflate_is_the_zlib_format_and_not_raw():
    assert read([compressed(zlib.compress(b"hello"))], encoding="deflate")[0] == [b"hello"]
    raw = zlib.compressobj(wbits=-15)
    assert read([compressed(raw.compress(b"hello") + raw.flush())], encoding="deflate")[1] is MalformedMessageError


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_inflating_stops_at_the_limit(encoding):
    def frame(size):
        return encode_frame(bytes(size), encoding=encoding)

    assert read([frame(LIMIT)], encoding=encoding) == ([bytes(LIMIT)], None, "")
    bomb = frame(50_000)
    decoder = FrameDecoder(max_message_bytes=len(bomb), encoding=encoding)
    with pytest.raises(FramingError, match="inflates to more than the limit"):
        list(decoder.receive_data(bomb))


def test_an_encoding_of_any_length_is_not_repeated_at_length():
    assert len(read([compressed(b"x")], encoding="z" * 10_000)[2]) < 200
