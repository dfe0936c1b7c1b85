"""Text and fusion encoder: BERT whose upper layers also attend to the image (ALBEF, section 3.1).

Layers below `fusion_layer` read the text alone; from there on each layer has, between self-attention and MLP, a
cross-attention whose keys and values are the image tokens. Parameter names are those of the released checkpoints
(BERT's own, with `crossattention` beside `attention`).

Three things here are not in BERT. The keys and values of an image are computed once (`image_keys_values`) and shared by
every pass and every text that looks at the image. The attention a GradCAM map needs is returned by the call that
computes it. And attention is a fused kernel except where a map needs the probabilities, or a second derivative.

Attributes typed `Any` are containers that give the checkpoints' names to their parts.

Shapes: B texts, T tokens, N images, S image tokens, W hidden size, H heads, D = W / H.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model_sizes import BertConfig


class KeyValue(NamedTuple):
    """Keys and values of N images for one fusion layer, each (N, H, S, D)."""

    key: Tensor
    value: Tensor


class FusionOutput(NamedTuple):
    """tokens: (B, T, W), CLS first, or (B, 1, W); attention: (B, H, T, S) of the layer asked for, before dropout."""

    tokens: Tensor
    attention: Tensor | None


class MatchOutput(NamedTuple):
    """logits: (B, 2); attention: (B, H, T, S) of the layer asked for, before dropout; gradient: of the match by it."""

    logits: Tensor
    attention: Tensor
    gradient: Tensor


class ResidualOutput(nn.Module):
    """LayerNorm(residual + dropout(Linear(x))): how every BERT sub-layer ends."""

    def __init__(self, config: BertConfig, inner_width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(inner_width, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, inner: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(residual + self.dropout(self.dense(inner)))


class Attention(nn.Module):
    """Multi-head attention of the text over itself or over image tokens.

    Args:
        projections: has the linear layers `query`, `key` and `value`.
        output: (mixed values, residual) -> new hidden states, (B, T, W) each.
    """

    def __init__(self, heads: int, dropout_prob: float, projections: nn.Module, output: nn.Module) -> None:
        super().__init__()
        self.heads, self.dropout_prob = heads, dropout_prob
        self.self: Any = projections
        self.output = output

    def keys_values(self, source: Tensor) -> KeyValue:
        """(N, S, source width) -> keys and values, (N, H, S, D) each."""
        return KeyValue(self._split_heads(self.self.key(source)), self._split_heads(self.self.value(source)))

    def forward(
        self,
        hidden: Tensor,
        source: KeyValue,
        bias: Tensor | None = None,
        explicit: bool = False,
        rest: KeyValue | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from `hidden` to `source`, one row of it per text or a single row shared by all texts.

        Args:
            hidden: (B, T, W).
            rest: rows for the texts after those of `source`; joining the two would copy both.
            bias: (B, 1, 1, S), added to the scores (0, or -10000 where there is nothing to see).
            explicit: compute the probabilities as a tensor: they are returned, and can be differentiated twice.

        Returns:
            the new hidden states (B, T, W) and the probabilities (B, H, T, S) before dropout, None unless `explicit`.
        """
        if explicit:
            attention = self.probabilities(hidden, source.key, bias)
            if torch.is_grad_enabled() and not attention.requires_grad:
                attention.requires_grad_()  # evaluation: the graph of a map begins here
            return self.mix(attention, source.value, hidden), attention
        query = self._split_heads(self.self.query(hidden))
        dropout = self.dropout_prob if self.training else 0.0
        if rest is not None:
            rows = query.split([len(source.key), len(rest.key)])
            pairs = zip(rows, (source, rest), strict=True)
            mixed = torch.cat([F.scaled_dot_product_attention(own, *seen, dropout_p=dropout) for own, seen in pairs])
        elif len(source.key) == 1 < len(query):
            folded = query.transpose(0, 1).flatten(1, 2)[None]
            mixed = F.scaled_dot_product_attention(folded, *source, dropout_p=dropout)
            mixed = mixed[0].unflatten(1, (len(query), -1)).transpose(0, 1)
        else:
            mask = None if bias is None else bias.to(query.dtype)
            mixed = F.scaled_dot_product_attention(query, *source, attn_mask=mask, dropout_p=dropout)
        return self._join_heads(mixed, hidden), None

    def probabilities(self, hidden: Tensor, key: Tensor, bias: Tensor | None = None) -> Tensor:
        """(B, T, W) and keys (B or 1, H, S, D) -> the attention (B, H, T, S), before dropout."""
        query = self._split_heads(self.self.query(hidden))
        scores = _matmul(query, key.transpose(-2, -1)) / math.sqrt(query.shape[-1])
        return (scores if bias is None else scores + bias).softmax(dim=-1)

    def mix(self, attention: Tensor, value: Tensor, hidden: Tensor) -> Tensor:
        """The new hidden states (B, T, W) by an attention (B, H, T, S) to values (B or 1, H, S, D)."""
        return self._join_heads(_matmul(F.dropout(attention, self.dropout_prob, self.training), value), hidden)

    def _join_heads(self, mixed: Tensor, hidden: Tensor) -> Tensor:
        return self.output(mixed.transpose(1, 2).flatten(2), hidden)

    def _split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def _matmul(rows: Tensor, shared: Tensor) -> Tensor:
    """(B, H, T, X) @ (B or 1, H, X, Y); with one shared matrix, no copy of it per row is made."""
    if len(shared) != 1 or len(rows) == 1:
        return rows @ shared
    folded = rows.transpose(0, 1).flatten(1, 2) @ shared[0]
    return folded.unflatten(1, (len(rows), -1)).transpose(0, 1)


