"""Training data: how samples, masks and batches are drawn; images that are not there. Its files: test_vg_entries.py."""

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from config import PretrainConfig
from dataset.reading import DataError
from dataset.text import Tokenizer, load_tokenizer
from dataset.transforms import normalise
from dataset.vg import NO_BOXES, Collate, Sample, TrainingData, clip_box, load_entries, mask_tokens
from models.pretrain import Batch, PretrainModel
from tests.small_model import BERT, SIZES

WIDTH, HEIGHT = 40, 30  # of every image here
PLAIN = {"flip_prob": 0, "grayscale_prob": 0, "jitter_prob": 0, "randaugment": False, "crop_scale": (1, 1)}
GOOD = {"image": "0.png", "caption": "a dog", "bbox": [[1, 2, 10, 20]]}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six images of noise, 0.png to 5.png. Do not write into it."""
    folder = tmp_path_factory.mktemp("images")
    for i in range(6):
        pixels = np.random.default_rng(i).integers(256, size=(HEIGHT, WIDTH, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


@pytest.fixture
def own(images: Path, tmp_path: Path) -> Path:
    """A copy of the images to write into."""
    return Path(shutil.copytree(images, tmp_path / "own"))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("text_encoder")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "big", "brown", "cat", "dog", "left", "right"]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    return load_tokenizer(str(folder))


def configure(images: Path, file: Path, rows: Any, **options: Any) -> PretrainConfig:
    """Write a training file; a config that reads it and changes no pixel but by resizing, unless told to."""
    file.write_text(json.dumps(rows))
    options = {"image_res": 48, "mask_size": 24, "augment": PLAIN, **options}
    return PretrainConfig(train_file=[str(file)], image_root=str(images), **options)


def open_data(images: Path, file: Path, rows: Any, seed: int = 0, **options: Any) -> TrainingData:
    return TrainingData(configure(images, file, rows, **options), seed)


def equal(one: Sample, other: Sample) -> bool:
    same_draws = one.rng.random() == other.rng.random()
    images_and_masks = torch.equal(one.image, other.image) and torch.equal(one.mask, other.mask)
    return images_and_masks and one.caption == other.caption and one.has_box == other.has_box and same_draws


# ---- the data of a config


@pytest.mark.parametrize("add_gcam", [True, False])
def test_amc_without_any_box_is_warned_of(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], add_gcam: bool
) -> None:
    rows = [{"image": "0.png", "caption": "a dog", "regions": [[1, 2, 3, 4]]}, {**GOOD, "bbox": []}]
    open_data(images, tmp_path / "train.json", rows, add_gcam=add_gcam)
    assert capsys.readouterr().out == (f"warning: {NO_BOXES}\n" if add_gcam else "")


def test_entries_of_all_files(images: Path, tmp_path: Path) -> None:
    config = configure(images, tmp_path / "one.json", [GOOD, {**GOOD, "caption": ["A  Dog!", "the brown-dog\n"]}])
    config = config.model_copy(update={"max_words": 2})
    configure(images, tmp_path / "two.json", [{"image": "5.png", "caption": "cat"}])  # no boxes is no bbox, too
    first, second = load_entries(tmp_path / "one.json", config)
    assert first[:4] == (images / "0.png", ["a dog"], [[1, 2, 10, 20]], f"{tmp_path / 'one.json'}: entry 0 (0.png)")
    assert second.captions == ["a dog", "the brown"]
    both = config.model_copy(update={"train_file": [str(tmp_path / "one.json"), str(tmp_path / "two.json")]})
    data = TrainingData(both, seed=0)
    assert [entry.image.name for entry in data.entries] == ["0.png", "0.png", "5.png"]
    assert data.entries[2].boxes == []
    assert not data[2].has_box


# ---- images that are not there


def test_missing_images_are_named_before_training(images: Path, tmp_path: Path) -> None:
    rows = [GOOD, {**GOOD, "image": "8.png"}, {**GOOD, "image": "9.png"}, {**GOOD, "image": "8.png"}]
    first = r"2 of 3 training images are missing, the first at .*train\.json: entry 1 \(8\.png\): check image_root"
    with pytest.raises(DataError, match=first):
        open_data(images, tmp_path / "train.json", rows)


def cut_jpeg(folder: Path) -> str:
    """The name of a JPEG of noise whose second half is lost."""
    Image.fromarray(np.random.default_rng(0).integers(256, size=(64, 64, 3), dtype=np.uint8)).save(folder / "cut.jpg")
    (folder / "cut.jpg").write_bytes((folder / "cut.jpg").read_bytes()[: (folder / "cut.jpg").stat().st_size // 2])
    return "cut.jpg"


def test_a_truncated_image_is_named(own: Path, tmp_path: Path) -> None:
    cut = cut_jpeg(own)
    data = open_data(own, tmp_path / "train.json", [GOOD, {**GOOD, "image": cut}])
    assert data[0].has_box
    with pytest.raises(DataError, match="cannot be decoded") as refused:
        data[1]
    assert f"{tmp_path / 'train.json'}: entry 1 ({cut})" in str(refused.value)
    assert not data.broken.any()


def test_broken_images_are_replaced_and_counted(own: Path, tmp_path: Path) -> None:
    rows = [{**GOOD, "image": cut_jpeg(own)}, {**GOOD, "image": "absent.png"}, *[GOOD] * 3]
    config = configure(own, tmp_path / "train.json", rows)
    data = TrainingData(config, seed=1, skip_broken=True)
    assert data[3].has_box
    assert not data.broken.any()
    for index in (0, 1, 0):
        assert torch.equal(data[index].image, data[3].image)
        assert equal(data[index], TrainingData(config, seed=1, skip_broken=True)[index])
    assert data.broken.tolist() == [True, True, False, False, False]  # each image counts once


def test_missing_images_are_told_and_counted(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [GOOD, {**GOOD, "image": "8.png"}, {**GOOD, "image": "x" * 300}, GOOD]
    data = TrainingData(configure(images, tmp_path / "train.json", rows), seed=0, skip_broken=True)
    assert "2 of 3 training images are missing, the first at" in capsys.readouterr().out
    assert data.replaced() == []
    assert data[1].has_box
    assert data[2].has_box
    assert data.replaced() == [f"{tmp_path / 'train.json'}: entry {i} ({rows[i]['image']})" for i in (1, 2)]
    monkeypatch.setattr("dataset.vg.gather_objects", lambda own: [own, [0, 1]])  # of another process
    assert data.broken_anywhere() == [0, 1, 2]
    assert len(data.replaced()) == 3


def test_nothing_but_broken_images(images: Path, tmp_path: Path) -> None:
    config = configure(images, tmp_path / "train.json", [{**GOOD, "image": f"absent{i}.png"} for i in range(3)])
    with pytest.raises(DataError, match="none of the 3 training images can be read"):
        TrainingData(config, seed=0, skip_broken=True)[0]


# ---- boxes


@pytest.mark.parametrize(
    ("box", "clipped"),
    [
        ([1, 2, 5, 6], (1, 2, 5, 6)),
        ([1.9, 2.2, 5.7, 6.99], (1, 2, 5, 6)),
        ([-3.5, -2, 100, 12.5], (0, 0, 40, 12)),
        ([35, 25, 41, 31], (35, 25, 40, 30)),
        ([0, 0, 40, 30], (0, 0, 40, 30)),
        ([41, 3, 50, 9], None),
        ([-9, 3, -2, 9], None),
        ([3, 30, 9, 35], None),
        ([5, 2, 1, 6], None),  # reversed
        ([1, 6, 5, 2], None),
        ([1.2, 2, 1.9, 6], None),  # empty once truncated
        ([3, 4, 3, 9], None),
    ],
)
def test_clip_box(box: list[float], clipped: tuple[int, ...] | None) -> None:
    assert clip_box(box, HEIGHT, WIDTH) == clipped


def boxes_drawn(data: TrainingData, epochs: int) -> Counter[tuple[int, ...]]:
    """How often each box came up in a mask of the image's own size: (x1, y1, x2, y2) on the mask of 40 x 40."""
    drawn: Counter[tuple[int, ...]] = Counter()
    for data.epoch in range(epochs):
        mask = data[0].mask.numpy()
        rows, columns = mask.any(axis=1).nonzero()[0], mask.any(axis=0).nonzero()[0]
        x1, y1, x2, y2 = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
        assert mask[y1:y2, x1:x2].all()
        drawn[int(x1), int(y1), int(x2), int(y2)] += 1
    return drawn


