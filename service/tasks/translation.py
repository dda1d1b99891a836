"""Translations: which checkpoint knows the two languages, and how it is told them.

A translating encoder-decoder names its languages itself (`model.languages`); an instructed LM is told them in English.
Knows neither HTTP nor torch. Runs in the API process.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from model.languages import Languages, UnknownLanguage, match
from service.engine.models import LoadedModel, ModelDirectory
from service.errors import InvalidRequest, ModelNotFound
from service.tasks.generation import GenerationEngine
from service.tasks.instructing import TEXT, Assignment

TASK = "translate"
MAX_LISTED = 250
TAG = re.compile(r"[A-Za-z]{2,8}(?:[-_][A-Za-z0-9]{1,8}){0,4}")
ENGLISH_NAMES = dict(
    entry.split(":")
    for entry in (
        "af:Afrikaans am:Amharic ar:Arabic as:Assamese az:Azerbaijani be:Belarusian bg:Bulgarian bn:Bengali bs:Bosnian "
        "ca:Catalan cs:Czech cy:Welsh da:Danish de:German el:Greek en:English eo:Esperanto es:Spanish et:Estonian "
        "eu:Basque fa:Persian fi:Finnish fr:French ga:Irish gl:Galician gu:Gujarati ha:Hausa he:Hebrew hi:Hindi "
        "hr:Croatian hu:Hungarian hy:Armenian id:Indonesian ig:Igbo is:Icelandic it:Italian ja:Japanese jv:Javanese "
        "ka:Georgian kk:Kazakh km:Khmer kn:Kannada ko:Korean ku:Kurdish ky:Kyrgyz la:Latin lb:Luxembourgish lo:Lao "
        "lt:Lithuanian lv:Latvian mg:Malagasy mi:Maori mk:Macedonian ml:Malayalam mn:Mongolian mr:Marathi ms:Malay "
        "mt:Maltese my:Burmese ne:Nepali nl:Dutch no:Norwegian oc:Occitan or:Odia pa:Punjabi pl:Polish ps:Pashto "
        "pt:Portuguese qu:Quechua ro:Romanian ru:Russian rw:Kinyarwanda sa:Sanskrit sd:Sindhi si:Sinhala sk:Slovak "
        "sl:Slovenian sm:Samoan sn:Shona so:Somali sq:Albanian sr:Serbian su:Sundanese sv:Swedish sw:Swahili ta:Tamil "
        "te:Telugu tg:Tajik th:Thai tk:Turkmen tl:Tagalog tr:Turkish tt:Tatar ug:Uyghur uk:Ukrainian ur:Urdu uz:Uzbek "
        "vi:Vietnamese wo:Wolof xh:Xhosa yi:Yiddish yo:Yoruba zh:Chinese zu:Zulu"
    ).split()
)
SCRIPT_NAMES = {"hans": "simplified", "hant": "traditional", "latn": "in Latin script", "cyrl": "in Cyrillic script"}


class TranslationEngine(GenerationEngine, Protocol):
    @property
    def models(self) -> ModelDirectory: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Translation:
    """A checkpoint and how to ask it for one direction; the codes are its own, or the caller's where it has none."""

    model: LoadedModel
    assignment: Assignment
    source: str | None
    target: str | None


def choose(engine: TranslationEngine, name: str | None, source: str | None, target: str | None) -> Translation:
    """The named checkpoint, or the first that translates between the two languages, made for it before instructed.

    Raises:
        ModelNotFound, TaskNotSupported: none can translate.
        InvalidRequest: there is no such language or pair; the message lists what there is.
    """
    if name is not None:
        return translation(engine.resolve(name, TASK), source, target)
    able = [model for model in engine.models.offered() if TASK in model.tasks]
    if not able:
        raise ModelNotFound("no loaded checkpoint can do 'translate'", param="model")
    able.sort(key=lambda model: (model.description.network != "encoder_decoder", model.chat_template is None))
    refusals: list[InvalidRequest] = []
    for model in able:
        try:
            return translation(model, source, target)
        except InvalidRequest as error:
            refusals.append(error)
    if len(refusals) == 1:
        raise refusals[0]
    reasons = "; ".join(f"{model.name}: {error.message}" for model, error in zip(able, refusals, strict=True))
    raise InvalidRequest(reasons, param=refusals[0].param)


