"""The heavy half: Q, V and log pi of every action, from logits or straight from hidden states."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import checks, library
from .contract import HeadInputs, Tokens, Transform
from .types import TokenValues

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def token_values(
    logits: Tensor,
    actions: Tensor,
    *,
    mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    with_entropy: bool = False,
    inplace_grad: bool = False,
    backend: str | None = None,
) -> TokenValues:
    """Soft Q-value, state value and log-probability of each action, from logits.

    A language model's logits are its soft Q-values (arXiv 2603.23355, section 3): with z the logits after
    softcap * tanh(z / softcap) and then z / temperature,

        q = z[action]    v = logsumexp(z)    log_prob = q - v = (z[action] - max z) - log sum exp(z - max z)

    Args:
        logits: [..., V] float32, bfloat16, float16 or float64; any strides, never copied as a whole. `...` is [B, T]
            or [N].
        actions: [...] int64 or int32, the token taken in each state, in [0, V).
        mask: [...] bool, true where the token is an action. Elsewhere the outputs are 0, the gradient is 0, the
            logits are never read, and the action may be anything (-100 too).
        temperature: a positive number, or a tensor [...]; a constant for the gradient.
        softcap: a positive number, or None.
        with_entropy: also return the entropy of softmax(z) in nats.
        inplace_grad: let the backward overwrite `logits` with its gradient (not where they are expanded). The logits'
            version counter is bumped, so a second backward raises. Ignored under torch.compile.
        backend: a name from `reval_kernels.backends()`; None for the default of the tensors' device.

    Returns:
        TokenValues of [...] float32 tensors (float64 for float64 logits), each differentiable in the logits.

    Raises:
        TypeError, ValueError: a dtype, shape, device or value that does not fit; the message names the argument. On a
            GPU, where nobody waits for the answer, an action outside [0, V) or a temperature that is not positive is
            a device-side assert (torch._assert_async) instead: a RuntimeError at some later call.
    """
    if not isinstance(logits, Tensor) or logits.dim() < 2:
        raise ValueError(f"logits must be a tensor of shape [..., V], got {getattr(logits, 'shape', type(logits))}")
    checks.tensor("logits", logits, checks.FLOATS, logits.shape, None)
    if logits.shape[-1] == 0:
        raise ValueError(f"logits must have a vocabulary of at least one word, got shape {list(logits.shape)}")
    checks.token_arguments(actions, logits.shape[:-1], logits.device, mask, temperature, softcap)
    if (
        inplace_grad
        and not torch.compiler.is_compiling()
        and any(step == 0 and size > 1 for step, size in zip(logits.stride(), logits.shape, strict=True))
    ):
        raise ValueError(f"inplace_grad needs logits that are not expanded, got strides {list(logits.stride())}")
    in_place = inplace_grad and not torch.compiler.is_compiling()
    out = library.token_values(
        logits, Tokens(actions, mask), transform_of(temperature, softcap), with_entropy, in_place, backend
    )
    return TokenValues(out.q, out.v, out.log_prob, out.entropy if with_entropy else None)


def linear_token_values(
    hidden: Tensor,
    weight: Tensor,
    actions: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    with_entropy: bool = False,
    backend: str | None = None,
    process_group: ProcessGroup | None = None,
) -> TokenValues:
    """`token_values` of logits = hidden @ weight.T + bias, which never exist as a whole.

    The logits are computed for unmasked tokens only, a chunk at a time, and never rounded below float32; the backward
    computes them anew. The weight's gradient accumulates in float32. With a frozen head (only `hidden` requires a
    gradient; no entropy, no process_group) the forward already sums up what that gradient needs of the logits,
    [..., D] in float32, and the backward computes none.

    Args:
        hidden: [..., D], `...` being [B, T] or [N]; float32, bfloat16, float16 or float64.
        weight: [V, D], the head; its dtype may differ from the hidden states'.
        actions: [...] int64 or int32, in [0, V).
        bias: [V] or None.
        mask, temperature, softcap, with_entropy, backend: as in `token_values`.
        process_group: `weight` and `bias` are this rank's slice of the vocabulary, in the order of the ranks; `hidden`
            and `actions` are the same on all ranks, and the outputs and the gradient of `hidden` are those of the
            whole vocabulary. Not under torch.compile.

    Returns:
        TokenValues of [...] float32 tensors (float64 for float64 hidden states), differentiable in hidden, weight and
        bias; only gradients that are asked for are computed.

    Raises:
        TypeError, ValueError: a dtype, shape, device or value that does not fit; the message names the argument. What
            is wrong with an action or a temperature may be a device-side assert on a GPU, as in `token_values`.
    """
    checks.head_arguments(hidden, weight, bias)
    checks.token_arguments(actions, hidden.shape[:-1], hidden.device, mask, temperature, softcap)
    head, tokens, transform = (
        HeadInputs(hidden, weight, bias),
        Tokens(actions, mask),
        transform_of(temperature, softcap),
    )
    if process_group is not None:
        from .sharded import sharded_token_values

        return sharded_token_values(process_group, head, tokens, transform, with_entropy, backend)
    frozen = not weight.requires_grad and (bias is None or not bias.requires_grad)
    with_expected = torch.is_grad_enabled() and hidden.requires_grad and frozen and not with_entropy
    out, _ = library.linear_token_values(head, tokens, transform, with_entropy, with_expected, backend)
    return TokenValues(out.q, out.v, out.log_prob, out.entropy if with_entropy else None)


def transform_of(temperature: float | Tensor, softcap: float | None) -> Transform:
    """The transform that two arguments of the public functions describe."""
    if isinstance(temperature, Tensor):
        return Transform(temperatures=temperature, softcap=softcap)
    return Transform(float(temperature), softcap=softcap)
