"""Tokens to text for one choice: however the worker's outputs are cut, and in each kind of vocabulary."""

from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.batch import SamplingParams, TokenLogprobs
from model.tokenizer import Tokenizer
from service.engine.protocol import TokenOutput
from service.tasks.generation import Choice, Delta, Prompt

DATA = Path(__file__).resolve().parents[3].parent / "shared" / "data"
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="the data folder ../shared/data is not here")
LOADED: dict[str, Tokenizer] = {}
EOS = {"stories260K-hf": 2, "tokenizers/gpt2": 50256}


def load(name: str) -> Tokenizer:
    if name not in LOADED:
        LOADED[name] = Tokenizer.load(DATA / name)
    return LOADED[name]


class Stream:
    """Outputs as they would come from the engine; remembers how it was ended."""

    def __init__(self, outputs: list[TokenOutput]) -> None:
        self.outputs, self.outcome = outputs, ""
        self.timings: Any = SimpleNamespace()

    async def __aiter__(self) -> AsyncIterator[TokenOutput]:
        for output in self.outputs:
            yield output

    def cancel(self, outcome: str = "cancelled") -> None:
        self.outcome = outcome


async def run(
    name: str, ids: list[int], sizes: list[int], *, reason: str = "length", logprobs: bool = False, **options: Any
) -> tuple[list[Delta], Choice]:
    """A choice fed with `ids` in outputs of these sizes; the reason comes with the last id, as the worker gives it."""
    sampling = SamplingParams(max_tokens=999, stop_ids=(EOS[name],), min_tokens=options.pop("min_tokens", 0))
    outputs, rest = [], list(ids)
    for size in [*sizes, len(ids)]:
        part, rest = rest[:size], rest[size:]
        entries = [TokenLogprobs(id, -1.0) for id in part] if logprobs else []
        outputs.append(TokenOutput(request_id=1, token_ids=part, logprobs=entries))
    outputs = [output for output in outputs if output.token_ids]
    outputs[-1].finish_reason = reason  # type: ignore[assignment]
    choice = Choice(0, Prompt(ids=[1], sampling=sampling, **options), load(name), Stream(outputs))
    return [delta async for delta in choice], choice


@pytest.mark.parametrize("name", list(EOS))
@given(text=st.text("ab \n🦙é.", max_size=25), sizes=st.lists(st.integers(0, 5), max_size=8), data=st.data())
@settings(max_examples=120, deadline=None)
async def test_how_outputs_are_cut_changes_nothing(name: str, text: str, sizes: list[int], data: st.DataObject) -> None:
    ids = [*load(name).encode(text, add_special_tokens=False), EOS[name]]
    stops = tuple(data.draw(st.lists(st.sampled_from(["a b", "\n", "🦙", "é.", "bb"]), max_size=2, unique=True)))
    options: dict[str, Any] = {"stop": stops, "reason": "stop", "logprobs": data.draw(st.booleans())}
    one_by_one, single = await run(name, ids, [1] * len(ids), continues=False, **options)
    grouped, choice = await run(name, ids, sizes, continues=False, **options)
    assert "".join(delta.text for delta in grouped) == "".join(delta.text for delta in one_by_one)
    assert [token for delta in grouped for token in delta.tokens] == [t for delta in one_by_one for t in delta.tokens]
    assert [offset for delta in grouped for offset in delta.offsets] == [o for d in one_by_one for o in d.offsets]
    assert choice.num_tokens == single.num_tokens
    assert [delta.finish_reason for delta in grouped if delta.finish_reason] == ["stop"]
    whole = load(name).decode(ids)
    if not any(stop in whole for stop in stops):
        assert "".join(delta.text for delta in grouped) == whole
        assert choice.num_tokens == len(ids)


async def test_a_stop_within_held_back_bytes_ends_the_text_at_once() -> None:
    """In vocabularies with byte tokens a newline is one, and byte tokens are held until their run ends."""
    newline = load("stories260K-hf").token_id("<0x0A>")
    assert newline is not None
    ids = [*load("stories260K-hf").encode("one", add_special_tokens=False), newline, newline, 300, 301]
    deltas, choice = await run("stories260K-hf", ids, [1] * len(ids), stop=("\n",), continues=False)
    assert "".join(delta.text for delta in deltas) == "one"
    assert choice.num_tokens == len(ids) - 3
    assert deltas[-1].finish_reason == "stop"
    assert choice.stream.outcome == "stop"  # type: ignore[attr-defined]


@pytest.mark.parametrize(("continues", "text"), [(True, " one"), (False, "one")])
async def test_only_a_beginning_drops_its_leading_space(continues: bool, text: str) -> None:
    ids = load("stories260K-hf").encode("one", add_special_tokens=False)
    deltas, _ = await run("stories260K-hf", ids, [], continues=continues)
    assert "".join(delta.text for delta in deltas) == text


async def test_offsets_say_where_each_token_begins() -> None:
    ids = load("tokenizers/gpt2").encode("a🦙b c")
    deltas, _ = await run("tokenizers/gpt2", ids, [1] * len(ids), logprobs=True, stop=("zzz",))
    offsets = [offset for delta in deltas for offset in delta.offsets]
    assert "".join(delta.text for delta in deltas) == "a🦙b c"
    assert offsets == [0, 1, 1, 1, 2, 3]


async def test_a_text_cut_in_mid_character_ends_as_its_full_decode() -> None:
    ids = load("tokenizers/gpt2").encode("a🦙")[:-1]
    deltas, _ = await run("tokenizers/gpt2", ids, [])
    assert "".join(delta.text for delta in deltas) == load("tokenizers/gpt2").decode(ids)