def translation(model: LoadedModel, source: str | None, target: str | None) -> Translation:
    """Raises: InvalidRequest that lists the languages or pairs there are."""
    for param, tag in (("source", source), ("target", target)):
        if tag is not None and not TAG.fullmatch(tag):
            message = f"{param}: {tag[:64]!r} is no language tag (as in: en, pt-BR, zh-Hant, eng_Latn)"
            raise InvalidRequest(message, param=param)
    if model.description.network != "encoder_decoder":
        return _instructed(model, source, target)
    languages = model.languages or Languages()
    try:
        direction = languages.direction(source, target)
    except UnknownLanguage as error:
        raise InvalidRequest(_shortened(str(error)), param=_param_at_fault(languages, source, target)) from error
    # A checkpoint whose files say nothing has one direction, and whoever names another cannot be contradicted.
    task = Assignment(instruction=TEXT, form=TEXT, declared_task="translation", direction=direction)
    return Translation(model=model, assignment=task, source=direction.source, target=direction.target)


def _instructed(model: LoadedModel, source: str | None, target: str | None) -> Translation:
    if target is None:
        message = f"no target language is given; {model.name} is told one in English, and there are {_known_names()}"
        raise InvalidRequest(message, param="target")
    into = _name_for(model, target, "target")
    shown = "Text" if source is None else _name_for(model, source, "source")
    out_of = "" if source is None else f" from {shown}"
    task = Assignment(
        instruction=f"Translate the following text{out_of} into {into}. Answer with the translation alone.\n\n{TEXT}",
        form=f"{shown}: {TEXT}\n{into}:",
        max_tokens=512,
    )
    return Translation(model=model, assignment=task, source=source, target=target)


def _name_for(model: LoadedModel, tag: str, param: str) -> str:
    """Raises: InvalidRequest for a tag that would have to be left to the LM to guess; it would answer all the same."""
    name = english_name(tag)
    if name is None:
        message = f"no {param} language '{tag}'; {model.name} is told one in English, and there are {_known_names()}"
        raise InvalidRequest(message, param=param)
    return name


def _known_names() -> str:
    return ", ".join(f"{code} ({name})" for code, name in ENGLISH_NAMES.items())


def english_name(tag: str) -> str | None:
    """What the language of a tag is called; None where it is not known. A name stands for itself."""
    if tag.capitalize() in ENGLISH_NAMES.values():
        return tag.capitalize()
    known: Sequence[str] = match(tag, ENGLISH_NAMES)
    if not known:
        return None
    name = ENGLISH_NAMES[known[0]]
    _, *rest = tag.replace("_", "-").split("-")
    script = next((SCRIPT_NAMES[part.lower()] for part in rest if part.lower() in SCRIPT_NAMES), None)
    region = next((part.upper() for part in rest if len(part) == 2 and part.upper() != "XX"), None)
    notes = [note for note in (script, f"as in {region}" if region else None) if note is not None]
    return f"{name} ({', '.join(notes)})" if notes else name


def _param_at_fault(languages: Languages, source: str | None, target: str | None) -> str:
    """Which of the two to name: the one that is not known by itself, else the target."""
    sources = [pair[0] for pair in languages.pairs] or languages.sources
    if source is None:
        needed = len(set(sources)) > 1 and languages.default_source is None
        return "source" if needed and target is not None and match(target, languages.targets) else "target"
    return "source" if sources and len(set(match(source, dict.fromkeys(sources)))) != 1 else "target"


def _shortened(message: str) -> str:
    """Two hundred languages are listed, a thousand pairs are not."""
    names = message.split(", ")
    return message if len(names) <= MAX_LISTED else ", ".join(names[:MAX_LISTED]) + f", ... ({len(names):,} in all)"
