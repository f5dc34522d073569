"""The contract between the public functions and the backends: groups of arguments, groups of results, and `Backend`.

A public function checks its arguments, packs them into the groups below and calls an op of library.py. The op checks
the data (are all actions inside the vocabulary?) and calls one function of a `Backend`. So a backend receives valid
groups and checks nothing, except for the functions that it names in `CHECKS_DATA`.

Letters: `...` is [B, T] (padded) or [N] (packed), B trajectories, T tokens of the longest trajectory, N tokens in all,
V words of the vocabulary, D features of a hidden state.
"""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .types import TokenValues

# --- groups of arguments --------------------------------------------------------------------------------------------
# Each field has a type that torch.library knows, because grouped_op.py flattens the groups into an op's schema.


class Tokens(NamedTuple):
    """The tokens of one call."""

    actions: Tensor
    """[...] int64 or int32, the token that the policy took in each state."""
    mask: Tensor | None
    """[...] bool, true where the token is an action of the policy; None: every token is an action."""


class Layout(NamedTuple):
    """Where trajectories begin and end, and which of their tokens are actions."""

    mask: Tensor | None
    """[...] bool; None: every token is an action."""
    cu_seqlens: Tensor | None
    """[B + 1] int32 or int64 for packed tokens [N]: trajectory b has the tokens cu_seqlens[b] to cu_seqlens[b + 1] - 1.
    None: the tokens are padded, [B, T]."""


class Transform(NamedTuple):
    """Softcap and temperature, applied to a logit x first: softcap * tanh(x / softcap), then / temperature.

    Example: Transform(temperature=0.7, softcap=30.0) turns x into 30 * tanh(x / 30) / 0.7.
    """

    temperature: float = 1.0
    """The temperature of all tokens. Unused where `temperatures` is given."""
    temperatures: Tensor | None = None
    """[...], one temperature for each token."""
    softcap: float | None = None

    def at(self, index: tuple[Tensor, ...]) -> Transform:
        """The transform of the tokens at `index`, with temperatures [C]."""
        return self if self.temperatures is None else self._replace(temperatures=self.temperatures[index])

    def flattened(self) -> Transform:
        """The same transform for tokens in one dimension, with temperatures [N]."""
        return self if self.temperatures is None else self._replace(temperatures=self.temperatures.reshape(-1))


PRECISIONS = ("exact", "bf16x3", "tf32", "bf16")
"""The precisions of `HeadInputs`, from the finest to the fastest (docs/kernels.md)."""


class HeadInputs(NamedTuple):
    """The inputs of logits = hidden @ weight.T + bias."""

    hidden: Tensor
    """[..., D]"""
    weight: Tensor
    """[V, D]"""
    bias: Tensor | None
    """[V]"""
    precision: str = "exact"
    """The least precision of products of float32 operands: a name from PRECISIONS."""

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """hidden, weight and bias."""
        return self.hidden, self.weight, self.bias

    def has(self, dtype: torch.dtype) -> bool:
        """Whether one of the tensors has this dtype."""
        return any(x is not None and x.dtype == dtype for x in self.tensors)


class Needs(NamedTuple):
    """Which gradients of `HeadInputs` the caller asks for."""

    needs_hidden: bool
    needs_weight: bool
    needs_bias: bool

    @property
    def frozen_head(self) -> bool:
        """Whether the hidden states alone need a gradient."""
        return self == (True, False, False)


class Reference(NamedTuple):
    """The reference policy's numbers for the loss: token values, or one return for each trajectory."""

    q_ref: Tensor | None
    """[...]; q_ref, v_ref and log_prob_ref are given together."""
    v_ref: Tensor | None
    log_prob_ref: Tensor | None
    returns: Tensor | None
    """[B], V_ref(s_1) + sum_h log pi_ref(a_h|s_h); enough for level "trajectory". None where token values are given."""

    @classmethod
    def of(cls, given: TokenValues | Tensor) -> Reference:
        """The Reference for either form that users pass."""
        return (
            cls(None, None, None, given) if isinstance(given, Tensor) else cls(given.q, given.v, given.log_prob, None)
        )


