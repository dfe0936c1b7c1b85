"""torch.compile as the training step needs it: whole functions, at fixed sizes, with an error for what it cannot do."""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from models.kernels.onednn import product_pass
from utils import UserError

TOKEN_SIZES = (8, 16, 25, 32, 64, 128, 256, 512)  # what captions are padded to
TARGET_PARTS = (4, 2, 1)  # and MLM targets: to this part of all positions


def token_sizes(longest: int) -> Iterator[int]:
    """The numbers of tokens, rising to `longest`, at each of which a step is compiled once."""
    yield from (size for size in TOKEN_SIZES if size < longest)
    yield longest


def whole(
    function: Callable[..., Any], device: torch.device, backend: str | Callable[..., Any] = "inductor"
) -> Callable[..., Any]:
    """The function compiled as one graph for each set of shapes, when it is first called with them.

    The call raises `UserError` where that cannot be done. On the CPU, inductor multiplies through oneDNN too.
    """
    dynamo: Any = torch._dynamo.config
    dynamo.cache_size_limit = max(dynamo.cache_size_limit, len(TOKEN_SIZES) * len(TARGET_PARTS))
    dynamo.optimize_ddp = False  # it would cut graphs where DistributedDataParallel's buckets of gradients end
    options: dict[str, Any] = {}
    if backend == "inductor" and device.type == "cpu" and (found := product_pass()):
        options["options"] = {"post_grad_custom_post_pass": found}
    compiled = torch.compile(function, fullgraph=True, dynamic=False, backend=backend, **options)

    def call(*args: Any) -> Any:
        try:
            return compiled(*args)
        except torch._dynamo.exc.TorchDynamoException as error:
            raise UserError(f"--compile: PyTorch cannot compile this step; leave the option out: {error}") from error

    return call
