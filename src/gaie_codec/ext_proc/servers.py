"""A model server as the processor needs it: where it is, and how it is spoken to."""

from __future__ import annotations

from typing import Protocol

import msgspec

from .. import Observer, Transcoder
from .picking import Candidate


class Server(Protocol):
    """One model server. Both codecs are None for one that speaks OpenAI HTTP itself; servers that are alike share them."""

    @property
    def address(self) -> str:
        """IP:PORT, an IPv6 address in brackets."""
        ...

    @property
    def transcoder(self) -> Transcoder | None:
        """For OpenAI's clients."""
        ...

    @property
    def observer(self) -> Observer | None:
        """For those that speak its gRPC."""
        ...

    def candidate(self) -> Candidate:
        """It, as a picker sees it now."""
        ...


class Spoken(msgspec.Struct, frozen=True):
    """A server and how it is spoken to at this moment: for who plans elsewhere, while it may become another."""

    server: Server
    transcoder: Transcoder | None
    observer: Observer | None

    @classmethod
    def of(cls, server: Server) -> Spoken:
        """As it is now."""
        return cls(server, server.transcoder, server.observer)


class StaticServer:
    """One that is always there. Who embeds the processor counts `in_flight`."""

    def __init__(self, address: str, transcoder: Transcoder | None = None) -> None:
        """`transcoder` None is for a server that speaks OpenAI HTTP itself."""
        self.address = address
        self.transcoder = transcoder
        self.observer = Observer(transcoder.adapter, limits=transcoder.limits) if transcoder is not None else None
        self.in_flight = 0

    def candidate(self) -> Candidate:
        """It, as it is now."""
        adapter = self.transcoder.adapter if self.transcoder is not None else None
        return Candidate(
            address=self.address,
            dialect=adapter.dialect if adapter is not None else "http",
            snapshot=adapter.snapshot.name if adapter is not None else "",
            in_flight=self.in_flight,
        )
