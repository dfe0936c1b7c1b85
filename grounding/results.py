"""The result folder of an evaluation (SPEC section 3): one result file a checkpoint, and a log of accuracies.

result/epoch<NN>.pth is a list with one record an expression, in input order; result/log.txt has one JSON line per
metric of a checkpoint. Beside them, result/epoch<NN>.json says what the result was computed from. Every file is
written under a temporary name and renamed, so that none is ever half there.
"""

import contextlib
import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import utils
from runs import read_log

Row = dict[str, Any]


class ResultError(utils.UserError):
    """Results in the way of those that were asked for."""


class ResultFolder:
    """Results by epoch, a two-character name ("00" for a single checkpoint)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log = folder / "log.txt"

    def path(self, epoch: str) -> Path:
        """The result file of an epoch."""
        return self.folder / f"epoch{epoch}.pth"

    # ---- records

    def check_origin(self, epoch: str, origin: Row) -> None:
        """Raise `ResultError` when the result of that epoch is known to be of something else than `origin`."""
        before = self.origin(epoch)
        if changed := [key for key in origin if key in before and before[key] != origin[key]]:
            differences = ", ".join(f"{key} {before[key]} (asked for now: {origin[key]})" for key in changed)
            raise ResultError(
                f"{self.path(epoch)} is the result of {differences}; choose another --output_dir, or delete that file "
                f"and {self._origin_path(epoch)}"
            )

    def read(self, epoch: str, ref_ids: Sequence[int]) -> tuple[list[Row], list[int]] | None:
        """The complete records of an epoch, and the positions of expressions that were left out of them.

        Returns None, with a word on why, when there are none that can be used.

        Raises:
            ResultError: they are of other expressions than those of `ref_ids`.
        """
        path = self.path(epoch)
        if not path.exists():
            return None
        try:
            records = utils.load_tensors(path, mapped=False)
            found = [record["ref_id"] for record in records]
        except (RuntimeError, EOFError, OSError, ValueError, TypeError, KeyError, pickle.UnpicklingError):
            print(f"{path} cannot be read, perhaps because its run was interrupted: evaluating again")
            return None
        skipped = self.origin(epoch).get("skipped", [])
        left_out = set(skipped)
        if found != [ref_id for position, ref_id in enumerate(ref_ids) if position not in left_out]:
            raise ResultError(
                f"{path} holds {len(found)} records, not those of the {len(ref_ids)} expressions of this config; "
                "choose another --output_dir, or delete that file"
            )
        return records, skipped

    def write(self, epoch: str, records: list[Row], skipped: list[int], origin: Row) -> None:
        """Store the records; `skipped` are the positions of expressions that they leave out."""
        utils.write_text(self._origin_path(epoch), json.dumps({**origin, "skipped": skipped}, indent=2) + "\n")
        utils.save_tensors(self.path(epoch), records)

    def _origin_path(self, epoch: str) -> Path:
        return self.folder / f"epoch{epoch}.json"

    def origin(self, epoch: str) -> Row:
        """What an epoch's result was computed from; {} where that is not known."""
        with contextlib.suppress(OSError, ValueError):
            return json.loads(self._origin_path(epoch).read_text(encoding="utf-8"))
        return {}

    # ---- log

    def lines(self, epoch: str) -> list[Row]:
        """The log lines of an epoch, in the order of the metrics."""
        return [row for row in read_log(self.log) if row.get("epoch") == epoch]

    def write_lines(self, epoch: str, lines: Sequence[Row]) -> None:
        """Put an epoch's lines in place of those that an interrupted run may have left, all at once."""
        rows = [row for row in read_log(self.log) if row.get("epoch") != epoch]
        rows += [{**line, "epoch": epoch} for line in lines]
        utils.write_text(self.log, "".join(json.dumps(row) + "\n" for row in rows))

    def accuracies(self, epoch: str, metrics: Sequence[str]) -> dict[tuple[str, str], float | None]:
        """An epoch's log by metric and key; empty where it has not one line for each of the metrics."""
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
        return f"{utils.aligned(cells, left=0)}\nin %; * best by {' '.join(decisive)}"


def percent(value: float | None) -> str:
    """An accuracy in 0..1 as a percentage; "-" for a split without expressions."""
    return "-" if value is None else f"{100 * value:.2f}"
