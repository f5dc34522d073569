"""td_targets and bellman_loss against their definition, and the identities of docs/method.md.

The functions compute from a few numbers per token. So nearly all tests run in float64, where no rounding error can hide
a wrong term. hypothesis chooses the trajectories: 0 to 6 actions, padded or packed, with or without gaps.
"""

import pytest
import torch
from cases import assert_close, assert_no_worse_than_torch, assert_same_bits, logits_and_actions, values
from hypothesis import given, settings
from hypothesis import strategies as st
from test_trajectories import actions_of, layouts

from reval_kernels import TokenValues, bellman_loss, reference, td_targets

LEVELS = ["trajectory", "token", "subtrajectory"]


def leaves(v: TokenValues) -> TokenValues:
    return TokenValues(*(x.detach().clone().requires_grad_() for x in v[:3]))


def gradients(out, v: TokenValues, **by) -> tuple:
    """The gradients of sum(output * by) for q, v and log_prob; 0 for a tensor that the outputs do not depend on."""
    outputs = [getattr(out, name) for name in by]
    if not any(x.requires_grad for x in outputs):  # for an empty batch the definition returns a constant
        return tuple(torch.zeros_like(x) for x in v[:3])
    found = torch.autograd.grad(outputs, v[:3], list(by.values()), allow_unused=True, retain_graph=True)
    return tuple(torch.zeros_like(x) if g is None else g for g, x in zip(found, v, strict=False))


def returns_of(v: TokenValues, actions: list[list[int]]) -> torch.Tensor:
    """V(s_1) + sum log pi of each trajectory; 0 for a trajectory without actions."""
    v1, log_prob = v.v.flatten(), v.log_prob.flatten()
    sums = [v1[a[0]] + log_prob[a].sum() if a else v1.new_zeros(()) for a in actions]
    return torch.stack(sums) if sums else v1.new_zeros(0)


# --- the definition -------------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(
    layout=layouts(),
    level=st.sampled_from(LEVELS),
    semi_gradient=st.booleans(),
    cached=st.booleans(),
    normalizer=st.sampled_from([None, 7.5]),
    seed=st.integers(0, 2**16),
)
def test_bellman_loss(backend, layout, level, semi_gradient, cached, normalizer, seed):
    """Loss, residual, and the gradients through both. Tokens that are no actions hold NaN and are not read."""
    torch.manual_seed(seed)
    shape, mask, cu_seqlens = layout
    actions = actions_of(*layout)
    v, ref = leaves(values(*shape)), values(*shape)
    rewards = torch.randn(len(actions))
    anchor = returns_of(ref, actions) if cached and level == "trajectory" else ref
    options = {"mask": mask, "cu_seqlens": cu_seqlens, "beta": 0.3, "level": level, "normalizer": normalizer}
    options["semi_gradient"] = semi_gradient and level == "token"
    truth = reference.bellman_loss(v, anchor, rewards, **options)
    by = {"loss": torch.randn((), dtype=torch.float64), "residual": torch.randn(len(actions), dtype=torch.float64)}
    expected = gradients(truth, v, **by)

    with torch.no_grad():
        for x in (*v[:3], *ref[:3]):
            x.masked_fill_(torch.zeros(shape, dtype=torch.bool) if mask is None else ~mask, torch.nan)
    ours = bellman_loss(v, anchor, rewards, backend=backend, **options)
    assert_close(ours.loss, truth.loss)
    assert_close(ours.residual, truth.residual)
    for g, g_expected in zip(gradients(ours, v, **by), expected, strict=True):
        assert_close(g, g_expected)
        assert mask is None or (g[~mask] == 0).all()


@settings(max_examples=30)
@given(layout=layouts(), gamma=st.sampled_from([1.0, 0.9, 0.0]), seed=st.integers(0, 2**16))
def test_td_targets(backend, layout, gamma, seed):
    torch.manual_seed(seed)
    shape, mask, cu_seqlens = layout
    v, ref, rewards = leaves(values(*shape)), values(*shape), torch.randn(len(actions_of(*layout)))
    options = {"mask": mask, "cu_seqlens": cu_seqlens, "beta": 0.3, "gamma": gamma}
    by = {"target": torch.randn(shape, dtype=torch.float64), "error": torch.randn(shape, dtype=torch.float64)}
    truth = reference.td_targets(v, ref, rewards, **options)
    ours = td_targets(v, ref, rewards, backend=backend, **options)
    for x, expected in zip(ours, truth, strict=True):
        assert_close(x, expected)
    for g, expected in zip(gradients(ours, v, **by), gradients(truth, v, **by), strict=True):
        assert_close(g, expected)
    assert not ours.endogenous_reward.requires_grad


