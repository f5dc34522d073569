"""One update of the learner. The result does not depend on the micro-batches, the gradient is clipped, and an update
that is not finite is refused before the weights move."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from reval.batching import collate
from reval.config import Config, ObjectiveConfig, OptimConfig, ReferenceConfig
from reval.learner import Learner, NonFiniteError
from reval.model.forward import token_values
from reval.model.loading import load_model
from reval.objectives import FUSED, ObjectiveOutput
from reval.reference_policy import ReferencePolicy


def annotated(config: Config, trajectories, count=13, turns=2):
    members = trajectories(count, turns=turns)
    ReferencePolicy(load_model(config.model, seed=4)[0], config).annotate(members)
    return members


def configured(config: Config, **optim) -> Config:
    return replace(config, optim=OptimConfig(**optim))


def gradient_of(config, members):
    """The metrics of one update, and the gradients at the moment when the optimizer would step."""
    model, _ = load_model(config.model, seed=0)
    learner = Learner(model, config)
    seen = {}
    learner.optimizer.step = lambda: seen.update({n: p.grad.clone() for n, p in model.named_parameters()})
    return learner.update(members), seen


SETTINGS = [
    {"level": "trajectory"},
    {"level": "token"},
    {"level": "subtrajectory"},
    {"taper": True, "value_gradient": False},
    {"name": "tba"},
    {"name": "grpo"},
    {"name": "grpo", "normalization": "token"},
    {"name": "grpo", "normalization": "constant"},
    {"name": "topr"},
    {"name": "asymre"},
    {"name": "kimi"},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: " ".join(map(str, settings.values())))
def test_any_micro_batching_gives_the_same_gradient(tiny_config, trajectories, settings):
    """The behaviour policy is the reference, whose weights are others, so importance ratios are not 1."""
    config = replace(
        tiny_config, objective=ObjectiveConfig(beta=0.1, **settings), reference=ReferenceConfig(reset_every=1)
    )
    members = annotated(config, trajectories)
    for i, t in enumerate(members):
        t.group = i % 4
    whole, expected = gradient_of(configured(config, micro_batch_tokens=10_000, max_grad_norm=float("inf")), members)
    for tokens, packing in ((1, "packed"), (40, "packed"), (100, "packed"), (40, "padded"), (10_000, "padded")):
        change = {"micro_batch_tokens": tokens, "packing": packing, "max_grad_norm": float("inf")}
        split, got = gradient_of(configured(config, **change), members)
        assert split["loss"] == pytest.approx(whole["loss"], rel=1e-5)
        assert split["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-5)
        for name, gradient in expected.items():
            error = (got[name] - gradient).norm() / gradient.norm()
            assert error < 1e-5, f"{name}: {error}"


@pytest.mark.parametrize("tokens", [1, 10_000])
def test_log_z_is_the_mean_over_the_group_in_the_whole_batch(tiny_config, trajectories, tokens):
    config = replace(
        tiny_config, objective=ObjectiveConfig(name="tba", beta=0.5), optim=OptimConfig(micro_batch_tokens=tokens)
    )
    members = annotated(config, trajectories)
    groups = [0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 3, 0, 2]
    for t, group in zip(members, groups, strict=True):
        t.group = group
    model, _ = load_model(config.model, seed=0)
    with torch.no_grad():
        log_pi = token_values(model, collate(members, model.device), config.model).log_prob.sum(1).double().numpy()
    x = [lp - t.reference["log_prob"] - t.reward / 0.5 for lp, t in zip(log_pi, members, strict=True)]
    mean = {group: np.mean([y for y, g in zip(x, groups, strict=True) if g == group]) for group in groups}
    expected = np.mean([(y - mean[group]) ** 2 for y, group in zip(x, groups, strict=True)])
    update, _ = gradient_of(config, members)
    assert update["loss"] == pytest.approx(expected, rel=1e-5)


def test_the_gradient_is_clipped_and_the_reported_norm_is_from_before_clipping(tiny_config, trajectories):
    members = annotated(tiny_config, trajectories)
    update, clipped = gradient_of(configured(tiny_config, max_grad_norm=0.5), members)
    norm = torch.stack([g.norm() for g in clipped.values()]).norm().item()
    assert update["grad_norm"] > 5 and norm == pytest.approx(0.5, rel=1e-3)


def test_an_update_moves_the_residual_towards_zero(tiny_config, trajectories):
    model, _ = load_model(tiny_config.model, seed=0)
    config = configured(tiny_config, lr=1e-3)
    members = annotated(config, trajectories, turns=1)
    learner = Learner(model, config)
    losses = [learner.update(members)["loss"] for _ in range(12)]
    assert losses[-1] < 0.5 * losses[0]
    assert all(t.uses == 12 for t in members) and learner.updates == 12


def test_warmup_rises_to_the_learning_rate(tiny_config, trajectories):
    model, _ = load_model(tiny_config.model, seed=0)
    learner = Learner(model, configured(tiny_config, lr=4e-4, warmup=4))
    members = annotated(tiny_config, trajectories, count=2)
    assert [learner.update(members)["lr"] for _ in range(6)] == pytest.approx([1e-4, 2e-4, 3e-4, 4e-4, 4e-4, 4e-4])


def test_a_linear_schedule_falls_to_0_over_the_run(tiny_config, trajectories):
    """The tiny run has 3 iterations of 2 updates, so the rate is 0 after 6 updates."""
    model, _ = load_model(tiny_config.model, seed=0)
    learner = Learner(model, configured(tiny_config, lr=4e-4, warmup=2, schedule="linear"))
    members = annotated(tiny_config, trajectories, count=2)
    assert [learner.update(members)["lr"] for _ in range(7)] == pytest.approx([2e-4, 4e-4, 4e-4, 3e-4, 2e-4, 1e-4, 0.0])


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_non_finite_update_leaves_the_weights_alone(tiny_config, trajectories, where):
    model, _ = load_model(tiny_config.model, seed=0)
    learner = Learner(model, tiny_config)
    members = annotated(tiny_config, trajectories)
    if where == "loss":
        members[5].reference["returns"] = float("inf")
    else:
        model.model.layers[0].mlp.up_proj.weight.register_hook(lambda g: g * float("nan"))
    before = {n: p.clone() for n, p in model.named_parameters()}
    with pytest.raises(NonFiniteError) as caught:
        learner.update(members)
    assert caught.value.trajectories is members
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert learner.updates == 0 and all(t.uses == 0 for t in members)
    assert all(p.grad is None for p in model.parameters())


class Waits(TorchDispatchMode):
    """Counts operations for which the CPU would wait for a GPU: reading a number, and shapes that depend on data."""

    names = ("_local_scalar_dense", "nonzero", "masked_select", "masked_scatter", "_unique2")

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        boolean = name == "index" and any(x is not None and x.dtype == torch.bool for x in args[1])
        if name in self.names or boolean:
            self.found.append(name)
        return func(*args, **kwargs or {})


@pytest.mark.parametrize(("packing", "each"), [("packed", 0), ("padded", 1)])
def test_nothing_waits_for_the_device_until_the_last_backward_pass(
    tiny_config, trajectories, packing, each, monkeypatch
):
    """A loss of plain operations stands for the fused one, whose checks read numbers on a CPU only. With padding,
    transformers itself asks once in each forward pass whether the mask masks anything."""

    def plain(hidden, head, batch, reference, config, totals):
        residual = batch.pad(hidden.sum(-1)).sum(1) - reference.returns
        loss = residual.square().sum() / totals.trajectories
        return ObjectiveOutput(loss, residual.detach(), reference.v, reference.v)

    monkeypatch.setitem(FUSED, "reval", plain)
    config = configured(tiny_config, packing=packing, micro_batch_tokens=40)
    members, waits, found = annotated(config, trajectories), Waits(), []
    learner = Learner(load_model(config.model, seed=0)[0], config)
    inner = learner._backward

    def watched(*args):
        with waits:
            return inner(*args)

    monkeypatch.setattr(learner, "_backward", lambda *args: found.append(watched(*args)) or found[-1])
    learner.update(members)
    assert len(found) > 2 and waits.found == ["_local_scalar_dense"] * each * len(found)


LEVELS = ["trajectory", "token", "subtrajectory"]
DTYPES = [{}, {"compute_dtype": "bfloat16"}, {"dtype": "bfloat16"}]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtypes", DTYPES, ids=["float32", "bf16 compute", "bf16"])
def test_without_a_signal_the_weights_stay(tiny_config, trajectories, level, dtypes):
    """All rewards are 0, and the policy is its reference. The first batch has the micro-batches that computed the
    reference's values: the residuals are exactly 0. The replayed batches have others: rounding errors."""
    config = replace(tiny_config, objective=ObjectiveConfig(level=level), model=replace(tiny_config.model, **dtypes))
    model, _ = load_model(config.model, seed=0)
    members = trajectories(40)
    for t in members:
        t.reward = 0.0
    ReferencePolicy(model, config).annotate(members)
    learner, before = Learner(model, config), {n: p.clone() for n, p in model.named_parameters()}
    for batch in (members, members[::2], members[3:9], members[7:8]):
        update = learner.update(batch)
        largest = update["residual_terms"]["residual"].abs().max()
        assert update["skipped"] == 1.0 and (largest == 0.0 if batch is members else largest < 0.1)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert learner.updates == 0 and all(t.uses == 0 for t in members)


