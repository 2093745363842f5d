"""The playground over HTTP: one page and the questions it asks, for this page and this machine alone.

A page from elsewhere must not read what is typed here, nor keep the processor busy. So every request must name this
machine (a stranger's domain that was pointed at 127.0.0.1 does not), every question must come from our own page, and
that page may load nothing and talk to nobody but this server.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import AsyncIterator, Callable
from functools import partial
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import anyio
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from basic.analysis.playground import Playground

MAX_TEXT_CHARACTERS = 8 << 20
MAX_BODY_BYTES = 6 * MAX_TEXT_CHARACTERS + 4096  # JSON may take six bytes to write a character
MAX_NEW_TOKENS = 1000


def create_app(playground: Playground, *, host: str = "127.0.0.1") -> Starlette:
    """The ASGI application.

    Args:
        playground: answers the questions.
        host: the address that the server is told to listen on; if it is a name, requests may use it.
    """
    html = (Path(__file__).parent / "pages" / "playground.html").read_text(encoding="utf-8")
    # One of each kind at a time: another would only slow down the first. Whoever has left meanwhile is passed over.
    encoding, judging, generating = (anyio.Semaphore(1) for _ in range(3))

    async def answer(request: Request, turn: anyio.Semaphore, ask: Callable[[], dict]) -> Response:
        async with turn:
            if await request.is_disconnected():
                raise ClientDisconnect
            return JSONResponse(await run_in_threadpool(ask))

    async def page(request: Request) -> Response:
        return HTMLResponse(html)

    async def about(request: Request) -> Response:
        limits = {"characters": MAX_TEXT_CHARACTERS, "new_tokens": MAX_NEW_TOKENS}
        return JSONResponse(await run_in_threadpool(playground.about) | {"limits": limits})

    async def tokenize(request: Request) -> Response:
        question = await read_question(request)
        name, text = question.text("tokenizer"), question.text("text")
        try:
            return await answer(request, encoding, partial(playground.tokenize, name, text))
        except KeyError:
            message = f"there is no tokenizer {name[:80]!r} here; reload the page for those there are"
            raise HTTPException(404, message) from None

    async def score(request: Request) -> Response:
        question = await read_question(request)
        text, keep_end = question.text("text"), question.flag("keep_end")
        return await answer(request, judging, partial(playground.score, text, keep_end=keep_end))

    async def generate(request: Request) -> Response:
        question = await read_question(request)
        pieces = playground.generate(
            question.text("prompt"),
            int(question.number("max_new_tokens", 1, MAX_NEW_TOKENS, whole=True)),
            temperature=question.number("temperature", 0, 10),
            top_p=question.number("top_p", 1e-6, 1),
            seed=int(question.number("seed", 0, 2**63 - 1, whole=True)) if question.has("seed") else None,
        )

        async def lines() -> AsyncIterator[str]:
            try:
                while (piece := await run_in_threadpool(next, pieces, None)) is not None:
                    yield json.dumps(piece) + "\n"
            except (ValueError, OSError, RuntimeError) as error:
                yield json.dumps({"error": str(error)}) + "\n"
            else:
                yield json.dumps({"done": True}) + "\n"

        return StreamInTurn(generating, lines())

    return Starlette(
        routes=[
            Route("/", page),
            Route("/api/about", about),
            *(Route(f"/api/{ask.__name__}", ask, methods=["POST"]) for ask in (tokenize, score, generate)),
        ],
        middleware=[Middleware(Guard, host=host, content_security_policy=content_security_policy(html))],
        exception_handlers=dict.fromkeys((HTTPException, ValueError, OSError, ClientDisconnect), refuse)
        | {Exception: fail},
    )


async def refuse(request: Request, error: Exception) -> Response:
    """What was wrong with a question."""
    if isinstance(error, HTTPException):
        return JSONResponse({"error": error.detail}, error.status_code)
    return JSONResponse({"error": str(error)}, 400)


async def fail(request: Request, error: Exception) -> Response:
    """What went wrong here."""
    return JSONResponse({"error": f"{type(error).__name__}: {error}; the terminal has the details"}, 500)


class StreamInTurn(StreamingResponse):
    """Lines of JSON, begun when nobody else's are being written. When the client leaves, the line at hand is the last
    one."""

    media_type = "application/x-ndjson"

    def __init__(self, turn: anyio.Semaphore, lines: AsyncIterator[str]) -> None:
        super().__init__(lines)
        self.turn = turn

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Not in the iterator: who is cancelled while a line is sent leaves that as it stands.
        async with self.turn:
            await super().__call__(scope, receive, send)


class Guard:
    """Refuses what our own page would not send, and tells browsers to hold the page to itself."""

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

        app = self.app if (reason := self.objection(scope)) is None else JSONResponse({"error": reason}, 403)
        await app(scope, receive, send_with_headers)

    def objection(self, scope: Scope) -> str | None:
        """Why a request is refused, None if it is not."""
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if not self._is_ours(host):
            return f"this server does not answer to {host[:100]!r}; use its address, such as http://127.0.0.1:8000"
        if scope["method"] in ("GET", "HEAD"):
            return None
        if headers.get("sec-fetch-site", "same-origin") != "same-origin":
            return "questions must come from this server's own page"
        if "origin" in headers and headers["origin"].lower() not in (
            f"http://{host}".lower(),
            f"https://{host}".lower(),
        ):
            return "questions must come from this server's own page"
        return None

    def _is_ours(self, host: str) -> bool:
        """Whether the Host header can only mean this server: an address, or a name that nobody else can point here."""
        try:
            name = urlsplit(f"//{host}").hostname or ""
            if name in ("localhost", self.host):
                return True
            ip_address(name)
        except ValueError:
            return False
        return True


def content_security_policy(html: str) -> str:
    """What a browser shall let the page do: run the script and style that are in it, and ask this server."""
    hashes = {}
    for tag in ("script", "style"):
        contents = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in contents]
        hashes[tag] = " ".join(f"'sha256-{digest}'" for digest in digests)
    return (
        f"default-src 'none'; script-src {hashes['script']}; style-src {hashes['style']}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


class Question:
    """The JSON object of a request, each value checked where it is taken out; what is wrong is a ValueError."""

    def __init__(self, values: dict[str, Any]) -> None:
        self._values = values

    def has(self, name: str) -> bool:
        return self._values.get(name) is not None

    def text(self, name: str) -> str:
        value = self._values.get(name)
        if not isinstance(value, str):
            raise ValueError(f"{name} must be a text, got {value!r:.80}")
        if len(value) > MAX_TEXT_CHARACTERS:
            raise ValueError(f"{name} has {len(value):,} characters; at most {MAX_TEXT_CHARACTERS:,} are allowed")
        return value

    def flag(self, name: str) -> bool:
        value = self._values.get(name, False)
        if not isinstance(value, bool):
            raise ValueError(f"{name} must be true or false, got {value!r:.80}")
        return value

    def number(self, name: str, least: float, most: float, *, whole: bool = False) -> float:
        value = self._values.get(name)
        kinds = (int,) if whole else (int, float)
        if isinstance(value, bool) or not isinstance(value, kinds) or not least <= value <= most:
            kind = "whole number" if whole else "number"
            raise ValueError(f"{name} must be a {kind} from {least:,} to {most:,}, got {value!r:.80}")
        return value


async def read_question(request: Request) -> Question:
    """The body of a request, given up as soon as it is too long."""
    # A form of another page cannot send this type without asking first, which is refused.
    if request.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
        raise HTTPException(415, "a question must be JSON (Content-Type: application/json)")
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise HTTPException(413, f"the text is too long; at most {MAX_TEXT_CHARACTERS:,} characters are allowed")
    try:
        values = await run_in_threadpool(json.loads, bytes(body))
    except (ValueError, RecursionError):
        raise ValueError("the question is not JSON") from None
    if not isinstance(values, dict):
        raise ValueError("the question must be a JSON object")
    return Question(values)
