"""Lists that are looked through up to their first fault, and no further.

A body of the largest size can hold millions of wrong elements, and a fault takes a hundred times the room of what it is
about. One is all that an error tells of. Knows pydantic's core schemas, nothing of requests.
"""

from typing import Any


def make_lists_fast(schema: Any) -> None:
    """In a core schema, which is changed."""
    if isinstance(schema, dict):
        if schema.get("type") == "list":
            schema["fail_fast"] = True
        for part in schema.values():
            make_lists_fast(part)
    elif isinstance(schema, list | tuple):
        for part in schema:
            make_lists_fast(part)
