"""The messages about wrong arguments. Every message is compared in full, because users read these messages.

B = 2, T = 3, V = 7, D = 4 are all different, so that a message that confuses two sizes fails.
"""

from fractions import Fraction

import numpy as np
import pytest
import torch
from cases import DEVICE, assert_refused, assert_same_bits, head, logits_and_actions, values

from reval_kernels import (
    TokenValues,
    bellman_loss,
    linear_reval_loss,
    linear_token_values,
    reval_loss,
    td_targets,
    token_values,
)

B, T, V, D = 2, 3, 7, 4


def good() -> dict:
    """Valid arguments for every function. A test replaces one of them."""
    hidden, weight, actions = head(B, T, V, D)
    logits, _ = logits_and_actions(B, T, V)
    v = TokenValues(*values(B, T, dtype=torch.float32)[:3])
    return {
        "logits": logits, "hidden": hidden, "weight": weight, "actions": actions, "values": v, "reference": v,
        "rewards": torch.zeros(B), "beta": 0.5,
    }  # fmt: skip


TAKES = {
    token_values: ("logits", "actions"),
    linear_token_values: ("hidden", "weight", "actions"),
    td_targets: ("values", "reference", "rewards", "beta"),
    bellman_loss: ("values", "reference", "rewards", "beta"),
    reval_loss: ("logits", "actions", "reference", "rewards", "beta"),
    linear_reval_loss: ("hidden", "weight", "actions", "reference", "rewards", "beta"),
}
ON_LOGITS, ON_HIDDEN = (token_values, reval_loss), (linear_token_values, linear_reval_loss)
ON_TOKENS = ON_LOGITS + ON_HIDDEN
ON_VALUES = (td_targets, bellman_loss)
LOSSES = (bellman_loss, reval_loss, linear_reval_loss)
ON_TRAJECTORIES = (td_targets, *LOSSES)


def message(function, error, **changes) -> str:
    everything = good()
    arguments = {name: everything[name] for name in TAKES[function]} | changes
    with pytest.raises(error) as caught:
        function(**arguments)
    assert type(caught.value) is error
    return str(caught.value)


def check_refused(function, text, **changes) -> None:
    """As `message`, for data that the ops check."""
    everything = good()
    assert_refused(function, text, **{name: everything[name] for name in TAKES[function]} | changes)


def on(functions, name, value, error, text):
    return [pytest.param(f, name, value, error, text, id=f"{f.__name__}-{name}-{i}") for i, f in enumerate(functions)]


LIST, INTS, HALF = [1.0], torch.zeros(B, T, dtype=torch.long), torch.zeros(B, dtype=torch.float16)
FLOATS = "float32 or bfloat16 or float16 or float64"
FLAT = TokenValues(*(x.flatten() for x in values(B, T, dtype=torch.float32)[:3]))
META, HERE = torch.device("meta"), torch.zeros(1).device