@pytest.mark.parametrize("level", LEVELS)
def test_float32_is_as_precise_as_plain_pytorch(backend, level):
    """The sums over 200 actions are so long that rounding matters."""
    wide, ref = values(4, 200, vocabulary=50), values(4, 200, vocabulary=50)
    rewards, mask = torch.randn(4), torch.rand(4, 200) < 0.8
    results = {}
    for name, function, dtype in (
        ("ours", lambda *a, **k: bellman_loss(*a, backend=backend, **k), torch.float32),
        ("plain", reference.bellman_loss, torch.float32),
        ("truth", reference.bellman_loss, torch.float64),
    ):
        # the truth starts from the same numbers, rounded to float32
        v, anchor = (TokenValues(*(x.float().to(dtype) for x in t[:3])) for t in (wide, ref))
        v = leaves(v)
        out = function(v, anchor, rewards, mask=mask, beta=0.02, level=level)
        results[name] = (out.loss, out.residual, *gradients(out, v, loss=torch.ones((), dtype=dtype)))
    for ours, plain, truth in zip(*(results[k] for k in ("ours", "plain", "truth")), strict=True):
        assert_no_worse_than_torch(ours, plain, truth)


def test_td_targets_do_not_depend_on_log_prob(backend):
    """A log_prob with a graph is no reason to record one, and to run a backward for nothing."""
    v, ref = values(2, 3), values(2, 3)
    out = td_targets(
        v._replace(log_prob=v.log_prob.clone().requires_grad_()), ref, torch.rand(2), beta=0.5, backend=backend
    )
    assert not any(x.requires_grad for x in out)


# --- identities of docs/method.md -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("level", LEVELS)
def test_a_policy_equal_to_its_reference_has_no_loss(backend, level, dtype):
    """Loss, residuals, gradients and TD errors are exactly 0."""
    ref = values(3, 7, dtype=dtype, vocabulary=40)
    v, mask = leaves(ref), torch.rand(3, 7) < 0.7
    out = bellman_loss(v, ref, torch.zeros(3), mask=mask, beta=0.02, level=level, backend=backend)
    assert out.loss == 0 and (out.residual == 0).all()
    assert all((g == 0).all() for g in gradients(out, v, loss=torch.ones((), dtype=dtype)))
    assert (td_targets(v, ref, torch.zeros(3), mask=mask, beta=0.02, backend=backend).error == 0).all()


def test_returns_of_the_policy_itself_leave_only_the_reward(backend):
    v, rewards = values(3, 7), torch.tensor([1.0, 0.0, -2.0])
    returns = returns_of(v, actions_of(v.q.shape, None, None))
    out = bellman_loss(v, returns, rewards, beta=0.25, backend=backend)
    assert_close(out.residual, -rewards / 0.25)
    assert_close(out.loss, (rewards.double() / 0.25).square().mean())


def test_returns_summed_in_float64_and_rounded_once_leave_nothing(backend):
    """With 300 actions, a sum in float32 would differ by several units in the last place."""
    v = values(9, 300, dtype=torch.float32, vocabulary=40)
    returns = (v.v[:, 0].double() + v.log_prob.double().sum(1)).float()
    out = bellman_loss(v, returns, torch.zeros(9), beta=0.02, backend=backend)
    assert out.loss == 0 and (out.residual == 0).all()


def test_a_constant_added_to_the_logits_moves_the_residual_by_the_constant(backend):
    """The residual contains V(s_1). The logits are multiples of 1/64, so that 2 can be added without rounding."""
    logits, actions = logits_and_actions(2, 4, 5, dtype=torch.float64)
    logits, ref = (logits * 64).round() / 64, values(2, 4)
    constant = torch.tensor([2.0, -0.5], dtype=torch.float64)
    before, after = (reference.token_values(x, actions) for x in (logits, logits + constant[:, None, None]))
    assert torch.equal(before.log_prob, after.log_prob)
    moved = [bellman_loss(v, ref, torch.ones(2), beta=0.5, backend=backend).residual for v in (before, after)]
    assert_close(moved[1] - moved[0], constant)


