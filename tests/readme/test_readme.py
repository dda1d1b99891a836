"""The README says what the code says."""

import re

import pytest

from tests.readme.tables import README, TABLES, section


@pytest.mark.parametrize("name", TABLES)
def test_a_table_of_the_readme_is_what_the_code_says(name: str) -> None:
    """`python tests/readme/tables.py` writes the tables anew."""
    text = README.read_text()
    first, last = section(text, name)
    assert text[first:last].strip() == TABLES[name]()


def test_every_file_that_the_readme_names_exists() -> None:
    text = README.read_text()
    named = set(re.findall(r"`((?:service|model|helm|tests|checkpoints)/[\w./-]*)`", text))
    assert len(named) > 10
    assert [name for name in sorted(named) if not (README.parent / name).exists()] == []
