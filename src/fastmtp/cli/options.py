"""Options that commands share, and how a command ends."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from fastmtp.cli.fetching import Command, yes_option
from fastmtp.cli.terminal import visible
from fastmtp.config import kind_of
from fastmtp.decode.drafting.options import AUTO, GROWING, DraftOptions
from fastmtp.engines.open import CUDA_DTYPES, NATIVE_DTYPES, TORCH_DTYPES, EngineName, EngineOptions
from fastmtp.locking import sole_writer

PATH = click.Path(path_type=Path)


# Of repetitions, requests, tokens, gigabytes and seconds: beyond it is no count but a slip, and sums overflow.
_MOST = 2**31 - 1


class CountRange(click.IntRange):
    """A count from `min` on."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        count = super().convert(value, param, ctx)
        if count > _MOST:
            self.fail(f"it is more than {_MOST}", param, ctx)
        return count


class FiniteRange(click.FloatRange):
    """A number in a range that is also one: click lets NaN pass."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is no finite number", param, ctx)
        if number > _MOST:
            self.fail(f"it is more than {_MOST}", param, ctx)
        return number


class _OutPath(click.Path):
    """A place to write to: what is there must be of the right kind, and its directory writable."""

    def __init__(self, **kind: bool) -> None:
        super().__init__(path_type=Path, writable=True, **kind)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        path = Path(value).absolute()
        if not value or path == path.parent:
            self.fail(f"{value!r} is no name of something to write", param, ctx)
        near = next(one for one in (path, *path.parents) if one.exists())
        if near != path and not (near.is_dir() and os.access(near, os.W_OK)):
            self.fail(f"{near} is no directory that can be written to", param, ctx)
        return super().convert(value, param, ctx)


OUT_FILE, OUT_DIRECTORY = _OutPath(dir_okay=False), _OutPath(file_okay=False)

json_option = click.option("--json", "as_json", is_flag=True, help="print one JSON document")
strict_option = click.option(
    "--strict", is_flag=True, help="stop at the first row that cannot be used  [default: leave it out and say so]"
)
config_option = click.option("--config", type=PATH, help="TOML file with the settings below")
large_option = yes_option("fetch a model of more than 1 GB without asking")
device_option = click.option("--device", help="cpu, cuda, cuda:1, ...  [default: the GPU if there is one]")
head_option = click.option("--head", type=PATH, help="head directory  [default: the target's shipped one]")
tokens_option = click.option(
    "--max-new-tokens", type=CountRange(1), default=512, show_default=True, help="for each answer"
)
verbose_option = click.option(
    "--verbose", is_flag=True, help="say after an answer what was drafted, and what came of it"
)


def target_option(command: Command) -> Command:
    """`--target`, and --yes for one that must be fetched."""
    return click.option(
        "--target",
        default="smollm2",
        show_default=True,
        help="smollm2 or qwen2.5-coder-1.5b (fetched at first use: 0.1 and 1.1 GB), a Hugging Face directory, a "
        ".gguf file, or a hub id",
    )(large_option(command))


def text_options(command: Command) -> Command:
    """Options for the texts whose tokens are counted."""
    command = click.option(
        "--text",
        "texts",
        multiple=True,
        help="text to count, FILE or LABEL=FILE: text, or JSONL, JSON or Parquet with `text`; may be repeated",
    )(command)
    return click.option("--data", type=PATH, multiple=True, help="data directory; may be repeated")(command)


def engine_options(command: Command) -> Command:
    """Options of commands that run on any engine; they are passed as `options`, an EngineOptions."""

    @functools.wraps(command)
    def collected(
        engine: EngineName | None, dtype: str | None, device: str | None, threads: int | None, **rest: Any
    ) -> None:
        command(options=EngineOptions(engine, dtype, device, threads), **rest)

    decorated: Command = click.option(
        "--threads", type=CountRange(1), help="of the native engine  [default: one for each physical core]"
    )(collected)
    decorated = device_option(decorated)
    decorated = click.option(
        "--dtype",
        type=click.Choice(dict.fromkeys([*NATIVE_DTYPES, *TORCH_DTYPES, *CUDA_DTYPES])),
        help=f"weights; native: {', '.join(NATIVE_DTYPES)}; cuda: {', '.join(CUDA_DTYPES)}  [default: int8 "
        "in native, bfloat16 in cuda, what suits the device in torch]",
    )(decorated)
    decorated = click.option(
        "--engine",
        type=click.Choice(("native", "cuda", "torch")),
        help="[default: native on a CPU, cuda on an NVIDIA GPU if it runs the model, else torch]",
    )(decorated)
    return target_option(decorated)


def decoding_options(command: Command) -> Command:
    """Options of drafting, checked for the target; they are passed as `drafting`, a DraftOptions."""

    @functools.wraps(command)
    def collected(target: str, head: Path | None, draft: str, draft_vocabulary: str, **rest: Any) -> None:
        from fastmtp.decode.drafting.open import check_drafting

        drafting = DraftOptions(head, draft, draft_vocabulary)
        check_drafting(drafting, target)
        command(target=target, drafting=drafting, **rest)

    decorated: Command = click.option(
        "--draft",
        default=AUTO,
        show_default=True,
        help="auto: trees from the head and the text, as large as pays; lookup: from the text alone; chain:K: K "
        "tokens in every round; plain: nothing",
    )(head_option(collected))
    return click.option(
        "--draft-vocabulary",
        default=GROWING,
        show_default=True,
        help="growing: the lists that fit the text, and its own tokens; listed: these lists alone; full: all "
        "tokens; or the name of one list",
    )(decorated)


class _OrWord(click.ParamType[Any]):
    """A value of a type, or one of the given words."""

    def __init__(self, kind: type[Any], words: tuple[str, ...]) -> None:
        self.name = "|".join([click.types.convert_type(kind).name, *words])
        self._kind, self._words = click.types.convert_type(kind), words

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return value if value in self._words else self._kind.convert(value, param, ctx)


def settings_options(kind: type[Any], without: tuple[str, ...] = ()) -> Callable[[Command], Command]:
    """An option for each setting of a dataclass in config.py, which has the defaults; None if it is not given."""

    def decorate(command: Command) -> Command:
        hints = typing.get_type_hints(kind)
        flags = [item for item in dataclasses.fields(kind) if item.metadata["flag"] and item.name not in without]
        for item in reversed(flags):
            choices = item.metadata["choices"]
            kind_of_value, words = kind_of(hints[item.name])
            is_flag = kind_of_value is bool
            parsed = _OrWord(kind_of_value, words) if words else kind_of_value
            command = click.option(
                "--" + item.name.replace("_", "-"),
                item.name,
                type=click.Choice(choices) if choices else parsed,
                is_flag=is_flag,
                default=None,
                help=item.metadata["meaning"] + ("" if is_flag else f"  [default: {item.default}]"),
            )(command)
        return command

    return decorate


def alone_in(*paths: Path | None) -> None:
    """Let nobody else write there until the command ends.

    Raises:
        OSError: somebody does; the message says who.
    """
    for path in paths:
        if path is not None:
            click.get_current_context().with_resource(sole_writer(path))


def finish(as_json: bool, facts: dict[str, Any], summary: str, *, to_stderr: bool = False) -> None:
    """Print a command's summary, or one JSON document on stdout."""
    if as_json:
        click.echo(json.dumps(facts, ensure_ascii=False))
    else:
        click.echo(visible(summary), err=to_stderr)
