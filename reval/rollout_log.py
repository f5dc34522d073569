"""Rollouts as JSON lines: the file that replay.preload names, and the file rollouts.jsonl that a run writes.

A row holds

    prompt_ids     token ids; or in their place
    prompt         the prompt as the model was asked it: text, or chat messages. The chat template formats it
    response_ids   token ids of everything after the prompt: the model's, and with several turns the environment's; or
    response       text. The end-of-sequence token is added, unless `finished` is false
    reward         the raw reward, before shaping. Without it, reward.function scores the response and gets the other
                   keys of the row as the columns of its problem
    action_mask    true for each token of `response_ids` that the model chose. May be left out: then all of them
    finished       false if the length limit cut the response off. May be left out: then true
    iteration      a whole number. May be left out
    group          a whole number. May be left out: then rows with one prompt are a group. Rows of one iteration with
                   one number are a group, whose mean reward.shaping subtracts

Examples: {"prompt_ids": [5, 6], "response_ids": [7, 8, 9], "reward": 1.0, "action_mask": [true, false, true]}
          {"prompt": "What is 3 + 4?", "response": "7", "answer": "7"}
"""

from __future__ import annotations

import difflib
from collections import Counter
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from .components import Components
from .config import GROUPED, Config
from .data import Problem
from .prompts import encode, make_prompt
from .replay import Trajectory
from .rewards import check_columns
from .rewards.shaping import shape_rewards
from .rollout import Response, end_tokens
from .scoring import nothing_scored, score
from .sources import Row, read_jsonl

PROMPT, RESPONSE = ("prompt_ids", "prompt"), ("response_ids", "response")
OPTIONAL = ("action_mask", "finished", "iteration", "group")
KEYS = (*PROMPT, *RESPONSE, "reward", *OPTIONAL)
CLOSE = 0.8
"""A key of a row without `reward` is a misspelt one of KEYS if it is that similar; otherwise it is a column."""


class Preload(NamedTuple):
    """The rollouts of the file replay.preload."""

    trajectories: list[Trajectory]
    held_out: int
    """Rollouts that are left out because their prompt is that of a problem that training must not use."""
    unscored: int
    """Rollouts that are left out because the reward function gave them no score."""
    exceptions: list[str]
    """The first exception of the reward function, if it raised."""

    def notes(self, capacity: int) -> list[str]:
        """What a person should know: why rollouts of the file are not in the buffer."""
        count = len(self.trajectories)
        reasons = {
            f"replay.preload: left out {self.held_out} rollouts, whose prompts the evaluation asks": self.held_out,
            f"replay.preload: left out {self.unscored} rollouts, which reward.function could not score": self.unscored,
            f"replay.preload has {count} rollouts, of which the last {capacity} stay (replay.capacity)": count
            > capacity,
        }
        return [text for text, applies in reasons.items() if applies]


class _Logged(NamedTuple):
    """A row of the file. Its trajectory has no shaped reward yet, and no score if `scored` is False."""

    trajectory: Trajectory
    problem: Problem
    group: Any
    """The same for the rows of a group."""
    scored: bool


def rollout_rows(trajectories: list[Trajectory], groups: list[int]) -> list[Row]:
    """The rows of these trajectories of one iteration. `groups` has the number of each trajectory's prompt."""
    rows = []
    for t, group in zip(trajectories, groups, strict=True):
        start = len(t.prefix) + 1
        mask = t.action_mask[start:]
        row = {
            "iteration": t.iteration,
            "group": group,
            "prompt_ids": t.token_ids[:start].tolist(),
            "response_ids": t.token_ids[start:].tolist(),
            "reward": t.score,
            "finished": t.finished,
        }
        rows.append(row if mask.all() else row | {"action_mask": mask.tolist()})
    return rows


