"""The one door to a model: what evaluation, `ground()`, demo, page, TensorBoard and figures ask of it.

`models.albef.ALBEF` is behind it; another model is another class with these members, and nothing else changes.

Shapes: N images, B texts, T tokens, H heads, a grid of h x w image patches.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from dataset.text import Tokens
from models import amc
from utils import UserError

# What a map explains, and which layers' attention it is made of. "itm": the match logit; "itc": the similarity.
MODES = {"itm": "fusion layers", "itc": "image encoder's blocks"}


class LayerError(UserError):
    """A layer that the model cannot explain."""


class Explanation(NamedTuple):
    """Why a model gave B texts their scores: what GradCAM maps are made of. All detached, on the model's device.

    Args:
        attention: (B, H, T, h * w), probabilities from T queries to the image patches; T is 1 where the query is the
            image's own CLS token.
        gradient: (B, H, T, h * w), d(score) / d(attention).
        token_mask: (B, T), 1 for a token of the text and 0 for padding; None where the queries are no tokens of the
            text.
        match: (B,), probability that text and image match; None where that is not what was explained.
        grid: (h, w).
        over_padding: whether a map is a mean over all T, as ALBEF's; else over the tokens of `token_mask`, which may
            leave out the first.
    """

    attention: Tensor
    gradient: Tensor
    token_mask: Tensor | None
    match: Tensor | None
    grid: tuple[int, int]
    over_padding: bool = True

    @property
    def maps(self) -> Tensor:
        """GradCAM maps, float32 (B, h, w), at least 0."""
        mask = torch.ones_like(self.attention[:, 0, :, 0]) if self.token_mask is None else self.token_mask
        cam = amc.gradcam(self.attention, self.gradient, mask, self.grid)
        return cam if self.over_padding else cam * (mask.shape[1] / mask.sum(dim=1).clamp(min=1))[:, None, None]

    @property
    def token_maps(self) -> Tensor | None:
        """The map of each token, float32 (B, T, h, w), 0 for padding; None where the queries are no tokens."""
        if self.token_mask is None:
            return None
        return amc.token_gradcam(self.attention, self.gradient, self.token_mask, self.grid)


class ExplainableModel(Protocol):
    """A model that can say where it looked. The last four members are those of `nn.Module`."""

    @property
    def image_res(self) -> int:
        """Height and width of its input images, in pixels."""

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of image patches: the size of a map."""

    @property
    def max_tokens(self) -> int:
        """The longest text that it can read, [CLS] included."""

    def layers(self, mode: str) -> range:
        """The layers whose attention can be explained in a mode of `MODES`."""

    def encode(
        self, images: Tensor, precision: torch.dtype = torch.float32, only: tuple[str, int] | None = None
    ) -> Any:
        """Encode images once, for any number of texts, modes and layers.

        Args:
            images: (N, 3, image_res, image_res), normalised, on the model's device.
            precision: of the image encoder; everything after it is computed in float32.
            only: the one (mode, layer) that will be asked for; what others need is then not computed.

        Returns:
            the images as the model keeps them: to be given back to `explain` and `match`, not to be looked into.
        """

    def explain(
        self, encoded: Any, image_index: Sequence[int] | None, tokens: Tokens, mode: str, layer: int
    ) -> Explanation:
        """Attention of `layer`, and the gradient of each text's score with respect to it.

        The score is the match logit in mode "itm", the image-text similarity in mode "itc".

        Args:
            encoded: from `encode`.
            image_index: for each of B texts, its image among the N; None: there is one image, and all texts are about
                it. Numbers of the host, so that a model that decides by them need not wait for a GPU.
            tokens: B texts, on the model's device.

        Raises:
            LayerError: `layer` is none of `layers(mode)`.
        """

    def match(self, encoded: Any, image_index: Sequence[int] | None, tokens: Tokens) -> Tensor:
        """The probability that each text matches its image, (B,); arguments as in `explain`, mode "itm"."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def modules(self) -> Iterator[nn.Module]: ...

    def eval(self) -> Any: ...


def check_layer(model: ExplainableModel, mode: str, layer: int) -> None:
    """Raise `LayerError` unless `layer` is one of `model.layers(mode)`."""
    known = model.layers(mode)
    if layer not in known:
        raise LayerError(f"--block_num {layer}: the {MODES[mode]} are {known.start} to {known[-1]}")
