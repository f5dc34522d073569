"""The torch.library ops: their signatures, fakes and autograd, and the choice of the backend.

The backends compute. The only arithmetic here is the product of a kept gradient and its upstream gradient (`_scaled`).
Each op is opaque to torch.compile, so compiled and eager code run the same kernels and agree to the bit. contract.py
describes the groups that the ops take; grouped_op.py flattens the groups for torch.library.

Letters: `...` is [B, T] (padded) or [N] (packed), B trajectories, V words of the vocabulary, D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import torch_private
from .backends import backend_for
from .backends.frozen_head import gradient_of_hidden
from .checks import check_cu_seqlens, check_token_data
from .contract import (
    Backend,
    BellmanOptions,
    Cotangents,
    HeadGradients,
    HeadInputs,
    Layout,
    LossAndGradients,
    LossTerms,
    Needs,
    Reference,
    RowValues,
    Statistics,
    Tokens,
    Transform,
    UnitGradients,
    keeps_wide_gradients,
    wide_dtype,
)
from .grouped_op import flatten, grouped_op
from .types import TokenValues


def _backend(name: str | None, like: Tensor) -> Backend:
    """The backend of this name, or the default of the tensor's device."""
    return backend_for(name, like.device.type)


def _checks_data(kernels: Backend, function: str, like: Tensor) -> bool:
    """Whether this function of a backend checks the data of its arguments itself."""
    return like.device.type == "cuda" and function in kernels.CHECKS_DATA


def _new_row_values(like: Tensor) -> RowValues:
    """Empty row values for the rows of logits or hidden states."""
    return RowValues(*(like.new_empty(like.shape[:-1], dtype=wide_dtype(like)) for _ in RowValues._fields))


def _no_second_order(name: str) -> str:
    return f"{name} has no second-order gradient; reval_kernels.reference.{name} has one, in plain PyTorch"


# --- token values from logits ---------------------------------------------------------------------------------------


@grouped_op("token_values")
def token_values(
    logits: Tensor,
    tokens: Tokens,
    transform: Transform,
    with_entropy: bool,
    inplace_grad: bool,
    backend: str | None,
) -> RowValues:
    """From logits [..., V]. The first four results are differentiable in the logits."""
    kernels = _backend(backend, logits)
    if not _checks_data(kernels, "token_values", logits):
        check_token_data(tokens, transform, logits.shape[-1], logits)
    return kernels.token_values(logits, tokens, transform, with_entropy)


@token_values.register_fake
def _(logits, tokens, transform, with_entropy, inplace_grad, backend):
    return _new_row_values(logits)


@grouped_op("token_values_backward")
def token_values_backward(
    logits: Tensor,
    tokens: Tokens,
    transform: Transform,
    statistics: Statistics,
    cotangents: Cotangents,
    backend: str | None,
) -> Tensor:
    """dlogits [..., V]."""
    return _backend(backend, logits).token_values_backward(logits, tokens, transform, statistics, cotangents, False)


token_values_backward.register_no_gradient(_no_second_order("token_values"))


@token_values_backward.register_fake
def _(logits, tokens, transform, statistics, cotangents, backend):
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


@grouped_op("token_values_backward_", mutates=("logits",))
def token_values_backward_(
    logits: Tensor,
    tokens: Tokens,
    transform: Transform,
    statistics: Statistics,
    cotangents: Cotangents,
    backend: str | None,
) -> None:
    """As token_values_backward, but dlogits is written over the logits."""
    _backend(backend, logits).token_values_backward(logits, tokens, transform, statistics, cotangents, True)


def _save_token_values(ctx, groups, output):
    logits, tokens, transform, _, ctx.inplace_grad, ctx.backend = groups
    ctx.set_materialize_grads(False)  # one tensor of zeros serves all outputs without a gradient
    _save(ctx, transform, logits, *tokens, transform.temperatures, *RowValues(*output).statistics)


def _token_values_gradient(ctx, *upstream):
    logits, actions, mask, temperatures, *statistics = ctx.saved_tensors
    arguments = (
        logits,
        Tokens(actions, mask),
        _saved_transform(ctx, temperatures),
        Statistics(*statistics),
        _cotangents(upstream, statistics[0]),
        ctx.backend,
    )
    if not ctx.inplace_grad:
        return (token_values_backward(*arguments),)
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph
        raise RuntimeError("inplace_grad=True has no second-order gradient, which create_graph=True asks for")
    token_values_backward_(*arguments)  # bumps the version counter: a second backward raises
    return (logits.detach(),)  # the saved logits have their graph, which a gradient has not


