"""A training step at a few thousand weights: teacher, queues, and each loss against plain layers and autograd."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from config import PretrainConfig
from models import amc
from models.pretrain import STUDENT_AND_TEACHER, Batch, PretrainModel
from models.xbert import KeyValue, TextEncoder
from tests.models.plain import IDS, MASK, close, images, plain_gradcam, plain_layers, plain_text, randomise

TinyConfig = Callable[..., Any]
pytestmark = pytest.mark.usefixtures("one_thread")


def make_batch(has_box: list[bool] | None = None) -> Batch:
    masked, labels = IDS.clone(), torch.full_like(IDS, -100)
    for row, column in ((0, 2), (0, 4), (1, 1), (2, 3)):
        masked[row, column], labels[row, column] = 3, IDS[row, column]
    box_mask = torch.zeros(3, 8, 8)
    box_mask[0, :3, 2:7] = box_mask[1, 4:, :4] = box_mask[2, 2:5, 1:8] = 1
    return Batch(images(3), IDS, MASK, masked, labels, box_mask, torch.tensor(has_box or [True] * 3))


def make_model(config: PretrainConfig) -> PretrainModel:
    """Student and teacher with different weights."""
    torch.manual_seed(0)  # for the queues
    model = PretrainModel(config)
    randomise(model)
    return model


def total(model: PretrainModel, losses: dict[str, Tensor]) -> Tensor:
    return torch.stack([weight * losses[name] for name, weight in model.loss_weights.items()]).sum()


def gradients(model: PretrainModel, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


# ---- teacher and queues


def teacher_pairs(model: PretrainModel) -> list[tuple[Tensor, Tensor]]:
    pairs = []
    for name in STUDENT_AND_TEACHER:
        student, teacher = getattr(model, name), getattr(model, f"{name}_m")
        pairs += list(zip(student.parameters(), teacher.parameters(), strict=True))
    assert len(pairs) > 50
    return pairs


def test_teacher_starts_as_the_student_and_is_not_trained(tiny_config: TinyConfig) -> None:
    model = PretrainModel(tiny_config())
    for student, teacher in teacher_pairs(model):
        assert torch.equal(student, teacher)
        assert student.data_ptr() != teacher.data_ptr()
        assert student.requires_grad
        assert not teacher.requires_grad
    randomise(model)
    model.copy_teacher()
    assert all(torch.equal(student, teacher) for student, teacher in teacher_pairs(model))


def test_forward_moves_the_teacher_before_it_uses_it(tiny_config: TinyConfig) -> None:
    model, batch = make_model(tiny_config(momentum=0.9)), make_batch()
    expected = [0.9 * teacher + 0.1 * student.detach() for student, teacher in teacher_pairs(model)]
    model(batch, alpha=0.4)
    for (_, teacher), value in zip(teacher_pairs(model), expected, strict=True):
        torch.testing.assert_close(teacher, value)
    image = F.normalize(model.vision_proj_m(model.visual_encoder_m(batch.image)[:, 0]), dim=-1)
    text = F.normalize(model.text_proj_m(model.text_encoder_m(IDS, MASK)[:, 0]), dim=-1)
    close(model.image_queue[:, :3].t(), image)
    close(model.text_queue[:, :3].t(), text)


def test_later_micro_batches_leave_the_teacher_alone(tiny_config: TinyConfig) -> None:
    model = make_model(tiny_config(momentum=0.5))
    before = [teacher.clone() for _, teacher in teacher_pairs(model)]
    model(make_batch(), alpha=0.4, update_teacher=False)
    assert all(torch.equal(teacher, old) for (_, teacher), old in zip(teacher_pairs(model), before, strict=True))


def test_queues_start_normalised(tiny_config: TinyConfig) -> None:
    model = PretrainModel(tiny_config())
    for queue in (model.image_queue, model.text_queue):
        assert queue.shape == (4, 6)
        torch.testing.assert_close(queue.norm(dim=0), torch.ones(6))
    assert not torch.equal(model.image_queue, model.text_queue)


@pytest.mark.parametrize("counts", [[4, 4], [6, 1], [3, 3, 3], [8], [2, 13, 2]])
def test_queue_wraps_around(tiny_config: TinyConfig, counts: list[int]) -> None:
    model = PretrainModel(tiny_config())
    image, text, pointer = model.image_queue.clone(), model.text_queue.clone(), 0
    for step, count in enumerate(counts):
        features = torch.randn(2, count, 4, generator=torch.Generator().manual_seed(step))
        model.enqueue(features[0], features[1])
        for row in range(count):  # one at a time, over the oldest
            image[:, pointer], text[:, pointer] = features[0, row], features[1, row]
            pointer = (pointer + 1) % 6
        assert torch.equal(model.image_queue, image)
        assert torch.equal(model.text_queue, text)
        assert model.queue_ptr_img.tolist() == model.queue_ptr_txt.tolist() == [pointer]


# ---- losses


def test_losses_have_names_weights_and_finite_gradients(tiny_config: TinyConfig) -> None:
    model = make_model(tiny_config(amc={"layer": 1, "weight_mean": 0.3, "weight_max": 0.6}))
    losses = model(make_batch(), alpha=0.4)
    assert list(losses) == ["loss_mlm", "loss_ita", "loss_itm", "loss_cam1", "loss_cam2"]
    assert list(model.loss_weights.values()) == [1.0, 1.0, 1.0, 0.3, 0.6]
    assert all(loss.shape == () and loss > 0 for loss in losses.values())
    found = gradients(model, total(model, losses))
    assert set(found) == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(gradient.isfinite().all() for gradient in found.values())


@pytest.mark.parametrize("layer", [1, 2])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_amc_terms_and_their_gradients_equal_plain_autograd(
    tiny_config: TinyConfig, layer: int, checkpointing: bool
) -> None:
    # Margins so large that every hinge is open; the sample without a box counts nothing.
    model = make_model(tiny_config(amc={"layer": layer, "margin_mean": 2.0, "margin_max": 2.0}))
    batch, encoder = make_batch([True, False, True]), model.text_encoder
    text = plain_text(encoder, IDS, MASK)
    tokens, attention = plain_layers(encoder, text, MASK, model.visual_encoder(batch.image), range(1, 3), layer)
    assert attention is not None
    (gradient,) = torch.autograd.grad(model.itm_head(tokens[:, 0])[:, 1].sum(), attention, create_graph=True)
    cam = amc.resize(amc.normalise_map(plain_gradcam(attention, gradient, MASK)), 8)
    mean_term = amc.mean_margin_loss(cam, batch.box_mask, batch.has_box, 2.0)
    max_term = amc.max_margin_loss(cam, batch.box_mask, batch.has_box, 2.0)
    expected = gradients(model, 0.2 * mean_term + 0.8 * max_term)

    model.checkpoint_activations(checkpointing)
    losses = model(batch, alpha=0.4, update_teacher=False)
    found = gradients(model, 0.2 * losses["loss_cam1"] + 0.8 * losses["loss_cam2"])
    assert losses["loss_cam1"].item() == pytest.approx(mean_term.item(), rel=1e-4)
    assert losses["loss_cam2"].item() == pytest.approx(max_term.item(), rel=1e-4)
    assert "visual_encoder.cls_token" in found
    assert "text_encoder.bert.embeddings.word_embeddings.weight" in found
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    for name in expected.keys() | found.keys():
        nothing = torch.zeros_like(model.get_parameter(name))
        torch.testing.assert_close(
            found.get(name, nothing), expected.get(name, nothing), rtol=1e-3, atol=1e-4 * largest, msg=name
        )


def test_hard_negatives_are_drawn_by_similarity_and_paired(
    tiny_config: TinyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = make_model(tiny_config(negative_sharpness=0.25)), make_batch()
    similarities, sharpnesses = [], []
    drawn = [torch.tensor([1, 2, 0]), torch.tensor([2, 2, 0])]  # an image for each text, a text for each image

    def draw(similarity: Tensor, sharpness: float) -> Tensor:
        similarities.append(similarity.clone())
        sharpnesses.append(sharpness)
        return drawn[len(similarities) - 1]

    monkeypatch.setattr("models.losses.hard_negatives", draw)
    found = model(batch, alpha=0.4)["loss_itm"].item()
    assert sharpnesses == [0.25, 0.25]
    encoder, tokens = model.text_encoder, model.visual_encoder(batch.image)
    text = model.text_encoder(IDS, MASK)
    # The student against the teacher, whose features have just been put into the queues.
    close(similarities[0], model.text_feature(text) @ model.image_queue[:, :3] / model.temp)
    close(similarities[1], model.image_feature(tokens) @ model.text_queue[:, :3] / model.temp)
    logits = []
    for texts, pictures in (([0, 1, 2], [0, 1, 2]), ([0, 1, 2], [1, 2, 0]), ([2, 2, 0], [0, 1, 2])):
        fused, _ = plain_layers(encoder, text[texts], MASK[texts], tokens[pictures], range(1, 3))
        logits.append(model.itm_head(fused[:, 0]))
    expected = F.cross_entropy(torch.cat(logits), torch.tensor([1] * 3 + [0] * 6))
    assert found == pytest.approx(expected.item(), rel=1e-4)


def test_checkpointing_changes_nothing(tiny_config: TinyConfig) -> None:
    results = []
    for enable in (False, True):
        model = make_model(tiny_config())
        model.checkpoint_activations(enable)
        torch.manual_seed(1)  # the hard negatives
        losses = model(make_batch(), alpha=0.4)
        results.append((losses, gradients(model, total(model, losses))))
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("enable", [False, True])
def test_activation_checkpointing_recomputes(tiny_config: TinyConfig, enable: bool) -> None:
    model = make_model(tiny_config())
    calls: list[str] = []
    for name, module in (("image", model.visual_encoder.blocks[0]), ("text", model.text_encoder.layers[0])):
        module.register_forward_pre_hook(lambda *_, name=name: calls.append(name))
    model.checkpoint_activations(enable)
    losses = model(make_batch(), alpha=0.4)
    assert sorted(calls) == ["image", "text"]  # the text and the masked text at once
    total(model, losses).backward()
    assert sorted(calls) == ["image"] * (1 + enable) + ["text"] * (1 + enable)


def test_without_amc_the_terms_are_zero_and_the_rest_is_unchanged(tiny_config: TinyConfig) -> None:
    torch.manual_seed(1)
    with_amc = make_model(tiny_config())(make_batch(), alpha=0.4)
    plain = make_model(tiny_config(add_gcam=False))
    without = plain(make_batch([False, False, False]), alpha=0.4)
    assert (without["loss_cam1"].item(), without["loss_cam2"].item()) == (0, 0)
    for name in ("loss_mlm", "loss_ita", "loss_itm"):
        assert without[name].item() == pytest.approx(with_amc[name].item(), rel=1e-4)
    assert all(gradient.isfinite().all() for gradient in gradients(plain, total(plain, without)).values())


def test_distillation_axis_comes_from_the_config(tiny_config: TinyConfig) -> None:
    values = {}
    for axis in ("sequence", "vocabulary"):
        model = make_model(tiny_config(mlm_distill_axis=axis))
        values[axis] = [model(make_batch(), alpha, update_teacher=False)["loss_mlm"].item() for alpha in (0.0, 0.4)]
    assert values["sequence"][0] == pytest.approx(values["vocabulary"][0], rel=1e-6)
    assert abs(values["sequence"][1] - values["vocabulary"][1]) > 0.01


@pytest.mark.parametrize(("start", "clamped"), [(5.0, 0.5), (0.0, 0.001), (-1.0, 0.001), (0.2, 0.2)])
def test_temperature_is_clamped(tiny_config: TinyConfig, start: float, clamped: float) -> None:
    model = make_model(tiny_config())
    model.temp.data.fill_(start)
    losses = model(make_batch(), alpha=0.4)
    assert model.temp.item() == pytest.approx(clamped)
    assert losses["loss_ita"].isfinite()


def test_autocast_leaves_the_amc_terms_in_float32(tiny_config: TinyConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    explained: list[torch.dtype] = []
    explain = TextEncoder.explain_match

    def spy(self: TextEncoder, text: Tensor, mask: Tensor, pictures: list[KeyValue], *args: Any) -> Any:
        out = explain(self, text, mask, pictures, *args)
        explained.extend(tensor.dtype for tensor in (*out, pictures[0].key))
        return out

    model, batch = make_model(tiny_config()), make_batch()
    exact = model(batch, alpha=0.4, update_teacher=False)
    monkeypatch.setattr(TextEncoder, "explain_match", spy)
    with torch.autocast("cpu", torch.bfloat16):
        assert model.vision_proj(torch.ones(1, 8)).dtype == torch.bfloat16  # autocast is at work
        losses = model(batch, alpha=0.4, update_teacher=False)
    assert explained == [torch.float32] * 4
    for name in ("loss_cam1", "loss_cam2"):
        assert losses[name].dtype == torch.float32
        assert losses[name].item() == pytest.approx(exact[name].item(), abs=0.1)
    assert all(gradient.isfinite().all() for gradient in gradients(model, total(model, losses)).values())
