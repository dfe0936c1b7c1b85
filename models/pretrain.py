"""ALBEF in training: momentum teacher, feature queues, and the losses of one step.

ALBEF: Li et al., NeurIPS 2021, arXiv 2107.07651. AMC: Yang et al., CVPR 2023, arXiv 2206.15462.
"""

import copy
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import PretrainConfig
from dataset.text import Tokens
from dataset.transforms import normalise_batch
from dataset.vg import mlm_targets
from models import amc, losses, selfeq
from models.albef import ALBEF, build_encoders
from models.kernels import compiling
from models.vit import ViT
from models.xbert import FusionEncoder, KeyValue
from utils import all_gather


class Batch(NamedTuple):
    """One step's input: B samples of T tokens.

    image: (B, 3, r, r); input_ids, attention_mask: (B, T); mlm_input_ids: (B, T), masked; mlm_labels: (B, T), the
    original id at targets and -100 elsewhere; box_mask: (B, s, s) in [0, 1]; has_box: (B,) bool; mlm_targets: (K,),
    int64, where they are in the flattened labels; without it the model looks for them, which waits for the device.

    For SelfEQ, other_ids, other_mask: (B, U), the same in other words: a paraphrase, or in the relation epoch, which
    trains on paraphrases, the caption; has_other: (B,) bool, rows that have one.
    """

    image: Tensor
    input_ids: Tensor
    attention_mask: Tensor
    mlm_input_ids: Tensor
    mlm_labels: Tensor
    box_mask: Tensor
    has_box: Tensor
    mlm_targets: Tensor | None = None
    other_ids: Tensor | None = None
    other_mask: Tensor | None = None
    has_other: Tensor | None = None

    def to(self, device: torch.device) -> "Batch":
        """On a device; images and masks that travelled as uint8 become the numbers described above there."""
        moved = Batch._make(tensor if tensor is None else tensor.to(device, non_blocking=True) for tensor in self)
        if moved.image.dtype == torch.uint8:
            moved = moved._replace(image=normalise_batch(moved.image), box_mask=moved.box_mask.float())
        return moved

    def padded(self, max_tokens: int) -> "Batch":
        """With T and K filled up to a few sizes, at each of which a step is compiled once.

        T grows to the next of `compiling.token_sizes(max_tokens)`; K to a quarter of B * T, nearly always, or else to a
        half or all of it. What is filled in is no word, and no target: the first [CLS] never is one.
        """
        assert self.mlm_targets is not None
        rows, tokens = self.input_ids.shape
        more = next((size for size in compiling.token_sizes(max_tokens) if size >= tokens), tokens) - tokens
        row, place = self.mlm_targets // tokens, self.mlm_targets % tokens
        targets, positions = row * (tokens + more) + place, rows * (tokens + more)
        room = next(size for part in compiling.TARGET_PARTS if (size := -(-positions // part)) >= len(targets))
        return self._replace(
            input_ids=F.pad(self.input_ids, (0, more)),
            attention_mask=F.pad(self.attention_mask, (0, more)),
            mlm_input_ids=F.pad(self.mlm_input_ids, (0, more)),
            mlm_labels=F.pad(self.mlm_labels, (0, more), value=-100),
            mlm_targets=F.pad(targets, (0, room - len(targets))),
        )


class TextsRead(NamedTuple):
    """Text tokens (B, T, W): for contrast, for matching, and of the masked captions; None without MLM."""

    contrast: Tensor
    match: Tensor
    masked: Tensor | None


class TeacherOutput(NamedTuple):
    """By the momentum teacher: L2-normalised features (B, E), and vocabulary logits (K, V) at the MLM targets."""

    image: Tensor
    text: Tensor
    words: Tensor | None


class Encoders(NamedTuple):
    """The parts that student and teacher have each."""

    visual_encoder: ViT
    vision_proj: nn.Linear
    text_encoder: Any
    text_proj: nn.Linear


STUDENT_AND_TEACHER = Encoders._fields


class RoundedEncoders:
    """Encoders whose layers have weights of 16 bits already, as autocast would make them at each use.

    Autocast keeps what it has rounded for weights that are trained alone. The teacher's would be rounded in each pass,
    by a kernel each; here all of them are rounded at once, after `stale` was set. What autocast leaves alone is shared,
    not copied.
    """

    def __init__(self, exact: Encoders, dtype: torch.dtype) -> None:
        source = nn.ModuleList(exact)
        shared = {id(tensor): tensor for tensor in (*source.parameters(), *source.buffers())}
        self.exact, self.own = exact, Encoders(*copy.deepcopy(source, shared))
        self.weights: list[Tensor] = []
        self.rounded: list[Tensor] = []
        for module in (module for part in self.own for module in part.modules()):
            if isinstance(module, nn.Linear | nn.Conv2d):
                for name, weight in list(module.named_parameters(recurse=False)):
                    rounded = nn.Parameter(weight.to(dtype), requires_grad=False)
                    setattr(module, name, rounded)
                    self.weights.append(weight)
                    self.rounded.append(rounded)
        self.stale = False

    def refreshed(self) -> Encoders:
        """The encoders, with the weights that the exact ones have now."""
        if self.stale:
            torch._foreach_copy_(self.rounded, self.weights)
            self.stale = False
        for own, exact in zip(self.own, self.exact, strict=True):
            if own.training != exact.training:
                own.train(exact.training)
        return self.own

    def fits(self, dtype: torch.dtype) -> bool:
        """Whether this is for a type, and for the weights' device."""
        return self.rounded[0].dtype == dtype and self.rounded[0].device == self.weights[0].device


class Queues(NamedTuple):
    """The teacher's features of earlier steps, (E, Q) each."""

    image: Tensor
    text: Tensor


class PretrainModel(ALBEF):
    """ALBEF with its teacher and queues; `forward` gives the named losses of one step, `total` their weighted sum.

    The losses are `loss_mlm`, `loss_ita`, `loss_itm` and `loss_<name>` of each loss on the map (`amc.MAP_LOSSES`). With
    `add_gcam: False` those on the map are 0 and have no weight. `selfeq` adds `loss_similarity`, `loss_consistency`. In
    its relation epoch (`relation_file`) texts are paraphrases, and the teacher's features of captions are enqueued.

    Raises:
        ConfigError: sizes that do not fit; a loss on the map without a weight, or a weight without a loss.
    """

    image_queue: Tensor
    text_queue: Tensor
    queue_ptr_img: Tensor
    queue_ptr_txt: Tensor
    visual_encoder_m: ViT
    text_encoder_m: Any
    vision_proj_m: nn.Linear
    text_proj_m: nn.Linear
    compiled = False
    plain_losses: tuple[str, ...] = ("loss_mlm", "loss_ita", "loss_itm")

    def __init__(self, config: PretrainConfig) -> None:
        super().__init__(*self._build(config), config.temp)
        self.config = config
        self.loss_weights = dict.fromkeys(self.plain_losses, 1.0)
        if config.add_gcam:
            self.loss_weights |= amc.map_loss_weights(config.amc)
        if config.paraphrases:
            self.loss_weights |= selfeq.loss_weights(config.selfeq)
        for name in STUDENT_AND_TEACHER:
            setattr(self, f"{name}_m", copy.deepcopy(getattr(self, name)).requires_grad_(False))
        self.rounded_teacher: RoundedEncoders | None = None  # no part of the checkpoint
        self.register_load_state_dict_post_hook(lambda model, _: setattr(model, "rounded_teacher", None))
        embed_dim = self.vision_proj.out_features
        for name in ("image_queue", "text_queue"):
            self.register_buffer(name, F.normalize(torch.randn(embed_dim, config.queue_size), dim=0))
        for name in ("queue_ptr_img", "queue_ptr_txt"):
            self.register_buffer(name, torch.zeros(1, dtype=torch.long))

    @staticmethod
    def _build(config: PretrainConfig) -> tuple[ViT, FusionEncoder, int]:
        """Encoders, and the size of embeddings."""
        return *build_encoders(config, mlm_head=True), config.embed_dim

    def total(self, losses: Mapping[str, Tensor]) -> Tensor:
        """The weighted sum of the losses, which is trained: a scalar."""
        return sum((weight * losses[name] for name, weight in self.loss_weights.items()), start=torch.zeros(()))

    def checkpoint_activations(self, enable: bool = True) -> None:
        """Recompute the student's activations in the backward pass; the twice-differentiated layers keep theirs."""
        self.visual_encoder.set_grad_checkpointing(enable)
        self.text_encoder.checkpoint_activations = enable

    def compile_step(self, backend: str | Callable[..., Any] = "inductor") -> None:
        """Compile what `forward` computes with torch.compile, at the first batch of each size (`Batch.padded`).

        A step is two graphs: the image encoders, and all the rest. The second is compiled once per size. What cannot be
        compiled is an error. The teacher's update and the queues' stay as they are, and so do parameters' names. Call
        it when the model is on its device.
        """
        self.compiled = True
        for name in ("_see", "_losses"):
            setattr(self, name, compiling.whole(getattr(self, name), self.temp.device, backend))

    def forward(self, batch: Batch, alpha: float, update_teacher: bool = True) -> dict[str, Tensor]:
        """The named losses of one step, each a scalar: ITC, ITM and the losses on the map, MLM.

        Args:
            alpha: weight of the teacher's targets, ramped from 0 in epoch 0.
            update_teacher: move teacher towards student first; False in all but the first micro-batch of a step.
        """
        with torch.no_grad():
            self.temp.clamp_(0.001, 0.5)
        if update_teacher:
            self.update_teacher()

        if batch.mlm_targets is None:
            batch = batch._replace(mlm_targets=mlm_targets(batch.mlm_labels))
        teacher, queues = self._teacher_parts(batch.image.device.type), Queues(self.image_queue, self.text_queue)
        weight: float | Tensor = alpha
        if self.compiled:
            batch = batch.padded(self.config.max_tokens)
            weight = torch.full((), alpha, device=batch.image.device)  # a number would be a part of the graph
            queues = Queues(*(queue.clone() for queue in queues))  # the backward pass reads them, after `enqueue`
        images = self._see(batch.image, teacher)
        named, image_m, text_m = self._losses(*images, batch, teacher, queues, weight)
        self.enqueue(all_gather(image_m), all_gather(text_m))
        return named

    def _see(self, pixels: Tensor, teacher: Encoders) -> tuple[Tensor, Tensor]:
        """Image tokens (B, S, W) by student and teacher."""
        with torch.no_grad():
            tokens_m = teacher.visual_encoder(pixels)
        return self.visual_encoder(pixels), tokens_m

    def _losses(
        self,
        image_tokens: Tensor,
        image_tokens_m: Tensor,
        batch: Batch,
        parts: Encoders,
        queues: Queues,
        alpha: float | Tensor,
    ) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """The named losses, and the teacher's features (B, E) for the queues, of images and texts."""
        read = self._read(self.text_encoder, batch)
        images = self.text_encoder.image_keys_values(image_tokens)
        teacher = self._teacher(image_tokens_m, batch, parts)
        contrast = losses.contrastive_loss(
            self.image_feature(image_tokens),
            self.text_feature(read.contrast),
            teacher.image,
            teacher.text,
            *queues,
            self.temp,
            alpha,
        )
        positives, map_losses = self._positives(read.match, images, batch)
        negatives = self._negatives(read.match, images, batch.attention_mask, contrast)
        match_logits = torch.cat([positives, negatives])
        named = {} if read.masked is None else {"loss_mlm": self._mlm(read.masked, images, teacher.words, batch, alpha)}
        named |= {
            "loss_ita": contrast.loss,
            "loss_itm": losses.matching_loss(match_logits, positives=len(positives)),
            **map_losses,
        }
        captions = self._teacher_captions(batch, parts) if self.config.relation_file else teacher.text
        return named, teacher.image, captions

    @torch.no_grad()
    def _teacher_captions(self, batch: Batch, parts: Encoders) -> Tensor:
        """The teacher's features (B, E) of the captions, in a batch that trains on their paraphrases."""
        assert batch.other_ids is not None
        assert batch.other_mask is not None
        tokens = self.contrast_tokens(parts.text_encoder, Tokens(batch.other_ids, batch.other_mask))
        return F.normalize(parts.text_proj(tokens[:, 0]), dim=-1)

    @staticmethod
    def _read(encoder: FusionEncoder, batch: Batch) -> TextsRead:
        """Captions and masked captions, in one pass."""
        ids = torch.cat([batch.input_ids, batch.mlm_input_ids])
        text, masked = encoder(ids, batch.attention_mask.repeat(2, 1)).chunk(2)
        return TextsRead(text, text, masked)

    @torch.no_grad()
    def _teacher(self, image_tokens: Tensor, batch: Batch, parts: Encoders) -> TeacherOutput:
        encoder = parts.text_encoder
        read = self._read(encoder, batch)
        image = F.normalize(parts.vision_proj(image_tokens[:, 0]), dim=-1)
        text = F.normalize(parts.text_proj(read.contrast[:, 0]), dim=-1)
        if read.masked is None:
            return TeacherOutput(image, text, None)
        fused = encoder.fuse(read.masked, batch.attention_mask, encoder.image_keys_values(image_tokens))
        return TeacherOutput(image, text, encoder.mlm_logits(_at_targets(fused.tokens, batch)))

    def _teacher_parts(self, device: str) -> Encoders:
        """The momentum teacher, with rounded weights where autocast is on."""
        exact = Encoders(*(getattr(self, f"{name}_m") for name in STUDENT_AND_TEACHER))
        if not torch.is_autocast_enabled(device):
            return exact
        dtype = torch.get_autocast_dtype(device)
        if self.rounded_teacher is None or not self.rounded_teacher.fits(dtype):
            self.rounded_teacher = RoundedEncoders(exact, dtype)
        return self.rounded_teacher.refreshed()

    def _positives(self, text_tokens: Tensor, images: list[KeyValue], batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Match logits (B, 2) of the true pairs, and the losses on their GradCAM maps by the names of the log."""
        config, zero = self.config, torch.zeros((), device=text_tokens.device)
        named = {f"loss_{name}": zero for name in amc.MAP_LOSSES}
        if not (config.add_gcam or config.paraphrases):
            fused = self.text_encoder.fuse(text_tokens, batch.attention_mask, images, cls_only=True)
            return self.match_logits(fused.tokens), named
        other_tokens = self.text_encoder(batch.other_ids, batch.other_mask) if config.paraphrases else None
        # fp32 whatever the rest runs in: these gradients are tiny, and maps are divided by their maximum.
        with torch.autocast(text_tokens.device.type, enabled=False):
            images = [KeyValue(image.key.float(), image.value.float()) for image in images]
            logits, cam = self._explained(text_tokens, batch.attention_mask, images)
            if self.compiled:  # the map is a mean over tokens: over those that there were before they were padded
                cam = cam * (batch.input_ids.shape[1] / _unpadded(batch).sum())
            if config.add_gcam:
                named = amc.map_losses(cam, batch.box_mask, batch.has_box, config.amc)
            if other_tokens is not None:
                assert batch.other_mask is not None
                assert batch.has_other is not None
                _, other = self._explained(other_tokens, batch.other_mask, images)
                named |= selfeq.named_losses(cam, other, batch.has_other, config.selfeq)
        return logits, named

    def _explained(self, text_tokens: Tensor, mask: Tensor, images: list[KeyValue]) -> tuple[Tensor, Tensor]:
        """Match logits (B, 2) of the true pairs, and their GradCAM maps (B, h, w), which can be differentiated."""
        encoder, layer = self.text_encoder, self.config.amc.layer
        match = encoder.explain_match(text_tokens.float(), mask, images, layer, self.match_logits)
        return match.logits, self.explanation(match.attention, match.gradient, mask, None).maps

    def _negatives(
        self, text_tokens: Tensor, images: list[KeyValue], attention_mask: Tensor, contrast: losses.ContrastiveOutput
    ) -> Tensor:
        """Match logits (2B, 2): each text with a hard image, then each image with a hard text."""
        sharpness = self.config.negative_sharpness
        image_index = losses.hard_negatives(contrast.sim_t2i, sharpness)
        text_index = losses.hard_negatives(contrast.sim_i2t, sharpness)
        texts, mask = (torch.cat([own, own.index_select(0, text_index)]) for own in (text_tokens, attention_mask))
        fused = self.text_encoder.fuse(texts, mask, images, image_index, cls_only=True)
        return self.match_logits(fused.tokens)

    def _mlm(
        self,
        masked_tokens: Tensor,
        images: list[KeyValue],
        teacher_words: Tensor | None,
        batch: Batch,
        alpha: float | Tensor,
    ) -> Tensor:
        """Masked language modelling with the image, against the words and the teacher's prediction."""
        assert teacher_words is not None
        encoder, labels = self.text_encoder, _at_targets(batch.mlm_labels, batch)
        tokens = encoder.fuse(masked_tokens, batch.attention_mask, images).tokens
        if self.config.mlm_distill_axis == "vocabulary":  # needs no other position than the targets
            return losses.mlm_loss(encoder.mlm_logits(_at_targets(tokens, batch)), labels, teacher_words, alpha)
        logits = encoder.mlm_logits(tokens)
        scores = logits.float()
        if self.compiled:
            scores = scores.masked_fill(~_unpadded(batch)[:, None], -torch.inf)
        distilled = _at_targets(scores.log_softmax(dim=1), batch)
        return losses.mlm_loss(_at_targets(logits, batch), labels, teacher_words, alpha, distilled)

    @torch.no_grad()
    def update_teacher(self) -> None:
        """p_m = momentum * p_m + (1 - momentum) * p, for every parameter of the teacher (ALBEF, section 3.3)."""
        for name in STUDENT_AND_TEACHER:
            student, teacher = getattr(self, name), getattr(self, f"{name}_m")
            torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1 - self.config.momentum)
        if self.rounded_teacher is not None:
            self.rounded_teacher.stale = True

    @torch.no_grad()
    def copy_teacher(self) -> None:
        """Start the teacher as a copy of the student."""
        for name in STUDENT_AND_TEACHER:
            getattr(self, f"{name}_m").load_state_dict(getattr(self, name).state_dict())
        self.rounded_teacher = None

    @torch.no_grad()
    def enqueue(self, image_features: Tensor, text_features: Tensor) -> None:
        """Put features (n, E) of all processes into the queues, over the oldest, wrapping at the end."""
        size = self.image_queue.shape[1]
        offsets = torch.arange(len(image_features), device=image_features.device)[-size:]
        pairs = (
            (self.image_queue, self.queue_ptr_img, image_features),
            (self.text_queue, self.queue_ptr_txt, text_features),
        )
        for queue, pointer, features in pairs:
            queue[:, (pointer + offsets) % size] = features[-size:].t().to(queue.dtype)
            pointer.copy_((pointer + len(features)) % size)


def _at_targets(values: Tensor, batch: Batch) -> Tensor:
    """(B, T, ...) -> (K, ...), the values at the MLM targets."""
    assert batch.mlm_targets is not None
    return values.flatten(0, 1).index_select(0, batch.mlm_targets)


def _unpadded(batch: Batch) -> Tensor:
    """(T,) bool: the positions that the batch had before `Batch.padded`, as many as its longest text."""
    return batch.attention_mask.any(dim=0)
