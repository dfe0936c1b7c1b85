"""Checkpoints: what is refused, what is converted, and that the report and the errors say so."""

import argparse
import math
import os
import pickle
import re
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from config import GroundingConfig, load_bert_config
from files import save_tensors
from models.albef import ALBEF
from models.checkpoint import (
    CheckpointError,
    export_student,
    init_image_encoder,
    init_text_encoder,
    load_weights,
    read_checkpoint,
)
from models.pretrain import PretrainModel
from models.xbert import TextEncoder

TinyConfig = Callable[..., Any]
State = dict[str, Tensor]
pytestmark = pytest.mark.usefixtures("one_thread")


def state_of(model: nn.Module, seed: int = 1) -> State:
    """A state dict of the model's shapes with other values than the model's."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for key, value in model.state_dict().items():
        drawn = torch.randn(value.shape, generator=generator)
        state[key] = drawn if value.is_floating_point() else value.clone()
    tied = "text_encoder.cls.predictions.decoder.weight"
    for suffix in ("", "_m"):
        key = tied.replace("text_encoder", f"text_encoder{suffix}")
        if key in state:
            state[key] = state[key.replace("cls.predictions.decoder", "bert.embeddings.word_embeddings")]
            bias = key.replace("decoder.weight", "bias")
            state[key.replace("weight", "bias")] = state[bias]
    return state


def assert_holds(model: nn.Module, state: State) -> None:
    own = model.state_dict()
    assert own.keys() == state.keys()
    for key, value in own.items():
        assert torch.equal(value, state[key]), key


# ---- reading


class Payload:
    """Pickles to a call that leaves a file behind."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.marker),)


def write_zip(content: Any, path: Path) -> None:
    torch.save(content, path)


def write_legacy(content: Any, path: Path) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


def write_pickle(content: Any, path: Path) -> None:
    path.write_bytes(pickle.dumps(content))


def write_safetensors(content: Any, path: Path) -> None:
    save_file(content["model"], path)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (write_zip, r"refused, .*\.mkdir\)$"),
        (write_legacy, r"refused, .*\.mkdir\)$"),
        (write_pickle, r"not a readable checkpoint \(not a file that PyTorch writes\)"),
    ],
)
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_function_call_in_a_checkpoint_is_refused_and_not_made(
    tmp_path: Path, write: Callable[[Any, Path], None], message: str
) -> None:
    marker, path = tmp_path / "marker", tmp_path / "evil.pth"
    write({"model": {"temp": torch.ones(())}, "epoch": Payload(marker)}, path)
    with pytest.raises(CheckpointError, match=r"evil\.pth: " + message) as error:
        read_checkpoint(path)
    assert "weights_only" not in str(error.value)  # PyTorch's message advises to read it unsafely
    assert not marker.exists()
    # The file is what it claims to be: an unsafe reader makes the call.
    if write is write_pickle:
        pickle.loads(path.read_bytes())
    else:
        torch.load(path, weights_only=False)
    assert marker.exists()


def write_torchscript(path: Path) -> None:
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), path)


