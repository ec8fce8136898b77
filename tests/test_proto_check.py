"""`proto check` and the command line: every doctored schema is found out, an additive one is not, and bad input is one line."""

from __future__ import annotations

import json
import shutil
import zipfile
from functools import cache
from pathlib import Path

import pytest
from click.testing import CliRunner
from google.protobuf.descriptor_pb2 import FieldDescriptorProto, FileDescriptorSet

from gaie_codec import FinishEvent, InferenceRequest, UsageError, adapters, snapshots
from gaie_codec.cli import _proto
from gaie_codec.proto import witness
from gaie_codec.proto.canonical import walk_messages
from gaie_codec.proto.check import _field, _is_mapped, check
from gaie_codec.proto.compile import Schema
from gaie_codec.proto.report import encode_json, encode_table
from gaie_codec.proto.sources import PACKAGES, Candidate, read_candidates, snapshot_schema
from gaie_codec.snapshots import SNAPSHOTS

DIALECT = "vllm.engine"
NEWEST = SNAPSHOTS[DIALECT][-1]
PACKAGE = "vllm.grpc.engine"
FOLDER = Path(__file__).parent.parent / "proto_vendor" / "vllm" / "engine" / NEWEST


class Doctor:
    """The newest snapshot, to be changed."""

    def __init__(self):
        self.set = FileDescriptorSet()
        self.set.CopyFrom(snapshot_schema(DIALECT, NEWEST).set)
        self.messages = {message.name: message for file in self.set.file for message in walk_messages(file.message_type)}
        self.enums = {enum.name: enum for file in self.set.file for enum in file.enum_type}
        self.service = next(service for file in self.set.file for service in file.service)

    def field(self, message, name):
        return next(field for field in self.messages[message].field if field.name == name)


def renumbered(doctor):
    doctor.field("SamplingParams", "top_k").number = 99


def renumbered_answer(doctor):
    doctor.field("GenerateStreamChunk", "index").number = 99


def swapped(doctor):
    doctor.field("GenerateComplete", "prompt_tokens").number, doctor.field("GenerateComplete", "completion_tokens").number = 4, 3


def retyped(doctor):
    doctor.field("SamplingParams", "seed").type = FieldDescriptorProto.TYPE_STRING


def narrowed(doctor):
    doctor.field("SamplingParams", "min_tokens").type = FieldDescriptorProto.TYPE_INT32


def into_a_oneof(doctor):
    names = [oneof.name for oneof in doctor.messages["SamplingParams"].oneof_decl]
    doctor.field("SamplingParams", "ignore_eos").oneof_index = names.index("constraint")


def enum_value_removed(doctor):
    values = doctor.enums["Modality"].value
    kept = [value for value in values if value.name != "AUDIO"]
    del values[:]
    values.extend(kept)


def presence_added(doctor):
    message, field = doctor.messages["SamplingParams"], doctor.field("SamplingParams", "top_k")
    field.proto3_optional, field.oneof_index = True, len(message.oneof_decl)
    message.oneof_decl.add(name="_top_k")


def presence_removed(doctor):
    message, field = doctor.messages["GenerateRequest"], doctor.field("GenerateRequest", "data_parallel_rank")
    gone = field.oneof_index
    field.proto3_optional = False
    field.ClearField("oneof_index")
    del message.oneof_decl[gone]
    for other in message.field:
        if other.HasField("oneof_index") and other.oneof_index > gone:
            other.oneof_index -= 1


def removed(doctor):
    fields = doctor.messages["SamplingParams"].field
    kept = [field for field in fields if field.name != "logit_bias"]
    del fields[:]
    fields.extend(kept)


def renamed(doctor):
    doctor.field("SamplingParams", "top_k").name = "top_most"


def service_renamed(doctor):
    doctor.service.name = "VllmServer"


def additive(doctor):
    doctor.messages["SamplingParams"].field.add(name="min_x", number=99, type=2, label=1)
    doctor.messages["GenerateComplete"].field.add(name="weight_version", number=99, type=9, label=1)
    doctor.messages["AbortResponse"].field.add(name="mood", number=99, type=9, label=1)
    doctor.enums["Modality"].value.add(name="SMELL", number=9)
    doctor.service.method.add(name="Rest", input_type=f".{PACKAGE}.AbortRequest", output_type=f".{PACKAGE}.AbortResponse")


@cache
def report_on(change, max_examples=25):
    doctor = Doctor()
    change(doctor)
    candidate = Candidate(dialect=DIALECT, name="smg-grpc-proto==9.9.9", schema=Schema(set=doctor.set, sha256={}))
    return check(candidate, max_examples=max_examples, witness=change is additive)


