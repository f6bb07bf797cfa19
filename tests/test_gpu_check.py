"""The check of a GPU, as far as a CPU can run it: each part on a tiny model, and what becomes of one that fails."""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from tools import gpu_check
from tools.gpu.bars import bars
from tools.gpu.decoding import TOGETHER
from tools.gpu.parts import LIMITS, PARTS
from tools.gpu.setting import ROOT, Setting

GOOD = "import json, sys; json.dump({'figure': 1}, open(sys.argv[1], 'w'))"
BROKEN = GOOD + "; raise SystemExit('no such kernel')"
# It and a process that it has started would go on for long.
SLOW = (
    "import json, subprocess, sys, time\n"
    "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
    "json.dump({'child': child.pid}, open(sys.argv[1], 'w'))\n"
    "time.sleep(600)\n"
)


def settings(out: Path, names: list[str], **changes: Any) -> argparse.Namespace:
    given = {"out": out, "device": "cpu", "seconds": 60.0, "limit": None, "parts": names, "tiny": False}
    return argparse.Namespace(**{**given, **changes})


def test_a_part_that_fails_or_hangs_is_named_and_the_next_one_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With what it had found until then; all that it had started is ended, and its files are gone."""
    scripts = {"machine": GOOD, "broken": BROKEN, "slow": SLOW, "good": GOOD}
    monkeypatch.setattr(
        gpu_check, "_command", lambda name, limit, result, given: [sys.executable, "-c", scripts[name], str(result)]
    )
    monkeypatch.setattr(gpu_check, "LIMITS", {"broken": 30.0, "slow": 1.0, "good": 30.0})
    out = tmp_path / "report.json"
    report = gpu_check.check(settings(out, ["broken", "slow", "good"]))
    assert json.loads(out.read_text()) == report
    assert report["machine"] == {"figure": 1}
    broken, slow, good = (report["parts"][name] for name in ("broken", "slow", "good"))
    assert (broken["ok"], broken["result"]) == (False, {"figure": 1})
    assert broken["error"].splitlines()[-2:] == ["no such kernel", "ended with 1"]
    assert (slow["ok"], slow["error"]) == (False, "stopped after 1 seconds")
    child = slow["result"]["child"]
    for _ in range(50):
        if not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE:
            break
        time.sleep(0.1)
    else:
        pytest.fail("what a part had started still runs")
    assert (good["ok"], good["error"], good["result"]) == (True, None, {"figure": 1})
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_the_time_of_all_parts_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part gets what is left at most; one that would get nothing is not begun."""
    monkeypatch.setattr(
        gpu_check, "_command", lambda name, limit, result, given: [sys.executable, "-c", GOOD, str(result)]
    )
    report = gpu_check.check(settings(tmp_path / "report.json", ["tests", "training"], seconds=0.5))
    assert [part["error"] for part in report["parts"].values()] == ["no time was left"] * 2
    assert set(LIMITS) == set(PARTS)
    assert sum(LIMITS.values()) <= 480


