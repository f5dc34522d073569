"""Settings: their list, their allowed values, how they are read, and the error messages.

Most tests compare a whole error message, because users read the messages. Hypothesis generates the values for the round
trips, because YAML has many special cases: `yes`, 1e-6, `{question}`, ` #`.
"""

import dataclasses
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from reval import config_io
from reval.config import PATHS, Config, ConfigError, DataConfig, OptimConfig, ReplayConfig, help_text, load_config

CONFIGS = Path(__file__).parents[2] / "configs"

# A new setting must be added to this list too, so that nobody adds a setting by accident.
SETTINGS = """
data.chat_template_kwargs data.columns data.held_out data.held_out_path data.name data.options data.path data.seed
data.size data.source data.split data.subset data.system_prompt data.template
distributed.timeout
environment.max_tokens environment.max_turns environment.name environment.options environment.timeout
environment.workers
evaluation.benchmarks evaluation.best_of_n evaluation.every evaluation.folder evaluation.greedy evaluation.k
evaluation.problems evaluation.reward evaluation.samples evaluation.temperature evaluation.template
lora.alpha lora.rank lora.targets
model.attn_implementation model.compile model.compute_dtype model.device model.dtype model.gradient_checkpointing
model.head_precision model.name
objective.baseline_shift objective.beta objective.clip_high objective.clip_low objective.level objective.name
objective.normalization objective.options objective.semi_gradient objective.taper objective.value_gradient
optim.betas optim.eps optim.lr optim.max_grad_norm optim.micro_batch_tokens optim.packing optim.schedule optim.warmup
optim.weight_decay
reference.offload reference.reset_every
replay.batch_size replay.capacity replay.draw replay.preload replay.preload_shaping replay.updates_per_iteration
reward.function reward.shaping reward.timeout reward.workers
rollout.ahead rollout.batch_size rollout.dtype rollout.engine rollout.max_new_tokens rollout.options
rollout.probe_tokens rollout.prompts rollout.responses rollout.sync_every rollout.temperature rollout.timeout
rollout.vllm_devices rollout.vllm_gpu_memory rollout.vllm_mode rollout.vllm_options
rollout.vllm_sleep
run.best_metric run.dir run.display run.iterations run.overwrite run.resume run.save_every run.save_total_limit run.seed
run.table run.threads
tracking.name tracking.project tracking.rollouts tracking.samples tracking.tensorboard tracking.trackio tracking.wandb
""".split()


