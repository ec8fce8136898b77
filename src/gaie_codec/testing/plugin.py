"""A pytest plugin: the fixture `candidate_snapshot` and the option `--gaie-proto`.

    pytest --gaie-proto smg-grpc-proto==0.4.29

runs every test that asks for `candidate_snapshot` once for each dialect in that schema: a `.proto` file, a folder, a descriptor set, a
snapshot's name or PACKAGE==VERSION. Without the option it is the newest snapshot of every dialect that has an adapter. A test that
wants its own may parametrize the fixture indirectly with `Snapshot`s.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from ..snapshots import Snapshot

_OPTION = "--gaie-proto"


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--gaie-proto` may be given several times."""
    group = parser.getgroup("gaie-codec", "schemas of model servers")
    group.addoption(_OPTION, action="append", default=[], metavar="PATH", help="a candidate schema for the fixture candidate_snapshot")
    group.addoption("--gaie-dialect", metavar="DIALECT", help="take only this dialect of it")


@pytest.fixture
def candidate_snapshot(request: pytest.FixtureRequest) -> Snapshot:
    """One schema to test against, as a `Snapshot`."""
    snapshot: Snapshot = request.param
    return snapshot


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrizes `candidate_snapshot` unless the test does so itself."""
    marked = any("candidate_snapshot" in str(mark.args[:1]) for mark in metafunc.definition.iter_markers("parametrize"))
    if "candidate_snapshot" in metafunc.fixturenames and not marked:
        found = _candidates(metafunc.config)
        metafunc.parametrize("candidate_snapshot", found, ids=[f"{one.dialect}-{one.name}" for one in found], indirect=True)


def _candidates(config: pytest.Config) -> list[Snapshot]:
    from .. import UsageError, snapshots
    from ..adapters import DIALECTS

    dialect: str | None = config.getoption("gaie_dialect")
    sources: list[str] = config.getoption("gaie_proto")
    if not sources:
        return [snapshots.load(name) for name in ([dialect] if dialect else DIALECTS)]
    from ..proto.sources import read_candidates

    try:
        return [candidate.snapshot for source in sources for candidate in read_candidates(source, dialect=dialect)]
    except UsageError as error:
        raise pytest.UsageError(str(error)) from error
