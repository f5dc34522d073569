"""A loss of your own: arithmetic on the (q, v, log_prob) of each token, and autograd does the rest.

    python examples/own_loss.py

Needs torch and reval_kernels. The loss is ReVal with Huber in place of the square, so a few wrong rewards pull less.
The policy is a table: one row of logits for each of H states, so every response has the same states. A response is
right if each action is the number of its state. The reward is the fraction of right actions. But 2% of the rewards are
wrong: random numbers from 0 to 100.
"""

import math

import torch
from torch import Tensor

from reval_kernels import BellmanLoss, TokenValues, bellman_loss, token_values

H, WORDS, B = 4, 8, 256  # actions of a response, words, responses
BETA = 0.05


def huber_loss(values: TokenValues, reference: TokenValues, rewards_B: Tensor, width: float) -> BellmanLoss:
    """huber(V(s_1) - V_ref(s_1) + sum_h (log pi - log pi_ref) - r / beta): squared near 0, linear beyond `width`."""
    residual_B = values.returns() - reference.returns() - rewards_B / BETA
    loss = torch.nn.functional.huber_loss(residual_B, torch.zeros_like(residual_B), delta=width)
    return BellmanLoss(2 * loss, residual_B)  # twice, so that a wide one is the loss of ReVal


def check_gradient() -> None:
    """With a large width the loss and its gradient are those of ReVal."""
    logits = torch.randn(B, H, WORDS, requires_grad=True)
    actions, rewards_B = torch.randint(WORDS, (B, H)), torch.rand(B)
    reference = token_values(torch.randn(B, H, WORDS), actions)
    values = token_values(logits, actions)
    ours = huber_loss(values, reference, rewards_B, width=1e6).loss
    theirs = bellman_loss(values, reference, rewards_B, beta=BETA).loss
    [gradient], [expected] = (torch.autograd.grad(loss, logits, retain_graph=True) for loss in (ours, theirs))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=0)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


def train(width: float, seed: int = 0) -> float:
    """Returns the probability of the right action after training, averaged over the states."""
    torch.manual_seed(seed)
    table = torch.zeros(H, WORDS, requires_grad=True)
    start = table.detach().clone()
    optimizer = torch.optim.Adam([table], lr=0.05)
    for _ in range(200):
        with torch.no_grad():
            actions = torch.multinomial(table.softmax(-1), B, replacement=True).T  # [B, H]
            rewards_B = (actions == torch.arange(H)).float().mean(1)
            wrong_B = torch.rand(B) < 0.02  # the judge is sometimes wrong
            rewards_B = torch.where(wrong_B, 100 * torch.rand(B), rewards_B)
            reference = token_values(start.expand(B, H, WORDS), actions)
        values = token_values(table.expand(B, H, WORDS), actions)
        loss, _ = huber_loss(values, reference, rewards_B, width)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return table.softmax(-1)[range(H), range(H)].mean().item()


if __name__ == "__main__":
    torch.set_num_threads(1)
    check_gradient()
    # pi* is proportional to pi_ref exp(r / beta); a right action adds 1 / H to the reward
    odds = math.exp(1 / H / BETA) / (WORDS - 1)
    print(f"without wrong rewards the best policy has {odds / (1 + odds):.2f} right actions")
    print(f"right actions: {train(width=1e6):.2f} with the square, {train(width=1.0):.2f} with Huber of width 1")
