"""ReVal in one file: a random tiny language model learns from rewards to write two digits in reverse.

    python examples/one_file.py [--seed 0] [--iterations 150] [--updates 4]

The file needs torch, transformers and reval_kernels, and downloads nothing. The prompt "4 7 =" asks for "7 4 EOS". The
reward is the share of right tokens. 20 of the 100 prompts are held out: training never shows them.

The method is ReVal (arXiv 2603.23355; docs/method.md). ReVal reads a language model's logits as soft Q-values:

    Q(s, a) = logit(s)[a]        V(s) = logsumexp_a Q(s, a)        log pi(a|s) = Q(s, a) - V(s)

The action a_h is a response token. The state s_h is the prompt with the response tokens before a_h. The Bellman
equation asks Q(s_h, a_h) = V(s_h) + log pi(a_h|s_h) to equal the reward plus V(s_{h+1}). ReVal sums the errors along
the response. In the sum the values of all states cancel, except V(s_1). The reference policy pi_ref is a frozen copy of
the policy; beta weighs it against the reward. The loss is the mean over responses of residual^2:

    residual = V(s_1) + sum_h log pi(a_h|s_h) - reference return - reward / beta
    reference return = V_ref(s_1) + sum_h log pi_ref(a_h|s_h)

V(s_1) - V_ref(s_1) is a learned baseline: one number for a prompt, the same for all responses to the prompt. Without
the baseline, a zero loss would ask for sum_h log pi = sum_h log pi_ref + reward / beta. But probabilities sum to 1, so
not all responses to a prompt can become more likely. The loss does not contain the policy that generated a response, so
the policy can also learn from old responses, which a replay buffer keeps.

A name ends with its axes: B responses, P = 3 prompt tokens, H = 3 response tokens, T = P + H tokens, V = 12 words of
the vocabulary, D hidden width.
"""

import argparse
import copy
import random
import time
from collections import deque
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from reval_kernels import linear_reval_loss, linear_token_values

EQUALS, EOS, VOCABULARY = 10, 11, 12  # tokens 0 to 9 are the digits
P, H = 3, 3
HELD_OUT = 20
PROMPTS, RESPONSES = 32, 8  # prompts of an iteration, and responses to each prompt
BUFFER = 512  # responses: two iterations
BETA = 1.0  # for normalized rewards and 3 tokens; long responses need a smaller beta (docs/method.md)
RESET_EVERY = 5  # iterations between copies of the policy into the reference: an old reference holds the policy back
LEARNING_RATE, MAX_GRAD_NORM = 3e-3, 1.0


class Trajectory(NamedTuple):
    """One response and everything that an update needs. The probability at generation time is not needed."""

    tokens_T: Tensor
    mask_H: Tensor
    reward: Tensor
    reference_return: Tensor


