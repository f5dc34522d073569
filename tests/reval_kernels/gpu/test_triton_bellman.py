"""The Bellman kernels over several blocks. With blocks of 4, trajectories of 0, 1, 4, 5 and 11 actions end at every
kind of position in a block.
"""

import pytest
import torch
from cases import evaluate, torch_error, values

import reval_kernels
from reval_kernels import TokenValues, reference

pytest.importorskip("triton")

CUTS = [0, 0, 1, 5, 10, 10, 21]


@pytest.fixture(params=[4, 1024])
def block(request, monkeypatch):
    from reval_kernels.backends.gpu import bellman

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
