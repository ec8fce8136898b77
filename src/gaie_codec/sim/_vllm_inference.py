"""`vllm.Inference` and `vllm.Control`, before vLLM 0.27 `vllm.Generate` alone: vLLM's own Rust front end.

What releases do differently was seen with the real binaries, release by release. The control of weights and sleep is not simulated.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import msgspec

from .. import Code, CodecError, FinishEvent, InferenceRequest, MalformedRequestError, ModelInfo, PromptEvent, TokensEvent
from ..snapshots import SNAPSHOTS
from ._engine import StatusError
from ._front import Event, Front, Habits, Step, check_prompt
from ._services import Services, server_info

if TYPE_CHECKING:
    from ..adapters.base import Adapter
    from ._engine import Engine

CONTROL = "vllm.Control"
_MAX_LOGPROBS: Final = 20
_RANK: Final = "x-data-parallel-rank"
# The codes that the front end makes of an engine's own kinds of failure; any other is INTERNAL.
_TOLD_CODES: Final = (Code.UNAVAILABLE, Code.INVALID_ARGUMENT)


class _Front(Front):
    habits = Habits(sends_text=True, names_eos=True)

    def __init__(self, adapter: Adapter, request: InferenceRequest, message: Any, engine: Engine) -> None:
        super().__init__(adapter, request)
        self._message = message
        self._engine = engine
        self._has_gained = self._has_ended = False
        # An end by another of the model's end tokens is told as one by a stop token.
        self._eos_token_id = next(iter(engine.model.eos_token_ids), None)

    def check(self, token_ids: Sequence[int], model: ModelInfo) -> None:
        request, params, message = self.request, self.request.sampling, self._message
        if message.WhichOneof("prompt") is None:
            raise MalformedRequestError("prompt is required")
        if params.n > 1:
            raise MalformedRequestError("num_sequences > 1 is not supported")
        if not model.serves(request.model):
            raise StatusError(Code.NOT_FOUND, f"model `{request.model}` not found")
        if "" in params.stop:
            if not since(self.adapter, "0.28.0"):
                raise StatusError(Code.UNAVAILABLE, "Socket closed")  # the process of the server is gone
            raise MalformedRequestError(f"text request `{request.request_id}` stop strings cannot be empty")
        if request.lora_name and not model.lora_adapters:
            raise StatusError(Code.FAILED_PRECONDITION, "engine was not started with LoRA enabled")
        if request.lora_name and request.lora_name not in model.lora_adapters:
            raise StatusError(Code.NOT_FOUND, f"LoRA adapter `{request.lora_name}` is not loaded")
        self._check_ranges()
        check_prompt(token_ids, model)

    def _check_ranges(self) -> None:
        params, random = self.request.sampling, self._message.sampling
        temperature = self._message.temperature
        if since(self.adapter, "0.27.1") and not 0 <= temperature <= 2:
            kind = "in [0, 2]" if math.isfinite(temperature) else "a finite number"
            raise MalformedRequestError(f"temperature must be {kind}, got {temperature:g}")
        has_presence = since(self.adapter, "0.32.0")
        if not 0 <= random.top_p <= 1 or (has_presence and random.HasField("top_p") and random.top_p == 0):
            raise MalformedRequestError(f"top_p must be in (0, 1], got {random.top_p:g}")
        for name in ("presence_penalty", "frequency_penalty"):
            if not -2 <= getattr(params, name) <= 2:
                raise MalformedRequestError(f"{name} must be in [-2, 2], got {getattr(params, name):g}")
        if params.max_tokens is not None and params.max_tokens < params.min_tokens:
            raise MalformedRequestError(f"`min_tokens` must be less than or equal to `max_tokens`, got {params.min_tokens}")
        if params.logprobs is not None and params.logprobs > _MAX_LOGPROBS:
            raise MalformedRequestError(
                f"requested logprobs of {params.logprobs}, which is greater than max allowed: {_MAX_LOGPROBS}", param="logprobs"
            )

    def tell(self, step: Step) -> Sequence[Event]:
        is_only = step.end is not None and not self._has_gained and len(step.gained.token_ids) <= 1
        if is_only and not step.gained.text and not since(self.adapter, "0.26.0"):
            # Seen in 0.22.1 to 0.25.1: an answer that ends with its first token has the text of the prompt.
            step = msgspec.structs.replace(step, gained=msgspec.structs.replace(step.gained, text=self._prompt_text()))
        self._has_gained = self._has_gained or bool(step.gained.token_ids)
        self._has_ended = self._has_ended or step.end is not None
        return super().tell(step)

    def _prompt_text(self) -> str:
        request = self.request
        return request.prompt_text or self._engine.tokenizer.detokenizer(()).decode(request.prompt_token_ids)

    def fail(self, error: CodecError, running: Sequence[int], sent: int) -> Sequence[Event]:
        if since(self.adapter, "0.33.0") and error.code in _TOLD_CODES:
            raise error
        if since(self.adapter, "0.30.0"):
            raise StatusError(Code.INTERNAL, "engine failed during generation")
        return [] if self._has_ended else self.teller.finish(FinishEvent(finish_reason="abort"), last=TokensEvent())

    def encode(self, event: Event) -> Any:
        """The event as a message that has what the request wants, and no more."""
        options, eos = self._message.response, None
        if isinstance(event, FinishEvent) and event.matched_stop is not None and event.matched_stop == self._eos_token_id:
            eos, event = self._eos_token_id, msgspec.structs.replace(event, matched_stop=None)
        message: Any = self.adapter.encode_response(event)
        if isinstance(event, PromptEvent):
            return message
        output = message.outputs
        if options.HasField("output_text") and not options.output_text:
            output.text = ""
        if not options.output_token_ids:
            del output.token_ids[:]
        if not options.output_candidates.top_n and since(self.adapter, "0.30.0"):
            for row in output.candidate_tokens:
                del row.tokens[:]
        if eos is not None:
            output.finish_info.eos_token_id = eos
        return message


def since(adapter: Adapter, release: str) -> bool:
    """Whether the snapshot is that of a release, or of a later one."""
    order = SNAPSHOTS["vllm.inference"]
    name = adapter.snapshot.name
    return name not in order or order.index(name) >= order.index(release)


def services(adapter: Adapter, engine: Engine) -> Services:
    """Generate, GenerateStream, and the questions of Control."""
    snapshot = adapter.snapshot
    stream_path, unary_path = adapter.generate_paths
    service = stream_path.split("/")[1]

    def front_for(message: Any, context: Any, *, streams: bool) -> _Front:
        request = adapter.decode_request(message)
        rank = dict(context.invocation_metadata()).get(_RANK, "") if "data_parallel_rank" in adapter.carries else ""
        if rank and not rank.isdecimal():
            raise MalformedRequestError(f"{_RANK} is no rank")
        request = msgspec.structs.replace(request, stream=streams, data_parallel_rank=int(rank) if rank else None)
        return _Front(adapter, request, message, engine)

    async def generate_stream(message: Any, context: Any) -> None:
        front = front_for(message, context, streams=True)

        async def send(event: Event) -> None:
            await context.write(front.encode(event))

        await engine.generate(front.request, front, send)

    async def generate(message: Any, context: Any) -> Any:
        front = front_for(message, context, streams=False)
        told: list[Any] = []

        async def send(event: Event) -> None:
            told.append(front.encode(event))

        await engine.generate(front.request, front, send)
        return told[-1] if told else snapshot.method_at(unary_path).response()

    def control(name: str) -> Any:
        return adapter.encode_model_info(engine.model)[f"/{CONTROL}/{name}"]

    async def get_server_info(_message: Any, _: Any) -> Any:
        answer = control("GetServerInfo")
        answer.MergeFrom(server_info(adapter, engine, type(answer)()))
        answer.engine_version = engine.model.server_version or snapshot.name
        answer.api_version = "vllm"
        answer.instance_id = "sim"
        if snapshot.has_field("ServerInfo", "proto_version"):
            answer.proto_version = "0.6.0"
        return answer

    async def get_model_info(_message: Any, _: Any) -> Any:
        return control("GetModelInfo")

    async def list_loras(_message: Any, _: Any) -> Any:
        if not engine.model.lora_adapters:
            raise StatusError(Code.FAILED_PRECONDITION, "engine was not started with LoRA enabled")
        return control("ListLoras")

    async def abort(message: Any, _: Any) -> Any:
        engine.abort(message.request_ids)
        return snapshot.method(CONTROL, "Abort").response()

    methods: dict[str, dict[str, Any]] = {service: {"GenerateStream": generate_stream, "Generate": generate}}
    if CONTROL not in snapshot.services:
        return Services(methods=methods)
    methods[CONTROL] = {
        "GetServerInfo": get_server_info,
        "GetModelInfo": get_model_info,
        "ListLoras": list_loras,
        "Abort": abort,
    }
    return Services(methods=methods, has_health=True)
