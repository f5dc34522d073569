"""ReValTrainer trained for real on the CPU: a random model of 11 words that TRL generates with, scores and updates.

Prompts have different lengths (padding on the left) and so have completions (on the right). A pass has two
micro-batches and the runs have six updates, so a checkpoint after three is in the middle of a generation.
"""

import ast
import math
import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("trl", reason="the extra `trl` has it")
pytest.importorskip("datasets")

import trl_runs
import trl_tiny
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

import reval.integrations.trl as ours
from reval.integrations.trl import ReValConfig, ReValTrainer, objective
from reval.integrations.trl.config import REFUSED
from reval_kernels import TokenValues, reference

ROOT = Path(__file__).parents[3]
PLAIN = {"objective_taper": False, "objective_value_gradient": True}
LEVELS = {
    "recipe": {},
    "trajectory": PLAIN,
    "no taper": {"objective_taper": False},
    "token": PLAIN | {"objective_level": "token"},
    "semi-gradient": PLAIN | {"objective_level": "token", "objective_semi_gradient": True},
    "subtrajectory": PLAIN | {"objective_level": "subtrajectory"},
}


# ---- versions and packages ----


@pytest.mark.parametrize("found", ["1.15.2", "1.17.0", "2.16.0", "1.16.0.dev0", "1.16.0rc1"])
def test_another_version_of_trl_is_refused_by_name(monkeypatch, found):
    monkeypatch.setattr(ours, "version", lambda _: found)
    with pytest.raises(ImportError, match=rf"TRL 1\.16; installed is TRL {found}.*reval-kernels\[trl\]"):
        ours.check_version()


def test_patch_versions_of_trl_are_accepted_and_a_missing_one_is_named(monkeypatch):
    monkeypatch.setattr(ours, "version", lambda _: "1.16.3")
    ours.check_version()

    def missing(_):
        raise ours.PackageNotFoundError

    monkeypatch.setattr(ours, "version", missing)
    with pytest.raises(ImportError, match=r"not installed: pip install 'reval-kernels\[trl\]'"):
        ours.check_version()


HIDDEN = """
import sys
hidden = set({packages!r})

class Without:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in hidden else self.finder.find_spec(name, path, target)

sys.meta_path = [Without(finder) for finder in sys.meta_path]
sys.path.insert(0, {here!r})
import trl_runs
trl_runs.run({folder!r}, 1)
assert not hidden & set(sys.modules)
"""


def test_it_trains_without_the_packages_of_the_extra_train(tmp_path):
    """pyyaml, numpy, safetensors, transformers and accelerate are not hidden: TRL itself needs them."""
    packages = ["gguf", "math_verify", "matplotlib", "peft", "reasoning_gym", "rich", "tensorboard"]
    code = HIDDEN.format(packages=packages, here=str(Path(__file__).parent), folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr[-3000:]


def environment():
    paths = [str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}


# ---- arguments ----


@pytest.mark.parametrize("name", REFUSED)
def test_arguments_without_meaning_are_refused_by_name(tmp_path, name):
    default = ReValConfig.__dataclass_fields__[name].default
    other = {"loss_type": "grpo", "scale_rewards": "none", "importance_sampling_level": "sequence"}.get(
        name, not default if isinstance(default, bool) else 0.123
    )
    with pytest.raises(ValueError, match=rf"^{name} must keep its default .* in ReValConfig, got "):
        trl_runs.arguments(tmp_path, **{name: other})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"objective_beta": 0.0}, "objective_beta must be a positive number, got 0.0"),
        (
            {"objective_level": "tokens"},
            "objective_level must be one of trajectory, token, subtrajectory, got 'tokens'",
        ),
        ({"objective_level": "token"}, "'trajectory' with objective_taper=True or objective_value_gradient=False"),
        (PLAIN | {"objective_semi_gradient": True}, "objective_semi_gradient must be False without"),
        ({"reward_shaping": "centred"}, "reward_shaping must be one of plain, centered, .*, got 'centred'"),
        ({"num_iterations": 0}, "num_iterations must be at least 1"),
        ({"reference_reset_every": -1}, "reference_reset_every must be at least 0"),
        ({"replay_draw": "group"}, "replay_draw must be 'uniform' or 'groups'"),
        ({"replay_capacity": 7}, r"replay_capacity must be at least generation_batch_size \(8\)"),
        ({"steps_per_generation": 3, "num_generations": 2}, "a multiple of gradient_accumulation_steps"),
    ],
)
def test_values_that_do_not_fit_are_refused(tmp_path, given, message):
    with pytest.raises(ValueError, match=message):
        trl_runs.arguments(tmp_path, **given)


