"""The README's tables say what the code says, and what the pages in docs/ say was measured."""

import pytest

from tests.readme.tables import README, TABLES, section


@pytest.mark.parametrize("name", TABLES)
def test_a_table_of_the_readme_is_what_it_is_made_from(name: str) -> None:
    """`make readme` writes the tables anew."""
    text = README.read_text()
    first, last = section(text, name)
    assert text[first:last].strip() == TABLES[name]()
