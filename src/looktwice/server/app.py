"""The endpoints, each a few lines over the service."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from looktwice.config import ServeConfig
from looktwice.errors import nearest
from looktwice.server import chat, responses
from looktwice.server.guard import Guard
from looktwice.server.metrics import ServerMetrics
from looktwice.server.refusal import Refusal
from looktwice.server.schema import AdapterRequest, ChatRequest, ResponsesRequest
from looktwice.server.service import Reply, Service

PAGE = Path(__file__).parent / "page"
PAGE_FILES = {file.name for file in PAGE.iterdir()}
PAGE_HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
}
CLOSED_BY_CLIENT = 499
T = TypeVar("T")
REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"description": "an error in OpenAI's form", "content": {"application/json": {}}}
    for status in (400, 401, 403, 404, 408, 413, 415, 429, 500, 502, 503)
}


def build_app(config: ServeConfig, service: Service, metrics: ServerMetrics) -> ASGIApp:
    """The application, its guard in front."""

    @asynccontextmanager
    async def running(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        try:
            yield
        finally:
            service.stop()

    # the pages of FastAPI load scripts of elsewhere
    app = FastAPI(title="looktwice", version="1", lifespan=running, docs_url=None, redoc_url=None, responses=REFUSALS)
    _add_errors(app)
    _add_state(app, service, metrics)
    _add_asking(app, config, service)
    guarded: ASGIApp = Guard(app, config, metrics)
    if config.allow_origins:
        guarded = CORSMiddleware(
            guarded, allow_origins=config.allow_origins, allow_methods=["GET", "POST"], allow_headers=["*"]
        )
    return guarded


def _add_state(app: FastAPI, service: Service, metrics: ServerMetrics) -> None:
    """What the server says of itself."""

    @app.get("/", include_in_schema=False)
    @app.get("/page/{name}", include_in_schema=False)
    async def page(name: str = "index.html") -> Response:
        if name not in PAGE_FILES:
            raise Refusal("no such address", status=404)
        return FileResponse(PAGE / name, headers=PAGE_HEADERS)

    @app.get("/health")
    async def health() -> JSONResponse:
        """Whether requests are taken."""
        if service.is_draining or not service.is_well:
            return JSONResponse({"status": "stopping" if service.is_draining else "unwell"}, 503)
        return JSONResponse({"status": "ok"})

    @app.get("/metrics")
    async def numbers() -> Response:
        """Counters in Prometheus's text format."""
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The model and its adapters."""
        return {"object": "list", "data": [model.plain() for model in service.models.known.values()]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        """One of them."""
        return service.models.named(name).plain()


def _add_asking(app: FastAPI, config: ServeConfig, service: Service) -> None:
    @app.post("/v1/chat/completions")
    async def chat_completions(asked: ChatRequest, request: Request) -> Response:
        """An answer with its crops, whole or streamed."""
        reply = await service.begin(chat.task_of(asked, config))
        if reply.task.is_streamed:
            return EventStream(reply, _chat_lines(reply))
        return await _whole(reply, request, chat.whole)

    @app.post("/v1/responses")
    async def make_response(asked: ResponsesRequest, request: Request) -> Response:
        """The same in the newer form; nothing is stored."""
        reply = await service.begin(responses.task_of(asked, config))
        if reply.task.is_streamed:
            return EventStream(reply, _response_lines(reply))
        return await _whole(reply, request, responses.whole)

    @app.post("/v1/load_lora_adapter")
    async def load_lora_adapter(asked: AdapterRequest) -> dict[str, Any]:
        """Have an adapter from below --adapter_folder answer under a name."""
        if asked.lora_path is None:
            raise Refusal("lora_path is missing; name the adapter's folder", param="lora_path")
        await service.load_adapter(asked.lora_name, asked.lora_path)
        return service.models.named(asked.lora_name).plain()

    @app.post("/v1/unload_lora_adapter")
    async def unload_lora_adapter(asked: AdapterRequest) -> dict[str, Any]:
        """Forget an adapter; its unfinished answers fail."""
        await service.remove_adapter(asked.lora_name)
        return {"id": asked.lora_name, "object": "model", "deleted": True}


async def _whole(reply: Reply, request: Request, write: Callable[[Reply], Awaitable[dict[str, Any]]]) -> Response:
    """A response that is not streamed; a client that leaves is not answered, and frees its place."""
    try:
        body = await until_gone(request, write(reply))
        return Response(status_code=CLOSED_BY_CLIENT) if body is None else Response(_json(body), media_type=JSON)
    finally:
        reply.close()


JSON = "application/json"


async def until_gone(request: Request, work: Awaitable[T]) -> T | None:
    """What comes of some work, None when the client leaves before."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return tasks[0].result() if tasks[0].done() else None
    finally:
        for task in tasks:
            task.cancel()
        with suppress(asyncio.CancelledError, Exception):
            await asyncio.gather(*tasks, return_exceptions=True)