def write(folder: Path, text: str, name: str = "x.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def error_of(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config([], overrides)
    return str(caught.value)


def file_error(folder: Path, text: str) -> str:
    """The message for a file that holds `text`, without the folder's name."""
    path = write(folder, text)
    with pytest.raises(ConfigError) as caught:
        load_config([path])
    return str(caught.value).replace(str(path), "x.yaml")


# ---- The declarations ----


def test_the_settings_are_these():
    assert sorted(config_io.settings(Config)) == SETTINGS


@pytest.mark.parametrize("section", dataclasses.fields(Config), ids=lambda section: section.name)
def test_every_setting_has_one_help_line_and_a_type_that_can_be_described(section):
    docs = config_io.field_docs(section.type)
    assert list(docs) == [field.name for field in dataclasses.fields(section.type)]
    for field in dataclasses.fields(section.type):
        assert docs[field.name].endswith((".", "...")) and len(docs[field.name]) > 10
        assert config_io.describe(field.type)
    # Error messages derive the name of the section from the name of the class.
    assert section.type.__name__ == section.name.capitalize() + "Config"


def test_help_shows_name_default_type_and_meaning():
    text = help_text(width=100)
    assert "  optim.lr=1e-06   (a number)\n      Learning rate after the warmup.\n" in text
    assert "  replay.batch_size=null   (a whole number, or null)\n" in text
    assert "  objective.level=trajectory   (one of trajectory, token, subtrajectory)\n" in text
    assert "  optim.betas=[0.9, 0.95]   (a list [a number, a number])\n" in text
    assert [line.split("=")[0].strip() for line in text.splitlines() if line[2:3].strip() and line[:2] == "  "] == list(
        config_io.settings(Config)
    )
    assert max(len(line) for line in text.splitlines()) <= 100


def test_a_config_is_frozen_and_slotted_and_survives_pickle():
    config = Config()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.optim.lr = 1.0
    assert not hasattr(config, "__dict__") and not hasattr(config.optim, "__dict__")
    assert pickle.loads(pickle.dumps(config)) == config


def test_sections_made_in_python_are_checked_and_converted_too():
    assert OptimConfig(lr=1, betas=[0, 0.5]).betas == (0.0, 0.5)
    assert isinstance(OptimConfig(lr=1).lr, float)
    with pytest.raises(ConfigError, match=r"^optim\.lr must be greater than 0 and finite; got -1\.0$"):
        dataclasses.replace(OptimConfig(), lr=-1)
    with pytest.raises(ConfigError, match=r"^optim\.lr must be a number; got 'fast'$"):
        OptimConfig(lr="fast")
    assert issubclass(ConfigError, ValueError)


def test_defaults_are_not_shared():
    first, second = Config(), Config()
    first.data.options["max_digits"] = 1
    assert second.data.options == {} and DataConfig().options == {}
    copied = first.to_dict()
    copied["data"]["options"]["max_digits"] = 2
    assert first.data.options == {"max_digits": 1}
    options = {"max_digits": 3}
    third = DataConfig(options=options)
    options.clear()
    assert third.options == {"max_digits": 3}


def test_derived_numbers():
    config = load_config([], ["rollout.prompts=3", "rollout.responses=5"])
    assert config.trajectories_per_iteration == 15
    assert config.replay_batch_size == 15
    assert load_config([], ["replay.batch_size=7"]).replay_batch_size == 7


# ---- Values ----

OBJECTIVE_ERROR = (
    "objective.name must be one of reval, tbrm, regression, tba, grpo, topr, asymre, kimi, module:function or "
    "file.py:function"
)


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("optim.lr=1e-6", 1e-6),
        ("optim.lr=1E-6", 1e-6),
        ("optim.lr=.5", 0.5),
        ("optim.lr=+5.e-1", 0.5),
        ("optim.lr=1", 1.0),
        ("optim.max_grad_norm=.inf", math.inf),
        ("run.iterations=1e3", 1000),
        ("run.iterations=1_000", 1000),
        ("run.seed=010", 10),  # YAML 1.1 reads 8
        ("run.overwrite=true", True),
        ("run.overwrite=False", False),
        ("replay.batch_size=null", None),
        ("replay.batch_size=None", None),
        ("replay.batch_size=64", 64),
        ("optim.betas=[0, 1e-1]", (0.0, 0.1)),
        ("data.options={a: [1e-3, yes]}", {"a": [1e-3, "yes"]}),
        ("data.system_prompt=null", None),
        ("data.system_prompt=", None),
        ("data.system_prompt='null'", "null"),
        ("data.template={question}", "{question}"),
        ("data.template={question}: a #1, [b", "{question}: a #1, [b"),
        ('data.template="{question}\\n"', "{question}\n"),
        ("data.template={question} = ?", "{question} = ?"),
        ("run.dir=2024", "2024"),
        ("run.dir=null", "null"),  # run.dir cannot be null, so this is the name of a folder
        ("model.name=yes", "yes"),
        ("reward.function=my/rewards.py:score", "my/rewards.py:score"),
    ],
)
def test_an_override_is_read_as_its_setting_s_type(override, value):
    section, field = override.split("=")[0].split(".")
    got = getattr(getattr(load_config([], [override]), section), field)
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lr=fast", "optim.lr must be a number; got 'fast'"),
        ("optim.lr=", "optim.lr must be a number; got null"),
        ("optim.lr=true", "optim.lr must be a number; got true"),
        ("optim.lr=0", "optim.lr must be greater than 0 and finite; got 0.0"),
        ("optim.lr=.nan", "optim.lr must be greater than 0 and finite; got nan"),
        ("optim.lr=.inf", "optim.lr must be greater than 0 and finite; got inf"),
        ("optim.lr=1" + 400 * "0", "optim.lr must be a number; got 1" + 400 * "0"),
        ("optim.eps=0", "optim.eps must be greater than 0 and finite; got 0.0"),
        ("optim.weight_decay=-1", "optim.weight_decay must be at least 0 and finite; got -1.0"),
        ("optim.packing=true", "optim.packing must be one of auto, packed, padded; got true"),
        ("optim.max_grad_norm=0", "optim.max_grad_norm must be greater than 0; got 0.0"),
        ("optim.warmup=-1", "optim.warmup must be at least 0; got -1"),
        ("optim.micro_batch_tokens=0", "optim.micro_batch_tokens must be at least 1; got 0"),
        ("optim.betas=0.9", "optim.betas must be a list [a number, a number]; got 0.9"),
        ("optim.betas=[0.9]", "optim.betas must be a list [a number, a number]; got [0.9]"),
        ("optim.betas=[0.9, x]", "optim.betas must be a list [a number, a number]; got [0.9, 'x']"),
        ("optim.betas=[0.9, 1]", "optim.betas must be two numbers from 0 to below 1; got [0.9, 1.0]"),
        ("run.iterations=1.5", "run.iterations must be a whole number; got 1.5"),
        ("run.iterations=.inf", "run.iterations must be a whole number; got inf"),
        ("run.iterations=true", "run.iterations must be a whole number; got true"),
        ("run.iterations=0", "run.iterations must be at least 1; got 0"),
        ("run.save_every=-1", "run.save_every must be at least 0; got -1"),
        ("run.table=-1", "run.table must be at least 0; got -1"),
        ("run.seed=-1", "run.seed must be from 0 to 2147483647; got -1"),
        ("run.seed=2147483648", "run.seed must be from 0 to 2147483647; got 2147483648"),
        ("data.seed=3000000000", "data.seed must be from 0 to 2147483647; got 3000000000"),
        ("run.overwrite=yes", "run.overwrite must be true or false; got 'yes'"),
        ("run.overwrite=1", "run.overwrite must be true or false; got 1"),
        ("run.dir=", "run.dir must be a folder; got ''"),
        ("run.display=curses", "run.display must be one of auto, rich, plain; got 'curses'"),
        (
            "rollout.engine=sglang",
            "rollout.engine must be one of auto, hf, vllm, none, module:Class or file.py:Class; got 'sglang'",
        ),
        ("rollout.dtype=float16", "rollout.dtype must be one of same, bfloat16, float32, auto; got 'float16'"),
        ("rollout.sync_every=0", "rollout.sync_every must be at least 1; got 0"),
        ("rollout.ahead=-1", "rollout.ahead must be at least 0; got -1"),
        ("rollout.probe_tokens=-1", "rollout.probe_tokens must be at least 0; got -1"),
        ("rollout.timeout=0", "rollout.timeout must be greater than 0 and finite; got 0.0"),
        ("rollout.vllm_mode=client", "rollout.vllm_mode must be one of server, colocated; got 'client'"),
        ("rollout.vllm_gpu_memory=2", "rollout.vllm_gpu_memory must be greater than 0 and at most 1; got 2.0"),
        (
            "rollout.vllm_devices=0-3",
            "rollout.vllm_devices must be null, or numbers with commas between them; got '0-3'",
        ),
        (
            "rollout.prompts=0",
            "rollout.prompts must be at least 1 (rollout.engine=none trains without generating, on the rollouts of "
            "replay.preload); got 0",
        ),
        ("rollout.responses=0", "rollout.responses must be at least 1; got 0"),
        ("rollout.max_new_tokens=0", "rollout.max_new_tokens must be at least 1; got 0"),
        ("rollout.temperature=0", "rollout.temperature must be greater than 0 and finite; got 0.0"),
        ("model.name=", "model.name must be a name; got ''"),
        ("model.dtype=float16", "model.dtype must be one of float32, bfloat16; got 'float16'"),
        ("reward.workers=0", "reward.workers must be at least 1; got 0"),
        ("reward.timeout=0", "reward.timeout must be greater than 0 and finite; got 0.0"),
        (
            "reward.function=maths",
            "reward.function must be one of number, math, reasoning_gym, module:function or file.py:function; "
            "got 'maths'",
        ),
        ("replay.updates_per_iteration=0", "replay.updates_per_iteration must be at least 1; got 0"),
        ("replay.batch_size=0", "replay.batch_size must be at least 1; got 0"),
        ("replay.batch_size=many", "replay.batch_size must be a whole number, or null; got 'many'"),
        (
            "replay.batch_size=5121",
            "replay.batch_size must be at most replay.capacity (5120), because a draw takes each trajectory once; "
            "got 5121",
        ),
        (
            "replay.capacity=1023",
            "replay.capacity must be at least rollout.prompts * rollout.responses (1024), or fresh trajectories would "
            "be dropped; got 1023",
        ),
        ("objective.beta=0", "objective.beta must be greater than 0 and finite; got 0.0"),
        ("objective.clip_low=-0.1", "objective.clip_low must be at least 0; got -0.1"),
        ("objective.clip_high=.nan", "objective.clip_high must be at least 0; got nan"),
        ("objective.baseline_shift=.inf", "objective.baseline_shift must be finite; got inf"),
        (
            "objective.normalization=mean",
            "objective.normalization must be one of response, token, constant; got 'mean'",
        ),
        ("replay.draw=group", "replay.draw must be one of uniform, groups; got 'group'"),
        ("objective.name=grppo", f"{OBJECTIVE_ERROR}; got 'grppo'; did you mean 'grpo'?"),
        ("objective.name=xyz", f"{OBJECTIVE_ERROR}; got 'xyz'"),
        ("objective.name=losses.py:", f"{OBJECTIVE_ERROR}; got 'losses.py:'"),
        (
            "objective.semi_gradient=true",
            "objective.semi_gradient must be false with objective.level=trajectory; got true",
        ),
        ("reference.reset_every=-1", "reference.reset_every must be at least 0; got -1"),
        ("evaluation.samples=0", "evaluation.samples must be at least 1; got 0"),
        ("evaluation.every=-1", "evaluation.every must be at least 0; got -1"),
        ("tracking.samples=-1", "tracking.samples must be at least 0; got -1"),
        ("data.size=0", "data.size must be at least 1; got 0"),
        ("data.held_out=1000", "data.held_out must be less than data.size (1000), which it is taken from; got 1000"),
        ("data.template=Add.", "data.template must be text that contains {question}; got 'Add.'"),
        ("data.source=jsonl", "data.path must be a file because data.source is 'jsonl'; got null"),
        ("data.source=parquet", "data.path must be a file because data.source is 'parquet'; got null"),
        ("data.path=x.jsonl", "data.path must be null unless data.source is 'jsonl' or 'parquet'; got 'x.jsonl'"),
        ("data.held_out_path=x", "data.held_out_path must be null with data.source='reasoning_gym'; got 'x'"),
        (
            "data.columns.prompt=3",
            "data.columns must be a mapping from names to the columns that hold them; got {'prompt': 3}",
        ),
        (
            "data.chat_template_kwargs.tokenize=true",
            "data.chat_template_kwargs must leave out 'tokenize', which the trainer sets",
        ),
        ("evaluation.k=[1, 5]", "evaluation.k must be a list of numbers from 1 to evaluation.samples (4); got [1, 5]"),
        ("evaluation.k=[0]", "evaluation.k must be a list of numbers from 1 to evaluation.samples (4); got [0]"),
        ("evaluation.problems=0", "evaluation.problems must be at least 1, or null; got 0"),
        (
            "evaluation.benchmarks=[aime23]",
            "evaluation.benchmarks must be a list of aime24, aime25, amc23, math500, "
            "minerva, olympiadbench, gpqa, champ, or of .jsonl and .parquet files; got ['aime23']",
        ),
        (
            "evaluation.benchmarks=[aime24, x/aime24.jsonl]",
            "evaluation.benchmarks must be a list of different names; got ['aime24', 'x/aime24.jsonl']",
        ),
        ("evaluation.folder=", "evaluation.folder must be a folder; got ''"),
        ("evaluation.template=Add.", "evaluation.template must be text that contains {question}, or null; got 'Add.'"),
        (
            "evaluation.reward=maths",
            "evaluation.reward must be one of number, math, reasoning_gym, module:function or "
            "file.py:function; got 'maths'",
        ),
        ("data.options=3", "data.options must be a mapping {name: value, ...}; got 3"),
        ("data.options={1: 2}", "data.options must be a mapping {name: value, ...}; got {1: 2}"),
        (
            "data.template='it's'",
            "cannot read data.template='it's' as YAML: expected '<document start>', but found '<scalar>'",
        ),
        ("optim.betas=[0.9", "cannot read optim.betas=[0.9 as YAML: expected ',' or ']', but got '<stream end>'"),
        (
            "data.options.a={",
            "cannot read data.options.a={ as YAML: expected the node content, but found '<stream end>'",
        ),
    ],
)
def test_a_bad_value_is_refused(override, message):
    assert error_of(override) == message


