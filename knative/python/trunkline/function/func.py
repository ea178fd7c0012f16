"""Serves ``handler.handle(event, context)`` to func's middleware, which speaks ASGI. There is nothing to change here."""

import logging

import trunkline
from hypercorn.middleware import AsyncioWSGIMiddleware
from trunkline import frame
from trunkline.errors import TrunklineError

from function.handler import handle

# The middleware asks in the loop that also serves requests, so this must not take long.
READY_S = 1.0
# So many times what the frame allows still reaches it, and is answered with 413 and the limit; more, with 400.
LENIENCE = 4


def new():
    """Return the instance that the middleware serves."""
    return Function()


class Function:
    def __init__(self):
        app = frame.create_app(handle)

        def with_end(environ, start_response):
            # The middleware has read the whole body: without a length it ends where the bytes do.
            environ["wsgi.input_terminated"] = not environ.get("CONTENT_LENGTH")
            return app(environ, start_response)

        self._serve = AsyncioWSGIMiddleware(with_end, max_body_size=LENIENCE * frame.max_body_bytes())

    async def handle(self, scope, receive, send):
        await self._serve(scope, receive, send)

    def start(self, configuration):
        # The middleware's own lines go the same way.
        for each in logging.getLogger().handlers[:]:
            logging.getLogger().removeHandler(each)
        frame.log_to_stderr()

    def alive(self):
        return True, "alive"

    def ready(self):
        """Say whether the sidecar answers for every model that the handler has named."""
        try:
            trunkline.ready(READY_S)
        except TrunklineError as error:
            return False, f"{error.code}: {error.message}"
        return True, "ready"
