"""The dtype that "auto" selects on each device."""

from __future__ import annotations

import pytest
import torch

from reval.config import Config, ModelConfig, RolloutConfig
from reval.model.dtypes import compute_dtype, rollout_dtype, with_dtypes


@pytest.mark.parametrize(("capability", "expected"), [("AVX512", torch.bfloat16), ("AVX2", torch.float32)])
def test_auto_is_bf16_only_where_the_processor_multiplies_it(capability, expected, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    model = ModelConfig(compute_dtype="auto", device="cpu")
    assert compute_dtype(model) == expected
    for rollout, dtype in (("auto", expected), ("same", torch.float32), ("bfloat16", torch.bfloat16)):
        assert rollout_dtype(Config(model=model, rollout=RolloutConfig(dtype=rollout))) == dtype
    run = with_dtypes(Config(model=model, rollout=RolloutConfig(dtype="auto")))
    assert run.model.compute_dtype == run.rollout.dtype == str(expected).removeprefix("torch.")
    assert with_dtypes(Config()) == Config()
    kept = ModelConfig(dtype="bfloat16", compute_dtype="auto", device="cpu")
    assert compute_dtype(kept) == rollout_dtype(Config(model=kept)) == torch.bfloat16
