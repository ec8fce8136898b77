"""One gRPC response, message by message: what has a place, where it is, and what ends it."""

from __future__ import annotations

import pytest

from gaie_codec import (
    BodyEvent,
    Code,
    CodecError,
    ErrorEvent,
    FinishEvent,
    FramingError,
    MalformedMessageError,
    OutOfOrderError,
    PromptEvent,
    State,
    TokensEvent,
    TruncatedResponseError,
    UpstreamStatusError,
    UsageError,
    adapters,
    snapshots,
)
from gaie_codec._reader import CallReader

ENGINE, INFERENCE, SCHEDULER, RUNTIME = (
    adapters.get(snapshots.load(dialect)) for dialect in ("vllm.engine", "vllm.inference", "sglang.scheduler", "sglang.runtime")
)


def reader_of(adapter=ENGINE, *, path=None, choices=1, is_streamed=True, limit=1000):
    reader = CallReader(adapter, path or adapter.generate_path, choices=choices, is_streamed=is_streamed, max_message_bytes=limit)
    reader.receive_headers((), 200)
    return reader


def feed(reader, *events):
    for event in events:
        for seen in reader.receive_message(reader.adapter.encode_response(event).SerializeToString()):
            place = reader.place(seen) if isinstance(seen, TokensEvent | FinishEvent) else 0
            reader.accept(seen, place)


def test_a_whole_answer():
    reader = CallReader(ENGINE, ENGINE.generate_path, choices=2, is_streamed=True, max_message_bytes=1000)
    assert reader.state is State.AWAIT_HEADERS
    reader.receive_headers((("content-type", "application/grpc"),), 200)
    feed(reader, TokensEvent(token_ids=[1], prompt_tokens=7, cached_tokens=3), TokensEvent(index=1, token_ids=[1], cached_tokens=1))
    assert (reader.state, reader.unfinished) == (State.STREAMING, 2)
    feed(reader, FinishEvent(index=1))
    assert (reader.state, reader.unfinished) == (State.STREAMING, 1)
    feed(reader, FinishEvent())
    assert reader.state is State.FINISHED
    assert (reader.prompt_tokens, reader.cached_tokens) == (7, 3)
    reader.receive_trailers((("grpc-status", "0"),))
    assert reader.state is State.CLOSED


def test_a_message_about_the_prompt_starts_no_stream():
    """So that a failure which follows it can still be told by the HTTP status."""
    reader = reader_of(INFERENCE)
    feed(reader, PromptEvent(prompt_tokens=7))
    assert (reader.state, reader.prompt_tokens) == (State.AWAIT_MESSAGE, 7)
    feed(reader, TokensEvent(text="a", completion_tokens=1))
    assert reader.state is State.STREAMING


@pytest.mark.parametrize("index", [1, 2**32 - 1])
def test_a_choice_that_was_not_asked_for_has_no_place(index):
    with pytest.raises(OutOfOrderError, match=f"choice {index} of 1"):
        feed(reader_of(), TokensEvent(index=index, token_ids=[1]))


def test_choices_with_names_get_the_place_in_which_they_came():
    reader = reader_of(RUNTIME, choices=2)
    assert [reader.place(TokensEvent(choice_id=name)) for name in ("y", "x", "y", "x")] == [0, 1, 0, 1]
    with pytest.raises(OutOfOrderError, match="choice 2 of 2"):
        reader.place(TokensEvent(choice_id="z"))


def test_unary_choices_that_all_say_index_0_come_in_order():
    reader = reader_of(SCHEDULER, choices=2, is_streamed=False)
    for expected in (0, 1):
        assert reader.place(FinishEvent()) == expected
        feed(reader, FinishEvent())
    assert reader.state is State.FINISHED
    streamed = reader_of(SCHEDULER, choices=2)
    feed(streamed, FinishEvent())
    assert streamed.place(FinishEvent()) == 0, "a stream tells them apart, so this is a second finish"


def test_an_error_in_the_stream_is_raised_with_its_code():
    for index in (None, 0):
        with pytest.raises(UpstreamStatusError) as caught:
            reader_of().accept(ErrorEvent(code=Code.RESOURCE_EXHAUSTED, message="slow down", index=index))
        assert (caught.value.code, caught.value.http_status) == (Code.RESOURCE_EXHAUSTED, 429)


def test_messages_that_say_nothing_come_at_their_time_too():
    reader = reader_of()
    assert list(reader.receive_message(b"")) == []
    feed(reader, FinishEvent())
    with pytest.raises(OutOfOrderError, match="MESSAGE in state FINISHED"):
        reader.receive_message(b"")
    unopened = CallReader(ENGINE, ENGINE.generate_path, choices=1, is_streamed=True, max_message_bytes=10)
    with pytest.raises(OutOfOrderError):
        unopened.receive_message(b"")


def test_a_message_of_the_wrong_size_or_form():
    with pytest.raises(FramingError, match="11 bytes is over the limit of 10"):
        reader_of(limit=10).receive_message(bytes(11))
    with pytest.raises(MalformedMessageError, match=r"is no vllm\.grpc\.engine\.GenerateResponse"):
        reader_of().receive_message(b"\xff")


