"""Envoy's ext_proc messages, as classes of our own trimmed copy (ext_proc.proto), and the path of the service they belong to.

The classes are made from a descriptor at import, so there is no generated code whose version pins that of protobuf.
"""

from __future__ import annotations

from typing import Any, Final

from google.protobuf import (
    descriptor_pool,
    message_factory,
    struct_pb2,  # noqa: F401  # registers the files that ours imports
    wrappers_pb2,  # noqa: F401
)

from ._descriptor import FILE

SERVICE: Final = "envoy.service.ext_proc.v3.ExternalProcessor"
PROCESS_PATH: Final = f"/{SERVICE}/Process"

_file: Final[Any] = descriptor_pool.Default().AddSerializedFile(FILE)


def _class(name: str) -> Any:
    return message_factory.GetMessageClass(_file.message_types_by_name[name])


ProcessingRequest: Final = _class("ProcessingRequest")
ProcessingResponse: Final = _class("ProcessingResponse")
ProcessingMode: Final = _class("ProcessingMode")
HeaderMap: Final = _class("HeaderMap")
HeaderValueOption: Final = _class("HeaderValueOption")
HeaderMutation: Final = _class("HeaderMutation")
CommonResponse: Final = _class("CommonResponse")
