"""Estimates, from the settings alone, how much memory a run needs per GPU and how many tokens it generates.

The estimate loads no model and does not import torch or transformers, so that `--dry-run` is fast on any machine. GiB
are 2^30 bytes. benchmarks/gpu/sizes.py measures the peaks: tests/benchmarks/test_sizes.py compares them on the CPU,
tools/gpu_check.py on a GPU. Assumptions:

- The transformer is a Llama or a Qwen: its shape comes from the table of reval/model/shapes.py or from the config.json
  of a local folder. The attention kernel (sdpa or flash attention) never stores a score per pair of tokens.
- The memory has a peak at each moment of an iteration: generation, the reference's values, and in an update the end of
  the forward pass, the loss and the backward pass. The GPU needs the largest one.
- A micro-batch is not the first one, so the gradients are there. If there is only one micro-batch, the gradients take
  the memory of activations that the backward pass has freed.
- N GPUs, N > 1: FSDP2 keeps 1/N of the parameters, gradients, Adam's two means and the reference on each GPU. During a
  micro-batch, each GPU also holds the whole embedding and head, with their gradient, and two whole layers at a time.
- One GPU, and model.compute_dtype differs from model.dtype: autocast casts the matrices of the layers. Autograd keeps
  these copies until the backward pass. With gradient checkpointing, autocast itself keeps them during the forward pass.
- The logits of a micro-batch never exist as a whole. On a GPU, the gradient is computed in chunks of about 1 GiB, which
  hold one number for each token and word, and 6% more (docs/kernels.md). On a CPU, the C++ kernels keep logits in the
  memory of the head's gradient.
- CUDA, NCCL and a fragmented allocator take 1 to 3 GiB more. The sum does not contain this memory.

The numbers of tokens are upper bounds: each response counts as its maximum, rollout.max_new_tokens or
environment.max_tokens.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import replace

from reval.config import Config
from reval.evaluation.benchmarks import BENCHMARKS, CHAMP_SIZE
from reval.model.shapes import SHAPES, Shape, shape_of

GIB = 1 << 30
PROMPT = 512  # assumed number of tokens of a prompt
CHUNK = GIB  # bytes per chunk of the gradient: twice LINEAR_CHUNK in reval_kernels/backends/gpu/__init__.py
BYTES = {"float32": 4, "bfloat16": 2}


Items = list[tuple[str, float]]
"""(description, bytes)"""


def memory(config: Config, shape: Shape, gpus: int) -> dict[str, Items]:
    """Everything that takes memory on each GPU, for each moment of an iteration that may have the peak."""
    always, cache = _always(config, shape, gpus), _cache(config, shape, gpus)
    moves = _offloaded(config) and gpus == 1
    moved = [("reference, moved to the GPU", _weights(config, shape, gpus))] if moves else []
    tokens = _tokens(config)
    one = tokens * (4 * shape.intermediate * BYTES[_compute_dtype(config)] + 3 * shape.hidden * _stream(config, gpus))
    passing = [*_gathered(config, shape, gpus, training=False), (f"one layer's tensors of {tokens} tokens", 1.0 * one)]
    moments = {
        "generation": [*always, *cache],
        "the reference's values": [*always, *moved, *passing, *_operands(config, shape)],
    }
    moments |= {name: [*always, *items] for name, items in _update(config, shape, gpus).items()}
    if _engine(config) == "hf" and config.rollout.ahead:  # generates during an update
        return {name: items if name == "generation" else [*items, *cache] for name, items in moments.items()}
    return moments


def peak(config: Config, shape: Shape, gpus: int) -> tuple[str, Items]:
    """The moment with the largest sum of `memory`, and its items."""
    return max(memory(config, shape, gpus).items(), key=lambda moment: total(moment[1]))


def total(items: Items) -> float:
    return sum(size for _, size in items)


def _trained(config: Config, shape: Shape) -> int:
    """Number of parameters that get a gradient."""
    rank = config.lora.rank
    return shape.layers * sum(rank * (a + b) for a, b in shape.linears) if rank else shape.parameters


def _weights(config: Config, shape: Shape, gpus: int) -> float:
    return shape.parameters * BYTES[config.model.dtype] / gpus


def _always(config: Config, shape: Shape, gpus: int) -> Items:
    """What stays in memory between the moments."""
    model, lora = config.model, config.lora.rank
    width, trained, weights = BYTES[model.dtype], _trained(config, shape), _weights(config, shape, gpus)
    spread = f", 1/{gpus} each" if gpus > 1 else ""
    items = [(f"parameters ({model.dtype}{spread})", weights)]
    if lora:
        items += [(f"adapters of policy and reference (rank {lora}{spread})", 2 * trained * width / gpus)]
    items += [(f"Adam's two means{spread}", 2 * trained * width / gpus)]
    if lora:
        items += [("reference: the base without adapters", 0.0)]
    elif _offloaded(config):
        items += [("reference: in the CPU's memory", 0.0)]
    else:
        items += [(f"reference ({model.dtype}{spread})", weights)]
    return [*items, *_rollout_weights(config, shape, gpus)]


def _update(config: Config, shape: Shape, gpus: int) -> dict[str, Items]:
    """What an update takes in addition to `_always`, at the end of the forward pass, in the loss and after it."""
    compute, lora, tokens = BYTES[_compute_dtype(config)], config.lora.rank, _tokens(config)
    spread, checkpointed = f", 1/{gpus} each" if gpus > 1 else "", config.model.gradient_checkpointing
    layers = _activations(config, shape, gpus)
    kept = tokens * shape.layers * shape.hidden * _stream(config, gpus) if checkpointed else layers
    what = f"activations of {tokens} tokens" + (", checkpointed" if checkpointed else "")
    gradients = _trained(config, shape) * BYTES[config.model.dtype] / gpus
    if tokens == _batch_tokens(config):
        gradients = max(0.0, gradients - kept)
    name = f"gradients{f' of the adapters (rank {lora})' if lora else ''}{spread}"
    common = [(name, gradients), *_gathered(config, shape, gpus, training=True), (what, kept)]
    matrices = sum(a * b for a, b in shape.linears) * compute
    cast = f"weights cast to {_compute_dtype(config)} by autocast"
    casts = shape.layers * matrices if _autocast(config, gpus) else 0.0
    recomputed = [("one layer's activations, recomputed", layers / shape.layers)] if checkpointed else []
    width = 2 * shape.intermediate + shape.hidden
    head = [] if lora else [("gradient of the head in fp32", 4.0 * shape.vocabulary * shape.hidden)]
    hidden = ("last hidden states and their gradient", 3.0 * tokens * shape.hidden * 4)
    after = [*common, *head, *recomputed, ("gradients of one layer's activations", 1.0 * tokens * width * compute)]
    if casts:
        after += [(cast, matrices if checkpointed else casts)]
    return {
        "the forward pass": [*common, (cast, 0.0 if checkpointed and lora else casts)] if casts else common,
        "the loss": [
            *common,
            *([(cast, casts)] if casts and not checkpointed else []),
            *head,
            *_operands(config, shape),
            *_chunk(config, shape),
            hidden,
        ],
        "the backward pass": after,
    }


def _gathered(config: Config, shape: Shape, gpus: int, training: bool) -> Items:
    """What FSDP gathers on each GPU."""
    width, compute = BYTES[config.model.dtype], BYTES[_compute_dtype(config)]
    if gpus == 1:
        return []
    if not training:
        return [
            ("embedding and head whole", 1.0 * shape.outside * width),
            ("two layers whole", 2.0 * shape.layer * compute),
        ]
    return [
        ("embedding and head whole, with their gradient", 1.0 * shape.outside * width * (1 if config.lora.rank else 2)),
        ("two layers whole, with one's gradient", 3.0 * shape.layer * compute),
    ]


def activations(shape: Shape, compute: int, autocast: bool) -> int:
    """Bytes per token that one layer keeps for its backward pass.

    The layer keeps: both norms with the residual stream; q, k, v and the output of the attention; and four tensors of
    the MLP's width. `compute` is the number of bytes of the compute dtype. tests/reval/test_estimate.py measures these
    numbers.
    """
    norms = (24 if autocast else 14 if compute == 2 else 16) * shape.hidden
    return norms + compute * (3 * shape.queries + 2 * shape.keys + 4 * shape.intermediate)


def _activations(config: Config, shape: Shape, gpus: int) -> float:
    """Bytes that all layers keep of a micro-batch."""
    per_token = activations(shape, BYTES[_compute_dtype(config)], _autocast(config, gpus))
    return 1.0 * _tokens(config) * shape.layers * per_token


def _autocast(config: Config, gpus: int) -> bool:
    return gpus == 1 and _compute_dtype(config) != config.model.dtype


def _stream(config: Config, gpus: int) -> int:
    """Bytes of a number of the residual stream between two layers."""
    return 4 if _autocast(config, gpus) else BYTES[_compute_dtype(config)]


def _batch_tokens(config: Config) -> int:
    longest = config.longest_response + PROMPT
    return max(config.trajectories_per_iteration, config.replay_batch_size) * longest


def _tokens(config: Config) -> int:
    """Tokens of a micro-batch."""
    longest = config.longest_response + PROMPT
    return min(max(config.optim.micro_batch_tokens, longest), _batch_tokens(config))


def _operands(config: Config, shape: Shape) -> Items:
    """The head's operands in bf16."""
    copies = {"bf16x3": 6, "bf16": 2}.get(_head_precision(config), 0) * (config.model.dtype == "float32")
    if not copies or _on_cpu(config):
        return []
    size = 1.0 * copies * shape.hidden * (shape.vocabulary + _tokens(config))
    return [(f"head and hidden states in bf16 ({_head_precision(config)})", size)]