def law(report, name):
    return next(law for law in report.laws if law.name == name)


def broken(report, name):
    return {finding.field for finding in law(report, name).findings}


FOUND = {
    renumbered: ("wire-breaking", "SamplingParams.top_k", "fields requests"),
    renumbered_answer: ("wire-breaking", "GenerateStreamChunk.index", "fields responses"),
    swapped: ("wire-breaking", "GenerateComplete.prompt_tokens", "fields responses"),
    retyped: ("wire-breaking", "SamplingParams.seed", "fields requests"),
    narrowed: ("semantic-breaking", "SamplingParams.min_tokens", "fields"),
    into_a_oneof: ("semantic-breaking", "SamplingParams.ignore_eos", "fields requests"),
    presence_added: ("semantic-breaking", "SamplingParams.top_k", "fields requests"),
    presence_removed: ("semantic-breaking", "GenerateRequest.data_parallel_rank", "fields requests"),
    removed: ("semantic-breaking", "SamplingParams.logit_bias", "fields requests"),
}


@pytest.mark.parametrize("change", FOUND, ids=lambda change: change.__name__)
def test_a_doctored_schema_is_found_out_by_classification_and_by_law(change):
    severity, field, laws = FOUND[change]
    report = report_on(change)
    assert not report.is_clean
    assert report.severity == severity
    assert f"{PACKAGE}.{field}" in {found.subject for found in report.changes if found.severity == severity}
    for name in laws.split():
        assert f"{PACKAGE}.{field}" in broken(report, name)
    module = "_engine_request" if "Request" in field or "Params" in field else "engine"
    assert any(f"{field.partition('.')[2]}: see src/gaie_codec/adapters/vllm/{module}.py:" in line for line in report.to_do)


def test_a_removed_enum_value_is_found_where_nothing_uses_it_yet():
    report = report_on(enum_value_removed)
    assert report.severity == "semantic-breaking"
    assert [change.subject for change in report.changes] == ["smg.grpc.common.Modality.AUDIO"]
    assert broken(report, "fields") == {f"{PACKAGE}.MediaRef.modality", f"{PACKAGE}.MultimodalInputs.modality"}
    assert law(report, "requests").outcome == "held"


def test_a_renamed_field_is_the_same_on_the_wire_and_breaks_the_adapter():
    report = report_on(renamed)
    assert report.severity == "source-only"
    assert [one.outcome for one in report.laws[:4]] == ["held", "held", "held", "broken"]
    lost, failed = law(report, "codec").findings
    assert (lost.field, lost.text) == ("top_k", "the adapter cannot carry it any more")
    assert "the adapter fails: AttributeError" in failed.text
    assert '"top_k"' in failed.text


def test_a_renamed_service_is_named_and_the_adapter_cannot_be_built():
    report = report_on(service_renamed)
    assert report.severity == "wire-breaking"
    assert "service renamed to vllm.grpc.engine.VllmServer" in str(report.changes[0])
    assert law(report, "requests").outcome == "held", "the messages are as they were"
    assert "VllmEngine" in law(report, "codec").findings[0].text


def test_nothing_is_wrong_with_an_additive_schema_and_what_is_new_is_listed():
    report = report_on(additive)
    assert report.is_clean
    assert report.severity == "additive"
    assert {one.outcome for one in report.laws} <= {"held", "skipped"}
    assert report.unmapped == (
        f"{PACKAGE}.GenerateComplete.weight_version",
        f"{PACKAGE}.SamplingParams.min_x",
        f"{PACKAGE}.VllmEngine.Rest",
    )
    assert report.unused == (f"{PACKAGE}.AbortResponse.mood",)
    assert any("proto vendor smg-grpc-proto==9.9.9 --dialect vllm.engine --name smg-9.9.9" in line for line in report.to_do)


def test_a_field_that_the_adapter_knows_is_not_called_unmapped():
    """The older snapshots are what the newest has and they have not: the adapter maps most of it."""
    newest = snapshots.load(DIALECT)
    adapter = adapters.get(newest)
    seen = [adapter.encode_request(InferenceRequest(request_id="r")), adapter.encode_response(FinishEvent())]
    assert _is_mapped(adapter, _field(newest, f"{PACKAGE}.GenerateRequest.data_parallel_rank"), seen)
    assert _is_mapped(adapter, _field(newest, f"{PACKAGE}.GenerateComplete.matched_stop_str"), seen)
    assert not _is_mapped(adapter, _field(newest, f"{PACKAGE}.GenerateRequest.media_refs"), seen)
    assert not _is_mapped(adapter, _field(newest, f"{PACKAGE}.GenerateComplete.media_identity"), seen)


