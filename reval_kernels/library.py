"""The torch.library ops: schemas, fakes, autograd, and dispatch to a backend by name or by device.

No arithmetic happens here. Each op is opaque to torch.compile, so compiled and eager code run the same kernels and
agree to the bit. `transform` travels as three arguments (temperature, per-token temperatures or None, softcap), the
reference as a list of tensors: (q, v, log_prob) per token, or (returns [B],) alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .backends import backend_for
from .backends.portable import wide_loss
from .backends.rows import Transform


def _op(name: str, mutates: Sequence[str] = ()) -> Callable[[Callable[..., Any]], Any]:
    return torch.library.custom_op(f"reval_kernels::{name}", mutates_args=mutates)


def _run(function: str, like: Tensor, backend: str | None, *args: Any) -> Any:
    # autocast would turn the fp32 matmuls inside into bf16
    with torch.autocast(like.device.type, enabled=False):
        return getattr(backend_for(backend, like.device.type), function)(*args)


def _wide_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _fake_values(like: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    new = [torch.empty(like.shape[:-1], dtype=_wide_dtype(like), device=like.device) for _ in range(6)]
    return new[0], new[1], new[2], new[3], new[4], new[5]


def _divisor(normalizer: Tensor | None, rewards: Tensor) -> float:
    """By default the number of trajectories. It is a number only in here: outside, torch.compile would compile anew for
    each normalizer (hence the tensor []) and each batch size."""
    return float(max(rewards.shape[0], 1)) if normalizer is None else normalizer.item()


# --- token values from logits ---------------------------------------------------------------------------------------


@_op("token_values")
def token_values(
    logits: Tensor,
    actions: Tensor,
    mask: Tensor | None,
    temperature: float,
    temperatures: Tensor | None,
    softcap: float | None,
    with_entropy: bool,
    inplace_grad: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """logits [..., V] -> q, v, log_prob, entropy, row_max, log_sum: [...] each."""
    transform = Transform(temperature if temperatures is None else temperatures, softcap)
    return _run("token_values", logits, backend, logits, actions, mask, transform, with_entropy)


@token_values.register_fake
def _(logits, actions, mask, temperature, temperatures, softcap, with_entropy, inplace_grad, backend):
    return _fake_values(logits)


@_op("token_values_backward")
def token_values_backward(
    logits: Tensor,
    actions: Tensor,
    mask: Tensor | None,
    temperature: float,
    temperatures: Tensor | None,
    softcap: float | None,
    statistics: Sequence[Tensor],
    cotangents: Sequence[Tensor],
    backend: str | None,
) -> Tensor:
    """dlogits [..., V]; statistics: row_max, log_sum, entropy; cotangents: dq, dv, dlog_prob, dentropy."""
    transform = Transform(temperature if temperatures is None else temperatures, softcap)
    args = (logits, actions, mask, transform, statistics, cotangents, False)
    return _run("token_values_backward", logits, backend, *args)


@token_values_backward.register_fake
def _(logits, actions, mask, temperature, temperatures, softcap, statistics, cotangents, backend):
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


@_op("token_values_backward_", mutates=("logits",))
def token_values_backward_(
    logits: Tensor,
    actions: Tensor,
    mask: Tensor | None,
    temperature: float,
    temperatures: Tensor | None,
    softcap: float | None,
    statistics: Sequence[Tensor],
    cotangents: Sequence[Tensor],
    backend: str | None,
) -> None:
    """The same, written over the logits."""
    transform = Transform(temperature if temperatures is None else temperatures, softcap)
    args = (logits, actions, mask, transform, statistics, cotangents, True)
    _run("token_values_backward", logits, backend, *args)


def _save_token_values(ctx, inputs, output):
    logits, actions, mask, ctx.temperature, temperatures, ctx.softcap, _, ctx.inplace_grad, ctx.backend = inputs
    ctx.save_for_backward(logits, actions, mask, temperatures, output[4], output[5], output[3])


def _token_values_gradient(ctx, dq, dv, dlog_prob, dentropy, _row_max, _log_sum):
    logits, actions, mask, temperatures, *statistics = ctx.saved_tensors
    args = (
        logits,
        actions,
        mask,
        ctx.temperature,
        temperatures,
        ctx.softcap,
        statistics,
        [dq, dv, dlog_prob, dentropy],
        ctx.backend,
    )
    if ctx.inplace_grad:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph
            raise RuntimeError("inplace_grad=True has no second-order gradient, which create_graph=True asks for")
        token_values_backward_(*args)  # bumps the version counter: a second backward raises
        dlogits = logits
    else:
        dlogits = token_values_backward(*args)
    return dlogits, None, None, None, None, None, None, None, None


token_values.register_autograd(_token_values_gradient, setup_context=_save_token_values)


# --- token values from hidden states --------------------------------------------------------------------------------


@_op("linear_token_values")
def linear_token_values(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    actions: Tensor,
    mask: Tensor | None,
    temperature: float,
    temperatures: Tensor | None,
    softcap: float | None,
    with_entropy: bool,
    with_expected: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """hidden [..., D], weight [V, D], bias [V] -> q, v, log_prob, entropy, row_max, log_sum: [...] each; and expected
    [..., D], with which the gradient of hidden alone needs the logits no more (empty unless wanted)."""
    transform = Transform(temperature if temperatures is None else temperatures, softcap)
    args = (hidden, weight, bias, actions, mask, transform, with_entropy, with_expected)
    return _run("linear_token_values", hidden, backend, *args)


@linear_token_values.register_fake
def _(hidden, weight, bias, actions, mask, temperature, temperatures, softcap, with_entropy, with_expected, backend):
    expected = hidden.new_empty(hidden.shape if with_expected else (0,), dtype=_wide_dtype(hidden))
    return *_fake_values(hidden), expected


@_op("linear_token_values_backward")
def linear_token_values_backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    actions: Tensor,
    mask: Tensor | None,
    temperature: float,
    temperatures: Tensor | None,
    softcap: float | None,
    statistics: Sequence[Tensor],
    cotangents: Sequence[Tensor],
    needs: Sequence[bool],
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dhidden, dweight, dbias; an empty tensor where `needs` says no."""
    transform = Transform(temperature if temperatures is None else temperatures, softcap)
    args = (hidden, weight, bias, actions, mask, transform, statistics, cotangents, needs)
    return _run("linear_token_values_backward", hidden, backend, *args)


