"""What the field measures beside the published metrics: recall, tolerance, merged boxes, asked for by the config."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import export
import prepare
from config import GroundingConfig, load_config
from dataset.expressions import Expression, with_merged_boxes
from grounding import metrics, questions
from grounding.benchmarks import FLICKR, REFCLEF, benchmark_of
from grounding.maps import ResizedMap
from grounding.metrics import MetricError
from grounding.results import ResultError
from grounding.validate import Validation
from models.albef import build_albef
from tests.grounding import test_evaluate as base
from tests.grounding.test_benchmarks import run
from tests.grounding.test_evaluate import ONE, evaluate, log

place = base.place
pytestmark = pytest.mark.usefixtures("one_thread")


def measured(cam: torch.Tensor, boxes: list[list[float]], *names: str) -> list[float]:
    """Metrics of a map of its image's own size."""
    one = Expression(Path("x"), "x", 0, "val", np.array(boxes, float), annotated_size=(cam.shape[0], cam.shape[1]))
    return list(metrics.score([cam], [one], names)[0])


# ---- recall


def test_recall_counts_the_best_boxes_of_the_map() -> None:
    """Three regions of at least half the maximum; their scores, sum / sqrt(area): 16 / 4, 12 * 0.7 / sqrt(12), 0.6."""
    cam = torch.zeros(20, 20)
    cam[1:5, 1:5] = 1.0  # [1, 1, 4, 4] scores 4
    cam[10:13, 10:14] = 0.7  # [10, 10, 4, 3] scores 2.4
    cam[18, 2] = 0.6  # [2, 18, 1, 1] scores 0.6
    cam[15, 15] = 0.4  # below half the maximum: no region
    names = "map_box", "recall_1", "recall_2", "recall_3", "recall_10"
    assert measured(cam, [[1, 1, 4, 4]], *names) == [1, 1, 1, 1, 1]
    assert measured(cam, [[10, 10, 4, 3]], *names) == [0, 0, 1, 1, 1]
    assert measured(cam, [[10, 10, 4, 6]], *names) == [0, 0, 1, 1, 1]  # IoU 12 / 24: exactly half
    assert measured(cam, [[10, 10, 4, 6.1]], *names) == [0, 0, 0, 0, 0]
    assert measured(cam, [[15, 15, 1, 1]], *names) == [0, 0, 0, 0, 0]
    assert measured(cam, [[15, 15, 1, 1], [10, 10, 4, 3]], *names) == [0, 0, 1, 1, 1]  # any of the true boxes
    assert measured(torch.zeros(20, 20), [[1, 1, 4, 4]], *names) == [0, 0, 0, 0, 0]  # no region at all


def test_a_region_of_one_pixel_is_never_right() -> None:
    """Of REFER's IoU: boxes that share a single row or column of pixels do not intersect."""
    cam = torch.zeros(20, 20)
    cam[18, 2] = 1.0
    assert measured(cam, [[2, 18, 1, 1]], "recall_1") == [0]


# ---- pointing with a tolerance


@pytest.mark.parametrize(
    ("box", "least"),
    [
        ([9, 9, 5, 5], 0),  # pixels 10 to 13: the maximum, at (10, 10), is right
        ([10, 9, 5, 5], 1),  # 11 to 14: on the left edge
        ([5, 9, 5, 5], 1),  # 6 to 9: on the right edge
        ([12, 9, 5, 5], 3),  # 13 to 16
        ([12.5, 9, 5, 5], 3),  # the first pixel after 12.5 is 13
        ([12, 13, 5, 5], 5),  # 3 to the right, 4 down: 5 away
        ([2, 1, 5, 4], 8),  # x to 6, y to 4: sqrt(16 + 36) = 7.2
        ([25, 8, 9, 9], 16),  # 26 to 33, of which 26 to 29 are in the image
    ],
)
def test_a_tolerance_is_a_distance_to_where_the_point_would_be_right(box: list[float], least: int) -> None:
    cam = torch.zeros(30, 30)
    cam[10, 10] = 1.0
    numbers = (1, 2, 3, 4, 5, 7, 8, 15, 16, 40)
    expected = [least == 0, *(number >= least for number in numbers)]
    assert measured(cam, [box], "point", *(f"point_{number}px" for number in numbers)) == expected
    assert measured(cam, [[40, 40, 5, 5]], "point_9999px") == [0]  # a box outside the image is never right
    assert measured(cam, [[40, 40, 5, 5], box], f"point_{max(least, 1)}px") == [1]  # any of several


@pytest.mark.parametrize(
    "name", ["recall_0", "recall_", "recall_05", "recall_5 ", "point_px", "point_-1px", "point_15", "recall_99999"]
)
def test_names_that_are_no_metrics(name: str) -> None:
    with pytest.raises(MetricError, match=r"there is no metric '.*there are box, point, .*point_Npx, recall_N \(N: "):
        metrics.find_metric(name)
    config = GroundingConfig(image_root="", benchmark="flickr", metrics=[name])
    with pytest.raises(MetricError, match="there is no metric"):  # what `prepare.py check` asks as well
        benchmark_of(config)


