"""The reference policy: a frozen copy of the policy, and what it says about trajectories.

A trajectory keeps V_ref(s_1) and sum log pi_ref, whose sum is the one number that the loss needs (METHOD.md section
3), with the version of the reference that computed them. A reset makes what is kept stale; it is computed anew when a
stale trajectory is next drawn.
"""

from __future__ import annotations

import copy

import numpy as np
import torch
from transformers import PreTrainedModel

from reval_kernels import TokenValues, linear_token_values

from .batching import Batch, collate, micro_batches
from .config import Config
from .models import head_of, last_hidden
from .objectives import Reference
from .replay import Trajectory


class ReferencePolicy:
    """A frozen copy of `model` and its version, which counts resets."""

    def __init__(self, model: PreTrainedModel, config: Config):
        self.model = copy.deepcopy(model).requires_grad_(False)
        self.version = 0
        self._config = config

    def reset(self, model: PreTrainedModel) -> None:
        """Become `model` as it is now."""
        self.model.load_state_dict(model.state_dict())
        self.version += 1

    def annotate(self, trajectories: list[Trajectory]) -> int:
        """Compute what is missing or stale of the reference's view of each; returns how many that were."""
        stale = [t for t in trajectories if t.reference.get("version") != self.version]
        for part in micro_batches(stale, self._config.optim.micro_batch_tokens):
            self._annotate([stale[i] for i in part])
        return len(stale)

    @torch.no_grad()
    def _annotate(self, trajectories: list[Trajectory]) -> None:
        batch = collate(trajectories, self.model.device)
        hidden, head = last_hidden(self.model, batch, self._config.model), head_of(self.model)
        values = linear_token_values(hidden, head.weight, batch.actions, mask=batch.mask, **head.options())
        v, log_prob = values.v[:, 0].cpu(), values.log_prob.sum(1).cpu()
        per_token, mask = torch.stack(values[:3], -1).cpu().numpy(), batch.mask.cpu().numpy()
        for row, t in enumerate(trajectories):
            t.reference = {"version": self.version, "v": v[row].item(), "log_prob": log_prob[row].item()}
            if self._config.objective.level != "trajectory":
                t.reference["values"] = per_token[row][mask[row]]  # [H, 3]: q, v, log_prob


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
