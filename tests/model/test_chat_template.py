"""Chat templates against transformers' own rendering, and against templates that mean harm."""

import functools
import json
import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from model.chat_template import ChatTemplate, ChatTemplateError
from model.errors import CheckpointError

TEMPLATES = Path(__file__).parent / "chat_templates"
DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
NAMES = sorted(path.stem for path in TEMPLATES.glob("*.jinja"))
WITH_TOOLS = ["llama-3.1", "qwen2.5", "qwen3", "mistral-7b-v0.3"]

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": 'The weather in a city, "now" <b>&</b> – día',
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "days": {"type": "integer", "default": 1}},
                "required": ["city"],
            },
        },
    },
    {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}},
]


def call(name: str, arguments: Any, id: str = "abcdefghi") -> dict[str, Any]:
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


CHATS: dict[str, list[dict[str, Any]]] = {
    "one turn": [{"role": "user", "content": "Hello, who are you?"}],
    "system": [{"role": "system", "content": " Be <b>brief</b> & 'kind'. "}, {"role": "user", "content": "你好 🦙\n"}],
    "turns": [
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": " 2 ", "tool_calls": None},
        {"role": "user", "content": "2 + 2?"},
    ],
    "ends with assistant": [
        {"role": "user", "content": "Tell me a story"},
        {"role": "assistant", "content": "<think>\nhmm\n</think>\n\nOnce upon a time "},
    ],
    "reasoning": [
        {"role": "user", "content": "1?"},
        {"role": "assistant", "content": "2.", "reasoning": "one and one"},
        {"role": "user", "content": "2?"},
    ],
    "wrong order": [{"role": "assistant", "content": "I"}, {"role": "assistant", "content": "You"}],
    "tool turns": [
        {"role": "system", "content": "Use tools."},
        {"role": "user", "content": "Weather in Paris?"},
        {"role": "assistant", "content": None, "tool_calls": [call("get_weather", {"city": "Paris", "days": 2})]},
        {"role": "tool", "content": "18 °C", "tool_call_id": "abcdefghi"},
    ],
}


@functools.cache
def reference() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(DATA / "stories260K-hf")


def both(template: str, chat: list[dict[str, Any]], **options: Any) -> tuple[str | None, str | None]:
    """Our rendering and transformers'; None where it was refused."""
    try:
        expected = reference().apply_chat_template(chat, chat_template=template, tokenize=False, **options)
    except Exception:
        expected = None
    variables = {key: options.pop(key) for key in ("enable_thinking", "date_string") if key in options}
    options.setdefault("add_generation_prompt", False)
    try:
        found = ChatTemplate(template, SPECIAL).render(chat, **options, variables=variables)
    except ChatTemplateError:
        found = None
    return found, expected


@pytest.mark.skipif(not DATA.is_dir(), reason="the data folder ../shared/data is not here")
@pytest.mark.parametrize("chat", list(CHATS))
@pytest.mark.parametrize("name", NAMES)
def test_rendering_equals_that_of_transformers(name: str, chat: str) -> None:
    template = (TEMPLATES / f"{name}.jinja").read_text()
    some_rendered = False
    for options in (
        {},
        {"add_generation_prompt": True},
        {"tools": TOOLS, "add_generation_prompt": True},
        {"continue_final_message": True},
        {"enable_thinking": False, "date_string": "1 Jan 2030", "add_generation_prompt": True},
    ):
        found, expected = both(template, CHATS[chat], **options)
        assert found == expected
        some_rendered |= found is not None
    # Some templates refuse some chats; each renders the plain ones.
    assert some_rendered or chat not in ("one turn", "turns")


@pytest.mark.parametrize("name", NAMES)
def test_a_template_says_whether_it_knows_tools(name: str) -> None:
    assert ChatTemplate((TEMPLATES / f"{name}.jinja").read_text()).supports_tools == (name in WITH_TOOLS)


def test_a_refusal_of_the_template_is_its_own_message() -> None:
    template = ChatTemplate((TEMPLATES / "gemma-2.jinja").read_text(), SPECIAL)
    with pytest.raises(ChatTemplateError, match=r"^System role not supported$"):
        template.render([{"role": "system", "content": "x"}])


