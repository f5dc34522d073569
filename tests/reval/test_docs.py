"""The Python shown in README.md and CONTRIBUTING.md runs."""

from __future__ import annotations

import re
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)


def test_readme_code_runs():
    shown = blocks("README.md")
    assert shown
    names: dict = {}
    for block in shown:
        exec(compile(block, "README.md", "exec"), names)
    assert names["loss"].requires_grad and names["hidden"].grad.abs().sum() > 0


def test_the_loss_in_contributing_is_one(tiny, tiny_config, trajectories):
    from reval import objectives
    from reval.batching import collate
    from reval.models import head_of, last_hidden
    from reval.reference_policy import ReferencePolicy, reference_of

    loss_block, reward_block = blocks("CONTRIBUTING.md")
    names = {**vars(objectives), "bellman_loss": __import__("reval_kernels").bellman_loss}
    exec(compile(loss_block, "CONTRIBUTING.md", "exec"), names)
    model, _ = tiny
    members = trajectories(6)
    ReferencePolicy(model, tiny_config).annotate(members)
    batch = collate(members, model.device)
    hidden = last_hidden(model, batch, tiny_config.model)
    reference, head = reference_of(members, batch), head_of(model)
    loss, residual = names["huber"](hidden, head, batch, reference, tiny_config.objective, 6)
    loss.backward()
    expected = torch.nn.functional.huber_loss(residual, torch.zeros_like(residual))
    torch.testing.assert_close(loss.detach(), expected)
    assert model.lm_head.weight.grad.abs().sum() > 0

    exec(compile(reward_block, "CONTRIBUTING.md", "exec"), names)
    assert names["shorter_is_better"](["p"], ["ab"], [[1, 2]]) == [0.5]
