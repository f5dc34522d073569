"""reval.integrations.verl against the real verl, on a CPU. `make test-peers` installs verl; elsewhere most of it skips.

The engine is verl's own FSDP2 engine with one process and gloo, on a model of 20 thousand weights.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parents[3]


def run(code: str, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], env=os.environ | env, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout + done.stderr


verl = pytest.importorskip("verl", reason="verl is not installed: make test-peers")
from functools import partial  # noqa: E402

import pandas  # noqa: E402
import verl_cpu  # noqa: E402, F401  # before verl's engines
from omegaconf import OmegaConf  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402
from verl_cpu import save_tiny_model  # noqa: E402

from reval.integrations.verl import register  # noqa: E402
from reval_kernels import reference  # noqa: E402

register()
from tensordict import TensorDict  # noqa: E402
from transfer_queue import KVBatchMeta  # noqa: E402
from verl.trainer.config import CheckpointConfig  # noqa: E402
from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY, get_policy_loss_fn  # noqa: E402
from verl.trainer.ppo.v1 import get_trainer_cls  # noqa: E402
from verl.utils import tensordict_utils as tu  # noqa: E402
from verl.utils.config import omega_conf_to_dataclass, validate_config  # noqa: E402
from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig  # noqa: E402
from verl.workers.engine import EngineRegistry, FSDPEngineWithLMHead  # noqa: E402
from verl.workers.utils.losses import ppo_loss  # noqa: E402
from verl.workers.utils.padding import response_from_nested  # noqa: E402

from reval.integrations.verl.engine import ReValEngine  # noqa: E402
from reval.integrations.verl.loss import ReValLossConfig, given, reval_policy_loss  # noqa: E402
from reval.integrations.verl.trainer import ReplayConfig, ReValTrainer  # noqa: E402

pytestmark = pytest.mark.timeout(1800)  # each import of verl takes seconds, and minutes on a busy machine
VOCABULARY = 40
SHAPES = [(5, 4), (3, 7), (6, 1), (4, 6)]
"""Prompt and response of each trajectory: other lengths each, and one response of one token."""


# the plugin


@pytest.mark.parametrize(("vendor", "loaded"), [("reval", True), ("", False)])
def test_verl_loads_the_plugin_by_its_entry_point_and_only_if_asked(vendor, loaded):
    """Loading verl's engines fixes its platform, so a plugin that nobody asked for must not load them."""
    code = (
        "import sys, verl\n"
        "names = ('reval.integrations.verl', 'reval.integrations.verl.trainer', 'verl.workers.engine')\n"
        "print('loaded:', *(name in sys.modules for name in names))"
    )
    assert f"loaded: True {loaded} {loaded}" in run(code, VERL_ENGINE_VENDOR=vendor, VERL_PLATFORM="")


def test_a_plugin_that_fails_says_so():
    """verl logs the exception of a plugin at level DEBUG, and would later only say: unknown trainer."""
    out = run("import verl", VERL_ENGINE_VENDOR="reval", VERL_PLATFORM="toaster")
    assert "VERL_ENGINE_VENDOR=reval, but ReVal's plugin failed: Unknown platform 'toaster'" in out


def test_another_version_of_verl_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(verl, "__version__", "0.10.0")
    with pytest.raises(ImportError, match="knows verl 0.9.0 and 0.9.1, got 0.10.0"):
        register()


def test_the_names_are_in_verls_registries():
    assert get_policy_loss_fn("reval") is reval_policy_loss
    assert get_trainer_cls("reval") is ReValTrainer
    assert "reval" in ADV_ESTIMATOR_REGISTRY


@pytest.mark.parametrize("backend", ["fsdp", "fsdp2"])
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_vendor_lookup(monkeypatch, backend, device):
    monkeypatch.setenv("VERL_ENGINE_DEVICE", device)
    monkeypatch.setenv("VERL_ENGINE_VENDOR", "reval")
    assert EngineRegistry.get_engine_cls("language_model", backend) is ReValEngine
    monkeypatch.setenv("VERL_ENGINE_DEVICE", "cuda")
    assert EngineRegistry.get_engine_cls("value_model", backend) is not ReValEngine  # a critic stays verl's
    monkeypatch.setenv("VERL_ENGINE_VENDOR", "nvidia")
    assert EngineRegistry.get_engine_cls("language_model", backend) is FSDPEngineWithLMHead


