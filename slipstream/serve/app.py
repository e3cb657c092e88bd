"""Which routes and middlewares make the server? `create_app` puts them together from one `ServeContext`.

A request passes CORS, its log and metrics, the key's check and the body's bound before it reaches a route;
all of these are plain ASGI, so that a stream passes through them chunk by chunk. Whatever a route raises
becomes an answer in the innermost layer: those further out only ever see answers.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

from fastapi import FastAPI
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from slipstream import __version__
from slipstream.serve import (
    chat,
    completions,
    embeddings,
    errors,
    health,
    management,
    metrics,
    model_list,
    not_served,
    openapi,
    page_routes,
    tokenization,
    trace_routes,
)
from slipstream.serve.auth import OPEN_PATHS, PAGE_PATHS, Auth
from slipstream.serve.body_limits import BodyLimits
from slipstream.serve.context import ServeContext
from slipstream.serve.request_ids import request_id_of
from slipstream.serve.request_log import RequestLog
from slipstream.serve.spans import open_spans

logger = logging.getLogger(__name__)

DESCRIPTION = "Text generation and embeddings in the shapes of OpenAI's API."
# Each has `add_routes(app, context)`.
ROUTE_MODULES = (
    completions,
    chat,
    embeddings,
    tokenization,
    model_list,
    health,
    metrics,
    trace_routes,
    management,
    page_routes,
)


def create_app(context: ServeContext) -> FastAPI:
    """Return the ASGI application that serves `context`."""
    settings = context.settings
    if settings.otlp_traces_endpoint is not None:
        context.spans = open_spans(settings.otlp_traces_endpoint, model=context.model_names[0])
    app = FastAPI(
        title="Slipstream",
        version=__version__,
        description=DESCRIPTION,
        docs_url="/docs" if settings.has_docs else None,
        redoc_url="/redoc" if settings.has_docs else None,
        redirect_slashes=False,
        middleware=middlewares(context),
        lifespan=closing(context),
    )
    app.state.context = context
    errors.add_handlers(app)
    for module in ROUTE_MODULES:
        module.add_routes(app, context)
    not_served.add_routes(app)
    app.openapi = functools.partial(openapi.openapi_document, app)
    return app


def closing(context: ServeContext) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    """Return the life of an application that ends with what it started itself."""

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(context.close)

    return life


def middlewares(context: ServeContext) -> list[Middleware]:
    """Return the layers around the routes, outermost first."""
    settings = context.settings
    layers = [Middleware(RequestLog, context=context, spans=context.spans)]
    if settings.cors_origins:
        layers.append(
            Middleware(
                CORSMiddleware,
                allow_origins=list(settings.cors_origins),
                allow_methods=["GET", "POST"],
                allow_headers=["*"],
            )
        )
    open_paths = OPEN_PATHS | PAGE_PATHS if settings.has_ui else OPEN_PATHS
    layers += [
        Middleware(Auth, api_keys=settings.api_keys, admin_keys=settings.admin_keys, open_paths=open_paths),
        Middleware(BodyLimits, max_body_bytes=settings.max_body_bytes),
        Middleware(FailureGuard),
    ]
    return layers


class FailureGuard:
    """ASGI middleware that answers what a route raised without meaning to."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        has_begun = False

        async def watched(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except Exception as error:
            answer = errors.of_exception(error, request_id_of(scope))
            if has_begun or scope["type"] != "http":
                raise
            await answer.response()(scope, receive, send)