class Level(IntEnum):
    """The numbers that a Bellman loss squares (docs/method.md section 4). The kernels use the same integers."""

    TRAJECTORY = 0
    """The sum of a trajectory's TD errors."""
    TOKEN = 1
    """Each TD error."""
    SUBTRAJECTORY = 2
    """The sum of the TD errors from each action to the last."""


class BellmanOptions(NamedTuple):
    """The options of a Bellman loss. docs/extending.md says which files a new option touches."""

    beta: float
    level: int = Level.TRAJECTORY
    """A `Level`. The type is int, because an op's schema has no enums."""
    semi_gradient: bool = False
    normalizer: Tensor | None = None
    """[] float64 on the CPU, the divisor of the sum of squares. None: the divisor is the number of trajectories. The
    normalizer is a tensor, because torch.compile would compile again for every new number."""

    def divisor(self, trajectories: int) -> float:
        """The normalizer as a number."""
        return float(max(trajectories, 1)) if self.normalizer is None else float(self.normalizer.item())


# --- groups of results ----------------------------------------------------------------------------------------------


class RowValues(NamedTuple):
    """Six numbers of each token, [...]: float32, or float64 for float64 inputs; 0 where masked out."""

    q: Tensor
    v: Tensor
    log_prob: Tensor
    entropy: Tensor
    """0 unless `with_entropy` is true."""
    row_max: Tensor
    """The largest transformed logit. v = row_max + log_sum. The backward needs both terms: in a sum near 1e4 the last
    digits of log_sum are lost."""
    log_sum: Tensor

    @property
    def statistics(self) -> Statistics:
        """The numbers from which the backward computes probabilities again."""
        return Statistics(self.row_max, self.log_sum, self.entropy)


class Statistics(NamedTuple):
    """The numbers of each row that the backward reads, [...] each: log p = (z - row_max) - log_sum."""

    row_max: Tensor
    log_sum: Tensor
    entropy: Tensor

    def at(self, index: tuple[Tensor, ...] | slice) -> Statistics:
        """The statistics of the tokens at `index`."""
        return Statistics(*(x[index] for x in self))


class Cotangents(NamedTuple):
    """Gradients of the loss with respect to the outputs of token_values, [...] each."""

    dq: Tensor
    dv: Tensor
    dlog_prob: Tensor
    dentropy: Tensor | None
    """None: no gradient through the entropy."""

    def at(self, index: tuple[Tensor, ...] | slice) -> Cotangents:
        """The cotangents of the tokens at `index`."""
        return Cotangents(*(None if x is None else x[index] for x in self))  # type: ignore[arg-type]  # dentropy


class HeadGradients(NamedTuple):
    """Gradients of `HeadInputs`. A gradient that the caller did not ask for is an empty tensor."""

    d_hidden: Tensor
    d_weight: Tensor
    d_bias: Tensor


class LossTerms(NamedTuple):
    """A Bellman loss, and its gradients with respect to q, v and log_prob of every token."""

    loss: Tensor
    """[]"""
    residual: Tensor
    """[B]"""
    dq: Tensor
    dv: Tensor
    dlog_prob: Tensor

    @property
    def unit(self) -> UnitGradients:
        """The gradients for an upstream gradient of 1."""
        return UnitGradients(self.dq, self.dv, self.dlog_prob)


class UnitGradients(NamedTuple):
    """Gradients of a Bellman loss with respect to q, v and log_prob, [...] each, for an upstream gradient of 1."""

    dq: Tensor
    dv: Tensor
    dlog_prob: Tensor


class LossAndGradients(NamedTuple):
    """A loss from hidden states, with the gradients of an upstream gradient of 1."""

    loss: Tensor
    """[]"""
    residual: Tensor
    """[B]"""
    d_hidden: Tensor
    """A gradient that is not needed is an empty tensor. All three gradients are in float32 (float64) if one of the
    inputs is float16: see `keeps_wide_gradients`."""
    d_weight: Tensor
    d_bias: Tensor


