"""opcheck tests the schemas, fakes and autograd of the torch.library ops; other tests compare compiled with eager bits.

All sizes differ (T = 5, V = 7, D = 3), so that a fake that confuses two of them cannot pass. A compiled case takes
seconds. So each public function has one case with inductor. The variants use the same tracing without code generation
("aot_eager").
"""

import pytest
import torch
from cases import assert_same_bits
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck

import reval_kernels
from reval_kernels import TokenValues, library
from reval_kernels.backends import portable
from reval_kernels.contract import (
    BellmanOptions,
    Cotangents,
    HeadInputs,
    Layout,
    Level,
    Needs,
    Reference,
    RowValues,
    Statistics,
    Tokens,
    Transform,
    UnitGradients,
)
from reval_kernels.grouped_op import flatten
from reval_kernels.losses import LEVELS

B, T, V, D = 2, 5, 7, 3


def tensors(dtype=torch.float32, requires_grad=True) -> dict[str, torch.Tensor]:
    """All tensors that the ops take, for a batch [B, T]."""
    torch.manual_seed(0)
    floats = {"logits": (B, T, V), "hidden": (B, T, D), "weight": (V, D), "bias": (V,)}
    out = {name: torch.randn(shape).to(dtype).requires_grad_(requires_grad) for name, shape in floats.items()}
    out |= {name: torch.randn(B, T).requires_grad_(requires_grad) for name in ("q", "v", "log_prob")}
    out |= {name: torch.randn(B, T) for name in ("q_ref", "v_ref", "log_ref")}
    out |= {"actions": torch.randint(V, (B, T)), "mask": torch.rand(B, T) < 0.7, "temperatures": torch.rand(B, T) + 0.5}
    out |= {"rewards": torch.randn(B), "returns": torch.randn(B)}
    return out


def strided(x: torch.Tensor) -> torch.Tensor:
    """The same numbers with a step of 2 in the last dimension."""
    return torch.stack([x.detach(), x.detach()], -1).flatten(-2)[..., ::2].requires_grad_(x.requires_grad)


def check(op, *groups, **options) -> None:
    assert set(opcheck(op.definition, flatten(groups), **options).values()) == {"SUCCESS"}


def transform(t: dict, optional: bool) -> Transform:
    return Transform(1.0, t["temperatures"], 5.0) if optional else Transform(0.7)


def tokens_of(t: dict, optional: bool) -> Tokens:
    return Tokens(t["actions"], t["mask"] if optional else None)


def head_of(t: dict, optional: bool) -> HeadInputs:
    """`optional`: hidden states with a stride, and a bias. Otherwise neither."""
    if optional:
        return HeadInputs(strided(t["hidden"]), t["weight"], t["bias"])
    return HeadInputs(t["hidden"], t["weight"], None)


@pytest.mark.parametrize(("dtype", "optional"), [(torch.float64, False), (torch.bfloat16, True)])
def test_token_values(backend, optional, dtype):
    """Once with every optional argument None; once with all of them given, and logits with a stride."""
    t = tensors(dtype)
    logits = strided(t["logits"]) if optional else t["logits"]
    given = (tokens_of(t, optional), transform(t, optional))
    check(library.token_values, logits, *given, optional, False, backend)
    by = (Statistics(*torch.randn(3, B, T)), Cotangents(*torch.randn(4, B, T)))
    for op in (library.token_values_backward, library.token_values_backward_):
        check(op, logits.detach(), *given, *by, backend)


@pytest.mark.parametrize("expected", [False, True])
@pytest.mark.parametrize(
    ("dtype", "optional", "needs"),
    [
        (torch.float64, True, (True, True, True)),
        (torch.bfloat16, True, (True, False, False)),
        (torch.bfloat16, False, (False, True, False)),
    ],
)
def test_linear_token_values(backend, optional, dtype, needs, expected):
    """The second case (a frozen head) uses `expected`. In the other cases `expected` must change nothing."""
    t = tensors(dtype, requires_grad=False)
    for name, need in zip(("hidden", "weight", "bias"), needs, strict=True):
        t[name].requires_grad_(need)
    head, given = head_of(t, optional), (tokens_of(t, optional), transform(t, optional))
    check(library.linear_token_values, head, *given, optional, expected, backend)
    if expected:
        return
    by = (Statistics(*torch.randn(3, B, T)), Cotangents(*torch.randn(4, B, T)))
    head = HeadInputs(*(None if x is None else x.detach() for x in head.tensors))
    needs = Needs(*needs[:2], needs[2] and head.bias is not None)
    check(library.linear_token_values_backward, head, *given, *by, needs, backend)


