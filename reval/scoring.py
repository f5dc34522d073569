"""Scoring: from the responses of one iteration to trajectories with shaped rewards.

Each process scores its share of the responses. Afterwards every process holds all trajectories.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import mean
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from .components import Components
from .config import Config
from .data import Problem, Prompt
from .replay import Trajectory
from .rewards import AllFailedError, RewardError, RewardPool, Scores
from .rewards.shaping import reward_metrics, shape_rewards
from .rollout import Response
from .rollout.generation import Rollouts


class ScoredResponse(NamedTuple):
    """A response of one iteration and its score. The token ids are in the trajectories."""

    group: int
    """Number of the prompt within the iteration: the same for all responses to one prompt."""
    prompt: Prompt
    text: str
    score: float | None
    """The raw reward. None if the reward function could not score the response."""
    length: int
    """Number of the model's own tokens, the end-of-sequence token included."""
    finished: bool
    """False if the limit of length or turns cut the response off."""
    turns: int | None
    """Number of the model's turns. None without an environment."""


@dataclass(frozen=True, slots=True)
class ScoredRollouts:
    """All responses of one iteration, of all processes, with their scores."""

    trajectories: list[Trajectory]
    """The responses that have a score, with shaped rewards. Empty after a failure."""
    failure: str
    """The error message if the scores do not fit reward.shaping, else empty. The caller records the responses, then
    raises the error."""
    responses: list[ScoredResponse]
    """All responses, those without a score too."""
    lag: int
    """See Rollouts.lag."""
    timeouts: int
    """Responses without a score because scoring took longer than reward.timeout."""
    errors: int
    """Responses without a score because the reward function raised or its process died."""
    exceptions: list[str]
    """`Scores.first_error` of each process that has a first error."""

    def unscored(self) -> str:
        """What to say when no response has a score."""
        in_turns = any(r.turns is not None for r in self.responses)
        return nothing_scored(len(self.responses), self.errors, self.timeouts, self.exceptions, in_turns)

    def groups(self) -> list[int]:
        """The group of each trajectory."""
        return [r.group for r in self.responses if r.score is not None] if self.trajectories else []

    def samples(self) -> list[tuple[Prompt, str, float | None]]:
        """(prompt, text, score) of each response."""
        return [(r.prompt, r.text, r.score) for r in self.responses]

    def metrics(self) -> dict[str, float]:
        """`reward`, `completions/...`, `num_tokens`, ...: all that is known before the updates. {} for NOTHING."""
        if not self.responses:
            return {}
        lengths = [r.length for r in self.responses]
        return (
            reward_metrics([r.score for r in self.responses], [r.group for r in self.responses])
            | {
                "completions/mean_length": sum(lengths) / len(lengths),
                "completions/max_length": max(lengths),
                "completions/clipped_ratio": sum(not r.finished for r in self.responses) / len(self.responses),
                "num_tokens": sum(lengths),
                "rollout/lag": self.lag,
                "reward_timeouts": self.timeouts,
                "reward_errors": self.errors,
            }
            | self._turns()
        )

    def _turns(self) -> dict[str, float]:
        turns = [r.turns for r in self.responses if r.turns is not None]
        return {"completions/mean_turns": mean(turns)} if turns else {}


NOTHING = ScoredRollouts(trajectories=[], failure="", responses=[], lag=0, timeouts=0, errors=0, exceptions=[])
"""The scored rollouts of an iteration that generates nothing (rollout.engine=none)."""


def score_rollouts(rollouts: Rollouts, iteration: int, config: Config, components: Components) -> ScoredRollouts:
    """Score the responses, shape the rewards and make the trajectories. Every process has to call this.

    Raises RewardError on every process when the reward function returns something else than rewards on one of them. A
    response for which the function fails has no score; the caller decides when there are too many of them.
    """
    world = components.world
    own_groups = list(zip(world.share(rollouts.problems), rollouts.own, strict=True))
    own = [(problem, response) for problem, group in own_groups for response in group]
    texts, scores, failure = [""] * len(own), Scores([None] * len(own), 0, 0, None), ""
    try:
        texts, scores = score(
            [problem for problem, _ in own],
            [response for _, response in own],
            components.reward_pool,
            components.tokenizer,
        )
    except RewardError as error:
        failure = str(error)
    # All processes raise together. If one raised alone, the others would wait for it in the next collective.
    reports = world.gather((failure, scores.timeouts, scores.errors, scores.first_error))
    for message, *_ in reports:
        if message:
            raise RewardError(message)
    n = config.rollout.responses
    rows = [(response, text, reward) for (_, response), text, reward in zip(own, texts, scores.rewards, strict=True)]
    groups = world.join([rows[i : i + n] for i in range(0, len(rows), n)])  # in the order of rollouts.problems
    everyones = [
        (
            problem,
            response,
            _scored_response(number, problem, response, text, raw, components.tokenizer),
        )
        for number, (problem, group) in enumerate(zip(rollouts.problems, groups, strict=True))
        for response, text, raw in group
    ]
    trajectories: list[Trajectory] = []
    try:
        trajectories = _trajectories(everyones, iteration, config)
    except ValueError as error:
        failure = f"reward.shaping={config.reward.shaping}: {error}"
    return ScoredRollouts(
        trajectories=trajectories,
        failure=failure,
        responses=[scored for _, _, scored in everyones],
        lag=rollouts.lag,
        timeouts=sum(timeouts for _, timeouts, _, _ in reports),
        errors=sum(errors for _, _, errors, _ in reports),
        exceptions=[exception for *_, exception in reports if exception],
    )


