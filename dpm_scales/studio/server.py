"""Serve the page on one machine: nothing is fetched, and only files that the page made can be read."""

from __future__ import annotations

import ipaddress
import json
import os
import socket
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from dpm_scales.errors import UserError
from dpm_scales.studio.photos import MAX_BYTES

LOOPBACK, PORT = "127.0.0.1", 7860
MAX_BODY = MAX_BYTES + 2**20
"""Largest request, in bytes: an upload with its envelope."""

READABLE = (
    *("/config", "/theme.css", "/favicon.ico", "/robots.txt", "/manifest.json", "/assets/", "/static/", "/svelte/"),
    *("/gradio_api/queue/", "/gradio_api/upload", "/gradio_api/heartbeat/", "/gradio_api/cancel", "/gradio_api/reset"),
    *("/gradio_api/file=", "/gradio_api/startup-events", "/gradio_api/app_id", "/gradio_api/component_server"),
)
"""Prefixes of the paths that the page requests; all others are refused."""

POLICY = "; ".join(
    (
        "default-src 'self'",
        "script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:",  # Gradio's pages need them
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data: blob:",
        "font-src 'self' data:",
        "connect-src 'self'",
        "worker-src 'self' blob:",
        "frame-ancestors 'none'",
        "form-action 'self'",
    )
)
HEADERS = {
    "content-security-policy": POLICY,
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "cross-origin-resource-policy": "same-origin",
}

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]


class Guard:
    """A wrapper around the server's application that refuses requests which the page does not make.

    It refuses requests for other hosts than the one it listens on (DNS rebinding), other paths, larger bodies,
    addresses in place of files, and files that were not uploaded.

    Args:
        app: the application.
        folder: the only folder whose files a request may name.
        hosts: names of this server; empty for any.
    """

    def __init__(self, app: App, folder: Path, hosts: tuple[str, ...]) -> None:
        self.app, self.folder, self.hosts = app, folder.resolve(), hosts

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        refusal = self._refusal(scope)
        if refusal is not None:
            await _refuse(send, *refusal)
            return
        if scope["method"] == "POST":
            body = await _read(receive)
            if body is None:
                await _refuse(send, 413, f"larger than {MAX_BYTES >> 20} MB")
                return
            if not self._names_own_files(scope, body):
                await _refuse(send, 403, "a file that was not uploaded")
                return
            receive = _replayed(body, receive)

        async def sent(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = [(key.encode(), value.encode()) for key, value in HEADERS.items()]
                message["headers"] = [*message.get("headers", []), *own]
            await send(message)

        await self.app(scope, receive, sent)

    def _refusal(self, scope: Message) -> tuple[int, str] | None:
        """Return the status and the reason for which a request is refused, or None."""
        headers = {key.decode("latin-1"): value.decode("latin-1") for key, value in scope["headers"]}
        host = headers.get("host", "").rpartition(":")[0].strip("[]") or headers.get("host", "")
        if self.hosts and host not in self.hosts:
            return 421, "another host"
        if scope["type"] != "http" or scope["method"] not in ("GET", "HEAD", "POST"):
            return 405, "no such method"
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2] != headers.get("host"):
            return 403, "another origin"
        path = str(scope["path"])
        if path != "/" and not path.startswith(READABLE):
            return 404, "no such path"
        if path.startswith("/gradio_api/file=") and not self._is_own(path.partition("=")[2]):
            return 403, "no file of the page"
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > MAX_BODY:
            return 413, f"larger than {MAX_BYTES >> 20} MB"
        return None

    def _is_own(self, name: str) -> bool:
        """Return whether a path, links resolved, lies in the folder."""
        try:
            return "://" not in name and "\0" not in name and Path(name).resolve().is_relative_to(self.folder)
        except (OSError, RuntimeError):
            return False

    def _names_own_files(self, scope: Message, body: bytes) -> bool:
        """Return whether all files that a JSON body names lie in the folder."""
        if str(scope["path"]).startswith("/gradio_api/upload"):
            return True
        try:
            stack = [json.loads(body or b"null")]
        except (ValueError, RecursionError):
            return False
        while stack:
            node = stack.pop()
            if isinstance(node, dict):
                path = node.get("path")
                if path is not None and not (isinstance(path, str) and self._is_own(path)):
                    return False
                stack += node.values()
            elif isinstance(node, list):
                stack += node
        return True


async def _read(receive: Receive) -> bytes | None:
    """Return the body of a request, or None if it is too large."""
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return b"".join(parts)
        part = message.get("body", b"")
        size += len(part)
        if size > MAX_BODY:
            return None
        parts.append(part)
        if not message.get("more_body", False):
            return b"".join(parts)


def _replayed(body: bytes, receive: Receive) -> Receive:
    """Return a receiver that returns the body first, and then what else is received."""
    waiting = [body]

    async def again() -> Message:
        if waiting:
            return {"type": "http.request", "body": waiting.pop(), "more_body": False}
        return await receive()

    return again


async def _refuse(send: Send, status: int, reason: str) -> None:
    headers = [(b"content-type", b"text/plain; charset=utf-8")]
    headers += [(key.encode(), value.encode()) for key, value in HEADERS.items()]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": f"refused: {reason}\n".encode()})


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens on a host and a port, 0 for any free one. Raises UserError if it can't."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        made = socket.socket(family, socket.SOCK_STREAM)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((host, port))
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"host={host} port={port}: {reason}; choose another, port=0 for any free one") from error
    made.listen(128)
    return made


def is_loopback(host: str) -> bool:
    """Return whether only this machine reaches a host."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@contextmanager
def private_folder() -> Iterator[Path]:
    """Yield a folder for uploads and pictures, readable by this user alone, which is removed afterwards.

    Meanwhile Gradio's settings in the environment allow no analytics, no sharing and no folders of its own.
    """
    with TemporaryDirectory(prefix="dpm_scales_studio_") as name:
        settings = {
            "GRADIO_TEMP_DIR": name,
            "GRADIO_ANALYTICS_ENABLED": "False",
            "GRADIO_ALLOWED_PATHS": "",
            "GRADIO_MCP_SERVER": "False",
            "GRADIO_RUN_HISTORY": "False",
            "GRADIO_SHARE": "False",
            "GRADIO_SSR_MODE": "False",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        before = {key: os.environ.get(key) for key in settings}
        os.environ.update(settings)
        try:
            yield Path(name)
        finally:
            for key, value in before.items():
                if value is None:
                    os.environ.pop(key, None)
                else:
                    os.environ[key] = value


def application(page: Any, folder: Path, host: str, css: str, theme: Any) -> App:
    """Return the server's application for a page.

    Args:
        page: the `gradio.Blocks`.
        folder: as `private_folder` yields it.
        host: the host on which it will listen; on loopback, requests under other names are refused.
        css, theme: style of the page.
    """
    import fastapi
    import gradio

    inner = fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app = gradio.mount_gradio_app(
        inner,
        page.queue(default_concurrency_limit=1, api_open=False),
        path="/",
        allowed_paths=[],
        css=css,
        footer_links=[],
        max_file_size=MAX_BYTES,
        mcp_server=False,
        run_history=False,
        server_name=host,
        show_error=True,
        ssr_mode=False,
        theme=theme,
    )
    page.has_launched = True  # then Gradio also checks which files a request names
    names = (host, LOOPBACK, "localhost", "::1") if is_loopback(host) else ()
    return Guard(app, folder, names)