@settings(max_examples=25)
@given(layout=layouts(), seed=st.integers(0, 2**16))
def test_errors_sum_to_the_residual(backend, layout, seed):
    """Sum of the TD errors d_h = residual = Eq. 2 written out. And e_h = log pi_ref + V_ref(s_h) - V_ref(s_{h+1})."""
    torch.manual_seed(seed)
    shape, mask, cu_seqlens = layout
    actions = actions_of(*layout)
    v, ref, rewards = values(*shape), values(*shape), torch.randn(len(actions), dtype=torch.float64)
    options = {"mask": mask, "cu_seqlens": cu_seqlens, "beta": 0.1, "backend": backend}
    residual = bellman_loss(v, ref, rewards, **options).residual
    targets = td_targets(v, ref, rewards, **options)
    outcome = rewards / 0.1 * torch.tensor([bool(a) for a in actions], dtype=torch.float64)
    assert_close(residual, returns_of(v, actions) - returns_of(ref, actions) - outcome, 1e-11)
    errors = [targets.error.flatten()[a].sum() for a in actions]
    assert_close(residual, torch.stack(errors) if errors else residual, 1e-11)
    e, v_ref, log_ref = (x.flatten() for x in (targets.endogenous_reward, ref.v, ref.log_prob))
    for a in actions:
        v_next = torch.cat([v_ref[a[1:]], v_ref.new_zeros(1)])[: len(a)]
        assert_close(e[a], log_ref[a] + v_ref[a] - v_next)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("gaps", [False, True])
def test_padded_equals_packed_equals_without_gaps(backend, level, gaps):
    """The same trajectories: right-padded with several turns; packed; and packed without the environment's tokens."""
    lengths = torch.tensor([6, 0, 3, 1])
    inside = torch.arange(6) < lengths[:, None]
    mask = inside & (torch.rand(4, 6) < 0.6) if gaps else inside
    assert not gaps or (mask.sum() < inside.sum() and mask[0].sum() > 1)
    v, ref, rewards = values(4, 6), values(4, 6), torch.randn(4)

    def pick(t: TokenValues, where) -> TokenValues:
        return TokenValues(*(x[where] for x in t[:3]))

    def ends(counts):
        return torch.cat([torch.zeros(1, dtype=torch.long), counts.cumsum(0)])

    options = {"beta": 0.5, "level": level, "backend": backend}
    forms = {
        "padded": (v, ref, {"mask": mask}),
        "packed": (pick(v, inside), pick(ref, inside), {"mask": mask[inside], "cu_seqlens": ends(lengths)}),
        "actions alone": (pick(v, mask), pick(ref, mask), {"cu_seqlens": ends(mask.sum(1))}),
    }
    results = []
    for policy, anchor, layout in forms.values():
        policy = leaves(policy)
        out = bellman_loss(policy, anchor, rewards, **layout, **options)
        kept = layout.get("mask", torch.ones_like(policy.q, dtype=torch.bool))
        by = {"loss": torch.ones((), dtype=torch.float64)}
        results.append((out.loss, out.residual, *(g[kept] for g in gradients(out, policy, **by))))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert_close(a, b)


def test_semi_gradient_reaches_q_only(backend):
    v, ref, rewards = leaves(values(2, 4)), values(2, 4), torch.ones(2)
    out = bellman_loss(v, ref, rewards, beta=0.5, level="token", semi_gradient=True, backend=backend)
    dq, dv, dlog = gradients(out, v, loss=torch.ones((), dtype=torch.float64))
    assert_close(dq, 2 * td_targets(v, ref, rewards, beta=0.5, backend=backend).error / 2)
    assert (dv == 0).all() and (dlog == 0).all()


@pytest.mark.parametrize("level", LEVELS)
def test_micro_batches_add_up(backend, level):
    """The normalizer is the number of trajectories in the whole batch."""
    v, ref, rewards = leaves(values(5, 4)), values(5, 4), torch.randn(5)
    one = torch.ones((), dtype=torch.float64)
    options = {"beta": 0.5, "level": level, "backend": backend}
    whole = bellman_loss(v, ref, rewards, **options)
    parts = []
    for rows in (slice(0, 2), slice(2, 5)):
        policy, anchor = (TokenValues(*(x[rows] for x in t[:3])) for t in (v, ref))
        parts.append(bellman_loss(policy, anchor, rewards[rows], normalizer=5, **options))
    assert_close(parts[0].loss + parts[1].loss, whole.loss)
    together = torch.autograd.grad(parts[0].loss + parts[1].loss, v[:3], allow_unused=True)
    for g, expected in zip(together, gradients(whole, v, loss=one), strict=True):
        assert_close(torch.zeros_like(expected) if g is None else g, expected)


