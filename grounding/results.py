"""The result folder of an evaluation: one result file a checkpoint, and a log of accuracies.

result/epoch<NN>.pth is a list with one record an expression, in input order; result/log.txt has one JSON line per
metric of a checkpoint (docs/method.md, Data formats). Beside them, result/epoch<NN>.json says what the result was
computed from. Every file is written under a temporary name and renamed, so that none is ever half there.
"""

import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

import files
import utils
from dataset.expressions import Expression
from grounding import identity
from grounding.identity import Origin
from runs import read_log
from terminal import aligned

Row = dict[str, Any]


class ResultError(utils.UserError):
    """Results that are missing, or that conflict with this run."""


class ResultFolder:
    """Results by epoch, a two-character name ("00" for a single checkpoint)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log = folder / "log.txt"

    def path(self, epoch: str) -> Path:
        """The result file of an epoch."""
        return self.folder / f"epoch{epoch}.pth"

    # ---- records

    def epochs(self) -> list[str]:
        """Every epoch that has a result file or a line in the log."""
        files = sorted(path.stem.removeprefix("epoch") for path in self.folder.glob("epoch*.pth"))
        return list(dict.fromkeys([*files, *(str(row.get("epoch", "?")) for row in read_log(self.log))]))

    def check_origins(self, origins: Mapping[str, Origin], skip_broken: bool) -> None:
        """Raise `ResultError` unless the results of some epochs were computed from what is asked for now.

        Args:
            origins: what each is computed from now.
            skip_broken: whether images may be left out.
        """
        problems = {}
        for epoch, now in origins.items():
            before = self.origin(epoch)
            changed = identity.changed_parts(before, now)
            if identity.lacks_parts(before, now) and not changed:
                problems[epoch] = "of an unknown origin: no record beside it says what it was computed from"
                continue
            if (left_out := len(before.get("skipped", []))) and not skip_broken:
                changed.append(f"--skip_broken, {left_out} expressions left out (asked for now: without)")
            if changed:
                problems[epoch] = f"the result of {', '.join(changed)}"
        if problems:
            epoch, problem = next(iter(problems.items()))
            more = f"; {len(problems) - 1} more of that folder differ as well" if len(problems) > 1 else ""
            which = "that file" if not more and self.path(epoch).exists() else f"the folder {self.folder}"
            raise ResultError(f"{self.path(epoch)} is {problem}{more}; choose another --output_dir, or delete {which}")

    def renew_origin(self, epoch: str, now: Origin) -> None:
        """Update where a result's checkpoint and images lie, and print what has changed since it was computed."""
        before = self.origin(epoch)
        renewed = {**before, **now, "torch": before.get("torch")}
        if changed := identity.harmless_changes(before, now):
            print(f"{self.path(epoch)}: when it was computed, {' and '.join(changed)}")
        if renewed != before:
            self._write_origin(epoch, renewed)

    def check_data(self, epoch: str, now: Origin) -> None:
        """Raise `ResultError` when a result is of other expressions or images than those of this run."""
        before = self.origin(epoch)
        data: Origin = {key: now[key] for key in ("benchmark", "expressions", "images") if key in before}
        if changed := identity.changed_parts(before, data):
            raise ResultError(
                f"{self.path(epoch)} cannot be compared: it is the result of {', '.join(changed)}; evaluate it again, "
                "on the same data"
            )

    def read(self, epoch: str, expressions: Sequence[Expression]) -> list[Tensor | None] | None:
        """The map (h, w) of each expression, None where its image could not be read.

        Returns None, and prints why, when there is no result that can be used.

        Raises:
            ResultError: it is of other expressions.
        """
        path = self.path(epoch)
        if not path.exists():
            return None
        try:
            records = files.load_tensors(path, mapped=False)
        except (OSError, files.UnreadableFile):
            records = None
        if not isinstance(records, list) or not all(map(_is_record, records)):
            print(f"{path} cannot be read, perhaps because its run was interrupted: evaluating again")
            return None
        left_out = set(self.origin(epoch).get("skipped", []))
        kept = [item.ref_id for position, item in enumerate(expressions) if position not in left_out]
        if [record["ref_id"] for record in records] != kept:
            raise ResultError(
                f"{path} holds {len(records)} records, not those of the {len(expressions)} expressions of this config; "
                "choose another --output_dir, or delete that file"
            )
        maps = (record["pred"] for record in records)
        return [None if position in left_out else next(maps) for position in range(len(expressions))]

    def write(
        self, epoch: str, expressions: Sequence[Expression], maps: Sequence[Tensor | None], origin: Origin
    ) -> None:
        """Store the map (h, w) of each expression; one without is left out of the records and noted as skipped.

        Each is stored by itself, whatever tensor it is a part of.
        """
        pairs = list(zip(expressions, maps, strict=True))
        records = [
            {"ref_id": item.ref_id, "pred": cam.clone(), **item.record} for item, cam in pairs if cam is not None
        ]
        skipped = [position for position, cam in enumerate(maps) if cam is None]
        self._write_origin(epoch, {**origin, "skipped": skipped})
        files.save_tensors(self.path(epoch), records)

    def _write_origin(self, epoch: str, origin: Origin) -> None:
        utils.write_text(self.path(epoch).with_suffix(".json"), json.dumps(origin, indent=2) + "\n")

    def origin(self, epoch: str) -> Origin:
        """What an epoch's result was computed from; {} where that is not known."""
        with contextlib.suppress(OSError, ValueError):
            found = json.loads(self.path(epoch).with_suffix(".json").read_text(encoding="utf-8"))
            return found if isinstance(found, dict) else {}
        return {}

    # ---- log

    def metrics(self, epoch: str, own: Sequence[str]) -> list[str]:
        """The metrics of an epoch's first log lines; `own`, of the benchmark, where it has no record of them."""
        return [name for name in self.origin(epoch).get("metrics", own) if " " not in name]  # without `of_regions`

    def lines(self, epoch: str) -> list[Row]:
        """The log lines of an epoch, in the order of the metrics."""
        return [row for row in read_log(self.log) if row.get("epoch") == epoch]

    def write_lines(self, epoch: str, lines: Sequence[Row]) -> None:
        """Replace an epoch's lines in one step; an empty `lines` removes them."""
        before = read_log(self.log)
        rows = [row for row in before if row.get("epoch") != epoch]
        if len(rows) == len(before) and not lines:
            return
        rows += [{**line, "epoch": epoch} for line in lines]
        utils.write_text(self.log, "".join(json.dumps(row) + "\n" for row in rows))

    def accuracies(self, epoch: str, metrics: Sequence[str]) -> dict[tuple[str, str], float | None]:
        """An epoch's log by metric and key; empty unless it has exactly one line for each of the metrics."""
        rows = self.lines(epoch)
        lines = zip(metrics, rows, strict=True) if len(rows) == len(metrics) else ()
        return {(metric, key): value for metric, row in lines for key, value in row.items() if key != "epoch"}

    def table(self, metrics: Sequence[str], decisive: tuple[str, str]) -> str:
        """The epochs of the log as a table, accuracies in %.

        Args:
            metrics: the name of each log line of an epoch.
            decisive: the metric and the key by which the best epoch is marked.
        """
        epochs = dict.fromkeys(row.get("epoch", "?") for row in read_log(self.log))
        by_epoch = {epoch: found for epoch in epochs if (found := self.accuracies(epoch, metrics))}
        if not by_epoch:
            return "no checkpoint has been evaluated"
        best = max(by_epoch, key=lambda epoch: by_epoch[epoch].get(decisive) or 0.0)
        columns = list(by_epoch[best])
        cells = [["epoch", *(key if key.startswith(metric) else f"{metric} {key}" for metric, key in columns)]]
        for epoch, values in by_epoch.items():
            mark = "*" if epoch == best else " "
            cells.append([epoch + mark, *(percent(values.get(column)) for column in columns)])
        return f"{aligned(cells, left=0)}\nin %; * best by {' '.join(decisive)}"


