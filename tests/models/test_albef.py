"""The model at a few thousand weights: attention, sharing of images, and GradCAM of every mode and layer."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from config import GroundingConfig
from dataset.text import Tokens
from models.albef import ALBEF, build_albef
from models.interface import Explanation, LayerError
from tests.models.plain import IDS, MASK, TOKENS, close, images, plain_gradcam, plain_layers, plain_text, randomise

TinyConfig = Callable[..., Any]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def model(tiny_config: TinyConfig) -> ALBEF:
    """An evaluation model, whose parameters need no gradient."""
    model = build_albef(tiny_config(GroundingConfig))
    randomise(model)
    return model.eval().requires_grad_(False)


# ---- text and fusion


def test_text_half_equals_plain_layers(model: ALBEF) -> None:
    close(model.text_encoder(*TOKENS), plain_text(model.text_encoder, *TOKENS))


@pytest.mark.parametrize("layer", [None, 1, 2])
def test_fusion_equals_plain_layers(model: ALBEF, layer: int | None) -> None:
    encoder = model.text_encoder
    image_tokens, text = model.visual_encoder(images(3)), encoder(*TOKENS)
    plain, attention = plain_layers(encoder, text, MASK, image_tokens, range(1, 3), seen=layer)
    fused = encoder.fuse(text, MASK, encoder.image_keys_values(image_tokens), None, layer)
    close(fused.tokens, plain)
    assert (fused.attention is None) == (layer is None)
    if layer is not None:
        close(fused.attention, attention)


@pytest.mark.parametrize("layer", [None, 1, 2])
def test_cls_only_leaves_out_what_the_cls_token_does_not_need(model: ALBEF, layer: int | None) -> None:
    encoder = model.text_encoder
    text, pictures = encoder(IDS, MASK), encoder.image_keys_values(model.visual_encoder(images(3)))
    computed: list[int] = []
    handle = encoder.layers[2].intermediate.dense.register_forward_hook(
        lambda *args: computed.append(args[1][0].shape[1])
    )
    whole, part = (encoder.fuse(text, MASK, pictures, None, layer, cls_only) for cls_only in (False, True))
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
        model.explain(model.encode(images(3)), [0, 1, 2], TOKENS, mode, layer)


def test_features_are_normalised_projections_of_the_first_token(model: ALBEF) -> None:
    halves = (
        (model.image_feature, model.vision_proj, model.visual_encoder(images(2))),
        (model.text_feature, model.text_proj, model.text_encoder(*TOKENS)),
    )
    for feature, projection, tokens in halves:
        projected = tokens[:, 0] @ projection.weight.t() + projection.bias
        close(feature(tokens), projected / projected.pow(2).sum(1, keepdim=True).sqrt())


# ---- GradCAM for evaluation


def whole_model_match_gradcam(model: ALBEF, pictures: Tensor, layer: int) -> tuple[Tensor, Tensor]:
    """Everything requires gradients, nothing is shared, and the graph reaches down to the pixels."""
    model.requires_grad_(True)
    text = plain_text(model.text_encoder, *TOKENS)
    image_tokens = model.visual_encoder(pictures)
    tokens, attention = plain_layers(model.text_encoder, text, MASK, image_tokens, range(1, 3), seen=layer)
    logits = model.itm_head(tokens[:, 0])
    assert attention is not None
    attention.retain_grad()
    logits[:, 1].sum().backward()
    assert attention.grad is not None
    model.zero_grad()
    model.requires_grad_(False)
    return plain_gradcam(attention.detach(), attention.grad, MASK), logits.detach()


def explained(model: ALBEF, pictures: Tensor, layer: int, index: list[int] | None, mode: str = "itm") -> Explanation:
    return model.explain(model.encode(pictures, only=(mode, layer)), index, TOKENS, mode, layer)


def same_maps(cam: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(cam / cam.max(), expected / expected.max(), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(cam.max(), expected.max(), rtol=1e-3, atol=0)


@pytest.mark.parametrize("layer", [1, 2])
def test_match_maps_equal_autograd_through_the_whole_model(model: ALBEF, layer: int) -> None:
    expected, expected_logits = whole_model_match_gradcam(model, images(3), layer)
    found = explained(model, images(3), layer, [0, 1, 2])
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
    index = [1, 1, 0]
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
    index, order = [1, 1, 0, 1, 2, 0], torch.tensor([0, 1, 2, 2, 0, 1])
    tokens = Tokens(IDS[order], MASK[order])
    found = model.explain(model.encode(images(3)), index, tokens, "itc", block)
    assert found.token_maps is found.match is None
    for row in range(6):
        text = Tokens(tokens.input_ids[row : row + 1], tokens.attention_mask[row : row + 1])
        alone = model.explain(model.encode(images(3)[index[row]][None]), None, text, "itc", block)
        torch.testing.assert_close(found.maps[row], alone.maps[0], rtol=1e-3, atol=1e-8)


def test_one_encoding_serves_every_mode_and_layer(model: ALBEF) -> None:
    """Whatever was asked before, and as if the images had been encoded for that question alone."""
    encoded, index = model.encode(images(3)), [2, 0, 1]
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
        tokens = model.visual_encoder(images(2)).float()
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