class Layer(nn.Module):
    """Self-attention, cross-attention in fusion layers, MLP: `intermediate` has the linear layer `dense`."""

    def __init__(
        self, attention: Attention, crossattention: Attention | None, intermediate: nn.Module, output: nn.Module
    ) -> None:
        super().__init__()
        self.attention = attention
        if crossattention is not None:
            self.crossattention = crossattention
        self.intermediate: Any = intermediate
        self.output = output

    def forward(
        self,
        hidden: Tensor,
        text_bias: Tensor,
        image: KeyValue | None = None,
        image_index: Tensor | None = None,
        explicit_self: bool = False,
        explicit_cross: bool = False,
        cls_only: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """(B, T, W) -> (B, T, W) and, if `explicit_cross`, the cross-attention (B, H, T, S); T = 1 if `cls_only`.

        `image` and `image_index` as in `TextEncoder.fuse`, of this layer. Rows of `image` are picked here, so that
        recomputed activations (`checkpoint_activations`) include the copies.
        """
        source = self.attention.keys_values(hidden)
        hidden, _ = self.attention(hidden[:, :1] if cls_only else hidden, source, text_bias, explicit_self)
        attention = None
        if image is not None:
            rest = image if image_index is not None and len(image_index) < len(hidden) else None
            if image_index is not None:
                image = KeyValue(image.key.index_select(0, image_index), image.value.index_select(0, image_index))
            hidden, attention = self.crossattention(hidden, image, explicit=explicit_cross, rest=rest)
        return self.finish(hidden), attention

    def finish(self, hidden: Tensor) -> Tensor:
        """The MLP, after the attentions."""
        return self.output(F.gelu(self.intermediate.dense(hidden)), hidden)


def _build_attention(config: BertConfig, source_width: int) -> Attention:
    width = config.hidden_size
    widths = {"query": width, "key": source_width, "value": source_width}
    projections = nn.ModuleDict({name: nn.Linear(own, width) for name, own in widths.items()})
    output = ResidualOutput(config, width)
    return Attention(config.num_attention_heads, config.attention_probs_dropout_prob, projections, output)


def _build_layer(config: BertConfig, fusion: bool) -> Layer:
    attention = _build_attention(config, config.hidden_size)
    crossattention = _build_attention(config, config.encoder_width) if fusion else None
    intermediate = nn.ModuleDict({"dense": nn.Linear(config.hidden_size, config.intermediate_size)})
    return Layer(attention, crossattention, intermediate, ResidualOutput(config, config.intermediate_size))


class Embeddings(nn.Module):
    """Word, position and segment embeddings."""

    position_ids: Tensor

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.register_buffer("position_ids", torch.arange(config.max_position_embeddings)[None])

    def forward(self, input_ids: Tensor) -> Tensor:
        positions = self.position_ids[:, : input_ids.shape[1]]
        segment = self.token_type_embeddings.weight[0]
        embedded = self.word_embeddings(input_ids) + self.position_embeddings(positions) + segment
        return self.dropout(self.LayerNorm(embedded))


class MLMHead(nn.Module):
    """(..., W) -> vocabulary logits (..., V); the checkpoint has its bias under two names."""

    def __init__(self, config: BertConfig, word_embeddings: nn.Embedding) -> None:
        super().__init__()
        width = config.hidden_size
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.transform: Any = nn.ModuleDict({"dense": nn.Linear(width, width), "LayerNorm": norm})
        self.decoder = nn.Linear(width, config.vocab_size)
        self.decoder.weight = word_embeddings.weight
        self.decoder.bias = self.bias

    def forward(self, hidden: Tensor) -> Tensor:
        return self.decoder(self.transform.LayerNorm(F.gelu(self.transform.dense(hidden))))


class FusionEncoder(nn.Module):
    """Layers that read texts together with images; a subclass has them, and reads the text before."""

    config: BertConfig
    checkpoint_activations = False

    @property
    def layers(self) -> list[Layer]:
        """BERT's layers, by index."""
        raise NotImplementedError

    @property
    def fusion_layers(self) -> range:
        """Indices of the layers with cross-attention."""
        return self.config.fusion_layers

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, T) ids and mask (1 word, 0 padding) -> what the first fusion layer reads, (B, T, W)."""
        raise NotImplementedError

    def text_bias(self, attention_mask: Tensor) -> Tensor:
        """The mask (B, T) of texts -> (B, 1, 1, T), 0 or -10000, to be added to the scores of self-attention."""
        return (1.0 - attention_mask[:, None, None, :].float()) * -10000.0

    def image_keys_values(self, image_tokens: Tensor) -> list[KeyValue]:
        """(N, S, encoder width) -> keys and values of every fusion layer, for any number of `fuse` calls."""
        return [self.layers[index].crossattention.keys_values(image_tokens) for index in self.fusion_layers]

    def fuse(
        self,
        text_tokens: Tensor,
        attention_mask: Tensor,
        images: list[KeyValue],
        image_index: Tensor | None = None,
        attention_layer: int | None = None,
        cls_only: bool = False,
    ) -> FusionOutput:
        """Read texts together with images.

        Args:
            text_tokens: (B, T, W), from `forward`.
            images: from `image_keys_values`, of B images, or of one image that all texts share.
            image_index: (n,), which image each of the first n texts looks at, where that is neither of the two; after
                them, if n < B, there is one text per image, in order. Such a half gives no attention.
            attention_layer: return the cross-attention of this BERT layer, one of `fusion_layers`.
            cls_only: the tokens of the result are (B, 1, W), the CLS token alone. The last layer then computes nothing
                for the others, which see the image no more; an attention asked for in the last layer is whole still.
        """
        hidden, bias, seen = text_tokens, self.text_bias(attention_mask), None
        for index, image in zip(self.fusion_layers, images, strict=True):
            asked = index == attention_layer
            first = cls_only and index == self.fusion_layers[-1] and not asked
            inputs = (hidden, bias, image, image_index, False, asked, first)
            hidden, attention = self._run(self.layers[index], asked, *inputs)
            seen = attention if asked else seen
        return FusionOutput(hidden[:, :1] if cls_only else hidden, seen)

    def explain_match(
        self,
        text_tokens: Tensor,
        attention_mask: Tensor,
        images: list[KeyValue],
        layer: int,
        match_logits: Callable[[Tensor], Tensor],
    ) -> MatchOutput:
        """Read each text with its own image, and differentiate the match by the cross-attention of a fusion layer.

        The gradient can be differentiated itself: from that attention on there are no fused kernels, which lack second
        derivatives, and no recomputed activations. The gradient is a part of the function here, not of a graph that it
        leaves: so this can be compiled, while compiled code cannot be differentiated twice from outside.

        Args:
            text_tokens, attention_mask, images: as in `fuse`, with one image per text.
            match_logits: fused tokens (B, 1, W), CLS alone -> logits (B, 2); class 1 is the match.
        """
        hidden, bias = text_tokens, self.text_bias(attention_mask)
        steps = dict(zip(self.fusion_layers, images, strict=True))
        for index in (index for index in self.fusion_layers if index < layer):
            hidden, _ = self._run(self.layers[index], False, hidden, bias, steps[index])
        asked, image = self.layers[layer], steps[layer]
        hidden, _ = asked.attention(hidden, asked.attention.keys_values(hidden), bias)
        attention = asked.crossattention.probabilities(hidden, image.key)

        def match(attention: Tensor) -> tuple[Tensor, Tensor]:
            tokens = asked.finish(asked.crossattention.mix(attention, image.value, hidden))
            for index in (index for index in self.fusion_layers if index > layer):
                first = index == self.fusion_layers[-1]
                tokens, _ = self.layers[index](tokens, bias, steps[index], None, True, True, first)
            logits = match_logits(tokens[:, :1])
            return logits[:, 1].sum(), logits

        gradient, logits = torch.func.grad(match, has_aux=True)(attention)
        return MatchOutput(logits, attention, gradient)

    def _run(self, layer: Layer, keep: bool, *inputs: Tensor | KeyValue | bool | None) -> tuple[Tensor, Tensor | None]:
        """A layer's outputs; `keep` its activations for the backward pass, even with `checkpoint_activations`."""
        if self.checkpoint_activations and torch.is_grad_enabled() and not keep:
            return checkpoint(layer, *inputs, use_reentrant=False)
        return layer(*inputs)