def test_reports_are_deterministic_and_say_the_same_in_both_forms():
    doctor = Doctor()
    renumbered(doctor)
    candidate = Candidate(dialect=DIALECT, name="smg-grpc-proto==9.9.9", schema=Schema(set=doctor.set, sha256={}))
    first = report_on(renumbered)
    assert encode_json([check(candidate, max_examples=25, witness=False)]) == encode_json([first])
    (shown,) = json.loads(encode_json([first]))
    assert shown["severity"] == "wire-breaking"
    assert shown["is_clean"] is False
    text = "\n".join(encode_table(first))
    for part in ("wire-breaking; needs work", "renumbered 3 -> 99", "sent 5, read 0", "To do", "_engine_request.py:"):
        assert part in text


@pytest.mark.parametrize("dialect", PACKAGES)
def test_the_newest_snapshot_of_every_dialect_is_clean(dialect):
    name = SNAPSHOTS[dialect][-1]
    report = check(*read_candidates(name, dialect=dialect), max_examples=10)
    assert report.is_clean, "\n".join(encode_table(report))
    assert report.severity is None
    assert {one.name: one.outcome for one in report.laws} == dict.fromkeys(("fields", "requests", "responses", "codec", "witness"), "held")
    assert all(one.examples >= 10 for one in report.laws)
    assert report.to_do == ()


# The witness


def test_the_witness_agrees_or_says_why_it_was_not_asked(monkeypatch):
    found = law(report_on(additive), "witness")
    assert found.outcome in ("held", "skipped")
    if found.outcome == "held":
        assert found.examples > 500
    monkeypatch.setattr(witness, "find_spec", lambda name: None)
    schema = snapshot_schema(DIALECT, NEWEST)
    skipped = witness.run_witness(None, schema.set, [])
    assert skipped.outcome == "skipped"
    assert "pip install gaie-codec[proto]" in skipped.skipped


def test_the_witness_disagrees_when_its_classes_are_of_another_schema():
    pytest.importorskip("betterproto2_compiler")
    doctor = Doctor()
    renumbered(doctor)
    newest = Candidate(dialect=DIALECT, name=NEWEST, schema=snapshot_schema(DIALECT, NEWEST))
    found = witness.run_witness(newest.snapshot, doctor.set, [])
    assert [finding.field for finding in found.findings] == [f"{PACKAGE}.SamplingParams.top_k"]


# The command line


def run(*arguments):
    result = CliRunner().invoke(_proto.proto, arguments)
    if isinstance(result.exception, UsageError):  # the command tree makes this a line and exit status 2
        assert "\n" not in str(result.exception)
        return 2, str(result.exception)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


@pytest.fixture
def write(tmp_path):
    def write(name, text):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return str(path)

    return write


def test_list_and_show():
    status, output = run("list", "--dialect", "sglang.api")
    assert status == 0
    assert [line.split()[:2] for line in output.splitlines()[1:]] == [["sglang.api", name] for name in SNAPSHOTS["sglang.api"]]
    assert "reconstructed" in output
    everything = json.loads(run("list", "--format", "json")[1])
    assert len(everything) == sum(map(len, SNAPSHOTS.values()))
    status, output = run("show", NEWEST, "--dialect", DIALECT)
    assert status == 0
    assert "service VllmEngine {" in output
    assert "package smg.grpc.common;" in output


def test_diff_of_two_snapshots():
    status, output = run("diff", "0.26.0", "0.27.1", "--dialect", "vllm.inference")
    assert status == 1
    assert "service renamed to vllm.Inference" in output
    status, output = run("diff", "smg-0.4.22", "smg-0.4.28")
    assert (status, output.splitlines()[0]) == (0, "vllm.engine: smg-0.4.22 -> smg-0.4.28: additive")
    (shown,) = json.loads(run("diff", "0.31.0", "0.32.0", "--format", "json")[1])
    assert (shown["severity"], len([change for change in shown["changes"] if change["severity"] == "semantic-breaking"])) == (
        "semantic-breaking",
        3,
    )


def test_diff_of_files_of_no_known_dialect(write):
    one = write("one.proto", 'syntax = "proto3"; package x; message M { int32 a = 1; }')
    other = write("other.proto", 'syntax = "proto3"; package x; message M { string a = 1; }')
    status, output = run("diff", one, other)
    assert status == 1
    assert "x.M.a: type int32 -> string (other bytes)" in output


