"""What servers answer, and what networks make of the bytes."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import DrawFn

from .. import FinishEvent, InferenceRequest, TokenLogprob, TokensEvent
from .._conventions import Teller
from .._events import Event
from ..adapters.base import Adapter

_MAX_CHOICES = 4
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


@st.composite
def event_streams(
    draw: DrawFn, request: InferenceRequest, adapter: Adapter, *, vocab_size: int = 256, max_messages: int = 5
) -> list[Event]:
    """One complete answer of a server of `adapter`'s dialect to `request`: the tokens of every choice (at most four), interleaved, and one
    finish for each.

    What a message repeats and counts is as that server does it (`Adapter.convention`). Log probabilities, stop matches and KV transfer
    parameters appear only where the request asks for them. A server that sends text sends one letter for each token.
    """
    events: list[Event] = []
    sends_text = adapter.sends_text or (request.prompt_text is not None and adapter.answers_text_with_text)
    teller = Teller(adapter.convention, request, sends_text=sends_text)
    n = min(max(request.sampling.n, 1), _MAX_CHOICES)
    ids = st.integers(0, vocab_size - 1)
    prompt: dict[str, Any] = {
        "prompt_tokens": len(request.prompt_token_ids) or draw(st.integers(1, 50)),
        "cached_tokens": draw(st.integers(0, 50)),
    }
    stops = request.sampling.stop if adapter.ends_at_stop_strings else ()
    matches: list[str | int | None] = [None, *stops, *request.sampling.stop_token_ids]

    def tokens(index: int) -> TokensEvent:
        token_ids = draw(st.lists(ids, min_size=1, max_size=3))
        logprobs = tuple(_logprob(draw(st.integers(1, 100)), token_id, request) for token_id in token_ids)
        return TokensEvent(
            index=index,
            token_ids=token_ids,
            text="".join(_LETTERS[token_id % len(_LETTERS)] for token_id in token_ids) if sends_text else None,
            logprobs=logprobs if request.sampling.logprobs is not None else (),
            **prompt,
        )

    for index in draw(st.lists(st.integers(0, n - 1), max_size=max_messages)):
        events += teller.gain(tokens(index))
    for index in draw(st.permutations(range(n))):
        finish_reason = draw(st.sampled_from(("stop", "length")))
        finish = FinishEvent(
            index=index,
            finish_reason=finish_reason,
            matched_stop=draw(st.sampled_from(matches)) if finish_reason == "stop" else None,
            kv_transfer_params=draw(st.sampled_from(("", '{"remote_port":5}'))) if request.kv_transfer_params else "",
            **prompt,
        )
        events += teller.finish(finish, last=draw(st.none() | st.just(tokens(index))))
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