def _cotangents(upstream: Sequence[Tensor | None], like: Tensor) -> Cotangents:
    """The gradients of q, v, log_prob and entropy. Of these, only the entropy's may be None."""
    dq, dv, dlog_prob = _zeros_for_none(upstream[:3], like)
    return Cotangents(dq, dv, dlog_prob, upstream[3])


def _zeros_for_none(gradients: Sequence[Tensor | None], like: Tensor) -> list[Tensor]:
    """The gradients; one tensor of zeros stands for all that are None."""
    zeros = torch.zeros_like(like) if any(g is None for g in gradients) else like
    return [zeros if g is None else g for g in gradients]


def _save(ctx: Any, transform: Transform, *tensors: Tensor | None) -> None:
    ctx.temperature, ctx.softcap = transform.temperature, transform.softcap
    ctx.save_for_backward(*tensors)


def _saved_transform(ctx: Any, temperatures: Tensor | None) -> Transform:
    return Transform(ctx.temperature, temperatures, ctx.softcap)


token_values.register_autograd(_token_values_gradient, _save_token_values)


# --- token values from hidden states --------------------------------------------------------------------------------


@grouped_op("linear_token_values")
def linear_token_values(
    head: HeadInputs,
    tokens: Tokens,
    transform: Transform,
    with_entropy: bool,
    with_expected: bool,
    backend: str | None,
) -> tuple[RowValues, Tensor]:
    """The values, and `expected` [..., D] (frozen_head.py), which is empty unless `with_expected`."""
    kernels = _backend(backend, head.hidden)
    if not _checks_data(kernels, "linear_token_values", head.hidden):
        check_token_data(tokens, transform, head.weight.shape[0], head.hidden)
    return kernels.linear_token_values(head, tokens, transform, with_entropy, with_expected)


@linear_token_values.register_fake
def _(head, tokens, transform, with_entropy, with_expected, backend):
    hidden = head.hidden
    expected = hidden.new_empty(hidden.shape if with_expected else (0,), dtype=wide_dtype(hidden))
    return _new_row_values(hidden), expected


@grouped_op("linear_token_values_backward")
def linear_token_values_backward(
    head: HeadInputs,
    tokens: Tokens,
    transform: Transform,
    statistics: Statistics,
    cotangents: Cotangents,
    needs: Needs,
    backend: str | None,
) -> HeadGradients:
    """Gradients in the dtypes of the inputs; an empty tensor for a gradient that `needs` does not ask for."""
    kernels = _backend(backend, head.hidden)
    return kernels.linear_token_values_backward(head, tokens, transform, statistics, cotangents, needs)


linear_token_values_backward.register_no_gradient(_no_second_order("linear_token_values"))


@linear_token_values_backward.register_fake
def _(head, tokens, transform, statistics, cotangents, needs, backend):
    return _new_head_gradients(head, needs)


def _new_head_gradients(head: HeadInputs, needs: Needs) -> HeadGradients:
    hidden, weight, bias = head.tensors
    return HeadGradients(
        hidden.new_empty(hidden.shape if needs.needs_hidden else (0,)),
        weight.new_empty(weight.shape if needs.needs_weight else (0,)),
        (weight if bias is None else bias).new_empty(weight.shape[0] if needs.needs_bias else 0),
    )


@grouped_op("linear_expected_backward")
def linear_expected_backward(
    expected: Tensor,
    head: HeadInputs,
    tokens: Tokens,
    transform: Transform,
    log_prob: Tensor,
    by: UnitGradients,
) -> Tensor:
    """dhidden [..., D] for a frozen head. No logits are needed, so one PyTorch function serves every backend."""
    return gradient_of_hidden(expected, head, tokens, transform, log_prob, by)


linear_expected_backward.register_no_gradient(_no_second_order("linear_token_values"))


@linear_expected_backward.register_fake
def _(expected, head, tokens, transform, log_prob, by):
    return head.hidden.new_empty(head.hidden.shape)


def _save_linear_token_values(ctx, groups, output):
    head, tokens, transform, _, ctx.with_expected, ctx.backend = groups
    *values, expected = output
    values = RowValues(*values)
    ctx.set_materialize_grads(False)  # a gradient of zeros for `expected` would be one more tensor [..., D]
    # A user may overwrite log_prob, which autograd notices. So the backward keeps log_prob only where it reads it.
    log_prob = values.log_prob if ctx.with_expected else None
    ctx.precision = head.precision
    _save(ctx, transform, *head.tensors, *tokens, transform.temperatures, *values.statistics, log_prob, expected)


