"""Events that have their type as their name, as Anthropic's clients and those of OpenAI's responses read them.

Knows nothing of what they tell; `service.api.event_stream` sends them. API process only.
"""

from typing import Any

import msgspec


class NamedEvents:
    """What is to be sent next. Where no stream is wanted nothing is kept."""

    def __init__(self, *, wanted: bool) -> None:
        self.num_events = 0
        """So far, taken or not."""
        self._wanted = wanted
        self._encoder = msgspec.json.Encoder()
        self._waiting: list[bytes] = []

    def add(self, type: str, **fields: Any) -> None:
        if self._wanted:
            data = self._encoder.encode({"type": type, **fields})
            self._waiting.append(b"event: " + type.encode() + b"\ndata: " + data + b"\n\n")
            self.num_events += 1

    def taken(self) -> bytes:
        events, self._waiting = self._waiting, []
        return b"".join(events)