def test_check_of_a_folder_guesses_the_dialect(write, tmp_path):
    shutil.copytree(FOLDER, tmp_path / "protos")
    status, output = run("check", str(tmp_path / "protos"), "--max-examples", "2")
    assert status == 0
    assert output.startswith(f"vllm.engine: {tmp_path}/protos against {NEWEST}: the same schema; nothing is wrong")
    assert "add the release" in output
    path = tmp_path / "protos" / "vllm_engine.proto"
    path.write_text(path.read_text().replace("uint32 top_k = 3;", "uint32 top_k = 30;"))
    status, output = run("check", str(path), "--max-examples", "2", "--format", "json")
    assert status == 1
    assert json.loads(output)[0]["changes"][0]["text"] == "renumbered 3 -> 30"


BAD = {
    "not a proto": ("bad.proto", "hello world", "not valid proto"),
    "not a descriptor set": ("bad.binpb", "hello world", "neither a .proto file nor"),
    "a missing import": ("bad.proto", 'syntax = "proto3"; import "gone.proto";', 'imports "gone.proto"'),
    "no dialect": (
        "ok.proto",
        'syntax = "proto3"; package x; message M {} service S { rpc R(M) returns (M); }',
        "no known dialect (it declares x.S)",
    ),
    "nothing in it": ("ok.proto", 'syntax = "proto3"; package x;', "declares no message"),
}


@pytest.mark.parametrize(("name", "text", "message"), BAD.values(), ids=BAD)
def test_bad_files_are_one_line(write, name, text, message):
    status, output = run("check", write(name, text))
    assert (status, message in output) == (2, True), output


def test_bad_names_are_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    for source, message in {
        str(tmp_path): "no .proto file in this folder",
        "no-such-thing": "neither a file or folder",
        "no-such-package==1.0": "the package index has no wheel",
        "what?==1.0": "is not PACKAGE==VERSION",
    }.items():
        for command in (("check", source), ("diff", source, NEWEST), ("diff", NEWEST, source, "--dialect", DIALECT)):
            status, output = run(*command)
            assert (status, message in output) == (2, True), output
    assert run("diff", "0.5.22", "0.32.0")[0] == 2
    assert run("show", "smg-9", "--dialect", DIALECT)[0] == 2


@pytest.fixture
def published(tmp_path, monkeypatch):
    """A package demo-protos 1.0 with the newest schemas and one field more, for pip to find."""
    index = tmp_path / "index"
    index.mkdir()
    text = (FOLDER / "vllm_engine.proto").read_text().replace("uint32 top_k = 3;", "uint32 top_k = 3; bool is_new = 77;")
    info = "demo_protos-1.0.dist-info"
    with zipfile.ZipFile(index / "demo_protos-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("demo_protos/proto/common.proto", (FOLDER / "common.proto").read_text())
        wheel.writestr("demo_protos/proto/vllm_engine.proto", text)
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: demo-protos\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    return "demo-protos==1.0"


def test_a_published_package_is_checked_and_vendored(published, tmp_path, monkeypatch):
    status, output = run("check", published, "--max-examples", "2")
    assert status == 0, output
    assert f"{PACKAGE}.SamplingParams.is_new" in output
    assert str(tmp_path) not in output

    root = tmp_path / "checkout"
    shutil.copytree(FOLDER, root / "proto_vendor/vllm/engine" / NEWEST)
    monkeypatch.setattr(_proto, "_checkout", lambda: root)
    status, output = run("vendor", published, "--name", "demo-1.0", "--first-published", "2026-11-23")
    assert status == 0, output
    assert "- {name: demo-1.0, published: 2026-11-23," in output
    assert f"# {PACKAGE}.SamplingParams.is_new" in output
    facts = json.loads((root / "proto_vendor/vllm/engine/demo-1.0/provenance.json").read_text())
    assert (facts["package"], facts["version"], facts["releases"]) == ("demo-protos", "1.0", ["demo-protos-1.0"])
    assert "demo-1.0" in (root / "src/gaie_codec/snapshots/_data/__init__.py").read_text()


def test_vendoring_refuses_what_it_cannot_do(tmp_path, monkeypatch):
    folder = str(FOLDER)
    assert "--package and --version" in run("vendor", folder, "--name", "x")[1]
    status, output = run("vendor", folder, "--name", "x", "--package", "p", "--version", "1", "--first-published", "2026-01-01")
    assert (status, f"the schema is that of vllm.engine {NEWEST}" in output) == (2, True), output
    assert "not YYYY-MM-DD" in run("vendor", folder, "--name", "x", "--package", "p", "--version", "1", "--first-published", "soon")[1]
    monkeypatch.setattr(_proto.snapshots, "__file__", str(tmp_path / "site-packages/gaie_codec/snapshots/__init__.py"))
    assert "installed package" in run("vendor", folder, "--name", "x", "--package", "p", "--version", "1")[1]
