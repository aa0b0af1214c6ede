"""The README's table of what works with what is what the checks of `tests/composition.py` find."""

import pytest

from tests import composition


@pytest.mark.filterwarnings("ignore::UserWarning:torch")
def test_the_table_in_the_readme_is_what_the_checks_find() -> None:
    found = composition.table(composition.found())
    assert composition.written() == found, f"run `python -m tests.composition`; the table is now\n{found}"