def square(folder: Path) -> str:
    """The name of a new image of 40 x 40, on which a mask of 40 x 40 is not resized."""
    Image.open(folder / "0.png").resize((40, 40)).save(folder / "square.png")
    return "square.png"


@pytest.mark.parametrize(
    ("boxes", "drawn"),
    [
        ([[1, 2, 10, 20], [5.5, 5.5, 39.5, 39.9], [30, -5, 99, 7]], {(1, 2, 10, 20), (5, 5, 39, 39), (30, 0, 40, 7)}),
        # Empty boxes are drawn again.
        ([[50, 50, 60, 60], [1, 2, 10, 20], [9, 9, 3, 3], [20, 20, 30, 40]], {(1, 2, 10, 20), (20, 20, 30, 40)}),
    ],
)
def test_one_box_is_drawn(boxes: list[list[float]], drawn: set[Any], own: Path, tmp_path: Path) -> None:
    row = {**GOOD, "image": square(own), "bbox": boxes}
    counts = boxes_drawn(open_data(own, tmp_path / "train.json", [row], mask_size=40), epochs=90)
    assert counts.keys() == drawn
    assert min(counts.values()) > 15


@pytest.mark.parametrize(("empty_box", "has_box"), [("zero_mask", True), ("no_box", False)])
def test_an_entry_with_an_empty_box_only(images: Path, tmp_path: Path, empty_box: str, has_box: bool) -> None:
    row = {**GOOD, "bbox": [[50, 50, 60, 60]]}
    data = open_data(images, tmp_path / "train.json", [row], amc={"empty_box": empty_box})
    with pytest.warns(UserWarning, match=r"entry 0 \(0\.png\): no box covers a pixel of the 40x30 image"):
        sample = data[0]
    assert sample.has_box is has_box
    assert not sample.mask.any()


