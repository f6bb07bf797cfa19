"""Tests and measurements on a machine with one GPU, in eight minutes, without a network: docs/gpu-check.md.

    python -m tools.gpu_check [--out gpu-check.json] [--device cuda] [--seconds 480] [--parts tests,training]

Each part is a process of its own with a limit of its own; one that fails or takes too long is named in the report,
and the next one begins. The report is complete after every part, whatever ends the check. With `--tiny --device
cpu` the CUDA engine's kernels are interpreted, where triton is installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tools.gpu.bars import bars
from tools.gpu.parts import LIMITS, PARTS, machine
from tools.gpu.setting import ROOT, Setting

FORMAT = 1
# What a bare machine lacks (`make gpu-bundle`).
BUNDLE = ROOT / "build" / "gpu"
# A part that would have less is not begun.
_LEAST_SECONDS = 1.0
# Of the process that finds out about the machine; and more for tiny parts, with imports and an interpreter.
_MACHINE_SECONDS, _TINY_SECONDS = 30.0, 300.0


def check(given: argparse.Namespace) -> dict[str, Any]:
    """Run the parts; returns the report, which is written to `given.out` after each."""
    begun = time.monotonic()
    report: dict[str, Any] = {"format": FORMAT, "tiny": given.tiny, "machine": {}, "bars": {}, "parts": {}}
    ended = _run("machine", _MACHINE_SECONDS, given)
    report["machine"] = ended["result"] if ended["ok"] else {"error": ended["error"]}
    for name in given.parts:
        left = given.seconds - (time.monotonic() - begun)
        limit = min(given.limit or LIMITS[name], left)
        if limit < _LEAST_SECONDS:
            ended = {"ok": False, "error": "no time was left", "seconds": 0.0, "result": {}}
        else:
            ended = _run(name, limit, given)
        report["parts"][name] = {"limit_seconds": limit, **ended}
        figures = {part: found["result"] for part, found in report["parts"].items()}
        report["bars"] = {bar: asdict(found) for bar, found in bars(figures).items()}
        report["seconds"] = time.monotonic() - begun
        _write(given.out, report)
        print(f"{name}: {'done' if ended['ok'] else ended['error'].splitlines()[-1]}", file=sys.stderr, flush=True)
    return report


def _run(name: str, limit: float, given: argparse.Namespace) -> dict[str, Any]:
    """A part in a process of its own: whether it ended well, why not, its seconds and its figures."""
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as directory:
        result, log = Path(directory) / "result.json", Path(directory) / "log"
        command, environment = _command(name, limit, result, given), _environment(given) | {"TMPDIR": directory}
        started, error = time.monotonic(), None
        with log.open("w") as stream:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=stream, stderr=stream, start_new_session=True
            )
            try:
                code = process.wait(limit + (_TINY_SECONDS if given.tiny else 0))
                error = None if code == 0 else f"ended with {code}"
            except subprocess.TimeoutExpired:
                error = f"stopped after {limit:g} seconds"
            finally:
                _end(process)
        seconds = time.monotonic() - started
        found: dict[str, Any] = json.loads(result.read_text()) if result.is_file() else {}
        tail = log.read_text(errors="replace").strip().splitlines()[-12:]
    message = None if error is None else "\n".join([*tail, error])
    return {"ok": error is None, "error": message, "seconds": seconds, "result": found}


def _command(name: str, limit: float, result: Path, given: argparse.Namespace) -> list[str]:
    command = [sys.executable, "-m", "tools.gpu_check", "--part", name, "--result", str(result)]
    return [*command, "--device", given.device, "--limit", str(limit), *(["--tiny"] if given.tiny else [])]


def _end(process: subprocess.Popen[bytes]) -> None:
    """With all that it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def other_python(packages: Path) -> str | None:
    """The Python that the bundle's compiled modules are for, if it is not this one."""
    for module in sorted(packages.rglob("*.cpython-*.so")):
        tag = module.name.split(".")[-2]
        if not tag.startswith(f"{sys.implementation.cache_tag}-"):
            return tag
    return None


def _is_interpreted(given: argparse.Namespace) -> bool:
    return given.tiny and given.device == "cpu" and importlib.util.find_spec("triton") is not None


def _environment(given: argparse.Namespace) -> dict[str, str]:
    """This checkout's package, and what was brought along, before what the machine has."""
    paths = [ROOT / "src", ROOT, BUNDLE / "packages"]
    known = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    found = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([*map(str, paths), *filter(None, known)]),
        "HF_HUB_OFFLINE": "1",
    }
    if _is_interpreted(given):
        # Triton reads it when it is imported.
        found["TRITON_INTERPRET"] = "1"
    if (BUNDLE / "cache").is_dir():
        found["FASTMTP_CACHE"] = str(BUNDLE / "cache")
    return found


def _write(path: Path, value: dict[str, Any]) -> None:
    """In place of what is there, never half of it."""
    beside = path.with_name(f".{path.name}.tmp")
    beside.write_text(json.dumps(value, indent=2) + "\n")
    beside.replace(path)


def _part(given: argparse.Namespace) -> None:
    """What a part's process does."""
    if given.part == "machine":
        _write(given.result, machine(given.device))
        return
    setting = Setting(
        given.device, given.limit, given.tiny, lambda found: _write(given.result, found), _is_interpreted(given)
    )
    _write(given.result, PARTS[given.part](setting))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu-check.json"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=480.0, help="of all parts together")
    parser.add_argument("--limit", type=float, help="seconds of each part, instead of its own limit")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of {', '.join(PARTS)}")
    parser.add_argument("--tiny", action="store_true", help="tiny random models: try the check itself")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.part:
        _part(given)
        return
    given.parts = given.parts.split(",")
    if unknown := [name for name in given.parts if name not in PARTS]:
        parser.error(f"no such part: {', '.join(unknown)}; there are {', '.join(PARTS)}")
    if other := other_python(BUNDLE / "packages"):
        here = ".".join(map(str, sys.version_info[:2]))
        remedy = f"make gpu-bundle GPU_PIP='--python-version {here} --only-binary :all:'"
        parser.error(f"{BUNDLE / 'packages'} is for {other}, not for Python {here}; {remedy}")
    report = check(given)
    failed = [name for name, ended in report["parts"].items() if not ended["ok"]]
    print(json.dumps(report, indent=2))
    if not given.tiny:
        for name, bar in report["bars"].items():
            verdict = {True: "reached", False: "MISSED", None: "not measured"}[bar["passed"]]
            print(f"{name}: {bar['measured']} (bar {bar['bound']}): {verdict}", file=sys.stderr)
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
