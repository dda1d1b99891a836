"""Constraints on generated text, checked at the door: a bad schema is the caller's fault, found before anything runs.

Compiling for a vocabulary is the worker's; here the same library parses a grammar, in a thread, with limits on its
size and time. Knows nothing of HTTP. Runs in the API process.
"""

import asyncio
import functools
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jsonschema
from llguidance.gbnf_to_lark import any_to_lark

from model.batch import Grammar
from model.grammar_check import validate
from service.errors import InvalidGrammar

MAX_GRAMMAR_CHARS = 100_000
NUM_THREADS = 2
SPACING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""As the examples of tool calls are written; free white space is where weak models get lost."""
META_SCHEMA = jsonschema.Draft202012Validator


async def checked(grammar: Grammar, *, param: str, timeout_seconds: float) -> Grammar:
    """The grammar itself, once it is known to be sound.

    Raises: InvalidGrammar that says what is wrong with it, or that it is too large or takes too long.
    """
    if grammar.kind == "json_object":
        return grammar
    if len(grammar.text) > MAX_GRAMMAR_CHARS:
        message = f"{param} has {len(grammar.text):,} characters; the limit is {MAX_GRAMMAR_CHARS:,}"
        raise InvalidGrammar(message, param=param)
    try:
        async with asyncio.timeout(timeout_seconds):
            return await asyncio.get_running_loop().run_in_executor(_threads(), _checked, grammar, param)
    except TimeoutError as error:
        message = f"{param}: checking it took more than {timeout_seconds:g} seconds; make it simpler"
        raise InvalidGrammar(message, param=param) from error


@functools.cache
def _threads() -> ThreadPoolExecutor:
    """Their own: while hostile grammars keep them busy, other requests are tokenized elsewhere."""
    return ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="grammar-check")


def json_schema(schema: Mapping[str, Any]) -> Grammar:
    return Grammar("json_schema", json.dumps(schema))


def one_of(texts: Sequence[str]) -> Grammar:
    """Lark writes a string as JSON does."""
    return Grammar("lark", "start: " + " | ".join(json.dumps(text, ensure_ascii=False) for text in texts))


def lark_marker(marker: str, token_ids: Mapping[str, int]) -> str:
    """A marker as Lark has it: by its id where it is a token of its own."""
    return f"<[{token_ids[marker]}]>" if marker in token_ids else json.dumps(marker)


def up_to(rule: str, marker: str, token_ids: Mapping[str, int]) -> list[str]:
    """Lark's lines for a rule that is any text up to and with the marker, and for `TEXT`, which is any.

    A marker that is a token is not to be written in letters: they would be read as the marker, and nothing after them
    would be held to what follows it.
    """
    end, text = lark_marker(marker, token_ids), "TEXT: /(?s:.*)/"
    if marker not in token_ids:
        return [f"{rule}[lazy]: TEXT {end}", text]
    return [f"{rule}: BEFORE {end}", f"BEFORE: TEXT & ~(TEXT {json.dumps(marker)} TEXT)", text]


def _checked(grammar: Grammar, param: str) -> Grammar:
    try:
        if grammar.kind == "json_schema":
            META_SCHEMA.check_schema(json.loads(grammar.text))
        if grammar.kind == "lark":  # or in llama.cpp's notation: `root ::= ...`
            grammar = Grammar("lark", any_to_lark(grammar.text))
        fault = validate(grammar)
    except jsonschema.SchemaError as error:
        place = ".".join(str(part) for part in error.absolute_path)
        fault = f"not a JSON schema: {place + ': ' if place else ''}{error.message}"
    except Exception as error:  # the converter of grammars raises bare Exception
        fault = str(error) or type(error).__name__
    if fault is not None:
        raise InvalidGrammar(f"{param}: {_line(fault)}", param=param)
    return grammar


def _line(text: str) -> str:
    return " ".join(text.split())[:500]
