"""A CUDA device without one: the programs' own lines on fake tensors, which have shape, dtype and device, no numbers.

PyTorch's `FakeTensorMode` computes what a kernel would return without computing it, refuses tensors of two devices in
one operation, and raises where a program asks for a number or for a shape that depends on one: on a GPU, that is where
the host waits for the device.
"""

import argparse
import contextlib
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import get_gradient_edge
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

import Pretrain
from config import PretrainConfig
from dataset import transforms
from models.pretrain import Batch, PretrainModel
from optim import create_optimizer
from runs import BEGINNING
from scheduler import create_scheduler
from training.log import TrainingLog
from training.parts import prepare_model

Module = TypeVar("Module", bound=nn.Module)
DEVICE = torch.device("cuda", 0)
META = torch.device("meta")
BLOCK = 512  # bytes: PyTorch's allocator gives memory of the device in multiples of it


class Memory(TorchDispatchMode):
    """Follows the tensors that operations return, as long as each one's storage lives.

    Args:
        device: the type of device that is watched.

    Attributes:
        held, peak: bytes now, and at most since the start or `reset`; scratch space inside a kernel is not among them.
        dtypes: of all tensors of more than one element.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device
        self.held = self.peak = 0
        self.dtypes: set[torch.dtype] = set()
        self.storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def reset(self) -> None:
        """Begin a new peak from what is held now."""
        self.peak = self.held

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.device.type == self.device:
                self._follow(tensor)
        return result

    def _follow(self, tensor: Tensor) -> None:
        if tensor.numel() > 1:
            self.dtypes.add(tensor.dtype)
        storage = tensor.untyped_storage()
        key, size = storage._cdata, -(-storage.nbytes() // BLOCK) * BLOCK
        if key in self.storages:
            return

        def forget(_: Any) -> None:
            del self.storages[key]
            self.held -= size

        self.storages[key] = weakref.ref(storage, forget)
        self.held += size
        self.peak = max(self.peak, self.held)


class FakeCUDA(Memory):
    """While active, all tensors are fake and "cuda" is a device; `peak` and `dtypes` are those of that device.

    Whether something is true is answered with yes, and counted in `waits` where a GPU would be asked; any other
    question for a number raises PyTorch's `DataDependentOutputException`, one for a size `DynamicOutputShapeException`.
    """

    def __init__(self) -> None:
        super().__init__("cuda")
        self.fake = FakeTensorMode()
        self.active = contextlib.ExitStack()
        self.fresh: set[int] = set()  # ids of what the last operation returned, if autograd records it
        self.autocast = [False]  # whether it is enabled, in each context that is entered
        self.enter_autocast, self.exit_autocast = torch.autocast.__enter__, torch.autocast.__exit__
        self.leaves: list[Any] = []
        self.waits = 0

    def __enter__(self) -> "FakeCUDA":
        for owner, name, stand_in in (
            # Else autocast and the loss scale of fp16 disable themselves where there is no GPU.
            (torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
            (torch.cuda, "is_bf16_supported", lambda *_: True),
            (torch.autocast, "__enter__", lambda *args: self._enter_autocast(*args)),
            (torch.autocast, "__exit__", lambda *args: self._exit_autocast(*args)),
            (nn.Module, "to", lambda *args: self._to(*args)),
            (F, "scaled_dot_product_attention", _attention),
            # The one table that the CPU computes: it reads numbers for that.
            (transforms, "_levels", lambda device: torch.empty(3, 256, device=device)),
        ):
            self.active.enter_context(mock.patch.object(owner, name, stand_in))
        self.active.enter_context(self.fake)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.active.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:
            return self._told(args[0])
        if func is torch.ops.aten._local_scalar_dense.default and args[0].dtype == torch.bool:
            self.waits += args[0].fake_device.type == "cuda"
            return True
        if kwargs and kwargs.get("device") == META:  # the answer of `_told` comes back
            kwargs = {**kwargs, "device": DEVICE}
        result = super().__torch_dispatch__(func, types, args, kwargs)
        inputs = (each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor))
        recorded = torch.is_grad_enabled() and any(each.requires_grad for each in inputs)
        self.fresh = set(map(id, tree_leaves(result))) if recorded else set()
        return result

    def _told(self, tensor: Any) -> torch.device:
        """What C++ is told of a tensor's device; Python, and the checks of `FakeTensorMode`, know the true one.

        Autograd is told "meta": for "cuda" it would ask a real GPU for its context. Autocast must hear "cuda". It asks
        of what goes into an operation; autograd asks once of what has just come out of one. A gradient must be taken
        outside of autocast.
        """
        device: torch.device = tensor.fake_device
        casting = self.autocast[-1] and not torch.is_autocast_enabled("cuda")  # which a casting operation suspends
        for_autograd = id(tensor) in self.fresh or not casting
        self.fresh.discard(id(tensor))
        return META if device.type == "cuda" and for_autograd else device

    def _enter_autocast(self, context: torch.autocast) -> Any:
        self.autocast.append(context._enabled if context.device == "cuda" else self.autocast[-1])
        return self.enter_autocast(context)

    def _exit_autocast(self, context: torch.autocast, *error: Any) -> Any:
        self.autocast.pop()
        return self.exit_autocast(context, *error)

    def put(self, tensor: Tensor | None) -> Tensor | None:
        """The fake of a tensor on the CPU, as a loader gives it."""
        return None if tensor is None else self.fake.from_tensor(tensor)

    def build(self, make: Callable[[], Module]) -> Module:
        """A module whose memory is never taken: without tensors until it is moved to a device (`.to`)."""
        with _disable_current_modes(), META:
            return make()

    def _to(self, module: Module, device: torch.device) -> Module:
        """`nn.Module.to` for what `build` made. PyTorch's would write into tensors that fake ones cannot replace."""
        made: dict[Tensor, Tensor] = {}  # a parameter that two modules share stays shared
        for owner in module.modules():
            for name, old in [*owner._parameters.items(), *owner._buffers.items()]:
                if old is not None:
                    if old not in made:
                        new = torch.empty(old.shape, dtype=old.dtype, device=device)
                        made[old] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
                    setattr(owner, name, made[old])
        # Autograd asks of a parameter once: now, that it is told "meta".
        self.leaves += [get_gradient_edge(new) for new in made.values() if new.requires_grad]
        return module


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, **rest: Any
) -> Tensor:
    """`F.scaled_dot_product_attention` by the fused kernels that PyTorch takes on GPUs; of fake ones it takes none."""
    assert not any(rest.values()), rest  # a causal mask, a scale: no model here asks for one
    if torch.is_autocast_enabled("cuda"):
        query, key, value = (x.to(torch.get_autocast_dtype("cuda")) for x in (query, key, value))
    if attn_mask is None and query.dtype != torch.float32:
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, dropout_p)[0]
    if attn_mask is not None:  # PyTorch lays its rows out at multiples of 16
        count = key.shape[-2]
        padded = F.pad(attn_mask.to(query.dtype), (0, -count % 16))[..., :count]
        attn_mask = padded.expand(*query.shape[:-1], count)
    differentiable = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    return efficient(query, key, value, attn_mask, differentiable, dropout_p)[0]