# --- the functions of a backend -------------------------------------------------------------------------------------


class Backend(Protocol):
    """A module with these names is a backend. Its functions record no graph for autograd.

    backends/portable.py is the complete example in PyTorch. A module may import functions from another
    backend if it has no better version of them.
    """

    @property
    def DEVICES(self) -> tuple[str, ...] | None:  # noqa: N802
        """Device types that the backend serves when the caller names no backend. None: every device."""

    @property
    def CHECKS_DATA(self) -> frozenset[str]:  # noqa: N802
        """The functions that check their data themselves on a GPU, with a device-side assert in a kernel: actions and
        temperatures, or cu_seqlens. Before all other functions, and on other devices, the ops check (checks.py)."""

    def missing(self) -> str | None:
        """Why the backend cannot run on this machine; None when it can."""

    def token_values(self, logits: Tensor, tokens: Tokens, transform: Transform, with_entropy: bool, /) -> RowValues:
        """The values of logits [..., V] with any strides."""

    def token_values_backward(
        self,
        logits: Tensor,
        tokens: Tokens,
        transform: Transform,
        statistics: Statistics,
        cotangents: Cotangents,
        inplace: bool,
        /,
    ) -> Tensor:
        """dlogits [..., V] in the dtype of the logits. `inplace`: dlogits is written over the logits."""

    def linear_token_values(
        self,
        head: HeadInputs,
        tokens: Tokens,
        transform: Transform,
        with_entropy: bool,
        with_expected: bool,
        /,
    ) -> tuple[RowValues, Tensor]:
        """The values, and `expected` [..., D] (frozen_head.py); `expected` is empty unless `with_expected`."""

    def linear_token_values_backward(
        self,
        head: HeadInputs,
        tokens: Tokens,
        transform: Transform,
        statistics: Statistics,
        cotangents: Cotangents,
        needs: Needs,
        /,
    ) -> HeadGradients:
        """Gradients in the dtypes of the inputs."""

    def td_targets(
        self,
        values: TokenValues,
        reference: Reference,
        rewards: Tensor,
        layout: Layout,
        beta: float,
        gamma: float,
        /,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Target, error and endogenous reward of each token, [...] (docs/method.md section 2)."""

    def td_targets_backward(
        self, d_target: Tensor, d_error: Tensor, layout: Layout, gamma: float, /
    ) -> tuple[Tensor, Tensor]:
        """dq and dv, [...]."""

    def bellman_loss(
        self,
        values: TokenValues,
        reference: Reference,
        rewards: Tensor,
        layout: Layout,
        options: BellmanOptions,
        /,
    ) -> LossTerms:
        """Loss, residuals, and the gradients with respect to q, v and log_prob (docs/method.md sections 3 and 4)."""

    def bellman_loss_backward(
        self, d_loss: Tensor, d_residual: Tensor | None, unit: UnitGradients, layout: Layout, /
    ) -> UnitGradients:
        """dq, dv, dlog_prob for the upstream gradients d_loss [] and d_residual [B]. None stands for zeros, as where
        the user differentiates the loss alone."""

    def linear_reval_loss(
        self,
        head: HeadInputs,
        actions: Tensor,
        layout: Layout,
        transform: Transform,
        reference: Reference,
        rewards: Tensor,
        options: BellmanOptions,
        needs: Needs,
        /,
    ) -> LossAndGradients:
        """`bellman_loss` of `linear_token_values`, with its gradients for an upstream gradient of 1."""


# --- dtypes ---------------------------------------------------------------------------------------------------------


def wide_dtype(x: Tensor) -> torch.dtype:
    """The dtype of every sum over words or tokens: float32, or float64 if x is float64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def keeps_wide_gradients(head: HeadInputs) -> bool:
    """Whether linear_reval_loss keeps its gradients in float32 (float64) until the upstream gradient is known.

    In float16 a gradient below 6e-8 would become 0 before it is multiplied by the upstream gradient, for example by a
    loss scale of 65536.
    """
    return head.has(torch.float16)