# the loss


def nested(rows: list[torch.Tensor]) -> torch.Tensor:
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


def micro_batch(seed: int = 0, dtype: torch.dtype = torch.float32) -> TensorDict:
    """A batch as verl's actor gets it. The second trajectory has two tokens of a tool in its response."""
    g = torch.Generator().manual_seed(seed)
    sequences = [torch.randint(0, VOCABULARY, (p + r,), generator=g) for p, r in SHAPES]
    masks = [torch.ones(r, dtype=torch.int64) for _, r in SHAPES]
    masks[1][2:4] = 0
    rewards = torch.tensor([1.0, 0.0, -1.0, 0.5], dtype=dtype)

    def noise() -> torch.Tensor:
        return nested([torch.randn(r, generator=g, dtype=dtype) for _, r in SHAPES])

    fields = {
        "input_ids": nested(sequences),
        "position_ids": nested([torch.arange(len(s)) for s in sequences]),
        "prompts": nested([s[:p] for s, (p, _) in zip(sequences, SHAPES, strict=True)]),
        "responses": nested([s[p:] for s, (p, _) in zip(sequences, SHAPES, strict=True)]),
        "response_mask": nested(masks),
        "loss_mask": nested(masks),
        "old_log_probs": noise(),
        "ref_log_prob": noise(),
        "ref_state_values": noise(),
        "advantages": nested([r * m for r, m in zip(rewards, masks, strict=True)]),
    }
    data = TensorDict(fields, batch_size=len(SHAPES))
    tu.assign_non_tensor(data, temperature=1.3, global_batch_size=len(SHAPES), micro_batch_size_per_gpu=2)
    tu.assign_non_tensor(data, use_remove_padding=False, use_dynamic_bsz=False, use_fused_kernels=False)
    return data


def actor(**options) -> OmegaConf:
    """verl's ActorConfig with our loss and verl's defaults."""
    with_defaults = {"beta": 0.3} | options
    return omega_conf_to_dataclass(
        OmegaConf.create(
            {
                "_target_": "verl.workers.config.FSDPActorConfig",
                "strategy": "fsdp2",
                "rollout_n": 2,
                "ppo_micro_batch_size_per_gpu": 2,
                "use_kl_loss": True,
                "kl_loss_coef": 0.0,
                "kl_loss_type": "kl",
                "policy_loss": {"_target_": "reval.integrations.verl.loss.ReValLossConfig"} | with_defaults,
            }
        )
    )


def expected_loss(logits: torch.Tensor, data: TensorDict, **options) -> torch.Tensor:
    """The definition, trajectory by trajectory: packed logits [N, V] of all tokens, at temperature 1.3."""
    actions = torch.roll(data["input_ids"].values(), -1)
    values = reference.token_values(logits, actions, temperature=1.3)
    offsets, dtype, total = data["input_ids"].offsets().tolist(), logits.dtype, 0.0
    rows = zip(SHAPES, offsets, *(data[k].unbind() for k in FIELDS), strict=False)
    for (p, r), start, mask, ref_log_prob, ref_v, advantages in rows:
        states = slice(start + p - 1, start + p + r - 1)  # the state of a token is the position before it
        own = [x[states][None] for x in values[:3]]
        ref = [x.to(dtype)[None] for x in (ref_v + ref_log_prob, ref_v, ref_log_prob)]
        total = (
            total
            + reference.bellman_loss(
                type(values)(*own), type(values)(*ref), advantages[:1].to(dtype), mask=mask[None].bool(), **options
            ).loss
        )
    return total / len(SHAPES)


FIELDS = ("response_mask", "ref_log_prob", "ref_state_values", "advantages")