def test_ended_choices_close_the_call_when_none_is_left():
    reader = reader_of(choices=3)
    feed(reader, TokensEvent(token_ids=[1]), FinishEvent(index=1))
    reader.end_choice(0)
    assert reader.state is State.STREAMING
    reader.end_choice(2)
    assert reader.state is State.CLOSED
    for end in (reader.receive_eof, lambda: reader.receive_status(Code.CANCELLED, ""), lambda: reader.receive_trailers(())):
        end()  # whatever becomes of the call now
        assert reader.state is State.CLOSED
    mixed = reader_of(choices=2)
    feed(mixed, TokensEvent(token_ids=[1]))
    mixed.end_choice(0)
    feed(mixed, FinishEvent(index=1))
    assert mixed.state is State.CLOSED, "not FINISHED: tokens of the ended one may still come"


@pytest.mark.parametrize(
    ("events", "end", "kind"),
    [
        ([], lambda reader: reader.receive_trailers((("grpc-status", "0"),)), TruncatedResponseError),
        ([TokensEvent(token_ids=[1])], lambda reader: reader.receive_status(Code.OK, ""), TruncatedResponseError),
        ([TokensEvent(token_ids=[1])], lambda reader: reader.receive_eof(), TruncatedResponseError),
        ([TokensEvent(token_ids=[1])], lambda reader: reader.receive_trailers((("grpc-status", "14"),)), UpstreamStatusError),
        ([TokensEvent(token_ids=[1])], lambda reader: reader.receive_status(Code.UNAVAILABLE, "gone"), UpstreamStatusError),
    ],
)
def test_success_is_a_finish_for_each_choice(events, end, kind):
    reader = reader_of()
    feed(reader, *events)
    with pytest.raises(kind):
        end(reader)


@pytest.mark.parametrize(
    "end",
    [
        lambda reader: reader.receive_eof(),
        lambda reader: reader.receive_trailers((("grpc-status", "14"),)),
        lambda reader: reader.receive_trailers(()),
        lambda reader: reader.receive_status(Code.UNAVAILABLE, "gone"),
    ],
)
def test_no_end_after_the_last_finish_takes_it_back(end):
    reader = reader_of()
    feed(reader, FinishEvent())
    end(reader)
    assert reader.state is State.CLOSED


def test_two_statuses_that_contradict_each_other_are_an_error():
    reader = CallReader(ENGINE, ENGINE.generate_path, choices=1, is_streamed=True, max_message_bytes=1000)
    reader.receive_headers((("grpc-status", "0"),), 200)
    feed(reader, FinishEvent())
    with pytest.raises(UpstreamStatusError):
        reader.receive_trailers((("grpc-status", "13"),))


def test_informational_headers_say_nothing():
    reader = CallReader(ENGINE, ENGINE.generate_path, choices=1, is_streamed=True, max_message_bytes=1000)
    reader.receive_headers((("link", "x"),), 103)
    assert reader.state is State.AWAIT_HEADERS


def test_what_a_status_means_is_the_adapters_word():
    for adapter, expected in ((RUNTIME, 429), (ENGINE, 500)):
        for end in (
            lambda reader: reader.receive_status(Code.INTERNAL, "429: slow down"),
            lambda reader: reader.receive_trailers((("grpc-status", "13"), ("grpc-message", "429: slow down"))),
        ):
            with pytest.raises(UpstreamStatusError) as caught:
                end(reader_of(adapter))
            assert caught.value.http_status == expected


def test_passed_through_pieces_end_with_the_last():
    path = RUNTIME.passthrough.paths["chat"]
    reader = reader_of(RUNTIME, path=path)
    first = RUNTIME.passthrough.encode_response(BodyEvent(data=b"{}"), path).SerializeToString()
    last = RUNTIME.passthrough.encode_response(BodyEvent(data=b"", is_last=True), path).SerializeToString()
    for payload, state in ((first, State.STREAMING), (last, State.FINISHED)):
        (event,) = reader.receive_message(payload)
        reader.accept(event)
        assert reader.state is state
    (event,) = reader.receive_message(first)
    with pytest.raises(OutOfOrderError):
        reader.accept(event)


def test_headers_come_once_and_may_be_the_whole_answer():
    reader = reader_of()
    with pytest.raises(OutOfOrderError, match="HEADERS"):
        reader.receive_headers((), 200)
    whole = CallReader(ENGINE, ENGINE.generate_path, choices=1, is_streamed=True, max_message_bytes=10)
    whole.receive_headers((("grpc-status", "5"), ("grpc-message", "gone")), 200)
    with pytest.raises(UpstreamStatusError, match="gone"):
        whole.receive_eof()
    page = CallReader(ENGINE, ENGINE.generate_path, choices=1, is_streamed=True, max_message_bytes=10)
    with pytest.raises(CodecError):
        page.receive_headers((("content-type", "text/html"),), 503)


def test_where_an_error_leads():
    status, broken = reader_of(), reader_of()
    status.fail(UpstreamStatusError(Code.INTERNAL, ""))
    broken.fail(OutOfOrderError("x"))
    assert (status.state, broken.state) == (State.CLOSED, State.ERROR)
    status.eof = True
    with pytest.raises(UsageError, match="received already"):
        status.check_open()
