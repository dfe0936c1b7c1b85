"""What the tests of the page share: a page that is served, and `Answers` over two tiny checkpoints."""

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from config import PretrainConfig
from dataset.scenes import files as scenes_files
from dataset.scenes.paths import SHIPPED, SHIPPED_CONFIG
from grounding.explain import Explainer
from grounding.load import OpenedModel, open_model
from grounding.web import server, session
from grounding.web.examples import BEFORE, Example, Offer
from grounding.web.session import Answers
from models.albef import ALBEF, build_albef
from tests.small_model import BERT, SIZES

PATIENCE = 120  # seconds to wait for what will come; a machine may be slow, and it is no test of speed
PHRASE = "the small red triangle"
CROSS_ATTENTION = "text_encoder.bert.encoder.layer.3.crossattention.self.query.weight"


class Site(NamedTuple):
    """A page that is served: its address and answers, the scene that is its example, and its models by name."""

    url: str
    scene: Path
    explainers: dict[str, Explainer]
    answers: Answers


@pytest.fixture(scope="package")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """The shipped model before AMC, and the same with other cross-attention."""
    pytest.importorskip("gradio", reason="the page needs requirements-web.txt")
    folder = tmp_path_factory.mktemp("web")
    scenes_files.generate(folder / "scenes", seed=0, train=1, annotated=1, evaluation=1)
    weights = load_file(SHIPPED)
    noise = torch.randn(weights[CROSS_ATTENTION].shape, generator=torch.Generator().manual_seed(1))
    save_file({**weights, CROSS_ATTENTION: weights[CROSS_ATTENTION] + 0.2 * noise}, folder / "changed.safetensors")

    def open_offer(offer: Offer) -> Any:
        return open_model(offer.checkpoint, offer.config, str(folder / "scenes/text_encoder"), "cpu")

    offers = [Offer(BEFORE, SHIPPED, str(SHIPPED_CONFIG))]
    offers.append(Offer("changed", folder / "changed.safetensors", str(SHIPPED_CONFIG)))
    scene = folder / "scenes/images/100000.jpg"
    examples = [Example("scene 1", scene, (PHRASE,)), Example("cat", scene, ("the cat",), "by its owner, CC0")]
    explainers = {offer.name: open_offer(offer).explainer() for offer in offers}
    answers = Answers(offers, open_offer)
    with server.running(answers, examples) as url:
        yield Site(url.rstrip("/"), scene, explainers, answers)


@pytest.fixture(scope="package")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two checkpoints, which say their sizes; the second has one layer less. A third is none."""
    folder = tmp_path_factory.mktemp("answers")
    (folder / "vocab.txt").write_text("\n".join(scenes_files.vocabulary()))
    for name, layers in (("one", 3), ("two", 2)):
        (folder / f"{name}.json").write_text(json.dumps({**BERT, "num_hidden_layers": layers}))
        trained = {**SIZES, "bert_config": str(folder / f"{name}.json"), "image_root": "x", "train_file": []}
        config = PretrainConfig.model_validate({**trained, "amc": {"layer": 1}})
        torch.manual_seed(layers)
        torch.save({"model": build_albef(config).state_dict(), "config": config.model_dump()}, folder / f"{name}.pth")
    (folder / "broken.pth").write_text("no checkpoint")
    return folder


class Counted:
    """`Answers` over the checkpoints of `place`, counting what is asked of the models."""

    def __init__(self, place: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
        self.calls = {"open": 0, "encode": 0, "ask": 0}

        def count(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
            def counted(*args: Any, **keys: Any) -> Any:
                self.calls[name] += 1
                return function(*args, **keys)

            return counted

        def open_offer(offer: Offer) -> OpenedModel:
            return open_model(offer.checkpoint, text_encoder=str(place), device="cpu")

        monkeypatch.setattr(ALBEF, "encode", count("encode", ALBEF.encode))
        monkeypatch.setattr(session, "ask", count("ask", session.ask))
        found = [Offer(name, place / f"{name}.pth") for name in ("one", "two", "broken")]
        self.answers = Answers(found, count("open", open_offer), **options)

    def took(self) -> tuple[int, ...]:
        """How often a model was opened, an image encoded and phrases asked since the last time."""
        counts = tuple(self.calls.values())
        self.calls = dict.fromkeys(self.calls, 0)
        return counts


@pytest.fixture
def counted(place: Path, monkeypatch: pytest.MonkeyPatch) -> Counted:
    return Counted(place, monkeypatch)


def noise(seed: int = 0, size: tuple[int, int] = (30, 20), orientation: int = 1) -> bytes:
    """A picture of noise, as JPEG."""
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), np.uint8)
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[274] = orientation
    Image.fromarray(pixels).save(buffer, "JPEG", exif=exif)
    return buffer.getvalue()
