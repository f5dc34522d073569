"""`ReValTrainer`, a GRPOTrainer with ReVal's loss and a replay buffer.

It overrides what TRL documents for a trainer with another objective, `compute_loss`, and few methods around it:
`_prepare_inputs` decides what an update trains on, `_calculate_rewards` gives the raw rewards, and the methods that
save and load a checkpoint keep the state. Everything else is TRL's.

One generation is K = num_iterations passes: one over the fresh completions, K - 1 over completions drawn from the
buffer. All K are known before the first update. So the reference values of all of them are computed at once, while the
policy still has the weights of the start, and with reference_reset_every=1 the reference needs no weights of its own.
Every process holds the whole buffer, draws the same passes, and trains on its share of each.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from torch import Tensor
from trl import GRPOTrainer

from reval_kernels import TokenValues
from reval_kernels.hf import token_values_of

from ...distributed import World
from ...replay import ReplayBuffer, Trajectory
from ...rewards.shaping import shape_rewards
from .batches import collate, states_and_actions, trajectories_of
from .config import ReValConfig
from .objective import Loss, SkipWithoutSignal, has_signal, reval_loss
from .reference import ReferenceWeights

BUFFER, REFERENCE, STATE = "reval_buffer.safetensors", "reval_reference.safetensors", "reval_state.json"
"""The files of a checkpoint that TRL does not know."""
FIXED = ("num_iterations", "steps_per_generation")
"""The arguments that a resumed run must keep: they say which batch a step trains on."""


class ReValTrainer(GRPOTrainer):
    """GRPOTrainer with ReVal's objective and replay. The arguments are those of GRPOTrainer; `args` is a ReValConfig.

    Raises TypeError for other `args`, and ValueError for a vision-language model, for the auxiliary loss of a
    mixture-of-experts model, for FSDP of version 1 and ZeRO-3, and for a fixed reference under FSDP or DeepSpeed.
    """

    args: ReValConfig
    _tag_names = ["trl", "reval"]
    _name = "ReVal"
    _paper = {"title": "Off-Policy Value-Based Reinforcement Learning for Large Language Models", "id": "2603.23355"}

    def __init__(
        self, model: Any, reward_funcs: Any = None, args: ReValConfig | None = None, *rest: Any, **kwargs: Any
    ):
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            args = ReValConfig(f"{name.split('/')[-1]}-ReVal")
        if not isinstance(args, ReValConfig):
            raise TypeError(f"args must be a ReValConfig, got {type(args).__name__}")
        super().__init__(model, reward_funcs, args, *rest, **kwargs)
        self._refuse_untried()
        self.world = World(self.accelerator.process_index, self.accelerator.num_processes)
        self.reference = ReferenceWeights(self.model, args.reference_reset_every)
        assert args.replay_capacity is not None, "ReValConfig replaces None"
        self.buffer = ReplayBuffer(args.replay_capacity)
        self.iteration = 0
        """Generations so far."""
        self._signal = SkipWithoutSignal()
        self.add_callback(self._signal)
        self._rng = Random(args.seed)
        self._passes: list[list[Trajectory]] = []
        """The K batches of this generation, the same on every process."""

    def _refuse_untried(self) -> None:
        if self._is_vlm:
            raise ValueError("ReValTrainer trains language models; processing_class is that of a vision-language model")
        if self.aux_loss_enabled:
            raise ValueError(
                "ReVal's loss has no auxiliary loss for mixture-of-experts models: set router_aux_loss_coef=0.0"
            )
        state = self.accelerator.state
        if self.is_fsdp_enabled and state.fsdp_plugin.fsdp_version == 1:
            raise ValueError("ReValTrainer needs FSDP2, got fsdp_version 1: set fsdp_version: 2 in accelerate's config")
        if self.is_deepspeed_enabled and state.deepspeed_plugin.zero_stage == 3:
            raise ValueError(
                "ReValTrainer cannot train with ZeRO-3, which splits the weights of the head: set zero_stage to 1 or 2 "
                "in DeepSpeed's config, or use FSDP2"
            )
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if sharded and self.args.reference_reset_every != 1:
            raise ValueError(
                "reference_reset_every must be 1 with FSDP or DeepSpeed, because the trainer keeps no sharded copy of "
                f"the weights; got {self.args.reference_reset_every}"
            )

    # ---- what an update trains on ----

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        """The batch of one forward and backward pass. TRL calls this with the prompts of the whole generation."""
        if not self.model.training:
            own = self._generate_trajectories(generation_batch)
            with self.reference():
                found = self._values(own)
            for t, values in zip(own, found, strict=True):
                self._store(t, values)
            return self._collate(own) | {"normalizer": max(len(own), 1), "prefix": "reval"}
        steps = self.args.steps_per_generation
        position = self._step % (steps * self.num_iterations)
        if position == 0:
            self._start_generation(generation_batch)
        number, step = divmod(position, steps)
        rows, stride = self._passes[number], steps * self.world.size
        if step == 0:
            for t in rows:
                t.uses += 1
        # Row i of a pass belongs to step and process i mod stride. An update is gradient_accumulation_steps steps.
        own = rows[step * self.world.size + self.world.rank :: stride]
        accumulated = self.args.gradient_accumulation_steps
        first = step // accumulated * accumulated * self.world.size
        count = sum(len(rows[i::stride]) for i in range(first, first + accumulated * self.world.size))
        # DDP averages the gradients of the processes, so each of them divides by its part of the update.
        normalizer = max(count, 1) / self.world.size
        return self._collate(own) | {"normalizer": normalizer, "prefix": "reval/replay" if number else "reval"}

    def _start_generation(self, generation_batch: Any) -> None:
        """Generate, fill the buffer, draw the passes, and compute the reference values that they lack."""
        self.iteration += 1
        self.reference.before(self.iteration)
        own = self._generate_trajectories(generation_batch)
        fresh = [t for share in self.world.gather(own) for t in share]
        self.buffer.add(fresh)
        draw, size = self.args.replay_draw, self.args.generation_batch_size
        self._passes = [fresh, *(self.buffer.sample(size, self._rng, draw) for _ in range(self.num_iterations - 1))]
        self._annotate(fresh)
        metrics = self.buffer.metrics(self.iteration) | {"reference/version": self.reference.version}
        for name, number in (metrics | {"reward_unscored": self._scores.count(None) / len(self._scores)}).items():
            self._metrics["train"][name].append(number)

    def _generate_trajectories(self, prompts: list[dict[str, Any]]) -> list[Trajectory]:
        """This process's completions that have a reward and an action."""
        output = self._generate_and_score_completions(prompts)
        responses = self.num_generations if self.model.training else self.num_generations_eval
        groups = [i // responses for i in range(len(self._scores))]
        try:
            shaped = shape_rewards(self._scores, groups, self.args.reward_shaping, self.args.objective_beta)
        except ValueError as error:
            raise ValueError(f"reward_shaping={self.args.reward_shaping!r}: {error}") from error
        own = slice(self.world.rank * len(prompts), (self.world.rank + 1) * len(prompts))
        numbers = shaped[own], self._scores[own], groups[own]
        return trajectories_of(output, *numbers, self.iteration, self.eos_token_ids)

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        """TRL's rewards [completions of all processes, functions]; keeps each completion's weighted sum, or None."""
        rewards = super()._calculate_rewards(*args, **kwargs)
        sums = (rewards * self.reward_weights.to(rewards.device)).nansum(1).tolist()
        unscored = rewards.isnan().all(1).tolist()
        self._scores = [None if missing else score for score, missing in zip(sums, unscored, strict=True)]
        return rewards

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> tuple[None, None, None]:
        """Nothing. TRL asks for the old log-probabilities of its importance ratio, which would cost a forward pass."""
        return None, None, None

    # ---- the loss and the values ----

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """ReVal's loss of one batch of `_prepare_inputs`: its part of the mean over the completions of the update."""
        if return_outputs:
            raise ValueError("return_outputs must be False: ReValTrainer returns no outputs")
        out = reval_loss(self._token_values(model, inputs), inputs, self.args, inputs["normalizer"])
        half = self.args.bf16 or self.args.fp16 or self.model.dtype != torch.float32
        signal = has_signal(out, inputs, torch.finfo(torch.bfloat16 if half else torch.float32).eps)
        anywhere = self._log_terms(inputs, out, signal)
        if self.model.training:
            self._signal.seen |= anywhere
        return out.loss * signal

    def _token_values(self, model: Any, batch: dict[str, Any]) -> TokenValues:
        """The values [B, C] of the tokens of a batch's completions, 0 where `action_mask` is false."""
        input_ids, attention_mask, mask = states_and_actions(batch)
        with self.accelerator.autocast():
            values = token_values_of(model, input_ids, attention_mask=attention_mask, mask=mask)
        width = batch["completion_ids"].shape[1]
        return TokenValues(*(x[:, -width:] for x in values[:3]))

    def _log_terms(self, inputs: dict[str, Any], out: Loss, signal: Tensor) -> bool:
        """Log the means of the residual and its terms over the completions of all processes.

        Returns whether `signal` is true on any process: one reduction for both.
        """
        count = inputs["action_mask"].any(1).sum()
        names = ("residual_mean", "residual_abs", "v_policy", "v_reference", "log_ratio")
        terms = (out.residual, out.residual.abs(), out.v, inputs["reference_v"], out.log_ratio)
        own = torch.stack([*(x.float().sum() for x in terms), count.float(), signal.float()])
        *sums, total, signals = self.accelerator.reduce(own, "sum").tolist()
        metrics = self._metrics["train" if self.model.training else "eval"]
        for name, number in zip(names, sums, strict=True):
            if total:
                metrics[f"{inputs['prefix']}/{name}"].append(number / total)
        return bool(signals)

    def _annotate(self, fresh: list[Trajectory]) -> None:
        """Compute the reference values that this generation's passes lack, and the fresh completions' log mu."""
        follows = self.args.reference_reset_every == 1  # the reference is the policy that generated
        if self.args.objective_taper and not follows:
            for t, values in zip(fresh, self._shared_values(fresh), strict=True):
                t.behavior = values[:, 2].copy()
        drawn = dict.fromkeys(t for rows in self._passes for t in rows)  # each once, in the same order everywhere
        stale = [t for t in drawn if t.reference.get("version") != self.reference.version]
        stale.sort(key=len)
        with self.reference():
            found = self._shared_values(stale)
        for t, values in zip(stale, found, strict=True):
            self._store(t, values)
            if follows and t.behavior is None:
                t.behavior = values[:, 2].copy()

    def _store(self, trajectory: Trajectory, values: np.ndarray) -> None:
        """Keep what the loss needs of the reference's values [H, 3], as reval.reference_policy does."""
        v, log_prob = float(values[0, 1]), float(values[:, 2].sum(dtype=np.float64))
        trajectory.reference = {
            "version": self.reference.version,
            "v": v,
            "log_prob": log_prob,
            "returns": v + log_prob,
        }
        if self.args.objective_level != "trajectory":
            trajectory.reference["values"] = values.copy()

    def _shared_values(self, trajectories: list[Trajectory]) -> list[np.ndarray]:
        """`_values` of trajectories that every process has; each process computes its share."""
        return self.world.join(self._values(self.world.share(trajectories)))

    @torch.no_grad()
    def _values(self, trajectories: list[Trajectory]) -> list[np.ndarray]:
        """q, v and log_prob of each trajectory's actions: float32 [H, 3]."""
        size, out = self.args.per_device_train_batch_size, []
        # Under FSDP all processes must run the model equally often.
        for i in range(max(self.world.gather(math.ceil(len(trajectories) / size)))):
            own = trajectories[i * size : (i + 1) * size]
            batch = self._collate(own)
            values = torch.stack(self._token_values(self.model, batch)[:3], -1)[batch["action_mask"]].float()
            ends = np.cumsum([int(t.action_mask.sum()) for t in own])
            out += np.split(values.cpu().numpy(), ends)[: len(own)]
        return out

    def _collate(self, trajectories: list[Trajectory]) -> dict[str, Any]:
        return collate(trajectories, self._tokenizer.pad_token_id, self.accelerator.device)

    # ---- checkpoints ----

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Also the buffer, the reference, and where the run is. transformers saves the random state of generation."""
        super()._save_optimizer_and_scheduler(output_dir)
        if not self.args.should_save:
            return
        folder = Path(output_dir)
        places = {t: i for i, t in enumerate(self.buffer)}
        state = {
            "iteration": self.iteration,
            "version": self.reference.version,
            "step": self._step,
            **{name: getattr(self.args, name) for name in FIXED},
            "passes": [[places[t] for t in rows] for rows in self._passes],
            "rng": self._rng.getstate(),
        }
        save_file(self.buffer.state(), folder / BUFFER)
        self.reference.save(folder / REFERENCE)
        (folder / STATE).write_text(json.dumps(state), encoding="utf-8")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        folder = Path(checkpoint)
        if not (folder / STATE).exists():
            raise FileNotFoundError(f"{folder} has no {STATE}: it is not a checkpoint of a ReValTrainer")
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        for name in FIXED:
            if getattr(self.args, name) != state[name]:
                raise ValueError(
                    f"{name} must be {state[name]}, as in the run that saved {folder}, got {getattr(self.args, name)}"
                )
        self.iteration, self._step = state["iteration"], state["step"]
        arrays = load_file(folder / BUFFER)
        self.buffer.load_state(arrays)
        held = list(self.buffer)
        gone = len(arrays["lengths"]) - len(held)  # a smaller replay_capacity keeps the newest
        self._passes = [[held[i - gone] for i in rows if i >= gone] for rows in state["passes"]]
        self.reference.load(folder / REFERENCE, state["version"])
        version, numbers, gauss = state["rng"]
        self._rng.setstate((version, tuple(numbers), gauss))
