"""The reference policy: what it is, and what it says about trajectories.

A trajectory keeps V_ref(s_1) and sum log pi_ref, whose sum is the one number that the loss needs (METHOD.md section
3), with the version of the reference that computed them. A reset makes what is kept stale; it is computed anew when a
stale trajectory is next drawn. While nothing is stale, the reference computes nothing and need not be on the GPU.
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

from .batching import Batch, MicroBatch, plan
from .config import Config
from .distributed import World
from .model.dtypes import compute_dtype
from .model.forward import token_values
from .model.loading import load_model
from .model.lora import reference_adapters, reset_reference_adapters
from .model.sharding import copy_weights, empty, shard
from .objectives import Reference
from .replay import Trajectory


class ReferencePolicy:
    """A frozen copy of `model`, spread as it is; or `model` itself without its adapters. `version` counts resets."""

    def __init__(
        self, model: PreTrainedModel, config: Config, world: World | None = None, checkpoint: Path | None = None
    ):
        self.version = 0
        self._config, self._world, self._policy = config, world or World(), model
        self.model: PreTrainedModel | None = None
        """None where the reference is the policy with other adapters."""
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
        """Become the policy as it is now."""
        if self.model is None:
            reset_reference_adapters(self._policy)
        else:
            copy_weights(self._policy, self.model)
        self.version += 1

    def annotate(self, trajectories: list[Trajectory]) -> int:
        """Compute what is missing or stale of the reference's view of each; returns how many that were."""
        stale = [t for t in trajectories if not self._known(t)]
        if not stale:
            return 0
        found: dict[int, dict[str, Any]] = {}
        with self._ready() as model:
            for micro in plan(stale, self._world, self._policy.device, self._config):
                found.update(zip(micro.indices, self._views(model, micro), strict=False))
        for others in self._world.gather(found):
            for i, view in others.items():
                stale[i].reference = view
        return len(stale)

    def _known(self, trajectory: Trajectory) -> bool:
        """Whether the trajectory carries all that the loss needs, and of this version."""
        known = trajectory.reference
        needs_values = self._config.objective.level != "trajectory"
        return known.get("version") == self.version and ("values" in known or not needs_values)

    @contextmanager
    def _ready(self) -> Iterator[PreTrainedModel]:
        """The model that computes as the reference within the block."""
        moved = self._config.reference.offload and self._world.size == 1  # FSDP fetches layers one by one itself
        if self.model is None:
            with reference_adapters(self._policy, self.version):
                yield self._policy
        elif moved:
            yield self.model.to(self._policy.device)  # type: ignore[arg-type]
            self.model.to("cpu")  # type: ignore[arg-type]
        else:
            yield self.model

    @torch.no_grad()
    def _views(self, model: PreTrainedModel, micro: MicroBatch) -> list[dict[str, Any]]:
        """What each trajectory keeps."""
        batch = micro.batch
        out = token_values(model, batch, self._config.model)
        v, log_prob = out.v[:, 0].tolist(), out.log_prob.sum(1).tolist()
        views = [{"version": self.version, "v": a, "log_prob": b} for a, b in zip(v, log_prob, strict=True)]
        if self._config.objective.level != "trajectory":
            per_token, mask = torch.stack(out[:3], -1).cpu().numpy(), batch.mask.cpu().numpy()
            for row, view in enumerate(views):
                view["values"] = per_token[row][mask[row]]  # [H, 3]: q, v, log_prob
        return views


def reference_of(trajectories: list[Trajectory], batch: Batch) -> Reference:
    """What annotated trajectories carry, as tensors for the batch made of them."""
    device = batch.mask.device
    v, log_prob = (
        torch.tensor([t.reference[key] for t in trajectories], dtype=torch.float32, device=device)
        for key in ("v", "log_prob")
    )
    values = None
    if "values" in trajectories[0].reference:
        padded = torch.zeros(*batch.mask.shape, 3, device=device)
        kept = np.concatenate([t.reference["values"] for t in trajectories])
        padded[batch.mask] = torch.from_numpy(kept).to(device)
        values = TokenValues(*padded.unbind(-1))
    return Reference(v, log_prob, values)
