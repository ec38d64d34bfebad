"""The HTTP application: all routes, behind the door, with errors as clients read them."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

from fastapi import FastAPI

import minisgl
from minisgl.config.runtime import ServerConfig
from minisgl.env import env_number
from minisgl.server.admission import Admission
from minisgl.server.bodies.intake import MAX_BODY_BYTES, Bodies
from minisgl.server.bodies.responses import ResponseStore
from minisgl.server.errors import add_error_handlers
from minisgl.server.frontend import Frontend
from minisgl.server.metrics import Exposition
from minisgl.server.routes.generation import Generation
from minisgl.server.routes.operations import Operations
from minisgl.server.routes.stored import add_stored

DOCUMENT = Path(__file__).parents[1] / "openapi.json"  # made by `python -m tools.openapi`


def create_app(
    frontend: Frontend, config: ServerConfig, exposition: Exposition, silent: Callable[[], str] = str
) -> FastAPI:
    """The application. It has no state of its own: requests live in `frontend`, counts in `exposition`. silent: the
    workers that are."""
    app = FastAPI(title="minisgl", version=minisgl.__version__, docs_url=None, redoc_url=None)
    app.openapi = cache(lambda: json.loads(DOCUMENT.read_bytes()))  # type: ignore[method-assign]
    add_error_handlers(app)
    app.add_middleware(Admission, config=config)
    max_body = int(env_number("MINISGL_MAX_BODY_BYTES", MAX_BODY_BYTES, low=1024, high=2**40))
    bodies, store = Bodies(config, max_body), ResponseStore()
    Generation(frontend, config, bodies, store).add_to(app)
    Operations(frontend, config, bodies, exposition, silent).add_to(app)
    add_stored(app, store)
    return app
