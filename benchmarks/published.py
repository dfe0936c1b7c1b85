"""The published procedure on this repository's weights, written plainly: the baseline of the benchmarks.

As the release does it: every (image, text) pair runs through both encoders by itself, every pass computes the fusion
layers' keys and values anew, attention is written out as probabilities, and a map takes a backward pass through every
weight of the model.
"""

import copy
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from models import amc, losses
from models.albef import ALBEF
from models.kernels.onednn import use_onednn
from models.pretrain import STUDENT_AND_TEACHER, Batch, PretrainModel
from models.xbert import FusionEncoder, TextEncoder

Model = TypeVar("Model", bound=ALBEF)


def shared_copy(model: Model) -> Model:
    """The same model, its parameters and buffers shared."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


def fast_copy(model: Model) -> Model:
    """The same model, its parameters shared, as the programs here run it on the CPU.

    `model` itself is left to the published procedure: timm's blocks write attention out, without a fused kernel.
    """
    own = shared_copy(model)
    use_onednn(own)
    blocks: list[Any] = list(model.visual_encoder.blocks)
    for block in blocks:
        if hasattr(block, "attn"):  # of timm
            block.attn.fused_attn = False
    return own


def encode_text(encoder: TextEncoder, ids: Tensor, mask: Tensor) -> Tensor:
    """(B, T) -> (B, T, W)."""
    hidden, bias = encoder.bert.embeddings(ids), encoder.text_bias(mask)
    for layer in encoder.layers[: encoder.config.fusion_layer]:
        hidden, _ = layer(hidden, bias, explicit_self=True)
    return hidden


def fuse(
    encoder: FusionEncoder, text: Tensor, mask: Tensor, image_tokens: Tensor, layer: int | None = None
) -> tuple[Tensor, Tensor | None]:
    """(B, T, W) with the tokens (B, S, V) of its own image each -> (B, T, W), and the cross-attention of `layer`."""
    hidden, bias, seen = text, encoder.text_bias(mask), None
    for index in encoder.fusion_layers:
        module = encoder.layers[index]
        image = module.crossattention.keys_values(image_tokens)
        hidden, attention = module(hidden, bias, image, explicit_self=True, explicit_cross=True)
        if index == layer:
            seen = attention
    return hidden, seen


def maps(model: ALBEF, images: Tensor, ids: Tensor, mask: Tensor, layer: int) -> Tensor:
    """GradCAM maps (B, h, w) of B pairs, by a backward pass through the whole model."""
    encoder = model.text_encoder
    text = encode_text(encoder, ids, mask) if isinstance(encoder, TextEncoder) else encoder(ids, mask)
    fused, attention = fuse(encoder, text, mask, model.visual_encoder(images), layer)
    assert attention is not None
    attention.retain_grad()
    model.zero_grad()
    model.match_logits(fused)[:, 1].sum().backward()
    assert attention.grad is not None
    return model.explanation(attention.detach(), attention.grad, mask, None).maps


def training_losses(model: PretrainModel, batch: Batch, alpha: float) -> dict[str, Tensor]:
    """One step's losses, one pass after the other: what `PretrainModel.forward` computes, without sharing."""
    config, encoder, teacher = model.config, model.text_encoder, model.text_encoder_m
    mask = batch.attention_mask
    with torch.no_grad():
        for name in STUDENT_AND_TEACHER:
            pairs = zip(getattr(model, name).parameters(), getattr(model, f"{name}_m").parameters(), strict=True)
            for own, slow in pairs:
                slow.copy_(slow * config.momentum + own * (1 - config.momentum))
    image, text = model.visual_encoder(batch.image), encode_text(encoder, batch.input_ids, mask)
    with torch.no_grad():
        image_m, text_m = model.visual_encoder_m(batch.image), encode_text(teacher, batch.input_ids, mask)
        image_feature_m = F.normalize(model.vision_proj_m(image_m[:, 0]), dim=-1)
        text_feature_m = F.normalize(model.text_proj_m(text_m[:, 0]), dim=-1)
    contrast = losses.contrastive_loss(
        model.image_feature(image),
        model.text_feature(text),
        image_feature_m,
        text_feature_m,
        model.image_queue.clone(),
        model.text_queue.clone(),
        model.temp,
        alpha,
    )
    model.enqueue(image_feature_m, text_feature_m)

    fused, attention = fuse(encoder, text, mask, image, config.amc.layer)
    logits = model.match_logits(fused)
    assert attention is not None
    (gradient,) = torch.autograd.grad(logits[:, 1].sum(), attention, create_graph=True)
    cam = amc.gradcam(attention[..., 1:], gradient[..., 1:], mask, model.grid)

    image_choice = losses.hard_negatives(contrast.sim_t2i)
    text_choice = losses.hard_negatives(contrast.sim_i2t)
    texts, masks = torch.cat([text, text[text_choice]]), torch.cat([mask, mask[text_choice]])
    mismatched, _ = fuse(encoder, texts, masks, torch.cat([image[image_choice], image]))
    matching = torch.cat([logits, model.match_logits(mismatched)])

    masked = batch.mlm_input_ids
    words, _ = fuse(encoder, encode_text(encoder, masked, mask), mask, image)
    with torch.no_grad():
        words_m, _ = fuse(teacher, encode_text(teacher, masked, mask), mask, image_m)
        soft = teacher.mlm_logits(words_m)
    target, predicted = batch.mlm_labels != -100, encoder.mlm_logits(words)
    distilled = predicted.log_softmax(dim=1 if config.mlm_distill_axis == "sequence" else 2)[target]
    return {
        "loss_mlm": losses.mlm_loss(predicted[target], batch.mlm_labels[target], soft[target], alpha, distilled),
        "loss_ita": contrast.loss,
        "loss_itm": losses.matching_loss(matching, positives=len(logits)),
        **amc.map_losses(cam, batch.box_mask, batch.has_box, config.amc),
    }


def point_and_box(pred: Tensor, height: int, width: int, detections: np.ndarray) -> tuple[tuple[int, int], int]:
    """The chosen pixel, and the index of the chosen box of (k, 4) [x, y, w, h], from the map at image size."""
    cam = F.interpolate(pred[None, None], (height, width), mode="bicubic", align_corners=False)[0, 0]
    y, x = divmod(int(cam.argmax()), width)
    best, index = 0.0, -1
    for k, (bx, by, w, h) in enumerate(detections.tolist()):
        score = float(cam[int(by) : int(by + h), int(bx) : int(bx + w)].sum() / (w * h) ** 0.5)
        if score > best:
            best, index = score, k
    return (x, y), index
