"""The `fastmtp` command, and the one place that turns errors into a line. Commands do heavy imports themselves."""

from __future__ import annotations

import logging
import signal
import sys

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
from fastmtp.cli.export import export
from fastmtp.cli.fetching import permit
from fastmtp.cli.generate import generate
from fastmtp.cli.head import head
from fastmtp.cli.import_ import import_
from fastmtp.cli.replay import replay
from fastmtp.cli.report import report
from fastmtp.cli.serve import serve
from fastmtp.cli.stopping import Stoppable
from fastmtp.cli.terminal import TERMINAL
from fastmtp.cli.train import train
from fastmtp.cli.verify_export import verify_export
from fastmtp.cli.vocab import vocab
from fastmtp.extras import MissingExtraError, remedy
from fastmtp.models.packaged import fetching


class _Remarks(logging.Handler):
    """Prints the library's log messages on stderr, a line each."""

    def emit(self, record: logging.LogRecord) -> None:
        click.echo(f"fastmtp: {record.getMessage()}", err=True)


_REMARKS = _Remarks()


def main() -> None:
    """Entry point: every expected error is one line, without a traceback."""
    # SIGTERM, which stops services and background jobs, acts like Ctrl-C, so that finished work is kept.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        commands.main(standalone_mode=False)
    except (ValueError, OSError, MemoryError, MissingExtraError) as error:
        click.echo(f"fastmtp: {error or 'out of memory'}", err=True)
        sys.exit(2)
    except ModuleNotFoundError as error:
        if (said := remedy(error.name)) is None:
            raise
        click.echo(f"fastmtp: {said}", err=True)
        sys.exit(2)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        # Before a command began; stopping.py knows what to say of one.
        click.echo("\nfastmtp: stopped", err=True)
        sys.exit(130)


@click.group(cls=Stoppable, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="fastmtp")
def commands() -> None:
    """Faster decoding of an open-weight LLM with its own multi-token-prediction head; same output."""
    logging.getLogger("fastmtp").addHandler(_REMARKS)
    click.get_current_context().with_resource(fetching(permit=permit, progress=TERMINAL))


for command in (
    accelerate, distill, data, train, vocab, head, demo, bench, report, replay, bench_engine, bench_serve, export,
    import_, verify_export, generate, chat, serve, cache,
):  # fmt: skip
    commands.add_command(command)
