"""Plain eager code calls the functions of the ops directly; whoever wants to see the op still sees it.

The two ways must agree to the bit, so each test here compares them or looks which one was taken.
"""

import contextlib

import pytest
import torch
from cases import DEVICE, assert_same_bits
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import reval_kernels
from reval_kernels import TokenValues, library, torch_private
from reval_kernels.grouped_op import GroupedOp

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="torch.set_default_device is a mode, which sees every op")

B, T, V, D = 2, 5, 7, 3
OPS = {name: op for name, op in vars(library).items() if isinstance(op, GroupedOp)}
FUNCTIONS = ["token_values", "linear_token_values", "td_targets", "bellman_loss", "reval_loss", "linear_reval_loss"]


@pytest.fixture
def dispatched(monkeypatch) -> list[str]:
    """The names of the ops that were called through torch's dispatcher, in order."""
    names = []

    def recording(name, definition):
        return lambda *inputs: (names.append(name), definition(*inputs))[1]

    for name, op in OPS.items():
        monkeypatch.setattr(op, "definition", recording(name, op.definition))
    return names


def tensors() -> dict[str, Tensor]:
    torch.manual_seed(0)
    floats = {"logits": (B, T, V), "hidden": (B, T, D), "weight": (V, D), "bias": (V,), "q": (B, T), "v": (B, T)}
    out = {name: torch.randn(shape, requires_grad=True) for name, shape in floats.items()}
    out |= {"log_prob": torch.randn(B, T, requires_grad=True), "actions": torch.randint(V, (B, T))}
    return out | {"mask": torch.rand(B, T) < 0.7, "rewards": torch.randn(B), "anchor": torch.randn(3, B, T)}


def call(name: str, t: dict[str, Tensor], backend: str | None = None, **options) -> tuple:
    policy, anchor = TokenValues(t["q"], t["v"], t["log_prob"]), TokenValues(*t["anchor"])
    if "token_values" not in name:
        options |= {"beta": 0.5}
    if name.startswith("linear"):
        options |= {"bias": t["bias"]}
    arguments = {
        "token_values": (t["logits"], t["actions"]),
        "linear_token_values": (t["hidden"], t["weight"], t["actions"]),
        "td_targets": (policy, anchor, t["rewards"]),
        "bellman_loss": (policy, anchor, t["rewards"]),
        "reval_loss": (t["logits"], t["actions"], anchor, t["rewards"]),
        "linear_reval_loss": (t["hidden"], t["weight"], t["actions"], anchor, t["rewards"]),
    }[name]
    return getattr(reval_kernels, name)(*arguments, mask=t["mask"], backend=backend, **options)


def results(name: str, backend: str | None = None, by: float = 1.5) -> list[Tensor]:
    """All outputs, and all gradients for an upstream gradient that is not 1."""
    t = tensors()
    outputs = [x for x in call(name, t, backend) if x is not None]
    leaves = [x for x in t.values() if x.requires_grad]
    total = sum(x.double().sin().sum() for x in outputs if x.requires_grad)
    gradients = torch.autograd.grad(total, leaves, torch.tensor(by).double(), allow_unused=True)
    return [*(x.detach() for x in outputs), *(x for x in gradients if x is not None)]


# --- which way is taken ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FUNCTIONS)
def test_plain_eager_code_calls_no_op(dispatched, name):
    results(name)
    with torch.no_grad():
        call(name, tensors())
    assert dispatched == []


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        return function(*arguments, **(options or {}))


