"""One model server over real gRPC: bytes and status, the questions, and what both shims make of the answers."""

from __future__ import annotations

import asyncio
import contextlib
import socket

import pytest

from gaie_codec import Code, Limits, MalformedMessageError, ModelInfo, Transcoder, UpstreamStatusError, UsageError, adapters, snapshots
from gaie_codec.text.huggingface import HuggingFaceTokenizer
from gaie_codec.tokenizer_sources import read_files
from gaie_codec.upstream import check_health, fetch_model_info, fetch_tokenizer, parse_target
from gaie_codec.upstream.listen import bind
from gaie_codec.upstream.transcoders import TranscoderOptions, Transcoders, complete_model_info
from scripted import ADAPTER, MODEL, TOKENIZER, ScriptedUpstream, connected, model_server


def test_upstream_moves_bytes_and_status():
    large = bytes(5 * 1024 * 1024)

    async def main():
        async with model_server() as (_, target), connected(f"grpc://{target}") as upstream:
            call = upstream.stream("/any/Echo", large)
            assert await call.read() == large
            assert await call.read() is None
            assert await call.status() == (Code.RESOURCE_EXHAUSTED, "100% f\u00fcll")
            call.cancel()
            with pytest.raises(UpstreamStatusError, match="UNIMPLEMENTED"):
                await upstream.unary("/any/Thing", b"", timeout_s=5)
            # A server's CANCELLED is a status and must not look like the cancellation of our own task.
            with pytest.raises(UpstreamStatusError, match="CANCELLED: not by the client"):
                await check_health(upstream, ADAPTER, timeout_s=5)

    asyncio.run(main())


def test_questions():
    async def main():
        async with model_server() as (_, target), connected(target) as upstream:
            assert await fetch_model_info(upstream, ADAPTER) == MODEL
            files = await fetch_tokenizer(upstream, ADAPTER)
            assert "tokenizer.json" in files
        old = Transcoder("vllm.engine", snapshot="intree-0.14.0", tokenizer=TOKENIZER).adapter
        with pytest.raises(UsageError, match="has no GetTokenizer"):
            await fetch_tokenizer(ScriptedUpstream(), old)
        with pytest.raises(MalformedMessageError, match="ended without a sha256"):
            await fetch_tokenizer(ScriptedUpstream(), ADAPTER)
        with pytest.raises(UpstreamStatusError, match="FAILED_PRECONDITION: no path"):
            await fetch_tokenizer(ScriptedUpstream((Code.FAILED_PRECONDITION, "no path")), ADAPTER)
        with pytest.raises(MalformedMessageError, match="without a message"):
            await fetch_model_info(ScriptedUpstream(), ADAPTER)

    asyncio.run(main())


@pytest.mark.parametrize(
    ("target", "parsed"),
    [
        ("grpc://model:50051", "model:50051"),
        ("10.0.0.1:50051", "10.0.0.1:50051"),
        ("grpc://[::1]:50051/", "[::1]:50051"),
        ("http://model:50051", None),
        ("grpcs://model:50051", None),
        ("model", None),
        ("grpc://model", None),
        ("model:0", None),
        ("model:99999", None),
        ("::1:50051", None),
        ("grpc://model:50051/path", None),
        ("", None),
    ],
)
def test_parse_target(target, parsed):
    if parsed is not None:
        assert parse_target(target) == parsed
    else:
        with pytest.raises(UsageError, match="upstream"):
            parse_target(target)


# Listening


def test_bind_takes_the_port_without_listening():
    with contextlib.closing(bind("127.0.0.1:0")) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port))
        listener.listen()
        with (
            socket.create_connection(("127.0.0.1", port)),
            pytest.raises(UsageError, match=f"listen 127.0.0.1:{port}: Address already in use"),
        ):
            bind(f"127.0.0.1:{port}")


@pytest.mark.parametrize("listen", ["8000", "host", "::1:8000", "127.0.0.1:70000", "a b:1"])
def test_bind_refuses_what_is_no_address(listen):
    with pytest.raises(UsageError, match="not of the form HOST:PORT"):
        bind(listen)


