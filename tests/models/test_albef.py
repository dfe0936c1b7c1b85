"""The model at a few thousand weights: attention, sharing of images, GradCAM, and a training step's parts."""

import math
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import GroundingConfig, PretrainConfig
from dataset.text import Tokens
from models import amc
from models.albef import ALBEF, build_albef
from models.interface import Explanation, LayerError
from models.pretrain import STUDENT_AND_TEACHER, Batch, PretrainModel
from models.xbert import Attention, KeyValue, TextEncoder

TinyConfig = Callable[..., Any]
pytestmark = pytest.mark.usefixtures("one_thread")

IDS = torch.tensor([[1, 7, 8, 9, 10], [1, 11, 12, 0, 0], [1, 5, 6, 7, 0]])
MASK = (IDS > 0).long()
TOKENS = Tokens(IDS, MASK)


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 0, scale: float = 0.3) -> None:
    """Weights far from their start, where attention is uniform and biases are 0: a test would miss too much there."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name == "temp":
            continue
        parameter.normal_(std=scale, generator=generator)
        if name.endswith(("LayerNorm.weight", "norm.weight", "norm1.weight", "norm2.weight")):
            parameter.add_(1)


def images(count: int, seed: int = 5) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def model(tiny_config: TinyConfig) -> ALBEF:
    """An evaluation model, whose parameters need no gradient."""
    model = build_albef(tiny_config(GroundingConfig))
    randomise(model)
    return model.eval().requires_grad_(False)


@pytest.fixture
def text_encoder(model: ALBEF) -> TextEncoder:
    return model.text_encoder


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


# ---- the fusion half, written out plainly: every image its own keys and values, softmax and products, no sharing


def plain_attention(block: Attention, hidden: Tensor, source: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    def heads(x: Tensor) -> Tensor:
        return torch.stack(x.chunk(block.heads, dim=-1), dim=1)

    query, key, value = heads(block.self.query(hidden)), heads(block.self.key(source)), heads(block.self.value(source))
    scores = torch.einsum("bhtd,bhsd->bhts", query, key) / math.sqrt(query.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(mask[:, None, None, :] == 0, -1e9)
    attention = scores.exp() / scores.exp().sum(dim=-1, keepdim=True)
    mixed = torch.cat(list(torch.einsum("bhts,bhsd->bhtd", attention, value).unbind(1)), dim=-1)
    return block.output.LayerNorm(block.output.dense(mixed) + hidden), attention


def plain_layers(
    encoder: TextEncoder, hidden: Tensor, mask: Tensor, image_tokens: Tensor | None, indices: range, seen: int = -1
) -> tuple[Tensor, Tensor | None]:
    attention = None
    for index in indices:
        layer = encoder.layers[index]
        hidden, _ = plain_attention(layer.attention, hidden, hidden, mask)
        if image_tokens is not None:
            hidden, cross = plain_attention(layer.crossattention, hidden, image_tokens, None)
            attention = cross if index == seen else attention
        inner = layer.intermediate.dense(hidden)
        inner = inner * (1 + torch.erf(inner / math.sqrt(2))) / 2
        hidden = layer.output.LayerNorm(layer.output.dense(inner) + hidden)
    return hidden, attention


def plain_gradcam(attention: Tensor, gradient: Tensor, mask: Tensor) -> Tensor:
    batch, heads, tokens, _ = attention.shape
    cam = torch.zeros(batch, 4)
    for b in range(batch):
        for head in range(heads):
            for token in range(tokens):
                positive = gradient[b, head, token, 1:].clamp(min=0)
                cam[b] = cam[b] + mask[b, token] * attention[b, head, token, 1:] * positive
    return (cam / (heads * tokens)).view(batch, 2, 2)


# ---- text and fusion


def test_text_half_equals_plain_layers(text_encoder: TextEncoder) -> None:
    embedded = text_encoder.bert.embeddings(IDS)
    close(text_encoder(IDS, MASK), plain_layers(text_encoder, embedded, MASK, None, range(1))[0])


def test_embeddings_add_words_positions_and_the_first_segment(text_encoder: TextEncoder) -> None:
    embeddings = text_encoder.bert.embeddings
    words, positions = embeddings.word_embeddings.weight, embeddings.position_embeddings.weight
    segment = embeddings.token_type_embeddings.weight[0]
    added = torch.stack([words[IDS[1, t]] + positions[t] + segment for t in range(5)])
    close(embeddings(IDS[1:2])[0], embeddings.LayerNorm(added))


@pytest.mark.parametrize("layer", [1, 2])
@pytest.mark.parametrize("twice", [False, True])
def test_fusion_equals_plain_layers(model: ALBEF, layer: int, twice: bool) -> None:
    encoder = model.text_encoder
    image_tokens, text = model.encode_image(images(3)), encoder(IDS, MASK)
    plain, attention = plain_layers(encoder, text, MASK, image_tokens, range(1, 3), seen=layer)
    fused = encoder.fuse(text, MASK, encoder.image_keys_values(image_tokens), None, layer, twice)
    assert attention is not None
    assert fused.attention is not None
    close(fused.tokens, plain)
    close(fused.attention, attention)
    close(fused.attention.sum(dim=-1), torch.ones(3, 2, 5))


def test_fused_kernel_equals_explicit_attention(model: ALBEF) -> None:
    encoder = model.text_encoder
    text, pictures = encoder(IDS, MASK), encoder.image_keys_values(model.encode_image(images(3)))
    without = encoder.fuse(text, MASK, pictures)
    assert without.attention is None
    for twice in (False, True):
        close(encoder.fuse(text, MASK, pictures, None, 1, twice).tokens, without.tokens)


@pytest.mark.parametrize("layer", [None, 1, 2])
@pytest.mark.parametrize("twice", [False, True])
def test_cls_only_leaves_out_what_the_cls_token_does_not_need(model: ALBEF, layer: int | None, twice: bool) -> None:
    encoder = model.text_encoder
    text, pictures = encoder(IDS, MASK), encoder.image_keys_values(model.encode_image(images(3)))
    computed: list[int] = []
    handle = encoder.layers[2].intermediate.dense.register_forward_hook(
        lambda *args: computed.append(args[1][0].shape[1])
    )
    whole, part = (encoder.fuse(text, MASK, pictures, None, layer, twice, cls_only) for cls_only in (False, True))
    handle.remove()
    assert part.tokens.shape == (3, 1, whole.tokens.shape[2])
    assert computed == [5, 5 if layer == 2 else 1]
    close(part.tokens, whole.tokens[:, :1])
    if layer is not None:
        assert whole.attention is not None
        assert part.attention is not None
        close(part.attention, whole.attention)
        gradients = [
            torch.autograd.grad(model.match_logits(fused.tokens)[:, 1].sum(), fused.attention)[0]
            for fused in (whole, part)
        ]
        close(gradients[1], gradients[0])


@pytest.mark.parametrize("layer", [None, 1, 2])
def test_image_index_equals_repeated_images(model: ALBEF, layer: int | None) -> None:
    encoder = model.text_encoder
    image_tokens, text = model.encode_image(images(2)), encoder(IDS, MASK)
    index = torch.tensor([1, 0, 1])
    indexed = encoder.fuse(text, MASK, encoder.image_keys_values(image_tokens), index, layer)
    repeated = encoder.fuse(text, MASK, encoder.image_keys_values(image_tokens[index]), None, layer)
    close(indexed.tokens, repeated.tokens)
    if layer is not None:
        close(indexed.attention, repeated.attention)
    swapped = encoder.fuse(text, MASK, encoder.image_keys_values(image_tokens), 1 - index, layer)
    assert (swapped.tokens - indexed.tokens).abs().max() > 0.01  # the image matters at all


@pytest.mark.parametrize("layer", [None, 1, 2])
def test_one_shared_image_equals_the_repeated_image(model: ALBEF, layer: int | None) -> None:
    encoder = model.text_encoder
    image_tokens, text = model.encode_image(images(1)), encoder(IDS, MASK)
    shared = encoder.fuse(text, MASK, encoder.image_keys_values(image_tokens), None, layer)
    repeated = encoder.fuse(text, MASK, encoder.image_keys_values(image_tokens.expand(3, -1, -1)), None, layer)
    close(shared.tokens, repeated.tokens)
    if layer is not None:
        close(shared.attention, repeated.attention)


@pytest.mark.parametrize("layer", [None, 1, 2])
def test_padding_does_not_change_a_text(model: ALBEF, layer: int | None) -> None:
    encoder = model.text_encoder
    pictures = encoder.image_keys_values(model.encode_image(images(1)))
    results = []
    for ids in (torch.tensor([[1, 11, 12]]), torch.tensor([[1, 11, 12, 0, 0, 0]])):
        mask = (ids > 0).long()
        text = encoder(ids, mask)
        results.append((text, *encoder.fuse(text, mask, pictures, None, layer)))
    (text, fused, attention), (padded_text, padded_fused, padded_attention) = results
    close(padded_text[:, :3], text)
    close(padded_fused[:, :3], fused)
    if layer is not None:
        close(padded_attention[:, :, :3], attention)


@pytest.mark.parametrize(
    ("mode", "layer", "message"),
    [
        ("itm", 0, "--block_num 0: the fusion layers are 1 to 2"),
        ("itm", 3, "--block_num 3: the fusion layers are 1 to 2"),
        ("itc", 2, "--block_num 2: the image encoder's blocks are 0 to 1"),
        ("itc", -1, "--block_num -1: the image encoder's blocks are 0 to 1"),
    ],
)
def test_layers_that_cannot_be_explained(model: ALBEF, mode: str, layer: int, message: str) -> None:
    with pytest.raises(LayerError, match=f"^{message}$"):
        model.explain(model.encode(images(3)), torch.arange(3), TOKENS, mode, layer)


def test_features_are_normalised_projections_of_the_first_token(model: ALBEF) -> None:
    tokens = model.encode_image(images(2))
    projected = tokens[:, 0] @ model.vision_proj.weight.t() + model.vision_proj.bias
    close(model.image_feature(tokens), projected / projected.pow(2).sum(1, keepdim=True).sqrt())
    text = model.encode_text(IDS, MASK)
    projected = text[:, 0] @ model.text_proj.weight.t() + model.text_proj.bias
    close(model.text_feature(text), projected / projected.pow(2).sum(1, keepdim=True).sqrt())


# ---- GradCAM for evaluation


def whole_model_match_gradcam(model: ALBEF, pictures: Tensor, layer: int) -> tuple[Tensor, Tensor]:
    """Everything requires gradients, nothing is shared, and the graph reaches down to the pixels."""
    model.requires_grad_(True)
    encoder = model.text_encoder
    embedded = encoder.bert.embeddings(IDS)
    text, _ = plain_layers(encoder, embedded, MASK, None, range(1))
    tokens, attention = plain_layers(encoder, text, MASK, model.encode_image(pictures), range(1, 3), seen=layer)
    logits = model.itm_head(tokens[:, 0])
    assert attention is not None
    attention.retain_grad()
    logits[:, 1].sum().backward()
    assert attention.grad is not None
    model.zero_grad()
    model.requires_grad_(False)
    return plain_gradcam(attention.detach(), attention.grad, MASK), logits.detach()


def explained(model: ALBEF, pictures: Tensor, layer: int, index: Tensor | None, mode: str = "itm") -> Explanation:
    return model.explain(model.encode(pictures, only=(mode, layer)), index, TOKENS, mode, layer)


def same_maps(cam: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(cam / cam.max(), expected / expected.max(), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(cam.max(), expected.max(), rtol=1e-3, atol=0)


@pytest.mark.parametrize("layer", [1, 2])
def test_match_maps_equal_autograd_through_the_whole_model(model: ALBEF, layer: int) -> None:
    expected, expected_logits = whole_model_match_gradcam(model, images(3), layer)
    found = explained(model, images(3), layer, torch.arange(3))
    assert found.match is not None
    assert found.token_maps is not None
    assert expected.amax(dim=(1, 2)).count_nonzero() >= 2  # not a comparison of nothing with nothing
    assert not any(tensor.requires_grad for tensor in (found.attention, found.gradient, found.maps, found.match))
    same_maps(found.maps, expected)
    close(found.token_maps.mean(dim=1), found.maps)
    assert not found.token_maps[1, 3:].any()  # padding
    close(found.match, expected_logits.softmax(dim=1)[:, 1])


@pytest.mark.parametrize("layer", [1, 2])
def test_match_maps_of_a_shared_and_of_indexed_images(model: ALBEF, layer: int) -> None:
    index = torch.tensor([1, 1, 0])
    expected, logits = whole_model_match_gradcam(model, images(2)[index], layer)
    same_maps(explained(model, images(2), layer, index).maps, expected)
    close(model.match(model.encode(images(2)), index, TOKENS), logits.softmax(dim=1)[:, 1])
    expected, logits = whole_model_match_gradcam(model, images(2)[[0, 0, 0]], layer)
    same_maps(explained(model, images(2)[:1], layer, None).maps, expected)
    close(model.match(model.encode(images(2)[:1]), None, TOKENS), logits.softmax(dim=1)[:, 1])


def test_match_map_of_a_padded_text_differs_by_a_factor_only(model: ALBEF) -> None:
    encoded = model.encode(images(1))
    ids, padded = torch.tensor([[1, 11, 12]]), torch.tensor([[1, 11, 12, 0, 0, 0]])
    one, other = (model.explain(encoded, None, Tokens(x, (x > 0).long()), "itm", 1) for x in (ids, padded))
    torch.testing.assert_close(other.maps * 6 / 3, one.maps, rtol=1e-3, atol=1e-8)  # the mean includes padding
    assert one.match is not None
    torch.testing.assert_close(other.match, one.match)


@pytest.mark.parametrize("block", [0, 1])
def test_similarity_maps_of_indexed_images(model: ALBEF, block: int) -> None:
    """Several texts of an image share its way through the model, and have the maps that each has alone."""
    index, order = torch.tensor([1, 1, 0, 1, 2, 0]), torch.tensor([0, 1, 2, 2, 0, 1])
    tokens = Tokens(IDS[order], MASK[order])
    found = model.explain(model.encode(images(3)), index, tokens, "itc", block)
    assert found.token_maps is found.match is None
    for row in range(6):
        text = Tokens(tokens.input_ids[row : row + 1], tokens.attention_mask[row : row + 1])
        alone = model.explain(model.encode(images(3)[index[row]][None]), None, text, "itc", block)
        torch.testing.assert_close(found.maps[row], alone.maps[0], rtol=1e-3, atol=1e-8)


def test_one_encoding_serves_every_mode_and_layer(model: ALBEF) -> None:
    """Whatever was asked before, and as if the images had been encoded for that question alone."""
    encoded, index = model.encode(images(3)), torch.tensor([2, 0, 1])
    questions = [("itm", 1), ("itm", 2), ("itc", 0), ("itc", 1)]
    first = [model.explain(encoded, index, TOKENS, *question).maps for question in questions]
    second = [model.explain(encoded, index, TOKENS, *question).maps for question in reversed(questions)]
    for (mode, layer), one, other in zip(questions, first, reversed(second), strict=True):
        assert torch.equal(one, other)
        assert torch.equal(one, explained(model, images(3), layer, index, mode).maps)


def test_encoding_for_one_question_computes_nothing_else(model: ALBEF) -> None:
    assert model.encode(images(1), only=("itm", 1)).block_inputs == {}
    ran: list[int] = []
    for index, block in enumerate(model.visual_encoder.blocks):
        block.register_forward_pre_hook(lambda *_, index=index: ran.append(index))
    encoded = model.encode(images(1), only=("itc", 1))
    assert (encoded.keys_values, list(encoded.block_inputs), ran) == ([], [1], [0])


def test_reduced_precision_is_of_the_image_encoder_alone(model: ALBEF) -> None:
    exact, reduced = model.encode(images(2)), model.encode(images(2), torch.bfloat16)
    assert {x.dtype for x in (*reduced.block_inputs.values(), *reduced.keys_values[0])} == {torch.float32}
    assert not torch.equal(reduced.block_inputs[1], exact.block_inputs[1])
    torch.testing.assert_close(reduced.block_inputs[1], exact.block_inputs[1], rtol=0.1, atol=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        tokens = model.encode_image(images(2)).float()
    expected = model.text_encoder.image_keys_values(tokens)[1].key  # by float32 weights
    assert torch.equal(reduced.keys_values[1].key, expected)


# ---- building


@pytest.mark.parametrize("spread", [0.02, 0.1])
def test_image_encoder_starts_with_the_configured_spread(tiny_config: TinyConfig, spread: float) -> None:
    torch.manual_seed(0)
    encoder = build_albef(tiny_config(GroundingConfig, vision_initializer_range=spread)).visual_encoder
    weights = [module.weight.flatten() for module in encoder.blocks.modules() if isinstance(module, nn.Linear)]
    assert len(weights) == 4 * len(encoder.blocks)
    assert torch.cat(weights).std().item() == pytest.approx(spread, rel=0.1)


# ---- training


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


def test_momentum_update(tiny_config: TinyConfig) -> None:
    model = make_model(tiny_config(momentum=0.9))
    before = [(student.detach().clone(), teacher.clone()) for student, teacher in teacher_pairs(model)]
    model.update_teacher()
    for (student, teacher), (old_student, old_teacher) in zip(teacher_pairs(model), before, strict=True):
        torch.testing.assert_close(teacher, 0.9 * old_teacher + 0.1 * old_student)
        assert torch.equal(student, old_student)


def test_forward_moves_the_teacher_before_it_uses_it(tiny_config: TinyConfig) -> None:
    model, batch = make_model(tiny_config(momentum=0.5)), make_batch()
    expected = [0.5 * teacher + 0.5 * student.detach() for student, teacher in teacher_pairs(model)]
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


def test_losses_have_names_weights_and_finite_gradients(tiny_config: TinyConfig) -> None:
    model = make_model(tiny_config(amc={"layer": 1, "weight_mean": 0.3, "weight_max": 0.6}))
    losses = model(make_batch(), alpha=0.4)
    assert list(losses) == ["loss_mlm", "loss_ita", "loss_itm", "loss_cam1", "loss_cam2"]
    assert list(model.loss_weights.values()) == [1.0, 1.0, 1.0, 0.3, 0.6]
    assert all(loss.shape == () and loss > 0 for loss in losses.values())
    found = gradients(model, total(model, losses))
    assert set(found) == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(gradient.isfinite().all() for gradient in found.values())


def amc_terms(model: PretrainModel, has_box: list[bool], shift: int = 0) -> tuple[float, float]:
    """The two terms; `shift` moves the box masks of the samples without a box."""
    batch = make_batch(has_box)
    moved = torch.where(batch.has_box[:, None, None], batch.box_mask, batch.box_mask.roll(shift, dims=1))
    losses = model(batch._replace(box_mask=moved), alpha=0.4, update_teacher=False)
    found = gradients(model, total(model, losses))
    assert all(gradient.isfinite().all() for gradient in found.values())
    return losses["loss_cam1"].item(), losses["loss_cam2"].item()


def test_batch_without_boxes_has_no_amc(tiny_config: TinyConfig) -> None:
    model = make_model(tiny_config(amc={"layer": 1, "margin_mean": 2.0, "margin_max": 2.0}))
    assert amc_terms(model, [False, False, False]) == (0, 0)


def test_batch_with_some_boxes_leaves_the_other_samples_out(tiny_config: TinyConfig) -> None:
    # Margins so large that every hinge is open, and then a mean over samples is exact.
    model = make_model(tiny_config(amc={"layer": 1, "margin_mean": 2.0, "margin_max": 2.0, "mean_over": "sample"}))
    alone = [amc_terms(model, [row == keep for row in range(3)]) for keep in range(3)]
    assert len({round(value, 4) for value, _ in alone}) == 3
    some, every = amc_terms(model, [True, False, True]), amc_terms(model, [True, True, True])
    for term in (0, 1):
        assert some[term] == pytest.approx((alone[0][term] + alone[2][term]) / 2, rel=1e-4)
        assert every[term] == pytest.approx(sum(values[term] for values in alone) / 3, rel=1e-4)
    assert amc_terms(model, [True, False, True], shift=2) == pytest.approx(some, rel=1e-5)


@pytest.mark.parametrize("layer", [1, 2])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_amc_terms_and_their_gradients_equal_plain_autograd(
    tiny_config: TinyConfig, layer: int, checkpointing: bool
) -> None:
    model, batch = make_model(tiny_config(amc={"layer": layer, "margin_mean": 2.0, "margin_max": 2.0})), make_batch()
    encoder = model.text_encoder
    text, _ = plain_layers(encoder, encoder.bert.embeddings(IDS), MASK, None, range(1))
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


def test_matching_pairs_of_a_batch_of_two(tiny_config: TinyConfig) -> None:
    # With two samples each negative is the other one, so that the loss can be written down.
    model = make_model(tiny_config())
    full = make_batch()
    batch = Batch(*(tensor[:2] for tensor in full))
    encoder = model.text_encoder
    tokens, text = model.visual_encoder(batch.image), encoder(IDS[:2], MASK[:2])

    def logits(text_rows: list[int], image_rows: list[int]) -> Tensor:
        fused, _ = plain_layers(encoder, text[text_rows], MASK[text_rows], tokens[image_rows], range(1, 3))
        return model.itm_head(fused[:, 0])

    pairs = torch.cat([logits([0, 1], [0, 1]), logits([0, 1], [1, 0]), logits([1, 0], [0, 1])])
    expected = F.cross_entropy(pairs, torch.tensor([1, 1, 0, 0, 0, 0]))
    assert model(batch, alpha=0.4)["loss_itm"].item() == pytest.approx(expected.item(), rel=1e-4)


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
    encoder, tokens = model.text_encoder, model.encode_image(batch.image)
    text = model.encode_text(IDS, MASK)
    # The student against the teacher, whose features have just been put into the queues.
    close(similarities[0], model.text_feature(text) @ model.image_queue[:, :3] / model.temp)
    close(similarities[1], model.image_feature(tokens) @ model.text_queue[:, :3] / model.temp)
    logits = []
    for texts, pictures in (([0, 1, 2], [0, 1, 2]), ([0, 1, 2], [1, 2, 0]), ([2, 2, 0], [0, 1, 2])):
        fused, _ = plain_layers(encoder, text[texts], MASK[texts], tokens[pictures], range(1, 3))
        logits.append(model.itm_head(fused[:, 0]))
    expected = F.cross_entropy(torch.cat(logits), torch.tensor([1] * 3 + [0] * 6))
    assert found == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize(("checkpointing", "compiled"), [(True, False), (False, True), (True, True)])
def test_checkpointing_and_compiling_change_nothing(
    tiny_config: TinyConfig, checkpointing: bool, compiled: bool
) -> None:
    graphs, results = mock.Mock(wraps=torch._dynamo.lookup_backend("aot_eager")), []
    for changed in (False, True):
        model = make_model(tiny_config())
        names = list(model.state_dict())
        model.checkpoint_activations(changed and checkpointing)
        if changed and compiled:
            model.compile_image_encoders(graphs)
        torch.manual_seed(1)  # the hard negatives
        losses = model(make_batch(), alpha=0.4)
        results.append((losses, gradients(model, total(model, losses))))
        assert list(model.state_dict()) == names
    assert graphs.call_count == (2 if compiled else 0)  # student and teacher, whole
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("enable", [False, True])
def test_activation_checkpointing_recomputes(tiny_config: TinyConfig, enable: bool) -> None:
    model = make_model(tiny_config())
    calls: list[str] = []
    for name, module in (("image", model.visual_encoder.blocks[0]), ("text", model.text_encoder.layers[0])):
        module.register_forward_pre_hook(lambda *_, name=name: calls.append(name))
    model.checkpoint_activations(enable)
    losses = model(make_batch(), alpha=0.4)
    assert sorted(calls) == ["image", "text", "text"]  # the text, and the masked text
    total(model, losses).backward()
    assert sorted(calls) == (["image"] * 2 + ["text"] * 4 if enable else ["image", "text", "text"])


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
    seen: list[torch.dtype] = []
    matrix_products: list[torch.dtype] = []
    normalise_map, fuse = amc.normalise_map, TextEncoder.fuse

    def spy(cam: Tensor) -> Tensor:
        seen.append(cam.dtype)
        return normalise_map(cam)

    def spy_fuse(self: TextEncoder, text: Tensor, mask: Tensor, pictures: list[KeyValue], *args: Any, **kw: Any) -> Any:
        out = fuse(self, text, mask, pictures, *args, **kw)
        if kw.get("twice_differentiable"):
            matrix_products.extend(tensor.dtype for tensor in (out.tokens, out.attention, pictures[0].key))
        return out

    model, batch = make_model(tiny_config()), make_batch()
    exact = model(batch, alpha=0.4, update_teacher=False)
    monkeypatch.setattr(amc, "normalise_map", spy)
    monkeypatch.setattr(TextEncoder, "fuse", spy_fuse)
    with torch.autocast("cpu", torch.bfloat16):
        assert model.encode_text(IDS, MASK).dtype == torch.float32  # LayerNorm ends it
        assert model.vision_proj(torch.ones(1, 8)).dtype == torch.bfloat16  # autocast is at work
        losses = model(batch, alpha=0.4, update_teacher=False)
    assert seen == [torch.float32]
    assert matrix_products == [torch.float32] * 3
    for name in ("loss_cam1", "loss_cam2"):
        assert losses[name].dtype == torch.float32
        assert losses[name].item() == pytest.approx(exact[name].item(), abs=0.1)
    assert all(loss.isfinite() for loss in losses.values())
    assert all(gradient.isfinite().all() for gradient in gradients(model, total(model, losses)).values())
