"""The Bellman kernels over several blocks. With blocks of 4, trajectories of 0, 1, 4, 5 and 11 actions end at every
kind of position in a block.
"""

import types

import pytest
import torch
from cases import DEVICE, assert_same_bits, evaluate, torch_error, values

import reval_kernels
from reval_kernels import TokenValues, reference
from reval_kernels.contract import BellmanOptions, Layout, Reference

pytest.importorskip("triton")

from triton.runtime.jit import JITFunction

from reval_kernels.backends.gpu import bellman, common

CUTS = [0, 0, 1, 5, 10, 10, 21]


@pytest.fixture(params=[4, 1024])
def block(request, monkeypatch):
    monkeypatch.setattr(bellman, "BLOCK", request.param)


def narrow(x: TokenValues) -> TokenValues:
    return TokenValues(*(y.float() for y in x[:3]))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("function", "options"),
    [
        ("td_targets", {"gamma": 1.0}),
        ("td_targets", {"gamma": 0.9}),
        ("bellman_loss", {"level": "trajectory"}),
        ("bellman_loss", {"level": "trajectory", "returns": True}),
        ("bellman_loss", {"level": "token"}),
        ("bellman_loss", {"level": "token", "semi_gradient": True}),
        ("bellman_loss", {"level": "subtrajectory"}),
    ],
    ids=str,
)
def test_against_the_definition(block, function, options, packed, masked):
    shape = (21,) if packed else (3, 9)
    options = dict(options)
    count = 6 if packed else 3
    policy, ref = narrow(values(*shape)), narrow(values(*shape))
    rewards = torch.randn(count)
    layout = {"mask": torch.rand(shape) < 0.6 if masked else None}
    if packed:
        layout["cu_seqlens"] = torch.tensor(CUTS, dtype=torch.int32)
    anchor = torch.randn(count) if options.pop("returns", False) else ref

    def call(module, q, v, log_prob, **extra):
        def to(x):
            return x.to(q.dtype) if isinstance(x, torch.Tensor) else TokenValues(*map(to, x[:3]))

        return getattr(module, function)(
            TokenValues(q, v, log_prob), to(anchor), to(rewards), beta=0.25, **layout, **options, **extra
        )

    outputs = {"td_targets": ("target", "error"), "bellman_loss": ("loss", "residual")}[function]
    sizes = {"loss": (), "residual": (count,)}
    by = {name: torch.randn(sizes.get(name, shape)) for name in outputs}
    inputs = dict(zip(("q", "v", "log_prob"), policy[:3], strict=True))
    unused = [k for k in inputs if (function == "td_targets" and k == "log_prob")]
    extra = {k: inputs.pop(k) for k in unused}
    touched = {k: x + 0 * x for k, x in inputs.items()}

    def anchored(module, **more):
        # every input is part of the output, so that autograd finds a gradient (perhaps 0) for each
        def run(**leaves):
            out = call(module, **leaves, **{k: x.to(leaves["q"].dtype) for k, x in extra.items()}, **more)
            silent = 0 * sum(x.sum() for x in leaves.values())
            return out._replace(**{outputs[0]: getattr(out, outputs[0]) + silent})

        return run

    ours = evaluate(anchored(reval_kernels, backend="triton"), touched, by)
    truth = evaluate(anchored(reference), {k: x.double() for k, x in touched.items()}, by)
    for name in truth:
        assert torch_error(ours[name], truth[name]) <= 4e-7, name


def test_a_long_trajectory_loses_no_digits():
    """5000 tokens whose log-probabilities nearly equal those of the reference, so that their difference is small."""
    policy = narrow(values(1, 5000))
    ref = TokenValues(*(x + 1e-3 * torch.randn_like(x) for x in policy[:3]))
    ours = reval_kernels.bellman_loss(policy, ref, torch.zeros(1), beta=1.0, backend="triton")
    wide = [TokenValues(*(x.double() for x in y[:3])) for y in (policy, ref)]
    truth = reference.bellman_loss(*wide, torch.zeros(1).double(), beta=1.0)
    assert torch_error(ours.residual, truth.residual) < 1e-7


# --- data that the kernels check ------------------------------------------------------------------------------------

interpreted = pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU a failed assert ends the process")
BAD_CUTS = {"start": [1, 2, 5], "falls": [0, 4, 3, 5], "ends early": [0, 2, 4], "ends late": [0, 2, 6], "one": [0, 4]}


