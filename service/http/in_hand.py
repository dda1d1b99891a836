"""What has been let in is carried to its end: a drain waits for it, and a full queue does not stop it half way.

A request may be several calls of the engine, one after another (the pieces of a long text, then their summary). The
engine knows its calls; this layer knows the request, and what all of its calls have spent. Innermost of those that may
refuse: whose body has not come yet is not in hand. Pure ASGI. Runs in the API process, on the event loop.
"""

from starlette.types import ASGIApp, Receive, Scope, Send

from service.api.state import AppState, scope_record
from service.engine.flight import Errand, errand_context
from service.http.gate import is_admin
from service.logs import RequestRecord


class InHand:
    def __init__(self, app: ASGIApp, state: AppState) -> None:
        self._app = app
        self._state = state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or is_admin(scope):
            await self._app(scope, receive, send)
            return
        errand = Errand()
        errand_context.set(errand)
        self._state.in_hand.begin()
        try:
            await self._app(scope, receive, send)
        finally:
            _note_spent(scope_record(scope), errand)
            self._state.in_hand.end()


def _note_spent(record: RequestRecord, errand: Errand) -> None:
    """A request that was given up or ran out of time has its tokens noted by nobody else, and they have been spent."""
    if not record.charged_tokens():
        record.prompt_tokens, record.output_tokens = errand.prompt_tokens, errand.output_tokens
