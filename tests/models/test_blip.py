"""BLIP behind the door, against transformers' own model and plain autograd through its eager attention."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from config import ConfigError, PretrainConfig
from dataset.text import Tokens, load_tokenizer
from grounding.load import OpenedModel, open_model, vocabulary_for
from model_sizes import load_bert_config
from models import amc, losses, selfeq
from models.albef import build_albef
from models.blip import Blip, PretrainBlip, build_blip
from models.checkpoint import CheckpointError, load_weights
from models.interface import LayerError
from models.pretrain import Batch
from tests.models.plain import close
from tests.small_blip import SIZES, WORDS, transformers_blip, write_folder
from utils import UserError

pytestmark = pytest.mark.usefixtures("one_thread")
IDS = torch.tensor([[2, 7, 8, 9, 10], [2, 11, 12, 0, 0], [2, 5, 6, 7, 0]])
TOKENS = Tokens(IDS, (IDS > 0).long())
SELFEQ = {"weight_similarity": 1.0, "weight_consistency": 0.5}
LAYERS, SEP, ENC = -1 + SIZES["text_config"]["num_hidden_layers"], 3, WORDS + 1
# What transformers' BLIP reads: for contrast with [CLS] first, for matching with [ENC].
TEXT = torch.tensor([[2, 7, 8, 9, 10, SEP], [2, 11, 12, SEP, 0, 0], [2, 5, 6, 7, SEP, 0]])
MATCH = torch.cat([torch.full((3, 1), ENC), TEXT[:, 1:]], dim=1)
SEEN = (TEXT > 0).long()


@pytest.fixture(scope="module")
def own() -> Any:
    """Transformers' model."""
    return transformers_blip()


@pytest.fixture(scope="module")
def opened(own: Any, tmp_path_factory: pytest.TempPathFactory) -> OpenedModel:
    return open_model(write_folder(tmp_path_factory.mktemp("blip"), own), device="cpu")


@pytest.fixture(scope="module")
def model(opened: OpenedModel) -> Blip:
    assert isinstance(opened.model, Blip)
    return opened.model


def pictures(count: int = 3) -> Tensor:
    return torch.randn(count, 3, 48, 48, generator=torch.Generator().manual_seed(5))


