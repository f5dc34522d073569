"""The reference policy, and its values of trajectories.

Each trajectory stores V_ref(s_1) and sum_h log pi_ref(a_h|s_h) in `Trajectory.reference`, and their sum, the return
R_ref, which is all that the loss needs (docs/method.md section 3). R_ref is summed in float64 and rounded to float32
once, as the loss does it with the policy's return: so a policy equal to its reference has the residual 0.

The trajectory also stores the version of the reference that computed these numbers. A reset of the reference makes the
stored values stale; `annotate` recomputes them when an update next uses the trajectory. As long as no values are stale,
the reference computes nothing and its weights need not be on the GPU.

    Trajectory.reference = {"version": int, "v": float, "log_prob": float, "returns": float}
    with objective.level=token or subtrajectory also "values": float32 [H, 3], q, v and log_prob of the H actions

With reference.reset_every=1 the reference is the policy as it was at the start of the iteration. So it is the policy
that generated the fresh trajectories, and its log-probs of them are their behaviour log-probs: `Trajectory.behavior`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from reval_kernels import TokenValues

from .batching import Batch, on_device
from .config import Config
from .distributed import World
from .model.dtypes import compute_dtype
from .model.forward import action_values
from .model.loading import load_model
from .model.lora import reference_adapters, reset_reference_adapters
from .model.packing import plan_for
from .model.sharding import copy_weights, empty, shard
from .objectives import Reference
from .replay import Trajectory
from .waiting import Progress


class ReferencePolicy:
    """The frozen policy with which the loss compares the trained policy.

    It is a copy of `model`, sharded in the same way. With lora.rank it is `model` itself with other adapters.
    """

    def __init__(
        self, model: PreTrainedModel, config: Config, world: World | None = None, checkpoint: Path | None = None
    ):
        self.version = 0
        """Number of resets so far."""
        self._config, self._world, self._policy = config, world or World(), model
        self.model: PreTrainedModel | None = None
        """The copy. None if the reference is the policy with other adapters."""
        if not config.lora.rank:
            self.model = self._copy() if checkpoint is None else self._saved(checkpoint / "training" / "reference")
            self.model.requires_grad_(False)

    def _copy(self) -> PreTrainedModel:
        policy, offload = self._policy, self._config.reference.offload
        if self._world.size == 1:
            return copy.deepcopy(policy).to("cpu" if offload else policy.device)  # type: ignore[arg-type]
        new = empty(type(policy), policy.config, policy.generation_config, policy.dtype)
        shard(new, self._world, policy.device, compute_dtype(self._config.model), offload=offload, fill=False)
        copy_weights(policy, new)
        return new

    def _saved(self, folder: Path) -> PreTrainedModel:
        settings = replace(self._config.model, name=str(folder), gradient_checkpointing=False)
        return load_model(settings, world=self._world, offload=self._config.reference.offload)[0]

    def reset(self) -> None:
        """Make the reference equal to the current policy. All stored values become stale."""
        if self.model is None:
            reset_reference_adapters(self._policy)
        else:
            copy_weights(self._policy, self.model)
        self.version += 1

    def annotate(self, trajectories: list[Trajectory], progress: Progress | None = None) -> int:
        """Compute the reference values of all trajectories whose values are missing or stale. Returns the number of
        these trajectories.

        Every process has to call this with the same trajectories.

        Args:
            progress: is called after each micro-batch with the numbers of micro-batches: done, all.
        """
        stale = [t for t in trajectories if not self._has_values(t)]
        if not stale:
            return 0
        with self._ready() as model:
            micros = plan_for(self._policy, stale, self._world, self._config)
            computed = []
            for done, micro in enumerate(micros, 1):
                computed.append(self._values(model, micro.batch))
                if progress is not None:
                    progress(done, len(micros))
        numbers = torch.cat(computed).cpu().numpy()  # one transfer for all micro-batches: each waits for the device
        found: dict[int, tuple[dict[str, Any], np.ndarray]] = {}
        for micro in micros:
            for i, t in zip(micro.indices, micro.trajectories, strict=False):  # a padding micro-batch has no indices
                own, numbers = np.split(numbers, [int(t.action_mask.sum())])
                found[i] = self._stored(own), own[:, 2].copy()
        for report in self._world.gather(found):
            for i, (values, log_prob) in report.items():
                stale[i].reference = values
                if self._config.reference.reset_every == 1 and stale[i].behavior is None:
                    stale[i].behavior = log_prob
        return len(stale)

    def _has_values(self, trajectory: Trajectory) -> bool:
        """Whether the trajectory has all values that the loss needs, from the current version of the reference."""
        stored = trajectory.reference
        needs_tokens = self._config.objective.level != "trajectory"
        return stored.get("version") == self.version and ("values" in stored or not needs_tokens)

    @contextmanager
    def _ready(self) -> Iterator[PreTrainedModel]:
        """Give a model that computes as the reference within the block, on the device of the policy."""
        # With several processes FSDP itself moves offloaded layers to the GPU, one at a time.
        moved = self._config.reference.offload and self._world.size == 1
        if self.model is None:
            with reference_adapters(self._policy, self.version):
                yield self._policy
        elif moved:
            yield self.model.to(self._policy.device)  # type: ignore[arg-type]
            self.model.to("cpu")  # type: ignore[arg-type]
        else:
            yield self.model

    @torch.no_grad()
    def _values(self, model: PreTrainedModel, batch: Batch) -> torch.Tensor:
        """q, v and log_prob of every action: float32 [M, 3]."""
        return torch.stack(action_values(model, batch, self._config.model)[:3], -1)

    def _stored(self, values: np.ndarray) -> dict[str, Any]:
        """The dictionary that a trajectory stores, from q, v and log_prob of its actions [H, 3]."""
        v, log_prob = float(values[0, 1]), float(values[:, 2].sum(dtype=np.float64))
        stored = {"version": self.version, "v": v, "log_prob": log_prob, "returns": v + log_prob}
        return stored if self._config.objective.level == "trajectory" else stored | {"values": values.copy()}


def reference_of(trajectories: list[Trajectory], batch: Batch) -> Reference:
    """The stored reference values of annotated trajectories, as tensors for `batch`, which has the same trajectories in
    the same order."""
    device = batch.rewards.device
    numbers = torch.tensor([[t.reference[key] for t in trajectories] for key in ("v", "log_prob", "returns")])
    values = None
    if "values" in trajectories[0].reference:
        stored = torch.from_numpy(np.concatenate([t.reference["values"] for t in trajectories]))
        values = TokenValues(*on_device(stored, device).unbind(-1))
    v, log_prob, returns = on_device(numbers, device)
    return Reference(v, log_prob, returns, values)
