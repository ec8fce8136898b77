#!/usr/bin/env python3
"""Vendor model-server schemas, by way of `gaie_codec.proto`. docs/protos.md has examples.

vendor.py write-text        one schema (.proto files, a package's folder or a FileDescriptorSet) becomes one snapshot folder
vendor.py write-data        every snapshot folder becomes one Python module, plus the index and the catalogue
vendor.py check             the same in memory; lists what differs from the files and exits 1
vendor.py check-published   downloads every smg-grpc-proto of proto_vendor/published.json and compares the schemas' hashes
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from gaie_codec import UsageError
from gaie_codec.proto.canonical import normalized, schema_hash
from gaie_codec.proto.catalogue import PublishedSchema
from gaie_codec.proto.compile import read_schema, select
from gaie_codec.proto.download import download
from gaie_codec.proto.vendoring import PUBLISHED, check, describe, write_data, write_snapshot

if TYPE_CHECKING:
    from collections.abc import Sequence

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {"vllm.engine": "vllm.grpc.engine", "sglang.scheduler": "sglang.grpc.scheduler"}


def write_text(root: Path, sources: list[Path], packages: list[str] | None, **facts: str) -> None:
    schema = read_schema(*sources)
    if packages:
        schema = select(schema, packages)
    print(write_snapshot(root, schema, describe(schema, **facts)))


def check_published(root: Path) -> list[str]:
    known = msgspec.json.decode((root / PUBLISHED).read_bytes(), type=tuple[PublishedSchema, ...])
    expected = {(schema.dialect, release): schema for schema in known for release in schema.releases}
    versions = sorted({release.removeprefix("smg-grpc-proto-") for _, release in expected if release.startswith("smg-grpc-proto-")})

    def problems(version: str) -> list[str]:
        with tempfile.TemporaryDirectory() as scratch:
            package = read_schema(download(f"smg-grpc-proto=={version}", Path(scratch)))
        faults = []
        for dialect, name in PACKAGES.items():
            named = expected[dialect, f"smg-grpc-proto-{version}"]
            if schema_hash(normalized(select(package, [name]).files)) != named.schema_hash:
                faults.append(f"smg-grpc-proto {version}: {dialect} is not {named.history_id}")
        return faults

    with ThreadPoolExecutor(4) as threads:
        found = [problem for some in threads.map(problems, versions) for problem in some]
    if not found:
        print(f"{len(versions)} published releases of smg-grpc-proto have the schemas that {PUBLISHED} says")
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=ROOT, help="repository to work on (default: this one)")
    commands = parser.add_subparsers(required=True, dest="command")

    text = commands.add_parser("write-text", help="write or replace one folder of proto_vendor")
    text.add_argument("dialect", help="such as vllm.engine")
    text.add_argument("snapshot", help="such as smg-0.4.28: after the first release with this schema")
    text.add_argument("sources", type=Path, nargs="+", help="the main .proto files, a package's folder, or a serialized FileDescriptorSet")
    text.add_argument("--packages", nargs="+", help="take only the services of these protobuf packages, such as vllm.grpc.engine")
    text.add_argument("--package", required=True, help="the published package that the source comes from")
    text.add_argument("--version", required=True)
    text.add_argument("--licence", default="Apache-2.0", help="SPDX identifier (default: %(default)s)")
    text.add_argument("--first-published", required=True, metavar="YYYY-MM-DD", help="orders the snapshots of a dialect")
    text.add_argument("--releases", nargs="+", default=[], help="every release with this schema, such as vllm-0.14.1")
    text.add_argument("--history-id", default="", help="its row in the upstream history, such as V23")
    text.add_argument("--reconstructed", action="store_true", help="no release ships this schema; it was inferred")
    text.add_argument("--refused", default="", metavar="REASON", help="keep it for tools alone: the library must not speak it")
    text.add_argument("--note", default="", help="what a maintainer should know")
    commands.add_parser("write-data", help="write the run-time data")
    commands.add_parser("check", help="fail if the folders, the data or their hashes have drifted")
    commands.add_parser("check-published", help="fail if a published package is not what published.json says (needs a package index)")

    arguments = vars(parser.parse_args(argv))
    command, root = arguments.pop("command"), arguments.pop("root")
    try:
        if command == "write-text":
            write_text(root, **arguments)
        elif command == "write-data":
            write_data(root)
        elif problems := check(root) if command == "check" else check_published(root):
            sys.exit("\n".join([*problems, *(["run: python tools/vendor.py write-data"] if command == "check" else [])]))
    except UsageError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