# ---- several boxes of a phrase


def test_merged_boxes_are_one_around_all() -> None:
    def merged(*boxes: list[float]) -> list[list[float]]:
        one = Expression(Path("x"), "x", 7, "val", np.array(boxes, float))
        return with_merged_boxes(one).boxes.tolist()

    assert merged([10, 20, 5, 5], [30, 2, 10, 10]) == [[10, 2, 30, 23]]
    assert merged([0, 0, 9, 9], [2, 2, 3, 3]) == [[0, 0, 9, 9]]
    assert merged([0.1, 0.2, 0.3, 0.7]) == [[0.1, 0.2, 0.3, 0.7]]  # 0.1 + 0.3 - 0.1 would round


def test_a_point_between_two_boxes_is_right_by_the_merged_protocol_alone() -> None:
    cam = torch.zeros(20, 40)
    cam[10, 20] = 1.0
    boxes = [[2.0, 5, 8, 10], [30.0, 5, 8, 10]]
    one = Expression(Path("x"), "x", 0, "val", np.array(boxes), annotated_size=(20, 40))
    assert not metrics.point(ResizedMap(cam, 20, 40), one)
    assert metrics.point(ResizedMap(cam, 20, 40), with_merged_boxes(one))


@pytest.fixture
def two_boxes(place: Path, tmp_path: Path) -> Path:
    """The scenes' Flickr30k, whose phrases get a second box each: beside the first, or far away."""
    keys: dict[str, Any] = json.loads((place / "flickr.yaml").read_text())
    files = []
    for name in keys["phrase_box_file"]:
        content = json.loads(Path(name).read_text())
        for image in content.values():
            for boxes in image["boxes"].values():
                boxes.append([0, 0, 3, 3])
        files.append(str(tmp_path / Path(name).name))
        Path(files[-1]).write_text(json.dumps(content))
    base.write_config(tmp_path / "flickr.yaml", {**keys, "phrase_box_file": files})
    return tmp_path / "flickr.yaml"


def test_the_protocols_on_flickr(place: Path, two_boxes: Path, tmp_path: Path) -> None:
    """The merged box of each phrase, by hand; results of one protocol are not taken for the other's."""
    config = load_config(two_boxes, GroundingConfig)
    words = ["--config", str(two_boxes)]
    evaluate(FLICKR, place, tmp_path / "any", *words, checkpoint=ONE)
    evaluate(FLICKR, place, tmp_path / "merged", *words, "--set", "box_protocol=merged", checkpoint=ONE)
    right: dict[str, list[bool]] = {"val": [], "test": []}
    records = base.results(tmp_path / "merged")
    for one, record in zip(FLICKR.load(config), records, strict=True):
        (x1, y1), (x2, y2) = one.boxes[:, :2].min(0), (one.boxes[:, :2] + one.boxes[:, 2:]).max(0)
        x, y = ResizedMap(record["pred"], *one.size).point()
        right[one.split].append(bool(x1 < x < x2 and y1 < y < y2))
    assert log(tmp_path / "merged") == [{"val_d": np.mean(right["val"]), "test": np.mean(right["test"]), "epoch": "00"}]
    assert log(tmp_path / "merged") != log(tmp_path / "any")
    before = json.loads((tmp_path / "any" / "result" / "epoch00.json").read_text())
    assert before["benchmark"] == "Flickr30k"
    with pytest.raises(ResultError, match=r"benchmark Flickr30k \(asked for now: Flickr30k, merged boxes\), boxes "):
        evaluate(FLICKR, place, tmp_path / "any", *words, "--set", "box_protocol=merged", checkpoint=ONE)


# ---- Visual Genome


