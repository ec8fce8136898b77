"""A data plane for tests of `Processor`: messages as Envoy sends them, and what it would make of the answers."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

from gaie_codec import (
    Event,
    FinishEvent,
    InferenceRequest,
    Limits,
    ModelInfo,
    Observer,
    SamplingParams,
    TokensEvent,
    Transcoder,
    adapters,
    encode_frame,
    snapshots,
)
from gaie_codec._conventions import Teller
from gaie_codec.ext_proc.gateway import Gateway
from gaie_codec.ext_proc.messages import ProcessingMode, ProcessingRequest
from gaie_codec.ext_proc.picking import Candidate, Picker
from gaie_codec.ext_proc.processor import Processor
from gaie_codec.tokenizer_sources import load_tokenizer
from strategies import frames_of

TOKENIZER = load_tokenizer("builtin")
CHAT = "/v1/chat/completions"
JSON = "application/json"
GRPC = "application/grpc"
FULL_DUPLEX = ProcessingMode.FULL_DUPLEX_STREAMED
GRPC_HEAD = ((":status", "200"), ("content-type", GRPC))
OK = (("grpc-status", "0"),)


class FakeServer:
    """A model server as the processor sees one; `dialect` "http" is one without gRPC."""

    def __init__(self, address: str = "10.0.0.1:50051", dialect: str = "vllm.engine", **options: Any) -> None:
        self.address = address
        self.dialect = dialect
        self.transcoder, self.observer = (None, None) if dialect == "http" else codecs(dialect, **options)

    def candidate(self) -> Candidate:
        return Candidate(address=self.address, dialect=self.dialect)


@cache
def codecs(dialect: str, **options: Any) -> tuple[Transcoder, Observer]:
    """Servers that are alike share them."""
    model = ModelInfo(served_model_name="m", max_model_len=100_000)
    return Transcoder(dialect, tokenizer=TOKENIZER, model=model, limits=Limits(max_calls=1), **options), Observer(dialect)


def first(_: InferenceRequest, candidates: Sequence[Candidate]) -> Sequence[Candidate]:
    return candidates


def gateway(*servers: FakeServer, picker: Picker | None = first, **options: Any) -> Gateway:
    return Gateway(**{"servers": lambda: servers, "picker": picker, **options})


SERVER = FakeServer()
GATEWAY = gateway(SERVER)


def chat(**fields: Any) -> bytes:
    return json.dumps({"messages": [{"role": "user", "content": "Hi"}], **fields}).encode()


def headers_message(kind: str, headers: Iterable[tuple[str, str]], *, end: bool = False) -> Any:
    message = ProcessingRequest()
    part = getattr(message, kind)
    part.SetInParent()
    for name, value in headers:
        (part.trailers if kind.endswith("trailers") else part.headers).headers.add(key=name, raw_value=value.encode("latin-1"))
    if end:
        part.end_of_stream = True
    return message


def body_message(kind: str, data: bytes = b"", *, end: bool = False) -> Any:
    message = ProcessingRequest()
    part = getattr(message, kind)
    part.body, part.end_of_stream = data, end
    return message


class Answered:
    """What became of a request or a response: as Envoy would send it on."""

    def __init__(self) -> None:
        self.headers: dict[str, str] | None = None
        self.removed: set[str] = set()
        self.body = b""
        self.ended = False
        self.trailers: dict[str, str] | None = None
        self.removed_trailers: set[str] = set()
        self.reroutes = False


class Stream:
    """Plays a stream. `request` and `response` are what the answers said so far; `immediate` is an answer in the place of all."""

    def __init__(self, gateway: Gateway = GATEWAY, *, mode: Any = FULL_DUPLEX, response_mode: Any = None, **options: Any) -> None:
        self.processor = Processor(gateway, **{"own_id": "own", "created": 1, **options})
        self.modes = (mode, mode if response_mode is None else response_mode)
        self.request, self.response = Answered(), Answered()
        self.immediate: Any = None
        self.metadata: dict[str, Any] = {}
        self.answers: list[Any] = []
        self._is_first = True

    def send(self, message: Any, *, metadata: dict[str, Any] | None = None) -> list[Any]:
        if self._is_first:
            self._is_first = False
            if self.modes[0] is not None:
                message.protocol_config.request_body_mode, message.protocol_config.response_body_mode = self.modes
        for name, value in (metadata or {}).items():
            message.metadata_context.filter_metadata[name].update(value)
        return self.take(self.processor.receive(message))

    def take(self, answers: Iterable[Any]) -> list[Any]:
        taken = list(answers)
        for answer in taken:
            assert self.immediate is None, "an answer after an ImmediateResponse"
            self._take(answer)
        self.answers += taken
        return taken

    def _take(self, answer: Any) -> None:
        assert not answer.HasField("mode_override")
        if answer.HasField("dynamic_metadata"):
            self.metadata = {name: dict(value.struct_value.items()) for name, value in answer.dynamic_metadata.fields.items()}
        kind = answer.WhichOneof("response")
        if kind == "immediate_response":
            self.immediate = answer.immediate_response
            return
        way = self.request if kind.startswith("request") else self.response
        assert not way.ended, f"{kind} after the end"
        if kind.endswith("_headers"):
            assert way.headers is None, "headers twice"
            way.headers = mutated(answer, kind, way.removed)
            common = getattr(answer, kind).response
            way.reroutes = common.clear_route_cache
            if common.status == common.CONTINUE_AND_REPLACE:
                way.body, way.ended = common.body_mutation.body, True
        elif kind.endswith("_body"):
            mutation = getattr(answer, kind).response.body_mutation
            mode = self.modes[0] if way is self.request else self.modes[1]
            if mode == ProcessingMode.BUFFERED:
                common = getattr(answer, kind).response
                if common.HasField("header_mutation"):
                    way.headers = mutated(answer, kind, way.removed)
                way.body += mutation.body
                return
            assert mutation.WhichOneof("mutation") == "streamed_response"
            assert way.headers is not None, "a body before headers"
            assert way.trailers is None, "a body after trailers"
            assert len(mutation.streamed_response.body) <= 62000
            way.body += mutation.streamed_response.body
            way.ended = mutation.streamed_response.end_of_stream
        else:
            assert way.headers is not None, "trailers before headers"
            way.trailers = mutated(answer, kind, way.removed_trailers)

    def ask(
        self,
        body: bytes | Iterable[bytes] = b"",
        *,
        path: str = CHAT,
        method: str = "POST",
        content_type: str = JSON,
        headers: Iterable[tuple[str, str]] = (),
        metadata: dict[str, Any] | None = None,
    ) -> Stream:
        """The request: headers, then body pieces, the last of which ends it; a method without a body ends with its headers."""
        pieces = [body] if isinstance(body, bytes) else list(body)
        head = [(":method", method), (":scheme", "http"), (":path", path), (":authority", "gw")]
        head += [("content-type", content_type)] if content_type else []
        bodyless = method in ("GET", "HEAD")
        self.send(headers_message("request_headers", (*head, *headers), end=bodyless), metadata=metadata)
        if not bodyless:
            for place, piece in enumerate(pieces):
                self.send(body_message("request_body", piece, end=place == len(pieces) - 1), metadata=metadata)
        return self

    def answer(
        self,
        pieces: Iterable[bytes] = (),
        *,
        headers: Iterable[tuple[str, str]] = GRPC_HEAD,
        trailers: Iterable[tuple[str, str]] | None = OK,
        metadata: dict[str, Any] | None = None,
    ) -> Stream:
        """The response. Without trailers the last piece ends it, and without pieces the headers do."""
        left = list(pieces)
        self.send(headers_message("response_headers", headers, end=not left and trailers is None), metadata=metadata)
        for place, piece in enumerate(left):
            self.send(body_message("response_body", piece, end=trailers is None and place == len(left) - 1))
        if trailers is not None:
            self.send(headers_message("response_trailers", trailers))
        return self


def mutated(answer: Any, kind: str, removed: set[str]) -> dict[str, str]:
    part = getattr(answer, kind)
    mutation = part.header_mutation if kind.endswith("trailers") else part.response.header_mutation
    removed.update(mutation.remove_headers)
    found = {}
    for option in mutation.set_headers:
        assert option.append_action == option.OVERWRITE_IF_EXISTS_OR_ADD
        assert option.header.key not in found, "set twice"
        found[option.header.key] = option.header.raw_value.decode("latin-1")
    assert not found.keys() & removed, "set and removed"
    return found


def frames(events: Iterable[Event], dialect: str = "vllm.engine") -> bytes:
    return frames_of(adapters.get(snapshots.load(dialect)), events)


def answer_frames(text: str, dialect: str = "vllm.engine", *, prompt_tokens: int = 10) -> list[bytes]:
    """A streamed answer as a server of the dialect tells it, a frame a piece."""
    adapter = adapters.get(snapshots.load(dialect))
    teller = Teller(adapter.convention, InferenceRequest(request_id="1", stream=True), sends_text=adapter.sends_text)
    events = []
    detokenizer = TOKENIZER.detokenizer((), skip_special_tokens=True)
    for token in TOKENIZER.encode(text, add_special_tokens=False):
        events += teller.gain(TokensEvent(token_ids=[token], text=detokenizer.decode([token]), prompt_tokens=prompt_tokens))
    events += teller.finish(FinishEvent(finish_reason="stop", prompt_tokens=prompt_tokens), last=None)
    return [frames([event], dialect) for event in events]


HI = TOKENIZER.encode("Hi there", add_special_tokens=False)
EVENTS = (
    TokensEvent(token_ids=HI[:1], prompt_tokens=10),
    TokensEvent(token_ids=HI[1:], prompt_tokens=10),
    FinishEvent(token_ids=HI[1:], finish_reason="stop", prompt_tokens=10),
)
ANSWER = frames(EVENTS)
GENERATE = "/vllm.grpc.engine.VllmEngine/Generate"
BUFFERED = ProcessingMode.BUFFERED


def grpc_request(dialect: str = "vllm.engine", **fields: object) -> tuple[str, bytes]:
    adapter = adapters.get(snapshots.load(dialect))
    request = InferenceRequest(request_id="c1", prompt_token_ids=[1, 2, 3], sampling=SamplingParams(temperature=0.5), **fields)
    return adapter.path_for(request), encode_frame(adapter.encode_request(request).SerializeToString())