def test_defaults_are_the_recipe_of_the_demo(tmp_path):
    """In configs/demo.yaml the buffer holds 10 iterations: 640 of 64."""
    from reval.config import load_config

    demo, here = load_config([ROOT / "configs" / "demo.yaml"]), trl_runs.arguments(tmp_path)
    assert here.objective_beta == demo.objective.beta and here.objective_taper == demo.objective.taper
    assert here.objective_value_gradient == demo.objective.value_gradient and here.objective_level == "trajectory"
    assert here.reward_shaping == demo.reward.shaping and here.replay_draw == demo.replay.draw
    assert here.reference_reset_every == demo.reference.reset_every
    assert here.num_iterations == demo.replay.updates_per_iteration
    assert here.replay_capacity / here.generation_batch_size == demo.replay.capacity / demo.trajectories_per_iteration


def test_a_config_of_trl_is_refused(tmp_path):
    with pytest.raises(TypeError, match="args must be a ReValConfig, got GRPOConfig"):
        ReValTrainer(trl_tiny.model(), trl_tiny.share_of_c, GRPOConfig(str(tmp_path), use_cpu=True, bf16=False))


# ---- docs/trl.md ----

PAGE = (ROOT / "docs" / "trl.md").read_text(encoding="utf-8")


def test_the_script_of_the_page_runs(tmp_path, monkeypatch):
    """With the tiny model in place of the one that it names, and for two updates."""
    trl_tiny.model().save_pretrained(tmp_path / "model")
    [script] = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len([line for line in script.splitlines() if line]) <= 12
    for shown, here in {
        '"HuggingFaceTB/SmolLM2-135M-Instruct"': repr(str(tmp_path / "model")),
        "max_steps=48": "max_steps=2, use_cpu=True, report_to=[]",
        "train_dataset=": "processing_class=trl_tiny.tokenizer(), train_dataset=",
    }.items():
        assert script.count(shown) == 1
        script = script.replace(shown, here)
    monkeypatch.chdir(tmp_path)
    names = {"trl_tiny": trl_tiny}
    exec(compile(script, "docs/trl.md", "exec"), names)
    assert names["trainer"].state.global_step == 2 and len(names["trainer"].buffer) == 64


def test_the_tables_of_the_page_are_those_of_the_code():
    own = {f.name: f.default for f in fields(ReValConfig) if f != GRPOConfig.__dataclass_fields__.get(f.name)}
    rows = re.findall(r"^\| `(\w+)` \| `(.+?)` \|", PAGE, re.MULTILINE)
    assert {name: ast.literal_eval(default) for name, default in rows} == own
    listed = PAGE.split("must keep their defaults")[1].split("\n\n")[0]
    assert sorted(re.findall(r"`(\w+)`", listed)) == sorted(REFUSED)
    theirs = vars(Trainer) | vars(GRPOTrainer)
    overridden = {name for name, value in vars(ReValTrainer).items() if callable(value) and name in theirs}
    assert len(overridden) == 7 and all(f"`{name}`" in PAGE for name in overridden - {"__init__"})
    assert f"TRL {ours.VERSIONS[0]} (tested" in PAGE


# ---- the loss ----


def own_values(model, t):
    """The values of a trajectory's actions [1, H] in float64, from the logits of its tokens alone."""
    ids = torch.from_numpy(t.token_ids.astype(np.int64))[None]
    logits = model(input_ids=ids).logits[:, :-1].double()
    mask = torch.from_numpy(t.action_mask)[None, 1:]
    values = reference.token_values(logits, ids[:, 1:], mask=mask)
    return TokenValues(*(x[mask][None] for x in values[:3]))


