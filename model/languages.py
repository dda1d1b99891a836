"""The languages of a translating checkpoint: which there are, what the caller may call them, how the network is told.

Four ways of telling: a token before or after the source and a forced first token (M2M100, NLLB, mBART), a token like
`>>fra<<` in the source (Marian with several targets), words before the source (T5), or nothing, where there is one
direction. Reads the checkpoint's own names from its tokenizer and config; nothing is listed here but the codes' kinship
(ISO 639-1 with 639-3, and which member of a macrolanguage is meant). No torch; runs in the API process.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from model.architectures.raw import read_json

CODES = (
    "aa:aar ab:abk af:afr ak:aka am:amh an:arg ar:arb,ara as:asm av:ava ay:ayr,aym az:azj,aze ba:bak be:bel bg:bul "
    "bh:bho bm:bam bn:ben bo:bod br:bre bs:bos ca:cat ce:che co:cos cs:ces cv:chv cy:cym da:dan de:deu,ger dv:div "
    "dz:dzo ee:ewe el:ell en:eng eo:epo es:spa et:est,ekk eu:eus fa:pes,fas ff:fuv,ful fi:fin fj:fij fo:fao fr:fra "
    "fy:fry ga:gle gd:gla gl:glg gn:grn,gug gu:guj gv:glv ha:hau he:heb hi:hin hr:hrv ht:hat hu:hun hy:hye ia:ina "
    "id:ind ig:ibo is:isl it:ita iu:iku ja:jpn jv:jav ka:kat kg:kon ki:kik kk:kaz kl:kal km:khm kn:kan ko:kor ks:kas "
    "ku:kmr,kur kw:cor ky:kir la:lat lb:ltz lg:lug li:lim ln:lin lo:lao lt:lit lu:lua,lub lv:lvs,lav mg:plt,mlg mi:mri "
    "mk:mkd ml:mal mn:khk,mon mr:mar ms:zsm,msa mt:mlt my:mya ne:npi,nep nl:nld nn:nno no:nob,nor,nb ns:nso "
    "nv:nav ny:nya oc:oci oj:oji om:gaz,orm or:ory,ori os:oss pa:pan pl:pol ps:pbt,pus pt:por qu:quy,que rm:roh rn:run "
    "ro:ron ru:rus rw:kin sa:san sc:srd sd:snd se:sme sg:sag si:sin sk:slk sl:slv sm:smo sn:sna so:som sq:als,sqi "
    "sr:srp ss:ssw st:sot su:sun sv:swe sw:swh,swa ta:tam te:tel tg:tgk th:tha ti:tir tk:tuk tl:tgl,fil "
    "tn:tsn to:ton ts:tso "
    "tr:tur tt:tat tw:twi ty:tah ug:uig uk:ukr ur:urd uz:uzn,uzb ve:ven vi:vie vo:vol wa:wln wo:wol xh:xho yi:ydd,yid "
    "yo:yor za:zha zh:zho,cmn zu:zul"
)
KIN: Mapping[str, str] = {
    long: short for short, _, longs in (entry.partition(":") for entry in CODES.split()) for long in longs.split(",")
}
"""Other codes of a language to the shortest; what is not here stands for itself."""

SCRIPTS = {
    "zh": "hans",
    "sr": "cyrl",
    "ks": "arab",
    "mn": "cyrl",
    "ms": "latn",
    "az": "latn",
    "uz": "latn",
    "pa": "guru",
}
"""The script meant where a code names none and the checkpoint has several."""

REGION_SCRIPTS = {"tw": "hant", "hk": "hant", "mo": "hant", "cn": "hans", "sg": "hans"}

GROUPS: Mapping[str, str] = {
    "roa romance itc": "an ast ca co es fr fur gl it la lad lij lmo mwl oc pms pt rm ro sc scn vec wa",
    "gem": "af da de en fo fy is lb nds nl nb nn no sv yi",
    "gmw": "af de en fy lb nds nl yi",
    "gmq scandinavia": "da fo is nb nn no sv",
    "sla": "be bg bs cs dsb hr hsb mk pl ru sh sk sl sr uk",
    "zle": "be ru rue uk",
    "zlw": "cs dsb hsb pl sk",
    "zls": "bg bs hr mk sh sl sr",
    "bat": "lt lv",
    "cel celtic": "br cy ga gd gv kw",
    "fiu urj": "et fi hu se vro",
    "trk": "az ba cv kk ky sah tk tr tt ug uz",
    "iir": "as bho bn fa gu hi ku mr ne or pa ps sa sd si tg ur",
    "inc": "as bho bn gu hi mr ne or pa sa sd si ur",
    "dra": "kn ml ta te",
    "sem": "am ar he mt ti",
    "afa": "am ar ha he mt om so ti",
    "bnt": "lg ln ny rn rw sn ss st sw tn ts ve xh zu",
    "poz": "ceb fj haw id jv mg mi ms sm su tl to ty",
}
"""Groups of languages that Marian checkpoints are named after (ISO 639-5, or their makers' words), and members of them.
`mul` has all. The network is told nothing of the source, so a member is translated as the group is."""

LANGUAGE_TOKEN = re.compile(
    r"__(?P<m2m>[a-z]{2,3})__|(?P<nllb>[a-z]{3}_[A-Z][a-z]{3})|(?P<mbart>[a-z]{2}_[A-Z]{2})|>>(?P<marian>[\w-]+)<<"
)
TASK_NAME = re.compile(r"translation_(\w+)_to_(\w+)")


class UnknownLanguage(ValueError):
    """A language, or a pair of them, that the checkpoint does not translate; the message lists what there is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Direction:
    """How to ask for one translation. Where `before` and `after` are None the tokenizer's own special tokens are right;
    else the source's ids are `before`, the text's without special tokens, `after`."""

    source: str | None = None
    target: str | None = None
    """The checkpoint's own codes."""
    task: str | None = None
    """Name in `task_specific_params`, whose prefix and parameters hold."""
    text_prefix: str = ""
    before: tuple[int, ...] | None = None
    after: tuple[int, ...] | None = None
    forced_bos_id: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Languages:
    """A checkpoint's languages by its own codes. `pairs` are the only ones there are, where that is limited."""

    sources: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()
    pairs: tuple[tuple[str, str], ...] = ()
    default_source: str | None = None
    default_target: str | None = None
    token_ids: Mapping[str, int] = field(default_factory=dict, repr=False)
    """By code, where languages are tokens around the source."""
    source_token_last: bool = False
    eos_id: int | None = None
    written_targets: bool = False
    """Marian: the target's token is written before the text."""
    tasks: Mapping[tuple[str, str], str] = field(default_factory=dict, repr=False)

    def direction(self, source: str | None, target: str | None) -> Direction:
        """How to translate from `source` to `target`, which may be the checkpoint's codes or BCP-47.

        Raises: UnknownLanguage that lists the languages or pairs there are.
        """
        if self.pairs:
            return self._of_pair(source, target)
        found_source = self._known("source", source or self.default_source, self.sources)
        found_target = self._known("target", target or self.default_target, self.targets)
        if self.token_ids:
            return self._by_tokens(found_source, found_target)
        if self.written_targets and found_target is not None:
            return Direction(source=found_source, target=found_target, text_prefix=f">>{found_target}<< ")
        return Direction(source=found_source, target=found_target)

    def _of_pair(self, source: str | None, target: str | None) -> Direction:
        fitting = [
            pair
            for pair in self.pairs
            if (source is None or match_source(source, [pair[0]])) and (target is None or match(target, [pair[1]]))
        ]
        if len(fitting) != 1:
            asked = f"{source or 'any language'} to {target or 'any language'}"
            count = "several translations fit" if fitting else "there is no translation"
            known = ", ".join(f"{a} to {b}" for a, b in self.pairs)
            raise UnknownLanguage(f"{count} from {asked}; this checkpoint translates {known}")
        return Direction(source=fitting[0][0], target=fitting[0][1], task=self.tasks.get(fitting[0]))

    def _known(self, side: str, asked: str | None, known: tuple[str, ...]) -> str | None:
        if asked is None:
            if len(known) > 1:
                raise UnknownLanguage(f"no {side} language is given; this checkpoint has {', '.join(known)}")
            return known[0] if known else None
        if not known:
            return asked
        found = match_source(asked, known) if side == "source" else match(asked, known)
        if len(found) != 1:
            reason = f"{asked!r} may mean {', '.join(found)}" if found else f"no {side} language {asked!r}"
            raise UnknownLanguage(f"{reason}; this checkpoint has {', '.join(known)}")
        return found[0]

    def _by_tokens(self, source: str | None, target: str | None) -> Direction:
        assert source is not None
        assert target is not None
        assert self.eos_id is not None
        code = self.token_ids[source]
        return Direction(
            source=source,
            target=target,
            before=() if self.source_token_last else (code,),
            after=(self.eos_id, code) if self.source_token_last else (self.eos_id,),
            forced_bos_id=self.token_ids[target],
        )


def read_languages(
    folder: Path, raw: Mapping[str, Any], vocabulary: Mapping[str, int], eos_id: int | None
) -> Languages | None:
    """The languages of the checkpoint in `folder`, whose `config.json` is `raw`; None if it names none.

    `vocabulary` has the tokenizer's ids by token, added tokens included.
    """
    path = folder / "tokenizer_config.json"
    config = read_json(path) if path.is_file() else {}
    source, target = config.get("source_lang") or config.get("src_lang"), config.get("target_lang")
    kind = raw.get("model_type")
    if kind == "marian":
        return _marian(source, target, vocabulary)
    if kind in ("m2m_100", "mbart"):
        return _by_tokens(kind, config, vocabulary, eos_id)
    names = [name for name in raw.get("task_specific_params") or {} if TASK_NAME.fullmatch(name)]
    tasks = {(found[1], found[2]): name for name in names if (found := TASK_NAME.fullmatch(name))}
    if not tasks:
        return None
    sources, targets = (tuple(dict.fromkeys(side)) for side in zip(*tasks, strict=True))
    return Languages(sources=sources, targets=targets, pairs=tuple(tasks), tasks=tasks)


def _marian(source: str | None, target: str | None, vocabulary: Mapping[str, int]) -> Languages:
    targets = _codes("marian", vocabulary)
    if targets:
        sources = (source,) if source else ()
        return Languages(sources=sources, targets=tuple(targets), written_targets=True, default_source=source)
    return Languages(
        sources=(source,) if source else (),
        targets=(target,) if target else (),
        pairs=((source, target),) if source and target else (),
    )


def _by_tokens(
    kind: str, config: Mapping[str, Any], vocabulary: Mapping[str, int], eos_id: int | None
) -> Languages | None:
    codes: dict[str, int] = {}
    style = "mbart" if kind == "mbart" else "m2m"
    for name in (style, "nllb"):
        codes = codes or _codes(name, vocabulary)
    if not codes:
        return None
    # mBART-50 was trained with the language first, mBART-25 with it last; a tokenizer of the former says what it is.
    fifty = "50" in str(config.get("tokenizer_class", "")) or len(codes) > 25
    last = bool(config.get("legacy_behaviour")) if kind != "mbart" else not fifty
    asked = config.get("src_lang")
    return Languages(
        sources=tuple(codes),
        targets=tuple(codes),
        default_source=asked if asked in codes else None,
        default_target=config.get("tgt_lang") if config.get("tgt_lang") in codes else None,
        token_ids=codes,
        source_token_last=last,
        eos_id=eos_id,
    )


def _codes(style: str, vocabulary: Mapping[str, int]) -> dict[str, int]:
    """Language codes to the ids of their tokens, in the order of the ids."""
    matches = ((LANGUAGE_TOKEN.fullmatch(token), id_) for token, id_ in vocabulary.items())
    found = {match[style]: id_ for match, id_ in matches if match is not None and match[style]}
    return dict(sorted(found.items(), key=lambda item: item[1]))


def match(asked: str, known: Iterable[str]) -> list[str]:
    """The known codes that `asked` may mean: itself, or the same language, and script and region where both say one."""
    known = list(known)
    same = [code for code in known if _plain(code) == _plain(asked)]
    if same:
        return same[:1]
    language, script, region = _parts(asked)
    found = [code for code in known if _parts(code)[0] == language]
    if len(found) > 1 and region is not None:
        found = [code for code in found if _parts(code)[2] == region] or found
    if script is not None:
        found = [code for code in found if _parts(code)[1] in (None, script)]
    elif len(found) > 1:
        usual = SCRIPTS.get(language)
        found = [code for code in found if _parts(code)[1] == usual] or found
    return found


def match_source(asked: str, known: Iterable[str]) -> list[str]:
    """As `match`; where there is no such language, the groups that it belongs to."""
    known = list(known)
    language = _parts(asked)[0]
    return match(asked, known) or [code for code in known if _holds(_plain(code), language)]


def _holds(group: str, language: str) -> bool:
    members = next((members for names, members in GROUPS.items() if group in names.split()), "")
    return group == "mul" or language in members.split()


def _plain(code: str) -> str:
    return code.lower().replace("-", "_")


def _parts(code: str) -> tuple[str, str | None, str | None]:
    """Language, script, region of `zh-Hant-TW`, `zho_Hant`, `pt_XX`."""
    first, *rest = _plain(code).split("_")
    region = next((piece for piece in rest if len(piece) == 2 and piece != "xx"), None)
    script = next((piece for piece in rest if len(piece) == 4), REGION_SCRIPTS.get(region or ""))
    return KIN.get(first, first), script, region
