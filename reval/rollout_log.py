"""Rollouts as JSON lines: the file that replay.preload names, and the file rollouts.jsonl that a run writes.

A row holds

    prompt_ids     token ids
    response_ids   token ids of everything after the prompt: the model's, and with several turns the environment's
    reward         the raw reward, before shaping
    action_mask    true for each token of the response that the model chose. May be left out: then all of them
    finished       false if the length limit cut the response off. May be left out: then true
    iteration      a whole number. May be left out. Rows with one prompt and one iteration are a group, whose mean
                   reward.shaping subtracts

Example: {"prompt_ids": [5, 6], "response_ids": [7, 8, 9], "reward": 1.0, "action_mask": [true, false, true]}
"""

from __future__ import annotations

import difflib
from collections import Counter
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from .config import Config
from .replay import Trajectory
from .scoring import shape_rewards
from .sources import Row, read_jsonl

NEEDED = ("prompt_ids", "response_ids", "reward")
KEYS = (*NEEDED, "action_mask", "finished", "iteration")


def rollout_rows(trajectories: list[Trajectory]) -> list[Row]:
    """The rows of these trajectories."""
    rows = []
    for t in trajectories:
        start = len(t.prefix) + 1
        mask = t.action_mask[start:]
        row = {
            "iteration": t.iteration,
            "prompt_ids": t.token_ids[:start].tolist(),
            "response_ids": t.token_ids[start:].tolist(),
            "reward": t.score,
            "finished": t.finished,
        }
        rows.append(row if mask.all() else row | {"action_mask": mask.tolist()})
    return rows


def load_rollouts(config: Config, model: PreTrainedModel) -> list[Trajectory]:
    """Read the file replay.preload, which fills the buffer at the start. Any policy may have generated the rollouts.

    The rewards are shaped as replay.preload_shaping says. A trajectory has iteration 0, whatever its row says.

    Raises ValueError, with the row, for a file or row that cannot be read, for a key that is unknown, for token ids
    outside the model's vocabulary, and for a rollout that is longer than the model's context.
    """
    path, how = config.replay.preload, config.replay.preload_shaping
    assert path is not None, "replay.preload names no file"
    how = config.reward.shaping if how == "same" else how
    text = model.config.get_text_config()
    embedding: Any = model.get_input_embeddings()
    vocabulary = min(text.vocab_size, embedding.weight.shape[0])
    context = getattr(text, "max_position_embeddings", None) or 1 << 30
    out, groups = [], []
    try:
        for number, row in enumerate(read_jsonl(path), 1):
            try:
                out.append(_trajectory(row, vocabulary, context))
            except ValueError as error:
                raise ValueError(f"{path}, row {number}: {error}") from None
            groups.append((tuple(row["prompt_ids"]), row.get("iteration")))
        numbers = {group: n for n, group in enumerate(dict.fromkeys(groups))}
        if not out:
            raise ValueError(f"{path} has no rows")
        if how in ("centered", "normalized") and max(Counter(groups).values()) == 1:
            raise ValueError(
                f"{path}: every reward would be 0 with the shaping {how!r}, because every prompt has one response, "
                "which is its own mean; set replay.preload_shaping=plain to use the rewards as they are"
            )
        shaped = shape_rewards([t.score for t in out], [numbers[group] for group in groups], how)
    except ValueError as error:
        raise ValueError(f"replay.preload: {error}") from None
    for t, reward in zip(out, shaped, strict=True):
        assert reward is not None, "every row has a reward"
        t.reward = reward
    return out


def _trajectory(row: Row, vocabulary: int, context: int) -> Trajectory:
    """The trajectory of a row, with the raw reward."""
    for key in row:
        if key not in KEYS:
            near = difflib.get_close_matches(key, KEYS, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"the keys are {', '.join(KEYS)}"
            raise ValueError(f"unknown key {key!r}; {hint}")
    if missing := [key for key in NEEDED if key not in row]:
        raise ValueError(f"has no {missing[0]!r}")
    prompt, response, reward = (row[key] for key in NEEDED)
    for name, ids in (("prompt_ids", prompt), ("response_ids", response)):
        allowed = f"{name} must be a list of at least one whole number from 0 to {vocabulary - 1}"
        _need(isinstance(ids, list) and len(ids) > 0, f"{allowed}; got {ids!r:.80}")
        for token in ids:
            _need(type(token) is int and 0 <= token < vocabulary, f"{allowed}; got {token!r:.80}")
    length = len(prompt) + len(response)
    _need(length <= context, f"has {length} tokens, but the model's context has {context}")
    _need(type(reward) in (int, float), f"reward must be a number; got {reward!r:.80}")
    mask, finished, iteration = row.get("action_mask"), row.get("finished", True), row.get("iteration")
    if mask is not None:
        booleans = isinstance(mask, list) and all(type(x) is bool or (type(x) is int and x in (0, 1)) for x in mask)
        _need(booleans, f"action_mask must be a list of true and false; got {mask!r:.80}")
        _need(
            len(mask) == len(response),
            f"action_mask must have one entry per token of the response ({len(response)}), but has {len(mask)}",
        )
    _need(type(finished) is bool, f"finished must be true or false; got {finished!r:.80}")
    _need(iteration is None or type(iteration) is int, f"iteration must be a whole number; got {iteration!r:.80}")
    mask = [True] * len(response) if mask is None else mask
    actions = np.array([False] * len(prompt) + mask, dtype=bool)
    return Trajectory(
        token_ids=prompt + response,
        action_mask=actions,
        reward=float(reward),
        score=float(reward),
        iteration=0,
        finished=finished,
    )


def _need(ok: Any, message: str) -> None:
    if not ok:
        raise ValueError(message)
