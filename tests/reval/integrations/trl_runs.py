"""Runs of ReValTrainer that test_trl_trainer.py compares, in this process or, started with torchrun, in two processes.

torchrun --nproc-per-node 2 tests/reval/integrations/trl_runs.py FOLDER
"""

import sys
from pathlib import Path

import numpy as np
import torch
import trl_tiny
from transformers import TrainerCallback

from reval.integrations.trl import ReValConfig, ReValTrainer
from reval.replay import Trajectory


def arguments(folder, **more):
    """Two micro-batches an update; AdamW's eps keeps a gradient that is only rounding from becoming a step."""
    size = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "num_generations": 4}
    off = {"report_to": [], "use_cpu": True, "bf16": False, "disable_tqdm": True, "gradient_checkpointing": False}
    steps = {"max_steps": 6, "logging_steps": 1, "save_steps": 3, "learning_rate": 1e-2, "adam_epsilon": 1e-5}
    return ReValConfig(**({"output_dir": str(folder), "max_completion_length": 6} | size | off | steps | more))


def trainer(folder, reward=trl_tiny.share_of_c, model=None, peft_config=None, eval_dataset=None, **more):
    return ReValTrainer(
        model or trl_tiny.model(),
        reward,
        arguments(folder, **more),
        train_dataset=trl_tiny.prompts(),
        eval_dataset=eval_dataset,
        processing_class=trl_tiny.tokenizer(),
        peft_config=peft_config,
    )


class StopAfter(TrainerCallback):
    def __init__(self, steps):
        self.steps = steps

    def on_step_end(self, args, state, control, **_):
        control.should_training_stop |= state.global_step >= self.steps


def run(folder, steps=6, resume=None, **more):
    """The trainer after `steps` updates, from checkpoint `resume` on."""
    made = trainer(folder, **more)
    made.add_callback(StopAfter(steps))
    made.train(resume_from_checkpoint=resume and str(resume))
    return made


def weights(made):
    return {name: p.detach().clone() for name, p in made.accelerator.unwrap_model(made.model).named_parameters()}


def trajectories(count):
    """Trajectories of different lengths; the third has the tokens of a tool in the middle. Half of the rewards are
    negative, and every log mu is 2 nats above the log pi of a uniform policy, so that the taper acts."""
    rng = np.random.default_rng(0)
    made = []
    for i in range(count):
        tokens = rng.integers(3, len(trl_tiny.WORDS), 3 + i % 4 + 4)
        mask = np.arange(len(tokens)) >= 1 + i % 3
        if i == 2:
            mask[4:6] = False
        t = Trajectory(tokens, mask, reward=float(rng.normal()), score=0.0, iteration=1, group=i)
        t.behavior = np.full(mask.sum(), -2.0, np.float32)
        made.append(t)
    return made


@torch.no_grad()
def move(model):
    """The policy leaves its reference."""
    for p in model.parameters():
        p.add_(0.05 * torch.cos(torch.arange(p.numel()).view(p.shape).float()))


def one_update(folder, count, **more):
    """The loss, the gradient and the reference values of one update on `count` given trajectories."""
    made = trainer(folder, num_iterations=2, **more)
    model = made.accelerator.prepare_model(made.model)
    rows = trajectories(count)
    made._passes = [[], rows]
    made._annotate([])
    move(made.model)
    model.train()
    losses = []
    for step in range(made.args.steps_per_generation):
        made._step = made.args.steps_per_generation + step
        loss = made.compute_loss(model, made._prepare_inputs([]))
        loss.backward()
        losses.append(loss.detach())
    gradient = {name: p.grad for name, p in made.model.named_parameters()}
    loss = made.accelerator.reduce(torch.stack(losses).sum(), "mean")
    return {"loss": loss, "gradient": gradient, "reference": [t.reference for t in rows]}


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    out = {"updates": {count: one_update(folder / "update", count) for count in (9, 1)}}
    made = run(folder / "whole")
    out["whole"], out["log"] = weights(made), made.state.log_history
    run(folder / "stopped", 3)
    resumed = run(folder / "stopped", resume=folder / "stopped" / "checkpoint-3")
    out["resumed"] = weights(resumed)
    out["buffer"] = [(t.token_ids, t.reward, t.uses) for t in made.buffer]
    torch.save(out, folder / f"rank{made.world.rank}.pt")
