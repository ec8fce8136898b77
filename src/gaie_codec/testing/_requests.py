"""Requests: as a client sends them, and as one adapter can carry them."""

from __future__ import annotations

from functools import partial
from typing import Any, Final

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from .. import Constraint, InferenceRequest, Media, SamplingParams
from ..adapters.base import Adapter

_TEXT: Final = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), max_size=8)
_NAME: Final = st.text("abcdefghijklmnopqrstuvwxyz-0123456789", min_size=1, max_size=12)
_SCHEMAS: Final = st.sampled_from(({}, {"type": "object"}, {"type": "string", "maxLength": 5}))
_MAX_COUNT: Final = 2**31 - 1
_KINDS: Final = ("image", "video", "audio")
_MEDIA: Final = st.builds(Media, kind=st.sampled_from(_KINDS), url=st.sampled_from(("https://host/a", "data:text/plain,b")))


def _floats(low: float, high: float, *, exclude_min: bool = False) -> SearchStrategy[float]:
    return st.floats(low, high, width=32, exclude_min=exclude_min, allow_subnormal=False)


# OpenAI


def openai_requests(*, vocab_size: int = 256, max_n: int = 3) -> SearchStrategy[dict[str, Any]]:
    """Bodies of `POST /v1/chat/completions` that are valid for vLLM: texts, sampling, stops, log probabilities, structured output.

    Tools, media and what no model server here can be told are not among them. Token ids are below `vocab_size`.
    """
    message = st.fixed_dictionaries({"role": st.sampled_from(("user", "assistant", "system")), "content": _TEXT})
    last = st.fixed_dictionaries({"role": st.just("user"), "content": _TEXT.filter(bool)})
    token_ids = st.integers(0, vocab_size - 1)
    plain = st.sampled_from(({"type": "text"}, {"type": "json_object"}))
    fields = st.fixed_dictionaries(
        {"messages": st.tuples(st.lists(message, max_size=2), last).map(lambda parts: [*parts[0], parts[1]])},
        optional={
            "model": _NAME,
            "temperature": _floats(0, 2),
            "top_p": _floats(0, 1, exclude_min=True),
            "top_k": st.integers(-1, 100),
            "min_p": _floats(0, 1),
            "frequency_penalty": _floats(-2, 2),
            "presence_penalty": _floats(-2, 2),
            "repetition_penalty": _floats(0.0625, 2),
            "max_completion_tokens": st.integers(16, 4096),
            "min_tokens": st.integers(0, 16),
            "stop": _TEXT.filter(bool) | st.lists(_TEXT.filter(bool), min_size=1, max_size=4),
            "stop_token_ids": st.lists(token_ids, max_size=3),
            "ignore_eos": st.booleans(),
            "skip_special_tokens": st.booleans(),
            "include_stop_str_in_output": st.booleans(),
            "seed": st.integers(0, _MAX_COUNT),
            "n": st.integers(1, max_n),
            "logit_bias": st.dictionaries(token_ids.map(str), _floats(-100, 100), max_size=3),
            "response_format": plain | st.builds(_schema_format, _NAME, _SCHEMAS),
            "user": _NAME,
        },
    )
    streams = st.sampled_from(({}, {"stream": False}, {"stream": True}, {"stream": True, "stream_options": {"include_usage": True}}))
    logprobs: SearchStrategy[dict[str, Any]] = st.just({}) | st.integers(0, 5).map(lambda top: {"logprobs": True, "top_logprobs": top})
    return st.tuples(fields, streams, logprobs).map(lambda parts: _valid(parts[0] | parts[1] | parts[2]))


def _valid(body: dict[str, Any]) -> dict[str, Any]:
    # Greedy choices would all be the same, and vLLM refuses them.
    return {name: value for name, value in body.items() if name != "n" or body.get("temperature") != 0}


