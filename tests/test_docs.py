"""Documents that are generated, or that name things which exist."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
from pathlib import Path

import pytest

from gaie_codec.openai import chat
from gaie_codec.sim import SimServer

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_state_table_is_current() -> None:
    subprocess.run([sys.executable, str(ROOT / "tools" / "state_table.py"), "--check"], check=True)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text()):
        if "://" not in target:
            assert (document.parent / target).exists(), target


def test_every_dependency_is_explained() -> None:
    text = (ROOT / "docs" / "dependencies.md").read_text()
    project = (ROOT / "pyproject.toml").read_text().partition("[project.scripts]")[0]
    for name in re.findall(r'"([A-Za-z_-]+)>=', project):
        if name != "hatchling":
            assert name in text, name


def test_refused_fields_are_listed() -> None:
    text = (ROOT / "docs" / "differences.md").read_text()
    assert [name for name in chat.REFUSED if f"`{name}`" not in text] == []


def test_example_host_answers() -> None:
    async def play() -> str:
        server = SimServer("vllm.engine")
        port = await server.start("127.0.0.1:0")
        try:
            command = [sys.executable, str(ROOT / "examples" / "grpcio_host.py"), f"127.0.0.1:{port}"]
            body = '{"messages": [{"role": "user", "content": "Hi"}], "stream": true}'
            process = await asyncio.create_subprocess_exec(*command, body, stdout=subprocess.PIPE)
            return (await process.communicate())[0].decode()
        finally:
            await server.stop()

    output = asyncio.run(play())
    assert output.startswith("HTTP 200 {'content-type': 'text/event-stream; charset=utf-8'")
    assert output.endswith("data: [DONE]\n\n")
