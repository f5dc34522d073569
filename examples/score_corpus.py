"""Scoring a corpus by its endogenous reward: which texts, and which tokens, a language model finds wrong.

    python examples/score_corpus.py [--steps 150]

Needs torch and reval_kernels. The endogenous reward of the action a_h is e_h = Q(s_h, a_h) - V(s_{h+1})
(arXiv 2506.23235; docs/method.md section 2). Over a text it sums to V(s_1) + sum_h log pi(a_h|s_h): the `returns` of
the token values. Every text starts with the same token here, so V(s_1) is the same and the sums can be compared. For
texts of different lengths divide by the number of actions.

A small model is trained on right sums ("3+4=7"). Then a corpus of right and wrong sums is scored.
"""

import argparse

import torch
from torch import Tensor, nn

from reval_kernels import TokenValues, actions_and_mask, linear_token_values, td_targets

START, WORDS = "^", "^0123456789+="


class Model(nn.Module):
    def __init__(self, width: int = 64):
        super().__init__()
        self.embedding = nn.Embedding(len(WORDS), width)
        self.layers = nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, len(WORDS), bias=False)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        return self.layers(self.embedding(tokens_BT))[0]


def encode(texts: list[str]) -> Tensor:
    return torch.tensor([[WORDS.index(c) for c in START + text] for text in texts])


def values_of(model: Model, tokens_BT: Tensor) -> tuple[TokenValues, Tensor]:
    """Token values [B, T - 1], and the mask: every token after START is an action."""
    actions, mask = actions_and_mask(tokens_BT, torch.ones(len(tokens_BT), dtype=torch.long))
    return linear_token_values(model(tokens_BT)[:, :-1], model.head.weight, actions, mask=mask), mask


@torch.no_grad()
def score(model: Model, texts: list[str]) -> tuple[Tensor, Tensor]:
    """Each text's sum of endogenous rewards [B], and the endogenous reward of each of its tokens [B, T - 1]."""
    values, mask = values_of(model, encode(texts))
    # The model is its own reference, and no outcome reward enters.
    targets = td_targets(values, values, torch.zeros(len(texts)), mask=mask, beta=1.0)
    return values.returns(mask), targets.endogenous_reward


def main(steps: int) -> None:
    torch.manual_seed(0)
    right = [f"{a}+{b}={a + b}" for a in range(10) for b in range(10 - a)]
    wrong = [f"{a}+{b}={(a + b + 1 + a * b) % 10}" for a in range(10) for b in range(10 - a)]
    wrong = [text for text in wrong if text not in right]
    model, tokens_BT = Model(), encode(right)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        loss = -values_of(model, tokens_BT)[0].log_prob.mean()  # ordinary supervised training
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    corpus = right + wrong
    sums_B, rewards_BT = score(model, corpus)
    order = sums_B.argsort(descending=True).tolist()
    first = sum(corpus[i] in right for i in order[: len(right)])
    print(f"of the {len(right)} texts with the highest score, {first} are right")
    for i in [*order[:2], *order[-2:]]:
        tokens = "  ".join(f"{c} {e:+.1f}" for c, e in zip(corpus[i], rewards_BT[i].tolist(), strict=True))
        print(f"{corpus[i]}  score {sums_B[i]:+7.2f}   endogenous rewards: {tokens}")
    # The sum of a text's endogenous rewards is its return: the values between the first and the last state cancel.
    torch.testing.assert_close(rewards_BT.sum(1), sums_B, rtol=1e-4, atol=1e-4)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=150)
    torch.set_num_threads(1)
    main(parser.parse_args().steps)
