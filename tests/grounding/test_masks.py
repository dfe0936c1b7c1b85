"""Metrics on masks: sums by hand, pycocotools, and an evaluation that chooses its threshold on val."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco

import export
from config import GroundingConfig, load_config
from dataset.expressions import Expression
from dataset.reading import DataError
from dataset.segmentation import from_mask, to_mask
from grounding import metrics
from grounding.benchmarks import REFCLEF, REFCOCO_PLUS, benchmark_of
from grounding.maps import ResizedMap, hot
from grounding.metrics import SHARES, MetricError
from grounding.report import sections
from grounding.report.rows import collect
from grounding.results import sources_of
from tests.grounding import test_evaluate as base
from tests.grounding.test_evaluate import ONE, evaluate, log, results

place = base.place
pytestmark = pytest.mark.usefixtures("one_thread")

MASKS = ["mask_iou", "mask_oiou", "mask_energy", "mask_point"]
ASKED = ("--set", f"metrics=[{', '.join(MASKS)}]")


def expression_of(mask: Any, split: str = "val") -> Expression:
    region = from_mask(np.array(mask))
    size = tuple(region["size"])
    return Expression(Path("x"), "x", 0, split, np.zeros((1, 4)), annotated_size=size, region=region)


CAM = torch.tensor([[1.0, 0.6, 0.3, 0.0], [0.5, 0.2, 0.0, 0.0]])
MASK = [[1, 1, 0, 0], [0, 0, 0, 0]]


def at(share: float) -> int:
    return SHARES.index(share)


def test_one_map_by_hand() -> None:
    ious, weighted, energy, right = metrics.score([7 * CAM], [expression_of(MASK)], MASKS)[0]
    # Pixels of at least a share of the maximum; both of the mask's are among them until the share is above 0.6.
    hand = {0.05: 2 / 5, 0.2: 2 / 5, 0.25: 2 / 4, 0.3: 2 / 4, 0.35: 2 / 3, 0.5: 2 / 3, 0.55: 1, 0.6: 1, 0.65: 1 / 2}
    for share, iou in hand.items():
        assert ious[at(share)] == weighted[at(share), 0] == iou
        assert weighted[at(share), 1] == 2 if share > 0.5 else weighted[at(share), 1] == 2 / iou  # the union
    assert (energy, right) == (pytest.approx(1.6 / 2.6), 1)
    ious, weighted, energy, _ = metrics.score([0 * CAM], [expression_of(MASK)], MASKS)[0]
    assert (ious == 0).all()  # no pixel is hot
    assert (weighted == [0, 2]).all()
    assert energy == 0


def test_the_point_is_of_the_mask_and_not_of_its_box() -> None:
    ring = np.ones((5, 5))
    ring[2, 2] = 0
    cam = torch.zeros(5, 5)
    cam[2, 2] = 1.0
    assert metrics.score([cam], [expression_of(ring)], ["mask_point"])["mask_point"] == [0]
    cam[0, 4] = 2.0
    assert metrics.score([cam], [expression_of(ring)], ["mask_point"])["mask_point"] == [1]


def test_the_threshold_is_the_best_on_val_and_serves_all_splits() -> None:
    large = torch.tensor([[1.0, 0.9, 0.9, 0.9], [0.9, 0.9, 0.1, 0.1]])
    cases = [
        (CAM, expression_of(MASK)),  # best at 0.55 and 0.6
        (large, expression_of([[1, 1, 1, 1], [1, 1, 1, 1]])),  # 1 up to 0.1, 6/8 up to 0.9
        (CAM, expression_of([[1, 0, 0, 0], [0, 0, 0, 0]], "test")),  # best from 0.65 on
        (None, expression_of(MASK)),
    ]
    maps, expressions = [cam for cam, _ in cases], [one for _, one in cases]
    splits, names = [one.split for one in expressions], ["mask_point", "mask_iou", "mask_oiou"]
    raw = metrics.score(maps, expressions, names)
    found, shares = metrics.settle(raw, splits)
    assert list(found) == [*names, "mask_oiou weight"]
    assert shares == {"mask_iou": 0.55, "mask_oiou": 0.55}  # the first of 0.55 and 0.6
    assert found["mask_iou"][:3].tolist() == [1, 6 / 8, 1 / 2]
    assert np.isnan(found["mask_iou"][3])
    reported = {"val": "val_d", "test": "test"}

    def line(name: str) -> dict[str, float | None]:
        return metrics.split_accuracies(found[name], splits, reported, found.get(f"{name} weight"))

    assert line("mask_iou") == {"val_d": (1 + 6 / 8) / 2, "test": 1 / 2}
    assert line("mask_oiou") == pytest.approx({"val_d": (2 + 6) / (2 + 8), "test": 1 / 2})
    unread, shares = metrics.settle(metrics.score([None, None, CAM, None], expressions, names), splits)
    assert shares == {}
    assert np.isnan(unread["mask_oiou"]).all()


def test_it_agrees_with_pycocotools() -> None:
    rng = np.random.default_rng(0)
    for _ in range(30):
        height, width = (int(side) for side in rng.integers(8, 60, 2))
        pred = torch.from_numpy(rng.random((6, 6)) ** 3)
        mask = np.zeros((height, width), np.uint8)
        y, x = int(rng.integers(height - 3)), int(rng.integers(width - 3))
        mask[y : y + int(rng.integers(3, 30)), x : x + int(rng.integers(3, 30))] = rng.random() < 2
        row = metrics.score([pred], [expression_of(mask)], ["mask_iou"])["mask_iou"][0]
        cam = ResizedMap(pred, height, width).product().numpy()
        regions = [coco.encode(np.asfortranarray(hot(cam, share), np.uint8)) for share in SHARES]
        assert row == pytest.approx(coco.iou(regions, [coco.encode(np.asfortranarray(mask))], [0])[:, 0])


# ---- the evaluation


def plain_numbers(place: Path, output: Path, masks: str) -> dict[str, dict[str, float]]:
    """mIoU and oIoU by split, and their threshold, from the result file."""
    config = load_config(place / "refcoco.yaml", GroundingConfig, [masks, "metrics=[mask_iou]"])
    terms: dict[str, list[np.ndarray]] = {}
    for one, record in zip(REFCOCO_PLUS.load(config), results(output), strict=True):
        assert one.region
        cam, mask = ResizedMap(record["pred"], *one.size).product().numpy(), to_mask(one.region)
        pairs = [((hot(cam, t) & mask).sum(), (hot(cam, t) | mask).sum()) for t in SHARES]
        terms.setdefault(one.split, []).append(np.array(pairs, float))
    best = int(np.mean([both / either for both, either in (p.T for p in terms["val"])], axis=0).argmax())
    found: dict[str, dict[str, float]] = {"mask_iou": {}, "mask_oiou": {}}
    for split, pairs in terms.items():
        both, either = np.array(pairs)[:, best].T
        found["mask_iou"][split], found["mask_oiou"][split] = (both / either).mean(), both.sum() / either.sum()
    for one in found.values():
        one["threshold"] = SHARES[best]
    return found


def test_the_log_is_that_of_the_maps_and_masks(place: Path, tmp_path: Path) -> None:
    """Beside the published lines, which stay as they are; again from the stored maps; and in the report."""
    evaluate(REFCOCO_PLUS, place, tmp_path / "without", checkpoint=ONE)
    masks = f"refcoco_data={place / 'data' / 'masks' / 'refer'}"
    evaluate(REFCOCO_PLUS, place, tmp_path / "with", "--set", masks, *ASKED, "--report", checkpoint=ONE)
    first, published = ((tmp_path / run / "result" / "log.txt").read_text() for run in ("with", "without"))
    assert first.startswith(published)
    expected = plain_numbers(place, tmp_path / "with", masks)
    lines = log(tmp_path / "with")[len(published.splitlines()) :]
    assert len(lines) == len(MASKS)
    for metric, line in zip(MASKS, lines, strict=True):
        plain = {key.removeprefix(f"{metric}_").removesuffix("_d"): value for key, value in line.items()}
        del plain["epoch"]
        assert plain == pytest.approx(expected[metric]) if metric in expected else "threshold" not in plain
    (source,) = sources_of([tmp_path / "with"], REFCOCO_PLUS.metrics)
    config = load_config(place / "refcoco.yaml", GroundingConfig, [masks, f"metrics=[{','.join(MASKS)}]"])
    report = collect(benchmark_of(config, REFCOCO_PLUS), REFCOCO_PLUS.load(config), [source])
    for metric in MASKS:
        grid = report.grid(metric, [source.name], report.table["split"].astype("category"))
        shown = {f"{metric}_{split}_d": grid[split].iloc[0].mean for split in grid}
        assert shown == pytest.approx({key: lines[MASKS.index(metric)][key] for key in shown})
    html, csv = ((tmp_path / "with" / file).read_text() for file in ("report.html", "expressions.csv"))
    assert "mask_iou" in html or "mask iou" in html
    assert '"mask_oiou weight: checkpoint_01"' in csv
    (tmp_path / "with" / "result" / "log.txt").unlink()
    evaluate(REFCOCO_PLUS, place, tmp_path / "with", "--set", masks, *ASKED, checkpoint=ONE)
    assert (tmp_path / "with" / "result" / "log.txt").read_text() == first


def test_other_segmentations_of_the_same_maps_are_measured_anew(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Boxes' outlines, then masks: the maps stay, the lines do not."""
    evaluate(REFCLEF, place, tmp_path, *ASKED, checkpoint=ONE)
    outlines = log(tmp_path)
    evaluate(REFCLEF, place, tmp_path, *ASKED, checkpoint=ONE)
    assert "already evaluated" in capsys.readouterr().out
    masks = f"refcoco_data={place / 'data' / 'masks' / 'refer'}"
    evaluate(REFCLEF, place, tmp_path, "--set", masks, *ASKED, checkpoint=ONE)
    assert "loaded" not in capsys.readouterr().out
    assert log(tmp_path)[0] == outlines[0]
    assert all(one != other for one, other in zip(log(tmp_path)[1:4], outlines[1:4], strict=True))


