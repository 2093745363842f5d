"""The playground's HTTP server: one page and its JSON API, for browsers on this machine.

Pages from other sites must not read what the user types, nor use the processor. So the Host header must name this
machine (which blocks DNS rebinding), POST requests must come from our own page (same origin), and the page's content
security policy allows connections only to this server.

The page serves one person, but a slow or large request must not stop the others: a connection that waits for its
client is closed after a time, and large texts have their own queue, so that one at a time is in memory.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
from asyncio import TimerHandle, Transport
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import suppress
from functools import partial
from ipaddress import ip_address
from pathlib import Path
from string import Template
from typing import Any
from urllib.parse import urlsplit

import anyio
import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from basic.analysis.playground.answers import Playground
from basic.analysis.playground.requests import RequestBody
from basic.common.errors import BasicError

MAX_TEXT_CHARACTERS = 8 << 20
MAX_NEW_TOKENS, MAX_SAMPLES, MAX_MESSAGES = 1000, 16, 1000
MAX_SHORT_BYTES = 256 << 10
"""Size of a request up to which it does not wait for the large ones."""
MAX_CONNECTIONS = 256
CLIENT_TIMEOUT_S = 30.0
"""Time in which a client must send its request, or read what was sent to it."""


def create_app(
    playground: Playground, *, host: str = "127.0.0.1", max_text_characters: int = MAX_TEXT_CHARACTERS
) -> Starlette:
    """Create the ASGI application.

    Args:
        host: the address that the server listens on; if it is a name, requests may use it as their Host.
    """
    html = read_page()
    handlers = Handlers(playground, html, max_text_characters)
    large = anyio.Semaphore(1)
    queued = [
        Route(f"/api/{handler.__name__}", QueuedEndpoint(handler, large, max_text_characters), methods=["POST"])
        for handler in (handlers.tokenize, handlers.score, handlers.attention, handlers.generate, handlers.chat)
    ]
    return Starlette(
        routes=[Route("/", handlers.page), Route("/api/about", handlers.about), *queued],
        middleware=[Middleware(SameOriginMiddleware, host=host, content_security_policy=content_security_policy(html))],
        exception_handlers=dict.fromkeys((HTTPException, BasicError, OSError, ClientDisconnect), client_error)
        | {Exception: server_error},
    )


class Handlers:
    """The request handlers of the routes."""

    def __init__(self, playground: Playground, html: str, max_text_characters: int) -> None:
        self._playground, self._html, self._max_text_characters = playground, html, max_text_characters

    async def page(self, request: Request) -> Response:
        return HTMLResponse(self._html)

    async def about(self, request: Request) -> Response:
        limits = {"characters": self._max_text_characters, "new_tokens": MAX_NEW_TOKENS, "samples": MAX_SAMPLES}
        return JSONResponse(await run_in_threadpool(self._playground.about) | {"limits": limits})

    async def tokenize(self, body: RequestBody) -> Response:
        name, text = body.text("tokenizer"), body.text("text")
        return await _answer(partial(self._playground.tokenize, name, text), "tokenizer", name)

    async def score(self, body: RequestBody) -> Response:
        text, chosen = body.text("text"), _chosen_model(body)
        keep_end = body.flag("keep_end")
        return await _answer(partial(self._playground.evaluate, text, *chosen, keep_end=keep_end), "model", chosen[0])

    async def attention(self, body: RequestBody) -> Response:
        text, chosen = body.text("text"), _chosen_model(body)
        return await _answer(partial(self._playground.attention, text, *chosen), "model", chosen[0])

    async def generate(self, body: RequestBody) -> Response:
        num_samples = body.integer("num_samples", 1, MAX_SAMPLES) if body.has("num_samples") else 1
        arguments = body.text("prompt"), *_length_and_model(body)
        return _stream(self._playground.generate(*arguments, num_samples=num_samples, **_sampling(body)))

    async def chat(self, body: RequestBody) -> Response:
        arguments = body.messages("messages", MAX_MESSAGES), *_length_and_model(body)
        return _stream(self._playground.answer(*arguments, **_sampling(body)))


def _chosen_model(body: RequestBody) -> tuple[str | None, int | None]:
    name = body.text("model") if body.has("model") else None
    return name, body.integer("checkpoint", 0, 2**63 - 1) if body.has("checkpoint") else None


def _length_and_model(body: RequestBody) -> tuple[int, str | None, int | None]:
    return body.integer("max_new_tokens", 1, MAX_NEW_TOKENS), *_chosen_model(body)


def _sampling(body: RequestBody) -> dict[str, Any]:
    return {
        "temperature": body.number("temperature", 0, 10),
        "top_p": body.number("top_p", 1e-6, 1),
        "top_k": body.integer("top_k", 1, 2**31 - 1) if body.has("top_k") else None,
        "seed": body.integer("seed", 0, 2**63 - 1) if body.has("seed") else None,
    }


async def _answer(compute: Callable[[], dict[str, Any]], kind: str, name: str | None) -> Response:
    try:
        return JSONResponse(await run_in_threadpool(compute))
    except KeyError:
        message = f"there is no {kind} {str(name)[:80]!r}; reload the page for the current list"
        raise HTTPException(404, message) from None


def _stream(updates: Iterator[dict[str, Any]]) -> Response:
    """Send updates as lines of JSON; the last line has "done" or "error"."""

    async def lines() -> AsyncIterator[str]:
        try:
            while (update := await run_in_threadpool(next, updates, None)) is not None:
                yield json.dumps(update) + "\n"
        except (BasicError, OSError, RuntimeError) as error:
            yield json.dumps({"error": str(error)}) + "\n"
        except KeyError:
            yield json.dumps({"error": "there is no such model; reload the page for the current list"}) + "\n"
        else:
            yield json.dumps({"done": True}) + "\n"

    return StreamingResponse(lines(), media_type="application/x-ndjson")


class QueuedEndpoint:
    """An ASGI application that answers one request at a time, beside the large requests of all endpoints.

    Args:
        handler: computes the response from the request's body.
        large: a semaphore that is shared by all endpoints.
    """

    def __init__(
        self, handler: Callable[[RequestBody], Awaitable[Response]], large: anyio.Semaphore, max_text_characters: int
    ) -> None:
        self.handler, self.large, self.max_text_characters = handler, large, max_text_characters
        self.short = anyio.Semaphore(1)  # concurrent requests would only slow each other down

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        max_bytes = 6 * self.max_text_characters + 4096  # a character is at most six bytes in JSON
        length = request.headers.get("content-length", "")
        if not length.isdecimal():
            raise HTTPException(411, "the request must have a Content-Length header")
        if len(length) > 15 or int(length) > max_bytes:
            message = f"the text is too long; at most {self.max_text_characters:,} characters are allowed"
            raise HTTPException(413, message)
        if int(length) > MAX_SHORT_BYTES:
            async with self.large:  # also while it is read, because of the memory
                body = await RequestBody.read(request, self.max_text_characters)
                await self._answer(request, body, send)
        else:  # read first: a slow client does not delay others
            body = await RequestBody.read(request, self.max_text_characters)
            async with self.short:
                await self._answer(request, body, send)

    async def _answer(self, request: Request, body: RequestBody, send: Send) -> None:
        if await request.is_disconnected():
            raise ClientDisconnect
        response = await self.handler(body)
        await response(request.scope, request.receive, send)


def read_page() -> str:
    """Return the page, self-contained: playground.html with the style and the script inserted."""
    pages = Path(__file__).parents[1] / "pages"
    return Template((pages / "playground.html").read_text("utf-8")).substitute(
        style=(pages / "playground.css").read_text("utf-8"),
        script="".join((pages / f"playground_{name}.js").read_text("utf-8") for name in ("tokens", "models", "views")),
    )


async def client_error(request: Request, error: Exception) -> Response:
    """Answer a request that cannot be served with the error's message."""
    if isinstance(error, HTTPException):
        return JSONResponse({"error": error.detail}, error.status_code)
    return JSONResponse({"error": str(error)}, 400)