def test_vllm_options_cannot_change_which_policy_answers():
    assert error_of("rollout.engine=hf", "rollout.vllm_options.max_model_len=9") == (
        "rollout.vllm_options must be {} unless rollout.engine is 'auto' or 'vllm'; got {'max_model_len': 9}"
    )
    assert error_of("rollout.engine=vllm", "rollout.vllm_options.quantization=fp8") == (
        "rollout.vllm_options must leave out 'quantization': it follows from other settings"
    )
    assert "must leave out 'enable_sleep_mode'" in error_of(
        "rollout.engine=vllm", "rollout.vllm_options.enable_sleep_mode=true"
    )
    config = load_config([], ["rollout.engine=vllm", "rollout.vllm_options.max_model_len=512"])
    assert config.rollout.vllm_options == {"max_model_len": 512}


OFFLINE = ["rollout.engine=none", "replay.preload=x.jsonl", "replay.batch_size=8"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("replay.preload=null", "replay.preload must be a file of rollouts"),
        ("replay.batch_size=null", "replay.batch_size must be a number of rollouts"),
        ("rollout.ahead=1", "rollout.ahead must be 0"),
        ("tracking.rollouts=true", "tracking.rollouts must be false"),
    ],
)
def test_without_generation_some_settings_are_needed_and_others_refused(override, message):
    error = error_of(*OFFLINE, override)
    assert error.startswith(f"{message} with rollout.engine=none, which generates nothing; got ")


