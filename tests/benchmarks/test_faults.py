"""How the repetitions of faults are counted."""

from typing import Literal

import pytest

from tests.benchmarks.scripts import load


def report(test: str, when: Literal["setup", "call", "teardown"], *, passed: bool) -> pytest.TestReport:
    outcome: Literal["passed", "failed"] = "passed" if passed else "failed"
    return pytest.TestReport(f"tests/torchrec_em3/{test}", ("", 0, ""), {}, outcome, None, when)


def test_each_case_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = load(monkeypatch, "faults").Counts()
    for case, passed in (("test_a.py::test_killed[1]", True), ("test_a.py::test_killed[2]", False)):
        counts.pytest_runtest_logreport(report(case, "setup", passed=True))
        counts.pytest_runtest_logreport(report(case, "call", passed=passed))
        counts.pytest_runtest_logreport(report(case, "teardown", passed=True))
    counts.pytest_runtest_logreport(report("test_b.py::test_without_data", "setup", passed=False))
    assert counts.table().splitlines()[2:] == [
        "| `test_a.py::test_killed` | 1/2 |",
        "| `test_b.py::test_without_data` | 0/1 |",
    ]
