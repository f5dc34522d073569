"""Batch invariance: which bits do not depend on the rest of the batch. docs/kernels.md has the promise.

"Alone" is one trajectory (or one token) in a call of its own. Here it is compared with itself in a padded batch, in a
packed batch at another position, and beside trajectories of other content. Lengths 4, 0, 7, 1 are padded to 7. V = 129
ends one word into a block, D = 31 in the middle of a block.
"""

import pytest
import torch
from cases import BACKENDS, assert_same_bits, head, values

from reval_kernels import (
    TokenValues,
    bellman_loss,
    linear_reval_loss,
    linear_token_values,
    reval_loss,
    td_targets,
    token_values,
)

LENGTHS, V, D = [4, 0, 7, 1], 129, 31
B, T = len(LENGTHS), max(LENGTHS)
LEVELS = ["trajectory", "token", "subtrajectory"]
DTYPES = [torch.float32, torch.bfloat16]


def inside() -> torch.Tensor:
    return torch.arange(T) < torch.tensor(LENGTHS)[:, None]


def packed(x: torch.Tensor, order: list[int]) -> torch.Tensor:
    """Padded [B, T, ...] -> [N, ...], the trajectories in this order."""
    return torch.cat([x[b, : LENGTHS[b]] for b in order])


def ends(order: list[int]) -> torch.Tensor:
    return torch.tensor([0] + [LENGTHS[b] for b in order]).cumsum(0)


def check(run, trajectories: dict, per_token: dict, other: dict) -> None:
    """`run(layout, **arguments)` returns ([N] or [B, T] tensors, [B] tensors). Compare every form of a batch with each
    trajectory alone. `other` has other content for `per_token`, in a batch whose trajectory 2 is unchanged."""
    alone = {}
    for b in range(B):
        own = {k: x[b : b + 1] for k, x in trajectories.items()} | {k: packed(x, [b]) for k, x in per_token.items()}
        alone[b] = run({"cu_seqlens": ends([b])}, **own)
    order = [2, 0, 3, 1]
    forms = {
        "padded": (range(B), run({"mask": inside()}, **trajectories, **per_token)),
        "packed": (
            order,
            run(
                {"cu_seqlens": ends(order)},
                **{k: x[order] for k, x in trajectories.items()},
                **{k: packed(x, order) for k, x in per_token.items()},
            ),
        ),
    }
    strangers = {k: x.clone() for k, x in other.items()}
    for k, x in per_token.items():
        strangers[k][2] = x[2]
    forms["beside others"] = ([2], run({"mask": inside()}, **trajectories, **strangers))
    for form, (members, (tokens, rows)) in forms.items():
        for place, b in enumerate(members):
            for x, own in zip(tokens, alone[b][0], strict=True):
                begin = 0 if form != "packed" else int(ends(order)[place])
                got = x[begin : begin + LENGTHS[b]] if form == "packed" else x[b, : LENGTHS[b]]
                assert_same_bits(got, own)
            for x, own in zip(rows, alone[b][1], strict=True):
                assert_same_bits(x[place if form == "packed" else b][None], own)


def graded(out: list, by: list, leaves: list) -> list:
    """Gradients of sum(output * upstream gradient)."""
    return list(torch.autograd.grad(out, leaves, by, allow_unused=True, materialize_grads=True))


def token_inputs(function, dtype: torch.dtype) -> dict:
    hidden, _, actions = head(B, T, V, D, dtype=dtype)
    out = {"actions": actions, "temperature": 0.5 + torch.rand(B, T)} | {k: torch.randn(B, T) for k in "abc"}
    return out | ({"hidden": hidden} if "linear" in function.__name__ else {"logits": torch.randn(B, T, V).to(dtype)})


@pytest.fixture
def weight():
    return torch.randn(V, D) * 2 / D**0.5


@pytest.mark.parametrize("dtype", DTYPES)
def test_token_values(backend, dtype):
    """q, v, log_prob, entropy and the gradient of the logits."""

    def run(layout, logits, actions, temperature, a, b, c):
        leaf = logits.detach().requires_grad_()
        options = {"temperature": temperature, "mask": layout.get("mask"), "with_entropy": True, "backend": backend}
        out = token_values(leaf, actions, **options)
        gradient = graded([out.v, out.log_prob, out.entropy], [a, b, c], [leaf])
        return [*(x.detach() for x in out), *gradient], []

    check(run, {}, token_inputs(token_values, dtype), token_inputs(token_values, dtype))


