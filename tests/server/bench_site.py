"""Routes over a Bench on a real socket: files, jobs and their index are real, the engine is not."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI

from tests.server.jobs_bench import Bench


class BenchSite:
    """Serves from a loop in a thread of its own. url: without a path; settings: as Bench takes them."""

    def __init__(self, model: Path, data_dir: Path, **settings: Any) -> None:
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main(model, data_dir, settings)), daemon=True)
        self._thread.start()
        assert self._ready.wait(30)

    def make_app(self, bench: Bench) -> FastAPI:
        """The application to serve; called on the loop."""
        raise NotImplementedError

    async def _main(self, model: Path, data_dir: Path, settings: dict[str, Any]) -> None:
        self.loop = asyncio.get_running_loop()
        async with Bench(model, data_dir, **settings) as self.bench:
            app = self.make_app(self.bench)
            self._server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", lifespan="off"))
            serving = asyncio.create_task(self._server.serve())
            while not self._server.started:
                await asyncio.sleep(0.01)
            self.url = f"http://127.0.0.1:{self._server.servers[0].sockets[0].getsockname()[1]}"
            self._ready.set()
            await serving

    def close(self) -> None:
        self._server.should_exit = True
        self._thread.join(30)
        assert not self._thread.is_alive()
