"""Token values: Q, V and log pi of every action, from logits or from hidden states."""

from __future__ import annotations

import math
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

    A language model's logits x are its soft Q-values (arXiv 2603.23355, section 3). With a softcap, x becomes
    softcap * tanh(x / softcap). Then z = x / temperature, and

        q = z[action]    v = logsumexp(z)    log_prob = q - v = (z[action] - max z) - log sum exp(z - max z)

    Args:
        logits: [..., V] float32, bfloat16, float16 or float64; any strides; never copied as a whole. `...` is [B, T]
            (padded) or [N] (packed), V the size of the vocabulary.
        actions: [...] int64 or int32, the token taken in each state, in [0, V).
        mask: [...] bool, true where the token is an action. Where it is false, the outputs and the gradient are 0, the
            logits are never read, and the action may have any value, for example -100.
        temperature: a positive number, or a tensor [...]. It gets no gradient. With inf all words with a logit above
            -inf are equally likely. A finite temperature must be in the range of the computation: float32, or float64
            for float64 logits.
        softcap: a positive number in the same range, or None. inf means None.
        with_entropy: also return the entropy of softmax(z) in nats.
        inplace_grad: let the backward overwrite `logits` with their gradient. Entries of `logits` must not share
            memory, as in expanded tensors. This bumps the version counter of `logits`, so a second backward raises.
            Ignored under torch.compile.
        backend: a name from `reval_kernels.backends()`; None means the default of the tensors' device.

    Returns:
        TokenValues of [...] float32 tensors (float64 for float64 logits), all differentiable in the logits.

    Raises:
        TypeError, ValueError: a dtype, shape, device or value that does not fit; the message names the argument. On a
            GPU the CPU does not wait for checks of the data. There, an action outside [0, V) or a temperature that is
            not positive fails a device-side assert: a RuntimeError at some later call.

    Examples:
        >>> import torch
        >>> from reval_kernels import token_values
        >>> logits = torch.tensor([[[0.0, 1.0, 2.0], [3.0, 0.0, 0.0]]])  # 1 trajectory, 2 tokens, 3 words
        >>> values = token_values(logits, torch.tensor([[2, 1]]))
        >>> values.q, values.v
        (tensor([[2., 0.]]), tensor([[2.4076, 3.0949]]))
        >>> values.log_prob
        tensor([[-0.4076, -3.0949]])
    """
    if not isinstance(logits, Tensor) or logits.dim() < 2:
        raise ValueError(f"logits must be a tensor of shape [..., V], got {getattr(logits, 'shape', type(logits))}")
    checks.tensor("logits", logits, checks.FLOATS, logits.shape, None)
    if logits.shape[-1] == 0:
        raise ValueError(f"logits must have a vocabulary of at least one word, got shape {list(logits.shape)}")
    checks.token_arguments(actions, logits, mask, temperature, softcap)
    in_place = inplace_grad and not torch.compiler.is_compiling()
    if in_place and checks.overlapping(logits):
        raise ValueError(
            "inplace_grad needs logits whose entries do not share memory (not expanded, no overlapping rows); got "
            f"shape {list(logits.shape)} with strides {list(logits.stride())}"
        )
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
    precision: str = "exact",
    backend: str | None = None,
    process_group: ProcessGroup | None = None,
) -> TokenValues:
    """`token_values` of logits = hidden @ weight.T + bias. The logits are never stored as a whole.

    The logits are computed for unmasked tokens only, a chunk at a time, and in float32 or wider. The backward computes
    them again. The weight's gradient is summed in float32. With a frozen head (only `hidden` requires a gradient,
    with_entropy is false, process_group is None), the forward also sums a float32 tensor [..., D], from which the
    backward computes the gradient of `hidden` without the logits.

    Args:
        hidden: [..., D], where `...` is [B, T] or [N]; float32, bfloat16, float16 or float64.
        weight: [V, D], the head. Its dtype may differ from the dtype of the hidden states.
        actions: [...] int64 or int32, in [0, V).
        bias: [V] or None.
        mask, temperature, softcap, with_entropy, backend: as in `token_values`.
        precision: the least precision of the products of float32 operands; the sums are in float32. It matters on a
            GPU, where float32 has no tensor cores; the other backends compute exactly. A head and hidden states that
            are both bfloat16 or float16, or float64, are multiplied exactly in any case.
            "exact": float32 products. "bf16x3": an operand is the sum of two bfloat16 numbers, and three of the four
            products are taken: a logit is nearly exact. "tf32": operands rounded to 10 bits behind the leading one.
            "bf16": operands rounded to bfloat16. With "bf16x3" and "bf16" the gradients are products of bfloat16
            operands, and one operand may be bfloat16 already.
        process_group: the ranks that share the vocabulary. `weight` and `bias` are this rank's slice: rank 0 holds the
            first words, rank 1 the next words, and so on. `hidden` and `actions` are the same on all ranks. The outputs
            and the gradient of `hidden` are those of the whole vocabulary. Not under torch.compile.

    Returns:
        TokenValues of [...] float32 tensors (float64 for float64 hidden states), differentiable in hidden, weight and
        bias. Only the gradients that autograd asks for are computed.

    Raises:
        TypeError, ValueError: a dtype, shape, device or value that does not fit; the message names the argument. On
            a GPU, a wrong action or temperature may fail a device-side assert, as in `token_values`.

    Examples:
        >>> import torch
        >>> from reval_kernels import linear_token_values
        >>> hidden, head = torch.ones(1, 2, 4), torch.eye(3, 4)  # 1 trajectory, 2 tokens; 3 words
        >>> mask = torch.tensor([[False, True]])
        >>> linear_token_values(hidden, head, torch.tensor([[-100, 2]]), mask=mask).v
        tensor([[0.0000, 2.0986]])
    """
    checks.head_arguments(hidden, weight, bias, precision)
    checks.token_arguments(actions, hidden, mask, temperature, softcap)
    head, tokens, transform = (
        HeadInputs(hidden, weight, bias, precision),
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
    """The Transform for the arguments `temperature` and `softcap` of the public functions."""
    softcap = None if softcap is None or softcap == math.inf else float(softcap)
    if isinstance(temperature, Tensor):
        return Transform(temperatures=temperature, softcap=softcap)
    return Transform(float(temperature), softcap=softcap)
