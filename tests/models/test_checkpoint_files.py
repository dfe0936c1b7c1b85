"""Checkpoint files as people have them: damaged, renamed, wrapped, of other models; and byte-equal ones of our own."""

import copy
import gzip
import hashlib
import itertools
import math
import os
import re
import resource
import shutil
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import files
import utils
from dataset.expressions import Expression
from grounding.load import ready
from grounding.results import ResultFolder
from models.albef import ALBEF
from models.checkpoint import (
    CheckpointError,
    check_resumable,
    diverged,
    export_student,
    init_image_encoder,
    init_text_encoder,
    load_weights,
    read_checkpoint,
)
from models.pretrain import PretrainModel
from tests.models.test_checkpoint import (
    State,
    TinyConfig,
    assert_holds,
    image_encoder,
    state_of,
    text_encoder,
    tiny_bert,
)
from tests.training_runs import make_workplace, train

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def without_checksums() -> Iterator[None]:
    switch = getattr(torch.serialization, "set_crc32_options", None)
    if switch is None:
        pytest.skip("this version of PyTorch always writes checksums")
    switch(False)
    yield
    switch(True)


def load(model: nn.Module, path: Path) -> str:
    """Load a file into a model; returns the report."""
    return str(load_weights(model, read_checkpoint(path)["model"], path))


