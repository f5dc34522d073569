"""The definition itself, against results computed by hand from docs/method.md and against sympy.

All other tests trust reference.py. So no test in this file uses the package to compute an expected result. Three words
and three actions are the smallest case in which the first, a middle and the last action differ.
"""

import math

import pytest
import sympy
import torch

from reval_kernels import TokenValues, reference, reval_loss


def test_token_values_by_hand():
    """exp(z) = 1, 2, 5: pi = 1/8, 1/4, 5/8."""
    logits = torch.tensor([[0.0, math.log(2), math.log(5)]], dtype=torch.float64)
    out = reference.token_values(logits, torch.tensor([1]), with_entropy=True)
    entropy = (math.log(8) + 2 * math.log(4) + 5 * math.log(8 / 5)) / 8
    expected = (math.log(2), math.log(8), -math.log(4), entropy)
    assert [x.item() for x in out] == pytest.approx(expected, rel=1e-15)


def test_softcap_comes_before_temperature():
    logits = torch.tensor([[-3.0, 0.5, 4.0], [1.0, 2.0, -1.0]], dtype=torch.float64)
    actions, temperature = torch.tensor([2, 0]), torch.tensor([0.5, 2.0])
    out = reference.token_values(logits, actions, softcap=2.0, temperature=temperature)
    for row, (a, t) in enumerate(zip(actions.tolist(), temperature.tolist(), strict=True)):
        z = [2 * math.tanh(x / 2) / t for x in logits[row].tolist()]
        v = math.log(sum(map(math.exp, z)))
        assert [x[row].item() for x in out[:3]] == pytest.approx([z[a], v, z[a] - v], rel=1e-14)
    number = reference.token_values(logits[:1], actions[:1], softcap=2.0, temperature=0.5)
    assert [x.item() for x in number[:3]] == pytest.approx([x[0].item() for x in out[:3]], rel=1e-15)


def test_gradient_rule_by_hand():
    """dlogits = dq onehot + dv softmax (docs/method.md section 4), log_prob = q - v; entropy by its definition."""
    logits = torch.tensor([[0.0, math.log(2), math.log(5)]], dtype=torch.float64, requires_grad=True)
    out = reference.token_values(logits, torch.tensor([1]), with_entropy=True)
    p, onehot = torch.tensor([1, 2, 5]) / 8.0, torch.tensor([0.0, 1.0, 0.0])
    expected = {"q": onehot, "v": p, "log_prob": onehot - p, "entropy": -p * (p.log() + out.entropy.item())}
    for name, gradient in expected.items():
        (ours,) = torch.autograd.grad(getattr(out, name), logits, retain_graph=True)
        torch.testing.assert_close(ours[0], gradient.double(), rtol=1e-7, atol=1e-8)


def test_words_at_minus_infinity():
    """They contribute nothing, also not to the entropy and its gradient. No 0 * inf gives NaN."""
    inf = torch.inf
    logits = torch.tensor([[-inf, 0.3, -inf, 1.0], [-inf, -inf, 2.0, -inf]], dtype=torch.float64, requires_grad=True)
    out = reference.token_values(logits, torch.tensor([3, 2]), with_entropy=True)
    rest = logits.detach()[:1, [1, 3]].requires_grad_()
    alone = reference.token_values(rest, torch.tensor([1]), with_entropy=True)
    assert [x[0].item() for x in out] == pytest.approx([x.item() for x in alone], rel=1e-15)
    assert [x[1].item() for x in out] == [2, 2, 0, 0]
    (ours,) = torch.autograd.grad(out.entropy.sum() + out.log_prob.sum(), logits)
    (expected,) = torch.autograd.grad(alone.entropy.sum() + alone.log_prob.sum(), rest)
    torch.testing.assert_close(ours[0, [1, 3]], expected[0])
    assert ours[0, [0, 2]].tolist() == [0, 0] and ours[1].tolist() == [0, 0, 0, 0]


def test_masked_tokens_are_never_read():
    mask = torch.tensor([[True, False, True]])
    hidden, weight, bias = (torch.randn(*s, dtype=torch.float64) for s in ((1, 3, 4), (5, 4), (5,)))
    actions = torch.tensor([[1, -100, 2]])
    hidden[0, 1] = torch.nan
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    out = reference.linear_token_values(hidden, weight, actions, bias=bias, mask=mask)
    by_hand = hidden.detach()[mask] @ weight.detach().T + bias.detach()
    torch.testing.assert_close(out.q[mask], by_hand[[0, 1], [1, 2]])
    torch.testing.assert_close(out.v[mask], by_hand.exp().sum(1).log())
    assert all(x[0, 1] == 0 for x in out[:3])
    gradients = torch.autograd.grad(sum(x.sum() for x in out[:3]), leaves)
    assert all(g.isfinite().all() for g in gradients) and (gradients[0][0, 1] == 0).all()


