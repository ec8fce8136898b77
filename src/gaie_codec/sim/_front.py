"""How one kind of model server tells an answer: steps of the engine -> the events of its dialect, by the adapter's own Convention.

The modules of the dialects override what their servers do besides: what they refuse, and how failures and aborts look.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, TypeAlias

import msgspec

from .. import (
    BodyEvent,
    CodecError,
    EmbeddingEvent,
    ErrorEvent,
    FinishEvent,
    InferenceRequest,
    MalformedRequestError,
    ModelInfo,
    PromptEvent,
    PromptLogprob,
    TokensEvent,
)
from .._conventions import Teller
from ._script import Script

if TYPE_CHECKING:
    from ..adapters.base import Adapter, Convention

Event: TypeAlias = PromptEvent | TokensEvent | FinishEvent | ErrorEvent | BodyEvent | EmbeddingEvent


class Habits(msgspec.Struct, frozen=True, kw_only=True):
    """How an engine and the front end before it generate. The defaults are those of vLLM behind an smg servicer."""

    sends_text: bool = False

    knows_stops: bool = True
    """Stop strings end a choice."""

    holds: Literal["text", "tokens"] = "text"
    """What waits while a stop string could still come: vLLM's front end keeps text back, SGLang's scheduler whole tokens."""

    length_first: bool = False
    """Of several reasons to end at a token, the length is the one told (SGLang's `check_finished`); with vLLM it is the last."""

    names_eos: bool = False
    """`matched_stop` is the EOS id, if that ended the choice."""


VLLM = Habits()
SGLANG = Habits(holds="tokens", length_first=True, names_eos=True)


class Step(msgspec.Struct, frozen=True):
    """What a choice gained, and its end if it ended."""

    gained: TokensEvent
    end: FinishEvent | None = None


class Front:
    """Tells the answer to one request."""

    habits = VLLM

    def __init__(self, adapter: Adapter, request: InferenceRequest) -> None:
        self.adapter = adapter
        self.request = request
        self.teller = Teller(adapter.convention, request, sends_text=self.habits.sends_text)

    def check(self, token_ids: Sequence[int], model: ModelInfo) -> None:
        """Raise CodecError for what this server refuses of the request."""

    def convention(self, script: Script) -> Convention:
        """How this server tells; of servers that come in two kinds, the kind that the script chose."""
        return self.adapter.convention

    def begin(self, script: Script, prompt_tokens: int, prompt_logprobs: tuple[PromptLogprob, ...] = ()) -> Sequence[Event]:
        """What comes before all tokens."""
        self.teller = Teller(self.convention(script), self.request, sends_text=self.habits.sends_text)
        return self.teller.begin(prompt_tokens, prompt_logprobs)

    def tell(self, step: Step) -> Sequence[Event]:
        """What the step is told as; for a request without `stream` nothing until choices end."""
        if step.end is None:
            return self.teller.gain(step.gained)
        return self.teller.finish(step.end, last=step.gained)

    def refuse(self, error: CodecError) -> Sequence[Event]:
        """How the server says no. Raises CodecError where it is by the status."""
        raise error

    def fail(self, error: CodecError, running: Sequence[int], sent: int) -> Sequence[Event]:
        """How a failure of the engine is told, after so many messages, while these choices run. Raises CodecError likewise."""
        raise error

    def abort(self, steps: Sequence[Step]) -> Sequence[Event]:
        """How the end by an Abort is told; the steps end the choices that still ran. Raises CodecError likewise."""
        return [event for step in steps for event in self.tell(step)]


def two_servicers(convention: Convention, script: Script) -> Convention:
    """The Python servicer's convention, or that of the Rust one, which counts and repeats everything."""
    return msgspec.structs.replace(convention, counts="total", repeats="all") if script.counts == "cumulative" else convention


def check_prompt(token_ids: Sequence[int], model: ModelInfo) -> None:
    """Raise MalformedRequestError for a prompt that vLLM refuses."""
    if not token_ids:
        raise MalformedRequestError("The decoder prompt cannot be empty")
    if len(token_ids) >= model.max_model_len:
        raise MalformedRequestError(
            f"The decoder prompt (length {len(token_ids)}) is longer than the maximum model length of {model.max_model_len}."
        )
    if max(token_ids) >= model.vocab_size:
        raise MalformedRequestError(f"Token id {max(token_ids)} is out of vocabulary")
