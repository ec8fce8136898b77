"""InferencePool manifests: each rule of the CRD once, by release and in both shapes; the decision; the watched file; the command."""

from __future__ import annotations

import copy
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gaie_codec import CodecError, MalformedRequestError, UsageError
from gaie_codec.compat import matrix
from gaie_codec.inferencepool import (
    ENVIRONMENT_VARIABLE,
    MAX_BYTES,
    RELEASES,
    EndpointPickerRef,
    InferencePool,
    WatchedPool,
    decode_pools,
    load_pool,
    transcode_override,
    transcodes,
)

EXAMPLE = Path(__file__).parents[1] / "deploy" / "inferencepool-vllm-grpc.yaml"
H2C = "kubernetes.io/h2c"
BASE: dict[str, Any] = {
    "apiVersion": "inference.networking.k8s.io/v1",
    "kind": "InferencePool",
    "metadata": {"name": "pool", "namespace": "prod"},
    "spec": {
        "selector": {"matchLabels": {"app": "vllm"}},
        "targetPorts": [{"number": 8000}],
        "endpointPickerRef": {"name": "epp", "port": {"number": 9002}},
    },
}
ABSENT = object()


def manifest(**changes: Any) -> dict[str, Any]:
    """BASE with values at dotted paths, `__` for a dot; ABSENT removes."""
    found = copy.deepcopy(BASE)
    for path, value in changes.items():
        *above, last = path.split("__")
        target = found
        for key in above:
            target = target[key]
        if value is ABSENT:
            del target[last]
        else:
            target[last] = value
    return found


