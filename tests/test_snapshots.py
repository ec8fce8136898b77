"""Snapshots: side by side in one process, equal to what was published, and generated from `proto_vendor/` and nothing else."""

from __future__ import annotations

import importlib
import importlib.util
import re
import runpy
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import pytest
from google.protobuf import descriptor_pool
from google.protobuf.descriptor_pb2 import FileDescriptorProto, FileDescriptorSet

from gaie_codec import UsageError, snapshots
from gaie_codec.proto import compile as proto_compile
from gaie_codec.proto.canonical import canonical, normalized, schema_hash
from gaie_codec.proto.catalogue import catalogue, provenance, published
from gaie_codec.proto.compile import read_schema, select
from gaie_codec.proto.download import download
from gaie_codec.proto.vendoring import describe, write_snapshot
from gaie_codec.snapshots import SNAPSHOTS, Snapshot, load

ROOT = Path(__file__).parent.parent
DATA = ROOT / "src/gaie_codec/snapshots/_data"
PROVENANCE = {(known.dialect, known.snapshot): known for known in catalogue().snapshots}
ALL = [(dialect, name) for dialect, names in SNAPSHOTS.items() for name in names]
INSTALLED = version("smg-grpc-proto")
FROM_INSTALLED = [key for key in ALL if (PROVENANCE[key].package, PROVENANCE[key].version) == ("smg-grpc-proto", INSTALLED)]
PACKAGES = {"vllm.engine": "vllm.grpc.engine", "sglang.scheduler": "sglang.grpc.scheduler"}


def data_of(dialect, name):
    return importlib.import_module(f"gaie_codec.snapshots._data.{snapshots.MODULES[dialect][name]}").FILES