def loss_of_verl(data: TensorDict, output: dict, config, dp_size: int = 1) -> torch.Tensor:
    tu.assign_non_tensor(data, dp_size=dp_size, batch_num_tokens=int(data["response_mask"].values().sum()))
    with given(output, data):
        return ppo_loss(config=config, model_output=output, data=data)


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize(
    "options",
    [{"level": "trajectory"}, {"level": "token", "semi_gradient": True}, {"level": "subtrajectory"}],
    ids=lambda o: o["level"],
)
def test_loss_and_gradient_on_nested_tensors_are_those_of_the_definition(options, padding):
    """verl's ppo_loss with our policy loss, on what our engine makes of logits in float64."""
    data, config = micro_batch(dtype=torch.float64), actor(**options)
    tu.assign_non_tensor(data, use_remove_padding=not padding)
    offsets = data["input_ids"].offsets()
    packed = torch.randn(int(offsets[-1]), VOCABULARY, dtype=torch.float64, requires_grad=True)
    logits = packed[None]
    if padding:
        logits = torch.nested.to_padded_tensor(torch.nested.nested_tensor_from_jagged(packed, offsets), 7.0)
    args = {"input_ids_rmpad_rolled": torch.roll(data["input_ids"].values(), -1), "pad_size": 0}
    args["temperature_rmpad"] = torch.full((len(packed),), 1.3)
    args["temperature"] = torch.full((len(SHAPES),), 1.3)
    engine = object.__new__(ReValEngine)
    engine.use_ulysses_sp = False
    output = engine.prepare_model_outputs(type("Output", (), {"logits": logits}), args, data, None)
    assert set(output) == {"log_probs", "state_values"}
    loss, metrics = loss_of_verl(data, output, config)
    (gradient,) = torch.autograd.grad(loss, packed)
    other = packed.detach().requires_grad_()
    wanted = expected_loss(other, data, beta=0.3, **options)
    (expected,) = torch.autograd.grad(wanted, other)
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=0)  # the temperature is float32 in verl
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-7)
    assert gradient[0].count_nonzero() == 0  # a token of the prompt
    assert {"actor/reval_residual_abs", "actor/reval_v_gap", "actor/pg_loss"} <= set(metrics)


def test_calibrated_start_has_loss_and_gradient_zero():
    data, config = micro_batch(), actor()
    logs, v = (torch.randn(int(data["input_ids"].offsets()[-1])) for _ in range(2))
    output = {
        k: torch.nested.nested_tensor_from_jagged(x.requires_grad_(), data["input_ids"].offsets())
        for k, x in (("log_probs", logs), ("state_values", v))
    }
    data["ref_log_prob"] = response_from_nested(output["log_probs"].detach(), data["response_mask"])
    data["ref_state_values"] = response_from_nested(output["state_values"].detach(), data["response_mask"])
    data["advantages"] = nested([x * 0 for x in data["advantages"].unbind()])
    loss, _ = loss_of_verl(data, output, config)
    assert loss == 0 and all(g.count_nonzero() == 0 for g in torch.autograd.grad(loss, (logs, v)))


def made_output(data: TensorDict) -> dict[str, torch.Tensor]:
    offsets = data["input_ids"].offsets()
    draws = torch.Generator().manual_seed(3)
    names = ("log_probs", "state_values")
    return {
        k: torch.nested.nested_tensor_from_jagged(torch.randn(int(offsets[-1]), generator=draws), offsets)
        for k in names
    }


def test_the_loss_counts_ranks_mini_batches_and_padding_rows_as_verl_does():
    data, config = micro_batch(), actor()
    output = made_output(data)
    one = loss_of_verl(data, output, config)[0]
    assert torch.equal(loss_of_verl(data, output, config, dp_size=2)[0], 2 * one)
    tu.assign_non_tensor(data, global_batch_size=2 * len(SHAPES))
    torch.testing.assert_close(loss_of_verl(data, output, config)[0], one / 2)
    masks = [m * 0 if i == 2 else m for i, m in enumerate(data["response_mask"].unbind())]
    data["response_mask"] = nested(masks)  # verl pads a batch with rows whose mask is 0
    assert 0 < loss_of_verl(data, output, config)[0] < one / 2


