"""Launches of every kernel with the sizes and optional arguments that Triton compiles differently.

Triton makes a constant of a size 1 and marks multiples of 16; None removes an argument. The interpreter makes no such
difference, so these launches are recorded and compiled for real GPUs (tools/compile_launches.py).
"""

import pytest
import torch
from cases import compare, head, logits_and_actions, upstream, values

import reval_kernels
from reval_kernels import TokenValues, linear_token_values, reference

pytest.importorskip("triton")

SIZES = [0, 1, 2, 15, 16, 17]
OPTIONS = [
    {},
    {"mask": True},
    {"temperature": True},
    {"softcap": 5.0},
    {"with_entropy": True},
    {"mask": True, "temperature": True, "softcap": 5.0, "with_entropy": True},
]


def token_options(options: dict, count: int) -> dict:
    """True stands for a tensor [count]. Every second token is unmasked."""
    tensors = {"mask": torch.arange(count) % 2 == 0, "temperature": 0.5 + torch.rand(count)}
    return {k: tensors.get(k, x) for k, x in options.items()}


def outputs(options: dict) -> tuple[str, ...]:
    return ("q", "v", "log_prob") + (("entropy",) if "with_entropy" in options else ())


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_rows(size, options):
    """The size is that of the tokens and then of the vocabulary; the dtypes take turns."""
    for dtype, shape in (
        (torch.float32, (size, 17)),
        (torch.bfloat16, (size, 16)),
        (torch.float16, (3, max(size, 1))),
    ):
        logits, actions = logits_and_actions(*shape, dtype=dtype)
        by = upstream(actions.shape, *outputs(options))
        inputs = {"logits": logits, "actions": actions}
        compare("triton", "token_values", inputs, by, **token_options(options, shape[0]))


@pytest.mark.parametrize("size", SIZES)
def test_an_overwritten_gradient(size):
    logits, actions = logits_and_actions(size, 17)
    leaf = logits.clone().requires_grad_()
    reval_kernels.token_values(leaf, actions, inplace_grad=True, backend="triton").log_prob.sum().backward()
    truth = logits.double().requires_grad_()
    reference.token_values(truth, actions).log_prob.sum().backward()
    torch.testing.assert_close(leaf.detach().double(), truth.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_hidden_states(size, options, bias):
    """The size is that of the tokens, of the vocabulary, and of the width."""
    for dtype, shape in (
        (torch.float32, (size, 17, 16)),
        (torch.bfloat16, (2, max(size, 1), 15)),
        (torch.float16, (3, 17, max(size, 1))),
    ):
        hidden, weight, actions = head(*shape, dtype=dtype)
        inputs = {"hidden": hidden, "weight": weight, "actions": actions}
        if bias:
            inputs["bias"] = torch.randn(shape[1]).to(dtype)
        by = upstream(actions.shape, *outputs(options))
        compare("triton", "linear_token_values", inputs, by, **token_options(options, shape[0]))


@pytest.mark.parametrize("size", SIZES)
def test_a_frozen_head(size):
    hidden, weight, actions = head(size, 17, 16)
    leaf = hidden.requires_grad_()
    linear_token_values(leaf, weight, actions, backend="triton").log_prob.sum().backward()
    truth = hidden.detach().double().requires_grad_()
    reference.linear_token_values(truth, weight.double(), actions).log_prob.sum().backward()
    torch.testing.assert_close(leaf.grad.double(), truth.grad, rtol=1e-4, atol=1e-5)


LOSSES = [
    {"level": "trajectory", "returns": True},
    {"level": "trajectory"},
    {"level": "token"},
    {"level": "token", "semi_gradient": True},
    {"level": "subtrajectory", "normalizer": 7.0},
]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_trajectories(size, masked, packed):
    """The size is that of a trajectory's tokens, and then of the trajectories."""
    for count, length in ((2, size), (size, 2)):
        shape = (count * length,) if packed else (count, length)
        policy, ref = ([x.float() for x in values(*shape)[:3]] for _ in range(2))
        rewards = torch.randn(count)
        layout = {"mask": torch.rand(shape) < 0.6} if masked else {}
        if packed:
            layout["cu_seqlens"] = torch.arange(count + 1, dtype=torch.int32) * length
        check_targets(policy, ref, rewards, layout)
        for options in LOSSES:
            check_loss(policy, ref, rewards, layout, dict(options))


def check_targets(policy, ref, rewards, layout) -> None:
    results = []
    for module, dtype, more in ((reval_kernels, torch.float32, {"backend": "triton"}), (reference, torch.float64, {})):
        leaves = [x.to(dtype).requires_grad_() for x in policy]
        anchor = TokenValues(*(x.to(dtype) for x in ref))
        out = module.td_targets(TokenValues(*leaves), anchor, rewards.to(dtype), beta=0.5, **layout, **more)
        results.append([*out, *gradients(out.target.square().sum() + out.error.square().sum(), leaves[:2])])
    assert_near(*results)


def check_loss(policy, ref, rewards, layout, options: dict) -> None:
    results, returns = [], options.pop("returns", False)
    for module, dtype, more in ((reval_kernels, torch.float32, {"backend": "triton"}), (reference, torch.float64, {})):
        leaves = [x.to(dtype).requires_grad_() for x in policy]
        anchor = rewards.to(dtype) * 3 if returns else TokenValues(*(x.to(dtype) for x in ref))
        arguments = TokenValues(*leaves), anchor, rewards.to(dtype)
        out = module.bellman_loss(*arguments, beta=0.5, **layout, **options, **more)
        results.append([out.loss, out.residual, *gradients(out.loss, leaves)])
    assert_near(*results)


def gradients(result, leaves) -> list[torch.Tensor]:
    if not result.requires_grad:  # an empty batch
        return [torch.zeros_like(x) for x in leaves]
    return list(torch.autograd.grad(result, leaves, allow_unused=True, materialize_grads=True))


def assert_near(ours, truth) -> None:
    for x, expected in zip(ours, truth, strict=True):
        torch.testing.assert_close(x.double(), expected.double(), rtol=1e-5, atol=1e-5)
