"""Tokenizers from the package, from directories and from the hub; and the package's own, which is trained in this repository."""

from __future__ import annotations

import importlib.util
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gaie_codec._errors import UsageError
from gaie_codec.text import harmony_prompts
from gaie_codec.text.huggingface import HuggingFaceTokenizer
from gaie_codec.tokenizer_sources import load_tokenizer, make_tokenizer, read_files

ROOT = Path(__file__).parent.parent
BUILTIN = ROOT / "src" / "gaie_codec" / "_builtin_tokenizer"
TOOLS = [{"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}]


def trainer() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_tokenizer", ROOT / "tools" / "train_tokenizer.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def builtin_once() -> HuggingFaceTokenizer:
    return load_tokenizer("builtin")


@pytest.fixture
def builtin() -> HuggingFaceTokenizer:
    return builtin_once()


def test_builtin_is_what_its_script_writes() -> None:
    module = trainer()
    assert {name: text.encode() for name, text in module.files().items()} == {
        path.name: path.read_bytes() for path in BUILTIN.iterdir() if path.is_file()
    }


def test_builtin_is_small() -> None:
    assert sum(path.stat().st_size for path in BUILTIN.iterdir() if path.is_file()) < 200_000


def test_builtin_facts(builtin: HuggingFaceTokenizer) -> None:
    assert (builtin.vocab_size, builtin.max_model_len, builtin.eos_token_ids) == (3072, 8192, {0, 2})
    assert len(builtin.encode("What is the weather in the city today?", add_special_tokens=False)) < 13
    assert builtin.encode("<|im_start|><|im_end|><|endoftext|>", add_special_tokens=True) == [1, 2, 0]


@given(st.text())
def test_builtin_has_every_text(text: str) -> None:
    tokenizer = builtin_once()
    token_ids = tokenizer.encode(text + ".", add_special_tokens=False)
    assert tokenizer.detokenizer([], skip_special_tokens=False).decode(token_ids) == text + "."


def test_builtin_template(builtin: HuggingFaceTokenizer) -> None:
    call = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Köln"}}}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": None, "tool_calls": [call, call]},
        {"role": "tool", "content": "12 °C"},
    ]
    called = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Köln"}}\n</tool_call>'
    chat = (
        "<|im_start|>user\nWeather?<|im_end|>\n"
        f"<|im_start|>assistant\n{called}\n{called}<|im_end|>\n"
        "<|im_start|>user\n<tool_response>\n12 °C\n</tool_response><|im_end|>\n"
    )
    assert builtin.render_chat(messages, add_generation_prompt=False) == "<|im_start|>system\nBe brief.<|im_end|>\n" + chat
    with_tools = builtin.render_chat(messages, tools=TOOLS)
    assert with_tools.startswith("<|im_start|>system\nBe brief.\n\nThese functions")
    assert '\n{"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}\n</tools>' in with_tools
    assert with_tools.endswith("<|im_end|>\n" + chat + "<|im_start|>assistant\n")
    assert not builtin.accepts_content_parts
    assert builtin.render_chat([], tools=TOOLS).startswith("<|im_start|>system\nThese functions")


def test_directory(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((BUILTIN / "tokenizer.json").read_bytes())
    (tmp_path / "chat_template.jinja").write_text("{{ strftime_now('%%') }}{{ messages[0].content }}")
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.render_chat([{"role": "user", "content": "x"}]) == "%x"
    assert load_tokenizer(str(tmp_path), chat_template="other").render_chat([]) == "other"


def test_errors_name_the_source(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=rf"{tmp_path}: the model's files have no tokenizer.json"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UsageError, match=rf"{tmp_path}: tokenizer.json is not"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(UsageError, match="give the directory"):
        load_tokenizer(str(tmp_path / "tokenizer.json"))
    for missing in (tmp_path / "missing", "./missing", "a/b/c"):
        with pytest.raises(UsageError, match=r"missing|a/b/c.*: no such directory"):
            load_tokenizer(str(missing))


def test_hub_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UsageError, match="needs the package huggingface_hub"):
        load_tokenizer("owner/model")


def test_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, object] = {}

    def snapshot_download(repo_id: str, **arguments: object) -> str:
        asked.update(arguments, repo_id=repo_id)
        return str(BUILTIN)

    hub = ModuleType("huggingface_hub")
    hub.snapshot_download = snapshot_download  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert load_tokenizer("owner/model", revision="r").vocab_size == 3072
    assert (asked["repo_id"], asked["revision"], asked["local_files_only"]) == ("owner/model", "r", False)

    def offline(repo_id: str, **arguments: object) -> str:
        raise ConnectionError("a long story")

    hub.snapshot_download = offline  # type: ignore[attr-defined]
    with pytest.raises(UsageError, match=r"owner/model.*hub \(ConnectionError\)"):
        load_tokenizer("owner/model")


def test_gpt_oss_models_are_known_by_their_config(monkeypatch: pytest.MonkeyPatch) -> None:
    files = read_files("builtin") | {"config.json": b'{"model_type": "gpt_oss"}'}
    with pytest.raises(UsageError, match="not that of a gpt-oss model"):
        make_tokenizer(files)
    assert isinstance(make_tokenizer(files, chat_template="x"), HuggingFaceTokenizer)
    monkeypatch.setattr(harmony_prompts, "HarmonyTokenizer", lambda tokenizer, *, strftime_now: (tokenizer, strftime_now("%Y")))
    tokenizer, year = make_tokenizer(files)  # type: ignore[misc]
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    assert year.startswith("2")
    monkeypatch.setitem(sys.modules, "gaie_codec.text.harmony_prompts", None)
    assert isinstance(make_tokenizer(files), HuggingFaceTokenizer)