@pytest.mark.parametrize(("name", "steps"), [("asymre", True), ("tba", False), ("grpo", False), ("kimi", False)])
def test_asymre_needs_no_reward(tiny_config, trajectories, name, steps):
    """Its baseline lies below the mean, so responses that are all right, or all wrong, still pull."""
    config = replace(tiny_config, objective=ObjectiveConfig(name=name), reference=ReferenceConfig(reset_every=1))
    model, members = load_model(config.model, seed=0)[0], trajectories(6)
    for t in members:
        t.reward = 0.0
    ReferencePolicy(model, config).annotate(members)
    learner, before = Learner(model, config), model.lm_head.weight.clone()
    assert learner.update(members)["skipped"] == float(not steps)
    assert torch.equal(model.lm_head.weight, before) != steps


@pytest.mark.parametrize("signal", ["reward", "residual"])
def test_one_reward_or_one_residual_is_a_signal(tiny_config, trajectories, signal):
    model, _ = load_model(tiny_config.model, seed=0)
    config = configured(tiny_config, micro_batch_tokens=40)
    members = trajectories(13)
    for t in members:
        t.reward = 0.0
    ReferencePolicy(model, config).annotate(members)
    if signal == "reward":
        members[4].reward = 1e-3
    else:
        members[4].reference["returns"] += 1e-3
    learner, before = Learner(model, config), model.lm_head.weight.clone()
    assert learner.update(members)["skipped"] == 0.0
    assert learner.updates == 1 and not torch.equal(model.lm_head.weight, before)


