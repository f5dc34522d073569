"""The argument `precision` of the linear functions: what each name allows, and what it keeps."""

import pytest
import torch
from cases import BACKENDS, assert_same_bits, evaluate, head, upstream

from reval_kernels import linear_reval_loss, linear_token_values, reference
from reval_kernels.contract import PRECISIONS

needs_triton = pytest.mark.skipif("triton" not in BACKENDS, reason="other backends compute exactly")
FAST = [name for name in PRECISIONS if name != "exact"]


def logits_of(hidden, weight):
    """The float64 logits [N, V], and the sum of the magnitudes of their products."""
    return hidden.double() @ weight.double().T, hidden.double().abs() @ weight.double().abs().T


def all_logits(hidden, weight, **options):
    """Every logit [N, V], as q of the word."""
    words = torch.arange(len(weight))
    rows = hidden[:, None].expand(-1, len(weight), -1)
    return linear_token_values(rows, weight, words.expand(len(hidden), -1), **options).q


@pytest.mark.parametrize("function", [linear_token_values, linear_reval_loss])
def test_a_wrong_name_is_refused_with_the_nearest(function):
    hidden, weight, actions = head(2, 3, 5, 4)
    about = (
        {} if function is linear_token_values else {"reference": torch.zeros(2), "rewards": torch.zeros(2), "beta": 1}
    )
    with pytest.raises(
        ValueError, match=r"precision must be one of 'exact', .*got 'bf16x2' \(did you mean 'bf16x3'\?\)"
    ):
        function(hidden, weight, actions, precision="bf16x2", **about)


@pytest.mark.parametrize("name", FAST)
def test_other_backends_compute_exactly(backend, name):
    if backend == "triton":
        return
    hidden, weight, actions = head(2, 3, 129, 31)
    inputs = {"hidden": hidden, "weight": weight, "actions": actions}
    by = upstream(actions.shape, "v", "log_prob")
    assert_same_bits(
        evaluate(linear_token_values, inputs, by, backend=backend, precision=name),
        evaluate(linear_token_values, inputs, by, backend=backend),
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", FAST)
def test_other_dtypes_are_multiplied_as_before(backend, name, dtype):
    hidden, weight, actions = head(2, 3, 129, 16, dtype=dtype)
    out = [linear_token_values(hidden, weight, actions, backend=backend, precision=p) for p in (name, "exact")]
    assert_same_bits(list(out[0][:3]), list(out[1][:3]))


@needs_triton
@pytest.mark.parametrize("width", [31, 64])
def test_errors_of_the_logits(width):
    """bf16 rounds an operand by 2^-8 at most, so a product by 2^-7. bf16x3 keeps hi and lo: lo is at most 2^-8 of the
    operand and rounded by 2^-8, and lo lo is left out, so 3 * 2^-16; and the sums in float32. Exact products have these
    sums alone."""
    hidden, weight, _ = head(6, 40, width)
    true, size = logits_of(hidden, weight)
    sums = 3 * width * 2**-24
    bounds = {"exact": sums, "bf16x3": 3 * 2**-16 + sums, "bf16": 2**-7 + 2**-16 + sums}
    errors = {}
    for name, bound in bounds.items():
        ours = all_logits(hidden, weight, backend="triton", precision=name)
        errors[name] = ((ours.double() - true).abs() / size).max()
        assert errors[name] <= bound, name
    assert errors["bf16"] > 30 * errors["bf16x3"]


@needs_triton
def test_bf16_is_the_cast_by_hand_with_gradients_in_float32():
    hidden, weight, actions = head(2, 5, 129, 64)
    inputs = {"hidden": hidden, "weight": weight, "actions": actions}
    cast = inputs | {"hidden": hidden.bfloat16(), "weight": weight.bfloat16()}
    by = upstream(actions.shape, "v", "log_prob")
    ours = evaluate(linear_token_values, inputs, by, backend="triton", precision="bf16")
    hand = evaluate(linear_token_values, cast, by, backend="triton")
    assert_same_bits([ours["v"], ours["log_prob"]], [hand["v"], hand["log_prob"]])
    for name in ("d hidden", "d weight"):
        assert ours[name].dtype == torch.float32
        assert_same_bits(ours[name].bfloat16(), hand[name])
        assert not torch.equal(ours[name], hand[name].float())  # not rounded to bf16


OPTIONS = [{}, {"softcap": 5.0, "temperature": 0.7}, {"bias": torch.linspace(-1, 1, 129)}]


@needs_triton
@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "softcap", "bias"])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", FAST)
def test_values_and_gradients(name, frozen, options):
    """A gradient has operands in bf16 at worst: a few roundings of 2^-8, relative to the sum of the products' sizes."""
    hidden, weight, actions = head(2, 5, 129, 64)
    mask = torch.tensor([[True] * 5, [True, True, False, True, False]])
    by = upstream(actions.shape, "q", "v", "log_prob")
    options = options | {"mask": mask}
    leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_(not frozen)]
    wide = [x.detach().double().requires_grad_(x.requires_grad) for x in leaves]
    ours = linear_token_values(*leaves, actions, backend="triton", precision=name, **options)
    true = reference.linear_token_values(
        *wide, actions, **{k: x.double() if k == "bias" else x for k, x in options.items()}
    )
    tolerance = {"bf16x3": 2**-14, "tf32": 2**-9, "bf16": 2**-6}[name]
    for k in ("q", "v", "log_prob"):
        assert (getattr(ours, k) - getattr(true, k)).abs().max() <= tolerance * getattr(true, k).abs().max(), k
    gradients = [
        torch.autograd.grad(
            [getattr(out, k) for k in by], [x for x in of if x.requires_grad], [g.to(out.q.dtype) for g in by.values()]
        )
        for out, of in ((ours, leaves), (true, wide))
    ]
    for mine, truth in zip(*gradients, strict=True):
        assert (mine - truth).abs().max() <= 2**-5 * truth.abs().max()