def seen_by(dropout: Any) -> tuple[list[Tensor], Any]:
    """The probabilities that enter a dropout, as leaves of no graph before them; and the hook's handle."""
    seen: list[Tensor] = []

    def see(_: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        probabilities = inputs[0] if inputs[0].requires_grad else inputs[0].detach().requires_grad_()
        seen.append(probabilities)
        return (probabilities,)

    return seen, dropout.register_forward_pre_hook(see)


def match_of(own: Any, image: Tensor, text: Tensor, layer: int, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, and cross-attention and gradient (B, H, T, patches), through all of transformers' model."""
    seen, hook = seen_by(own.text_encoder.encoder.layer[layer].crossattention.self.dropout)
    logits = own(text, image, attention_mask=(text > 0).long()).itm_score
    hook.remove()
    (gradient,) = torch.autograd.grad(logits[:, 1].sum(), seen[0], **options)
    return logits, seen[0][..., 1:], gradient[..., 1:]


def same(found: Tensor, expected: Tensor) -> None:
    assert expected.max() > 0
    torch.testing.assert_close(found / expected.max(), expected / expected.max(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("layer", range(LAYERS))
def test_match_maps_equal_transformers(own: Any, model: Blip, layer: int) -> None:
    images, index = pictures(), [1, 1, 0]
    found = model.explain(model.encode(images, only=("itm", layer)), index, TOKENS, "itm", layer)
    assert found.token_maps is not None
    assert found.match is not None
    for row, image in enumerate(index):  # one expression at a time, without padding
        text = MATCH[row : row + 1, : int(SEEN[row].sum())]
        logits, attention, gradient = match_of(own, images[image : image + 1], text, layer)
        tokens = (attention * gradient.clamp(min=0)).mean(dim=1)[0, 1:-1]  # neither [ENC] nor [SEP]
        same(found.maps[row].flatten(), tokens.mean(dim=0))
        same(found.token_maps[row, 1 : 1 + len(tokens)].flatten(1), tokens)
        torch.testing.assert_close(found.match[row], logits.softmax(dim=1)[0, 1], rtol=0, atol=1e-5)
        assert not found.token_maps[row, 0].any()
        assert not found.token_maps[row, 1 + len(tokens) :].any()
    close(model.match(model.encode(images), index, TOKENS), found.match)
    shared = model.explain(model.encode(images[:1]), None, TOKENS, "itm", layer)
    same(shared.maps, model.explain(model.encode(images), [0, 0, 0], TOKENS, "itm", layer).maps)


@pytest.mark.parametrize("block", [0, 1])
def test_similarity_maps_equal_transformers(own: Any, model: Blip, block: int) -> None:
    images, index = pictures(), [1, 1, 0]
    found = model.explain(model.encode(images, only=("itc", block)), index, TOKENS, "itc", block)
    again = model.explain(model.encode(images), index, TOKENS, "itc", block)
    assert torch.equal(found.maps, again.maps)
    for row, image in enumerate(index):
        seen, hook = seen_by(own.vision_model.encoder.layers[block].self_attn.dropout)
        text, mask = TEXT[row : row + 1], SEEN[row : row + 1]
        score = own(text, images[image : image + 1], use_itm_head=False, attention_mask=mask).itm_score
        hook.remove()
        (gradient,) = torch.autograd.grad(score.sum() / model.temp, seen[0])
        same(found.maps[row].flatten(), (seen[0] * gradient.clamp(min=0)).mean(dim=1)[0, 0, 1:])
        similarity = (
            model.image_feature(model.visual_encoder(images[image : image + 1]))
            * model.text_feature(model.contrast_tokens(model.text_encoder, TOKENS))[row]
        )
        torch.testing.assert_close(similarity.sum(), score[0, 0].detach(), rtol=0, atol=1e-5)


def test_layers_sizes_and_what_a_folder_says(opened: OpenedModel, model: Blip) -> None:
    assert (model.layers("itm"), model.layers("itc")) == (range(2), range(2))
    assert (model.image_res, model.grid, model.max_tokens) == (48, (3, 3), 32)
    assert opened.config.block_num == 6  # LAVIS' layer, which so small a model lacks
    with pytest.raises(LayerError, match="--block_num 6: the fusion layers are 0 to 1"):
        opened.explainer()
    assert not any(parameter.requires_grad for parameter in model.parameters())


# ---- training


def training_config(tmp_path: Path, **keys: Any) -> PretrainConfig:
    (tmp_path / "config.json").write_text(json.dumps(SIZES))
    sizes = {"model": "blip", "bert_config": str(tmp_path / "config.json"), "image_res": 48, "image_root": ""}
    rest = {"train_file": [], "queue_size": 6, "mask_size": 12, "amc": {"layer": 1}}
    return PretrainConfig.model_validate({**sizes, **rest, **keys})


@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("recompute", [False, True])
def test_a_steps_gradients_equal_plain_autograd(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layer: int, recompute: bool
) -> None:
    margins = {"layer": layer, "margin_mean": 2.0, "margin_max": 2.0}  # so large that every hinge is open
    model = PretrainBlip(training_config(tmp_path, amc=margins, selfeq=SELFEQ))
    own = transformers_blip().requires_grad_(True)
    load_weights(model, own.state_dict(), "own")
    model.checkpoint_activations(recompute)
    images, has_box = pictures(), torch.tensor([True, False, True])
    box_mask = torch.zeros(3, 12, 12)
    box_mask[0, :4, 2:9] = box_mask[1, 4:, :4] = box_mask[2, 2:7, 1:8] = 1
    labels = torch.full_like(IDS, -100)
    drawn = [torch.tensor([1, 2, 0]), torch.tensor([2, 2, 0])]  # an image for each text, a text for each image
    draws = iter(drawn)
    monkeypatch.setattr("models.losses.hard_negatives", lambda *_: next(draws))
    queues = model.image_queue.clone(), model.text_queue.clone()
    order, has_other = [2, 0, 1], torch.tensor([True, True, False])  # each text's paraphrase is another's text
    other = {"other_ids": IDS[order], "other_mask": TOKENS.attention_mask[order], "has_other": has_other}
    batch = Batch(images, *TOKENS, IDS, labels, box_mask, has_box, **other)
    found = model(batch, alpha=0.4, update_teacher=False)
    maps = ["loss_cam1", "loss_cam2", "loss_similarity", "loss_consistency"]
    assert list(found) == ["loss_ita", "loss_itm", *maps]
    assert list(model.loss_weights) == list(found)
    model.total(found).backward()

    def features(of: Any) -> tuple[Tensor, Tensor]:
        image, text = of.vision_model(images)[0][:, 0], of.text_encoder(TEXT, attention_mask=SEEN)[0][:, 0]
        return F.normalize(of.vision_proj(image), dim=-1), F.normalize(of.text_proj(text), dim=-1)

    teacher = [feature.detach() for feature in features(own)]  # a copy of the student, as no file had one
    contrast = losses.contrastive_loss(*features(own), *teacher, *queues, torch.tensor(0.07), 0.4)

    def explained(text: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        logits, attention, gradient = match_of(own, images, text, layer, create_graph=True)
        words = mask.clone()
        words[:, 0] = words[torch.arange(3), mask.sum(dim=1) - 1] = 0
        cam = (attention * gradient.clamp(min=0)).mean(dim=1) * words[..., None]
        return logits, (cam.sum(dim=1) / words.sum(dim=1, keepdim=True)).view(3, 3, 3)

    (logits, raw), (_, paraphrase) = explained(MATCH, SEEN), explained(MATCH[order], SEEN[order])
    cam = amc.resize(amc.normalise_map(raw), 12)
    pairs = [(drawn[0], torch.arange(3)), (torch.arange(3), drawn[1])]
    negatives = [own(MATCH[t], images[i], attention_mask=SEEN[t]).itm_score for i, t in pairs]
    expected = {
        "loss_ita": contrast.loss,
        "loss_itm": losses.matching_loss(torch.cat([logits, *negatives]), 3),
        "loss_cam1": amc.mean_margin_loss(cam, box_mask, has_box, 2.0),
        "loss_cam2": amc.max_margin_loss(cam, box_mask, has_box, 2.0),
        **selfeq.named_losses(raw, paraphrase, has_other, model.config.selfeq),
    }
    assert all(value > 0 for value in expected.values())
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5, msg=name)
    torch.stack([model.loss_weights[name] * value for name, value in expected.items()]).sum().backward()
    gradients = {name.replace("vision_model.", "visual_encoder."): p.grad for name, p in own.named_parameters()}
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad and name != "temp"}
    assert gradients.keys() == trained.keys()
    largest = max(float(gradient.abs().max()) for gradient in gradients.values())
    for name, gradient in gradients.items():
        torch.testing.assert_close(trained[name], gradient, rtol=1e-3, atol=1e-5 * largest, msg=name)


def test_the_relation_epoch_enqueues_captions(tmp_path: Path, own: Any) -> None:
    """SelfEQ's: the batch trains on paraphrases, and the captions are the other texts."""
    model = PretrainBlip(training_config(tmp_path, relation_file=["x.json"], add_gcam=False, amc={"layer": 1}))
    load_weights(model, own.state_dict(), "own")
    paraphrases, labels = TOKENS.input_ids[[1, 2, 0]], torch.full_like(IDS, -100)
    texts = Tokens(paraphrases, (paraphrases > 0).long())
    rest = torch.zeros(3, 12, 12), torch.zeros(3, dtype=torch.bool)
    model(Batch(pictures(), *texts, paraphrases, labels, *rest, None, *TOKENS, torch.ones(3)), 0.4, False)
    captions = F.normalize(own.text_proj(own.text_encoder(TEXT, attention_mask=SEEN)[0][:, 0]), dim=-1)
    close(model.text_queue[:, :3].T, captions)


def test_what_it_cannot_do_is_an_error(tmp_path: Path, own: Any) -> None:
    with pytest.raises(ConfigError, match=r"amc\.layer is 2; the fusion layers are 0 to 1"):
        PretrainBlip(training_config(tmp_path, amc={"layer": 2}))
    with pytest.raises(ConfigError, match="image_res is 40, which its patch_size of 16 does not divide"):
        PretrainBlip(training_config(tmp_path, image_res=40))
    with pytest.raises(ConfigError, match="vit_init"):
        PretrainBlip(training_config(tmp_path, vit_init="deit.pth"))


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("vision_config", "num_hidden_layers", 2**31),  # would be built for hours
        ("vision_config", "patch_size", 0),
        ("vision_config", "image_size", 10**20),
        ("text_config", "num_hidden_layers", 2**31),
        ("text_config", "vocab_size", 10**20),
        ("text_config", "sep_token_id", 10**20),
        ("vision_config", "hidden_act", "nonsense"),
    ],
)
def test_sizes_that_no_model_has(tmp_path: Path, part: str, key: str, value: Any) -> None:
    config = training_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**SIZES, part: SIZES[part] | {key: value}}))
    with pytest.raises(ConfigError, match=rf"config\.json: .*{'BLIP' if key == 'hidden_act' else key}"):
        build_blip(config)