@pytest.mark.parametrize("phrase_input", [True, False])
def test_mask_all_is_the_union(own: Path, tmp_path: Path, phrase_input: bool) -> None:
    boxes = [[1, 2, 10, 20], [5, 5, 30, 12], [50, 50, 60, 60]]
    row = {**GOOD, "image": square(own), "bbox": boxes}
    options = {"mask_all": True, "phrase_input": phrase_input, "mask_size": 40}
    sample = open_data(own, tmp_path / "train.json", [row], **options)[0]
    union = torch.zeros(40, 40, dtype=torch.uint8)
    union[2:20, 1:10] = 1
    union[5:12, 5:30] = 1
    assert torch.equal(sample.mask, union)
    assert sample.has_box


# ---- samples


@pytest.mark.parametrize(
    ("options", "has_box"), [({}, True), ({"add_gcam": False}, False), ({"phrase_input": False}, False)]
)
def test_a_sample(options: dict[str, Any], has_box: bool, images: Path, tmp_path: Path) -> None:
    sample = open_data(images, tmp_path / "train.json", [GOOD], **options)[0]
    assert sample.image.shape == (3, 48, 48)
    assert sample.image.dtype == sample.mask.dtype == torch.uint8
    assert sample.mask.shape == (24, 24)
    assert sample.has_box is has_box
    assert sample.mask.unique().tolist() == ([0, 1] if has_box else [0])