def test_without_generation_no_setting_of_a_fresh_batch_counts():
    config = load_config([], [*OFFLINE, "replay.capacity=8", "rollout.responses=1"])
    assert (config.trajectories_per_iteration, config.replay_batch_size, config.updates) == (0, 8, 1300)


@pytest.mark.parametrize("shaping", ["centered", "normalized", "soft_centered"])
def test_a_group_of_one_response_has_no_baseline(shaping):
    assert error_of("rollout.responses=1", f"reward.shaping={shaping}").startswith(
        f"reward.shaping must not be '{shaping}' with rollout.responses=1: one response is its own mean"
    )
    for other in ("plain", "plus_minus_one", "batch_normalized"):
        given = ["rollout.responses=1", f"reward.shaping={other}"]
        assert load_config([], given).rollout.responses == 1
        assert error_of(*given, "objective.name=tba").startswith(
            "objective.name must not be tba with rollout.responses=1: the log Z of one response is its own residual"
        )


def test_the_regression_needs_a_baseline():
    for shaping in ("plain", "plus_minus_one"):
        assert error_of("objective.name=regression", f"reward.shaping={shaping}") == (
            "reward.shaping must be 'centered' (Kimi k1.5) or 'soft_centered' (OAPL) with objective.name=regression, "
            f"whose loss has no V to take the mean's place; got '{shaping}'"
        )
    for shaping in ("centered", "normalized", "soft_centered", "batch_normalized"):
        load_config([], ["objective.name=regression", f"reward.shaping={shaping}"])


