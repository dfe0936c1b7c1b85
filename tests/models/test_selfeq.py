"""SelfEQ's losses: by hand, against the release's numbers, finite differences, and plain autograd in a step."""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from config import SelfEQConfig
from models import amc, selfeq
from models.pretrain import Batch, PretrainModel
from tests.conftest import GOLDEN
from tests.models.plain import IDS, MASK, close, plain_gradcam, plain_layers, plain_text
from tests.models.test_training_step import gradients, make_batch, make_model

TinyConfig = Callable[..., Any]
OPTIONS = SelfEQConfig()
WEIGHTS = {"weight_similarity": 1.0, "weight_consistency": 0.5}
ALL = torch.ones(2)
pytestmark = pytest.mark.usefixtures("one_thread")

# Of two samples with two patches each: the sums are 1.5, 0.5, 0.8 and 0.
CAPTION = torch.tensor([[[0.9, 0.1]], [[0.5, 0.0]]])
PARAPHRASE = torch.tensor([[[0.6, 0.4]], [[0.3, 0.0]]])


# ---- by hand


def test_similarity() -> None:
    both = (0.3**2 + 0.3**2 + 0.2**2) / 2 / 4
    assert selfeq.similarity_loss(CAPTION, PARAPHRASE, ALL).item() == pytest.approx(both)
    assert selfeq.similarity_loss(CAPTION, PARAPHRASE, torch.tensor([0, 1])).item() == pytest.approx(0.2**2 / 2 / 2)
    assert selfeq.similarity_loss(CAPTION, PARAPHRASE, torch.zeros(2)).item() == 0
    far = torch.tensor([[[3.0]]]), torch.tensor([[[0.0]]])  # beyond 1 it is linear
    assert selfeq.similarity_loss(*far, torch.ones(1)).item() == pytest.approx(2.5)


def test_region() -> None:
    inside = selfeq.region(CAPTION.clone().requires_grad_(), PARAPHRASE, ALL, 0.8)
    assert inside.tolist() == [[[1, 0]], [[1, 0]]]
    assert not inside.requires_grad
    assert selfeq.region(CAPTION, PARAPHRASE, torch.tensor([True, False]), 0.8).tolist() == [[[1, 0]], [[0, 0]]]


def deviation(*values: float) -> float:
    return float(np.std(values, ddof=1))


@pytest.mark.parametrize(
    ("options", "keep", "expected"),
    [
        # means inside: 0.45 and 0.7; those above the floor cost nothing
        ({}, [1, 1], deviation(0.9, 0, 0.5, 0) + deviation(0.6, 0, 0.3, 0)),
        ({"floor": 0.6}, [1, 1], deviation(0.9, 0, 0.5, 0) + deviation(0.6, 0, 0.3, 0) + 0.6 - 0.45),
        ({"std_over": "region", "floor": 0.6}, [1, 1], deviation(0.9, 0.5) + deviation(0.6, 0.3) + 0.15),
        ({"floor": 0.6}, [0, 1], deviation(0.5, 0) + deviation(0.3, 0) + 0.1 + 0.3),
        (
            {"over": "sample", "floor": 0.6},
            [1, 1],
            (deviation(0.9, 0) + deviation(0.6, 0) + deviation(0.5, 0) + deviation(0.3, 0) + 0.1 + 0.3) / 2,
        ),
        ({"over": "sample", "std_over": "region", "floor": 0.6}, [1, 1], (0.1 + 0.3) / 2),
        ({"threshold": 0.9}, [0, 1], 0),  # an empty region
        ({"threshold": 0.9, "over": "sample"}, [1, 1], (deviation(0.9, 0) + deviation(0.6, 0)) / 2),
        ({}, [0, 0], 0),
    ],
)
def test_consistency(options: dict[str, Any], keep: list[int], expected: float) -> None:
    maps = [cam.clone().requires_grad_() for cam in (CAPTION, PARAPHRASE)]
    found = selfeq.consistency_loss(*maps, torch.tensor(keep), SelfEQConfig(**options))
    assert found.item() == pytest.approx(expected, rel=1e-6, abs=1e-12)
    found.backward()
    for cam in maps:
        assert cam.grad is not None
        assert cam.grad.isfinite().all()
        assert cam.grad.any() == (expected > 0)
        assert not cam.grad[torch.tensor(keep) == 0].any()


# ---- the release's numbers