def _linear_token_values_gradient(ctx, *upstream):
    hidden, weight, bias, actions, mask, temperatures, *statistics, log_prob, expected = ctx.saved_tensors
    head, tokens, transform = (
        HeadInputs(hidden, weight, bias, ctx.precision),
        Tokens(actions, mask),
        _saved_transform(ctx, temperatures),
    )
    needs = Needs(*ctx.needs_input_grad[:3])
    cotangents = _cotangents(upstream, statistics[0])
    if ctx.with_expected and cotangents.dentropy is None and needs.frozen_head:
        by = UnitGradients(*cotangents[:3])
        return (linear_expected_backward(expected, head, tokens, transform, log_prob, by),)
    gradients = linear_token_values_backward(
        head, tokens, transform, Statistics(*statistics), cotangents, needs, ctx.backend
    )
    return tuple(g if need else None for g, need in zip(gradients, needs, strict=True))


linear_token_values.register_autograd(_linear_token_values_gradient, _save_linear_token_values)


# --- TD targets -----------------------------------------------------------------------------------------------------


@grouped_op("td_targets")
def td_targets(
    values: TokenValues,
    reference: Reference,
    rewards: Tensor,
    layout: Layout,
    beta: float,
    gamma: float,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Target, error, endogenous reward: [...] each."""
    kernels = _backend(backend, values.q)
    if not _checks_data(kernels, "td_targets", values.q):
        check_cu_seqlens(layout, values.q)
    return kernels.td_targets(values, reference, rewards, layout, beta, gamma)


@td_targets.register_fake
def _(values, reference, rewards, layout, beta, gamma, backend):
    return tuple(values.q.new_empty(values.q.shape) for _ in range(3))


@grouped_op("td_targets_backward")
def td_targets_backward(
    d_target: Tensor, d_error: Tensor, layout: Layout, gamma: float, backend: str | None
) -> tuple[Tensor, Tensor]:
    """dq, dv: [...] each."""
    return _backend(backend, d_error).td_targets_backward(d_target, d_error, layout, gamma)


td_targets_backward.register_no_gradient(_no_second_order("td_targets"))


@td_targets_backward.register_fake
def _(d_target, d_error, layout, gamma, backend):
    return d_error.new_empty(d_error.shape), d_error.new_empty(d_error.shape)


def _save_td_targets(ctx, groups, output):
    *_, layout, _, ctx.gamma, ctx.backend = groups
    ctx.set_materialize_grads(False)  # zeros for the output endogenous_reward would be one more tensor [...]
    ctx.save_for_backward(*layout)


def _td_targets_gradient(ctx, *upstream):
    d_target, d_error, _ = upstream
    d_target, d_error = _zeros_for_none((d_target, d_error), d_target if d_error is None else d_error)
    return td_targets_backward(d_target, d_error, Layout(*ctx.saved_tensors), ctx.gamma, ctx.backend)


td_targets.register_autograd(_td_targets_gradient, _save_td_targets)


# --- Bellman losses -------------------------------------------------------------------------------------------------


@grouped_op("bellman_loss")
def bellman_loss(
    values: TokenValues,
    reference: Reference,
    rewards: Tensor,
    layout: Layout,
    options: BellmanOptions,
    backend: str | None,
) -> LossTerms:
    """The differentiable loss [] and residuals [B], and the gradients of the loss with respect to q, v and log_prob."""
    kernels = _backend(backend, values.q)
    if not _checks_data(kernels, "bellman_loss", values.q):
        check_cu_seqlens(layout, values.q)
    return kernels.bellman_loss(values, reference, rewards, layout, options)


@bellman_loss.register_fake
def _(values, reference, rewards, layout, options, backend):
    q = values.q
    return LossTerms(q.new_empty(()), q.new_empty(rewards.shape), *(q.new_empty(q.shape) for _ in range(3)))


@grouped_op("bellman_loss_backward")
def bellman_loss_backward(
    d_loss: Tensor, d_residual: Tensor | None, unit: UnitGradients, layout: Layout, backend: str | None
) -> UnitGradients:
    """dq, dv, dlog_prob [...] for the upstream gradients d_loss [] and d_residual [B]; None stands for zeros."""
    return _backend(backend, d_loss).bellman_loss_backward(d_loss, d_residual, unit, layout)


bellman_loss_backward.register_no_gradient(_no_second_order("bellman_loss"))


@bellman_loss_backward.register_fake
def _(d_loss, d_residual, unit, layout, backend):
    return UnitGradients(*(x.new_empty(x.shape) for x in unit))


def _save_bellman_loss(ctx, groups, output):
    *_, layout, _, ctx.backend = groups
    ctx.set_materialize_grads(False)  # zeros for the outputs dq, dv, dlog_prob would be 3 more tensors [...]
    _, _, *unit = output
    ctx.save_for_backward(*unit, *layout)


def _bellman_loss_gradient(ctx, d_loss, d_residual, *_):
    *unit, mask, cu_seqlens = ctx.saved_tensors
    if d_loss is None:
        d_loss = unit[0].new_zeros(())
    return bellman_loss_backward(d_loss, d_residual, UnitGradients(*unit), Layout(mask, cu_seqlens), ctx.backend)


bellman_loss.register_autograd(_bellman_loss_gradient, _save_bellman_loss)


# --- the loss from hidden states ------------------------------------------------------------------------------------


@grouped_op("linear_reval_loss")
def linear_reval_loss(
    head: HeadInputs,
    actions: Tensor,
    layout: Layout,
    transform: Transform,
    reference: Reference,
    rewards: Tensor,
    options: BellmanOptions,
    needs: Needs,
    backend: str | None,
) -> LossAndGradients:
    """The loss [], differentiable in the head's inputs; the residuals [B]; and the gradients that `needs` names."""
    kernels = _backend(backend, head.hidden)
    if not _checks_data(kernels, "linear_reval_loss", head.hidden):
        check_token_data(Tokens(actions, layout.mask), transform, head.weight.shape[0], head.hidden)
        check_cu_seqlens(layout, actions)
    return kernels.linear_reval_loss(head, actions, layout, transform, reference, rewards, options, needs)


@linear_reval_loss.register_fake
def _(head, actions, layout, transform, reference, rewards, options, needs, backend):
    hidden, wide = head.hidden, wide_dtype(head.hidden)
    gradients = _new_head_gradients(head, needs)
    if keeps_wide_gradients(head):
        gradients = HeadGradients(*(x.to(wide) for x in gradients))
    return LossAndGradients(hidden.new_empty((), dtype=wide), hidden.new_empty(rewards.shape, dtype=wide), *gradients)


def _save_linear_reval_loss(ctx, groups, output):
    head, *_, needs, _ = groups
    ctx.dtypes = [None if x is None else x.dtype for x in head.tensors]
    ctx.set_materialize_grads(False)  # zeros for the output d_weight would be one more tensor [V, D]
    # torch.export makes `needs` a constant. So the output can lack a gradient that its user asks for. The backward then
    # calls the op again.
    ctx.lacking = any(asked and not have for asked, have in zip(ctx.needs_input_grad[:3], needs, strict=True))
    if ctx.lacking:
        inputs = flatten(groups)
        ctx.constants = [None if isinstance(x, Tensor) else x for x in inputs]
        ctx.save_for_backward(*(x if isinstance(x, Tensor) else None for x in inputs))
    else:
        ctx.save_for_backward(*output[2:])


def _linear_reval_loss_gradient(ctx, d_loss, d_residual, *second_order):
    # With create_graph, the gradients below have a graph: the saved tensors are outputs of the op, so their graph leads
    # back to this function.
    if any(x is not None for x in second_order):
        raise RuntimeError(_no_second_order("linear_reval_loss"))
    if d_loss is None:
        return None, None, None
    asked, unit = Needs(*ctx.needs_input_grad[:3]), ctx.saved_tensors
    if ctx.lacking:
        inputs = [c if x is None else x for c, x in zip(ctx.constants, unit, strict=True)]
        groups = linear_reval_loss.grouped(inputs)
        groups[-2] = asked
        unit = linear_reval_loss(*groups)[2:]
    each = zip(unit, ctx.dtypes, asked, strict=True)
    return tuple(_scaled(g, d_loss).to(dtype) if need else None for g, dtype, need in each)


def _scaled(gradient: Tensor, d_loss: Tensor) -> Tensor:
    """gradient * d_loss.

    The product overwrites `gradient` in an eager backward that does not keep its graph: no later backward reads
    `gradient`, and a second tensor [V, D] would double the memory of the head's gradient.
    """
    traced = torch.compiler.is_compiling() or type(gradient) is not Tensor
    if traced or torch_private.is_batched(d_loss) or torch_private.backward_keeps_graph():
        return gradient * d_loss
    if d_loss.device.type == "cpu" and d_loss == 1:  # on a GPU this comparison costs more than the product
        return gradient.data
    return gradient.data.mul_(d_loss)


linear_reval_loss.register_autograd(_linear_reval_loss_gradient, _save_linear_reval_loss)