def test_gradient_checkpointing_and_bf16_compute_change_little(tiny_config, trajectories):
    members = annotated(tiny_config, trajectories)
    optim = OptimConfig(max_grad_norm=float("inf"))
    _, expected = gradient_of(replace(tiny_config, optim=optim), members)
    same = [{"gradient_checkpointing": True}, {"attn_implementation": "eager"}]
    for change, allowed in (*((one, 1e-6) for one in same), ({"compute_dtype": "bfloat16"}, 0.05)):
        config = replace(tiny_config, model=replace(tiny_config.model, **change), optim=optim)
        _, got = gradient_of(config, members)
        for name, gradient in expected.items():
            assert (got[name] - gradient).norm() <= allowed * gradient.norm(), name


@pytest.mark.slow
def test_compiled_layers_compute_the_same_update(tiny_config, trajectories):
    members = annotated(tiny_config, trajectories)
    plain, expected = gradient_of(tiny_config, members)
    compiled, got = gradient_of(replace(tiny_config, model=replace(tiny_config.model, compile=True)), members)
    assert compiled["loss"] == pytest.approx(plain["loss"], rel=1e-5)
    assert all((got[name] - g).norm() <= 1e-5 * g.norm() for name, g in expected.items())


def test_checkpointing_recomputes_every_layer_and_stays_on_after_generating(tiny_config, trajectories):
    """generate() leaves the model in evaluation mode. In this mode, transformers would keep all activations."""
    members = annotated(tiny_config, trajectories)
    for checkpointing, times in ((False, 1), (True, 2)):
        config = replace(tiny_config, model=replace(tiny_config.model, gradient_checkpointing=checkpointing))
        model, _ = load_model(config.model, seed=0)
        learner, passes = Learner(model, config), []
        model.model.layers[0].mlp.register_forward_pre_hook(lambda *_, passes=passes: passes.append(1))
        for _ in range(2):
            passes.clear()
            learner.update(members)
            assert len(passes) == times
            model.eval()


def test_a_resumed_optimizer_takes_the_settings_of_the_new_config(tiny_config, trajectories):
    learner = Learner(load_model(tiny_config.model, seed=0)[0], configured(tiny_config, weight_decay=0.1))
    learner.update(annotated(tiny_config, trajectories))
    now = configured(tiny_config, weight_decay=0.3, betas=(0.5, 0.6), eps=1e-5)
    other = Learner(load_model(tiny_config.model, seed=0)[0], now)
    other.load_state(learner.state(), updates=1)
    [group] = other.optimizer.param_groups
    assert (group["weight_decay"], tuple(group["betas"]), group["eps"]) == (0.3, (0.5, 0.6), 1e-5)
    assert other.updates == 1 and other.optimizer.state[next(other.model.parameters())]["step"] == 1


def test_each_micro_batch_is_reported(tiny_config, trajectories):
    config, members, seen = configured(tiny_config, micro_batch_tokens=1), trajectories(3), []
    model, _ = load_model(config.model, seed=0)
    ReferencePolicy(model, config).annotate(members, lambda *report: seen.append(report))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    Learner(model, config).update(members, lambda *report: seen.append(report))
    assert seen[3:] == [(1, 3), (2, 3), (3, 3)]