def test_results_of_other_metrics_are_compared_by_those_of_this_run(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their maps are stored: they are measured again, and the folder stays as it is."""
    monkeypatch.setattr(sections, "chart", lambda *_, **__: "data:,")  # drawing takes most of the time
    monkeypatch.setattr(sections, "panel", lambda *_: Image.new("RGB", (1, 1)))
    masks = "--set", f"refcoco_data={place / 'data' / 'masks' / 'refer'}"
    evaluate(REFCLEF, place, tmp_path / "plain", checkpoint=ONE)
    before = log(tmp_path / "plain")
    other = "ckpt/checkpoint_02.pth"
    evaluate(REFCLEF, place, tmp_path / "out", *masks, *ASKED, "--compare", str(tmp_path / "plain"), checkpoint=other)
    said = f"plain/result/epoch00.pth was measured by point; the report measures its maps by point, {', '.join(MASKS)}"
    assert said in capsys.readouterr().out
    assert log(tmp_path / "plain") == before
    table = pd.read_csv(tmp_path / "out" / "expressions.csv")
    evaluate(REFCLEF, place, tmp_path / "masks", *masks, *ASKED, checkpoint=ONE)
    for metric, line in zip(MASKS, log(tmp_path / "masks")[1:], strict=True):
        weights = table["mask_oiou weight: checkpoint_01"] if metric == "mask_oiou" else np.ones(len(table))
        val = table["split"] == "val"
        mean = np.average(table.loc[val, f"{metric}: checkpoint_01"], weights=weights[val])
        assert mean == pytest.approx(line[f"{metric}_val_d"], abs=1e-6)
    evaluate(REFCLEF, place, tmp_path / "plain", "--compare", str(tmp_path / "masks"), checkpoint=ONE)
    said = f"masks/result/epoch00.pth was measured by point, {', '.join(MASKS)}; the report measures its maps by point"
    assert f"{said}\n" in capsys.readouterr().out
    html = (tmp_path / "plain" / "report.html").read_text()
    assert "Image-text matching" not in html  # whose lines follow those of all metrics


def test_the_card_of_an_exported_model_has_them(place: Path, tmp_path: Path) -> None:
    evaluate(REFCLEF, place, tmp_path, *ASKED, checkpoint=ONE)
    names = [row[1] for row in export.accuracy_rows(tmp_path, place / ONE)]
    assert list(dict.fromkeys(names)) == ["point", *MASKS]


# ---- errors


def test_metrics_that_the_data_cannot_be_measured_by(place: Path, tmp_path: Path) -> None:
    with pytest.raises(MetricError, match=r"'mask_iou' needs region, which \d+ of \d+ expressions do not have"):
        evaluate(base.FLICKR, place, tmp_path / "a", *ASKED, checkpoint=ONE)
    config = json.loads((place / "refclef.yaml").read_text())
    files = json.dumps(config["test_file"][1:])
    with pytest.raises(MetricError, match=r"threshold of mask_iou is chosen on val, and no expr"):
        evaluate(REFCLEF, place, tmp_path / "b", *ASKED, "--set", f"test_file={files}", checkpoint=ONE)


@pytest.mark.parametrize(
    ("row", "image", "message"),
    [
        ({"segmentation": [[1, 1, 5, 1, float("nan"), 5]]}, {}, "'segmentation' of the ref's annotation: a polygon"),
        ({"segmentation": None}, {}, "'segmentation' of the ref's annotation must be a list of polygons"),
        ({"segmentation": [[900, 1, 905, 1, 905, 5]]}, {}, "'segmentation' of the ref's annotation covers no pixel"),
        (
            {"segmentation": {"size": [2, 2], "counts": [0, 4]}},
            {},
            r"instances\.json: .segmentation. of the ref.s annotation: the size of an RLE is not that of its image",
        ),
        ({}, {"width": None}, "the ref's image lacks 'height' or 'width'"),
        ({}, {"width": 57}, "by instances.json, whose segmentations metrics ask for, 57x"),
    ],
)
def test_annotations_without_a_usable_region(
    row: dict[str, Any], image: dict[str, Any], message: str, place: Path, tmp_path: Path
) -> None:
    """They are named before anything is computed, and are no problem while no metric asks."""
    shutil.copytree(place / "data" / "refer", tmp_path / "refer")
    file = tmp_path / "refer" / "refclef" / "instances.json"
    instances = json.loads(file.read_text())
    for key, changes in (("annotations", row), ("images", image)):
        for each in instances[key]:
            each |= changes
    file.write_text(json.dumps(instances))
    words = "--set", f"refcoco_data={tmp_path / 'refer'}"
    with pytest.raises((DataError, MetricError), match=message):
        evaluate(REFCLEF, place, tmp_path / "out", *words, *ASKED, checkpoint=ONE)
    assert not (tmp_path / "out" / "result").exists()
    assert REFCLEF.load(load_config(place / "refclef.yaml", GroundingConfig, [words[1]]))