def flip(path: Path, at: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    path.write_bytes(data)


# ---- checksums


def data_offset(path: Path, record: str) -> int:
    with zipfile.ZipFile(path) as archive, archive.open(record) as stream:
        return stream._orig_compress_start  # type: ignore[attr-defined]


@pytest.mark.parametrize("record", ["data.pkl", "data/0", "data/2", "byteorder", "version"])
def test_a_flipped_bit_names_file_and_record(tmp_path: Path, record: str) -> None:
    path = tmp_path / "flipped.pth"
    torch.save({"model": {name: torch.ones(100) for name in "abc"}}, path)
    flip(path, data_offset(path, f"flipped/{record}"))
    expected = rf"flipped\.pth: not a readable checkpoint \(damaged: the checksum of its record 'flipped/{record}'"
    with pytest.raises(CheckpointError, match=expected):
        read_checkpoint(path)


def test_no_flipped_bit_changes_a_number(tmp_path: Path) -> None:
    """Wherever it is: in weights, tables, names or padding."""
    path, model = tmp_path / "flipped.pth", {name: torch.arange(8.0) + i for i, name in enumerate("abcd")}
    files.save_tensors(path, {"model": model})
    whole, refused = path.read_bytes(), 0
    for at in range(0, len(whole), 13):
        flip(path, at, at % 8)
        try:
            assert all(torch.equal(value, model[key]) for key, value in read_checkpoint(path)["model"].items())
        except CheckpointError:
            refused += 1
        path.write_bytes(whole)
    assert refused > len(whole) / 13 / 3


@pytest.mark.usefixtures("without_checksums")
def test_an_archive_without_checksums_is_read(tmp_path: Path) -> None:
    torch.save({"model": {"a": torch.arange(3.0)}}, tmp_path / "plain.pth")
    with zipfile.ZipFile(tmp_path / "plain.pth") as archive:
        assert {record.CRC for record in archive.infolist()} == {0}
    assert read_checkpoint(tmp_path / "plain.pth")["model"]["a"].tolist() == [0, 1, 2]


def test_one_checksum_of_zero_is_damage(tmp_path: Path) -> None:
    path = tmp_path / "zero.pth"
    torch.save({"model": {"a": torch.arange(3.0)}}, path)
    with zipfile.ZipFile(path) as archive:
        record = archive.getinfo("zero/data/0")
    data, checksum = path.read_bytes(), record.CRC.to_bytes(4, "little")
    assert data.count(checksum) >= 2  # beside the record, and in the table at the end
    path.write_bytes(data.replace(checksum, bytes(4)))
    with pytest.raises(CheckpointError, match="'zero/data/0'"):
        read_checkpoint(path)


def test_a_flipped_bit_in_berts_weights(tmp_path: Path, tiny_config: TinyConfig) -> None:
    bert, folder = tiny_bert(), tmp_path / "bert"
    bert.save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    path = folder / "pytorch_model.bin"
    torch.save(bert.state_dict(), path)
    init_text_encoder(text_encoder(tiny_config), str(folder))
    flip(path, data_offset(path, "pytorch_model/data/3"))
    with pytest.raises(CheckpointError, match=r"no BERT weights there \(damaged: .*pytorch_model/data/3"):
        init_text_encoder(text_encoder(tiny_config), str(folder))


@pytest.mark.parametrize(
    "text", ["[]", "null", "{", '{"hidden_act": "foo"}', '{"num_attention_heads": 0}', '{"a":' * 5000]
)
def test_an_odd_config_of_berts_folder(tmp_path: Path, tiny_config: TinyConfig, text: str) -> None:
    tiny_bert().save_pretrained(tmp_path / "bert")
    (tmp_path / "bert" / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"bert: no BERT weights there \(.+\); give a local folder"):
        init_text_encoder(text_encoder(tiny_config), str(tmp_path / "bert"))


# ---- other files


def repacked(path: Path) -> None:
    """A checkpoint of 8 MB that weighs 20 KB, as an archiver leaves it."""
    torch.save({"model": {"a": torch.zeros(2_000_000)}}, path)
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in records.items():
            archive.writestr(name, data)


def zipped_checkpoint(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("ALBEF.pth", b"")


def npz(path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, a=np.ones(3))


OTHER_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "repacked": (repacked, "its record 'repacked/data.pkl' is compressed"),
    "zipped": (zipped_checkpoint, r"a zip archive of other files \('ALBEF.pth'\): unpack it first"),
    "npz": (npz, "a zip archive of other files"),
    "gzip": (lambda path: path.write_bytes(gzip.compress(b"x" * 100)), "a gzip archive: unpack it first"),
    "lfs": (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid"), "a Git LFS pointer"),
    "page": (lambda path: path.write_text("<html>Quota exceeded</html>"), "a web page"),
    "hdf5": (lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(99)), "an HDF5 file"),
    "text": (lambda path: path.write_text("hello"), "not a readable checkpoint"),
    "empty": (lambda path: path.write_bytes(b""), "not a readable checkpoint"),
    "huge": (lambda path: path.write_bytes(b"\x80\x02\x8a\xff" + b"\xff" * 99), "not a readable checkpoint"),
    "sizes": (lambda path: path.write_bytes((2**60).to_bytes(8, "little") + b"{" * 99), "header too large"),
}


@pytest.mark.parametrize("name", OTHER_FILES)
def test_other_files_are_named(tmp_path: Path, name: str) -> None:
    write, message = OTHER_FILES[name]
    path = tmp_path / f"{name}.pth"
    write(path)
    with pytest.raises(CheckpointError, match=message) as error:
        read_checkpoint(path)
    assert str(error.value).startswith(f"{path}: not a readable checkpoint (")
    assert "\n" not in str(error.value)


def test_safetensors_by_another_name(tmp_path: Path) -> None:
    save_file({"a": torch.arange(3.0)}, tmp_path / "weights.pth")
    assert read_checkpoint(tmp_path / "weights.pth")["model"]["a"].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    "error", [KeyError("1"), AssertionError(), IndexError("list index"), TypeError("odd"), MemoryError()]
)
def test_whatever_pytorch_raises_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    torch.save({"model": {"a": torch.ones(1)}}, tmp_path / "odd.pth")
    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(CheckpointError, match=rf"odd\.pth: not a readable checkpoint \({type(error).__name__}"):
        read_checkpoint(tmp_path / "odd.pth")


# ---- odd content


