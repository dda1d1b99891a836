"""Which translations a checkpoint offers, by the names that callers use, and how each is asked for."""

import json
from pathlib import Path
from typing import Any

import pytest

from model.languages import Direction, Languages, UnknownLanguage, match, read_languages


def read(folder: Path, model_type: str, tokens: list[str], tokenizer: dict[str, Any], **raw: Any) -> Languages:
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    vocabulary = {token: 100 + index for index, token in enumerate(tokens)}
    found = read_languages(folder, {"model_type": model_type, **raw}, vocabulary, eos_id=2)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ("fra_Latn", ["fra_Latn"]),
        ("fr", ["fra_Latn"]),
        ("fr-CA", ["fra_Latn"]),
        ("FRA-latn", ["fra_Latn"]),
        ("zh", ["zho_Hans"]),
        ("zh-TW", ["zho_Hant"]),
        ("zh-Hant", ["zho_Hant"]),
        ("cmn", ["zho_Hans"]),
        ("ar", ["arb_Arab"]),
        ("nb", ["nob_Latn"]),
        ("no", ["nob_Latn"]),
        ("lv", ["lvs_Latn"]),
        ("fa", ["pes_Arab"]),
        ("kn", []),
        ("ace", ["ace_Arab", "ace_Latn"]),
        ("ace-Latn", ["ace_Latn"]),
    ],
)
def test_callers_codes_find_the_checkpoints_own(asked: str, expected: list[str]) -> None:
    """NLLB's."""
    codes = "ace_Arab ace_Latn arb_Arab eng_Latn fra_Latn lvs_Latn nob_Latn pes_Arab zho_Hans zho_Hant".split()
    assert match(asked, codes) == expected


def test_region_codes_mean_their_script() -> None:
    assert match("zh-Hans", ["en_XX", "zh_CN"]) == ["zh_CN"]
    assert match("zh-Hant", ["en_XX", "zh_CN"]) == []
    assert match("pt-BR", ["pt_XX"]) == ["pt_XX"]


def test_nllb_has_the_source_first_and_forces_the_target(tmp_path: Path) -> None:
    found = read(tmp_path, "m2m_100", ["deu_Latn", "eng_Latn", "hello"], {"src_lang": "eng_Latn"})
    assert found.sources == ("deu_Latn", "eng_Latn")
    assert found.direction("en", "de") == Direction(
        source="eng_Latn", target="deu_Latn", before=(101,), after=(2,), forced_bos_id=100
    )
    assert found.direction(None, "de").source == "eng_Latn"


def test_old_nllb_has_the_source_last(tmp_path: Path) -> None:
    found = read(tmp_path, "m2m_100", ["deu_Latn", "eng_Latn"], {"legacy_behaviour": True})
    direction = found.direction("en", "de")
    assert (direction.before, direction.after) == ((), (2, 101))


def test_m2m100s_tokens_are_found(tmp_path: Path) -> None:
    found = read(tmp_path, "m2m_100", ["__af__", "__en__", "__zh__", "aa_BB"], {})
    assert found.targets == ("af", "en", "zh")
    assert found.direction("eng", "zh-CN").forced_bos_id == 102


def test_mbart_25_has_the_source_last_and_mbart_50_first(tmp_path: Path) -> None:
    codes = ["ar_AR", "cs_CZ", "de_DE", "en_XX", "zh_CN"]
    old = read(tmp_path, "mbart", codes, {"tokenizer_class": "MBartTokenizer"}).direction("en", "zh")
    assert (old.before, old.after, old.forced_bos_id) == ((), (2, 103), 104)
    new = read(tmp_path, "mbart", codes, {"tokenizer_class": "MBart50Tokenizer"}).direction("en", "zh")
    assert (new.before, new.after) == ((103,), (2,))


def test_marian_writes_the_target_before_the_text(tmp_path: Path) -> None:
    found = read(tmp_path, "marian", [">>fra<<", ">>por<<", ">>pt_br<<"], {"source_lang": "en"})
    assert found.direction("en", "fr").text_prefix == ">>fra<< "
    assert found.direction(None, "pt-BR").text_prefix == ">>pt_br<< "
    with pytest.raises(UnknownLanguage, match=r"no target language is given.*fra, por"):
        found.direction("en", None)
    with pytest.raises(UnknownLanguage, match="no source language 'de'"):
        found.direction("de", "fr")


def test_marian_with_one_pair_needs_no_words(tmp_path: Path) -> None:
    found = read(tmp_path, "marian", ["hello"], {"source_lang": "eng", "target_lang": "deu"})
    assert found.direction(None, None) == Direction(source="eng", target="deu")
    assert found.direction("en", "de-AT") == Direction(source="eng", target="deu")
    with pytest.raises(UnknownLanguage, match="no translation from en to fr; this checkpoint translates eng to deu"):
        found.direction("en", "fr")


@pytest.mark.parametrize(
    ("group", "asked", "fits"),
    [("ROMANCE", "fr", True), ("gmq", "nb-NO", True), ("mul", "sw", True), ("zle", "de", False), ("de", "nl", False)],
)
def test_a_group_of_languages_is_the_source_of_its_members(tmp_path: Path, group: str, asked: str, fits: bool) -> None:
    """opus-mt-ROMANCE-en refused French."""
    several = read(tmp_path, "marian", [">>eng<<", ">>por<<"], {"source_lang": group})
    one = read(tmp_path, "marian", ["hello"], {"source_lang": group, "target_lang": "en"})
    for found, prefix in ((several, ">>eng<< "), (one, "")):
        if fits:
            expected = Direction(source=group, target="eng" if prefix else "en", text_prefix=prefix)
            assert found.direction(asked, "en") == expected
        else:
            with pytest.raises(UnknownLanguage):
                found.direction(asked, "en")


def test_t5_has_the_pairs_of_its_tasks(tmp_path: Path) -> None:
    tasks: dict[str, Any] = {"summarization": {}, "translation_en_to_de": {}, "translation_en_to_fr": {}}
    found = read(tmp_path, "t5", [], {}, task_specific_params=tasks)
    assert found.pairs == (("en", "de"), ("en", "fr"))
    assert found.direction("eng", "ger").task == "translation_en_to_de"
    with pytest.raises(UnknownLanguage, match="several translations fit from en to any language"):
        found.direction("en", None)


def test_what_is_ambiguous_or_unknown_is_listed(tmp_path: Path) -> None:
    found = read(tmp_path, "m2m_100", ["ace_Arab", "ace_Latn", "eng_Latn"], {})
    with pytest.raises(UnknownLanguage, match="'ace' may mean ace_Arab, ace_Latn"):
        found.direction("en", "ace")
    with pytest.raises(UnknownLanguage, match="no source language 'tlh'; this checkpoint has ace_Arab"):
        found.direction("tlh", "en")


def test_a_summarizer_has_no_languages(tmp_path: Path) -> None:
    assert read_languages(tmp_path, {"model_type": "bart"}, {"de_DE": 1}, eos_id=2) is None