@pytest.mark.parametrize("level", ["token", "subtrajectory"])
@pytest.mark.parametrize("name", ["tbrm", "regression"])
def test_only_reval_has_levels(name, level):
    assert error_of(f"objective.name={name}", f"objective.level={level}") == (
        f"objective.level must be trajectory with objective.name={name}; got '{level}'"
    )
    assert load_config([], [f"objective.name={name}"]).objective.name == name
    assert load_config([], [f"objective.level={level}"]).objective.level == level


def test_combinations_at_their_limits_are_accepted():
    assert load_config([], ["replay.capacity=1024", "replay.batch_size=1024"]).replay_batch_size == 1024
    assert load_config([], ["objective.level=token", "objective.semi_gradient=true"]).objective.semi_gradient
    jsonl = load_config([], ["data.source=jsonl", "data.path=a.jsonl", "data.held_out_path=b.jsonl", "data.size=1"])
    assert (jsonl.data.path, jsonl.data.held_out_path) == ("a.jsonl", "b.jsonl")
    assert ReplayConfig(capacity=1, batch_size=1).batch_size == 1


# ---- Names ----


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("optim.lrr", "'optim.lr'"),
        ("optimizer.lr", "'optim.lr'"),
        ("rollout.lr", "'optim.lr'"),
        ("lr", "'optim.lr'"),
        ("OPTIM.LR", "'optim.lr'"),
        ("optim.lr.x", "'optim.lr'"),
        ("iteration", "'run.iterations'"),
        ("seed", "'data.seed' or 'run.seed'"),
        ("rolout.batchsize", "'rollout.batch_size'"),
        ("repaly.batch_size", "'replay.batch_size'"),
        ("data.option.max_digits", "'data.options'"),
        ("evaluate.temperature", "'evaluation.temperature'"),
    ],
)
def test_an_unknown_name_gets_the_nearest_one(name, near, tmp_path):
    assert error_of(f"{name}=1") == f"unknown setting '{name}'; did you mean {near}?"
    if name.count(".") == 1:
        section, field = name.split(".")
        text = f"{section}:\n  {field}: 1\n"
        assert file_error(tmp_path, text) == f"x.yaml: unknown setting '{name}'; did you mean {near}?"


