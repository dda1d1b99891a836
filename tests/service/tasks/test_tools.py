"""Tool calls: what the grammar lets through, and what is read back from it, however it is cut."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from llguidance import LLMatcher, LLTokenizer, grammar_from

from service.tasks.call_grammars import CallGrammar
from service.tasks.call_readers import CallPiece
from service.tasks.grammars import MAX_GRAMMAR_CHARS
from service.tasks.tool_calls import Reading, ToolCallParser
from service.tasks.tools import HERMES, LLAMA3, MISTRAL, MISTRAL_11, QWEN3_CODER, ToolFormat, format_of

CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
FUNCTIONS: list[dict[str, Any]] = [{"name": "weather", "parameters": CITY}, {"name": "now"}]
SET = {
    "name": "set",
    "parameters": {
        "$defs": {"List": {"type": "array"}},
        "properties": {
            "n": {"type": "integer"},
            "on": {"type": "boolean"},
            "s": {"type": "string"},
            "m": {"anyOf": [{"type": "string"}, {"type": "null"}]},
            "list": {"$ref": "#/$defs/List"},
        },
    },
}
FORMATS = pytest.mark.parametrize(
    "format", [HERMES, LLAMA3, MISTRAL, MISTRAL_11, QWEN3_CODER], ids=lambda format: format.name
)
REPLIES = {
    HERMES: [
        "plain text",
        "\n\n a < b <tool and </tool_call> \n",
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Pa}\\"ris"}}\n</tool_call>',
        'Let me see. \n<tool_call>{"name": "now", "arguments": {}}</tool_call>\n'
        '<tool_call>{"arguments": {"city": "x", "b": [1, {"c": 2}]}, "name": "weather"}</tool_call>\n',
        '<tool_call>{"name": "weather", "arguments": {"city": "cut o',
        '<tool_call>{"name": "weather", "arguments": {"city": "one brace short"}</tool_call>after',
        '<tool_call>{"name": "weather", "arguments": "{\\"city\\": 1}"}</tool_call>',
        "<tool_call>not json</tool_call>",
        '<tool_call>{"noname": 1}</tool_call> more',
        '<tool_call>{"na',
        "text <tool_ca",
        '<tool_call>{"name": "a\\q", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "\\ud83d", "arguments": {"a": {}}} ',
        '<tool_call>{"arguments": {"city": "\\ud83d", "b": "\\u00e9"}, "name": "weather"}</tool_call>',
        '<tool_call>{"arguments": "\\ud83d", "name": "weather"}</tool_call>',
        '<tool_call>{"arguments": {"n": 1e999}, "name": "weather"}</tool_call>',
    ],
    LLAMA3: [
        "plain text {}",
        '{"name": "weather", "parameters": {"city": "Paris"}}',
        '<|python_tag|>{"name": "now", "parameters": {}}; {"name": "weather", "parameters": {"city": "b"}}',
        '{"name": "now", "parameters": {}}\n{"name": "now", "parameters": {}}',
        '{"just": "json"}',
        '{"name": "cut", "para',
        ' \n{"type": "function", "name": "now", "parameters": {}}',
        "",
        "<|python",
        '{"name": "now", "parameters": {}}; ',
    ],
    MISTRAL: [
        "plain [text]",
        '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "[]"}}, {"name": "now", "arguments": {}}]',
        '[TOOL_CALLS][{"name": "now", "arguments": {}, "id": "abcdefghi"}]',
        '{"name": "now", "arguments": {}}',
        "[TOOL_",
        "[TOOL_CALLS] none",
    ],
    MISTRAL_11: [
        "plain [text] [ARGS]{}",
        '[TOOL_CALLS]weather[ARGS]{"city": "[TOOL_CALLS]}"}[TOOL_CALLS]now[ARGS]{}',
        'Let me see.\n[TOOL_CALLS]now[CALL_ID]abcdefghi[ARGS]{"a": [{}]} \n more',
        '[TOOL_CALLS]weather {"city": "x"}',
        '[TOOL_CALLS]weather[ARGS]{"city": "cut o',
        "[TOOL_CALLS]weath",
        "text [TOOL_",
        "[TOOL_CALLS]  no tool",
        "[TOOL_CALLS]weather[ARGS]none[TOOL_CALLS]now[ARGS]{}",
    ],
    QWEN3_CODER: [
        "plain < text <function=f>",
        '<tool_call>\n<function=weather>\n<parameter=city>\nZü"rich\n</parameter>\n</function>\n</tool_call>',
        "So: <tool_call><function=set><parameter=n>5</parameter><parameter=on>True</parameter>"
        "<parameter=s>5</parameter><parameter=m>\nnull\n</parameter></function></tool_call>\n"
        "<tool_call>\n<function=now>\n</function>\n</tool_call>",
        "<tool_call><function=set><parameter=s>\n<a>\n</b>\n\n</parameter><parameter=list>[1, {'a': None}]</parameter>"
        '<parameter=other>{"a": 1}</parameter></function></tool_call>',
        "<tool_call><function=set><parameter=n>five</parameter><parameter=m>5</parameter></tool_call> after",
        "<tool_call><function=set><parameter=s>cut o",
        "<tool_call><function=se",
        '<tool_call>{"name": "now", "arguments": {}}</tool_call>',
        "<tool_call><function=set><parameter=s></parameter></function>",
    ],
}
CASES = [
    pytest.param(format, reply, id=f"{format.name}-{n}")
    for format in REPLIES
    for n, reply in enumerate(REPLIES[format])
]


def read(format: ToolFormat, pieces: list[str], **options: Any) -> tuple[str, list[tuple[str, str]]]:
    """The content, and name and arguments of each call, as a client puts them together."""
    parser = ToolCallParser(format, functions=[*FUNCTIONS, SET], **options)
    whole: Reading = [part for piece in pieces for part in parser.feed(piece)] + parser.finish()
    calls: list[list[str]] = []
    for piece in calls_of(whole):
        if piece.id is not None:
            assert piece.index == len(calls)
            assert piece.name is not None
            calls.append([piece.name, ""])
        calls[piece.index][1] += piece.arguments
    content = "".join(part for part in whole if isinstance(part, str))
    return content, [(name, arguments) for name, arguments in calls]


def calls_of(reading: Reading) -> list[CallPiece]:
    return [part for part in reading if isinstance(part, CallPiece)]


@pytest.mark.parametrize(("format", "reply"), CASES)
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_what_is_read_does_not_depend_on_how_the_reply_is_cut(
    format: ToolFormat, reply: str, data: st.DataObject
) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(reply)), max_size=12)))
    pieces = [reply[a:b] for a, b in zip([0, *cuts], [*cuts, len(reply)], strict=True)]
    assert read(format, pieces) == read(format, [reply])
    assert read(format, list(reply)) == read(format, [reply])


@pytest.mark.parametrize(
    ("format", "number", "content", "calls"),
    [
        (HERMES, 0, "plain text", []),
        (HERMES, 1, REPLIES[HERMES][1], []),
        (HERMES, 2, "", [("weather", '{"city": "Pa}\\"ris"}')]),
        (HERMES, 3, "Let me see.", [("now", "{}"), ("weather", '{"city": "x", "b": [1, {"c": 2}]}')]),
        (HERMES, 4, "", [("weather", '{"city": "cut o')]),
        (HERMES, 5, "after", [("weather", '{"city": "one brace short"}')]),
        (HERMES, 6, "", [("weather", '{"city": 1}')]),
        (HERMES, 7, REPLIES[HERMES][7], []),
        (HERMES, 8, REPLIES[HERMES][8], []),
        (HERMES, 9, REPLIES[HERMES][9], []),
        (HERMES, 10, "text <tool_ca", []),
        (HERMES, 11, REPLIES[HERMES][11], []),
        (HERMES, 12, REPLIES[HERMES][12], []),
        (HERMES, 13, "", [("weather", '{"city": "\\ud83d", "b": "\\u00e9"}')]),
        (HERMES, 14, REPLIES[HERMES][14], []),
        (HERMES, 15, REPLIES[HERMES][15], []),
        (LLAMA3, 0, "plain text {}", []),
        (LLAMA3, 1, "", [("weather", '{"city": "Paris"}')]),
        (LLAMA3, 2, "", [("now", "{}"), ("weather", '{"city": "b"}')]),
        (LLAMA3, 3, "", [("now", "{}"), ("now", "{}")]),
        (LLAMA3, 4, '{"just": "json"}', []),
        (LLAMA3, 5, '{"name": "cut", "para', []),
        (LLAMA3, 6, "", [("now", "{}")]),
        (LLAMA3, 7, "", []),
        (LLAMA3, 8, "<|python", []),
        (LLAMA3, 9, "", [("now", "{}")]),
        (MISTRAL, 0, "plain [text]", []),
        (MISTRAL, 1, "", [("weather", '{"city": "[]"}'), ("now", "{}")]),
        (MISTRAL, 2, "", [("now", "{}")]),
        (MISTRAL, 3, '{"name": "now", "arguments": {}}', []),
        (MISTRAL, 4, "[TOOL_", []),
        (MISTRAL, 5, "[TOOL_CALLS] none", []),
        (MISTRAL_11, 0, REPLIES[MISTRAL_11][0], []),
        (MISTRAL_11, 1, "", [("weather", '{"city": "[TOOL_CALLS]}"}'), ("now", "{}")]),
        (MISTRAL_11, 2, "Let me see.more", [("now", '{"a": [{}]}')]),
        (MISTRAL_11, 3, "", [("weather", '{"city": "x"}')]),
        (MISTRAL_11, 4, "", [("weather", '{"city": "cut o')]),
        (MISTRAL_11, 5, "[TOOL_CALLS]weath", []),
        (MISTRAL_11, 6, "text [TOOL_", []),
        (MISTRAL_11, 7, "[TOOL_CALLS]  no tool", []),
        (MISTRAL_11, 8, "[TOOL_CALLS]weather[ARGS]none", [("now", "{}")]),
        (QWEN3_CODER, 0, REPLIES[QWEN3_CODER][0], []),
        (QWEN3_CODER, 1, "", [("weather", '{"city": "Zü\\"rich"}')]),
        (QWEN3_CODER, 2, "So:", [("set", '{"n": 5, "on": true, "s": "5", "m": null}'), ("now", "{}")]),
        (QWEN3_CODER, 3, "", [("set", '{"s": "<a>\\n</b>\\n", "list": [1, {"a": null}], "other": {"a": 1}}')]),
        (QWEN3_CODER, 4, " after", [("set", '{"n": "five", "m": "5"}')]),
        (QWEN3_CODER, 5, "", [("set", '{"s": "cut o')]),
        (QWEN3_CODER, 6, "<tool_call><function=se", []),
        (QWEN3_CODER, 7, REPLIES[QWEN3_CODER][7], []),
        (QWEN3_CODER, 8, "", [("set", '{"s": ""}')]),
    ],
)
def test_calls_and_content_are_told_apart(
    format: ToolFormat, number: int, content: str, calls: list[tuple[str, str]]
) -> None:
    assert read(format, [REPLIES[format][number]]) == (content, calls)


def test_arguments_go_out_while_they_are_written() -> None:
    parser = ToolCallParser(HERMES)
    texts = ('<tool_call>\n{"name": "weather", ', '"arguments": {"ci', 'ty": "Pa', 'ris"}', "}\n</tool_call>")
    pieces = [[(piece.name, piece.arguments) for piece in calls_of(parser.feed(text))] for text in texts]
    assert pieces == [[], [("weather", ""), (None, '{"ci')], [(None, 'ty": "Pa')], [(None, 'ris"}')], []]


@pytest.mark.parametrize("arguments", ["[" * 200_000, '{"a":' * 200_000, "[" * 200_000 + "]" * 200_000])
def test_what_is_nested_too_deep_to_be_read_is_content(arguments: str) -> None:
    """It raised RecursionError."""
    reply = f'<tool_call>{{"arguments": {arguments}, "name": "weather"}}'
    assert read(HERMES, [reply]) == (reply, [])


def test_a_value_between_tags_can_be_written_whatever_it_says() -> None:
    """Half of a surrogate pair went on as it was, and could not be written as UTF-8."""
    reply = '<tool_call><function=set><parameter=list>["\\ud83d"]</parameter></function></tool_call>'
    assert read(QWEN3_CODER, [reply]) == ("", [("set", '{"list": ["\\ud83d"]}')])


def test_further_calls_are_dropped_where_only_one_is_allowed() -> None:
    content, calls = read(HERMES, [REPLIES[HERMES][3]], max_calls=1)
    assert (content, calls) == ("Let me see.", [("now", "{}")])


def accepts(grammar: str, text: str) -> bool:
    """Whether the whole text is in the grammar; one byte per token will do for that."""
    tokens = [bytes([byte]) for byte in range(256)] + [b"<eos>"]
    tokenizer = _byte_tokenizer(tokens)
    matcher = LLMatcher(tokenizer, grammar_from("lark", grammar))
    assert not matcher.is_error(), matcher.get_error()
    return matcher.try_consume_tokens(list(text.encode())) == len(text.encode()) and matcher.is_accepting()


def _byte_tokenizer(tokens: list[bytes]) -> LLTokenizer:
    from llguidance import TokenizerWrapper

    class Bytes:
        eos_token_id = 256
        bos_token_id = None
        special_token_ids = (256,)

        def __init__(self) -> None:
            self.tokens = tokens

        def __call__(self, text: bytes | str) -> list[int]:
            return list(text if isinstance(text, bytes) else text.encode())

    return LLTokenizer(TokenizerWrapper(Bytes()))


WEATHER = {"name": "weather", "X": {"city": "Paris"}}
NOW: dict[str, Any] = {"name": "now", "X": {}}


def parameters(arguments: dict[str, Any] | None) -> str:
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in (arguments or {}).items()}
    return "".join(f"<parameter={key}>\n{text}\n</parameter>\n" for key, text in texts.items())


def wrong(format: ToolFormat) -> dict[str, Any]:
    """Arguments that do not fit; as text between tags a number is a string, too."""
    return {"town": "x"} if format is QWEN3_CODER else {"city": 5}


def written(format: ToolFormat, *calls: dict[str, Any]) -> str:
    texts = [json.dumps(call).replace('"X"', f'"{format.arguments_key}"') for call in calls]
    if format is LLAMA3:
        return "; ".join(texts)
    if format is MISTRAL:
        return f"[TOOL_CALLS] [{', '.join(texts)}]"
    if format is MISTRAL_11:
        return "".join(f"[TOOL_CALLS]{call['name']}[ARGS]{json.dumps(call.get('X'))}" for call in calls)
    if format is QWEN3_CODER:
        texts = [f"<function={call['name']}>\n{parameters(call.get('X'))}</function>" for call in calls]
    return "\n".join(f"<tool_call>\n{text}\n</tool_call>" for text in texts)


@FORMATS
def test_the_grammar_lets_through_calls_of_the_chosen_tools_alone(format: ToolFormat) -> None:
    both = CallGrammar(format=format, functions=FUNCTIONS).required()
    assert accepts(both, written(format, WEATHER))
    assert accepts(both, written(format, NOW, WEATHER, NOW))
    assert not accepts(both, "text")
    assert not accepts(both, written(format, {"name": "other", "X": {}}))
    assert not accepts(both, written(format, {"name": "weather", "X": wrong(format)}))
    assert not accepts(both, written(format, {"name": "weather"}))
    one = CallGrammar(format=format, functions=FUNCTIONS[1:], parallel=False).required()
    assert accepts(one, written(format, NOW))
    assert not accepts(one, written(format, WEATHER))
    assert not accepts(one, written(format, NOW, NOW))


@FORMATS
def test_what_the_grammar_lets_through_is_read_back(format: ToolFormat) -> None:
    _, calls = read(format, list(written(format, NOW, WEATHER)))
    assert [(name, json.loads(arguments)) for name, arguments in calls] == [("now", {}), ("weather", {"city": "Paris"})]


def test_markers_that_are_tokens_are_named_by_their_ids() -> None:
    ids = {"<tool_call>": 7, "</tool_call>": 8}
    grammar = CallGrammar(format=HERMES, functions=FUNCTIONS, token_ids=ids)
    assert 'marked: <[7]> "\\n" call "\\n" <[8]>' in grammar.required()
    assert "opening: BEFORE <[7]>" in grammar.or_text()
    for text in (grammar.required(), grammar.or_text()):
        assert LLMatcher.validate_grammar(grammar_from("lark", text)) == ""


@FORMATS
def test_references_within_a_tool_s_schema_are_found(format: ToolFormat) -> None:
    """As pydantic writes nested models: they were looked for at the root of the whole call."""
    schema = {"$defs": {"City": CITY}, "properties": {"where": {"$ref": "#/$defs/City"}}, "required": ["where"]}
    functions = [{"name": "weather", "parameters": schema}, {"name": "sun", "parameters": schema}]
    grammar = CallGrammar(format=format, functions=functions).required()
    assert accepts(grammar, written(format, {"name": "sun", "X": {"where": {"city": "Bern"}}}))
    assert not accepts(grammar, written(format, {"name": "sun", "X": {"where": {"town": "Bern"}}}))


@FORMATS
def test_a_strict_tool_is_called_by_its_schema_or_not_at_all(format: ToolFormat) -> None:
    """Also where the model is free to call: that is what strict promises."""
    functions = [{**FUNCTIONS[0], "strict": True}, FUNCTIONS[1]]
    grammar = CallGrammar(format=format, functions=functions)
    assert grammar.is_strict
    free = grammar.or_text()
    for text in ("", "plain\ntext 😀 <b>", " \n[x]", written(format, WEATHER), written(format, NOW, WEATHER)):
        assert accepts(free, text)
    assert accepts(free, written(format, {"name": "now", "X": {"anything": [1]}}))
    assert not accepts(free, written(format, {"name": "weather", "X": wrong(format)}))
    assert not accepts(free, written(format, {"name": "other", "X": {}}))
    if not format.bare:
        assert accepts(free, "Let me see. " + written(format, NOW, WEATHER) + " Done.")
        assert not accepts(free, "Let me see. " + written(format, NOW, {"name": "weather", "X": {}}))


def test_mistral_may_write_an_id_of_its_own() -> None:
    grammar = CallGrammar(format=MISTRAL_11, functions=FUNCTIONS, token_ids={"[ARGS]": 9})
    assert "<[9]>" in grammar.required()
    grammar = CallGrammar(format=MISTRAL_11, functions=FUNCTIONS)
    assert accepts(grammar.required(), "[TOOL_CALLS]now[CALL_ID]abcdefgh9[ARGS]{}")


@FORMATS
def test_a_reply_in_a_format_may_still_call(format: ToolFormat) -> None:
    schema = {"$defs": {"N": {"type": "integer"}}, "type": "object", "properties": {"n": {"$ref": "#/$defs/N"}}}
    grammar = CallGrammar(format=format, functions=FUNCTIONS).or_json({**schema, "required": ["n"]})
    assert accepts(grammar, '{\n  "n": 5\n}')
    assert accepts(grammar, written(format, NOW, WEATHER))
    for text in ('{"n": "x"}', "text", written(format, {"name": "weather", "X": wrong(format)})):
        assert not accepts(grammar, text)


XML_CASES: list[tuple[dict[str, Any], list[str], list[str]]] = [
    ({"type": "integer"}, ["5", "-1"], ["five", "5.5", ""]),
    ({"type": "boolean"}, ["true", "false"], ["True", "yes"]),
    ({"type": "string"}, ["", "a\n<b>", "5"], []),
    ({"enum": ["a/b", "c", 5]}, ["a/b", "5"], ["a", "6"]),
    ({"const": "x.y"}, ["x.y"], ["xzy"]),
    ({"type": "string", "pattern": "^a/b+$"}, ["a/bb"], ["a/b!", "xa/b"]),
    ({"type": "string", "pattern": "b{2}"}, ["abba"], ["aba"]),
    ({"type": "string", "minLength": 2, "maxLength": 3}, ["é\n", "abc"], ["a", "abcd"]),
    ({"type": ["integer", "null"]}, ["1", "null"], ["x"]),
    (
        {"anyOf": [{"$ref": "#/$defs/N"}, {"type": "array", "items": {"type": "integer"}}]},
        ["3", "[1, 2]"],
        ["9", "[x]"],
    ),
    ({"allOf": [{"$ref": "#/$defs/N"}]}, ["3"], ["9", "x"]),
    ({"$ref": "#/$defs/Loop"}, ["1"], ["x"]),
    (True, ["anything"], []),  # type: ignore[list-item]
]


@pytest.mark.parametrize(("schema", "good", "bad"), XML_CASES)
def test_values_between_tags_fit_their_schemas_and_are_read_as_their_types(
    schema: dict[str, Any], good: list[str], bad: list[str]
) -> None:
    loop = {"anyOf": [{"$ref": "#/$defs/Loop"}, {"$ref": "#/$defs/Loop"}, {"type": "integer"}]}
    parameters = {
        "$defs": {"N": {"type": "integer", "maximum": 5}, "Loop": loop},
        "properties": {"x": schema, "y": {"type": "string"}},
        "required": ["x"],
    }
    functions = [{"name": "f", "parameters": parameters}]
    grammar = CallGrammar(format=QWEN3_CODER, functions=functions).required()
    for texts, fits in ((good, True), (bad, False)):
        for text in texts:
            reply = written(QWEN3_CODER, {"name": "f", "X": {"x": text, "y": "z"}})
            assert accepts(grammar, reply) is fits, text
            if not fits:
                continue
            pieces = calls_of(ToolCallParser(QWEN3_CODER, functions=functions).feed(reply))
            arguments = json.loads("".join(piece.arguments for piece in pieces))
            assert arguments["y"] == "z"
            assert typed_as(arguments["x"], schema, parameters)
            assert arguments["x"] == text or json.dumps(arguments["x"]) == text


def typed_as(value: Any, schema: Any, parameters: dict[str, Any]) -> bool:
    whole = schema if isinstance(schema, bool) else {**schema, "$defs": parameters["$defs"]}
    return "Loop" in str(schema) or Draft202012Validator(whole).is_valid(value)


@pytest.mark.parametrize(
    "parameters",
    [
        {"properties": 5, "required": 5},
        {"properties": {"x": 5}, "required": [5, "x", "y"]},
        {"properties": {"x": {"type": {"a": []}}}},
        {"properties": {"x": {"anyOf": 5, "enum": 5, "type": [5, []]}}},
        {"properties": {"x": {"$ref": "#/$defs/x/y"}}, "$defs": 5},
    ],
)
def test_what_is_no_schema_breaks_nothing(parameters: Any) -> None:
    functions = [{"name": "f", "parameters": parameters}]
    assert CallGrammar(format=QWEN3_CODER, functions=functions).required()
    parser = ToolCallParser(QWEN3_CODER, functions=functions)
    reply = "<tool_call><function=f><parameter=x>[1]</parameter></function></tool_call>"
    assert "".join(piece.arguments for piece in calls_of(parser.feed(reply))) == '{"x": [1]}'


def test_definitions_that_many_parameters_refer_to_are_not_repeated_without_end() -> None:
    properties = {f"p{n}": {"type": "array", "items": {"$ref": "#/$defs/D"}} for n in range(5000)}
    parameters = {"$defs": {"D": {"enum": ["x" * 50_000]}}, "properties": properties}
    grammar = CallGrammar(format=QWEN3_CODER, functions=[{"name": "f", "parameters": parameters}]).required()
    assert MAX_GRAMMAR_CHARS < len(grammar) < 3 * MAX_GRAMMAR_CHARS


def test_strings_between_tags_go_out_while_they_are_written() -> None:
    parser = ToolCallParser(QWEN3_CODER, functions=FUNCTIONS)
    texts = ("<tool_call>\n<function=weather>\n<parameter=city>", "\nPa", "ris\n</para", "meter>\n</function>")
    pieces = [[piece.arguments for piece in calls_of(parser.feed(text))] for text in texts]
    assert pieces == [["", "{"], ['"city": "Pa'], ["ris"], ['"}']]


@pytest.mark.parametrize("format", [MISTRAL, MISTRAL_11], ids=lambda format: format.name)
def test_mistral_s_ids_are_as_its_templates_want_them(format: ToolFormat) -> None:
    pieces = calls_of(ToolCallParser(format).feed(REPLIES[format][1]))
    assert all(len(piece.id) == 9 and piece.id.isalnum() for piece in pieces if piece.id is not None)


@pytest.mark.parametrize(
    ("source", "format"),
    [
        ("... <tool_call> ...", HERMES),
        ("<|python_tag|>", LLAMA3),
        ("nothing", HERMES),
        ("ipython", LLAMA3),
        ("[TOOL_CALLS]", MISTRAL),
        ("'[TOOL_CALLS]' + name + '[ARGS]' + arguments", MISTRAL_11),
        ("<tool_call>\n<function=example>\n<parameter=key>", QWEN3_CODER),
    ],
)
def test_the_template_says_which_format_it_asks_for(source: str, format: ToolFormat) -> None:
    assert format_of(source) is format