def check(item: Any, gaie_version: str | None = None) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Paths with messages of the errors, and of the notes."""
    _, findings = decode_pools(json.dumps(item), gaie_version=gaie_version)
    return tuple([(each.path, each.message) for each in findings if each.severity == severity] for severity in ("error", "note"))  # type: ignore[return-value]


def one(item: Any, gaie_version: str | None = None) -> InferencePool:
    pools, _ = decode_pools(json.dumps(item), gaie_version=gaie_version)
    return pools[0]


# What is decoded


def test_a_pool_is_read_with_the_defaults_of_the_crd() -> None:
    assert one(BASE) == InferencePool(
        name="pool",
        namespace="prod",
        selector={"app": "vllm"},
        target_ports=(8000,),
        app_protocol="http",
        declared_at="",
        picker=EndpointPickerRef(name="epp", group="", kind="Service", port=9002, failure_mode="FailClose"),
        accepted_since="1.0",
    )
    assert check(BASE) == ([], [])


def test_yaml_and_json_and_bytes_say_the_same() -> None:
    expected = decode_pools(json.dumps(BASE))
    assert decode_pools(yaml.safe_dump(BASE)) == expected
    assert decode_pools(json.dumps(BASE, indent="\t")) == expected  # white space in JSON, none in YAML
    assert decode_pools(b"\xef\xbb\xbf" + yaml.safe_dump(BASE).encode()) == expected
    assert decode_pools("\ufeff" + json.dumps(BASE)) == expected


def test_the_example_is_valid() -> None:
    pools, findings = decode_pools(EXAMPLE.read_text())
    assert [finding.severity for finding in findings] == ["note"]
    assert pools[0] == load_pool(EXAMPLE, gaie_version="1.4")
    assert (pools[0].app_protocol, pools[0].declared_at, pools[0].accepted_since) == (H2C, "spec.appProtocol", "1.4")


def test_what_the_api_server_adds_is_no_error() -> None:
    text = yaml.safe_dump(BASE) + ("status:\n  parents: [{anything: 1}]\n")
    text = text.replace(
        "metadata:\n", "metadata:\n  creationTimestamp: 2026-07-01T15:30:00Z\n  uid: 7f\n  generation: 2\n  managedFields: []\n"
    )
    pools, findings = decode_pools(text)
    assert (len(pools), findings) == (1, ())


# Both shapes


@pytest.mark.parametrize("value", ["http", H2C])
def test_the_merged_shape_is_accepted_since_1_4(value: str) -> None:
    item = manifest(spec__appProtocol=value)
    errors, notes = check(item)
    assert not errors
    assert [path for path, _ in notes] == ["spec.appProtocol"]
    assert (one(item).app_protocol, one(item).declared_at, one(item).accepted_since) == (value, "spec.appProtocol", "1.4")
    for release in RELEASES:
        errors, notes = check(item, release)
        assert [path for path, _ in errors] == (["spec.appProtocol"] if release < "1.4" else [])
        assert not notes


def test_the_shape_of_the_proposal_is_read_and_no_release_accepts_it() -> None:
    item = manifest(spec__targetPorts=[{"number": 8000, "appProtocol": H2C}, {"number": 8001, "appProtocol": H2C}])
    errors, notes = check(item)
    assert not errors
    assert [path for path, _ in notes] == ["spec.targetPorts", "spec.targetPorts[0].appProtocol", "spec.targetPorts[1].appProtocol"]
    assert "proposal-2162" in notes[1][1]
    pool = one(item)
    assert (pool.app_protocol, pool.declared_at, pool.accepted_since) == (H2C, "spec.targetPorts[].appProtocol", "")
    for release in RELEASES:
        assert "spec.targetPorts[0].appProtocol" in [path for path, _ in check(item, release)[1]]


@pytest.mark.parametrize(
    ("protocols", "paths"),
    [
        ([H2C, H2C], []),
        (["http", H2C], [1]),
        ([H2C, None], [1]),
        ([None, "http"], [1]),  # unset is a value of its own, although the default is http
        ([None, None], []),
        (["http", H2C, "http", H2C], [1, 3]),
    ],
)
def test_all_ports_of_the_proposal_agree(protocols: list[str | None], paths: list[int]) -> None:
    ports = [{"number": 8000 + place, **({"appProtocol": value} if value else {})} for place, value in enumerate(protocols)]
    errors, _ = check(manifest(spec__targetPorts=ports))
    assert [path for path, _ in errors] == [f"spec.targetPorts[{place}].appProtocol" for place in paths]


def test_both_shapes_in_one_pool_must_not_contradict_each_other() -> None:
    ports = [{"number": 8000, "appProtocol": H2C}]
    assert not check(manifest(spec__targetPorts=ports, spec__appProtocol=H2C))[0]
    errors, _ = check(manifest(spec__targetPorts=ports, spec__appProtocol="http"))
    assert [path for path, _ in errors] == ["spec.targetPorts[0].appProtocol"]


def test_the_port_of_the_picker_has_no_app_protocol() -> None:
    errors, _ = check(manifest(spec__endpointPickerRef__port={"number": 9002, "appProtocol": H2C}))
    assert [path for path, _ in errors] == ["spec.endpointPickerRef.port.appProtocol"]
    assert "model servers'" in errors[0][1]


# Each rule once

RULES: list[tuple[dict[str, Any], str]] = [
    ({"apiVersion": ABSENT}, "apiVersion"),
    ({"apiVersion": "inference.networking.k8s.io/v1beta1"}, "apiVersion"),
    ({"apiVersion": 1}, "apiVersion"),
    ({"extra": 1}, "extra"),
    ({"metadata": ABSENT}, "metadata.name"),
    ({"metadata": "pool"}, "metadata"),
    ({"metadata__name": ABSENT}, "metadata.name"),
    ({"metadata__name": None}, "metadata.name"),
    ({"metadata__name": "Pool"}, "metadata.name"),
    ({"metadata__name": "pool\n"}, "metadata.name"),
    ({"metadata__name": "a..b"}, "metadata.name"),
    ({"metadata__name": "a" * 254}, "metadata.name"),
    ({"metadata__name": 7}, "metadata.name"),
    ({"metadata__namespace": "a.b"}, "metadata.namespace"),
    ({"metadata__namespace": "a" * 64}, "metadata.namespace"),
    ({"metadata__label": {}}, "metadata.label"),
    ({"metadata__labels": {"a": 1}}, "metadata.labels['a']"),
    ({"metadata__annotations": {"-a": "x"}}, "metadata.annotations['-a']"),
    ({"metadata__annotations": []}, "metadata.annotations"),
    ({"spec": ABSENT}, "spec"),
    ({"spec": []}, "spec"),
    ({"spec__size": 1}, "spec.size"),
    ({"spec__selector": ABSENT}, "spec.selector"),
    ({"spec__selector__app": "vllm"}, "spec.selector.app"),
    ({"spec__selector": {}}, "spec.selector.matchLabels"),
    ({"spec__selector__matchExpressions": []}, "spec.selector.matchExpressions"),
    ({"spec__selector__matchLabels": {}}, "spec.selector.matchLabels"),
    ({"spec__selector__matchLabels": {f"l{number}": "" for number in range(65)}}, "spec.selector.matchLabels"),
    ({"spec__selector__matchLabels": {"": "x"}}, "spec.selector.matchLabels['']"),
    ({"spec__selector__matchLabels": {"Example.com/a": "x"}}, "spec.selector.matchLabels['Example.com/a']"),
    ({"spec__selector__matchLabels": {"a" * 64: "x"}}, f"spec.selector.matchLabels['{'a' * 60}...']"),
    ({"spec__selector__matchLabels": {"a." * 120 + "b/" + "c" * 40: "x"}}, f"spec.selector.matchLabels['{'a.' * 30}...']"),
    ({"spec__selector__matchLabels": {"app": "x" * 64}}, "spec.selector.matchLabels['app']"),
    ({"spec__selector__matchLabels": {"app": "-x"}}, "spec.selector.matchLabels['app']"),
    ({"spec__selector__matchLabels": {"app": True}}, "spec.selector.matchLabels['app']"),
    ({"spec__selector__matchLabels": {"app": None}}, "spec.selector.matchLabels['app']"),
    ({"spec__targetPorts": ABSENT}, "spec.targetPorts"),
    ({"spec__targetPorts": []}, "spec.targetPorts"),
    ({"spec__targetPorts": {"number": 1}}, "spec.targetPorts"),
    ({"spec__targetPorts": [{"number": number} for number in range(1, 10)]}, "spec.targetPorts"),
    ({"spec__targetPorts": [8000]}, "spec.targetPorts[0]"),
    ({"spec__targetPorts": [None]}, "spec.targetPorts[0]"),
    ({"spec__targetPorts": [{}]}, "spec.targetPorts[0].number"),
    ({"spec__targetPorts": [{"number": 0}]}, "spec.targetPorts[0].number"),
    ({"spec__targetPorts": [{"number": 65536}]}, "spec.targetPorts[0].number"),
    ({"spec__targetPorts": [{"number": "8000"}]}, "spec.targetPorts[0].number"),
    ({"spec__targetPorts": [{"number": True}]}, "spec.targetPorts[0].number"),
    ({"spec__targetPorts": [{"number": 80.5}]}, "spec.targetPorts[0].number"),
    ({"spec__targetPorts": [{"number": 1}, {"number": 2}, {"number": 1}]}, "spec.targetPorts[2].number"),
    ({"spec__targetPorts": [{"number": 1, "name": "grpc"}]}, "spec.targetPorts[0].name"),
    ({"spec__targetPorts": [{"number": 1, "appProtocol": "grpc"}]}, "spec.targetPorts[0].appProtocol"),
    ({"spec__appProtocol": "h2c"}, "spec.appProtocol"),
    ({"spec__appProtocol": ["http"]}, "spec.appProtocol"),
    ({"spec__endpointPickerRef": "epp"}, "spec.endpointPickerRef"),
    ({"spec__endpointPickerRef__name": ABSENT}, "spec.endpointPickerRef.name"),
    ({"spec__endpointPickerRef__name": ""}, "spec.endpointPickerRef.name"),
    ({"spec__endpointPickerRef__name": "\ud800"}, "spec.endpointPickerRef.name"),
    ({"spec__endpointPickerRef__group": "a/b"}, "spec.endpointPickerRef.group"),
    ({"spec__endpointPickerRef__kind": ""}, "spec.endpointPickerRef.kind"),
    ({"spec__endpointPickerRef__kind": "a/b"}, "spec.endpointPickerRef.kind"),
    ({"spec__endpointPickerRef__port": ABSENT}, "spec.endpointPickerRef.port"),
    ({"spec__endpointPickerRef": {"name": "epp", "kind": "Service"}}, "spec.endpointPickerRef.port"),
    ({"spec__endpointPickerRef__port": 9002}, "spec.endpointPickerRef.port"),
    ({"spec__endpointPickerRef__port": {}}, "spec.endpointPickerRef.port.number"),
    ({"spec__endpointPickerRef__port": {"number": 70000}}, "spec.endpointPickerRef.port.number"),
    ({"spec__endpointPickerRef__portNumber": 9002}, "spec.endpointPickerRef.portNumber"),
    ({"spec__endpointPickerRef__failureMode": "failOpen"}, "spec.endpointPickerRef.failureMode"),
    ({"spec__extensionRef": {"name": "epp"}}, "spec.extensionRef"),
]


@pytest.mark.parametrize(("changes", "path"), RULES, ids=[f"{number}-{path}" for number, (_, path) in enumerate(RULES)])
def test_a_broken_rule_is_one_error_that_names_the_path(changes: dict[str, Any], path: str) -> None:
    item = manifest(**changes)
    errors, _ = check(item)
    assert [found for found, _ in errors] == [path]
    assert decode_pools(json.dumps(item))[0] == ()
    for release in RELEASES:  # and so it is in every release, whatever else is wrong there
        assert path in [found for found, _ in check(item, release)[0]]


GOOD: list[tuple[dict[str, Any], str]] = [
    ({"spec__selector__matchLabels": {"example.com/a.b_c": "A.b-c_9", "b": "", "C": "1" * 63}}, "1.0"),
    ({"spec__selector__matchLabels": {f"l{number}": "x" for number in range(64)}}, "1.0"),
    ({"spec__targetPorts": [{"number": 1}]}, "1.0"),
    ({"spec__targetPorts": [{"number": 65535.0}]}, "1.0"),
    ({"spec__targetPorts": [{"number": 8000 + place} for place in range(8)]}, "1.1"),
    ({"spec__appProtocol": None}, "1.0"),
    ({"spec__endpointPickerRef": {"name": "epp", "kind": "Picker", "group": "example.com"}}, "1.0"),
    ({"spec__endpointPickerRef__failureMode": "FailOpen"}, "1.0"),
    ({"spec__endpointPickerRef": ABSENT}, "1.6"),
    ({"spec__endpointPickerRef": None}, "1.6"),
    ({"metadata": {"generateName": "web-"}}, "1.0"),
    ({"metadata__name": "a.b-c.9"}, "1.0"),
    ({"metadata__annotations": {"Example.com/a": "any text: ü"}}, "1.0"),
]


@pytest.mark.parametrize(("changes", "since"), GOOD)
def test_a_good_pool_is_accepted_from_one_release_on(changes: dict[str, Any], since: str) -> None:
    item = manifest(**changes)
    errors, notes = check(item)
    assert not errors
    assert bool(notes) == (since != "1.0")
    assert one(item).accepted_since == since
    for release in RELEASES:
        errors, notes = check(item, release)
        assert bool(errors) == (release < since), release
        assert not notes


def test_all_errors_are_reported_not_only_the_first() -> None:
    item = manifest(spec__targetPorts=[{"number": 0}, {"number": "x"}], spec__selector={}, spec__endpointPickerRef={}, spec__more=1)
    assert {path for path, _ in check(item)[0]} == {
        "spec.more",
        "spec.selector.matchLabels",
        "spec.targetPorts[0].number",
        "spec.targetPorts[1].number",
        "spec.endpointPickerRef.name",
        "spec.endpointPickerRef.port",
    }


def test_the_older_api_is_pointed_to_v1() -> None:
    item = manifest(apiVersion="inference.networking.x-k8s.io/v1alpha2", spec={"targetPortNumber": 8000, "extensionRef": {"name": "epp"}})
    ((path, message),) = check(item)[0]
    assert path == "apiVersion"
    assert "inference.networking.k8s.io/v1;" in message


def test_notes_and_errors_say_for_which_releases_they_hold() -> None:
    item = manifest(spec__appProtocol=H2C, spec__endpointPickerRef=ABSENT, spec__targetPorts=[{"number": 1}, {"number": 2}])
    for version in (None, "v1.0.0"):
        _, findings = decode_pools(json.dumps(item), gaie_version=version)
        assert {finding.path: finding.releases for finding in findings} == {
            "spec.targetPorts": "<1.1",
            "spec.appProtocol": "<1.4",
            "spec.endpointPickerRef": "<1.6",
        }


@pytest.mark.parametrize("version", ["1.4", "v1.4.0", "1.4.2", "1.5.0rc1", "v1.6.0-rc.2"])
def test_releases_are_named_as_their_tags_are(version: str) -> None:
    assert not check(manifest(spec__appProtocol=H2C), version)[0]


@pytest.mark.parametrize("version", ["", "1", "0.5", "1.7", "1.4x", "latest", "1.4.0.0", "1.4\n1"])
def test_a_release_without_rules_is_a_usage_error(version: str) -> None:
    with pytest.raises(UsageError, match="no rules for GAIE"):
        decode_pools(json.dumps(BASE), gaie_version=version)


def test_every_release_of_the_compat_matrix_has_rules() -> None:
    for release in matrix().servers["gaie"].releases:
        decode_pools(json.dumps(BASE), gaie_version=release.version)


# Files of several documents


def test_other_kinds_are_skipped_and_named() -> None:
    text = "---\n" + yaml.safe_dump_all([{"kind": "Service", "metadata": {"name": "epp"}}, None, BASE, {"kind": "ConfigMap"}]) + "---\n"
    pools, findings = decode_pools(text)
    assert len(pools) == 1
    assert [(each.pool, each.severity, each.message) for each in findings] == [
        ("Service epp", "note", "skipped: not an InferencePool"),
        ("ConfigMap document 3", "note", "skipped: not an InferencePool"),
    ]


@pytest.mark.parametrize("text", ["", "---\n", "kind: Service", "[]", "7", "kind: 5", "{}"])
def test_a_text_without_a_pool_is_an_error(text: str) -> None:
    pools, findings = decode_pools(text)
    assert not pools
    assert findings[-1].severity == "error"
    assert findings[-1].message.startswith("no InferencePool among")


def test_lists_are_looked_into() -> None:
    listed = {"apiVersion": "v1", "kind": "List", "items": [BASE, {"kind": "Pod"}, manifest(metadata__name="other", spec__x=1)]}
    pools, findings = decode_pools(json.dumps(listed))
    assert [pool.name for pool in pools] == ["pool"]
    assert [(each.pool, each.path) for each in findings] == [("Pod document 1 item 2", "kind"), ("prod/other", "spec.x")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\na: 2", "line 2, column 1: key 'a' is there twice"),
        ("spec:\n  1: a\n  '1': b", "line 3, column 3: key '1' is there twice"),
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "key 'c' is there twice"),
        ("a: [1", "YAML in line 1"),
        ("a: *b", "undefined alias"),
        ("&a [*a]", "recursive"),
        ("a: !!python/name:os.system x", "has no place"),
        ("a: !!binary aGk=", "has no place"),
        ("? [a]\n: 1", "a key that is no string"),
        ("a: 0x_", "not a whole number"),
        ("a: " + "9" * 5000, "not a whole number"),
        ('a: "\\UFFFFFFFF"', "cannot be read"),
        ("%YAML 1." + "9" * 5000 + "\n---\na", "cannot be read"),
        ("a: \x01", "character 4"),
        ("<<: 3", "takes a mapping"),
        ("[" * 5000, "nested too deeply"),
        ('{"a":' * 100000, "nested too deeply"),
        ('{"a": NaN}', "NaN is no JSON"),
        (b"a: \xff", "byte 4 is not UTF-8"),
        (" " * (MAX_BYTES + 1), "more than"),
    ],
)
def test_what_is_no_manifest_is_refused_with_its_place(text: str | bytes, message: str) -> None:
    with pytest.raises(MalformedRequestError) as caught:
        decode_pools(text)
    assert message in str(caught.value)


def test_merges_and_aliases_work_and_are_bounded() -> None:
    text = yaml.safe_dump(BASE).replace("app: vllm", "<<: {app: other, tier: x}\n      app: vllm")
    assert decode_pools(text)[0][0].selector == {"app": "vllm", "tier": "x"}
    bomb = "a0: &a0 {x: 1}\n" + "".join(f"a{n}: &a{n}\n  <<: [{', '.join([f'*a{n - 1}'] * 2000)}]\n" for n in range(1, 9))
    with pytest.raises(MalformedRequestError, match="too much is merged"):
        decode_pools(bomb)


def test_words_that_only_pyyaml_takes_for_something_else_stay_text() -> None:
    text = yaml.safe_dump(BASE).replace("app: vllm", "a: 2026-07-01\n      b: abc")
    assert decode_pools(text)[0][0].selector == {"a": "2026-07-01", "b": "abc"}
    text = yaml.safe_dump(BASE).replace("app: vllm", "a: on")
    assert [each.path for each in decode_pools(text)[1]] == ["spec.selector.matchLabels['a']"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(exclude_categories=()), max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("name number port kind appProtocol x \ud800".split()), inner)
    ),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=80) | st.text("{}[]:,-&*!|>'\"%@#?<~ \n\tab01_.x\\U", max_size=60) | st.binary(max_size=60))
@example("0b_")
@example("!!bool x")
@example("!!null {}")
@example("!!str {=: 1}")
@example("a: !!map x")
@example("? !!null\n: 1")
def test_arbitrary_text_raises_only_our_errors(text: str | bytes) -> None:
    try:
        pools, findings = decode_pools(text)
    except CodecError:
        return
    assert pools or any(finding.severity == "error" for finding in findings)


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(
        [
            path.replace(".", "__")
            for path in (
                "metadata spec metadata.name metadata.labels spec.selector spec.targetPorts "
                "spec.appProtocol spec.endpointPickerRef spec.selector.matchLabels spec.endpointPickerRef.port apiVersion kind"
            ).split()
        ]
    ),
    JSON,
    st.sampled_from([None, *RELEASES]),
)
def test_arbitrary_values_in_any_place_become_findings(path: str, value: Any, version: str | None) -> None:
    text = json.dumps(manifest(**{path: value}))
    try:
        pools, findings = decode_pools(text, gaie_version=version)
    except CodecError:
        assert "NaN" in text or "Infinity" in text
        return
    assert bool(pools) != any(finding.severity == "error" for finding in findings)
    json.dumps([finding.message for finding in findings], ensure_ascii=False).encode()


# The decision


@pytest.mark.parametrize(
    ("protocol", "speaks_grpc", "override", "expected", "reason"),
    [
        (H2C, True, "auto", True, "transcode: appProtocol is kubernetes.io/h2c (spec.appProtocol)"),
        (H2C, False, "auto", False, "does not imply gRPC"),
        ("http", True, "auto", False, "gRPC needs HTTP/2"),
        ("http", False, "auto", False, "appProtocol is http"),
        (None, True, "auto", False, "http (the default)"),
        ("http", True, "transcode", True, "override"),
        (H2C, True, "passthrough", False, "override"),
        (H2C, False, "passthrough", False, "override"),
    ],
)
def test_h2c_means_transcode_for_a_server_that_speaks_grpc(
    protocol: Any, speaks_grpc: bool, override: Any, expected: bool, reason: str
) -> None:
    pool = one(manifest(spec__appProtocol=protocol))
    answer, said = transcodes(pool, speaks_grpc=speaks_grpc, override=override)
    assert answer is expected
    assert reason in said


def test_the_shape_of_the_proposal_decides_as_well() -> None:
    answer, said = transcodes(one(manifest(spec__targetPorts=[{"number": 1, "appProtocol": H2C}])), speaks_grpc=True)
    assert answer
    assert "spec.targetPorts[].appProtocol" in said


def test_without_a_pool_the_declared_server_decides() -> None:
    assert transcodes(None, speaks_grpc=True)[0]
    assert not transcodes(None, speaks_grpc=False)[0]


def test_transcoding_cannot_be_forced_without_a_grpc_server() -> None:
    with pytest.raises(UsageError, match="nothing to transcode to"):
        transcodes(one(manifest(spec__appProtocol=H2C)), speaks_grpc=False, override="transcode")
    with pytest.raises(UsageError, match="'on'"):
        transcodes(None, speaks_grpc=True, override="on")  # type: ignore[arg-type]


def test_the_flag_wins_over_the_variable_and_both_are_checked() -> None:
    assert transcode_override(None, {}) == "auto"
    assert transcode_override(None, {ENVIRONMENT_VARIABLE: ""}) == "auto"
    assert transcode_override(None, {ENVIRONMENT_VARIABLE: "On"}) == "transcode"
    assert transcode_override(None, {ENVIRONMENT_VARIABLE: "off"}) == "passthrough"
    assert transcode_override("auto", {ENVIRONMENT_VARIABLE: "on"}) == "auto"
    assert transcode_override("passthrough", {ENVIRONMENT_VARIABLE: "nonsense"}) == "passthrough"
    with pytest.raises(UsageError, match=ENVIRONMENT_VARIABLE):
        transcode_override(None, {ENVIRONMENT_VARIABLE: "yes"})
    with pytest.raises(UsageError, match="--transcode"):
        transcode_override("maybe", {ENVIRONMENT_VARIABLE: "on"})


# Files


def write(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(manifest(**changes)))


def test_loading_names_the_first_error_and_counts_the_rest(tmp_path: Path) -> None:
    write(tmp_path / "p.yaml", spec__targetPorts=[{"number": 0}], spec__x=1)
    with pytest.raises(MalformedRequestError, match=r"p\.yaml: prod/pool: spec\.x: unknown field \(and 1 more\)") as caught:
        load_pool(tmp_path / "p.yaml")
    assert caught.value.param == "spec.x"


@pytest.mark.parametrize("name", ["absent.yaml", "", ".", "a\0b"])
def test_a_file_that_cannot_be_read_is_a_usage_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError):
        load_pool(f"{tmp_path}/{name}")


def test_one_of_several_pools_is_chosen_by_name(tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(yaml.safe_dump_all([BASE, manifest(metadata__name="b"), manifest(metadata__namespace="dev")]))
    assert load_pool(path, name="b").name == "b"
    assert load_pool(path, name="dev/pool").namespace == "dev"
    for name in (None, "pool", "c"):
        with pytest.raises(UsageError, match="there are prod/pool, prod/b, dev/pool"):
            load_pool(path, name=name)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_watched_pool_flips_when_the_file_changes_and_not_before_the_interval(tmp_path: Path) -> None:
    path, clock = tmp_path / "p.yaml", Clock()
    write(path)
    watched = WatchedPool(path, clock=clock, interval_s=1.0)
    running = watched.current()
    assert not transcodes(running, speaks_grpc=True)[0]
    write(path, spec__appProtocol=H2C)
    clock.now = 0.9
    assert watched.current() is running
    clock.now = 1.0
    assert transcodes(watched.current(), speaks_grpc=True)[0]
    assert not transcodes(running, speaks_grpc=True)[0]  # who has begun keeps what it began with


def test_a_watched_pool_follows_the_symbolic_link_of_a_config_map(tmp_path: Path) -> None:
    clock = Clock()
    for name, protocol in (("..1", "http"), ("..2", H2C)):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "p.yaml", spec__appProtocol=protocol)
    (tmp_path / "..data").symlink_to("..1")
    (tmp_path / "p.yaml").symlink_to("..data/p.yaml")
    watched = WatchedPool(tmp_path / "p.yaml", clock=clock, interval_s=0)
    assert watched.current().app_protocol == "http"
    (tmp_path / "..new").symlink_to("..2")
    os.replace(tmp_path / "..new", tmp_path / "..data")
    assert watched.current().app_protocol == H2C


def test_a_watched_pool_keeps_the_last_good_one_and_says_once_what_is_wrong(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "gaie_codec.inferencepool")
    path = tmp_path / "p.yaml"
    write(path, spec__appProtocol=H2C)
    watched = WatchedPool(path, clock=Clock(), interval_s=0)
    good = watched.current()

    def told() -> list[str]:
        for _ in range(3):
            assert watched.current() is good
        found = [record.getMessage() for record in caplog.records]
        caplog.clear()
        return found

    assert told() == []
    path.write_text("a: [")
    (line,) = told()
    assert "YAML" in line
    assert "YAML" in watched.problem
    write(path, spec__appProtocol="grpc")
    (line,) = told()
    assert "spec.appProtocol: 'grpc' is none of http, kubernetes.io/h2c" in line
    path.unlink()
    (line,) = told()
    assert "No such file" in line
    write(path, spec__appProtocol="http")
    assert watched.current().app_protocol == "http"
    assert watched.problem == ""
    assert [record.getMessage().partition(": ")[2] for record in caplog.records] == [
        "can be used again",
        "changed; appProtocol was kubernetes.io/h2c, is http",
    ]


def test_a_file_is_read_only_when_it_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "p.yaml"
    write(path)
    watched = WatchedPool(path, clock=Clock(), interval_s=0)
    reads: list[Any] = []
    monkeypatch.setattr("gaie_codec.inferencepool._files.decode_pools", lambda *a, **k: (reads.append(a), decode_pools(*a, **k))[1])
    watched.current()
    assert reads == []
    write(path, spec__appProtocol=H2C)
    watched.current()
    watched.current()
    assert len(reads) == 1


def test_a_watched_pool_must_be_good_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        WatchedPool(tmp_path / "absent")
    write(tmp_path / "p.yaml", spec__x=1)
    with pytest.raises(MalformedRequestError):
        WatchedPool(tmp_path / "p.yaml")
    write(tmp_path / "p.yaml")
    with pytest.raises(UsageError):
        WatchedPool(tmp_path / "p.yaml", gaie_version="9")


# The command


def run(*arguments: Any, stdin: bytes = b"") -> tuple[int, str, str]:
    command = [sys.executable, "-m", "gaie_codec.cli", "pool", "check", *map(str, arguments)]
    done = subprocess.run(command, input=stdin, capture_output=True, timeout=60)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def test_check_says_what_is_valid_and_where(tmp_path: Path) -> None:
    status, out, err = run(EXAMPLE)
    assert (status, err) == (0, "")
    note, valid = out.splitlines()
    assert note.startswith(f"{EXAMPLE}: default/vllm-grpc: spec.appProtocol: note: ")
    assert valid.startswith(
        f"{EXAMPLE}: default/vllm-grpc: valid; GAIE 1.4 and later accept it; kubernetes.io/h2c (spec.appProtocol): transcode"
    )
    status, out, _ = run(EXAMPLE, "--gaie-version", "1.3")
    assert status == 1
    assert out.startswith(f"{EXAMPLE}: default/vllm-grpc: spec.appProtocol: error: ")
    status, out, _ = run("-", "--gaie-version", "1.4", stdin=EXAMPLE.read_bytes())
    assert status == 0
    assert out.startswith("-: default/vllm-grpc: valid")


def test_check_goes_on_after_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("a: [")
    (tmp_path / "none.yaml").write_text("kind: Pod")
    status, out, err = run(tmp_path / "absent", tmp_path / "bad.yaml", tmp_path / "none.yaml", EXAMPLE)
    assert status == 2
    assert [line.rpartition("/")[2].split(":")[0] for line in err.splitlines()] == ["absent", "bad.yaml"]
    assert "none.yaml: error: no InferencePool" in out
    assert "vllm-grpc: valid" in out
    assert run(tmp_path / "none.yaml")[0] == 1


def test_check_writes_json(tmp_path: Path) -> None:
    status, out, _ = run(EXAMPLE, tmp_path / "absent", "--format", "json")
    first, second = json.loads(out)
    assert status == 2
    assert (first["valid"], first["pools"][0]["app_protocol"], first["findings"][0]["releases"]) == (True, H2C, "<1.4")
    assert (second["valid"], second["error"]) == (False, "No such file or directory")


@pytest.mark.parametrize("arguments", [(), ("--gaie-version", "9.9", str(EXAMPLE)), ("--format", "xml", str(EXAMPLE))])
def test_wrong_arguments_end_with_2_and_one_line(arguments: tuple[str, ...]) -> None:
    status, out, err = run(*arguments)
    assert (status, out) == (2, "")
    assert "Traceback" not in err
    assert len(err.splitlines()) == 1
