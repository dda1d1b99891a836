"""Where sentences end, and that a text is all there in its sentences."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.tasks.sentences import split_sentences

CASES = [
    ["One. Two! Three?", "One.", "Two!", "Three?"],
    ["It is 3.14 or 2,000.5 metres long. Fine.", "It is 3.14 or 2,000.5 metres long.", "Fine."],
    ["Mr. Smith met Dr. No. They left.", "Mr. Smith met Dr. No.", "They left."],
    ["J. R. R. Tolkien wrote it. He smoked.", "J. R. R. Tolkien wrote it.", "He smoked."],
    ["See Fig. 3 and p. 12. No. 5 is best.", "See Fig. 3 and p. 12.", "No. 5 is best."],
    ["I said no. Then I left.", "I said no.", "Then I left."],
    ["Apples, pears, etc. are fruit.", "Apples, pears, etc. are fruit."],
    ["They sell apples etc. The shop is old.", "They sell apples etc.", "The shop is old."],
    ["The U.S. Army came. It left.", "The U.S. Army came.", "It left."],
    ["He lives in the U.S. She does not.", "He lives in the U.S.", "She does not."],
    ["At 5 p.m. Monday we met, e.g. Anna and I.", "At 5 p.m. Monday we met, e.g. Anna and I."],
    ['"Why?" he asked. "Because."', '"Why?" he asked.', '"Because."'],
    ["He said “Go.” She went.", "He said “Go.”", "She went."],
    ["(It rained.) We stayed.", "(It rained.)", "We stayed."],
    ["Wait... what? Oh... Yes.", "Wait... what?", "Oh...", "Yes."],
    ["Visit www.example.com/a.b?c=d today. Now.", "Visit www.example.com/a.b?c=d today.", "Now."],
    ["今天天气好。我们走吧！好吗？", "今天天气好。", "我们走吧！", "好吗？"],
    ["「行く。」と彼は言った。「そう。」彼女は笑った。", "「行く。」と彼は言った。", "「そう。」", "彼女は笑った。"],
    ["他说：“好。”然后走了。", "他说：“好。”", "然后走了。"],
    ["A title\n\nA text that\nis wrapped. End", "A title", "A text that\nis wrapped.", "End"],
    ["Buy:\n- milk\n- bread\n2. Go home", "Buy:", "- milk", "- bread", "2. Go home"],
    ["यह एक वाक्य है। यह दूसरा है।", "यह एक वाक्य है।", "यह दूसरा है।"],
    ["¿Qué? ¡No! Él vino.", "¿Qué?", "¡No!", "Él vino."],
    ["Really?! Yes!! “Ok.”", "Really?!", "Yes!!", "“Ok.”"],
    ["Smith et al. (2020) say so. We agree.", "Smith et al. (2020) say so.", "We agree."],
    ["It costs $5. 10 people came.", "It costs $5.", "10 people came."],
    ["no end mark", "no end mark"],
    ["   \n\n "],
    [""],
]


@pytest.mark.parametrize("case", CASES, ids=[case[0][:20] for case in CASES])
def test_sentences_end_where_readers_say(case: list[str]) -> None:
    text, *expected = case
    assert [text[span.start : span.end] for span in split_sentences(text)] == expected


@given(st.text(alphabet="aB1 .!?\n\"'”)(。」と-\t…", max_size=60) | st.text(max_size=60))
def test_sentences_hold_all_that_is_not_white_space(text: str) -> None:
    spans = split_sentences(text)
    end = 0
    for span in spans:
        assert not text[end : span.start].strip()
        sentence = text[span.start : span.end]
        assert sentence
        assert sentence == sentence.strip()
        end = span.end
    assert not text[end:].strip()
