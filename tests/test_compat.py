"""The matrix against reality: the vendored snapshots, the adapters, the packages' own requirements, and the generated files."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import re
import subprocess
import sys
from itertools import pairwise, product
from pathlib import Path
from types import ModuleType
from typing import Any

import jsonschema
import msgspec
import pytest
import yaml
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st
from packaging.specifiers import SpecifierSet
from packaging.version import Version as PackagingVersion

from gaie_codec import UsageError, adapters, compat
from gaie_codec.cli._compat import compat_command
from gaie_codec.compat import _versions as versions
from gaie_codec.compat import report
from gaie_codec.compat._matrix import Installed, Row, matrix
from gaie_codec.compat._resolve import PROTO, SERVICER, snapshot_for_proto
from gaie_codec.compat._supported import FIELDS, treatment
from gaie_codec.compat.blocks import Block, as_markdown, as_text
from gaie_codec.snapshots import SNAPSHOTS, load

ROOT = Path(__file__).parents[1]
MATRIX = matrix()
SMG_DIALECTS = ("vllm.engine", "sglang.scheduler")
ROWS = [
    (server, dialect, row)
    for server, entry in MATRIX.servers.items()
    for dialect, offer in entry.dialects.items()
    for row in offer.releases
]


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("compat_tool", ROOT / "tools" / "compat.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def provenance(dialect: str, snapshot: str) -> dict[str, Any]:
    path = ROOT.joinpath("proto_vendor", *dialect.split("."), snapshot, "provenance.json")
    found: dict[str, Any] = json.loads(path.read_text())
    return found


# --- the file and what is generated from it


def test_generated_files_are_current() -> None:
    done = subprocess.run([sys.executable, "tools/compat.py", "check"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_file_fits_its_schema(tool: ModuleType) -> None:
    schema = json.loads((ROOT / "docs" / "compat_matrix.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    values = tool.load_yaml((ROOT / "compat_matrix.yaml").read_text())
    assert not list(validator.iter_errors(values))
    values["behaviours"][0]["effects"] = "misspelt"
    values["bad_pairs"][0]["releases"] = "newer than 0.5"
    assert len(list(validator.iter_errors(values))) == 2


@pytest.mark.parametrize("text", ["today: 2026-11-23\n", "today: 2026-11-23\ntoday: 2026-11-24\n"])
def test_a_wrong_file_is_refused(tool: ModuleType, text: str) -> None:
    with pytest.raises((msgspec.ValidationError, yaml.YAMLError), match=r"missing required field|twice"):
        tool.data_module(text)


def test_the_matrix_is_pure_data() -> None:
    code = "import sys, gaie_codec.compat as c; c.resolve(server='vllm', version='0.31.0'); print('yaml' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


# --- the matrix against the snapshots


def test_it_names_the_snapshots_that_there_are() -> None:
    named = {dialect: tuple(step.name for step in entry.snapshots) for dialect, entry in MATRIX.dialects.items()}
    assert named == dict(SNAPSHOTS)


def test_every_snapshot_is_used_by_some_release() -> None:
    for dialect, entry in MATRIX.dialects.items():
        for step in entry.snapshots:
            assert compat.used_by(dialect, step.name), f"{dialect} {step.name}"


@pytest.mark.parametrize(("dialect", "snapshot"), [(dialect, step) for dialect in MATRIX.dialects for step in SNAPSHOTS[dialect]])
def test_entries_agree_with_provenance(dialect: str, snapshot: str) -> None:
    found = provenance(dialect, snapshot)
    step = next(step for step in MATRIX.dialects[dialect].snapshots if step.name == snapshot)
    assert (step.published, step.schema or "") == (found["first_published"], found["history_id"])
    assert bool(step.refused) == bool(found.get("refused"))
    protos = {name.removeprefix(f"{PROTO}-") for name in found["releases"] if name.startswith(PROTO)}
    assert {proto.version for proto in MATRIX.packages.proto if versions.within(proto.version, step.exact or "")} == protos
    engine = dialect.partition(".")[0]
    shipped = {name.removeprefix(f"{engine}-") for name in found["releases"] if name.startswith(f"{engine}-")}
    exact = {row.version for server, spoken, row in ROWS if (server, spoken, row.snapshot) == (engine, dialect, snapshot)}
    if not protos:
        assert shipped <= exact
        if not step.schema:
            assert shipped == exact


@pytest.mark.parametrize("dialect", MATRIX.dialects)
def test_services_exist(dialect: str) -> None:
    from gaie_codec.snapshots import load

    for step in MATRIX.dialects[dialect].snapshots:
        assert (step.service or MATRIX.dialects[dialect].service) in load(dialect, step.name).services


# --- ranges and releases


@pytest.mark.parametrize("dialect", SMG_DIALECTS)
def test_every_proto_package_has_one_snapshot(dialect: str) -> None:
    for package in MATRIX.packages.proto:
        hits = [step.name for step in MATRIX.dialects[dialect].snapshots if versions.within(package.version, step.smg_grpc_proto or "")]
        assert len(hits) == 1, (package.version, hits)
        step = snapshot_for_proto(dialect, package.version)
        assert step is not None
        schema = package.vllm_engine if dialect == "vllm.engine" else package.sglang_scheduler
        assert versions.within(package.version, step.exact or "") == (step.schema == schema)


def test_tables_are_in_order() -> None:
    lists = [MATRIX.packages.proto, MATRIX.packages.servicer, *(server.releases for server in MATRIX.servers.values())]
    lists += [offer.releases for server in MATRIX.servers.values() for offer in server.dialects.values()]
    for entries in lists:
        for before, after in pairwise(entries):
            assert versions.parse(before.version) < versions.parse(after.version)
    for dialect, entry in MATRIX.dialects.items():
        assert [step.published for step in entry.snapshots] == sorted(step.published for step in entry.snapshots), dialect


def test_rows_belong_to_releases_and_to_one_era() -> None:
    for server, dialect, row in ROWS:
        assert row.version in [release.version for release in MATRIX.servers[server].releases]
        eras = [era for era in MATRIX.servers[server].dialects[dialect].eras if versions.within(row.version, era.releases)]
        assert len(eras) == 1, (server, dialect, row.version)
        points = (row.floor, row.release_day, row.today)
        assert all(point is None for point in points) if row.snapshot else all(point is not None for point in points)
        if row.snapshot:
            assert row.snapshot in SNAPSHOTS[dialect]


@pytest.mark.parametrize(
    ("server", "dialect", "row"), [entry for entry in ROWS if entry[2].floor], ids=lambda value: getattr(value, "version", value)
)
def test_installed_packages_follow_from_requirements(server: str, dialect: str, row: Row) -> None:
    """Floor, release day and today are what a package manager makes of the requirements, on the days in the tables."""
    release = next(entry for entry in MATRIX.servers[server].releases if entry.version == row.version)
    era = next(era for era in MATRIX.servers[server].dialects[dialect].eras if versions.within(row.version, era.releases))
    match = re.fullmatch(r"([a-z-]+)(\[vllm\])?(.*)", era.requires or "")
    assert match is not None
    assert release.uploaded is not None
    package, extra, wanted = match.groups()

    def allowed(until: str) -> list[tuple[str | None, str]]:
        protos = [proto for proto in MATRIX.packages.proto if proto.uploaded <= until]
        if package == PROTO:
            return [(None, proto.version) for proto in protos if versions.within(proto.version, wanted)]
        return [
            (servicer.version, proto.version)
            for servicer in MATRIX.packages.servicer
            if servicer.uploaded <= until and versions.within(servicer.version, wanted)
            if not extra or versions.within(row.version, servicer.vllm or "")
            for proto in protos
            if versions.within(proto.version, servicer.proto)
        ]

    def installed(pair: tuple[str | None, str]) -> Installed:
        step = snapshot_for_proto(dialect, pair[1])
        assert step is not None
        return Installed(pair[0], pair[1], step.name)

    always = allowed("9")
    assert row.floor == installed(always[0])
    assert row.release_day == installed(allowed(release.uploaded)[-1])
    assert row.today == installed(always[-1])


def test_behaviours_and_pairs_name_what_exists() -> None:
    known = {name: [release.version for release in server.releases] for name, server in MATRIX.servers.items()}
    known[SERVICER] = [entry.version for entry in MATRIX.packages.servicer]
    ids = [item.id for item in (*MATRIX.behaviours, *MATRIX.bad_pairs)]
    assert len(ids) == len(set(ids))
    for item in MATRIX.behaviours:
        assert item.dialect in MATRIX.dialects
        assert set(item.fields) <= set(compat.NEUTRAL_FIELDS), item.id
        assert item.of is not None or item.since is item.until is None, item.id
        for version in (item.since, item.until):
            assert version is None or version in known[item.of or ""], item.id
        if item.since and item.until:
            assert versions.parse(item.since) <= versions.parse(item.until)
    for pair in MATRIX.bad_pairs:
        assert set(pair.dialects) <= set(MATRIX.dialects)
        assert any(versions.within(version, pair.releases) for version in known[pair.of])
        assert any(versions.within(proto.version, pair.smg_grpc_proto) for proto in MATRIX.packages.proto)


def test_the_field_names_lead_to_fields() -> None:
    for name, neutral in MATRIX.openai_fields.items():
        assert name not in compat.NEUTRAL_FIELDS
        assert set(neutral) <= set(compat.NEUTRAL_FIELDS), name
    gateway = [name for group in MATRIX.gateway_fields for name in group.names]
    assert not set(gateway) & {*compat.NEUTRAL_FIELDS, *MATRIX.openai_fields}


# --- resolve


def test_one_release() -> None:
    found = compat.resolve(server="vllm", version="0.31.0")
    assert (found.release, found.assumed, found.notes) == ("0.31.0", False, ())
    engine, inference = found.dialects
    assert [point.snapshot for point in (engine.floor, engine.release_day, engine.today)] == ["smg-0.4.4", "smg-0.4.22", "smg-0.4.28"]
    assert engine.requires == "smg-grpc-servicer[vllm]>=0.5.2"
    assert engine.start.startswith("vllm serve MODEL --grpc")
    assert inference.service == "vllm.Inference"
    assert inference.floor == inference.today
    effects = {item.id for item in inference.behaviours}
    assert "inference-zero-is-unset" in effects
    assert not effects & {"inference-presence", "inference-empty-stop-crash", "inference-kv-floats"}


def test_the_service_was_renamed() -> None:
    assert compat.resolve(server="vllm", version="0.26.0").dialect("vllm.inference").service == "vllm.Generate"
    assert compat.resolve(server="vllm", version="0.27.0").dialect("vllm.inference").service == "vllm.Inference"


@pytest.mark.parametrize(
    ("server", "version", "release", "assumed"),
    [
        ("vllm", "v0.31.0", "0.31.0", False),
        ("vLLM", "0.31", "0.31.0", False),
        ("vllm", "0.31.0+cu129", "0.31.0", False),
        ("vllm", "0.31.1", "0.31.0", True),
        ("vllm", "0.31.0.post1", "0.31.0", True),
        ("vllm", "0.32.0rc1", "0.31.0", True),
        ("vllm", "0.13.0rc1", "0.13.0", True),
        ("vllm", "0.34.0.dev7+gabc", "0.33.0", True),
        ("vllm", "1.0.0", "0.33.0", True),
        ("sglang", "0.5.3.post1", "0.5.3.post1", False),
        ("sglang", "0.5.10.post3", "0.5.10.post1", True),
        ("gaie", "v1.5.0-rc.1", "1.5.0rc1", False),
        ("llm-d", "v0.9.0", "0.9.0", False),
        ("llm-d-inference-scheduler", "0.7.3", "0.7.0", True),
    ],
)
def test_releases_that_are_written_otherwise_or_unknown(server: str, version: str, release: str, assumed: bool) -> None:
    found = compat.resolve(server=server, version=version)
    assert (found.release, found.assumed) == (release, assumed)
    assert any("stands in for it" in note for note in found.notes) == assumed


@pytest.mark.parametrize(
    ("server", "version", "message"),
    [
        ("tgi", "1.0.0", "there are: vllm, sglang, gaie, llm-d-router, smg-grpc-servicer, smg-grpc-proto"),
        ("vllm", "0.9.0", "0.13.0 to 0.33.0"),
        ("vllm", "latest", "not a release number such as 0.31.0"),
        ("vllm", "9" * 5000, "not a release number"),
        ("", "", "no server"),
    ],
)
def test_what_cannot_be_resolved(server: str, version: str, message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        compat.resolve(server=server, version=version)


def test_bad_pairs_are_found_where_they_come_about() -> None:
    engine = compat.resolve(server="vllm", version="0.21.0").dialect("vllm.engine")
    assert (engine.floor.broken, engine.today.broken) == ((), ())
    assert "GetModelInfo fails" in engine.release_day.broken[0]
    assert "GetModelInfo fails" in compat.resolve(server="vllm", version="0.18.1").dialect("vllm.engine").floor.broken[0]
    own = compat.resolve(server="sglang", version="0.5.9").dialect("sglang.scheduler")
    assert not own.release_day.broken
    assert own.today.broken
    assert [pair.id for pair in own.bad_pairs] == ["sglang-0.5.9"]
    assert not compat.resolve(server="sglang", version="0.5.20").dialect("sglang.scheduler").bad_pairs


def test_pickers_have_no_server_behaviour() -> None:
    picker = compat.resolve(server="llm-d-router", version="0.10.0").dialect("vllm.engine")
    assert picker.floor.snapshot == "intree-0.14.0"
    assert not picker.floor.exact
    assert {item.of for item in picker.behaviours} == {"llm-d-router"}
    assert compat.resolve(server="gaie", version="1.6.0").dialects == ()


def test_packages_resolve_too() -> None:
    servicer = compat.resolve(server="smg-grpc-servicer", version="0.13.0")
    engine = servicer.dialect("vllm.engine")
    assert [point.proto for point in (engine.floor, engine.release_day, engine.today)] == ["0.4.22", "0.4.22", "0.4.28"]
    assert [support.dialect for support in compat.resolve(server="smg-grpc-servicer", version="0.4.2").dialects] == ["vllm.engine"]
    proto = compat.resolve(server="smg-grpc-proto", version="0.4.16")
    assert proto.dialect("sglang.scheduler").today.snapshot == "smg-0.4.14"
    with pytest.raises(UsageError, match=r"does not speak vllm\.inference"):
        proto.dialect("vllm.inference")


def test_a_refused_snapshot_says_so() -> None:
    assert "field numbers" in compat.resolve(server="sglang", version="0.5.3").dialect("sglang.scheduler").refused
    with pytest.raises(UsageError, match="is not spoken"):
        compat.features("sglang.scheduler", "intree-0.5.3")


def test_every_release_resolves() -> None:
    for name in compat.servers():
        entry = MATRIX.servers.get(name)
        packages = MATRIX.packages.servicer if name == SERVICER else MATRIX.packages.proto
        for release in entry.releases if entry is not None else packages:
            assert not compat.resolve(server=name, version=release.version).assumed


# --- features and explain


def test_features_of_a_snapshot() -> None:
    found = compat.features("vllm.engine", "smg-0.4.8")
    missing = {item.field: item for item in found.missing}
    assert set(found.carries) | set(missing) == set(compat.NEUTRAL_FIELDS)
    assert missing["kv_transfer_params"].since == "smg-0.4.11"
    assert missing["kv_transfer_params"].reason == "not in this snapshot; from smg-0.4.11 on"
    assert missing["lora_name"].reason == "no field in any snapshot of this dialect"
    assert found.ranges["seed"] == (-(2**31), 2**31 - 1)
    assert found.used_by == ("vllm 0.22.0", "vllm 0.22.1", "vllm 0.23.0")
    assert "engine-grammar-first" not in {item.id for item in found.behaviours}
    assert compat.features("vllm.engine").snapshot == SNAPSHOTS["vllm.engine"][-1]


@pytest.mark.parametrize("dialect", adapters.DIALECTS)
def test_features_are_the_adapters_own(dialect: str) -> None:
    refused = {step.name for step in MATRIX.dialects[dialect].snapshots if step.refused}
    for snapshot in SNAPSHOTS[dialect]:
        if snapshot in refused:
            continue
        found = compat.features(dialect, snapshot)
        carried = set(found.carries)
        for item in found.missing:
            assert item.field not in carried
            assert item.since is None or item.field in compat.features(dialect, item.since).carries
        for field in compat.NEUTRAL_FIELDS:
            verdicts = compat.explain(field, dialect=dialect, snapshot=snapshot).verdicts
            assert [verdict.can for verdict in verdicts] == [field in carried]


def test_without_an_adapter_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from gaie_codec.compat import _features

    monkeypatch.setattr(adapters, "DIALECTS", ("vllm.engine",))
    _features._carried.cache_clear()
    with pytest.raises(UsageError, match=r"no adapter for sglang\.api yet"):
        compat.features("sglang.api")
    with pytest.raises(UsageError, match=r"no adapter for sglang\.api yet"):
        compat.explain("n", dialect="sglang.api")
    assert set(compat.explain("n").without_adapter) == set(SNAPSHOTS) - {"vllm.engine"}
    assert "no adapter" in as_text(report.of_dialect("sglang.api"))


@pytest.mark.parametrize("arguments", [("vllm.engine", "smg-9"), ("nope", None)])
def test_unknown_dialects_and_snapshots(arguments: tuple[str, str | None]) -> None:
    with pytest.raises(UsageError, match="there are:"):
        compat.features(*arguments)
    with pytest.raises(UsageError):
        compat.explain("n", dialect=arguments[0], snapshot=arguments[1])


@pytest.mark.parametrize(
    ("field", "neutral"),
    [
        ("logit_bias", ("logit_bias",)),
        ("max_completion_tokens", ("max_tokens",)),
        ("X-Data-Parallel-Rank", ("data_parallel_rank",)),
        ("max_output_tokens", ("max_tokens",)),
        ("constraint.regex", ("constraint.regex",)),
    ],
)
def test_fields_by_either_name(field: str, neutral: tuple[str, ...]) -> None:
    found = compat.explain(field)
    assert found.neutral == neutral
    assert {verdict.dialect for verdict in found.verdicts} == set(adapters.DIALECTS)


def test_fields_that_never_leave_the_gateway() -> None:
    found = compat.explain("tools")
    assert "template" in found.gateway
    assert "refused" not in found.gateway
    assert not found.verdicts
    assert "without effect" in compat.explain("guided_json").gateway
    assert "without effect" not in compat.explain("parallel_tool_calls").gateway


def test_it_agrees_with_what_requests_meet() -> None:
    for row in FIELDS:
        found = compat.explain(row.partition(" ")[0])
        for dialect in adapters.DIALECTS:
            adapter = adapters.get(load(dialect))
            is_refused = treatment(adapter, row).kind == "refused"
            can = [verdict.can for verdict in found.verdicts if verdict.dialect == dialect]
            by_other_means = ("n", "bad_words", "session_id")  # several calls; as ids; a hint
            assert is_refused or found.gateway or any(can) or row in by_other_means, (row, dialect)
            if " " not in row:  # which is one value of a field that is otherwise sent
                assert not is_refused or found.refused or not all(can), (row, dialect)
            assert not (is_refused and found.gateway), (row, dialect)
    assert "yet" in compat.explain("vllm_xargs").refused
    assert "/v1/completions" in compat.explain("prompt_embeds").refused
    assert "yet" in as_text(report.of_explanations([compat.explain("suffix")]))
    assert "emulated: sampling_params.regex" in as_text(report.of_explanations([compat.explain("constraint.choice")]))


@pytest.mark.parametrize(("field", "near"), [("logit_bais", "logit_bias"), ("json_schem", "json_schema"), ("temprature", "temperature")])
def test_unknown_fields_name_their_neighbours(field: str, near: str) -> None:
    with pytest.raises(UsageError, match=near):
        compat.explain(field)


@given(st.text(max_size=50))
def test_any_text_is_a_field_or_a_usage_error(text: str) -> None:
    with contextlib.suppress(UsageError):
        compat.explain(text, dialect="vllm.engine")


# --- release numbers, held against the package `packaging`

numbers = st.integers(0, 12)
releases = st.lists(numbers, min_size=1, max_size=4).map(lambda parts: ".".join(map(str, parts)))
suffixes = st.tuples(
    st.sampled_from(["", "a1", "b2", "rc1", "-rc.1", "rc"]),
    st.sampled_from(["", ".post1", ".post2", "-3"]),
    st.sampled_from(["", ".dev0", ".dev5"]),
).map("".join)
written = st.builds(str.__add__, releases, suffixes)


@given(written, written)
def test_order_is_that_of_packaging(one: str, other: str) -> None:
    mine = versions.parse(one), versions.parse(other)
    theirs = PackagingVersion(one), PackagingVersion(other)
    assert (mine[0] < mine[1], mine[0] == mine[1]) == (theirs[0] < theirs[1], theirs[0] == theirs[1])
    assert mine[0].is_prerelease == theirs[0].is_prerelease


@given(releases, releases, releases)
def test_ranges_are_those_of_packaging(version: str, low: str, high: str) -> None:
    for specifier in (f">={low},<{high}", f"=={low}", f"<={high},!={low}", f">{low}"):
        assert versions.within(version, specifier) == SpecifierSet(specifier).contains(version), specifier


@given(st.text(max_size=30))
def test_any_text_is_a_version_or_a_usage_error(text: str) -> None:
    for call in (lambda: versions.parse(text), lambda: versions.within("1.0", text)):
        with contextlib.suppress(UsageError):
            call()


# --- what is printed


def all_reports() -> list[list[Block]]:
    found = [report.overview(), report.document()]
    found += [report.of_dialect(dialect) for dialect in MATRIX.dialects]
    found += [report.of_server(server) for server in MATRIX.servers]
    found += [report.of_resolution(compat.resolve(server=server, version=row.version)) for server, _, row in ROWS[::5]]
    found += [report.of_features(compat.features(dialect)) for dialect in adapters.DIALECTS]
    found += [report.of_explanations([compat.explain(field)]) for field in ("n", "response_format", "tools")]
    return found


def test_text_fits_a_hundred_columns_and_markdown_keeps_its_columns() -> None:
    for blocks in all_reports():
        text = as_text(blocks)
        assert max(map(len, text.splitlines())) <= 100
        tables = [line for line in as_markdown(blocks).splitlines() if line.startswith("|")]
        assert all(line.endswith("|") for line in tables)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(compat_command, arguments)


@pytest.mark.parametrize("form", ["table", "json", "markdown"])
@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("--server", "vllm"),
        ("--server", "vllm", "--version", "0.31.0"),
        ("--server", "vllm", "--version", "0.31.0", "--dialect", "vllm.engine"),
        ("--dialect", "sglang.scheduler"),
        ("--dialect", "vllm.engine", "--snapshot", "smg-0.4.4"),
        ("--snapshot", "smg-0.4.8"),
        ("--explain", "logit_bias"),
        ("--explain", "n", "--dialect", "vllm.engine"),
        ("--explain", "kv_transfer_params", "--server", "vllm", "--version", "0.18.0"),
    ],
)
def test_command_line(arguments: tuple[str, ...], form: str) -> None:
    done = run(*arguments, "--format", form)
    assert done.exception is None, done.output
    assert done.output.endswith("\n")
    if form == "json":
        json.loads(done.output)
    elif form == "table":
        assert max(map(len, done.output.splitlines())) <= 100


def test_the_answer_to_why_not() -> None:
    output = run("--explain", "kv_transfer_params", "--server", "vllm", "--version", "0.23.0", "--dialect", "vllm.engine").output
    assert re.search(r"vllm.engine smg-0\.4\.8 +no +not in this snapshot; from smg-0\.4\.11 on", output)
    assert re.search(r"vllm.engine smg-0\.4\.28 +yes", output)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--version", "0.31.0"), "--version needs --server"),
        (("--server", "vllm", "--version", "0.31.0", "--snapshot", "smg-0.4.4"), "not by both"),
        (("--server", "vllm", "--explain", "n"), "needs --version"),
        (("--server", "vllm", "--dialect", "vllm.engine"), "needs --version"),
        (
            (
                "--server",
                "smg-grpc-proto",
            ),
            "needs --version",
        ),
        (("--snapshot", "smg-0.4.28"), "several dialects"),
        (("--snapshot", "smg-9"), "no dialect has a snapshot smg-9|no dialect has a snapshot 'smg-9'"),
        (("--dialect", "nope"), "no dialect 'nope'"),
        (("--explain", "logit_bais"), "near it: logit_bias"),
        (("--explain", "n", "--server", "sglang", "--version", "0.5.3"), "is not spoken"),
    ],
)
def test_wrong_questions(arguments: tuple[str, ...], message: str) -> None:
    done = run(*arguments)
    assert isinstance(done.exception, UsageError)
    assert re.search(message, str(done.exception))


def test_every_pair_of_options_answers_or_refuses() -> None:
    options = [
        (),
        ("--server", "sglang"),
        ("--version", "0.5.20"),
        ("--dialect", "vllm.engine"),
        ("--snapshot", "smg-0.4.4"),
        ("--explain", "n"),
    ]
    for one, other in product(options, options):
        if one == other:
            continue
        exception = run(*one, *other).exception
        assert exception is None or isinstance(exception, UsageError), (one, other, exception)
