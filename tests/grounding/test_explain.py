"""ground(): the evaluation's maps and points, boxes from the map, words, on a tiny model and on maps done by hand."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from numpy.random import default_rng
from PIL import Image

from config import GroundingConfig
from dataset.scenes import files as scenes_files
from dataset.text import load_tokenizer
from dataset.transforms import normalise, resize_bicubic, resize_bilinear_image
from grounding import maps
from grounding.explain import MAX_PAIRS, Explainer, PhraseError, encode, ground, ground_all, word_maps
from grounding.maps import THRESHOLD, map_boxes
from models.albef import build_albef
from models.checkpoint import CheckpointError
from tests.small_model import BERT, SIZES

SHORT_BERT = {**BERT, "max_position_embeddings": 20}
QKV = "visual_encoder.blocks.0.attn.qkv.weight"
PHRASES = ["the red dog", "circle", "a small star above the big blue square", "circle"]
PHOTO = Image.fromarray(default_rng(3).integers(0, 256, (40, 70, 3), np.uint8))
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def explainer(tmp_path_factory: pytest.TempPathFactory) -> Explainer:
    folder = tmp_path_factory.mktemp("ground")
    (folder / "vocab.txt").write_text("\n".join(scenes_files.vocabulary()))
    (folder / "bert.json").write_text(json.dumps(SHORT_BERT))
    config = GroundingConfig.model_validate({**SIZES, "bert_config": str(folder / "bert.json"), "image_root": ""})
    model = build_albef(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if name != "temp":  # far from uniform attention, in which too much would look right
            parameter.normal_(std=0.4, generator=generator)
            if name.lower().endswith(("norm.weight", "norm1.weight", "norm2.weight")):
                parameter.add_(1)
    return Explainer(model, load_tokenizer(str(folder)), torch.device("cpu"), "itm", 1)


def alike(small: np.ndarray, cam: torch.Tensor) -> None:
    """Equal up to a positive factor."""
    scaled = torch.from_numpy(small) / float(small.max())
    torch.testing.assert_close(scaled, cam / cam.max(), rtol=1e-4, atol=1e-5)


# ---- the whole call


@pytest.mark.parametrize(("mode", "block"), [("itm", 1), ("itm", 2), ("itc", 0), ("itc", 1)])
@pytest.mark.parametrize("resize", [resize_bicubic, resize_bilinear_image])
def test_maps_points_and_matches_are_the_evaluations(
    mode: str, block: int, resize: object, explainer: Explainer
) -> None:
    asked = explainer._replace(mode=mode, block=block)
    pixels, index = normalise(resize(PHOTO, 48))[None], [0] * len(PHRASES)  # type: ignore[operator]
    cams, matches = asked.maps(pixels, index, PHRASES), asked.match_probabilities(pixels, index, PHRASES)
    image = PHOTO if resize is resize_bicubic else encode(explainer, PHOTO, resize)  # type: ignore[arg-type]
    found = ground_all(asked, image, PHRASES)
    for one, cam, match, phrase in zip(found, cams, matches, PHRASES, strict=True):
        alike(one.small, cam)
        resized = maps.ResizedMap(cam, 40, 70)
        assert one.point == resized.point()
        torch.testing.assert_close(torch.from_numpy(one.map), (resized.pixels / resized.pixels.max()).clamp(0))
        assert one.match == pytest.approx(float(match), abs=1e-5)
        assert (one.phrase, one.text) == (phrase, phrase)
        assert one.small.shape == (3, 3)
        assert one.map.shape == (40, 70)
        assert one.map.dtype == one.small.dtype == np.float32
        assert (one.map.min() >= 0, one.map.max()) == (True, 1)
        assert one.boxes == map_boxes(maps.ResizedMap(torch.from_numpy(one.small), 40, 70), one.map, THRESHOLD)
        assert bool(one.words) == (mode == "itm")
    assert len({one.match for one in found}) == 3
    assert np.abs(found[0].map - found[2].map).max() > 1e-3  # phrases matter, far above what `alike` lets pass


@pytest.mark.parametrize(
    ("mode", "key", "value", "message"),
    [
        ("itm", "itm_head.weight", math.nan, "the map holds .* in x.pth, itm_head.weight holds NaN"),
        ("itm", "itm_head.bias", math.nan, "the match probability holds .* in x.pth, itm_head.bias holds NaN"),
        ("itm", QKV, math.inf, f"the map holds .* in x.pth, {QKV} holds NaN or infinity"),
        ("itm", QKV, 1e38, rf"the map holds .* of x.pth are finite, but so large .*of {QKV}, is 1e\+38"),
        ("itc", "text_proj.weight", math.nan, "the map holds .* in x.pth, text_proj.weight holds NaN"),
        ("itc", "itm_head.bias", math.nan, "the match probability holds .* in x.pth, itm_head.bias holds NaN"),
    ],
)
def test_answers_that_are_not_numbers(mode: str, key: str, value: float, message: str, explainer: Explainer) -> None:
    model = copy.deepcopy(explainer.model)
    model.get_parameter(key).fill_(value)
    spoiled = explainer._replace(model=model, mode=mode, name="x.pth")
    with pytest.raises(CheckpointError, match=message):
        ground(spoiled, PHOTO, "circle")
    ask = spoiled.maps if "map" in message else spoiled.match_probabilities
    with pytest.raises(CheckpointError, match=message):
        ask(normalise(resize_bicubic(PHOTO, 48))[None], [0], ["circle"])


def test_a_phrase_comes_out_as_if_it_were_alone(explainer: Explainer) -> None:
    image = encode(explainer, PHOTO)
    for phrase, one in zip(PHRASES, ground_all(explainer, image, PHRASES), strict=True):
        alone = ground(explainer, image, phrase)
        np.testing.assert_allclose(one.small, alone.small, rtol=1e-3)  # its scale as well, whatever it is padded to
        assert (one.point, [word.word for word in one.words]) == (alone.point, [word.word for word in alone.words])
        for together, single in zip(one.words, alone.words, strict=True):
            np.testing.assert_allclose(together.small, single.small, rtol=1e-3, atol=1e-9)


def test_many_phrases_keep_their_order(explainer: Explainer) -> None:
    shapes = ["circle", "star", "square", "cross", "triangle"]
    phrases = [shapes[k % 5] for k in range(2 * MAX_PAIRS["cpu"] + 3)]
    found = ground_all(explainer, PHOTO, phrases)
    assert [one.phrase for one in found] == [one.text for one in found] == phrases
    assert [one.words[1].word for one in found] == phrases
    for k, one in enumerate(found):
        assert one.match == pytest.approx(found[k % 5].match, abs=1e-5)


def test_an_image_is_encoded_once(explainer: Explainer, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[int] = []
    block = explainer.model.get_submodule("visual_encoder.blocks.0")
    monkeypatch.setattr(block, "_forward_hooks", {0: lambda _, inputs, __: runs.append(len(inputs[0]))})
    image = encode(explainer, PHOTO)
    assert runs == [1]
    for mode, block in (("itm", 1), ("itm", 2), ("itc", 0)):
        ground_all(explainer._replace(mode=mode, block=block), image, PHRASES)
    assert runs == [1, 1]  # mode itc goes on from block 0 itself


def test_gradients_do_not_pile_up(explainer: Explainer) -> None:
    image = encode(explainer, PHOTO)
    assert not any(
        tensor.requires_grad for tensor in [*image.encoded.block_inputs.values(), *image.encoded.keys_values[0]]
    )
    ground(explainer, image, "circle")
    assert all(parameter.grad is None for parameter in explainer.model.parameters())


def test_phrases_are_cleaned_and_cut(explainer: Explainer) -> None:
    found = ground(explainer, PHOTO, "The RED, red-red dog!", max_words=3)
    assert (found.phrase, found.text) == ("The RED, red-red dog!", "the red red")
    assert ground(explainer, PHOTO, "a " * 19).text == "a " * 18 + "a"  # 20 tokens with [CLS]
    with pytest.raises(PhraseError, match=r"phrase 'a a .*: 21 word pieces, and this model reads at most 20"):
        ground(explainer, PHOTO, "a " * 20)
    for phrase in ("", " ?! ", "\u200b"):  # the last is dropped by the tokenizer
        with pytest.raises(PhraseError, match="nothing is left of it"):
            ground_all(explainer, PHOTO, ["circle", phrase])
    with pytest.raises(PhraseError, match=r"phrase 'caf\\udce9': holds characters that are no text"):
        ground(explainer, PHOTO, "caf\udce9")  # Latin-1 on a UTF-8 terminal's command line


# ---- words


def test_words_average_to_the_map(explainer: Explainer) -> None:
    found = ground(explainer, PHOTO, "the red dog")
    assert [(word.word, word.pieces) for word in found.words] == [
        ("[CLS]", ("[CLS]",)),
        ("the", ("the",)),
        ("red", ("red",)),
        ("dog", ("d", "##o", "##g")),
    ]
    counts = [len(word.pieces) for word in found.words]
    whole = np.average([word.small for word in found.words], axis=0, weights=counts)
    np.testing.assert_allclose(whole, found.small, rtol=1e-4, atol=1e-9)
    shares = [word.share for word in found.words]
    assert sum(shares) == pytest.approx(1)
    weights = [count * float(word.small.sum()) for count, word in zip(counts, found.words, strict=True)]
    assert shares == pytest.approx([weight / sum(weights) for weight in weights], rel=1e-4)
    assert len({round(share, 4) for share in shares}) == 4


def test_word_pieces_are_merged_by_their_mean(explainer: Explainer) -> None:
    words = explainer.tokenizer.split("ox red")
    maps = torch.tensor([[[2.0, 0.0]], [[1.0, 3.0]], [[3.0, 1.0]], [[0.0, 6.0]]])
    merged = word_maps(words, maps)
    assert [word.word for word in merged] == ["[CLS]", "ox", "red"]
    assert [word.small.tolist() for word in merged] == [[[2, 0]], [[2, 2]], [[0, 6]]]
    assert [word.share for word in merged] == [2 / 16, 8 / 16, 6 / 16]
    assert [word.share for word in word_maps(words, maps * 0)] == [0, 0, 0]
