"""One server -> a ProbeReport: see whether it speaks HTTP/2, ask what it is, ask what only that kind knows, conclude.

Questions of one step go out together, and each step takes only a share of the time that is left, so that a server which swallows one
question still gets the others.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final

from google.protobuf.message import DecodeError

from .. import Code, UpstreamStatusError, UsageError, adapters, snapshots
from ..compat import Missing, features, resolve
from ._asking import Answer, Asker
from ._connection import check_http2
from ._dialects import KNOWN, UNDECODABLE, Known
from ._reflection import Listing, ask_health, fetch_files, list_services
from ._report import Health, ProbeReport
from ._schemas import Verdict, find_floor, match_schema, match_version

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from google.protobuf.message import Message

    from ..upstream import Upstream

# No server has these. What it says of them is how it says no.
_NO_METHOD: Final = "/gaie_codec.probe.Nothing/Nothing"
_NO_SERVICE: Final = "gaie_codec.probe.Nothing"

# grpcio's words for an answer without grpc-status. They choose between two sentences of ours and nothing else.
_NO_GRPC: Final = "Received http2 header with status"

_MAX_TIMEOUT_S: Final = 3600.0


async def probe(upstream: Upstream, *, timeout_s: float = 5.0) -> ProbeReport:
    """What the server is. Returns or raises within `timeout_s`.

    `dialect` of the report is empty for a server that answers but is none of the known ones. Raises UpstreamStatusError with
    UNAVAILABLE or DEADLINE_EXCEEDED where nothing answers, and FramingError where something answers that does not speak HTTP/2.
    """
    if not 0 < timeout_s <= _MAX_TIMEOUT_S:
        raise UsageError(f"timeout {timeout_s} s: not above 0 and at most {_MAX_TIMEOUT_S:g}")
    try:
        async with asyncio.timeout(timeout_s):
            asker = Asker(upstream, timeout_s)
            await check_http2(upstream.target, timeout_s=asker.left_s * 0.95)
            return await _Probe(upstream.target, asker).run()
    except TimeoutError:
        raise UpstreamStatusError(Code.DEADLINE_EXCEEDED, f"{upstream.target}: no conclusion in {timeout_s:g} s") from None


class _Probe:
    def __init__(self, target: str, asker: Asker) -> None:
        self._target = target
        self._asker = asker
        self._notes: list[str] = []

    async def run(self) -> ProbeReport:
        listing, control, is_well = await asyncio.gather(
            list_services(self._asker), self._asker.ask(_NO_METHOD, share=0.5), ask_health(self._asker, "")
        )
        if not any(answer.is_answer for answer in self._asker.answers.values()):
            raise UpstreamStatusError(control.code, f"{self._target} speaks HTTP/2, but answered no call: {control.details}")
        listed = set(listing.services) if listing is not None else set()
        reflected = [known for known in KNOWN.values() if listed.intersection(known.services)]
        found = await self._recognize(reflected or list(KNOWN.values()), control)
        if not found:
            found = {known.dialect: known for known in reflected[:1]}
        if not found:
            self._check_silence()
            return self._report_unknown(listing, control)
        known = next(iter(found.values()))
        if others := list(found)[1:]:
            self._notes.append(f"this port speaks {', '.join(others)} as well")
        return await self._report(known, listing, control, is_well)

    async def _recognize(self, candidates: Iterable[Known], control: Answer) -> dict[str, Known]:
        """The dialects whose methods are there, in the order of KNOWN."""
        candidates = list(candidates)
        paths = {path: known for known in candidates for path in known.asks_all}
        await asyncio.gather(*(self._asker.ask(path, share=0.5) for path in paths))
        found = {known.dialect: known for path, known in paths.items() if self._exists(path, control)}
        if found:
            return found
        # Servers without a method that may be asked: by the name that they registered with grpc.health.v1, or by a refusal.
        paths = {path: known for known in candidates for path in known.asks_undecodable}
        await asyncio.gather(*(self._asker.ask(path, UNDECODABLE, share=0.5) for path in paths))
        found = {known.dialect: known for path, known in paths.items() if self._exists(path, control)}
        if found:
            return found
        services = {service: known for known in candidates for service in known.services}
        told = await asyncio.gather(*(ask_health(self._asker, service) for service in (_NO_SERVICE, *services)))
        if told[0] is None:  # else it says the same of every service
            found = {known.dialect: known for known, is_well in zip(services.values(), told[1:], strict=True) if is_well is not None}
        return found

    def _exists(self, path: str, control: Answer) -> bool:
        """Whether the answer shows that the server has the method, given how it answers for one that nobody has."""
        answer = self._asker.answers.get(path)
        if answer is None or not answer.is_answer:
            return False
        if answer.code is Code.OK:
            return answer.message is not None and control.code is not Code.OK
        return answer.is_in_schema or (answer.code is not Code.UNIMPLEMENTED and control.code is Code.UNIMPLEMENTED)

    async def _report(self, known: Known, listing: Listing | None, control: Answer, is_well: bool | None) -> ProbeReport:
        there = {path.split("/")[1] for path in _paths(known) if self._exists(path, control)}
        asks = [path for path in _paths(known) if path not in self._asker.answers and (not there or path.split("/")[1] in there)]
        services = [name for name in known.services if listing is None or name in listing.services] or list(known.services)
        reflected, service_is_well, _ = await asyncio.gather(
            self._match_reflected(known, listing),
            ask_health(self._asker, services[0]),
            asyncio.gather(*(self._asker.ask(path, _request(known, path), share=0.5) for path in asks)),
        )
        methods = [path for path in _paths(known) if self._exists(path, control)]
        messages = self._decode(known, methods)
        facts = known.read({path.rpartition("/")[2]: message for path, message in messages.items()})
        verdict = reflected or self._conclude(known, facts.engine_version, methods, messages)
        self._note_silence(known)
        if verdict.match == "floor" and facts.engine_version:
            self._note_release(known, facts.engine_version)
        own = messages.get(known.health)
        health, health_basis = _conclude_health(known, service_is_well if service_is_well is not None else is_well, own)
        refused = snapshots.load(known.dialect, verdict.snapshot).refused
        tokenizer = self._asker.answers.get(known.tokenizer)
        return ProbeReport(
            target=self._target,
            dialect=known.dialect,
            snapshot=verdict.snapshot,
            match=verdict.match,
            basis=verdict.basis,
            reason=verdict.reason,
            refused=refused,
            releases=verdict.releases,
            schema_hash=verdict.schema_hash,
            unknown=verdict.unknown,
            reflection=listing.version if listing is not None else "",
            services=listing.services if listing is not None else tuple(sorted({path.split("/")[1] for path in methods})),
            answers=self._codes(),
            engine=known.engine,
            engine_version=facts.engine_version,
            proto_version=facts.proto_version,
            health=health,
            health_basis=health_basis,
            model=facts.model,
            aliases=facts.aliases,
            model_path=facts.model_path,
            max_model_len=facts.max_model_len,
            tokenizer_path=facts.tokenizer_path,
            has_tokenizer_stream=tokenizer is not None and tokenizer.message is not None,
            has_adapter=known.dialect in adapters.DIALECTS,
            cannot_say=None if refused else _unsayable(known.dialect, verdict.snapshot),
            notes=tuple(self._notes),
        )

    def _check_silence(self) -> None:
        """A method without an answer is perhaps one of a server that is still starting, and no reason to say that it is none."""
        asked = [self._asker.answers.get(path) for known in KNOWN.values() for path in known.asks_all]
        for answer in asked:
            if answer is not None and not answer.is_answer:
                raise UpstreamStatusError(answer.code, f"{self._target} answers, but not to {answer.path}: {answer.details}")

    def _report_unknown(self, listing: Listing | None, control: Answer) -> ProbeReport:
        if control.details.startswith(_NO_GRPC):
            reason = "it speaks HTTP/2, but not gRPC; model servers have gRPC on a port of its own"
        elif control.code is Code.UNIMPLEMENTED:
            reason = "it speaks gRPC and has none of the services of model servers that are known here"
        elif control.code in (Code.UNAUTHENTICATED, Code.PERMISSION_DENIED):
            reason = f"it wants credentials: {control.code.name}"
        else:
            reason = f"it answers {control.code.name} to everything: perhaps no gRPC, or a proxy"
        return ProbeReport(
            target=self._target,
            reason=reason,
            reflection=listing.version if listing is not None else "",
            services=listing.services if listing is not None else (),
            answers=self._codes(),
            notes=tuple(self._notes),
        )

    async def _match_reflected(self, known: Known, listing: Listing | None) -> Verdict | None:
        services = tuple(name for name in known.services if listing is not None and name in listing.services)
        if listing is None or not services:
            return None
        files = await fetch_files(self._asker, listing.version, services)
        declared = {f"{file.package}.{service.name}" for file in files for service in file.service}
        try:
            if not declared.issuperset(services):
                raise UsageError("a service is listed, but nothing declares it")
            return match_schema(known.dialect, files)
        except UsageError as error:
            self._notes.append(f"what reflection hands out is incomplete: {error}")
            return None

    def _conclude(self, known: Known, version: str, methods: list[str], messages: Mapping[str, Message]) -> Verdict:
        floor = find_floor(known.dialect, methods, messages)
        told = match_version(known.dialect, known.engine, version) if version else None
        names = snapshots.SNAPSHOTS[known.dialect]
        # A build between two releases may have the older one's version and the newer one's schema.
        if told is None or floor.unknown or names.index(floor.snapshot) > names.index(told.snapshot):
            return floor
        return told

    def _note_silence(self, known: Known) -> None:
        asked = [(path, self._asker.answers.get(path)) for path in _paths(known)]
        silent = [path.rpartition("/")[2] for path, answer in asked if answer is not None and not answer.is_answer]
        if silent:
            self._notes.append(f"no answer in time from {', '.join(silent)}")

    def _note_release(self, known: Known, version: str) -> None:
        """What the engine's release installs beside itself, where its version does not decide on the schema."""
        try:
            found = resolve(server=known.engine, version=version).dialect(known.dialect)
        except UsageError:
            return
        if found.floor.proto and found.release_day.proto:
            self._notes.append(
                f"{known.engine} {version} takes any smg-grpc-proto from {found.floor.proto} on; on its release day that was "
                f"{found.release_day.proto} (snapshot {found.release_day.snapshot})"
            )

    def _decode(self, known: Known, methods: Iterable[str]) -> dict[str, Any]:
        """The answers by path, in the classes of the newest snapshot."""
        newest = snapshots.load(known.dialect)
        messages = {}
        for path in methods:
            _, service, method = path.split("/")
            received = self._asker.answers[path].message
            if received is None or service not in newest.services or not newest.has_method(service, method):
                continue
            try:
                messages[path] = newest.method(service, method).response.FromString(received)
            except DecodeError:
                self._notes.append(f"{method} answers with {len(received)} bytes that do not fit the schema")
        return messages

    def _codes(self) -> dict[str, str]:
        return {path: answer.code.name for path, answer in sorted(self._asker.answers.items()) if path != _NO_METHOD}


def _paths(known: Known) -> list[str]:
    return [path for path in (*known.asks_all, *known.asks_recognized, *known.asks_undecodable, known.tokenizer, known.health) if path]


def _request(known: Known, path: str) -> bytes:
    return UNDECODABLE if path in known.asks_undecodable else b""


def _unsayable(dialect: str, snapshot: str) -> tuple[Missing, ...] | None:
    return features(dialect, snapshot).missing if dialect in adapters.DIALECTS else None


def _conclude_health(known: Known, standard: bool | None, own: Any) -> tuple[Health, str]:
    """The dialect's own HealthCheck knows of the engine, grpc.health.v1 in some servers only of the process."""
    if own is not None:
        return ("serving" if own.healthy else "not serving"), known.health.rpartition("/")[2]
    if standard is not None:
        return ("serving" if standard else "not serving"), "grpc.health.v1"
    return "unknown", known.no_health or "nobody says"
