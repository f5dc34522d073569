"""SFT, then DPO with an SFT term, on the same token values.

    python examples/dpo_sft.py [--steps 60] [--sft 1.0] [--seed 0]

The file needs torch, transformers and reval_kernels, and downloads nothing. A tiny random model first learns from
examples to count up from a digit (SFT: mean of -log pi). Then pairs of responses teach it to count down instead (DPO,
arXiv 2305.18290): the chosen response counts down, the rejected one counts up. The reference policy is the model after
SFT. DPO alone asks only for the difference of the two, and here it makes both responses unlikely: see `--sft 0`. So the
SFT loss of the chosen response is added, from the token values that DPO has already. Logits never exist as a whole.

A name ends with its axes: B sequences, T tokens, H response tokens.
"""

from __future__ import annotations

import argparse
import copy

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from reval_kernels import TokenValues, linear_token_values

H = 4  # response tokens, after a prompt of one digit
BETA = 0.5  # DPO: how far the policy may move from the reference
LEARNING_RATE = 3e-3


def make_model() -> LlamaForCausalLM:
    """A transformer with random weights; its words are the digits."""
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=10, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)
    )


def counting(direction: int) -> Tensor:
    """A digit and the H digits that follow it upwards (direction 1) or downwards (-1), modulo 10: [B = 10, T]."""
    return (torch.arange(10)[:, None] + direction * torch.arange(1 + H)) % 10


def values_of(model: LlamaForCausalLM, tokens_BT: Tensor) -> TokenValues:
    """Q, V and log pi of every response token.

    The state of token t is the hidden state that has read tokens 0 to t - 1. The prompt is the first token.
    """
    hidden = model.base_model(tokens_BT[:, :-1]).last_hidden_state
    return linear_token_values(hidden, model.get_output_embeddings().weight, tokens_BT[:, 1:])


def sft_loss(values: TokenValues) -> Tensor:
    """Cross entropy: the mean of -log pi over the tokens."""
    return -values.log_prob.mean()


def dpo_loss(chosen: TokenValues, rejected: TokenValues, ref_chosen: TokenValues, ref_rejected: TokenValues) -> Tensor:
    """-log sigmoid of beta times the difference of the two log ratios to the reference."""
    margin_B = (chosen.log_prob - ref_chosen.log_prob).sum(1) - (rejected.log_prob - ref_rejected.log_prob).sum(1)
    return -F.logsigmoid(BETA * margin_B).mean()


@torch.no_grad()
def share_of(model: LlamaForCausalLM, direction: int) -> float:
    """The probability of the response that counts in this direction, averaged over the prompts."""
    return values_of(model, counting(direction)).log_prob.sum(1).exp().mean().item()


def train(steps: int, sft: float, seed: int) -> tuple[float, float]:
    """Train with both losses. Returns the probability of counting up after SFT, and of counting down after DPO."""
    torch.manual_seed(seed)
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)

    def update(loss: Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    up, down = counting(1), counting(-1)
    for _ in range(steps):
        update(sft_loss(values_of(model, up)))
    after_sft = share_of(model, 1)
    print(f"after SFT: counts up with probability {after_sft:.3f}, down with {share_of(model, -1):.3f}")
    reference = copy.deepcopy(model).requires_grad_(False)
    ref_chosen, ref_rejected = values_of(reference, down), values_of(reference, up)
    for _ in range(steps):
        chosen, rejected = values_of(model, down), values_of(model, up)
        update(dpo_loss(chosen, rejected, ref_chosen, ref_rejected) + sft * sft_loss(chosen))
    after_dpo = share_of(model, -1)
    print(f"after DPO: counts up with probability {share_of(model, 1):.3f}, down with {after_dpo:.3f}")
    return after_sft, after_dpo


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60, help="updates of each of the two losses")
    parser.add_argument("--sft", type=float, default=1.0, help="weight of the SFT loss beside DPO")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    train(options.steps, options.sft, options.seed)