def load_rollouts(config: Config, components: Components) -> Preload:
    """Read the file replay.preload, which fills the buffer at the start. Any policy may have generated the rollouts.

    Rows without a reward are scored by reward.function. The rewards are shaped as replay.preload_shaping says. A
    trajectory has iteration 0, whatever its row says.

    Raises ValueError, with the row, for a file or row that cannot be read, for a key that is unknown, for token ids
    outside the model's vocabulary, for a rollout that is longer than the model's context, and for a row that
    reward.function could never score; ValueError if no rollout is left.
    """
    path = config.replay.preload
    assert path is not None, "replay.preload names no file"
    reader = _Reader(config, components)
    try:
        rows = []
        for number, row in enumerate(read_jsonl(path), 1):
            try:
                rows.append(reader.read(row))
            except ValueError as error:
                raise ValueError(f"{path}, row {number}: {error}") from None
        if not rows:
            raise ValueError(f"{path} has no rows")
        kept = [row for row in rows if tuple(row.problem.token_ids) not in components.held_out_prompts]
        if not kept:
            raise ValueError(f"{path}: every rollout answers a problem of the evaluation, which training must not use")
        scored, exceptions = _score(kept, components, path)
        _shape(scored, config, path)
    except ValueError as error:
        raise ValueError(f"replay.preload: {error}") from None
    return Preload([row.trajectory for row in scored], len(rows) - len(kept), len(kept) - len(scored), exceptions)


def _score(rows: list[_Logged], components: Components, path: str) -> tuple[list[_Logged], list[str]]:
    """The rows that have a score, after reward.function scored those without, and its first exception."""
    bare = [row for row in rows if not row.scored]
    if not bare:
        return rows, []
    assert components.reward_pool is not None, "with an environment, the reader refuses rows without a reward"
    responses = [
        Response(row.trajectory.token_ids[len(row.problem.token_ids) :].tolist(), row.trajectory.finished)
        for row in bare
    ]
    _, scores = score([row.problem for row in bare], responses, components.reward_pool, components.tokenizer)
    for row, reward in zip(bare, scores.rewards, strict=True):
        if reward is not None:
            row.trajectory.score = reward
    unscored = {id(row) for row, reward in zip(bare, scores.rewards, strict=True) if reward is None}
    exceptions = [scores.first_error] if scores.first_error else []
    if len(unscored) == len(rows):
        why = nothing_scored(len(rows), scores.errors, scores.timeouts, exceptions)
        raise ValueError(f"{path}: {why}")
    return [row for row in rows if id(row) not in unscored], exceptions


def _shape(rows: list[_Logged], config: Config, path: str) -> None:
    """Set the reward of each trajectory. Raises ValueError if the scores do not fit the shaping."""
    how = config.replay.preload_shaping
    how = config.reward.shaping if how == "same" else how
    groups = [row.group for row in rows]
    numbers = {group: n for n, group in enumerate(dict.fromkeys(groups))}
    if how in GROUPED and max(Counter(groups).values()) == 1:
        raise ValueError(
            f"{path}: every reward would be 0 with the shaping {how!r}, because every prompt has one response, which "
            "is its own mean; set replay.preload_shaping=plain to use the rewards as they are"
        )
    scores: list[float | None] = [row.trajectory.score for row in rows]
    shaped = shape_rewards(scores, [numbers[group] for group in groups], how, config.objective.beta)
    for row, reward in zip(rows, shaped, strict=True):
        assert reward is not None, "every row has a score"
        row.trajectory.reward = reward
        row.trajectory.group = -1 - numbers[row.group]  # the groups that this run generates have positive numbers


