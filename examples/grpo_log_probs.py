"""GRPO with one line replaced: log-probs from hidden states instead of from logits. Memory and time of both.

    python examples/grpo_log_probs.py [--tokens 128] [--vocabulary 32768]

The file needs torch, transformers and reval_kernels, and downloads nothing. A tiny random policy gets responses with
random advantages, and takes the same GRPO step twice: with the logits of all tokens, as most scripts compute their
log-probs, and with linear_token_values. Losses and gradients agree. The peak of memory and the time are measured in
this process.

A name ends with its axes: B responses, T tokens, V words of the vocabulary.
"""

from __future__ import annotations

import argparse
import ctypes
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from reval_kernels import linear_token_values

B, CLIP, STEPS = 8, 0.2, 3


def make_policy(vocabulary: int) -> LlamaForCausalLM:
    """A random transformer that is small beside its head, as small models with large vocabularies are."""
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    return LlamaForCausalLM(config)


def log_probs_before(policy: LlamaForCausalLM, tokens_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """The usual lines: the logits of all tokens, and log_softmax, which is as large."""
    logits_BTV = policy(tokens_BT[:, :-1]).logits
    return logits_BTV.log_softmax(-1).gather(-1, tokens_BT[:, 1:, None])[..., 0] * mask_BT[:, 1:]


def log_probs_after(policy: LlamaForCausalLM, tokens_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """The replaced lines: the head works on the unmasked tokens only, a chunk of words at a time."""
    hidden = policy.base_model(tokens_BT[:, :-1]).last_hidden_state
    head = policy.get_output_embeddings().weight
    return linear_token_values(hidden, head, tokens_BT[:, 1:], mask=mask_BT[:, 1:]).log_prob


def grpo_loss(log_probs_BT: Tensor, old_BT: Tensor, advantages_B: Tensor, mask_BT: Tensor) -> Tensor:
    """The clipped objective, averaged over the tokens of each response and then over the responses."""
    ratio_BT = (log_probs_BT - old_BT).exp()
    clipped_BT = ratio_BT.clamp(1 - CLIP, 1 + CLIP)
    each_BT = -torch.minimum(ratio_BT * advantages_B[:, None], clipped_BT * advantages_B[:, None]) * mask_BT[:, 1:]
    return (each_BT.sum(1) / mask_BT[:, 1:].sum(1).clamp(min=1)).mean()


def step(log_probs: Callable, policy: LlamaForCausalLM, batch: tuple[Tensor, ...]) -> float:
    """Loss and backward of one step; the gradients stay in the policy."""
    tokens_BT, mask_BT, old_BT, advantages_B = batch
    policy.zero_grad()
    loss = grpo_loss(log_probs(policy, tokens_BT, mask_BT), old_BT, advantages_B, mask_BT)
    loss.backward()
    return loss.item()


def peak_mib(run: Callable[[], object]) -> float:
    """How far the memory of this process rises above its level before the run (Linux)."""
    ctypes.CDLL(None).malloc_trim(0)  # free memory that earlier runs left counts as memory of this process
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = memory_mib("VmRSS")
    run()
    return memory_mib("VmHWM") - before


def memory_mib(name: str) -> float:
    line = next(s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith(name))
    return int(line.split()[1]) / 1024


def make_batch(policy: LlamaForCausalLM, tokens: int, vocabulary: int) -> tuple[Tensor, ...]:
    """Prompts of a quarter of the tokens, then a response. The behaviour policy differs a little from the policy."""
    tokens_BT = torch.randint(vocabulary, (B, tokens))
    mask_BT = torch.arange(tokens).expand(B, -1) >= tokens // 4
    with torch.no_grad():
        old_BT = log_probs_after(policy, tokens_BT, mask_BT)
    return tokens_BT, mask_BT, old_BT + 0.1 * torch.randn_like(old_BT) * mask_BT[:, 1:], torch.randn(B)


def main(tokens: int, vocabulary: int) -> None:
    torch.manual_seed(0)
    policy = make_policy(vocabulary)
    batch = make_batch(policy, tokens, vocabulary)
    print(f"{B} responses of {tokens} tokens, {vocabulary} words: one float32 tensor of logits has", end=" ")
    print(f"{B * (tokens - 1) * vocabulary * 4 / 2**20:.0f} MiB")
    losses, gradients, peaks = [], [], []
    for name, function in (("before", log_probs_before), ("after", log_probs_after)):
        step(function, policy, batch)  # warm up: the gradients exist from here on
        peaks.append(peak_mib(partial(step, function, policy, batch)))
        start = time.perf_counter()
        losses.append([step(function, policy, batch) for _ in range(STEPS)][-1])
        seconds = (time.perf_counter() - start) / STEPS
        gradients.append(torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None]))
        print(f"{name:6s}  loss {losses[-1]:.6f}  peak {peaks[-1]:5.0f} MiB  {seconds:5.2f} s a step")
    difference = (gradients[0] - gradients[1]).norm() / gradients[0].norm()
    print(f"losses differ by {abs(losses[0] - losses[1]):.0e}, gradients by {difference:.0e} of their norm;", end=" ")
    print(f"the peak is {peaks[0] / peaks[1]:.1f} times smaller")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--vocabulary", type=int, default=32768)
    options = parser.parse_args()
    torch.set_num_threads(1)
    main(options.tokens, options.vocabulary)