ODD_WEIGHTS: dict[str, tuple[Callable[[], Any], str]] = {
    "a number": (lambda: 3, "'temp' in its state dict is of type int, not a tensor"),
    "a list": (lambda: [1], "'temp' in its state dict is of type list"),
    "sparse": (lambda: torch.eye(2).to_sparse(), "'temp' .* a cpu sparse_coo tensor"),
    "compressed": (lambda: torch.eye(2).to_sparse_csr(), "'temp' .* a cpu sparse_csr tensor"),
    "meta": (lambda: torch.zeros(3, device="meta"), "'temp' .* a meta strided tensor"),
    "quantized": (
        lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
        "'temp' .* a quantized tensor",
    ),
    "expanded": (
        lambda: torch.zeros(1).expand(10**9, 10**9),
        r"'temp' .* larger than the file: its shape is \[1000000000, ",
    ),
    "integers": (lambda: torch.tensor(3), "of another type: temp is torch.int64, the model has torch.float32"),
    "complex": (lambda: torch.tensor(1j), "of another type: temp is torch.complex64"),
    "empty": (lambda: torch.zeros(0), r"of another shape: temp is \[0\], the model has \[\]"),
}


@pytest.mark.filterwarnings("ignore::UserWarning")  # of sparse and quantized tensors
@pytest.mark.parametrize("what", ODD_WEIGHTS)
def test_a_weight_that_is_none(tmp_path: Path, evaluation: ALBEF, what: str) -> None:
    make, message = ODD_WEIGHTS[what]
    torch.save({"model": state_of(evaluation) | {"temp": make()}}, tmp_path / "odd.pth")
    with pytest.raises(CheckpointError, match=rf"odd\.pth: (does not fit .*\n  )?{message}"):
        load(evaluation, tmp_path / "odd.pth")


@pytest.mark.parametrize("key", [1, None, b"temp", (1, "a"), 1.5])
def test_a_key_that_is_no_text(tmp_path: Path, evaluation: ALBEF, key: Any) -> None:
    torch.save({"model": state_of(evaluation) | {key: torch.ones(1)}}, tmp_path / "odd.pth")
    with pytest.raises(CheckpointError, match=rf"odd\.pth: {re.escape(repr(key))} in its state dict is a key that is "):
        read_checkpoint(tmp_path / "odd.pth")


@pytest.mark.parametrize("shape", [(), (5,), (1, 1, 8), (1, 7, 8), (2, 17, 8), (1, 17, 9), (1, 17, 8, 1), (1, 0, 8)])
def test_position_embeddings_that_are_none(evaluation: ALBEF, shape: tuple[int, ...]) -> None:
    state = state_of(evaluation) | {"visual_encoder.pos_embed": torch.zeros(shape)}
    expected = f"of another shape: visual_encoder.pos_embed is {list(shape)}, the model has [1, 5, 8]"
    with pytest.raises(CheckpointError, match=re.escape(expected)):
        load_weights(evaluation, state, "odd.pth")


@pytest.mark.parametrize("shape", [(), (6,), (4, 6, 1), (4, 0, 2)])
def test_queues_that_are_none(training: PretrainModel, shape: tuple[int, ...]) -> None:
    state = state_of(training) | {name: torch.zeros(shape) for name in ("image_queue", "text_queue")}
    with pytest.raises(CheckpointError, match=r"of another shape: image_queue is"):
        load_weights(training, state, "odd.pth")


@pytest.mark.parametrize("shape", [(2,), (1, 1, 3), (0,)])
def test_a_pointer_that_is_none(training: PretrainModel, shape: tuple[int, ...]) -> None:
    state = state_of(training)
    del state["queue_ptr_img"], state["queue_ptr_txt"]
    with pytest.raises(CheckpointError, match=r"of another shape: queue_ptr_img is"):
        load_weights(training, state | {"queue_ptr": torch.zeros(shape).long()}, "odd.pth")


def test_positions_that_do_not_count_are_damage(evaluation: ALBEF) -> None:
    key = "text_encoder.bert.embeddings.position_ids"
    state = state_of(evaluation)
    load_weights(evaluation, state | {key: state[key].half()}, "half.pth")  # `.half()` of a whole state dict
    state[key] = state[key].flip(1)
    with pytest.raises(CheckpointError, match=rf"odd\.pth: {re.escape(key)} does not count from 0"):
        load_weights(evaluation, state, "odd.pth")


