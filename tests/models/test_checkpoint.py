"""State dicts: what is converted, started afresh or left out when one is loaded, and that report and errors say so."""

import itertools
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from models.albef import ALBEF
from models.checkpoint import CheckpointError, check_resumable, diverged, load_weights, read_checkpoint, student_of
from models.pretrain import PretrainModel
from tests.models.states import State, assert_holds, load, resized, state_of

TinyConfig = Callable[..., Any]
pytestmark = pytest.mark.usefixtures("one_thread")


# ---- names


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


# ---- position embeddings, queues, teacher


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


@pytest.mark.parametrize("key", ["visual_encoder_m.extra", "text_encoder.cls.seq_relationship.weight"])
def test_unexpected_key_of_a_part_that_the_model_has_is_an_error(
    training: PretrainModel, evaluation: ALBEF, key: str
) -> None:
    """Leaving the whole part out is for evaluation, which has none of it."""
    state = state_of(training) | {key: torch.ones(1)}
    load_weights(evaluation, state, "checkpoint.pth")
    with pytest.raises(CheckpointError, match=rf"\n  unexpected: {re.escape(key)}$"):
        load_weights(training, state, "checkpoint.pth")


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


@pytest.mark.parametrize(
    ("keys", "shapes"),
    [
        (
            ["visual_encoder.pos_embed"],
            [(), (5,), (1, 1, 8), (1, 7, 8), (2, 17, 8), (1, 17, 9), (1, 17, 8, 1), (1, 0, 8)],
        ),
        (["image_queue", "text_queue"], [(), (6,), (4, 6, 1), (4, 0, 2)]),
        (["image_queue"], [(3, 6), (5, 6)]),  # only the length of a queue may differ: the features would be others
        (["queue_ptr_img"], [(2,), (1, 1, 3), (0,)]),
    ],
)
def test_tensors_of_a_shape_that_nothing_explains(
    training: PretrainModel, keys: list[str], shapes: list[tuple[int, ...]]
) -> None:
    for shape in shapes:
        state = state_of(training) | {key: torch.zeros(shape, dtype=training.state_dict()[key].dtype) for key in keys}
        if keys == ["queue_ptr_img"]:  # one pointer for both, as the release has it
            del state["queue_ptr_txt"]
            state["queue_ptr"] = state.pop("queue_ptr_img")
        with pytest.raises(CheckpointError, match=rf"of another shape: {re.escape(keys[0])} is "):
            load_weights(training, state, "odd.pth")


def test_positions_that_do_not_count_are_damage(evaluation: ALBEF) -> None:
    key = "text_encoder.bert.embeddings.position_ids"
    state = state_of(evaluation)
    load_weights(evaluation, state | {key: state[key].half()}, "half.pth")  # `.half()` of a whole state dict
    state[key] = state[key].flip(1)
    with pytest.raises(CheckpointError, match=rf"odd\.pth: {re.escape(key)} does not count from 0"):
        load_weights(evaluation, state, "odd.pth")


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


# ---- numbers that are none


def test_the_first_weight_that_is_not_sound(evaluation: ALBEF) -> None:
    state = state_of(evaluation)
    assert diverged(state) is diverged(state, math.inf) is None
    state["temp"] = torch.tensor([-3e6, 2.0])
    assert diverged(state) == "temp reaches from -3e+06 to 2"
    assert diverged(state, math.inf) is None
    for value in (math.nan, math.inf, -math.inf):
        state["itm_head.weight"][0, 1] = value
        assert diverged(state, math.inf) == "itm_head.weight holds NaN or infinity"
    state["visual_encoder.blocks.1.norm1.bias"][2] = math.nan
    assert diverged(state, math.inf) == "visual_encoder.blocks.1.norm1.bias holds NaN or infinity"


# ---- students, and resuming


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_student_starts_another_training(training: PretrainModel, dtype: torch.dtype) -> None:
    state = state_of(training)
    student = student_of({f"module.{key}": value for key, value in state.items()}, "x.pth", dtype)
    assert not [key for key in student if "_m." in key or "queue" in key or ".cls.predictions.decoder." in key]
    assert {value.dtype for value in student.values()} == {dtype}
    report = load_weights(training, dict(student), "student")
    assert len(report.fresh) == 2  # queues and teacher
    assert report.converted == ["2 tensors of the MLM head, tied to others"]
    for key, value in training.state_dict().items():
        if "_m." not in key and "queue" not in key:
            assert torch.equal(value, state[key].to(dtype).to(value.dtype)), key
    assert torch.equal(training.vision_proj_m.weight, training.vision_proj.weight)


def test_a_head_that_is_not_tied_stays_whole(training: PretrainModel) -> None:
    state = state_of(training)
    state["text_encoder.cls.predictions.decoder.weight"] = state["text_encoder.cls.predictions.decoder.weight"] + 1
    assert "text_encoder.cls.predictions.decoder.weight" in student_of(state, "x.pth", torch.float32)


def test_what_half_precision_cannot_hold(training: PretrainModel) -> None:
    state = state_of(training)
    state["vision_proj.bias"][1] = 7e4
    student_of(state, "x.pth", torch.float32)
    with pytest.raises(CheckpointError, match=r"x\.pth: not .*, vision_proj\.bias holds NaN or infinity in float16"):
        student_of(state, "x.pth", torch.float16)


RESUMABLE: dict[str, Any] = {"model": {}, "optimizer": {"state": {}}, "lr_scheduler": {}, "epoch": 3}


def test_what_can_be_resumed() -> None:
    for scaler in ({}, {"scaler": {}}, {"scaler": None}):
        check_resumable(RESUMABLE | scaler, "good.pth")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *itertools.product(["epoch"], ["abc", None, 1.0, True, -1, torch.tensor(1)]),
        *itertools.product(["optimizer", "lr_scheduler", "scaler"], [[], "cosine", torch.ones(2)]),
        *itertools.product(["optimizer", "lr_scheduler"], [None]),
    ],
)
def test_what_cannot_be_resumed(key: str, value: Any) -> None:
    with pytest.raises(CheckpointError, match=rf"^odd\.pth: cannot resume, its '{key}' is .*; drop --resume"):
        check_resumable(RESUMABLE | {key: value}, "odd.pth")
