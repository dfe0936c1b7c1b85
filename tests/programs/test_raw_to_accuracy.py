"""From raw to accuracy: scenes in their owners' layouts, through prepare.py, to training and evaluation.

The files or, where these have other names, the accuracies must be those of the same scenes whose files the generator
writes directly. The model is the one that ships with the repository.
"""

import json
import pickle
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import Pretrain
from dataset.raw.visual_genome import OUTPUTS
from dataset.scenes import files as scenes_files
from dataset.scenes.world import draw_scene
from grounding import evaluate as program
from grounding.benchmarks import REFCOCO_PLUS
from tests.data_keys import PARTS, data_keys
from tests.dataset.raw.raw_layouts import contents, mattnet_detections, run, write, write_entities, write_refer

pytestmark = pytest.mark.slow
CONFIGS = Path("configs/scenes")
CHECKPOINT = Path("checkpoints/scenes_stage1.safetensors")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three scenes a split, as the generator writes them. Do not write into it."""
    folder = tmp_path_factory.mktemp("scenes")
    scenes_files.generate(folder, seed=4, train=1, annotated=1, evaluation=3)
    return folder


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def evaluated(scenes: Path, output: Path, checkpoint: Path = CHECKPOINT, **keys: object) -> Path:
    """Evaluate by the scenes' RefCOCO+ config, `keys` in place of its paths; returns the result folder."""
    words = ["--config", str(CONFIGS / "Grounding_refcoco.yaml"), "--checkpoint", str(checkpoint)]
    words += ["--output_dir", str(output), "--text_encoder", str(scenes / "text_encoder")]
    for key, value in ({"matching_file": []} | keys).items():
        words += ["--set", f"{key}={json.dumps([str(v) for v in value] if isinstance(value, list) else str(value))}"]
    words += ["--device", "cpu", "--num_workers", "0"]
    program.evaluate(REFCOCO_PLUS, program.parse_args(REFCOCO_PLUS, words))
    return output / "result"


def lines(result: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (result / "log.txt").read_text().splitlines()]


# ---- Flickr30k Entities


def test_flickr(scenes: Path, tmp_path: Path) -> None:
    direct, raw = scenes / "flickr", tmp_path / "flickr30k_entities"
    for part in PARTS:
        boxes, sentences = (read(direct / f"{kind}_{part}.json") for kind in ("bounding_boxes", "sentences"))
        write_entities(raw, boxes, sentences)
        shutil.copy(direct / f"{part}.txt", raw)
    run("flickr", raw, "--out", tmp_path / "out", "--ids", *(raw / f"{part}.txt" for part in PARTS))
    made, written = contents(tmp_path / "out"), contents(direct)
    assert {name: text.strip() for name, text in made.items()} == {name: text.strip() for name, text in written.items()}


# ---- REFER


def raw_refer(scenes: Path, root: Path, dataset: str, source: str, split_by: str, splits: dict[str, str]) -> None:
    """REFER's layout of a data set: COCO's image names, and file names in refs and instances that are of no use.

    Args:
        source: the scenes' data set whose refs they are.
        splits: the names of its splits -> those that they get.
    """
    refs = pickle.loads((scenes / "refer" / source / "refs(unc).p").read_bytes())
    refs = [
        {**row, "split": splits.get(row["split"], row["split"]), "file_name": f"{row['ref_id']}.jpg"} for row in refs
    ]
    instances = read(scenes / "refer" / source / "instances.json")
    if dataset != "refclef":
        instances["images"] = [{**row, "file_name": "COCO_train2014_000000000001.jpg"} for row in instances["images"]]
    write_refer(root / "refer" / dataset, split_by, refs, instances)
    (root / "train2014").mkdir(exist_ok=True)
    for image in instances["images"]:
        name = "COCO_train2014_{:012d}.jpg".format(image["id"])
        shutil.copy(scenes / "images" / f"{image['id']:06d}.jpg", root / "train2014" / name)


def test_refclef(scenes: Path, tmp_path: Path) -> None:
    raw_refer(scenes, tmp_path, "refclef", "refclef", "unc", {})
    words = ["--out", tmp_path / "out", "--image-root", scenes / "images"]
    run("refer", tmp_path / "refer", "--dataset", "refclef", *words)
    for part in PARTS:
        name = f"refclef_{part}.json"
        assert read(tmp_path / "out" / name) == read(scenes / "refer" / "refclef" / name)


