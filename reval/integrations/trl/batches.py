"""From TRL's batches to trajectories, and from trajectories to batches in TRL's layout.

Letters: B completions, P tokens of the longest prompt, C of the longest completion.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from reval_kernels import TokenValues

from ...replay import Trajectory


def trajectories_of(
    output: dict[str, Any],
    rewards: Sequence[float | None],
    scores: Sequence[float | None],
    groups: Sequence[int],
    iteration: int,
    eos: Sequence[int],
) -> list[Trajectory]:
    """The completions of `output` that have a reward and an action, as trajectories.

    Args:
        output: what GRPOTrainer._generate_and_score_completions returned, B completions.
        rewards, scores: [B], the shaped and the raw reward. None for a completion without one.
        groups: [B], the number of the prompt in this generation.
        iteration: the number of this generation, from 1.
        eos: the tokens that end a completion.
    """
    actions = output["completion_mask"].bool()
    if "tool_mask" in output:
        actions = actions & output["tool_mask"].bool()
    tokens = torch.cat([output["prompt_ids"], output["completion_ids"]], 1).cpu().numpy()
    real = torch.cat([output["prompt_mask"], output["completion_mask"]], 1).bool().cpu().numpy()
    chosen = torch.cat([torch.zeros_like(output["prompt_mask"], dtype=torch.bool), actions], 1).cpu().numpy()
    return [
        Trajectory(
            token_ids=tokens[row][real[row]],
            action_mask=chosen[row][real[row]],
            reward=reward,
            score=score,
            iteration=iteration,
            group=(iteration << 32) + group,
            finished=int(tokens[row][real[row]][-1]) in eos,
        )
        for row, (reward, score, group) in enumerate(zip(rewards, scores, groups, strict=True))
        if reward is not None and score is not None and chosen[row].any()
    ]


def collate(trajectories: list[Trajectory], pad_token: int, device: torch.device) -> dict[str, Any]:
    """A batch in TRL's layout: prompts padded on the left, completions on the right.

    Without trajectories the batch is one row without action, so that a process without a share can run the model.

    Returns `prompt_ids`, `prompt_mask`: int64 [B, P]; `completion_ids`, `completion_mask`: int64 [B, C]; `action_mask`:
    bool [B, C], false also for the tokens of tools; `rewards`: float32 [B], shaped. And, where the trajectories have
    reference values: `reference_v`, `reference_log_prob`, `reference_returns`, `behavior_log_prob`: float32 [B], sums
    over the actions (NaN: not known), and `reference_values`: TokenValues [B, C] where single tokens have them.
    """
    if not trajectories:
        nothing = Trajectory(np.full(2, pad_token), np.array([False, True]), reward=0, score=0, iteration=0)
        nothing.reference = {"v": 0.0, "log_prob": 0.0, "returns": 0.0, "values": np.zeros((1, 3), np.float32)}
        empty = collate([nothing], pad_token, device)
        empty["action_mask"][:] = False
        return empty
    starts = [int(t.action_mask.argmax()) for t in trajectories]
    prompts = [torch.from_numpy(t.token_ids[:n].astype(np.int64)) for t, n in zip(trajectories, starts, strict=True)]
    completions = [
        torch.from_numpy(t.token_ids[n:].astype(np.int64)) for t, n in zip(trajectories, starts, strict=True)
    ]
    actions = [torch.from_numpy(t.action_mask[n:]) for t, n in zip(trajectories, starts, strict=True)]
    batch: dict[str, Any] = {
        "prompt_ids": pad_sequence(prompts, True, pad_token, "left"),
        "prompt_mask": pad_sequence([torch.ones_like(x) for x in prompts], True, 0, "left"),
        "completion_ids": pad_sequence(completions, True, pad_token),
        "completion_mask": pad_sequence([torch.ones_like(x) for x in completions], True),
        "action_mask": pad_sequence(actions, True, False),
        "rewards": torch.tensor([t.reward for t in trajectories], dtype=torch.float32),
    }
    if all(t.reference for t in trajectories):
        for name in ("v", "log_prob", "returns"):
            numbers = [t.reference[name] for t in trajectories]
            batch[f"reference_{name}"] = torch.tensor(numbers, dtype=torch.float32)
        behavior = [np.nan if t.behavior is None else t.behavior.sum(dtype=np.float64) for t in trajectories]
        batch["behavior_log_prob"] = torch.tensor(behavior, dtype=torch.float32)
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    if all("values" in t.reference for t in trajectories):
        stored = np.concatenate([t.reference["values"] for t in trajectories])
        columns = torch.from_numpy(stored).to(device).unbind(-1)
        mask = batch["action_mask"]
        zeros = torch.zeros(mask.shape, device=device)
        batch["reference_values"] = TokenValues(*(zeros.masked_scatter(mask, x) for x in columns))
    return batch


def states_and_actions(batch: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """`input_ids` and `attention_mask`, int64 [B, P + C], and which next tokens are actions, bool [B, P + C - 1]."""
    input_ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    attention_mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    mask = torch.cat([torch.zeros_like(batch["prompt_mask"], dtype=torch.bool), batch["action_mask"]], 1)
    return input_ids, attention_mask, mask[:, 1:]