async def _chat_lines(reply: Reply) -> AsyncIterator[str]:
    """Chunks as server-sent events; an error in the middle is the last of them."""
    try:
        async for chunk in chat.chunks(reply):
            yield f"data: {_json(chunk)}\n\n"
    except Refusal as refusal:
        yield f"data: {_json(refusal.body)}\n\n"
    yield "data: [DONE]\n\n"


async def _response_lines(reply: Reply) -> AsyncIterator[str]:
    """Events as server-sent events, which say their kind."""
    try:
        async for event in responses.events(reply):
            yield f"event: {event['type']}\ndata: {_json(event)}\n\n"
    except Refusal as refusal:
        error = {**refusal.body["error"], "type": "error", "sequence_number": 0}
        yield f"event: error\ndata: {_json(error)}\n\n"


class EventStream(StreamingResponse):
    """Server-sent events of a reply, which is closed at the end, also when the client left before the beginning."""

    def __init__(self, reply: Reply, lines: AsyncIterator[str]) -> None:
        super().__init__(lines, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self.reply = reply

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.reply.close()


def _add_errors(app: FastAPI) -> None:
    """Whatever goes wrong is told in OpenAI's form."""

    async def refused(_: Request, error: Exception) -> Response:
        assert isinstance(error, Refusal)
        return JSONResponse(error.body, int(error.status), error.headers)

    async def malformed(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return await refused(request, malformed_request(error))

    async def unknown(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        message = "no such address" if error.status_code == 404 else str(error.detail)
        headers = error.headers or {}
        return await refused(request, Refusal(message, status=error.status_code, headers=headers))

    async def broken(request: Request, error: Exception) -> Response:
        return await refused(request, Refusal("this request failed; ask again", status=500))

    app.add_exception_handler(Exception, broken)
    app.add_exception_handler(Refusal, refused)
    app.add_exception_handler(RequestValidationError, malformed)
    app.add_exception_handler(HTTPException, unknown)


def malformed_request(error: RequestValidationError) -> Refusal:
    """The first thing that is wrong with a body, in words; what the body held is not repeated."""
    problem = error.errors()[0]
    # beside names and numbers there are pydantic's own words for the branches of a type
    place = ".".join(str(part) for part in problem["loc"] if part != "body" and "[" not in str(part))
    if problem["type"] == "json_invalid":
        return Refusal("the body is no JSON", code="invalid_json")
    if problem["type"] == "extra_forbidden":
        hint = nearest(str(problem["loc"][-1]), ChatRequest.model_fields)
        return Refusal(f"unknown field {place}.{hint}", param=place, code="unknown_field")
    if problem["type"] == "too_long" and not problem["ctx"]["max_length"]:
        return Refusal(f"{place}: there is none here; leave it out", param=place, code="unsupported")
    return Refusal(f"{place or 'the body'}: {problem['msg']}", param=place or None, code="invalid_value")


def _json(body: dict[str, Any]) -> str:
    return json.dumps(body, ensure_ascii=False, separators=(",", ":"))