def test_what_is_missing_is_named():
    data, config = micro_batch(), actor()
    output = made_output(data)
    tu.assign_non_tensor(data, dp_size=1, batch_num_tokens=16)
    with pytest.raises(RuntimeError, match="VERL_ENGINE_VENDOR=reval"):
        ppo_loss(config=config, model_output=output, data=data)
    with pytest.raises(ValueError, match="ref_state_values: set trainer.v1.trainer_mode=reval"):
        loss_of_verl(data.exclude("ref_state_values"), output, config)
    with pytest.raises(ValueError, match="rollout_correction=null"):
        data["rollout_is_weights"] = data["advantages"]
        loss_of_verl(data, output, config)
    with pytest.raises(TypeError, match="_target_=reval.integrations.verl.loss.ReValLossConfig, got PolicyLossConfig"):
        plain = actor()
        object.__setattr__(plain, "policy_loss", ReValLossConfig.__base__(loss_mode="reval"))
        loss_of_verl(data.exclude("rollout_is_weights"), output, plain)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"beta": None}, "beta must be a positive number, got None"),
        ({"beta": 0}, "beta must be a positive number, got 0"),
        ({"beta": float("nan")}, "beta must be a positive number, got nan"),
        ({"beta": True}, "beta must be a positive number, got True"),
        ({"beta": "small"}, "beta must be a positive number, got 'small'"),
        ({"level": "word"}, "level must be one of trajectory, token, subtrajectory; got 'word'"),
        ({"level": ["token"]}, "level must be one of"),
        ({"semi_gradient": True}, "semi_gradient must be false, or true with .*level=token; got True with trajectory"),
        ({"semi_gradient": "yes", "level": "token"}, "semi_gradient must be false, .* got 'yes' with token"),
    ],
)
def test_settings_of_the_loss_are_checked_at_once(wrong, message):
    with pytest.raises(ValueError, match=f"actor_rollout_ref.actor.policy_loss.{message}"):
        ReValLossConfig(**{"beta": 0.1} | wrong)


def test_advantage_estimator_puts_the_reward_on_every_action():
    mask = torch.tensor([[1, 1, 0], [1, 0, 1]])
    rewards = torch.tensor([[0.0, 2.0, 0.0], [0.0, 0.0, -1.0]])
    found, _ = ADV_ESTIMATOR_REGISTRY["reval"](
        token_level_rewards=rewards, response_mask=mask, config=None, index=[0, 0]
    )
    assert found.tolist() == [[2.0, 2.0, 0.0], [-1.0, 0.0, -1.0]]


# the engine


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> str:
    folder = str(tmp_path_factory.mktemp("model"))
    save_tiny_model(folder, VOCABULARY)
    return folder


@pytest.fixture(scope="module")
def process_group():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture
def engine(model_folder, process_group) -> ReValEngine:
    return made_engine(model_folder)


def made_engine(model_folder: str) -> ReValEngine:
    """verl's registry builds it, as in a worker of verl."""
    model = HFModelConfig(
        path=model_folder, enable_gradient_checkpointing=False, override_config={"attn_implementation": "sdpa"}
    )
    model.model_type = "language_model"
    settings = FSDPEngineConfig(
        strategy="fsdp2", mixed_precision={"param_dtype": "fp32"}, use_torch_compile=False, use_dynamic_bsz=False
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VERL_ENGINE_VENDOR", "reval")
        made = EngineRegistry.new(
            "language_model",
            "fsdp2",
            model_config=model,
            engine_config=settings,
            optimizer_config=FSDPOptimizerConfig(lr=3e-3, total_training_steps=100, weight_decay=0.0),
            checkpoint_config=CheckpointConfig(),
        )
    made.initialize()
    return made


def plain_logits(model, data: TensorDict) -> torch.Tensor:
    """Packed logits [N, V] of the Hugging Face model, one sequence at a time."""
    return torch.cat([model(input_ids=ids[None]).logits[0] for ids in data["input_ids"].unbind()])


@pytest.mark.parametrize("padding", [False, True])
def test_engine_returns_v_log_probs_and_entropy_of_the_model(engine, model_folder, padding):
    data = micro_batch()
    tu.assign_non_tensor(data, use_remove_padding=not padding, calculate_entropy=True)
    with engine.eval_mode():
        found = engine.infer_batch(data)["model_output"]
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float64)
    wanted = reference.token_values(
        plain_logits(model, data), torch.roll(data["input_ids"].values(), -1), temperature=1.3, with_entropy=True
    )
    for name, values in (("state_values", wanted.v), ("log_probs", wanted.log_prob), ("entropy", wanted.entropy)):
        assert torch.equal(found[name].offsets(), data["input_ids"].offsets())
        packed = torch.nested.nested_tensor_from_jagged(values.float(), data["input_ids"].offsets())
        ours, theirs = (response_from_nested(x, data["response_mask"]).values() for x in (found[name], packed))
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_log_probs_are_those_of_verls_own_engine(engine):
    data = micro_batch()
    with engine.eval_mode():
        ours = engine.infer_batch(data)["model_output"]
        engine.__class__ = FSDPEngineWithLMHead
        theirs = engine.infer_batch(data)["model_output"]
    torch.testing.assert_close(ours["log_probs"].values(), theirs["log_probs"].values(), rtol=1e-5, atol=1e-5)
    assert set(theirs) == {"log_probs"}