def test_the_mask_lies_where_the_box_is(own: Path, tmp_path: Path) -> None:
    """The box is made red, and after flip and resize the red pixels and the mask still agree."""
    pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    pixels[5:25, 10:16] = (255, 0, 0)
    Image.fromarray(pixels).save(own / "red.png")
    row = {**GOOD, "image": "red.png", "bbox": [[10, 5, 16, 25]]}
    flipping = {**PLAIN, "flip_prob": 0.5}
    data = open_data(own, tmp_path / "train.json", [row], augment=flipping, image_res=96, mask_size=96)
    sides = Counter()
    for data.epoch in range(20):
        sample = data[0]
        red = sample.image[0] > 126
        assert (red != sample.mask.bool()).float().mean() < 0.02
        sides[bool(sample.mask[:, :48].any())] += 1
    assert min(sides[True], sides[False]) > 3


def test_a_caption_is_drawn(images: Path, tmp_path: Path) -> None:
    for add_gcam in (True, False):
        row = {**GOOD, "caption": ["a dog", "brown dog", "the dog"]}
        data = open_data(images, tmp_path / "train.json", [row], add_gcam=add_gcam)
        drawn: Counter[str] = Counter()
        for data.epoch in range(60):
            drawn[data[0].caption] += 1
        assert drawn.keys() == {"a dog", "brown dog", "the dog"}
        assert min(drawn.values()) > 8


@pytest.mark.parametrize("add_gcam", [True, False])
def test_samples_depend_on_seed_epoch_and_index_alone(images: Path, tmp_path: Path, add_gcam: bool) -> None:
    options = {"add_gcam": add_gcam, "augment": {}}
    rows = [{**GOOD, "image": f"{i}.png", "caption": ["a dog", "a cat", "left dog"]} for i in range(6)]
    data = open_data(images, tmp_path / "train.json", rows, seed=3, **options)
    again = open_data(images, tmp_path / "train.json", rows, seed=3, **options)
    data.epoch = again.epoch = 2
    in_order = [data[i] for i in range(6)]
    backwards = [again[i] for i in reversed(range(6))]
    assert all(equal(one, other) for one, other in zip(in_order, reversed(backwards), strict=True))
    np.random.seed(7)  # noqa: NPY002 - the global generators do not matter
    torch.manual_seed(7)
    assert equal(again[4], data[4])
    again.epoch = 1
    assert not equal(again[4], data[4])
    other_seed = open_data(images, tmp_path / "train.json", rows, seed=4, **options)
    other_seed.epoch = 2
    assert not equal(other_seed[4], data[4])
    same_entry = open_data(images, tmp_path / "train.json", [rows[0]] * 2, seed=3, **options)
    assert not equal(same_entry[0], same_entry[1])


# ---- batches


def test_mask_tokens(tokenizer: Tokenizer) -> None:
    rng = np.random.default_rng(0)
    ids = rng.integers(5, 12, size=400_000)  # words alone
    ids[::10], ids[1::10] = tokenizer.cls_id, tokenizer.pad_id
    masked = mask_tokens(ids, tokenizer, 0.15, rng)
    special = (ids == tokenizer.cls_id) | (ids == tokenizer.pad_id)
    target = masked.labels != -100
    assert not target[special].any()
    assert (masked.ids[~target] == ids[~target]).all()
    assert (masked.labels[target] == ids[target]).all()
    assert target[~special].mean() == pytest.approx(0.15, abs=0.003)
    # A random id is [MASK], or the word itself, once in the 12 words of the vocabulary.
    new, old = masked.ids[target], ids[target]
    assert (new == tokenizer.mask_id).mean() == pytest.approx(0.8 + 0.1 / 12, abs=0.008)
    assert (new == old).mean() == pytest.approx(0.1 + 0.1 / 12, abs=0.006)
    others = new[(new != tokenizer.mask_id) & (new != old)]
    assert len(others) / len(new) == pytest.approx(0.1 * 10 / 12, abs=0.006)
    assert set(others.tolist()) == set(range(12)) - {tokenizer.mask_id}


