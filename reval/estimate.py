"""Estimates, from the settings alone, how much memory a run needs per GPU and how many tokens it generates.

The estimate loads no model and does not import torch or transformers, so that `--dry-run` is fast on any machine. GiB
are 2^30 bytes. Assumptions:

- The transformer is a Llama or a Qwen: grouped-query attention, gated MLP, RMS norms. Its shape comes from a table of
  known names or from the config.json of a local folder. The attention kernel (sdpa or flash attention) never stores a
  score per pair of tokens.
- N GPUs, N > 1: FSDP2 keeps 1/N of the parameters, gradients, Adam's two means and the reference on each GPU. During a
  micro-batch, each GPU also holds the whole embedding and head, with their gradient, and two whole layers at a time.
- One GPU, and model.compute_dtype differs from model.dtype: autocast keeps a cast copy of all weights during a
  micro-batch.
- The logits of a micro-batch never exist as a whole. The gradient is computed in chunks of at most 1 GiB, which hold
  one number for each token and word, and 6% more (docs/kernels.md).
- CUDA, NCCL and a fragmented allocator take 1 to 3 GiB more. The sum does not contain this memory.

The numbers of tokens are upper bounds: each response counts as rollout.max_new_tokens tokens.
"""

from __future__ import annotations

from collections.abc import Iterator

from reval.config import Config
from reval.evaluation.benchmarks import BENCHMARKS, CHAMP_SIZE
from reval.model.shapes import SHAPES, Shape, shape_of

GIB = 1 << 30
PROMPT = 512  # assumed number of tokens of a prompt, for the size of the rollout's cache
CHUNK = GIB  # bytes per chunk of the gradient: twice LINEAR_CHUNK in reval_kernels/backends/gpu/__init__.py
BYTES = {"float32": 4, "bfloat16": 2}


def memory(config: Config, shape: Shape, gpus: int) -> Iterator[tuple[str, float]]:
    """(description, bytes) of everything that takes memory on each GPU."""
    model, lora = config.model, config.lora.rank
    width, compute = BYTES[model.dtype], BYTES[_compute_dtype(config)]
    spread = f", 1/{gpus} each" if gpus > 1 else ""
    trained = shape.parameters if not lora else shape.layers * sum(lora * (a + b) for a, b in shape.linears)
    yield f"parameters ({model.dtype}{spread})", shape.parameters * width / gpus
    yield f"gradients{f' of the adapters (rank {lora})' if lora else ''}{spread}", trained * width / gpus
    yield f"Adam's two means{spread}", 2 * trained * width / gpus
    if lora:
        yield "reference: the base without adapters", 0.0
    elif config.reference.offload:
        yield "reference: in the CPU's memory", 0.0
    else:
        yield f"reference ({model.dtype}{spread})", shape.parameters * width / gpus
    head = shape.vocabulary * shape.hidden
    if gpus > 1:
        yield "embedding and head whole, with their gradient", shape.outside * width * (1 if lora else 2)
        yield "two layers whole, with one's gradient", 3 * shape.layer * compute
    elif compute != width:
        yield f"weights cast to {_compute_dtype(config)} by autocast", shape.parameters * compute
    if not lora and gpus == 1:
        yield "gradient of the head in fp32 while it is summed", head * 4
    yield from _activations(config, shape, compute, autocast=gpus == 1 and compute != width)
    yield from _rollout(config, shape, gpus)


def activations(shape: Shape, compute: int, autocast: bool) -> int:
    """Bytes per token that one layer keeps for its backward pass.

    The layer keeps: both norms with the residual stream; q, k, v and the output of the attention; and four tensors of
    the MLP's width. `compute` is the number of bytes of the compute dtype. tests/reval/test_estimate.py measures these
    numbers.
    """
    norms = (24 if autocast else 14 if compute == 2 else 16) * shape.hidden
    return norms + compute * (3 * shape.queries + 2 * shape.keys + 4 * shape.intermediate)


def _activations(config: Config, shape: Shape, compute: int, autocast: bool) -> Iterator[tuple[str, float]]:
    longest = config.rollout.max_new_tokens + PROMPT
    batch = max(config.trajectories_per_iteration, config.replay_batch_size) * longest
    tokens = min(max(config.optim.micro_batch_tokens, longest), batch)
    layer = tokens * activations(shape, compute, autocast)
    if config.model.gradient_checkpointing:
        kept = tokens * shape.layers * shape.hidden * (4 if autocast else compute)
        yield f"activations of {tokens} tokens, checkpointed, and one layer's", kept + layer
    else:
        yield f"activations of {tokens} tokens", shape.layers * layer
    fast = _head_precision(config) in ("bf16x3", "bf16") or config.model.dtype == "bfloat16"
    yield "a chunk of tokens and words", 17 / 16 * min(CHUNK, tokens * shape.vocabulary * (2 if fast else 4))
    copies = {"bf16x3": 6, "bf16": 2}.get(_head_precision(config), 0) * (config.model.dtype == "float32")
    if copies:
        yield f"the head in bf16 ({_head_precision(config)})", shape.vocabulary * shape.hidden * copies
    yield "last hidden states and their gradient", 2.0 * tokens * shape.hidden * 4


def _compute_dtype(config: Config) -> str:
    """The data type that the layers compute in. For `auto`: the type on a GPU, which is bfloat16."""
    model = config.model
    if model.dtype != "float32":
        return model.dtype
    return "bfloat16" if model.compute_dtype == "auto" else model.compute_dtype


