"""The sum of endogenous rewards against its definition, from the model's own logits in float64."""

from __future__ import annotations

from dataclasses import replace

import torch

from reval.evaluation.endogenous import endogenous_scorer


def by_definition(model, prompt, response):
    """sum over h of Q(s_h, a_h) - V(s_{h+1}), with V = 0 after the last token."""
    ids = torch.tensor([[*prompt, *response]])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0].double()
    total = 0.0
    for h, action in enumerate(response):
        state = len(prompt) - 1 + h
        last = h == len(response) - 1
        total += logits[state, action] - (0.0 if last else logits[state + 1].logsumexp(0))
    return float(total)


def test_it_is_the_definition_whatever_the_micro_batches(tiny, tiny_config):
    model, _ = tiny
    generator = torch.Generator().manual_seed(0)

    def tokens(count):
        return torch.randint(6, 102, (count,), generator=generator).tolist()

    prompts = [tokens(n) for n in (1, 4, 7)]
    pairs = [(p, tokens(n)) for p in prompts for n in (1, 5, 9)]
    expected = torch.tensor([by_definition(model, *pair) for pair in pairs])
    for budget in (16384, 20):
        config = replace(tiny_config, optim=replace(tiny_config.optim, micro_batch_tokens=budget))
        found = torch.tensor(endogenous_scorer(model, config)(pairs))
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)


def test_nothing_to_score(tiny, tiny_config):
    assert endogenous_scorer(tiny[0], tiny_config)([]) == []
