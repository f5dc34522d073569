"""Shared by the tests here: the backends, random inputs, evaluation with gradients, and the measure of errors.

Three results per case are compared: the definition (reference.py) in float64, called the truth; the definition in the
dtype of the test, called plain PyTorch; and ours, the backend's result. Our error may be at most twice the error of
plain PyTorch, plus one unit in the last place of the quantity's scale.

Letters: `...` is [B, T] or [N], V words of the vocabulary, D features.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import reval_kernels
from reval_kernels import TokenValues, reference
from reval_kernels.backends import BACKENDS as modules

DEVICE = os.environ.get("REVAL_TEST_DEVICE", "cpu")


def chosen_backends() -> list[str]:
    """Every available backend, or those named in REVAL_TEST_BACKENDS=portable,cpu. On a GPU: those that serve it."""
    found = reval_kernels.backends()
    serving = {name for name, x in modules.items() if DEVICE == "cpu" or DEVICE in (x.DEVICES or (DEVICE,))}
    available = [name for name, info in found.items() if info.available and name in serving]
    chosen = os.environ.get("REVAL_TEST_BACKENDS", ",".join(available)).split(",")
    for name in set(chosen) - set(available):  # without this error every test would be skipped silently
        raise ValueError(f"REVAL_TEST_BACKENDS: {name!r} cannot run here: {found.get(name)}")
    return chosen


BACKENDS = chosen_backends()

# The largest number of logits in a test of a slow backend: on a CPU, triton runs in its interpreter.
LARGEST = {"triton": 1 << 14} if DEVICE == "cpu" else {}

Tensors = dict[str, Tensor]

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def on_backends(cases: Iterable[tuple[int, ...]], entries: Callable[[tuple[int, ...]], int] = math.prod):
    """Parametrise `backend` and `shape`: every backend with the shapes that are not too large for this backend."""
    pairs = [(b, s) for b in BACKENDS for s in cases if entries(s) <= LARGEST.get(b, math.inf)]
    return pytest.mark.parametrize(("backend", "shape"), pairs, ids=lambda x: x if isinstance(x, str) else str(list(x)))


# --- inputs ---------------------------------------------------------------------------------------------------------


def logits_and_actions(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 2.0) -> tuple[Tensor, Tensor]:
    """logits [..., V] and actions [...]."""
    return (torch.randn(shape) * scale).to(dtype), torch.randint(shape[-1], shape[:-1])


def head(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """hidden [..., D], weight [V, D] and actions [...] for the shape (..., V, D); logits of standard deviation 2."""
    *tokens, vocabulary, width = shape
    hidden, weight = torch.randn(*tokens, width), torch.randn(vocabulary, width) * 2 / width**0.5
    return hidden.to(dtype), weight.to(dtype), torch.randint(vocabulary, tokens)


def upstream(shape: torch.Size, *names: str, dtype: torch.dtype = torch.float32) -> Tensors:
    """A random gradient for each output; a third of its entries is 0. The second token has gradient 0."""
    out = {}
    for name in names or ("q", "v", "log_prob", "entropy"):
        out[name] = torch.randn(shape, dtype=dtype) * (torch.rand(shape) < 2 / 3)
        if out[name].numel() > 1:
            out[name].view(-1)[1] = 0
    return out


def values(*shape: int, dtype: torch.dtype = torch.float64, vocabulary: int = 5) -> TokenValues:
    """Token values [...] of random logits."""
    return reference.token_values(*logits_and_actions(*shape, vocabulary, dtype=dtype))


# --- results --------------------------------------------------------------------------------------------------------


def evaluate(function: Callable, inputs: Tensors, upstream: Tensors, **options) -> Tensors:
    """The outputs named in `upstream`, and "d <name>", the gradient of sum(output * upstream) for each float input."""
    leaves = {k: x.detach().requires_grad_() if x.is_floating_point() else x for k, x in inputs.items()}
    out = function(**leaves, **options)
    results = {name: getattr(out, name) for name in upstream}
    wrt = {k: x for k, x in leaves.items() if x.requires_grad}
    cotangents = [g.to(results[name].dtype) for name, g in upstream.items()]
    gradients = torch.autograd.grad(list(results.values()), list(wrt.values()), cotangents)
    assert all(g.dtype == x.dtype and g.shape == x.shape for g, x in zip(gradients, wrt.values(), strict=True))
    return {k: x.detach() for k, x in results.items()} | dict(zip((f"d {k}" for k in wrt), gradients, strict=True))


def float64_truth(name: str, inputs: Tensors, upstream: Tensors, **options) -> Tensors:
    """The definition in float64."""
    wide = {k: x.double() if x.is_floating_point() else x for k, x in inputs.items()}
    return evaluate(getattr(reference, name), wide, upstream, **options)


def compare(backend: str, name: str, inputs: Tensors, upstream: Tensors, **options) -> Tensors:
    """Check outputs and gradients of reval_kernels.<name>. Returns our results."""
    ours = evaluate(getattr(reval_kernels, name), inputs, upstream, backend=backend, **options)
    plain = evaluate(getattr(reference, name), inputs, upstream, **options)
    truth = float64_truth(name, inputs, upstream, **options)
    scales = natural_scales(name, inputs, truth, upstream, **options)
    floor = logit_error(inputs) + residual_error(name, inputs, **options)
    for what in truth:
        device = device_error(name, inputs, truth, upstream, what, **options) if backend == "triton" else 0.0
        scale, more = scales.get(what), floor + device
        assert_no_worse_than_torch(ours[what], plain[what], truth[what], scale=scale, floor=more, what=what)
    return ours


def residual_error(name: str, inputs: Tensors, **options) -> float:
    """The relative error of a residual, and so of its gradients, from numbers that are rounded to float32 before the
    residual is taken: V(s_1) and log pi of every token, and the policy's return if the reference is a return."""
    if "reference" not in options or "values" in options or "logits" not in inputs and "hidden" not in inputs:
        return 0.0
    wide = {k: x.double() if x.is_floating_point() else x for k, x in inputs.items()}
    residual = getattr(reference, name)(**wide, **options).residual
    about_values = {k: options[k] for k in ("mask", "temperature", "softcap") if k in options}
    values = getattr(reference, "linear_token_values" if "hidden" in inputs else "token_values")(**wide, **about_values)
    layout = {k: options[k] for k in ("mask", "cu_seqlens") if k in options}
    sizes = TokenValues(values.v.abs(), values.v.abs(), values.log_prob.abs(), None)
    nothing, none = torch.zeros_like(residual), torch.zeros_like(residual)
    rounded = reference.bellman_loss(
        sizes, nothing, none, beta=1.0, **layout
    ).residual  # |V(s_1)| + the sum of |log pi|
    if isinstance(options["reference"], Tensor):
        rounded = rounded + (residual + options["reference"] + options["rewards"] / options["beta"]).abs()
    return float((rounded / residual).abs()[residual != 0].max()) * torch.finfo(torch.float32).eps / 2