# Transcoders


def test_alike_servers_share_a_transcoder_and_a_tokenizer(caplog):
    caplog.set_level("INFO", "gaie_codec.upstream")

    async def main():
        transcoders = Transcoders(TranscoderOptions(limits=Limits(max_calls=3), unsupported="drop"))
        async with model_server() as (_, one), model_server() as (_, two), connected(one) as first, connected(two) as second:
            made = await asyncio.gather(*(transcoders.make(upstream, ADAPTER, MODEL) for upstream in (first, second, first)))
            assert made[0] is made[1] is made[2]
            assert (made[0].limits.max_calls, made[0].unsupported, made[0].model) == (3, "drop", MODEL)
            other = await transcoders.make(second, ADAPTER, ModelInfo(served_model_name="other", max_model_len=4096))
            assert other is not made[0]
            assert other.tokenizer is made[0].tokenizer
            assert transcoders.make_unasked(ADAPTER) is None, "the tokenizer is the server's"

    asyncio.run(main())
    told = [message for message in caplog.messages if "parser" in message]
    assert told == [f"{name}: tool-call parser hermes, reasoning parser none" for name in (*MODEL.names, "other")]


def test_a_tokenizer_that_is_not_the_servers_is_not_asked_for():
    async def main():
        transcoders = Transcoders(TranscoderOptions(tokenizer="builtin"))
        assert transcoders.make_unasked(ADAPTER) is None, "not loaded yet"
        await transcoders.load()
        unasked = transcoders.make_unasked(ADAPTER)
        upstream = ScriptedUpstream()
        assert await transcoders.make(upstream, ADAPTER, ModelInfo()) is unasked
        assert (await transcoders.make(upstream, ADAPTER, MODEL)).tokenizer is unasked.tokenizer
        assert upstream.asked == []
        with pytest.raises(UsageError, match=r"tokenizer \./nowhere"):
            await Transcoders(TranscoderOptions(tokenizer="./nowhere")).load()

    asyncio.run(main())


def test_no_tokenizer_is_needed_where_json_is_passed_through():
    runtime = adapters.get(snapshots.load("sglang.runtime"))

    async def main():
        upstream = ScriptedUpstream()
        upstream.target = "model:1"
        made = await Transcoders(TranscoderOptions()).make(upstream, runtime, ModelInfo())
        assert made.tokenizer is None
        with pytest.raises(UsageError, match=r"no tokenizer from the model server: .*; name another source, such as --tokenizer org/model"):
            await Transcoders(TranscoderOptions(passthrough=False)).make(upstream, runtime, ModelInfo(model_path="org/model"))

    asyncio.run(main())


def test_what_the_server_does_not_tell_of_its_model_is_the_tokenizers():
    files = read_files("builtin") | {"generation_config.json": b'{"temperature": 0.5}'}
    tokenizer = HuggingFaceTokenizer.from_files(files)
    runtime = adapters.get(snapshots.load("sglang.runtime"))
    assert not runtime.advertises_defaults
    bare = complete_model_info(ModelInfo(), tokenizer, runtime, takes_defaults=True)
    assert (bare.max_model_len, bare.default_sampling_params) == (tokenizer.max_model_len, {"temperature": 0.5})
    assert complete_model_info(ModelInfo(), tokenizer, runtime, takes_defaults=False).default_sampling_params == {}
    told = ModelInfo(max_model_len=7, default_sampling_params={"top_p": 0.5})
    assert complete_model_info(told, tokenizer, runtime, takes_defaults=True) == told
    nested = HuggingFaceTokenizer.from_files(files | {"config.json": b'{"is_matryoshka": true, "matryoshka_dimensions": [64, 32]}'})
    learned = complete_model_info(told, nested, runtime, takes_defaults=True)
    assert (learned.is_matryoshka, learned.matryoshka_dimensions) == (True, (32, 64))