def vendor(*arguments):
    command = [sys.executable, ROOT / "tools" / "vendor.py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def hash_of(schema):
    return schema_hash(normalized(schema.files))


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


def test_the_snapshots_are_those_that_real_releases_shipped():
    assert {dialect: " ".join(names) for dialect, names in SNAPSHOTS.items()} == {
        "sglang.api": "0.5.22 0.5.23",
        "sglang.runtime": "0.5.16 0.5.19 0.5.20 0.5.21 0.5.22 0.5.23",
        "sglang.scheduler": "intree-0.5.3 intree-0.5.3.post2 intree-0.5.8 smg-0.3.2 smg-0.4.4 smg-0.4.6 smg-0.4.14 smg-0.4.19 smg-0.4.28",
        "vllm.engine": "intree-0.14.0 smg-0.4.4 smg-0.4.8 smg-0.4.11 smg-0.4.13 smg-0.4.20 smg-0.4.22 smg-0.4.28",
        "vllm.inference": "0.25.1 0.26.0 0.27.1 0.28.0 0.29.0 0.30.0 0.31.0 0.32.0 0.33.0",
    }


def test_all_live_in_one_process_and_none_in_the_default_pool():
    loaded = [load(dialect, name) for dialect, name in ALL]
    assert len({id(snapshot.pool) for snapshot in loaded}) == len(ALL)
    methods = [snapshot.pool.FindServiceByName(service).methods[0] for snapshot in loaded for service in snapshot.services]
    assert len({method.input_type for method in methods}) == len(methods)
    script = (
        "from google.protobuf import descriptor_pool; from gaie_codec.snapshots import SNAPSHOTS, load\n"
        "loaded = [load(dialect, name) for dialect, names in SNAPSHOTS.items() for name in names]\n"
        "for service in {service for snapshot in loaded for service in snapshot.services}:\n"
        "    try: descriptor_pool.Default().FindServiceByName(service)\n"
        "    except KeyError: print(service)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == {service for snapshot in loaded for service in snapshot.services}


@pytest.mark.parametrize(("dialect", "name"), ALL)
def test_loading_one_takes_less_than_10_ms(dialect, name):
    def milliseconds():
        start = time.perf_counter()
        data = runpy.run_path(DATA / f"{snapshots.MODULES[dialect][name]}.py")  # as if imported without a cached .pyc
        Snapshot(dialect, name, data["FILES"], data["REFUSED"])
        return (time.perf_counter() - start) * 1e3

    assert min(milliseconds() for _ in range(3)) < 10


def test_a_snapshot_that_no_server_may_be_spoken_to_in_says_why():
    refused = {(dialect, name): load(dialect, name).refused for dialect, name in ALL if load(dialect, name).refused}
    assert list(refused) == [("sglang.scheduler", "intree-0.5.3")]
    assert "SamplingParams" in refused["sglang.scheduler", "intree-0.5.3"]
    assert all(load(dialect).refused == "" for dialect in SNAPSHOTS)
    old, new = load("sglang.scheduler", "intree-0.5.3"), load("sglang.scheduler", "intree-0.5.3.post2")
    said = old.message("SamplingParams")(n=3).SerializeToString()
    assert new.message("SamplingParams").FromString(said).min_new_tokens == 3


def test_load_is_cached_and_defaults_to_the_newest():
    assert load("vllm.engine") is load("vllm.engine", SNAPSHOTS["vllm.engine"][-1])
    assert SNAPSHOTS["vllm.engine"][0] == "intree-0.14.0"
    for dialect, names in SNAPSHOTS.items():
        dates = [PROVENANCE[dialect, name].first_published for name in names]
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


@pytest.mark.parametrize(("dialect", "name"), FROM_INSTALLED)
def test_data_equals_the_published_package(dialect, name):
    ours = [FileDescriptorProto.FromString(file) for file in data_of(dialect, name)]
    for file in ours:
        if not file.name.startswith("google/"):
            importlib.import_module(f"smg_grpc_proto.generated.{Path(file.name).stem}_pb2")
    pool = descriptor_pool.Default()
    theirs = [FileDescriptorProto.FromString(pool.FindFileByName(file.name).serialized_pb) for file in ours]
    assert schema_hash(normalized(theirs)) == schema_hash(ours) == PROVENANCE[dialect, name].schema_hash


@pytest.mark.parametrize("part", ["proto", "generated"])
@pytest.mark.parametrize("dialect", PACKAGES)
def test_the_installed_package_has_the_schema_that_the_history_gives_it(dialect, part):
    [package] = importlib.util.find_spec("smg_grpc_proto").submodule_search_locations
    found = select(read_schema(Path(package, part)), [PACKAGES[dialect]])
    known = published(dialect, hash_of(found))
    assert f"smg-grpc-proto-{INSTALLED}" in known.releases
    if part == "proto" and (dialect, f"smg-{INSTALLED}") in PROVENANCE:
        assert PROVENANCE[dialect, f"smg-{INSTALLED}"].source_sha256 == found.sha256


@pytest.mark.parametrize(("dialect", "prefix", "last"), [("vllm.engine", "V", 23), ("sglang.scheduler", "S", 20)])
def test_one_history_id_is_one_schema_hash_and_every_release_has_one_of_them(dialect, prefix, last):
    """`tools/vendor.py check-published` proves the same of the packages themselves, and needs a package index."""
    schemas = [known for known in catalogue().published if known.dialect == dialect]
    assert [known.history_id for known in schemas] == [f"{prefix}{number}" for number in range(1, last + 1)]
    assert len({known.schema_hash for known in schemas}) == len(schemas)
    releases = [release for known in schemas for release in known.releases]
    assert len(set(releases)) == len(releases)
    from_smg = [release.removeprefix("smg-grpc-proto-") for release in releases if release.startswith("smg-")]
    assert from_smg == ["0.3.2", "0.3.3", *(f"0.4.{patch}" for patch in range(29))]


@pytest.mark.parametrize(("dialect", "name"), ALL)
def test_provenance_is_complete(dialect, name):
    facts = PROVENANCE[dialect, name]
    assert re.fullmatch(r"202\d-\d\d-\d\d", facts.first_published)
    assert facts.licence == "Apache-2.0"
    assert facts.source_sha256
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in [*facts.source_sha256.values(), facts.schema_hash])
    assert f"{facts.package}-{facts.version}" in facts.releases
    assert facts.note
    assert facts.reconstructed == (dialect in ("sglang.runtime", "sglang.api"))
    if dialect in PACKAGES:
        known = published(dialect, facts.schema_hash)
        assert (known.history_id, known.releases) == (facts.history_id, facts.releases)


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
    history = tmp_path / "proto_vendor/published.json"
    for folder in ("proto_vendor", "src/gaie_codec/snapshots/_data"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    text = tmp_path / "proto_vendor/vllm/engine/intree-0.14.0/vllm_engine.proto"
    text.write_text(text.read_text().replace("bool stream = 5", "bool streamed = 5"))
    history.write_text(re.sub(r'"smg-grpc-proto-0\.4\.11",\s+"smg-grpc-proto-0\.4\.12"', '"smg-grpc-proto-0.4.11"', history.read_text()))
    data = tmp_path / "src/gaie_codec/snapshots/_data"
    (data / "vllm_engine__smg_0_4_28.py").unlink()
    (data / "vllm_engine__gone.py").write_text("")

    done = vendor("--root", tmp_path, "check")
    assert done.returncode == 1
    assert done.stderr.splitlines()[:-1] == [
        "proto_vendor/vllm/engine/intree-0.14.0/provenance.json: schema_hash is not that of the text",
        "proto_vendor/vllm/engine/smg-0.4.11/provenance.json: does not agree with V10 in proto_vendor/published.json",
        "src/gaie_codec/snapshots/_data/catalogue.json: differs",
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


def test_a_schema_with_imports_and_two_services_goes_all_the_way(tmp_path):
    for name, text in (("main", MAIN), ("shared", SHARED), ("second", SECOND)):
        (tmp_path / f"{name}.proto").write_text(text)
    options = ["--package", "p", "--version", "1.0", "--first-published", "2026-01-01", "--reconstructed", "--refused", 'a "test"']
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
    snapshot = Snapshot("test.dialect", "v-1.0", namespace["FILES"], namespace["REFUSED"])
    assert snapshot.refused == 'a "test"'
    assert set(snapshot.services) == {"a.b.Main", "a.b.Second"}
    question = snapshot.message("Question")(parts={"x": {"text": "t", "color": "CRIMSON"}}, seed=0, earlier=[{"data": b"d"}])
    question.tree.update({"k": [1, None]})
    assert snapshot.message("Question").FromString(question.SerializeToString()) == question
    assert snapshot.message("Question.Part").DESCRIPTOR.full_name == "a.b.Question.Part"

    files = [FileDescriptorProto.FromString(file) for file in namespace["FILES"]]
    form = canonical(files)
    assert {"a.b.Question", "a.b.Question.Part", "c.Answer", "google.protobuf.Struct", "a.b.Empty"} <= set(form["messages"])
    assert "c.Unused" not in form["messages"]
    assert form["messages"]["a.b.Question"]["3"] == ["tree", "google.protobuf.Struct", "", "input"]
    assert form["services"]["a.b.Main"] == {"Talk": ["a.b.Question", "c.Answer", True, True]}


# Schemas from anywhere


NO_PROTO = "there is no .proto file in this folder"
NOT_A_SET = "neither a .proto file nor a serialized FileDescriptorSet"


@pytest.mark.parametrize(
    ("files", "source", "said"),
    [
        ({}, "gone.proto", "no such file or folder"),
        ({"readme.txt": "no schema"}, "readme.txt", NOT_A_SET),
        ({"empty.binpb": ""}, "empty.binpb", NOT_A_SET),
        ({"folder/readme.txt": "no schema"}, "folder", NO_PROTO),
        ({"folder/google/protobuf/struct.proto": MAIN}, "folder", NO_PROTO),
        ({"main.proto": MAIN}, "main.proto", 'main.proto imports "shared.proto", which was not found'),
        ({"a/main.proto": MAIN}, "a", 'main.proto imports "shared.proto", which was not found'),
        ({"bad.proto": "hello, world"}, "bad.proto", "not valid proto: bad.proto:1:1: "),
        ({"main.proto": MAIN, "shared.proto": "hello, world"}, "main.proto", "not valid proto: shared.proto:1:1: "),
        ({"bad.proto": 'syntax = "proto3"; message A { B b = 1; }'}, "bad.proto", '"B" is not defined'),
        ({"a/one.proto": SECOND, "b/one.proto": SECOND}, ".", "two files are called one.proto; give the folder of one of them"),
        ({"a/one.proto": SECOND, "b/two.proto": SECOND}, ".", '"a.b.Empty" is already defined'),
        ({"x_pb2.py": "print('no descriptor')"}, ".", "no module with a protobuf descriptor"),
        ({"x_pb2.py": "this is no python"}, "x_pb2.py", "not a Python module"),
    ],
)
def test_a_bad_source_gets_one_clear_line(tmp_path, files, source, said):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    with pytest.raises(UsageError) as caught:
        read_schema(tmp_path / source)
    assert said in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path / source))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ([FileDescriptorProto(name="m.proto", dependency=["gone.proto"])], 'm.proto imports "gone.proto", which was not found'),
        ([FileDescriptorProto(name="m.proto", dependency=["m.proto"])], "not valid|not found"),
        ([FileDescriptorProto()], NOT_A_SET),
    ],
)
def test_a_descriptor_set_must_be_a_whole_schema(tmp_path, files, said):
    (tmp_path / "set.binpb").write_bytes(FileDescriptorSet(file=files).SerializeToString())
    with pytest.raises(UsageError, match=said):
        read_schema(tmp_path / "set.binpb")


