"""One page that is served, shared by the tests of this folder."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from dataset.scenes import files as scenes_files
from dataset.scenes.paths import SHIPPED, SHIPPED_CONFIG
from grounding.explain import Explainer
from grounding.load import open_model
from grounding.web import server
from grounding.web.examples import BEFORE, Example, Offer
from grounding.web.session import Answers

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
