"""Matching: the accuracy of the match head on balanced pairs of image and text, and pairs that cannot be read."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from config import GroundingConfig, load_config
from dataset.own import load_pairs
from dataset.reading import DataError, read_image
from dataset.text import load_tokenizer
from dataset.transforms import normalise, resize_bilinear_image
from grounding import questions
from grounding.batches import answer_pairs
from grounding.benchmarks import REFCLEF
from models.albef import build_albef
from tests.grounding import test_evaluate as base
from tests.grounding.test_evaluate import ONE, evaluate, log, results

place = base.place
pytestmark = pytest.mark.usefixtures("one_thread")


def test_matching_accuracy(place: Path, tmp_path: Path) -> None:
    file = place / "data" / "matching_val.json"
    evaluate(REFCLEF, place, tmp_path, "--set", f"matching_file=[{file}]", checkpoint=ONE)
    line = log(tmp_path)[1]
    kinds = {"matching_val_caption", "matching_val_phrase"}
    assert line.keys() == {"matching_val", *kinds, "epoch"}

    config = load_config(place / "refclef.yaml", GroundingConfig)
    model = build_albef(config)
    model.load_state_dict(torch.load(place / ONE, weights_only=True)["model"])
    model.eval()
    tokenizer = load_tokenizer(str(place / "data" / "text_encoder"))
    right: dict[str, list[bool]] = {"caption": [], "phrase": []}
    for row in json.loads(file.read_text()):
        image = read_image(place / "data" / "images" / row["image"], "")
        tokens = model.visual_encoder(normalise(resize_bilinear_image(image, 48))[None])
        ids, mask = tokenizer([row["text"].replace(",", "")])
        text = model.text_encoder(ids, mask)
        fused = model.text_encoder.fuse(text, mask, model.text_encoder.image_keys_values(tokens))
        no, yes = model.match_logits(fused.tokens)[0].tolist()
        right[row["kind"]].append((yes > no) == bool(row["match"]))
    for kind, correct in right.items():
        assert line[f"matching_val_{kind}"] == pytest.approx(np.mean(correct), abs=0.03)  # near-ties may turn
    assert line["matching_val"] == pytest.approx(np.mean(right["phrase"] + right["caption"]), abs=0.03)


@pytest.mark.parametrize(
    ("of_true", "of_false", "accuracy"), [(0.6, 0.4, 1.0), (0.4, 0.3, 0.5), (0.7, 0.6, 0.5), (0.3, 0.7, 0.0)]
)
def test_matching_is_decided_at_one_half(
    of_true: float, of_false: float, accuracy: float, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given probabilities of true and of false pairs."""
    file = place / "data" / "matching_val.json"
    matches = [row["match"] for row in json.loads(file.read_text())]

    def answer(function: Any, asked: Any, batches: Any) -> Any:
        if function.__name__ == "maps":
            return answer_pairs(function, asked, batches)
        return ((i, torch.tensor(of_true if match else of_false)) for i, match in enumerate(matches))

    monkeypatch.setattr(questions, "answer_pairs", answer)
    evaluate(REFCLEF, place, tmp_path, "--set", f"matching_file=[{file}]", checkpoint=ONE)
    assert log(tmp_path)[1]["matching_val"] == accuracy


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"image": "a.jpg", "text": "cat", "match": 2}], r"must be 0 or 1.*\n.*pairs\.json: entry 0 \(found 2"),
        ([{"image": "a.jpg", "text": "cat"}], r"key 'match' is missing"),
        ([{"image": "a.jpg", "text": "\ud800", "match": 1}], r"key 'text' holds half of a surrogate pair"),
        ([{"image": "a.jpg", "text": "a", "match": 1, "kind": "\ud800"}], r"key 'kind' holds half of a surrogate pair"),
        ([{"image": "x" * 300, "text": "a", "match": 1}], r"does not exist; check image_root"),
        ([{"image": "b.jpg", "text": "cat", "match": 1}], r"does not exist; check image_root"),
        ([], r"holds no entries"),
    ],
)
def test_broken_pairs(rows: list[Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "pairs.json").write_text(json.dumps(rows))
    (tmp_path / "a.jpg").touch()
    with pytest.raises(DataError, match=message):
        load_pairs(str(tmp_path / "pairs.json"), str(tmp_path))


@pytest.mark.parametrize("mode", ["itm", "itc"])
def test_texts_without_content_are_evaluated_as_cls_alone(mode: str, place: Path, tmp_path: Path) -> None:
    test, pairs = tmp_path / "test.json", tmp_path / "pairs.json"
    rows = json.loads((place / "data" / "refer" / "refclef" / "refclef_val.json").read_text())
    rows[0]["text"], rows[1]["text"] = "?!", "\u200b"
    test.write_text(json.dumps(rows))
    pairs.write_text(json.dumps([{"image": rows[0]["image"], "text": ".", "match": 1}]))
    words = ["--set", f"test_file=[{test}]", "--set", f"matching_file=[{pairs}]", "--gradcam_mode", mode]
    evaluate(REFCLEF, place, tmp_path / "out", *words, "--block_num", "1", "--report", checkpoint=ONE)
    found = results(tmp_path / "out")
    assert len(found) == len(rows)
    for record, row in zip(found, rows, strict=True):
        assert record["image_path"] == row["image"]
        assert record["pred"].shape == (3, 3)
        assert bool(record["pred"].isfinite().all())
    assert log(tmp_path / "out")[1]["pairs"] in (0.0, 1.0)
