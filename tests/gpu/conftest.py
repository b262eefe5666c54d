"""Checks on a GPU: skipped without one, and a table and a report of what was measured."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

REPORT = Path("gpu_report.json")
FOUND: list[dict[str, Any]] = []


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="there is no GPU"))


@pytest.fixture
def measured(request: pytest.FixtureRequest) -> Callable[[str, Any, str, bool], None]:
    """Record what a check found beside its pass mark, and fail if it does not pass."""

    def record(what: str, found: Any, mark: str, passed: bool) -> None:
        found = float(f"{found:.4g}") if isinstance(found, float) else found
        FOUND.append({"check": request.node.name, "what": what, "found": found, "mark": mark, "passed": bool(passed)})
        assert passed, f"{what}: {found}, to pass: {mark}"

    return record


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if not FOUND:
        return
    report = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "checks": FOUND}
    REPORT.write_text(json.dumps(report, indent=1, ensure_ascii=False))
    terminalreporter.write_line(f"\n{report['gpu']}, torch {report['torch']}")
    for row in FOUND:
        passed = "passed" if row["passed"] else "FAILED"
        terminalreporter.write_line(f"{passed}  {row['what']:<60} {row['found']!s:>14}   to pass: {row['mark']}")
    terminalreporter.write_line(f"written: {REPORT}")