@linear_token_values_backward.register_fake
def _(hidden, weight, bias, actions, mask, temperature, temperatures, softcap, statistics, cotangents, needs, backend):
    return _fake_head_gradients(hidden, weight, bias, needs)


def _fake_head_gradients(hidden, weight, bias, needs):
    return (
        hidden.new_empty(hidden.shape if needs[0] else (0,)),
        weight.new_empty(weight.shape if needs[1] else (0,)),
        (weight if bias is None else bias).new_empty(weight.shape[0] if needs[2] else 0),
    )


@_op("linear_expected_backward")
def linear_expected_backward(
    expected: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    actions: Tensor,
    mask: Tensor | None,
    temperature: float,
    temperatures: Tensor | None,
    softcap: float | None,
    log_prob: Tensor,
    cotangents: Sequence[Tensor],
) -> Tensor:
    """dhidden [..., D]; cotangents: dq, dv, dlog_prob. A few numbers a token and D: one code serves every backend."""
    transform = Transform(temperature if temperatures is None else temperatures, softcap)
    args = (expected, hidden, weight, bias, actions, mask, transform, log_prob, cotangents)
    return _run("linear_expected_backward", hidden, "portable", *args)


@linear_expected_backward.register_fake
def _(expected, hidden, weight, bias, actions, mask, temperature, temperatures, softcap, log_prob, cotangents):
    return hidden.new_empty(hidden.shape)


def _save_linear_token_values(ctx, inputs, output):
    *tensors, ctx.temperature, temperatures, ctx.softcap, _, ctx.with_expected, ctx.backend = inputs
    _, _, log_prob, entropy, row_max, log_sum, expected = output
    ctx.set_materialize_grads(False)  # zeros for `expected` would be another N x D
    ctx.save_for_backward(*tensors, temperatures, row_max, log_sum, entropy, log_prob, expected)


