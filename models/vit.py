"""Image encoder: timm's VisionTransformer, plus a way to see one block's attention.

Dosovitskiy et al., ICLR 2021, arXiv 2010.11929. Parameter names are timm's, and the
released checkpoints'.
"""

from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class VisionTransformer(TimmVisionTransformer):
    """ViT with a CLS token, learned absolute positions, a final LayerNorm and no head."""

    cls_token: nn.Parameter
    pos_embed: nn.Parameter

    def __init__(
        self,
        image_res: int,
        patch_size: int,
        width: int,
        depth: int,
        heads: int,
        mlp_ratio: float,
        initializer_range: float = 0.02,
    ) -> None:
        super().__init__(
            img_size=image_res,
            patch_size=patch_size,
            embed_dim=width,
            depth=depth,
            num_heads=heads,
            mlp_ratio=mlp_ratio,
            qkv_bias=True,
            num_classes=0,
            global_pool="token",
        )
        self.checkpoint_activations = False
        for module in self.blocks.modules():  # timm's 0.02 is right for a width of 768, too small for 128
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=initializer_range)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        rows, columns = self.patch_embed.grid_size
        return rows, columns

    def forward(self, images: Tensor) -> Tensor:  # type: ignore[override]  # timm's options are not ours
        """(B, 3, image_res, image_res) -> tokens (B, 1 + patches, width), CLS first."""
        return self.norm(self._run(self.embed(images), 0, len(self.blocks)))

    def embed(self, images: Tensor) -> Tensor:
        """Patches to tokens with CLS and positions: the input of block 0."""
        patches = self.patch_embed(images)
        return torch.cat([self.cls_token.expand(len(patches), -1, -1), patches], dim=1) + self.pos_embed

    def tokens_before(self, images: Tensor, block: int) -> Tensor:
        """The input of block `block`, (B, 1 + patches, width)."""
        return self._run(self.embed(images), 0, block)

    def block_inputs(self, images: Tensor) -> list[Tensor]:
        """What enters each block, and last what leaves the final norm: `tokens_before` of every block at once."""
        tokens = [self.embed(images)]
        for block in range(len(self.blocks)):
            tokens.append(self._run(tokens[-1], block, block + 1))
        return [*tokens[:-1], self.norm(tokens[-1])]

    def forward_from(self, tokens: Tensor, block: int) -> tuple[Tensor, Tensor]:
        """Run the blocks from `block` on and return that block's attention as well.

        Args:
            tokens: its input, (B, 1 + patches, width), from `tokens_before`.

        Returns:
            the final tokens (B, 1 + patches, width) and the attention probabilities (B, heads, 1 + patches,
            1 + patches) they depend on; a leaf to differentiate by when nothing before it needs a gradient.
        """
        seen: Any = self.blocks[block]
        update, attention = _explicit_attention(seen.attn, seen.norm1(tokens))
        tokens = tokens + update
        tokens = tokens + seen.mlp(seen.norm2(tokens))
        return self.norm(self._run(tokens, block + 1, len(self.blocks))), attention

    def _run(self, tokens: Tensor, start: int, stop: int) -> Tensor:
        for block in self.blocks[start:stop]:
            if self.checkpoint_activations and torch.is_grad_enabled():
                tokens = checkpoint(block, tokens, use_reentrant=False)
            else:
                tokens = block(tokens)
        return tokens


def _explicit_attention(attn: Any, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """timm's self-attention without the fused kernel, which does not give its probabilities away."""
    batch, length, width = tokens.shape
    qkv = attn.qkv(tokens).view(batch, length, 3, attn.num_heads, width // attn.num_heads)
    query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind()
    attention = (query * attn.scale @ key.transpose(-2, -1)).softmax(dim=-1)
    if torch.is_grad_enabled() and not attention.requires_grad:
        attention.requires_grad_()
    mixed = (attention @ value).transpose(1, 2).reshape(batch, length, width)
    return attn.proj(mixed), attention
