"""What servers answer, and what networks make of the bytes."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import DrawFn

from .. import FinishEvent, InferenceRequest, TokenLogprob, TokensEvent

_MAX_CHOICES = 4


@st.composite
def event_streams(
    draw: DrawFn, request: InferenceRequest, *, vocab_size: int = 256, max_messages: int = 5
) -> list[TokensEvent | FinishEvent]:
    """One complete answer to `request`: the tokens of every choice (at most four), interleaved, and one finish for each.

    Log probabilities, stop matches and KV transfer parameters appear only where the request asks for them.
    """
    events: list[TokensEvent | FinishEvent] = []
    n = min(max(request.sampling.n, 1), _MAX_CHOICES)
    ids = st.integers(0, vocab_size - 1)
    seen = [0] * n
    prompt: dict[str, Any] = {
        "prompt_tokens": len(request.prompt_token_ids) or draw(st.integers(1, 50)),
        "cached_tokens": draw(st.integers(0, 50)),
    }
    matches: list[str | int | None] = [None, *request.sampling.stop, *request.sampling.stop_token_ids]
    for index in draw(st.lists(st.integers(0, n - 1), max_size=max_messages)):
        token_ids = draw(st.lists(ids, min_size=1, max_size=3))
        seen[index] += len(token_ids)
        logprobs = tuple(_logprob(draw(st.integers(1, 100)), token_id, request) for token_id in token_ids)
        asked = logprobs if request.sampling.logprobs is not None else ()
        events.append(TokensEvent(index=index, token_ids=token_ids, logprobs=asked, completion_tokens=len(token_ids), **prompt))
    for index in draw(st.permutations(range(n))):
        finish_reason = draw(st.sampled_from(("stop", "length")))
        events.append(
            FinishEvent(
                index=index,
                finish_reason=finish_reason,
                matched_stop=draw(st.sampled_from(matches)) if finish_reason == "stop" else None,
                completion_tokens=seen[index],
                kv_transfer_params=draw(st.sampled_from(("", '{"remote_port":5}'))) if request.kv_transfer_params else "",
                **prompt,
            )
        )
    return events


def _logprob(steps: int, token_id: int, request: InferenceRequest) -> TokenLogprob:
    # Quarters are exact in every float format.
    top = tuple((token_id + place, -0.25 * (steps + place)) for place in range(min(request.sampling.logprobs or 0, 3)))
    return TokenLogprob(token_id=token_id, logprob=-0.25 * steps, top=top)


@st.composite
def partitions(draw: DrawFn, data: bytes, *, max_cuts: int = 12) -> list[bytes]:
    """`data` in pieces, in order and complete; some of them may be empty."""
    cuts = sorted(draw(st.lists(st.integers(0, len(data)), max_size=max_cuts)))
    return [data[start:end] for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True)]