def test_visual_genome_has_the_numbers_of_the_same_data_in_another_format(place: Path, tmp_path: Path) -> None:
    """The first box of every phrase of the scenes' Flickr30k, as regions and as one's own data."""
    expressions = FLICKR.load(load_config(place / "flickr.yaml", GroundingConfig))
    (tmp_path / "VG_100K").symlink_to(place / "data" / "images")
    regions: dict[int, list[Any]] = {}
    own = []
    for one in expressions:
        box = dict(zip(("x", "y", "width", "height"), one.boxes[0].tolist(), strict=True))
        regions.setdefault(int(one.image.stem), []).append({"phrase": one.text, **box})
        own.append({"image": one.image.name, "phrase": one.text, "box": list(box.values())})
    images = [
        {"image_id": i, "url": f"/VG_100K/{i}.jpg", "width": size[1], "height": size[0]}
        for i, size in {int(one.image.stem): one.size for one in expressions}.items()
    ]
    files = {
        "image_data": images[::-1],
        "regions": [{"id": i, "regions": of} for i, of in sorted(regions.items())],
        "own": own,
    }
    for name, content in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    (tmp_path / "test.txt").write_text("\n".join(map(str, regions)))
    sizes = json.loads((place / "flickr.yaml").read_text())
    sizes = {key: value for key, value in sizes.items() if not key.endswith("_file")}
    names = {"image_data_file": "image_data.json", "region_file": "regions.json"}
    vg = {**sizes, "benchmark": "vg", **{key: str(tmp_path / name) for key, name in names.items()}}
    base.write_config(
        tmp_path / "vg.yaml", {**vg, "image_ids_file": [str(tmp_path / "test.txt")], "image_root": str(tmp_path)}
    )
    base.write_config(tmp_path / "own.yaml", {**sizes, "benchmark": "own", "test_file": [str(tmp_path / "own.json")]})
    run(place, tmp_path / "vg.yaml", tmp_path / "vg", checkpoint=ONE)
    run(place, tmp_path / "own.yaml", tmp_path / "own", checkpoint=ONE)
    assert log(tmp_path / "vg") == log(tmp_path / "own")[1:]
    pairs = list(zip(base.results(tmp_path / "vg"), base.results(tmp_path / "own"), strict=True))
    assert len(pairs) == len(expressions)
    assert all(torch.equal(one["pred"], other["pred"]) for one, other in pairs)
    args = prepare.parse_args(["check", str(tmp_path / "vg.yaml"), "--json"])
    args.run(args)  # without errors


# ---- asked for by the config


def test_metrics_of_the_config_follow_those_of_the_benchmark(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stored maps are measured again; the published lines stay; each further line names its metric."""
    evaluate(REFCLEF, place, tmp_path)
    plain, maps = log(tmp_path), (tmp_path / "result" / "epoch00.pth").read_bytes()
    monkeypatch.setattr(questions, "build_model", None)  # the maps are there
    capsys.readouterr()
    evaluate(REFCLEF, place, tmp_path, "--set", "metrics=[recall_1, point_15px, point, recall_1]", "--report")
    lines = [[line for line in log(tmp_path) if line["epoch"] == epoch] for epoch in ("00", "01", "02")]
    assert [each[0] for each in lines] == plain
    keys = ["recall_1_val_d", "recall_1_test", "epoch", "point_15px_val_d", "point_15px_test", "epoch"]
    assert all([*each[1], *each[2]] == keys for each in lines)
    assert all(near["point_15px_test"] >= point["test"] for point, _, near in lines)
    assert (tmp_path / "result" / "epoch00.pth").read_bytes() == maps
    printed = capsys.readouterr().out
    assert "* best by point val_d" in printed  # the last metric of its own still decides
    assert "  recall_1_val_d  recall_1_test  point_15px_val_d" in printed
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "In bold the best by point val_d" in html
    assert "point_15px val_d" in html
    assert [row[1:3] for row in export.accuracy_rows(tmp_path, place / ONE)] == [
        *(["point", key] for key in ("val_d", "test")),
        *(["recall_1", key] for key in keys[:2]),
        *(["point_15px", key] for key in keys[3:5]),
    ]
    evaluate(REFCLEF, place, tmp_path, "--set", "metrics=[recall_5, point_3px]")
    assert [next(iter(line)) for line in log(tmp_path)[:3]] == ["val_d", "recall_5_val_d", "point_3px_val_d"]
    evaluate(REFCLEF, place, tmp_path)
    assert log(tmp_path) == plain


def test_a_model_in_training_is_measured_so_as_well(place: Path, tmp_path: Path) -> None:
    """Validation by a config with further metrics and merged boxes: the point of its own decides."""
    keys = json.loads((place / "flickr.yaml").read_text())
    base.write_config(tmp_path / "some.yaml", {**keys, "metrics": ["recall_1"], "box_protocol": "merged"})
    config = load_config(tmp_path / "some.yaml", GroundingConfig)
    model = build_albef(config)
    model.load_state_dict(torch.load(place / ONE, weights_only=True)["model"])
    asking = questions.Asking(str(place / "data" / "text_encoder"), num_workers=0)
    found = Validation([str(tmp_path / "some.yaml")], model, asking, torch.device("cpu"))
    assert found.decisive == "val_flickr_point"
    words = ["--config", str(tmp_path / "some.yaml")]
    evaluate(FLICKR, place, tmp_path / "out", *words, checkpoint=ONE)
    point, recall = log(tmp_path / "out")
    expected = {"val_flickr_point": point["val_d"], "val_flickr_recall_1": recall["recall_1_val_d"]}
    assert found.measure() == pytest.approx(expected)


def test_a_metric_of_the_config_that_the_data_cannot_be_measured_by(place: Path, tmp_path: Path) -> None:
    with pytest.raises(MetricError, match=r"metric 'box' needs detections, which (\d+) of \1 expressions do not have"):
        evaluate(FLICKR, place, tmp_path / "out", "--set", "metrics=[box]", checkpoint=ONE)
    assert not (tmp_path / "out").exists()
