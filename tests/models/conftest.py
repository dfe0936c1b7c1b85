"""Fixtures of the models' tests: models of a few thousand weights."""

from collections.abc import Callable
from typing import Any

import pytest

from config import GroundingConfig
from models.albef import ALBEF, build_albef
from models.pretrain import PretrainModel


@pytest.fixture
def training(tiny_config: Callable[..., Any]) -> PretrainModel:
    return PretrainModel(tiny_config())


@pytest.fixture
def evaluation(tiny_config: Callable[..., Any]) -> ALBEF:
    return build_albef(tiny_config(GroundingConfig))
