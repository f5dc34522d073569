"""How many kernels and torch operations a call needs on a GPU. Each costs time on the CPU and a launch on the GPU.

Counted in the interpreter, as if the tensors were on a GPU: the checks that a kernel makes itself are left out. Not
counted is what launches nothing: new memory, and views.
"""

from collections import Counter

import pytest
import torch
from cases import DEVICE
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import reval_kernels
from reval_kernels import TokenValues, library
from reval_kernels.grouped_op import GroupedOp, tuple_of

pytest.importorskip("triton")

from reval_kernels.backends.gpu import bellman, common, rows

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="counts in the interpreter")

B, T, V = 2, 8, 64
LAUNCH = common.launch
OPS = {op.name: op for op in vars(library).values() if isinstance(op, GroupedOp)}


def shares_memory(out, x) -> bool:
    """Whether a result is its input, or a view of its input."""
    both = isinstance(out, Tensor) and isinstance(x, Tensor)
    return both and out.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()


class Counting(TorchDispatchMode):
    """Counts torch's operations, also those inside our ops, and the launches of our kernels."""

    def __init__(self):
        super().__init__()
        self.counts, self.launching = Counter(), False

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name = function._schema.name.split("::")[1]
        if function.namespace == "reval_kernels":
            with self:
                return tuple_of(OPS[name]._function(*OPS[name].grouped(arguments)))
        out = function(*arguments, **(options or {}))
        if not (self.launching or "empty" in name or (shares_memory(out, arguments[0]) and name[-1] != "_")):
            self.counts[name] += 1
        return out

    def launch(self, kernel, *arguments, **constants):
        self.counts[kernel.fn.__name__] += 1
        self.launching = True  # the interpreter itself calls torch
        LAUNCH(kernel, *arguments, **constants)
        self.launching = False


@pytest.fixture
def counting(monkeypatch) -> Counting:
    mode = Counting()
    for module in (bellman, common, rows):
        monkeypatch.setattr(module, "launch", mode.launch)
    monkeypatch.setattr(library, "_checks_data", lambda kernels, function, like: function in kernels.CHECKS_DATA)
    return mode


def values(*shape: int) -> TokenValues:
    return TokenValues(*torch.randn(3, *shape).unbind())


def counts(mode: Counting, function, *inputs: Tensor) -> tuple[dict, dict]:
    """What a call needs, and what the backward of its first result needs. The upstream gradient exists already."""
    leaves = [x.requires_grad_() for x in inputs]
    with mode:
        out = function(*leaves)[0]
    forward, by = dict(mode.counts), torch.randn(out.shape)
    mode.counts.clear()
    with mode:
        torch.autograd.grad(out, leaves, by, allow_unused=True)
    return forward, dict(mode.counts)


LOSS = {"loss_kernel": 1, "sum": 1, "to": 1}  # the sum over trajectories is taken in float64


@pytest.mark.parametrize("level", ["trajectory", "token", "subtrajectory"])
@pytest.mark.parametrize("masked", [False, True])
def test_bellman_loss(counting, level, masked):
    mask = torch.rand(B, T) < 0.7 if masked else None
    reference, rewards = values(B, T), torch.randn(B)

    def loss(*policy):
        options = {"mask": mask, "level": level, "beta": 0.5, "backend": "triton"}
        return reval_kernels.bellman_loss(TokenValues(*policy), reference, rewards, **options)

    assert counts(counting, loss, *values(B, T)[:3]) == (LOSS, {"loss_backward_kernel": 1})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_no_input_of_the_bellman_loss_is_converted(counting, dtype):
    """Packed, with cu_seqlens, which the kernel checks; references and rewards of other dtypes."""
    reference = TokenValues(*(x.to(dtype) for x in values(B * T)[:3]))
    rewards, cu_seqlens = torch.randn(B).to(dtype), torch.tensor([0, 5, B * T])

    def loss(*policy):
        options = {"cu_seqlens": cu_seqlens, "beta": 0.5, "backend": "triton"}
        return reval_kernels.bellman_loss(TokenValues(*policy), reference, rewards, **options)

    assert counts(counting, loss, *values(B * T)[:3]) == (LOSS, {"loss_backward_kernel": 1})


def test_td_targets(counting):
    reference, rewards, cu_seqlens = values(B * T), torch.randn(B), torch.tensor([0, 5, B * T])

    def error(q, v):
        options = {"cu_seqlens": cu_seqlens, "beta": 0.5, "backend": "triton"}
        return (reval_kernels.td_targets(TokenValues(q, v, q), reference, rewards, **options).error,)

    backward = {"zeros_like": 1, "td_backward_kernel": 1}  # zeros for the TD target, which has no gradient here
    assert counts(counting, error, *values(B * T)[:2]) == ({"td_kernel": 1}, backward)


@pytest.mark.parametrize(("vocabulary", "kernels"), [(64, ["row_forward"]), (17 * 4096, ["row_forward", "merge"])])
def test_token_values(counting, vocabulary, kernels):
    """With many words several programs share a row, and `merge` joins their parts."""
    actions = torch.randint(vocabulary, (1, 2))

    def log_prob(logits):
        return (reval_kernels.token_values(logits, actions, backend="triton").log_prob,)

    forward, backward = counts(counting, log_prob, torch.randn(1, 2, vocabulary))
    checks = {"aminmax": 1, "item": 2}  # on the CPU, where the kernel's own check would be too late
    assert forward in (dict.fromkeys(kernels, 1), dict.fromkeys(kernels, 1) | checks)
    assert backward == {"zeros_like": 1, "row_backward": 1}  # zeros for the outputs without a gradient
