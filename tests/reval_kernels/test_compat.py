"""The calls of TRL 1.16 and Liger 0.8.5 (reval_kernels/compat): their signatures, and values and gradients in float64.

The sizes are 0 and 1, and those around 16, where kernels go from one vector to two. Each test runs on the default
backend and on the portable one, which is the default where the C++ kernels were not built.
"""

import importlib
import inspect
import math

import pytest
import torch
import torch.distributed as dist
from cases import DEVICE, assert_no_worse_than_torch, head, logits_and_actions

from reval_kernels import backends
from reval_kernels.backends import chunks, cpu
from reval_kernels.compat import liger, trl_kernels, trl_utils

ROWS = {
    "trl_utils": trl_utils.selective_log_softmax_and_entropy,
    "trl_kernels": trl_kernels.selective_log_softmax_and_entropy,
}
chunked = trl_kernels.ChunkedLogProbFunction.apply
scaled = liger.LigerFusedLinearScaledCrossEntropyFunction.apply


@pytest.fixture(params=["default", "portable"])
def default_backend(request, monkeypatch):
    if request.param == "portable":
        if DEVICE != "cpu" or backends()["cpu"].reason:
            pytest.skip("portable is the default already, or the tests run on a GPU")
        monkeypatch.setattr(cpu, "missing", lambda: "not built")


BOTH = pytest.mark.usefixtures("default_backend")

# --- signatures -----------------------------------------------------------------------------------------------------

ROW = "(logits, index, temperature=1.0, row_mask=None)"
TP = "weight, target, tp_group, temperature=1.0, ignore_index=-100, tiles_per_reduce=1, return_entropy=False)"
CALLS = [
    (trl_utils.selective_log_softmax, "trl.trainer.utils:selective_log_softmax", ROW),
    (trl_utils.entropy_from_logits, "trl.trainer.utils:entropy_from_logits", "(logits, chunk_size=128)"),
    (
        trl_utils.selective_log_softmax_and_entropy,
        "trl.trainer.utils:selective_log_softmax_and_entropy",
        "(logits, index, entropy_requires_grad=True, temperature=1.0, row_mask=None)",
    ),
    (
        trl_kernels.selective_log_softmax_and_entropy,
        "trl.kernels.logprob_entropy:selective_log_softmax_and_entropy",
        ROW,
    ),
    (
        chunked,
        "trl.kernels:ChunkedLogProbFunction.forward",
        "(hidden, weight, bias, targets, temperature, chunk_size, final_logit_softcapping=None, logit_scale=1.0, "
        "outputs=('entropy', 'log_sum_sq_probs', 'mean_logits', 'is_top1'))",
    ),
    (
        scaled,
        "liger_kernel.ops:LigerFusedLinearScaledCrossEntropyFunction.apply",
        "(_input, weight, target, temperature=1.0, ignore_index=-100, m_tiles_per_cluster=1, return_entropy=False, "
        "selected_token_ids=None)",
    ),
    (
        liger.LigerFusedLinearScaledCrossEntropyTPFunction.apply,
        "liger_kernel.ops:LigerFusedLinearScaledCrossEntropyTPFunction.apply",
        f"(_input, {TP}",
    ),
    (
        liger.liger_fused_linear_scaled_cross_entropy_tp,
        "liger_kernel.transformers.functional:liger_fused_linear_scaled_cross_entropy_tp",
        f"(input, {TP}",
    ),
]
"""Our function, the name of the peer's, and the peer's signature as it was in TRL 1.16.0 and Liger 0.8.5."""


def signature(function) -> str:
    """Names, order, kinds and defaults, without annotations and without the ctx of an autograd function."""
    found = inspect.signature(function)
    parameters = [p.replace(annotation=p.empty) for p in found.parameters.values() if p.name != "ctx"]
    return str(found.replace(parameters=parameters, return_annotation=found.empty))


@pytest.mark.parametrize(("ours", "name", "recorded"), CALLS, ids=[name for _, name, _ in CALLS])
def test_the_signature_is_the_peers(ours, name, recorded):
    assert signature(ours) == recorded
    module, _, path = name.partition(":")
    try:
        theirs = importlib.import_module(module)
    except ImportError as error:
        pytest.skip(f"compared with the recorded signature alone: {error}")
    for part in path.split("."):
        theirs = getattr(theirs, part)
    assert signature(theirs) == recorded


# --- from logits ----------------------------------------------------------------------------------------------------