@pytest.mark.parametrize("padding", [False, True])
def test_backward_through_verls_engine_is_the_gradient_of_the_definition(engine, model_folder, padding):
    """Two micro-batches, verl's ppo_loss, FSDP2; the other side is autograd through the plain model in float64."""
    data = micro_batch()
    tu.assign_non_tensor(data, use_remove_padding=not padding)
    with engine.train_mode():
        out = engine.forward_backward_batch(data, partial(ppo_loss, config=actor()))
        found = {name: w.grad.full_tensor().clone() for name, w in engine.module.named_parameters()}
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float64)
    loss = expected_loss(plain_logits(model, data), data, beta=0.3)
    loss.backward()
    torch.testing.assert_close(sum(out["loss"]), float(loss), rtol=1e-4, atol=0)
    for name, weight in model.named_parameters():
        scale = weight.grad.abs().max().item()
        torch.testing.assert_close(found[name].double(), weight.grad, rtol=1e-3, atol=1e-4 * scale, msg=name)


def test_two_ranks_have_the_gradient_of_the_whole_batch(tmp_path):
    """FSDP averages over the ranks, and verl's losses count them."""
    save_tiny_model(str(tmp_path / "model"), VOCABULARY)
    here = Path(__file__).parent
    env = os.environ | {"PYTHONPATH": f"{here}:{ROOT}", "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen([sys.executable, "-W", "ignore", here / "verl_ranks.py", str(rank), tmp_path], env=env)
        for rank in range(2)
    ]
    assert [rank.wait() for rank in ranks] == [0, 0]
    data, found = micro_batch(), torch.load(tmp_path / "gradients.pt")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float64)
    expected_loss(plain_logits(model, data), data, beta=0.3).backward()
    for name, weight in model.named_parameters():
        scale = weight.grad.abs().max().item()
        torch.testing.assert_close(found[name].double(), weight.grad, rtol=1e-3, atol=1e-4 * scale, msg=name)


def test_verls_train_batch_fits_the_residuals(engine):
    """The same off-policy batch again and again, as replay does: the residuals shrink."""
    data, losses = micro_batch(), []
    for _ in range(20):
        with engine.train_mode():
            losses.append(sum(engine.train_batch(data, partial(ppo_loss, config=actor()))["loss"]))
    assert losses[-1] < 0.5 * losses[0], losses


def test_options_that_need_another_pass_over_the_logits_are_refused(engine):
    data = micro_batch()
    tu.assign_non_tensor(data, calculate_sum_pi_squared=True)
    with engine.eval_mode(), pytest.raises(ValueError, match="calculate_sum_pi_squared must be false"):
        engine.infer_batch(data)


# the settings


def composed(*overrides: str):
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(str(ROOT / "examples" / "verl"), version_base=None):
        return compose("reval", overrides=["trainer.n_gpus_per_node=1", *overrides])