def test_a_checkpoint_that_holds_itself(tmp_path: Path) -> None:
    content: dict[str, Any] = {}
    content["model"] = content
    torch.save(content, tmp_path / "ring.pth")
    with pytest.raises(CheckpointError, match="no state dict found"):
        read_checkpoint(tmp_path / "ring.pth")


# ---- other names


def compiled_by_parts(key: str) -> str:
    """As torch.compile leaves the names of two modules that were compiled one by one."""
    return re.sub(r"^(visual_encoder(?:_m)?|text_encoder\.bert)\.", r"\1._orig_mod.", key)


RENAMED: dict[str, tuple[Callable[[str], str], str]] = {
    "DataParallel": (lambda key: f"module.{key}", "module."),
    "compiled": (lambda key: f"_orig_mod.{key}", "_orig_mod."),
    "compiled DataParallel": (lambda key: f"_orig_mod.module.{key}", "_orig_mod., module."),
    "DataParallel of compiled": (lambda key: f"module._orig_mod.{key}", "_orig_mod., module."),
    "twice": (lambda key: f"module.module.{key}", "module."),
    "parts compiled": (compiled_by_parts, "_orig_mod."),
    "parts compiled in DataParallel": (lambda key: f"module.{compiled_by_parts(key)}", "_orig_mod., module."),
    "a part in DataParallel": (lambda key: key.replace("visual_encoder.", "visual_encoder.module.", 1), "module."),
    "FSDP": (lambda key: f"_fsdp_wrapped_module.{key}", "_fsdp_wrapped_module."),
    "checkpointed blocks": (
        lambda key: re.sub(r"(blocks\.\d+\.)", r"\1_checkpoint_wrapped_module.", key),
        "_checkpoint_wrapped_module.",
    ),
}


@pytest.mark.parametrize("name", RENAMED)
def test_prefixes_of_wrappers_go_and_are_reported(tmp_path: Path, training: PretrainModel, name: str) -> None:
    rename, prefixes = RENAMED[name]
    state, path = state_of(training), tmp_path / "wrapped.pth"
    torch.save({"model": {rename(key): value for key, value in state.items()}}, path)
    changed = sum(rename(key) != key for key in state)
    assert changed > 0
    assert f"  converted: {changed} names without {prefixes}" in load(training, path).splitlines()
    assert_holds(training, state)