@needs_triton
@pytest.mark.parametrize("kinds", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
@pytest.mark.parametrize("name", ["bf16x3", "bf16"])
def test_a_pair_of_float32_and_bfloat16_uses_the_kernel(monkeypatch, name, kinds):
    from reval_kernels.backends import portable

    def refuse(*_):
        raise AssertionError("went to the portable backend")

    monkeypatch.setattr(portable, "linear_token_values", refuse)
    hidden, weight, actions = head(3, 129, 16)
    hidden, weight = hidden.to(kinds[0]), weight.to(kinds[1])
    ours = linear_token_values(hidden, weight, actions, backend="triton", precision=name)
    true = reference.linear_token_values(hidden.double(), weight.double(), actions)
    assert (ours.v - true.v).abs().max() <= (2**-14 if name == "bf16x3" else 2**-6) * true.v.abs().max()


@needs_triton
@pytest.mark.parametrize("name", PRECISIONS)
def test_a_policy_equal_to_its_reference_has_no_loss(name):
    hidden, weight, actions = head(3, 5, 129, 32)
    inputs = {"hidden": hidden, "weight": weight, "actions": actions}
    about = {"backend": "triton", "precision": name}
    known = linear_token_values(**inputs, **about)
    ours = evaluate(
        linear_reval_loss,
        inputs,
        {"loss": torch.tensor(1.0)},
        reference=known,
        rewards=torch.zeros(3),
        beta=0.1,
        **about,
    )
    assert all((ours[k] == 0).all() for k in ("loss", "d hidden", "d weight"))


@needs_triton
def test_torch_s_setting_for_float32_matmuls_is_restored():
    hidden, weight, actions = head(3, 129, 16)
    before = torch.get_float32_matmul_precision()
    leaf = hidden.requires_grad_()
    linear_token_values(leaf, weight.requires_grad_(), actions, backend="triton", precision="tf32").v.sum().backward()
    assert torch.get_float32_matmul_precision() == before


@needs_triton
@pytest.mark.parametrize("name", ["bf16x3", "tf32"])
def test_compiled_code_has_the_same_bits(name):
    hidden, weight, actions = head(3, 129, 16)
    function = torch.compile(linear_token_values, fullgraph=True, backend="eager")
    options = {"backend": "triton", "precision": name}
    ours = [f(hidden, weight, actions, **options) for f in (function, linear_token_values)]
    assert_same_bits(list(ours[0][:3]), list(ours[1][:3]))