def expected_loss(before, policy, rows, config):
    """The loss of one update from the definition, one trajectory at a time."""
    total = 0.0
    for t in rows:
        with torch.no_grad():
            ref = own_values(before, t)
        values, reward = own_values(policy, t), torch.tensor([t.reward], dtype=torch.float64)
        if config.objective_taper or not config.objective_value_gradient:
            v = values.v[0, 0] if config.objective_value_gradient else values.v[0, 0].detach()
            moved = (values.log_prob - ref.log_prob).sum()
            residual = v - ref.v[0, 0] + moved - t.reward / config.objective_beta
            ratio = (values.log_prob.detach().sum() - t.behavior.sum()).exp().clamp(max=1)
            total += (ratio if config.objective_taper and t.reward < 0 else 1.0) * residual**2
        else:
            kind = {"level": config.objective_level, "semi_gradient": config.objective_semi_gradient}
            total += reference.bellman_loss(values, ref, reward, beta=config.objective_beta, **kind).loss
    return total / len(rows)


@pytest.mark.parametrize("level", LEVELS)
def test_loss_and_gradient_equal_the_definition_in_float64(tmp_path, level):
    out = trl_runs.one_update(tmp_path, 7, **LEVELS[level])
    policy, rows = trl_tiny.model(), trl_runs.trajectories(7)
    trl_runs.move(policy)
    expected = expected_loss(trl_tiny.model(), policy, rows, trl_runs.arguments(tmp_path, **LEVELS[level]))
    expected.backward()
    torch.testing.assert_close(out["loss"].double(), expected.detach(), rtol=1e-5, atol=0)
    for name, p in policy.named_parameters():
        torch.testing.assert_close(out["gradient"][name], p.grad, rtol=1e-4, atol=1e-4 * p.grad.abs().max().item())


@pytest.mark.parametrize("level", LEVELS)
def test_a_batch_without_completions_has_no_gradient(tmp_path, level):
    """The second micro-batch of an update on one completion has none."""
    out = trl_runs.one_update(tmp_path, 1, **LEVELS[level])
    policy = trl_tiny.model()
    trl_runs.move(policy)
    config = trl_runs.arguments(tmp_path, **LEVELS[level])
    expected = expected_loss(trl_tiny.model(), policy, trl_runs.trajectories(1), config)
    torch.testing.assert_close(out["loss"].double(), expected.detach(), rtol=1e-5, atol=0)


def test_a_tapered_update_differs_from_an_untapered_one(tmp_path):
    """Otherwise the test above would not see the taper."""
    losses = [trl_runs.one_update(tmp_path, 7, objective_taper=taper)["loss"].item() for taper in (True, False)]
    assert losses[0] < 0.9 * losses[1]


def test_the_taper_never_weighs_a_completion_more_than_once():
    """min(1, pi / mu): pi below mu, above mu, mu not known, and a positive reward."""
    batch = {"behavior_log_prob": torch.tensor([0.0, -3.0, torch.nan, 0.0]), "rewards": torch.tensor([-1.0, -1, -1, 1])}
    weights = objective._taper(torch.full((4,), -1.0), batch)
    torch.testing.assert_close(weights, torch.tensor([math.exp(-1), 1, 1, 1]))


def test_an_update_without_signal_has_no_gradient(tmp_path):
    """AdamW would turn rounding errors into steps as long as any other."""
    made = trl_runs.trainer(tmp_path, num_iterations=2)
    rows = trl_runs.trajectories(4)
    for t in rows:
        t.reward = 0.0
    made._passes = [[], rows]
    made._annotate([])
    made.model.train()
    for t in rows:
        t.reference["v"] += 1e-6
    made._step = made.args.steps_per_generation
    loss = made.compute_loss(made.model, made._prepare_inputs([]))
    loss.backward()
    assert all(p.grad is None or not p.grad.any() for p in made.model.parameters())
    rows[0].reference["v"] += 1.0
    assert made.compute_loss(made.model, made._prepare_inputs([])) > 0.1


def test_momentum_and_weight_decay_move_nothing_in_an_update_without_signal(tmp_path):
    """From the second generation on all rewards are equal."""
    generations, seen = [], []

    def first_alone(completions, answer, **_):
        generations.append(len(completions))
        return trl_tiny.share_of_c(completions, answer) if len(generations) == 1 else [0.5] * len(completions)

    class Keep(TrainerCallback):
        def on_step_end(self, args, state, control, model, optimizer, **_):
            moments = [x for p in optimizer.state.values() for x in p.values()]
            seen.append([x.clone() for x in [*model.parameters(), *moments]])

    settings = {"num_iterations": 1, "weight_decay": 0.1, "save_strategy": "no"}
    made = trl_runs.trainer(tmp_path, reward=first_alone, **settings)
    made.add_callback(Keep())
    made.add_callback(trl_runs.StopAfter(3))
    made.train()
    assert len(generations) == 3
    assert not torch.equal(seen[0][0], trl_tiny.model().model.embed_tokens.weight)
    assert all(torch.equal(a, b) for later in seen[1:] for a, b in zip(seen[0], later, strict=True))


