"""A jinja2 sandbox whose templates end: bounded in time, in output and in the size of any value.

The same globals, filters, tests and tags that `transformers` gives chat templates; what differs is that each loop and
macro checks a budget, and that operations which could make a huge value in one go are refused. A template is code from
a checkpoint, so it is not trusted. Knows nothing of messages. Runs in whatever thread renders.
"""

import contextlib
import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import datetime
from functools import wraps
from typing import Any, NoReturn

from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

MAX_VALUE_CHARS = 16_000_000
MAX_OUTPUT_CHARS = 32_000_000
MAX_INTEGER = 1_000_000
WIDE_FORMAT = re.compile(r"\d{5,}")
TOO_WIDE = "the chat template formats to a width that is too large"


class TemplateRaisedError(TemplateError):
    """The template itself refused its input, by `raise_exception`."""


class BudgetExceededError(TemplateError):
    """The template took too long or wrote too much."""


@dataclass(slots=True)
class Budget:
    """What is left to one rendering; `deadline` in `time.monotonic()` seconds."""

    deadline: float
    chars: int = MAX_OUTPUT_CHARS

    def spend(self, chars: int) -> None:
        self.chars -= chars
        if self.chars < 0:
            raise BudgetExceededError(f"the chat template wrote more than {MAX_OUTPUT_CHARS:,} characters")
        if time.monotonic() > self.deadline:
            raise BudgetExceededError("the chat template took too long")


_budget: ContextVar[Budget] = ContextVar("template_budget")


@contextlib.contextmanager
def budget(seconds: float) -> Iterator[None]:
    """Everything rendered inside shares one budget."""
    token = _budget.set(Budget(time.monotonic() + seconds))
    try:
        yield
    finally:
        _budget.reset(token)


class Sandbox(ImmutableSandboxedEnvironment):
    """Compile with `from_string`; render inside `budget(...)`."""

    intercepted_binops = frozenset({"*", "**", "%", "+"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols])
        self.filters = {name: _bounded_filter(function) for name, function in self.filters.items()}
        self.filters.update(tojson=to_json, join=_bounded_join(self.filters["join"]), replace=_replace)
        self.globals.update(
            raise_exception=raise_exception,
            strftime_now=strftime_now,
            dict=TemplateDict(),
            namespace=TemplateNamespace,
        )

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        template: nodes.Template = _Instrument().visit(super()._parse(source, name, filename))
        return template

    def tick(self, chars: int = 0) -> None:
        _budget.get().spend(chars)

    def emit(self, value: object) -> object:
        _budget.get().spend(len(value) if isinstance(value, str) else 32)
        return value

    def concat_bounded(self, *parts: object) -> str:
        texts = [str(part) for part in parts]
        _check_chars(sum(map(len, texts)))
        return "".join(texts)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        # Named as in jinja2, so that a template may pass `self=` or `context=` as keywords.
        _check_arguments(args, kwargs)
        _check_method(__obj, args)
        result = super().call(__context, __obj, *args, **kwargs)
        if isinstance(result, str):
            _check_chars(len(result))
        return result

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator in ("*", "**") and not (_is_small(left) and _is_small(right)):
            raise SecurityError(f"the chat template's '{operator}' makes a value that is too large")
        if operator == "*" and (size := _length(left) * abs(right) if isinstance(right, int) else 0):
            _check_chars(size)
        if operator == "*" and (size := _length(right) * abs(left) if isinstance(left, int) else 0):
            _check_chars(size)
        if operator == "+":
            _check_chars(_length(left) + _length(right))
        if operator == "**" and isinstance(right, int) and abs(right) > 64:
            raise SecurityError("the chat template's '**' makes a value that is too large")
        if operator == "%" and isinstance(left, str) and WIDE_FORMAT.search(left):
            raise SecurityError(TOO_WIDE)
        return super().call_binop(context, operator, left, right)