def _linear_token_values_gradient(ctx, *given):
    hidden, weight, bias, actions, mask, temperatures, *statistics, log_prob, expected = ctx.saved_tensors
    needs, transform = list(ctx.needs_input_grad[:3]), (ctx.temperature, temperatures, ctx.softcap)
    cotangents = [torch.zeros_like(log_prob) if g is None else g for g in given[:4]]
    if ctx.with_expected and given[3] is None and needs == [True, False, False]:
        head = (expected, hidden, weight, bias, actions, mask)
        return linear_expected_backward(*head, *transform, log_prob, cotangents[:3]), *(None,) * 10
    gradients = linear_token_values_backward(
        hidden, weight, bias, actions, mask, *transform, statistics, cotangents, needs, ctx.backend
    )
    return *(g if need else None for g, need in zip(gradients, needs, strict=True)), *(None,) * 8


linear_token_values.register_autograd(_linear_token_values_gradient, setup_context=_save_linear_token_values)


# --- TD targets -----------------------------------------------------------------------------------------------------


@_op("td_targets")
def td_targets(
    q: Tensor,
    v: Tensor,
    reference: Sequence[Tensor],
    rewards: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    beta: float,
    gamma: float,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """q, v [...] -> target, error, endogenous reward: [...] each."""
    return _run("td_targets", q, backend, q, v, reference, rewards, mask, cu_seqlens, beta, gamma)


@td_targets.register_fake
def _(q, v, reference, rewards, mask, cu_seqlens, beta, gamma, backend):
    return q.new_empty(q.shape), q.new_empty(q.shape), q.new_empty(q.shape)


@_op("td_targets_backward")
def td_targets_backward(
    d_target: Tensor,
    d_error: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    gamma: float,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """dq, dv: [...] each."""
    return _run("td_targets_backward", d_error, backend, d_target, d_error, mask, cu_seqlens, gamma)


@td_targets_backward.register_fake
def _(d_target, d_error, mask, cu_seqlens, gamma, backend):
    return d_error.new_empty(d_error.shape), d_error.new_empty(d_error.shape)


def _save_td_targets(ctx, inputs, output):
    _, _, reference, _, mask, cu_seqlens, _, ctx.gamma, ctx.backend = inputs
    ctx.no_gradient = [None] * len(reference)  # a list among the inputs wants a list among the gradients
    ctx.save_for_backward(mask, cu_seqlens)


def _td_targets_gradient(ctx, d_target, d_error, _):
    mask, cu_seqlens = ctx.saved_tensors
    dq, dv = td_targets_backward(d_target, d_error, mask, cu_seqlens, ctx.gamma, ctx.backend)
    return dq, dv, ctx.no_gradient, *(None,) * 6


td_targets.register_autograd(_td_targets_gradient, setup_context=_save_td_targets)


# --- Bellman losses -------------------------------------------------------------------------------------------------


@_op("bellman_loss")
def bellman_loss(
    q: Tensor,
    v: Tensor,
    log_prob: Tensor,
    reference: Sequence[Tensor],
    rewards: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    beta: float,
    level: str,
    semi_gradient: bool,
    normalizer: Tensor | None,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """q, v, log_prob [...] -> loss [], residual [B], and the loss's cotangents dq, dv, dlog_prob [...]."""
    divisor = _divisor(normalizer, rewards)
    args = (q, v, log_prob, reference, rewards, mask, cu_seqlens, beta, level, semi_gradient, divisor)
    return _run("bellman_loss", q, backend, *args)


@bellman_loss.register_fake
def _(q, v, log_prob, reference, rewards, mask, cu_seqlens, beta, level, semi_gradient, normalizer, backend):
    return q.new_empty(()), q.new_empty(rewards.shape), *(q.new_empty(q.shape) for _ in range(3))


@_op("bellman_loss_backward")
def bellman_loss_backward(
    d_loss: Tensor,
    d_residual: Tensor,
    unit: Sequence[Tensor],
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dv, dlog_prob [...] from the loss's cotangents and the upstream gradients [] and [B]."""
    return _run("bellman_loss_backward", d_loss, backend, d_loss, d_residual, unit, mask, cu_seqlens)


@bellman_loss_backward.register_fake
def _(d_loss, d_residual, unit, mask, cu_seqlens, backend):
    return tuple(x.new_empty(x.shape) for x in unit)


def _save_bellman_loss(ctx, inputs, output):
    mask, cu_seqlens, ctx.backend = inputs[5], inputs[6], inputs[-1]
    ctx.no_gradient, ctx.trajectories = [None] * len(inputs[3]), inputs[4].shape
    ctx.set_materialize_grads(False)  # zeros for the outputs that hold the cotangents would be as many again
    ctx.save_for_backward(*output[2:], mask, cu_seqlens)


def _bellman_loss_gradient(ctx, d_loss, d_residual, *_):
    *unit, mask, cu_seqlens = ctx.saved_tensors
    d_loss = unit[0].new_zeros(()) if d_loss is None else d_loss
    d_residual = unit[0].new_zeros(ctx.trajectories) if d_residual is None else d_residual
    gradients = bellman_loss_backward(d_loss, d_residual, unit, mask, cu_seqlens, ctx.backend)
    return *gradients, ctx.no_gradient, *(None,) * 8


bellman_loss.register_autograd(_bellman_loss_gradient, setup_context=_save_bellman_loss)


# --- the loss from hidden states ------------------------------------------------------------------------------------


@_op("linear_reval_loss")
def linear_reval_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    actions: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    temperature: float,
    temperatures: Tensor | None,
    softcap: float | None,
    reference: Sequence[Tensor],
    rewards: Tensor,
    beta: float,
    level: str,
    semi_gradient: bool,
    normalizer: Tensor | None,
    needs: Sequence[bool],
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> loss [], residual [B], and the loss's gradients of hidden, weight and bias (empty where not needed), in fp32
    (fp64) if any of these is fp16."""
    transform = Transform(temperature if temperatures is None else temperatures, softcap)
    args = (
        hidden,
        weight,
        bias,
        actions,
        mask,
        cu_seqlens,
        transform,
        reference,
        rewards,
        beta,
        level,
        semi_gradient,
        _divisor(normalizer, rewards),
        needs,
    )
    return _run("linear_reval_loss", hidden, backend, *args)


@linear_reval_loss.register_fake
def _(
    hidden,
    weight,
    bias,
    actions,
    mask,
    cu_seqlens,
    temperature,
    temperatures,
    softcap,
    reference,
    rewards,
    beta,
    level,
    semi_gradient,
    normalizer,
    needs,
    backend,
):
    wide = _wide_dtype(hidden)
    gradients = _fake_head_gradients(hidden, weight, bias, needs)
    if wide_loss(hidden, weight, bias):
        gradients = tuple(x.to(wide) for x in gradients)
    return hidden.new_empty((), dtype=wide), hidden.new_empty(rewards.shape, dtype=wide), *gradients


def _save_linear_reval_loss(ctx, inputs, output):
    ctx.no_gradient = [None] * len(inputs[9])
    ctx.dtypes = [None if x is None else x.dtype for x in inputs[:3]]
    ctx.set_materialize_grads(False)  # zeros for the outputs that hold the gradients would be another V x D
    ctx.save_for_backward(*output[2:])


def _linear_reval_loss_gradient(ctx, d_loss, *_):
    needs = [need and d_loss is not None for need in ctx.needs_input_grad[:3]]
    each = zip(ctx.saved_tensors, ctx.dtypes, needs, strict=True)
    gradients = [_scaled(g, d_loss).to(dtype) if need else None for g, dtype, need in each]
    if torch.is_grad_enabled():  # create_graph: a constant would pass for a second-order gradient of 0
        refuse = torch._C._functions.DelayedError("linear_reval_loss has no second-order gradient", 1)
        gradients = [None if g is None else refuse(g.detach().requires_grad_()) for g in gradients]
    return *gradients, *(None,) * 6, ctx.no_gradient, *(None,) * 7


def _scaled(gradient: Tensor, d_loss: Tensor) -> Tensor:
    """gradient * d_loss: in place in an eager backward that does not retain its graph, where nothing asks for it again.
    Otherwise the head's gradient would be in memory twice."""
    traced = torch.compiler.is_compiling() or type(gradient) is not Tensor
    batched = torch._C._functorch.is_legacy_batchedtensor(d_loss)  # by is_grads_batched
    if traced or batched or torch._C._autograd._get_current_graph_task_keep_graph():
        return gradient * d_loss
    if d_loss.device.type == "cpu" and d_loss == 1:  # on a GPU the question would cost more than the product
        return gradient.data
    return gradient.data.mul_(d_loss)


linear_reval_loss.register_autograd(_linear_reval_loss_gradient, setup_context=_save_linear_reval_loss)