@pytest.mark.parametrize("level", LEVELS)
def test_bellman_loss(backend, level):
    """The residuals, and the gradients of q, v and log_prob."""
    per_token = values_of("", torch.float32) | values_of("r", torch.float32)

    def run(layout, rewards, by, q, v, log_prob, rq, rv, rlog_prob):
        leaves = [x.detach().requires_grad_() for x in (q, v, log_prob)]
        ref = TokenValues(rq, rv, rlog_prob)
        out = bellman_loss(
            TokenValues(*leaves), ref, rewards, beta=0.3, normalizer=3, level=level, backend=backend, **layout
        )
        gradients = graded([out.loss, out.residual], [torch.tensor(1.5), by], leaves)
        return gradients, [out.residual.detach()]

    other = values_of("", torch.float32) | values_of("r", torch.float32)
    check(run, {"rewards": torch.randn(B), "by": torch.randn(B)}, per_token, other)


def test_td_targets(backend):
    """Targets, errors, endogenous rewards, and the gradients of q and v."""

    def run(layout, rewards, a, b, q, v, log_prob, rq, rv, rlog_prob):
        leaves = [x.detach().requires_grad_() for x in (q, v)]
        policy = TokenValues(*leaves, log_prob)
        out = td_targets(
            policy, TokenValues(rq, rv, rlog_prob), rewards, beta=0.3, gamma=0.9, backend=backend, **layout
        )
        return [*(x.detach() for x in out), *graded([out.target, out.error], [a, b], leaves)], []

    def inputs():
        extra = {k: torch.randn(B, T) for k in "ab"}
        return values_of("", torch.float32) | values_of("r", torch.float32) | extra

    check(run, {"rewards": torch.randn(B)}, inputs(), inputs())


def values_of(prefix: str, dtype: torch.dtype) -> dict:
    return dict(zip((f"{prefix}{k}" for k in ("q", "v", "log_prob")), values(B, T, dtype=dtype)[:3], strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("level", LEVELS)
def test_reval_loss(backend, level, dtype):
    """The residuals and the gradient of the logits."""
    check(
        *losses(backend, lambda **x: reval_loss(**x), level, "logits"),
        token_inputs(reval_loss, dtype) | values_of("r", torch.float32),
        token_inputs(reval_loss, dtype) | values_of("r", torch.float32),
    )


def losses(backend, function, level, leaf_name, gradients: bool = True, **constant):
    """(run, trajectories) for `check`, of a loss from logits or hidden states."""

    def run(layout, rewards, actions, temperature, rq, rv, rlog_prob, a, b, c, **inputs):
        inputs[leaf_name] = inputs[leaf_name].detach().requires_grad_(gradients)
        options = {"beta": 0.3, "normalizer": 3, "level": level, "temperature": temperature, "backend": backend}
        ref = TokenValues(rq, rv, rlog_prob)
        out = function(**inputs, actions=actions, reference=ref, rewards=rewards, **options, **layout, **constant)
        found = graded([out.loss], [torch.tensor(1.5)], [inputs[leaf_name]]) if gradients else []
        return found, [out.residual.detach()]

    return run, {"rewards": torch.randn(B)}


# --- from hidden states ---------------------------------------------------------------------------------------------
# The triton backend's own matmul has tiles that do not depend on the number of tokens. The other backends' logits, and
# everyone's gradient of the hidden states, come from a matmul of a library, whose bits may depend on its shape.

own_matmul = pytest.mark.parametrize("backend", [x for x in BACKENDS if x == "triton"])


@own_matmul
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_token_values(backend, weight, dtype):
    """q, v, log_prob and entropy."""

    def run(layout, hidden, actions, temperature, a, b, c):
        options = {"temperature": temperature, "mask": layout.get("mask"), "with_entropy": True, "backend": backend}
        return list(linear_token_values(hidden, weight.to(dtype), actions, **options)), []

    check(run, {}, token_inputs(linear_token_values, dtype), token_inputs(linear_token_values, dtype))


@own_matmul
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("graph", [False, True])
def test_linear_reval_loss(backend, weight, graph, level, dtype):
    """The residuals, whether or not a gradient is computed with them."""
    run, trajectories = losses(backend, linear_reval_loss, level, "hidden", gradients=graph, weight=weight.to(dtype))
    inputs, other = (token_inputs(linear_reval_loss, dtype) | values_of("r", torch.float32) for _ in range(2))
    check(lambda layout, **x: ([], run(layout, **x)[1]), trajectories, inputs, other)


@pytest.mark.parametrize("frozen", [False, True])
def test_other_hidden_states_of_a_batch_of_one_shape(backend, frozen):
    """The gradient of a token's hidden state does not depend on the content of the other tokens."""
    hidden, weight, actions = head(B, T, V, D)
    changed = hidden.clone()
    changed[2] += 1
    by, results = torch.randn(B, T), []
    for x in (hidden, changed):
        leaf = x.detach().requires_grad_()
        out = linear_token_values(leaf, weight.detach().requires_grad_(not frozen), actions, backend=backend)
        results.append(torch.autograd.grad([out.v, out.log_prob], leaf, [by, by * by])[0])
    same = [0, 1, 3]
    assert_same_bits(results[0][same], results[1][same])
    assert not torch.equal(results[0][2], results[1][2])