@pytest.mark.parametrize("case", json.loads((GOLDEN / "selfeq.json").read_text()), ids=lambda case: case["case"])
def test_golden(case: dict[str, Any]) -> None:
    arrays, name = np.load(GOLDEN / "selfeq.npz"), case["case"]
    maps = [torch.from_numpy(arrays[f"{name}_{text}"]).requires_grad_() for text in ("caption", "paraphrase")]
    keep = torch.ones(len(maps[0]))
    found = selfeq.named_losses(*maps, keep, OPTIONS)
    assert found["loss_similarity"].item() == pytest.approx(case["similarity"], abs=1e-6)
    assert found["loss_consistency"].item() == pytest.approx(case["consistency"] or 0, abs=1e-6)
    normalised = [amc.normalise_map(cam) for cam in maps]
    assert selfeq.region(*normalised, keep, OPTIONS.threshold).sum() == case["region"]
    (found["loss_similarity"] + 0.5 * found["loss_consistency"]).backward()
    for cam, text in zip(maps, ("caption", "paraphrase"), strict=True):
        assert cam.grad is not None
        expected = arrays[f"{name}_grad_{text}"] if case["region"] else np.zeros(cam.shape)
        np.testing.assert_allclose(cam.grad, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("options", [{}, {"over": "sample"}, {"std_over": "region"}])
def test_gradients_are_those_of_finite_differences(options: dict[str, str]) -> None:
    draw = torch.Generator().manual_seed(1)
    maps = [torch.rand(3, 4, 4, dtype=torch.double, generator=draw).requires_grad_() for _ in range(2)]
    keep = torch.tensor([True, False, True])

    def loss(caption: Tensor, paraphrase: Tensor) -> Tensor:
        named = selfeq.named_losses(caption, paraphrase, keep, SelfEQConfig(floor=0.95, **options))
        return named["loss_similarity"] + 0.5 * named["loss_consistency"]

    assert torch.autograd.gradcheck(loss, maps, eps=1e-7, atol=1e-6)
    assert not torch.autograd.grad(loss(*maps), maps[0])[0][1].any()


# ---- in a step

OTHER_IDS = torch.tensor([[1, 4, 8, 9, 10, 6], [1, 6, 12, 4, 0, 0], [1, 5, 4, 0, 0, 0]])
OTHER_MASK = (OTHER_IDS > 0).long()


def with_other(has_other: list[bool]) -> Batch:
    batch = make_batch()
    return batch._replace(other_ids=OTHER_IDS, other_mask=OTHER_MASK, has_other=torch.tensor(has_other))


def plain_map(model: PretrainModel, batch: Batch, ids: Tensor, mask: Tensor) -> Tensor:
    encoder = model.text_encoder
    text, image = plain_text(encoder, ids, mask), model.visual_encoder(batch.image)
    tokens, attention = plain_layers(encoder, text, mask, image, range(1, 3), 1)
    assert attention is not None
    (gradient,) = torch.autograd.grad(model.itm_head(tokens[:, 0])[:, 1].sum(), attention, create_graph=True)
    return plain_gradcam(attention, gradient, mask)


@pytest.mark.parametrize("add_gcam", [False, True])
def test_both_terms_and_their_gradients_equal_plain_autograd(tiny_config: TinyConfig, add_gcam: bool) -> None:
    model = make_model(tiny_config(selfeq=WEIGHTS, add_gcam=add_gcam))
    batch = with_other([True, False, True])
    maps = plain_map(model, batch, IDS, MASK), plain_map(model, batch, OTHER_IDS, OTHER_MASK)
    named = selfeq.named_losses(*(cam[[0, 2]] for cam in maps), ALL, OPTIONS)
    expected = gradients(model, named["loss_similarity"] + 0.5 * named["loss_consistency"])

    losses = model(batch, alpha=0.4, update_teacher=False)
    assert model.loss_weights["loss_similarity"] == 1
    assert model.loss_weights["loss_consistency"] == 0.5
    assert ("loss_cam1" in model.loss_weights) == (losses["loss_cam1"].item() > 0) == add_gcam
    for name, loss in named.items():
        assert losses[name].item() == pytest.approx(loss.item(), rel=1e-4)
        assert loss.item() > 0
    found = gradients(model, losses["loss_similarity"] + 0.5 * losses["loss_consistency"])
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-4 * largest, msg=name)


def test_a_usual_step_stays_as_it_is_but_for_the_two_losses(tiny_config: TinyConfig) -> None:
    results = []
    for keys, batch in (({}, make_batch()), ({"selfeq": WEIGHTS}, with_other([True] * 3))):
        model = make_model(tiny_config(**keys))
        torch.manual_seed(1)  # the hard negatives
        results.append((model(batch, alpha=0.4), model.text_queue))
    (before, queue), (now, queue_now) = results
    assert now.keys() - before.keys() == {"loss_similarity", "loss_consistency"}
    assert all(torch.equal(now[name], loss) for name, loss in before.items())
    assert torch.equal(queue, queue_now)


def test_the_relation_step_trains_paraphrases_and_enqueues_captions(tiny_config: TinyConfig) -> None:
    keys = {"relation_file": ["r.json"], "selfeq": WEIGHTS, "add_gcam": False}
    usual, model = make_model(tiny_config(add_gcam=False)), make_model(tiny_config(**keys))
    torch.manual_seed(1)
    expected = usual(make_batch(), alpha=0.4)
    torch.manual_seed(1)
    found = model(with_other([True] * 3), alpha=0.4)  # its texts are the paraphrases, the others are the captions
    for name in ("loss_mlm", "loss_ita", "loss_itm"):
        assert found[name].item() == pytest.approx(expected[name].item(), rel=1e-4)
    captions = F.normalize(model.text_proj_m(model.text_encoder_m(OTHER_IDS, OTHER_MASK)[:, 0]), dim=-1)
    close(model.text_queue[:, :3].t(), captions)
    assert torch.equal(model.image_queue, usual.image_queue)
    assert not torch.equal(model.text_queue[:, :3], usual.text_queue[:, :3])
    total = model.total(found)
    assert total.item() == pytest.approx(
        sum(
            found[f"loss_{name}"].item() * w
            for name, w in (("mlm", 1), ("ita", 1), ("itm", 1), ("similarity", 1), ("consistency", 0.5))
        )
    )


def test_autocast_leaves_the_terms_in_float32(tiny_config: TinyConfig) -> None:
    model, batch = make_model(tiny_config(selfeq=WEIGHTS)), with_other([True] * 3)
    exact = model(batch, alpha=0.4, update_teacher=False)
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(batch, alpha=0.4, update_teacher=False)
    for name in ("loss_similarity", "loss_consistency"):
        assert losses[name].dtype == torch.float32
        assert losses[name].item() == pytest.approx(exact[name].item(), abs=0.1)
    assert all(gradient.isfinite().all() for gradient in gradients(model, model.total(losses)).values())
