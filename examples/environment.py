"""An environment of your own: write a word backwards, in three tries. After each try the model is told what was right.

Train the tiny random model on it, from the root of the repository:

    reval train configs/guessing.yaml environment.name=examples/environment.py:Backwards environment.max_turns=3 \\
        rollout.max_new_tokens=2 data.options.letters=ab data.options.length=2 replay.updates_per_iteration=4 \\
        run.iterations=100 run.dir=runs/backwards

The protocol is in reval/environments/protocol.py. The class needs no import from reval.
"""

import random


class Backwards:
    """The column `word` holds the word."""

    def __init__(self, tries=3):  # environment.options.tries
        self.tries = tries

    def reset(self, problem):
        """The first messages of the conversation."""
        self.target, self.left = problem["word"][::-1], self.tries
        return [{"role": "user", "content": f"Write {problem['word']} backwards."}]

    def step(self, completion):
        """(messages, reward, done): the answer to a completion."""
        said = completion.strip()
        self.left -= 1
        if said == self.target:
            return [], 1.0, True
        seen = "".join(b if a == b else "?" for a, b in zip(said.ljust(len(self.target)), self.target, strict=False))
        share = 1 - seen.count("?") / len(seen)  # the last try may be right in part
        return [{"role": "user", "content": seen}], share if self.left == 0 else 0.0, self.left == 0

    @staticmethod
    def problems(count, seed, letters="abcdefgh", length=3):  # data.options.letters, data.options.length
        """The rows of data.source=environment."""
        draw = random.Random(seed)
        words = ("".join(draw.choices(letters, k=length)) for _ in range(count))
        return [{"prompt": f"word {number}", "word": word} for number, word in enumerate(words)]
