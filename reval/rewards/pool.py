"""Runs a reward function in worker processes, which can be killed (workers.py).

`RewardPool` is what the trainer calls. `_Job` keeps the state of one call to `score` or `extract`. `_load` and the
functions below it run in the worker processes.
"""

import math
import reprlib
from collections import deque
from dataclasses import dataclass
from functools import partial
from typing import Any

from reval.rewards.answers import Extractor, extractor_of
from reval.rewards.verifiers import RewardError, RewardFunction, resolve
from reval.workers import Run, Task, Worker, Workers

_MOST_IN_A_CHUNK = 16  # a larger chunk saves no more time on messages, and a timeout repeats the whole chunk


@dataclass(slots=True)
class Scores:
    """The rewards of a list of completions.

    Attributes:
        rewards: one per completion, in order. None if the function returned None, raised, or was killed.
        timeouts: number of completions that reached the time limit.
        errors: number of completions for which the function raised or the process died.
        first_error: text about the failed completion with the lowest index, with a short traceback. If `errors` is 0
            but the function raised for a chunk and then scored each completion of the chunk alone: the traceback of
            the chunk. Otherwise None.
    """

    rewards: list[float | None]
    timeouts: int
    errors: int
    first_error: str | None


class AllFailedError(RewardError):
    """The function failed for every one of at least two completions: it is wrong, or these completions belong to a row
    that it cannot score. `scores` counts the failures."""

    def __init__(self, message: str, scores: Scores):
        super().__init__(message)
        self.scores = scores


class RewardPool:
    """Worker processes that score completions with one reward function.

    The pool sends completions to the workers in chunks. A chunk fails if it takes longer than `timeout`, raises, or
    kills its process. The completions of a failed chunk are then scored one by one, so that only the faulty completion
    loses its reward. The function may thus get a completion twice. If every completion hangs, one call takes about
    `timeout * completions / workers` seconds.

    `Workers` says what a program that uses a pool must respect. Use a pool from one thread at a time.

    Args:
        function: spec for `resolve`: a registered name, "package.module:function" or "path/to/file.py:function".
        workers: number of processes, at least 1.
        timeout: maximum number of seconds for one completion.

    Raises:
        RewardError: `function` cannot be found or loaded.
        ValueError: `workers` or `timeout` out of range.
    """

    def __init__(self, function: str, *, workers: int = 2, timeout: float = 10.0) -> None:
        self._function = function
        self._count = workers
        self._workers = Workers(
            _load, function, f"reward function {function!r}", count=workers, timeout=timeout, error=RewardError
        )

    def score(
        self,
        prompts: list[str | list[dict]],
        completions: list[str],
        completion_ids: list[list[int]],
        columns: dict[str, list],
    ) -> Scores:
        """Score completions; see `Scores`.

        Args:
            prompts: one per completion.
            completions: decoded texts.
            completion_ids: token ids of each completion.
            columns: the other columns of the data set by name, each with one entry per completion.

        Raises:
            RewardError: the function did not return a list with one finite number or None per completion.
            AllFailedError: the function failed for every one of at least two completions: then the function or a column
                is wrong. (A failure for a single completion may have either cause, and is only counted in `errors`.)
            ValueError: lengths differ, or a column has the name of another argument.
        """
        return self._do(
            _Job("score", self._function, prompts, completions, completion_ids, columns, workers=self._count)
        )

    def extract(self, completions: list[str]) -> list[str | None] | None:
        """The final answer of each completion, for majority votes. None if the reward function has no extractor.

        The extractor runs in the workers, under the time limit of `score`. The answer is None where the extractor
        returned None, raised or was killed.

        Raises:
            RewardError: the extractor returned something else than text or None, or failed for every one of at least
                two completions.
        """
        if not self._workers.information:
            return None
        nothing: list = [None] * len(completions)
        return self._do(_Job("extract", self._function, nothing, completions, nothing, {}, workers=self._count)).rewards

    def _do(self, job: "_Job") -> Any:
        self._workers.do(job)
        return job.result()

    def close(self) -> None:
        """Kill the workers. A second call does nothing."""
        self._workers.close()

    def __enter__(self) -> "RewardPool":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class _Job:
    """State of one call to `score` or `extract`: the queue of chunks not yet sent, and the results so far."""

    def __init__(
        self,
        what: str,
        function: str,
        prompts: list,
        completions: list,
        completion_ids: list,
        columns: dict,
        *,
        workers: int,
    ) -> None:
        own = {"prompts": prompts, "completions": completions, "completion_ids": completion_ids}
        for name in columns:
            if name in own:
                raise ValueError(f"columns must not have a column {name!r}: that is the name of another argument")
        count = len(completions)
        for name, values in {**own, **columns}.items():
            if len(values) != count:
                raise ValueError(f"{name} must have one entry per completion ({count}), but has {len(values)}")
        self.what = what
        self._name = _name(what, function)
        self._inputs = (prompts, completions, completion_ids)
        self._columns = columns
        self._scores = Scores(rewards=[None] * count, timeouts=0, errors=0, first_error=None)
        self._first_failure: int = count
        self._chunk_error: str | None = None
        # About four chunks per worker, so that at the end no worker waits long for the slowest one.
        size = max(1, min(_MOST_IN_A_CHUNK, math.ceil(count / (4 * workers))))
        self._queue = deque(list(range(start, min(start + size, count))) for start in range(0, count, size))

    def waiting(self) -> bool:
        """See Job.waiting."""
        return bool(self._queue)

    def take(self, worker: Worker) -> Task | None:
        """See Job.take. The message is (what, indices, inputs, columns) of a chunk of completions, for `_run`."""
        if not self._queue:
            return None
        indices = self._queue.popleft()
        inputs = [[values[i] for i in indices] for values in self._inputs]
        columns = {name: [values[i] for i in indices] for name, values in self._columns.items()}
        return Task(indices, (self.what, indices, inputs, columns))

    def record(self, indices: list[int], worker: Worker, kind: str, value: Any) -> None:
        """See Job.record. The value holds rewards, or the reason why there are none."""
        scores = self._scores
        if kind == "invalid":
            raise RewardError(value)
        if kind == "scored":
            for index, reward in zip(indices, value, strict=True):
                scores.rewards[index] = reward
        elif len(indices) > 1:
            self._queue.extend([index] for index in indices)
            if kind == "raised" and self._chunk_error is None:
                self._chunk_error = f"{len(indices)} completions at once raised, each alone did not:\n{value}"
        elif kind == "late":
            scores.timeouts += 1
        else:
            scores.errors += 1
            if indices[0] < self._first_failure:
                self._first_failure = indices[0]
                scores.first_error = f"{_name_completion(indices[0], self._inputs[1][indices[0]])}: {value}"

    def result(self) -> Scores:
        scores, count = self._scores, len(self._scores.rewards)
        if scores.errors == count > 1:
            raise AllFailedError(
                f"{self._name} failed for all {count} completions; the first was {scores.first_error}", scores
            )
        if scores.errors == 0:
            scores.first_error = self._chunk_error
        return scores