def write_tar(path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        archive.addfile(tarfile.TarInfo("storages"))


@pytest.mark.parametrize(
    ("write", "what"), [(write_torchscript, "a TorchScript program"), (write_tar, r"a \.tar archive")]
)
@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_programs_and_early_formats_never_reach_torch_load(
    write: Callable[[Path], None], what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch before 2.6 runs the first and unpacks the second, weights_only or not."""
    path = tmp_path / "ALBEF.pth"
    write(path)
    monkeypatch.setattr(torch, "load", lambda *args, **options: pytest.fail("torch.load was called"))
    with pytest.raises(CheckpointError, match=rf"ALBEF\.pth: not a readable checkpoint \({what}\)"):
        read_checkpoint(path)


def test_other_objects_in_a_checkpoint_are_refused_by_name(tmp_path: Path) -> None:
    torch.save({"model": {"a": torch.ones(1)}, "args": argparse.Namespace(lr=1)}, tmp_path / "args.pth")
    with pytest.raises(CheckpointError, match=r"args\.pth: refused.*\(argparse\.Namespace\)$"):
        read_checkpoint(tmp_path / "args.pth")


@pytest.mark.parametrize("write", [write_zip, write_legacy])
def test_checkpoint_reads_back(tmp_path: Path, write: Callable[[Any, Path], None]) -> None:
    path = tmp_path / "good.pth"
    content = {"model": {"a": torch.arange(3.0)}, "epoch": 4, "config": {"lr": [1e-5]}, "optimizer": {"state": {}}}
    write(content, path)
    found = read_checkpoint(path)
    assert torch.equal(found.pop("model")["a"], torch.arange(3.0))
    assert found == {"epoch": 4, "config": {"lr": [1e-5]}, "optimizer": {"state": {}}}


@pytest.mark.parametrize("write", [write_zip, write_legacy, write_safetensors])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.99])
def test_truncated_checkpoint(tmp_path: Path, write: Callable[[Any, Path], None], share: float) -> None:
    path = tmp_path / f"cut.{'safetensors' if write is write_safetensors else 'pth'}"
    write({"model": {"a": torch.ones(2000)}}, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(CheckpointError, match=r"cut\.\w+: not a readable checkpoint"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    ("name", "more"), [("none.pth", ""), ("none.safetensors", ""), (".", r" \(it is a folder: give a file\)")]
)
def test_missing_checkpoint(tmp_path: Path, name: str, more: str) -> None:
    with pytest.raises(CheckpointError, match="no such checkpoint" + more):
        read_checkpoint(tmp_path / name)


@pytest.mark.parametrize(
    "content",
    [{"epoch": 1}, {}, {"model": {}}, {"model": torch.ones(2)}, {"model": {"a": 1}}, [torch.ones(2)], torch.ones(2)],
)
def test_checkpoint_without_a_state_dict(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "odd.pth")
    with pytest.raises(CheckpointError, match=r"odd\.pth: no state dict found"):
        read_checkpoint(tmp_path / "odd.pth")


def test_safetensors(tmp_path: Path, evaluation: ALBEF) -> None:
    state = state_of(evaluation)
    save_file({f"module.{key}": value for key, value in state.items()}, tmp_path / "weights.safetensors")
    load_weights(evaluation, read_checkpoint(tmp_path / "weights.safetensors")["model"], "weights.safetensors")
    assert_holds(evaluation, state)


# ---- writing


def test_saved_checkpoint_reads_back_into_a_model(tmp_path: Path, tiny_config: TinyConfig) -> None:
    first, second = PretrainModel(tiny_config()), PretrainModel(tiny_config())
    path = tmp_path / "new folder" / "checkpoint_00.pth"
    save_tensors(path, {"model": first.state_dict(), "epoch": 0})
    report = load_weights(second, read_checkpoint(path)["model"], path)
    assert_holds(second, first.state_dict())
    assert report.loaded == len(first.state_dict())
    assert str(report) == f"{path}: {report.loaded} tensors loaded"  # and nothing more to say
    assert [file.name for file in path.parent.iterdir()] == ["checkpoint_00.pth"]


def test_interrupted_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "checkpoint_00.pth"
    save_tensors(path, {"model": {"a": torch.ones(1)}, "epoch": 7})
    before = path.read_bytes()

    def full_disk(content: Any, file: IO[bytes]) -> None:
        file.write(b"half of")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_tensors(path, {"model": {"a": torch.zeros(1)}, "epoch": 8})
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint_00.pth"]


# ---- position embeddings


def resized(embedding: Tensor, side: int) -> Tensor:
    """The positions of a CLS token and a square grid, on another grid."""
    old = math.isqrt(embedding.shape[1] - 1)
    rows = [[embedding[0, 1 + row * old + column] for column in range(old)] for row in range(old)]
    grid = torch.stack([torch.stack(row, dim=1) for row in rows], dim=1)[None]
    new = F.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)[0]
    patches = [new[:, row, column] for row in range(side) for column in range(side)]
    return torch.stack([embedding[0, 0], *patches])[None]


def test_checkpoint_of_another_resolution(tiny_config: TinyConfig) -> None:
    state = state_of(PretrainModel(tiny_config()))
    model = PretrainModel(tiny_config(image_res=16))
    report = load_weights(model, state, "small.pth")
    for name in ("visual_encoder", "visual_encoder_m"):
        key = f"{name}.pos_embed"
        torch.testing.assert_close(model.state_dict()[key], resized(state[key], 4))
        assert f"{key}, 5 to 17 tokens" in report.resized
    assert len(report.resized) == 2
    assert "resized: visual_encoder.pos_embed, 5 to 17 tokens" in str(report)


# ---- queues and teacher


def test_one_pointer_serves_both_queues(training: PretrainModel) -> None:
    state = state_of(training)
    del state["queue_ptr_img"], state["queue_ptr_txt"]
    state["queue_ptr"] = torch.tensor([4])
    report = load_weights(training, state, "ALBEF.pth")
    assert training.queue_ptr_img.tolist() == training.queue_ptr_txt.tolist() == [4]
    assert torch.equal(training.image_queue, state["image_queue"])
    assert not report.fresh
    training.queue_ptr_img += 1  # they are two tensors
    assert training.queue_ptr_txt.tolist() == [4]


def test_queue_of_another_length_starts_afresh(tiny_config: TinyConfig) -> None:
    state = state_of(PretrainModel(tiny_config(queue_size=10)))
    state["queue_ptr_img"] = state["queue_ptr_txt"] = torch.tensor([8])
    model = PretrainModel(tiny_config())
    queues = model.image_queue.clone(), model.text_queue.clone()
    report = load_weights(model, state, "long.pth")
    assert torch.equal(model.image_queue, queues[0])
    assert torch.equal(model.text_queue, queues[1])
    assert model.queue_ptr_img.tolist() == model.queue_ptr_txt.tolist() == [0]
    assert report.fresh == ["queues (of length 10 in the file, 6 here)"]
    assert "fresh: queues (of length 10 in the file, 6 here)" in str(report)
    assert torch.equal(model.state_dict()["temp"], state["temp"])


@pytest.mark.parametrize("name", ["image_queue", "text_queue", "queue_ptr_img", "vision_proj_m.weight"])
def test_queues_or_teacher_in_part_are_an_error(training: PretrainModel, name: str) -> None:
    state = state_of(training)
    del state[name]
    with pytest.raises(CheckpointError, match=rf"missing: {re.escape(name)}$"):
        load_weights(training, state, "checkpoint.pth")


@pytest.mark.parametrize("rows", [3, 5])
def test_queue_of_another_embedding_is_an_error(training: PretrainModel, rows: int) -> None:
    """Only the length of a queue may differ: a start afresh would hide that the features are others."""
    state = state_of(training)
    state["image_queue"] = torch.zeros(rows, training.image_queue.shape[1])
    with pytest.raises(CheckpointError, match=rf"of another shape: image_queue is \[{rows}, 6\]"):
        load_weights(training, state, "checkpoint.pth")


def test_checkpoint_without_queues_or_teacher_starts_them(tiny_config: TinyConfig) -> None:
    model = PretrainModel(tiny_config())
    everything = state_of(model)
    student = {key: value for key, value in everything.items() if "_m." not in key and "queue" not in key}
    report = load_weights(model, student, "student.pth")
    for name in ("visual_encoder", "vision_proj", "text_encoder", "text_proj"):
        own, teacher = getattr(model, name).state_dict(), getattr(model, f"{name}_m").state_dict()
        assert own.keys() == teacher.keys()
        assert all(torch.equal(own[key], teacher[key]) for key in own)
        assert all(torch.equal(own[key], student[f"{name}.{key}"]) for key in own)
    assert report.fresh == [
        "queues (missing in the file, 6 here)",
        "teacher (copied from the student; the file has none)",
    ]


def test_exported_student_starts_another_training(training: PretrainModel, tmp_path: Path) -> None:
    state = state_of(training)
    save_tensors(tmp_path / "trained.pth", {"model": state, "epoch": 0, "config": {"image_res": 96}})
    export_student(tmp_path / "trained.pth", tmp_path / "student.safetensors")
    content = read_checkpoint(tmp_path / "student.safetensors")
    assert content.keys() == {"model", "config"}
    assert content["config"] == {"image_res": 96}
    exported = content["model"]
    assert not [key for key in exported if "_m." in key or "queue" in key]
    assert {value.dtype for value in exported.values()} == {torch.float16}
    report = load_weights(training, exported, "student.safetensors")
    assert len(report.fresh) == 2  # queues and teacher
    for key, value in training.state_dict().items():
        if key in exported:
            assert torch.equal(value, state[key].half().float()), key
    assert torch.equal(training.vision_proj_m.weight, training.vision_proj.weight)


def test_teacher_of_the_file_is_kept(training: PretrainModel) -> None:
    state = state_of(training)
    assert not torch.equal(state["vision_proj.weight"], state["vision_proj_m.weight"])
    load_weights(training, state, "both.pth")
    assert_holds(training, state)


def test_evaluation_leaves_the_training_parts_out(training: PretrainModel, evaluation: ALBEF) -> None:
    state = state_of(training)
    report = load_weights(evaluation, state, "train.pth")
    assert_holds(evaluation, {key: state[key] for key in evaluation.state_dict()})
    teacher = sum("_m." in key for key in state)
    head = sum(key.startswith("text_encoder.cls.") for key in state)
    assert report.ignored == [f"teacher, {teacher} tensors", "queues, 4 tensors", f"MLM head, {head} tensors"]
    assert report.loaded + teacher + 4 + head == len(state)
    text = str(report)
    assert text.startswith(f"train.pth: {report.loaded} tensors loaded\n")
    assert f"ignored on purpose: teacher, {teacher} tensors" in text


def test_position_ids_may_be_absent(training: PretrainModel) -> None:
    state = state_of(training)
    for key in [key for key in state if key.endswith("position_ids")]:
        del state[key]
    load_weights(training, state, "new.pth")
    assert training.text_encoder.bert.embeddings.position_ids.tolist() == [list(range(12))]


# ---- what does not fit


def test_missing_key_is_an_error(evaluation: ALBEF) -> None:
    state = state_of(evaluation)
    del state["itm_head.bias"], state["temp"]
    with pytest.raises(CheckpointError, match=r"lacking\.pth: does not fit .*\n  missing: temp, itm_head\.bias$"):
        load_weights(evaluation, state, "lacking.pth")


def test_unexpected_key_is_an_error(evaluation: ALBEF) -> None:
    state = state_of(evaluation) | {"itm_head.extra": torch.ones(1)}
    with pytest.raises(CheckpointError, match=r"\n  unexpected: itm_head\.extra$"):
        load_weights(evaluation, state, "more.pth")


@pytest.mark.parametrize("key", ["visual_encoder_m.extra", "text_encoder.cls.seq_relationship.weight"])
def test_unexpected_key_of_a_part_that_the_model_has_is_an_error(
    training: PretrainModel, evaluation: ALBEF, key: str
) -> None:
    """Leaving the whole part out is for evaluation, which has none of it."""
    state = state_of(training) | {key: torch.ones(1)}
    load_weights(evaluation, state, "checkpoint.pth")
    with pytest.raises(CheckpointError, match=rf"\n  unexpected: {re.escape(key)}$"):
        load_weights(training, state, "checkpoint.pth")


def test_other_shape_is_an_error(evaluation: ALBEF) -> None:
    state = state_of(evaluation) | {"vision_proj.weight": torch.ones(4, 9)}
    with pytest.raises(CheckpointError, match=r"vision_proj\.weight is \[4, 9\], the model has \[4, 8\]"):
        load_weights(evaluation, state, "wide.pth")


def test_every_kind_of_misfit_is_said_at_once_and_nothing_is_loaded(evaluation: ALBEF) -> None:
    before = {key: value.clone() for key, value in evaluation.state_dict().items()}
    state = state_of(evaluation) | {"vision_proj.bias": torch.ones(5), "stray": torch.ones(1)}
    for key in [key for key in state if key.startswith("visual_encoder.blocks")]:
        del state[key]
    with pytest.raises(CheckpointError) as error:
        load_weights(evaluation, state, "odd.pth")
    blocks = sum(key.startswith("visual_encoder.blocks") for key in before)
    assert f", and {blocks - 5} more" in str(error.value)
    assert "unexpected: stray" in str(error.value)
    assert "vision_proj.bias is [5], the model has [4]" in str(error.value)
    assert_holds(evaluation, before)


# ---- starting the image encoder


def image_encoder(image_res: int = 8, **options: Any) -> VisionTransformer:
    return VisionTransformer(image_res, 4, embed_dim=8, depth=2, num_heads=2, num_classes=0, global_pool="", **options)


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
    torch.save({"model": state | head}, tmp_path / "deit.pth")
    encoder = image_encoder(4 * new)
    report = init_image_encoder(encoder, tmp_path / "deit.pth")
    positions = encoder.pos_embed.detach()
    assert_holds(encoder, state | {"pos_embed": positions})
    torch.testing.assert_close(positions, resized(state["pos_embed"], new))
    assert report.ignored == ["classifier, 2 tensors"]
    assert report.resized == [f"pos_embed, {1 + old**2} to {1 + new**2} tokens"]
    assert report.loaded == len(state)


def test_image_encoder_of_another_kind_is_an_error(tmp_path: Path) -> None:
    state = state_of(image_encoder())
    del state["norm.weight"]
    torch.save(state | {"blocks.2.norm1.weight": torch.ones(8)}, tmp_path / "vit.pth")
    with pytest.raises(CheckpointError, match=r"missing: norm\.weight\n  unexpected: blocks\.2\.norm1\.weight"):
        init_image_encoder(image_encoder(), tmp_path / "vit.pth")


# ---- starting the text encoder


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


def test_tied_decoder_stays_tied_after_loading(tmp_path: Path, tiny_config: TinyConfig) -> None:
    tiny_bert().save_pretrained(tmp_path / "bert")
    encoder = text_encoder(tiny_config)
    init_text_encoder(encoder, str(tmp_path / "bert"))
    assert encoder.cls is not None
    predictions = encoder.cls.predictions
    assert predictions.decoder.weight is encoder.bert.embeddings.word_embeddings.weight
    assert predictions.decoder.bias is predictions.bias


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


def test_absent_text_encoder_is_an_error(tmp_path: Path, tiny_config: TinyConfig) -> None:
    with pytest.raises(CheckpointError, match="no BERT weights there"):
        init_text_encoder(text_encoder(tiny_config), str(tmp_path / "nothing"))


def write_cut_safetensors(folder: Path, bert: Any) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def write_cut_bin(folder: Path, bert: Any) -> None:
    (folder / "model.safetensors").unlink()
    path = folder / "pytorch_model.bin"
    torch.save(bert.state_dict(), path)
    path.write_bytes(path.read_bytes()[:1000])


def write_evil_bin(folder: Path, bert: Any) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"a": Payload(folder / "marker")}, folder / "pytorch_model.bin")


@pytest.mark.parametrize("damage", [write_cut_safetensors, write_cut_bin, write_evil_bin])
def test_damaged_weights_of_the_text_encoder_are_an_error(
    tmp_path: Path, tiny_config: TinyConfig, damage: Callable[[Path, Any], None]
) -> None:
    bert, folder = tiny_bert(), tmp_path / "bert"
    bert.save_pretrained(folder)
    damage(folder, bert)
    with pytest.raises(CheckpointError, match="no BERT weights there"):
        init_text_encoder(text_encoder(tiny_config), str(folder))
    assert not (folder / "marker").exists()


def test_bert_without_its_mlm_head_is_reported(tmp_path: Path, tiny_config: TinyConfig) -> None:
    # transformers fills what a folder lacks with random weights, and only logs it.
    tiny_bert().bert.save_pretrained(tmp_path / "bert")
    report = init_text_encoder(text_encoder(tiny_config), str(tmp_path / "bert"))
    assert "WARNING" in str(report)
    assert "cls.predictions" in str(report)
