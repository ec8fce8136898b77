"""`gaie_codec.testing`: what the strategies draw is valid, and the plugin offers candidates."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorSet
from hypothesis import given, settings
from hypothesis import strategies as st

import gaie_codec.testing
from gaie_codec import FinishEvent, InferenceRequest, PromptEvent, SamplingParams, Transcoder, adapters, encode_frame, snapshots
from gaie_codec._fit import asked_for
from gaie_codec._tally import Tally
from gaie_codec.adapters import DIALECTS
from gaie_codec.proto.sources import snapshot_schema
from gaie_codec.testing import ByteTokenizer, event_streams, inference_requests, messages, openai_requests, partitions
from strategies import as_read

ADAPTERS = {
    f"{dialect}-{name}": adapters.get(snapshots.load(dialect, name))
    for dialect in DIALECTS
    for name in snapshots.SNAPSHOTS[dialect]
    if not snapshots.load(dialect, name).refused
}
NEWEST = [snapshots.load(dialect) for dialect in snapshots.SNAPSHOTS]


@given(body=openai_requests())
def test_every_openai_request_is_valid(body):
    transcoder = Transcoder("vllm.engine", tokenizer=ByteTokenizer())
    call = transcoder.request("POST", "/v1/chat/completions", {}, json.dumps(body).encode(), request_id="r")
    assert call.inference.prompt_token_ids
    assert not call.dropped


@pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=ADAPTERS)
@settings(max_examples=max(10, 4 * settings().max_examples // len(ADAPTERS)))  # they share nearly all code
@given(data=st.data())
def test_inference_requests_are_carried_and_come_back(adapter, data):
    request = data.draw(inference_requests(adapter))
    assert set(asked_for(request)) - {"request_id"} <= adapter.carries
    message = adapter.encode_request(request)
    again = adapter.decode_request(type(message).FromString(message.SerializeToString()))
    assert again == as_read(adapter, request), "exact"


@given(data=st.data(), n=st.integers(1, 9), name=st.sampled_from(sorted(ADAPTERS)), stream=st.booleans())
def test_event_streams_are_complete_answers(data, n, name, stream):
    adapter = ADAPTERS[name]
    request = InferenceRequest(
        request_id="r", prompt_token_ids=[1, 2], stream=stream, sampling=SamplingParams(n=n, logprobs=2, stop=("a",), max_tokens=9)
    )
    events = data.draw(event_streams(request, adapter))
    finishes = [event for event in events if isinstance(event, FinishEvent)]
    names = {event.choice_id or event.index for event in events if not isinstance(event, PromptEvent)}
    assert len(finishes) == len(names) == min(n, 4)
    tallies = {name: Tally(0, adapter.counts) for name in names}
    for event in events:
        if not isinstance(event, PromptEvent):
            token_ids, entries = tallies[event.choice_id or event.index].take(event)
            assert len(entries) == len(token_ids) or not token_ids
    for finish in finishes:
        assert finish.matched_stop is None or (finish.matched_stop == "a" and adapter.ends_at_stop_strings)
        tallied = tallies[finish.choice_id or finish.index].completion_tokens
        assert finish.completion_tokens == tallied or adapter.convention.counts == "delta"
    assert max(event.prompt_tokens for event in events) == 2
    assert stream or len(events) == len(finishes)


@pytest.mark.parametrize("dialect", DIALECTS)
@given(data=st.data(), stream=st.booleans())
def test_event_streams_become_one_answer(dialect, data, stream):
    transcoder = Transcoder(dialect, tokenizer=ByteTokenizer(), passthrough=False)
    body = {"messages": [{"role": "user", "content": "hi"}], "n": 2, "logprobs": True, "max_tokens": 50, "stream": stream}
    call = transcoder.request("POST", "/v1/chat/completions", {}, json.dumps(body).encode(), request_id="r")
    response = call.response(created=1)
    expected = 0
    for place, one in enumerate(call.calls):
        events = data.draw(event_streams(one.inference, transcoder.adapter))
        frames = b"".join(encode_frame(transcoder.adapter.encode_response(event).SerializeToString()) for event in events)
        response.receive_headers((), call=place)
        for piece in data.draw(partitions(frames)):
            response.receive_data(piece, call=place)
        response.receive_trailers([("grpc-status", "0")], call=place)
        tallies = [Tally(index, transcoder.adapter.counts) for index in range(one.choices)]
        places = {}
        for event in events:
            if not isinstance(event, PromptEvent):
                index = places.setdefault(event.choice_id, len(places)) if event.choice_id else event.index
                tallies[index].take(event)
        expected += sum(tally.completion_tokens for tally in tallies)
    assert response.error is None
    assert response.usage.completion_tokens == expected
    assert response.usage.prompt_tokens == len(call.inference.prompt_token_ids)


@pytest.mark.parametrize("snapshot", NEWEST, ids=str)
@given(data=st.data())
def test_messages_of_any_snapshot(snapshot, data):
    service = snapshot.pool.FindServiceByName(snapshot.services[0])
    method = data.draw(st.sampled_from(list(service.methods)))
    for descriptor in (method.input_type, method.output_type):
        message = data.draw(messages(snapshot, descriptor.full_name))
        assert type(message).FromString(message.SerializeToString()) == message


@given(data=st.data(), content=st.binary(max_size=40))
def test_partitions_are_complete(data, content):
    pieces = data.draw(partitions(content, max_cuts=4))
    assert b"".join(pieces) == content
    assert len(pieces) <= 5


@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_the_byte_tokenizer_says_what_it_was_told(text):
    tokenizer = ByteTokenizer()
    detokenizer = tokenizer.detokenizer(())
    said = ""
    for token_id in [*tokenizer.encode(text, add_special_tokens=False), 256]:
        peeked = detokenizer.peek(token_id)
        assert detokenizer.decode([token_id]) == peeked, "peeking changes nothing"
        said += peeked
    assert said == text


def test_importing_it_imports_no_hypothesis():
    code = "import gaie_codec.testing.plugin, sys; sys.exit('hypothesis' in sys.modules or 'grpc' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert set(gaie_codec.testing.__all__) == set(gaie_codec.testing._MODULES)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        gaie_codec.testing.nothing  # noqa: B018


# The plugin


@pytest.fixture
def run_pytest(tmp_path):
    def run(test: str, *arguments: str) -> str:
        Path(tmp_path, "test_it.py").write_text(test)
        installed = any(point.value == "gaie_codec.testing.plugin" for point in entry_points(group="pytest11"))
        plugin = [] if installed else ["-p", "gaie_codec.testing.plugin"]
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *plugin, "-rA", *arguments, "test_it.py"]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False).stdout

    return run


SHOWN = "def test_it(candidate_snapshot):\n    print('saw', candidate_snapshot)\n"


def test_the_plugin_offers_the_newest_snapshots(run_pytest):
    output = run_pytest(SHOWN)
    assert [line for line in output.splitlines() if line.startswith("saw ")] == [f"saw {snapshots.load(name)}" for name in DIALECTS]


def test_the_plugin_reads_a_candidate(run_pytest, tmp_path):
    schema = FileDescriptorSet()
    schema.CopyFrom(snapshot_schema("sglang.api", "0.5.22").set)
    (tmp_path / "new.binpb").write_bytes(schema.SerializeToString())
    output = run_pytest(SHOWN, "--gaie-proto", "new.binpb", "--gaie-proto", "0.33.0")
    assert [line for line in output.splitlines() if line.startswith("saw ")] == ["saw sglang.api new.binpb", "saw vllm.inference 0.33.0"]
    output = run_pytest(SHOWN, "--gaie-proto", "gone.proto")
    assert "gone.proto: neither a file or folder" in output


def test_a_test_may_parametrize_the_fixture_itself(run_pytest):
    output = run_pytest(
        "import pytest\nfrom gaie_codec import snapshots\n"
        "@pytest.mark.parametrize('candidate_snapshot', [snapshots.load('sglang.api', '0.5.22')], indirect=True)\n" + SHOWN
    )
    assert "saw sglang.api 0.5.22" in output
