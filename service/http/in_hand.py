"""What has been let in is carried to its end: a drain waits for it, and a full queue does not stop it half way.

A request may be several calls of the engine, one after another (the pieces of a long text, then their summary). The
engine knows its calls; this layer knows the request. Innermost of those that may refuse: whose body has not come yet
is not in hand. Pure ASGI. Runs in the API process, on the event loop.
"""

from starlette.types import ASGIApp, Receive, Scope, Send

from service.api.state import AppState
from service.engine.flight import Errand, errand_context
from service.http.gate import is_admin


class InHand:
    def __init__(self, app: ASGIApp, state: AppState) -> None:
        self._app = app
        self._state = state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or is_admin(scope):
            await self._app(scope, receive, send)
            return
        errand_context.set(Errand())
        self._state.in_hand.begin()
        try:
            await self._app(scope, receive, send)
        finally:
            self._state.in_hand.end()