@settings(max_examples=25)
@given(layout=layouts(), level=st.sampled_from(LEVELS), reward=st.booleans(), data=st.data())
def test_trajectories_do_not_affect_each_other(backend, layout, level, reward, data):
    """Another reward, or other values, of one trajectory change its own residual and gradient, and no bit of the
    others."""
    shape, mask, cu_seqlens = layout
    actions = actions_of(*layout)
    if not actions:
        return
    torch.manual_seed(data.draw(st.integers(0, 2**16)))
    changed = data.draw(st.integers(0, len(actions) - 1))
    inside = torch.zeros(shape.numel(), dtype=torch.bool)
    inside[actions[changed]] = True
    inside = inside.view(shape)
    v, ref, rewards = values(*shape), values(*shape), torch.randn(len(actions))
    other = values(*shape)
    v_changed = v if reward else TokenValues(*(b.where(inside, a) for a, b in zip(v[:3], other[:3], strict=True)))
    rewards_changed = rewards + reward * (torch.arange(len(actions)) == changed)
    results = []
    for policy, r in ((leaves(v), rewards), (leaves(v_changed), rewards_changed)):
        out = bellman_loss(policy, ref, r, mask=mask, cu_seqlens=cu_seqlens, beta=0.5, level=level, backend=backend)
        by = {"loss": torch.ones((), dtype=torch.float64)}
        results.append((out.residual, torch.stack(gradients(out, policy, **by))))
    (residual, gradient), (residual_changed, gradient_changed) = results
    rest = torch.arange(len(actions)) != changed
    assert_same_bits(residual[rest], residual_changed[rest])
    assert_same_bits(gradient[:, ~inside], gradient_changed[:, ~inside])
    assert not actions[changed] or residual[changed] != residual_changed[changed]


# --- behaviour ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    ("shape", "cu_seqlens"), [((0, 5), None), ((3, 0), None), ((0,), [0]), ((0,), [0, 0, 0]), ((2,), [0, 0, 2, 2])]
)
def test_empty_batches_and_trajectories(backend, shape, cu_seqlens, level):
    """Batches without trajectories, tokens or actions raise no error and give no NaN."""
    count = shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    v, ref, rewards = leaves(values(*shape)), values(*shape), torch.ones(count)
    layout = {"cu_seqlens": None if cu_seqlens is None else torch.tensor(cu_seqlens)}
    out = bellman_loss(v, ref, rewards, beta=0.5, level=level, backend=backend, **layout)
    truth = reference.bellman_loss(v, ref, rewards, beta=0.5, level=level, **layout)
    assert_close(out.loss, truth.loss)
    assert_close(out.residual, truth.residual)
    assert out.residual.shape == (count,) and (out.loss == 0) == (v.q.numel() == 0)
    out.loss.backward()
    assert all(x.grad.isfinite().all() and x.grad.shape == shape for x in v[:3])
    assert td_targets(v, ref, rewards, beta=0.5, backend=backend, **layout).error.shape == shape


def test_two_backwards_through_loss_and_residual(backend):
    v, ref, rewards = leaves(values(3, 4)), values(3, 4), torch.randn(3)
    out = bellman_loss(v, ref, rewards, beta=0.5, backend=backend)
    truth = reference.bellman_loss(v, ref, rewards, beta=0.5)
    for by in ({"loss": torch.tensor(3.0)}, {"residual": torch.ones(()).expand(3)}, {"residual": torch.randn(6)[::2]}):
        by = {k: g.double() for k, g in by.items()}
        once = gradients(out, v, **by)
        assert_same_bits(once, gradients(out, v, **by))
        for g, expected in zip(once, gradients(truth, v, **by), strict=True):
            assert_close(g, expected)


@pytest.mark.parametrize("level", LEVELS)
def test_same_bits_every_time_and_with_either_width_of_cu_seqlens(backend, level):
    v, ref, rewards = leaves(values(9)), values(9), torch.randn(3)
    results = []
    for dtype in (torch.int64, torch.int32, torch.int64):
        cu_seqlens = torch.tensor([0, 4, 4, 9], dtype=dtype)
        out = bellman_loss(v, ref, rewards, cu_seqlens=cu_seqlens, beta=0.5, level=level, backend=backend)
        results.append((out.loss, out.residual, *gradients(out, v, loss=torch.ones((), dtype=torch.float64))))
    assert_same_bits(results[0], results[1])
    assert_same_bits(results[0], results[2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_reference_and_rewards_of_other_dtypes(backend, dtype):
    """They are converted to the dtype of the policy's values, which is also the dtype of the results."""
    v, ref = values(2, 3, dtype=torch.float32), values(2, 3)
    ref, rewards = TokenValues(*(x.to(dtype) for x in ref[:3])), torch.tensor([1.0, -1.0], dtype=dtype)
    wide = TokenValues(*(x.double() for x in v[:3])), TokenValues(*(x.double() for x in ref[:3])), rewards.double()
    ours, truth = bellman_loss(v, ref, rewards, beta=0.5, backend=backend), reference.bellman_loss(*wide, beta=0.5)
    assert ours.loss.dtype == ours.residual.dtype == torch.float32
    assert_close(ours.residual, truth.residual, 1e-6)
    targets = td_targets(v, ref, rewards, beta=0.5, backend=backend)
    assert {x.dtype for x in targets} == {torch.float32}
    assert_close(targets.error, reference.td_targets(*wide, beta=0.5).error, 1e-6)
