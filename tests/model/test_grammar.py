"""Grammars: what is refused early, what the masks allow, and whole texts that obey, from a model that knows nothing."""

import json
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from jsonschema import Draft202012Validator
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import model.grammar
from model.batch import Grammar, Row, SamplingParams
from model.grammar import GrammarCompiler, Matcher
from model.grammar_check import MAX_GRAMMAR_BYTES, compiler_form, validate
from model.sampling import Masks, Sampler

EOS = 0
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


def byte_level() -> Tokenizer:
    """GPT-2's kind: every byte is a visible character; a few merges, among them one across a JSON boundary."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = ["<end>", *letters, "na", "me", "name", '":', "Ġ{", "tru", "Ã©"]
    merges = [("n", "a"), ("m", "e"), ("na", "me"), ('"', ":"), ("Ġ", "{"), ("t", "r"), ("Ã", "©")]
    pieces.append("tr")
    merges.append(("tr", "u"))
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    return tokenizer


def byte_fallback() -> Tokenizer:
    """Llama's kind: pieces with a visible space, and one token for each byte."""
    pieces = ["<end>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"{}[]:,abename0123456789", "na", "me", "name"]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys([*pieces, '"']))}
    tokenizer = Tokenizer(models.BPE(vocab, [("n", "a"), ("m", "e"), ("na", "me")], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(["<end>"])
    return tokenizer


TOKENIZERS = {"byte level": byte_level, "byte fallback": byte_fallback}


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return TOKENIZERS[request.param]()


@pytest.fixture
def make_compiler() -> Callable[..., GrammarCompiler]:
    made = []

    def make(tokenizer: Tokenizer, vocab_size: int | None = None, **more: float) -> GrammarCompiler:
        size = vocab_size or tokenizer.get_vocab_size()
        made.append(GrammarCompiler(tokenizer.to_str(), size, [EOS], **more))
        return made[-1]

    yield make
    for compiler in made:
        compiler.close()


def make_row(number: int, grammar: Grammar, output_ids: list[int] | None = None) -> Row:
    sampling = SamplingParams(max_tokens=500, temperature=1.0, seed=number, grammar=grammar)
    return Row(number, [1], 0, [0], sampling, True, output_ids or [], [1])


def allowed_ids(compiler: GrammarCompiler, row: Row, size: int) -> set[int]:
    bits = np.full(-(-size // 32), -1, np.int32)
    assert compiler.fill_mask(row, bits) is None
    return set(np.flatnonzero(np.unpackbits(bits.view(np.uint8), bitorder="little")[:size]).tolist())


def generate(compiler: GrammarCompiler, tokenizer: Tokenizer, grammar: Grammar, *, seed: int) -> str:
    """A text by random logits under the grammar, up to its end."""
    size = tokenizer.get_vocab_size()
    generator, sampler, output_ids = torch.Generator().manual_seed(seed), Sampler(size), []
    for _ in range(400):
        row = make_row(seed, grammar, output_ids)
        bits = np.full((1, -(-size // 32)), -1, np.int32)
        assert compiler.fill_mask(row, bits[0]) is None
        logits = torch.randn((1, size), generator=generator)
        (found,) = sampler.sample(logits, [row], Masks([0], bits))
        if found.token_id == EOS:
            break
        output_ids.append(found.token_id)
        matcher = compiler.matcher(seed)
        assert matcher.advance(found.token_id) is None
        if matcher.finished:
            break
    else:
        pytest.fail(f"no end: {tokenizer.decode(output_ids)!r}")
    compiler.forget(seed)
    return tokenizer.decode(output_ids)


@pytest.mark.parametrize("seed", range(4))
def test_any_logits_give_json_that_obeys_its_schema(tokenizer, make_compiler, seed):
    text = generate(make_compiler(tokenizer), tokenizer, Grammar("json_schema", json.dumps(SCHEMA)), seed=seed)
    Draft202012Validator(SCHEMA).validate(json.loads(text))


def test_any_logits_give_a_json_object(tokenizer, make_compiler):
    compiler = make_compiler(tokenizer)
    assert isinstance(json.loads(generate(compiler, tokenizer, Grammar("json_object"), seed=3)), dict)


@pytest.mark.parametrize("pattern", ["(yes|no)", r"[0-9]{3}-[a-f]{2}", r"a/b\\n?", "(é|ü){2,3}"])
def test_any_logits_give_what_the_expression_matches(tokenizer, make_compiler, pattern):
    compiler = make_compiler(tokenizer)
    for seed in range(5):
        assert re.fullmatch(pattern, generate(compiler, tokenizer, Grammar("regex", pattern), seed=seed))


def test_any_logits_give_what_the_lark_grammar_derives(tokenizer, make_compiler):
    grammar = Grammar("lark", 'start: "(" start ")" | "x"')
    text = generate(make_compiler(tokenizer), tokenizer, grammar, seed=1)
    assert re.fullmatch(r"\(*x\)*", text)
    assert text.count("(") == text.count(")")


def test_a_finished_grammar_says_so_and_an_open_one_does_not(tokenizer, make_compiler):
    compiler = make_compiler(tokenizer)
    ids = {piece: tokenizer.token_to_id(piece) for piece in "ab"}
    row = make_row(1, Grammar("regex", "ab*"))
    assert allowed_ids(compiler, row, tokenizer.get_vocab_size()) >= {ids["a"]}
    matcher = compiler.matcher(1)
    assert matcher.advance(ids["a"]) is None
    assert not matcher.finished
    row.output_ids = [ids["a"]]
    assert EOS in allowed_ids(compiler, row, tokenizer.get_vocab_size())
    assert matcher.advance(EOS) is None
    assert matcher.finished


def test_a_replayed_sequence_has_the_mask_it_would_have_had(tokenizer, make_compiler):
    """After a worker's death the delivered ids are given at the start; after preemption the row brings them."""
    size, grammar = tokenizer.get_vocab_size(), Grammar("regex", "(abc|bad|cab)")
    ids = [tokenizer.token_to_id(piece) for piece in "ba"]
    compiler = make_compiler(tokenizer)
    compiler.start(1, grammar, ids)
    while not compiler.any_done:
        pass
    assert compiler.done() == [(1, None)]
    expected = {tokenizer.token_to_id(piece) for piece in ("d", "<0x64>")} - {None}
    assert allowed_ids(compiler, make_row(1, grammar, ids), size) == expected
    assert allowed_ids(compiler, make_row(2, grammar, ids), size) == expected


def test_a_sequence_that_went_back_starts_over(tokenizer, make_compiler):
    """The matcher took a token, then the step failed as a whole and the sequence is computed again without it."""
    size, grammar = tokenizer.get_vocab_size(), Grammar("regex", "(ab|ba)")
    compiler = make_compiler(tokenizer)
    before = allowed_ids(compiler, make_row(1, grammar), size)
    assert compiler.matcher(1).advance(tokenizer.token_to_id("a")) is None
    assert allowed_ids(compiler, make_row(1, grammar), size) == before


def test_sequences_of_one_grammar_do_not_share_their_state(tokenizer, make_compiler):
    size, grammar = tokenizer.get_vocab_size(), Grammar("regex", "(ab|ba)")
    compiler = make_compiler(tokenizer)
    before = allowed_ids(compiler, make_row(1, grammar), size)
    allowed_ids(compiler, make_row(2, grammar, [tokenizer.token_to_id("a")]), size)
    assert allowed_ids(compiler, make_row(3, grammar), size) == before


def test_ids_past_the_tokenizers_own_are_never_allowed(tokenizer, make_compiler):
    """Embeddings are often padded beyond the vocabulary."""
    size = tokenizer.get_vocab_size() + 70
    allowed = allowed_ids(make_compiler(tokenizer, size), make_row(1, Grammar("regex", "(?s:.)+")), size)
    assert max(allowed) < tokenizer.get_vocab_size()


def test_a_tokenizer_with_more_ids_than_the_network_still_gives_masks(tokenizer, make_compiler):
    size = tokenizer.get_vocab_size() - 5
    assert allowed_ids(make_compiler(tokenizer, size), make_row(1, Grammar("regex", "[a-z]+")), size)


def test_a_forbidden_token_is_an_error_and_not_a_crash(tokenizer, make_compiler):
    compiler = make_compiler(tokenizer)
    size, grammar = tokenizer.get_vocab_size(), Grammar("regex", "ab")
    error = compiler.fill_mask(make_row(1, grammar, [tokenizer.token_to_id("b")]), np.zeros(-(-size // 32), np.int32))
    assert "cannot go on" in error


BAD = {
    "no JSON": Grammar("json_schema", "{nonsense"),
    "no schema": Grammar("json_schema", "[1, 2]"),
    "unknown type": Grammar("json_schema", '{"type": "objekt"}'),
    "a keyword that would be ignored": Grammar("json_schema", '{"type": "array", "uniqueItems": true}'),
    "a reference to elsewhere": Grammar("json_schema", '{"$ref": "http://example.com/x"}'),
    "nothing matches": Grammar("json_schema", "false"),
    "open group": Grammar("regex", "(ab"),
    "look-ahead": Grammar("regex", "(?=a)b"),
    "unknown rule": Grammar("lark", 'start: "a" b'),
    "no start": Grammar("lark", 'begin: "a"'),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_grammar_is_refused_with_a_reason_and_fails_its_own_sequence(name, tokenizer, make_compiler):
    assert validate(BAD[name])
    compiler = make_compiler(tokenizer)
    compiler.start(1, BAD[name])
    compiler.start(2, Grammar("regex", "a"))
    results = {}
    while len(results) < 2:
        results |= dict(compiler.done())
    assert results[1].startswith("does not compile: ")
    assert results[2] is None
    assert isinstance(compiler.matcher(2), Matcher)
    assert compiler.matcher(1) is None


GOOD = [
    Grammar("json_object"),
    Grammar("json_schema", json.dumps(SCHEMA)),
    Grammar("json_schema", '{"$ref": "#/$defs/a", "$defs": {"a": {"type": "array", "items": {"$ref": "#/$defs/a"}}}}'),
    Grammar("regex", "[a-z]{3,5}/x"),
    Grammar("lark", 'start: "a"+'),
]


@pytest.mark.parametrize("grammar", GOOD, ids=lambda grammar: grammar.kind)
def test_a_good_grammar_is_not_refused(grammar):
    assert validate(grammar) is None


def test_a_grammar_beyond_the_size_limit_is_refused_with_the_numbers():
    message = validate(Grammar("regex", "a" * (MAX_GRAMMAR_BYTES + 1)))
    assert f"{MAX_GRAMMAR_BYTES:,}" in message


def test_a_grammar_that_takes_too_long_fails_alone(tokenizer, make_compiler, monkeypatch):
    never = threading.Event()

    def stuck(grammar: Grammar) -> str:
        if grammar.text == "slow":
            never.wait()
        return compiler_form(grammar)

    monkeypatch.setattr(model.grammar, "compiler_form", stuck)
    compiler = make_compiler(tokenizer, timeout_seconds=0.02)
    compiler.start(1, Grammar("regex", "slow"))
    results: list[tuple[int, str | None]] = []
    while not results:
        results = compiler.done()
    assert results[0][0] == 1
    assert "took more than 0.02 seconds" in results[0][1]
    assert "took more than" in compiler.fill_mask(make_row(3, Grammar("regex", "slow")), np.zeros(1, np.int32))
    never.set()
    assert allowed_ids(make_compiler(tokenizer), make_row(2, Grammar("regex", "fast")), tokenizer.get_vocab_size())


def test_a_compiler_that_breaks_fails_one_sequence(tokenizer, make_compiler, monkeypatch):
    def broken(grammar: Grammar) -> str:
        if grammar.text == "bad":
            raise RuntimeError("panicked")
        return compiler_form(grammar)

    monkeypatch.setattr(model.grammar, "compiler_form", broken)
    compiler = make_compiler(tokenizer)
    compiler.start(1, Grammar("regex", "bad"))
    compiler.start(2, Grammar("regex", "good"))
    results = {}
    while len(results) < 2:
        results |= dict(compiler.done())
    assert "breaks the grammar compiler" in results[1]
    assert results[2] is None


def test_a_forgotten_sequence_leaves_nothing_behind(tokenizer, make_compiler):
    compiler = make_compiler(tokenizer)
    compiler.start(1, Grammar("regex", "a"))
    compiler.forget(1)
    assert compiler.done() == []
    allowed_ids(compiler, make_row(2, Grammar("regex", "a")), tokenizer.get_vocab_size())
    compiler.forget(2)
    assert compiler.matcher(2) is None


def test_grammars_reach_the_api_process_without_torch():
    root = Path(__file__).parents[2]
    code = "import sys, model.grammar_check; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