def _chunk(config: Config, shape: Shape) -> Items:
    """The gradient of the logits, by chunks: see GPUChunkedHead.size in reval_kernels/backends/gpu/chunked_head.py."""
    if _on_cpu(config):
        return []
    bf16 = _head_precision(config) in ("bf16x3", "bf16") or config.model.dtype == "bfloat16"
    every = _tokens(config) * shape.vocabulary * (2 if bf16 else 4)
    spared = 4 * shape.vocabulary * shape.hidden * (bf16 and not config.lora.rank)
    return [("a chunk of tokens and words", 17 / 16 * (every if every <= CHUNK + spared else CHUNK))]


def _offloaded(config: Config) -> bool:
    return config.reference.offload and not config.lora.rank and not _on_cpu(config)


def _on_cpu(config: Config) -> bool:
    return config.model.device == "cpu"


def _compute_dtype(config: Config) -> str:
    """The data type that the layers compute in. For `auto`: the type on a GPU, which is bfloat16."""
    model = config.model
    if model.dtype != "float32":
        return model.dtype
    if model.compute_dtype == "auto":
        return "float32" if _on_cpu(config) else "bfloat16"
    return model.compute_dtype


def _head_precision(config: Config) -> str:
    """The precision of the head's products on a GPU: see reval.model.dtypes.head_precision."""
    if config.model.head_precision != "auto":
        return config.model.head_precision
    return "bf16x3" if _compute_dtype(config) == "bfloat16" else "exact"


