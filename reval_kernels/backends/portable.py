"""Chunked PyTorch for every device: tokens x vocabulary never exists in fp32 as a whole, and nothing of it is kept.

Letters: N tokens, M of them unmasked, C tokens of one chunk, V vocabulary, D width, B trajectories, L actions of the
longest one. Every function computes in float32 (float64 for float64 inputs) whatever the dtype of its inputs.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .rows import Transform, row_gradient_, row_values
from .trajectories import Trajectories, next_state

DEVICES = None
# Logits of one chunk, in entries: from logits, small enough for a CPU's cache; from hidden states, large enough for
# the matmuls to run at full speed (64 MiB in fp32).
ROWS_CHUNK = 1 << 21
LINEAR_CHUNK = 1 << 24


def missing() -> str | None:
    return None


def token_values(
    logits: Tensor, actions: Tensor, mask: Tensor | None, transform: Transform, with_entropy: bool
) -> tuple[Tensor, ...]:
    """Per token [...]: q, v, log_prob, entropy, and the row's max and log_sum that the backward needs."""
    rows, actions = _unmasked(actions, mask, logits.shape[-1], transform)
    values = [
        row_values(_wide(logits[at]), actions[c], transform.at(at), with_entropy)
        for c, at in _chunks(rows, ROWS_CHUNK // logits.shape[-1])
    ]
    return _per_token(values, rows, logits)


def token_values_backward(
    logits: Tensor,
    actions: Tensor,
    mask: Tensor | None,
    transform: Transform,
    statistics: tuple[Tensor, ...],
    cotangents: tuple[Tensor, ...],
    inplace: bool,
) -> Tensor:
    """dlogits [..., V] in the logits' dtype, written over the logits where `inplace`."""
    rows, actions = _unmasked(actions, mask, logits.shape[-1], transform)
    out = logits if inplace else logits.new_zeros(logits.shape)
    if inplace and mask is not None:
        out.masked_fill_(~mask[..., None], 0)
    for c, at in _chunks(rows, ROWS_CHUNK // logits.shape[-1]):
        chunk = _wide(logits[at])  # indexing copies, so the caller's logits stay as they are
        out[at] = row_gradient_(
            chunk, actions[c], transform.at(at), [x[at] for x in statistics], [x[at] for x in cotangents]
        ).to(out.dtype)
    return out


def linear_token_values(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    actions: Tensor,
    mask: Tensor | None,
    transform: Transform,
    with_entropy: bool,
    with_expected: bool,
) -> tuple[Tensor, ...]:
    """`token_values` of logits = hidden [..., D] @ weight [V, D].T + bias [V], a chunk of them at a time; `expected` as
    in `values_by_chunks`."""
    head = Head(hidden, weight, bias, (with_expected, False, False), wide=True)
    return values_by_chunks(head, actions, mask, transform, with_entropy)


def values_by_chunks(
    head: Head, actions: Tensor, mask: Tensor | None, transform: Transform, with_entropy: bool
) -> tuple[Tensor, ...]:
    """The six numbers of each token, and `expected` [..., D] if the head gathers a gradient of its hidden states.

    With a frozen head, expected = sum over all words but the action of p * dz/dlogit * weight[word] is all that the
    gradient of the hidden states needs of the logits, whatever the upstream gradient (`linear_expected_backward`):
    4 M V D operations instead of 6. The action stays out, or a confident state's 1 - p would be lost beside its p.
    """
    rows, actions = _unmasked(actions, mask, len(head.weight), transform)
    values, logits = [], None
    for c, at in _chunks(rows, head.size):
        logits = None  # the last chunk's room is free before the next takes its own
        logits, numbers = head.values(at, actions[c], transform.at(at), with_entropy)
        values.append(numbers)
        if head.needs[0]:
            _, _, log_prob, entropy, row_max, log_sum = numbers
            zero, one = torch.zeros_like(log_prob), torch.ones_like(log_prob)
            # -d log_prob, but for the action's own term
            by = (-log_prob.expm1(), zero, -one, zero)
            head.add_gradient_(at, logits, actions[c], transform.at(at), (row_max, log_sum, entropy), by)
    return *_per_token(values, rows, head.hidden), head.d_hidden


def linear_expected_backward(
    expected: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    actions: Tensor,
    mask: Tensor | None,
    transform: Transform,
    log_prob: Tensor,
    cotangents: tuple[Tensor, ...],
) -> Tensor:
    """d_hidden from the `expected` of `values_by_chunks`; cotangents: dq, dv, dlog_prob [...]."""
    rows, actions = _unmasked(actions, mask, len(weight), transform)
    d_hidden = hidden.new_zeros(hidden.shape)
    for c, at in _chunks(rows, ROWS_CHUNK // max(1, hidden.shape[-1])):
        word, of = weight[actions[c]].to(expected.dtype), transform.at(at)
        log_pi, dq, dv, dlog = (x[at][:, None] for x in (log_prob, *cotangents))
        at_action = dq + dv * log_pi.exp() - dlog * log_pi.expm1()  # as in row_gradient_
        if of.softcap is not None:
            logit = (_wide(hidden[at]) * word).sum(-1, keepdim=True)
            at_action = at_action * of.slope(logit if bias is None else logit + bias[actions[c]][:, None])
        at_action = at_action / of.temperature
        d_hidden[at] = ((dv - dlog) * expected[at] + at_action * word).to(hidden.dtype)
    return d_hidden


def linear_token_values_backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    actions: Tensor,
    mask: Tensor | None,
    transform: Transform,
    statistics: tuple[Tensor, ...],
    cotangents: tuple[Tensor, ...],
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias (empty where not needed); the logits are computed anew by chunks."""
    return recompute_gradients(Head(hidden, weight, bias, needs), actions, mask, transform, statistics, cotangents)


def recompute_gradients(
    head: Head,
    actions: Tensor,
    mask: Tensor | None,
    transform: Transform,
    statistics: tuple[Tensor, ...],
    cotangents: tuple[Tensor, ...],
) -> tuple[Tensor, Tensor, Tensor]:
    rows, actions = _unmasked(actions, mask, len(head.weight), transform)
    for c, at in _chunks(rows, head.size):
        logits = head.logits(at)
        head.add_gradient_(
            at, logits, actions[c], transform.at(at), [x[at] for x in statistics], [x[at] for x in cotangents]
        )
    return head.finish()


def linear_reval_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    actions: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    transform: Transform,
    reference: tuple[Tensor, ...],
    rewards: Tensor,
    beta: float,
    level: str,
    semi_gradient: bool,
    normalizer: float,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, residual [B], and the loss's gradients of hidden, weight and bias (empty where not needed; `wide_loss`)."""
    head = Head(hidden.reshape(-1, hidden.shape[-1]), weight, bias, needs, wide_loss(hidden, weight, bias))
    return whole_trajectory_loss(
        head,
        hidden.shape,
        actions,
        mask,
        cu_seqlens,
        transform,
        reference,
        rewards,
        beta,
        level,
        semi_gradient,
        normalizer,
    )


def wide_loss(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the loss's gradients are kept in fp32 (fp64) until the upstream gradient is known: in fp16 they would
    underflow before a loss scale could save them."""
    return any(x is not None and x.dtype == torch.float16 for x in (hidden, weight, bias))


def whole_trajectory_loss(
    head: Head,
    shape: torch.Size,
    actions: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    transform: Transform,
    reference: tuple[Tensor, ...],
    rewards: Tensor,
    beta: float,
    level: str,
    semi_gradient: bool,
    normalizer: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`linear_reval_loss` for hidden states of this shape, which `head` holds as [N, D].

    A chunk is made of whole trajectories, so its residuals close and its gradient is known while its logits are still
    there: 6 M V D operations instead of 8. A trajectory longer than a chunk has its logits computed twice.
    """
    layout = Trajectories(shape[:-1], actions.device, mask, cu_seqlens)
    _, actions = _unmasked(actions, mask, len(head.weight), transform)
    transform = transform.flattened()
    loss = _wide(head.hidden.new_zeros(()))
    residual = loss.new_zeros(len(layout.counts))

    for trajectories, span in _whole_trajectories(layout.counts.tolist(), head.size):
        tokens, taken, lengths = layout.actions[span], actions[span], layout.counts[trajectories]
        logits, values = None, []
        for c, at in (pieces := list(_chunks((tokens,), head.size))):
            logits = None  # the last piece's room is free before the next takes its own
            logits, numbers = head.values(at, taken[c], transform.at(at))
            values.append(numbers)
        q, v, log_prob, *statistics = (torch.cat(x) for x in zip(*values, strict=True))
        chunk_loss, residual[trajectories], *cotangents = head.bellman_loss(
            q,
            v,
            log_prob,
            [r[trajectories] if len(reference) == 1 else r.reshape(-1)[tokens] for r in reference],
            rewards[trajectories],
            None,
            torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]),
            beta,
            level,
            semi_gradient,
            normalizer,
        )
        loss += chunk_loss
        for c, at in pieces if any(head.needs) else ():
            if len(pieces) > 1:
                logits = head.logits(at)
            entropy, row_max, log_sum = (x[c] for x in statistics)
            head.add_gradient_(
                at,
                logits,
                taken[c],
                transform.at(at),
                (row_max, log_sum, entropy),
                (*(x[c] for x in cotangents), torch.zeros_like(entropy)),
            )
    d_hidden, d_weight, d_bias = head.finish()
    return loss, residual, d_hidden.view(shape) if head.needs[0] else d_hidden, d_weight, d_bias


def td_targets(
    q: Tensor,
    v: Tensor,
    reference: tuple[Tensor, ...],
    rewards: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    beta: float,
    gamma: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Targets, errors and endogenous rewards per token (METHOD.md section 2)."""
    layout = Trajectories(q.shape, q.device, mask, cu_seqlens)
    q_ref, v_ref = (layout.rows(x.to(q.dtype)) for x in reference[:2])
    q, v_next, v_ref_next = layout.rows(q), next_state(layout.rows(v)), next_state(v_ref)
    outcome = torch.where(layout.last, _scaled(rewards, beta, q)[:, None], 0)
    endogenous = q_ref - gamma * v_ref_next
    # policy minus reference before anything else: exactly 0 where they agree
    error = (q - q_ref) - gamma * (v_next - v_ref_next) - outcome
    return (
        layout.tokens(endogenous + outcome + gamma * v_next),
        layout.tokens(error),
        layout.tokens(torch.where(layout.valid, endogenous, 0)),
    )


def td_targets_backward(
    d_target: Tensor, d_error: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, gamma: float
) -> tuple[Tensor, Tensor]:
    """dq and dv per token."""
    layout = Trajectories(d_error.shape, d_error.device, mask, cu_seqlens)
    d_error = layout.rows(d_error)
    return layout.tokens(d_error), layout.tokens(_previous_state(gamma * (layout.rows(d_target) - d_error)))


def bellman_loss(
    q: Tensor,
    v: Tensor,
    log_prob: Tensor,
    reference: tuple[Tensor, ...],
    rewards: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    beta: float,
    level: str,
    semi_gradient: bool,
    normalizer: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, residual [B] and the loss's cotangents dq, dv, dlog_prob per token (METHOD.md sections 3 and 4).

    `reference` is (q, v, log_prob) per token, or (returns [B],).
    """
    layout = Trajectories(q.shape, q.device, mask, cu_seqlens)
    q, v, log_prob = layout.rows(q), layout.rows(v), layout.rows(log_prob)
    outcome = _scaled(rewards, beta, q)
    per_token = len(reference) == 3
    if per_token:
        # policy minus reference before anything else: exactly 0 where they agree
        d_q, d_v, d_log = (x - layout.rows(ref.to(x.dtype)) for x, ref in zip((q, v, log_prob), reference, strict=True))
        residual = _first(d_v) + d_log.sum(1) - outcome
    else:
        residual = _first(v) + log_prob.sum(1) - reference[0].to(q.dtype) - outcome
    residual = torch.where(layout.counts > 0, residual, 0)

    scale = 2 / normalizer
    dq = torch.zeros_like(q)
    dv, dlog = torch.zeros_like(q), torch.zeros_like(q)
    if level == "trajectory":
        terms = residual
        dv[:, :1] = scale * residual[:, None]
        dlog += scale * residual[:, None]
    elif level == "token":
        terms = torch.where(layout.valid, d_q - next_state(d_v) - torch.where(layout.last, outcome[:, None], 0), 0)
        dq += scale * terms
        if not semi_gradient:
            dv = _previous_state(-scale * terms)
    else:  # subtrajectory: c_h = sum over k >= h of d_k
        to_go = d_log.flip(1).cumsum(1).flip(1)
        terms = torch.where(layout.valid, d_v + to_go - outcome[:, None], 0)
        dv += scale * terms
        dlog = (scale * terms).cumsum(1)
    loss = terms.square().sum() / normalizer
    return loss, residual, layout.tokens(dq), layout.tokens(dv), layout.tokens(dlog)


def bellman_loss_backward(
    d_loss: Tensor,
    d_residual: Tensor,
    unit: tuple[Tensor, Tensor, Tensor],
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dv, dlog_prob per token, from the cotangents at d_loss = 1 and the upstream gradients."""
    layout = Trajectories(unit[0].shape, unit[0].device, mask, cu_seqlens)
    dq, dv, dlog = (layout.rows(d_loss * x) for x in unit)
    dv[:, :1] += d_residual[:, None]
    return layout.tokens(dq), layout.tokens(dv), layout.tokens(dlog + d_residual[:, None])


class Head:
    """logits = hidden @ weight.T + bias by chunks, what is computed on a chunk, and the gradients gathered from them.

    A backend with better kernels replaces the parts it does better. The weight's gradient adds up in fp32 (fp64).
    """

    bellman_loss = staticmethod(bellman_loss)

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: tuple[bool, bool, bool], wide: bool = False
    ):
        """`wide`: all gradients in fp32 (fp64), rather than in the dtypes of what they are gradients of."""
        self.hidden, self.weight, self.bias, self.needs, self.wide = hidden, weight, bias, needs, wide
        dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        self.d_hidden = hidden.new_zeros(hidden.shape if needs[0] else (0,), dtype=dtype if wide else hidden.dtype)
        self.d_weight = weight.new_zeros(weight.shape if needs[1] else (0,), dtype=dtype)
        self.d_bias = weight.new_zeros(len(weight) if needs[2] else 0, dtype=dtype)

    @property
    def size(self) -> int:
        """Tokens of one chunk."""
        return max(1, LINEAR_CHUNK // len(self.weight))

    def logits(self, at: tuple[Tensor, ...]) -> Tensor:
        """[C, V] in fp32 (fp64) of the tokens `at`."""
        return _logits(self.hidden[at], self.weight, self.bias)

    def values(
        self, at: tuple[Tensor, ...], actions: Tensor, transform: Transform, with_entropy: bool = False
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The logits, and the six numbers [C] of each row."""
        logits = self.logits(at)
        return logits, row_values(logits, actions, transform, with_entropy)

    def add_gradient_(
        self,
        at: tuple[Tensor, ...],
        logits: Tensor,
        actions: Tensor,
        transform: Transform,
        statistics: tuple[Tensor, ...],
        cotangents: tuple[Tensor, ...],
    ) -> None:
        """Take in the gradient of the tokens `at`, which may overwrite their logits."""
        self.gather(at, row_gradient_(logits, actions, transform, statistics, cotangents))

    def gather(self, at: tuple[Tensor, ...], dlogits: Tensor) -> None:
        """Take in the gradient [C, V] of their logits, in fp32 (fp64)."""
        if self.needs[0]:
            d_hidden = dlogits.new_zeros(len(dlogits), self.weight.shape[1])
            for words, tile in _tiles(self.weight, dlogits.dtype):
                d_hidden.addmm_(dlogits[:, words], tile)
            self.d_hidden[at] = d_hidden.to(self.d_hidden.dtype)
        if self.needs[1]:
            self.d_weight.addmm_(dlogits.T, self.hidden[at].to(dlogits.dtype))
        if self.needs[2]:
            self.d_bias += dlogits.sum(0)

    def finish(self) -> tuple[Tensor, Tensor, Tensor]:
        """d_hidden, d_weight, d_bias; empty where not needed."""
        if self.wide:
            return self.d_hidden, self.d_weight, self.d_bias
        bias = self.weight if self.bias is None else self.bias
        return self.d_hidden, self.d_weight.to(self.weight.dtype), self.d_bias.to(bias.dtype)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _unmasked(
    actions: Tensor, mask: Tensor | None, vocabulary: int, transform: Transform
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Where the unmasked tokens are (one index tensor [M] for each of the leading dimensions), and their actions."""
    rows = (torch.ones_like(actions, dtype=torch.bool) if mask is None else mask).nonzero(as_tuple=True)
    actions = actions[rows].long()
    outside = (actions < 0) | (actions >= vocabulary)
    if outside.any():
        first = int(outside.nonzero()[0, 0])
        where = [int(i[first]) for i in rows]
        raise ValueError(
            f"actions must lie in [0, {vocabulary}) where they are not masked out; got {int(actions[first])} at {where}"
        )
    if isinstance(transform.temperature, Tensor) and not (transform.temperature[rows] > 0).all():
        raise ValueError("temperature must be positive at every unmasked token")
    return rows, actions


def _chunks(rows: tuple[Tensor, ...], size: int) -> Iterator[tuple[slice, tuple[Tensor, ...]]]:
    """Pieces of at most `size` tokens: where they lie among the unmasked ones, and where among all."""
    size = max(1, size)
    for start in range(0, len(rows[0]), size):
        piece = slice(start, min(start + size, len(rows[0])))
        yield piece, tuple(index[piece] for index in rows)


def _whole_trajectories(counts: list[int], size: int) -> Iterator[tuple[slice, slice]]:
    """Runs of trajectories with at most `size` actions together (one alone may have more), and their actions."""
    first, start, held = 0, 0, 0
    for b, count in enumerate(counts):
        if held and held + count > size:
            yield slice(first, b), slice(start, start + held)
            first, start, held = b, start + held, 0
        held += count
    if held:
        yield slice(first, len(counts)), slice(start, start + held)


def _per_token(values: list[tuple[Tensor, ...]], rows: tuple[Tensor, ...], like: Tensor) -> tuple[Tensor, ...]:
    """The pieces' numbers [C] joined and put in their places [...], 0 elsewhere."""
    out = tuple(_wide(like.new_zeros(())).new_zeros(like.shape[:-1]) for _ in range(6))
    for x, pieces in zip(out, zip(*values, strict=True), strict=False):
        x[rows] = torch.cat(pieces)
    return out


def _tiles(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """The head's rows in the dtype of the computation; a narrower weight is widened a part at a time."""
    size = len(weight) if weight.dtype == dtype else max(1, LINEAR_CHUNK // 4 // max(1, weight.shape[1]))
    for start in range(0, len(weight), size):
        words = slice(start, min(start + size, len(weight)))
        yield words, weight[words].to(dtype)


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """[C, V] in fp32 (fp64): a bf16 logit near 20 is off by up to 0.06, and 5000 of them are summed."""
    hidden = _wide(hidden)
    logits = hidden.new_empty(len(hidden), len(weight))
    for words, tile in _tiles(weight, hidden.dtype):
        torch.mm(hidden, tile.T, out=logits[:, words])
    return logits if bias is None else logits.add_(bias)


def _scaled(rewards: Tensor, beta: float, like: Tensor) -> Tensor:
    return rewards.to(like.dtype) / beta


def _first(x: Tensor) -> Tensor:
    """The first column of [B, L], 0 where L = 0."""
    return x[:, 0] if x.shape[1] else x.new_zeros(len(x))


def _previous_state(d_next: Tensor) -> Tensor:
    """The gradient of V(s_h) from that of `next_state`."""
    out = torch.zeros_like(d_next)
    out[:, 1:] = d_next[:, :-1]
    return out
