"""What evaluation waits for: of a batch of images, for the copy of its answers, and for nothing else of a GPU's."""

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from grounding.explain import MAX_PAIRS, Explainer
from tests.grounding import test_explain as base

explainer = base.explainer
pytestmark = pytest.mark.usefixtures("one_thread")
WAITS = ("aten::_local_scalar_dense", "aten::item", "aten::nonzero", "aten::is_nonzero")
QUESTIONS = [("itm", 1, "maps"), ("itc", 0, "maps"), ("itm", 1, "match_probabilities")]
# More texts than one pass takes, of three images, unequally many.
INDEX = [row % 3 if row % 4 else 0 for row in range(2 * max(MAX_PAIRS.values()) + 5)]
TEXTS = ["a red star" if row % 2 else "circle" for row in range(len(INDEX))]


@pytest.mark.parametrize(("mode", "block", "question"), QUESTIONS)
def test_a_batch_reads_no_number_but_of_its_answer(mode: str, block: int, question: str, explainer: Explainer) -> None:
    ask = getattr(explainer._replace(mode=mode, block=block), question)
    images = torch.randn(3, 3, 48, 48)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiled:
        ask(images, INDEX, TEXTS)
    ran = Counter(event.name for event in profiled.events())
    assert ran["aten::linear"] > 0
    finite = dict.fromkeys(WAITS, 1) | {"aten::nonzero": 0}  # the answer is looked at once, on the CPU
    assert {name: ran[name] for name in WAITS} == finite


class Copies(TorchDispatchMode):
    """Notes each copy from one device to another, and whether it is waited for; and counts pinned tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[object, ...]] = []
        self.pinned = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        keys = kwargs or {}
        found = function(*args, **keys)
        self.pinned += bool(keys.get("pin_memory"))
        sources = {each.device.type for each in args if isinstance(each, Tensor) and each.ndim}
        if isinstance(found, Tensor) and len({found.device.type, *sources}) > 1:
            self.seen.append((*sources, found.device.type, bool(keys.get("non_blocking"))))
        return found


@pytest.mark.skipif(torch.__version__ < "2.5", reason="fake tensors of PyTorch 2.4 ask for a real GPU")
@pytest.mark.parametrize(("mode", "block", "question"), QUESTIONS)
def test_one_copy_from_the_gpu_is_waited_for(
    mode: str, block: int, question: str, explainer: Explainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU that computes nothing (fake tensors): reading a number of it would be an error there."""
    monkeypatch.setattr(Explainer, "finite", lambda _, answer, *__: answer)  # reads a number of the CPU's
    # PyTorch's engine asks for a real GPU.
    monkeypatch.setattr(torch.autograd, "grad", lambda _, to, *__, **___: [torch.empty_like(to)])
    model: Any = copy.deepcopy(explainer.model)
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in model.modules():
            for tensors in (module._parameters, module._buffers):
                tensors.update({name: each.to("cuda") for name, each in tensors.items() if each is not None})
        asked = explainer._replace(model=model, mode=mode, block=block, device=torch.device("cuda", 0))
        with Copies() as copies:
            answers = getattr(asked, question)(torch.randn(3, 3, 48, 48), INDEX, TEXTS)
    assert answers.device.type == "cpu"
    assert len(answers) == len(TEXTS)
    *uploads, last = copies.seen
    assert last == ("cuda", "cpu", False)
    assert set(uploads) == {("cpu", "cuda", True)}
    assert copies.pinned == len(uploads) - 1  # all but the images, which go before there is anything to wait for