def logit_error(inputs: Tensors) -> float:
    """The error of a float32 logit, a sum of products. It is also the relative error of a probability."""
    if "hidden" not in inputs or not inputs["hidden"].numel():
        return 0.0
    products = inputs["hidden"].double().nan_to_num().abs() @ inputs["weight"].double().abs().T
    return float(products.max()) * torch.finfo(torch.float32).eps


INSTRUCTION_ERROR = 0.0 if DEVICE == "cpu" else 2.0**-22
"""The relative error of a GPU's exp2 and division, for which Triton emits ex2.approx.ftz.f32 and div.full.f32.

Both are documented with 2 ulp (CUDA C++ Programming Guide, mathematical functions, exp2f and x / y), which is at most
2^-22. tl.log is a polynomial within 1 ulp and tl.div_rn is correctly rounded, as in the interpreter.
"""


def device_error(name: str, inputs: Tensors, truth: Tensors, upstream: Tensors, what: str, **options) -> float:
    """What a GPU's exp2 and division, with relative error E each, add to the error of one result, relative to its
    scale (`natural_scales`). Zero on a CPU. First order in E; z is a logit after softcap and temperature.

    - z, absolute: 0 without a softcap. With one, -2 / softcap, exp2 and a division: 3 E |z|.
    - log_sum, absolute: a weight exp2(..) is computed or rescaled at most once a block of 4096, its lane is joined with
      the others, and log1p divides: (blocks + 2) E, and the errors of two z. From hidden states tiles are joined too.
      (Programs share a row from 17 blocks on, and each has at most 16 of them.)
    - v, log_prob: those of log_sum and of z. q: that of z.
    - entropy = log_sum - t / T / (1 + s): two divisions, and t and s each have the error of log_sum; |t| <= log V.
    - a gradient of logits is proportional to p: two exp2, log_sum, two z. 1 / T is divided twice: in the factor, and in
      z, which changes p by E p |log p| <= E / e. The slope of the softcap is a sum of squares of tanh: 4 E more.
      The gradients of several outputs may cancel in the scale, a row's largest entry: times their size over the scale.
      An entropy's gradient is p (log p + entropy), and both terms have these errors.
    - a residual sums the v and log_prob of a trajectory. The loss and its gradients are relative to the residual.
    """
    e = INSTRUCTION_ERROR
    if not e or not truth[what].numel():
        return 0.0
    wide = {k: x.double() if x.is_floating_point() else x for k, x in inputs.items()}
    z, vocabulary = _logits(wide, **options)
    softcap = options.get("softcap") is not None
    logit = 3 * e * float(z.where(z.isfinite(), 0).abs().max()) if softcap and z.numel() else 0.0
    log_sum = (math.ceil(vocabulary / 4096) + 2 + ("hidden" in inputs)) * e + 2 * logit
    value = log_sum + 2 * logit
    if what in ("q", "v", "log_prob"):
        scale = float(truth[what].where(truth[what].isfinite(), 0).abs().max()) + math.log(vocabulary)
        return value / scale if scale else 0.0
    if what == "entropy":
        return (log_sum + 2 * (log_sum + e) * math.log(vocabulary)) / max(math.log(vocabulary), e)
    slope = (1 if options.get("temperature") is not None else 0) + (4 if softcap else 0)
    gradient = 2 * e + value + (slope + 1) * e
    if "loss" not in truth and "residual" not in truth:
        return gradient * (_cancellation(wide, truth, upstream, **options) if what == "d logits" else 1.0)
    return gradient * what.startswith("d ") + 2 * value * _terms_per_residual(name, wide, **options)


