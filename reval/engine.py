"""The policy's weights and their update: micro-batches, backward, clipping, AdamW."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from .batching import collate, micro_batches
from .config import Config
from .models import head_of, last_hidden
from .objectives import OBJECTIVES, residual_parts
from .reference_policy import reference_of
from .replay import Trajectory


class NonFiniteError(RuntimeError):
    """A loss or gradient that is not finite; the weights have not moved. `trajectories` is the batch that did it."""

    def __init__(self, message: str, trajectories: list[Trajectory]):
        super().__init__(message)
        self.trajectories = trajectories


class Engine:
    """Owns the optimizer of `model`."""

    def __init__(self, model: PreTrainedModel, config: Config):
        self.model, self._config, self.updates = model, config, 0
        if config.model.gradient_checkpointing:
            model.train()  # transformers checkpoints in training mode only; what else that means is dropout:
            for module in model.modules():
                if isinstance(module, torch.nn.Dropout):
                    module.p = 0.0
        optim = config.optim
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay
        )

    def _schedule(self) -> float:
        """The share of optim.lr that the next update takes."""
        optim, total = self._config.optim, self._config.updates
        if self.updates < optim.warmup:
            return (self.updates + 1) / optim.warmup
        if optim.schedule == "constant":
            return 1.0
        return max(0.0, (total - self.updates) / max(total - optim.warmup, 1))

    def update(self, trajectories: list[Trajectory]) -> dict[str, Any]:
        """One step on annotated trajectories; the result does not depend on the micro-batches.

        Returns the loss, the gradient norm before clipping, and `parts`: tensors [B] of what the residuals are made of.
        Raises NonFiniteError before the weights move.
        """
        config, head = self._config, head_of(self.model)
        self.optimizer.zero_grad(set_to_none=True)
        loss, parts = 0.0, []
        for indices in micro_batches(trajectories, config.optim.micro_batch_tokens):
            members = [trajectories[i] for i in indices]
            batch = collate(members, self.model.device)
            reference = reference_of(members, batch)
            hidden = last_hidden(self.model, batch, config.model)
            out = OBJECTIVES[config.objective.name](
                hidden, head, batch, reference, config.objective, len(trajectories)
            )
            out.loss.backward()
            loss += out.loss.item()
            parts.append(residual_parts(hidden.detach(), head, batch, reference, config.objective, out.residual))
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.optim.max_grad_norm).item()
        if not (torch.isfinite(torch.tensor([loss, norm])).all()):
            self.optimizer.zero_grad(set_to_none=True)
            raise NonFiniteError(f"the loss is {loss} and the gradient norm {norm}", trajectories)
        for group in self.optimizer.param_groups:
            group["lr"] = config.optim.lr * self._schedule()
        self.optimizer.step()
        self.updates += 1
        for t in trajectories:
            t.uses += 1
        joined = {key: torch.cat([p[key].float().cpu() for p in parts]) for key in parts[0]}
        return {"loss": loss, "grad_norm": norm, "lr": self.optimizer.param_groups[0]["lr"], "parts": joined}
