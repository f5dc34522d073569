"""From the tokens of a model to states, actions and mask: the shift by one, and which tokens the model chose itself.

The hidden state (or logits) at position t has read the tokens up to t, and belongs to the action that follows: token
t + 1. So padded input_ids [B, T] have T - 1 states and actions. Pass `hidden[:, :-1]` (or `logits[:, :-1]`) together
with the result of `actions_and_mask`. Packed input_ids [N] keep their length, because sequences lie end to end: pass
`hidden` as it is. The last state of a sequence has no action, so the mask is false there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def actions_and_mask(
    input_ids: Tensor,
    prompt_lengths: Tensor,
    *,
    attention_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The action in each state, and where the model itself chose it.

    Args:
        input_ids: [B, T] padded on the left or on the right, or [N] packed together with cu_seqlens: a prompt and its
            response in each sequence.
        prompt_lengths: [B], the number of tokens of each prompt, without padding.
        attention_mask: [B, T] bool or 0 and 1, false for padding; None: there is no padding. Padded tokens only. Tokens
            after the end of a response count as padding (see `until_end`).
        cu_seqlens: [B + 1] int32 or int64, 0, ..., N: sequence b has the tokens cu_seqlens[b] to cu_seqlens[b + 1] - 1.

    Returns:
        actions, mask: [B, T - 1], or [N] if packed. The mask is true where the action is a token of the response.

    Raises:
        TypeError: an argument that is no tensor, or cu_seqlens of another dtype.
        ValueError: a shape that does not fit, cu_seqlens that does not go from 0 to N, or a prompt without tokens: the
            first action needs a state before it.

    Examples:
        >>> import torch
        >>> from reval_kernels import actions_and_mask
        >>> ids = torch.tensor([[5, 6, 7, 8], [5, 9, 0, 0]])  # the second is padded with 0
        >>> actions, mask = actions_and_mask(ids, torch.tensor([2, 1]), attention_mask=ids != 0)
        >>> actions
        tensor([[6, 7, 8],
                [9, 0, 0]])
        >>> mask
        tensor([[False,  True,  True],
                [ True, False, False]])
        >>> ids, ends = torch.tensor([5, 6, 7, 8, 5, 9]), torch.tensor([0, 4, 6])  # the same, packed
        >>> actions, mask = actions_and_mask(ids, torch.tensor([2, 1]), cu_seqlens=ends)
        >>> actions[mask]
        tensor([7, 8, 9])
    """
    checks.tensor("input_ids", input_ids, INTEGERS, None, None)
    checks.tensor("prompt_lengths", prompt_lengths, INTEGERS, None, None)
    if input_ids.dim() != (2 if cu_seqlens is None else 1):
        wanted = "[B, T] without cu_seqlens" if cu_seqlens is None else "[N] with cu_seqlens"
        raise ValueError(f"input_ids must have shape {wanted}, got {list(input_ids.shape)}")
    if cu_seqlens is not None:
        checks.packed_tokens(cu_seqlens, input_ids)
    sequences = len(input_ids) if cu_seqlens is None else len(cu_seqlens) - 1
    if prompt_lengths.shape != (sequences,):
        raise ValueError(f"prompt_lengths must have shape [{sequences}], got {list(prompt_lengths.shape)}")
    if bool((prompt_lengths < 1).any()):
        raise ValueError("prompt_lengths must be at least 1: the first action needs a state before it")
    if cu_seqlens is None:
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask.to(input_ids.dtype)
        if real.shape != input_ids.shape:
            raise ValueError(f"attention_mask must have shape {list(input_ids.shape)}, got {list(real.shape)}")
        count = real.cumsum(1)  # tokens of the sequence up to here, this one included
        return input_ids[:, 1:], ((count > prompt_lengths[:, None]) & (real > 0))[:, 1:]
    if attention_mask is not None:
        raise ValueError("attention_mask goes with padded tokens; packed tokens have no padding")
    token = torch.arange(len(input_ids), device=input_ids.device)
    sequence = torch.searchsorted(cu_seqlens[1:], token, right=True)
    following = token + 1
    inside = following < cu_seqlens[1:][sequence]  # the last token of a sequence has no successor
    response = following >= (cu_seqlens[:-1] + prompt_lengths)[sequence]
    return input_ids.roll(-1), inside & response


def until_end(tokens: Tensor, end_tokens: int | list[int]) -> Tensor:
    """Where a response goes on: true up to its first end token, and for that token; false behind it.

    Args:
        tokens: [B, H] int, the generated tokens without the prompt, as `generate` returns them.
        end_tokens: the end-of-sequence token, or several of them.

    Returns:
        [B, H] bool. All true for a response that the length limit cut off.

    Raises:
        TypeError: end_tokens that are no integers.
        ValueError: tokens of another shape.

    Examples:
        >>> import torch
        >>> from reval_kernels import until_end
        >>> until_end(torch.tensor([[4, 2, 2], [4, 5, 6]]), 2)
        tensor([[ True,  True, False],
                [ True,  True,  True]])
    """
    if tokens.dim() != 2:
        raise ValueError(f"tokens must have shape [B, H], got {list(tokens.shape)}")
    wrong = f"end_tokens must be an integer or a list of integers, got {end_tokens!r}"
    try:
        last = torch.as_tensor(end_tokens, device=tokens.device)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(wrong) from None
    if last.is_floating_point() and last.numel():  # an empty list becomes float32
        raise TypeError(wrong)
    ends = torch.isin(tokens, last).long()
    return ends.cumsum(1) - ends == 0  # no end before this token
