"""Runs a web application until a signal ends it."""

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol


@contextlib.contextmanager
def bound_socket(host: str, port: int) -> Iterator[socket.socket]:
    """A socket that is bound to an address, and does not listen yet.

    Args:
        host: name or address.
        port: 0 to 65535; 0 for any that is free.

    Raises:
        ValueError: it is no address of this machine, or the port is not free.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise ValueError(f"host: expected a name or address of this machine. Received: {host!r}: {error}") from None
    with socket.socket(family, kind, protocol) as bound:
        # A port whose last server has just ended is free too.
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            bound.bind(address)
        except OSError as error:
            raise ValueError(
                f"port: expected one of {host!r} that is free. Received: {port}: {error.strerror}"
            ) from error
        yield bound


def run(
    app: Any,
    bound: socket.socket,
    ready: Callable[[], Any],
    max_connections: int,
    patience_s: float,
    grace_s: float,
) -> None:
    """Serves an ASGI application until SIGTERM or SIGINT; then requests in flight are finished.

    Args:
        app: the application.
        bound: a bound socket. It is closed at the end.
        ready: called when requests are accepted.
        max_connections: >= 1, requests on more connections than these are answered with 503.
        patience_s: > 0, how long a connection may take to send the head of a request, or to send the rest of a request
            that was answered before its end.
        grace_s: > 0, how long requests in flight may take at the end.
    """

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            ready()

    class Protocol(_Impatient):
        patience = patience_s

    config = uvicorn.Config(
        app,
        http=Protocol,
        ws="none",
        lifespan="on",
        log_config=None,
        log_level="error",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        # It answers the connection that reaches the limit with 503 too.
        limit_concurrency=max_connections + 1,
        timeout_graceful_shutdown=round(grace_s) + 1,
    )
    server = Server(config)
    # uvicorn raises the signals that ended it once more, for the handlers that were there before: these.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, server.handle_exit)
    server.run(sockets=[bound])


class _Impatient(H11Protocol):
    """A connection that is closed if it waits for the head of a request for too long.

    uvicorn itself closes connections that send nothing after an answer, but waits without end for the first request,
    and for one that has begun.
    """

    patience: float

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.loop.call_later(self.patience, self._look, None)

    def _look(self, last):
        """Closes the connection if it has been idle since the last look, which found it idle after the cycle `last`."""
        if self.transport.is_closing():
            return
        idle = self.cycle is None or self.cycle.response_complete
        if idle and self.cycle is last:
            self.transport.abort()
        else:
            self.loop.call_later(self.patience, self._look, self.cycle if idle else self)
