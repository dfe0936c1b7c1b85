"""The tiny world that tests/fuzz.py damages: scenes, raw downloads, pictures, configs, a checkpoint, logs, results."""

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, features
from ruamel.yaml import YAML
from safetensors.torch import save_file

from config import PretrainConfig, load_config
from dataset.expressions import Expression
from dataset.scenes import files as scenes_files
from dataset.text import load_tokenizer
from grounding.results import ResultFolder
from models.pretrain import PretrainModel
from tests.data_keys import data_keys
from tests.dataset.raw.raw_layouts import mattnet_detections, write_entities
from tests.dataset.raw.test_vg_files import FILES as VG_FILES
from tests.small_blip import SIZES as BLIP
from tests.small_model import BERT, SIZES

VG_KEYS = {"image_data_file": "image_data", "region_file": "region_descriptions"}
PICTURES = ["a.jpg", "a.png", "a.gif", "a.bmp", "a.webp", "a.tif", "packbits.tif", "tiff_lzw.tif", "jpeg.tif", "a.ppm"]
PICTURES += ["a.jp2"] if features.check("jpg_2000") else []
PICTURES += ["a.avif"] if features.check("avif") else []


def make_world(folder: Path) -> None:
    """Write all files; equal for every call."""
    scenes_files.generate(folder / "s", seed=3, train=4, annotated=4, evaluation=2, size=48)
    (folder / "bert.json").write_text(json.dumps(BERT))
    sizes = {**SIZES, "bert_config": str(folder / "bert.json"), "image_root": str(folder / "s/images")}
    train = {**sizes, "train_file": [str(folder / "s/train_phrases.json")], "batch_size": 2, "queue_size": 8}
    configs: dict[str, dict[str, Any]] = {"train": train | {"mask_size": 48, "amc": {"layer": 1}}}
    for name in ("refcoco", "refclef", "flickr"):
        configs[name] = {**sizes, "block_num": 1, **data_keys(name, folder / "s")}
    own = [str(folder / f"s/own.{end}") for end in ("json", "jsonl")]
    configs["own"] = {**sizes, "benchmark": "own", "test_file": own}
    files = {key: str(folder / f"vg/{of}.json") for key, of in VG_KEYS.items()}
    more = {"image_ids_file": [str(folder / "vg/test.txt")], "image_root": str(folder / "vg")}
    configs["regions"] = {**sizes, "benchmark": "vg", **files, **more}
    relations = {"train_file": train["train_file"], "relation_file": [str(folder / "s/train_relations.json")]}
    configs["relations"] = configs["train"] | relations
    configs["segmentations"] = configs["train"] | {"train_file": [str(folder / "s/segmentations.json")]}
    masks = {"refcoco_data": str(folder / "s/masks/refer"), "metrics": ["mask_iou", "mask_point", "recall_5"]}
    configs["masks"] = configs["refcoco"] | masks
    configs["blip"] = configs["refcoco"] | {"model": "blip", "bert_config": str(folder / "blip/config.json")}
    for name, values in configs.items():
        (folder / f"{name}.yaml").write_bytes(dump_yaml(values))
    rows = [{"image": "000000.jpg", "phrase": "a star", "box": [1, 2, 3, 4], "category": "star"}]
    rows.append({"image": "000001.jpg", "phrases": ["it", "that"], "boxes": [[9, 9, 9, 9.5]], "split": "val"})
    (folder / "s/own.json").write_text(json.dumps(rows))
    _write_lines(folder / "s/own.jsonl", rows)
    (folder / "s/segmentations.json").write_text(json.dumps(_segmented(folder / "s/masks/train_phrases.json")))
    _write_raw(folder)
    _write_pictures(folder / "images")
    _write_weights(folder)
    (folder / "blip").mkdir()
    (folder / "blip/config.json").write_text(json.dumps(BLIP))
    (folder / "blip/model.safetensors").touch()  # its folder is then one of transformers
    (folder / "json_tokenizer").mkdir()
    load_tokenizer(str(folder / "s/text_encoder")).pieces.save(str(folder / "json_tokenizer/tokenizer.json"))
    losses = [{"epoch": n, "train_loss_mlm": 1.0 / (n + 1), "train_lr": 1e-5, "steps": 20} for n in range(3)]
    _write_lines(folder / "run/log.txt", losses)
    _write_lines(folder / "run/steps.jsonl", [{"epoch": 0, "step": n, "loss_mlm": 1.0 / (n + 1)} for n in range(3)])
    _write_lines(folder / "result/log.txt", [{"val_d": 0.5, "epoch": "00"}])
    ResultFolder(folder / "result").write("00", [asked()], [torch.rand(3, 3)], {"gradcam_mode": "itm"})


