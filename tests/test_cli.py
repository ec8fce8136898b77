"""`gaie-codec transcode`, as a process: files in, bytes and text out, exit status 2 and one line for wrong input."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from pathlib import Path

import pytest
from smg_grpc_proto.generated import vllm_engine_pb2 as pb

from gaie_codec import encode_frame

GOLDEN = Path(__file__).parent / "golden"
MODEL = str(GOLDEN / "model")
CASE = json.loads((GOLDEN / "vllm" / "chat_hello_stream.json").read_text())
REQUEST = json.dumps(CASE["http"]["request"]).encode()


def run(*arguments: str, data: bytes = b"", status: int = 0) -> tuple[bytes, str]:
    done = subprocess.run([sys.executable, "-m", "gaie_codec.cli", *arguments], input=data, capture_output=True, timeout=60)
    assert done.returncode == status, done.stderr.decode()
    return done.stdout, done.stderr.decode()


def transcode(command: str, *arguments: str, data: bytes = b"", status: int = 0) -> tuple[bytes, str]:
    return run("transcode", command, "--dialect", "vllm.engine", *arguments, data=data, status=status)


def fault(command: str, *arguments: str, data: bytes = b"") -> str:
    """The one line on stderr."""
    _, errors = transcode(command, *arguments, data=data, status=2)
    assert errors.startswith("gaie-codec: ")
    assert errors.count("\n") == 1
    return errors


FRAMES = b"".join(
    encode_frame(pb.GenerateResponse(**{kind: value}).SerializeToString())
    for kind, value in [
        ("chunk", pb.GenerateStreamChunk(token_ids=[42], prompt_tokens=15, completion_tokens=1)),
        ("complete", pb.GenerateComplete(output_ids=[2], finish_reason="stop", completion_tokens=1)),
    ]
)


class TestRequest:
    def test_frame_is_what_the_published_stubs_read(self) -> None:
        frame, _ = transcode("request", "--tokenizer", MODEL, "--max-model-len", "2048", "--output", "frame", data=REQUEST)
        message, _ = transcode("request", "--tokenizer", MODEL, "--max-model-len", "2048", "--output", "message", data=REQUEST)
        assert frame == encode_frame(message)
        parsed = pb.GenerateRequest.FromString(message)
        assert list(parsed.tokenized.input_ids) == CASE["grpc_vllm"][0]["request"]["tokenized"]["input_ids"]
        assert parsed.sampling_params.max_tokens == 2033

    def test_flavor(self) -> None:
        message, _ = transcode("request", "--tokenizer", MODEL, "--flavor", "sglang", "--output", "message", data=REQUEST)
        assert pb.GenerateRequest.FromString(message).request_id == "golden"

    def test_readable_forms(self, tmp_path: Path) -> None:
        file = tmp_path / "request.json"
        file.write_bytes(REQUEST)
        shown = json.loads(transcode("request", str(file))[0])
        assert shown["request_id"] == "chatcmpl-golden"
        assert b'request_id: "chatcmpl-golden"' in transcode("request", "--output", "textproto", str(file))[0]
        frame, _ = transcode("request", "--output", "frame", str(file))
        assert bytes.fromhex(transcode("request", "--output", "hex", str(file))[0].decode()) == frame

    def test_several_calls(self) -> None:
        body = b'{"messages":[{"role":"user"}],"n":2}'
        old = ("--snapshot", "intree-0.14.0")
        shown = transcode("request", *old, "--output", "frame", data=body)[0]
        lines = [json.loads(line) for line in transcode("decode", *old, "--direction", "request", data=shown)[0].splitlines()]
        assert [line["message"]["request_id"] for line in lines] == ["chatcmpl-0-0", "chatcmpl-0-1"]
        assert "takes 2 calls" in fault("request", *old, "--output", "message", data=body)

    def test_each_call_is_answered_by_a_file(self, tmp_path: Path) -> None:
        file, frames = tmp_path / "request.json", tmp_path / "frames.bin"
        file.write_bytes(b'{"messages":[{"role":"user"}],"n":2}')
        frames.write_bytes(FRAMES)
        asked = ("response", "--snapshot", "intree-0.14.0", "--request", str(file))
        assert "takes 2 calls, and there are responses to 1" in fault(*asked, data=FRAMES)
        choices = json.loads(transcode(*asked, str(frames), str(frames))[0])["choices"]
        assert [choice["index"] for choice in choices] == [0, 1]
        assert choices[0]["message"] == choices[1]["message"]

    def test_passed_through_or_not(self) -> None:
        body = b'{"messages":[{"role":"user","content":"hi"}],"max_tokens":5}'
        asked = ("transcode", "request", "--dialect", "sglang.runtime")
        assert json.loads(run(*asked, data=body)[0]) == {"json_body": base64.b64encode(body).decode()}
        typed = json.loads(run(*asked, "--no-passthrough", data=body)[0])
        assert (typed["rid"], typed["sampling_params"]["max_new_tokens"]) == ("chatcmpl-0", 5)

    @pytest.mark.parametrize(
        ("body", "named"),
        [
            (b"", "body"),
            (b"{", "body.1"),
            (b"[]", "body"),
            (b'{"messages": 3}', "body.messages"),
            (b'{"messages": [], "temperature": "hot"}', "body.temperature"),
            (b'{"messages": [{"role": "user"}], "temperature": "hot"}', "body.temperature"),
            (b'{"messages": [{"role": "user"}], "top_p": 7}', "top_p"),
            (b'{"messages": [{"role": "user"}], "use_beam_search": true}', "use_beam_search"),
        ],
    )
    def test_wrong_input_names_the_field(self, body: bytes, named: str) -> None:
        assert named in fault("request", data=body)

    def test_wrong_options(self) -> None:
        assert "no such directory" in fault("request", "--tokenizer", "/no/such", data=REQUEST)
        assert "no snapshot 'x'" in fault("request", "--snapshot", "x", data=REQUEST)
        assert "No such file" in fault("request", "/no/such/file")
        assert "does not exist" in fault("request", "--path", "/v1/nothing", data=REQUEST)


class TestResponse:
    @pytest.fixture
    def request_file(self, tmp_path: Path) -> str:
        file = tmp_path / "request.json"
        file.write_bytes(REQUEST)
        return str(file)

    def test_stream_as_a_client_gets_it(self, request_file: str) -> None:
        arguments = ("--tokenizer", MODEL, "--request", request_file, "--id", "x", "--created", "5")
        body, _ = transcode("response", *arguments, data=FRAMES)
        events = body.decode().split("\n\n")
        assert events[-2:] == ["data: [DONE]", ""]
        first = json.loads(events[0].removeprefix("data: "))
        assert (first["id"], first["created"]) == ("x", 5)
        assert transcode("response", *arguments, "--input", "hex", data=FRAMES.hex().encode())[0] == body

    def test_status_of_the_trailers(self, request_file: str) -> None:
        arguments = ("--request", request_file, "--grpc-status", "3", "--grpc-message", "too%20long")
        body, errors = transcode("response", *arguments, "--include")
        head, _, rest = body.decode().partition("\n\n")
        assert head.startswith("HTTP 400\ncontent-type: application/json\n")
        assert json.loads(rest)["error"]["message"] == "too long"
        assert errors == "gaie-codec: INVALID_ARGUMENT: too long\n"

    def test_missing_finish(self, request_file: str) -> None:
        body, errors = transcode("response", "--request", request_file, data=b"")
        assert json.loads(body)["error"]["code"] == 502
        assert "before 1 of 1 choices had finished" in errors

    def test_bad_bytes_are_an_error_with_their_offset(self, request_file: str) -> None:
        body, errors = transcode("response", "--request", request_file, data=FRAMES[:14] + b"g" + FRAMES[15:], status=2)
        assert b'"code":502' in body
        assert errors == "gaie-codec: frame at offset 14: flag is 103, not 0 or 1\n"
        body, errors = transcode("response", "--request", request_file, data=FRAMES[:-1], status=2)
        assert "the stream ended after" in errors
        assert "not hexadecimal" in fault("response", "--request", request_file, "--input", "hex", data=b"zz")


class TestDecode:
    def test_frames_with_offsets_and_unknown_fields(self) -> None:
        unknown = bytes.fromhex("0a070a012a10031801a2060568656c6c6f980607")
        lines = [json.loads(line) for line in transcode("decode", data=encode_frame(unknown) + FRAMES)[0].splitlines()]
        assert [line["offset"] for line in lines] == [0, 25, 25 + 5 + lines[1]["length"]]
        assert [(field["number"], field["value"]) for field in lines[0]["unknown_fields"]] == [(100, "68656c6c6f"), (99, 7)]
        assert lines[2]["message"]["complete"]["finish_reason"] == "stop"

    @pytest.mark.parametrize(
        ("data", "shown"),
        [
            (FRAMES + b"garbage", "flag is 103"),
            (FRAMES[:-3], "the stream ended after"),
            (encode_frame(b"\xff\xff\xff\xff"), "the payload is no vllm.grpc.engine.GenerateResponse"),
            (b"\x01\x00\x00\x00\x01x", "compressed, but grpc-encoding is 'identity'"),
        ],
    )
    def test_what_is_wrong_is_shown(self, data: bytes, shown: str) -> None:
        lines, errors = transcode("decode", data=data, status=2)
        assert shown in json.loads(lines.splitlines()[-1])["error"]
        assert shown in errors

    def test_frames_after_a_bad_payload_are_shown(self) -> None:
        lines, _ = transcode("decode", data=encode_frame(b"\xff") + FRAMES, status=2)
        assert ["error" in json.loads(line) for line in lines.splitlines()] == [True, False, False]

    def test_requests_and_other_methods(self) -> None:
        frame, _ = transcode("request", "--output", "frame", data=REQUEST)
        shown = json.loads(transcode("decode", "--direction", "request", data=frame)[0])
        assert shown["message"]["request_id"] == "chatcmpl-golden"
        info = encode_frame(pb.GetModelInfoResponse(served_model_name="m").SerializeToString())
        assert json.loads(transcode("decode", "--method", "GetModelInfo", data=info)[0])["message"] == {"served_model_name": "m"}
        assert "no method 'Nope'" in fault("decode", "--method", "Nope")

    def test_compressed(self) -> None:
        frame = encode_frame(pb.GenerateResponse(chunk=pb.GenerateStreamChunk(token_ids=[7])).SerializeToString(), encoding="gzip")
        shown = json.loads(transcode("decode", "--grpc-encoding", "gzip", data=frame)[0])
        assert shown["message"] == {"chunk": {"token_ids": [7]}}


def test_help_and_version() -> None:
    assert b"transcode" in run("--help")[0]
    assert b"gaie-codec" in run("--version")[0]
    _, errors = run(status=2)
    assert "Usage" in errors
