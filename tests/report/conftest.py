"""A finished chain, its report, and a browser to look at it with."""

from pathlib import Path

import pytest
from chains import tiny
from chromium import Chromium, find


@pytest.fixture
def chain(tmp_path: Path) -> Path:
    return tiny(tmp_path / "tiny")


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    if find() is None:
        pytest.skip("no Chromium is installed")
    chromium = Chromium(tmp_path_factory.mktemp("profile"))
    yield chromium
    chromium.close()