class Source(NamedTuple):
    """The results of one checkpoint, and the name that a report gives it."""

    name: str
    folder: ResultFolder
    epoch: str


def sources_of(folders: Sequence[Path], own: Sequence[str]) -> list[Source]:
    """Every complete checkpoint in --output_dir folders, in their order, by the checkpoint's own name.

    Args:
        own: the benchmark's own metrics.

    Raises:
        ResultError: a folder has no complete results.
    """
    found = []
    for folder in folders:
        results = ResultFolder(folder / "result")
        epochs = list(dict.fromkeys(row.get("epoch") for row in read_log(results.log)))
        complete = [
            epoch for epoch in epochs if epoch and len(results.lines(epoch)) >= len(results.metrics(epoch, own))
        ]
        if not complete:
            raise ResultError(f"{folder}: no complete results in {results.log}; is it an --output_dir of this script?")
        for epoch in complete:
            checkpoint = results.origin(epoch).get("checkpoint", f"epoch {epoch}")
            found.append(Source(Path(checkpoint).stem, results, epoch))
    return found


def _is_record(row: Any) -> bool:
    """Whether a row of a result file is a record: a ref_id and a map of finite numbers."""
    pred = row.get("pred") if isinstance(row, dict) and "ref_id" in row else None
    return isinstance(pred, Tensor) and pred.ndim == 2 and pred.numel() > 0 and bool(pred.isfinite().all())


def percent(value: float | None) -> str:
    """An accuracy in 0..1 as a percentage; "-" for a split without expressions."""
    return "-" if value is None else f"{100 * value:.2f}"