def on_packed(function: str, cuts: list[int], dtype: torch.dtype = torch.float32):
    """Call a function of the backend itself, so that no op checks before. 5 tokens."""
    policy, ref = (TokenValues(*torch.randn(3, 5, dtype=dtype)) for _ in range(2))
    given = (policy, Reference.of(ref), torch.randn(len(cuts) - 1, dtype=dtype), Layout(None, torch.tensor(cuts)))
    options = (BellmanOptions(0.5),) if function == "bellman_loss" else (0.5, 1.0)
    return getattr(bellman, function)(*given, *options)


@interpreted
@pytest.mark.parametrize("cuts", BAD_CUTS)
@pytest.mark.parametrize("function", ["bellman_loss", "td_targets"])
def test_bad_cu_seqlens_fail_an_assert_in_the_kernel(function, cuts):
    with pytest.raises(Exception, match="cu_seqlens must be 0, ..., N and never fall"):
        on_packed(function, BAD_CUTS[cuts])


@interpreted
@pytest.mark.parametrize("function", ["bellman_loss", "td_targets"])
@pytest.mark.parametrize(("cuts", "dtype"), [([0], torch.float32), ([0, 3, 2], torch.float64)])
def test_bad_cu_seqlens_without_a_kernel(function, cuts, dtype):
    """No trajectories, so no launch; and float64, which the portable backend takes."""
    with pytest.raises(ValueError, match="cu_seqlens must start at 0, never fall and end at N = 5"):
        on_packed(function, cuts, dtype)


# --- numbers --------------------------------------------------------------------------------------------------------


def test_beta_is_not_rounded_to_float32():
    """V - r / beta = 3e7 - 3e6 / 0.1 = 0. With 0.1 rounded to float32 it would be 0.45."""
    zero = torch.zeros(1, 1)
    policy, ref = TokenValues(zero, zero + 3e7, zero), TokenValues(zero, zero, zero)
    options = {"beta": 0.1, "backend": "triton"}
    assert reval_kernels.bellman_loss(policy, ref, torch.tensor([3e6]), **options).residual.item() == 0
    policy = policy._replace(q=zero + 3e7)
    assert reval_kernels.td_targets(policy, ref, torch.tensor([3e6]), **options).error.item() == 0


@pytest.mark.parametrize(("kernel", "names"), [("loss_kernel", ["beta", "weight"]), ("td_kernel", ["beta"])])
def test_a_compiled_kernel_takes_doubles(kernel, names):
    """Without the annotation Triton takes a Python float as fp32. The interpreter takes it as it is."""
    doubles = [p.name for p in JITFunction(getattr(bellman, kernel).fn).params if p.annotation_type == "fp64"]
    assert doubles == names


@pytest.mark.parametrize("level", ["trajectory", "token", "subtrajectory"])
def test_the_loss_alone_and_with_the_residual(level):
    """No gradient for the residual is the same as a gradient of 0."""
    policy = [x.requires_grad_() for x in narrow(values(2, 9))[:3]]
    mask = torch.rand(2, 9) < 0.6
    out = reval_kernels.bellman_loss(
        TokenValues(*policy), narrow(values(2, 9)), torch.randn(2), mask=mask, beta=0.5, level=level, backend="triton"
    )
    by = torch.randn(())
    alone = torch.autograd.grad(out.loss, policy, by, retain_graph=True)
    assert_same_bits(alone, torch.autograd.grad([out.loss, out.residual], policy, [by, torch.zeros(2)]))


# --- the launch -----------------------------------------------------------------------------------------------------


class Kernel:
    """Stands for a compiled kernel. Records the device that was current at the launch, and the options."""

    def __getitem__(self, grid):
        return lambda *args, **options: self.launches.append((torch.cuda.current_device(), options))

    def __init__(self):
        self.launches = []


@pytest.mark.parametrize("index", [0, 1])
def test_a_kernel_runs_on_the_device_of_its_tensors(monkeypatch, index):
    """Device 0 is the current one."""
    current = [0]

    class Device:
        def __init__(self, device):
            self.index = device.index

        def __enter__(self):
            current.append(self.index)

        def __exit__(self, *_):
            current.pop()

    monkeypatch.setattr(common, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "device", Device)
    kernel, x = Kernel(), types.SimpleNamespace(device=torch.device("cuda", index))
    common.launch(kernel, (1,), x, BLOCK=4)
    assert kernel.launches == [(index, {"BLOCK": 4, "enable_fp_fusion": False})] and current == [0]
