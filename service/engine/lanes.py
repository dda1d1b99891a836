"""One checkpoint in the worker, as the worker's loop sees it: its queue, its weights, a step of its work at a time.

A generation lane is a scheduler over a runner with a paged KV cache, a single-pass lane is a batcher over an encoder
runner. What a lane is made of is in `service.engine.loading`. Worker process.
"""

from collections.abc import Callable, Collection
from typing import Protocol

from service.engine.protocol import Encode, Generate, Loaded, Step


class Lane(Protocol):
    """`busy_seconds` is the time that its steps have taken, by which the loop gives each lane its fair turn; `on_batch`
    is told whose requests a step computes, before it does."""

    loaded: Loaded
    busy_seconds: float
    on_batch: Callable[[Collection[int]], None]

    @property
    def has_work(self) -> bool: ...

    @property
    def next_step_tokens(self) -> int:
        """About how many tokens the next step computes, for the bound of its duration."""
        ...

    def submit(self, message: Generate | Encode, now: float) -> None:
        """Raises ValueError, with advice, for a request that this checkpoint can never run."""
        ...

    def cancel(self, request_id: int) -> bool:
        """Whether the request was here."""
        ...

    def step(self, now: float, *, alone: bool = False) -> Step:
        """`alone`: no other checkpoint has work."""
        ...

    def report(self) -> Step:
        """How things stand, without a step."""
        ...

    def close(self) -> Step:
        """Fails what is left."""
        ...
