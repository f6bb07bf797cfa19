"""Reads mutated files until its time is over; what it is reading is on disk, should it not survive that.

    python -m tests.fuzz.worker DIRECTORY SEED SECONDS FORMAT...

DIRECTORY gets for each format a valid `example` and what is being read (`now`), and besides `beat` (what was read
last) and `counts.jsonl` (a line for each round: how many cases there were by class). Findings are printed.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import sys
import time
from collections import Counter
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.fuzz.formats import FORMATS, Case, cases, judge, servers

# Beyond what the process has when it begins.
_MEMORY = 2 << 30
_ROUND = 25
SLOW = 5.0


def main(base: Path, first: int, seconds: float, names: list[str]) -> None:
    os.environ["FASTMTP_CACHE"] = str(base / "cache")
    expected = {}
    with servers(), (base / "counts.jsonl").open("a") as log:
        for name in names:
            example = base / name / "example"
            example.mkdir(parents=True)
            FORMATS[name].make(example)
            shutil.copytree(example, base / name / "now")
            expected[name] = FORMATS[name].read(base / name / "now")
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + _MEMORY, size + _MEMORY))
        until, number = time.monotonic() + seconds, first
        while time.monotonic() < until:
            number += 1
            for name in names:
                log.write(
                    json.dumps({"format": name, "counts": explore(base, name, number, expected[name])}) + "\n"
                )
                log.flush()
        (base / "done").touch()


def explore(base: Path, name: str, number: int, expected: object) -> Counter[str]:
    """A round of one format; how many cases there were by class."""
    form, example, directory = FORMATS[name], base / name / "example", base / name / "now"
    counts = Counter[str]()

    @seed(number)
    @settings(
        max_examples=_ROUND,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(cases(example, form))
    def read(case: Case) -> None:
        path, label = directory / case.file, f"{case.file}: {case.mutation.label}"
        path.write_bytes(case.mutation.data)
        (base / "beat").write_text(json.dumps([name, label]))
        started = time.process_time()
        outcome, words = judge(form, directory, case, expected)
        if (spent := time.process_time() - started) > SLOW and outcome == "clean":
            outcome, words = "hang", f"{spent:.1f} s of a processor"
        counts[outcome] += 1
        if outcome != "clean":
            kept = keep(base, name, outcome, words)
            print(
                json.dumps({"class": outcome, "format": name, "label": label, "words": words, "kept": kept}),
                flush=True,
            )
        shutil.copyfile(example / case.file, path)

    read()
    return counts


def keep(base: Path, name: str, outcome: str, words: str) -> str:
    """Keep what is being read; one of a kind, by the first words of the error."""
    kind = "".join(letter if letter.isalnum() else "-" for letter in words[:40])
    kept = base / "found" / f"{name}-{outcome}-{kind}"
    if not kept.exists():
        shutil.copytree(base / name / "now", kept)
    return str(kept)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), sys.argv[4:])