# ---- whole runs ----

RUNS = {
    "recipe": {},
    "fixed reference, tokens": LEVELS["semi-gradient"] | {"reference_reset_every": 0, "num_iterations": 2},
    "groups, eviction, dropout": {
        "replay_draw": "groups",
        "replay_capacity": 10,
        "reward_shaping": "centered",
        "objective_beta": 0.5,
        "disable_dropout": False,
        "num_iterations": 2,
    },
    "reset every two, two updates a pass": {"reference_reset_every": 2, "num_iterations": 2, "steps_per_generation": 4},
}


@pytest.mark.parametrize("case", RUNS)
def test_a_resumed_run_equals_a_run_without_a_stop(tmp_path, case):
    def run(name, *args, **more):
        return trl_runs.run(tmp_path / name, *args, model=trl_tiny.model(attention_dropout=0.1), **RUNS[case], **more)

    whole = run("whole")
    run("stopped", 3)
    resumed = run("stopped", resume=tmp_path / "stopped" / "checkpoint-3")
    same(trl_runs.weights(whole), trl_runs.weights(resumed))
    assert losses(whole) == losses(resumed)
    assert len(whole.buffer) == min(whole.buffer.added, whole.args.replay_capacity)
    a, b = whole.buffer.state(), resumed.buffer.state()
    assert all(np.array_equal(a[name], b[name]) for name in a)
    assert not all(
        torch.equal(p, q) for p, q in zip(trl_tiny.model().parameters(), whole.model.parameters(), strict=True)
    )


def same(a, b):
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def losses(made):
    return [row["loss"] for row in made.state.log_history if "loss" in row]


def test_a_checkpoint_of_another_trainer_is_refused(tmp_path):
    made = trl_runs.run(tmp_path, 3)
    (tmp_path / "checkpoint-3" / "reval_state.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no reval_state\.json: it is not a checkpoint of a ReValTrainer"):
        made._load_optimizer_and_scheduler(str(tmp_path / "checkpoint-3"))


@pytest.mark.parametrize(
    ("saved", "given", "message"),
    [
        ({}, {"num_iterations": 2}, "num_iterations must be 4, as in the run that saved .*, got 2"),
        ({}, {"steps_per_generation": 4}, "steps_per_generation must be 2, as in the run that saved .*, got 4"),
        ({}, {"reference_reset_every": 2}, "reference_reset_every must be 1, as in the run that saved .*; got 2"),
    ],
)
def test_a_resume_with_an_argument_that_does_not_fit_is_refused(tmp_path, saved, given, message):
    trl_runs.run(tmp_path, 3, **saved)
    with pytest.raises(ValueError, match=message):
        trl_runs.run(tmp_path, resume=tmp_path / "checkpoint-3", **saved | given)


def test_it_learns(tmp_path):
    """The reward is the share of the letter c in the completion, 1/11 by chance."""
    steps = {"max_steps": 32, "logging_steps": 4, "learning_rate": 3e-2, "lr_scheduler_type": "constant"}
    made = trl_runs.run(tmp_path, 32, save_strategy="no", per_device_train_batch_size=8, **steps)
    rewards = [row["reward"] for row in made.state.log_history if "reward" in row]
    assert rewards[0] < 0.2 and np.mean(rewards[-3:]) > 0.55, rewards


