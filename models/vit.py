"""Image encoder: a vision transformer of timm, as it is, and a way to see the attention of one of its blocks.

Dosovitskiy et al., ICLR 2021, arXiv 2010.11929. Parameter names are timm's, and the released checkpoints'.

Every pass is timm's own: to see or to replace what a block computes, its `forward_features` runs on a shallow copy of
the encoder in which that block is another. Parameters are shared, and the encoder itself is never changed, so that
nothing has to be restored and threads do not meet.

Shapes: N images, S = P + h * w tokens, P prefix tokens (CLS first, then others such as registers), W width, H heads.
"""

import copy
import difflib
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from config import VISION_SIZES, ConfigError, ModelConfig

Module = TypeVar("Module", bound=nn.Module)
ViT = Any  # a module of timm with a CLS token, of VisionTransformer's kind (`build_vit` checks it)


# ---- building


def build_vit(config: ModelConfig) -> ViT:
    """The image encoder of a config, with random weights; called with images (N, 3, r, r), it gives tokens (N, S, W).

    Without `vision_model`, it is a plain ViT of the config's sizes.

    Raises:
        ConfigError: `vision_model` is not in timm, its maps could not be explained, or its sizes are not the config's.
    """
    if config.vision_model is not None:
        return _named_vit(config, config.vision_model)
    vit = VisionTransformer(
        img_size=config.image_res,
        patch_size=config.patch_size,
        embed_dim=config.vision_width,
        depth=config.vision_depth,
        num_heads=config.vision_heads,
        mlp_ratio=config.vision_mlp_ratio,
        qkv_bias=True,
        num_classes=0,
        global_pool="",
    )
    for module in vit.blocks.modules():  # timm's 0.02 is right for a width of 768, too small for 128
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=config.vision_initializer_range)
    return vit


def _named_vit(config: ModelConfig, name: str) -> ViT:
    if not timm.is_model(name):  # names of model hubs are not followed: nothing is downloaded
        hint = "".join(f"; did you mean {near}?" for near in difflib.get_close_matches(name, timm.list_models(), n=1))
        raise ConfigError(f"vision_model: timm has no architecture {name}{hint}")
    make: dict[str, Any] = {"pretrained": False, "num_classes": 0, "global_pool": "", "img_size": config.image_res}
    try:
        with torch.device("meta"):
            probe = timm.create_model(name, **make)
            problem = why_unfit(probe)
    except Exception as error:  # each architecture refuses in its own way what it does not know
        problem = f"it is no ViT for images of {config.image_res} pixels ({error})"
    if problem:
        raise ConfigError(f"vision_model: {name} cannot be explained: {problem}")
    if problems := _contradictions(config, probe):
        raise ConfigError("\n".join(problems))
    return timm.create_model(name, **make)


def _contradictions(config: ModelConfig, vit: ViT) -> list[str]:
    """Which of the size keys that the config sets are not those of its `vision_model`."""
    sizes = {
        "patch_size": vit.patch_embed.patch_size[0],
        "vision_width": vit.embed_dim,
        "vision_depth": len(vit.blocks),
        "vision_heads": vit.blocks[0].attn.num_heads,
    }
    return [
        f"vision_model: {config.vision_model} has its own {key}"
        + (f", {sizes[key]}, and the config says {getattr(config, key)}" if key in sizes else "")
        + ": leave that key out"
        for key in VISION_SIZES
        if key in config.model_fields_set and getattr(config, key) != sizes.get(key)
    ]


