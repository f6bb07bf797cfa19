"""The tests for a GPU, by pytest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tools.gpu.setting import ROOT, Setting

# In files with tests for a GPU: those of one part, and those that all engines pass.
_MARKS = ("mark.gpu", "engine: Engine")


def tests(setting: Setting) -> dict[str, Any]:
    """`pytest -m gpu`, reported after each test: how many passed, which failed. Without a GPU they are counted.

    What takes minutes is left out: the part `lossless` compares as many tokens.
    """
    import pytest

    # Others may need packages that are not here.
    files = [
        str(path)
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        if any(mark in path.read_text("utf-8") for mark in _MARKS)
    ]
    collect = [] if setting.device.startswith("cuda") else ["--collect-only"]
    options = [
        "-q",
        "-p",
        "no:cacheprovider",
        # The machine's own plugins, and what its versions warn of, are not what is tested.
        "--disable-plugin-autoload",
        "-W",
        "default",
        "--continue-on-collection-errors",
        "-m",
        "gpu and not slow",
        *collect,
    ]
    progress = TestProgress(setting.report)
    code = pytest.main([*options, *files], plugins=[progress])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED) and not progress.figures["failed"]:
        raise RuntimeError(f"pytest ended with {int(code)}")
    return progress.figures


class TestProgress:
    """A plugin of pytest: the tests that others build on first, and figures after each.

    Attributes:
        figures: `collected`, `passed`, `skipped` (why), and `failed`: a line of each failure by the test's name.
    """

    __test__ = False

    def __init__(self, report: Callable[[dict[str, Any]], None]) -> None:
        self._report = report
        self.figures: dict[str, Any] = {"collected": 0, "passed": 0, "skipped": [], "failed": {}}

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        """The kernels, the engine, then what all engines pass."""
        items.sort(key=lambda item: ("engine" in item.fixturenames, "cuda" not in item.nodeid))

    def pytest_collection_finish(self, session: Any) -> None:
        self.figures["collected"] = len(session.items)
        self._report(self.figures)

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self._failed(report)

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self._failed(report)
        elif report.skipped:
            reason = report.longrepr[-1] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            self.figures["skipped"] = sorted({*self.figures["skipped"], reason})
        elif report.when == "call":
            self.figures["passed"] += 1
        self._report(self.figures)

    def _failed(self, report: Any) -> None:
        crash = getattr(report.longrepr, "reprcrash", None)
        lines = (crash.message if crash else str(report.longrepr)).strip().splitlines()
        self.figures["failed"][report.nodeid] = lines[0 if crash else -1] if lines else ""
