"""ChatComplete, Complete and their like: OpenAI JSON in and out, in SGLang's flavour.

Shapes are those of SGLang's openai/protocol.py. What its request models refuse is INTERNAL with their text; what the serving layer
refuses is a body, whose HTTP status only SGLang 0.5.22 and newer tell.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import msgspec

from .. import BodyEvent, Code, CodecError, FinishEvent, InferenceRequest, ModelInfo, PromptLogprob, TokensEvent
from ._engine import StatusError
from ._front import SGLANG, Event, Front, Step
from ._services import Method
from ._sglang import check_length, check_prompt, check_sampling
from ._sglang_bodies import GENERATIONS, Generation, decode_generation, describe_logprobs, encode_error
from ._sglang_scores import answer_body

if TYPE_CHECKING:
    from ..adapters.base import Adapter, Passthrough
    from ..text import Tokenizer
    from ._engine import Engine

# Their bridge cannot encode the list that reranking gives: read in grpc_bridge.py of 0.5.16 and 0.5.21; 0.5.23 can.
_RERANK_FAILS: Final = ("0.5.16", "0.5.19", "0.5.20", "0.5.21")


class _Front(Front):
    """One answer, of the choices of all prompts of one body: `offset` is the first of those that are told now."""

    habits = msgspec.structs.replace(SGLANG, sends_text=True)

    def __init__(self, adapter: Adapter, request: InferenceRequest, asked: Generation, tokenizer: Tokenizer, *, is_chat: bool) -> None:
        super().__init__(adapter, request)
        self._asked = asked
        self._tokenizer = tokenizer
        self._is_chat = is_chat
        self._created = int(time.time())
        self._counts = {"prompt_tokens": 0, "completion_tokens": 0, "cached_tokens": 0}
        self._roles: set[int] = set()
        self._gained: dict[int, list[TokensEvent]] = {}
        self._ends: dict[int, FinishEvent] = {}
        self.offset = 0
        self.failed = False

    def check(self, token_ids: Sequence[int], model: ModelInfo) -> None:
        check_sampling(self.request.sampling)
        check_prompt(token_ids, model)
        check_length(self.request.sampling, token_ids, model)

    def begin(self, script: Any, prompt_tokens: int, prompt_logprobs: tuple[PromptLogprob, ...] = ()) -> Sequence[Event]:
        self._counts["prompt_tokens"] += prompt_tokens
        self._counts["cached_tokens"] += script.cached_tokens
        return ()

    def tell(self, step: Step) -> Sequence[Event]:
        gained, end = step.gained, step.end
        index = self.offset + gained.index
        self._counts["completion_tokens"] += len(gained.token_ids)
        self._gained.setdefault(index, []).append(gained)
        if end is not None:
            self._ends[index] = end
        if not self.request.stream:
            return ()
        if not self._is_chat:
            return [self._chunk([self._choice(index, {"text": gained.text}, gained, end)])]
        events = []
        if index not in self._roles:
            self._roles.add(index)
            events.append(self._chunk([self._choice(index, {"delta": {"role": "assistant", "content": ""}})]))
        if gained.text or gained.logprobs:
            events.append(self._chunk([self._choice(index, {"delta": {"content": gained.text}}, gained)]))
        return events

    def close(self) -> Sequence[Event]:
        """What comes after all choices have ended."""
        if self.failed:
            return ()
        if not self.request.stream:
            choices = [
                self._choice(index, self._message(parts), _joined(parts), self._ends.get(index))
                for index, parts in sorted(self._gained.items())
            ]
            return [self._body({"choices": choices, "usage": self._usage(), "metadata": {"weight_version": "default"}}, 200)]
        events = []
        if self._is_chat:  # the ends of all choices come together
            events += [self._chunk([self._choice(index, {"delta": {}}, None, end)]) for index, end in sorted(self._ends.items())]
        if (self._asked.stream_options or {}).get("include_usage"):
            events.append(self._chunk([], self._usage()))
        return [*events, BodyEvent(data=b"", is_last=True)]

    def refuse(self, error: CodecError) -> Sequence[Event]:
        return self.fail(error, (), 0)

    def fail(self, error: CodecError, running: Sequence[int], sent: int) -> Sequence[Event]:
        self.failed = True
        body = encode_error(error)
        if sent and self.request.stream:
            return [BodyEvent(data=msgspec.json.encode({"error": body})), BodyEvent(data=b"", is_last=True)]
        return [BodyEvent(data=msgspec.json.encode(body), http_status=body["code"], is_last=True)]

    def abort(self, steps: Sequence[Step]) -> Sequence[Event]:
        raise StatusError(Code.CANCELLED, f"Request aborted: {self.request.request_id}")

    def _message(self, parts: Sequence[TokensEvent]) -> dict[str, Any]:
        text = "".join(part.text or "" for part in parts)
        if not self._is_chat:
            return {"text": text}
        return {"message": {"role": "assistant", "content": text, "reasoning_content": None}}

    def _choice(
        self, index: int, part: dict[str, Any], gained: TokensEvent | None = None, end: FinishEvent | None = None
    ) -> dict[str, Any]:
        if "delta" in part:
            part = {"delta": {"role": None, "content": None, "reasoning_content": None, **part["delta"]}}
        logprobs = describe_logprobs(gained, self._tokenizer, is_chat=self._is_chat) if gained is not None and gained.logprobs else None
        return {
            "index": index,
            **part,
            "logprobs": logprobs,
            "finish_reason": end.finish_reason if end is not None else None,
            "matched_stop": end.matched_stop if end is not None else None,
        }

    def _usage(self) -> dict[str, Any]:
        prompt, completion = self._counts["prompt_tokens"], self._counts["completion_tokens"]
        cached = self._counts["cached_tokens"]
        return {
            "prompt_tokens": prompt,
            "total_tokens": prompt + completion,
            "completion_tokens": completion,
            "prompt_tokens_details": {"cached_tokens": cached} if cached else None,
            "reasoning_tokens": 0,
        }

    def _chunk(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> BodyEvent:
        return self._body({"choices": choices, "usage": usage}, None)

    def _body(self, fields: dict[str, Any], status: int | None) -> BodyEvent:
        kind = "chat.completion" + (".chunk" if self.request.stream else "") if self._is_chat else "text_completion"
        head = {"id": self.request.request_id, "object": kind, "created": self._created, "model": self._asked.model}
        return BodyEvent(data=msgspec.json.encode({**head, **fields}), http_status=status, is_last=status is not None)


def _joined(parts: Sequence[TokensEvent]) -> TokensEvent:
    return msgspec.structs.replace(
        parts[0],
        token_ids=[token_id for part in parts for token_id in part.token_ids],
        logprobs=tuple(entry for part in parts for entry in part.logprobs),
    )


def openai_methods(adapter: Adapter, engine: Engine) -> Mapping[str, Method]:
    """The methods that take OpenAI JSON, by name."""
    way = adapter.passthrough
    assert way is not None
    return {
        path.rpartition("/")[2]: (_generation if kind in GENERATIONS else _unary)(adapter, way, engine, kind, path)
        for kind, path in way.paths.items()
    }


def _generation(adapter: Adapter, way: Passthrough, engine: Engine, kind: str, path: str) -> Method:
    is_chat = kind == "chat"

    async def call(message: Any, context: Any) -> None:
        body, headers = way.decode_request(message)
        try:
            asked = decode_generation(body, kind)
        except ValueError as error:
            raise StatusError(Code.INTERNAL, str(error)) from None
        request = asked.request(f"{len(engine.requests) + 1:032x}", headers, is_chat=is_chat)
        front = _Front(adapter, request, asked, engine.tokenizer, is_chat=is_chat)

        async def send(event: Event) -> None:
            await context.write(way.encode_response(event, path))  # type: ignore[arg-type]

        try:
            prompts = asked.prompts(engine.tokenizer, is_chat=is_chat)
        except CodecError as error:
            for event in front.refuse(error):
                await send(event)
            return
        for number, token_ids in enumerate(prompts):
            front.offset = number * request.sampling.n
            await engine.generate(msgspec.structs.replace(request, prompt_token_ids=token_ids), front, send)
            if front.failed:
                return
        for event in front.close():
            await send(event)

    return call


def _unary(adapter: Adapter, way: Passthrough, engine: Engine, kind: str, path: str) -> Method:
    async def call(message: Any, _: Any) -> Any:
        body, headers = way.decode_request(message)
        number = f"{len(engine.requests) + 1:032x}"
        engine.requests.append(InferenceRequest(request_id=number, trace_headers=headers))
        status, answer = answer_body(kind, body, engine, number)
        if kind == "rerank" and adapter.snapshot.name in _RERANK_FAILS and status == 200:
            status, answer = 500, {"error": {"message": "Object of type RerankResponse is not JSON serializable"}}
        return way.encode_response(BodyEvent(data=msgspec.json.encode(answer), http_status=status, is_last=True), path)

    return call