def test_the_example_config_is_one_that_verl_accepts():
    config = composed()
    validate_config(config=config, use_reference_policy=True, use_critic=False)
    assert isinstance(omega_conf_to_dataclass(config.actor_rollout_ref.actor).policy_loss, ReValLossConfig)
    trainer = ReValTrainer(config)
    assert trainer.options == ReplayConfig(updates=2, capacity=5120, max_staleness_versions=None, seed=0)
    assert trainer.use_reference_policy and not trainer.use_critic
    assert config.ray_kwargs.ray_init.runtime_env.env_vars.VERL_ENGINE_VENDOR == "reval"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("actor_rollout_ref.actor.use_kl_loss=false", "use_kl_loss=true, kl_loss_coef=0 and kl_loss_type=kl"),
        ("actor_rollout_ref.actor.kl_loss_coef=0.1", "got True, 0.1 and kl"),
        ("actor_rollout_ref.ref.strategy=megatron", "ref.strategy=fsdp or fsdp2: .* no V; got megatron"),
        ("algorithm.adv_estimator=gae", "has no critic: .* got gae"),
        ("critic.enable=true", "has no critic: .* got grpo, and critic.enable=True"),
        ("trainer.critic_warmup=3", "trainer.critic_warmup=0, got 3"),
        ("trainer.v1.reval.updates=0", "trainer.v1.reval.updates must be a whole number >= 1, got 0"),
        ("trainer.v1.reval.updates=two", "trainer.v1.reval.updates must be a whole number >= 1, got 'two'"),
        ("trainer.v1.reval.capacity=null", "trainer.v1.reval.capacity must be a whole number >= 1, got None"),
        ("trainer.v1.reval.max_staleness_versions=-1", "trainer.v1.reval.max_staleness_versions must be .* or null"),
        ("trainer.v1.reval.seed=0.5", "trainer.v1.reval.seed must be a whole number >= 0, got 0.5"),
        ("+trainer.v1.reval.staleness=2", "trainer.v1.reval has no setting staleness; it has updates, capacity"),
        ("+trainer.v1.reval.parameter_sync_step=2", "parameter_sync_step must be 1, got 2"),
    ],
)
def test_settings_that_cannot_work_are_refused(override, message):
    with pytest.raises(ValueError, match=message):
        ReValTrainer(composed(override))


@pytest.mark.parametrize("column", [1, 2])
def test_the_overrides_in_coming_from_are_accepted_beside_verls_own_config(column):
    from hydra import compose, initialize_config_module

    section = (ROOT / "docs" / "coming_from.md").read_text(encoding="utf-8").split("\n## verl\n")[1].split("\n## ")[0]
    cells = [line.split("|")[column] for line in section.splitlines() if line.startswith("|")]
    found = re.findall(r"`(\+?(?:actor|algorithm|trainer|actor_rollout_ref)\.[^`=]+=[^`]+)`", " ".join(cells))
    assert len(found) >= 9
    overrides = [re.sub(r"^(\+?)actor\.", r"\1actor_rollout_ref.actor.", text) for text in found]
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose("ppo_trainer", overrides=["algorithm.adv_estimator=grpo", *overrides])
    policy_loss = omega_conf_to_dataclass(config.actor_rollout_ref.actor.policy_loss)
    if column == 2:
        assert policy_loss.beta == 0.02 and isinstance(policy_loss, ReValLossConfig)
        assert ReValTrainer(config).options == ReplayConfig(updates=2, max_staleness_versions=8)


# the trainer


