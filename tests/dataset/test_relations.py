"""SelfEQ's relation files: what entries may hold, how paraphrases are drawn, and what is said of the rest."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import prepare
from config import PretrainConfig, load_config
from dataset.reading import DataError
from dataset.text import Tokenizer, load_tokenizer
from dataset.transforms import resize_bicubic
from dataset.vg import NO_BOXES, NO_SYNONYMS, Collate, TrainingData, load_entries
from models.pretrain import Batch

RELATION = {"group": "Puppy", "synonym": ["Dog!", "little dog"], "hypernym": ["animal"], "exclusion": ["cat"]}
VG = {"image": "0.png", "caption": ["a puppy", "The puppy, left"], "bbox": [[1, 2, 10, 20]], "relation": RELATION}
COCO = {"image": "1.png", "phrase_chunks": "one big Puppy", "relation": RELATION}
WEIGHTS = {"weight_similarity": 1.0}
WORDS = ["a", "big", "dog", "left", "little", "one", "puppy", "right", "the"]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for i in range(3):
        pixels = np.random.default_rng(i).integers(256, size=(30, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    return tmp_path


def configure(images: Path, rows: Any, **keys: Any) -> PretrainConfig:
    """A config whose two lists of files hold the same entries."""
    (images / "r.json").write_text(json.dumps(rows))
    sizes = {"image_res": 48, "mask_size": 24, "augment": {"flip_prob": 0, "grayscale_prob": 0, "jitter_prob": 0}}
    return PretrainConfig.model_validate(
        {"train_file": [str(images / "r.json")], "image_root": str(images), **sizes, **keys}
    )


def relation_epoch(images: Path, rows: Any, **keys: Any) -> TrainingData:
    return TrainingData(configure(images, rows, relation_file=[str(images / "r.json")], **keys).phases()[0].config, 0)


# ---- entries


def test_both_forms_are_read(images: Path) -> None:
    vg, coco, none = load_entries(images / "r.json", configure(images, [VG, COCO, {**VG, "relation": {}}]))
    assert vg.captions == ["a puppy", "the puppy left"]
    assert (coco.captions, coco.boxes) == (["one big puppy"], [])
    assert vg.relation == coco.relation == ["puppy", "dog", "little dog"]
    assert not none.relation


@pytest.mark.parametrize(
    "relation",
    [None, {}, {"group": "x"}, {**RELATION, "synonym": []}, {**RELATION, "synonym": ["?"]}, {**RELATION, "group": "!"}],
)
def test_without_a_synonym_there_is_no_relation(images: Path, relation: Any) -> None:
    (entry,) = load_entries(images / "r.json", configure(images, [{**VG, "relation": relation}]))
    assert not entry.relation


@pytest.mark.parametrize(
    "relation",
    [
        "puppy",
        ["puppy", "dog"],
        {"synonym": ["dog"]},
        {**RELATION, "group": 3},
        {**RELATION, "synonym": "dog"},
        {**RELATION, "synonym": ["dog", None]},
    ],
)
def test_a_malformed_relation_is_named(images: Path, relation: Any) -> None:
    with pytest.raises(
        DataError, match=r"(?s)^key 'relation' must be \{\"group\": .* - 1 found:.*r\.json: entry 1 \(0\.png\)"
    ):
        load_entries(images / "r.json", configure(images, [VG, {**VG, "relation": relation}]))


@pytest.mark.parametrize("bad", [3, [], ["a", 3]])
def test_malformed_chunks_are_named(images: Path, bad: Any) -> None:
    with pytest.raises(DataError, match="key 'phrase_chunks' must be a string or a list of strings"):
        load_entries(images / "r.json", configure(images, [{**COCO, "phrase_chunks": bad}]))


def test_synonyms_that_change_nothing_are_counted(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = RELATION | {"synonym": ["puppy!", "Puppy"]}
    load_entries(images / "r.json", configure(images, [VG, {**VG, "relation": own}, {**VG, "relation": None}]))
    assert re.search(
        r"or is its only synonym; .* - 1 found:\n.*: entry 1 \(0.png\) \('puppy'\)", capsys.readouterr().out
    )


# ---- samples


def drawn(data: TrainingData, index: int = 0, epochs: int = 60) -> set[tuple[str, str | None]]:
    found = set()
    for data.epoch in range(epochs):
        sample = data[index]
        found.add((sample.caption, sample.other))
    return found


def test_without_a_loss_on_maps_paraphrases_are_trained_still(images: Path) -> None:
    weights = {"weight_similarity": 0, "weight_consistency": 0}
    assert drawn(relation_epoch(images, [COCO], selfeq=weights)) == {
        *(("one big dog", "one big puppy"), ("one big little dog", "one big puppy"))
    }


def test_the_relation_epoch_trains_paraphrases(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = {"image": "2.png", "caption": "one big puppy", "bbox": []}
    data = relation_epoch(images, [other, VG, COCO, {**other, "relation": RELATION | {"group": "cat"}}])
    said = capsys.readouterr().out
    assert "3 of 4 entries have synonyms; the others take no part" in said
    assert re.search(r"the relation's group is in no caption.* - 1 found:\n.*: entry 3 \(2.png\) \('cat'\)", said)
    assert len(data) == len(data.broken) == 3
    assert drawn(data) == {
        *(("a dog", "a puppy"), ("a little dog", "a puppy")),
        *(("the dog left", "the puppy left"), ("the little dog left", "the puppy left")),
    }
    assert drawn(data, 1) == {("one big dog", "one big puppy"), ("one big little dog", "one big puppy")}
    assert drawn(data, 2) == {("one big puppy", "one big puppy")}  # a group that does not occur
    sample = data[0]
    expected = resize_bicubic(Image.open(images / "0.png"), 48)
    assert torch.equal(sample.image, torch.from_numpy(expected.copy()).permute(2, 0, 1))
    assert not sample.mask.any()
    assert not sample.has_box


def test_no_image_is_augmented_in_it(images: Path) -> None:
    data = relation_epoch(images, [VG], augment={"flip_prob": 1, "grayscale_prob": 1, "jitter_prob": 1})
    first = data[0].image
    data.epoch = 1
    assert torch.equal(data[0].image, first)


@pytest.mark.parametrize("add_gcam", [True, False])
def test_beside_other_losses_captions_are_trained(images: Path, add_gcam: bool) -> None:
    rows = [VG, {**VG, "relation": None}]
    keys = {"add_gcam": add_gcam, "augment": {"flip_prob": 0.5, "flip_words": "swap", "crop_scale": [1, 1]}}
    plain = TrainingData(configure(images, rows, **keys), 0)
    data = TrainingData(configure(images, rows, **keys, selfeq=WEIGHTS), 0)
    assert len(data) == 2
    assert drawn(data) == {
        (caption, caption.replace("puppy", synonym))
        for caption in ("a puppy", "the puppy left", "the puppy right")
        for synonym in ("dog", "little dog")
    }
    assert {other for _, other in drawn(data, 1)} == {None}
    assert {other for _, other in drawn(plain)} == {None}
    for one, other in ((plain[i], data[i]) for i in (0, 1)):  # all else is drawn as ever
        assert torch.equal(one.image, other.image)
        assert torch.equal(one.mask, other.mask)
        assert (one.caption, one.has_box) == (other.caption, other.has_box)


def test_words_of_a_mirrored_caption_are_mirrored(images: Path) -> None:
    row = {**VG, "caption": "dog on the left", "relation": {"group": "on the left", "synonym": ["at the left side"]}}
    data = TrainingData(configure(images, [row], selfeq=WEIGHTS, augment={"flip_prob": 1, "flip_words": "swap"}), 0)
    assert drawn(data) == {("dog on the right", "dog at the right side")}


@pytest.mark.parametrize(
    ("replace", "paraphrase"), [("text", "kitten kittentle a kitten"), ("word", "kitten cattle a kitten")]
)
def test_longer_words(images: Path, replace: str, paraphrase: str) -> None:
    row = {**VG, "caption": "cat cattle a cat", "relation": {"group": "cat", "synonym": ["kitten"]}}
    data = TrainingData(configure(images, [row], selfeq={**WEIGHTS, "replace": replace}), 0)
    assert drawn(data, epochs=2) == {("cat cattle a cat", paraphrase)}


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]) + "\n")
    return load_tokenizer(str(tmp_path))


def test_collate(images: Path, tokenizer: Tokenizer) -> None:
    rows = [
        {**VG, "caption": "a puppy", "relation": {"group": "a puppy", "synonym": ["the little dog"]}},
        {**VG, "relation": None},
    ]
    data = TrainingData(configure(images, rows, selfeq=WEIGHTS, mlm_probability=1), 0)
    samples = [data[0], data[1]._replace(caption="one")]
    batch = Batch(*Collate(tokenizer, data.config)(samples))
    assert batch.other_ids is not None
    assert batch.other_mask is not None
    assert batch.has_other is not None
    ids = {word: 5 + WORDS.index(word) for word in WORDS}
    assert batch.input_ids.tolist() == [[2, ids["a"], ids["puppy"]], [2, ids["one"], 0]]
    assert batch.other_ids.tolist() == [[2, ids["the"], ids["little"], ids["dog"]], [2, ids["one"], 0, 0]]
    assert batch.other_mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch.has_other.tolist() == [True, False]
    assert batch.mlm_labels.tolist() == [[-100, ids["a"], ids["puppy"]], [-100, ids["one"], -100]]


# ---- files and configs


@pytest.mark.parametrize("keys", [{"relation_file": True}, {"selfeq": WEIGHTS}])
def test_no_synonyms_at_all(images: Path, keys: dict[str, Any]) -> None:
    keys = {key: [str(images / "r.json")] if value is True else value for key, value in keys.items()}
    config = configure(images, [{**VG, "relation": None, "relations": RELATION}], **keys)
    with pytest.raises(DataError, match=r"r\.json: no entry has a relation with synonyms"):
        TrainingData(config.phases()[0].config, 0)


def test_large_files_are_packed_with_their_relations(images: Path) -> None:
    config = configure(images, [VG, {**VG, "relation": None}], selfeq=WEIGHTS)
    data = TrainingData(config, 0, cache_dir=str(images))
    assert [list(entry.relation) for entry in data.entries] == [["puppy", "dog", "little dog"], []]
    assert list(images.glob("*.packed"))
    assert data[0].other is not None


def test_check_reads_relation_files(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (images / "train.json").write_text(json.dumps([{"image": "0.png", "caption": "a dog"}]))
    config = {"relation_file": [f"{images}/r.json"], "train_file": [f"{images}/train.json"], "image_root": str(images)}
    (images / "c.yaml").write_text(json.dumps(config))

    def check(rows: Any) -> str:
        (images / "r.json").write_text(json.dumps(rows))
        prepare.main(prepare.parse_args(["check", str(images / "c.yaml")]))
        return capsys.readouterr().out

    out = check([VG, COCO, {**VG, "caption": "x", "relation": None}])
    assert f"{images}/r.json: 1 of 3 entries have no synonyms, and take no part" in out
    assert re.search(r"r\.json +training entries +3 ", out)
    assert NO_BOXES not in out  # neither phase needs any
    for rows, message in (
        ([VG, {**COCO, "relation": "puppy"}], "key 'relation' must be"),
        ([COCO | {"relation": {}}], NO_SYNONYMS),
        ([COCO | {"image": 3}], "1 error and"),  # and none about synonyms
    ):
        with pytest.raises(SystemExit):
            check(rows)
        assert message in capsys.readouterr().out


RELEASED = """
relation_file: ['vg_relation.json']
train_file: ['vg.json']
image_root: 'vg/'
bert_config: 'configs/config_bert.json'
image_res: 256
vision_width: 768
embed_dim: 256
batch_size: 56
temp: 0.07
mlm_probability: 0.15
queue_size: 65536
momentum: 0.995
alpha: 0.4
phrase_input: True
max_words: 50
add_gcam: True
mask_all: False
mask_size: 256
optimizer: {opt: adamW, lr: 1e-5, weight_decay: 0.02}
schedular: {sched: cosine, lr: 1e-5, epochs: 30, min_lr: 1e-6, decay_rate: 1, warmup_lr: 1e-6, warmup_epochs: 10, cooldown_epochs: 0}
relation_optimizer: {opt: adamW, lr: 2e-5, weight_decay: 0.02}
relation_schedular: {sched: cosine, lr: 1e-5, epochs: 1, min_lr: 1e-6, decay_rate: 1, warmup_lr: 1e-6, warmup_epochs: 20, cooldown_epochs: 0}
"""  # noqa: E501


def test_a_released_config_has_two_phases(tmp_path: Path) -> None:
    (tmp_path / "Pretrain_vg.yaml").write_text(RELEASED)
    config = load_config(tmp_path / "Pretrain_vg.yaml", PretrainConfig, ["schedular.warmup_lr=3e-6"])
    assert (config.selfeq.weight_similarity, config.selfeq.weight_consistency) == (1, 0.5)
    assert [phase[1:] for phase in config.phases()] == [(range(1), "relation", True), (range(1, 30), "", False)]
    first, later = (phase.config for phase in config.phases())
    assert first.train_file == ["vg_relation.json"]
    assert (first.optimizer.lr, first.schedular.warmup_lr, first.schedular.epochs) == (2e-5, 1e-6, 1)
    assert (first.augment.kind, first.add_gcam, first.paraphrases) == ("none", False, True)
    assert later.train_file == ["vg.json"]
    assert (later.optimizer.lr, later.schedular.warmup_lr, later.schedular.epochs) == (1e-5, 3e-6, 30)
    assert (later.augment.kind, later.add_gcam, later.paraphrases, later.relation_file) == ("amc", False, False, [])
    own = load_config(tmp_path / "Pretrain_vg.yaml", PretrainConfig, ["selfeq.weight_similarity=2", "relation_file=[]"])
    assert (own.selfeq.weight_similarity, own.selfeq.weight_consistency) == (2, 0)
    assert own.phases() == [(own, range(30), "", False)]


def test_boxes_follow_no_other_augmentation(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="kind must be amc where add_gcam is True"):
        configure(tmp_path, [], augment={"kind": "albef"})
    assert configure(tmp_path, [], augment={"kind": "albef"}, add_gcam=False).augment.kind == "albef"
