"""What a request holds its text to, by whichever server's name for it: one grammar, checked, or none.

HTTP only: what a grammar is and whether it is sound, the tasks know. Runs in the API process, on the event loop.
"""

import json
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

from fastapi import Request

from model.batch import Grammar
from service.api.schemas_openai import ConstrainedBody, JsonObjectFormat, JsonSchemaFormat, StructuredOutputs
from service.api.state import request_state
from service.errors import DeadlineExceeded, InvalidGrammar, InvalidRequest
from service.tasks import grammars


def _schema(given: dict[str, Any] | str) -> Grammar:
    return Grammar("json_schema", given if isinstance(given, str) else json.dumps(given))


def _regex(text: str) -> Grammar:
    return Grammar("regex", text)


def _grammar(text: str) -> Grammar:
    return Grammar("lark", text)


FIELDS: dict[str, Callable[[Any], Grammar]] = {
    "json_schema": _schema,
    "regex": _regex,
    "grammar": _grammar,
    "ebnf": _grammar,
    "guided_json": _schema,
    "guided_regex": _regex,
    "guided_choice": grammars.one_of,
    "guided_grammar": _grammar,
}
"""Fields of the request that are a constraint by themselves: llama.cpp's, SGLang's, and vLLM's of old."""
STRUCTURED: dict[str, Callable[[Any], Grammar]] = {
    "json": _schema,
    "regex": _regex,
    "choice": grammars.one_of,
    "grammar": _grammar,
    "json_object": lambda _: Grammar("json_object"),
}


async def grammar_of(request: Request, body: ConstrainedBody, deadline: float | None) -> Grammar | None:
    """The one constraint that the body sets on the text, checked."""
    found = list(_constraints(body))
    if len(found) > 1:
        names = [param.split(".")[0] for param, _ in found]
        raise InvalidRequest(f"{' and '.join(names)} exclude each other", param=names[-1])
    if not found:
        return None
    param, grammar = found[0]
    return await checked_grammar(request, grammar, param=param, deadline=deadline)


def _constraints(body: ConstrainedBody) -> Iterator[tuple[str, Grammar]]:
    """All of them, each with the place that it was found at."""
    match body.response_format:
        case JsonObjectFormat(schema_=dict() as schema):
            yield "response_format.schema", _schema(schema)
        case JsonObjectFormat():
            yield "response_format", Grammar("json_object")
        case JsonSchemaFormat(json_schema=wanted):
            yield "response_format.json_schema.schema", _schema(wanted.schema_)
    for name, make in FIELDS.items():
        if (given := getattr(body, name)) is not None:
            yield name, make(given)
    if body.structured_outputs is not None:
        yield _structured(body.structured_outputs)


def _structured(wanted: StructuredOutputs) -> tuple[str, Grammar]:
    ((name, given),) = wanted.model_dump(by_alias=True, exclude_unset=True).items()
    return f"structured_outputs.{name}", STRUCTURED[name](given)


async def checked_grammar(request: Request, grammar: Grammar, *, param: str, deadline: float | None) -> Grammar:
    """Within the time that grammars have, and within the request's own. Raises InvalidGrammar, DeadlineExceeded."""
    limit = request_state(request).settings.grammar_timeout
    left = math.inf if deadline is None else deadline - time.monotonic()
    try:
        return await grammars.checked(grammar, param=param, timeout_seconds=min(limit, left))
    except InvalidGrammar:
        if left < limit and deadline is not None and time.monotonic() >= deadline:
            raise DeadlineExceeded("the request's deadline passed while its grammar was checked") from None
        raise
