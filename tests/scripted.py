"""Model servers that say what a test tells them: in place of the connection, and over real gRPC."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import io
import zipfile
from importlib import resources

import grpc
import grpc.aio

from gaie_codec import Code, FinishEvent, ModelInfo, TokensEvent, Transcoder
from gaie_codec.tokenizer_sources import load_tokenizer
from gaie_codec.upstream import Upstream

TOKENIZER = load_tokenizer("builtin")
MODEL = ModelInfo(served_model_name="tiny", max_model_len=4096, vocab_size=TOKENIZER.vocab_size)
ADAPTER = Transcoder("vllm.engine", tokenizer=TOKENIZER).adapter
SERVICE = "vllm.grpc.engine.VllmEngine"
IDS = TOKENIZER.encode("Hello world", add_special_tokens=False)

WHOLE = [FinishEvent(token_ids=IDS, finish_reason="stop", prompt_tokens=3, completion_tokens=len(IDS))]
STREAM = [TokensEvent(token_ids=[token], prompt_tokens=3, completion_tokens=1) for token in IDS] + WHOLE


class ScriptedCall:
    """Answers from a list: bytes are messages, an exception is raised, None waits until cancelled, a (Code, str) is the status."""

    def __init__(self, script):
        self.script = list(script)
        self.is_cancelled = False
        self.waiting = asyncio.Event()

    async def read(self):
        step = self.script[0] if self.script else (Code.OK, "")
        if step is None:
            self.waiting.set()
            await asyncio.Event().wait()
        if isinstance(step, tuple):
            return None
        self.script.pop(0)
        if isinstance(step, Exception):
            raise step
        return step

    async def status(self):
        return self.script[0] if self.script else (Code.OK, "")

    def cancel(self):
        self.is_cancelled = True


class ScriptedUpstream(Upstream):
    """One script for every path; `calls` are the calls that were made."""

    def __init__(self, *script):
        self.script = [step if isinstance(step, bytes | tuple | Exception | None) else encode(step) for step in script]
        self.calls = []
        self.asked = []

    def stream(self, path, message, *, metadata=(), timeout_s=None):
        self.asked.append((path, message, tuple(metadata), timeout_s))
        self.calls.append(ScriptedCall(self.script))
        return self.calls[-1]


def encode(event):
    return ADAPTER.encode_response(event).SerializeToString()


class ModelServer(grpc.GenericRpcHandler):
    """`vllm.engine` in raw bytes. Generate with the stop string "forever" ends only when it is `cancelled`."""

    def __init__(self, *, has_tokenizer=True):
        self.has_tokenizer = has_tokenizer
        self.cancelled = asyncio.Event()

    def service(self, details):
        name = details.method.rpartition("/")[2]
        handler = getattr(self, name, None)
        is_there = handler is not None and (name != "GetTokenizer" or self.has_tokenizer)
        return grpc.unary_stream_rpc_method_handler(handler) if is_there else None

    async def GetModelInfo(self, request, context):
        yield ADAPTER.encode_model_info(MODEL)[ADAPTER.info_paths[0]].SerializeToString()

    async def GetTokenizer(self, request, context):
        data = io.BytesIO()
        with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
            for file in (resources.files("gaie_codec") / "_builtin_tokenizer").iterdir():
                if file.name.endswith((".json", ".jinja")):
                    archive.writestr(file.name, file.read_bytes())
        chunk = ADAPTER.snapshot.method(SERVICE, "GetTokenizer").response
        data = data.getvalue()
        half = len(data) // 2
        yield chunk(data=data[:half]).SerializeToString()
        yield chunk(data=data[half:], sha256=hashlib.sha256(data).hexdigest()).SerializeToString()

    async def HealthCheck(self, request, context):
        await context.abort(grpc.StatusCode.CANCELLED, "not by the client")
        yield b""

    async def Generate(self, request, context):
        try:
            for event in STREAM if ADAPTER.request_type.FromString(request).stream else WHOLE:
                yield encode(event)
            if b"forever" in request:
                await asyncio.sleep(60)
        except (asyncio.CancelledError, GeneratorExit):  # the latter where a message was on its way
            self.cancelled.set()
            raise

    async def Echo(self, request, context):
        yield request
        context.set_trailing_metadata((("x-trailer", "t"),))
        await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "100% f\u00fcll")


@contextlib.asynccontextmanager
async def model_server(**options):
    handler = ModelServer(**options)
    server = grpc.aio.server(options=[("grpc.max_receive_message_length", -1)])
    server.add_generic_rpc_handlers((handler,))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield handler, f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


@contextlib.asynccontextmanager
async def connected(target):
    upstream = Upstream(target)
    try:
        yield upstream
    finally:
        await upstream.close()
