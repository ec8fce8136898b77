"""Log probabilities of the prompt on the wires of all dialects: asked for, told, read, and bridged."""

from __future__ import annotations

import pytest

from gaie_codec import (
    Bridge,
    FinishEvent,
    InferenceRequest,
    MalformedMessageError,
    PromptEvent,
    PromptLogprob,
    SamplingParams,
    TokensEvent,
    adapters,
    encode_frame,
    snapshots,
)
from gaie_codec._conventions import Teller
from gaie_codec.adapters.wire import rank_among
from gaie_codec.tokenizer_sources import load_tokenizer
from strategies import as_read

ADAPTERS = {
    f"{dialect}-{name}": adapters.get(snapshots.load(dialect, name))
    for dialect in adapters.DIALECTS
    for name in snapshots.SNAPSHOTS[dialect]
    if not snapshots.load(dialect, name).refused
}
CARRIERS = {name: adapter for name, adapter in ADAPTERS.items() if "prompt_logprobs" in adapter.carries}
PROMPT = (
    PromptLogprob(token_id=7),
    PromptLogprob(token_id=8, logprob=-0.5, rank=1, top=((8, -0.5), (9, -1.0))),
    PromptLogprob(token_id=9, logprob=-2.0, rank=2, top=((5, -1.0), (9, -2.0))),
)
each_carrier = pytest.mark.parametrize("adapter", [pytest.param(adapter, id=name) for name, adapter in CARRIERS.items()])


def without_ranks(entries):
    return [(one.token_id, one.logprob, one.top) for one in entries]


def ask(stream=False, **sampling):
    return InferenceRequest(request_id="r", prompt_token_ids=[7, 8, 9], stream=stream, sampling=SamplingParams(max_tokens=5, **sampling))


def told_by(adapter, event):
    """What the adapter reads of the prompt in what it wrote."""
    message = adapter.encode_response(event)
    return next(found.prompt_logprobs for found in adapter.decode_response(message) if found.prompt_logprobs)


def test_only_the_oldest_schema_has_no_place_for_them():
    assert ADAPTERS.keys() - CARRIERS.keys() == {"vllm.engine-intree-0.14.0"}


@each_carrier
@pytest.mark.parametrize("more", [{}, {"logprobs": 0}, {"logprobs": 3}])
@pytest.mark.parametrize("wanted", [0, 2])
def test_the_request_says_how_many(adapter, more, wanted):
    request = ask(prompt_logprobs=wanted, temperature=0.5, **more)
    read = adapter.decode_request(adapter.encode_request(request))
    assert read.sampling.prompt_logprobs == as_read(adapter, request).sampling.prompt_logprobs >= wanted
    assert adapter.decode_request(adapter.encode_request(ask(temperature=0.5, **more))).sampling.prompt_logprobs is None


@each_carrier
def test_the_answer_tells_them(adapter):
    text = "" if adapter.sends_text else None
    finish = FinishEvent(token_ids=[40], text=text, prompt_logprobs=PROMPT, prompt_tokens=3, completion_tokens=1)
    tokens = TokensEvent(token_ids=[40], text=text, prompt_logprobs=PROMPT, prompt_tokens=3, completion_tokens=1)
    for event in (finish, tokens):
        told = told_by(adapter, event)
        assert without_ranks(told) == without_ranks(PROMPT)
        # vLLM's smg servicer cuts the list to as many as were asked for: who is last in it may be anywhere below.
        assert [one.rank for one in told] == ([0, 1, 0] if adapter.dialect == "vllm.engine" else [0, 1, 2])


@pytest.mark.parametrize(
    ("top", "is_cut", "rank"),
    [
        ((), False, 0),
        (((5, -1.0), (6, -2.0)), False, 0),
        (((4, -2.0), (5, -1.0)), False, 2),
        (((4, -2.0), (5, -1.0)), True, 0),
        (((4, -1.0), (5, -2.0)), True, 1),
        (((4, -1.0),), True, 0),
        (((4, -1.0), (5, -1.0)), True, 0),
        (((4, float("-inf")),), False, 1),
    ],
)
def test_ranks_are_told_only_where_they_are_certain(top, is_cut, rank):
    assert rank_among(4, top, is_cut=is_cut) == rank


@pytest.mark.parametrize("dialect", ["vllm.engine", "sglang.scheduler"])
def test_columns_of_different_lengths_are_refused(dialect):
    adapter = adapters.get(snapshots.load(dialect))
    message = adapter.encode_response(FinishEvent(token_ids=[40], prompt_logprobs=PROMPT))
    message.complete.input_logprobs.token_ids.append(5)
    with pytest.raises(MalformedMessageError):
        adapter.decode_response(message)


def test_json_that_is_none_of_sglangs_is_refused():
    adapter = adapters.get(snapshots.load("sglang.runtime"))
    message = adapter.encode_response(FinishEvent(token_ids=[40], prompt_logprobs=PROMPT))
    message.meta_info["input_token_logprobs"] = '[["a"]]'
    with pytest.raises(MalformedMessageError, match="input_token_logprobs"):
        adapter.decode_response(message)


@each_carrier
def test_a_stream_tells_them_with_the_first_tokens(adapter):
    request = ask(stream=True, prompt_logprobs=2)
    teller = Teller(adapter.convention, request, sends_text=adapter.sends_text)
    events = [
        event
        for token_id in (40, 41)
        for event in teller.gain(TokensEvent(token_ids=[token_id], text="x", prompt_tokens=3, prompt_logprobs=PROMPT))
    ]
    events += teller.finish(FinishEvent(prompt_tokens=3, prompt_logprobs=PROMPT))
    first, *others = [bool(event.prompt_logprobs) for event in events]
    assert first
    if adapter.convention.announces_prompt:
        assert isinstance(events[0], PromptEvent)
        assert not any(others)
    elif not adapter.convention.is_cumulative:
        assert others == [False, True], "once with tokens, and with the end"


TOKENIZER = load_tokenizer("builtin")


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("inbound", adapters.DIALECTS)
@pytest.mark.parametrize("outbound", adapters.DIALECTS)
def test_a_bridge_passes_them_on(inbound, outbound, stream):
    client, server = (adapters.get(snapshots.load(name)) for name in (inbound, outbound))
    bridge = Bridge(inbound, outbound, tokenizer=TOKENIZER)
    asked = client.encode_request(ask(stream=stream, prompt_logprobs=2, temperature=0.5))
    call = bridge.request_message(client.path_for(ask(stream=stream)), {}, asked.SerializeToString())
    assert call.calls[0].inference.sampling.prompt_logprobs == 2
    teller = Teller(server.convention, call.calls[0].inference, sends_text=server.sends_text)
    events = teller.gain(TokensEvent(token_ids=[40], text="x", prompt_tokens=3, prompt_logprobs=PROMPT))
    events += teller.finish(FinishEvent(finish_reason="length", prompt_tokens=3, prompt_logprobs=PROMPT), last=TokensEvent(text=""))
    response = call.response(framed=False)
    response.receive_headers()
    outputs = list(response.receive_data(b"".join(encode_frame(server.encode_response(one).SerializeToString()) for one in events)))
    response.receive_status(0)
    assert response.error is None
    response_type = client.snapshot.method_at(client.path_for(ask(stream=stream))).response
    read = [
        event
        for output in outputs
        if hasattr(output, "data")
        for event in client.decode_response(response_type.FromString(output.data))
        if event.prompt_logprobs
    ]
    assert [(one.token_id, one.logprob, one.top) for one in read[0].prompt_logprobs] == [
        (one.token_id, one.logprob, one.top) for one in PROMPT
    ]
