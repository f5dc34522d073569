"""The policy's weights and their update: micro-batches, backward, clipping, AdamW."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from transformers import PreTrainedModel

from .batching import MicroBatch, plan
from .config import Config
from .distributed import World
from .model.forward import with_hidden
from .model.head import OutputHead
from .model.sharding import layers_of, whole
from .objectives import OBJECTIVES, residual_parts
from .reference_policy import reference_of
from .replay import Trajectory


class NonFiniteError(RuntimeError):
    """A loss or gradient that is not finite; the weights have not moved. `trajectories` is the batch that did it."""

    def __init__(self, message: str, trajectories: list[Trajectory]):
        super().__init__(message)
        self.trajectories = trajectories


class Learner:
    """Owns the optimizer of `model`."""

    def __init__(self, model: PreTrainedModel, config: Config, world: World | None = None):
        self.model, self._config, self._world, self.updates = model, config, world or World(), 0
        if config.model.compile:
            for layer in layers_of(model):
                layer.compile(dynamic=True)
        optim = config.optim
        self.optimizer = torch.optim.AdamW(
            [p for p in model.parameters() if p.requires_grad],
            lr=optim.lr,
            betas=optim.betas,
            eps=optim.eps,
            weight_decay=optim.weight_decay,
            fused=model.device.type in ("cpu", "cuda"),  # one pass over the weights instead of eight
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
        """One step on annotated trajectories, the same on every process; the result depends neither on the
        micro-batches nor on the number of processes, but for rounding.

        Returns the loss, the gradient norm before clipping, and `parts`: tensors [B] of what the residuals are made of.
        Raises NonFiniteError before the weights move.
        """
        for layer in layers_of(self.model):
            # transformers checkpoints layers in training mode only; what lies in them stays without dropout
            layer.training = self._config.model.gradient_checkpointing
        own_losses: list[float] = []
        own_parts: list[dict[str, Tensor]] = []
        for micro in plan(trajectories, self._world, self.model.device, self._config):
            loss, parts = self._backward(micro, len(trajectories))
            if micro.indices:
                own_losses.append(loss)
                own_parts.append(parts)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        norm = whole(torch.nn.utils.clip_grad_norm_(trained, self._config.optim.max_grad_norm)).item()
        everyones = self._world.gather((own_losses, own_parts))
        loss = sum(x for losses, _ in everyones for x in losses)
        if not (torch.isfinite(torch.tensor([loss, norm])).all()):
            self.optimizer.zero_grad(set_to_none=True)
            raise NonFiniteError(f"the loss is {loss} and the gradient norm {norm}", trajectories)
        for group in self.optimizer.param_groups:
            group["lr"] = self._config.optim.lr * self._schedule()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)  # now: the memory is wanted for generating
        self.updates += 1
        for t in trajectories:
            t.uses += 1
        pieces = [piece for _, parts in everyones for piece in parts]
        joined = {key: torch.cat([piece[key] for piece in pieces]) for key in pieces[0]}
        return {"loss": loss, "grad_norm": norm, "lr": self.optimizer.param_groups[0]["lr"], "parts": joined}

    def _backward(self, micro: MicroBatch, count: int) -> tuple[float, dict[str, Tensor]]:
        """Add the micro-batch's gradient of the sum over it / `count`; its loss and parts."""
        objective, batch = self._config.objective, micro.batch
        reference = reference_of(micro.trajectories, batch)

        def losses(hidden: Tensor, head: OutputHead) -> tuple[Tensor, dict[str, Tensor]]:
            out = OBJECTIVES[objective.name](hidden, head, batch, reference, objective, count)
            return out.loss, residual_parts(hidden.detach(), head, batch, reference, objective, out.residual)

        loss, parts = with_hidden(self.model, batch, self._config.model, losses)
        (loss if micro.indices else 0 * loss).backward()
        return loss.item(), {key: x.float().cpu() for key, x in parts.items()}

    def state(self) -> dict[str, Any]:
        """The optimizer's state by parameter name, for torch.distributed.checkpoint."""
        return get_optimizer_state_dict(self.model, self.optimizer)

    def load_state(self, state: dict[str, Any], updates: int) -> None:
        """Go on from what `state` returned after that many updates, with the settings as they are now."""
        set_optimizer_state_dict(self.model, self.optimizer, state)
        optim = self._config.optim
        for group in self.optimizer.param_groups:
            group.update(betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay)
        self.updates = updates