def plain(logits, index, mask=None, temperature=1.0):
    """log-prob and entropy as one would write them; a word at -inf adds nothing to the entropy."""
    log_p = (logits / temperature).log_softmax(-1)
    entropy = -(log_p.exp() * log_p.where(log_p > -math.inf, 0)).sum(-1)
    own = log_p.gather(-1, index if index.dim() == logits.dim() else index[..., None])
    own = own if index.dim() == logits.dim() else own[..., 0]
    return (own, entropy) if mask is None else (own.where(mask, 0), entropy.where(mask, 0))


def check(ours, definition, inputs, *constants, truth_inputs=None, slack=2.0, **options):
    """Outputs and gradients of `ours` against `definition` in float64; plain PyTorch in float32 is the yardstick."""
    by = None
    results = []
    wide = [x.double() for x in (truth_inputs or inputs)]
    for function, given in ((ours, inputs), (definition, [x.float() for x in inputs]), (definition, wide)):
        leaves = [x.detach().requires_grad_() for x in given]
        out = [x for x in function(*leaves, *constants, **(options if function is ours else {})) if x is not None]
        by = [torch.randn(x.shape) for x in out] if by is None else by
        gradients = torch.autograd.grad(out, leaves, [g.to(x.dtype) for g, x in zip(by, out, strict=True)])
        results.append((out, gradients))
    (mine, my_gradients), (plain_out, plain_gradients), (truth, true_gradients) = results
    wanted = torch.float64 if inputs[0].dtype == torch.float64 else torch.float32
    for x, y, z in zip(mine, plain_out, truth, strict=True):
        assert x.dtype == wanted
        scale = z.detach().abs().max() + 1 if z.numel() else None
        assert_no_worse_than_torch(x, y.to(wanted), z, slack, scale=scale, floor=2e-7, what="output")
    for x, y, z, leaf in zip(my_gradients, plain_gradients, true_gradients, inputs, strict=True):
        assert x.dtype == leaf.dtype and x.isfinite().all()
        assert_no_worse_than_torch(x, y.to(x.dtype), z, slack, floor=4 * torch.finfo(leaf.dtype).eps, what="gradient")
    return mine


@BOTH
@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(15, 17), (1, 1), (16, 16), (17, 15), (2, 3, 1030), (0, 5)])
def test_log_probs_and_entropy(name, dtype, shape):
    logits, index = logits_and_actions(*shape, dtype=dtype)
    check(ROWS[name], plain, [logits], index)
    one_word = trl_utils.selective_log_softmax
    check(lambda *x, **y: (one_word(*x, **y),), lambda *x: plain(*x)[:1], [logits], index)
    check(lambda x: (trl_utils.entropy_from_logits(x),), lambda x: plain(x, index)[1:], [logits])


@BOTH
@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("kind", [torch.bool, torch.int32, torch.int64])
def test_masked_rows_are_never_read(name, kind):
    logits, index = logits_and_actions(15, 17)
    mask = torch.rand(15) < 0.6
    truth = logits.clone()
    logits[~mask], index = torch.nan, index.where(mask, -100)

    def definition(x, i):
        return plain(x.where(mask[:, None], 0), i.where(mask, 0), mask, 0.7)

    found = check(
        ROWS[name],
        definition,
        [logits],
        index,
        truth_inputs=[truth],
        temperature=0.7,
        row_mask=mask.to(kind) * torch.tensor(2, dtype=kind),
    )
    assert all((x[~mask] == 0).all() for x in found)


@BOTH
@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("columns", [slice(0, 1030), slice(5, 9), slice(1, None)])
def test_columns_of_minus_infinity(name, columns):
    """The first 1,030 words (a whole block of TRL's kernel), some words, all words but one."""
    logits, index = logits_and_actions(3, 1100)
    logits[:, columns] = -torch.inf
    index = logits.argmax(-1)
    check(ROWS[name], plain, [logits], index)


def on_a_grid(*shape):
    """Logits to which float32 can add 1e4 exactly."""
    logits, index = logits_and_actions(*shape)
    return (logits * 8).round() / 8, index


@BOTH
@pytest.mark.parametrize("name", ROWS)
def test_a_common_offset_costs_no_digits(name):
    logits, index = on_a_grid(16, 130)
    check(ROWS[name], plain, [logits + 1e4], index, truth_inputs=[logits])