@pytest.fixture(scope="module")
def refcoco_plus(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results on RefCOCO+'s files as the generator writes them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the tests, whose maps must equal these
    try:
        return evaluated(scenes, tmp_path_factory.mktemp("direct"), **data_keys("refcoco", scenes))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("dataset", "split_by", "splits", "names"),
    [
        ("refcoco+", "unc", {}, {"val_d": "val_d", "testA_d": "testA_d", "testB_d": "testB_d"}),
        ("refcoco", "unc", {}, {"val_d": "val", "testA_d": "testA", "testB_d": "testB"}),
        ("refcocog", "umd", {"testA": "test", "testB": "train"}, {"val_d": "val", "testA_d": "test"}),
        ("refcocog", "google", {"testA": "train", "testB": "train"}, {"val_d": "val"}),
    ],
    ids=["refcoco+", "refcoco", "refcocog-umd", "refcocog-google"],
)
def test_refcoco_and_its_like(
    dataset: str,
    split_by: str,
    splits: dict[str, str],
    names: dict[str, str],
    scenes: Path,
    refcoco_plus: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    one_thread: None,
) -> None:
    """The same refs and boxes under another name have the same accuracies; refs of train are not in the test lists."""
    raw_refer(scenes, tmp_path, dataset, "refcoco+", split_by, splits)
    words = ["--split-by", split_by, "--out", tmp_path / "lists", "--image-root", tmp_path]
    run("refer", tmp_path / "refer", "--dataset", dataset, *words)
    mattnet = write(tmp_path / "mattnet.json", mattnet_detections(read(scenes / "refer" / "refcoco+" / "dets.json")))
    run("detections", mattnet, "--out", tmp_path / "dets.json")
    keys: dict[str, object] = {
        "test_file": [tmp_path / "lists" / f"{dataset}_{part}.json" for part in PARTS],
        "refcoco_data": tmp_path / "refer",
        "image_root": tmp_path,
        "det_file": tmp_path / "dets.json",
    }
    if dataset != "refcoco+":
        keys |= {"refer_dataset": dataset, "refer_split": split_by}
    result = evaluated(scenes, tmp_path / "out", **keys)

    expected = [{new: row[old] for old, new in names.items()} | {"epoch": "00"} for row in lines(refcoco_plus)]
    assert lines(result) == expected
    assert 0 < expected[1][names["val_d"]] < 1
    title = {"refcoco+": "RefCOCO+", "refcoco": "RefCOCO", "refcocog": "RefCOCOg"}[dataset]
    printed = capsys.readouterr().out
    assert f"\n{title}: " in printed
    assert f"* best by point {names['val_d']}\n" in printed
    if not splits:
        found, wanted = (torch.load(one / "epoch00.pth", weights_only=True) for one in (result, refcoco_plus))
        assert [row["ref_id"] for row in found] == [row["ref_id"] for row in wanted]
        assert all(torch.equal(a["pred"], b["pred"]) for a, b in zip(found, wanted, strict=True))


# ---- Visual Genome


def test_visual_genome(tmp_path: Path, one_thread: None) -> None:
    """Raw files of training scenes -> prepare.py -> Pretrain.py -> the accuracy of its checkpoint."""
    data, raw, count = tmp_path / "scenes", tmp_path / "vg", 8
    scenes_files.generate(data, seed=5, train=count, annotated=count, evaluation=2)
    (raw / "VG_100K").mkdir(parents=True)
    images: list[dict[str, Any]] = []
    regions: list[dict[str, Any]] = []
    attributes: list[dict[str, Any]] = []
    boxes_of: dict[tuple[int, str], list[list[int]]] = {}  # of each phrase, in the generator's order
    for row in read(data / "train_phrases.json"):
        for phrase in [row["caption"]] if isinstance(row["caption"], str) else row["caption"]:
            known = boxes_of.setdefault((int(row["image"][:6]), phrase), [])
            known += [box for box in row["bbox"] if box not in known]
    for i in range(count):
        scene = draw_scene(np.random.default_rng([5, 0, i]))
        shutil.copy(data / "images" / f"{i:06d}.jpg", raw / "VG_100K" / f"{i}.jpg")
        url = f"https://example.org/VG_100K/{i}.jpg"
        images.append({"image_id": i, "url": url, "width": scene.width, "height": scene.height})
        images[-1] |= {"coco_id": None, "flickr_id": None}
        own = [(phrase, box) for (image, phrase), boxes in boxes_of.items() if image == i for box in boxes]
        regions.append({"id": i, "regions": [{"image_id": i, "phrase": text, **corner(box)} for text, box in own]})
        things = [{"names": [t.shape], "attributes": [t.colour], **corner(t.box, "w", "h")} for t in scene.things]
        attributes.append({"image_id": i, "attributes": things})
    for name, rows in (("image_data", images), ("region_descriptions", regions), ("attributes", attributes)):
        write(raw / f"{name}.json", rows)

    run("vg", raw, "--out", tmp_path / "out")
    described = read(tmp_path / "out" / "vg_descriptions.json")
    assert described == [
        {"image": f"VG_100K/{image}.jpg", "caption": phrase, "bbox": boxes}
        for (image, phrase), boxes in boxes_of.items()
    ]
    coloured = read(tmp_path / "out" / "vg_attributes.json")
    things = draw_scene(np.random.default_rng([5, 0, 0])).things
    first = [(row["caption"], row["bbox"]) for row in coloured if row["image"] == "VG_100K/0.jpg"]
    assert len(first) == len({(thing.colour, thing.shape) for thing in things})
    for caption, boxes in first:
        assert boxes == [list(thing.box) for thing in things if f"{thing.colour} {thing.shape}" == caption]

    files = [str(tmp_path / "out" / name) for name in OUTPUTS.values()]
    words = ["--config", str(CONFIGS / "Pretrain.yaml"), "--output_dir", str(tmp_path / "run"), "--max_steps", "2"]
    words += ["--checkpoint", str(CHECKPOINT), "--text_encoder", str(data / "text_encoder"), "--device", "cpu"]
    for key, value in {"train_file": files, "image_root": str(raw), "batch_size": 4, "schedular.epochs": 1}.items():
        words += ["--set", f"{key}={json.dumps(value)}"]
    Pretrain.main(Pretrain.parse_args([*words, "--num_workers", "0"]))
    (epoch,) = [json.loads(line) for line in (tmp_path / "run" / "log.txt").read_text().splitlines()]
    assert epoch["steps"] == 2
    assert epoch["train_loss_cam2"] > 0

    checkpoint = tmp_path / "run" / "checkpoint_00.pth"
    result = evaluated(data, tmp_path / "eval", checkpoint, **data_keys("refcoco", data))
    assert 0 < lines(result)[1]["val_d"] <= 1


def corner(box: Sequence[int], width: str = "width", height: str = "height") -> dict[str, int]:
    """Visual Genome's keys of a box [x1, y1, x2, y2]."""
    return {"x": box[0], "y": box[1], width: box[2] - box[0], height: box[3] - box[1]}
