"""`gaie_codec.testing`: what the strategies draw is valid, and the plugin offers candidates."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorSet
from hypothesis import given
from hypothesis import strategies as st

import gaie_codec.testing
from gaie_codec import FinishEvent, InferenceRequest, SamplingParams, TokensEvent, Transcoder, adapters, encode_frame, snapshots
from gaie_codec.adapters import DIALECTS
from gaie_codec.proto.sources import snapshot_schema
from gaie_codec.testing import ByteTokenizer, event_streams, inference_requests, messages, openai_requests, partitions

ADAPTERS = {name: adapters.get(snapshots.load("vllm.engine", name)) for name in snapshots.SNAPSHOTS["vllm.engine"]}
NEWEST = [snapshots.load(dialect) for dialect in snapshots.SNAPSHOTS]


@given(body=openai_requests())
def test_every_openai_request_is_valid(body):
    transcoder = Transcoder("vllm.engine", tokenizer=ByteTokenizer())
    call = transcoder.request("POST", "/v1/chat/completions", {}, json.dumps(body).encode(), request_id="r")
    assert call.inference.prompt_token_ids
    assert not call.dropped


@pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=ADAPTERS)
@given(data=st.data())
def test_inference_requests_are_carried_and_come_back(adapter, data):
    request = data.draw(inference_requests(adapter))
    again = adapter.decode_request(adapter.request_type.FromString(adapter.encode_request(request).SerializeToString()))
    assert again == InferenceRequest(**{name: getattr(request, name) for name in request.__struct_fields__ if name != "model"}), "exact"


@given(data=st.data(), n=st.integers(1, 9))
def test_event_streams_are_complete_answers(data, n):
    request = InferenceRequest(request_id="r", prompt_token_ids=[1, 2], sampling=SamplingParams(n=n, logprobs=2, stop=("a",)))
    events = data.draw(event_streams(request))
    finishes = [event for event in events if isinstance(event, FinishEvent)]
    assert sorted(event.index for event in finishes) == list(range(min(n, 4)))
    for finish in finishes:
        before = [event for event in events if isinstance(event, TokensEvent) and event.index == finish.index]
        assert finish.completion_tokens == sum(len(event.token_ids) for event in before)
        assert finish.matched_stop in (None, "a")
        assert all(len(event.logprobs) == len(event.token_ids) for event in before)
    assert {event.prompt_tokens for event in events} == {2}


@given(data=st.data())
def test_event_streams_become_one_answer(data):
    transcoder = Transcoder("vllm.engine", tokenizer=ByteTokenizer())
    body = {"messages": [{"role": "user", "content": "hi"}], "n": 2, "logprobs": True}
    call = transcoder.request("POST", "/v1/chat/completions", {}, json.dumps(body).encode(), request_id="r")
    events = data.draw(event_streams(call.inference))
    frames = b"".join(encode_frame(transcoder.adapter.encode_response(event).SerializeToString()) for event in events)
    response = call.response(created=1)
    response.receive_headers(())
    for piece in data.draw(partitions(frames)):
        response.receive_data(piece)
    response.receive_trailers([("grpc-status", "0")])
    assert response.error is None
    assert response.usage.completion_tokens == sum(len(event.token_ids) for event in events if isinstance(event, TokensEvent))


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
