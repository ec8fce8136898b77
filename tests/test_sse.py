"""Server-sent events: what the encoder writes the decoder reads, in any partition and with any line ends."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gaie_codec import MalformedMessageError, ServerSentEvent, SSEDecoder, TruncatedResponseError
from gaie_codec._sse import DONE, encode_event
from strategies import damaged, partitions, single_bytes

# No line breaks: JSON has none. U+2028 and U+0085 are breaks to str.splitlines, but not here.
CHARACTERS = st.characters(exclude_characters="\r\n", exclude_categories=["Cs"])
LINES = st.text(CHARACTERS, max_size=12) | st.sampled_from(["\u2028", "\x85\x0b", ""])
SOUP = st.lists(
    st.sampled_from([b"\r", b"\n", b"\r\n", b"data: x", b"data", b":", b"event: e", b"id: 1", b"\xef\xbb\xbf", b" ", b"\xff"]), max_size=20
).map(b"".join)


def read(pieces, **options):
    """The events, and the error that ended them."""
    decoder = SSEDecoder(**options)
    events = []
    try:
        for piece in pieces:
            for event in decoder.receive_data(piece):
                events.append(event)
        decoder.receive_eof()
    except (MalformedMessageError, TruncatedResponseError) as error:
        return events, str(error)
    return events, None


def data_of(stream: bytes) -> list[str]:
    events, error = read([stream])
    assert error is None
    return [event.data for event in events]


def reference(stream: bytes) -> list[str]:
    """The data of each event, by the standard's own grammar, on the whole stream at once."""
    text = stream.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "replace").replace("\r\n", "\n").replace("\r", "\n")
    *lines, _ = text.split("\n")
    events, data = [], []
    for line in lines:
        name, _, value = line.partition(":")
        if not line:
            events += ["\n".join(data)] if data else []
            data = []
        elif name == "data":
            data.append(value.removeprefix(" "))
    return events


def test_the_bytes_of_an_event():
    assert encode_event(b"{}") == b"data: {}\n\n"
    assert encode_event(b"[DONE]") == DONE


@given(lines=st.lists(LINES, max_size=5), data=st.data())
def test_round_trip_in_any_partition(lines, data):
    stream = b"".join(encode_event(line.encode()) for line in lines)
    expected = [ServerSentEvent(data=line) for line in lines]
    assert read(data.draw(partitions(stream))) == (expected, None)
    assert read(single_bytes(stream)) == (expected, None)


@given(stream=SOUP | st.binary(max_size=30), data=st.data())
@example(stream=b"data: a\r\rdata: b\r\n\r\ndata: c\n\n", data=None)
@example(stream=b"\r\ndata: a\n\r\ndata: b\r\r\n\r", data=None)
def test_any_stream_in_any_partition_reads_as_the_standard_says(stream, data):
    whole = read([stream])
    assert [event.data for event in whole[0]] == reference(stream)
    assert read(single_bytes(stream)) == whole
    if data is not None:
        assert read(data.draw(partitions(stream))) == whole


@given(lines=st.lists(LINES, min_size=1, max_size=3), data=st.data())
def test_damage_is_the_same_in_any_partition(lines, data):
    stream = data.draw(damaged(b"".join(encode_event(line.encode()) for line in lines)))
    whole = read([stream])
    assert read(data.draw(partitions(stream))) == whole
    assert read(single_bytes(stream)) == whole
    stream = stream.replace(b"\r", b"\n")  # for CRLF see the next test
    whole = read([stream], max_event_bytes=20)
    assert read(data.draw(partitions(stream)), max_event_bytes=20) == whole
    assert read(single_bytes(stream), max_event_bytes=20) == whole


def test_the_limit_does_not_depend_on_where_a_crlf_is_cut():
    stream = b"data: a\r\n\r\n"
    assert read([stream], max_event_bytes=10) == read(single_bytes(stream), max_event_bytes=10)


@pytest.mark.parametrize("end", ["\n", "\r", "\r\n"])
def test_line_ends_split_everywhere(end):
    stream = f"data: a{end}data: b{end}{end}data: c{end}{end}".encode()
    for cut in range(len(stream) + 1):
        assert [event.data for event in read([stream[:cut], stream[cut:]])[0]] == ["a\nb", "c"], cut


def test_a_cr_ends_a_line_without_waiting_for_an_lf():
    decoder = SSEDecoder()
    assert [event.data for event in decoder.receive_data(b"data: a\r\r")] == ["a"]
    assert [event.data for event in decoder.receive_data(b"\n")] == []
    assert [event.data for event in decoder.receive_data(b"data: b\n\n")] == ["b"]


@pytest.mark.parametrize(
    ("stream", "expected"),
    [
        (b"\xef\xbb\xbfdata: a\n\n", ["a"]),
        (b"\n\xef\xbb\xbfdata: a\n\n", []),  # a BOM is one at the start only; later it is part of the field's name
        (b": comment\ndata: a\n:\n\n", ["a"]),
        (b": comment alone\n\n", []),
        (b"data: a\ndata:b\ndata:  c\n\n", ["a\nb\n c"]),
        (b"data\n\n", [""]),
        (b"data:\ndata:\n\n", ["\n"]),
        (b"data: a: b\n\n", ["a: b"]),
        (b"retry: 5\nunknown: x\ndata : no\nDATA: no\n\n", []),
        (b"data: \xff\n\n", ["\ufffd"]),
        (b"\n\n\n", []),
    ],
)
def test_the_fine_print(stream, expected):
    assert data_of(stream) == expected


def test_names_last_one_event_and_ids_last():
    events, _ = read([b"event: error\nid: 1\ndata: a\n\ndata: b\n\nid: 2\0\nid\ndata: c\n\n"])
    assert events == [
        ServerSentEvent(data="a", event="error", id="1"),
        ServerSentEvent(data="b", id="1"),
        ServerSentEvent(data="c", id=""),
    ]
    # An event without data is none, and its name does not reach the next one.
    assert read([b"event: x\n\ndata: a\n\n"])[0] == [ServerSentEvent(data="a")]


@pytest.mark.parametrize("tail", [b"data: b", b"data: b\n", b"data: b\r", b"dat", b"data: b\nevent: x"])
def test_an_event_without_its_blank_line_is_not_dispatched(tail):
    events, error = read([b"data: a\n\n" + tail])
    assert [event.data for event in events] == ["a"]
    assert error == "the event stream ended inside an event"


def test_the_limit_is_on_one_event():
    at = b"data: " + b"x" * 15 + b"\n"
    assert len(at) == 22, "line ends do not count"
    assert read([at + b"\n"], max_event_bytes=21)[1] is None
    assert read([(at + b"\n") * 50], max_event_bytes=21)[1] is None, "one event, not the stream"
    assert read([at + at + b"\n"], max_event_bytes=41)[1] == "an event of more than 41 bytes"
    assert read([b"x"] * 22, max_event_bytes=21)[1] == "an event of more than 21 bytes", "also without any line end"
    assert [event.data for event in read([b"data: a\n\n" + at + at], max_event_bytes=21)[0]] == ["a"], "events before it are delivered"
