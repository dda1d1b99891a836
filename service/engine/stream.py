"""The tokens of one accepted request as they come, for whoever submitted it.

Knows its flight and a way to end it, nothing of workers. Runs in the API process, on the event loop.
"""

from collections.abc import Callable

from service.engine.flight import Flight, GenerateFlight
from service.engine.protocol import TokenOutput


class GenerationStream:
    """Not finishing the iteration means cancelling: call `aclose`."""

    def __init__(self, flight: GenerateFlight, end: Callable[[Flight, str], None]) -> None:
        self._flight = flight
        self._end = end

    def __aiter__(self) -> "GenerationStream":
        return self

    async def __anext__(self) -> TokenOutput:
        flight = self._flight
        while flight.unread is None:
            if flight.error is not None:
                raise flight.error
            if flight.outcome is not None:
                raise StopAsyncIteration
            await flight.changed()
        output, flight.unread = flight.unread, None
        return output

    @property
    def timings(self) -> Flight:
        """When the request was accepted, started and answered first; how many tokens it took and gave."""
        return self._flight

    def cancel(self, outcome: str = "cancelled") -> None:
        """Ends the request if it has not ended; its blocks are free before the worker's next step.

        `outcome` is "stop" where the caller has all it wanted (a stop string), which is no cancellation.
        """
        self._end(self._flight, outcome)

    async def aclose(self) -> None:
        self.cancel()
