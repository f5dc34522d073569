"""The actor: gives the policy's responses to problems, in one turn, or in several turns with an environment.

Token ids are never decoded and encoded again: what the model reads in its second turn are the tokens that it sampled
in its first one, and after them the environment's messages in the chat template.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from ..config import Config
from ..data import Problem
from ..environments import Conversation, EnvironmentPool
from ..prompts import encode, encode_turn
from .protocol import Episode, Response, RolloutEngine

TURN_SEED = 24  # each turn samples with another seed: the turn's number is in the bits above these


class Actor:
    """Responds to problems with a rollout engine.

    Args:
        engine: samples the model's turns.
        config: all settings.
        tokenizer: that of the policy.
        environments: runs environment.name. None: each response is one turn. The problems of benchmarks always have
            one turn.
        context: maximum number of tokens of the model's context.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        config: Config,
        tokenizer: PreTrainedTokenizerBase,
        environments: EnvironmentPool | None = None,
        context: int = 1 << 30,
    ):
        self._engine, self._config, self._tokenizer = engine, config, tokenizer
        self._environments, self._context = environments, context
        self._lock = threading.Lock()

    def respond(
        self, problems: list[Problem], *, responses: int, temperature: float, seed: int
    ) -> list[list[Response]]:
        """`responses` responses to each problem. The same seed, problems and weights give the same responses.

        An environment that fails costs its own response: `Episode.reward` is then None.
        """
        out: list[list[Response]] = [[] for _ in problems]
        alone = [i for i, p in enumerate(problems) if self._environments is None or p.benchmark is not None]
        if alone:
            found = self._generate([problems[i].token_ids for i in alone], responses, temperature, seed)
            for i, group in zip(alone, found, strict=True):
                out[i] = group
        in_turns = sorted(set(range(len(problems))) - set(alone))
        if in_turns:
            assert self._environments is not None, "without environments every problem has one turn"
            with self._lock:  # a thread generates ahead while the main thread evaluates
                found = self._episodes(
                    self._environments, [problems[i] for i in in_turns], responses, temperature, seed
                )
            for i, group in zip(in_turns, found, strict=True):
                out[i] = group
        return out

    def _generate(self, prompts: list[list[int]], count: int, temperature: float, seed: int) -> list[list[Response]]:
        return self._engine.generate(
            prompts,
            responses=count,
            max_new_tokens=self._config.rollout.max_new_tokens,
            temperature=temperature,
            seed=seed,
        )

    def _episodes(
        self, environments: EnvironmentPool, problems: list[Problem], count: int, temperature: float, seed: int
    ) -> list[list[Response]]:
        """The loop of turns. All conversations take their turn together."""
        groups = [[_Episode(_conversation(problem)) for _ in range(count)] for problem in problems]
        episodes = [episode for group in groups for episode in group]
        environments.start()
        environments.advance([e.conversation for e in episodes])
        for episode in episodes:
            self._begin(episode)
        for turn in range(self._config.environment.max_turns):
            going = [e for e in episodes if e.going]
            if not going:
                break
            for e, response in zip(
                going, self._turn(groups, going, temperature, seed + (turn << TURN_SEED)), strict=True
            ):
                self._say(e, response)
            environments.advance([e.conversation for e in going])
            for e in going:
                self._hear(e, last=turn + 1 == self._config.environment.max_turns)
        return [[e.response() for e in group] for group in groups]

    def _turn(
        self, groups: list[list[_Episode]], going: list[_Episode], temperature: float, seed: int
    ) -> list[Response]:
        """The model's turn in each of the conversations `going`."""
        contexts = [e.prompt_ids + e.token_ids for e in going]
        count = len(groups[0])
        alike = all(contexts[i] == contexts[i - i % count] for i in range(len(contexts)))
        if len(going) == len(groups) * count and alike:  # as in the first turn: an engine reads such a prompt once
            return [r for group in self._generate(contexts[::count], count, temperature, seed) for r in group]
        return [group[0] for group in self._generate(contexts, 1, temperature, seed)]

    def _begin(self, episode: _Episode) -> None:
        """Encode the environment's first messages."""
        said = episode.conversation
        if not said.lost:
            try:
                ids = encode(said.observations[0], self._tokenizer, self._config.data.chat_template_kwargs)
                if not self._fits(len(ids), 0):
                    raise ValueError(
                        f"the messages of reset have {len(ids)} tokens; with rollout.max_new_tokens more they exceed "
                        f"the model's context of {self._context}"
                    )
                episode.prompt_ids = ids
            except ValueError as error:
                said.error = str(error)
        episode.going = not said.lost

    def _say(self, episode: _Episode, response: Response) -> None:
        """Add a turn of the model. The environment gets it as text without the end-of-sequence token."""
        ids = response.token_ids
        episode.token_ids += ids
        episode.action_mask += [True] * len(ids)
        episode.turns += 1
        episode.end = ids[-1] if response.finished else None
        shown = ids[:-1] if response.finished else ids
        episode.conversation.completions.append(str(self._tokenizer.decode(shown, skip_special_tokens=False)))

    def _hear(self, episode: _Episode, last: bool) -> None:
        """Add what the environment answered, if the model has another turn.

        A turn starts only if it fits whole: into the model's context, and with all tokens of the trajectory into
        environment.max_tokens. A turn that reached rollout.max_new_tokens is passed on as it is: the tokens that follow
        end the model's message.
        """
        said = episode.conversation
        episode.finished, episode.going = said.done, False
        if said.lost or said.done or last:
            return
        try:
            ids = encode_turn(said.observations[-1], self._tokenizer, self._config.data.chat_template_kwargs)
        except ValueError as error:
            said.error = str(error)
            return
        if episode.end in ids[:2]:  # the model has sampled the end of its message itself
            ids = ids[ids.index(episode.end) + 1 :]
        if self._fits(len(episode.prompt_ids), len(episode.token_ids) + len(ids)):
            episode.token_ids += ids
            episode.action_mask += [False] * len(ids)
            episode.going = True

    def _fits(self, prompt: int, after: int) -> bool:
        after += self._config.rollout.max_new_tokens
        return prompt + after <= self._context and after <= self._config.environment.max_tokens


@dataclass(slots=True, eq=False)
class _Episode:
    """A conversation as the model sees it: token ids."""

    conversation: Conversation
    prompt_ids: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    """Everything after the prompt."""
    action_mask: list[bool] = field(default_factory=list)
    turns: int = 0
    end: int | None = None
    """The end-of-sequence token of the last turn. None if the turn was cut off."""
    finished: bool = False
    going: bool = False
    """The model has another turn."""

    def response(self) -> Response:
        said = self.conversation
        reward = None if said.lost else said.reward
        episode = Episode(self.prompt_ids, self.action_mask, self.turns, reward, said.error)
        return Response(self.token_ids, self.finished, episode)


def _conversation(problem: Problem) -> Conversation:
    return Conversation(problem.columns | {"prompt": problem.prompt})
