"""What a run says about settings that work and learn badly. docs/method.md section 6 has the reasons."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from .config import Config

LAG = 2.0
"""Nats. A larger `reval/value_lag` is large."""
ITERATIONS = 5
"""The lag is said when it was large in so many iterations in a row."""


def at_start(config: Config) -> list[str]:
    """What the settings alone show."""
    objective, replay = config.objective, config.replay
    pushed_again = (
        objective.name == "reval"
        and not objective.taper
        and config.reward.shaping != "plain"
        and config.reference.reset_every == 1
        and replay.updates_per_iteration > 2
    )
    if not pushed_again:
        return []
    return [
        f"replay.updates_per_iteration={replay.updates_per_iteration} with reward.shaping={config.reward.shaping} and "
        "reference.reset_every=1: replayed wrong responses are pushed down again in every iteration, and their "
        "probability goes to arbitrary other responses. objective.taper=true (with objective.level=trajectory) stops "
        "that; docs/method.md section 6, Choosing"
    ]


def value_lag(residual: Tensor) -> float:
    """How far V(s_1) is below its target, in nats: log mean exp(-residual).

    Args:
        residual: [B], V(s_1) - V_ref(s_1) + D - r / beta of responses of the current policy.

    The target is V_ref(s_1) + log Z with Z = E_ref exp(r / beta). An average over responses of the policy, each times
    pi_ref / pi = exp(-D), estimates Z, so for one prompt this is log Z - (V(s_1) - V_ref(s_1)). Each prompt is compared
    with its own V: prompts have different Z, and the average over prompts is 0 where V is right for all of them.
    """
    return ((-residual.double()).logsumexp(0) - math.log(len(residual))).item()


class ValueLag:
    """Watches `reval/value_lag`, and says once that V(s_1) lags behind log Z.

    With a reference that is reset within ITERATIONS iterations there is nothing to say: after each reset V starts at
    V_ref again, so a lag is normal. Without a gradient through V there is nothing to say either: V is not trained.
    """

    def __init__(self, config: Config):
        self._watches = config.objective.value_gradient and not 1 <= config.reference.reset_every <= ITERATIONS
        self._large = 0
        """Number of iterations in a row. Stays at ITERATIONS when the lag was said."""

    def note(self, row: Mapping[str, float]) -> str | None:
        """The text to show after the iteration with these metrics, if any."""
        lag = row.get("reval/value_lag", 0.0)
        if not self._watches or self._large == ITERATIONS:
            return None
        self._large = self._large + 1 if lag > LAG else 0
        if self._large < ITERATIONS:
            return None
        return (
            f"V(s_1) is {lag:.1f} nats below its target (reval/value_lag), and was more than {LAG:g} below it in "
            f"{ITERATIONS} iterations in a row: right responses are pushed about {lag:.0f} nats too far, wrong ones "
            "hardly. reward.shaping=normalized (with rollout.responses=1 batch_normalized), reference.reset_every=1 "
            "and a larger objective.beta, 0.1 to 1, help; docs/method.md section 6, Choosing"
        )
