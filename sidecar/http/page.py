"""The page: what an operator sees of a node, rendered here with what there is at the moment, and kept up to date by its script.

The page itself and its files hold no secret; what they show is told to whoever may look, in the page or as events. It asks nobody
else for anything, runs nothing that does not come from here, and stands in no frame.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from flask import Blueprint, Flask, Response, render_template, request, send_from_directory

from sidecar.http.access import OPEN, READ, needs
from sidecar.http.events import Feed
from sidecar.modelrows import MODEL_COLUMNS
from sidecar.view import TENANT_COLUMNS

ROLE_HEADER: Final = "Trunkline-Role"
_POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
)


def add_page(app: Flask, feed: Feed, role: Callable[[], str]) -> None:
    """Serve the page, its files and its events. ``role`` says what whoever asks may do; empty: not even look."""
    routes = Blueprint("page", __name__, template_folder="page")
    routes.after_request(_guarded)
    # Told when this process is about to end.
    app.extensions["feed"] = feed

    @routes.get("/")
    @needs(OPEN)
    def page() -> Response:
        """Render the page; what the node looks like is on it for whoever may look."""
        may = role()
        look = feed.latest().look if may else None
        return Response(
            render_template(
                "index.html",
                is_shown=bool(may),
                state=look.state if look else None,
                drawing=look.drawing if look else None,
                model_columns=MODEL_COLUMNS,
                tenant_columns=TENANT_COLUMNS,
            ),
            headers={"Cache-Control": "no-store"},
        )

    @routes.get('/page/<any("page.css","page.js","drawing.js","stream.js","theme.js","icon.svg"):file>')
    @needs(OPEN)
    def files(file: str) -> Response:
        """Send one of the page's files."""
        # To be asked for each time, and answered with 304 mostly: a sidecar that was upgraded has its own.
        return send_from_directory(routes.root_path + "/page", file, max_age=0)

    @routes.get("/admin/v1/events")
    @needs(READ)
    def events() -> Response:
        """Send what the page shows as server-sent events, all of it whenever it changes, at most once a second."""
        response = Response(mimetype="text/event-stream", headers={"Cache-Control": "no-store", ROLE_HEADER: role()})
        # No proxy is to collect them.
        response.headers["X-Accel-Buffering"] = "no"
        if request.method == "HEAD":
            return response
        response.response = feed.open(request.headers.get("Last-Event-ID", ""))
        return response

    app.register_blueprint(routes)


def _guarded(response: Response) -> Response:
    response.headers["Content-Security-Policy"] = _POLICY
    response.headers["X-Content-Type-Options"] = "nosniff"
    response.headers["Referrer-Policy"] = "no-referrer"
    response.headers["Cross-Origin-Opener-Policy"] = "same-origin"
    response.headers["Cross-Origin-Resource-Policy"] = "same-origin"
    return response
