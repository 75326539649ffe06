"""Settings of every test: one thread a process, and no test that silently does not run."""

from __future__ import annotations

import os
from collections.abc import Generator

import pytest

# Before any test imports torch: the tests share few cores, and spinning OpenMP threads would slow each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

NO_SKIP = "GRPO_DS_NO_SKIP"


def _refuse_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    """Turns a skipped report into a failed one where the caller asked for that (launch/test.sh does)."""
    if os.environ.get(NO_SKIP) == "1" and report.outcome == "skipped" and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped, which {NO_SKIP}=1 counts as failed: {report.longrepr}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    _refuse_skip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    _refuse_skip(report)
    return report
