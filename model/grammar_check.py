"""Whether a grammar can be compiled at all, and its form for the compiler.

A grammar comes as a JSON schema, a regular expression or a Lark grammar, within a frame where it has one; llguidance's
fuel limits bound what any of them may cost. Torch-free, so that the API process can refuse early: `validate` may take a
tenth of a second, so it is not for the event loop. Runs in both processes.
"""

import json
from typing import Any

from llguidance import LLMatcher, LLParserLimits

from model.batch import Grammar

MAX_GRAMMAR_BYTES = 1 << 18

# Any whitespace that a writer of indented JSON uses, but not without end: weak models never stop repeating it.
WHITESPACE = r"[\x20\x0A\x0D\x09]{1,64}"


def limits() -> LLParserLimits:
    """About 50 ms of building, 30 ms for a mask and 100 MB of states at the worst."""
    return LLParserLimits(
        initial_lexer_fuel=2_000_000,
        step_lexer_fuel=200_000,
        step_max_items=50_000,
        max_lexer_states=50_000,
        max_grammar_size=500_000,
        verbose_errors=False,
    )


def compiler_form(grammar: Grammar) -> str:
    """The grammar in llguidance's own notation. Raises: ValueError where the text is not even JSON."""
    own = _own_form(grammar)
    if not grammar.frame:
        return own
    # A Lark grammar stays the text that it is; the other kinds become a list of grammars already.
    answer, *others = [{"lark_grammar": own}] if grammar.kind == "lark" else json.loads(own)["grammars"]
    grammars: list[dict[str, Any]] = [{"lark_grammar": grammar.frame}, {**answer, "name": "answer"}, *others]
    return json.dumps({"grammars": grammars})


def _own_form(grammar: Grammar) -> str:
    if grammar.kind == "json_object":
        return LLMatcher.grammar_from_json_schema({"type": "object"}, overrides={"whitespace_pattern": WHITESPACE})
    if grammar.kind == "json_schema":
        return LLMatcher.grammar_from_json_schema(grammar.text, overrides={"whitespace_pattern": WHITESPACE})
    if grammar.kind == "regex":
        return LLMatcher.grammar_from_regex(grammar.text)
    return LLMatcher.grammar_from_lark(grammar.text)


def validate(grammar: Grammar) -> str | None:
    """What is wrong with the grammar, as advice; None if it compiles."""
    size = len(grammar.text.encode("utf-8", "surrogatepass"))
    if size > MAX_GRAMMAR_BYTES:
        return f"the grammar has {size:,} bytes; the limit is {MAX_GRAMMAR_BYTES:,}"
    try:
        failed, messages = LLMatcher.validate_grammar_with_warnings(compiler_form(grammar), limits=limits())
    except ValueError as fault:
        return f"not a valid {_name(grammar)}: {fault}"
    return f"not a valid {_name(grammar)}: {messages[0].strip()}" if failed else None


def _name(grammar: Grammar) -> str:
    names = {"regex": "regular expression", "lark": "Lark grammar"}
    return names.get(grammar.kind, "JSON schema")