def test_one_schema_has_one_hash_in_every_shape_it_comes_in(tmp_path):
    (tmp_path / "deep/sub").mkdir(parents=True)
    (tmp_path / "deep/main.proto").write_text(MAIN.replace('"shared.proto"', '"sub/shared.proto"'))
    (tmp_path / "deep/sub/shared.proto").write_text(SHARED)
    whole = read_schema(tmp_path)
    assert [file.name for file in whole.files] == ["google/protobuf/struct.proto", "sub/shared.proto", "main.proto"]
    assert set(whole.sha256) == {"main.proto", "sub/shared.proto"}

    backwards = FileDescriptorSet(file=[file for file in reversed(whole.files) if not file.name.startswith("google/")])
    (tmp_path / "set.binpb").write_bytes(backwards.SerializeToString())
    modules = tmp_path / "modules"
    modules.mkdir()
    for file in backwards.file:
        text = f"DESCRIPTOR = _descriptor_pool.Default().AddSerializedFile({file.SerializeToString()!r})\n"
        (modules / f"{Path(file.name).stem}_pb2.py").write_text(text)
    hashes = {hash_of(read_schema(source)) for source in (tmp_path, tmp_path / "deep/main.proto", tmp_path / "set.binpb", modules)}
    assert hashes == {hash_of(whole)}


