"""The estimate against real models: the number of parameters, and the bytes that a layer keeps for backward."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

from reval.config import Config, load_config
from reval.estimate import activations, memory, peak, report, tokens
from reval.model.builtin import config_of
from reval.model.shapes import SHAPES, Shape, shape_of

GPU_RUN = ["rollout.max_new_tokens=1000", "optim.micro_batch_tokens=4096", "model.name=Qwen/Qwen2.5-7B"]


def counted(config: PreTrainedConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())


@pytest.mark.parametrize("name", SHAPES)
def test_parameters_of_the_known_models(name):
    assert SHAPES[name].parameters == counted(config_of(SHAPES[name]))


def test_known_sizes():
    """Numbers of parameters from the model cards: 1.78 G (with an untied head), 7.62 G, 135 M."""
    sizes = {name: round(shape.parameters / 1e6) for name, shape in SHAPES.items()}
    assert sizes["deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"] == 1777
    assert sizes["Qwen/Qwen2.5-Math-7B"] == 7616
    assert sizes["smollm2-135m-instruct"] == 135


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, vocab_size=50),
        Qwen2Config(
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=50,
            tie_word_embeddings=True,
        ),
        Qwen3Config(
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            vocab_size=50,
        ),
    ],
    ids=lambda c: c.model_type,
)
def test_a_local_folder_says_its_own_shape(config, tmp_path):
    config.save_pretrained(tmp_path)
    shape = shape_of(str(tmp_path))
    assert shape is not None and shape.parameters == counted(config)


def test_what_is_not_known_is_said(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5", "d_model": 8}))
    for name in (str(tmp_path), "some/model"):
        config = load_config([], [f"model.name={name}"])
        assert shape_of(name) is None
        assert f"# Memory: unknown, since '{name}' is neither a local folder" in report(config, 1)
        assert "# training: at most" in report(config, 1)
    assert shape_of("Qwen/Qwen2.5-7B-Instruct") == SHAPES["Qwen/Qwen2.5-7B"]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(("hidden", "heads", "kv_heads"), [(128, 4, 4), (128, 4, 1), (256, 8, 8)])
def test_a_layer_keeps_about_what_the_formula_says(autocast, hidden, heads, kv_heads):
    shape = Shape(hidden=hidden, intermediate=512, layers=2, heads=heads, kv_heads=kv_heads, head_dim=32, vocabulary=64)
    length, kept = 257, []
    for layers in (2, 4):
        model = AutoModelForCausalLM.from_config(config_of(replace(shape, layers=layers, qkv_bias=True)))
        model = model.to(torch.float32 if autocast else torch.bfloat16)
        seen = {}

        def keep(tensor, seen=seen):
            if length in tensor.shape:  # excludes weights and cast copies of weights
                seen[tensor.untyped_storage().data_ptr()] = (tensor.untyped_storage().nbytes(), tensor)
            return tensor

        cast = torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), cast:
            out = model.base_model(input_ids=torch.zeros(1, length, dtype=torch.long), use_cache=False)
        kept.append(sum(size for size, _ in seen.values()))
        del out
    per_token = (kept[1] - kept[0]) / 2 / length
    assert per_token == pytest.approx(activations(shape, 2, autocast), rel=0.1)


def moments(*overrides: str, gpus: int = 1) -> dict[str, dict[str, float]]:
    config = load_config([], [*GPU_RUN, *overrides])
    shape = shape_of(config.model.name)
    assert shape is not None
    return {name: dict(items) for name, items in memory(config, shape, gpus).items()}


def update(*overrides: str, gpus: int = 1) -> dict[str, float]:
    """The items of all moments of an update."""
    found = moments(*overrides, gpus=gpus)
    return found["the forward pass"] | found["the loss"] | found["the backward pass"]


def largest(*overrides: str, gpus: int = 1) -> float:
    return max(sum(items.values()) for items in moments(*overrides, gpus=gpus).values())


def test_what_sharding_divides_and_what_it_does_not():
    p, one, eight = SHAPES["Qwen/Qwen2.5-7B"].parameters, update(), update(gpus=8)
    assert one["parameters (float32)"] == one["gradients"] == one["reference (float32)"] == 4 * p
    assert one["Adam's two means"] == 8 * p
    for name in ("parameters (float32, 1/8 each)", "gradients, 1/8 each", "reference (float32, 1/8 each)"):
        assert eight[name] == p / 2
    activations = [name for name in one if name.startswith("activations")]
    assert activations and all(eight[name] == one[name] for name in activations)


def test_settings_that_save_memory_save_it():
    whole = update()
    name = "activations of 4096 tokens"
    checkpointed = update("model.gradient_checkpointing=true")
    assert checkpointed[f"{name}, checkpointed"] < whole[name] / 10
    assert checkpointed["one layer's activations, recomputed"] == whole[name] / 28
    offloaded = moments("reference.offload=true")
    assert offloaded["the loss"]["reference: in the CPU's memory"] == 0
    p = SHAPES["Qwen/Qwen2.5-7B"].parameters
    assert offloaded["the reference's values"]["reference, moved to the GPU"] == 4 * p
    cpu = moments("reference.offload=true", "model.device=cpu")
    assert cpu["the loss"]["reference (float32)"] == 4 * p, "the CPU's memory is the device's"
    lora = update("lora.rank=16", "model.dtype=bfloat16")
    assert lora["reference: the base without adapters"] == 0
    shape = SHAPES["Qwen/Qwen2.5-7B"]
    adapters = shape.layers * sum(16 * (a + b) for a, b in shape.linears)
    assert lora["gradients of the adapters (rank 16)"] == 2 * adapters
    assert "gradient of the head in fp32" in whole and "gradient of the head in fp32" not in lora
    assert largest("model.dtype=bfloat16") < 0.6 * largest()


def test_the_gradients_of_a_single_micro_batch_take_the_memory_of_freed_activations():
    several, one = (update("optim.micro_batch_tokens=" + n) for n in ("1512", str(10**9)))
    assert several["gradients"] > one["gradients"] == 0
    small = [
        "reward.shaping=plain",
        "rollout.prompts=1",
        "rollout.responses=1",
        "replay.batch_size=1",
        "rollout.max_new_tokens=8",
    ]
    short = update(*small)
    assert several["gradients"] == short["gradients"] + short["activations of 520 tokens"]


def test_a_cpu_has_neither_chunks_nor_copies_of_the_head():
    gpu, cpu = (update("model.compute_dtype=auto", f"model.device={d}") for d in ("auto", "cpu"))
    for name in ("a chunk of tokens and words", "head and hidden states in bf16 (bf16x3)"):
        assert name in gpu and name not in cpu
    assert "weights cast to bfloat16 by autocast" in gpu and not any("cast" in name for name in cpu)


def test_auto_is_bf16_on_a_gpu():
    auto = moments("model.compute_dtype=auto", "rollout.dtype=auto")
    assert auto == moments("model.compute_dtype=bfloat16", "rollout.dtype=bfloat16") != moments()


def test_the_rollout_s_own_weights_and_cache():
    found = moments("rollout.batch_size=8")
    shared = found["generation"]
    assert shared["rollout: the policy's own weights"] == 0
    cache = 2 * 28 * 4 * 128 * 4  # (keys and values) * layers * kv_heads * head_dim * (bytes of fp32)
    assert shared["rollout: cache of 8 x 1512 tokens"] == 8 * 1512 * cache
    assert not any("cache" in name for name in found["the loss"])
    assert any("cache" in name for name in moments("rollout.ahead=1")["the loss"]), "it generates during the update"
    for override, gpus in (("rollout.dtype=bfloat16", 1), ("rollout.ahead=1", 1), ("rollout.batch_size=256", 2)):
        copies = [items for items in moments(override, gpus=gpus).values() if "rollout: a copy" in str(items)]
        assert len(copies) == 5, "the copy stays in memory"
    assert "rollout: " not in str(moments("rollout.engine=vllm"))
    config = load_config([], [*GPU_RUN, "rollout.engine=vllm", "rollout.vllm_gpu_memory=0.5"])
    assert "vLLM takes 50% of each GPU (rollout.vllm_gpu_memory), including 28.4 GiB of weights" in report(config, 8)
    config = load_config([], [*GPU_RUN, "rollout.engine=vllm", "rollout.dtype=bfloat16", "rollout.vllm_devices=4,5"])
    assert "vLLM has other GPUs (rollout.vllm_devices); each engine divides 14.2 GiB of weights" in report(config, 4)
    config = load_config([], [*GPU_RUN, "rollout.engine=vllm", "rollout.vllm_sleep=true"])
    assert "vLLM takes 40% of each GPU (rollout.vllm_gpu_memory) and gives it back while the policy" in report(
        config, 8
    )


def test_the_report_shows_the_peak_and_the_other_moments():
    text = report(load_config([], [*GPU_RUN, "rollout.engine=vllm"]), 1)
    config = load_config([], [*GPU_RUN, "rollout.engine=vllm"])
    moment, items = peak(config, shape_of("Qwen/Qwen2.5-7B"), 1)
    assert f"7.62 G parameters, at the peak, in {moment}:" in text
    assert f"{sum(size for _, size in items) / 2**30:8.2f}  total" in text
    assert "# Peaks at other moments: " in text and text.count(f" in {moment}") == 1


def test_tokens_of_the_run():
    overrides = ["run.iterations=25", "rollout.prompts=3", "rollout.responses=2", "rollout.max_new_tokens=10"]
    training, evaluation, updates = tokens(load_config([], overrides))
    assert training == "training: at most 1.5 k tokens (25 iterations x 3 prompts x 2 responses x 10 tokens)"
    # 4 evaluations: before training, after the iterations 10 and 20, and after the last iteration
    assert evaluation == "evaluation: at most 6.4 k tokens (4 times 32 problems x 5 answers x 10 tokens)"
    assert updates == "updates: 50 (2 an iteration)"
    more = ["evaluation.benchmarks=[aime24, math500, own.jsonl]", "evaluation.problems=40", "run.iterations=20"]
    line = list(tokens(load_config([], [*overrides, *more])))[1]
    assert "(3 times 102 problems and the problems of files of your own x 5 answers x 10 tokens)" in line


def test_nothing_to_answer_is_said():
    assert list(tokens(load_config([], ["data.held_out=0"])))[1] == "evaluation: nothing to answer"


def test_the_report_is_all_comments():
    lines = report(Config(), 4).splitlines()
    assert lines[0].startswith("# An estimate for 4 GPUs") and all(line.startswith("# ") for line in lines)


def test_a_run_that_generates_nothing():
    """Only an evaluation needs an engine, whose batch is then not limited by the responses of an iteration."""
    offline = ["rollout.engine=none", "replay.preload=x.jsonl", "replay.batch_size=8", "rollout.batch_size=64"]
    config = load_config([], offline)
    shape = SHAPES["tiny"]
    items = dict(memory(config, shape, 1)["generation"])
    assert {"rollout: the policy's own weights", "rollout: cache of 64 x 1536 tokens"} <= items.keys()
    alone = load_config([], [*offline, "data.held_out=0"])
    assert "rollout" not in str(memory(alone, shape, 1))
    assert list(tokens(alone)) == [
        "training: no tokens are generated; it uses the rollouts of replay.preload",
        "evaluation: nothing to answer",
        "updates: 1300 (2 an iteration)",
    ]