def test_names_with_nothing_near():
    assert error_of("replay.xyz=1") == (
        "unknown setting 'replay.xyz'; 'replay' has capacity, updates_per_iteration, draw, batch_size, preload, "
        "preload_shaping"
    )
    assert error_of("zzz.xyz=1").startswith("unknown setting 'zzz.xyz'; the sections are model, data, rollout, ")
    assert error_of("zzz.xyz=1").endswith("; --help lists every setting")
    assert error_of("data.options.=1").startswith("unknown setting 'data.options.'")
    assert error_of("replay=3") == (
        "'replay' is a section, with the settings capacity, updates_per_iteration, draw, batch_size, preload, "
        "preload_shaping; got 'replay=3'"
    )


# ---- Files ----


def test_later_files_win_and_overrides_win_over_files(tmp_path):
    base = write(tmp_path, "optim: {lr: 1e-3, warmup: 1}\nrun:\n  dir: base\n", "base.yaml")
    more = write(tmp_path, "optim:\n  lr: 1e-4\n", "more.yaml")
    config = load_config([base, str(more)], ["run.seed=1", "run.seed=2"])
    assert (config.optim.lr, config.optim.warmup, config.run.dir, config.run.seed) == (1e-4, 1, "base", 2)
    assert load_config([more, base]).optim.lr == 1e-3
    assert load_config([base, more], ["optim.lr=1e-5"]).optim.lr == 1e-5


def test_free_form_options_are_replaced_by_files_and_reached_into_by_overrides(tmp_path):
    base = write(tmp_path, "data:\n  options: {a: 1, deep: {b: [1]}}\n", "base.yaml")
    other = write(tmp_path, "data:\n  options: {c: 1e-3}\n", "other.yaml")
    assert load_config([base, other]).data.options == {"c": 1e-3}
    overrides = ["data.options.a=2", "data.options.deep.c=x", "data.options.new.inner=[1, two]"]
    assert load_config([base], overrides).data.options == {
        "a": 2,
        "deep": {"b": [1], "c": "x"},
        "new": {"inner": [1, "two"]},
    }
    assert load_config([], ["data.options.max_digits=2"]).data.options == {"max_digits": 2}
    assert load_config([base], ["data.options={}", "data.options.a=3"]).data.options == {"a": 3}
    assert Config().data.options == {}
    with pytest.raises(ConfigError, match=r"^data\.options\.a\.x cannot be set: data\.options\.a holds 1, not a mapp"):
        load_config([base], ["data.options.a.x=2"])


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n", "optim:\n", "optim: {}\n"])
def test_empty_files_and_sections_are_the_defaults(text, tmp_path):
    assert load_config([write(tmp_path, text)]) == load_config() == Config()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim:\n  lr: 1\n  lr: 2\n", "x.yaml, line 3: 'lr' is given twice"),
        ("run:\n  dir: a\noptim:\nrun:\n  seed: 1\n", "x.yaml, line 4: 'run' is given twice"),
        ("data: {options: {a: 1, a: 1}}", "x.yaml: 'a' is given twice"),
        ("optim:\n  lr: [1\n", "x.yaml, line 3: expected ',' or ']', but got '<stream end>'"),
        ("optim:\n\tlr: 1\n", "x.yaml, line 2: found character '\\t' that cannot start any token"),
        ("a: !!python/object:os.system 1\n", "x.yaml, line 1: could not determine a constructor for the tag "),
        ("- 1\n", "x.yaml must hold sections (model, data, rollout, "),
        ("optim: 3\n", "x.yaml: 'optim' is a section, with the settings lr, schedule, betas, "),
        ("optim.lr: 3\n", "x.yaml: 'optim.lr' must be nested in a file: `optim: {lr: ...}`"),
        ("lr: 3\n", "x.yaml: unknown setting 'lr'; did you mean 'optim.lr'?"),
        ("1: 3\n", "x.yaml: unknown setting '1'; the sections are "),
        ("run: {overwrite: 'true'}\n", "run.overwrite must be true or false; got 'true'"),
        ("run: {dir: 2024}\n", "run.dir must be text; got 2024; put quotes around it"),
        ("data: {options: }\n", "data.options must be a mapping {name: value, ...}; got null"),
        ("run: {dir: 'a\x07'}\n", "x.yaml: not valid YAML ("),
    ],
)
def test_a_bad_file_is_refused(text, message, tmp_path):
    assert file_error(tmp_path, text).startswith(message)


def test_yaml_anchors_still_work(tmp_path):
    text = "data: {options: &o {a: 1, b: 2}}\noptim: {lr: &lr 1e-3, eps: *lr}\n"
    assert load_config([write(tmp_path, text)]).optim.eps == 1e-3
    merged = "data:\n  options:\n    base: &base {a: 1, b: 2}\n    own: {<<: *base, b: 3}\n"
    assert load_config([write(tmp_path, merged)]).data.options["own"] == {"a": 1, "b": 3}


