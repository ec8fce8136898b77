"""A schema in any of its published shapes -> a complete FileDescriptorSet, dependencies first.

`.proto` text needs a compiler: the one of `grpcio-tools`, or a `protoc` on the PATH. A FileDescriptorSet and the `_pb2.py` modules of
a package need none; of a module only the serialized descriptor is read, and nothing is imported or run.
"""

from __future__ import annotations

import ast
import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec
from google.protobuf import descriptor_pb2, descriptor_pool, duration_pb2, empty_pb2, struct_pb2, timestamp_pb2, wrappers_pb2
from google.protobuf.descriptor_pb2 import FileDescriptorProto, FileDescriptorSet
from google.protobuf.message import DecodeError

from .. import UsageError
from .canonical import WELL_KNOWN

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

__all__ = ["Schema", "compile_folder", "own_files", "read_schema", "select"]

_IMPORT: Final = re.compile(r'^\s*import\s+(?:public\s+|weak\s+)?"([^"]+)"\s*;', re.MULTILINE)
_BUILT_IN: Final = {
    module.DESCRIPTOR.name: module.DESCRIPTOR.serialized_pb
    for module in (descriptor_pb2, duration_pb2, empty_pb2, struct_pb2, timestamp_pb2, wrappers_pb2)
}


class Schema(msgspec.Struct, frozen=True, kw_only=True):
    """Descriptors and where they were read. `sha256` tells of every file that was read its name and the hash of its bytes."""

    set: FileDescriptorSet
    sha256: Mapping[str, str]

    @property
    def files(self) -> Sequence[FileDescriptorProto]:
        """The files of the schema and all that they import, dependencies first."""
        return self.set.file


def read_schema(*sources: Path) -> Schema:
    """Reads one source, or several `.proto` files that belong together.

    A source is a `.proto` file, a `_pb2.py` module, a folder (a package's, say) with either below it, or a serialized
    FileDescriptorSet. Raises UsageError, in one line, for one that is not there or none of these, and for text that protoc refuses.
    """
    first = sources[0]
    for source in sources:
        if not source.exists():
            raise UsageError(f"{source}: no such file or folder")
    if first.is_dir():
        texts = [path for path in sorted(first.rglob("*.proto")) if WELL_KNOWN not in path.as_posix()]
        modules = sorted(first.rglob("*_pb2.py"))
        if not texts and not modules:
            raise UsageError(f"{first}: there is no .proto file in this folder")
        return _read_texts(first, texts) if texts else _read_modules(first, modules)
    if first.suffix == ".proto":
        return _read_texts(first, sources)
    if len(sources) > 1:
        raise UsageError(f"{first}: only .proto files can be read together")
    if first.suffix == ".py":
        return _read_modules(first, sources)
    data = first.read_bytes()
    try:
        files = FileDescriptorSet.FromString(data).file
    except DecodeError:
        files = FileDescriptorSet().file
    if not files or not all(file.name for file in files):
        raise UsageError(f"{first}: neither a .proto file nor a serialized FileDescriptorSet")
    return Schema(set=_complete(first, files), sha256={first.name: hashlib.sha256(data).hexdigest()})


def own_files(files: Iterable[FileDescriptorProto]) -> list[FileDescriptorProto]:
    """Without the well-known files that every protoc brings along."""
    return [file for file in files if not file.name.startswith(WELL_KNOWN)]


def select(schema: Schema, packages: Iterable[str]) -> Schema:
    """The part that declares the services of these protobuf packages, with what it imports.

    A package such as smg-grpc-proto carries several dialects. Raises UsageError if nothing is left.
    """
    wanted = frozenset(packages)
    files = {file.name: file for file in schema.files}
    kept: set[str] = set()
    waiting = [file.name for file in schema.files if file.service and file.package in wanted]
    if not waiting:
        there = sorted({f"{file.package}.{service.name}" for file in schema.files for service in file.service})
        raise UsageError(f"no service of {', '.join(sorted(wanted))} in this schema; there are: {', '.join(there) or 'none'}")
    while waiting:
        name = waiting.pop()
        if name not in kept:
            kept.add(name)
            waiting += files[name].dependency
    part = FileDescriptorSet(file=[file for file in schema.files if file.name in kept])
    return Schema(set=part, sha256={name: value for name, value in schema.sha256.items() if name in kept or name not in files})


# Text


def compile_folder(folder: Path) -> FileDescriptorSet:
    """All `.proto` files below a folder that is their import root. Raises UsageError for text that protoc refuses."""
    names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*.proto"))]
    return _complete(folder, _protoc(folder, [folder], names))


