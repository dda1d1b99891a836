"""Arguments that are written as text between tags: what type a tool's schema gives them, and their grammar.

A string stands as it is, anything else as JSON (or as Python writes it, which is how templates show earlier calls to
the model). JSON Schema's `format` of a string is a remark, not a rule. Schemas come as callers wrote them: what is no
schema in them says nothing here, and is refused with the grammar. Knows nothing of HTTP or tokens. Pure.
"""

import ast
import json
import re
import warnings
from collections.abc import Mapping
from typing import Any

from service.tasks.grammars import MAX_GRAMMAR_CHARS, SPACING

Schema = Mapping[str, Any]
TYPES = {str: "string", bool: "boolean", int: "integer", float: "number", list: "array", dict: "object"}
DEFINITIONS = ("$defs", "definitions")


def parameter(parameters: Schema, name: str) -> Schema:
    """One parameter's schema; references in it are the whole's."""
    found = _mapping(parameters.get("properties")).get(name)
    return _mapping(found)


def options(schema: Any, parameters: Schema) -> list[Schema]:
    """The alternatives of a value, each of at most one type. A reference is followed once, however often it occurs."""
    found: list[Schema] = []
    waiting, followed = [schema], set()
    while waiting:
        one = waiting.pop()
        one = _mapping(one)  # true is one, too, and lets through anything
        reference = one.get("$ref")
        alternatives = _list(one.get("anyOf") or one.get("oneOf") or one.get("allOf"))
        if isinstance(reference, str):
            if reference not in followed:
                followed.add(reference)
                waiting.append(_target(reference, parameters))
        elif alternatives and ("allOf" not in one or len(one) == len(alternatives) == 1):
            waiting += reversed(alternatives)
        else:
            found += _by_type(one)
    return found


def _by_type(schema: Schema) -> list[Schema]:
    """The same schema for each of its types, with the values of that type where they are listed."""
    values = [schema["const"]] if "const" in schema else _list(schema.get("enum"))
    if not values:
        types = [type_ for type_ in _list(schema.get("type")) if isinstance(type_, str)]
        return [{**schema, "type": type_} for type_ in types] or [schema]
    listed = dict.fromkeys(_type_of(value) for value in values)
    return [{"type": type_, "enum": [value for value in values if _type_of(value) == type_]} for type_ in listed]


def types_of(schema: Schema, parameters: Schema) -> frozenset[str | None]:
    """JSON's types that a value may have; None among them: any."""
    found = (option.get("type") for option in options(schema, parameters))
    return frozenset(type_ if isinstance(type_, str) else None for type_ in found)


def typed(text: str, types: frozenset[str | None]) -> Any:
    """The value that is written so: what can be read as one of the types is, anything else is a string."""
    for read in (json.loads, _literal):
        try:
            value = read(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
            continue
        if _is_json(value) and _fits(_type_of(value), types):
            return value
    return text


def _literal(text: str) -> Any:
    with warnings.catch_warnings(action="ignore"):  # of odd escapes
        return ast.literal_eval(text)


def rules(name: str, parameters: Schema) -> list[str]:
    """Lark's lines for the rule `name`: the parameters in their order, the required ones always.

    A schema that says nothing of its properties lets through any.
    """
    required = [key for key in _list(parameters.get("required")) if isinstance(key, str)]
    keys = dict.fromkeys([*_mapping(parameters.get("properties")), *required])
    if not keys:
        return [f"{name}: any_parameter*"]
    parts, lines = [], []
    for number, key in enumerate(keys):
        rule = f"{name}_{number}"
        parts.append(rule if key in required else f"{rule}?")
        values = []
        for place, option in enumerate(options(parameter(parameters, key), parameters)):
            value = f"{rule}_{place}"
            values.append(value)
            lines.append(_value(value, option, parameters))
        opening = json.dumps(f"<parameter={key}>\n", ensure_ascii=False)
        lines.append(f"{rule}: {opening} ({' | '.join(values)})")
        if sum(map(len, lines)) > MAX_GRAMMAR_CHARS:
            break  # definitions are repeated with each reference to them; what is too large already will be refused
    return [f"{name}: {' '.join(parts)}", *lines]


ANY_PARAMETER = [
    r'any_parameter: "<parameter=" /[^>\n<]{1,64}/ ">\n" any_value',
    r"any_value[lazy]: /(?s:.*)\n<\/parameter>\n/",
]


def _value(name: str, option: Schema, parameters: Schema) -> str:
    """One alternative, up to and with the end of its parameter."""
    end = r'"\n</parameter>\n"'
    type_ = option.get("type")
    if type_ == "string" and "enum" in option:
        return f"{name}: ({' | '.join(json.dumps(text, ensure_ascii=False) for text in option['enum'])}) {end}"
    if type_ == "string" or (type_ is None and "allOf" not in option):
        return rf"{name}[lazy]: /{_text_pattern(option)}\n<\/parameter>\n/"
    definitions = {key: parameters[key] for key in DEFINITIONS if key in parameters}
    return f"{name}: %json {json.dumps({**definitions, **option, 'x-guidance': SPACING})} {end}"


def _text_pattern(option: Schema) -> str:
    """A string's expression by its pattern or its lengths."""
    if isinstance(option.get("pattern"), str):
        pattern: str = option["pattern"]
        before, after = "" if pattern.startswith("^") else "(?s:.*)", "" if pattern.endswith("$") else "(?s:.*)"
        return _escaped(f"{before}({pattern.removeprefix('^').removesuffix('$')}){after}")
    least, most = option.get("minLength", 0), option.get("maxLength", "")
    return f"(?s:.{{{least},{most}}})"


def _escaped(pattern: str) -> str:
    """As it stands between Lark's slashes."""
    return re.sub(r"(?<!\\)/", r"\/", pattern).replace("\n", r"\n")


def _target(reference: str, parameters: Schema) -> Any:
    """What a reference within the schema points at: `#/$defs/City`. None, which is anything, where that is nothing."""
    found: Any = parameters
    for part in reference.removeprefix("#/").split("/"):
        found = _mapping(found).get(part)
    return found


def _mapping(value: Any) -> Schema:
    return value if isinstance(value, Mapping) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _type_of(value: Any) -> str:
    return TYPES.get(type(value), "null")


def _is_json(value: Any) -> bool:
    """Python's literals are more: bytes, tuples, sets, numbers without end."""
    try:
        return bool(json.loads(json.dumps(value, allow_nan=False)) == value)
    except (TypeError, ValueError, RecursionError):
        return False


def _fits(type_: str, types: frozenset[str | None]) -> bool:
    return None in types or type_ in types or (type_ == "integer" and "number" in types)
