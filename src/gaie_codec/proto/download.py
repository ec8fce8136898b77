"""`PACKAGE==VERSION` -> a folder with the schema files of that published package, by way of pip."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from .. import UsageError

__all__ = ["download"]


def download(requirement: str, folder: Path, *, timeout_s: float = 300) -> Path:
    """Fetches the wheel of one exact release into a new folder below `folder` and unpacks its `.proto` and `_pb2.py` files there alone.

    Nothing of the package is installed or run. Returns the folder to read. Raises UsageError if there is no such release or no pip.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*==[A-Za-z0-9.!+]+", requirement):
        raise UsageError(f"{requirement!r} is not PACKAGE==VERSION")
    folder.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(dir=folder))
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input", "--no-deps"]
    command += ["--only-binary=:all:", "--dest", str(fresh), requirement]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        raise UsageError(f"{requirement}: pip did not finish within {timeout_s:g} s") from None
    wheels = sorted(fresh.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        raise UsageError(f"{requirement}: {_complaint(done.stderr)}")
    unpacked = fresh / "unpacked"
    with zipfile.ZipFile(wheels[0]) as archive:
        archive.extractall(unpacked, [name for name in archive.namelist() if name.endswith((".proto", "_pb2.py"))])
    unpacked.mkdir(exist_ok=True)
    return unpacked


def _complaint(stderr: str) -> str:
    if "No matching distribution" in stderr:
        return "the package index has no wheel of that release"
    if "No module named pip" in stderr:
        return "fetching a package needs pip"
    lines = [line.removeprefix("ERROR: ") for line in stderr.splitlines() if line.startswith("ERROR")]
    return lines[-1] if lines else "pip could not fetch it"