# Three states; the middle one belongs to the environment, so H = 2. Log-probabilities are q - v.
MASK = torch.tensor([[True, False, True]])
POLICY = TokenValues(*(torch.tensor([x], dtype=torch.float64) for x in ([1, 77, 4], [2, 88, 5], [-1, 99, -1])))
ANCHOR = TokenValues(*(torch.tensor([x], dtype=torch.float64) for x in ([0.5, 66, 1], [1, 55, 2], [-0.5, 44, -1])))
REWARD = torch.tensor([1.0])


def test_td_targets_by_hand():
    """e_1 = 0.5 - 2, e_2 = 1 - 0. r / beta = 2 arrives at the last action. The middle state belongs to no action."""
    out = reference.td_targets(POLICY, ANCHOR, REWARD, mask=MASK, beta=0.5)
    assert out.endogenous_reward.tolist() == [[-1.5, 0, 1]]
    assert out.target.tolist() == [[-1.5 + 5, 0, 1 + 2]]
    assert out.error.tolist() == [[1 - 3.5, 0, 4 - 3]]


def test_discount_by_hand():
    out = reference.td_targets(POLICY, ANCHOR, REWARD, mask=MASK, beta=0.5, gamma=0.5)
    assert out.endogenous_reward.tolist() == [[0.5 - 0.5 * 2, 0, 1]]
    assert out.target.tolist() == [[-0.5 + 0.5 * 5, 0, 3]]
    assert out.error.tolist() == [[1 - 2, 0, 1]]


@pytest.mark.parametrize(
    ("level", "loss"),
    [("trajectory", 1.5**2), ("token", 2.5**2 + 1**2), ("subtrajectory", 1.5**2 + 1**2)],
)
def test_losses_by_hand(level, loss):
    """d = -2.5, 1; residual = V - V_ref + sums - r / beta = (2 - 1) + (-2) - (-1.5) - 2 = -1.5."""
    out = reference.bellman_loss(POLICY, ANCHOR, REWARD, mask=MASK, beta=0.5, level=level)
    assert out.residual.tolist() == [-1.5] and out.loss.item() == loss
    half = reference.bellman_loss(POLICY, ANCHOR, REWARD, mask=MASK, beta=0.5, level=level, normalizer=2)
    assert half.loss.item() == loss / 2
    packed = [TokenValues(*(x[0] for x in values[:3])) for values in (POLICY, ANCHOR)]
    same = reference.bellman_loss(*packed, REWARD, mask=MASK[0], cu_seqlens=torch.tensor([0, 3]), beta=0.5, level=level)
    assert same.loss.item() == loss


@pytest.mark.parametrize(
    ("level", "dq", "dv", "dlog"),
    [
        ("trajectory", [0, 0, 0], [-3, 0, 0], [-3, 0, -3]),
        ("token", [-5, 0, 2], [0, 0, 5], [0, 0, 0]),
        ("subtrajectory", [0, 0, 0], [-3, 0, 2], [-3, 0, -1]),
    ],
)
def test_gradients_by_hand(level, dq, dv, dlog):
    """Each gradient is twice a term times its derivative. V(s_1) has a gradient, V(s_2) is in the target of d_1, and
    the reference is constant."""
    policy, anchor = (TokenValues(*(x.clone().requires_grad_() for x in t[:3])) for t in (POLICY, ANCHOR))
    rewards = REWARD.clone().requires_grad_()
    loss = reference.bellman_loss(policy, anchor, rewards.detach(), mask=MASK, beta=0.5, level=level).loss
    found = torch.autograd.grad(loss, (*policy[:3], *anchor[:3]), allow_unused=True)
    assert [[0, 0, 0] if g is None else g[0].tolist() for g in found[:3]] == [dq, dv, dlog]
    assert found[3:] == (None, None, None)


def test_returns_are_enough_for_the_trajectory_level():
    """R_ref = V_ref(s_1) + sum log pi_ref = 1 - 1.5."""
    out = reference.bellman_loss(POLICY, torch.tensor([-0.5]), REWARD, mask=MASK, beta=0.5)
    assert out.residual.tolist() == [-1.5] and out.loss.item() == 1.5**2


def test_semi_gradient_stops_at_the_target():
    q, v = (x.clone().requires_grad_() for x in POLICY[:2])
    out = reference.bellman_loss(
        TokenValues(q, v, POLICY.log_prob), ANCHOR, REWARD, mask=MASK, beta=0.5, level="token", semi_gradient=True
    )
    dq, dv = torch.autograd.grad(out.loss, (q, v), allow_unused=True)
    assert dq.tolist() == [[2 * -2.5, 0, 2 * 1]]
    assert dv is None or (dv == 0).all()


