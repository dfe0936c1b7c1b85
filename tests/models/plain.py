"""ALBEF written out plainly, without sharing and fused kernels, and small inputs: what the model is held against."""

import math

import torch
from torch import Tensor, nn

from dataset.text import Tokens
from models.xbert import Attention, TextEncoder

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


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


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


def plain_text(encoder: TextEncoder, ids: Tensor, mask: Tensor) -> Tensor:
    """The layers without image; the tests' encoder has one."""
    embeddings = encoder.bert.embeddings
    words, positions = embeddings.word_embeddings.weight[ids], embeddings.position_embeddings.weight[: ids.shape[1]]
    embedded = embeddings.LayerNorm(words + positions + embeddings.token_type_embeddings.weight[0])
    return plain_layers(encoder, embedded, mask, None, range(1))[0]


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