def _logits(wide: Tensors, **options) -> tuple[Tensor, int]:
    """Unmasked logits in float64 after softcap and temperature, and V."""
    x = wide.get("logits")
    if x is None:
        x = reference._head(wide["hidden"], wide["weight"], wide.get("bias"), options.get("mask"))
    vocabulary, temperature = x.shape[-1], options.get("temperature", 1.0)
    temperature = temperature[..., None].double() if isinstance(temperature, Tensor) else temperature
    if options.get("softcap") is not None:
        x = options["softcap"] * torch.tanh(x / options["softcap"])
    z, mask = x / temperature, options.get("mask")
    return z if mask is None else z[mask], vocabulary


def _cancellation(wide: Tensors, truth: Tensors, upstream: Tensors, **options) -> float:
    """The size of the terms of a row's gradient over its largest entry: the largest of all rows."""
    each = [float64_truth("token_values", wide, {k: g}, **options)["d logits"].abs() for k, g in upstream.items()]
    if "entropy" in upstream:  # p log p and p entropy alone
        size = {"v": upstream["entropy"].abs() * 2 * (1 + truth["entropy"])}
        each.append(float64_truth("token_values", wide, size, **options)["d logits"].abs())
    terms, largest = torch.stack(each).sum(0).amax(-1), truth["d logits"].abs().amax(-1)
    return float((terms / largest)[largest > 0].max()) if (largest > 0).any() else 0.0


def _terms_per_residual(name: str, wide: Tensors, **options) -> float:
    """The number of values that a residual sums, over the residual: the largest of all trajectories that have one."""
    residual = getattr(reference, name)(**wide, **options).residual.detach().abs()
    steps = wide["actions"].shape[-1] + 1
    return float(steps / residual[residual > 0].min()) if (residual > 0).any() else 0.0


def natural_scales(name: str, inputs: Tensors, truth: Tensors, upstream: Tensors, **options) -> Tensors:
    """The scales of the errors: the size of the terms whose sum is the result. (The default scale of a result without
    one is its largest entry.)

    - v, log_prob, entropy: the largest entry plus log V, for a logit and the logarithm of a sum over the vocabulary
    - a row of dlogits: its largest entry
    - gradients of the head's inputs: the sum of the magnitudes of the products
    """
    if "logits" in inputs:
        vocabulary = inputs["logits"].shape[-1]
        scales = {"d logits": truth["d logits"].abs().amax(-1, keepdim=True)}
    else:
        head = {k: inputs[k].double() for k in ("hidden", "weight", "bias") if k in inputs}
        rest = {k: x for k, x in inputs.items() if k not in head}
        logits = reference._head(head["hidden"], head["weight"], head.get("bias"), options.get("mask"))
        vocabulary, on_logits = logits.shape[-1], {"logits": logits, **rest}
        on = name.removeprefix("linear_")
        one_by_one = [float64_truth(on, on_logits, {k: g}, **options)["d logits"] for k, g in upstream.items()]
        d_logits = torch.stack(one_by_one).abs().sum(0)
        # dv p and dlog_prob p may cancel, and so may log p + entropy. So the terms before the sum are about as large as
        # p times the sum of all upstream gradients.
        size = d_logits.amax(-1) + (upstream["entropy"].abs() * (1 + truth["entropy"]) if "entropy" in upstream else 0)
        about_values = {k: x for k, x in options.items() if k in ("mask", "temperature", "softcap")}
        d_logits = d_logits + float64_truth("token_values", on_logits, {"v": size}, **about_values)["d logits"]
        rows, hidden = (x.flatten(0, -2) for x in (d_logits, head["hidden"].nan_to_num().abs()))
        scales = {
            "d hidden": d_logits @ head["weight"].abs(),
            "d weight": rows.T @ hidden,
            "d bias": rows.sum(0),
        }
    for what in {"v", "log_prob", "entropy"} & truth.keys():
        scales[what] = truth[what].abs().amax() + math.log(vocabulary) if truth[what].numel() else truth[what]
    return scales


