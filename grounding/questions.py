"""What a benchmark asks of a model: its expressions, read and checked, and the model's answers."""

from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import utils
from config import GroundingConfig
from dataset.text import check_vocabulary, load_tokenizer
from grounding import metrics
from grounding.batches import Ask, ImageData, Pair, answer_pairs, load_images
from grounding.benchmarks import Benchmark, benchmark_of, with_splits
from grounding.explain import Explainer, Resize
from grounding.load import build_model, check_config, ready
from model_sizes import load_bert_config
from models.checkpoint import LoadReport


class EvaluationError(utils.UserError):
    """An evaluation that cannot be done as asked."""


class Asking(NamedTuple):
    """How a benchmark is asked, as the options of evaluation say it; their defaults are here.

    Args:
        text_encoder: hub name or folder of the vocabulary.
        num_workers: processes that decode images.
        skip_broken: leave out images that are missing or cannot be read.
        mode: what the maps explain, "itm" or "itc".
        block: the layer to explain; None: the config's.
        precision: of the image encoder, a key of `precision.DTYPES`.
    """

    text_encoder: str
    num_workers: int = 4
    skip_broken: bool = False
    mode: str = "itm"
    block: int | None = None
    precision: str = "fp32"


class PairAnswers(NamedTuple):
    """Answers to some of many (image, text) pairs, as two tensors on the CPU, which are sent as they are.

    Args:
        positions: int64 (n,), of the pairs.
        values: (n, ...), a map or a number each.
    """

    positions: Tensor
    values: Tensor

    def gathered(self) -> "PairAnswers":
        """On rank 0 the answers of all processes, elsewhere the own (a collective call)."""
        return PairAnswers(*map(utils.rows_on_rank_0, self))


class Questions:
    """A benchmark's expressions, read and checked before anything is computed, and how a model is asked about them.

    Args:
        benchmark: that of a script which evaluates no other; None: the one that the config names.

    Raises:
        UserError: config, data, vocabulary and layer do not fit; the message says what.
    """

    def __init__(
        self, config: GroundingConfig, asking: Asking, device: torch.device, benchmark: Benchmark | None = None
    ) -> None:
        self.config, self.asking, self.device = config, asking, device
        self.block = config.block_num if asking.block is None else asking.block
        benchmark = benchmark_of(config, benchmark)
        self.expressions = benchmark.load(config, asking.skip_broken)
        metrics.check_metrics(benchmark.metrics, self.expressions)
        self.benchmark = with_splits(benchmark, self.expressions)
        self.asked: list[Pair] = [(expression.image, expression.text) for expression in self.expressions]
        self.tokenizer = load_tokenizer(asking.text_encoder)
        self.check_readable(text for _, text in self.asked)
        check_config(config, asking.mode, self.block)

    def check_readable(self, texts: Iterable[str]) -> None:
        """Raise `UserError` for a vocabulary or a text that the model has no embeddings for."""
        bert = load_bert_config(self.config.bert_config)
        check_vocabulary(self.tokenizer, bert.vocab_size, bert.special_ids)
        longest = bert.max_position_embeddings
        for text in dict.fromkeys(texts):
            if len(text) * 4 < longest:  # no character is more than 3 pieces: spares tokenising nearly all
                continue
            tokens = self.tokenizer([text]).input_ids.shape[1]
            if tokens > longest:
                raise EvaluationError(
                    f"expression {text!r:.60} has {tokens} word pieces, and this model reads at most {longest} "
                    "(bert_config's max_position_embeddings); shorten it or leave it out"
                )

    def explainer(self, content: dict[str, Any], path: str | Path) -> tuple[Explainer, LoadReport]:
        """A new model with a checkpoint's weights, ready for evaluation, and what became of the file's tensors."""
        model, asking = build_model(self.config), self.asking
        report = ready(model, content, path, self.device)
        explainer = Explainer(model, self.tokenizer, self.device, asking.mode, self.block, asking.precision, str(path))
        return explainer, report

    def answers(
        self, function: Ask, pairs: Sequence[Pair], resize: Resize, wanted: Collection[Path] | None = None
    ) -> PairAnswers:
        """Call a method of `Explainer` for the (image, text) pairs that fall to this process.

        Args:
            wanted: leave out all but these images. Batches with any of them stay as they are, and so do the answers,
                which depend on their batch by rounding.

        Returns:
            without those of unreadable images.
        """
        images = list(dict.fromkeys(image for image, _ in pairs))
        data = ImageData(images, resize, self.config.image_res, self.asking.skip_broken)
        batches = load_images(data, self.config.batch_size, self.asking.num_workers, wanted)
        positions: list[int] = []
        values = torch.empty(0)
        for position, answer in answer_pairs(function, pairs, batches):
            if wanted is not None and pairs[position][0] not in wanted:
                continue
            if not positions:
                values = answer.new_empty((len(pairs), *answer.shape))
            values[len(positions)] = answer
            positions.append(position)
        return PairAnswers(torch.tensor(positions, dtype=torch.int64), values[: len(positions)])

    def scores(self, maps: PairAnswers) -> np.ndarray:
        """How right maps are by the benchmark's metrics; each process scores its own (a collective call).

        Args:
            maps: those that this process has, of the expressions.

        Returns:
            on rank 0, what `metrics.score` returns of all expressions; elsewhere, of the own maps alone.
        """
        expressions = [self.expressions[position] for position in maps.positions.tolist()]
        own = metrics.score(maps.values, expressions, self.benchmark.metrics)
        numbers = torch.from_numpy(own.view(np.float64).reshape(len(own), own.itemsize // 8))
        found = PairAnswers(maps.positions, numbers).gathered()
        scores = np.full(len(self.expressions), np.nan, own.dtype)
        scores[found.positions.numpy()] = found.values.numpy().view(own.dtype)[:, 0]
        return scores
