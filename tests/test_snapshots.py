"""Snapshots: side by side in one process, equal to what was published, and generated from `proto_vendor/` and nothing else."""

from __future__ import annotations

import importlib
import importlib.util
import json
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import pytest
from google.protobuf import descriptor_pool
from google.protobuf.descriptor_pb2 import FileDescriptorProto

from gaie_codec import snapshots
from gaie_codec._errors import UsageError
from gaie_codec.snapshots import SNAPSHOTS, Snapshot, load

ROOT = Path(__file__).parent.parent
VENDOR = ROOT / "tools" / "vendor.py"
PROVENANCE = {
    (facts["dialect"], facts["snapshot"]): facts
    for facts in (json.loads(path.read_text()) for path in (ROOT / "proto_vendor").rglob("provenance.json"))
}
ALL = [(dialect, name) for dialect, names in SNAPSHOTS.items() for name in names]
FROM_SMG = [key for key in ALL if PROVENANCE[key]["package"] == "smg-grpc-proto"]


@pytest.fixture(scope="module")
def proto_text():
    spec = importlib.util.spec_from_file_location("proto_text", ROOT / "tools" / "proto_text.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def data_of(dialect, name):
    return importlib.import_module(f"gaie_codec.snapshots._data.{snapshots.MODULES[dialect][name]}").FILES


def vendor(*arguments):
    return subprocess.run([sys.executable, VENDOR, *map(str, arguments)], capture_output=True, text=True, check=False)


# Several versions in one process


def test_old_and_new_live_side_by_side():
    old, new = load("vllm.engine", "intree-0.14.0"), load("vllm.engine", "smg-0.4.28")
    assert old.message("GenerateRequest").DESCRIPTOR.full_name == new.message("GenerateRequest").DESCRIPTOR.full_name
    assert new.has_field("GenerateRequest", "kv_transfer_params_json")
    assert not old.has_field("GenerateRequest", "kv_transfer_params_json")

    said_by_new = new.message("GenerateRequest")(request_id="r", kv_transfer_params_json="{}")
    heard_by_old = old.message("GenerateRequest").FromString(said_by_new.SerializeToString())
    assert heard_by_old.request_id == said_by_new.request_id == "r"
    assert not hasattr(heard_by_old, "kv_transfer_params_json")
    with pytest.raises(ValueError, match=r"no .*kv_transfer_params_json"):
        old.message("GenerateRequest")(kv_transfer_params_json="{}")
    with pytest.raises(TypeError):
        old.message("GenerateRequest")(sampling_params=new.message("SamplingParams")())


@pytest.mark.parametrize(("dialect", "name"), ALL)
def test_every_snapshot_loads_and_every_method_resolves(dialect, name):
    snapshot = load(dialect, name)
    assert (snapshot.dialect, snapshot.name) == (dialect, name)
    assert snapshot.services
    for service in snapshot.services:
        for method in snapshot.pool.FindServiceByName(service).methods:
            found = snapshot.method(service, method.name)
            assert found.path == f"/{service}/{method.name}"
            assert found.request().SerializeToString() == found.response().SerializeToString() == b""


def test_load_is_cached_and_defaults_to_the_newest():
    assert load("vllm.engine") is load("vllm.engine", SNAPSHOTS["vllm.engine"][-1])
    assert SNAPSHOTS["vllm.engine"][0] == "intree-0.14.0"
    for dialect, names in SNAPSHOTS.items():
        dates = [PROVENANCE[dialect, name]["first_published"] for name in names]
        assert dates == sorted(dates)


def test_threads_that_race_for_a_snapshot_get_the_same_one(monkeypatch):
    both_are_building = threading.Barrier(2, timeout=10)

    class SlowSnapshot(Snapshot):
        def __init__(self, *arguments):
            both_are_building.wait()
            super().__init__(*arguments)

    monkeypatch.setattr(snapshots, "_loaded", {})
    monkeypatch.setattr(snapshots, "Snapshot", SlowSnapshot)
    with ThreadPoolExecutor(2) as threads:
        one, other = threads.map(load, ["vllm.engine"] * 2)
    assert one is other is load("vllm.engine")


def test_loading_one_snapshot_imports_no_other():
    script = (
        "import sys; from gaie_codec.snapshots import load; load('vllm.engine', 'intree-0.14.0');"
        "print(*[name for name in sys.modules if '._data.' in name])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["gaie_codec.snapshots._data.vllm_engine__intree_0_14_0"]


# Names


def test_short_and_full_names_find_the_same():
    snapshot = load("vllm.engine", "smg-0.4.28")
    assert snapshot.services == ("vllm.grpc.engine.VllmEngine",)
    assert snapshot.message("GenerateRequest") is snapshot.message("vllm.grpc.engine.GenerateRequest")
    assert snapshot.message("KvEventBatch") is snapshot.message("smg.grpc.common.KvEventBatch")
    generate = snapshot.method("VllmEngine", "Generate")
    assert generate == snapshot.method("vllm.grpc.engine.VllmEngine", "Generate")
    assert generate.path == "/vllm.grpc.engine.VllmEngine/Generate"
    assert generate.request is snapshot.message("GenerateRequest")
    assert generate.response is snapshot.message("GenerateResponse")
    assert generate.server_streaming
    assert not snapshot.method("VllmEngine", "Embed").server_streaming


@pytest.mark.parametrize(
    ("misuse", "named"),
    [
        (lambda: load("vllm.engin"), "vllm.engine"),
        (lambda: load("vllm.engine", "0.14.0"), "intree-0.14.0"),
        (lambda: load("vllm.engine").message("Generate"), "GenerateRequest"),
        (lambda: load("vllm.engine").message(""), "GenerateRequest"),
        (lambda: load("vllm.engine").has_field("Generate", "stream"), "GenerateRequest"),
        (lambda: load("vllm.engine").method("Engine", "Generate"), "vllm.grpc.engine.VllmEngine"),
        (lambda: load("vllm.engine", "intree-0.14.0").method("VllmEngine", "GetLoads"), "GetServerInfo"),
    ],
)
def test_an_unknown_name_is_a_usage_error_that_lists_the_known_ones(misuse, named):
    with pytest.raises(UsageError) as caught:
        misuse()
    assert named in str(caught.value)


# Published packages


@pytest.mark.parametrize(("dialect", "name"), FROM_SMG)
def test_data_equals_the_published_package(proto_text, dialect, name):
    installed, facts = version("smg-grpc-proto"), PROVENANCE[dialect, name]
    if facts["version"] != installed:
        pytest.skip(f"smg-grpc-proto {installed} is installed")
    ours = [FileDescriptorProto.FromString(file) for file in data_of(dialect, name)]
    for file in ours:
        if not file.name.startswith("google/"):
            importlib.import_module(f"smg_grpc_proto.generated.{Path(file.name).stem}_pb2")
    published = descriptor_pool.Default()
    theirs = [FileDescriptorProto.FromString(published.FindFileByName(file.name).serialized_pb) for file in ours]
    assert proto_text.schema_hash(proto_text.normalized(theirs)) == proto_text.schema_hash(ours) == facts["schema_hash"]


def test_bytes_pass_between_our_classes_and_the_published_ones():
    theirs = importlib.import_module("smg_grpc_proto.generated.vllm_engine_pb2").GenerateRequest
    ours = load("vllm.engine", "smg-0.4.28").message("GenerateRequest")
    fields = {
        "request_id": "r1",
        "tokenized": {"original_text": "hé", "input_ids": [1, 2, 70000]},
        "sampling_params": {"temperature": 0.0, "top_p": 0.5, "logit_bias": {7: -1.5}, "choice": {"choices": ["a", "b"]}},
        "stream": True,
        "data_parallel_rank": 0,
    }
    sent_by_us, sent_by_them = ours(**fields), theirs(**fields)
    assert theirs.FromString(sent_by_us.SerializeToString()) == sent_by_them
    assert ours.FromString(sent_by_them.SerializeToString()) == sent_by_us
    assert sent_by_us.HasField("data_parallel_rank")


# The generator


def test_text_data_and_hashes_are_current():
    done = vendor("check")
    assert (done.returncode, done.stderr) == (0, "")


def test_check_lists_what_drifted(tmp_path):
    for folder in ("proto_vendor", "src/gaie_codec/snapshots/_data"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    text = tmp_path / "proto_vendor/vllm/engine/intree-0.14.0/vllm_engine.proto"
    text.write_text(text.read_text().replace("bool stream = 5", "bool streamed = 5"))
    data = tmp_path / "src/gaie_codec/snapshots/_data"
    (data / "vllm_engine__smg_0_4_28.py").unlink()
    (data / "vllm_engine__gone.py").write_text("")

    done = vendor("--root", tmp_path, "check")
    assert done.returncode == 1
    assert done.stderr.splitlines()[:-1] == [
        "proto_vendor/vllm/engine/intree-0.14.0/provenance.json: schema_hash is not that of the text",
        "src/gaie_codec/snapshots/_data/vllm_engine__gone.py: stale",
        "src/gaie_codec/snapshots/_data/vllm_engine__intree_0_14_0.py: differs",
        "src/gaie_codec/snapshots/_data/vllm_engine__smg_0_4_28.py: missing",
    ]


MAIN = """
syntax = "proto3";
package a.b;
import "google/protobuf/struct.proto";
import "shared.proto";
// A comment, which is not vendored.
service Main { rpc Talk(stream Question) returns (stream c.Answer); }
message Question {
  reserved 4, 8 to 10;
  reserved "gone";
  message Part { string text = 1; Color color = 2; }
  enum Color { option allow_alias = true; NONE = 0; RED = 1; CRIMSON = 1; }
  map<string, Part> parts = 1;
  oneof input { string text = 2 [deprecated = true]; google.protobuf.Struct tree = 3; }
  optional uint64 seed = 5;
  repeated c.Answer earlier = 6;
}
"""
SHARED = 'syntax = "proto3"; package c; message Answer { bytes data = 1; } message Unused {}'
SECOND = 'syntax = "proto3"; package a.b; service Second { rpc Ask(Empty) returns (Empty); } message Empty {}'


def test_a_schema_with_imports_and_two_services_goes_all_the_way(tmp_path, proto_text):
    for name, text in (("main", MAIN), ("shared", SHARED), ("second", SECOND)):
        (tmp_path / f"{name}.proto").write_text(text)
    options = ["--package", "p", "--version", "1.0", "--first-published", "2026-01-01", "--reconstructed"]
    sources = [tmp_path / "main.proto", tmp_path / "second.proto"]
    written = vendor("--root", tmp_path, "write-text", "test.dialect", "v-1.0", *sources, *options)
    assert written.returncode == 0, written.stderr
    assert vendor("--root", tmp_path, "write-data").returncode == vendor("--root", tmp_path, "check").returncode == 0

    folder = tmp_path / "proto_vendor/test/dialect/v-1.0"
    assert sorted(path.name for path in folder.iterdir()) == ["main.proto", "provenance.json", "second.proto", "shared.proto"]
    assert "comment" not in (folder / "main.proto").read_text()
    assert "reserved 4, 8 to 10;" in (folder / "main.proto").read_text()
    namespace = {}
    exec((tmp_path / "src/gaie_codec/snapshots/_data/test_dialect__v_1_0.py").read_text(), namespace)
    snapshot = Snapshot("test.dialect", "v-1.0", namespace["FILES"])
    assert set(snapshot.services) == {"a.b.Main", "a.b.Second"}
    question = snapshot.message("Question")(parts={"x": {"text": "t", "color": "CRIMSON"}}, seed=0, earlier=[{"data": b"d"}])
    question.tree.update({"k": [1, None]})
    assert snapshot.message("Question").FromString(question.SerializeToString()) == question
    assert snapshot.message("Question.Part").DESCRIPTOR.full_name == "a.b.Question.Part"

    files = [FileDescriptorProto.FromString(file) for file in namespace["FILES"]]
    form = proto_text.canonical(files)
    assert {"a.b.Question", "a.b.Question.Part", "c.Answer", "google.protobuf.Struct", "a.b.Empty"} <= set(form["messages"])
    assert "c.Unused" not in form["messages"]
    assert form["messages"]["a.b.Question"]["3"] == ["tree", "google.protobuf.Struct", "", "input"]
    assert form["services"]["a.b.Main"] == {"Talk": ["a.b.Question", "c.Answer", True, True]}
