"""BLIP: Li et al., ICML 2022, arXiv 2201.12086, by the modules of transformers' BlipForImageTextRetrieval.

Weights and their names are transformers' own, but for `visual_encoder`, which is `vision_model` there. All layers of
the text encoder see the image. ALBEF's text is [CLS] and word pieces; BLIP's is closed by [SEP], and for matching it
begins with [ENC]. A phrase's map is the mean over the tokens between the two, as in LAVIS.

Shapes: N images, S image tokens (CLS first), B texts, T tokens ([CLS] included, [SEP] not), W width, H heads.
"""

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from config import ConfigError, ModelConfig, PretrainConfig
from dataset.text import Tokens
from model_sizes import BertConfig, load_bert_config, load_blip_config, size_problems
from models.albef import ALBEF, EncodedImages
from models.interface import Explanation
from models.pretrain import Batch, PretrainModel, TextsRead
from models.xbert import Attention, FusionEncoder, Layer


class BlipImages(nn.Module):
    """The image encoder around transformers' modules: fused attention, except where it is looked at."""

    num_prefix_tokens = 1
    recompute = False

    def __init__(self, vision: Any) -> None:
        super().__init__()
        self.embeddings, self.encoder, self.post_layernorm = vision.embeddings, vision.encoder, vision.post_layernorm
        # what ALBEF asks of timm's encoder
        size, self.embed_dim = vision.config.image_size, vision.config.hidden_size
        self.patch_embed = SimpleNamespace(img_size=(size, size), grid_size=(size // vision.config.patch_size,) * 2)

    @property
    def blocks(self) -> list[Any]:
        """The transformer's layers."""
        return list(self.encoder.layers)

    def set_grad_checkpointing(self, enable: bool) -> None:
        """Recompute activations in the backward pass."""
        self.recompute = enable

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, r, r) -> (N, S, W)."""
        return self.post_layernorm(self.run(self.embeddings(images))[0])

    def run(self, tokens: Tensor, begin: int = 0, end: int | None = None, see: bool = False) -> tuple[Tensor, Tensor]:
        """Blocks `begin` up to `end`: tokens (N, S, W), and with `see` the attention (N, H, S, S) of the first."""
        attention = torch.empty(0)
        for index, block in enumerate(self.blocks[begin:end]):
            explicit = see and index == 0
            if self.recompute and torch.is_grad_enabled() and not explicit:
                tokens, _ = checkpoint(_block, block, tokens, False, use_reentrant=False)
                continue
            tokens, found = _block(block, tokens, explicit)
            attention = found if explicit else attention
        return tokens, attention


def _block(block: Any, tokens: Tensor, explicit: bool) -> tuple[Tensor, Tensor]:
    attn = block.self_attn
    qkv = attn.qkv(block.layer_norm1(tokens)).unflatten(-1, (3, attn.num_heads, -1))
    query, key, value = qkv.permute(2, 0, 3, 1, 4)
    attention = torch.empty(0)
    if explicit:
        attention = (query @ key.transpose(-2, -1) * attn.scale).softmax(dim=-1)
        if torch.is_grad_enabled() and not attention.requires_grad:
            attention.requires_grad_()  # evaluation: the graph of a map begins here
        mixed = attn.dropout(attention) @ value
    else:
        dropout = attn.dropout.p if attn.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, scale=attn.scale)
    tokens = tokens + attn.projection(mixed.transpose(1, 2).flatten(2))
    return tokens + block.mlp(block.layer_norm2(tokens)), attention


class BlipTexts(FusionEncoder):
    """The text encoder around transformers' modules; masks (B, T) are of texts without [SEP]."""

    def __init__(self, text: Any, config: BertConfig) -> None:
        super().__init__()
        self.config = config
        self.sep_id, self.enc_id = text.config.sep_token_id, text.config.vocab_size - 1
        self.embeddings = text.embeddings
        layers = nn.ModuleList(_around(layer, config) for layer in text.encoder.layer)
        self.encoder: Any = nn.ModuleDict({"layer": layers})

    @property
    def layers(self) -> list[Layer]:
        """BERT's layers, by index."""
        return list(self.encoder.layer)

    def text_bias(self, attention_mask: Tensor) -> Tensor:
        """(B, T) -> (B, 1, 1, T + 1), with [SEP]."""
        return super().text_bias(F.pad(attention_mask, (1, 0), value=1))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """[CLS] and pieces (B, T) -> the embeddings of [ENC], pieces and [SEP], (B, T + 1, W), for matching."""
        closed = self._closed(input_ids, attention_mask)
        first = torch.full_like(closed[:, :1], self.enc_id)
        return self.embeddings(input_ids=torch.cat([first, closed[:, 1:]], dim=1))

    def alone(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """[CLS] and pieces (B, T) -> text tokens (B, 1, W) without an image, [CLS] alone, for contrast."""
        hidden = self.embeddings(input_ids=self._closed(input_ids, attention_mask))
        bias = self.text_bias(attention_mask)
        for index, layer in enumerate(self.layers):
            last = index == len(self.layers) - 1
            hidden, _ = self._run(layer, False, hidden, bias, None, None, False, False, last)
        return hidden

    def _closed(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, T) -> (B, T + 1), [SEP] after the last piece."""
        end = F.pad(attention_mask, (1, 0), value=1) > F.pad(attention_mask, (0, 1))
        return F.pad(input_ids, (0, 1), value=self.config.pad_token_id).masked_fill(end, self.sep_id)


def _around(layer: Any, config: BertConfig) -> Layer:
    """Our layer around transformers' modules; the names of parameters stay."""
    self_attention, crossattention = (
        Attention(config.num_attention_heads, config.attention_probs_dropout_prob, part.self, part.output)
        for part in (layer.attention, layer.crossattention)
    )
    return Layer(self_attention, crossattention, layer.intermediate, layer.output)


class Blip(ALBEF):
    """BLIP as evaluation sees it: a `models.interface.ExplainableModel`, with ALBEF's heads."""

    def layers(self, mode: str) -> range:
        """As in `ALBEF.layers`, but for the last layer's cross-attention: there the match depends on [ENC] alone."""
        return super().layers(mode)[:-1] if mode == "itm" else super().layers(mode)

    @staticmethod
    def contrast_tokens(encoder: FusionEncoder, tokens: Tokens) -> Tensor:
        """Text tokens for contrast, as in `ALBEF.contrast_tokens`."""
        assert isinstance(encoder, BlipTexts)
        return encoder.alone(*tokens)

    def explanation(self, attention: Tensor, gradient: Tensor, mask: Tensor, match: Tensor | None) -> Explanation:
        """As in `ALBEF.explanation`, of cross-attention (B, H, T + 1, S): the map is of neither [ENC] nor [SEP]."""
        tokens = mask.shape[1]
        words = F.pad(mask[:, 1:], (1, 0))
        found = super().explanation(attention[:, :, :tokens], gradient[:, :, :tokens], words, match)
        return found._replace(over_padding=False)

    def _block_inputs(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        encoder = self.visual_encoder
        inputs = [encoder.embeddings(images)]
        for index in range(len(encoder.blocks)):
            inputs.append(encoder.run(inputs[-1], index, index + 1)[0])
        return inputs[:-1], encoder.post_layernorm(inputs[-1])

    def _tokens_before(self, images: Tensor, block: int) -> Tensor:
        return self.visual_encoder.run(self.visual_encoder.embeddings(images), 0, block)[0]

    def _forward_from(self, encoded: EncodedImages, block: int) -> tuple[Tensor, Tensor]:
        tokens, attention = self.visual_encoder.run(encoded.block_inputs[block], block, see=True)
        return self.visual_encoder.post_layernorm(tokens), attention


class PretrainBlip(PretrainModel, Blip):
    """BLIP with its teacher and queues: `PretrainModel` without language modelling, the loss named `loss_mlm`."""

    plain_losses = ("loss_ita", "loss_itm")

    @staticmethod
    def _build(config: PretrainConfig) -> tuple[BlipImages, FusionEncoder, int]:
        return _parts(config)

    @staticmethod
    def _read(encoder: FusionEncoder, batch: Batch) -> TextsRead:
        assert isinstance(encoder, BlipTexts)
        texts = batch.input_ids, batch.attention_mask
        return TextsRead(encoder.alone(*texts), encoder(*texts), None)

    def compile_step(self, *_: Any) -> None:
        """Raises `ConfigError`: transformers' modules are not made for it."""
        raise ConfigError("--compile: is for ALBEF alone; train BLIP without it")


def build_blip(config: ModelConfig) -> Blip:
    """BLIP for evaluation, with random weights; raises `ConfigError` for sizes that do not fit."""
    return Blip(*_parts(config), config.temp)


def _parts(config: ModelConfig) -> tuple[BlipImages, BlipTexts, int]:
    """Image encoder, text encoder, size of embeddings."""
    bert = load_bert_config(config.bert_config)
    if problems := size_problems(config, bert):
        raise ConfigError("\n".join(problems))
    sizes = load_blip_config(config.bert_config)
    sizes.vision_config.image_size = config.image_res
    if config.image_res % sizes.vision_config.patch_size:
        raise ConfigError(
            f"image_res is {config.image_res}, which patches of {sizes.vision_config.patch_size} do not divide"
        )
    try:
        vision = transformers.BlipVisionModel(sizes.vision_config)
        text = transformers.BlipTextModel(sizes.text_config, add_pooling_layer=False)
    except Exception as error:  # of many kinds, by key and version
        raise ConfigError(f"{config.bert_config}: transformers cannot build its BLIP of it ({error})") from error
    try:
        found = BlipImages(vision), BlipTexts(text, bert)
        pairs = zip(found, (vision, text), strict=True)
        same = all(ours.state_dict().keys() == own.state_dict().keys() for ours, own in pairs)
    except AttributeError as error:
        raise ConfigError(f"transformers {transformers.__version__}: its BLIP has other modules ({error})") from error
    if not same:
        raise ConfigError(f"transformers {transformers.__version__}: its BLIP has parameters that are unknown here")
    return *found, sizes.image_text_hidden_size
