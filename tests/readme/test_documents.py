"""README.md and docs/ lead where they say, say of a number the same everywhere, and have room for what tools write."""

import re
from pathlib import Path

import pytest

from model.architectures.table import DECODERS
from service.bench import costs, own
from tests.chaos import run as chaos
from tests.deploy import summary
from tests.peers import report
from tests.readme.measured import LOAD, UNNAMED_PROCESSOR, between, peer_sections, ratios, rows

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "helm/README.md"]
LINK = re.compile(r"\]\((?!https?://)([^)#]*)(?:#([^)]*))?\)")
PLACES = [
    *(
        (own.PERFORMANCE, name)
        for name in ("numbers", *(f"costs {part}" for part in costs.PARTS), "gpu", *report.KINDS)
    ),
    (chaos.FAULTS, "chaos"),
    *((summary.PAGE, name) for name in ("image", "image-cu13", "rolling")),
]


def prose(page: Path) -> str:
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_of_a_page_leads_somewhere(page: Path) -> None:
    for path, anchor in LINK.findall(prose(page)):
        target = page.parent / path if path else page
        assert target.exists(), path
        assert not anchor or anchor in anchors(target), f"{path}#{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_file_that_a_page_names_exists(page: Path) -> None:
    named = set(re.findall(r"`((?:service|model|helm|tests|checkpoints)/[\w./-]*)`", page.read_text()))
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


@pytest.mark.parametrize(("page", "name"), PLACES, ids=lambda value: value if isinstance(value, str) else value.name)
def test_what_a_tool_writes_has_one_place(page: Path, name: str) -> None:
    text = page.read_text()
    assert text.count(f"<!-- {name} -->\n") == text.count(f"<!-- /{name} -->") == 1
    assert rows(between(page.name, name))


def test_what_is_written_takes_the_place_of_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in ((own, "PERFORMANCE"), (summary, "PAGE")):
        page = tmp_path / name
        page.write_text("before\n<!-- numbers -->\nold\n<!-- /numbers -->\nafter\n")
        monkeypatch.setattr(module, name, page)
    own.write_between(own.BEGIN, own.END, "new")
    summary.write("numbers", ["new"])
    assert (tmp_path / "PERFORMANCE").read_text() == "before\n<!-- numbers -->\nnew\n<!-- /numbers -->\nafter\n"
    assert "| what | seen |\n|---|---|\nnew\n" in (tmp_path / "PAGE").read_text()


def test_both_pages_say_the_same_of_generation_beside_peers() -> None:
    there = {
        (shape, precision): rows(text) for on, shape, precision, text in peer_sections() if on == UNNAMED_PROCESSOR
    }
    _, *here = re.split(r"^\*\*(\S+), (\w+)\*\*: ", between("performance.md", "peers"), flags=re.MULTILINE)
    assert len(here) > 6
    for shape, precision, text in zip(here[::3], here[1::3], here[2::3], strict=True):
        found = rows(text)
        assert there[shape, precision][: len(found)] == found


def test_both_pages_say_the_same_of_embeddings_beside_peers() -> None:
    there = {
        (shape, precision, row[0]): [row[1], row[-1]]
        for on, shape, precision, text in peer_sections()
        if on == UNNAMED_PROCESSOR
        for row in rows(text)
    }
    here = rows(between("performance.md", "peers-embeddings"))
    assert len(here) > 40
    for shape, precision, load, ours, ratio, _ in here:
        assert there[shape, precision, load] == [ours, ratio]


def test_one_server_is_ahead_in_one_cell() -> None:
    """As the README says; libraries in process, which are no servers, are ahead in more."""
    ahead = []
    for *where, text in peer_sections():
        for row in rows(text):
            if row[0] == "**ours ÷ best peer**":
                ahead += [(*where, ratio) for ratio in ratios(row[1:]) if float(ratio) < 1]
            elif LOAD.fullmatch(row[0]):
                (names,) = re.findall(r"^\| load \| slimpajama \| (.*) \| ours", text, re.MULTILINE)
                ours, *theirs = (float(cell.partition(" ")[0]) for cell in row[1:-1])
                servers = [rate for name, rate in zip(names.split(" | "), theirs, strict=True) if "process" not in name]
                ahead += [(*where, row[0]) for rate in servers if rate > ours]
    assert ahead == [("AVX2 (Zen 3)", "smollm2-135m", "int8", "0.88")]


def test_checkpoints_names_every_class_of_decoder_and_no_other() -> None:
    text = prose(ROOT / "docs/checkpoints.md").partition("## Decoders")[2].partition("\n## ")[0]
    cells = " ".join(line for line in text.splitlines() if line.startswith("|"))
    named = re.findall(r"\b\w+(?:ForCausalLM|LMHeadModel|ForConditionalGeneration|Model|Classification)\b", cells)
    assert set(named) == set(DECODERS)
    assert len(named) == len(DECODERS)
