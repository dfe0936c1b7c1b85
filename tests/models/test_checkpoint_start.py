"""What training starts from: an image encoder of DeiT or timm, and BERT's weights in a folder."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from config import GroundingConfig
from model_sizes import load_bert_config
from models.albef import ALBEF
from models.checkpoint import CheckpointError, init_image_encoder, init_text_encoder
from models.xbert import TextEncoder
from tests.models.states import Payload, assert_holds, data_offset, flip, image_encoder, resized, state_of

TinyConfig = Callable[..., Any]
pytestmark = pytest.mark.usefixtures("one_thread")


# ---- the image encoder


@pytest.mark.parametrize(("options", "prefix"), [({"reg_tokens": 4}, 5), ({"no_embed_class": True}, 0)])
def test_positions_of_prefix_tokens_are_not_resized(tmp_path: Path, options: dict[str, Any], prefix: int) -> None:
    state = state_of(image_encoder(16, **options))
    torch.save(state, tmp_path / "vit.pth")
    encoder = image_encoder(8, **options)
    report = init_image_encoder(encoder, tmp_path / "vit.pth")
    before, after = state["pos_embed"], encoder.pos_embed.detach()
    assert report.resized == [f"pos_embed, {prefix + 16} to {prefix + 4} tokens"]
    assert torch.equal(after[:, :prefix], before[:, :prefix])
    patches = before[:, prefix:].mT.unflatten(2, (4, 4))
    expected = F.interpolate(patches, size=(2, 2), mode="bicubic", align_corners=False)
    torch.testing.assert_close(after[:, prefix:], expected.flatten(2).mT)


@pytest.mark.parametrize(("old", "new"), [(4, 2), (4, 3), (2, 4)])
def test_image_encoder_starts_from_a_classifier(tmp_path: Path, old: int, new: int) -> None:
    state = state_of(image_encoder(4 * old))
    head = {"head.weight": torch.ones(1000, 8), "head.bias": torch.ones(1000)}
    wrapped = {f"module.{key}": value for key, value in (state | head).items()}
    torch.save({"model": wrapped}, tmp_path / "deit.pth")
    encoder = image_encoder(4 * new)
    report = init_image_encoder(encoder, tmp_path / "deit.pth")
    positions = encoder.pos_embed.detach()
    assert_holds(encoder, state | {"pos_embed": positions})
    torch.testing.assert_close(positions, resized(state["pos_embed"], new))
    assert report.ignored == ["classifier, 2 tensors"]
    assert report.resized == [f"pos_embed, {1 + old**2} to {1 + new**2} tokens"]
    assert report.loaded == len(state)
    assert "without module." in str(report)


def test_image_encoder_of_another_kind_is_an_error(tmp_path: Path) -> None:
    state = state_of(image_encoder())
    del state["norm.weight"]
    torch.save(state | {"blocks.2.norm1.weight": torch.ones(8)}, tmp_path / "vit.pth")
    with pytest.raises(CheckpointError, match=r"missing: norm\.weight\n  unexpected: blocks\.2\.norm1\.weight"):
        init_image_encoder(image_encoder(), tmp_path / "vit.pth")


def test_albef_is_no_image_encoder(tmp_path: Path, evaluation: ALBEF) -> None:
    torch.save({"model": state_of(evaluation)}, tmp_path / "ALBEF.pth")
    with pytest.raises(CheckpointError, match=r"ALBEF\.pth: holds a whole ALBEF"):
        init_image_encoder(image_encoder(), tmp_path / "ALBEF.pth")


# ---- the text encoder


def tiny_bert(**changes: int) -> Any:
    """transformers' BERT, for the config below, with weights that are far from their start."""
    from transformers import BertConfig, BertForMaskedLM

    sizes = {
        "vocab_size": 30,
        "hidden_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "max_position_embeddings": 12,
    }
    bert = BertForMaskedLM(BertConfig(**(sizes | changes))).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in bert.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return bert


def text_encoder(tiny_config: TinyConfig, fusion_layer: int = 1, mlm_head: bool = True) -> TextEncoder:
    config = tiny_config(GroundingConfig, {"fusion_layer": fusion_layer})
    return TextEncoder(load_bert_config(config.bert_config), mlm_head).eval()


def bert_folder(tmp_path: Path, **changes: int) -> Path:
    """A small BERT as transformers saves it, with its weights both as safetensors and as PyTorch's archive."""
    folder, bert = tmp_path / "bert", tiny_bert(**changes)
    bert.save_pretrained(folder)
    torch.save(bert.state_dict(), folder / "pytorch_model.bin")
    return folder


