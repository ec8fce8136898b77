"""`gaie-codec transcode`: look at payloads, and turn them over by hand with the same code that gateways run."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import click
from google.protobuf import json_format, text_format
from google.protobuf.message import DecodeError, Message
from google.protobuf.unknown_fields import UnknownFieldSet

from .. import BodyChunk, CodecError, FrameDecoder, ModelInfo, Output, ResponseHead, Transcoder, UsageError, snapshots
from .._framing import ENCODINGS, HEADER_BYTES
from ..adapters import DIALECTS
from ._options import flavor, parsers

_WIRE_TYPES = ("varint", "fixed64", "length-delimited", "start-group", "end-group", "fixed32")
_SHOWN_BYTES = 64

_dialect = click.option("--dialect", type=click.Choice(DIALECTS), required=True, help="The model server's protocol.")
_snapshot = click.option("--snapshot", help="Which version of its schema.  [default: the newest]")
_input = click.option(
    "--input", "input_form", type=click.Choice(("frames", "hex")), default="frames", show_default=True, help="Raw bytes, or hex digits."
)
_encoding = click.option(
    "--grpc-encoding", type=click.Choice(ENCODINGS), default="identity", show_default=True, help="How frames with flag 1 are compressed."
)
_file = click.argument("file", type=click.File("rb"), default="-")


def _transcoder_options(command: Any) -> Any:
    options: list[Any] = [
        _dialect,
        _snapshot,
        click.option("--tokenizer", default="builtin", show_default=True, metavar="DIR|HUB_ID|builtin"),
        click.option("--path", default="/v1/chat/completions", show_default=True, help="The HTTP path of the request."),
        click.option("--max-model-len", type=click.IntRange(min=1), help="Context length in tokens.  [default: the model's own]"),
        click.option("--unsupported", type=click.Choice(("reject", "drop")), default="reject", show_default=True),
        click.option("--stop-holdback", type=click.Choice(("prefix", "window")), default="prefix", show_default=True),
        parsers,
        flavor,
        click.option("--passthrough/--no-passthrough", default=True, show_default=True, help="Whether OpenAI JSON goes out as it is."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


@click.group()
def transcode() -> None:
    """Turn requests and responses over by hand, for debugging."""


@transcode.command()
@_transcoder_options
@click.option("--request-id", default="0", show_default=True, help="Used when the body names none.")
@click.option(
    "--output",
    type=click.Choice(("frame", "message", "textproto", "json", "hex")),
    default="json",
    show_default=True,
    help="Length-prefixed bytes, bare protobuf, readable text, JSON, or the frame in hex.",
)
@_file
def request(output: str, request_id: str, path: str, file: Any, **options: Any) -> None:
    """OpenAI JSON in FILE -> the gRPC request. One after the other where it takes several calls."""
    transcoder = _make_transcoder(**options)
    call = transcoder.request("POST", path, (), file.read(), request_id=request_id)
    for name in call.dropped:
        click.echo(f"gaie-codec: {name} has no effect on this model server", err=True)
    if output == "message" and len(call.calls) > 1:
        raise UsageError(f"the request takes {len(call.calls)} calls, and bare messages in one file cannot be told apart; use frame")
    for one in call.calls:
        message = transcoder.adapter.snapshot.method_at(one.path).request.FromString(one.message)
        if output in ("frame", "message"):
            _write(one.frame if output == "frame" else one.message)
        elif output == "hex":
            click.echo(one.frame.hex())
        elif output == "textproto":
            if len(call.calls) > 1:
                click.echo(f"# {one.path}, choices from {one.first_index} on")
            click.echo(text_format.MessageToString(message), nl=False)
        else:
            click.echo(json.dumps(_as_dict(message), indent=2, ensure_ascii=False))


@transcode.command()
@_transcoder_options
@click.option("--request", "request_file", type=click.File("rb"), required=True, help="The OpenAI JSON that is answered.")
@_input
@_encoding
@click.option("--id", "response_id", help="Id of the completion.  [default: the request's]")
@click.option("--created", type=int, default=0, show_default=True, help="Time of the completion, in seconds since the epoch.")
@click.option("--grpc-status", type=click.IntRange(min=0), default=0, show_default=True, help="grpc-status of the trailers.")
@click.option("--grpc-message", default="", help="grpc-message of the trailers, percent-encoded.")
@click.option("-i", "--include", is_flag=True, help="Show the HTTP status and headers too.")
@click.argument("files", type=click.File("rb"), nargs=-1)
def response(
    path: str,
    request_file: Any,
    input_form: str,
    grpc_encoding: str,
    response_id: str | None,
    created: int,
    grpc_status: int,
    grpc_message: str,
    include: bool,
    files: Sequence[Any],
    **options: Any,
) -> None:
    """Framed gRPC response bytes in FILE -> SSE or JSON, just as a client would get it. A request that takes several calls has a FILE for
    each, in their order.

    The exit status is 2 when the bytes themselves are wrong. A status in the trailers, or a missing finish, is an answer like any other.
    """
    transcoder = _make_transcoder(**options)
    call = transcoder.request("POST", path, (), request_file.read(), request_id="0")
    bodies = [_read(file, input_form) for file in files or (sys.stdin.buffer,)]
    if len(bodies) != len(call.calls):
        raise UsageError(f"this request takes {len(call.calls)} calls, and there are responses to {len(bodies)}")
    reader = call.response(id=response_id, created=created)
    outputs: list[Output] = []
    for number, data in enumerate(bodies):
        outputs += reader.receive_headers([("content-type", "application/grpc"), ("grpc-encoding", grpc_encoding)], call=number)
        outputs += reader.receive_data(data, call=number)
        outputs += reader.receive_trailers([("grpc-status", str(grpc_status)), ("grpc-message", grpc_message)], call=number)
    for out in outputs:
        if isinstance(out, ResponseHead):
            if include:
                _write("".join([f"HTTP {out.status}\n", *(f"{name}: {value}\n" for name, value in out.headers), "\n"]).encode())
            elif out.status != 200:
                click.echo(f"gaie-codec: HTTP {out.status}", err=True)
        elif isinstance(out, BodyChunk):
            _write(out.data)
    if reader.error is None:
        return
    # The client got its error. Whoever debugs wants to know where the bytes are wrong.
    faults = [
        frame["error"]
        for one, data in zip(call.calls, bodies, strict=True)
        for frame in _frames(data, transcoder.adapter.snapshot.method_at(one.path).response, grpc_encoding)
        if "error" in frame
    ]
    sys.stdout.flush()
    if faults:
        raise UsageError(faults[0])
    click.echo(f"gaie-codec: {reader.error}", err=True)


@transcode.command()
@click.option("--dialect", type=click.Choice(tuple(snapshots.SNAPSHOTS)), required=True, help="The model server's protocol.")
@_snapshot
@click.option("--method", default="Generate", show_default=True, help="The gRPC method that the body belongs to.")
@click.option("--direction", type=click.Choice(("request", "response")), default="response", show_default=True)
@_input
@_encoding
@_file
def decode(dialect: str, snapshot: str | None, method: str, direction: str, input_form: str, grpc_encoding: str, file: Any) -> None:
    """Show any captured gRPC body: a JSON line for each frame, and what is wrong with it."""
    schema = snapshots.load(dialect, snapshot)
    service = next((name for name in schema.services if schema.has_method(name, method)), None)
    if service is None:
        raise UsageError(f"{schema} has no method {method!r}")
    found = schema.method(service, method)
    message_type = found.request if direction == "request" else found.response
    fault = None
    for frame in _frames(_read(file, input_form), message_type, grpc_encoding):
        click.echo(json.dumps(frame, ensure_ascii=False))
        fault = fault or frame.get("error")
    if fault:
        sys.stdout.flush()
        raise UsageError(fault)


def _make_transcoder(*, tokenizer: str, max_model_len: int | None, **options: Any) -> Transcoder:
    from ..tokenizer_sources import load_tokenizer  # needs the extra `tokenizers`, which `decode` does without

    loaded = load_tokenizer(tokenizer)
    model = ModelInfo(max_model_len=max_model_len or loaded.max_model_len or 0, vocab_size=loaded.vocab_size)
    return Transcoder(tokenizer=loaded, model=model, **options)


def _read(file: Any, input_form: str) -> bytes:
    data: bytes = file.read()
    if input_form == "frames":
        return data
    try:
        return bytes.fromhex(data.decode("ascii"))
    except ValueError:
        raise UsageError("the input is not hexadecimal digits") from None


def _write(data: bytes) -> None:
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


def _frames(data: bytes, message_type: type[Message], encoding: str) -> Iterator[dict[str, Any]]:
    """Each frame as something to print; after what cannot be a frame, the rest of the bytes in one last piece."""
    offset = 0
    while offset < len(data):
        head = data[offset : offset + HEADER_BYTES]
        shown: dict[str, Any] = {"offset": offset}
        end = len(data)
        if len(head) == HEADER_BYTES:
            length = int.from_bytes(head[1:], "big")
            shown |= {"flag": head[0], "length": length}
            if head[0] <= 1:
                end = min(end, offset + HEADER_BYTES + length)
        piece = data[offset:end]
        try:
            payload = _payload(piece, offset, encoding)
            message = message_type.FromString(payload)
        except CodecError as error:
            shown |= {"error": error.message.replace("frame at offset 0", f"frame at offset {offset}"), "hex": _hex(piece)}
        except DecodeError:
            shown |= {
                "error": f"frame at offset {offset}: the payload is no {message_type.DESCRIPTOR.full_name}",
                "hex": _hex(piece[HEADER_BYTES:]),
            }
        else:
            shown["message"] = _as_dict(message)
            unknown = list(_unknown_fields(message, ()))
            if unknown:
                shown["unknown_fields"] = unknown
        yield shown
        offset = end


def _payload(piece: bytes, offset: int, encoding: str) -> bytes:
    decoder = FrameDecoder(encoding=encoding)
    for payload in decoder.receive_data(piece):
        return payload
    decoder.receive_eof()
    raise UsageError(f"frame at offset {offset}: nothing to decode")


def _as_dict(message: Message) -> dict[str, Any]:
    pool: Any = message.DESCRIPTOR.file.pool
    try:
        decoded: dict[str, Any] = json_format.MessageToDict(message, preserving_proto_field_name=True, descriptor_pool=pool)
    except json_format.SerializeToJsonError:  # NaN or infinity in a Struct, which JSON has not
        return {"textproto": text_format.MessageToString(message, as_one_line=True)}
    return decoded


def _unknown_fields(message: Message, path: Sequence[str]) -> Iterator[dict[str, Any]]:
    fields: Any = UnknownFieldSet(message)
    for field in fields:
        value = _hex(field.data) if isinstance(field.data, bytes) else field.data if isinstance(field.data, int) else "group"
        yield {
            "in": ".".join(path) or message.DESCRIPTOR.name,
            "number": field.field_number,
            "wire_type": _WIRE_TYPES[field.wire_type],
            "value": value,
        }
    for descriptor, value in message.ListFields():
        nested = descriptor.message_type
        if nested is None or nested.GetOptions().map_entry:
            continue
        for child in (value,) if isinstance(value, Message) else value:
            yield from _unknown_fields(child, (*path, descriptor.name))


def _hex(data: bytes) -> str:
    return data[:_SHOWN_BYTES].hex() + (f"... ({len(data)} bytes)" if len(data) > _SHOWN_BYTES else "")