def _name(what: str, function: str) -> str:
    return ("" if what == "score" else "extract_answer of ") + f"reward function {function!r}"


def _name_completion(index: int, completion: str) -> str:
    text = completion if len(completion) <= 200 else f"{completion[:100]} ... {completion[-100:]}"
    return f"completion {index} ({text!r})"


# The functions below run in the worker process.


def _load(function: str) -> tuple[bool, Run]:
    """The reward function, ready to run, and whether it has an extractor. See workers.Load."""
    reward = resolve(function)
    extractor = extractor_of(function, reward)
    return extractor is not None, partial(_run, reward, extractor, function)


def _run(reward: RewardFunction, extractor: Extractor | None, function: str, message: Any) -> tuple[str, Any]:
    """Do one task. Returns ("scored", results) or ("invalid", message about the results)."""
    what, indices, (prompts, completions, completion_ids), columns = message
    if what == "extract":
        assert extractor is not None, "the pool asks only a function with an extractor"
        result: object = [extractor(completion) for completion in completions]
    else:
        result = reward(prompts, completions, completion_ids, **columns)
    try:
        check = _checked_answers if what == "extract" else _checked
        return "scored", check(result, function, indices, completions)
    except RewardError as error:
        return "invalid", str(error)


def _checked_answers(result: Any, function: str, indices: list[int], completions: list[str]) -> list[str | None]:
    """The extracted answers. RewardError unless each is text or None."""
    for index, completion, answer in zip(indices, completions, result, strict=True):
        if answer is not None and not isinstance(answer, str):
            raise RewardError(
                f"{_name('extract', function)} must return text or None, but returned {reprlib.repr(answer)} "
                f"({type(answer).__name__}) for {_name_completion(index, completion)}"
            )
    return result


def _checked(result: object, function: str, indices: list[int], completions: list[str]) -> list[float | None]:
    """The rewards as floats. RewardError unless `result` is a list with one finite number or None per completion."""
    name, got = f"reward function {function!r}", reprlib.repr(result)
    if not isinstance(result, list):
        raise RewardError(
            f"{name} must return a list with one number or None per completion, but returned "
            f"{type(result).__name__}: {got}"
        )
    if len(result) != len(completions):
        raise RewardError(f"{name} must return one reward per completion ({len(completions)}), but returned {got}")
    rewards: list[float | None] = []
    for index, completion, value in zip(indices, completions, result, strict=True):
        try:
            # Text is refused here, because float() would accept the text "1.0".
            reward = value if value is None else math.nan if isinstance(value, str | bytes) else float(value)
        except (TypeError, ValueError, OverflowError):
            reward = math.nan
        if reward is not None and not math.isfinite(reward):
            raise RewardError(
                f"{name} must return finite numbers or None, but returned {reprlib.repr(value)} "
                f"({type(value).__name__}) for {_name_completion(index, completion)}"
            )
        rewards.append(reward)
    return rewards