def test_the_entropy_has_a_gradient_or_none():
    logits, index = logits_and_actions(2, 5)
    logits.requires_grad_()
    with_gradient = trl_utils.selective_log_softmax_and_entropy(logits, index)
    without = trl_utils.selective_log_softmax_and_entropy(logits, index, False)
    assert with_gradient[1].requires_grad and not without[1].requires_grad and without[0].requires_grad
    assert torch.equal(with_gradient[1], without[1])


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(15, 17, 4), (1, 1, 1), (2, 3, 130, 7), (0, 5, 2), (3, 5, 0)])
def test_several_words_a_row(dtype, shape):
    *rows, vocabulary, several = shape
    logits, _ = logits_and_actions(*rows, vocabulary, dtype=dtype)
    index = torch.randint(vocabulary, (*rows, several))
    ours = trl_utils.selective_log_softmax
    check(lambda *x, **y: (ours(*x, **y),), lambda *x: plain(*x)[:1], [logits], index)
    check(lambda *x, **y: (ours(*x, **y),), lambda *x: plain(*x, None, 0.7)[:1], [logits], index, temperature=0.7)


@BOTH
def test_several_words_with_offset_mask_and_minus_infinity():
    logits, _ = on_a_grid(15, 130)
    index = torch.randint(130, (15, 4))
    mask = torch.rand(15, 4) < 0.6
    mask[3] = False
    logits[:, ::3] = -torch.inf
    offset = logits + 1e4
    offset[3] = torch.nan

    def definition(x, i):
        kept = x.clone()
        kept[3] = 0
        log_p = plain(kept, i)[0]
        return (log_p.where(mask, 0),)

    def ours(x, i):
        return (trl_utils.selective_log_softmax(x, i.where(mask, -100), row_mask=mask.int()),)

    check(ours, definition, [offset], index % 129 // 3 * 3 + 1, truth_inputs=[logits])
    impossible = trl_utils.selective_log_softmax(logits, torch.zeros(15, 1, dtype=torch.long))
    assert (impossible == -torch.inf).all()


# --- from hidden states ---------------------------------------------------------------------------------------------


def plain_head(hidden, weight, bias, targets, temperature=1.0, softcap=None, scale=1.0):
    """Log-prob, entropy, and the three statistics of TRL's chunked head, which are returned without a gradient."""
    z = (hidden @ weight.T + (0 if bias is None else bias)) * scale
    z = (z if softcap is None else softcap * torch.tanh(z / softcap)) / temperature
    own, entropy = plain(z, targets)
    p = z.detach().softmax(-1)
    return own, entropy, p.square().sum(-1).log(), z.detach().mean(-1), z.detach().argmax(-1) == targets


def head_inputs(tokens, vocabulary=130, width=17, dtype=torch.float32):
    hidden, weight, targets = head(tokens, vocabulary, width, dtype=dtype)
    return [hidden, weight, torch.randn(vocabulary).to(dtype)], targets


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("tokens", [0, 1, 15, 16, 17])
@pytest.mark.parametrize("transform", [{}, {"temperature": 0.7, "softcap": 5.0, "scale": 0.3}])
def test_the_chunked_head(tokens, dtype, transform):
    inputs, targets = head_inputs(tokens, dtype=dtype)
    arguments = transform.get("temperature", 1.0), 32, transform.get("softcap"), transform.get("scale", 1.0)
    check(
        lambda h, w, b, t: chunked(h, w, b, t, *arguments)[:2],
        lambda h, w, b, t: plain_head(h, w, b, t, **transform)[:2],
        inputs,
        targets,
    )
    wide = [x.double() for x in inputs]
    truth = plain_head(*wide, targets, **transform)
    found = chunked(*inputs, targets, *arguments)
    for x, y in zip(found[2:4], truth[2:4], strict=True):
        assert not x.requires_grad and x.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(x.double(), y, rtol=1e-5, atol=1e-5)
    assert torch.equal(found[4], truth[4])
    log_prob, log_z, entropy = trl_kernels.chunked_log_probs(*inputs, targets, arguments[0], *arguments[2:])
    assert torch.equal(log_prob, found[0]) and torch.equal(entropy, found[1])
    torch.testing.assert_close(
        log_z.double(), plain_log_z(*wide, **transform), rtol=1e-5, atol=1e-5
    )  # no peer returns log Z


def test_the_statistics_of_several_chunks(monkeypatch):
    (hidden, weight, bias), targets = head_inputs(17)
    whole = chunked(hidden, weight, bias, targets, 1.0, 32)[2:]
    monkeypatch.setattr(chunks, "LINEAR_CHUNK", 5 * 130)
    for x, y in zip(chunked(hidden, weight, bias, targets, 1.0, 32)[2:], whole, strict=True):
        torch.testing.assert_close(x, y)


def plain_log_z(hidden, weight, bias, temperature=1.0, softcap=None, scale=1.0):
    z = (hidden @ weight.T + bias) * scale
    return ((z if softcap is None else softcap * torch.tanh(z / softcap)) / temperature).logsumexp(-1)


def test_only_the_outputs_that_are_named():
    (hidden, weight, _), targets = head_inputs(5)
    assert [x is None for x in chunked(hidden, weight, None, targets, 1.0, 32, outputs=())] == [False] + 4 * [True]
    found = chunked(hidden, weight, None, targets, 1.0, 32, None, 1.0, ("log_sum_sq_probs", "entropy"))
    assert [x is None for x in found] == [False, False, False, True, True]


def test_the_first_of_equal_logits_is_the_top():
    weight = torch.tensor([[0.0], [1.0], [1.0]])
    top = chunked(torch.ones(3, 1), weight, None, torch.arange(3), 1.0, 32)[4]
    assert top.tolist() == [False, True, False]


@BOTH
def test_an_offset_in_the_bias_costs_no_digits():
    (hidden, weight, bias), targets = head_inputs(15)
    inputs = [(x * 8).round() / 8 for x in (hidden, weight, bias)]
    offset = [*inputs[:2], inputs[2] + 1e4]
    check(lambda *x: chunked(*x, 1.0, 32)[:2], lambda *x: plain_head(*x)[:2], offset, targets, truth_inputs=inputs)


def test_autocast_changes_no_bit():
    (hidden, weight, bias), targets = head_inputs(5)
    words = torch.tensor([3, 1])
    with torch.autocast(DEVICE, torch.bfloat16):
        narrow = [
            *chunked(hidden, weight, bias, targets, 1.0, 32),
            *scaled(hidden, weight, targets, 1.0, -100, 1, True, words),
        ]
    wide = [
        *chunked(hidden, weight, bias, targets, 1.0, 32),
        *scaled(hidden, weight, targets, 1.0, -100, 1, True, words),
    ]
    assert all(torch.equal(x, y) for x, y in zip(narrow, wide, strict=True))


# --- Liger's scaled cross entropy -----------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("tokens", [0, 1, 15, 16, 17])
def test_scaled_cross_entropy(tokens, dtype):
    (hidden, weight, _), target = head_inputs(tokens, dtype=dtype)
    mask = torch.rand(tokens) < 0.7
    truth_inputs = [hidden.clone(), weight]
    hidden[~mask], target = torch.nan, target.where(mask, -7)
    words = torch.tensor([129, 0, 0, 64])

    def definition(h, w, t):
        z = (h.where(mask[:, None], 0) @ w.T) / 0.7
        own, entropy = plain(z, t.where(mask, 0), mask)
        return -own, entropy, z.log_softmax(-1)[:, words].where(mask[:, None], 0)

    check(
        lambda h, w, t: scaled(h, w, t, 0.7, -7, 1, True, words),
        definition,
        [hidden, weight],
        target,
        truth_inputs=truth_inputs,
    )


def test_an_offset_costs_the_selected_words_no_digits():
    """All numbers are multiples of 1/64, so every logit is exact with the offset too; V is not."""
    (hidden, weight, _), target = head_inputs(15)
    hidden, weight = ((x.detach() * 8).round() / 8 for x in (hidden, weight))
    hidden[:, 0] = 1
    words = torch.tensor([129, 0, 64])
    expected = (hidden.double() @ weight.double().T / 0.5).log_softmax(-1)[:, words]
    weight[:, 0] += 1e4
    found = scaled(hidden, weight, target, 0.5, selected_token_ids=words)[1]
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-5)


