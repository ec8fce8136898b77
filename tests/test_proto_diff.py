"""`proto.diff`: the published history is classified as it was, and every kind of change by itself."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
from google.protobuf.descriptor_pb2 import FieldDescriptorProto, FileDescriptorProto

from gaie_codec.proto.catalogue import provenance
from gaie_codec.proto.diff import Severity, compare, worst
from gaie_codec.proto.sources import PACKAGES, snapshot_schema
from gaie_codec.snapshots import SNAPSHOTS

# The published history, step by step; what is not here was additive. Shared reference: proto-history.json and native-servers.md.
STEPS = {
    "V4": "semantic-breaking",
    "V11": "semantic-breaking",
    "S2": "wire-breaking",
    "S3": "semantic-breaking",
    "S7": "semantic-breaking",
    "S8": "wire-breaking",
    "S11": "semantic-breaking",
    "S15": "source-only",
    "S20": "semantic-breaking",
}
# MultimodalInputs.image_data came in V3 and went in V4: between these two snapshots nobody sees it.
CAME_AND_WENT = {("vllm.engine", "smg-0.4.4"): "additive"}
NATIVE = {("vllm.inference", "0.27.1"): "wire-breaking", ("vllm.inference", "0.32.0"): "semantic-breaking"}


def consecutive():
    for dialect, names in SNAPSHOTS.items():
        for old, new in pairwise(names):
            first, last = (provenance(dialect, name).history_id for name in (old, new))
            if first:
                steps = [STEPS.get(f"{first[0]}{step}", "additive") for step in range(int(first[1:]) + 1, int(last[1:]) + 1)]
                expected = CAME_AND_WENT.get((dialect, new), min(steps, key=list(Severity).index))
            else:
                expected = NATIVE.get((dialect, new), "additive")
            yield pytest.param(dialect, old, new, expected, id=f"{dialect}-{old}-{new}")


def changes_between(dialect, old, new):
    return compare(snapshot_schema(dialect, old).files, snapshot_schema(dialect, new).files)


@pytest.mark.parametrize(("dialect", "old", "new", "expected"), list(consecutive()))
def test_consecutive_snapshots_are_classified_as_in_the_history(dialect, old, new, expected):
    assert worst(changes_between(dialect, old, new)) == expected


@pytest.mark.parametrize("dialect", PACKAGES)
def test_a_schema_equals_itself(dialect):
    assert changes_between(dialect, SNAPSHOTS[dialect][-1], SNAPSHOTS[dialect][-1]) == ()


def lines(changes, *severities):
    return [str(change) for change in changes if change.severity in severities]


def test_renumberings_and_reused_numbers_are_called_by_name():
    found = lines(changes_between("sglang.scheduler", "intree-0.5.3", "intree-0.5.3.post2"), Severity.WIRE)
    moved = {"n": "18 -> 17", "min_new_tokens": "20 -> 18", "ignore_eos": "21 -> 19", "no_stop_trim": "22 -> 20", "logit_bias": "24 -> 22"}
    for name, numbers in moved.items():
        assert f"sglang.grpc.scheduler.SamplingParams.{name}: renumbered {numbers}" in found
    assert "sglang.grpc.scheduler.SamplingParams.lora_path: number 17 reused: string lora_path -> int32 n" in found
    assert len(found) == 14


def test_the_multimodal_struct_became_tensors():
    changes = changes_between("sglang.scheduler", "smg-0.3.2", "smg-0.4.4")
    (found,) = lines(changes, Severity.WIRE)
    assert found.startswith("sglang.grpc.scheduler.MultimodalInputs.processed_features: type google.protobuf.Struct -> ")
    assert [change.renamed_to for change in changes if change.renamed_to] == ["pixel_values"]


def test_embed_was_flattened():
    found = lines(changes_between("sglang.scheduler", "smg-0.4.4", "smg-0.4.6"), Severity.SEMANTIC)
    assert "sglang.grpc.scheduler.EmbedComplete: message removed" in found
    assert any(line.startswith("sglang.grpc.scheduler.EmbedResponse.complete: field") and "(number reserved)" in line for line in found)
    assert len(found) == 9


def test_a_field_that_moved_into_a_oneof_and_got_another_name():
    changes = changes_between("vllm.engine", "smg-0.4.11", "smg-0.4.13")
    field = "vllm.grpc.engine.TensorData.data"
    assert lines(changes, Severity.SEMANTIC, Severity.SOURCE) == [
        f"{field}: moved into oneof payload (same bytes; presence and clearing differ)",
        f"{field}: number 1 renamed data -> inline",
    ]


def test_the_native_service_was_renamed_and_presence_came():
    (renamed,) = lines(changes_between("vllm.inference", "0.26.0", "0.27.1"), Severity.WIRE)
    assert renamed == "vllm.Generate: service renamed to vllm.Inference: the path of every call changes"
    presence = lines(changes_between("vllm.inference", "0.31.0", "0.32.0"), Severity.SEMANTIC)
    assert [line.split(":")[0] for line in presence] == [f"vllm.RandomSampling.{name}" for name in ("top_k", "top_p", "min_p")]


# Each kind of change by itself


def schema(text: str = "", *, messages: str = "", enums: str = "", methods: str = "", reserved: str = "", service: str = "S"):
    """`a.M` with fields such as `optional int32 x = 1; [o] string y = 2`, other messages and enums beside it, and a service."""
    file = FileDescriptorProto(name="a.proto", package="a", syntax="proto3")
    for name, body in [("M", text), ("N", ""), *re.findall(r"(\w+)\{(.*?)\}", messages)]:
        message = file.message_type.add(name=name)
        for label, oneof, kind, field, number in re.findall(r"(repeated |optional )?(?:\[(\w+)\] )?([\w.]+) (\w+) = (\d+)", body):
            made = message.field.add(name=field, number=int(number), label=3 if label == "repeated " else 1)
            if hasattr(FieldDescriptorProto, f"TYPE_{kind.upper()}"):
                made.type = FieldDescriptorProto.Type.Value(f"TYPE_{kind.upper()}")
            else:
                made.type, made.type_name = (14 if kind.startswith("E") else 11), f".a.{kind}"
            if oneof or label == "optional ":
                oneof, made.proto3_optional = oneof or f"_{field}", not oneof
                names = [one.name for one in message.oneof_decl]
                if oneof not in names:
                    message.oneof_decl.add(name=oneof)
                    names.append(oneof)
                made.oneof_index = names.index(oneof)
    for start in reserved.split():
        file.message_type[0].reserved_range.add(start=int(start), end=int(start) + 1)
    for name, body in re.findall(r"(\w+)\{(.*?)\}", enums):
        enum = file.enum_type.add(name=name)
        for value, number in re.findall(r"(\w+)=(\d+)", body):
            enum.value.add(name=value, number=int(number))
    added = file.service.add(name=service)
    for name, request, response, stream in re.findall(r"(\w+)\((\w+)\)(\w+)(!?)", methods or "Do(M)N"):
        added.method.add(name=name, input_type=f".a.{request}", output_type=f".a.{response}", server_streaming=bool(stream))
    return [file]


E = "E{Z=0 A=1 B=2}"

CASES = {
    "nothing": (schema("int32 x = 1"), schema("int32 x = 1"), None, ""),
    "field added": (schema("int32 x = 1"), schema("int32 x = 1; string y = 2"), "additive", "field string y = 2 added"),
    "field removed": (schema("int32 x = 1; int32 y = 2"), schema("int32 x = 1"), "semantic-breaking", "(number NOT reserved)"),
    "field removed, reserved": (schema("int32 x = 1"), schema("", reserved="1"), "semantic-breaking", "(number reserved)"),
    "reserved number taken": (schema("", reserved="1"), schema("int32 x = 1"), "semantic-breaking", "a number that was reserved"),
    "renamed": (schema("int32 x = 1"), schema("int32 y = 1"), "source-only", "number 1 renamed x -> y"),
    "renumbered": (schema("int32 x = 1"), schema("int32 x = 2"), "wire-breaking", "renumbered 1 -> 2"),
    "renumbered, retyped": (schema("int32 x = 1"), schema("string x = 2"), "wire-breaking", "renumbered 1 -> 2 (int32 -> string)"),
    "swapped": (
        schema("int32 x = 1; int32 y = 2"),
        schema("int32 y = 1; int32 x = 2"),
        "wire-breaking",
        "number 1 reused: int32 x -> int32 y",
    ),
    "retyped": (schema("int32 x = 1"), schema("string x = 1"), "wire-breaking", "type int32 -> string"),
    "float widened": (schema("float x = 1"), schema("double x = 1"), "wire-breaking", "type float -> double"),
    "zigzag": (schema("int32 x = 1"), schema("sint32 x = 1"), "wire-breaking", "other bytes"),
    "varint": (schema("int32 x = 1"), schema("uint32 x = 1"), "semantic-breaking", "the same varint"),
    "enum to number": (schema("E x = 1", enums=E), schema("int32 x = 1"), "semantic-breaking", "the same varint"),
    "string to bytes": (schema("string x = 1"), schema("bytes x = 1"), "semantic-breaking", "UTF-8"),
    "numbers repeated": (schema("int32 x = 1"), schema("repeated int32 x = 1"), "wire-breaking", "packed"),
    "text repeated": (schema("string x = 1"), schema("repeated string x = 1"), "semantic-breaking", "the last of several wins"),
    "presence added": (schema("int32 x = 1"), schema("optional int32 x = 1"), "semantic-breaking", "presence added"),
    "presence removed": (schema("optional int32 x = 1"), schema("int32 x = 1"), "semantic-breaking", "presence removed"),
    "into a oneof": (schema("int32 x = 1"), schema("[o] int32 x = 1"), "semantic-breaking", "moved into oneof o"),
    "out of a oneof": (schema("[o] int32 x = 1"), schema("int32 x = 1"), "semantic-breaking", "moved out of oneof o"),
    "presence to oneof": (schema("optional int32 x = 1"), schema("[o] int32 x = 1"), "semantic-breaking", "moved into oneof o"),
    "oneof renamed": (schema("[o] int32 x = 1"), schema("[p] int32 x = 1"), "source-only", "oneof o -> p"),
    "oneof split": (
        schema("[o] int32 x = 1; [o] int32 y = 2"),
        schema("[o] int32 x = 1; [p] int32 y = 2"),
        "semantic-breaking",
        "oneof o -> p",
    ),
    "message on a message": (schema("N x = 1"), schema("N x = 1"), None, ""),
    "another message": (
        schema("P x = 1", messages="P{int32 a = 1}"),
        schema("Q x = 1", messages="Q{string a = 1}"),
        "wire-breaking",
        "another message",
    ),
    "message renamed": (
        schema("P x = 1", messages="P{int32 a = 1}"),
        schema("Q x = 1", messages="Q{int32 a = 1}"),
        "semantic-breaking",  # P is gone for whoever uses it
        "another name for the same fields",
    ),
    "unused message removed": (schema(messages="P{int32 a = 1}"), schema(), "source-only", "which nothing used"),
    "message added": (schema(), schema(messages="P{int32 a = 1}"), "additive", "message added (int32 a=1)"),
    "enum value added": (schema("E x = 1", enums=E), schema("E x = 1", enums="E{Z=0 A=1 B=2 C=3}"), "additive", "enum value 3 added"),
    "enum value removed": (schema("E x = 1", enums=E), schema("E x = 1", enums="E{Z=0 A=1}"), "semantic-breaking", "enum value 2 removed"),
    "enum value renumbered": (
        schema("E x = 1", enums=E),
        schema("E x = 1", enums="E{Z=0 A=1 B=3}"),
        "semantic-breaking",
        "enum value renumbered 2 -> 3",
    ),
    "enum value renamed": (schema("E x = 1", enums=E), schema("E x = 1", enums="E{Z=0 A=1 C=2}"), "source-only", "renamed B -> C"),
    "default of an enum": (
        schema("E x = 1", enums=E),
        schema("E x = 1", enums="E{A=0 Z=1 B=2}"),
        "semantic-breaking",
        "enum value renumbered 0 -> 1",
    ),
    "method removed": (schema(methods="Do(M)N Go(M)N"), schema(methods="Do(M)N"), "wire-breaking", "method removed"),
    "method added": (schema(methods="Do(M)N"), schema(methods="Do(M)N Go(M)N!"), "additive", "method added (a.M) returns (stream a.N)"),
    "method renamed": (schema(methods="Do(M)N"), schema(methods="Go(M)N"), "wire-breaking", "method removed"),
    "streaming": (schema(methods="Do(M)N"), schema(methods="Do(M)N!"), "wire-breaking", "server streaming added"),
    "response replaced": (
        schema("int32 x = 1", methods="Do(M)N"),
        schema("int32 x = 1", methods="Do(M)M"),
        "wire-breaking",
        "response type",
    ),
    "service renamed": (schema(service="S"), schema(service="T"), "wire-breaking", "service renamed to a.T"),
}


@pytest.mark.parametrize(("old", "new", "severity", "text"), CASES.values(), ids=CASES)
def test_every_kind_of_change(old, new, severity, text):
    changes = compare(old, new)
    assert worst(changes) == severity, [str(change) for change in changes]
    assert any(text in str(change) for change in changes) or not text


def test_json_names_are_compared_where_they_are_given():
    old, new = schema("int32 x_y = 1"), schema("int32 x_y = 1")
    new[0].message_type[0].field[0].json_name = "xY"
    assert compare(old, new) == ()
    new[0].message_type[0].field[0].json_name = "other"
    assert lines(compare(old, new), Severity.SOURCE) == ["a.M.x_y: JSON name xY -> other"]