def test_metrics_have_the_names_of_the_trainer_reval(tmp_path):
    from reval.metric_names import TRAINING

    made = trl_runs.run(tmp_path, 2, max_steps=2, save_strategy="no", logging_steps=2)
    row = made.state.log_history[0]
    assert {name for name in row if "/" in name and name.split("/")[0] in ("reval", "buffer", "reference")} == {
        name for name in TRAINING if name.split("/")[0] in ("reval", "buffer", "reference")
    } - {"reval/value_lag", "reval/residual_p95", "reval/replay/residual_p95"}
    assert row["buffer/size"] == 8 and row["reference/version"] == 0 and row["reward_unscored"] == 0
    # at the first update the policy is its reference: the residual is -A / beta, and A has variance 1
    assert row["reval/residual_mean"] == pytest.approx(0, abs=1e-4) and 1 < row["reval/residual_abs"] <= 4.01
    assert row["reval/v_policy"] == pytest.approx(row["reval/v_reference"], abs=1e-5)
    assert row["reval/replay/residual_abs"] != row["reval/residual_abs"]


def test_replay_draws_older_generations_and_recomputes_their_stale_values(tmp_path):
    made = trl_runs.run(tmp_path, save_strategy="no", num_iterations=2)
    replayed = made._passes[1]
    assert made.iteration == 3 and len({t.iteration for t in replayed}) > 1
    assert {t.reference["version"] for t in replayed} == {2} and len(made.buffer) == 24
    older = [t for t in replayed if t.iteration < 3]
    assert all(t.uses >= 2 and t.behavior is not None for t in older)
    assert any(abs(t.behavior.sum() - t.reference["log_prob"]) > 1e-3 for t in older)  # mu is not the new reference


def test_a_fixed_reference_stays_the_first_policy(tmp_path):
    made = trl_runs.run(tmp_path, 4, save_strategy="no", num_iterations=2, reference_reset_every=0)
    [t] = made._passes[0][:1]
    values = own_values(trl_tiny.model(), t)
    assert t.reference["v"] == pytest.approx(values.v[0, 0].item(), abs=1e-5)
    assert t.reference["log_prob"] == pytest.approx(values.log_prob.sum().item(), abs=1e-4)
    before = trl_runs.weights(made)
    with made.reference():
        same(trl_runs.weights(made), dict(trl_tiny.model().named_parameters()))
    same(trl_runs.weights(made), before)


def test_completions_without_a_score_or_an_action_are_left_out(tmp_path):
    def some(completions, **_):
        return [None if i % 4 == 1 else float(len(text)) for i, text in enumerate(completions)]

    made = trl_runs.run(tmp_path, 2, save_strategy="no", reward=some, num_iterations=2)
    assert [len(rows) for rows in made._passes] == [6, 6] and len(made.buffer) == 6
    assert made.state.log_history[0]["reward_unscored"] == 0.25
    made = trl_runs.run(tmp_path, 2, save_strategy="no", num_iterations=2, mask_truncated_completions=True)
    assert 0 < len(made.buffer) < 8 and all(t.finished for t in made.buffer)
    assert made.state.log_history[0]["reward_unscored"] == 0  # left out, but they have a score
    made = trl_runs.run(tmp_path, 2, save_strategy="no", reward=lambda completions, **_: [None] * len(completions))
    assert len(made.buffer) == 0
    same(trl_runs.weights(made), dict(trl_tiny.model().named_parameters()))


def test_tokens_of_an_environment_are_no_actions(tmp_path):
    def rollout(prompts, trainer):
        ids = [trainer.processing_class(p)["input_ids"] for p in prompts]
        said = [[3 + i % 5, 4, 5, 6, 1] for i in range(len(prompts))]
        mask = [[1, 0, 0, 1, 1]] * len(prompts)
        logprobs = [[0.0] * 5] * len(prompts)
        return {"prompt_ids": ids, "completion_ids": said, "logprobs": logprobs, "env_mask": mask}

    made = trl_runs.trainer(tmp_path, save_strategy="no")
    made.rollout_func = rollout
    made.train()
    for t in made.buffer:
        assert t.action_mask[-5:].tolist() == [True, False, False, True, True] and len(t.behavior) == 3
        assert t.finished


def test_lora(tmp_path):
    """Only adapters train, are saved and are kept as the reference. With one update a generation, the run is stopped
    when its reference is neither the first policy nor the present one."""

    def adapted():
        torch.manual_seed(1)
        return get_peft_model(trl_tiny.model(), LoraConfig(target_modules=["q_proj", "v_proj"], r=2))

    settings = {"reference_reset_every": 2, "num_iterations": 1}
    whole = trl_runs.run(tmp_path / "whole", model=adapted(), **settings)
    trl_runs.run(tmp_path / "stopped", 3, model=adapted(), **settings)
    checkpoint = tmp_path / "stopped" / "checkpoint-3"
    resumed = trl_runs.run(tmp_path / "stopped", resume=checkpoint, model=adapted(), **settings)
    same(trl_runs.weights(whole), trl_runs.weights(resumed))
    base = trl_tiny.model().model.embed_tokens.weight
    assert torch.equal(whole.model.get_base_model().model.embed_tokens.weight, base)
    moved = [p for name, p in whole.model.named_parameters() if "lora_B" in name]
    assert all(p.any() for p in moved)
    assert whole.reference._kept and all("lora" in name for name in whole.reference._kept)


