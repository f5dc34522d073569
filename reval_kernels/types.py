"""The results of the public functions."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.serialization import add_safe_globals

from .torch_private import allow_export


class TokenValues(NamedTuple):
    """Q, V and log pi of one action in one state, for every token. The losses use no other output of the policy.

    All tensors have the shape [...] of the actions ([B, T] padded or [N] packed) and are float32 (float64 for
    float64 logits). Masked-out positions hold 0. Values are in units of reward / beta.
    """

    q: Tensor
    """Q(s, a): the action's logit, after softcap and temperature."""
    v: Tensor
    """V(s) = logsumexp over the vocabulary."""
    log_prob: Tensor
    """log pi(a|s) = q - v, computed without subtracting two large numbers."""
    entropy: Tensor | None = None
    """Entropy of pi(.|s) in nats; None unless with_entropy is true."""

    def returns(self, mask: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
        """V(s_1) + sum_h log pi(a_h|s_h) of each trajectory.

        Of the reference policy, this is all that `bellman_loss` needs at level "trajectory", so one number stands for a
        whole trajectory in a replay buffer. Of the policy, it is the sum of the endogenous rewards of a response.

        Args:
            mask: [B, T] or [N] bool, true where the token is an action; None: every token is one.
            cu_seqlens: [B + 1] int32 or int64, for packed tokens: 0, ..., N.

        Returns:
            [B] in the dtype of the values, summed in float64 and rounded once. 0 for a trajectory without actions.
            Differentiable in v and log_prob.

        Raises:
            TypeError: the mask is not bool, or cu_seqlens is not int32 or int64.
            ValueError: the values are neither padded [B, T] nor packed [N] with cu_seqlens, the mask has another shape
                than they have, or cu_seqlens does not go from 0 to N.

        Examples:
            >>> import torch
            >>> from reval_kernels import TokenValues, token_values
            >>> values = token_values(torch.zeros(2, 3, 10), torch.zeros(2, 3, dtype=torch.long))
            >>> mask = torch.tensor([[False, True, True], [False, False, False]])
            >>> values.returns(mask)  # log 10 - 2 log 10, and a trajectory without actions
            tensor([-2.3026,  0.0000])
            >>> packed = TokenValues(*(x[0] for x in values[:3]))
            >>> packed.returns(cu_seqlens=torch.tensor([0, 1, 3]))
            tensor([ 0.0000, -2.3026])
        """
        if self.v.dim() != (2 if cu_seqlens is None else 1):
            wanted = "[B, T] without cu_seqlens" if cu_seqlens is None else "[N] with cu_seqlens"
            raise ValueError(f"the values must have shape {wanted}, got {list(self.v.shape)}")
        if cu_seqlens is not None:
            _check_ends(cu_seqlens, len(self.v))
        mask = torch.ones_like(self.v, dtype=torch.bool) if mask is None else mask
        if mask.dtype != torch.bool:
            raise TypeError(f"mask must be bool, got {str(mask.dtype).removeprefix('torch.')}")
        if mask.shape != self.v.shape:
            raise ValueError(f"mask must have shape {list(self.v.shape)}, got {list(mask.shape)}")
        before = mask.cumsum(-1) - mask.int()  # actions before each token, of all trajectories if packed
        if cu_seqlens is None:
            first = mask & (before == 0)
        else:
            token = torch.arange(len(mask), device=mask.device)
            trajectory = torch.searchsorted(cu_seqlens[1:], token, right=True)
            first = mask & (before == before[cu_seqlens[:-1].long()[trajectory]])
        terms = self.log_prob.double().where(mask, 0) + self.v.double().where(first, 0)
        if cu_seqlens is None:
            return terms.sum(1).to(self.v.dtype)
        sums = terms.new_zeros(len(cu_seqlens) - 1).index_add(0, trajectory, terms)
        return sums.to(self.v.dtype)


def _check_ends(cu_seqlens: Tensor, tokens: int) -> None:
    """Check cu_seqlens. checks.py does it too, but it imports this module."""
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens must be int32 or int64, got {str(cu_seqlens.dtype).removeprefix('torch.')}")
    if cu_seqlens.dim() != 1 or not len(cu_seqlens):
        raise ValueError(f"cu_seqlens must have shape [B + 1], got {list(cu_seqlens.shape)}")
    if torch.compiler.is_compiling() or cu_seqlens.device.type != "cpu":  # a GPU would have to be waited for
        return
    if cu_seqlens[0] != 0 or cu_seqlens[-1] != tokens or (cu_seqlens[1:] < cu_seqlens[:-1]).any():
        raise ValueError(f"cu_seqlens must start at 0, never fall and end at N = {tokens}, got {cu_seqlens.tolist()}")


class TDTargets(NamedTuple):
    """TD targets of docs/method.md section 2. Each tensor is [...] like the token values, and 0 where masked out."""

    target: Tensor
    """y_h = e_h + 1[h=H] r / beta + gamma V(s_{h+1})"""
    error: Tensor
    """d_h = Q(s_h, a_h) - y_h"""
    endogenous_reward: Tensor
    """e_h = Q_ref(s_h, a_h) - gamma V_ref(s_{h+1})"""


class BellmanLoss(NamedTuple):
    """A Bellman loss and the residuals of its trajectories."""

    loss: Tensor
    """Scalar."""
    residual: Tensor
    """[B], sum_h d_h of each trajectory in units of reward / beta; 0 for a trajectory without actions."""


for _type in (TokenValues, TDTargets, BellmanLoss):
    allow_export(_type)
    add_safe_globals([_type])  # torch.load takes the type with weights_only=True, its default