class TextEncoder(FusionEncoder):
    """BERT in two halves: `forward` reads the text, `fuse` reads the text with an image; `mlm_logits` on request."""

    def __init__(self, config: BertConfig, mlm_head: bool) -> None:
        super().__init__()
        self.config = config
        embeddings = Embeddings(config)
        layers = nn.ModuleList(
            _build_layer(config, index in config.fusion_layers) for index in range(config.num_hidden_layers)
        )
        self.bert: Any = nn.ModuleDict({"embeddings": embeddings, "encoder": nn.ModuleDict({"layer": layers})})
        self.cls: Any = None
        if mlm_head:
            self.cls = nn.ModuleDict({"predictions": MLMHead(config, embeddings.word_embeddings)})
        self.apply(self._initialise)

    def _initialise(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            nn.init.zeros_(module.weight[module.padding_idx])

    @property
    def layers(self) -> list[Layer]:
        """BERT's layers, by index."""
        return list(self.bert.encoder.layer)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, T) ids and mask (1 word, 0 padding) -> text tokens (B, T, W), from the layers without image."""
        hidden, bias = self.bert.embeddings(input_ids), self.text_bias(attention_mask)
        for layer in self.layers[: self.config.fusion_layer]:
            hidden, _ = self._run(layer, False, hidden, bias)
        return hidden

    def mlm_logits(self, hidden: Tensor) -> Tensor:
        """(..., W) -> (..., V); only of an encoder built with its MLM head."""
        return self.cls.predictions(hidden)
