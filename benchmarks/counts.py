"""What a piece of work asks of the device, counted by operators: launches, bytes written, and waits of the host.

    with Counts() as counts:
        step()
    counts.launches.total(), counts.written.total(), counts.waits

On the CPU the same operators are called as on a GPU, and counted alike; under `FakeTensorMode` nothing is computed.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Neither a view by its schema nor a kernel: they reserve memory, or rename what is there.
FREE = {
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "detach", "lift_fresh",
    "set_", "resize_", "record_stream", "_reshape_alias", "alias",
}  # fmt: skip
# Operators whose result's size or value the host reads; on a GPU it waits there for all work before.
WAITING = {
    "_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "item", "multinomial", "bincount",
    "_unique2", "unique_dim", "unique_consecutive",
}  # fmt: skip


class Counts(TorchDispatchMode):
    """Counters by operator's name, of all that runs inside, the backward pass included.

    launches: operators that compute, views and allocations left out. An operator counts once though some launch
        several kernels (`_foreach_*` a few for hundreds of tensors, a reduction in two parts), and the kernels of
        compiled graphs are not seen.
    written: bytes of the tensors that these operators return or change.
    waits: operators of `WAITING`, boolean indices, and copies between host and device that block.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        self.written: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name in WAITING or _boolean_index(name, args) or _blocks(name, args, kwargs):
            self.waits[name] += 1
        out = func(*args, **kwargs)
        if name not in FREE and not func.is_view:
            self.launches[name] += 1
            returned = out if func._schema.returns else args[0]  # `_foreach_*_` return nothing
            self.written[name] += sum(leaf.nbytes for leaf in tree_leaves(returned) if isinstance(leaf, Tensor))
        return out


def _boolean_index(name: str, args: Sequence[Any]) -> bool:
    indices = args[1] if name in ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index") else ()
    return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)


def _blocks(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a copy between host and device waits. A single number of the host goes along with the kernel instead."""
    if name == "_to_copy":
        pair = args[0].device, torch.device(kwargs.get("device") or args[0].device)
        non_blocking = kwargs.get("non_blocking", False)
    elif name == "copy_":
        pair, non_blocking = (args[1].device, args[0].device), bool(args[2]) if len(args) > 2 else False
        non_blocking = kwargs.get("non_blocking", non_blocking)
    else:
        return False
    return pair[0].type != pair[1].type and not non_blocking
