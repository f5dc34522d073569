"""The README.md of a checkpoint: the base model, the training settings and the metrics."""

from __future__ import annotations

import yaml

from . import __version__
from .config import Config


def model_card(config: Config, iteration: int, metrics: dict[str, float]) -> str:
    """The text of README.md: the header that the Hugging Face hub reads, then Markdown.

    `metrics` are those of `iteration`; the card shows eval/*, reward* and num_tokens.
    """
    objective = config.objective.name.rpartition(":")[2]  # of a file of the user, the function's name
    header = {
        "library_name": "transformers",
        "base_model": config.model.name,
        "pipeline_tag": "text-generation",
        "tags": ["reval", "reinforcement-learning", objective],
    }
    shown = [name for name in sorted(metrics) if name.startswith(("eval/", "reward")) or name == "num_tokens"]
    rows = "\n".join(f"| {name} | {metrics[name]:.6g} |" for name in shown)
    data = config.data.name if config.data.path is None else config.data.path
    batches = f"{config.rollout.prompts} prompts x {config.rollout.responses} responses an iteration"
    if not config.generates:
        data = f"the logged rollouts in {config.replay.preload}"
        batches = f"Batches of {config.replay_batch_size} logged rollouts"
    paper = " ([arXiv 2603.23355](https://arxiv.org/abs/2603.23355))" if objective == "reval" else ""
    return f"""---
{yaml.safe_dump(header, sort_keys=False)}---
# {config.model.name}, trained with ReVal

`{config.model.name}` after {iteration} of {config.run.iterations} iterations of reinforcement learning on `{data}` with
the reward `{config.reward.function}` and the objective `{objective}`{paper}; made by reval {__version__}. Every setting
is in `config.yaml`.

{batches},
{config.replay.updates_per_iteration} updates each, beta {config.objective.beta:g}, learning rate {config.optim.lr:g}.

| metric, in iteration {iteration} | |
|---|---|
{rows}

`from_pretrained` loads this folder. `reval train --resume` needs the subfolder `training/`; without it, the model still
loads.
"""