def test_a_missing_file_names_its_neighbours(tmp_path):
    for name in ("b.yaml", "a.yml", "c.txt"):
        write(tmp_path, "", name)
    (tmp_path / "empty").mkdir()
    for path, message in [
        (tmp_path / "x.yaml", f"config file '{tmp_path}/x.yaml' does not exist; '{tmp_path}' holds a.yml, b.yaml"),
        (tmp_path / "no/x.yaml", f"config file '{tmp_path}/no/x.yaml' does not exist; the folder "),
        (tmp_path / "empty/x", f"config file '{tmp_path}/empty/x' does not exist; '{tmp_path}/empty' holds no .yaml"),
        (tmp_path, f"config file '{tmp_path}' is a folder; '{tmp_path}' holds a.yml, b.yaml"),
        ("optim.lr", "optim.lr is a setting and needs a value: optim.lr=..."),
    ]:
        with pytest.raises(ConfigError) as caught:
            load_config([path])
        assert str(caught.value).startswith(message)
    (tmp_path / "latin.yaml").write_bytes(b"run: {dir: \xe9}")
    with pytest.raises(ConfigError, match="latin.yaml' cannot be read: 'utf-8' codec"):
        load_config([tmp_path / "latin.yaml"])


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_configs_in_the_repository_load(path):
    config = load_config([path])
    assert config.run.dir == f"runs/{path.stem}"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("paper_*.yaml")), ids=lambda path: path.stem)
def test_every_value_of_the_paper_s_configs_says_where_it_comes_from(path):
    lines = [line for line in path.read_text().splitlines() if line.startswith("  ") and "dir: runs/" not in line]
    assert len(lines) >= 5
    for line in lines:
        assert any(tag in line for tag in ("# [M 3]", "# [M 5]", "# [ours]")), line


def test_the_paper_s_numbers():
    small, large = (load_config([CONFIGS / f"paper_{size}.yaml"]) for size in ("1.5b", "7b"))
    for config in (small, large):
        assert (config.trajectories_per_iteration, config.replay.capacity, config.updates) == (1024, 5120, 1300)
        assert (config.optim.lr, config.rollout.temperature, config.evaluation.every) == (1e-6, 1.0, 10)
        assert (len(config.evaluation.benchmarks), config.evaluation.samples) == (7, 16)
    assert (small.objective.beta, small.reward.shaping, small.reference.reset_every) == (0.002, "plain", 0)
    assert (large.objective.beta, large.reward.shaping, large.reference.reset_every) == (0.02, "centered", 200)
    assert small.rollout.max_new_tokens == 8192
    one = load_config([CONFIGS / "paper_1.5b.yaml", CONFIGS / "paper_n1.yaml"])
    assert (one.trajectories_per_iteration, one.replay.updates_per_iteration, one.model) == (128, 4, small.model)
    single = load_config([CONFIGS / "paper_1.5b.yaml", CONFIGS / "paper_one_prompt.yaml"])
    assert (single.rollout.prompts, single.data.source, single.model) == (1, "jsonl", small.model)


def test_the_demo_and_the_tiny_config_exist():
    assert {"demo", "tiny"} <= {path.stem for path in CONFIGS.glob("*.yaml")}


# ---- Round trips ----

# Half of the texts consist of characters that have a meaning in YAML.
TEXT = st.text() | st.text(alphabet="{}[]:#'\"\\-?!&*%@`|>~ \t\n0179eE+.,nulTtrueyYNo_<=")
FLOATS = st.floats(allow_nan=False)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | FLOATS | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)
POSITIVE = st.floats(min_value=0, exclude_min=True, allow_infinity=False)


@settings(deadline=None)
@given(value=st.dictionaries(TEXT, JSON, max_size=4))
def test_any_mapping_survives_yaml(value: dict[str, Any]):
    text = config_io.dump_yaml(value)
    assert config_io.parse_yaml(text, "x") == value
    assert yaml.safe_load(text) == value  # other programs may read the file as YAML 1.1


@settings(deadline=None)
@given(options=st.dictionaries(TEXT, JSON, max_size=3), text=TEXT, lr=POSITIVE, batch_size=st.none() | st.just(7))
def test_any_config_survives_its_yaml(options, text, lr, batch_size, tmp_path_factory):
    data = DataConfig(options=options, system_prompt=text, template=text + "{question}")
    config = Config(data=data, optim=OptimConfig(lr=lr), replay=ReplayConfig(batch_size=batch_size))
    path = write(tmp_path_factory.getbasetemp(), config.to_yaml())
    assert load_config([path]) == config