def test_evaluation_bf16_and_checkpointed_activations(tmp_path):
    some = trl_tiny.prompts().select(range(4))
    settings = {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 4, "eval_dataset": some}
    settings |= {"gradient_checkpointing": True, "bf16": True, "max_steps": 2, "save_strategy": "no"}
    made = trl_runs.run(tmp_path, 2, **settings)
    found = {name for row in made.state.log_history for name in row}
    assert {"eval_reward", "eval_loss", "eval_reval/residual_abs"} <= found
    assert len(made.buffer) == 8  # evaluation adds nothing
    assert all(np.isfinite(losses(made))) and losses(made)[0] > 0


def test_what_was_not_tried_is_refused(tmp_path, monkeypatch):
    made = trl_runs.trainer(tmp_path)
    with pytest.raises(ValueError, match="return_outputs must be False"):
        made.compute_loss(made.model, {}, return_outputs=True)
    made.aux_loss_enabled = True
    with pytest.raises(ValueError, match=r"router_aux_loss_coef=0\.0"):
        made._refuse_untried()
    made.aux_loss_enabled, made.is_fsdp_enabled, made.args.reference_reset_every = False, True, 3
    state = SimpleNamespace(fsdp_plugin=SimpleNamespace(fsdp_version=2), deepspeed_plugin=SimpleNamespace(zero_stage=3))
    monkeypatch.setattr(made.accelerator, "state", state)
    with pytest.raises(ValueError, match="reference_reset_every must be 1 with FSDP or DeepSpeed.*; got 3"):
        made._refuse_untried()
    state.fsdp_plugin.fsdp_version = 1
    with pytest.raises(ValueError, match="needs FSDP2, got fsdp_version 1: set fsdp_version: 2 in accelerate"):
        made._refuse_untried()
    made.is_fsdp_enabled, made.is_deepspeed_enabled, made.args.reference_reset_every = False, True, 1
    with pytest.raises(ValueError, match="cannot train with ZeRO-3.*: set zero_stage to 1 or 2"):
        made._refuse_untried()
    made._is_vlm = True
    with pytest.raises(ValueError, match="vision-language"):
        made._refuse_untried()


# ---- two processes ----


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = str(Path(trl_runs.__file__))
    done = subprocess.run(
        [*command, script, str(folder)], capture_output=True, text=True, timeout=280, env=environment()
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in (0, 1)]


@pytest.mark.distributed
@pytest.mark.parametrize("count", [9, 1])
def test_two_processes_compute_what_one_does(two, tmp_path, count):
    """9 completions share out unevenly; with 1, one process has none."""
    one = trl_runs.one_update(tmp_path, count)
    for rank in two:
        got = rank["updates"][count]
        torch.testing.assert_close(got["loss"], one["loss"], rtol=1e-5, atol=1e-6)
        for a, b in zip(got["reference"], one["reference"], strict=True):
            assert a == pytest.approx(b, rel=1e-5)
        for name, gradient in one["gradient"].items():
            atol = 1e-5 * gradient.abs().max().item()
            torch.testing.assert_close(got["gradient"][name], gradient, rtol=1e-4, atol=atol)


@pytest.mark.distributed
def test_two_processes_stay_equal_and_resume(two):
    same(two[0]["whole"], two[1]["whole"])
    for rank in two:
        same(rank["whole"], rank["resumed"])
    for (a, r, u), (b, q, v) in zip(two[0]["buffer"], two[1]["buffer"], strict=True):
        assert np.array_equal(a, b) and r == q and u == v
    assert len(two[0]["buffer"]) == 32  # two generations of 2 x 2 x 4
    assert any(row["reval/residual_abs"] > 1 for row in two[0]["log"] if "reval/residual_abs" in row)