class SilentLog(TrainingLog):
    """A log to which no line is ever due: reading the means is where training waits for the device."""

    def is_due(self, step: int) -> bool:
        return False


class SimulatedRun(Pretrain.Run):
    """A training run on a fake device: what `Pretrain.Run` takes from files is given, the rest are its own lines.

    Args:
        args: with a precision, which a run otherwise chooses by its device.
        batches: on the CPU, not fake.
    """

    def __init__(
        self, cuda: FakeCUDA, args: argparse.Namespace, config: PretrainConfig, batches: Sequence[Batch]
    ) -> None:
        self.args, self.config, self.device, self.output = args, config, DEVICE, Path(args.output_dir)
        self.phase, self.earlier_steps = config.phases()[0], 0
        self.loader: Any = [tuple(cuda.put(field) for field in batch) for batch in batches]
        self.epoch_steps = len(batches) // args.accum_steps
        self.model = cuda.build(lambda: PretrainModel(config))
        self.parallel = prepare_model(self.model, args, self.device)
        self.optimizer = create_optimizer(config.optimizer, self.model)
        self.schedule = create_scheduler(config.schedular, self.optimizer)
        self.scaler = torch.amp.GradScaler("cuda", enabled=args.precision == "fp16")
        self.start, self.progress = BEGINNING, {}
        self.data: Any = SimpleNamespace()
        self.order: Any = SimpleNamespace()
        samples = config.batch_size * args.accum_steps
        self.log = SilentLog(self.output, self.epoch_steps, samples, self.device)

    def save_if_asked(self, at: Any) -> None:
        """Nobody asks."""

    def train(self) -> None:
        """One epoch: a step for each `--accum_steps` batches."""
        self.train_epoch(0, self.epoch_steps)