def torch_error(x: Tensor, truth: Tensor, scale: Tensor | None = None) -> float:
    """The largest error in units of `scale` (default: the largest entry). Where the scale is 0, x must be exact."""
    smallest = torch.finfo(x.dtype).smallest_normal  # below this number the spacing of floats no longer shrinks
    x, truth = x.detach().double(), truth.detach().double()
    if not x.numel():
        return 0.0
    infinite = truth.isinf()
    if not torch.equal(x[infinite], truth[infinite]):
        return math.inf
    error, finite = (x - truth).where(~infinite, 0).abs(), truth.where(~infinite, 0)
    scale = (finite.abs().max() if scale is None else scale).expand_as(error)
    scale = scale.clamp(min=smallest).where(scale > 0, 0)
    error = torch.where(error == 0, 0.0, error / scale)  # NaN and errors at scale 0 stay
    return math.inf if error.isnan().any() else float(error.max())


def assert_no_worse_than_torch(
    ours: Tensor,
    plain: Tensor,
    truth: Tensor,
    slack: float = 2.0,
    *,
    scale: Tensor | None = None,
    floor: float = 0.0,
    what: str = "",
) -> None:
    """Our error is at most `slack` times plain PyTorch's in the same dtype, plus `floor` and one unit in the last
    place."""
    assert ours.dtype == plain.dtype, f"{what}: {ours.dtype}, the definition has {plain.dtype}"
    assert ours.shape == truth.shape, f"{what}: {ours.shape}, the definition has {truth.shape}"
    mine, theirs = torch_error(ours, truth, scale), torch_error(plain, truth, scale)
    bound = slack * theirs + floor + torch.finfo(ours.dtype).eps
    if ours.dtype == torch.float64 and theirs < 1e-12:  # the truth has no more digits than ours
        bound = 1024 * torch.finfo(ours.dtype).eps
    assert mine <= bound, f"{what}: error {mine:.3g} of the scale, plain PyTorch {theirs:.3g}, bound {bound:.3g}"


def assert_same_bits(a: Any, b: Any) -> None:
    """Check that two results (tensors, in tuples or dicts) have the same bits."""
    if isinstance(a, Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), f"{a} != {b}"
    elif a is None or b is None:
        assert a is b
    else:
        pairs = zip(a.values(), b.values(), strict=True) if isinstance(a, dict) else zip(a, b, strict=True)
        for x, y in pairs:
            assert_same_bits(x, y)


def assert_close(ours: Tensor, truth: Tensor, tolerance: float = 1e-12) -> None:
    """Check that two float64 results are equal up to rounding, relative to the largest entry."""
    error = torch_error(ours, truth)
    assert error <= tolerance, f"error {error:.3g} of the scale"


# --- refused data ---------------------------------------------------------------------------------------------------

CALL = """
import sys
import torch
import reval_kernels
name, arguments = torch.load(sys.argv[1], weights_only=False)
try:
    out = getattr(reval_kernels, name)(**arguments)
    torch.cuda.synchronize()
except RuntimeError:
    print("refused")
else:
    print("accepted")
"""


def assert_refused(function: Callable, text: str, **arguments: Any) -> None:
    """Check that a function refuses data: on a CPU with a ValueError of exactly this text.

    On a GPU the refusal is a device-side assert, after which its process cannot use the GPU. So there a process of its
    own makes the call and waits for the GPU. It must get a RuntimeError, and the assert names the argument, the first
    word of `text`.
    """
    if DEVICE == "cpu":
        with pytest.raises(ValueError) as caught:
            function(**arguments)
        assert type(caught.value) is ValueError and str(caught.value) == text
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "call.pt")
        torch.save((function.__name__, arguments), path)
        done = subprocess.run([sys.executable, "-c", CALL, path], capture_output=True, text=True, timeout=200)
    assert done.stdout.strip() == "refused" and text.split()[0] in done.stderr, done.stdout + done.stderr
