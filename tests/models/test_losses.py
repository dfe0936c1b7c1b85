"""ALBEF's objectives against their formulas written out as plain loops."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models import losses

pytestmark = pytest.mark.usefixtures("one_thread")


def draw(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def softmax(row: list[float]) -> list[float]:
    weights = [math.exp(value - max(row)) for value in row]
    return [weight / sum(weights) for weight in weights]


def dot(a: Tensor, b: Tensor) -> float:
    return sum(x * y for x, y in zip(a.tolist(), b.tolist(), strict=True))


# ---- contrast


def features() -> list[Tensor]:
    """Student and teacher features of 3 samples in 4 dimensions (image, text, image, text), queues of 5 columns."""
    rows = [F.normalize(draw(3, 4, seed=seed), dim=1) for seed in range(4)]
    return rows + [F.normalize(draw(4, 5, seed=seed), dim=0) for seed in (4, 5)]


def plain_direction(queries: Tensor, teachers: Tensor, keys: Tensor, queue: Tensor, temp: float, alpha: float) -> float:
    """Cross entropy of one direction: `queries` of the student against `keys` and `queue` of the teacher."""
    everything = [*keys, *queue.t()]
    total = 0.0
    for row in range(len(queries)):
        student = softmax([dot(queries[row], key) / temp for key in everything])
        teacher = softmax([dot(teachers[row], key) / temp for key in everything])
        for column in range(len(everything)):
            target = alpha * teacher[column] + (1 - alpha) * (row == column)
            total -= target * math.log(student[column])
    return total / len(queries)


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_contrastive_loss_equals_plain_loops(alpha: float) -> None:
    image, text, image_m, text_m, image_queue, text_queue = features()
    out = losses.contrastive_loss(image, text, image_m, text_m, image_queue, text_queue, torch.tensor(0.2), alpha)
    i2t = plain_direction(image, image_m, text_m, text_queue, 0.2, alpha)
    t2i = plain_direction(text, text_m, image_m, image_queue, 0.2, alpha)
    assert out.loss.item() == pytest.approx((i2t + t2i) / 2, rel=1e-5)


def test_contrastive_loss_returns_similarities_within_the_batch() -> None:
    image, text, image_m, text_m, image_queue, text_queue = features()
    image.requires_grad_()
    out = losses.contrastive_loss(image, text, image_m, text_m, image_queue, text_queue, torch.tensor(0.2), 0.4)
    for row in range(3):
        for column in range(3):
            assert out.sim_i2t[row, column].item() == pytest.approx(dot(image[row], text_m[column]) / 0.2, rel=1e-4)
            assert out.sim_t2i[row, column].item() == pytest.approx(dot(text[row], image_m[column]) / 0.2, rel=1e-4)
    assert out.sim_i2t.shape == out.sim_t2i.shape == (3, 3)
    assert not out.sim_i2t.requires_grad


def test_contrast_trains_the_student_and_the_temperature_but_no_target() -> None:
    inputs = [tensor.requires_grad_() for tensor in (*features(), torch.tensor(0.2))]
    losses.contrastive_loss(*inputs, alpha=0.4).loss.backward()
    image, text, *targets, temp = inputs
    assert all(tensor.grad is not None and tensor.grad.any() for tensor in (image, text, temp))
    assert all(tensor.grad is None for tensor in targets)


# ---- hard negatives


@pytest.mark.parametrize("sharpness", [None, 0.0, 0.5])
def test_hard_negatives_follow_the_softmax_without_the_diagonal(sharpness: float | None) -> None:
    similarity = torch.tensor([[3.0, 0.0, 1.0, 2.0], [0.0, 9.0, 0.0, 0.0], [-1.0, 0.5, 0.0, 1.5], [2.0, 2.0, 0.0, 0.0]])
    torch.manual_seed(0)
    draws = 3000
    counts = torch.zeros(4, 4)
    for _ in range(draws):
        drawn = losses.hard_negatives(similarity) if sharpness is None else losses.hard_negatives(similarity, sharpness)
        counts[torch.arange(4), drawn] += 1
    assert not counts.diagonal().any()
    for row in range(4):
        scores = [value * (1.0 if sharpness is None else sharpness) for value in similarity[row].tolist()]
        weights = [math.exp(score) if column != row else 0.0 for column, score in enumerate(scores)]
        expected = [weight / sum(weights) * draws for weight in weights]
        pairs = [(seen, mean) for seen, mean in zip(counts[row].tolist(), expected, strict=True) if mean]
        # A chi-square of two degrees of freedom seldom exceeds 20; a wrong sharpness gives 100 outside row 1.
        assert sum((seen - mean) ** 2 / mean for seen, mean in pairs) < 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [2, 5])
def test_hard_negatives_survive_rows_whose_weights_underflow(size: int, dtype: torch.dtype) -> None:
    # softmax first, diagonal out afterwards: every weight of these rows would be 0.
    similarity = torch.eye(size, dtype=dtype) * 1e4
    for _ in range(50):
        drawn = losses.hard_negatives(similarity)
        assert drawn.dtype == torch.int64
        assert drawn.shape == (size,)
        assert (drawn != torch.arange(size)).all()
        assert ((drawn >= 0) & (drawn < size)).all()


def test_hard_negatives_need_two_samples() -> None:
    with pytest.raises(ValueError, match="batch of at least 2"):
        losses.hard_negatives(torch.ones(1, 1))


# ---- matching


def test_matching_loss_by_hand() -> None:
    # Each row costs log(1 + exp(wrong - right)); class 1 is right in the first two rows, class 0 in the others.
    logits = torch.tensor([[0.0, 2.0], [1.0, 0.0], [0.0, 0.0], [3.0, -1.0], [0.0, 1.0], [-2.0, 0.5]])
    costs = [math.log1p(math.exp(gap)) for gap in (-2.0, 1.0, 0.0, -4.0, 1.0, 2.5)]
    assert losses.matching_loss(logits, positives=2).item() == pytest.approx(sum(costs) / 6, rel=1e-6)
    assert losses.matching_loss(logits.bfloat16(), positives=2).dtype == torch.float32


# ---- masked language modelling


def plain_mlm(logits: Tensor, labels: Tensor, teacher: Tensor, alpha: float, axis: str) -> float:
    batch, tokens, words = logits.shape
    total, count = 0.0, 0
    for b in range(batch):
        for t in range(tokens):
            label = int(labels[b, t])
            if label == -100:
                continue
            count += 1
            total -= (1 - alpha) * math.log(softmax(logits[b, t].tolist())[label])
            target = softmax(teacher[b, t].tolist())
            for v in range(words):
                column = logits[b, :, v] if axis == "sequence" else logits[b, t]
                probability = softmax(column.tolist())[t if axis == "sequence" else v]
                total -= alpha * target[v] * math.log(probability)
    return total / count


LABELS = torch.tensor([[-100, 2, -100, 4], [-100, -100, 0, -100]])


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("axis", ["sequence", "vocabulary"])
def test_mlm_loss_equals_plain_loops(axis: str, alpha: float) -> None:
    logits, teacher = draw(2, 4, 6, seed=1, scale=2), draw(2, 4, 6, seed=2, scale=2)
    target = LABELS != -100
    distilled = logits.log_softmax(dim=1)[target] if axis == "sequence" else None
    loss = losses.mlm_loss(logits[target], LABELS[target], teacher[target], alpha, distilled)
    assert loss.item() == pytest.approx(plain_mlm(logits, LABELS, teacher, alpha, axis), rel=1e-5)


def test_mlm_loss_without_targets_is_zero() -> None:
    logits = draw(0, 6).requires_grad_()
    loss = losses.mlm_loss(logits, torch.zeros(0, dtype=torch.int64), draw(0, 6), 0.4)
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None