class _Reader:
    """Reads rows for one model. Every method raises ValueError, without the row, for what cannot be read."""

    def __init__(self, config: Config, components: Components):
        model: Any = components.model
        text = model.config.get_text_config()
        self._tokenizer, self._reward = components.tokenizer, config.reward.function
        self._environment = config.environment.name
        # The prompt of a log is what the model was asked. So the template is in it, and the system prompt too.
        self._data = replace(config.data, template="{question}", system_prompt=None)
        self._vocabulary: int = min(text.vocab_size, model.get_input_embeddings().weight.shape[0])
        self._context: int = getattr(text, "max_position_embeddings", None) or 1 << 30
        self._ends = end_tokens(model, components.tokenizer)

    def read(self, row: Row) -> _Logged:
        """The rollout of a row."""
        scored = "reward" in row
        _check_keys(row)
        finished, reward = row.get("finished", True), row.get("reward", 0)
        _need(type(finished) is bool, f"finished must be true or false; got {finished!r:.80}")
        for name in ("iteration", "group"):
            given = row.get(name)
            _need(given is None or type(given) is int, f"{name} must be a whole number; got {given!r:.80}")
        _need(type(reward) in (int, float), f"reward must be a number; got {reward!r:.80}")
        prompt, prompt_ids = self._prompt(row)
        response = self._response(row, finished)
        length = len(prompt_ids) + len(response)
        _need(length <= self._context, f"has {length} tokens, but the model's context has {self._context}")
        columns = {key: value for key, value in row.items() if key not in KEYS}
        if not scored:
            _need(not self._environment, "has no 'reward'; environment.name scores no logged response")
            try:
                check_columns(self._reward, columns)
            except ValueError as error:
                raise ValueError(
                    f"has no 'reward', and reward.function={self._reward} cannot score it: {error}"
                ) from None
        trajectory = Trajectory(
            token_ids=np.array(prompt_ids + response),
            action_mask=np.array([False] * len(prompt_ids) + _mask(row, len(response)), dtype=bool),
            reward=float(reward),
            score=float(reward),
            iteration=0,
            finished=finished,
        )
        group = (row.get("group", tuple(prompt_ids)), row.get("iteration"))
        return _Logged(trajectory, Problem(prompt, prompt_ids, columns), group, scored)

    def _prompt(self, row: Row) -> tuple[Any, list[int]]:
        """The prompt as the reward function gets it, and its token ids."""
        if "prompt_ids" in row:
            ids = self._ids("prompt_ids", row["prompt_ids"])
            return self._tokenizer.decode(ids), ids
        given = row["prompt"]
        _need(isinstance(given, str | list), f"prompt must be a text or a list of chat messages; got {given!r:.80}")
        prompt = make_prompt(given, self._data, self._tokenizer.chat_template is not None)
        ids = encode(prompt, self._tokenizer, self._data.chat_template_kwargs)
        return prompt, self._ids("prompt", ids)

    def _response(self, row: Row, finished: bool) -> list[int]:
        """The token ids of the response. A text gets its end-of-sequence token if it is finished and has none."""
        if "response_ids" in row:
            return self._ids("response_ids", row["response_ids"])
        text = row["response"]
        _need(isinstance(text, str), f"response must be a text; got {text!r:.80}")
        ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        if finished and not (ids and ids[-1] in self._ends):
            end = self._tokenizer.eos_token_id
            _need(
                end is not None, "response is a text, but the tokenizer has no end-of-sequence token; give response_ids"
            )
            ids = [*ids, end]
        return self._ids("response", ids)

    def _ids(self, name: str, ids: Any) -> list[int]:
        """`ids`, if they are token ids of the model. `name` is the key of the row."""
        allowed = f"{name} must be a list of at least one whole number from 0 to {self._vocabulary - 1}"
        if not name.endswith("_ids"):
            allowed = f"{name} must give at least one token, each from 0 to {self._vocabulary - 1}"
        _need(isinstance(ids, list) and len(ids) > 0, f"{allowed}; got {ids!r:.80}")
        for token in ids:
            _need(type(token) is int and 0 <= token < self._vocabulary, f"{allowed}; got {token!r:.80}")
        return ids


def _check_keys(row: Row) -> None:
    """Raise ValueError for a key that is missing, that is there twice, or that is unknown.

    A row without `reward` may have any other key, which is a column. Only a key that is nearly one of KEYS is refused.
    """
    scored = "reward" in row
    for key in row:
        if key not in KEYS:
            near = difflib.get_close_matches(key, KEYS, n=1, cutoff=0.5 if scored else CLOSE)
            if near or scored:
                hint = f"did you mean {near[0]!r}?" if near else f"the keys are {', '.join(KEYS)}"
                raise ValueError(f"unknown key {key!r}; {hint}")
    for ids, text in (PROMPT, RESPONSE):
        _need(ids in row or text in row, f"has no {ids!r} and no {text!r}")
        _need(ids not in row or text not in row, f"must have {ids!r} or {text!r}, not both")
    _need("action_mask" not in row or "response_ids" in row, "action_mask must come with response_ids, not with a text")


def _mask(row: Row, length: int) -> list[bool]:
    """The action mask of the response, which has `length` tokens."""
    mask = row.get("action_mask")
    if mask is None:
        return [True] * length
    booleans = isinstance(mask, list) and all(type(x) is bool or (type(x) is int and x in (0, 1)) for x in mask)
    _need(booleans, f"action_mask must be a list of true and false; got {mask!r:.80}")
    _need(
        len(mask) == length,
        f"action_mask must have one entry per token of the response ({length}), but has {len(mask)}",
    )
    return mask


def _need(ok: Any, message: str) -> None:
    if not ok:
        raise ValueError(message)
