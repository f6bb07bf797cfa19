"""One training run from data directories to a head directory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastmtp.config import TrainConfig
from fastmtp.distill.dataset import data_sha256, read_exchanges
from fastmtp.models.head_format import save_head
from fastmtp.models.target import Target
from fastmtp.progress import bar, console
from fastmtp.provenance import provenance
from fastmtp.train.trainer import Progress, Trainer
from fastmtp.vocabulary.lists import ALL, VocabularyLists, rank_tokens


def train_head(
    target: Target, data: Sequence[Path], config: TrainConfig, out: Path, init: Path | None = None
) -> dict[str, Any]:
    """Train, and write the head with the best held-out acceptance length to `out`.

    The first weights are those of the head in `init`, or without one of the target's last layer.
    Checkpoints and metrics lie beside it, in `<out>.training`; a run that was stopped goes on from there.

    Returns:
        steps, tau and acceptance (cumulative by step) of the head that was written.
    """
    if out.exists() and not (out / "vocabulary.json").is_file():
        raise ValueError(f"{out}: exists and is not a head directory; choose another --out")
    # Now, not at the end: the code may have changed by then.
    record = provenance(config)
    exchanges = read_exchanges(data, target.identity.tokenizer_sha256)
    vocabulary = _vocabulary(target, [exchange.ids for exchange in exchanges], config.draft_vocabulary)
    directory = out.with_name(out.name + ".training")
    trainer = Trainer(target, exchanges, vocabulary.union() or None, config, directory, init)
    with bar("train", trainer.steps, trainer.step) as progress:
        for done in trainer.train():
            progress.advance(1, done.tokens, "loss " + " ".join(f"{loss:.3f}" for loss in done.losses))
            if done.held_out is not None:
                console.print(_measured(done))
    head = trainer.best_head()
    held_out = trainer.measure()
    facts = {
        "target": target.source,
        "init": None if init is None else str(init),
        "data": data_sha256(data),
        "exchanges": len(exchanges),
        "tokens": sum(len(exchange.ids) for exchange in exchanges),
        "held_out_tau": held_out.tau,
        "held_out_acceptance": held_out.cumulative,
    }
    save_head(
        out,
        head,
        target,
        draft_steps=config.draft_steps,
        vocabulary=vocabulary,
        provenance=record | facts,
    )
    return {"steps": trainer.steps, "tau": held_out.tau, "acceptance": held_out.cumulative}


def _vocabulary(target: Target, texts: list[list[int]], size: int) -> VocabularyLists:
    """The likeliest tokens of the data, end tokens always among them; nothing where all tokens are wanted."""
    if size == 0 or size >= target.vocabulary_size:
        return VocabularyLists({})
    return VocabularyLists({ALL: rank_tokens(texts, size, sorted(target.end_ids), target.vocabulary_size)})


def _measured(done: Progress) -> str:
    assert done.held_out is not None
    shares = " / ".join(f"{100 * share:.1f}" for share in done.held_out.cumulative)
    return f"step {done.step}: held-out tau {done.held_out.tau:.3f}, acceptance {shares} %"