CASES = [
    # logits, hidden states and the head
    *on(ON_LOGITS, "logits", LIST, ValueError, "logits must be a tensor of shape [..., V], got <class 'list'>"),
    *on(ON_LOGITS, "logits", torch.zeros(7), ValueError,
        "logits must be a tensor of shape [..., V], got torch.Size([7])"),
    *on(ON_LOGITS, "logits", INTS, TypeError, f"logits must be {FLOATS}, got int64"),
    *on(ON_LOGITS, "logits", torch.zeros(B, T, 0), ValueError,
        "logits must have a vocabulary of at least one word, got shape [2, 3, 0]"),
    *on(ON_HIDDEN, "hidden", LIST, ValueError, "hidden must be a tensor of shape [..., D], got <class 'list'>"),
    *on(ON_HIDDEN, "hidden", torch.zeros(D), ValueError,
        "hidden must be a tensor of shape [..., D], got torch.Size([4])"),
    *on(ON_HIDDEN, "hidden", torch.zeros(B, T, 0), ValueError,
        "hidden must have at least one feature (D >= 1), got shape [2, 3, 0]"),
    *on(ON_HIDDEN, "hidden", INTS, TypeError, f"hidden must be {FLOATS}, got int64"),
    *on(ON_HIDDEN, "weight", LIST, TypeError, "weight must be a tensor, got list"),
    *on(ON_HIDDEN, "weight", torch.zeros(V, 5), ValueError, "weight must have shape [V, 4], got [7, 5]"),
    *on(ON_HIDDEN, "weight", torch.zeros(V, D, dtype=torch.int8), TypeError, f"weight must be {FLOATS}, got int8"),
    *on(ON_HIDDEN, "weight", torch.zeros(V, D, device=META), ValueError, f"weight must be on {HERE}, got meta"),
    *on(ON_HIDDEN, "weight", torch.zeros(0, D), ValueError,
        "weight must have at least one row (V >= 1), got shape [0, D]"),
    *on(ON_HIDDEN, "bias", torch.zeros(D), ValueError, "bias must have shape [7], got [4]"),
    *on(ON_HIDDEN, "bias", torch.zeros(V, dtype=torch.bool), TypeError, f"bias must be {FLOATS}, got bool"),
    # the tokens
    *on(ON_TOKENS, "actions", LIST, TypeError, "actions must be a tensor, got list"),
    *on(ON_TOKENS, "actions", INTS.float(), TypeError, "actions must be int64 or int32, got float32"),
    *on(ON_TOKENS, "actions", INTS[:, :2], ValueError, "actions must have shape [2, 3], got [2, 2]"),
    *on(ON_TOKENS, "actions", INTS[0], ValueError, "actions must have shape [2, 3], got [3]"),
    *on(ON_TOKENS, "actions", INTS.to(META), ValueError, f"actions must be on {HERE}, got meta"),
    *on(TAKES, "mask", INTS, TypeError, "mask must be bool, got int64"),
    *on(TAKES, "mask", torch.ones(T, B, dtype=torch.bool), ValueError, "mask must have shape [2, 3], got [3, 2]"),
    *on(ON_TOKENS, "temperature", 0.0, ValueError, "temperature must be positive, got 0.0"),
    *on(ON_TOKENS, "temperature", float("nan"), ValueError, "temperature must be positive, got nan"),
    *on(ON_TOKENS, "temperature", "1", TypeError, "temperature must be a number, got str"),
    *on(ON_TOKENS, "temperature", torch.ones(B), ValueError, "temperature must have shape [2, 3], got [2]"),
    *on(ON_TOKENS, "temperature", INTS, TypeError, f"temperature must be {FLOATS}, got int64"),
    *on(ON_TOKENS, "softcap", -1, ValueError, "softcap must be positive or None, got -1"),
    *on(ON_TOKENS, "temperature", 1e-40, ValueError,
        "temperature must be at least 1.2e-38 (the smallest normal float32), got 1e-40"),
    *on(ON_TOKENS, "temperature", 1e39, ValueError,
        "temperature must be at most 3.4e+38 (the largest float32) or infinite, got 1e+39"),
    *on(ON_TOKENS, "softcap", 1e-46, ValueError,
        "softcap must be at least 1.2e-38 (the smallest normal float32) or None, got 1e-46"),
    *on(ON_TOKENS, "softcap", 1e39, ValueError,
        "softcap must be at most 3.4e+38 (the largest float32) or infinite or None, got 1e+39"),
    *on(ON_TOKENS, "softcap", LIST, TypeError, "softcap must be a number or None, got list"),
    # the trajectories
    *on(ON_VALUES, "values", LIST, TypeError, "values must be TokenValues, got list"),
    *on(ON_VALUES, "values", TokenValues(LIST, LIST, LIST), TypeError, "values.q must be a tensor, got list"),
    *on(ON_VALUES, "values", TokenValues(INTS, INTS, INTS), TypeError,
        "values.q must be float32 or float64, got int64"),
    *on(ON_VALUES, "values", FLAT._replace(v=FLAT.v.double()), TypeError, "values.v must be float32, got float64"),
    *on(ON_VALUES, "values", FLAT._replace(log_prob=FLAT.v[:4]), ValueError,
        "values.log_prob must have shape [6], got [4]"),
    *on(ON_VALUES, "values", FLAT, ValueError,
        "values must have shape [B, T], or [N] together with cu_seqlens [B + 1]; got [6] and no cu_seqlens"),
    *on(ON_TRAJECTORIES, "cu_seqlens", torch.tensor([0, 3, 6]), ValueError,
        "values must have shape [N] when cu_seqlens is given, got [2, 3]"),
    *on((td_targets,), "reference", torch.zeros(B), TypeError,
        "reference must be TokenValues (returns are not enough), got Tensor"),
    *on(LOSSES, "reference", (1, 2, 3), TypeError,
        "reference must be TokenValues or a tensor of returns [B], got tuple"),
    *on(LOSSES, "reference", torch.zeros(B + 1), ValueError, "reference must have shape [2], got [3]"),
    *on(LOSSES, "reference", torch.zeros(B, dtype=torch.long), TypeError, f"reference must be {FLOATS}, got int64"),
    *on(ON_TRAJECTORIES, "reference", FLAT, ValueError, "reference.q must have shape [2, 3], got [6]"),
    *on(ON_TRAJECTORIES, "rewards", LIST, TypeError, "rewards must be a tensor, got list"),
    *on(ON_TRAJECTORIES, "rewards", torch.zeros(B, 1), ValueError, "rewards must have shape [2], got [2, 1]"),
    *on(ON_TRAJECTORIES, "rewards", torch.zeros(B, dtype=torch.int32), TypeError,
        f"rewards must be {FLOATS}, got int32"),
    *on(ON_TRAJECTORIES, "rewards", torch.zeros(B, device=META), ValueError, f"rewards must be on {HERE}, got meta"),
    *on(ON_TRAJECTORIES, "beta", 0, ValueError, "beta must be positive, got 0"),
    *on(ON_TRAJECTORIES, "beta", None, TypeError, "beta must be a number, got NoneType"),
    *on(ON_TRAJECTORIES, "beta", True, TypeError, "beta must be a number, got bool"),
    *on(ON_TRAJECTORIES, "beta", float("nan"), ValueError, "beta must be positive, got nan"),
    *on(ON_TRAJECTORIES, "beta", 1e-40, ValueError,
        "beta must be at least 1.2e-38 (the smallest normal float32), got 1e-40"),
    *on(ON_TRAJECTORIES, "beta", 1e39, ValueError,
        "beta must be at most 3.4e+38 (the largest float32) or infinite, got 1e+39"),
    *on(ON_TRAJECTORIES, "beta", torch.ones(2), TypeError, "beta must be a number, got Tensor of shape [2]"),
    *on((td_targets,), "gamma", float("nan"), ValueError,
        "gamma must be finite and within 3.4e+38 (the largest float32), got nan"),
    *on((td_targets,), "gamma", -1e39, ValueError,
        "gamma must be finite and within 3.4e+38 (the largest float32), got -1e+39"),
    *on((td_targets,), "gamma", float("inf"), ValueError,
        "gamma must be finite and within 3.4e+38 (the largest float32), got inf"),
    *on((td_targets,), "gamma", "0.9", TypeError, "gamma must be a number, got str"),
    *on((td_targets,), "gamma", None, TypeError, "gamma must be a number, got NoneType"),
    *on((td_targets,), "gamma", torch.ones(2), TypeError, "gamma must be a number, got Tensor of shape [2]"),
    *on(LOSSES, "normalizer", 0, ValueError, "normalizer must be positive or None, got 0"),
    *on(LOSSES, "normalizer", torch.ones(2), TypeError,
        "normalizer must be a number or None, got Tensor of shape [2]"),
    *on(LOSSES, "normalizer", 10**400, ValueError,
        "normalizer must be a number or None, got an int that is too large for float64"),
    *on(LOSSES, "normalizer", 1e-40, ValueError,
        "normalizer must be at least 1.2e-38 (the smallest normal float32) or None, got 1e-40"),
    *on(LOSSES, "level", "tokens", ValueError,
        "level must be one of 'trajectory', 'token', 'subtrajectory'; got 'tokens' (did you mean 'token'?)"),
    *on(LOSSES, "level", "word", ValueError, "level must be one of 'trajectory', 'token', 'subtrajectory'; got 'word'"),
    *on(LOSSES, "semi_gradient", True, ValueError,
        "semi_gradient stops the gradient at the TD target of level 'token', got level 'trajectory'"),
]  # fmt: skip


