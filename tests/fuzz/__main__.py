"""Fuzzes all readers for a time, in processes with limits: `python -m tests.fuzz [SECONDS] [FORMAT...]`.

Prints how many mutated files there were by format and class, and where the first of each kind of finding is kept.
Ends with 1 if there was any. FASTMTP_FUZZ_SECONDS is the time where no argument says it; an hour without both.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import psutil

from tests.fuzz.worker import keep

CLASSES = ("clean", "traceback", "crash", "hang", "memory", "accepted")
# Importing PyTorch takes a while on a busy machine.
_START = 600.0
_HANG = 30.0


class Worker:
    """A process, and what is known of its findings."""

    def __init__(self, base: Path, seed: int, seconds: float, names: list[str]) -> None:
        self.base = base
        base.mkdir(parents=True)
        self._said = (base / "said").open("w")
        command = [sys.executable, "-m", "tests.fuzz.worker", str(base), str(seed), str(seconds), *names]
        self.process = subprocess.Popen(command, stdout=self._said, stderr=(base / "errors").open("w"))
        self.started = self._begun = time.time()
        self._spent = 0.0

    def ended_by(self) -> str | None:
        """`hang` or `crash` if the process must be, or was, ended so; an empty text if it ended by itself."""
        if self.process.poll() is not None:
            return "crash" if self.process.returncode else ""
        beat, done = self.base / "beat", (self.base / "done").exists()
        begun = beat.stat().st_mtime if beat.exists() else self.started
        with suppress(psutil.NoSuchProcess):
            spent = sum(psutil.Process(self.process.pid).cpu_times()[:2])
            if begun != self._begun:
                self._begun, self._spent = begun, spent
            # By the processor's time: on a busy machine a case may take long.
            if not done and beat.exists() and spent - self._spent > _HANG:
                return self._killed("hang")
        # Beginning and ending are no cases.
        return self._killed("" if done else "hang") if time.time() - begun > _START else None

    def _killed(self, end: str) -> str:
        self.process.kill()
        self.process.wait()
        return end


def run(base: Path, seconds: float, names: list[str]) -> list[dict[str, str]]:
    """Findings, with the counts printed."""
    until, workers, serial = time.time() + seconds, list[Worker](), 0
    findings: list[dict[str, str]] = []
    counts: dict[str, Counter[str]] = {name: Counter() for name in names}
    while True:
        for worker in [*workers]:
            if (end := worker.ended_by()) is not None:
                workers.remove(worker)
                findings += collected(worker, end, counts)
        left = until - time.time()
        while left > 1 and len(workers) < min(4, os.cpu_count() or 1):
            serial += 1
            workers.append(Worker(base / f"worker-{serial}", serial * 1_000_000 + int(time.time()), left, names))
        if not workers:
            break
        time.sleep(0.5)
    width = max(map(len, names))
    print(" " * width, *(f"{name:>10}" for name in CLASSES))
    for name in names:
        print(f"{name:{width}}", *(f"{counts[name][kind]:10}" for kind in CLASSES))
    return findings


def collected(worker: Worker, end: str, counts: dict[str, Counter[str]]) -> list[dict[str, str]]:
    """What a process that has ended found, added to the counts."""
    findings = [json.loads(line) for line in (worker.base / "said").read_text().splitlines()]
    for line in (worker.base / "counts.jsonl").read_text().splitlines():
        found = json.loads(line)
        counts[found["format"]].update(found["counts"])
    if end and not (worker.base / "beat").exists():
        raise SystemExit(f"a worker ended before it began:\n{(worker.base / 'errors').read_text()}")
    if end:
        name, label = json.loads((worker.base / "beat").read_text())
        words = f"{end} {worker.process.returncode}: {(worker.base / 'errors').read_text().strip()[-300:]}"
        kept = keep(worker.base, name, end, label)
        findings.append({"class": end, "format": name, "label": label, "words": words, "kept": kept})
        counts[name][end] += 1
    return findings


def main() -> None:
    arguments = sys.argv[1:]
    seconds = float(os.environ.get("FASTMTP_FUZZ_SECONDS") or 3600)
    if arguments and arguments[0][0].isdigit():
        seconds = duration(arguments.pop(0))
    # Here, as the import takes seconds that a worker needs anyway.
    from tests.fuzz.formats import FORMATS

    base, kept = Path(tempfile.mkdtemp(prefix="fastmtp-fuzz-")), Path("fuzz-found")
    try:
        findings = run(base, seconds, arguments or list(FORMATS))
        kinds: dict[str, dict[str, str]] = {}
        for finding in findings:
            kinds.setdefault(Path(finding["kept"]).name, finding)
        for name, finding in kinds.items():
            shutil.copytree(finding["kept"], kept / name, dirs_exist_ok=True)
            print(f"\n{kept / name}: {finding['label']}\n  {finding['class']}: {finding['words'][:300]}")
    finally:
        shutil.rmtree(base)
    sys.exit(bool(findings))


def duration(text: str) -> float:
    """Seconds of a time as 90, 20m or 1h."""
    if (found := re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text)) is None:
        raise SystemExit(f"{text}: give a time as 90s, 20m or 1h")
    return float(found[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[found[2]]


if __name__ == "__main__":
    main()
