"""Where a tokenizer comes from: the one in this package, a directory, or the Hugging Face hub.

All disk, network and clock that tokenizers need is here; `text.huggingface` works on the bytes. For tokenizers that the model
server itself hands out see `text.archive`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeAlias

from ._errors import MalformedMessageError, UsageError
from .text.huggingface import HuggingFaceTokenizer

if TYPE_CHECKING:
    from .text.harmony_prompts import HarmonyTokenizer

AnyTokenizer: TypeAlias = "HuggingFaceTokenizer | HarmonyTokenizer"

FILES: Final = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "config.json",
    "special_tokens_map.json",
)


def load_tokenizer(
    source: str, *, chat_template: str | None = None, revision: str | None = None, local_files_only: bool = False
) -> AnyTokenizer:
    """A tokenizer by "builtin", the path of a model's directory, or its id on the hub, tried in this order.

    `chat_template` is the text of one to use instead of the model's. `revision` and `local_files_only` (only what was downloaded
    before) are for the hub, which needs the package huggingface_hub. Raises UsageError, naming the source and the file.
    """
    files = read_files(source, revision=revision, local_files_only=local_files_only)
    try:
        return make_tokenizer(files, chat_template=chat_template)
    except MalformedMessageError as error:
        raise UsageError(f"tokenizer {source}: {error}") from error


def make_tokenizer(files: Mapping[str, bytes], *, chat_template: str | None = None) -> AnyTokenizer:
    """A tokenizer of a model's files by their base names. Chats of a gpt-oss model are rendered as vLLM does, where the extra `harmony` is
    installed and `chat_template` asks for nothing else.

    Raises MalformedMessageError naming the file, and UsageError for a gpt-oss model with another vocabulary.
    """
    tokenizer = HuggingFaceTokenizer.from_files(files, chat_template=chat_template, strftime_now=strftime_now)
    if chat_template is not None or "config.json" not in files or json.loads(files["config.json"]).get("model_type") != "gpt_oss":
        return tokenizer
    try:
        from .text.harmony_prompts import HarmonyTokenizer
    except ImportError:
        return tokenizer
    return HarmonyTokenizer(tokenizer, strftime_now=strftime_now)


def read_files(source: str, *, revision: str | None = None, local_files_only: bool = False) -> dict[str, bytes]:
    """The files of a source, by base name, as they are. Raises UsageError, naming the source and the file."""
    directory = _locate(source, revision=revision, local_files_only=local_files_only)
    try:
        return {name: (directory / name).read_bytes() for name in FILES if (directory / name).is_file()}
    except OSError as error:
        raise UsageError(f"tokenizer {source}: cannot read {error.filename}: {error.strerror}") from error


def _locate(source: str, *, revision: str | None, local_files_only: bool) -> Traversable:
    if source == "builtin":
        return resources.files(__package__) / "_builtin_tokenizer"
    directory = Path(source)
    if directory.is_dir():
        return directory
    if directory.exists():
        raise UsageError(f"tokenizer {source}: a file; give the directory that it is in")
    if source.startswith((".", "~", "/")) or source.count("/") > 1:
        raise UsageError(f"tokenizer {source}: no such directory")
    return _download(source, revision=revision, local_files_only=local_files_only)


def _download(source: str, *, revision: str | None, local_files_only: bool) -> Path:
    try:
        import huggingface_hub
    except ImportError as error:
        raise UsageError(f"tokenizer {source}: no such directory, and a model of the hub needs the package huggingface_hub") from error
    try:
        return Path(
            huggingface_hub.snapshot_download(source, revision=revision, allow_patterns=list(FILES), local_files_only=local_files_only)
        )
    except Exception as error:  # HTTP, cache and name errors of several packages
        raise UsageError(
            f"tokenizer {source}: no such directory, and it cannot be had from the Hugging Face hub ({type(error).__name__})"
        ) from error


def strftime_now(pattern: str) -> str:
    """The clock that chat templates may ask for the date: local time."""
    return datetime.now().strftime(pattern)
