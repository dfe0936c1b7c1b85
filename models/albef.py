"""ALBEF: two encoders, projections and a matching head (Li et al., NeurIPS 2021, arXiv 2107.07651).

Encoders are injected; `build_albef` makes them from a config. `models.interface` says what evaluation asks of it.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import ConfigError, ModelConfig
from dataset.text import Tokens
from model_sizes import load_bert_config, size_problems, width_problems
from models import vit
from models.interface import Explanation, check_layer
from models.vit import ViT, build_vit
from models.xbert import FusionEncoder, KeyValue, TextEncoder
from utils import upload


class EncodedImages(NamedTuple):
    """N images as ALBEF keeps them.

    Args:
        pixels: (N, 3, r, r).
        keys_values: for each fusion layer, of N images; none where only mode "itc" will be asked.
        block_inputs: what enters an image block, (N, S, W), by its index: all blocks, one, or none.
    """

    pixels: Tensor
    keys_values: list[KeyValue]
    block_inputs: dict[int, Tensor]


class ALBEF(nn.Module):
    """The model as evaluation sees it: a `models.interface.ExplainableModel`.

    Shapes: N images, S image tokens (CLS first), B texts, T tokens, W width, E embedding size.
    """

    def __init__(self, visual_encoder: ViT, text_encoder: FusionEncoder, embed_dim: int, temp: float) -> None:
        super().__init__()
        width, text_width = visual_encoder.embed_dim, text_encoder.config.hidden_size
        self.visual_encoder = visual_encoder
        self.text_encoder: Any = text_encoder  # ALBEF's own is a TextEncoder
        self.vision_proj = nn.Linear(width, embed_dim)
        self.text_proj = nn.Linear(text_width, embed_dim)
        self.temp = nn.Parameter(torch.tensor(temp))
        self.itm_head = nn.Linear(text_width, 2)

    # ---- its heads

    def image_feature(self, image_tokens: Tensor) -> Tensor:
        """(N, S, W) -> L2-normalised (N, E), for contrast."""
        return F.normalize(self.vision_proj(image_tokens[:, 0]), dim=-1)

    def text_feature(self, text_tokens: Tensor) -> Tensor:
        """(B, T, W) -> L2-normalised (B, E), for contrast."""
        return F.normalize(self.text_proj(text_tokens[:, 0]), dim=-1)

    def match_logits(self, fusion_tokens: Tensor) -> Tensor:
        """(B, T, W) -> (B, 2); class 1 says that text and image match."""
        return self.itm_head(fusion_tokens[:, 0])

    # ---- the door

    @property
    def image_res(self) -> int:
        """Height and width of input images, in pixels."""
        return self.visual_encoder.patch_embed.img_size[0]

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of image patches."""
        return self.visual_encoder.patch_embed.grid_size

    @property
    def max_tokens(self) -> int:
        """The longest text that it can read, [CLS] included."""
        return self.text_encoder.config.max_position_embeddings

    def layers(self, mode: str) -> range:
        """The BERT layers with cross-attention ("itm"), or the image encoder's blocks ("itc")."""
        return self.text_encoder.config.explained_layers if mode == "itm" else range(len(self.visual_encoder.blocks))

    @torch.no_grad()
    def encode(
        self, images: Tensor, precision: torch.dtype = torch.float32, only: tuple[str, int] | None = None
    ) -> EncodedImages:
        """Images once, as in `ExplainableModel.encode`."""
        inputs, tokens = {}, None
        with torch.autocast(images.device.type, precision, enabled=precision != torch.float32):
            if only is None:
                found, tokens = self._block_inputs(images)
                inputs = dict(enumerate(found))
            elif only[0] == "itm":
                tokens = self.visual_encoder(images)
            else:
                inputs = {only[1]: self._tokens_before(images, only[1])}
        keys_values = [] if tokens is None else self.text_encoder.image_keys_values(tokens.float())
        return EncodedImages(images, keys_values, {block: x.float() for block, x in inputs.items()})

    def explain(
        self, encoded: EncodedImages, image_index: Sequence[int] | None, tokens: Tokens, mode: str, layer: int
    ) -> Explanation:
        """Attention and gradient, as in `ExplainableModel.explain`. Parameters should not require gradients."""
        check_layer(self, mode, layer)
        function = self._explain_match if mode == "itm" else self._explain_similarity
        return function(encoded, image_index, tokens, layer)

    @torch.no_grad()
    def match(self, encoded: EncodedImages, image_index: Sequence[int] | None, tokens: Tokens) -> Tensor:
        """Match probabilities (B,), as in `ExplainableModel.match`."""
        text = self.text_encoder(*tokens)
        index = None if image_index is None else _beside(encoded, image_index)
        fused = self.text_encoder.fuse(text, tokens.attention_mask, encoded.keys_values, index, cls_only=True)
        return self.match_logits(fused.tokens).softmax(dim=1)[:, 1]

    def _explain_match(
        self, encoded: EncodedImages, image_index: Sequence[int] | None, tokens: Tokens, layer: int
    ) -> Explanation:
        """Cross-attention of fusion layer `layer`; the gradient of the match logit runs back to it and no further."""
        with torch.no_grad():
            text = self.text_encoder(*tokens)
        index = None if image_index is None else _beside(encoded, image_index)
        with torch.enable_grad():
            mask, images = tokens.attention_mask, encoded.keys_values
            fused = self.text_encoder.fuse(text, mask, images, index, attention_layer=layer, cls_only=True)
            logits = self.match_logits(fused.tokens)
            assert fused.attention is not None
            (gradient,) = torch.autograd.grad(logits[:, 1].sum(), fused.attention)
        match = logits.detach().softmax(dim=1)[:, 1]
        return self.explanation(fused.attention.detach(), gradient, mask, match)

    def _explain_similarity(
        self, encoded: EncodedImages, image_index: Sequence[int] | None, tokens: Tokens, layer: int
    ) -> Explanation:
        """Self-attention of image block `layer`, its CLS row, and the gradient of the similarity over temperature.

        The image's way through the model does not depend on the text: it is computed once, a text adds a backward pass.
        """
        image_index = [0] * len(tokens.input_ids) if image_index is None else image_index
        index = _beside(encoded, image_index)
        with torch.no_grad():
            text = self.text_feature(self.contrast_tokens(self.text_encoder, tokens))
        with torch.enable_grad():
            final, attention = self._forward_from(encoded, layer)
            similarity = (self.image_feature(final)[index] * text).sum(dim=1) / self.temp
        rows_seen = self._patches(attention.detach()[index, :, :1])
        gradients = torch.empty_like(rows_seen)
        for group in _one_text_per_image(image_index):
            rows = _beside(encoded, group)
            chosen = torch.zeros_like(similarity).index_fill(0, rows, 1.0)
            (gradient,) = torch.autograd.grad(similarity, attention, chosen, retain_graph=True)
            gradients[rows] = self._patches(gradient[index[rows], :, :1])
        return Explanation(rows_seen, gradients, None, None, self.grid)

    # ---- what another model of these parts does in its own way

    @staticmethod
    def contrast_tokens(encoder: FusionEncoder, tokens: Tokens) -> Tensor:
        """Text tokens (B, T, W), for contrast; `encoder` is the model's or its teacher's."""
        return encoder(*tokens)

    def explanation(self, attention: Tensor, gradient: Tensor, mask: Tensor, match: Tensor | None) -> Explanation:
        """Of cross-attention (B, H, T, S) and its gradient, for texts of a mask (B, T)."""
        return Explanation(self._patches(attention), self._patches(gradient), mask, match, self.grid)

    def _block_inputs(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        return vit.block_inputs(self.visual_encoder, images)

    def _tokens_before(self, images: Tensor, block: int) -> Tensor:
        return vit.tokens_before(self.visual_encoder, images, block)

    def _forward_from(self, encoded: EncodedImages, block: int) -> tuple[Tensor, Tensor]:
        return vit.forward_from(self.visual_encoder, encoded.pixels, encoded.block_inputs[block], block)

    def _patches(self, columns: Tensor) -> Tensor:
        """(..., S) -> (..., h * w): without the CLS token, and registers."""
        return columns[..., self.visual_encoder.num_prefix_tokens :]


def _beside(encoded: EncodedImages, numbers: Sequence[int]) -> Tensor:
    """Numbers as a tensor on the images' device."""
    return upload(torch.as_tensor(numbers), encoded.pixels.device)


def _one_text_per_image(image_index: Sequence[int]) -> list[list[int]]:
    """Rows of texts in groups that name no image twice: each group's gradients do not mix."""
    groups: list[list[int]] = []
    before = Counter[int]()
    for row, image in enumerate(map(int, image_index)):
        if before[image] == len(groups):
            groups.append([])
        groups[before[image]].append(row)
        before[image] += 1
    return groups


def build_encoders(config: ModelConfig, mlm_head: bool) -> tuple[ViT, TextEncoder]:
    """The two encoders with random weights, at the config's sizes; raises `ConfigError` for sizes that do not fit."""
    bert_config = load_bert_config(config.bert_config)
    if problems := size_problems(config, bert_config):
        raise ConfigError("\n".join(problems))
    visual_encoder = build_vit(config)
    if problems := width_problems(f"the width of {config.vision_model}", visual_encoder.embed_dim, bert_config):
        raise ConfigError("\n".join(problems))
    return visual_encoder, TextEncoder(bert_config, mlm_head)


def build_albef(config: ModelConfig) -> ALBEF:
    """ALBEF for evaluation (no MLM head, no teacher, no queues), with random weights."""
    return ALBEF(*build_encoders(config, mlm_head=False), config.embed_dim, config.temp)