@settings(deadline=None)
@given(lr=POSITIVE)
def test_any_float_survives_an_override(lr):
    assert load_config([], [f"optim.lr={lr!r}"]).optim.lr == lr


@settings(deadline=None)
@given(text=TEXT.filter(lambda text: text and text[0] not in "'\""))
def test_any_unquoted_text_survives_an_override(text):
    assert load_config([], [f"tracking.project={text}"]).tracking.project == text


@pytest.mark.parametrize(
    "what", ["objective.name=grpo", "objective.name=topr", "objective.name=kimi", "objective.taper=true"]
)
@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        ([], "replay.updates_per_iteration above 1"),
        (["replay.updates_per_iteration=1", "rollout.ahead=1"], "rollout.ahead above 0"),
        (["replay.updates_per_iteration=1", "rollout.sync_every=2"], "rollout.sync_every above 1"),
        ([*OFFLINE, "replay.updates_per_iteration=1"], "rollout.engine=none"),
    ],
)
def test_an_importance_ratio_needs_a_reference_that_follows(what, overrides, why):
    given = [what, *overrides]
    for every in (0, 2):
        assert error_of(*given, f"reference.reset_every={every}") == (
            f"reference.reset_every must be 1 with {what} and {why}: the reference then is the policy "
            f"at the start of the iteration, which the importance ratio needs; got {every}"
        )
    load_config([], [*given, "reference.reset_every=1"])
    load_config([], [what, "replay.updates_per_iteration=1"])  # the ratio is 1
    load_config([], ["objective.name=asymre", "objective.taper=true", *overrides])  # has no ratio


@pytest.mark.parametrize("shaping", ["plain", "centered", "normalized", "soft_centered", "batch_normalized"])
def test_grpo_takes_every_shaping(shaping):
    given = ["objective.name=grpo", f"reward.shaping={shaping}", "replay.updates_per_iteration=1"]
    assert load_config([], given).reward.shaping == shaping


def test_an_objective_of_ones_own(monkeypatch):
    given = ["objective.name=my/losses.py:huber", "objective.options={width: 2}"]
    config = load_config([], given)
    assert (config.objective.name, config.objective.options) == ("my/losses.py:huber", {"width": 2})
    assert load_config([], ["objective.name=my.losses:huber"]).objective.options == {}
    monkeypatch.setenv("HOME", "/home/me")
    assert load_config([], ["objective.name=~/l.py:huber"]).objective.name == "/home/me/l.py:huber"
    assert error_of("objective.options={width: 2}") == (
        "objective.options must be {} with objective.name=reval, which has its own settings; got {'width': 2}"
    )


def test_an_engine_that_generates_during_training_cannot_sleep():
    assert error_of("rollout.vllm_sleep=true", "rollout.ahead=2") == (
        "rollout.vllm_sleep must be null or false with rollout.ahead=2, which generates during training; got true"
    )


def test_resume_false_may_be_written_without_quotes(tmp_path):
    assert load_config([write(tmp_path, "run: {resume: false}\n")]).run.resume == "false"
    assert "run.resume must be text; got true" in file_error(tmp_path, "run: {resume: true}\n")


TEXTS = """
data.split data.subset data.system_prompt data.template evaluation.template lora.targets model.attn_implementation
model.device rollout.vllm_devices run.best_metric tracking.name tracking.project
""".split()


def test_a_path_in_the_home_folder(monkeypatch, tmp_path):
    """Every setting that is a free text is either a path or in TEXTS."""
    monkeypatch.setenv("HOME", "/home/me")
    free = {name for name, field in config_io.settings(Config).items() if field.type in (str, str | None, list[str])}
    assert free == PATHS | set(TEXTS)
    given = ["run.dir=~/runs/a", "evaluation.benchmarks=[~/a.jsonl, aime24]", "data.template=~{question}"]
    config = load_config([], given)
    assert config.run.dir == "/home/me/runs/a" and config.evaluation.benchmarks == ["/home/me/a.jsonl", "aime24"]
    assert config.data.template == "~{question}"
    assert load_config([], ["reward.function=~/r.py:score"]).reward.function == "/home/me/r.py:score"
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path, "run: {dir: here}\n")
    assert load_config(["~/x.yaml"]).run.dir == "here"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_copied_config_replaces_no_results(path):
    assert "overwrite" not in path.read_text()
