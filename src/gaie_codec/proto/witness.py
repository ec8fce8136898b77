"""A second protobuf implementation reads and writes the same bytes: betterproto2, with classes generated from the candidate.

protoc and upb share their authors; what both get wrong together, or what our own reading of descriptors gets wrong, an unrelated
implementation shows. The classes are generated into a temporary folder and imported under a name of their own.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from io import BytesIO
from itertools import count
from pathlib import Path
from typing import Any, Final

from google.protobuf.compiler.plugin_pb2 import CodeGeneratorRequest, CodeGeneratorResponse
from google.protobuf.descriptor_pb2 import FileDescriptorSet
from google.protobuf.message import DecodeError, Message

from .. import UsageError
from ..snapshots import is_repeated
from .compile import own_files
from .laws import types_of, variants
from .meaning import ABSENT, AnyDescriptor, between, differences, is_map, meaning
from .report import Finding, Law

__all__ = ["run_witness"]

_PLUGIN: Final = "protoc-gen-python_betterproto2"
_CLAIM: Final = "betterproto2 reads and writes the same bytes"
_numbers = count()


def run_witness(snapshot: Any, files: FileDescriptorSet, messages: Sequence[Message]) -> Law:
    """Holds betterproto2's classes of the candidate against upb's: `messages`, and every field alone."""
    missing = [name for name in ("betterproto2", "betterproto2_compiler") if find_spec(name) is None]
    if missing:
        return Law(name="witness", claim=_CLAIM, skipped=f"not installed: {', '.join(missing)}; pip install gaie-codec[proto]")
    first: dict[str, str] = {}
    tried = 0
    with _generated(files) as classes:
        every = [message for descriptor in types_of(snapshot).values() for _, message in variants(descriptor)]
        for message in [*every, *messages]:
            witness = classes.get(f"type.googleapis.com/{message.DESCRIPTOR.full_name}")
            if witness is None:
                continue  # types within types have names of betterproto2's own
            tried += 1
            for field, text in _compared(message, witness):
                first.setdefault(field, text)
    findings = tuple(Finding(field=field, text=text) for field, text in first.items())
    return Law(name="witness", claim=_CLAIM, examples=tried, findings=findings)


def _compared(message: Message, witness: Any) -> Iterator[tuple[str, str]]:
    data = message.SerializeToString()
    descriptor = message.DESCRIPTOR
    try:
        read = witness.parse(data)
        told = _told(read, descriptor, meaning(message))
        again = type(message).FromString(bytes(read))
    except DecodeError:
        yield descriptor.full_name, "what betterproto2 writes cannot be parsed"
    except Exception as error:  # another library's; whatever it raises, it does not read what we write
        yield descriptor.full_name, f"betterproto2 fails: {type(error).__name__}: {' '.join(str(error).split())[:120]}"
    else:
        yield from between(meaning(message), descriptor, told, descriptor, {})
        yield from differences(message, again, {})


def _parse(message_type: Any, data: bytes) -> Any:
    """`Message.parse`, also for a message with a field called `load` (KvEventBatch has one), which hides the method that it calls."""
    from betterproto2 import Message as Base

    return Base.load(message_type(), BytesIO(data))


def _told(read: Any, descriptor: AnyDescriptor, expected: dict[str, Any]) -> dict[str, Any]:
    """What a message of betterproto2 says, in the form of `meaning`. The well-known types, which it maps to Python's, are taken as read."""
    from betterproto2 import casing

    told: dict[str, Any] = {}
    for field in descriptor.fields:
        value = getattr(read, field.name if hasattr(read, field.name) else casing.safe_snake_case(field.name))
        kind = field.message_type.fields_by_name["value"] if is_map(field) else field
        known = expected[field.name]
        if kind.message_type is not None and kind.message_type.full_name.startswith("google.protobuf."):
            told[field.name] = known
        elif is_map(field):
            told[field.name] = {key: _one(value[key], kind, known.get(key, {})) for key in value}
        elif is_repeated(field):
            told[field.name] = [_one(item, kind, one) for item, one in zip(value, known, strict=False)] + [None] * (len(value) - len(known))
        elif value is None:
            told[field.name] = ABSENT
        else:
            told[field.name] = _one(value, kind, known or {})
    return told


def _one(value: Any, field: Any, expected: Any) -> Any:
    if field.message_type is not None:
        return _told(value, field.message_type, expected if expected else _empty(field.message_type))
    if field.enum_type is not None:
        known = field.enum_type.values_by_number.get(int(value))
        return known.name if known is not None else f"unknown value {int(value)}"
    return value


def _empty(descriptor: AnyDescriptor) -> dict[str, Any]:
    from google.protobuf.message_factory import GetMessageClass

    return meaning(GetMessageClass(descriptor)())


@contextmanager
def _generated(files: FileDescriptorSet) -> Iterator[dict[str, Any]]:
    """Classes by type URL."""
    plugin = shutil.which(_PLUGIN, path=str(Path(sys.executable).parent)) or shutil.which(_PLUGIN)
    if plugin is None:
        raise UsageError(f"betterproto2_compiler is installed, but its {_PLUGIN} is not on the PATH")
    package = f"_gaie_codec_witness_{next(_numbers)}"
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, package)
        folder.mkdir()
        # The plugin is asked directly: it insists on source_code_info, which protoc does not pass on from descriptors.
        request = CodeGeneratorRequest(parameter="client_generation=none", file_to_generate=[file.name for file in own_files(files.file)])
        for file in files.file:
            request.proto_file.add().CopyFrom(file)
            request.proto_file[-1].source_code_info.SetInParent()
        # It formats what it made with ruff, its own dependency, which is where it is itself.
        environment = os.environ | {"PATH": os.pathsep.join((str(Path(plugin).parent), os.environ.get("PATH", os.defpath)))}
        done = subprocess.run([plugin], input=request.SerializeToString(), capture_output=True, check=False, env=environment)
        if done.returncode:
            raise UsageError(
                f"betterproto2 cannot generate classes: {(done.stderr.decode(errors='replace').splitlines() or ['no reason given'])[-1]}"
            )
        for made in CodeGeneratorResponse.FromString(done.stdout).file:
            path = folder / made.name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(made.content)
        try:
            spec = spec_from_file_location(package, folder / "__init__.py", submodule_search_locations=[str(folder)])
            if spec is None or spec.loader is None:
                raise UsageError("betterproto2 generated no package")
            sys.modules[package] = module = module_from_spec(spec)
            spec.loader.exec_module(module)
            for path in sorted(folder.rglob("__init__.py")):
                import_module(".".join((package, *path.parent.relative_to(folder).parts)))
            classes = dict(import_module(f"{package}.message_pool").default_message_pool.url_to_type)
            for made_class in classes.values():
                made_class.parse = classmethod(_parse)
            yield classes
        finally:
            for name in [name for name in sys.modules if name == package or name.startswith(f"{package}.")]:
                del sys.modules[name]