@pytest.mark.skipif(not DATA.is_dir(), reason="the data folder ../shared/data is not here")
def test_templates_are_found_in_each_place_that_transformers_looks(tmp_path: Path) -> None:
    for file in (DATA / "stories260K-hf").glob("*token*.json"):
        shutil.copy(file, tmp_path / file.name)
        (tmp_path / file.name).chmod(0o644)
    chat = [{"role": "user", "content": "x"}]

    def check() -> str:
        template = ChatTemplate.load(tmp_path)
        assert template is not None
        expected = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(chat, tokenize=False)
        assert template.render(chat, add_generation_prompt=False) == expected
        return str(expected)

    assert ChatTemplate.load(tmp_path) is None
    path = tmp_path / "tokenizer_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"chat_template": "config {{ bos_token }}{{ messages[0].content }}"}))
    assert check() == "config <s>x"
    named = [{"name": "default", "template": "named"}, {"name": "tool_use", "template": "with tools {{ tools }}"}]
    path.write_text(json.dumps(config | {"chat_template": named}))
    assert check() == "named"
    template = ChatTemplate.load(tmp_path)
    assert template is not None
    assert template.supports_tools
    assert template.render(chat, tools=[{"a": 1}]) == "with tools [{'a': 1}]"
    (tmp_path / "chat_template.jinja").write_text("file {{ messages[0].content }}")
    assert check() == "file x"


def test_template_that_is_no_jinja_is_named_when_it_is_loaded() -> None:
    with pytest.raises(CheckpointError, match=r"chat template 'default' is not valid.*line 2"):
        ChatTemplate("fine\n{% for %}")


HOSTILE = {
    "endless loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "recursive macro": "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
    "doubling by ~": "{% set n = namespace(s='x') %}{% for i in range(99) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
    "doubling by +": "{% set n = namespace(s='x') %}{% for i in range(99) %}{% set n.s = n.s + n.s %}{% endfor %}",
    "repetition": "{{ 'x' * 10000000000 }}",
    "repeated repetition": "{{ ('x' * 1000000) * 1000000 }}",
    "list repetition": "{{ [0] * 1000000 * 1000000 }}",
    "power": "{{ 9 ** 9 ** 9 }}",
    "power of small": "{{ 9 ** 900000 }}",
    "width": "{{ '%1000000000d' % 1 }}",
    "width filter": "{{ '%1000000000d' | format(1) }}",
    "width method": "{{ '{:>1000000000}'.format(1) }}",
    "ljust": "{{ 'x'.ljust(1000000000) }}",
    "center": "{{ 'x' | center(1000000000) }}",
    "join": "{{ range(99999) | join('x' * 1000000) }}",
    "join method": "{{ ('x' * 1000000).join(range(99999) | map('string') | list) }}",
    "replace": "{{ ('x' * 1000000).replace('x', 'y' * 1000000) }}",
    "replace filter": "{{ ('x' * 1000000) | replace('x', 'y' * 1000000) }}",
    "output": "{% for a in range(99999) %}{{ 'x' * 1000000 }}{% endfor %}",
    "captured output": "{% set s %}{% for a in range(99999) %}{{ 'x' * 1000000 }}{% endfor %}{% endset %}",
    "captured text": "{% set s %}{% for a in range(99999) %}" + "x" * 10_000 + "{% endfor %}{% endset %}",
    "indent": "{{ messages | tojson(indent=100000) }}",
    "class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ raise_exception.__globals__ }}{{ messages.append.__self__.__class__ }}",
    "globals of the sandbox": "{{ raise_exception.__globals__['json'].loads('1') }}",
    "mutation": "{{ messages.append(1) }}",
    "private attribute": "{% set n = namespace(_x=1) %}",
    "undefined": "{{ nothing.at.all }}",
    "division": "{{ 1 / 0 }}",
    "bad type": "{{ messages + 1 }}",
}


@pytest.mark.parametrize("name", list(HOSTILE))
def test_a_hostile_template_ends_and_takes_little_memory(name: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(ChatTemplateError):
            ChatTemplate(HOSTILE[name]).render([{"role": "user", "content": "x"}], max_seconds=0.3)
        assert tracemalloc.get_traced_memory()[1] < 200_000_000
    finally:
        tracemalloc.stop()


def test_variables_cannot_replace_the_messages() -> None:
    template = ChatTemplate("{{ messages[0].content }} {{ extra }}")
    text = template.render([{"role": "user", "content": "x"}], variables={"messages": [], "extra": "y"})
    assert text == "x y"


@pytest.mark.parametrize("name", NAMES)
def test_a_template_says_whether_it_takes_a_system_message(name: str) -> None:
    assert ChatTemplate((TEMPLATES / f"{name}.jinja").read_text(), SPECIAL).takes_system == (name != "gemma-2")


def test_a_template_that_drops_system_messages_takes_none() -> None:
    source = "{% for message in messages if message.role != 'system' %}{{ message.content }}{% endfor %}"
    assert not ChatTemplate(source).takes_system
