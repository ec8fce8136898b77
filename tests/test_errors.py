"""Errors: the table is total, only CodecErrors face the client, and what a 5xx says to the client is ours."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

import gaie_codec
from gaie_codec import (
    Code,
    CodecError,
    ModelNotFoundError,
    RequestError,
    RequestTooLargeError,
    UnsupportedEndpointError,
    UpstreamError,
    UpstreamStatusError,
    UsageError,
    encode_error_response,
)
from gaie_codec._errors import CODE_TABLE, code_from_http, code_from_text

FAILURES = [code for code in Code if code is not Code.OK]
SECRET = "worker-7.internal:50051 refused tensor 0xdead"
ERRORS = [value for value in vars(gaie_codec).values() if isinstance(value, type) and issubclass(value, CodecError)]


def test_the_table_is_total_and_in_the_order_of_the_codes():
    assert list(CODE_TABLE) == list(Code)
    assert list(Code) == list(range(17))


@pytest.mark.parametrize("code", FAILURES)
def test_every_failure_has_a_status_a_type_and_a_sentence(code):
    entry = CODE_TABLE[code]
    assert 400 <= entry.status < 600
    assert entry.type.endswith("Error") or code is Code.UNAVAILABLE  # whose type is vLLM's: "Service Unavailable"
    assert entry.message


@pytest.mark.parametrize("code", FAILURES)
def test_a_4xx_shows_the_servers_words_and_a_5xx_hides_them(code):
    error = UpstreamStatusError(code, SECRET)
    assert (error.code, error.http_status, error.error_type) == (code, CODE_TABLE[code].status, CODE_TABLE[code].type)
    body = json.loads(encode_error_response(error)[1].data)["error"]
    shown = error.http_status < 500 and code is not Code.CANCELLED  # which is never the server's word about the request
    assert body["message"] == (SECRET if shown else CODE_TABLE[code].message)
    assert SECRET in str(error), "the operator's log keeps the words"
    assert str(error).startswith(code.name)


@pytest.mark.parametrize("code", FAILURES)
def test_a_server_without_words_gets_the_tables(code):
    assert UpstreamStatusError(code).message == CODE_TABLE[code].message


def test_ok_is_not_an_error():
    with pytest.raises(UsageError):
        UpstreamStatusError(Code.OK, "all is well")


def test_the_tree_names_the_guilty_side():
    assert not issubclass(UsageError, CodecError)
    assert issubclass(UsageError, RuntimeError)
    for error in ERRORS:
        sides = [side for side in (RequestError, UpstreamError, UpstreamStatusError) if issubclass(error, side)]
        assert len(sides) == (0 if error is CodecError else 1), error
    assert {error for error in ERRORS if issubclass(error, RequestError) and not 400 <= error.http_status < 500} == set()
    assert {error.http_status for error in ERRORS if issubclass(error, UpstreamError)} == {502}


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (ModelNotFoundError("m"), 404, "NotFoundError"),
        (RequestTooLargeError("m"), 413, "RequestTooLargeError"),
        (UnsupportedEndpointError("m"), 404, "NotFoundError"),
        (UnsupportedEndpointError("m", http_status=405), 405, "MethodNotAllowedError"),
        (UpstreamError("m", detail="not for clients"), 502, "BadGatewayError"),
        (RequestError("m", param="seed"), 400, "BadRequestError"),
    ],
)
def test_a_whole_answer(error, status, kind):
    head, chunk, end = encode_error_response(error)
    assert head.status == status
    assert dict(head.headers) == {"content-type": "application/json", "content-length": str(len(chunk.data))}
    assert json.loads(chunk.data) == {"error": {"message": "m", "type": kind, "param": error.param, "code": status}}
    assert type(end) is gaie_codec.EndOfBody


@pytest.mark.parametrize(
    ("status", "code"),
    [(400, 13), (401, 16), (403, 7), (404, 12), (429, 14), (502, 14), (503, 14), (504, 14), (200, 2), (302, 2), (500, 2), (-1, 2)],
)
def test_http_statuses_map_as_grpc_has_it(status, code):
    assert code_from_http(status) is Code(code)


@pytest.mark.parametrize("code", Code)
def test_every_code_is_read_from_its_number(code):
    assert code_from_text(str(code.value)) is code


@pytest.mark.parametrize("text", ["", " 0", "0 ", "+0", "-1", "17", "1e0", "OK", "0x0", "\u0660", "²", "9" * 5000, "\0"])
def test_what_is_no_code_is_unknown(text):
    assert code_from_text(text) is Code.UNKNOWN


@given(st.text())
def test_any_text_gives_a_code(text):
    assert code_from_text(text) in CODE_TABLE