def make_policy() -> LlamaForCausalLM:
    """A transformer with random weights."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=1,
            num_attention_heads=4,
            max_position_embeddings=P + H,
        )
    )


def make_prompts() -> tuple[Tensor, Tensor]:
    """The prompts to train on [80, P] and the held-out ones [20, P]."""
    digits = torch.cartesian_prod(torch.arange(10), torch.arange(10))
    prompts = F.pad(digits, (0, 1), value=EQUALS)[torch.randperm(100)]
    return prompts[HELD_OUT:], prompts[:HELD_OUT]


@torch.no_grad()
def generate(policy: LlamaForCausalLM, prompts_BP: Tensor) -> tuple[Tensor, Tensor]:
    """Sample one response to each prompt. Returns prompt with response [B, T], and the mask [B, H].

    The mask is true for the actions: the tokens up to EOS, and EOS itself. The loop goes on after EOS to keep the code
    short. The mask excludes these later tokens, so they have no reward, no Q-value and no gradient. A response without
    EOS ends at the length limit.
    """
    tokens_BT = prompts_BP
    for _ in range(H):
        probabilities_BV = policy(tokens_BT).logits[:, -1].softmax(-1)  # of the next token
        tokens_BT = torch.cat([tokens_BT, torch.multinomial(probabilities_BV, 1)], 1)
    ends_BH = (tokens_BT[:, P:] == EOS).long()
    return tokens_BT, ends_BH.cumsum(1) - ends_BH == 0  # no EOS before this token; EOS itself is not before itself


def right_tokens(tokens_BT: Tensor, mask_BH: Tensor) -> Tensor:
    """Whether each response token is the one asked for, [B, H]."""
    answers_BH = F.pad(tokens_BT[:, :2].flip(1), (0, 1), value=EOS)
    return (tokens_BT[:, P:] == answers_BH) & mask_BH


def normalize(rewards_B: Tensor) -> Tensor:
    """Subtract the mean of the responses to the same prompt, and divide by their deviation."""
    groups = rewards_B.view(PROMPTS, RESPONSES)
    centered = groups - groups.mean(1, keepdim=True)
    return (centered / (groups.std(1, keepdim=True) + 1e-4)).flatten()


def states(model: LlamaForCausalLM, tokens_BT: Tensor) -> Tensor:
    """The hidden state in which each response token was chosen, [B, H, D].

    The hidden state at position i has read tokens 0 to i, and its logits belong to token i + 1. The first action is
    token P = 3, so its state is at position P - 1 = 2, the token "=". The last token is left out: no action follows it.
    """
    return model.base_model(tokens_BT[:, :-1]).last_hidden_state[:, P - 1 :]


@torch.no_grad()
def reference_returns(reference: LlamaForCausalLM, tokens_BT: Tensor, mask_BH: Tensor) -> Tensor:
    """V_ref(s_1) + sum_h log pi_ref(a_h|s_h), [B].

    The residual contains the frozen reference as this sum only. So one stored number stands for a whole response, and
    an update does not run the reference.
    """
    head = reference.get_output_embeddings().weight
    values = linear_token_values(states(reference, tokens_BT), head, tokens_BT[:, P:], mask=mask_BH)
    return values.returns(mask_BH)


def recompute_returns(buffer: deque[Trajectory], reference: LlamaForCausalLM) -> deque[Trajectory]:
    """The buffer with the reference returns of a new reference. The stored returns belong to the old reference."""
    tokens_BT, mask_BH, _, _ = map(torch.stack, zip(*buffer, strict=True))
    returns_B = reference_returns(reference, tokens_BT, mask_BH)
    return deque((t._replace(reference_return=r) for t, r in zip(buffer, returns_B, strict=True)), BUFFER)


def update(policy: LlamaForCausalLM, optimizer: torch.optim.Optimizer, batch: list[Trajectory]) -> tuple[float, float]:
    """One gradient step. Returns the loss and the mean of |residual|, both from before the step."""
    tokens_BT, mask_BH, rewards_B, returns_B = map(torch.stack, zip(*batch, strict=True))
    head = policy.get_output_embeddings().weight  # the loss makes the logits chunk by chunk, never all at once
    loss, residual_B = linear_reval_loss(
        states(policy, tokens_BT), head, tokens_BT[:, P:], returns_B, rewards_B, mask=mask_BH, beta=BETA
    )
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(policy.parameters(), MAX_GRAD_NORM)
    optimizer.step()
    return loss.item(), residual_B.abs().mean().item()


def accuracy(policy: LlamaForCausalLM, prompts_BP: Tensor) -> float:
    """Share of responses with every token right, among 10 sampled responses to each prompt."""
    return right_tokens(*generate(policy, prompts_BP.repeat_interleave(10, 0))).all(1).float().mean().item()


def train(seed: int, iterations: int, updates: int) -> tuple[float, float]:
    """Train a new policy. Returns the accuracy on the held-out prompts before and after."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    policy = make_policy()
    reference = copy.deepcopy(policy).requires_grad_(False)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=iterations)  # down to 0
    prompts, held_out = make_prompts()
    buffer: deque[Trajectory] = deque(maxlen=BUFFER)  # first in, first out
    before = accuracy(policy, held_out)
    for iteration in range(1, iterations + 1):
        # Generate: several responses to each prompt, so that rewards can be compared within a prompt.
        prompts_BP = prompts[torch.randint(len(prompts), (PROMPTS,))].repeat_interleave(RESPONSES, 0)
        tokens_BT, mask_BH = generate(policy, prompts_BP)
        rewards_B = right_tokens(tokens_BT, mask_BH).float().mean(1)
        # Store: everything that later updates need, the reference returns included.
        returns_B = reference_returns(reference, tokens_BT, mask_BH)
        fresh = list(map(Trajectory, tokens_BT, mask_BH, normalize(rewards_B), returns_B))
        buffer.extend(fresh)
        # Learn: once from the fresh responses, then from stored ones, because generation costs most in real runs.
        loss, residual = update(policy, optimizer, fresh)
        for _ in range(updates - 1):
            update(policy, optimizer, rng.sample(list(buffer), len(fresh)))
        schedule.step()
        if iteration % RESET_EVERY == 0:
            reference.load_state_dict(policy.state_dict())
            buffer = recompute_returns(buffer, reference)
        print(f"{iteration:4d}  reward {rewards_B.mean():.3f}  |residual| {residual:.3f}  loss {loss:.3f}", flush=True)
    return before, accuracy(policy, held_out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--iterations", type=int, default=150)
    parser.add_argument("--updates", type=int, default=4, help="updates an iteration: 1 fresh batch, the rest replayed")
    options = parser.parse_args()
    torch.set_num_threads(1)  # more threads make operations this small slower
    start = time.perf_counter()
    before, after = train(options.seed, options.iterations, options.updates)
    print(f"accuracy on held-out prompts: {before:.3f} before, {after:.3f} after; {time.perf_counter() - start:.0f} s")