def test_gradient_of_equation_2_by_sympy(backend):
    """V = 3, H = 3: dL/dlogits of Eq. 2 by symbolic differentiation, by docs/method.md section 3, and ours."""
    z = sympy.symbols("z:3:3")
    states = [z[0:3], z[3:6], z[6:9]]
    actions, v_ref, log_ref = [2, 0, 1], sympy.Rational(7, 5), sympy.Rational(-13, 4)
    outcome = 1 / sympy.Rational(1, 4)  # r / beta
    v = [sympy.log(sum(map(sympy.exp, s))) for s in states]
    log_pi = [s[a] - u for s, a, u in zip(states, actions, v, strict=True)]
    residual = v[0] - v_ref + sum(log_pi) - log_ref - outcome
    loss = residual**2

    g = 2 * residual
    pi = [[sympy.exp(x - u) for x in s] for s, u in zip(states, v, strict=True)]
    rule = [g * int(a == actions[0]) for a in range(3)]
    rule += [g * (int(a == actions[h]) - pi[h][a]) for h in (1, 2) for a in range(3)]

    point = {x: sympy.Rational(n, 7) for x, n in zip(z, (3, -5, 11, 2, 9, -4, 1, 6, -8), strict=True)}
    derived = [float(loss.diff(x).subs(point).evalf(30)) for x in z]
    assert [float(x.subs(point).evalf(30)) for x in rule] == pytest.approx(derived, rel=1e-14, abs=1e-14)

    logits = torch.tensor([float(point[x]) for x in z], dtype=torch.float64).view(1, 3, 3)
    returns = torch.tensor([float(v_ref + log_ref)], dtype=torch.float64)
    arguments = (torch.tensor([actions]), returns, torch.ones(1))
    for function, options in ((reference.reval_loss, {}), (reval_loss, {"backend": backend})):
        leaf = logits.clone().requires_grad_()
        out = function(leaf, *arguments, beta=0.25, **options)
        assert out.loss.item() == pytest.approx(float(loss.subs(point).evalf(30)), rel=1e-13)
        (gradient,) = torch.autograd.grad(out.loss, leaf)
        assert gradient.flatten().tolist() == pytest.approx(derived, rel=1e-12, abs=1e-12)


# --- without any action ---------------------------------------------------------------------------------------------

EMPTY = {
    "all masked": ((2, 3), [0] * 6, None),
    "no trajectories": ((0, 3), None, None),
    "no steps": ((2, 0), None, None),
    "packed, all masked": ((4,), [0] * 4, [0, 2, 4]),
    "packed, no trajectories": ((0,), None, [0]),
    "packed, no steps": ((0,), None, [0, 0, 0]),
}


@pytest.mark.parametrize("case", EMPTY)
@pytest.mark.parametrize("level", ["trajectory", "token", "subtrajectory"])
def test_nothing_is_an_action(case, level):
    """Every function is differentiable, with gradient 0, and reads no number of a masked token."""
    shape, mask, cu_seqlens = EMPTY[case]
    count = shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    options = {
        "mask": None if mask is None else torch.tensor(mask, dtype=torch.bool).view(shape),
        "cu_seqlens": None if cu_seqlens is None else torch.tensor(cu_seqlens),
    }
    masked = {"mask": options["mask"]}

    def leaf(*size):
        return torch.full(size, torch.nan, requires_grad=True)

    def check(outputs, inputs):
        for x in outputs:
            assert not x.any()
            assert not any(g.any() for g in torch.autograd.grad(x.sum(), inputs, retain_graph=True))

    q, v, log_prob, logits, hidden = leaf(*shape), leaf(*shape), leaf(*shape), leaf(*shape, 7), leaf(*shape, 5)
    weight, bias = (torch.randn(s, requires_grad=True) for s in ((7, 5), (7,)))
    actions, policy = torch.full(shape, -100), TokenValues(q, v, log_prob)
    anchor, rewards = TokenValues(*(x.detach() for x in policy[:3])), torch.ones(count)
    head, loss = (hidden, weight, bias), {"beta": 0.5, "level": level, **options}

    check(reference.token_values(logits, actions, with_entropy=True, **masked), [logits])
    check(reference.linear_token_values(hidden, weight, actions, bias=bias, with_entropy=True, **masked), head)
    check(reference.td_targets(policy, anchor, rewards, beta=0.5, **options)[:2], [q, v])
    out = reference.bellman_loss(policy, anchor, rewards, **loss)
    check([out.loss], [q, v, log_prob])
    check([out.residual], [v, log_prob])
    check(reference.reval_loss(logits, actions, anchor, rewards, **loss), [logits])
    check(reference.linear_reval_loss(hidden, weight, actions, anchor, rewards, bias=bias, **loss), head)