# ---- weights


def test_weights_of_torch_and_of_other_positions(tmp_path: Path, own: Any, model: Blip) -> None:
    folder = write_folder(tmp_path / "torch", own, safetensors=False)
    state = torch.load(folder / "pytorch_model.bin", weights_only=True)
    state["text_encoder.embeddings.position_ids"] = torch.arange(33)[None]  # as in files of older versions
    torch.save(state, folder / "pytorch_model.bin")
    again = open_model(folder, device="cpu")
    assert "temperature" in str(again.report)
    assert "position ids" in str(again.report)
    state = model.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in again.model.state_dict().items())
    larger = open_model(folder, device="cpu", overrides=["image_res=64"])
    assert "10 to 17 tokens" in str(larger.report)
    assert larger.model.grid == (4, 4)
    (folder / "preprocessor_config.json").write_text('{"image_mean": [0.48145466, 0.4578275, 0.40821073]}')
    open_model(folder, device="cpu")
    (folder / "preprocessor_config.json").write_text('{"image_std": [0.5, 0.5, 0.5]}')
    with pytest.raises(CheckpointError, match=r"image_std is \[0.5, 0.5, 0.5\]"):
        open_model(folder, device="cpu")


@pytest.mark.parametrize(
    ("part", "key", "value", "message"),
    [
        ("text_config", "sep_token_id", None, "sep_token_id is None, no id of the vocabulary"),
        ("text_config", "sep_token_id", 102, r"\[SEP\] has the id 3, and by the model's config\.json 102"),  # BERT's
        ("text_config", "pad_token_id", 1, r"\[PAD\] has the id 0, and by the model's config\.json 1"),
        ("text_config", "bos_token_id", ENC, r"bos_token_id is the last of the vocabulary, which is \[ENC\] in BLIP"),
        ("text_config", "vocab_size", WORDS, rf"{WORDS} word pieces, and .*config\.json says {WORDS - 2}"),
        ("text_config", "hidden_act", "relu", "key 'hidden_act'"),
        ("vision_config", "num_attention_heads", 5, "vision_config's hidden_size is 12, which its num_attention_heads"),
    ],
)
def test_a_config_that_contradicts(own: Any, tmp_path: Path, part: str, key: str, value: Any, message: str) -> None:
    folder = write_folder(tmp_path, own)
    config = json.loads(json.dumps(SIZES))
    config[part][key] = value
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        open_model(folder, device="cpu")