async def server_error(request: Request, error: Exception) -> Response:
    """Answer a request that failed because of a bug."""
    return JSONResponse({"error": f"{type(error).__name__}: {error}; see the terminal for details"}, 500)


class SameOriginMiddleware:
    """Rejects requests that our own page does not send, and adds security headers to all responses."""

    def __init__(self, app: ASGIApp, *, host: str, content_security_policy: str) -> None:
        self.app, self.host = app, host.lower()
        self.headers = {
            "Content-Security-Policy": content_security_policy,
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Cross-Origin-Opener-Policy": "same-origin",
            "Cache-Control": "no-store",
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(self.headers)
            await send(message)

        app = self.app if (reason := self.rejection(scope)) is None else JSONResponse({"error": reason}, 403)
        await app(scope, receive, send_with_headers)

    def rejection(self, scope: Scope) -> str | None:
        """Return the reason to reject a request, None if it is allowed."""
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if not self._is_allowed_host(host):
            return (
                f"the host name {host[:100]!r} is not allowed; use the server's address, such as http://127.0.0.1:8000"
            )
        if scope["method"] in ("GET", "HEAD"):
            return None
        own_origins = (f"http://{host}".lower(), f"https://{host}".lower())
        is_same_site = headers.get("sec-fetch-site", "same-origin") == "same-origin"
        if is_same_site and headers.get("origin", own_origins[0]).lower() in own_origins:
            return None
        return "requests must come from this server's own page"

    def _is_allowed_host(self, host: str) -> bool:
        """Whether the Host header is an IP address or a name that no other site can resolve to this machine."""
        try:
            name = urlsplit(f"//{host}").hostname or ""
            if name in ("localhost", self.host):
                return True
            ip_address(name)
        except ValueError:
            return False
        return True


class TimedProtocol(H11Protocol):
    """An HTTP connection that is closed if its client does not send a request, or does not read the answer, in time."""

    timeout_s = CLIENT_TIMEOUT_S
    _request_timer: TimerHandle | None = None
    _answer_timer: TimerHandle | None = None

    def connection_made(self, transport: Transport) -> None:
        super().connection_made(transport)
        self._start_request_timer()

    def on_response_complete(self) -> None:
        self._start_request_timer()
        super().on_response_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._answer_timer = self.loop.call_later(self.timeout_s, self.transport.abort)

    def resume_writing(self) -> None:
        _cancel(self._answer_timer)
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        _cancel(self._request_timer)
        _cancel(self._answer_timer)
        super().connection_lost(exc)

    def _start_request_timer(self) -> None:
        _cancel(self._request_timer)
        self._request_timer = self.loop.call_later(self.timeout_s, self._check_request)

    def _check_request(self) -> None:
        """Close the connection if the request is not complete, unless it is the server that does not read it yet."""
        if self.flow.read_paused:
            self._start_request_timer()
        elif self.cycle is None or self.cycle.response_complete or self.cycle.more_body:
            self.transport.abort()


def _cancel(timer: TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()


def serve(app: Starlette, listener: socket.socket) -> None:
    """Serve an application on a listening socket until Ctrl-C."""
    config = uvicorn.Config(
        app,
        http=TimedProtocol,
        ws="none",
        lifespan="off",
        log_level="warning",
        limit_concurrency=MAX_CONNECTIONS,
        timeout_graceful_shutdown=2,
    )
    with suppress(KeyboardInterrupt):
        uvicorn.Server(config).run(sockets=[listener])


def content_security_policy(html: str) -> str:
    """Build the policy: only the page's own inline script and style run, and it connects only to this server."""
    hashes = {}
    for tag in ("script", "style"):
        contents = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in contents]
        hashes[tag] = " ".join(f"'sha256-{digest}'" for digest in digests)
    return (
        f"default-src 'none'; script-src {hashes['script']}; style-src {hashes['style']}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