def test_a_file_without_package_can_be_read_and_written(tmp_path):
    (tmp_path / "bare.proto").write_text('syntax = "proto3"; service S { rpc R(M) returns (M); } message M { M m = 1; }')
    schema = read_schema(tmp_path / "bare.proto")
    facts = describe(schema, dialect="a.b", snapshot="x", package="p", version="1", first_published="2026-01-01")
    assert canonical(schema.files)["services"] == {"S": {"R": ["M", "M", False, False]}}
    assert "package" not in (write_snapshot(tmp_path, schema, facts) / "bare.proto").read_text()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('syntax = "proto2"; message M {}', "only proto3"),
        ('syntax = "proto3"; message M { string s = 1 [ctype = CORD]; }', "option ctype"),
    ],
)
def test_what_cannot_be_written_is_not_vendored(tmp_path, text, said):
    (tmp_path / "m.proto").write_text(text)
    with pytest.raises(UsageError, match=said):
        hash_of(read_schema(tmp_path / "m.proto"))


@pytest.mark.parametrize(("dialect", "snapshot"), [("vllm.engine", "../x"), ("vllm", "x"), ("vllm/..", "x")])
def test_a_snapshot_is_never_written_elsewhere(tmp_path, dialect, snapshot):
    (tmp_path / "second.proto").write_text(SECOND)
    schema = read_schema(tmp_path / "second.proto")
    facts = describe(schema, dialect=dialect, snapshot=snapshot, package="p", version="1", first_published="2026-01-01")
    with pytest.raises(UsageError, match="want names"):
        write_snapshot(tmp_path, schema, facts)
    assert [path.name for path in tmp_path.iterdir()] == ["second.proto"]


def test_a_part_is_chosen_by_the_package_of_its_services(tmp_path):
    for name, text in (("main", MAIN), ("shared", SHARED), ("other", SECOND.replace("a.b", "other"))):
        (tmp_path / f"{name}.proto").write_text(text)
    part = select(read_schema(tmp_path), ["a.b"])
    assert set(canonical(part.files)["services"]) == {"a.b.Main"}
    assert set(part.sha256) == {"main.proto", "shared.proto"}
    with pytest.raises(UsageError, match=r"there are: a\.b\.Main, other\.Second"):
        select(read_schema(tmp_path), ["c"])


def test_without_a_compiler_the_way_out_is_named(tmp_path, monkeypatch):
    (tmp_path / "second.proto").write_text(SECOND)
    monkeypatch.setattr(proto_compile, "find_spec", lambda name: None)
    monkeypatch.setattr(proto_compile.shutil, "which", lambda name: None)
    with pytest.raises(UsageError, match="pip install grpcio-tools"):
        read_schema(tmp_path / "second.proto")


@pytest.mark.parametrize(
    ("requirement", "said"),
    [
        ("smg-grpc-proto", "is not PACKAGE==VERSION"),
        ("--help==1", "is not PACKAGE==VERSION"),
        ("smg-grpc-proto==9.9", "has no wheel of that"),
    ],
)
def test_a_package_that_cannot_be_had_gets_one_clear_line(tmp_path, monkeypatch, requirement, said):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(UsageError, match=said):
        download(requirement, tmp_path)


def test_an_unknown_snapshot_has_no_provenance():
    with pytest.raises(UsageError, match=r"vllm\.engine smg-0\.4\.28"):
        provenance("vllm.engine", "smg-9")
    assert published("vllm.engine", "0" * 64) is None