def _rollout_dtype(config: Config) -> str:
    known = {"same": config.model.dtype, "auto": _compute_dtype(config)}
    return known.get(config.rollout.dtype, config.rollout.dtype)


def _engine(config: Config) -> str:
    """The rollout engine: hf, vllm or own. For `auto`: vllm if it is installed, of whichever version. For `none`: hf,
    which answers the evaluation problems."""
    if config.rollout.engine != "auto":
        return {"vllm": "vllm", "hf": "hf", "none": "hf"}.get(config.rollout.engine, "own")
    return "vllm" if config.model.name != "tiny" and importlib.util.find_spec("vllm") else "hf"


def _rollout_weights(config: Config, shape: Shape, gpus: int) -> Items:
    rollout, dtype = config.rollout, _rollout_dtype(config)
    if _no_engine(config):
        return []
    if gpus == 1 and dtype == config.model.dtype and not rollout.ahead and rollout.sync_every == 1:
        return [("rollout: the policy's own weights", 0.0)]
    return [(f"rollout: a copy of the weights ({dtype})", 1.0 * shape.parameters * BYTES[dtype])]


def _cache(config: Config, shape: Shape, gpus: int) -> Items:
    """Keys and values of the sequences that are generated at once."""
    rollout = config.rollout
    if _no_engine(config):
        return []
    most = -(-config.trajectories_per_iteration // gpus) if config.generates else rollout.batch_size
    sequences = min(rollout.batch_size, most)
    length, each = config.longest_response + PROMPT, 2 * shape.layers * shape.keys * BYTES[_rollout_dtype(config)]
    return [(f"rollout: cache of {sequences} x {length} tokens", 1.0 * sequences * length * each)]


def _no_engine(config: Config) -> bool:
    """Whether nothing of the engine is in this sum: vLLM takes a fraction of the GPU (`_vllm`), what an
    engine of the user takes is not known, and a run that generates nothing and has nothing to answer has no engine."""
    answers = config.data.held_out or config.data.held_out_path or config.evaluation.benchmarks
    return _engine(config) in ("vllm", "own") or not (config.generates or answers)


def tokens(config: Config) -> Iterator[str]:
    """Lines of text with the maximum number of tokens that the run generates."""
    longest, run = config.longest_response, config.run
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


def _vllm(config: Config, shape: Shape, training: float) -> str:
    """Text about the memory that vLLM takes in addition to training, which needs `training` GiB."""
    rollout = config.rollout
    dtype = _rollout_dtype(config)
    weights = f"{shape.parameters * BYTES[dtype] / GIB:.1f} GiB of weights"
    if rollout.vllm_devices is not None:
        return f"vLLM has other GPUs (rollout.vllm_devices); each engine divides {weights} over its GPUs"
    share = rollout.vllm_gpu_memory
    if replace(rollout, engine="vllm").sleeps:
        return f"vLLM takes {share:.0%} of each GPU (rollout.vllm_gpu_memory) and gives it back while the policy trains"
    both = f"; a GPU needs {training / (1 - share):.0f} GiB for training and vLLM" if share < 1 else ""
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
        moment, parts = peak(config, shape, gpus)
        lines.append(f"Memory per GPU in GiB, for {_count(shape.parameters)} parameters, at the peak, in {moment}:")
        lines += [f"{size / GIB:8.2f}  {what}" for what, size in parts]
        largest = total(parts) / GIB
        lines.append(f"{largest:8.2f}  total")
        others = {name: total(items) / GIB for name, items in memory(config, shape, gpus).items() if name != moment}
        lines.append("Peaks at other moments: " + ", ".join(f"{size:.2f} in {name}" for name, size in others.items()))
        if _engine(config) == "vllm":
            lines.append(f"          {_vllm(config, shape, largest)}")
        if _engine(config) == "own":
            lines.append(f"          without rollout.engine {config.rollout.engine!r}, whose memory is not known")
    return "".join(f"# {line}\n" for line in (*lines, *tokens(config)))


def _count(number: float) -> str:
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:g}"
