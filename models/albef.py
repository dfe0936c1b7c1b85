"""ALBEF: two encoders, projections and a matching head (Li et al., NeurIPS 2021, arXiv 2107.07651).

Encoders are injected; `build_albef` makes them from a config.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import BertConfig, ConfigError, ModelConfig, load_bert_config, size_problems
from models.amc import gradcam
from models.vit import VisionTransformer
from models.xbert import KeyValue, TextEncoder


class Explained(NamedTuple):
    """attention and gradient: (B, H, T, S) of a layer and d(match logit)/d(it); logits: (B, 2). All detached."""

    attention: Tensor
    gradient: Tensor
    logits: Tensor


class ALBEF(nn.Module):
    """The model as evaluation sees it.

    Shapes: N images, S image tokens (CLS first), B texts, T tokens, W width, E embedding size.
    """

    def __init__(
        self, visual_encoder: VisionTransformer, text_encoder: TextEncoder, embed_dim: int, temp: float
    ) -> None:
        super().__init__()
        width, text_width = visual_encoder.embed_dim, text_encoder.config.hidden_size
        self.visual_encoder = visual_encoder
        self.text_encoder = text_encoder
        self.vision_proj = nn.Linear(width, embed_dim)
        self.text_proj = nn.Linear(text_width, embed_dim)
        self.temp = nn.Parameter(torch.tensor(temp))
        self.itm_head = nn.Linear(text_width, 2)

    def encode_image(self, images: Tensor) -> Tensor:
        """(N, 3, r, r), normalised -> tokens (N, S, W)."""
        return self.visual_encoder(images)

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, T) ids and mask -> tokens (B, T, W)."""
        return self.text_encoder(input_ids, attention_mask)

    def image_feature(self, image_tokens: Tensor) -> Tensor:
        """(N, S, W) -> L2-normalised (N, E), for contrast."""
        return F.normalize(self.vision_proj(image_tokens[:, 0]), dim=-1)

    def text_feature(self, text_tokens: Tensor) -> Tensor:
        """(B, T, W) -> L2-normalised (B, E), for contrast."""
        return F.normalize(self.text_proj(text_tokens[:, 0]), dim=-1)

    def match_logits(self, fusion_tokens: Tensor) -> Tensor:
        """(B, T, W) -> (B, 2); class 1 says that text and image match."""
        return self.itm_head(fusion_tokens[:, 0])

    def match_gradcam(
        self,
        images: list[KeyValue],
        input_ids: Tensor,
        attention_mask: Tensor,
        layer: int,
        image_index: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """GradCAM of the match logit on cross-attention layer `layer` (AMC, equation 3), one map per text.

        Arguments as in `match_attention`.

        Returns:
            maps (B, h, w) and the match logits (B, 2), both detached.
        """
        seen = self.match_attention(images, input_ids, attention_mask, layer, image_index)
        return gradcam(seen.attention, seen.gradient, attention_mask, self.visual_encoder.grid), seen.logits

    def match_attention(
        self,
        images: list[KeyValue],
        input_ids: Tensor,
        attention_mask: Tensor,
        layer: int,
        image_index: Tensor | None = None,
    ) -> Explained:
        """Cross-attention of layer `layer` and the gradient of the match logit by it: what a GradCAM map is made of.

        The gradient runs from the logit back to that attention and no further. Parameters should not require gradients.

        Args:
            images: from `text_encoder.image_keys_values`; `image_index` as in `TextEncoder.fuse`.
        """
        with torch.no_grad():
            text = self.encode_text(input_ids, attention_mask)
        with torch.enable_grad():
            fused = self.text_encoder.fuse(
                text, attention_mask, images, image_index, attention_layer=layer, cls_only=True
            )
            logits = self.match_logits(fused.tokens)
            assert fused.attention is not None
            (gradient,) = torch.autograd.grad(logits[:, 1].sum(), fused.attention)
        return Explained(fused.attention.detach(), gradient, logits.detach())

    def contrast_gradcam(
        self,
        block_tokens: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        block: int,
        image_index: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """GradCAM of the image-text similarity on self-attention of image block `block`: its CLS row, patch columns.

        The image's way through the model does not depend on the text: it is computed once, a text adds a backward pass.

        Args:
            block_tokens: (N, S, W), the images as they enter that block (`visual_encoder.tokens_before`).
            image_index: (B,), which image each text is compared with; left out where text b goes with image b.

        Returns:
            maps (B, h, w) and similarities over temperature (B,), both detached.
        """
        if image_index is None:
            image_index = torch.arange(len(input_ids), device=input_ids.device)
        with torch.no_grad():
            text = self.text_feature(self.encode_text(input_ids, attention_mask))
        with torch.enable_grad():
            tokens, attention = self.visual_encoder.forward_from(block_tokens, block)
            similarity = (self.image_feature(tokens)[image_index] * text).sum(dim=1) / self.temp
        cams = attention.new_empty(len(text), *self.visual_encoder.grid)
        for rows in _one_text_per_image(image_index):
            chosen = torch.zeros_like(similarity).index_fill(0, rows, 1.0)
            (gradient,) = torch.autograd.grad(similarity, attention, chosen, retain_graph=True)
            seen = image_index[rows]
            cls_attention, cls_gradient = attention.detach()[seen, :, :1], gradient[seen, :, :1]
            one_token = torch.ones_like(attention_mask[rows, :1])
            cams[rows] = gradcam(cls_attention, cls_gradient, one_token, self.visual_encoder.grid)
        return cams, similarity.detach()


def _one_text_per_image(image_index: Tensor) -> list[Tensor]:
    """Rows of texts in groups that name no image twice: each group's gradients do not mix."""
    groups: list[list[int]] = []
    count: dict[int, int] = {}
    for row, image in enumerate(image_index.tolist()):
        turn = count.get(image, 0)
        count[image] = turn + 1
        if turn == len(groups):
            groups.append([])
        groups[turn].append(row)
    return [torch.tensor(group, device=image_index.device) for group in groups]


def build_encoders(config: ModelConfig, mlm_head: bool) -> tuple[VisionTransformer, TextEncoder]:
    """The two encoders with random weights, at the config's sizes; raises `ConfigError` for sizes that do not fit."""
    bert_config: BertConfig = load_bert_config(config.bert_config)
    if problems := size_problems(config, bert_config):
        raise ConfigError("\n".join(problems))
    visual_encoder = VisionTransformer(
        image_res=config.image_res,
        patch_size=config.patch_size,
        width=config.vision_width,
        depth=config.vision_depth,
        heads=config.vision_heads,
        mlp_ratio=config.vision_mlp_ratio,
        initializer_range=config.vision_initializer_range,
    )
    return visual_encoder, TextEncoder(bert_config, mlm_head)


def build_albef(config: ModelConfig) -> ALBEF:
    """ALBEF for evaluation (no MLM head, no teacher, no queues), with random weights."""
    return ALBEF(*build_encoders(config, mlm_head=False), config.embed_dim, config.temp)
