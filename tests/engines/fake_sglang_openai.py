"""The OpenAI handlers of `fake_sglang_runtime`: they stand for OpenAIServingChat and its like, and answer in OpenAI form by script.

Requests have been checked by SGLang's own pydantic classes before they come here. There are no logprobs and no tool calls.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import model
import script
from fastapi.responses import JSONResponse, StreamingResponse

KINDS = ("chat", "completion", "embedding", "classify", "score", "rerank")


def strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from strings(part)


class Handler:
    """One endpoint. `handle_request` is what grpc_bridge.py calls."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    async def handle_request(self, request: Any, http: Any) -> Any:
        body = request.model_dump(exclude_none=True)
        script.log("request", kind=self.kind, headers=getattr(http.headers, "_data", None), body=body)
        prompt = "\n".join(strings([body.get(key) for key in ("messages", "prompt", "input", "query")]))
        answer = script.find(prompt)
        if "body" in answer:
            return JSONResponse(answer["body"])
        if "error" in answer and not ({"text", "tokens"} & answer.keys()):
            return JSONResponse(self._error(answer), status_code=script.failure(answer)[0])
        head = {"id": "mock-1", "created": int(time.time()), "model": body.get("model", model.NAME)}
        prompt_tokens = len(model.encode(prompt))
        usage = {"prompt_tokens": prompt_tokens, "total_tokens": prompt_tokens}
        if self.kind not in ("chat", "completion"):
            data = [{"object": "embedding", "index": 0, "embedding": [0.5, -1.25, 3.0]}]
            return JSONResponse({**head, "object": "list", "data": data, "usage": usage})
        n = int(body.get("n") or 1)
        steps = list(self._steps(body, answer))
        usage["completion_tokens"] = n * sum(len(step.ids) for step in steps)
        usage["total_tokens"] += usage["completion_tokens"]
        if body.get("stream"):
            return StreamingResponse(self._events(body, answer, head, usage, steps, n, http), media_type="text/event-stream")
        for _ in steps:
            await asyncio.sleep(answer.get("delay", 0))
            if await http.is_disconnected():
                script.log("disconnected", kind=self.kind)
                break
        if steps[-1].finish == "error":
            return JSONResponse(self._error(answer), status_code=script.failure(answer)[0])
        choices = [self._choice(index, steps) for index in range(n)]
        return JSONResponse({**head, "object": self._object(), "choices": choices, "usage": usage})

    def _steps(self, body: dict[str, Any], answer: dict[str, Any]) -> Iterator[script.Step]:
        stop = body.get("stop") or []
        stops = [stop] if isinstance(stop, str) else stop
        eos = () if body.get("ignore_eos") else model.END_TOKENS
        limit = body.get("max_completion_tokens") or body.get("max_tokens")
        return script.hold(script.steps(answer, limit=limit, eos=eos, stop_ids=body.get("stop_token_ids") or (), stops=stops), stops)

    def _object(self, chunk: bool = False) -> str:
        return "chat.completion" + (".chunk" if chunk else "") if self.kind == "chat" else "text_completion"

    def _choice(self, index: int, steps: list[script.Step]) -> dict[str, Any]:
        text, last = text_after(steps), steps[-1]
        part = {"message": {"role": "assistant", "content": text}} if self.kind == "chat" else {"text": text}
        return {"index": index, **part, "logprobs": None, "finish_reason": last.finish, "matched_stop": last.matched}

    async def _events(
        self,
        body: dict[str, Any],
        answer: dict[str, Any],
        head: dict[str, Any],
        usage: dict[str, Any],
        steps: list[script.Step],
        n: int,
        http: Any,
    ) -> AsyncIterator[str]:
        chat = self.kind == "chat"

        def chunk(index: int, part: dict[str, Any], finish: str | None = None) -> str:
            choice = {"index": index, **part, "logprobs": None, "finish_reason": finish}
            return event({**head, "object": self._object(chunk=True), "choices": [choice]})

        if "events" in answer:  # verbatim; no [DONE] is added
            for data in answer["events"]:
                await asyncio.sleep(answer.get("delay", 0))
                yield event(data)
            return
        for index in range(n if chat else 0):
            yield chunk(index, {"delta": {"role": "assistant", "content": ""}})
        sent = ""
        for end, step in enumerate(steps, 1):
            await asyncio.sleep(answer.get("delay", 0))
            if await http.is_disconnected():
                script.log("disconnected", kind=self.kind)
                return
            if step.finish == "error":
                yield event({"error": self._error(answer)})
                break
            text = text_after(steps[:end])
            new, sent = text[len(sent) :], text
            for index in range(n):
                if new:
                    yield chunk(index, {"delta": {"content": new}} if chat else {"text": new})
                if step.finish:
                    yield chunk(index, {"delta": {}} if chat else {"text": ""}, step.finish)
        if (body.get("stream_options") or {}).get("include_usage"):
            yield event({**head, "object": self._object(chunk=True), "choices": [], "usage": usage})
        yield event("[DONE]")

    @staticmethod
    def _error(answer: dict[str, Any]) -> dict[str, Any]:
        status, message = script.failure(answer)
        return {"object": "error", "message": message, "type": "BadRequestError", "param": None, "code": status}


def text_after(steps: list[script.Step]) -> str:
    """The text of all steps as SGLang shows it: without special tokens, and without what stopped it."""
    last = steps[-1]
    ids = [token_id for step in steps for token_id in step.ids]
    if isinstance(last.matched, int):
        ids = ids[:-1]
    text = model.decode(ids, partial=not last.finish, special=False)
    return text[: text.find(last.matched)] if isinstance(last.matched, str) else text


def event(data: Any) -> str:
    return f"data: {data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)}\n\n"
