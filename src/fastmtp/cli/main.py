"""The `fastmtp` command, and the one place that turns errors into a line. Commands do heavy imports themselves."""

from __future__ import annotations

import logging
import os
import signal
import sys
import traceback
from dataclasses import dataclass

import click

from fastmtp.cli.accelerate import accelerate
from fastmtp.cli.bench import bench
from fastmtp.cli.bench_engine import bench_engine
from fastmtp.cli.bench_serve import bench_serve
from fastmtp.cli.cache import cache
from fastmtp.cli.chat import chat
from fastmtp.cli.data import data
from fastmtp.cli.demo import demo
from fastmtp.cli.distill import distill
from fastmtp.cli.errors import fault, foreseen
from fastmtp.cli.export import export
from fastmtp.cli.fetching import permit
from fastmtp.cli.generate import generate
from fastmtp.cli.head import head
from fastmtp.cli.import_ import import_
from fastmtp.cli.replay import replay
from fastmtp.cli.report import report
from fastmtp.cli.serve import serve
from fastmtp.cli.stopping import Stoppable
from fastmtp.cli.terminal import TERMINAL, in_a_line
from fastmtp.cli.train import train
from fastmtp.cli.verify_export import verify_export
from fastmtp.cli.vocab import vocab
from fastmtp.models.packaged import fetching


class _Remarks(logging.Handler):
    """Prints the library's log messages on stderr, a line each."""

    def emit(self, record: logging.LogRecord) -> None:
        click.echo(f"fastmtp: {in_a_line(record.getMessage())}", err=True)


_REMARKS = _Remarks()


@dataclass
class _Shown:
    """What is shown of an error."""

    traceback: bool = False


def main() -> None:
    """Entry point: every expected error is one line, without a traceback."""
    # SIGTERM, which stops services and background jobs, acts like Ctrl-C, so that finished work is kept.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    _open_streams()
    shown = _Shown()
    try:
        commands.main(standalone_mode=False, obj=shown)
        sys.stdout.flush()
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        # Before a command began; stopping.py knows what to say of one.
        click.echo("\nfastmtp: stopped", err=True)
        sys.exit(130)
    except Exception as error:
        if shown.traceback:
            traceback.print_exc()
        said = foreseen(error)
        click.echo(f"fastmtp: {fault(error) if said is None else in_a_line(said)}", err=True)
        _drop_output()
        sys.exit(1 if said is None else 2)


def _open_streams() -> None:
    """Have the standard streams where the command was started without: the next files would take their places."""
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        if getattr(sys, name) is None:
            while (opened := os.open(os.devnull, os.O_RDWR)) < number:
                pass
            setattr(sys, name, os.fdopen(opened, mode, closefd=False))


def _drop_output() -> None:
    """Where standard output cannot be written, do not let the interpreter try again at its end."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _show_tracebacks(context: click.Context, _: click.Parameter, value: bool) -> None:
    if value and isinstance(context.obj, _Shown):
        context.obj.traceback = True


@click.group(cls=Stoppable, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="fastmtp")
@click.option(
    "--traceback",
    is_flag=True,
    expose_value=False,
    callback=_show_tracebacks,
    help="show where in the code an error came from, as a report of a fault needs",
)
def commands() -> None:
    """Faster decoding of an open-weight LLM with its own multi-token-prediction head; same output."""
    logging.getLogger("fastmtp").addHandler(_REMARKS)
    click.get_current_context().with_resource(fetching(permit=permit, progress=TERMINAL))


for command in (
    accelerate, distill, data, train, vocab, head, demo, bench, report, replay, bench_engine, bench_serve, export,
    import_, verify_export, generate, chat, serve, cache,
):  # fmt: skip
    commands.add_command(command)
