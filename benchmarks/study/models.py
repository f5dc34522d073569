"""Base models of the fast tasks: the built-in tiny model, trained to answer as a chatty model would.

A base model knows the answers in part, and says too much: it is what SmolLM2 is in configs/demo.yaml, a thousand times
smaller. The training is plain supervised learning on sampled texts, so the model's distribution is close to that of the
texts, and the success rate before reinforcement learning follows from the recipe.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import json
import random
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

VERSION = 5
"""Part of the key of every model. Raise it when the texts or the training change."""
WORDY = ("It is {}.", "{}, I think", "{question}{}!", "The sum is {}.", "{} of course", "That makes {}.", "{} or so")
NUMBERS = 13
"""How many numbers an answer of the family `count` has: 38 characters and the end."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a base model is made of."""

    family: str
    """sums: "37+4=", and the answer is "41". count: "37:", and the answer is the next 13 numbers."""
    bare: float = 1.0
    """sums: the probability of an answer without words."""
    right: float = 0.95
    """The probability of a right number; count: of each number."""
    steps: int = 1500
    seed: int = 0

    @property
    def key(self) -> str:
        return hashlib.sha256(json.dumps([VERSION, asdict(self)]).encode()).hexdigest()[:12]


def questions(family: str) -> list[tuple[str, str]]:
    """All pairs (question, right answer) of a family.

    A model of this size learns a rule for the units and one for the tens. With the 100 sums of one-digit numbers it
    learned each sum alone, and training on 80 of them made the model forget the 20 others.
    """
    if family == "sums":
        return [(f"{a}+{b}=", str(a + b)) for a in range(10, 50) for b in range(10)]
    return [
        (f"{start}:", " ".join(str(start + i) for i in range(1, NUMBERS + 1))) for start in range(10, 100 - NUMBERS)
    ]


def _sum_text(question: str, answer: str, recipe: Recipe, rng: random.Random) -> str:
    number = int(answer)
    if rng.random() > recipe.right:
        number = max(0, number + rng.choice((-2, -1, 1, 2)))
    form = "{}" if rng.random() < recipe.bare else rng.choice(WORDY)
    return form.format(number, question=question)


def _count_text(question: str, answer: str, recipe: Recipe, rng: random.Random) -> str:
    """An error repeats a number or leaves one out, and the counting goes on from there."""
    numbers = [int(question[:-1])]
    for _ in range(NUMBERS):
        step = 1 if rng.random() < recipe.right else rng.choice((0, 2))
        numbers.append(min(99, numbers[-1] + step))
    return " ".join(map(str, numbers[1:]))


TEXTS: dict[str, Callable[[str, str, Recipe, random.Random], str]] = {"sums": _sum_text, "count": _count_text}


@contextmanager
def locked(target: Path) -> Iterator[None]:
    """Hold a lock while `target` is made: another study may make it at this moment."""
    with open(target.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def base_model(recipe: Recipe, folder: Path) -> Path:
    """The folder of the trained model, as model.name loads it. The first call trains it: less than a minute."""
    target = folder / "models" / recipe.key
    target.parent.mkdir(parents=True, exist_ok=True)
    with locked(target):
        if not target.exists():
            unfinished = target.with_suffix(".unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            start = time.monotonic()
            print(f"training the base model {recipe.key}: {recipe}", flush=True)
            _train(recipe, unfinished)
            (unfinished / "recipe.json").write_text(json.dumps(asdict(recipe), indent=1) + "\n")
            unfinished.rename(target)
            print(f"  {time.monotonic() - start:.0f} s", flush=True)
    return target


def _train(recipe: Recipe, target: Path, batch: int = 32) -> None:
    import torch  # here, because worker processes import this module too

    from reval.model.builtin import tiny_model

    model, tokenizer = tiny_model(recipe.seed)
    rng, asked = random.Random(recipe.seed), questions(recipe.family)
    prompts = {question: _prompt(question, tokenizer) for question, _ in asked}

    @functools.cache
    def tokens(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]

    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=recipe.steps)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(recipe.steps):
            chosen = [rng.choice(asked) for _ in range(batch)]
            texts = [(question, TEXTS[recipe.family](question, answer, recipe, rng)) for question, answer in chosen]
            ids, labels = _padded(
                [(prompts[question], tokens(text)) for question, text in texts], tokenizer.pad_token_id
            )
            loss = model(input_ids=ids, labels=labels).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    finally:
        torch.set_num_threads(threads)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def _prompt(question: str, tokenizer: Any) -> list[int]:
    message = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=True, return_dict=False)


def _padded(chats: list[tuple[list[int], list[int]]], pad: int) -> tuple[Tensor, Tensor]:
    """Token ids and labels of pairs (prompt, answer), each [chats, longest]. A label of -100 is not learned.

    The padding is on the right and needs no mask: with causal attention, nothing before it reads it.
    """
    import torch

    longest = max(len(prompt) + len(answer) for prompt, answer in chats)
    ids = torch.full((len(chats), longest), pad)
    labels = torch.full_like(ids, -100)
    for row, (prompt, answer) in enumerate(chats):
        end = len(prompt) + len(answer)
        ids[row, :end] = torch.tensor(prompt + answer)
        labels[row, len(prompt) : end] = torch.tensor(answer)
    return ids, labels