@pytest.mark.parametrize(("function", "name", "value", "error", "text"), CASES)
def test_message(function, name, value, error, text):
    assert message(function, error, **{name: value}) == text


@pytest.mark.parametrize("level", ["token", "subtrajectory"])
@pytest.mark.parametrize("function", LOSSES)
def test_returns_are_not_enough_for_other_levels(function, level):
    expected = f"level {level!r} needs the reference's TokenValues, got its returns (a tensor)"
    assert message(function, ValueError, level=level, reference=torch.zeros(B)) == expected


@pytest.mark.parametrize(
    ("cu_seqlens", "error", "text"),
    [
        (torch.tensor([0.0, 6.0]), TypeError, "cu_seqlens must be int32 or int64, got float32"),
        (torch.zeros(2, 2, dtype=torch.long), ValueError, "cu_seqlens must have shape [B + 1], got [2, 2]"),
        (torch.zeros(0, dtype=torch.long), ValueError,
         "cu_seqlens must have B + 1 entries, the first of them 0; got none"),
        (torch.tensor([0, 6]), ValueError, "rewards must have shape [1], got [2]"),
        (torch.zeros(3, dtype=torch.long, device=META), ValueError, f"cu_seqlens must be on {HERE}, got meta"),
    ],
)  # fmt: skip
def test_cu_seqlens(cu_seqlens, error, text):
    assert message(bellman_loss, error, values=FLAT, reference=FLAT, cu_seqlens=cu_seqlens) == text