MODES = {
    "dispatch mode": Watching,
    "flop counter": lambda: FlopCounterMode(display=False),
    "function mode": lambda: torch.device("cpu"),  # as torch.set_default_device
    "forward mode": torch.autograd.forward_ad.dual_level,
    "inference mode": torch.inference_mode,
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_mode_sees_the_op(dispatched, name, mode):
    t = tensors()
    with MODES[mode]():
        call(name, t)
    assert dispatched


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_mode_around_the_backward_alone_sees_its_op(dispatched, name):
    t = tensors()
    out = call(name, t)[0]
    assert dispatched == []
    with Watching():
        out.sum().backward()
    arithmetic = ["linear_reval_loss"]  # the forward computed the gradient; its backward is a product
    assert dispatched or name in arithmetic


TRACERS = {
    "make_fx": lambda f, x: make_fx(f)(x),
    "pre-dispatch": lambda f, x: make_fx(f, pre_dispatch=True)(x),
    "functionalize": lambda f, x: torch.func.functionalize(f)(x),
    "func.grad": lambda f, x: torch.func.grad(lambda x: f(x).sum())(x),
}


@pytest.mark.parametrize("tracer", TRACERS)
def test_a_tracer_sees_the_op(dispatched, tracer):
    t = tensors()
    with contextlib.suppress(Exception):  # some cannot trace or differentiate the op, which is not our matter
        TRACERS[tracer](lambda x: reval_kernels.token_values(x, t["actions"]).v, t["logits"].detach())
    assert dispatched == ["token_values"]


class Subclass(Tensor):
    pass


def fake(x: Tensor) -> Tensor:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        return mode.from_tensor(x)


TENSORS = {
    "subclass": lambda x: x.as_subclass(Subclass),
    "fake": fake,
    "meta": lambda x: x.to("meta"),
    "negated": lambda x: torch.complex(x, -x).conj().imag,
}


@pytest.mark.parametrize("kind", TENSORS)
def test_a_tensor_that_is_more_than_its_memory_goes_to_the_op(dispatched, kind):
    x = TENSORS[kind](tensors()["logits"].detach())
    actions = torch.zeros(B, T, dtype=torch.long, device=x.device)
    reval_kernels.token_values(x, fake(actions) if kind == "fake" else actions)
    assert dispatched == ["token_values"]


def test_a_lazy_negation_is_negated(backend):
    x = tensors()["logits"].detach()
    negated = TENSORS["negated"](x)
    assert negated.is_neg()
    actions = torch.zeros(B, T, dtype=torch.long)
    ours, plain = (reval_kernels.token_values(y, actions, backend=backend)[:3] for y in (negated, x))
    assert_same_bits(ours, plain)


# --- both ways agree ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FUNCTIONS)
def test_both_ways_have_the_same_bits(backend, name, monkeypatch):
    direct = results(name, backend)
    monkeypatch.setattr(torch_private, "plain_eager", lambda tensors: False)
    assert_same_bits(direct, results(name, backend))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_no_graph_where_nothing_needs_a_gradient(backend, name):
    t = {k: x.detach() for k, x in tensors().items()}
    assert not any(x.requires_grad for x in call(name, t, backend) if x is not None)
    with torch.no_grad():
        assert not any(x.requires_grad for x in call(name, tensors(), backend) if x is not None)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_tensors_without_a_gradient_give_the_same_outputs_a_graph(name, monkeypatch):
    """A reference that needs a gradient gets none. But the outputs have a graph, in both ways."""
    t = {k: x.detach() for k, x in tensors().items()}
    t["anchor"].requires_grad_()
    direct = [x is not None and x.requires_grad for x in call(name, t)]
    monkeypatch.setattr(torch_private, "plain_eager", lambda tensors: False)
    assert direct == [x is not None and x.requires_grad for x in call(name, t)]


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(backend, reentrant):
    t = tensors()
    outside = torch.autograd.grad(call("token_values", t, backend).v.sum(), t["logits"])[0]

    def function(logits):
        return call("token_values", t | {"logits": logits}, backend).v

    checkpoint(function, t["logits"], use_reentrant=reentrant).sum().backward()
    assert_same_bits(t["logits"].grad, outside)


def test_hooks_of_saved_tensors_see_what_is_saved(backend):
    t, seen = tensors(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: seen.append(x.shape) or x, lambda x: x):
        call("bellman_loss", t, backend)
    assert seen == [(B, T)] * 4  # the gradients with respect to q, v and log_prob, and the mask


def test_autocast_is_off_in_both_ways(backend):
    t = tensors()
    plain = call("linear_token_values", t, backend).v
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same_bits(call("linear_token_values", t, backend).v.detach(), plain.detach())


def test_the_profiler_shows_the_op(backend):
    t = tensors()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call("bellman_loss", t, backend).loss.backward()
    names = {event.name for event in profile.events()}
    assert {"reval_kernels::bellman_loss", "reval_kernels::bellman_lossBackward"} <= names
