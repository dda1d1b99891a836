"""A served name that stands for several versions: by weight, the same version for the same caller, shadow or none.

The choice is a hash of the name and of whom the request is for, so that it needs no memory and holds over restarts.
Pure logic beside one context variable, which the HTTP layer sets for the length of a request. API process only.
"""

import hashlib
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field

from service.logs import request_id_context

sticky_key_context: ContextVar[str] = ContextVar("sticky_key", default="")
"""Whom the request is for: the body's `user`, else the API key's name; empty: every request for itself."""


@dataclass(frozen=True, slots=True)
class Alias:
    """Weights by version, in any unit; `shadow` is a version that runs each request again for comparison."""

    weights: Mapping[str, float] = field(default_factory=dict)
    shadow: str | None = None

    def pick(self, name: str, sticky_key: str) -> str:
        """The version whose share of [0, 1) holds the key's hash.

        Worked example: weights {a: 3, b: 1} give a [0, 0.75) and b [0.75, 1); a key that hashes to 0.8 gets b.
        """
        digest = hashlib.blake2b(f"{name}\0{sticky_key}".encode(), digest_size=8).digest()
        place = int.from_bytes(digest, "big") / 2**64 * sum(self.weights.values())
        version = ""
        for version, weight in self.weights.items():
            place -= weight
            if place < 0 and weight > 0:
                return version
        return version

    @property
    def heaviest(self) -> str:
        return max(self.weights, key=lambda version: self.weights[version])


def sticky_key() -> str:
    return sticky_key_context.get() or request_id_context.get()
