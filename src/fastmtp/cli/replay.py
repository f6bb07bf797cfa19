"""`fastmtp replay`: drafters on recorded answers."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from fastmtp.cli.options import PATH, alone_in, engine_options, finish, head_option, json_option
from fastmtp.cli.terminal import TERMINAL, results
from fastmtp.engines.open import EngineOptions, open_engine


@click.command()
@click.argument("recordings", type=PATH, nargs=-1, required=True, metavar="FILE...")
@engine_options
@head_option
@click.option(
    "--fit",
    is_flag=True,
    help="write what was learned of the head's drafts into --head, where decoding starts from it",
)
@json_option
def replay(
    recordings: tuple[Path, ...],
    target: str,
    options: EngineOptions,
    head: Path | None,
    fit: bool,
    as_json: bool,
) -> None:
    """What chains and `auto` would give on recorded answers, by this machine's costs and without its noise."""
    from fastmtp.decode.drafting import estimates
    from fastmtp.decode.drafting.open import draft_lists
    from fastmtp.decode.drafting.options import GROWING
    from fastmtp.evaluate import recording
    from fastmtp.evaluate import replay as replays
    from fastmtp.files import file_sha256
    from fastmtp.heads.format import check_head
    from fastmtp.heads.shipped import shipped_head
    from fastmtp.provenance import provenance
    from fastmtp.report import replay as tables

    directory = head or shipped_head(target)
    if directory is None or (fit and head is None):
        raise ValueError("give --head DIR, the head that was recorded")
    check_head(directory)
    alone_in(directory if fit else None)
    known = estimates.load(directory)
    answers = [one for path in recordings for one in recording.load(path)]
    engine = open_engine(target, options, progress=TERMINAL)
    loaded = engine.load_head(directory)
    lists = draft_lists(loaded, GROWING, engine.target.vocabulary_size)
    costs = engine.costs(loaded, lists, TERMINAL)
    if fit:
        found = replays.fit(answers, costs, estimates.Estimates())
        hashes = {path.name: file_sha256(path) for path in recordings}
        estimates.save(found, directory, provenance(recordings=hashes))
    compared = replays.compare(answers, costs, estimates.load(directory) if fit else known)
    means = {name: tables.mean_speedup(by_benchmark) for name, by_benchmark in compared.items()}
    if not as_json:
        results(tables.replay_grid(compared))
    best = max((name for name in means if name.startswith("chain")), key=means.__getitem__)
    finish(
        as_json,
        {"costs": asdict(costs), "speedups": means, "replayed": tables.as_json(compared)},
        f"auto {means['auto']:.2f}x, {best} {means[best]:.2f}x, in hindsight {means[replays.HINDSIGHT]:.2f}x, "
        f"an oracle {means[replays.ORACLE]:.2f}x; {len(answers)} answers"
        + (f"; estimates written into {directory}" if fit else ""),
    )
