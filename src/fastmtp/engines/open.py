"""What the commands share: options, opening a target with its engine, and the last line."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

if TYPE_CHECKING:
    from fastmtp.decode.generation import Result
    from fastmtp.engines.protocol import Batch
    from fastmtp.engines.torch.forward import Forward
    from fastmtp.engines.torch.target import Target
    from fastmtp.models.info import TargetInfo

Command = Callable[..., None]
EngineName = Literal["native", "torch"]
TORCH_DTYPES = ("float32", "bfloat16", "float16")
NATIVE_DTYPES = ("int8", "int4", "bfloat16")
_ONLY_NATIVE = ("int8", "int4")
_TARGET_HELP = "smollm2 (embedded), a Hugging Face directory, a .gguf file, or a hub id"

json_option = click.option("--json", "as_json", is_flag=True, help="print one JSON document")
config_option = click.option("--config", type=click.Path(path_type=Path), help="TOML file with the settings below")
target_option = click.option("--target", default="smollm2", show_default=True, help=_TARGET_HELP)
device_option = click.option("--device", help="cpu, cuda, cuda:1, ...  [default: the GPU if there is one]")


@dataclass(frozen=True)
class EngineOptions:
    """How a user wants a target run; None leaves it to the machine."""

    engine: EngineName | None = None
    dtype: str | None = None
    device: str | None = None
    threads: int | None = None


def training_options(command: Command) -> Command:
    """Options of the command that needs gradients, so PyTorch."""
    command = click.option(
        "--dtype", type=click.Choice(TORCH_DTYPES), help="arithmetic  [default: what suits the device]"
    )(command)
    command = click.option(
        "--engine",
        type=click.Choice(("native", "torch")),
        help="what computes the target's states  [default: native on a CPU, torch on a GPU]",
    )(command)
    return target_option(device_option(command))


def engine_options(command: Command) -> Command:
    """Options of the commands that run on any engine; they arrive as `options`, an EngineOptions."""

    @functools.wraps(command)
    def collected(
        engine: EngineName | None, dtype: str | None, device: str | None, threads: int | None, **rest: Any
    ) -> None:
        command(options=EngineOptions(engine, dtype, device, threads), **rest)

    decorated: Command = click.option(
        "--threads", type=click.IntRange(1), help="of the native engine  [default: one for each physical core]"
    )(collected)
    decorated = device_option(decorated)
    decorated = click.option(
        "--dtype",
        type=click.Choice(dict.fromkeys([*NATIVE_DTYPES, *TORCH_DTYPES])),
        help="weights; native: int8, int4, bfloat16  [default: int8 in native, what suits the device in torch]",
    )(decorated)
    decorated = click.option(
        "--engine", type=click.Choice(("native", "torch")), help="[default: native on a CPU, torch on a GPU]"
    )(decorated)
    return target_option(decorated)


def choose_engine(options: EngineOptions) -> EngineName:
    """The engine that fits what was asked for, or the fastest one for this machine.

    Raises:
        ValueError: the options contradict each other, or the native engine is asked for and was not built.
    """
    on_gpu = options.device not in (None, "cpu")
    if options.engine == "torch" or (
        options.engine is None and (on_gpu or options.dtype in ("float32", "float16"))
    ):
        if options.dtype in _ONLY_NATIVE:
            raise ValueError(f"--dtype {options.dtype} is the native engine's, which runs on a CPU only")
        return "torch"
    if options.engine == "native":
        if on_gpu:
            raise ValueError(f"--engine native runs on a CPU, not on --device {options.device}")
        if options.dtype not in (None, *NATIVE_DTYPES):
            raise ValueError(f"--engine native has --dtype {', '.join(NATIVE_DTYPES)}, not {options.dtype}")
    built = importlib.util.find_spec("fastmtp._native") is not None
    asked = options.engine == "native" or options.dtype in _ONLY_NATIVE
    if built and (asked or options.device == "cpu" or not _has_gpu()):
        return "native"
    if asked:
        raise ValueError("the native engine was not built; install fastmtp again where a C++ compiler is")
    if not built and not _has_gpu():
        click.echo("fastmtp: the native engine was not built (no C++ compiler?); decoding with PyTorch", err=True)
    return "torch"


def open_target(name: str, options: EngineOptions) -> TargetInfo:
    """Load a target into the engine that `choose_engine` chooses."""
    if choose_engine(options) == "torch":
        return open_torch_target(name, options.dtype, options.device)
    from fastmtp.engines.native.target import load_native_target

    with _quietly(name):
        weight_type: Any = options.dtype or "int8"
        return load_native_target(name, weight_type=weight_type, threads=options.threads)


def describe_target(name: str) -> TargetInfo:
    """A target without its weights: its tokenizer, chat template and ends."""
    from fastmtp.models.source import describe

    with _quietly(name):
        return describe(name)


def open_torch_target(name: str, dtype: str | None, device: str | None, *, for_throughput: bool = False) -> Target:
    """Load a target into PyTorch with the user's or the fitting arithmetic."""
    import torch

    from fastmtp.engines.torch.target import load_target, throughput_dtype

    chosen = getattr(torch, dtype) if dtype else throughput_dtype(device) if for_throughput else None
    with _quietly(name):
        return load_target(name, dtype=chosen, device=device)


def open_forward(target: Target, name: str, engine: EngineName | None, device: str | None) -> Forward:
    """What computes the states of a target that is loaded in PyTorch."""
    from fastmtp.engines.torch.forward import TorchForward
    from fastmtp.models.config import ONLY_TORCH

    options = EngineOptions(engine, device=device)
    if choose_engine(options) == "torch" or (engine is None and target.config.model_type in ONLY_TORCH):
        return TorchForward(target)
    return forward_of(open_target(name, options))


def forward_of(target: TargetInfo) -> Forward:
    """What computes the states of a target in the engine that it is loaded in."""
    from fastmtp.engines.torch.forward import TorchForward
    from fastmtp.engines.torch.target import Target

    if isinstance(target, Target):
        return TorchForward(target)
    from fastmtp.engines.native.forward import NativeForward

    native: Any = target
    return NativeForward(native)


def open_batch(name: str, options: EngineOptions) -> Batch:
    """An engine that decodes many sequences together."""
    if choose_engine(options) == "torch":
        from fastmtp.engines.torch.batch import TorchBatch

        return TorchBatch(open_torch_target(name, options.dtype, options.device, for_throughput=True))
    from fastmtp.engines.native.batch import NativeBatch

    target: Any = open_target(name, options)
    return NativeBatch(target)


def described(result: Result) -> str:
    """An answer's statistics in one line."""
    reasons = {
        "end": "",
        "stop_string": "",
        "length": ", cut at max-new-tokens",
        "context": ", context is full",
    }
    verified = result.verified / max(1, result.acceptance.rounds)
    tau = f", tau {result.acceptance.tau:.2f}, {verified:.1f} verified a round" if result.plans else ", plain"
    return f"{len(result.tokens)} tokens, {result.tokens_per_second:.1f} tokens/s{tau}{reasons[result.stopped]}"


def finish(as_json: bool, facts: dict[str, Any], summary: str, *, to_stderr: bool = False) -> None:
    if as_json:
        click.echo(json.dumps(facts, ensure_ascii=False))
    else:
        click.echo(summary, err=to_stderr)


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _quietly(name: str) -> Any:
    """Around loading: a line that says so, and none of transformers' own messages."""
    from transformers.utils import logging

    from fastmtp.progress import console

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return console.status(f"loading {name}")
