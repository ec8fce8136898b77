"""fetch.py PACKAGE VERSION FOLDER PATTERN...: single files out of a wheel, by range requests, with pip's own client.

vLLM's and SGLang's wheels are hundreds of megabytes, of which a few files are needed. pip knows the index, its credentials and which
wheel fits this interpreter. Where the index does no range requests, or pip's insides have moved, the whole wheel is fetched, once.
"""

from __future__ import annotations

import fnmatch
import logging
import subprocess
import sys
import tempfile
from pathlib import Path
from zipfile import ZipFile


def main() -> None:
    package, version, folder, *patterns = sys.argv[1:]
    logging.getLogger("pip").setLevel(logging.ERROR)
    try:
        fetched = _by_ranges(package, version, Path(folder), patterns)
    except (ImportError, AttributeError, TypeError):
        fetched = False
    if not fetched:
        _whole(package, version, Path(folder), patterns)


def _by_ranges(package: str, version: str, folder: Path, patterns: list[str]) -> bool:
    from pip._internal.commands.install import InstallCommand
    from pip._internal.network.lazy_wheel import HTTPRangeRequestUnsupported, LazyZipOverHTTP
    from pip._vendor.packaging.specifiers import SpecifierSet

    command = InstallCommand("install", "")
    options, _ = command.parse_args([package])
    options.no_input = True
    session = command._build_session(options)
    finder = command._build_package_finder(options, session, ignore_requires_python=True)
    best = finder.find_best_candidate(package, SpecifierSet(f"=={version}")).best_candidate
    if best is None or not best.link.is_wheel:
        sys.exit(f"there is no wheel of {package} {version} for this machine and Python {sys.version.split()[0]}")
    if best.link.is_file:
        _extract(ZipFile(best.link.file_path), folder, patterns)
        return True
    try:
        with LazyZipOverHTTP(best.link.url_without_fragment, session) as wheel:
            _extract(ZipFile(wheel), folder, patterns)
    except HTTPRangeRequestUnsupported:
        return False
    return True


def _whole(package: str, version: str, folder: Path, patterns: list[str]) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        command = [sys.executable, "-m", "pip", "download", "-qq", "--no-deps", "--only-binary", ":all:", "--ignore-requires-python"]
        if subprocess.run([*command, "-d", temporary, f"{package}=={version}"]).returncode:
            sys.exit(f"{package} {version} cannot be downloaded")
        _extract(ZipFile(next(Path(temporary).glob("*.whl"))), folder, patterns)


def _extract(archive: ZipFile, folder: Path, patterns: list[str]) -> None:
    for pattern in patterns:
        found = fnmatch.filter(archive.namelist(), pattern)
        if not found:
            sys.exit(f"the wheel has no {pattern}")
        for name in found:
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_name(path.name + ".part")
            part.write_bytes(archive.read(name))  # checks the archive's CRC
            part.chmod(0o755)
            part.replace(path)


if __name__ == "__main__":
    main()