def _scored_response(
    group: int, problem: Problem, response: Response, text: str, score: float | None, tokenizer: PreTrainedTokenizerBase
) -> ScoredResponse:
    prompt, turns, episode = problem.prompt, None, response.episode
    if episode is not None:  # the environment's first messages are what the model was asked
        prompt, turns = str(tokenizer.decode(episode.prompt_ids)), episode.turns
    return ScoredResponse(group, prompt, text, score, response.length, response.finished, turns)


def score(
    problems: list[Problem], responses: list[Response], pool: RewardPool | None, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[str], Scores]:
    """Decode one response to each of the problems, and score the texts. A problem may occur several times. Responses
    of several turns have their scores from the environment, and the texts hold all turns; they need no `pool`.

    The reward function and people read the texts, which leave out only the end-of-sequence token at the end. If other
    special tokens were hidden, `<|user|>7` would be rewarded as 7. Training uses the token ids.
    """
    ids, special = [response.token_ids for response in responses], set(tokenizer.all_special_ids)
    shown = [r.token_ids[:-1] if r.finished and r.token_ids[-1] in special else r.token_ids for r in responses]
    texts = tokenizer.batch_decode(shown, skip_special_tokens=False) if ids else []  # [] would decode to one empty text
    if pool is None:
        return texts, _environment_scores(responses)
    names = sorted({name for p in problems for name in p.columns})
    columns = {name: [p.columns.get(name) for p in problems] for name in names}
    try:
        return texts, pool.score([p.prompt for p in problems], texts, ids, columns)
    except AllFailedError as error:  # these problems may be the only ones that the function cannot score
        return texts, error.scores


def _environment_scores(responses: list[Response]) -> Scores:
    """The rewards and the failures of the environments."""
    episodes = [r.episode for r in responses if r.episode is not None]
    assert len(episodes) == len(responses), "without a reward pool, every response has several turns"
    errors = [e.error for e in episodes if e.error]
    lost = sum(e.reward is None for e in episodes)
    return Scores([e.reward for e in episodes], lost - len(errors), len(errors), next(iter(errors), None))


def _trajectories(
    responses: list[tuple[Problem, Response, ScoredResponse]], iteration: int, config: Config
) -> list[Trajectory]:
    """The responses that have a score, as trajectories. Raises ValueError if the scores do not fit reward.shaping."""
    raws, groups = [scored.score for _, _, scored in responses], [scored.group for _, _, scored in responses]
    out = []
    shaped = shape_rewards(raws, groups, config.reward.shaping, config.objective.beta)
    first = iteration << 32  # the number of this iteration's first group, also after rollout.prompts has changed
    for (problem, response, scored), raw, reward in zip(responses, raws, shaped, strict=True):
        if reward is not None and raw is not None:
            prompt, mask = problem.token_ids, [True] * len(response.token_ids)
            if response.episode is not None:
                prompt, mask = response.episode.prompt_ids, response.episode.action_mask
            out.append(
                Trajectory(
                    token_ids=np.array(prompt + response.token_ids),
                    action_mask=np.array([False] * len(prompt) + mask),
                    reward=reward,
                    score=raw,
                    iteration=iteration,
                    group=first + scored.group,
                    finished=response.finished,
                )
            )
    return out


def nothing_scored(responses: int, errors: int, timeouts: int, exceptions: list[str], in_turns: bool = False) -> str:
    """An error message: why none of the responses has a score. The arguments are as in ScoredRollouts; `in_turns`: an
    environment gives the scores."""
    reasons = {
        f"the {'environment' if in_turns else 'reward function'} raised or its process died": errors,
        f"{'an answer' if in_turns else 'scoring'} took longer than "
        f"{'environment' if in_turns else 'reward'}.timeout": timeouts,
        "the reward function returned None, so it may not accept the row's answer": responses - errors - timeouts,
    }
    text = "; ".join(f"for {count}, {reason}" for reason, count in reasons.items() if count)
    return f"none of {responses} responses has a score: {text}" + (f"\n{exceptions[0]}" if exceptions else "")
