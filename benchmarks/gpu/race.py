"""A small program for compute-sanitizer: rows whose gradient overwrites the logits, the Bellman loss at every level
with a mask, and the loss from hidden states, forward and backward.

    compute-sanitizer --tool racecheck python -m benchmarks.gpu.race cuda
"""

from __future__ import annotations

import sys

import torch

from reval_kernels import TokenValues, bellman_loss, linear_reval_loss, token_values


def main(device: str) -> None:
    torch.manual_seed(0)
    large = device == "cuda"
    tokens, vocabulary, width = (40, 5000, 64) if large else (6, 70, 16)
    logits = torch.randn(tokens, vocabulary, device=device, requires_grad=True)
    actions = torch.randint(vocabulary, (tokens,), device=device)
    values = token_values(logits * 1, actions, inplace_grad=True, backend="triton")
    (values.v.sum() + values.log_prob.square().sum()).backward()

    mask = torch.rand(4, 10, device=device) < 0.7
    rewards = torch.randn(4, device=device)
    q, v, reference_q, reference_v = torch.randn(4, 4, 10, device=device)
    reference = TokenValues(reference_q, reference_v, reference_q - reference_v)
    for level in ("trajectory", "token", "subtrajectory"):
        own_q, own_v = q.clone().requires_grad_(), v.clone().requires_grad_()
        made = TokenValues(own_q, own_v, own_q - own_v)
        bellman_loss(made, reference, rewards, mask=mask, beta=0.5, level=level, backend="triton").loss.backward()

    dtype = torch.bfloat16 if large else torch.float32
    hidden = torch.randn(4, 10, width, device=device, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocabulary, width, device=device, dtype=dtype, requires_grad=True)
    taken = torch.randint(vocabulary, (4, 10), device=device)
    linear_reval_loss(hidden, weight, taken, rewards, rewards, mask=mask, beta=0.5, backend="triton").loss.backward()
    if large:
        torch.cuda.synchronize()


if __name__ == "__main__":
    main(*sys.argv[1:])
