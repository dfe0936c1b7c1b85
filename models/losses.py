"""ALBEF's three objectives as pure functions of tensors (Li et al., NeurIPS 2021, arXiv 2107.07651, section 3.2-3.3).

Shapes: B samples, E embedding size, Q queue length, K targets of MLM, V vocabulary size.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class ContrastiveOutput(NamedTuple):
    """loss: scalar; sim_i2t, sim_t2i: (B, B) student similarities over temperature within the batch, detached."""

    loss: Tensor
    sim_i2t: Tensor
    sim_t2i: Tensor


def contrastive_loss(
    image: Tensor,
    text: Tensor,
    image_teacher: Tensor,
    text_teacher: Tensor,
    image_queue: Tensor,
    text_queue: Tensor,
    temp: Tensor,
    alpha: float | Tensor,
) -> ContrastiveOutput:
    """Image-text contrast with soft targets from the momentum teacher (ITC; ALBEF, equations 1, 2 and 6).

    Args:
        image, text, image_teacher, text_teacher: (B, E), L2-normalised.
        image_queue, text_queue: (E, Q), columns L2-normalised.
        temp: scalar temperature.
        alpha: weight of the teacher's distribution against the one-hot target.
    """
    with torch.no_grad():
        image_keys = torch.cat([image_teacher.t(), image_queue], dim=1)
        text_keys = torch.cat([text_teacher.t(), text_queue], dim=1)
        one_hot = torch.eye(len(image), image_keys.shape[1], device=image.device)
        i2t_target = alpha * (image_teacher @ text_keys / temp).softmax(dim=1) + (1 - alpha) * one_hot
        t2i_target = alpha * (text_teacher @ image_keys / temp).softmax(dim=1) + (1 - alpha) * one_hot
    i2t = image @ text_keys / temp
    t2i = text @ image_keys / temp
    loss = (F.cross_entropy(i2t, i2t_target) + F.cross_entropy(t2i, t2i_target)) / 2
    batch = len(image)
    return ContrastiveOutput(loss, i2t[:, :batch].detach(), t2i[:, :batch].detach())


def hard_negatives(similarity: Tensor, sharpness: float = 1.0) -> Tensor:
    """Draw for each row one column other than the diagonal, likelier the more similar it is.

    The weights are softmax(row) with the diagonal set to 0. Leaving the diagonal out before the softmax gives the same
    distribution, and weights that cannot all underflow to 0.

    Args:
        similarity: (B, B) over temperature.
        sharpness: factor on the similarities; 1 is ALBEF's, 0 draws every other column alike.

    Returns:
        (B,) int64 column indices.

    Raises:
        ValueError: B = 1, where there is no negative to draw.
    """
    if len(similarity) < 2:
        raise ValueError("image-text matching needs a hard negative: use a batch of at least 2 samples per process")
    diagonal = torch.eye(len(similarity), dtype=torch.bool, device=similarity.device)
    scores = (sharpness * similarity.float()).masked_fill(diagonal, -torch.inf)
    # A NaN is for the training loop to report, with the loss's name: here every column would be drawn alike.
    return draw_columns(scores.softmax(dim=1).nan_to_num(nan=1.0))


def draw_columns(weights: Tensor) -> Tensor:
    """Draw a column of each row (B, N) with a probability proportional to its weight; returns (B,) int64.

    Of exponential waiting times whose rates are the weights, column j's is the shortest with probability w_j / sum(w).
    `torch.multinomial` draws one sample so, the very same one; but it asks first whether the weights are sound, which
    waits for the device.
    """
    return (weights / torch.empty_like(weights).exponential_()).argmax(dim=-1)


def matching_loss(logits: Tensor, positives: int) -> Tensor:
    """Image-text matching (ITM; ALBEF, equation 4): cross entropy over logits (3B, 2) whose first B rows match."""
    labels = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
    labels[:positives] = 1
    return F.cross_entropy(logits.float(), labels)


def mlm_loss(
    logits: Tensor, labels: Tensor, teacher_logits: Tensor, alpha: float | Tensor, distilled: Tensor | None = None
) -> Tensor:
    """Masked language modelling with distillation (MLM; ALBEF, equations 3 and 7), averaged over K target positions.

    Args:
        logits, teacher_logits: (K, V) of student and teacher.
        labels: (K,) token ids, -100 where there is no target.
        distilled: (K, V), the student's log-probabilities in the distillation term; None: its log-softmax over the
            vocabulary, as ALBEF was later corrected. The release's run over the sequence of each sample.
    """
    hard = F.cross_entropy(logits.float(), labels, reduction="sum")
    if distilled is None:
        distilled = logits.float().log_softmax(dim=-1)
    target = labels != -100
    soft = -((teacher_logits.float().softmax(dim=-1) * distilled).sum(dim=-1) * target).sum()
    return ((1 - alpha) * hard + alpha * soft) / target.sum().clamp(min=1)