CONTAINERS: dict[str, Callable[[State], Any]] = {
    "state_dict": lambda state: {"state_dict": state, "epoch": 3},
    "model_state_dict": lambda state: {"model_state_dict": state, "epoch": 3},
    "model in model": lambda state: {"model": {"state_dict": state}, "epoch": 3},
    "a name under model": lambda state: {"model": "ALBEF", "state_dict": state, "epoch": 3},
    "Lightning": lambda state: {"state_dict": {f"model.{key}": value for key, value in state.items()}, "epoch": 3},
    "Lightning, compiled": lambda state: {
        "state_dict": {f"model._orig_mod.{key}": value for key, value in state.items()},
        "epoch": 3,
    },
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_state_dicts_under_other_keys(tmp_path: Path, evaluation: ALBEF, name: str) -> None:
    state, path = state_of(evaluation), tmp_path / "other.ckpt"
    torch.save(CONTAINERS[name](state), path)
    content = read_checkpoint(path)
    assert content["epoch"] == 3
    report = str(load_weights(evaluation, content["model"], path))
    assert_holds(evaluation, state)
    assert ("without model." in report) == ("Lightning" in name)


def fine_tuned(state: State) -> State:
    """The names of ALBEF's retrieval models: BertModel without MLM head, one pointer, ids of the queue's images."""
    renamed = {re.sub(r"^(text_encoder(?:_m)?)\.bert\.", r"\1.", key): value for key, value in state.items()}
    kept = {key: value for key, value in renamed.items() if ".cls." not in key and "queue_ptr" not in key}
    return kept | {"queue_ptr": torch.zeros(1).long(), "idx_queue": torch.full((1, 6), -100)}


def test_albefs_fine_tuned_names(tmp_path: Path, training: PretrainModel, evaluation: ALBEF) -> None:
    state, path = state_of(training), tmp_path / "refcoco.pth"
    torch.save({"model": fine_tuned(state)}, path)
    report = load(evaluation, path)
    assert_holds(evaluation, {key: state[key] for key in evaluation.state_dict()})
    renamed = sum(bool(re.match(r"text_encoder(_m)?\.bert\.", key)) for key in state)
    assert f"converted: {renamed} names with text_encoder.bert. for text_encoder." in report
    assert "ignored on purpose: queues, 4 tensors" in report
    with pytest.raises(CheckpointError, match=r"missing: text_encoder\.cls\."):  # nothing to train MLM with
        load(training, path)


@pytest.mark.parametrize(
    ("one", "other"),
    [("temp", "module.temp"), ("_orig_mod.temp", "module.temp"), ("visual_encoder.module.norm.bias", None)],
)
def test_names_that_collide_are_an_error(tmp_path: Path, evaluation: ALBEF, one: str, other: str | None) -> None:
    state = state_of(evaluation) | {name: torch.zeros(()) for name in (one, other) if name}
    if one != "temp" and other:
        del state["temp"]
    torch.save({"model": state}, tmp_path / "both.pth")
    with pytest.raises(CheckpointError, match=r"both\.pth: its keys \S+ and \S+ are both \S+, by their prefixes$"):
        load(evaluation, tmp_path / "both.pth")


def test_our_own_files_need_no_conversion(tmp_path: Path, training: PretrainModel) -> None:
    training.compile_image_encoders(backend="eager")
    files.save_tensors(tmp_path / "own.pth", {"model": training.state_dict()})
    assert "converted" not in load(training, tmp_path / "own.pth")


def test_a_wrapped_checkpoint_is_exported_by_our_names(tmp_path: Path, training: PretrainModel) -> None:
    torch.save({f"module.{key}": value for key, value in state_of(training).items()}, tmp_path / "wrapped.pth")
    export_student(tmp_path / "wrapped.pth", tmp_path / "student.safetensors")
    content = read_checkpoint(tmp_path / "student.safetensors")
    assert "temp" in content["model"]
    assert "config" not in content


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"config": "{"}, {"config": "[" * 9999}])
def test_metadata_without_a_config_is_passed_over(metadata: dict[str, str] | None, tmp_path: Path) -> None:
    save_file({"temp": torch.ones(())}, tmp_path / "x.safetensors", metadata)
    assert read_checkpoint(tmp_path / "x.safetensors").keys() == {"model"}


OTHER_MODELS = {
    "BLIP": [
        "visual_encoder.cls_token",
        "text_encoder.embeddings.word_embeddings.weight",
        "ptr_queue",
        "itm_head.bias",
    ],
    "ALBEF for VQA, or BLIP": ["visual_encoder.cls_token", "text_decoder.bert.embeddings.LayerNorm.weight"],
    "ALBEF fine-tuned as a classifier": ["visual_encoder.cls_token", "cls_head.0.weight"],
    "BLIP of transformers": ["vision_model.encoder.layers.0.self_attn.qkv.weight", "itm_head.weight"],
    "CLIP or SigLIP of transformers": ["vision_model.encoder.layers.0.self_attn.q_proj.weight", "text_model.a.weight"],
    "CLIP": ["visual.conv1.weight", "transformer.resblocks.0.ln_1.weight", "logit_scale"],
    "an image encoder alone": ["cls_token", "patch_embed.proj.weight", "blocks.0.norm1.weight"],
    "an image encoder of transformers": ["vit.embeddings.cls_token", "vit.encoder.layer.0.output.dense.weight"],
    "BERT alone": ["bert.embeddings.word_embeddings.weight", "cls.predictions.bias"],
    "a ResNet": ["conv1.weight", "layer1.0.conv1.weight", "fc.weight"],
    "a LoRA adapter": ["base_model.model.text_encoder.layer.0.query.lora_A.weight"],
    "X-VLM": ["vision_encoder.layers.0.weight", "text_encoder.bert.embeddings.LayerNorm.weight"],
}