def _segmented(file: Path) -> list[dict[str, Any]]:
    """Entries in all forms of a segmentation: COCO's text of run lengths, a list of them, polygons, run lengths."""
    text, parts, outline, counts = json.loads(file.read_text())[:4]
    parts["segmentation"] = [parts["segmentation"]]
    outline["segmentation"] = [[[1, 1, 40, 1, 40, 40.5, 1, 40], [2, 2, 9, 9, 2, 9]], [[0, 0, 9, 0, 9, 9]]]
    height, width = counts["segmentation"][0]["size"]
    counts["segmentation"] = [{"size": [height, width], "counts": [5, 10, height * width - 15], "area": 10, "id": 7}]
    return [text, parts, outline, counts]


def _write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _write_pictures(folder: Path) -> None:
    folder.mkdir()
    picture = Image.effect_noise((40, 30), 60).convert("RGB")
    for name in PICTURES:
        stem, _, suffix = name.partition(".")
        picture.save(folder / name, **({"compression": stem} if suffix == "tif" and stem != "a" else {}))
    Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40) * 50).save(folder / "deep.png")
    picture.convert("F").save(folder / "a.pfm")


def _write_weights(folder: Path) -> None:
    torch.manual_seed(0)
    config = load_config(folder / "train.yaml", PretrainConfig)
    model = PretrainModel(config)
    content = {
        "model": model.state_dict(),
        "optimizer": torch.optim.AdamW([model.temp], lr=1e-4).state_dict(),
        "lr_scheduler": {},
        "config": config.model_dump(mode="json"),
        "epoch": 0,
    }
    torch.save(content, folder / "w.pth")
    torch.save(content, folder / "old.pth", _use_new_zipfile_serialization=False)
    save_file({key: value.clone() for key, value in model.state_dict().items()}, folder / "w.safetensors")


def asked() -> Expression:
    """What the result file of the seeds is about."""
    return Expression(Path("x.jpg"), "x", 0, "val", np.ones((1, 4)), {"image_path": "x.jpg"})


def _write_raw(folder: Path) -> None:
    """Downloads in their owners' forms."""
    boxes, sentences = (
        json.loads((folder / f"s/flickr/{name}_val.json").read_text()) for name in ("bounding_boxes", "sentences")
    )
    write_entities(folder / "entities", boxes, sentences)
    shutil.copy(folder / "s/flickr/val.txt", folder / "entities/val.txt")
    detections = json.loads((folder / "s/refer/refcoco+/dets.json").read_text())
    (folder / "mattnet.json").write_text(json.dumps(mattnet_detections(detections)))
    (folder / "vg").mkdir()
    for name, rows in VG_FILES.items():
        (folder / f"vg/{name}.json").write_text(json.dumps(rows))
    (folder / "vg/test.txt").write_text("7\n")
    (folder / "vg/VG_100K_2").mkdir()
    shutil.copy(folder / "s/images/000000.jpg", folder / "vg/VG_100K_2/7.jpg")


def dump_yaml(value: Any) -> bytes:
    buffer = io.BytesIO()
    YAML(typ="safe", pure=True).dump(value, buffer)
    return buffer.getvalue()
