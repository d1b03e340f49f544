"""A web application that serves a SavedModel: TensorFlow Serving's REST protocol, and plain uploads of images.

Needs `pip install 's2sd_tf[serve]'`. `s2sd-serve` runs it; any ASGI server can.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
from absl import logging
from starlette.applications import Starlette
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from s2sd_tf.checks import check_above, check_at_least, checked_int
from s2sd_tf.data.decoding import first_line
from s2sd_tf.serving import rest
from s2sd_tf.serving.batching import Batcher, QueueFull
from s2sd_tf.serving.encoder import why_refused
from s2sd_tf.serving.metrics import Metrics
from s2sd_tf.serving.servable import Servable, Signature

# A folder of a SavedModel has no version; TensorFlow Serving's clients may ask for one.
VERSION = 1
_CHUNK = 2**18


class Limits(NamedTuple):
    """How images are batched, and what a server refuses.

    Attributes:
        max_batch: >= 1, most images of a batch.
        batch_wait_ms: >= 0, how long an image waits for others.
        max_queue: >= 1, most images that wait; more are answered with 503.
        max_items: >= 1, most images or rows of a request; at most `max_queue`; more are answered with 400.
        max_request_bytes: >= 1, most bytes of a request's body; more are answered with 413.
        max_held_bytes: >= `max_request_bytes`, most bytes of all bodies; more are answered with 503.
        read_timeout_s: > 0, how long a body may take to arrive; then 408.
        timeout_s: > 0, how long a request may then wait and be computed; then 504.
    """

    max_batch: int = 32
    batch_wait_ms: float = 2.0
    max_queue: int = 256
    max_items: int = 64
    max_request_bytes: int = 2**24
    max_held_bytes: int = 2**30
    read_timeout_s: float = 10.0
    timeout_s: float = 30.0


def create_app(servable: Servable, name: str = "model", limits: Limits | None = None) -> Starlette:
    """Makes the ASGI application.

    - `POST /v1/models/<name>:predict`, `GET /v1/models/<name>`, `GET /v1/models/<name>/metadata`: the REST protocol of
      TensorFlow Serving, also with `/versions/1` after the name.
    - `POST /v1/models/<name>:embed` (an encoder) or `:search` (a retrieval): the body is an image, or a form
      (multipart/form-data) with image files. Answers `{"embeddings": [[...], ...]}` or
      `{"matches": [[{"id", "label", "score"}, ...], ...]}`, for each image one list.
    - `GET /healthz`, `GET /metrics` (in Prometheus's text format).

    Errors are answered with `{"error": "..."}`. An image that cannot be decoded fails only its own request.

    Args:
        servable: the SavedModel.
        name: its name in the URLs, without slashes and colons.
        limits: the limits; None for the default ones.

    Raises:
        ValueError: `name` or a limit is invalid.
    """
    if not isinstance(name, str) or not name or set(name) & set("/:?#% "):
        raise ValueError(f"name: expected a name without / : ? # % and blanks. Received: {name!r}")
    limits = limits or Limits()
    for limit in ("max_items", "max_request_bytes"):
        checked_int(limit, getattr(limits, limit), 1)
    check_at_least("max_held_bytes", limits.max_held_bytes, limits.max_request_bytes)
    check_above("read_timeout_s", limits.read_timeout_s, 0)
    check_above("timeout_s", limits.timeout_s, 0)
    metrics = Metrics()
    batcher = Batcher(limits.max_batch, limits.batch_wait_ms, limits.max_queue, metrics.count_batch)
    server = _Server(servable, name, limits, batcher, metrics)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(batcher.close, limits.timeout_s)

    routes = [Route("/healthz", server.health), Route("/metrics", server.metrics)]
    for model in ("/v1/models/{model}/versions/{version:int}", "/v1/models/{model}"):
        routes += [
            Route(model + ":{verb}", server.answer, methods=["POST"]),
            Route(model + "/metadata", server.metadata),
            Route(model, server.status),
        ]
    app = Starlette(routes=routes, lifespan=lifespan, exception_handlers={HTTPException: _refused, Exception: _failed})
    app.add_middleware(_Counting, metrics=metrics)
    return app


class _Server:
    def __init__(self, servable: Servable, name: str, limits: Limits, batcher: Batcher, metrics: Metrics) -> None:
        self._servable = servable
        self._name = name
        self._limits = limits
        self._max_items = min(limits.max_items, limits.max_queue)
        self._batcher = batcher
        self._metrics = metrics
        self._held = 0
        self._verbs = {"predict": self._predict, "search" if servable.is_retrieval else "embed": self._upload}

    async def health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def metrics(self, request: Request) -> Response:
        return PlainTextResponse(self._metrics.text(len(self._batcher)), media_type="text/plain; version=0.0.4")

    async def status(self, request: Request) -> Response:
        self._check_model(request)
        return JSONResponse(rest.status_answer(VERSION))

    async def metadata(self, request: Request) -> Response:
        self._check_model(request)
        return JSONResponse(rest.metadata_answer(self._name, VERSION, self._servable.signature_defs))

    async def answer(self, request: Request) -> Response:
        self._check_model(request)
        verb = request.path_params["verb"]
        if verb not in self._verbs:
            wanted = " or ".join(f":{verb}" for verb in self._verbs)
            raise HTTPException(404, f"expected {wanted} after the name. Received: :{verb[:100]}")
        async with self._body(request) as body:
            try:
                return await asyncio.wait_for(self._verbs[verb](request, body), self._limits.timeout_s)
            except asyncio.TimeoutError:
                raise HTTPException(504, f"not computed within {self._limits.timeout_s} seconds") from None

    async def _predict(self, request, body):
        try:
            # In a thread, because a body of many numbers takes seconds.
            asked = await asyncio.to_thread(rest.read_predict, body, self._servable.signatures, self._max_items)
        except ValueError as error:
            raise HTTPException(400, str(error)) from None
        if asked.signature.run_each:
            found = await self._each(asked.signature, asked.values)
        else:
            # A function of its own, as the rows of another request may have another shape.
            found = await self._computed(lambda rows: _each_row(asked.signature.run(np.stack(rows))), asked.values)
        outputs = {key: np.stack([rows[key] for rows in found]) for key in found[0]}
        return Response(rest.predict_answer(outputs, asked.in_rows), media_type="application/json")

    async def _upload(self, request, body):
        images = await self._images(request, body)
        found = await self._each(self._servable.signatures["encoded_images"], images)
        if not self._servable.is_retrieval:
            return JSONResponse({"embeddings": [rows["embedding"].tolist() for rows in found]})
        columns = [[rest.plain(rows[key]) for key in ("ids", "labels", "scores")] for rows in found]
        return JSONResponse(
            {
                "matches": [
                    [dict(zip(("id", "label", "score"), row)) for row in zip(*each) if row[0]] for each in columns
                ]
            }
        )

    def _check_model(self, request):
        model, version = request.path_params["model"], request.path_params.get("version", VERSION)
        if model != self._name or version != VERSION:
            raise HTTPException(404, f"Servable not found for request: expected {self._name!r}, version {VERSION}")

    @contextlib.asynccontextmanager
    async def _body(self, request):
        """The body of a request. Until the end of the block, its bytes count as held."""
        body = bytearray()
        try:
            try:
                await asyncio.wait_for(self._read(request, body), self._limits.read_timeout_s)
            except asyncio.TimeoutError:
                wanted = f"expected the whole request within {self._limits.read_timeout_s} seconds"
                raise HTTPException(408, wanted, {"Connection": "close"}) from None
            except ClientDisconnect:
                raise HTTPException(400, "the client is gone") from None
            yield bytes(body)
        finally:
            self._held -= len(body)

    async def _read(self, request, body):
        most = self._limits.max_request_bytes
        length = request.headers.get("Content-Length", "0")
        too_long = HTTPException(413, f"expected a request of at most {most} bytes")
        if len(length) > 15 or (length.isdecimal() and int(length) > most):
            raise too_long
        async for part in request.stream():
            if len(body) + len(part) > most:
                raise too_long
            if self._held + len(part) > self._limits.max_held_bytes:
                raise _busy("too many bytes are being received")
            self._held += len(part)
            body += part

    async def _images(self, request, body):
        """The images of an upload, a list of bytes."""
        if not request.headers.get("Content-Type", "").lower().startswith("multipart/form-data"):
            return [body]
        most = self._max_items
        form = Request(request.scope, _receiving(body)).form(max_files=most, max_fields=most, max_part_size=2**16)
        async with form as parts:
            images = [await part.read() for _, part in parts.multi_items() if isinstance(part, UploadFile)]
        if not images:
            raise HTTPException(400, "expected a form with image files. Received: none")
        return images

    async def _each(self, signature: Signature, images: Sequence[bytes]) -> list[dict[str, np.ndarray]]:
        # In a thread, because the header of a hostile file can take seconds to read.
        excess = await asyncio.to_thread(lambda: [why_refused(image) for image in images])
        for position, reason in enumerate(excess):
            if reason:
                raise HTTPException(400, f"image {position}: {reason}")
        return await self._computed(signature.run_each, images)

    async def _computed(self, function, items):
        """The results of the batcher. An error of one item is that of the request."""
        try:
            futures = self._batcher.submit(function, items)
        except QueueFull:
            raise _busy("too many images wait") from None
        # If the request takes too long, those that still wait are cancelled with it.
        found = await asyncio.gather(*map(asyncio.wrap_future, futures), return_exceptions=True)
        for position, result in enumerate(found):
            if isinstance(result, tf.errors.InvalidArgumentError):
                raise HTTPException(400, first_line(result))
            if isinstance(result, ValueError):
                raise HTTPException(400, f"image {position}: {result}")
            if isinstance(result, BaseException):
                raise result
        return found


class _Counting:
    """Counts the requests of an application."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status, since = 500, time.monotonic()

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, sending)
        finally:
            verb = scope["path"].rpartition(":")[2]
            kind = verb if verb in ("predict", "embed", "search") else "other"
            self._metrics.count_request(kind, status, time.monotonic() - since)


def _each_row(outputs):
    """The outputs of every row by name, given those of all rows."""
    return [dict(zip(outputs, row)) for row in zip(*outputs.values())]


def _busy(reason):
    return HTTPException(503, f"{reason}; try again later", {"Retry-After": "1"})


def _receiving(body):
    """An ASGI `receive` of a body, in pieces, so that parsing it does not keep other requests waiting for long."""
    pieces = iter(range(0, max(len(body), 1), _CHUNK))

    async def receive() -> Any:
        await asyncio.sleep(0)
        start = next(pieces)
        more = start + _CHUNK < len(body)
        return {"type": "http.request", "body": body[start : start + _CHUNK], "more_body": more}

    return receive


async def _refused(request, error):
    return JSONResponse({"error": error.detail}, error.status_code, error.headers)


async def _failed(request, error):
    # Starlette raises the error again, and the server logs it.
    logging.error("%s %s failed: %s", request.method, request.url.path, type(error).__name__)
    return JSONResponse({"error": "the model failed; the server's log says why"}, 500)