@pytest.mark.parametrize("name", OTHER_MODELS)
def test_other_models_are_named_in_one_line(
    tmp_path: Path, evaluation: ALBEF, training: PretrainModel, name: str
) -> None:
    torch.save({"state_dict": {f"module.{key}": torch.ones(2) for key in OTHER_MODELS[name]}}, tmp_path / "other.pth")
    for model in (evaluation, training):
        with pytest.raises(CheckpointError, match=rf"other\.pth: holds {name}") as error:
            load(model, tmp_path / "other.pth")
        assert "\n" not in str(error.value)


def test_albef_is_no_image_encoder(tmp_path: Path, evaluation: ALBEF) -> None:
    torch.save({"model": state_of(evaluation)}, tmp_path / "ALBEF.pth")
    with pytest.raises(CheckpointError, match=r"ALBEF\.pth: holds a whole ALBEF"):
        init_image_encoder(image_encoder(), tmp_path / "ALBEF.pth")


def test_image_encoder_with_prefixes(tmp_path: Path) -> None:
    encoder = image_encoder()
    state = state_of(encoder)
    torch.save({"state_dict": {f"module.{key}": value for key, value in state.items()}}, tmp_path / "deit.pth")
    assert "without module." in str(init_image_encoder(encoder, tmp_path / "deit.pth"))
    assert_holds(encoder, state)


# ---- resuming


def resumable() -> dict[str, Any]:
    groups = [{"lr": 0.1, "params": [0, 1]}, {"lr": 0.1, "params": [2]}]
    optimizer = {"param_groups": groups, "state": {0: {"step": torch.ones(())}, 2: {"step": torch.ones(())}}}
    return {"model": {}, "optimizer": optimizer, "lr_scheduler": {}, "epoch": 3, "scaler": {}}


def test_what_can_be_resumed() -> None:
    check_resumable(resumable(), "good.pth")
    check_resumable(resumable() | {"scaler": None}, "good.pth")
    check_resumable({key: value for key, value in resumable().items() if key != "scaler"}, "good.pth")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *itertools.product(["epoch"], ["abc", None, 1.0, True, -1, [1], torch.tensor(1), {}]),
        *itertools.product(["optimizer"], [None, [], "adamw", 3, torch.ones(2)]),
        *itertools.product(["lr_scheduler", "scaler"], [[], "cosine", 3, torch.ones(2)]),
        ("lr_scheduler", None),
    ],
)
def test_what_cannot_be_resumed(key: str, value: Any) -> None:
    with pytest.raises(CheckpointError, match=rf"^odd\.pth: cannot resume, its '{key}' is .*; drop --resume"):
        check_resumable(resumable() | {key: value}, "odd.pth")


# ---- numbers that are none


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_the_first_parameter_that_is_not_finite(evaluation: ALBEF, value: float) -> None:
    state = state_of(evaluation)
    assert diverged(state) is diverged(state, math.inf) is None
    state["itm_head.weight"][0, 1] = value
    assert diverged(state) == diverged(state, math.inf) == "itm_head.weight holds NaN or infinity"
    state["visual_encoder.blocks.1.norm1.bias"][2] = value
    assert diverged(state, math.inf) == "visual_encoder.blocks.1.norm1.bias holds NaN or infinity"


def test_weights_too_large_to_be_sound(evaluation: ALBEF) -> None:
    state = state_of(evaluation) | {"temp": torch.tensor([-3e6, 2.0])}
    assert diverged(state) == "temp reaches from -3e+06 to 2"
    assert diverged(state, math.inf) is None


# ---- what stays mapped