@torch.no_grad()
def why_unfit(vit: ViT) -> str | None:
    """Why the attention of a model of timm cannot be explained as a ViT's; None where it can.

    Runs the model: cheap for one on the meta device.
    """
    if getattr(vit, "cls_token", None) is None:
        return "it has no CLS token"
    if not hasattr(getattr(vit, "patch_embed", None), "grid_size") or not hasattr(vit, "num_prefix_tokens"):
        return "its patches form no grid"
    attentions: list[Any] = [getattr(block, "attn", None) for block in getattr(vit, "blocks", ())]
    if not attentions or not all(hasattr(attention, "fused_attn") for attention in attentions):
        return "its blocks have no self-attention of timm's ViT"
    patches = vit.patch_embed
    (height, width), (rows, columns), (down, right) = patches.img_size, patches.grid_size, patches.patch_size
    if (rows * down, columns * right) != (height, width):
        return f"patches of {down} x {right} pixels do not divide images of {height} x {width}"
    seeing = [_seeing(block) for block in vit.blocks]
    images = torch.zeros(1, 3, height, width, device=vit.cls_token.device)
    tokens = _run(vit, images, [block for block, _ in seeing])
    length = vit.num_prefix_tokens + rows * columns
    if getattr(tokens, "shape", None) != (1, length, vit.embed_dim) or vit.forward_head(tokens) is not tokens:
        return "its output is not one token a patch and its prefix tokens"
    for attention, (_, seen) in zip(attentions, seeing, strict=True):
        if [tuple(found.shape) for found in seen] != [(1, attention.num_heads, length, length)]:
            return "its blocks do not attend from every token to every token, once"
    return None


# ---- looking inside


def block_inputs(vit: ViT, images: Tensor) -> tuple[list[Tensor], Tensor]:
    """What enters each block, and the tokens after the final norm, each (N, S, W), from images (N, 3, r, r)."""
    taps = [_Tap(block) for block in vit.blocks]
    tokens = _run(vit, images, taps)
    return [tap.entered for tap in taps], tokens


def tokens_before(vit: ViT, images: Tensor, block: int) -> Tensor:
    """What enters block `block`, (N, S, W); nothing after that is computed."""
    rest = [_Tap(_skip) for _ in vit.blocks[block:]]
    _run(vit, images, [*vit.blocks[:block], *rest], norm=nn.Identity())
    return rest[0].entered


def forward_from(vit: ViT, images: Tensor, tokens: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Run an encoder from block `block` on, and return that block's attention as well.

    Args:
        images: (N, 3, r, r); of them, what timm computes beside the tokens is taken, such as rotary embeddings.
        tokens: (N, S, W), what enters the block: from `tokens_before` or `block_inputs`.

    Returns:
        the final tokens (N, S, W) and the attention probabilities (N, H, S, S) that they depend on, before dropout; a
        leaf to differentiate by where nothing before it needs a gradient.
    """
    explained, seen = _seeing(vit.blocks[block])
    enter = _Tap(lambda _, *args, **keys: explained(tokens, *args, **keys))
    final = _run(vit, images, [*(_Tap(_skip) for _ in vit.blocks[:block]), enter, *vit.blocks[block + 1 :]])
    return final, seen[0]


class _Tap(nn.Module):
    """Stands for a block or a dropout: keeps what enters it, and computes `function` of its inputs."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, tokens: Tensor, *args: Any, **keys: Any) -> Tensor:
        self.entered = tokens
        return self.function(tokens, *args, **keys)


def _skip(tokens: Tensor, *_: Any, **__: Any) -> Tensor:
    return tokens


def _run(vit: ViT, images: Tensor, blocks: Iterable[nn.Module], **children: nn.Module) -> Tensor:
    """timm's `forward_features` with other blocks, and other children."""
    return _with(vit, blocks=nn.Sequential(*blocks), **children).forward_features(images)


def _with(module: Module, **children: nn.Module) -> Module:
    """A shallow copy of a module, with other children in place of those named."""
    other = copy.copy(module)
    other._modules = {**module._modules, **children}
    if hasattr(other, "grad_checkpointing"):  # would run a block again to differentiate it
        other.grad_checkpointing = False  # type: ignore[assignment]
    return other


def _seeing(block: Any) -> tuple[nn.Module, list[Tensor]]:
    """The block with its attention unfused, and a list to which each pass adds that attention's probabilities.

    timm gives them to the module `attn_drop`, between softmax and values, where no fused kernel computes both at once.
    """
    seen: list[Tensor] = []
    dropout = block.attn.attn_drop

    def see(attention: Tensor) -> Tensor:
        if torch.is_grad_enabled() and not attention.requires_grad:
            attention.requires_grad_()  # evaluation: the graph of a map begins here
        seen.append(attention)
        return dropout(attention)

    attn = _with(block.attn, attn_drop=_Tap(see))
    attn.fused_attn = False
    return _with(block, attn=attn), seen
