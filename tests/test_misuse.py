"""Every mistake of :mod:`tests.misuses` is told so that it can be mended."""

import re
from pathlib import Path

import pytest

from tests import misuses

PAGE = Path(__file__).parents[1] / "docs" / "errors.md"
ALL = [misuse for group in misuses.TABLE.values() for misuse in group]


@pytest.mark.parametrize("misuse", ALL, ids=lambda misuse: misuse.id)
def test_message_tells_what_is_wrong(misuse):
    for package in misuse.needs:
        pytest.importorskip(package)
    with pytest.raises(misuse.error) as raised:
        misuse.do()
    error = raised.value
    told = "\n".join([str(error), *getattr(error, "__notes__", [])])
    assert re.search(".*".join(map(re.escape, misuse.told)), told, re.DOTALL), told
    assert "Tracer" not in told  # what JAX makes of a value inside of a function


def test_page_is_current():
    assert PAGE.read_text() == misuses.page(), misuses.__doc__


def test_ids_differ():
    assert len({misuse.id for misuse in ALL}) == len(ALL)
