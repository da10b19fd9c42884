"""`coserve serve` and `coserve keys`: arguments, signals.

Owns: how a server ends: no new connections, time for what runs, the engine, exit code 0. Does not own: the listening socket
(server/listen.py), the application (server/app.py), settings and their checks (server/settings.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import logging
import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from coserve.cli.fleet import run_fleet
from coserve.cli.settings import config_flags, with_flags
from coserve.cli.vllmflags import drop_flags
from coserve.core import CoserveError
from coserve.server import logs
from coserve.server.app import create_app, index_url, open_services
from coserve.server.index.store import Store
from coserve.server.link.setup import STOP_SIGNALS
from coserve.server.listen import HttpServer, allow_many_files, bind, keep_loop_free
from coserve.server.locks import make_private
from coserve.server.records import now
from coserve.server.replicas.fleetsettings import check_fleet
from coserve.server.settings import ServerConfig, read_settings
from coserve.server.startup import startup_lines
from coserve.server.tenants import make_key

keys_app = typer.Typer(no_args_is_help=True, help="API keys of tenants.")
_log = logging.getLogger(__name__)


DataDirOption = Annotated[Path | None, typer.Option(help="Files, jobs, adapters and the index (coserve-data).")]
DatabaseOption = Annotated[str | None, typer.Option(help="SQLAlchemy URL of the index (SQLite in the data directory).")]


class ServeCommand(TyperCommand):
    """Accepts flags of vLLM that ask for what happens anyway."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, drop_flags(args))


@with_flags(config_flags(ServerConfig))
def serve(
    model: Annotated[str | None, typer.Argument(help="Directory, GGUF file or hub id (default SmolLM2).")] = None,
    config: Annotated[Path | None, typer.Option(help="TOML file with any of these settings.")] = None,
    **given: Any,
) -> None:
    """Serve a model and finetune on it, with OpenAI's API."""
    values = {name: value for name, value in {"model": model, **given}.items() if value not in ((), [])}
    settings = read_settings(config, values)
    process = "api" if settings.replicas is None else "fleet"
    handler = logs.configure(process, format=settings.log_format, level=settings.log_level)
    try:
        check_fleet(settings)
        if settings.replicas is None:
            asyncio.run(run_server(settings))
        else:
            run_fleet(settings)
    except (CoserveError, OSError) as error:
        if settings.log_format != "json":
            raise
        _log.error("%s", error)
        raise typer.Exit(2) from None
    finally:
        handler.close()
    # All is written and closed. Without _exit Python would take seconds to free its objects, while a restart waits for this
    # process to end.
    with contextlib.suppress(OSError):  # a pipe that nobody reads any more
        sys.stdout.flush()
    os._exit(0)


async def run_server(config: ServerConfig) -> None:
    """Serves until one of STOP_SIGNALS. Raises what keeps it from starting."""
    allow_many_files()
    loop, this = asyncio.get_running_loop(), asyncio.current_task()
    assert this is not None
    app = create_app(config)
    server = HttpServer.of(app, config)
    with bind(config.host, config.port) as listener:
        ends = [n for n in STOP_SIGNALS if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]  # as nohup does
        for number in ends:
            loop.add_signal_handler(number, this.cancel)
        try:
            async with open_services(config, _report) as services:
                app.state.services = services
                keep_loop_free()
                server.lines = startup_lines(services, listener.getsockname()[1])

                def end() -> None:
                    if server.should_exit:
                        server.force_exit = True
                    server.should_exit = True
                    services.jobs.journal.end_streams()  # they would last as long as their jobs
                    loop.call_later(config.shutdown_timeout, services.engine.fail_requests, "the server is ending")

                for number in ends:
                    loop.add_signal_handler(number, end)
                await server.serve(sockets=[listener])
                _log.info("ending ...")
        except asyncio.CancelledError:
            _log.info("ended before it was ready")


def _report(line: str) -> None:
    _log.info("%s", line)


# --- keys ---


def _open_store(data_dir: Path | None, database_url: str | None) -> Store:
    config = read_settings(None, {"data_dir": data_dir, "database_url": database_url})
    make_private(config.data_dir)
    return Store(index_url(config))


@keys_app.command("add")
def add_key(
    tenant: Annotated[str, typer.Argument(help="Who it stands for.")], data_dir: DataDirOption = None,
    database_url: DatabaseOption = None,
) -> None:
    """Make a key. It is shown once; only its digest is kept."""
    key, record = make_key(tenant)
    with contextlib.closing(_open_store(data_dir, database_url)) as store:
        store.add_key(record)
    print(key)


@keys_app.command("list")
def list_keys(data_dir: DataDirOption = None, database_url: DatabaseOption = None) -> None:
    """Show keys, revoked ones included."""
    with contextlib.closing(_open_store(data_dir, database_url)) as store:
        for record in store.list_keys():
            revoked = "" if record.revoked_at is None else f"  revoked {_time(record.revoked_at)}"
            print(f"{record.id}  {record.tenant}  {record.prefix}...  made {_time(record.created_at)}{revoked}")


@keys_app.command("revoke")
def revoke_key(
    key_id: Annotated[str, typer.Argument(metavar="ID", help="As `list` shows it.")], data_dir: DataDirOption = None,
    database_url: DatabaseOption = None,
) -> None:
    """End a key. A running server takes it for at most a second more."""
    with contextlib.closing(_open_store(data_dir, database_url)) as store:
        store.revoke_key(key_id, now())
    print(f"revoked {key_id}")


def _time(seconds: int) -> str:
    return datetime.datetime.fromtimestamp(seconds).isoformat(" ", "minutes")
