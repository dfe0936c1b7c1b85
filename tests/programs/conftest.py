"""Fixtures of the programs' tests."""

from pathlib import Path

import pytest

from tests.training_runs import make_workplace


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny scenes and the config of a tiny model. Do not write into it."""
    return make_workplace(tmp_path_factory.mktemp("place"))