@pytest.mark.parametrize("probability", [0, 1])
def test_mask_tokens_at_the_ends(tokenizer: Tokenizer, probability: float) -> None:
    ids = np.full(100, 7)
    masked = mask_tokens(ids, tokenizer, probability, np.random.default_rng(0))
    assert (masked.labels != -100).mean() == probability
    assert (masked.ids != ids).any() == bool(probability)


@pytest.mark.parametrize("axis", ["sequence", "vocabulary"])
@pytest.mark.parametrize("captions", [["?", ".", "\u200b"], ["?", "a big dog", "\u200b"]], ids=["all", "some"])
def test_a_step_on_cls_alone(
    images: Path, tmp_path: Path, tokenizer: Tokenizer, captions: list[str], axis: str
) -> None:
    (tmp_path / "bert.json").write_text(json.dumps({**BERT, "vocab_size": tokenizer.vocab_size}))
    options = {**SIZES, "bert_config": str(tmp_path / "bert.json"), "queue_size": 8, "amc": {"layer": 1}}
    rows = [{**GOOD, "caption": caption} for caption in captions]
    data = open_data(images, tmp_path / "train.json", rows, **options, mlm_distill_axis=axis, mlm_probability=1)
    batch = Batch(*Collate(tokenizer, data.config)([data[i] for i in range(3)]))
    assert batch.input_ids[0].tolist() == [tokenizer.cls_id, *[tokenizer.pad_id] * (batch.input_ids.shape[1] - 1)]
    model = PretrainModel(data.config)
    losses = model(batch.to(torch.device("cpu")), alpha=0.4)
    assert all(bool(loss.isfinite()) for loss in losses.values())
    assert (losses["loss_mlm"].item() == 0) == (batch.mlm_labels.max() == -100) == (len(batch.input_ids[0]) == 1)
    sum(losses.values()).backward()  # type: ignore[union-attr]
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)


def test_collate(images: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [
        GOOD,
        {"image": "1.png", "caption": "a big brown dog left", "bbox": []},
        {"image": "2.png", "caption": "cat " * 30, "bbox": [[0, 0, 40, 30]]},
    ]
    data = open_data(images, tmp_path / "train.json", rows, max_tokens=8, mlm_probability=0.5)
    samples = [data[i] for i in range(3)]
    travels = Batch(*Collate(tokenizer, data.config)(samples))
    assert travels.image.dtype == travels.box_mask.dtype == torch.uint8
    batch = travels.to(torch.device("cpu"))
    assert batch.image.shape == (3, 3, 48, 48)
    assert batch.box_mask.shape == (3, 24, 24)
    assert batch.image.dtype == batch.box_mask.dtype == torch.float32
    assert batch.has_box.dtype == torch.bool
    assert batch.has_box.tolist() == [True, False, True]
    for tensor in (batch.input_ids, batch.attention_mask, batch.mlm_input_ids, batch.mlm_labels):
        assert tensor.shape == (3, 8)
        assert tensor.dtype == torch.int64
    assert batch.input_ids.tolist() == [[2, 5, 9, 0, 0, 0, 0, 0], [2, 5, 6, 7, 9, 10, 0, 0], [2, *[8] * 7]]
    assert torch.equal(batch.attention_mask, (batch.input_ids != 0).long())
    target = batch.mlm_labels != -100
    assert 0 < target.sum() < batch.attention_mask.sum()
    assert torch.equal(batch.mlm_labels[target], batch.input_ids[target])
    assert torch.equal(batch.mlm_input_ids[~target], batch.input_ids[~target])
    for index, sample in enumerate(samples):
        assert torch.equal(batch.image[index], normalise(sample.image.permute(1, 2, 0).numpy()))
        assert torch.equal(batch.box_mask[index], sample.mask.float())
    assert samples[0].mask.any()
    assert all(torch.equal(one, other) for one, other in zip(batch[:8], batch.to(torch.device("cpu"))[:8], strict=True))
    assert batch[8:] == (None, None, None)