def _read_texts(source: Path, texts: Sequence[Path]) -> Schema:
    """Every file is compiled by the name that other files import it by, which depends on the folder it is seen from."""
    base = source.resolve() if source.is_dir() else None
    roots: dict[Path, Path] = {}
    imported: dict[Path, Path] = {}
    for path in (text.resolve() for text in texts):
        above = [path.parent, *path.parent.parents]
        imports = [name for name in _IMPORT.findall(path.read_text(errors="replace")) if not name.startswith(WELL_KNOWN)]
        folders = above[: above.index(base) + 1] if base else above
        roots[path] = max(folders, key=lambda root: sum((root / name).is_file() for name in imports))
        imported |= {roots[path] / name: roots[path] for name in imports}
    roots |= {path: root for path, root in imported.items() if path in roots}
    names = sorted(path.relative_to(root).as_posix() for path, root in roots.items())
    for name, following in pairwise(names):
        if name == following:
            raise UsageError(f"{source}: two files are called {name}; give the folder of one of them")
    folders = sorted(set(roots.values()), key=lambda root: (-len(root.parts), root))
    files = _complete(source, _protoc(source, folders, names))
    found = {file.name: next(root / file.name for root in folders if (root / file.name).is_file()) for file in own_files(files.file)}
    return Schema(set=files, sha256={name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in found.items()})


def _protoc(source: Path, folders: Iterable[Path], names: Iterable[str]) -> Iterable[FileDescriptorProto]:
    if find_spec("grpc_tools"):
        compiler = [sys.executable, "-m", "grpc_tools.protoc"]
    elif found := shutil.which("protoc"):
        compiler = [found]
    else:
        raise UsageError(f"{source}: compiling .proto text needs a compiler: pip install grpcio-tools, or put protoc on the PATH")
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch, "set.binpb")
        paths = [f"-I{folder.resolve()}" for folder in folders]
        command = [*compiler, *paths, "--include_imports", f"--descriptor_set_out={out}", *names]
        # An empty working directory: protoc would take a file there for the one that is meant.
        done = subprocess.run(command, cwd=scratch, capture_output=True, text=True, errors="replace", check=False)
        if done.returncode:
            said = done.stderr
            for folder in folders:
                said = said.replace(f"{folder.resolve()}/", "")
            raise UsageError(f"{source}: {_complaint(said)}")
        return FileDescriptorSet.FromString(out.read_bytes()).file


def _complaint(stderr: str) -> str:
    """The line of protoc's that says what to do."""
    noise = re.compile(r"WARNING: |[IWE]\d{4} |.*: warning: |\s*$")  # warnings, and the log of protoc's own libraries
    lines = [line for line in stderr.splitlines() if not noise.match(line)]
    missing = {found[1] for line in lines if (found := re.fullmatch(r"(.+): File not found\.", line))}
    for line in lines:
        found = re.fullmatch(r'(.+?):\d+:\d+: Import "(.+)" was not found or had errors\.', line)
        if found and found[2] in missing:
            return f'{found[1]} imports "{found[2]}", which was not found'
    return f"not valid proto: {lines[0]}" if lines else "protoc failed without a word"


# Generated modules


def _read_modules(source: Path, modules: Iterable[Path]) -> Schema:
    files: dict[str, FileDescriptorProto] = {}
    sha256 = {}
    for path in modules:
        data = path.read_bytes()
        for serialized in _descriptors(path, data):
            file = FileDescriptorProto.FromString(serialized)
            files.setdefault(file.name, file)
            sha256[path.name] = hashlib.sha256(data).hexdigest()
    if not files:
        raise UsageError(f"{source}: no module with a protobuf descriptor")
    return Schema(set=_complete(source, files.values()), sha256=sha256)


def _descriptors(path: Path, data: bytes) -> list[bytes]:
    """The argument of `AddSerializedFile(b"...")`, which every generated module of the last years has."""
    try:
        tree = ast.parse(data)
    except (SyntaxError, ValueError):
        raise UsageError(f"{path}: not a Python module") from None
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and node.args]
    literals = [call.args[0] for call in calls if isinstance(call.func, ast.Attribute) and call.func.attr == "AddSerializedFile"]
    return [literal.value for literal in literals if isinstance(literal, ast.Constant) and isinstance(literal.value, bytes)]


# All of them


def _complete(source: Path, files: Iterable[FileDescriptorProto]) -> FileDescriptorSet:
    """With the well-known files, sorted, and proven to be a schema: protobuf accepts it."""
    known = {file.name: file for file in files}
    ordered: dict[str, FileDescriptorProto] = {}

    def add(name: str, importer: str) -> None:
        if name in ordered:
            return
        if name not in known and name in _BUILT_IN:
            known[name] = FileDescriptorProto.FromString(_BUILT_IN[name])
        if name not in known:
            raise UsageError(f'{source}: {importer} imports "{name}", which was not found')
        file = known.pop(name)
        for dependency in file.dependency:
            add(dependency, name)
        ordered[name] = file

    for name in list(known):
        add(name, name)
    pool = descriptor_pool.DescriptorPool()
    for file in ordered.values():
        try:
            pool.AddSerializedFile(file.SerializeToString())
        except (TypeError, DecodeError) as error:
            raise UsageError(f"{source}: not a valid schema: {' '.join(str(error).split())}") from None
    return FileDescriptorSet(file=ordered.values())