def test_what_scaled_cross_entropy_returns():
    (hidden, weight, _), target = head_inputs(5)
    whole = scaled(hidden, weight, target, return_entropy=True, selected_token_ids=torch.tensor([1]))
    nll, entropy, selected = whole
    assert torch.equal(scaled(hidden, weight, target), nll)
    for found, wanted in (
        (scaled(hidden, weight, target, return_entropy=True), (nll, entropy)),
        (scaled(hidden, weight, target, selected_token_ids=torch.tensor([1])), (nll, selected)),
    ):
        assert all(torch.equal(x, y) for x, y in zip(found, wanted, strict=True))


@pytest.mark.skipif(DEVICE != "cpu", reason="gloo, for tensors of the CPU")
def test_the_sharded_loss_asks_the_group(monkeypatch):
    """tests/reval_kernels/test_sharded.py has the values of several ranks; here the group must arrive."""
    (hidden, weight, _), target = head_inputs(5)
    expected = scaled(hidden, weight, target, 0.7, -100, 1, True)
    with pytest.raises(RuntimeError, match="not initialized"):
        liger.liger_fused_linear_scaled_cross_entropy_tp(hidden, weight, target, None)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    asked = []
    original = liger.linear_token_values
    monkeypatch.setattr(
        liger,
        "linear_token_values",
        lambda *x, process_group, **y: asked.append(process_group) or original(*x, process_group=process_group, **y),
    )
    try:
        group = dist.new_group([0])
        for given, wanted in ((group, group), (None, dist.group.WORLD)):
            found = liger.liger_fused_linear_scaled_cross_entropy_tp(
                hidden, weight, target, given, 0.7, return_entropy=True
            )
            assert asked.pop() is wanted
            for x, y in zip(found, expected, strict=True):
                torch.testing.assert_close(x, y)
    finally:
        dist.destroy_process_group()


