"""Ids of texts that a checkpoint reads through its chat template, and which of them may be cut.

sentence-transformers cuts the end of what the template wrote and then puts the template's own last tokens back over it,
because such networks read the last position. Which those are is found as it finds them: two fillings, and what they
end with alike. Knows neither HTTP nor the network. Runs in the API process.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import takewhile

from model.chat_template import ChatTemplateError
from model.text_messages import MessageFormat, Text
from model.tokenizer import Encoding, TokenizerError
from service.engine.models import LoadedModel
from service.errors import InvalidRequest, ServiceError

FILLINGS = ("0", "1 2 3 4")


def encode_templated(
    model: LoadedModel, format: MessageFormat, texts: Sequence[Text], prompt: str, *, limit: int
) -> list[Encoding | ServiceError]:
    """Each text's ids, or why it has none; in those of more than `limit` ids the template's own belong to no text."""
    return [_encode(model, format, text, prompt, limit) for text in texts]


def _encode(model: LoadedModel, format: MessageFormat, text: Text, prompt: str, limit: int) -> Encoding | ServiceError:
    try:
        found = _rendered(model, format, text, prompt)
        return found if len(found.ids) <= limit else _with_owners(model, format, text, prompt, found)
    except (ChatTemplateError, TokenizerError) as error:
        return InvalidRequest(str(error))


def _rendered(model: LoadedModel, format: MessageFormat, text: Text, prompt: str) -> Encoding:
    assert model.chat_template is not None
    rendered = format.render(model.chat_template, text, prompt)
    return model.tokenizer.encode_with_offsets(rendered, add_special_tokens=False)


def _with_owners(model: LoadedModel, format: MessageFormat, text: Text, prompt: str, found: Encoding) -> Encoding:
    """What lies between the template's first and last ids is the text's, or the pair's second, which is cut first."""
    fillings = [filling if isinstance(text, str) else (filling, filling) for filling in FILLINGS]
    one, other = (_rendered(model, format, filling, prompt).ids for filling in fillings)
    start = _num_alike(one, other)
    end = _num_alike(one[::-1], other[::-1]) if format.keeps_suffix else 0
    middle = len(found.ids) - start - end
    owner = 0 if isinstance(text, str) else 1
    return replace(found, sequence_ids=[*[None] * start, *[owner] * middle, *[None] * end])


def _num_alike(one: Sequence[int], other: Sequence[int]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