@pytest.mark.parametrize("optional", [False, True])
def test_linear_expected_backward(optional):
    t = tensors(torch.bfloat16, requires_grad=False)
    given = (head_of(t, optional), tokens_of(t, optional), transform(t, optional))
    check(library.linear_expected_backward, torch.randn(B, T, D), *given, -torch.rand(B, T), *torch.randn(3, B, T))


def packed_layout(t: dict) -> Layout:
    return Layout(t["mask"].flatten(), torch.tensor([0, 4, 10], dtype=torch.int32))


@pytest.mark.parametrize("packed", [False, True])
def test_td_targets(backend, packed):
    t, layout = tensors(), Layout(None, None)
    values, reference, by = (
        [t["q"], t["v"], t["log_prob"]],
        [t["q_ref"], t["v_ref"], t["log_ref"]],
        torch.randn(2, B, T),
    )
    if packed:
        layout = packed_layout(t)
        values, reference, by = ([x.flatten() for x in several] for several in (values, reference, by))
        values = [strided(x) for x in values]
    given = (TokenValues(*values), Reference(*reference, None), t["rewards"], layout)
    check(library.td_targets, *given, 0.5, 0.9, backend)
    check(library.td_targets_backward, *by, layout, 0.9, backend)


@pytest.mark.parametrize("level", [*LEVELS, "returns"])
def test_bellman_loss(backend, level):
    t, layout = tensors(), Layout(None, None)
    values, reference = [t["q"], t["v"], t["log_prob"]], [t["q_ref"], t["v_ref"], t["log_ref"]]
    if level == "token":
        layout = packed_layout(t)
        values, reference = ([x.flatten() for x in several] for several in (values, reference))
    anchor, normalizer = Reference(*reference, None), torch.tensor(2.0, dtype=torch.float64)
    if level == "returns":
        anchor, normalizer = Reference.of(t["returns"]), None
    options = BellmanOptions(0.5, LEVELS.get(level, Level.TRAJECTORY), False, normalizer)
    check(library.bellman_loss, TokenValues(*values), anchor, t["rewards"], layout, options, backend)
    unit = UnitGradients(*(torch.randn_like(x) for x in values))
    check(library.bellman_loss_backward, torch.randn(()), torch.randn(B), unit, layout, backend)


@pytest.mark.parametrize(("dtype", "optional"), [(torch.float32, True), (torch.bfloat16, False)])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_linear_reval_loss(backend, requires_grad, optional, dtype):
    t = tensors(dtype, requires_grad)
    head, given = head_of(t, optional), (t["actions"], Layout(t["mask"] if optional else None, None))
    values = TokenValues(t["q_ref"], t["v_ref"], t["log_ref"])
    options = BellmanOptions(0.5, Level.TRAJECTORY, False, torch.tensor(2.0, dtype=torch.float64) if optional else None)
    rest = (Reference.of(values if optional else t["returns"]), t["rewards"], options)
    needs = Needs(True, True, head.bias is not None)
    # test_aot_dispatch_dynamic differentiates all outputs, and the gradients among them refuse that (the second order).
    # The tests of torch.compile below differentiate the loss.
    tried = ["test_schema", "test_autograd_registration", "test_faketensor"]
    tried += [] if requires_grad else ["test_aot_dispatch_dynamic"]
    check(library.linear_reval_loss, head, *given, transform(t, optional), *rest, needs, backend, test_utils=tried)


def test_backends_run_without_autocast(monkeypatch):
    """An op turns autocast off, so a backend's matmuls keep their dtype."""
    seen = []

    def values(logits, *_):
        seen.append(torch.is_autocast_enabled(logits.device.type))
        return RowValues(*(torch.zeros(logits.shape[:-1]) for _ in range(6)))

    monkeypatch.setattr(portable, "token_values", values)
    with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
        reval_kernels.token_values(torch.randn(2, V), torch.zeros(2, dtype=torch.long), backend="portable")
    assert seen == [False]


# --- torch.compile --------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def fresh_compiler():
    """torch.compile keeps at most 8 graphs of one function. Here it compiles each function for every backend."""
    torch.compiler.reset()


CASES = {
    "token_values": {"with_entropy": True, "softcap": 5.0},
    "linear_token_values": {"temperature": 0.7},
    "td_targets": {"beta": 0.5},
    "bellman_loss": {"beta": 0.5, "level": "token"},
    "reval_loss": {"beta": 0.5, "level": "subtrajectory"},
    "linear_reval_loss": {"beta": 0.5},
}