class GenerationTag(Extension):
    """`{% generation %}...{% endgeneration %}` marks what the assistant wrote, for training; here it is its content."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_content"), [], [], body).set_lineno(line)

    def _content(self, caller: Callable[[], str]) -> str:
        return caller()


class TemplateDict:
    """`dict(...)` for templates, without the type behind it."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class TemplateNamespace(Namespace):
    """jinja2's `namespace`, which no underscore name enters (as in `transformers`)."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, rest = args[0], args[1:]
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            _check_name(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


class _Instrument(NodeTransformer):
    """Puts a budget check into each loop and macro, and counts what each output writes."""

    def visit(self, node: nodes.Node, *_args: Any, **_kwargs: Any) -> Any:
        self.generic_visit(node)
        match node:
            case nodes.For() | nodes.Macro():
                chars = sum(len(data.data) for part in node.body for data in part.find_all(nodes.TemplateData))
                node.body.insert(0, nodes.ExprStmt(_environment_call("tick", nodes.Const(chars))))
            case nodes.Output():
                fixed = (nodes.TemplateData, nodes.Const)
                node.nodes = [
                    part if isinstance(part, fixed) else _environment_call("emit", part) for part in node.nodes
                ]
            case nodes.Concat():
                return _environment_call("concat_bounded", *node.nodes)
        return node


def _environment_call(name: str, *arguments: nodes.Expr) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(name), list(arguments), [], None, None)


def raise_exception(message: object) -> NoReturn:
    raise TemplateRaisedError(str(message))


def to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """jinja2's own filter escapes HTML characters, which a model must not see."""
    if isinstance(indent, int) and indent > 16:
        raise SecurityError("the chat template indents too far")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a chat template cannot store the name {name!r} on a namespace")


def _check_chars(count: int) -> None:
    if count > MAX_VALUE_CHARS:
        raise SecurityError(f"the chat template makes a value of more than {MAX_VALUE_CHARS:,} characters")


def _check_arguments(args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    for value in (*args, *kwargs.values()):
        if isinstance(value, int) and abs(value) > MAX_INTEGER:
            raise SecurityError(f"the chat template calls something with a number above {MAX_INTEGER:,}")


def _check_method(function: Any, args: Sequence[Any]) -> None:
    function = getattr(function, "__wrapped__", function)  # jinja2 wraps `str.format` in its own
    owner, name = getattr(function, "__self__", None), getattr(function, "__name__", "")
    if not isinstance(owner, str):
        return
    if name in ("replace", "join"):
        _check_growth(owner, args)
    elif name in ("format", "format_map") and WIDE_FORMAT.search(owner):
        raise SecurityError(TOO_WIDE)


def _check_growth(text: str, args: Sequence[Any]) -> None:
    """`str.replace` and `str.join` multiply lengths; everything else adds them."""
    if len(args) == 1 and isinstance(args[0], (list, tuple)):
        _check_chars(len(text) * len(args[0]) + sum(_length(part) for part in args[0]))
    elif len(args) >= 2 and isinstance(args[0], str) and isinstance(args[1], str):
        _check_chars(len(text) + text.count(args[0]) * len(args[1]))


def _is_small(value: Any) -> bool:
    return not isinstance(value, int) or abs(value) <= MAX_INTEGER


def _length(value: Any) -> int:
    return len(value) if isinstance(value, (str, list, tuple)) else 0


def _bounded_filter(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def bounded(*args: Any, **kwargs: Any) -> Any:
        if (left := _budget.get(None)) is not None:  # none while constants are folded
            left.spend(0)
        _check_arguments(args[1:], kwargs)
        if function.__name__ == "do_format" and WIDE_FORMAT.search(str(args[0])):
            raise SecurityError(TOO_WIDE)
        result = function(*args, **kwargs)
        if isinstance(result, str):
            _check_chars(len(result))
        return result

    return bounded


def _bounded_join(join: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(join)
    def bounded(context: Any, value: Any, d: str = "", attribute: str | int | None = None) -> Any:
        parts = list(value)
        _check_chars(len(parts) * len(str(d)) + sum(_length(part) for part in parts))
        return join(context, parts, d, attribute)

    return bounded


def _replace(text: object, old: str, new: str, count: int = -1) -> str:
    source = str(text)
    _check_growth(source, (str(old), str(new)))
    return source.replace(str(old), str(new), -1 if count is None else count)