def test_the_stored_reference_values_are_those_of_the_initial_model(engine, model_folder, monkeypatch):
    """verl's workers write into the same field of the queue: the actor first, then the reference."""
    queue, initial = micro_batch(), made_engine(model_folder)
    queue = queue.exclude("ref_log_prob", "ref_state_values")
    for _ in range(3):
        with engine.train_mode():
            engine.train_batch(micro_batch(), partial(ppo_loss, config=actor()))

    def pass_of(worker) -> list[int]:
        with worker.eval_mode():
            queue.update(worker.infer_batch(queue)["model_output"])
        return [0] * len(SHAPES)

    monkeypatch.setattr(
        "transfer_queue.kv_batch_get", lambda keys, partition_id, select_fields: queue.select(*select_fields)
    )
    monkeypatch.setattr("transfer_queue.kv_batch_put", lambda keys, partition_id, fields: queue.update(fields))
    trainer = ReValTrainer(composed())
    trainer.ref_in_actor = False
    trainer.ref_policy_wg = SimpleNamespace(compute_ref_log_prob=lambda batch: pass_of(initial))
    pass_of(engine)
    of_actor = response_from_nested(queue["state_values"], queue["response_mask"]).values()
    trainer._compute_ref_log_prob(KVBatchMeta(keys=[str(i) for i in range(len(SHAPES))], tags=[{}] * len(SHAPES)), {})
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float64)
    actions = torch.roll(queue["input_ids"].values(), -1)
    wanted = reference.token_values(plain_logits(model, queue), actions, temperature=1.3)
    for name, packed in (("ref_state_values", wanted.v), ("ref_log_prob", wanted.log_prob)):
        nested_values = torch.nested.nested_tensor_from_jagged(packed.float(), queue["input_ids"].offsets())
        expected = response_from_nested(nested_values, queue["response_mask"]).values()
        torch.testing.assert_close(queue[name].values(), expected, rtol=1e-5, atol=1e-5)
    assert (queue["ref_state_values"].values() - of_actor).abs().max() > 1e-2  # the actor has moved


def test_the_schedule_of_the_learning_rate_counts_all_updates(model_folder, tmp_path):
    """verl's engines get the number of updates; the trainer still ends after the steps."""
    row = {"data_source": "none", "prompt": [{"role": "user", "content": "3"}], "reward_model": {"ground_truth": ""}}
    pandas.DataFrame([row] * 8).to_parquet(tmp_path / "prompts.parquet")
    settings = ["data.train_batch_size=4", "trainer.total_epochs=5", "trainer.v1.reval.updates=3"]
    settings += [f"data.{name}={tmp_path}/prompts.parquet" for name in ("train_files", "val_files")]
    trainer = ReValTrainer(composed(f"actor_rollout_ref.model.path={model_folder}", *settings))
    trainer._init_tokenizer()
    trainer._init_dataloader()
    assert trainer.total_training_steps == 10
    assert trainer.config.actor_rollout_ref.actor.optim.total_training_steps == 30


def run_of_the_trainer(folder: Path, steps: int) -> list[dict]:
    """verl_run.py in a process of its own: the rows that it prints."""
    here = Path(__file__).parent
    env = {"VERL_USE_EXTERNAL_MODULES": "verl_cpu", "VERL_PLATFORM": "cpu", "VERL_ENGINE_VENDOR": "reval"}
    env |= {"PYTHONPATH": f"{here}:{ROOT}", "OMP_NUM_THREADS": "1"}
    env["RAY_worker_niceness"] = "0"  # 15 otherwise: on a busy machine Ray's workers would get no time
    command = [sys.executable, "-W", "ignore", str(here / "verl_run.py"), str(folder), str(steps)]
    done = subprocess.run(command, env=os.environ | env, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return [json.loads(line[4:]) for line in done.stdout.splitlines() if line.startswith("ROW ")]


@pytest.mark.slow
def test_the_trainer_replays_evicts_and_resumes(tmp_path):
    """Two steps with a checkpoint, then two more from it. Batches of 8 trajectories, 3 updates, 2 versions of lag."""
    rows = run_of_the_trainer(tmp_path, 2)
    assert [row["step"] for row in rows] == [1, 2]
    rows += run_of_the_trainer(tmp_path, 4)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    admitted: list[set[str]] = []
    for row in rows:
        (first, new), *replayed = row["trained"]
        assert first == "train" and len(set(new)) == 8 and len(replayed) == 2
        admitted.append(set(new))
        held = set().union(*admitted[-3:])  # of this version and of the two before
        for partition, keys in replayed:
            assert partition == "reval_replay" and len(set(keys)) == 8 and set(keys) <= held
        assert row["stored"] == row["replay/size"] == len(held)
        assert row["actor/grad_norm"] > 0 and row["replay/actor/reval_residual_abs"] > 0
    drawn = {key for row in rows[2:] for _, keys in row["trained"][1:] for key in keys}
    assert drawn & (admitted[0] | admitted[1])  # a resumed run replays what was generated before
    assert len({row["actor/lr"] for row in rows}) == 1
