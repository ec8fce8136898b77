"""Server reflection, and grpc.health.v1: services that many servers have beside their own.

grpc.reflection.v1 and v1alpha are the same on the wire but for the service's name. Each question is a call of its own with one
message, so an `Upstream`, which sends one message per call, can ask what is a bidirectional stream in the schema. The parts of both
protocols that are used here are few enough to be written down here, which spares a dependency. Specs: grpc/grpc,
src/proto/grpc/reflection/v1/reflection.proto and src/proto/grpc/health/v1/health.proto.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final, Literal

import msgspec
from google.protobuf import descriptor_pool, duration_pb2, struct_pb2, text_format, timestamp_pb2, wrappers_pb2
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import DecodeError
from google.protobuf.message_factory import GetMessageClass

from .. import Code

if TYPE_CHECKING:
    from ._asking import Asker

_VERSIONS: Final[tuple[Literal["v1", "v1alpha"], ...]] = ("v1", "v1alpha")
_MAX_FILES: Final = 100  # a schema has three at most; a server that goes on naming files is no reason to go on asking

_HEALTH: Final = "/grpc.health.v1.Health/Check"

_SCHEMA: Final = """
    name: "gaie_codec/probe.proto" package: "gaie_codec.probe" syntax: "proto3"
    message_type { name: "Question"
        field { name: "file_by_filename" number: 3 type: TYPE_STRING }
        field { name: "file_containing_symbol" number: 4 type: TYPE_STRING }
        field { name: "list_services" number: 7 type: TYPE_STRING } }
    message_type { name: "Files" field { name: "serialized" number: 1 type: TYPE_BYTES label: LABEL_REPEATED } }
    message_type { name: "Service" field { name: "name" number: 1 type: TYPE_STRING } }
    message_type { name: "Services"
        field { name: "service" number: 1 type: TYPE_MESSAGE type_name: ".gaie_codec.probe.Service" label: LABEL_REPEATED } }
    message_type { name: "Reply"
        field { name: "files" number: 4 type: TYPE_MESSAGE type_name: ".gaie_codec.probe.Files" }
        field { name: "services" number: 6 type: TYPE_MESSAGE type_name: ".gaie_codec.probe.Services" } }
    message_type { name: "HealthQuestion" field { name: "service" number: 1 type: TYPE_STRING } }
    message_type { name: "HealthReply" field { name: "status" number: 1 type: TYPE_INT32 } }
"""


def _classes() -> dict[str, Any]:
    pool = DescriptorPool()
    file = pool.AddSerializedFile(text_format.Parse(_SCHEMA, FileDescriptorProto()).SerializeToString())
    return {name: GetMessageClass(message) for name, message in file.message_types_by_name.items()}


_MESSAGES: Final = _classes()

# Some servers do not hand out the files that come with protobuf. Imported so that they are in the default pool.
_WELL_KNOWN: Final = {module.DESCRIPTOR.name for module in (duration_pb2, struct_pb2, timestamp_pb2, wrappers_pb2)}


class Listing(msgspec.Struct, frozen=True):
    """The services that a server lists, and which version of reflection it has."""

    version: Literal["v1", "v1alpha"]
    services: tuple[str, ...]


async def list_services(asker: Asker) -> Listing | None:
    """What the server lists, None if it has no reflection."""
    question = _MESSAGES["Question"](list_services="*").SerializeToString()
    replies = await asyncio.gather(*(_ask(asker, version, question) for version in _VERSIONS))
    for version, reply in zip(_VERSIONS, replies, strict=True):
        if reply is not None and reply.HasField("services"):
            return Listing(version, tuple(service.name for service in reply.services.service))
    return None


async def fetch_files(asker: Asker, version: Literal["v1", "v1alpha"], services: tuple[str, ...]) -> list[FileDescriptorProto]:
    """The files that declare the services, and all that those import, as far as the server has them."""
    files: dict[str, FileDescriptorProto] = {}
    missing: set[str] = set()

    def receive(reply: Any) -> None:
        for serialized in reply.files.serialized if reply is not None else ():
            try:
                file = FileDescriptorProto.FromString(serialized)
            except DecodeError:
                continue
            files.setdefault(file.name, file)

    questions = [_MESSAGES["Question"](file_containing_symbol=service) for service in services]
    while questions and len(files) + len(missing) < _MAX_FILES:
        for reply in await asyncio.gather(*(_ask(asker, version, question.SerializeToString()) for question in questions)):
            receive(reply)
        missing |= {question.file_by_filename for question in questions if question.file_by_filename} - files.keys()
        wanted = {name for file in files.values() for name in file.dependency} - files.keys() - missing
        questions = [_MESSAGES["Question"](file_by_filename=name) for name in sorted(wanted)]
    for name in missing & _WELL_KNOWN:
        files[name] = FileDescriptorProto()
        descriptor_pool.Default().FindFileByName(name).CopyToProto(files[name])
    return list(files.values())


async def _ask(asker: Asker, version: str, question: bytes) -> Any:
    answer = await asker.ask(f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo", question, share=0.5)
    return _decode("Reply", answer.message)


async def ask_health(asker: Asker, service: str) -> bool | None:
    """Whether grpc.health.v1 says that a service is well, "" for all of the server. None where it does not say."""
    answer = await asker.ask(_HEALTH, _MESSAGES["HealthQuestion"](service=service).SerializeToString(), share=0.5)
    if answer.code is not Code.OK:
        return None
    reply = _decode("HealthReply", answer.message)
    return None if reply is None else {1: True, 2: False}.get(reply.status)


def _decode(name: str, message: bytes | None) -> Any:
    """None for what is no such message: it says nothing."""
    if message is None:
        return None
    try:
        return _MESSAGES[name].FromString(message)
    except DecodeError:
        return None