@pytest.mark.parametrize("name", [name for name in PARTS if name != "tests" and "llama" not in name])
def test_each_part_runs_on_a_tiny_model(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The figures that docs/gpu-check.md names, all of them above zero; nothing differs."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    reported: list[dict[str, Any]] = []
    found = PARTS[name](Setting("cpu", 1.0, True, lambda figures: reported.append(dict(figures))))
    documented = (ROOT / "docs" / "gpu-check.md").read_text(encoding="utf-8")
    assert [key for key in found if f"`{key}`" not in documented] == []
    json.dumps(found)
    if name == "lossless":
        assert found["chain"]["tokens"] > 0
        assert found["chain"]["differing"] == found["tree"]["differing"] == 0
    elif name.startswith("decode"):
        assert set(found["forward_ms"]) == set(TOGETHER)
        assert found["round_ms"] > 0
        assert reported[0]["plain_ms"] == found["plain_ms"]
    else:
        assert found["tokens_per_second"] > 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_whole_check(tmp_path: Path) -> None:
    report = gpu_check.check(settings(tmp_path / "report.json", list(PARTS), limit=1.0, tiny=True, seconds=1800.0))
    assert {name: part["error"] for name, part in report["parts"].items() if not part["ok"]} == {}
    engines = [report["parts"][name]["result"]["engine"] for name in ("lossless", "decode qwen2.5-1.5b")]
    if importlib.util.find_spec("triton") is not None:
        assert all("interpreted" in engine for engine in engines)
        decoded = report["parts"]["decode qwen2.5-1.5b"]["result"]
        assert 0.5 < decoded["dtypes"]["int8"]["bytes"] / decoded["bytes"] < 0.6


def test_bars_are_held_against_what_was_measured() -> None:
    """On either side of each bound; what was not measured is neither reached nor missed."""
    assert {bar.passed for bar in bars({}).values()} == {None}
    decoded = {"plain_share": 0.75, "flatness_8": 1.1, "round_steps": 1.36}
    found = bars(
        {
            "decode qwen2.5-1.5b": decoded,
            "decode llama-3.1-8b": decoded,
            "lossless": {"chain": {"differing": 0, "tokens": 20_000}, "tree": {"differing": 1, "tokens": 9}},
            "distillation": {"tokens_per_second": 1e9, "drawn_tokens_per_second": 249_999.0},
            "training": {"tokens_per_second": 250_000},
        }
    )
    assert {name: bar.passed for name, bar in found.items() if bar.passed is not None} == {
        "decode qwen2.5-1.5b: share of the copy bandwidth": True,
        "decode qwen2.5-1.5b: 8 tokens over 1": True,
        "decode qwen2.5-1.5b: round over plain steps": False,
        "decode llama-3.1-8b: share of the copy bandwidth": False,
        "decode llama-3.1-8b: 8 tokens over 1": True,
        "decode llama-3.1-8b: round over plain steps": False,
        "lossless: chain, differing tokens": True,
        "lossless: chain, tokens compared": True,
        "lossless: tree, differing tokens": False,
        "lossless: tree, tokens compared": False,
        "distillation: tokens a second": False,
        "training: tokens a second": True,
    }


TESTS = """
import pytest

@pytest.fixture
def engine():
    return 1

def test_of_all_engines(engine):
    pass

def test_that_fails():
    raise ValueError("no such kernel")

def test_skipped():
    pytest.skip("not here")
"""
PYTEST = """
import json, sys, pytest
from tools.gpu.tests import TestProgress
progress = TestProgress(lambda figures: print("report", json.dumps(figures)))
pytest.main(["-q", "-p", "no:cacheprovider", "-c", "/dev/null", sys.argv[1]], plugins=[progress])
"""


def test_what_passed_is_reported_after_each_test(tmp_path: Path) -> None:
    """Those of all engines last; a failure with its first line."""
    (tmp_path / "test_some.py").write_text(TESTS)
    done = subprocess.run(
        [sys.executable, "-c", PYTEST, str(tmp_path)], capture_output=True, text=True, cwd=ROOT, check=True
    )
    lines = [line.partition("report ")[2] for line in done.stdout.splitlines() if "report " in line]
    reports = [json.loads(line) for line in lines]
    assert reports[0] == {"collected": 3, "passed": 0, "skipped": [], "failed": {}}
    assert [name.rpartition("::")[2] for name in reports[-1]["failed"]] == ["test_that_fails"]
    assert list(reports[-1]["failed"].values()) == ["ValueError: no such kernel"]
    assert (reports[-1]["passed"], reports[-1]["skipped"]) == (1, ["Skipped: not here"])
    assert next(report for report in reports if report["passed"])["failed"]


def test_a_bundle_for_another_python_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anything runs, with the command that makes the right one; modules for any Python do not count."""
    packages, tag = tmp_path / "packages", sys.implementation.cache_tag
    packages.mkdir()
    for name in ("one.abi3.so", f"two.{tag}-x86_64-linux-gnu.so"):
        (packages / name).touch()
    assert gpu_check.other_python(packages) is None
    (packages / "three.cpython-39-x86_64-linux-gnu.so").touch()
    monkeypatch.setattr(gpu_check, "BUNDLE", tmp_path)
    monkeypatch.setattr(gpu_check, "check", lambda given: pytest.fail("it began"))
    monkeypatch.setattr(sys, "argv", ["gpu_check"])
    with pytest.raises(SystemExit):
        gpu_check.main()
    wanted = f"--python-version {sys.version_info[0]}.{sys.version_info[1]} --only-binary :all:"
    assert (said := capsys.readouterr().err).count("is for cpython-39-x86_64-linux-gnu") == 1 and wanted in said


def test_nothing_that_the_parts_run_needs_the_compiled_package() -> None:
    """On a machine with a GPU it is not compiled."""
    engines = ["torch.engine", *["cuda.load"] * (importlib.util.find_spec("triton") is not None)]
    modules = ["decode.speculative", "decode.drafting.adaptive", "evaluate.prompts", "distill.speed"]
    modules += ["train.trainer", *[f"engines.{name}" for name in engines]]
    imports = "; ".join(f"import fastmtp.{name}" for name in modules)
    command = [sys.executable, "-c", f"import sys; sys.modules['fastmtp._native'] = None; {imports}"]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