def _schema_format(name: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": name, "schema": schema}}


# The neutral vocabulary


def inference_requests(adapter: Adapter) -> SearchStrategy[InferenceRequest]:
    """Requests that say nothing which `adapter` does not carry. Values are in OpenAI's ranges; floats fit in 32 bits exactly."""
    carried = adapter.carries
    prompts: list[SearchStrategy[dict[str, Any]]] = []
    if "prompt_token_ids" in carried:
        prompts.append(st.fixed_dictionaries({"prompt_token_ids": st.lists(st.integers(0, _MAX_COUNT), min_size=1, max_size=5)}))
    if "prompt_text" in carried:
        prompts.append(st.fixed_dictionaries({"prompt_text": _TEXT.filter(bool)}))
    fields: dict[str, SearchStrategy[Any]] = {
        "model": _NAME,
        "stream": st.booleans(),
        "priority": st.integers(-100, 100),
        "cache_salt": _NAME,
        "lora_name": _NAME,
        "data_parallel_rank": _counts(adapter, "data_parallel_rank", 0, 7),
        "kv_transfer_params": st.sampled_from(("{}", '{"do_remote_decode":true,"remote_port":5}')),
        "session_id": _NAME,
        "trace_headers": st.just({"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}),
        "return_token_ids": st.booleans(),
        "thinks": st.booleans(),
        "media": st.lists(_MEDIA, max_size=3).map(lambda drawn: tuple(sorted(drawn, key=lambda one: _KINDS.index(one.kind)))),
    }
    sampling = _optional(_sampling(adapter), carried).map(lambda drawn: SamplingParams(**drawn))
    return st.builds(
        lambda request_id, prompt, sampling, rest: InferenceRequest(request_id=request_id, sampling=sampling, **_together(prompt, rest)),
        _NAME,
        st.one_of(prompts) if prompts else st.just({}),
        sampling,
        _optional(fields, carried),
    )


def _together(prompt: dict[str, Any], rest: dict[str, Any]) -> dict[str, Any]:
    # Media stand where the tokens of the prompt say so, and ids come back only from a prompt of ids.
    with_ids = rest if "prompt_text" not in prompt else {name: rest[name] for name in rest if name not in ("media", "return_token_ids")}
    return prompt | with_ids


def _optional(fields: dict[str, SearchStrategy[Any]], carried: frozenset[str]) -> SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional={name: values for name, values in fields.items() if name in carried or name == "constraint"})


def _counts(adapter: Adapter, name: str, low: int, high: int = _MAX_COUNT) -> SearchStrategy[int]:
    lowest, highest = adapter.ranges.get(name, (low, high))
    return st.integers(int(max(low, lowest)), int(min(high, highest)))


def _sampling(adapter: Adapter) -> dict[str, SearchStrategy[Any]]:
    counts = partial(_counts, adapter)
    token_ids = st.lists(st.integers(0, _MAX_COUNT), min_size=1, max_size=3).map(tuple)
    return {
        "temperature": _floats(0, 2),
        "top_p": _floats(0, 1, exclude_min=True),
        "top_k": counts("top_k", 0),
        "min_p": _floats(0, 1),
        "frequency_penalty": _floats(-2, 2),
        "presence_penalty": _floats(-2, 2),
        "repetition_penalty": _floats(0.0625, 2),
        "max_tokens": counts("max_tokens", 1),
        "min_tokens": counts("min_tokens", 0),
        "stop": st.lists(_TEXT.filter(bool), min_size=1, max_size=3).map(tuple),
        "stop_token_ids": token_ids,
        "skip_special_tokens": st.booleans(),
        "spaces_between_special_tokens": st.booleans(),
        "ignore_eos": st.booleans(),
        "n": counts("n", 1, 4),
        "logprobs": counts("logprobs", 0, 20),
        "prompt_logprobs": counts("prompt_logprobs", 0, 20),
        "seed": counts("seed", 0),
        "include_stop_str_in_output": st.booleans(),
        "logit_bias": st.dictionaries(st.integers(0, _MAX_COUNT), _floats(-100, 100), min_size=1, max_size=3),
        "bad_words": st.lists(_TEXT.filter(bool), min_size=1, max_size=3).map(tuple),
        "bad_words_token_ids": st.lists(token_ids, min_size=1, max_size=3).map(tuple),
        "allowed_token_ids": token_ids,
        "grammar_from_first_token": st.booleans() if "grammar_from_first_token" in adapter.sends else st.just(False),
        "thinking_token_budget": counts("thinking_token_budget", 0),
        "stream_interval": counts("stream_interval", 1),
        "constraint": _constraints(adapter.carries),
    }


def _constraints(carried: frozenset[str]) -> SearchStrategy[Constraint | None]:
    kinds = sorted(name.partition(".")[2] for name in carried if name.startswith("constraint."))
    values = {
        "json_schema": st.just('{"type":"object"}'),
        "json_object": st.just(""),
        "choice": st.lists(_TEXT.filter(bool), min_size=1, max_size=3).map(tuple),
    }
    made: list[SearchStrategy[Any]] = [
        st.builds(Constraint, kind=st.just(kind), value=values.get(kind, _TEXT.filter(bool))) for kind in kinds
    ]
    return st.one_of(st.none(), *made)
