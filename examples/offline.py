"""Offline training: a tiny model learns from a JSONL file of logged rollouts, and generates nothing while it trains.

    python examples/offline.py [--log rollouts.jsonl] [--steps 200] [--seed 0]

Needs torch and reval_kernels. A row of the log has the token ids of a prompt and of a response, and a reward:

    {"prompt_ids": [4, 2, 5], "response_ids": [2, 4, 6], "reward": 1.0}

Nothing says how likely the response was: the loss has no importance ratio, so any policy may have written the log, or
people. Without --log the example makes a log: the prompt "4 2 =" asks for "2 4 END", and a third of the responses are
right, the others random.

Names end with their axes: B trajectories, T tokens of the longest one, V words, D hidden width.
"""

import argparse
import json
import random
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from reval_kernels import TokenValues, actions_and_mask, bellman_loss, linear_token_values

EQUALS, END, WORDS = 5, 6, 7  # tokens 0 to 4 are the digits
PROMPTS = [(a, b) for a in range(5) for b in range(5)]
BETA = 0.2
BATCH = 64


class Policy(nn.Module):
    """A small recurrent language model. It returns hidden states; the losses apply the head."""

    def __init__(self, width: int = 64):
        super().__init__()
        self.embedding = nn.Embedding(WORDS, width)
        self.layers = nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, WORDS, bias=False)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        return self.layers(self.embedding(tokens_BT))[0]  # [B, T, D]


def make_log(path: Path, rng: random.Random, rows: int = 1000) -> None:
    """Logged rollouts of a policy that is right a third of the time."""
    with path.open("w") as file:
        for _ in range(rows):
            a, b = rng.choice(PROMPTS)
            response = [b, a, END] if rng.random() < 1 / 3 else [rng.randrange(5), rng.randrange(5), END]
            row = {"prompt_ids": [a, b, EQUALS], "response_ids": response, "reward": float(response[:2] == [b, a])}
            file.write(json.dumps(row) + "\n")


def read_log(path: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens [B, T], padded on the right; actions and mask [B, T - 1]; rewards [B]."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    sequences = [torch.tensor(row["prompt_ids"] + row["response_ids"]) for row in rows]
    tokens_BT = pad_sequence(sequences, batch_first=True)
    real_BT = pad_sequence([torch.ones(len(s), dtype=torch.bool) for s in sequences], batch_first=True)
    prompt_lengths_B = torch.tensor([len(row["prompt_ids"]) for row in rows])
    actions, mask = actions_and_mask(tokens_BT, prompt_lengths_B, attention_mask=real_BT)
    return tokens_BT, actions, mask, torch.tensor([row["reward"] for row in rows])


@torch.no_grad()
def accuracy(policy: Policy) -> float:
    """Share of right responses, sampled at temperature 1: 20 to each of the 25 prompts."""
    tokens_BT = torch.tensor([[a, b, EQUALS] for a, b in PROMPTS]).repeat(20, 1)
    wanted = torch.tensor([[b, a, END] for a, b in PROMPTS]).repeat(20, 1)
    for _ in range(3):
        probabilities_BV = policy.head(policy(tokens_BT)[:, -1]).softmax(-1)
        tokens_BT = torch.cat([tokens_BT, torch.multinomial(probabilities_BV, 1)], 1)
    return (tokens_BT[:, 3:] == wanted).all(1).float().mean().item()


def main(options: argparse.Namespace, path: Path) -> None:
    torch.manual_seed(options.seed)
    if options.log is None:
        make_log(path, random.Random(options.seed))
    tokens_BT, actions, mask, rewards_B = read_log(path)
    policy = Policy()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-2)

    def values_of(rows: Tensor) -> TokenValues:
        return linear_token_values(policy(tokens_BT[rows])[:, :-1], policy.head.weight, actions[rows], mask=mask[rows])

    # First imitate the log, good responses and bad ones. ReVal then raises what was rewarded above this reference. (A
    # reference that does not write what the log holds leaves V undetermined: docs/method.md section 6.)
    for _ in range(options.steps // 2):
        rows = torch.randperm(len(tokens_BT))[:BATCH]
        step(policy, optimizer, -values_of(rows).log_prob.sum() / mask[rows].sum())
    print(f"accuracy: {(rewards_B > 0).float().mean():.2f} in the log, {accuracy(policy):.2f} of its imitation")

    # The reference enters the loss as one number for each trajectory, so it runs once over the log, and never again.
    with torch.no_grad():
        returns_B = values_of(torch.arange(len(tokens_BT))).returns(mask)
    for i in range(1, options.steps + 1):
        rows = torch.randperm(len(tokens_BT))[:BATCH]
        loss, residual_B = bellman_loss(values_of(rows), returns_B[rows], rewards_B[rows], mask=mask[rows], beta=BETA)
        step(policy, optimizer, loss)
        if i % 50 == 0:
            print(f"step {i:4d}  loss {loss:7.3f}  |residual| {residual_B.abs().mean():.3f}")
    print(f"accuracy: {accuracy(policy):.2f} after training with ReVal")


def step(policy: Policy, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
    optimizer.step()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--log", type=Path, help="JSONL of rollouts with the tokens 0 to 6; default: make one")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)  # more threads make operations this small slower
    with tempfile.TemporaryDirectory() as folder:
        main(options, options.log or Path(folder, "rollouts.jsonl"))