def _head_precision(config: Config) -> str:
    """The precision of the head's products on a GPU: see reval.model.dtypes.head_precision."""
    if config.model.head_precision != "auto":
        return config.model.head_precision
    return "bf16x3" if _compute_dtype(config) == "bfloat16" else "exact"


def _rollout_dtype(config: Config) -> str:
    known = {"same": config.model.dtype, "auto": _compute_dtype(config)}
    return known.get(config.rollout.dtype, config.rollout.dtype)


def _rollout(config: Config, shape: Shape, gpus: int) -> Iterator[tuple[str, float]]:
    rollout = config.rollout
    if rollout.engine == "vllm":
        return  # vLLM takes a fraction of the GPU that is not part of this sum: see `_vllm`
    if not config.generates and not (config.data.held_out or config.data.held_out_path or config.evaluation.benchmarks):
        return  # rollout.engine=none and nothing to answer: there is no engine
    dtype = _rollout_dtype(config)
    if gpus == 1 and dtype == config.model.dtype and not rollout.ahead and rollout.sync_every == 1:
        yield "rollout: the policy's own weights", 0.0
    else:
        yield f"rollout: a copy of the weights ({dtype})", shape.parameters * BYTES[dtype]
    cache = 2 * shape.layers * shape.kv_heads * shape.head_dim * BYTES[dtype]  # bytes for keys and values of one token
    most = -(-config.trajectories_per_iteration // gpus) if config.generates else rollout.batch_size
    sequences = min(rollout.batch_size, most)
    length = rollout.max_new_tokens + PROMPT
    yield f"rollout: cache of {sequences} x {length} tokens", float(sequences * length * cache)


def tokens(config: Config) -> Iterator[str]:
    """Lines of text with the maximum number of tokens that the run generates."""
    longest, run = config.rollout.max_new_tokens, config.run
    training = run.iterations * config.trajectories_per_iteration
    if config.generates:
        yield (
            f"training: at most {_count(training * longest)} tokens ({run.iterations} iterations x "
            f"{config.rollout.prompts} prompts x {config.rollout.responses} responses x {longest} tokens)"
        )
    else:
        yield "training: no tokens are generated; it uses the rollouts of replay.preload"
    evaluation = config.evaluation
    times = 1 + (run.iterations // evaluation.every if evaluation.every else 0)
    times += not evaluation.every or run.iterations % evaluation.every != 0  # every run ends with an evaluation
    sizes = [config.data.held_out if config.data.held_out_path is None else None]
    known = {name: benchmark.size for name, benchmark in BENCHMARKS.items()} | {"champ": CHAMP_SIZE}
    sizes += [known.get(name) for name in evaluation.benchmarks]
    limited = [n if n is None or evaluation.problems is None else min(n, evaluation.problems) for n in sizes]
    problems, answers = sum(n or 0 for n in limited), evaluation.samples + evaluation.greedy
    unknown = " and the problems of files of your own" if None in sizes else ""
    if problems or unknown:
        yield (
            f"evaluation: at most {_count(times * problems * answers * longest)} tokens ({times} times {problems} "
            f"problems{unknown} x {answers} answers x {longest} tokens)"
        )
    else:
        yield "evaluation: nothing to answer"
    updates = config.updates
    yield f"updates: {updates} ({config.replay.updates_per_iteration} an iteration)"


def _vllm(config: Config, shape: Shape, total: float) -> str:
    """Text about the memory that vLLM takes in addition to training, which needs `total` GiB."""
    rollout = config.rollout
    dtype = _rollout_dtype(config)
    weights = f"{shape.parameters * BYTES[dtype] / GIB:.1f} GiB of weights"
    if rollout.vllm_devices is not None:
        return f"vLLM has other GPUs (rollout.vllm_devices); each engine divides {weights} over its GPUs"
    share = rollout.vllm_gpu_memory
    if rollout.sleeps:
        return f"vLLM takes {share:.0%} of each GPU (rollout.vllm_gpu_memory) and gives it back while the policy trains"
    both = f"; a GPU needs {total / (1 - share):.0f} GiB for training and vLLM" if share < 1 else ""
    return f"vLLM takes {share:.0%} of each GPU (rollout.vllm_gpu_memory), including {weights}{both}"


def report(config: Config, gpus: int) -> str:
    """The estimate as text: lines of YAML comments."""
    lines = [f"An estimate for {gpus} GPU{'s' if gpus > 1 else ''} (reval/estimate.py says what it assumes)."]
    shape = shape_of(config.model.name)
    if shape is None:
        lines.append(
            f"Memory: unknown, since {config.model.name!r} is neither a local folder with the config.json of a Llama "
            f"or Qwen nor one of {', '.join(SHAPES)}."
        )
    else:
        parts = list(memory(config, shape, gpus))
        lines.append(f"Memory per GPU in GiB, for {_count(shape.parameters)} parameters:")
        lines += [f"{size / GIB:8.2f}  {what}" for what, size in parts]
        total = sum(size for _, size in parts) / GIB
        lines.append(f"{total:8.2f}  total")
        if config.rollout.engine == "vllm":
            lines.append(f"          {_vllm(config, shape, total)}")
    return "".join(f"# {line}\n" for line in (*lines, *tokens(config)))


def _count(number: float) -> str:
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:g}"
