"""The arguments of `ReValTrainer`: those of GRPOTrainer that make sense here, and those of ReVal."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import isfinite

from trl import GRPOConfig

from ...rewards.shaping import SHAPINGS

RATIO = "ReVal's loss has no importance ratio"
REFUSED = {
    "beta": "it is TRL's coefficient of a KL term, which ReVal's loss does not have; the beta that divides the reward "
    "is objective_beta",
    "loss_type": "the loss is ReVal's; objective_level selects its form",
    "scale_rewards": "reward_shaping takes its place",
    "multi_objective_aggregation": "the weighted sum of the rewards is shaped, see reward_shaping",
    "sync_ref_model": "reference_reset_every takes its place",
    **dict.fromkeys(("ref_model_mixup_alpha", "ref_model_sync_steps"), "reference_reset_every takes its place"),
    **dict.fromkeys(("epsilon", "epsilon_high", "delta", "importance_sampling_level"), RATIO),
    **dict.fromkeys(("off_policy_mask_threshold", "vllm_importance_sampling_correction"), RATIO),
    **dict.fromkeys(("vllm_importance_sampling_mode", "vllm_importance_sampling_cap"), RATIO),
    **dict.fromkeys(("vllm_importance_sampling_clip_min", "vllm_importance_sampling_clip_max"), RATIO),
    "use_bias_correction_kl": "ReVal's loss has no KL term",
    **dict.fromkeys(("sapo_temperature_neg", "sapo_temperature_pos"), "it belongs to SAPO's loss"),
    **dict.fromkeys(
        ("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg"), "it belongs to VESPO's loss"
    ),
    **dict.fromkeys(("top_entropy_quantile", "entropy_coef", "use_adaptive_entropy"), "ReVal has no entropy term"),
    **dict.fromkeys(("entropy_coef_min", "entropy_coef_max", "entropy_coef_delta"), "ReVal has no entropy term"),
    "entropy_target": "ReVal has no entropy term",
    "cast_lm_head_to_fp32": "the kernels multiply the head's weight in its own type and add up in float32",
    "pad_to_multiple_of": "the trainer pads replayed completions to the longest one",
}
"""Arguments of GRPOConfig that must keep their defaults, and why."""


@dataclass
class ReValConfig(GRPOConfig):
    """The arguments of `ReValTrainer`. All of GRPOConfig, except those in `REFUSED`, and the following.

    The defaults are the recipe of configs/demo.yaml (docs/evidence.md says why). A name such as `objective_beta` is the
    setting objective.beta of `reval train`. docs/trl.md has all differences from GRPOConfig.

    Raises ValueError, with the argument's name, for values that do not fit.
    """

    num_iterations: int = field(
        default=4,
        metadata={
            "help": "K: updates for each generation of completions. The first one is on the fresh completions, the "
            "other K - 1 are on completions drawn from the replay buffer."
        },
    )
    disable_dropout: bool = field(
        default=True,
        metadata={
            "help": "Whether to disable dropout. The loss compares policy and reference; dropout is noise in it."
        },
    )
    vllm_importance_sampling_correction: bool = field(default=False, metadata={"help": f"Must be False: {RATIO}."})
    objective_beta: float = field(
        default=0.25,
        metadata={
            "help": "The loss divides the reward by it. With reference_reset_every=1 it is a step size, 0.1 to 1. With "
            "a fixed reference, longer completions need a smaller one. It is not `beta`, TRL's KL coefficient."
        },
    )
    objective_level: str = field(
        default="trajectory",
        metadata={"help": "What the loss squares: the residual of a 'trajectory', 'token' or 'subtrajectory'."},
    )
    objective_semi_gradient: bool = field(
        default=False,
        metadata={"help": "Whether to stop the gradient at the TD target. Only for objective_level='token'."},
    )
    objective_taper: bool = field(
        default=True,
        metadata={
            "help": "Whether to weigh a completion with a negative reward by min(1, pi / mu): how likely the policy "
            "still writes it. mu is the policy when it was generated."
        },
    )
    objective_value_gradient: bool = field(
        default=False,
        metadata={"help": "Whether the gradient goes through V(s_1), Eq. 2 of the paper, or not, Eq. 4."},
    )
    reward_shaping: str = field(
        default="normalized",
        metadata={"help": f"How rewards are shaped before the loss divides them, one of {', '.join(SHAPINGS)}."},
    )
    replay_capacity: int | None = field(
        default=None,
        metadata={"help": "Completions in the replay buffer, first in first out. None: those of 10 generations."},
    )
    replay_draw: str = field(
        default="uniform",
        metadata={"help": "How replayed batches are drawn: 'uniform', or 'groups', whole groups of a prompt."},
    )
    reference_reset_every: int = field(
        default=1,
        metadata={"help": "Generations between two resets of the reference policy to the policy. 0: no reset."},
    )

    def __post_init__(self) -> None:
        given = self.pad_to_multiple_of
        super().__post_init__()
        ours = type(self).__dataclass_fields__
        for name, why in REFUSED.items():
            value, allowed = given if name == "pad_to_multiple_of" else getattr(self, name), ours[name].default
            if value != allowed:
                raise ValueError(f"{name} must keep its default {allowed!r} in ReValConfig, got {value!r}: {why}")
        if self.replay_capacity is None:
            self.replay_capacity = 10 * self.generation_batch_size
        self._check_objective()
        self._check_replay()

    def _check(self, right: bool, name: str, allowed: str) -> None:
        if not right:
            raise ValueError(f"{name} must be {allowed}, got {getattr(self, name)!r}")

    def _check_objective(self) -> None:
        self._check(isfinite(self.objective_beta) and self.objective_beta > 0, "objective_beta", "a positive number")
        levels = ("trajectory", "token", "subtrajectory")
        self._check(self.objective_level in levels, "objective_level", f"one of {', '.join(levels)}")
        if self.objective_taper or not self.objective_value_gradient:
            allowed = "'trajectory' with objective_taper=True or objective_value_gradient=False"
            self._check(self.objective_level == "trajectory", "objective_level", allowed)
        if self.objective_level != "token":
            self._check(
                not self.objective_semi_gradient, "objective_semi_gradient", "False without objective_level='token'"
            )
        self._check(self.reward_shaping in SHAPINGS, "reward_shaping", f"one of {', '.join(SHAPINGS)}")

    def _check_replay(self) -> None:
        self._check(self.num_iterations >= 1, "num_iterations", "at least 1")
        self._check(self.reference_reset_every >= 0, "reference_reset_every", "at least 0")
        self._check(self.replay_draw in ("uniform", "groups"), "replay_draw", "'uniform' or 'groups'")
        batch = self.generation_batch_size
        allowed = f"at least generation_batch_size ({batch}), because a fresh batch enters the buffer as a whole"
        self._check(self.replay_capacity >= batch, "replay_capacity", allowed)
        accumulated = self.gradient_accumulation_steps
        self._check(
            self.steps_per_generation % accumulated == 0,
            "steps_per_generation",
            f"a multiple of gradient_accumulation_steps ({accumulated}), so that no update mixes two batches",
        )
