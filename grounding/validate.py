"""Validation: a model in training, measured on benchmarks as the evaluation scripts measure its checkpoint."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

import utils
from config import GroundingConfig, load_config
from grounding import metrics
from grounding.benchmarks import BENCHMARKS, MERGED, guessed
from grounding.explain import Explainer
from grounding.questions import Asking, Questions
from models.albef import ALBEF
from models.checkpoint import QUEUE, TEACHER

SPLIT = "val"


class BenchmarkError(utils.UserError):
    """A benchmark that a model in training cannot be measured on."""


class Validation:
    """The benchmarks of --validate. Their data are read, and a model's weights tried on them, before it is trained.

    Accuracies are named as in log.txt: `val_refcoco+_point`. Where a benchmark has no split named val, all its splits
    count, each by its name: `val_own_test_point`. Of two configs of one benchmark, the files' names tell them apart.

    Args:
        files: a Grounding_*.yaml each.
        model: the model in training; it is copied from, and stays as it is.

    Raises:
        BenchmarkError: a config, its data, its layer or its sizes cannot be used, with the file's name.
    """

    def __init__(self, files: Sequence[str], model: ALBEF, asking: Asking, device: torch.device) -> None:
        self.model, self.device = model, device
        questions = [self._prepared(file, asking) for file in files]
        named = [each.benchmark.name.removesuffix(MERGED) for each in questions]
        keys = [next(key for key, one in BENCHMARKS.items() if one.name == name) for name in named]
        names = [key if Counter(keys)[key] == 1 else Path(file).stem for key, file in zip(keys, files, strict=True)]
        if len(set(names)) < len(names):
            raise BenchmarkError(f"--validate {' '.join(files)}: two are called alike; rename a file")
        self.questions = dict(zip(names, questions, strict=True))
        self.names = {name: _names(name, each) for name, each in self.questions.items()}
        for name, splits in self.names.items():
            utils.log(f"validation on {self.questions[name].benchmark.name}: {_told(self.questions[name], splits)}")

    @property
    def decisive(self) -> str:
        """The name of the accuracy by which the best epoch is chosen: the first benchmark's own last metric."""
        name = next(iter(self.questions))
        return f"{next(iter(self.names[name].values()))}_{self.questions[name].benchmark.decisive}"

    def measure(self) -> dict[str, float]:
        """Measure the weights as they are now: accuracies in 0..1 by their names (a collective call).

        An accuracy is left out where no image of its split can be read.
        """
        found: dict[str, float] = {}
        for name, questions in self.questions.items():
            # Random weights of the new model, and the loader's seed: training draws the same numbers afterwards.
            with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
                found |= _accuracies(questions, self.names[name], self._explainer(questions))
        return found

    def _prepared(self, file: str, asking: Asking) -> Questions:
        try:
            config = load_config(file, GroundingConfig)
            questions = Questions(config, asking, self.device, None if config.benchmark else guessed(config))
            with torch.random.fork_rng([]):
                self._explainer(questions)
        except utils.UserError as error:
            raise BenchmarkError(f"--validate {file}: {error}") from error
        return questions

    def _explainer(self, questions: Questions) -> Explainer:
        """A new model with the student's weights: made each time, so that training has the memory in between."""
        state = self.model.state_dict()
        student = {key: state[key].cpu() for key in state if not (TEACHER.search(key) or QUEUE.search(key))}
        return questions.explainer({"model": student}, "the model in training")[0]


def _names(name: str, questions: Questions) -> dict[str, str]:
    """Split -> the name of its accuracies, less the metric's: of val, or failing that, of all splits there are."""
    there = {one.split for one in questions.expressions}
    if SPLIT in there:
        return {SPLIT: f"val_{name}"}
    splits = [split for split in questions.benchmark.splits if split in there]
    return {split: f"val_{name}_{split.replace('/', '_')}" for split in splits}


def _told(questions: Questions, names: dict[str, str]) -> str:
    """What is measured, in words."""
    which = [one for one in questions.expressions if one.split in names]
    counts = f"{len(which)} expressions of {len({one.image for one in which})} images"
    return counts if SPLIT in names else f"it has no split named {SPLIT}: all of {', '.join(names)}, {counts}"


def _accuracies(questions: Questions, names: dict[str, str], explainer: Explainer) -> dict[str, float]:
    """Accuracies of some splits, by `names` and metric. Batches are those of the whole benchmark, as in evaluation."""
    benchmark = questions.benchmark
    chosen = [position for position, one in enumerate(questions.expressions) if one.split in names]
    expressions = [questions.expressions[position] for position in chosen]
    images = {one.image for one in expressions}
    maps = questions.answers(explainer.maps, questions.asked, benchmark.resize, images)
    scores = questions.scores(maps)[chosen]
    splits, found = [one.split for one in expressions], {}
    columns, _ = metrics.settle(scores, splits)
    if missing := int(np.isnan(columns[benchmark.decisive]).sum()):
        utils.log(f"{missing} expressions of unreadable images are left out of the validation")
    for metric in benchmark.metrics:
        weights = columns.get(metrics.weight_of(metric))
        for name, value in metrics.split_accuracies(columns[metric], splits, names, weights).items():
            if value is not None:
                found[f"{name}_{metric}"] = value
    return utils.gather_objects(found)[0]  # rank 0 has the scores of all
