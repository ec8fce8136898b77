"""A script and an open call -> one stream, played as Envoy plays it in FULL_DUPLEX_STREAMED.

Envoy waits for little: a request goes out as it comes, and so does its response. What has to be answered first is said here: the
response cannot begin before the request has gone on, and a streaming answer is sent no faster than it is passed on, so that one sees
whether it is.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any, Final

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from ..adapters.base import Adapter
from ..ext_proc.messages import ProcessingMode, ProcessingRequest, ProcessingResponse
from .addresses import LB, SERVED, SUBSET, SUBSET_HINT
from .answers import Pairs, answer
from .exchange import Exchange, streamed
from .scripts import Script
from .transcript import Line, StreamEnd, StreamStart

_CLOSE_S: Final = 2.0
_GONE: Final = (grpc.aio.AioRpcError, asyncio.InvalidStateError)


class Stream:
    """One stream. `log` gets its lines, among those of streams beside it."""

    def __init__(self, call: Any, script: Script, log: list[Line], *, adapter: Adapter, headers: Pairs, timeout_s: float) -> None:
        self._call = call
        self._script = script
        self._log = log
        self._adapter = adapter
        self._headers = headers
        self._timeout_s = timeout_s
        self._lines: list[tuple[int, Line]] = []
        self._news = asyncio.Event()
        self._reader = asyncio.ensure_future(self._read())
        self._end: StreamEnd | None = None
        self._is_first = True
        self._is_refused = False
        self._served = ""

    @property
    def exchange(self) -> Exchange:
        """All that was said so far."""
        return Exchange(self._script.name, self._lines)

    async def play(self, pause: Callable[[], Awaitable[None]] | None = None) -> Exchange:
        """Play it to its end. `pause` is awaited before the message that ends the request."""
        self._note(Line(start=StreamStart(expects=self._script.expects, paced=self._script.answer == "stream")))
        try:
            await self._send_request(pause)
            await self._until(lambda seen: seen.request.is_complete, "the request to go on")
            if self._end is None and not self._is_refused:
                await self._send_response()
            await self._close()
        finally:
            self._call.cancel()
            self._reader.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._reader
        if self._end is not None:
            self._note(Line(end=self._end))
        return self.exchange

    async def _send_request(self, pause: Callable[[], Awaitable[None]] | None) -> None:
        script = self._script
        last = {"nothing": [(b"", True)], "twice": [(b"", True), (b"", True)]}.get(script.ends_with, [])
        pieces = [(piece, False) for piece in script.body]
        if script.ends_with == "piece" and pieces:
            last = [(pieces.pop()[0], True)]
        headers = {"headers": self._header_map(self._request_headers()), "end_of_stream": not script.body}
        if not script.body:
            await (pause() if pause is not None else asyncio.sleep(0))
            await self._send("request_headers", **headers)
            return
        await self._send("request_headers", **headers)
        for piece, _ in pieces:
            await self._send("request_body", body=piece)
        if pause is not None:
            await pause()
        for piece, ends in last:
            await self._send("request_body", body=piece, end_of_stream=ends)
        if script.ends_with == "trailers":
            await self._send("request_trailers", trailers=self._header_map((("x-checksum", "1"),)))

    async def _send_response(self) -> None:
        exchange = self.exchange
        self._served = exchange.picked[0] if self._script.reports_served and exchange.picked else ""
        reply = answer(self._script.answer, exchange, self._adapter)
        headers = (*reply.headers, *self._script.answer_headers)
        ends = not reply.body and reply.trailers is None
        await self._send("response_headers", headers=self._header_map(headers), end_of_stream=ends)
        paced = self._script.answer == "stream"
        ends_with_piece = self._script.answer == "local_reply"
        for number, piece in enumerate(reply.body, start=1):
            before = _pieces_out(self.exchange) if paced else 0
            await self._send("response_body", body=piece, end_of_stream=ends_with_piece and number == len(reply.body))
            if paced:
                # Once is enough to tell that pieces are held back.
                paced = await self._settled(lambda seen, before=before: _pieces_out(seen) > before)  # type: ignore[misc]
        if reply.trailers is not None:
            await self._send("response_trailers", trailers=self._header_map(reply.trailers))
        elif reply.body and not ends_with_piece:
            await self._send("response_body", end_of_stream=True)
        await self._until(lambda seen: seen.response.is_complete, "the response to go on")

    async def _until(self, done: Callable[[Exchange], bool], what: str) -> None:
        if not await self._settled(done) and self._end is None:
            self._end = StreamEnd(by="envoy", status="DEADLINE_EXCEEDED", details=f"waited {self._timeout_s:g} s for {what}")

    async def _settled(self, done: Callable[[Exchange], bool]) -> bool:
        """Whether it came to that, in time. An ImmediateResponse settles everything."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._timeout_s):
                while self._end is None:
                    self._news.clear()
                    if self._is_refused or done(self.exchange):
                        return True
                    await self._news.wait()
        return False

    async def _close(self) -> None:
        """Say that nothing follows, and see what still comes."""
        if self._end is not None:
            return
        with contextlib.suppress(*_GONE, TimeoutError):
            async with asyncio.timeout(min(_CLOSE_S, self._timeout_s)):
                await self._call.done_writing()
                await asyncio.shield(self._reader)
        if self._end is None:
            self._end = StreamEnd(by="envoy", status="CANCELLED", details="the EPP keeps a stream that is over open")

    async def _send(self, kind: str, **fields: Any) -> None:
        if self._end is not None or self._is_refused:
            return
        message = ProcessingRequest(**{kind: fields})
        if self._is_first:
            self._is_first = False
            message.protocol_config.request_body_mode = ProcessingMode.FULL_DUPLEX_STREAMED
            message.protocol_config.response_body_mode = ProcessingMode.FULL_DUPLEX_STREAMED
        metadata = message.metadata_context.filter_metadata
        if kind.startswith("request"):
            if self._script.subset is not None:
                metadata[SUBSET_HINT].update({SUBSET: self._script.subset})
        elif self._served:
            metadata[LB].update({SERVED: self._served})
        self._note(Line(sender="envoy", message=message))
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._call.write(message.SerializeToString())
        except TimeoutError:
            details = f"waited {self._timeout_s:g} s for room to send {kind}"
            self._end = StreamEnd(by="envoy", status="DEADLINE_EXCEEDED", details=details)
        except _GONE:
            await self._reader  # which knows why

    async def _read(self) -> None:
        status, details = "OK", ""
        try:
            while (data := await self._call.read()) is not grpc.aio.EOF:
                message = ProcessingResponse.FromString(data)
                self._is_refused = self._is_refused or message.HasField("immediate_response")
                self._note(Line(sender="epp", message=message))
                self._news.set()
            status, details = (await self._call.code()).name, await self._call.details() or ""
        except grpc.aio.AioRpcError as error:
            status, details = error.code().name, error.details() or ""
        except DecodeError:
            status, details = "INTERNAL", "what it sent is no ProcessingResponse"
        if self._end is None:
            self._end = StreamEnd(by="epp", status=status, details=details)
        self._news.set()

    def _note(self, line: Line) -> None:
        named = Line(stream=self._script.name, start=line.start, sender=line.sender, message=line.message, end=line.end)
        self._lines.append((len(self._log), named))
        self._log.append(named)

    def _request_headers(self) -> Pairs:
        headers = {
            ":method": "POST" if self._script.body else "GET",
            ":scheme": "http",
            ":authority": "conformance.example",
            ":path": self._script.path,
            "user-agent": "gaie-codec-conformance",
            "accept": "*/*",
            "x-forwarded-proto": "http",
            "x-request-id": f"conformance-{len(self._log)}",
        }
        if self._script.body:
            headers["content-type"] = "application/json"
            if "transfer-encoding" not in dict(self._script.headers) and self._script.ends_with == "nothing":
                headers["content-length"] = str(sum(map(len, self._script.body)))
        return tuple((headers | dict(self._script.headers) | dict(self._headers)).items())

    @staticmethod
    def _header_map(pairs: Pairs) -> Any:
        return {"headers": [{"key": name, "raw_value": value.encode("latin-1", "replace")} for name, value in pairs]}


def _pieces_out(exchange: Exchange) -> int:
    return sum(1 for entry in exchange.response.bodies_out if streamed(entry).body)
