"""Metadata: percent-encoded messages, statuses, and answers from something that is not gRPC."""

from __future__ import annotations

import string

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gaie_codec import Code, MalformedMessageError, UpstreamStatusError
from gaie_codec._metadata import as_mapping, check_headers, decode_grpc_message, decode_status, encode_grpc_message

UNICODE = st.text(st.characters(exclude_categories=["Cs"]))


@given(UNICODE)
@example("50% of 100%25 - naïve 😀\r\n\t\0\x7f")
def test_round_trip(text):
    encoded = encode_grpc_message(text)
    assert all(" " <= char <= "~" for char in encoded)
    assert decode_grpc_message(encoded) == text


def test_the_encoding_is_grpcs():
    plain = "".join(char for char in string.printable if " " <= char <= "~" and char != "%")
    assert encode_grpc_message(plain) == plain
    assert encode_grpc_message("%é\n") == "%25%C3%A9%0A"
    assert encode_grpc_message("\ud800") == "?"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("%e2%82%AC", "€"),
        ("100%", "100%"),
        ("%2", "%2"),
        ("%zz%41", "%zzA"),
        ("%%41", "%A"),
        ("%2541", "%41"),  # once, not twice
        ("%FF", "\ufffd"),
        ("%E2%82", "\ufffd"),
        ("naïve €", "naïve €"),  # raw, where the sender did not encode
        ("\udcc3\udca9", "é"),  # raw UTF-8, from a host that reads headers as ASCII with surrogateescape
        ("", ""),
    ],
)
def test_what_is_not_encoded_well_stays_readable(value, text):
    assert decode_grpc_message(value) == text


@given(st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from("%0aF")))
def test_any_header_value_decodes(value):
    decode_grpc_message(value).encode()


def test_a_surrogate_that_stands_for_no_byte_decodes_too():
    decode_grpc_message("\ud800")


def test_names_in_any_case_and_the_last_of_several():
    pairs = [("Grpc-Status", "5"), ("x", "1"), ("GRPC-STATUS", "0")]
    assert as_mapping(pairs) == {"grpc-status": "0", "x": "1"}
    assert as_mapping(dict(pairs[:2])) == {"grpc-status": "5", "x": "1"}
    assert as_mapping(()) == {}


@pytest.mark.parametrize(
    ("trailers", "code", "detail"),
    [
        ({"grpc-status": "5", "grpc-message": "no%20such%20model"}, Code.NOT_FOUND, "NOT_FOUND: no such model"),
        ({"grpc-status": "14"}, Code.UNAVAILABLE, "UNAVAILABLE: "),
        ({"grpc-status": "99", "grpc-message": "x"}, Code.UNKNOWN, "UNKNOWN: x"),
        ({"grpc-status": "abc"}, Code.UNKNOWN, "UNKNOWN: grpc-status 'abc'"),
        ({"grpc-status": ""}, Code.UNKNOWN, "UNKNOWN: grpc-status ''"),
        ({}, Code.UNKNOWN, "UNKNOWN: no grpc-status in the trailers"),
        ({"grpc-message": "half of it"}, Code.UNKNOWN, "UNKNOWN: half of it"),
    ],
)
def test_statuses(trailers, code, detail):
    error = decode_status(trailers)
    assert error.code is code
    assert error.detail == detail


def test_ok_is_ok_whatever_the_message():
    assert decode_status({"grpc-status": "0", "grpc-message": "ignored"}) is None


@pytest.mark.parametrize(
    "headers", [{}, *({"content-type": value} for value in ("application/grpc", "application/grpc+proto", "application/grpc;x=y"))]
)
def test_grpc_headers_pass(headers):
    assert check_headers(200, headers) is None


@pytest.mark.parametrize("content_type", ["text/html", "application/json", ""])
def test_another_content_type_is_not_grpc(content_type):
    error = check_headers(200, {"content-type": content_type})
    assert isinstance(error, MalformedMessageError)
    assert error.http_status == 502
    assert content_type in error.detail


@pytest.mark.parametrize(
    ("status", "code"), [(503, Code.UNAVAILABLE), (404, Code.UNIMPLEMENTED), (401, Code.UNAUTHENTICATED), (418, Code.UNKNOWN)]
)
def test_a_proxys_status_stands_for_a_code(status, code):
    error = check_headers(status, {"content-type": "text/html"})
    assert isinstance(error, UpstreamStatusError)
    assert error.code is code
    assert str(status) in error.detail
