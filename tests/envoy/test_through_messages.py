"""The anthropic SDK through a real Envoy, which asks the endpoint picker."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import anthropic
import pytest
from stack import Stack, make_sim, stack_of

from test_e2e import ask


@pytest.fixture(scope="module", params=["vllm.engine", "sglang.api"])
def stack(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with stack_of(tmp_path_factory.mktemp("stack"), sims=[make_sim(request.param)]) as made:
        yield made


def test_messages(stack: Stack) -> None:
    with anthropic.Anthropic(base_url=stack.url, api_key="none", max_retries=0, timeout=30) as client:
        asked: dict[str, Any] = {"model": "sim", "messages": ask({"text": "Hello there."})}
        unary = client.messages.create(max_tokens=50, **asked)
        with client.messages.stream(max_tokens=50, **asked) as stream:
            assert "".join(stream.text_stream) == "Hello there."
            final = stream.get_final_message()
        assert [block.text for block in (*final.content, *unary.content)] == ["Hello there."] * 2
        assert final.usage.output_tokens == unary.usage.output_tokens
        assert client.messages.count_tokens(**asked).input_tokens == unary.usage.input_tokens
        with pytest.raises(anthropic.NotFoundError) as unknown:
            client.messages.create(model="other", max_tokens=5, messages=ask())
        assert unknown.value.body["error"]["type"] == "not_found_error"
        failing = ask({"error": {"code": "RESOURCE_EXHAUSTED", "message": "the queue is full", "after": 0}})
        with pytest.raises(anthropic.RateLimitError):
            client.messages.create(model="sim", max_tokens=5, messages=failing)