def mapped_files() -> str:
    return Path("/proc/self/maps").read_text() if Path("/proc/self/maps").exists() else ""


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_a_loaded_model_does_not_hold_on_to_its_file(
    tmp_path: Path, evaluation: ALBEF, training: PretrainModel, suffix: str
) -> None:
    path, state = tmp_path / f"weights.{suffix}", state_of(training)
    save_file({k: v.clone() for k, v in state.items()}, path) if suffix == "safetensors" else torch.save(state, path)
    for model in (evaluation, training):
        ready(model, read_checkpoint(path), path, torch.device("cpu"))  # type: ignore[arg-type]
        assert str(path) not in mapped_files()
    path.write_bytes(b"")  # in place: a mapping would now end the process
    assert diverged(training.state_dict(), math.inf) is None


def test_results_are_no_mapping(tmp_path: Path) -> None:
    folder = ResultFolder(tmp_path)
    expressions = [Expression(Path("x.jpg"), "x", 0, "val", np.ones((1, 4)))]
    folder.write("00", expressions, [torch.arange(4.0)[None]], {})
    found = folder.read("00", expressions)
    assert str(tmp_path) not in mapped_files()
    folder.path("00").write_bytes(b"")
    assert found is not None
    assert found[0] is not None
    assert found[0].tolist() == [[0, 1, 2, 3]]


# ---- equal bytes


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_equal_content_gives_equal_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = {"model": {"a": torch.arange(5.0), "b": torch.ones(2)}, "epoch": 1}
    files.save_tensors(tmp_path / "one.pth", content)
    monkeypatch.setattr(os, "getpid", lambda: 7)
    files.save_tensors(tmp_path / "folder" / "another.name", copy.deepcopy(content))
    assert sha256(tmp_path / "one.pth") == sha256(tmp_path / "folder" / "another.name")
    content["model"]["a"][0] = 1
    files.save_tensors(tmp_path / "other.pth", content)
    assert sha256(tmp_path / "one.pth") != sha256(tmp_path / "other.pth")


def test_the_same_training_twice_leaves_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place, names = make_workplace(tmp_path), ["checkpoint_00.pth", "checkpoint_01.pth"]
    first, second, resumed = tmp_path / "first", tmp_path / "second run", tmp_path / "resumed"
    options = ("batch_size=16", "--max_steps", "5")
    train(place, first, *options)
    monkeypatch.setattr(os, "getpid", lambda: 7)
    train(place, second, *options)
    assert [sha256(first / name) for name in names] == [sha256(second / name) for name in names]
    shutil.copytree(first, resumed)
    (resumed / names[1]).unlink()
    train(place, resumed, *options, "--resume")
    assert sha256(first / names[1]) == sha256(resumed / names[1])


def test_a_disk_without_space_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint_00.pth"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    try:
        with pytest.raises(utils.UserError) as error:
            files.save_tensors(path, {"model": {str(i): torch.ones(20_000) for i in range(9)}})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(error.value).startswith(f"{path}: cannot be written, files may not be that large (0.72 MB are needed, ")
    assert not list(tmp_path.iterdir())


def test_digest_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "BLOCK", 10)
    path, seen = tmp_path / "file", set()
    for data in (b"", b"a", b"a" * 9, b"a" * 10, b"a" * 11, b"a" * 20, b"a" * 10 + b"b" * 10, b"b" * 10 + b"a" * 10):
        path.write_bytes(data)
        seen.add(files.file_digest(path))
    assert len(seen) == 8
    (tmp_path / "copy").write_bytes(path.read_bytes())
    assert files.file_digest(tmp_path / "copy") == files.file_digest(path)


@pytest.mark.parametrize("letter", [b"\0", b"x", b"\xff"])
def test_a_name_of_a_million_characters_in_the_old_format(tmp_path: Path, letter: bytes) -> None:
    """PyTorch searches its message about the name with a pattern whose time grows with the square of it."""
    path = tmp_path / "old.pth"
    torch.save({"model": OrderedDict(a=torch.ones(2))}, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes().replace(b"ccollections\n", b"c" + letter * 10**6 + b"\n"))
    with pytest.raises(CheckpointError, match=r"not a readable checkpoint \(not a file that PyTorch writes\)"):
        read_checkpoint(path)
