"""The evaluation program of all scripts: checkpoints -> maps -> metrics -> results (docs/method.md, Evaluation)."""

import argparse
import json
from collections.abc import Sequence
from contextlib import ExitStack
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import precision
import utils
from config import GroundingConfig, load_config, naming, save_config
from dataset.loader.workers import killed_workers_explained
from dataset.own import load_pairs
from dataset.reading import DataError
from dataset.transforms import resize_bilinear_image
from grounding import identity, metrics
from grounding.batches import Ask, Pair
from grounding.benchmarks import Benchmark
from grounding.explain import Explainer, Resize
from grounding.identity import Origin
from grounding.load import own_sizes
from grounding.questions import Asking, EvaluationError, PairAnswers, Questions
from grounding.results import ResultFolder, percent, sources_of
from models.checkpoint import read_checkpoint
from models.student import is_student, lacking, local_checkpoint, own_text_encoder
from runs import claim, is_within_epoch, write_provenance
from terminal import aligned, boolean, integer

EXTENT = "bf16 and fp16: of the image encoder, maps are computed in fp32; tf32: of both (default: fp32)"
Line = dict[str, float | None]
Models = dict[str, Explainer]  # the models of one checkpoint, by what they were made of


def parse_args(benchmark: Benchmark | None = None, argv: Sequence[str] | None = None) -> argparse.Namespace:
    what = benchmark.name if benchmark else "the benchmark that the config names"
    parser = argparse.ArgumentParser(description=f"Evaluate visual grounding on {what}.")
    parser.add_argument(
        "--config",
        nargs="+",
        default=[benchmark.config] if benchmark else None,
        required=benchmark is None,
        help="a Grounding_*.yaml: data and sizes of the model; of several, each has its folder in --output_dir",
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a config key")
    which = "a file, a folder of them (every *.pth), a folder of export.py, or the name of one on the hub"
    parser.add_argument("--checkpoint", required=True, help=which)
    parser.add_argument("--output_dir", default="output/grounding")
    parser.add_argument("--gradcam_mode", choices=("itm", "itc"), default="itm", help="what the map explains")
    parser.add_argument("--block_num", type=int, default=None, help="layer to explain (default: the config's, 8)")
    parser.add_argument("--text_encoder", help="hub name or folder (default: the checkpoint's, or bert-base-uncased)")
    parser.add_argument("--evaluate", type=boolean, nargs="?", const=True, default=True, help="has no effect")
    parser.add_argument("--device", default=None, help="cuda or cpu (default: the GPU if there is one)")
    precision.add_options(parser, "fp32", EXTENT)
    parser.add_argument("--seed", type=integer(0), default=42)
    parser.add_argument("--num_workers", type=integer(0), default=4, help="processes that decode images")
    parser.add_argument(
        "--skip_broken", action="store_true", help="leave out missing and unreadable images and count them"
    )
    parser.add_argument("--report", action="store_true", help="write report.html and expressions.csv to OUTPUT_DIR")
    parser.add_argument(
        "--compare", action="append", default=[], metavar="FOLDER", help="another --output_dir, to put into the report"
    )
    launch = parser.add_argument_group("process group", "read from the launcher's environment")
    launch.add_argument("--world_size", default=1, type=int)
    launch.add_argument("--dist_url", default="env://")
    launch.add_argument("--distributed", default=True, type=boolean)
    return parser.parse_args(argv)


def program(benchmark: Benchmark | None = None) -> None:
    """What each evaluation script is; without a benchmark, the config names it."""
    utils.run(lambda args: evaluate(benchmark, args), parse_args(benchmark))


def evaluate(benchmark: Benchmark | None, args: argparse.Namespace) -> None:
    """Evaluate every checkpoint that has no complete result yet, then print all of them as a table.

    Of several configs, all data are read first, and of each checkpoint a model that serves several is loaded once.
    """
    utils.seed_everything(args.seed)
    device = utils.choose_device(args.device)
    if args.distributed:
        utils.init_distributed(device, args.dist_url)
    args.precision = precision.choose(args.precision, device, args.force_precision)
    checkpoint = local_checkpoint(args.checkpoint)
    checkpoints = find_checkpoints(checkpoint)
    args.text_encoder = args.text_encoder or own_text_encoder(checkpoint) or "bert-base-uncased"
    with ExitStack() as stack, killed_workers_explained():
        evaluations = []
        for one in one_each(args):
            stack.enter_context(claim(Path(one.output_dir)))
            with naming(one.config):
                config = load_config(one.config, GroundingConfig, [*own_sizes(checkpoint), *args.set])
                evaluations.append(Evaluation(benchmark, config, one, device))
        for evaluation in evaluations:
            utils.on_rank_0(partial(evaluation.begin, checkpoints))
        for epoch, path in checkpoints.items():
            loaded: Models = {}
            for evaluation in evaluations:
                with naming(evaluation.args.config):
                    evaluation.run(epoch, path, loaded)
        if utils.rank() == 0:
            for evaluation in evaluations:
                evaluation.report()
            if len(evaluations) > 1:
                print(table_of_all(evaluations, list(checkpoints)))


def one_each(args: argparse.Namespace) -> list[argparse.Namespace]:
    """The arguments of each config. Of several, each has folders below --output_dir and --compare, called as its file.

    Raises:
        EvaluationError: two would have the same folder.
    """
    if len({Path(config).stem for config in args.config}) < len(args.config):
        raise EvaluationError(
            f"--config {' '.join(args.config)}: two are called alike, and so would be their folders; rename one"
        )
    found = []
    for config in args.config:
        folders = [args.output_dir, *args.compare]
        if len(args.config) > 1:
            folders = [str(Path(folder, Path(config).stem)) for folder in folders]
        own = {"config": config, "output_dir": folders[0], "compare": folders[1:]}
        found.append(argparse.Namespace(**vars(args) | own))
    return found


def table_of_all(evaluations: Sequence["Evaluation"], epochs: Sequence[str]) -> str:
    """The accuracies of several evaluations, in %: a row a benchmark, checkpoint and metric, a column a split."""
    splits = dict.fromkeys(split for one in evaluations for split in one.benchmark.splits)
    rows = [["results", "epoch", "metric", *splits]]
    for one in evaluations:
        for epoch in epochs:
            found = one.results.accuracies(epoch, one.line_names)
            for metric in one.benchmark.metrics:
                keys = one.benchmark.log_keys(metric)
                values = [percent(found.get((metric, keys.get(split, "")))) for split in splits]
                rows.append([one.results.folder.parent.name, epoch, metric, *values])
    return f"{aligned(rows, left=3)}\nin %"


def find_checkpoints(checkpoint: str | Path) -> dict[str, Path]:
    """Two-character epoch -> checkpoint. A file or a student is "00"; in a folder of files it is the end of each name.

    Raises:
        EvaluationError: there is none, or two of a folder would have the same results.
    """
    path = Path(checkpoint)
    if path.is_file() or is_student(path):
        return {"00": path}
    if not path.is_dir():
        raise EvaluationError(f"--checkpoint {checkpoint}: no such file or folder")
    found: dict[str, Path] = {}
    for file in sorted(path.glob("*.pth")):
        hidden = file.name.startswith(".")  # such as macOS's ._checkpoint_00.pth
        again = file.is_symlink() and file.resolve().parent == path.resolve()  # best.pth
        if hidden or again or not file.is_file() or is_within_epoch(file):
            continue
        epoch = file.stem[-2:]
        if epoch in found:
            raise EvaluationError(
                f"{found[epoch]} and {file.name} end alike, so both results would be named epoch{epoch}: rename one, "
                "or evaluate them one at a time"
            )
        found[epoch] = file
    if not found:
        raise EvaluationError(
            f"--checkpoint {checkpoint}: the folder holds no *.pth, and no {' and no '.join(lacking(path))}"
        )
    return found


class Evaluation(Questions):
    """A benchmark's questions and its result folder; checked before anything is computed."""

    def __init__(
        self, benchmark: Benchmark | None, config: GroundingConfig, args: argparse.Namespace, device: torch.device
    ) -> None:
        asking = Asking(
            args.text_encoder, args.num_workers, args.skip_broken, args.gradcam_mode, args.block_num, args.precision
        )
        super().__init__(config, asking, device, benchmark)
        self.args = args
        files = config.matching_file
        self.pairs = {Path(file).stem: load_pairs(file, config.image_root, args.skip_broken) for file in files}
        if len(self.pairs) < len(files):
            raise EvaluationError(f"matching_file: two of {', '.join(files)} are called alike; rename one")
        self.line_names = [*self.benchmark.metrics, *self.pairs]
        self.check_readable(pair.text for pairs in self.pairs.values() for pair in pairs)
        images = {expression.image for expression in self.expressions}
        count = f"{len(self.expressions)} expressions of {len(images)} images"
        utils.log(f"{self.benchmark.name}: {count}, on {device}, {args.precision}")
        self.results = ResultFolder(Path(args.output_dir) / "result")
        self.origin: Origin = {}

    @cached_property
    def made_of(self) -> Origin:
        """What the models are, besides their weights."""
        return identity.of_model(self.config, self.tokenizer.source)

    def begin(self, checkpoints: dict[str, Path]) -> None:
        """Check what the output folder holds, then write there what its results are computed from; for rank 0.

        Raises:
            ResultError: there are results of something else than what is asked for, or none to compare with.
        """
        results, config, args = self.results, self.config, self.args
        names, own = list(self.benchmark.metrics), self.benchmark.own_metrics
        stored = [results.origin(epoch) for epoch in results.epochs()]
        self.origin = {
            "benchmark": self.benchmark.name,
            "gradcam_mode": args.gradcam_mode,
            "block_num": self.block,
            "precision": args.precision,
            "metrics": names + identity.of_regions(self.expressions),
            **self.made_of,
            **identity.of_data(self.expressions, self.pairs, config.image_root, stored),
        }
        for source in sources_of([Path(folder) for folder in args.compare], own):
            source.folder.check_data(source.epoch, self.origin)
            if (others := source.folder.metrics(source.epoch, own)) != names:
                path = source.folder.path(source.epoch)
                print(f"{path} was measured by {', '.join(others)}; the report measures its maps by {', '.join(names)}")
        kept = [epoch for epoch in checkpoints if results.path(epoch).exists()]
        deleted = checkpoints.keys() - kept
        origins = {epoch: self.origin for epoch in results.epochs() if epoch not in deleted}
        for epoch in kept:
            origins[epoch] = {**identity.of_checkpoint(checkpoints[epoch], stored), **self.origin}
        results.check_origins(origins, args.skip_broken)
        for epoch in results.epochs():
            if epoch in deleted or results.origin(epoch).get("metrics", [*own]) != self.origin["metrics"]:
                results.write_lines(epoch, [])  # of a deleted result, or of other metrics of the same maps
        for epoch in kept:
            results.renew_origin(epoch, origins[epoch])
        output = results.folder.parent
        if not all(map(self.complete, checkpoints)) or not (output / "config.yaml").exists():
            save_config(config, output / "config.yaml")
            write_provenance(output / "run.json", args.seed, options=vars(args))

    def complete(self, epoch: str) -> bool:
        """Whether the log has all lines of an epoch."""
        return len(self.results.lines(epoch)) == len(self.line_names)

    def run(self, epoch: str, path: Path, loaded: Models) -> None:
        """Evaluate one checkpoint, or what an interrupted run left out of it. All processes call it together."""
        stored = self.results.read(epoch, self.expressions) if utils.rank() == 0 else None
        has_maps, complete = utils.gather_objects((stored is not None, self.complete(epoch)))[0]
        if has_maps and complete:
            utils.log(f"epoch {epoch}: already evaluated, skipped ({path})")
            return
        matching: list[Line] = []
        # What rank 0 has read from a file, it scores alone.
        scores = None if stored is None else metrics.score(stored, self.expressions, self.benchmark.metrics)
        if not has_maps or self.pairs:
            origin = utils.on_rank_0(lambda: identity.of_checkpoint(path, [self.results.origin(epoch)]))
            explainer = self.load(path, origin, loaded)
            if not has_maps:
                own = self.ask(explainer.maps, self.asked, self.benchmark.resize)
                utils.on_rank_0(partial(self.write, epoch, path, own.gathered(), origin))
                scores = self.scores(own)
            matching = [self.matching(explainer, name) for name in self.pairs]
            utils.on_rank_0(lambda: identity.check_unchanged(path, origin))
        if utils.rank() == 0:
            assert scores is not None
            lines = [*self.accuracies(scores), *matching]
            self.results.write_lines(epoch, lines)
            for name, line in zip(self.line_names, lines, strict=True):
                print(f"epoch {epoch} {name}: " + ", ".join(f"{key} {percent(value)}" for key, value in line.items()))

    def load(self, path: Path, origin: Origin, loaded: Models) -> Explainer:
        """The model of a checkpoint, ready for evaluation: one of `loaded`, or a new one, which is added there."""
        key = json.dumps([self.made_of, self.block, origin[identity.CHECKPOINT]])
        if key not in loaded:
            loaded[key], report = self.explainer(read_checkpoint(path), path)
            utils.log(str(report))
        return loaded[key]

    def write(self, epoch: str, path: Path, found: PairAnswers, origin: Origin) -> None:
        """Write the maps of all processes, if the checkpoint is still the file of that origin; for rank 0."""
        identity.check_unchanged(path, origin)
        if missing := len(self.expressions) - len(found.positions):
            print(f"{missing} expressions of unreadable images are left out of results and metrics")
        maps: list[Tensor | None] = [None] * len(self.expressions)
        for position, cam in zip(found.positions.tolist(), found.values, strict=True):
            maps[position] = cam
        self.results.write(epoch, self.expressions, maps, {**origin, **self.origin})

    def accuracies(self, scores: np.ndarray) -> list[Line]:
        """A log line for each metric of the benchmark: reported split -> accuracy; and the threshold if one is chosen.

        Args:
            scores: as `metrics.score` returns them.
        """
        splits, lines = [expression.split for expression in self.expressions], []
        columns, shares = metrics.settle(scores, splits)
        for name in self.benchmark.metrics:
            keys, weights = self.benchmark.log_keys(name), columns.get(metrics.weight_of(name))
            line = metrics.split_accuracies(columns[name], splits, keys, weights)
            lines.append({**line, f"{name}_threshold": shares[name]} if name in shares else line)
        return lines

    def matching(self, explainer: Explainer, name: str) -> Line:
        """A log line: the accuracy of matching on balanced pairs, over all and by kind of text.

        On rank 0; elsewhere it is of the pairs of the process alone.
        """
        pairs = self.pairs[name]
        asked = [(pair.image, pair.text) for pair in pairs]
        positions, probabilities = self.ask(explainer.match_probabilities, asked, resize_bilinear_image).gathered()
        if missing := len(pairs) - len(positions):
            utils.log(f"{name}: {missing} pairs of unreadable images are left out")
        found = [pairs[position] for position in positions.tolist()]
        right = [(p > 0.5) == pair.match for p, pair in zip(probabilities.tolist(), found, strict=True)]
        kinds = {kind: f"{name}_{kind}" for kind in sorted({pair.kind for pair in pairs})}
        by_kind = metrics.split_accuracies(right, [pair.kind for pair in found], kinds)
        return {name: metrics.accuracy(right), **by_kind}

    def ask(self, function: Ask, pairs: Sequence[Pair], resize: Resize) -> PairAnswers:
        """As `answers`, in all processes together; raises `DataError` on all of them where no pair has one."""
        own = self.answers(function, pairs, resize)
        if pairs and not any(utils.gather_objects(len(own.positions))):
            count = len({image for image, _ in pairs})
            raise DataError(f"none of the {count} images can be read; check image_root")
        return own

    def report(self) -> None:
        """Print all checkpoints as a table and, where it is asked for, write report.html; for rank 0."""
        decisive = (self.benchmark.decisive, next(iter(self.benchmark.splits.values())))
        print(self.results.table(self.line_names, decisive))
        print(f"Results and log.txt are in {self.results.folder}")
        if self.args.report or self.args.compare:
            from grounding.report.write import report_folders  # loads matplotlib

            folders = [Path(folder) for folder in (*self.args.compare, self.args.output_dir)]
            print(f"The report is {report_folders(self.benchmark, self.expressions, folders)}")
