"""The image encoder: maps of many kinds of ViT against autograd through timm's own attention, and what is refused."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from config import VISION_SIZES, ConfigError, GroundingConfig, ModelConfig, PretrainConfig, load_config, save_config
from dataset.text import Tokens
from model_sizes import load_bert_config
from models import vit
from models.albef import ALBEF, build_albef
from models.pretrain import Batch, PretrainModel
from models.xbert import TextEncoder
from tests.models.plain import IDS, MASK, randomise

TinyConfig = Callable[..., Any]
pytestmark = pytest.mark.usefixtures("one_thread")

SMALL: dict[str, Any] = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
TOKENS_OUT: dict[str, Any] = {"num_classes": 0, "global_pool": ""}


def small(name: str, **changes: Any) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, pretrained=False, **{**SMALL, **TOKENS_OUT, **changes})


KINDS: dict[str, Callable[[], nn.Module]] = {
    "vit": small("vit_tiny_patch16_224"),
    "deit3: LayerScale, CLS without position": small("deit3_small_patch16_224"),
    "dinov2: registers": small("vit_small_patch14_reg4_dinov2"),
    "clip: norm_pre": small("vit_base_patch16_clip_224"),
    "eva02: rotary embeddings, SwiGLU": small("eva02_tiny_patch14_224"),
    "dinov3: rotary embeddings, registers": small("vit_small_patch16_dinov3"),
    "other rotary embeddings for each block": small("vit_small_patch16_rope_mixed_224"),
    "beit: relative positions": small("beit_base_patch16_224"),
    "query and key norm": lambda: VisionTransformer(**SMALL, **TOKENS_OUT, qk_norm=True),
    "not square": lambda: VisionTransformer(**{**SMALL, **TOKENS_OUT, "img_size": (8, 12)}, reg_tokens=1),
}


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest, tiny_config: TinyConfig) -> ALBEF:
    """An evaluation model around a small encoder of each kind, with weights far from their start."""
    bert = load_bert_config(tiny_config(GroundingConfig, {"encoder_width": 16}).bert_config)
    model = ALBEF(KINDS[request.param](), TextEncoder(bert, mlm_head=False), embed_dim=4, temp=0.07)
    randomise(model)
    return model.eval().requires_grad_(False)


def pictures(model: ALBEF, count: int) -> Tensor:
    size = model.visual_encoder.patch_embed.img_size
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(5))


def plain_map(model: ALBEF, images: Tensor, tokens: Tokens, block: int) -> Tensor:
    """GradCAM of the similarity, one text an image: timm's own forward, its attention seen by a hook on the dropout."""
    model = copy.deepcopy(model).requires_grad_(True)
    encoder, kept = model.visual_encoder, []
    attn = encoder.blocks[block].attn
    attn.fused_attn = False
    attn.attn_drop.register_forward_hook(lambda module, inputs, output: kept.append(output))
    image = F.normalize(model.vision_proj(encoder.forward_features(images)[:, 0]), dim=-1)
    text = F.normalize(model.text_proj(model.text_encoder(*tokens)[:, 0]), dim=-1)
    (attention,) = kept
    (gradient,) = torch.autograd.grad(((image * text).sum() / model.temp), attention)
    rows, columns = encoder.patch_embed.grid_size
    maps = torch.zeros(len(images), rows, columns)
    for b in range(len(images)):
        for place in range(rows * columns):
            column = attention.shape[-1] - rows * columns + place
            products = attention[b, :, 0, column] * gradient[b, :, 0, column].clamp(min=0)
            maps[b, place // columns, place % columns] = products.detach().mean()
    return maps


@pytest.mark.parametrize("block", [0, 1])
def test_maps_equal_autograd_through_timms_attention(model: ALBEF, block: int) -> None:
    images, tokens = pictures(model, 3), Tokens(IDS, MASK)
    expected = plain_map(model, images, tokens, block)
    before = vars(model.visual_encoder.blocks[block].attn).copy()
    found = model.explain(model.encode(images, only=("itc", block)), torch.arange(3), tokens, "itc", block).maps
    assert found.shape[1:] == model.grid
    assert expected.amax(dim=(1, 2)).min() > 0
    torch.testing.assert_close(found / found.max(), expected / expected.max(), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(found.max(), expected.max(), rtol=1e-3, atol=0)
    assert vars(model.visual_encoder.blocks[block].attn) == before  # the encoder itself is never changed


def test_match_maps_leave_prefix_tokens_out(model: ALBEF) -> None:
    images, tokens = pictures(model, 3), Tokens(IDS, MASK)
    encoder = model.text_encoder
    image_tokens = model.visual_encoder.forward_features(images)
    keys_values = encoder.image_keys_values(image_tokens)
    whole = encoder.fuse(encoder(*tokens), MASK, keys_values, attention_layer=1).attention
    found = model.explain(model.encode(images), torch.arange(3), tokens, "itm", 1)
    assert whole is not None
    patches = model.grid[0] * model.grid[1]
    torch.testing.assert_close(found.attention, whole[..., -patches:], rtol=1e-4, atol=1e-6)
    assert found.maps.shape == (3, *model.grid)


def test_an_encoder_can_be_entered_at_any_block(model: ALBEF) -> None:
    encoder, images = model.visual_encoder, pictures(model, 2)
    inputs, last = vit.block_inputs(encoder, images)
    assert len(inputs) == 2
    torch.testing.assert_close(last, encoder(images))
    for block, tokens in enumerate(inputs):
        assert torch.equal(tokens, vit.tokens_before(encoder, images, block))
        final, attention = vit.forward_from(encoder, images, tokens, block)
        torch.testing.assert_close(final, last, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(attention.sum(dim=-1), torch.ones(attention.shape[:3]))


def test_attention_is_that_before_dropout(tiny_config: TinyConfig) -> None:
    encoder = VisionTransformer(**SMALL, **TOKENS_OUT, attn_drop_rate=0.5).train()
    randomise(encoder)
    images = torch.ones(1, 3, 8, 8)
    with torch.no_grad():
        _, attention = vit.forward_from(encoder, images, vit.tokens_before(encoder, images, 0), 0)
    torch.testing.assert_close(attention.sum(dim=-1), torch.ones(1, 2, 5))


# ---- `vision_model`


def named(tiny_config: TinyConfig, name: str, kind: type[ModelConfig], bert_width: int = 192, **keys: Any) -> Any:
    config = tiny_config(kind, {"encoder_width": bert_width})
    return kind.model_validate({**config.model_dump(exclude=set(VISION_SIZES)), "vision_model": name, **keys})


def test_an_encoder_by_its_name(tiny_config: TinyConfig, tmp_path: Any) -> None:
    config = named(tiny_config, "vit_tiny_patch16_224", GroundingConfig, image_res=32, vision_width=192)
    model = build_albef(config)
    assert (model.grid, model.image_res, len(model.layers("itc"))) == ((2, 2), 32, 12)
    save_config(config, tmp_path / "config.yaml")
    assert "vision_width" not in (tmp_path / "config.yaml").read_text()
    assert load_config(tmp_path / "config.yaml", GroundingConfig).model_dump() == config.model_dump()
    assert "vision_model" not in tiny_config(GroundingConfig).model_dump()


@pytest.mark.parametrize(
    ("name", "keys", "message"),
    [
        ("swin_tiny_patch4_window7_224", {}, "swin_tiny.* cannot be explained: it has no CLS token"),
        ("vit_base_patch16_siglip_224", {}, "siglip_224 cannot be explained: it has no CLS token"),
        ("convnext_tiny", {}, "convnext_tiny cannot be explained: it is no ViT for images of 32 pixels"),
        ("xcit_nano_12_p16_224", {}, "xcit_nano.* cannot be explained: its patches form no grid"),
        ("cait_xxs24_224", {}, "cait_.* cannot be explained: its (blocks have no self-attention|patches form no grid)"),
        ("vit_tiny_patch16_224", {"image_res": 40}, "patches of 16 x 16 pixels do not divide images of 40 x 40"),
        ("vit_tiny_patch16_224", {"vision_width": 768}, "its own vision_width, 192, and the config says 768: leave"),
        ("vit_tiny_patch16_224", {"vision_mlp_ratio": 2}, "vit_tiny_patch16_224 has its own vision_mlp_ratio: leave"),
        ("vit_tiny_patch16_224", {"bert_width": 64}, "vit_tiny.* is 192 but bert_config has encoder_width 64"),
        ("vit_tinny_patch16_224", {}, r"no architecture vit_tinny_patch16_224; did you mean vit_tiny_patch16_224\?"),
        ("hf-hub:timm/vit_tiny_patch16_224", {}, "timm has no architecture hf-hub:timm"),
    ],
)
def test_architectures_that_are_refused(name: str, keys: dict[str, Any], message: str, tiny_config: TinyConfig) -> None:
    with pytest.raises(ConfigError, match=message):
        build_albef(named(tiny_config, name, GroundingConfig, **{"image_res": 32, **keys}))


def test_training_with_registers(tiny_config: TinyConfig) -> None:
    """AMC's gradient reaches the registers, and recomputed activations change nothing."""
    config = named(tiny_config, "vit_small_patch14_reg4_dinov2", PretrainConfig, 384, image_res=28)
    torch.manual_seed(0)
    model = PretrainModel(config)
    assert model.grid == (2, 2)
    mask = torch.zeros(3, 8, 8)
    mask[:, :4] = 1
    batch = Batch(torch.randn(3, 3, 28, 28), IDS, MASK, IDS, IDS, mask, torch.tensor([True] * 3))
    results = []
    for recompute in (False, True):
        model.checkpoint_activations(recompute)
        torch.manual_seed(1)  # the hard negatives
        losses = model(batch, alpha=0.4, update_teacher=False)
        reg_token = model.visual_encoder.reg_token
        (gradient,) = torch.autograd.grad(losses["loss_cam1"] + losses["loss_cam2"], reg_token)
        results.append((losses["loss_cam1"].detach(), gradient))
    assert results[0][1].abs().max() > 0
    torch.testing.assert_close(results[1], results[0])
    assert all(value.isfinite() for value in losses.values())