# --- refused, compiled ----------------------------------------------------------------------------------------------


class PartOfZero3(torch.nn.Parameter):
    ds_id = 0


def test_what_cannot_be_honoured_is_refused_by_name():
    logits, index = logits_and_actions(3, 5)
    (hidden, weight, bias), targets = head_inputs(3)
    several = trl_utils.selective_log_softmax

    def refused(text, function, *arguments, **options):
        with pytest.raises((TypeError, ValueError)) as caught:
            function(*arguments, **options)
        assert str(caught.value).startswith(text), caught.value

    refused("index must lie in [0, 5)", several, logits, index + 5)
    refused("index must have shape [3]", several, logits, index[:2])
    refused("index must have shape [3, 2]", several, logits, torch.zeros(2, 2, dtype=torch.long))
    refused("index must be int64 or int32", several, logits, index.float())
    refused("row_mask must have shape [3]", several, logits, index, row_mask=index[:2])
    refused("row_mask must have shape [3, 1]", several, logits, index[:, None], row_mask=index)
    refused("row_mask must be a tensor or None, got list", several, logits, index, row_mask=[True, False, True])
    refused("logits must be a tensor, got list", trl_utils.entropy_from_logits, [[1.0, 2.0]])
    refused("temperature must be positive", several, logits, index, 0.0)
    refused("logits must be", several, logits.int(), index)
    refused("targets must lie in [0, 130)", chunked, hidden, weight, bias, targets - 200, 1.0, 32)
    refused("chunk_size must be a positive integer, got 0", chunked, hidden, weight, bias, targets, 1.0, 0)
    refused("temperature must be positive", chunked, hidden, weight, bias, targets, -1.0, 32)
    refused("logit_scale must be positive", chunked, hidden, weight, bias, targets, 1.0, 32, None, 0.0)
    refused("final_logit_softcapping", chunked, hidden, weight, bias, targets, 1.0, 32, 0.0)
    refused("outputs must be one of 'entropy'", chunked, hidden, weight, bias, targets, 1.0, 32, outputs=("top1",))
    refused("weight must be whole", chunked, hidden, PartOfZero3(weight), bias, targets, 1.0, 32)
    refused("target must lie in [0, 130)", scaled, hidden, weight, targets + 130)
    refused("_input must be", scaled, hidden.int(), weight, targets)
    refused("m_tiles_per_cluster must be", scaled, hidden, weight, targets, 1.0, -100, 0)
    refused("selected_token_ids must be int64", scaled, hidden, weight, targets, selected_token_ids=targets.int())
    refused(
        "tiles_per_reduce must be one of",
        liger.liger_fused_linear_scaled_cross_entropy_tp,
        hidden,
        weight,
        targets,
        None,
        1.0,
        -100,
        3,
    )


def test_compiled_in_one_graph():
    logits, index = logits_and_actions(3, 17)
    (hidden, weight, bias), targets = head_inputs(3)

    def everything(logits, index, hidden, weight, bias, targets):
        return (
            *trl_kernels.selective_log_softmax_and_entropy(logits, index, 0.7),
            trl_utils.selective_log_softmax(logits, torch.stack([index, index], -1)),
            *chunked(hidden, weight, bias, targets, 0.7, 32, 5.0, 0.3),
            *scaled(hidden, weight, targets, 0.7, -100, 1, True, torch.tensor([3])),
        )

    inputs = (logits, index, hidden, weight, bias, targets)
    compiled = torch.compile(everything, fullgraph=True, backend="eager")(*inputs)
    assert all(torch.equal(x, y) for x, y in zip(compiled, everything(*inputs), strict=True))