@pytest.mark.parametrize("number", [np.float32(0.5), np.float64(0.5), torch.tensor(0.5), Fraction(1, 2)])
def test_numbers_of_other_types(number):
    """NumPy's scalars, tensors with one element, and everything else that float() takes."""
    everything = good()
    names = ("softcap", "beta", "normalizer") + (() if isinstance(number, torch.Tensor) else ("temperature",))
    for name in names:
        arguments = {k: everything[k] for k in TAKES[reval_loss]}
        expected, ours = (reval_loss(**arguments | {name: x}).loss for x in (0.5, number))
        assert_same_bits(expected, ours)
    arguments = {k: everything[k] for k in TAKES[td_targets]}
    assert_same_bits(*(td_targets(**arguments, gamma=x).error for x in (0.5, number)))


@pytest.mark.parametrize("number", [10**30, float("inf")])
def test_large_normalizers(backend, number):
    everything = good()
    arguments = {k: everything[k] for k in TAKES[reval_loss]} | {"backend": backend}
    one = reval_loss(**arguments, normalizer=1).loss.double()
    ours = reval_loss(**arguments, normalizer=number).loss.double()
    torch.testing.assert_close(ours, one / float(number), rtol=1e-6, atol=0)


def test_float64_has_the_range_of_float64(backend):
    """Numbers that float32 cannot hold, for inputs in float64."""
    everything = good()
    logits, actions = everything["logits"].double(), everything["actions"]
    out = token_values(logits, actions, temperature=1e200, softcap=1e250, backend=backend)
    torch.testing.assert_close(out.q, logits.gather(-1, actions[..., None])[..., 0] / 1e200, rtol=1e-12, atol=0)
    wide = TokenValues(*(x.double() for x in everything["values"][:3]))
    rewards = torch.full((B,), 1e-50, dtype=torch.float64)
    loss = bellman_loss(wide, wide, rewards, beta=1e-50, normalizer=1e-100, backend=backend).loss
    torch.testing.assert_close(loss.item(), B * 1e100, rtol=1e-12, atol=0)


# --- checks of the data, which the ops make -------------------------------------------------------------------------


