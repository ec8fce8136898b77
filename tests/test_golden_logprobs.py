"""vLLM's answers with log probabilities, for messages that say all that vLLM's own engine says.

The gRPC side of these goldens lacks log probabilities of the prompt, and has one of the likeliest less than vLLM shows besides a token that
is not among them. Here messages are made of the values in vLLM's answers: with `vllm.inference`, whose wire has room for all of them, the
answer is equal to vLLM's; with `vllm.engine` it lacks what that wire cannot carry, and no more.
"""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest

from gaie_codec import FinishEvent, ModelInfo, PromptLogprob, TokenLogprob, TokensEvent, Transcoder
from gaie_codec._conventions import Teller
from strategies import answer_to, frames_of
from test_goldens import CASES, DIFFERENCES, TOKENIZER, normalize, parsed, transcode

NAMES = sorted(name for name, heading in DIFFERENCES.items() if "ikeliest" in heading or "prompt" in heading)
STEP = 0.5  # by so much does the scripted engine make each next id less likely


def events_of(body: Any) -> list[Any]:
    return body if isinstance(body, list) else [body]


def prompt_logprobs(case: dict[str, Any]) -> list[Any] | None:
    """As vLLM's answer has them; those of the streamed case are those of its unary twin."""
    twin = CASES[case["name"].removesuffix("_stream")]
    body = json.loads(twin["http"]["body"])
    return body.get("prompt_logprobs") or body["choices"][0].get("prompt_logprobs")


def top_logprobs(case: dict[str, Any]) -> list[dict[str, float]]:
    """Of every token of the output."""
    columns = [
        choice["logprobs"]
        for event in events_of(parsed(case["http"]["body"]))
        if event != "data: [DONE]"
        for choice in event["choices"]
        if choice.get("logprobs")
    ]
    tops = [top for one in columns for top in one["top_logprobs"]]
    return tops[len(prompt_logprobs(case) or ()) :]


def output_of(case: dict[str, Any]) -> tuple[list[tuple[int, float]], str]:
    """Ids, log probabilities and the end, as the golden's gRPC side tells them."""
    transcoder = Transcoder("vllm.engine", tokenizer=TOKENIZER)
    entries: list[tuple[int, float]] = []
    reason = ""
    for message in case["grpc_vllm"][0]["responses_b64"]:
        (event,) = transcoder.adapter.decode_response(transcoder.adapter.response_type.FromString(base64.b64decode(message)))
        if isinstance(event, FinishEvent):
            reason = event.finish_reason
            if entries:
                continue
        logprobs = [one.logprob for one in event.logprobs] or [0.0] * len(event.token_ids)
        entries += zip(event.token_ids, logprobs, strict=True)
    return entries, reason


def wire(call: Any, case: dict[str, Any]) -> bytes:
    """The response of the bound dialect that says what the golden's answer says."""
    adapter, request = call.transcoder.adapter, call.calls[0].inference
    is_engine = adapter.dialect == "vllm.engine"

    def likeliest(token_id: int, value: float, all_of_them: list[tuple[int, float]], most: int) -> tuple[tuple[int, float], ...]:
        """vLLM shows the token, then the others; smg's servicer cuts that, the Rust front end sends the likeliest by themselves."""
        others = [one for one in all_of_them if one[0] != token_id]
        return tuple([(token_id, value), *others][:most] if is_engine else others if len(others) == most else all_of_them)

    prompt = []
    for token_id, place in zip(request.prompt_token_ids, prompt_logprobs(case) or (), strict=False):
        if place is None:
            prompt.append(PromptLogprob(token_id=token_id))
            continue
        values = [(int(other), one["logprob"]) for other, one in place.items()]
        most = request.sampling.prompt_logprobs
        top = likeliest(token_id, values[0][1], values, most)
        prompt.append(PromptLogprob(token_id=token_id, logprob=values[0][1], rank=1, top=top))
    entries, reason = output_of(case)
    tops = top_logprobs(case)
    detokenizer = TOKENIZER.detokenizer(request.prompt_token_ids)
    told: dict[str, Any] = {"prompt_tokens": len(request.prompt_token_ids), "cached_tokens": 3, "prompt_logprobs": tuple(prompt)}
    teller = Teller(adapter.convention, request, sends_text=adapter.sends_text)
    events = []
    for place, (token_id, value) in enumerate(entries):
        logprobs: tuple[TokenLogprob, ...] = ()
        if request.sampling.logprobs is not None:
            count = 1 + place % 2 if "emoji" in case["name"] or not tops[place:] else len(tops[place])
            all_of_them = [(token_id + further, value - STEP * further) for further in range(count)]
            if not place % 2 and request.sampling.logprobs == 2:
                all_of_them[1:] = [(token_id + 2, value - 1.0)]
            logprobs = (
                TokenLogprob(token_id=token_id, logprob=value, top=likeliest(token_id, value, all_of_them, request.sampling.logprobs)),
            )
        gained = TokensEvent(token_ids=[token_id], text=detokenizer.decode((token_id,)), logprobs=logprobs, **told)
        if place == len(entries) - 1:
            events += teller.finish(FinishEvent(finish_reason=reason, **told), last=gained)
        else:
            events += teller.gain(gained)
    return frames_of(adapter, events)


