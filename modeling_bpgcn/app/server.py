"""The demo as a web server that asks no other host for anything, and gives away nothing but the page and what its
visitors sent."""

import ctypes
import ipaddress
import json
import os
import re
import signal
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import gradio as gr
import uvicorn
from fastapi import FastAPI
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .answering import Demonstration
from .interface import build_interface

M_ARENA_MAX, HEAPS = -8, 2  # of glibc's mallopt
MAX_SESSIONS = 200  # visitors that the server remembers
MAX_BODY = 2**16  # bytes of a request, around an image or without one
API = "/gradio_api/"
FILE = f"{API}file="
# What the page asks for. Gradio has more, for instance to fetch a URL on behalf of the visitor.
READ = re.compile(
    rf"/|/config|/theme\.css|/favicon\.ico|/manifest\.json|/robots\.txt|/assets/.*|/static/.*|{FILE}.*"
    rf"|{API}(info|app_id|startup-events|queue/data|upload_progress|heartbeat/\w+)"
)
SENT = re.compile(rf"{API}(upload|queue/join|cancel|reset)/?")
# Gradio's page is made of inline scripts and of templates that it compiles; they reach no other host all the same.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline';"
    " img-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; object-src 'none';"
    " base-uri 'self'; form-action 'self'; frame-ancestors {}"
)


@contextmanager
def upload_folder() -> Iterator[Path]:
    """A folder of this process alone for what visitors send, removed in the end."""
    before = os.environ.get("GRADIO_TEMP_DIR")
    with tempfile.TemporaryDirectory(prefix="bpgcn-app-", ignore_cleanup_errors=True) as name:
        folder = Path(name).resolve()
        os.environ["GRADIO_TEMP_DIR"] = str(folder)
        try:
            yield folder
        finally:
            if before is None:
                del os.environ["GRADIO_TEMP_DIR"]
            else:
                os.environ["GRADIO_TEMP_DIR"] = before


def build_app(
    demonstration: Demonstration, folder: Path, max_bytes: int, max_pixels: int, embedded_in: str = "'none'"
) -> "Guard":
    """The demo as an ASGI application.

    Args:
        folder: of `upload_folder`, which must be open.
        max_bytes, max_pixels: of an image that is sent.
        embedded_in: origins whose pages may show this one in a frame, as in a Content-Security-Policy.
    """
    page = build_interface(demonstration, max_bytes, max_pixels)
    page.state_session_capacity = MAX_SESSIONS
    page.has_launched = True  # else Gradio takes any path that a visitor names for one that it made itself
    theme = gr.themes.Default(
        primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    ).set(  # Gradio's own are too pale on white
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_700",
    )
    app = gr.mount_gradio_app(
        FastAPI(docs_url=None, redoc_url=None, openapi_url=None),
        page,
        path="/",
        footer_links=[],
        run_history=False,
        allowed_paths=[],
        show_error=False,
        max_file_size=max_bytes,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        theme=theme,
        css=resources.files(__package__).joinpath("style.css").read_text(encoding="utf-8"),
    )
    return Guard(app, folder, max_bytes, POLICY.format(embedded_in))


class Guard:
    """Middleware that lets through what the page needs: known paths, bodies of bounded size, files that were sent.

    Args:
        app: the application behind it.
        folder: the only one of which files are given away, or taken as a visitor's.
        max_bytes: of an upload, without what HTTP wraps around it.
        policy: the Content-Security-Policy of every answer.
    """

    def __init__(self, app: ASGIApp, folder: Path, max_bytes: int, policy: str):
        self.app, self.folder, self.max_bytes = app, folder, max_bytes
        self.headers = {
            "Content-Security-Policy": policy,
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or hand it on."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            respond, receive = await self._judge(scope, receive)
            await respond(scope, receive, self._with_headers(send))
        else:
            await send({"type": "websocket.close", "code": 1008})  # the page has none

    async def _judge(self, scope: Scope, receive: Receive) -> tuple[ASGIApp, Receive]:
        path, method = scope["path"], scope["method"]
        if method in ("GET", "HEAD"):
            if not READ.fullmatch(path):
                return _refusal(404, "There is no such page."), receive
            if path.startswith(FILE) and not self._is_sent_file(unquote(path.removeprefix(FILE))):
                return _refusal(403, "This file is not given away."), receive
            return self.app, receive
        if method != "POST" or not SENT.fullmatch(path):
            return _refusal(404, "There is no such page."), receive
        is_upload = path.removeprefix(API).startswith("upload")
        length = Headers(scope=scope).get("content-length", "")
        if not length.isdecimal():
            return _refusal(411, "The request does not say how long it is."), receive
        if int(length) > MAX_BODY + is_upload * self.max_bytes:
            return _refusal(413, f"More than {self.max_bytes / 2**20:g} MB are not taken."), receive
        if is_upload:
            return self.app, receive
        body = await _read(receive)
        if not self._names_sent_files(body):
            return _refusal(400, "The request is not one of this page."), receive
        return self.app, _replay(body, receive)

    def _is_sent_file(self, name: str) -> bool:
        return Path(name).is_absolute() and "\0" not in name and Path(name).resolve().is_relative_to(self.folder)

    def _names_sent_files(self, body: bytes) -> bool:
        """Whether this is JSON whose `path` values are files that were sent: Gradio would fetch URLs, too."""
        try:
            paths = list(_paths(json.loads(body)))
        except (ValueError, RecursionError):
            return False
        return all(isinstance(path, str) and self._is_sent_file(path) for path in paths)

    def _with_headers(self, send: Send) -> Send:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(self.headers)
            await send(message)

        return send_with_headers


def _refusal(status: int, reason: str) -> JSONResponse:
    return JSONResponse({"detail": reason, "error": reason}, status)


def _paths(value: Any) -> Iterator[Any]:
    """The values under `path`, however deep."""
    if isinstance(value, dict):
        if value.get("path") is not None:
            yield value["path"]
        for item in value.values():
            yield from _paths(item)
    elif isinstance(value, list):
        for item in value:
            yield from _paths(item)


async def _read(receive: Receive) -> bytes:
    body, more = b"", True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    return body


def _replay(body: bytes, receive: Receive) -> Receive:
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return messages.pop() if messages else await receive()

    return replay


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens there; port 0 is any free one.

    Raises:
        OSError: the host is none of this machine's, or the port is taken.
    """
    family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    listener = socket.socket(family, kind)
    try:
        if os.name == "posix":
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(128)
    except OSError:
        listener.close()
        raise
    return listener


def url_of(listener: socket.socket) -> tuple[str, bool]:
    """Where a browser finds it, and whether that is this machine alone."""
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    return f"http://{shown}:{port}", ipaddress.ip_address(host).is_loopback


def share_heaps() -> None:
    """Let all threads allocate from the same few heaps: glibc would give each thread that answers visitors one of its
    own, what is free in one is of no use to another, and memory would grow for as long as visitors come."""
    with suppress(OSError, TypeError, AttributeError):  # another C library does not do so, and lacks the call
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, HEAPS)


def serve(app: ASGIApp, listener: socket.socket) -> None:
    """Answer until the process is told to stop by SIGINT or SIGTERM, and return then."""
    # the event streams of open pages would hold up the end
    config = uvicorn.Config(app, log_level="warning", server_header=False, timeout_graceful_shutdown=2)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # uvicorn raises again what has stopped it
    try:
        with suppress(KeyboardInterrupt):
            uvicorn.Server(config).run(sockets=[listener])
    finally:
        signal.signal(signal.SIGTERM, before)