def test_folder_without_weights_leaves_the_text_encoder_random(
    golden_text_encoder: Path, tiny_config: TinyConfig
) -> None:
    encoder = text_encoder(tiny_config)
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    report = init_text_encoder(encoder, str(golden_text_encoder))
    assert report.loaded == 0
    assert len(report.fresh) == 1
    assert "WARNING" in str(report)
    assert "random" in str(report)
    assert_holds(encoder, before)


@pytest.mark.parametrize("fusion_layer", [0, 1, 3])
def test_text_encoder_starts_from_bert_and_computes_what_bert_does(
    tmp_path: Path, tiny_config: TinyConfig, fusion_layer: int
) -> None:
    bert, folder = tiny_bert(), tmp_path / "bert"
    bert.save_pretrained(folder)
    encoder = text_encoder(tiny_config, fusion_layer)
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    report = init_text_encoder(encoder, str(folder))
    cross = {key for key in before if ".crossattention." in key}
    own = encoder.state_dict()
    assert bool(cross) == (fusion_layer < 3)
    assert all(torch.equal(own[key], before[key]) for key in cross)
    for key, value in bert.state_dict().items():
        assert torch.equal(own[key], value), key
    if cross:
        assert len(report.fresh) == 1
        assert "cross-attention" in report.fresh[0]
    predictions = encoder.cls.predictions  # its tied weights stay tied
    assert predictions.decoder.weight is encoder.bert.embeddings.word_embeddings.weight
    assert predictions.decoder.bias is predictions.bias

    ids = torch.tensor([[1, 7, 8, 9, 10], [1, 11, 12, 0, 0]])
    mask = (ids > 0).long()
    with torch.no_grad():
        out = bert(input_ids=ids, attention_mask=mask, output_hidden_states=True)
        tokens = encoder(ids, mask)
        for row, length in enumerate((5, 3)):  # what stands at padding is nobody's business
            expected = out.hidden_states[fusion_layer][row, :length]
            torch.testing.assert_close(tokens[row, :length], expected, rtol=1e-4, atol=1e-5)
        logits = encoder.mlm_logits(out.hidden_states[-1])
    torch.testing.assert_close(logits, out.logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"intermediate_size": 32}, r"intermediate\.dense\.weight is \[32, 16\], the model has \[24, 16\]"),
        ({"num_hidden_layers": 2}, r"missing: bert\.encoder\.layer\.2\.attention"),
    ],
)
def test_bert_of_another_size_is_an_error(
    tmp_path: Path, tiny_config: TinyConfig, changes: dict[str, int], message: str
) -> None:
    tiny_bert(**changes).save_pretrained(tmp_path / "bert")
    with pytest.raises(CheckpointError, match=message):
        init_text_encoder(text_encoder(tiny_config), str(tmp_path / "bert"))


def cut_short(folder: Path, name: str) -> None:
    (folder / name).write_bytes((folder / name).read_bytes()[:1000])


def only_archive(folder: Path) -> Path:
    (folder / "model.safetensors").unlink()
    return folder / "pytorch_model.bin"


def flip_a_bit(folder: Path) -> None:
    path = only_archive(folder)
    flip(path, data_offset(path, "pytorch_model/data/3"))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (lambda folder: folder.rename(folder.with_name("elsewhere")), ""),
    "cut safetensors": (lambda folder: cut_short(folder, "model.safetensors"), ""),
    "cut archive": (lambda folder: cut_short(folder, only_archive(folder).name), ""),
    "a call": (lambda folder: torch.save({"a": Payload(folder / "marker")}, only_archive(folder)), ""),
    "flipped bit": (flip_a_bit, "damaged: .*pytorch_model/data/3"),
    **{
        f"config {text:.25}": (lambda folder, text=text: (folder / "config.json").write_text(text), ".+")  # type: ignore[misc]
        for text in ("[]", "null", "{", '{"hidden_act": "foo"}', '{"num_attention_heads": 0}', '{"a":' * 5000)
    },
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_folders_of_bert(tmp_path: Path, tiny_config: TinyConfig, name: str) -> None:
    damage, message = DAMAGES[name]
    folder = bert_folder(tmp_path)
    damage(folder)
    expected = rf"{re.escape(str(folder))}: no BERT weights there \({message}.*\); give a local folder"
    with pytest.raises(CheckpointError, match=expected):
        init_text_encoder(text_encoder(tiny_config), str(folder))
    assert not (folder / "marker").exists()


def test_bert_without_its_mlm_head_is_reported(tmp_path: Path, tiny_config: TinyConfig) -> None:
    # transformers fills what a folder lacks with random weights, and only logs it.
    tiny_bert().bert.save_pretrained(tmp_path / "bert")
    report = init_text_encoder(text_encoder(tiny_config), str(tmp_path / "bert"))
    assert "WARNING" in str(report)
    assert "cls.predictions" in str(report)