def answer(name: str, dialect: str) -> Any:
    case = CASES[name]
    http = case["http"]
    transcoder = Transcoder(
        dialect,
        tokenizer=TOKENIZER,
        model=ModelInfo(max_model_len=2048, served_model_name="test-model"),
        reasoning_parser="none",
        tool_call_parser="none",
        prompt_tokens_details="--enable-prompt-tokens-details" in case["oracle"],
        return_tokens_as_token_ids="--return-tokens-as-token-ids" in case["oracle"],
    )
    call = transcoder.request(http["method"], http["path"], http["headers"], json.dumps(http["request"]).encode(), request_id="unused")
    return parsed(answer_to(call, [wire(call, case)]).body.decode())


@pytest.mark.parametrize("name", NAMES)
def test_equal_to_vllm_where_the_wire_has_room(name: str) -> None:
    assert answer(name, "vllm.inference") == parsed(CASES[name]["http"]["body"])


def without_what_the_wire_lacks(body: Any, most: int, *, ranks: bool = True) -> Any:
    """vLLM's answer with `most` of the likeliest, and no rank of a token that may be beyond them."""
    if isinstance(body, list):
        return [without_what_the_wire_lacks(one, most) for one in body]
    if not isinstance(body, dict):
        return body
    cut = {key: without_what_the_wire_lacks(value, most) for key, value in body.items()}
    if "top_logprobs" in cut:
        cut["top_logprobs"] = [None if top is None else dict(list(top.items())[:most]) for top in cut["top_logprobs"]]
    if "prompt_logprobs" in cut:
        cut["prompt_logprobs"] = [
            None if place is None else {key: {**one, "rank": None} for key, one in list(place.items())[:most]}
            for place in body["prompt_logprobs"]
        ]
    return cut


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"comp_logprobs_emoji"}))
def test_equal_to_vllm_but_for_what_smg_cuts_off(name: str) -> None:
    most = CASES[name]["http"]["request"].get("logprobs", 1)
    assert answer(name, "vllm.engine") == normalize(without_what_the_wire_lacks(parsed(CASES[name]["http"]["body"]), most))


@pytest.mark.parametrize("name", [name for name in NAMES if "comp" in name and "stream" not in name])
def test_what_a_server_does_not_tell_is_null(name: str) -> None:
    """The goldens' own gRPC side, which has no log probabilities of the prompt: its tokens are there all the same."""
    request = CASES[name]["http"]["request"]
    ours, theirs = parsed(transcode(CASES[name])[2]), parsed(CASES[name]["http"]["body"])
    (mine,), (choice,) = ours.pop("choices"), theirs.pop("choices")
    assert ours == theirs
    assert "prompt_logprobs" not in mine
    for key in ("text", "finish_reason"):
        assert mine[key] == choice[key]
    if "logprobs" in request:
        for key in ("tokens", "text_offset"):
            assert mine["logprobs"][key] == choice["logprobs"][key]
        prompt = len(prompt_logprobs(CASES[name]) or ())
        assert mine["logprobs"]["token_logprobs"][:prompt] == mine["logprobs"]["top_logprobs"][:prompt] == [None] * prompt
        assert mine["logprobs"]["token_logprobs"][prompt:] == choice["logprobs"]["token_logprobs"][prompt:]