@pytest.mark.parametrize("function", ON_TOKENS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("action", [-1, V, -100])
def test_action_outside_the_vocabulary(backend, function, action):
    actions = torch.zeros(B, T, dtype=torch.int32)
    actions[1, 2] = action
    text = f"actions must lie in [0, 7) where they are not masked out; got {action} at [1, 2]"
    check_refused(function, text, actions=actions, backend=backend)
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[0, 0] = False
    check_refused(function, text, actions=actions, mask=mask, backend=backend)
    everything = good()
    mask[1, 2] = False  # a masked action may have any value
    arguments = {k: everything[k] for k in TAKES[function]} | {"actions": actions, "mask": mask}
    out = function(**arguments, backend=backend)
    assert all(x.isfinite().all() for x in out if x is not None)


@pytest.mark.parametrize("function", ON_TOKENS, ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    ("bad", "text"),
    [
        (0.0, "be positive at every unmasked token, got 0.0"),
        (-1.0, "be positive at every unmasked token, got -1.0"),
        (float("nan"), "be positive at every unmasked token, got nan"),
        (1e-60, "be at least 1.2e-38 (the smallest normal float32) at every unmasked token, got 1e-60"),
        (1e60, "be at most 3.4e+38 (the largest float32) or infinite at every unmasked token, got 1e+60"),
    ],
)
def test_temperature_of_a_token(backend, function, bad, text):
    """A masked token may have any temperature."""
    temperature = torch.ones(B, T, dtype=torch.float64)
    temperature[1, 0] = bad
    text = f"temperature must {text} at [1, 0]"
    check_refused(function, text, temperature=temperature, backend=backend)
    if not abs(bad) > 1 and bad != 1e-60:  # bfloat16 holds this number too
        check_refused(function, text, temperature=temperature.bfloat16(), backend=backend)
    everything, mask = good(), torch.ones(B, T, dtype=torch.bool)
    mask[1, 0] = False
    arguments = {k: everything[k] for k in TAKES[function]} | {"temperature": temperature, "mask": mask}
    function(**arguments, backend=backend)


@pytest.mark.parametrize("bad", [[0, 2, 5], [1, 2, 6], [0, 4, 3, 6], [0, 7], [6], [0, 2**31 - 1, -2, 6]])
@pytest.mark.parametrize("masked", [False, True])
def test_cu_seqlens_that_do_not_cover_the_tokens(backend, bad, masked):
    """Every function with cu_seqlens refuses them, with and without a mask."""
    everything, count = good(), len(bad) - 1
    flat = {k: everything[k].flatten(0, 1) for k in ("logits", "hidden", "actions")}
    cu_seqlens = torch.tensor(bad, dtype=torch.int32)  # in which differences of the last case overflow
    changes = {"cu_seqlens": cu_seqlens, "rewards": torch.zeros(count), "backend": backend}
    if masked:
        changes["mask"] = torch.zeros(B * T, dtype=torch.bool)
    for function in ON_TRAJECTORIES:
        own = {k: flat[k] for k in TAKES[function] if k in flat}
        own |= {"values": FLAT} if function in ON_VALUES else {}
        text = f"cu_seqlens must start at 0, never fall and end at N = 6, got {bad}"
        check_refused(function, text, reference=FLAT, **own, **changes)


@pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU a device-side assert ends the use of the GPU")
def test_refused_data_leaves_inputs_and_gradients_unchanged(backend):
    """And the next call with valid data works."""
    arguments = good()
    hidden, weight = arguments["hidden"].requires_grad_(), arguments["weight"].requires_grad_()
    before = hidden.detach().clone(), weight.detach().clone()
    for function in ON_HIDDEN:
        with pytest.raises(ValueError):
            function(**{k: arguments[k] for k in TAKES[function]} | {"actions": torch.full((B, T), V)}, backend=backend)
        assert hidden.grad is None and weight.grad is None
        assert torch.equal(hidden, before[0]) and torch.equal(weight, before[1])
        function(**{k: arguments[k] for k in TAKES[function]}, backend=backend)
