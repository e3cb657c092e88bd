"""What does a browser get at `/`? A page to talk to the model, from files that hold no data.

The files are open, as they tell nothing of the server; whatever the page asks for needs the key that any
client needs. Its policy lets it run its own scripts and ask its own server, and nothing else.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

from slipstream.serve.auth import PAGE_FOLDER, PAGE_PATHS
from slipstream.serve.context import ServeContext

FOLDER = Path(__file__).resolve().parent / "page"
MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; "
        "frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    # Asked for anew each time, and not sent again unless it changed.
    "Cache-Control": "no-cache",
}
# The one thing in the page that depends on the server's options.
DOCS_LINK = '<a id="docs-link" href="/docs" target="_blank" rel="noopener">API</a>'


class PageFile:
    """One file, as it is sent."""

    def __init__(self, path: Path, content: bytes) -> None:
        self.content = content
        tag = hashlib.sha256(content).hexdigest()[:32]
        self.headers = {**HEADERS, "Content-Type": MEDIA_TYPES[path.suffix], "ETag": f'"{tag}"'}

    def answer(self, request: Request) -> Response:
        """Return the file, or that the browser's copy is still the same."""
        known = [tag.strip() for tag in request.headers.get("if-none-match", "").split(",")]
        is_known = "*" in known or any(tag.removeprefix("W/") == self.headers["ETag"] for tag in known)
        if is_known:
            kept = {name: value for name, value in self.headers.items() if name != "Content-Type"}
            return Response(status_code=304, headers=kept)
        return Response(self.content, headers=self.headers)


def add_routes(app: FastAPI, context: ServeContext) -> None:
    """Add a route for each file, unless the page is switched off."""
    if not context.settings.has_ui:
        return
    for path in sorted(PAGE_PATHS):
        _add_file(app, path, _read(path, has_docs=context.settings.has_docs))


def _read(path: str, *, has_docs: bool) -> PageFile:
    file = FOLDER / (path.removeprefix(PAGE_FOLDER) if path != "/" else "index.html")
    content = file.read_bytes()
    if path == "/" and not has_docs:
        content = content.replace(DOCS_LINK.encode(), b"")
    return PageFile(file, content)


def _add_file(app: FastAPI, path: str, file: PageFile) -> None:
    async def answer(request: Request) -> Response:
        return file.answer(request)

    app.add_api_route(path, answer, methods=["GET", "HEAD"], include_in_schema=False)
