"""Running the application under uvicorn, and its end: SIGTERM lets it finish what it has begun."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import sys
from types import FrameType

import uvicorn

from looktwice.config import ServeConfig
from looktwice.errors import ConfigError
from looktwice.server.app import build_app
from looktwice.server.guard import read_keys
from looktwice.server.metrics import ServerMetrics
from looktwice.server.models import Models
from looktwice.server.service import Service

LOOK_EVERY_S = 0.05
MOST_CONNECTIONS = 2048


class Server(uvicorn.Server):
    """After a first SIGTERM or SIGINT new requests are refused with 503 until all others are answered, or
    `drain_seconds` have passed; a second one ends it at once."""

    def __init__(self, config: ServeConfig, service: Service, metrics: ServerMetrics) -> None:
        options = uvicorn.Config(
            build_app(config, service, metrics),
            lifespan="on",
            access_log=False,
            log_config=None,
            server_header=False,
            ws="none",
            limit_concurrency=MOST_CONNECTIONS,
            timeout_graceful_shutdown=1,
        )
        super().__init__(options)
        self.service = service
        self.drain_seconds = config.drain_seconds
        self._drain: asyncio.Task[None] | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.service.is_draining:
            super().handle_exit(sig, frame)
            return
        self.service.is_draining = True
        if sig == signal.SIGINT:  # whoever types Ctrl-C is told that it was heard
            self._captured_signals.append(sig)

    async def main_loop(self) -> None:
        watch = asyncio.create_task(self._end_when_empty())
        try:
            await super().main_loop()
        finally:
            watch.cancel()

    async def _end_when_empty(self) -> None:
        while not self.service.is_draining:
            await asyncio.sleep(LOOK_EVERY_S)
        loop = asyncio.get_running_loop()
        ends = loop.time() + self.drain_seconds
        while self.service.worker.num_open and loop.time() < ends:
            await asyncio.sleep(LOOK_EVERY_S)
        await asyncio.sleep(LOOK_EVERY_S)  # what is written may still be on its way
        self.should_exit = True


def listen(config: ServeConfig) -> socket.socket:
    """A socket that listens where the settings say. Raises ConfigError when it cannot."""
    try:
        family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
        found = socket.socket(family, socket.SOCK_STREAM)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind((config.host, config.port))
        found.listen(MOST_CONNECTIONS)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(
            f"{config.host}:{config.port} cannot be listened on ({reason}); choose another --port"
        ) from error
    return found


def serve(config: ServeConfig) -> None:
    """Load the model and answer until a signal ends it."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    read_keys(config.api_key_file)
    where = listen(config)
    metrics = ServerMetrics()
    models = Models(config)
    service = Service(config, models, metrics)
    server = Server(config, service, metrics)
    host, port = where.getsockname()[:2]
    print(f"{models.described}\nhttp://{f'[{host}]' if ':' in host else host}:{port}", file=sys.stderr, flush=True)
    server.run(sockets=[where])
