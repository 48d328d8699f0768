"""Break runs and checkpoints on purpose, as often as docs/reliability.md says, and count what holds.

    OMP_NUM_THREADS=1 python benchmarks/faults.py [--only EXPRESSION]

Runs the tests marked `fault` with all of their repetitions, of which `make test` runs the first ones alone, and prints
a Markdown table of how many of each passed, also when it is interrupted. Whole trainings are killed and started again,
one after the other.
"""

import sys
from collections import Counter
from pathlib import Path

import pytest
from jsonargparse import auto_cli

TESTS = Path(__file__).parents[1] / "tests" / "torchrec_em3"


class Counts:
    """A plugin of pytest that counts the cases of each test function."""

    def __init__(self) -> None:
        self.all: Counter[str] = Counter()
        self.passed: Counter[str] = Counter()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count a case once it has been called, or when it could not be set up."""
        if report.when == "teardown" or (report.when == "setup" and not report.failed):
            return
        test = report.nodeid.split("[")[0].removeprefix("tests/torchrec_em3/")
        self.all[test] += 1
        self.passed[test] += report.passed

    def table(self) -> str:
        """Return a Markdown table."""
        lines = [f"| `{test}` | {self.passed[test]}/{count} |" for test, count in self.all.items()]
        return "\n".join(["| test | passed |", "|---|---:|", *lines])


def main(only: str = "") -> None:
    """Run the tests and print the table.

    Args:
        only: Tests to run, as pytest's -k names them; all if empty.
    """
    counts = Counts()
    code = pytest.main(["-m", "fault", "-k", only, str(TESTS)], plugins=[counts])
    print(counts.table())
    sys.exit(code)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
