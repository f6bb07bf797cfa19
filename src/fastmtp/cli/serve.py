"""`fastmtp serve`: the model behind an API that clients speak."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from fastmtp.addresses import key_of
from fastmtp.cli.options import CountRange, FiniteRange, decoding_options, engine_options, settings_options
from fastmtp.cli.terminal import TERMINAL, visible
from fastmtp.config import MOST_TOGETHER, SamplingConfig, load_config
from fastmtp.decode.drafting.options import DraftOptions
from fastmtp.engines.open import EngineOptions, choose_engine
from fastmtp.extras import require
from fastmtp.models.packaged import file_of

if TYPE_CHECKING:
    from fastmtp.serve.service import Service


@click.command()
@engine_options
@decoding_options
@settings_options(SamplingConfig, without=("seed",))
@click.option("--host", default="127.0.0.1", show_default=True, help="address to listen at")
@click.option("--port", type=click.IntRange(0, 65535), default=8137, show_default=True, help="0: any that is free")
@click.option(
    "--api-key",
    envvar="FASTMTP_API_KEY",
    help="what clients must send; better given as $FASTMTP_API_KEY, which other users cannot see",
)
@click.option("--no-api-key", is_flag=True, help="let everybody in who reaches --host, if it is not this machine")
@click.option(
    "--slots",
    type=click.IntRange(1, MOST_TOGETHER),
    default=8,
    show_default=True,
    help="requests decoded at the same time",
)
@click.option("--queue", type=CountRange(0), default=64, show_default=True, help="requests that may wait")
@click.option("--context", type=CountRange(2), help="tokens of a prompt and its answer  [default: the model's]")
@click.option(
    "--prefix-cache",
    type=FiniteRange(0),
    default=1.0,
    show_default=True,
    metavar="GB",
    help="memory for the beginnings of prompts that others may share; 0: none is shared",
)
@click.option(
    "--grace",
    type=FiniteRange(0),
    default=10.0,
    show_default=True,
    help="seconds that answers under way have left after Ctrl-C; a second one ends them at once",
)
def serve(
    target: str,
    options: EngineOptions,
    drafting: DraftOptions,
    host: str,
    port: int,
    api_key: str | None,
    no_api_key: bool,
    slots: int,
    queue: int,
    context: int | None,
    prefix_cache: float,
    grace: float,
    **settings: Any,
) -> None:
    """Answer many clients at once, over HTTP in OpenAI's shapes, until Ctrl-C.

    The settings of sampling are for requests that do not give their own.
    """
    require("serve")
    load_config(SamplingConfig, None, settings)
    choose_engine(options)
    from fastmtp.serve import server
    from fastmtp.serve.load import Room, load_service
    from fastmtp.serve.security import is_loopback

    if api_key is not None and (no_api_key or not api_key.strip()):
        raise ValueError("--api-key is empty" if not no_api_key else "give --api-key or --no-api-key, not both")
    api_key = key_of("--api-key or FASTMTP_API_KEY", api_key)
    if api_key is None and not no_api_key and not is_loopback(host):
        raise ValueError(f"--host {host} lets others in: give --api-key KEY, or --no-api-key to let them")
    listener = server.listen(host, port)
    url = address(host, listener.getsockname()[1])
    click.echo(f"fastmtp: listening at {url}, loading {visible(target)}", err=True)
    # Here, since it may ask.
    file_of(target, TERMINAL)
    sampling = {name: value for name, value in settings.items() if value is not None}

    def load() -> Service:
        room = Room(slots, queue, context, int(prefix_cache * 1e9))
        return load_service(target, options, drafting, room, sampling, TERMINAL)

    def ready(service: Service) -> None:
        click.echo(
            f"fastmtp: {visible(service.name)} is ready at {url}/v1 (Ctrl-C stops it); for example:\n"
            f"{example(url, api_key)}"
        )

    server.serve(listener, load, host=host, key=api_key, grace=grace, on_ready=ready)
    click.echo("fastmtp: stopped", err=True)


def address(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def example(url: str, key: str | None) -> str:
    """A request for a shell; the key is not shown."""
    authorization = "" if key is None else ' -H "Authorization: Bearer $FASTMTP_API_KEY"'
    body = '{"messages": [{"role": "user", "content": "Why is the sky blue?"}]}'
    return f"curl {url}/v1/chat/completions -H 'Content-Type: application/json'{authorization} -d '{body}'"
