"""Levels of the package: no I/O below the shims, imports only go down, and importing the package costs two packages."""

import ast
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import gaie_codec

LEVELS = {"_errors": 0, "adapters": 2, "anthropic": 2, "openai": 2}
LEVELS |= dict.fromkeys(
    ("_tally", "_choices", "_text_choice", "_conventions", "_fit", "_grpc_in", "_outputs", "_parts", "_per_token", "_reader"), 2
)
LEVELS |= {"_logprob_texts": 2, "_prompt_texts": 2}
LEVELS |= dict.fromkeys(("_bridge", "_calls", "_local", "_observer", "_response", "_transcoder"), 3)
LEVELS |= dict.fromkeys(("_events", "_framing", "_sse", "_state", "_metadata", "snapshots", "text"), 1) | {"compat": 2}
LEVELS |= dict.fromkeys(("asgi", "cli", "conformance", "ext_proc", "inferencepool", "probe", "proto", "sim", "telemetry"), 4)
LEVELS |= dict.fromkeys(("testing", "tokenizer_sources", "upstream"), 4)
ROOT = Path(gaie_codec.__file__).parent
FILES = {path.relative_to(ROOT).with_suffix("").parts: path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py"}
CORE = {parts: path for parts, path in FILES.items() if LEVELS[parts[0]] < 4}
IMPURE = "asyncio socket ssl http urllib logging time datetime random secrets uuid os pathlib io tempfile subprocess threading"
ALLOWED = {*sys.stdlib_module_names, "msgspec", "google"} - {*IMPURE.split()}
EXTRAS = {("text", name): {"tokenizers", "jinja2"} for name in ("huggingface", "_chat_templates", "_detokenizers")}
EXTRAS |= {("text", name): {"openai_harmony"} for name in ("harmony", "harmony_prompts")}
EXTRAS |= {("text", "archive"): {"io"}}  # BytesIO: zipfile reads nothing but files


def imports(parts: tuple[str, ...], path: Path):
    """Dotted names of what a module imports; ours begin with a dot."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            above = ("", *parts[:-1])[: len(parts) - node.level + 1] if node.level else ()
            base = ".".join((*above, *filter(None, [node.module]))).removeprefix("gaie_codec")
            yield from [base] if base.strip(".") else (f".{alias.name}" for alias in node.names)


@pytest.mark.parametrize("parts", sorted(FILES), ids="/".join)
def test_imports_only_go_down_and_never_across(parts):
    for name in imports(parts, FILES[parts]):
        if name.startswith("."):
            top, *rest = name.split(".")[1:]
            assert LEVELS.get(top, 4) <= LEVELS[parts[0]], name  # a name of the package itself is for level 4
            assert {parts[0], top} not in ({"adapters", "openai"}, {"adapters", "anthropic"})
            assert (parts[0], top) != ("openai", "anthropic")
            if (parts[0], top) == ("adapters", "adapters") and len(parts) > 2:
                assert rest[0] in ("base", "wire") or rest[-1].startswith("_"), "an adapter knows no other"


@pytest.mark.parametrize("parts", sorted(CORE), ids="/".join)
def test_the_core_does_no_io(parts):
    assert {name.split(".")[0] for name in imports(parts, CORE[parts])} - {""} <= ALLOWED | EXTRAS.get(parts, set())
    calls = [node.func for node in ast.walk(ast.parse(CORE[parts].read_text())) if isinstance(node, ast.Call)]
    assert not {"open", "print", "input", "eval", "exec"} & {getattr(function, "id", "") for function in calls}


def test_importing_the_package_loads_no_more_than_it_needs():
    code = "import sys; before = set(sys.modules); import gaie_codec; print(*{name.split('.')[0] for name in set(sys.modules) - before})"
    loaded = set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())
    # msgspec takes typing_extensions where it is installed.
    assert loaded - {"typing_extensions", *sys.stdlib_module_names} == {"gaie_codec", "google", "msgspec"}
    assert not loaded & {"asyncio", "socket", "ssl", "http", "logging"}


def test_exports_are_sorted_and_complete():
    public = [name for name, value in vars(gaie_codec).items() if not name.startswith("_") and not isinstance(value, ModuleType)]
    assert gaie_codec.__all__ == sorted(public)
