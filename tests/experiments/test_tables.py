"""What documents show of the code is what the code gives."""

import pytest

from experiments import tables


def test_the_table_of_the_readme_is_that_of_the_code():
    text = tables.README.read_text(encoding="utf-8")
    assert text == tables.updated(text), "run: python -m experiments.tables"


def test_a_table_without_its_marks_is_not_passed_over():
    text = tables.README.read_text(encoding="utf-8")
    with pytest.raises(SystemExit, match="lost its marks"):
        tables.updated(text.replace("<!-- end of variants -->", ""))