def call(name: str, t: dict[str, torch.Tensor], backend: str, **options) -> tuple:
    """Call the public function on the results of other operations."""
    policy = TokenValues(t["q"] * 2, -t["v"], t["log_prob"])
    anchor = TokenValues(t["q_ref"], t["v_ref"], t["log_ref"])
    arguments = {
        "token_values": (t["logits"] * 2, t["actions"]),
        "linear_token_values": (t["hidden"] * 2, t["weight"], t["actions"]),
        "td_targets": (policy, anchor, t["rewards"]),
        "bellman_loss": (policy, anchor, t["rewards"]),
        "reval_loss": (t["logits"] * 2, t["actions"], anchor, t["rewards"]),
        "linear_reval_loss": (t["hidden"] * 2, t["weight"], t["actions"], anchor, t["rewards"]),
    }[name]
    return tuple(getattr(reval_kernels, name)(*arguments, **options, backend=backend))


def results(function, t: dict[str, torch.Tensor]) -> list:
    """All outputs and all gradients."""
    outputs = [x for x in function(t) if x is not None]
    leaves = [x for x in t.values() if x.requires_grad]
    total = sum(x.double().sum() for x in outputs if x.requires_grad)
    return [*(x.detach() for x in outputs), *torch.autograd.grad(total, leaves, allow_unused=True)]


def test_compiled_code_gives_the_same_bits(backend):
    """All six functions in one graph, compiled by inductor and its C++ compiler, with a mask."""
    t = tensors()

    def everything(t):
        return tuple(x for name, options in CASES.items() for x in call(name, t, backend, mask=t["mask"], **options))

    assert_same_bits(results(everything, t), results(torch.compile(everything, fullgraph=True), t))


@pytest.mark.parametrize("name", CASES)
def test_every_function_is_one_graph(backend, name):
    """Without optional arguments, in bf16."""
    t, options = tensors(torch.bfloat16), {"beta": 0.5} if "beta" in CASES[name] else {}

    def function(t):
        return call(name, t, backend, **options)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert_same_bits(results(function, t), results(compiled, t))


def test_a_frozen_head_is_one_graph(backend):
    """torch.compile knows whether the head is frozen when it makes the graph."""
    t = tensors(torch.bfloat16) | {"weight": tensors(torch.bfloat16)["weight"].detach()}

    def function(t):
        return call("linear_token_values", t, backend, mask=t["mask"], softcap=5.0)[:3]

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    eager = results(function, t)
    assert eager[0].grad_fn is None and any(x is not None for x in eager[3:])
    assert_same_bits(eager, results(compiled, t))


@pytest.mark.parametrize("fused", [True, False])
def test_dynamic_shapes(backend, fused):
    """One forward graph and one backward graph serve batches of every size and length."""
    weight = tensors(torch.float64)["weight"]

    def loss(hidden, weight, actions, returns, rewards):
        if fused:
            return reval_kernels.linear_reval_loss(hidden, weight, actions, returns, rewards, beta=0.5, backend=backend)
        v = reval_kernels.linear_token_values(hidden, weight, actions, backend=backend)
        return reval_kernels.bellman_loss(v, returns, rewards, beta=0.5, backend=backend)

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=counter)
    for batch, length in ((2, 5), (3, 4), (6, 9)):
        hidden = torch.randn(batch, length, D, dtype=torch.float64, requires_grad=True)
        rest = (weight, torch.randint(V, (batch, length)), torch.randn(batch), torch.randn(batch))
        both = []
        for function in (loss, compiled):
            out = function(hidden, *rest)
            both.append((out.loss.detach(), out.residual.detach(), *torch.autograd.grad(out.loss, (hidden, weight))))
        assert_same_bits(*both)
    assert 1 <= counter.frame_count <= 2  # torch 2.7 makes one


@pytest.mark.parametrize("function", ["bellman_loss", "linear_reval_loss"])
def test_a_new_normalizer_needs_no_new_graph(function):
    """The normalizer is the number of tokens or trajectories of the whole batch, so every step has another one. After
    the second step nothing is compiled, and the values are those of eager code."""
    t = tensors()

    def loss(normalizer):
        return call(function, t, "portable", beta=0.5, normalizer=normalizer)[0]

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    for normalizer in (2.0, 3.5, 8.25, 21.0):
        assert_same_bits(loss(normalizer).detach(), compiled(normalizer).detach())
    assert counter.frame_count <= 2


def test_inplace_gradient_is_ignored_when_compiled(backend):
    t = tensors()
    logits = t["logits"].detach().clone().requires_grad_()
    before = logits.detach().clone()
    compiled = torch.compile(reval_kernels.token_values, fullgraph=True, backend="aot_eager")
    out = compiled(logits, t["actions"], inplace_grad=True, backend=backend)
    out.log_prob.sum().backward()
    assert_same_bits(logits.detach(), before)
    eager = reval_kernels.token_values(t["logits"], t["actions"], backend=backend)
    assert_same_bits(logits.grad, torch.autograd.grad(eager.log_prob.sum(), t["logits"])[0])
