"""The learner: one update of the policy from a batch of trajectories.

An update runs forward and backward passes over micro-batches, clips the gradient and takes one AdamW step.
"""

from __future__ import annotations

from collections import defaultdict
from math import isfinite
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from .batching import MicroBatch
from .config import OBJECTIVES, Config
from .distributed import World
from .model.attention import attention_for
from .model.forward import token_values, with_hidden
from .model.packing import plan_for
from .model.sharding import layers_of
from .objectives import FUSED, Totals
from .policy_gradients import value_objective
from .reference_policy import reference_of
from .replay import Trajectory
from .waiting import Progress

TERMS = ("residual", "v_policy", "v_reference", "log_ratio")
"""The residual of a trajectory, and the terms that it is the sum of with the reward."""


AT_REST = {*OBJECTIVES} - {"asymre"}
"""Objectives whose gradient is 0 where all rewards and residuals are 0. Of a user's own objective this is not known."""


class NonFiniteError(RuntimeError):
    """The loss or the gradient of a batch is not finite. The weights have not moved."""

    def __init__(self, message: str, trajectories: list[Trajectory]):
        super().__init__(message)
        self.trajectories = trajectories
        """The batch."""


class Learner:
    """Trains `model`: owns the optimizer and counts the updates."""

    def __init__(self, model: PreTrainedModel, config: Config, world: World | None = None):
        self.model, self._config, self._world = model, config, world or World()
        self.updates = 0
        """Updates taken so far."""
        self._total_updates, self._longest = config.updates, config.longest_response
        self._layers = layers_of(model)
        name = config.objective.name
        self._fused = FUSED.get(name)
        self._objective = value_objective(name) if self._fused is None else None
        if config.model.compile:
            for layer in self._layers:
                layer.compile(dynamic=True)
        optim = config.optim
        self._trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self._trained,
            lr=optim.lr,
            betas=optim.betas,
            eps=optim.eps,
            weight_decay=optim.weight_decay,
            fused=model.device.type in ("cpu", "cuda"),  # one pass over the weights instead of eight
        )

    def update(self, trajectories: list[Trajectory], progress: Progress | None = None) -> dict[str, Any]:
        """Take one step on a batch of annotated trajectories, which is the same on every process.

        The number of micro-batches and the number of processes change the result by rounding only.

        There is no step if the batch has no signal (`_has_signal`): AdamW divides the gradient by its own size, so even
        a gradient of rounding errors would move every weight by about the learning rate.

        Args:
            progress: is called after each micro-batch with the numbers of micro-batches: done, all.

        Returns `loss`, `grad_norm` before clipping, `lr`, `skipped` (1 if there was no step, else 0), and
        `residual_terms`: tensors [B] by name, with the residual of each trajectory and its terms. The order of the
        trajectories in these tensors is not that of the batch.

        Raises NonFiniteError before the weights move.
        """
        for layer in self._layers:
            # transformers checkpoints activations only in layers in training mode. Their children stay in evaluation
            # mode, so there is no dropout. Generation ends training mode, so the mode is set before every update.
            layer.training = self._config.model.gradient_checkpointing
        micros = plan_for(self.model, trajectories, self._world, self._config)
        actions = sum(int(t.action_mask.sum()) for t in trajectories)
        totals = Totals(len(trajectories), actions, self._longest)
        log_z = self._log_z(micros, trajectories) if self._config.objective.name == "tba" else None
        computed = []
        for done, micro in enumerate(micros, 1):
            computed.append(self._backward(micro, totals, log_z))
            if progress is not None:
                progress(done, len(micros))
        norm = torch.nn.utils.get_total_norm([p.grad for p in self._trained if p.grad is not None])
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()  # FSDP: each process knows the norm of its slices
        # The only wait for the device in an update: all numbers come in one transfer, before the weights move.
        losses, terms = torch.stack([x for x, _ in computed]), torch.cat([x for _, x in computed], 1)
        numbers = torch.cat([norm.float()[None], losses, terms.flatten()]).cpu()
        own = [micro for micro in micros if micro.indices]  # the padding micro-batches come last
        members = [t for micro in own for t in micro.trajectories]
        grad_norm, own_loss = numbers[0].item(), numbers[1 : len(own) + 1].double().sum().item()
        own_terms = numbers[len(micros) + 1 :].view(len(TERMS), -1)[:, : len(members)]
        reports = self._world.gather((own_loss, own_terms, self._has_signal(members, own_terms[0])))
        loss, signal = sum(x for x, *_ in reports), any(x for *_, x in reports)
        if not (isfinite(loss) and isfinite(grad_norm)):
            self.optimizer.zero_grad(set_to_none=True)
            raise NonFiniteError(f"the loss is {loss} and the gradient norm {grad_norm}", trajectories)
        if grad_norm > self._config.optim.max_grad_norm:
            torch.nn.utils.clip_grads_with_norm_(self._trained, self._config.optim.max_grad_norm, norm)
        lr = self._config.optim.lr * self._schedule()
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if signal:
            self.optimizer.step()
            self.updates += 1
            for t in trajectories:
                t.uses += 1
        # Free the gradients now instead of just before the next backward pass, because generation needs the memory.
        self.optimizer.zero_grad(set_to_none=True)
        joined = dict(zip(TERMS, torch.cat([x for _, x, _ in reports], 1), strict=True))
        return {"loss": loss, "grad_norm": grad_norm, "lr": lr, "skipped": float(not signal), "residual_terms": joined}

    def _backward(
        self, micro: MicroBatch, totals: Totals, log_z: dict[int, float] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Add the gradient of one micro-batch to the gradient of the batch, which has `totals`.

        Returns the loss of the micro-batch and its TERMS [4, B], float32 on the device: nothing waits for them here.
        """
        objective, batch = self._config.objective, micro.batch
        reference = reference_of(micro.trajectories, batch)
        if log_z is not None:
            reference = reference._replace(log_z=batch.rewards.new_tensor([log_z[t.group] for t in micro.trajectories]))
        with attention_for(self.model, batch.tree):
            if (fused := self._fused) is not None:
                out = with_hidden(
                    self.model,
                    batch,
                    self._config.model,
                    lambda hidden, head: fused(hidden, head, batch, reference, objective, totals),
                )
            else:
                assert self._objective is not None
                values = token_values(self.model, batch, self._config.model)
                out = self._objective(values, batch, reference, objective, totals)
            # A padding micro-batch takes part in the backward pass, in which FSDP communicates, but adds no gradient.
            (out.loss if micro.indices else 0 * out.loss).backward()
        terms = (out.residual, out.v, reference.v, out.log_ratio)
        return out.loss.detach().float(), torch.stack([x.float() for x in terms])

    @torch.no_grad()
    def _log_z(self, micros: list[MicroBatch], trajectories: list[Trajectory]) -> dict[int, float]:
        """mean_G (r / beta - D) of each group in the batch. It takes a pass over the batch before the update, because a
        group may be in several micro-batches or on several processes."""
        log_probs = []
        for micro in micros:
            with attention_for(self.model, micro.batch.tree):
                log_probs.append(token_values(self.model, micro.batch, self._config.model).log_prob.sum(1))
        own = torch.cat(log_probs).tolist()
        indices = [i for micro in micros for i in micro.indices]  # the padding micro-batches come last
        found = dict(pair for report in self._world.gather(list(zip(indices, own, strict=False))) for pair in report)
        groups = defaultdict(list)
        for i, t in enumerate(trajectories):
            groups[t.group].append(t.reward / self._config.objective.beta - (found[i] - t.reference["log_prob"]))
        return {group: sum(x) / len(x) for group, x in groups.items()}

    def _has_signal(self, trajectories: list[Trajectory], residuals: Tensor) -> bool:
        """Whether a trajectory has a reward other than 0, or a residual that is larger than rounding makes it.

        A loss that has a gradient without both, such as AsymRE's, always has a signal.

        Two sources of rounding: the reference's return is a float32, and each action's log-probability has the error of
        the data type that the transformer computes in. These errors differ between micro-batches of different shapes.
        """
        if self._config.objective.name not in AT_REST:
            return True
        model, storage = self._config.model, torch.finfo(torch.float32).eps
        compute = torch.finfo(torch.bfloat16).eps if "bfloat16" in (model.dtype, model.compute_dtype) else storage
        for t, residual in zip(trajectories, residuals.abs().tolist(), strict=True):
            returns = abs(t.reference["v"]) + abs(t.reference["log_prob"])
            rounding = 4 * storage * returns + 16 * compute * float(t.action_mask.sum()) ** 0.5
            if t.reward or residual > rounding:
                return True
        return False

    def _schedule(self) -> float:
        """The factor on optim.lr for the next update."""
        optim, total = self._config.optim, self._total_updates
        if self.updates < optim.warmup:
            return (self.updates + 1) / optim.warmup
        if optim.schedule == "constant":
            return 1.0
        return max(0.0, (total - self.updates) / max(total - optim.warmup, 1))

    def state(self) -> dict[str, Any]:
        """The optimizer's state by parameter name, as torch.distributed.checkpoint saves it."""
        return get_optimizer_state_dict(self.model, self.optimizer)

    def load_state(self, state: dict[str, Any], updates: int) -> None:
        """Continue from `state`, which `state()` returned after `updates` updates.

        The state contains AdamW's settings too. They are overwritten with the current ones, because a resumed run may
        change them.
        """
        set_optimizer_state_dict(self.model, self.optimizer, state)
        optim = self._config.optim
        for group in self.optimizer.param_groups:
            group.update(betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay)
        self.updates = updates
