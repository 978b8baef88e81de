"""What browsers are sent: one HTML page, its own files, and a stream of events.

A stream has two events: `points`, of the last hour, all of them at first and then those that are new; and `view`, each
second. Every stream is sent the same bytes, made once. A reader that is slow misses views and no points; it makes
nothing grow, since the next is put together when the last has gone out.
"""

from __future__ import annotations

import asyncio
import mimetypes
import time
from collections.abc import AsyncIterator, Callable
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Mount, Route

from fastload.page.guard import HEADERS, Door, SignedIn, judge
from fastload.page.ring import Point, Ring
from fastload.page.view import Viewer
from fastload.page.watcher import Seen
from fastload.snapshot import Snapshot

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

STREAMS_MOST = 16
_ASSETS = Path(__file__).parent / "assets"
_SERVED = ("page.css", "page.js", "icon.svg", "uplot/uPlot.iife.min.js", "uplot/uPlot.min.css")


class Board:
    """The latest view, for all streams. Used by the loop's thread only."""

    def __init__(self) -> None:
        self.ring = Ring()
        self._viewer = Viewer()
        self._view = b""
        self._changed = asyncio.Event()

    def post(self, seen: Seen) -> None:
        """Show this from now on."""
        if isinstance(seen, Snapshot):
            self.ring.add(seen)
            view = self._viewer.view(seen)
        else:
            view = self._viewer.unserved(seen, time.time())
        self._view = _event("view", view)
        self.wake()

    def wake(self) -> None:
        """Let all streams look again."""
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def events(self, is_over: Callable[[], bool]) -> AsyncIterator[bytes]:
        """What one stream is sent, until it is over."""
        points_at, is_first = 0.0, True
        while not is_over():
            changed = self._changed
            points = self.ring.since(points_at)
            if points or is_first:
                points_at = points[-1].at if points else points_at
                yield _event("points", _columns(points))
            is_first = False
            if self._view:
                yield self._view
            await changed.wait()


def _columns(points: list[Point]) -> dict[str, list[float | None]]:
    rows = [(point.at, *(point.rates or (None,) * 4)) for point in points]
    names = ("at", "ram", "disk", "store", "fetched")
    return {name: [row[index] for row in rows] for index, name in enumerate(names)}


def _event(name: str, value: object) -> bytes:
    return b"event: %s\ndata: %s\n\n" % (
        name.encode(),
        msgspec.json.encode(value),
    )  # JSON has no line feed outside strings


class Streams:
    """The route of streams: an ASGI application, so that a stream is counted from the moment that it is asked for."""

    def __init__(self, board: Board, is_over: Callable[[], bool]) -> None:
        self.count = 0
        self._board, self._is_over = board, is_over

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] == "HEAD":
            await Response(media_type="text/event-stream")(scope, receive, send)
            return
        if self.count >= STREAMS_MOST:
            text = f"{STREAMS_MOST} browsers watch already"
            response = PlainTextResponse(text, HTTPStatus.SERVICE_UNAVAILABLE, {"Retry-After": "10"})
            await response(scope, receive, send)
            return
        self.count += 1
        try:
            stream = StreamingResponse(self._board.events(self._is_over), media_type="text/event-stream")
            await stream(scope, receive, send)
        finally:
            self.count -= 1


def application(door: Door, streams: Streams) -> ASGIApp:
    """All of it."""

    def page(_: Request) -> Response:
        return Response((_ASSETS / "page.html").read_bytes(), media_type="text/html")

    def asset(request: Request) -> Response:
        name = request.path_params["name"]
        if name not in _SERVED:
            return PlainTextResponse("no such file", HTTPStatus.NOT_FOUND)
        return Response((_ASSETS / name).read_bytes(), media_type=mimetypes.guess_type(name)[0])

    inner = [Route("/", page), Route("/events", streams), Route("/{name:path}", asset)]
    return _guarded(Starlette(routes=[Mount(door.path, routes=inner)]), door)


def _guarded(app: ASGIApp, door: Door) -> ASGIApp:
    """Every request is judged first, and every reply has the headers."""
    own = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]

    async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise RuntimeError(f"a connection of type {scope['type']}")

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], *own]}
            await send(message)

        verdict = judge(door, scope["method"], scope["headers"], scope["query_string"])
        if verdict is None:
            response: ASGIApp = app
        elif isinstance(verdict, SignedIn):
            headers = {"Location": verdict.location, "Set-Cookie": verdict.cookie}
            response = Response(status_code=HTTPStatus.SEE_OTHER, headers=headers)
        else:
            headers = {"Allow": "GET, HEAD"} if verdict.status == HTTPStatus.METHOD_NOT_ALLOWED else {}
            response = PlainTextResponse(f"{verdict.text}\n", verdict.status, headers)
        await response(scope, receive, send_with_headers)

    return guarded
