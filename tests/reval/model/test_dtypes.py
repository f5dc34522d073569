"""The dtype that "auto" selects on each device."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from reval.batching import collate
from reval.config import Config, ModelConfig, RolloutConfig
from reval.model import dtypes
from reval.model.dtypes import compute_dtype, head_precision, rollout_dtype, with_dtypes
from reval.model.forward import token_values, with_hidden


@pytest.mark.parametrize(("capability", "expected"), [("AVX512", torch.bfloat16), ("AVX2", torch.float32)])
def test_auto_is_bf16_only_where_the_processor_multiplies_it(capability, expected, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    model = ModelConfig(compute_dtype="auto", device="cpu")
    assert compute_dtype(model) == expected
    for rollout, dtype in (("auto", expected), ("same", torch.float32), ("bfloat16", torch.bfloat16)):
        assert rollout_dtype(Config(model=model, rollout=RolloutConfig(dtype=rollout))) == dtype
    run = with_dtypes(Config(model=model, rollout=RolloutConfig(dtype="auto")))
    assert run.model.compute_dtype == run.rollout.dtype == str(expected).removeprefix("torch.")
    plain = Config(model=ModelConfig(head_precision="exact"), rollout=RolloutConfig(engine="hf"))
    assert with_dtypes(replace(Config(), rollout=RolloutConfig(engine="hf"))) == plain
    kept = ModelConfig(dtype="bfloat16", compute_dtype="auto", device="cpu")
    assert compute_dtype(kept) == rollout_dtype(Config(model=kept)) == torch.bfloat16


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for the GPU that is not there")
def test_auto_for_a_gpu_that_is_not_there(tiny_config):
    """The settings can be resolved; loading the model then says that there is no GPU."""
    config = replace(tiny_config, model=replace(tiny_config.model, device="cuda", compute_dtype="auto"))
    assert with_dtypes(config).model.compute_dtype == "float32"


def test_auto_must_be_resolved_before_the_forward_pass(tiny, tiny_config, trajectories):
    model, _ = tiny
    batch = collate(trajectories(2, seed=0), torch.device("cpu"))
    with pytest.raises(ValueError, match="model.compute_dtype must be float32 or bfloat16 by now; got auto"):
        token_values(model, batch, replace(tiny_config.model, compute_dtype="auto"))


def test_the_head_s_precision_follows_the_layers_on_a_gpu(monkeypatch, tiny_config):
    """Where the kernels have tensor cores: bf16 layers have more noise than bf16x3 adds. Elsewhere: exact."""
    bf16, wide = (ModelConfig(compute_dtype=name, device="cpu") for name in ("bfloat16", "float32"))
    assert head_precision(bf16) == head_precision(wide) == "exact"
    monkeypatch.setattr(dtypes, "device_of", lambda name: torch.device("cuda"))
    assert head_precision(bf16) == "bf16x3" and head_precision(wide) == "exact"
    assert head_precision(replace(bf16, head_precision="tf32")) == "tf32"
    assert with_dtypes(replace(tiny_config, model=bf16)).model.head_precision == "bf16x3"


def test_the_head_s_precision_reaches_the_kernels(tiny, tiny_config, trajectories):
    """In the policy, the reference and every other use, because all of them go through with_hidden."""
    model, _ = tiny
    batch = collate(trajectories(2, seed=0), torch.device("cpu"))
    config, seen = replace(tiny_config.model, head_precision="bf16"), []
    with_hidden(model, batch, config, lambda hidden, head: seen.append(head.precision))
    assert seen == ["bf16"]
