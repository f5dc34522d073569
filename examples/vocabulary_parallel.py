"""Vocabulary parallel: two processes hold half of the head each, and get the loss and gradients of the whole head.

    python examples/vocabulary_parallel.py

Needs torch and reval_kernels. The processes are on one machine and talk over gloo; on GPUs take nccl. Each process
calls the same functions as one process would, with its slice of the head and `process_group`. The logits of the whole
vocabulary never exist: the processes exchange five numbers a token, and the gradient of the hidden states.
"""

import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from reval_kernels import bellman_loss, linear_token_values

B, T, D, WORDS, PROCESSES = 4, 16, 32, 1001, 2  # 1001 words: the slices may differ in size


def inputs() -> tuple[Tensor, ...]:
    """Hidden states, head, actions, mask, rewards and reference returns: the same in every process."""
    torch.manual_seed(0)
    hidden = torch.randn(B, T, D)
    head = torch.randn(WORDS, D) / D**0.5
    actions, mask = torch.randint(WORDS, (B, T)), torch.rand(B, T) < 0.8
    reference = linear_token_values(hidden + 0.1, head, actions, mask=mask)
    return hidden.requires_grad_(), head, actions, mask, torch.rand(B), reference.returns(mask)


def loss_and_gradients(head: Tensor, group: dist.ProcessGroup | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, and its gradients of the hidden states and of `head`, which is a slice if there is a group."""
    hidden, _, actions, mask, rewards, returns = inputs()
    head.requires_grad_()
    values = linear_token_values(hidden, head, actions, mask=mask, process_group=group)
    loss, _ = bellman_loss(values, returns, rewards, mask=mask, beta=0.1)
    d_hidden, d_head = torch.autograd.grad(loss, (hidden, head))
    return loss.detach(), d_hidden, d_head


def work(rank: int, meeting: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=PROCESSES)
    whole = inputs()[1]
    own = whole.chunk(PROCESSES)[rank].clone()  # rank 0 has the first words, rank 1 the next
    loss, d_hidden, d_own = loss_and_gradients(own, dist.group.WORLD)

    expected, d_hidden_expected, d_head_expected = loss_and_gradients(whole)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(d_hidden, d_hidden_expected)  # already summed over the processes
    torch.testing.assert_close(d_own, d_head_expected.chunk(PROCESSES)[rank])
    print(
        f"process {rank}: {len(own)} of {WORDS} words, loss {loss:.4f}, as of one process ({expected:.4f})", flush=True
    )
    dist.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(work, (str(Path(folder, "meeting")),), PROCESSES)
