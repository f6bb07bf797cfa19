"""`fastmtp vocab`: the lists of tokens that a head drafts from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from fastmtp.config import VocabularyConfig, load_config
from fastmtp.options import settings_options
from fastmtp.session import config_option, describe_target, finish, json_option, target_option

_head_option = click.option("--head", type=click.Path(path_type=Path), required=True, help="head directory")


def _text_options(command: Any) -> Any:
    command = click.option(
        "--text",
        "texts",
        multiple=True,
        help="text to count, FILE or LABEL=FILE: .txt, .jsonl, .parquet; may be repeated",
    )(command)
    return click.option(
        "--data", type=click.Path(path_type=Path), multiple=True, help="data directory; may be repeated"
    )(command)


@click.group()
def vocab() -> None:
    """Build and inspect the lists of tokens that a head drafts from; one for each language and domain."""


@vocab.command()
@target_option
@_head_option
@_text_options
@config_option
@json_option
@settings_options(VocabularyConfig)
def build(
    target: str,
    head: Path,
    data: tuple[Path, ...],
    texts: tuple[str, ...],
    config: Path | None,
    as_json: bool,
    **settings: Any,
) -> None:
    """Count the target's own words, and write the likeliest of each language and domain into the head."""
    chosen = load_config(VocabularyConfig, config, settings)
    if not data and not texts:
        raise ValueError("there is nothing to count; give --data or --text")
    from rich.console import Console

    from fastmtp.distill.dataset import data_sha256
    from fastmtp.distill.token_counts import count
    from fastmtp.models.head_format import read_description
    from fastmtp.provenance import provenance
    from fastmtp.tables import figures_table
    from fastmtp.vocabulary import builder

    described = describe_target(target)
    read_description(head, described)
    labelled = count(described, data, texts)
    built = builder.build(
        labelled,
        described.basic_ids,
        described.vocabulary_size,
        size=chosen.size,
        covered=chosen.coverage or None,
    )
    record = provenance(chosen, data=data_sha256(data), texts=list(texts), tokens=built.tokens)
    path = head / "vocabulary.json"
    built.lists.save(path, described.identity.tokenizer_sha256, record)
    if not as_json:
        table = figures_table("list", ["tokens counted", "size", "covers of text kept aside"])
        for name, ids in built.lists.lists.items():
            table.add_row(name, f"{built.tokens[name]:,}", f"{len(ids):,}", f"{100 * built.coverage[name]:.2f} %")
        Console().print(table)
    sizes = {name: len(ids) for name, ids in built.lists.lists.items()}
    finish(
        as_json,
        {"sizes": sizes, "tokens": built.tokens, "coverage": built.coverage, "out": str(path)},
        f"{len(sizes)} lists, {len(built.lists.union()):,} tokens together, in {path}",
    )


@vocab.command()
@target_option
@_head_option
@_text_options
@click.option("--missing", type=click.IntRange(0), default=10, show_default=True, help="left-out tokens to print")
@json_option
def show(
    target: str, head: Path, data: tuple[Path, ...], texts: tuple[str, ...], missing: int, as_json: bool
) -> None:
    """The lists' sizes and overlaps, and how much of --data and --text each covers."""
    from rich.console import Console

    from fastmtp.distill.token_counts import count
    from fastmtp.models.head_format import read_description
    from fastmtp.tables import figures_table
    from fastmtp.vocabulary.builder import compare

    described = describe_target(target)
    vocabulary, _ = read_description(head, described)
    labelled = count(described, data, texts) if data or texts else {}
    found = compare(vocabulary, {label: counts.total for label, counts in labelled.items()}, missing)
    words = {
        label: [str(described.tokenizer.decode([token])) for token in tokens]
        for label, tokens in found.left_out.items()
    }
    if not as_json:
        console = Console()
        console.print("how many of a list's tokens the others have:")
        overlaps = figures_table("list", ["size", *found.sizes])
        for name, size in found.sizes.items():
            shares = (f"{100 * found.overlap[name][other]:.0f} %" for other in found.sizes)
            overlaps.add_row(name, f"{size:,}", *shares)
        console.print(overlaps)
        if found.coverage:
            console.print("how much of a text the lists cover:")
            covers = figures_table("text", ["tokens", *found.sizes, "all lists"])
            for label, by_list in found.coverage.items():
                shares = (f"{100 * share:.2f} %" for share in by_list.values())
                covers.add_row(label, f"{labelled[label].total.total():,}", *shares)
            console.print(covers)
        for label, left_out in words.items():
            if left_out:
                console.print(f"{label}, in no list: " + " ".join(map(repr, left_out)), markup=False)
    finish(
        as_json,
        {"sizes": found.sizes, "overlap": found.overlap, "coverage": found.coverage, "left_out": words},
        f"{len(found.sizes)} lists, {len(vocabulary.union()):,} tokens together",
    )