def test_ids_of_a_tokenizer_json(own: Any, model: Blip, tmp_path: Path) -> None:
    """It may have BLIP's two words after its own; then [ENC] must be the last."""
    folder = write_folder(tmp_path, own)
    for added in (["[DEC]", "[ENC]"], ["[ENC]", "[DEC]"]):
        pieces = load_tokenizer(str(folder)).pieces
        pieces.add_special_tokens(added)
        (folder / "other").mkdir(exist_ok=True)
        pieces.save(str(folder / "other" / "tokenizer.json"))
        if added[1] == "[ENC]":
            again = open_model(folder, text_encoder=str(folder / "other"), device="cpu")
            assert again.tokenizer.vocab_size == WORDS
        else:
            with pytest.raises(UserError, match=rf"json: \[ENC\] has the id {WORDS}, and by the .* {WORDS + 1}"):
                open_model(folder, text_encoder=str(folder / "other"), device="cpu")


@pytest.mark.parametrize("stated", [True, False], ids=["as released", "defaults"])
def test_ids_of_the_released_config(bert_vocab: Path, tmp_path: Path, stated: bool) -> None:
    text = {"vocab_size": 30524, "bos_token_id": 30522, "eos_token_id": 2, "pad_token_id": 0, "sep_token_id": 102}
    text |= {"num_attention_heads": 12, "is_decoder": True, "model_type": "blip_text_model", "torch_dtype": None}
    released = {"model_type": "blip", "text_config": text if stated else {}, "vision_config": {}}
    (tmp_path / "config.json").write_text(json.dumps(released))
    bert = load_bert_config(tmp_path / "config.json")
    assert bert.special_ids == {"[PAD]": 0, "[SEP]": 102, "[ENC]": 30523}
    assert bert.explained_layers == range(11)
    assert vocabulary_for(str(tmp_path / "config.json"), str(bert_vocab.parent)).vocab_size == 30522


@pytest.mark.parametrize("change", ["missing", "unexpected", "shape"])
def test_weights_that_do_not_fit(own: Any, tmp_path: Path, change: str) -> None:
    state, key = own.state_dict(), "text_encoder.encoder.layer.1.crossattention.self.key.weight"
    value = state.pop(key)
    if change == "unexpected":
        state |= {key: value, "text_encoder.pooler.dense.weight": value}
    if change == "shape":
        state[key] = value[:, 1:]
    with pytest.raises(CheckpointError, match=change):
        load_weights(build_blip(training_config(tmp_path)), state, "file")


def test_a_model_and_a_file_of_two_kinds(own: Any, tmp_path: Path, tiny_config: Callable[..., Any]) -> None:
    with pytest.raises(CheckpointError, match=r"holds BLIP of transformers .*model: blip"):
        load_weights(build_albef(tiny_config()), own.state_dict(), "file")
    with pytest.raises(ConfigError, match=r"model is blip, and .* is another model's"):
        build_blip(training_config(tmp_path, bert_config=str(tiny_config().bert_config)))
    with pytest.raises(ConfigError, match=r"model is albef, and .*config.json is another model's"):
        build_albef(training_config(tmp_path, model="albef"))
