"""The device and the types that a run computes in, from its settings and what the device can do."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from ..config import Config, ModelConfig


def compute_dtype(config: ModelConfig) -> torch.dtype:
    """Type that the transformer's layers compute in."""
    if config.dtype != "float32":
        return getattr(torch, config.dtype)
    if config.compute_dtype == "auto":
        return torch.bfloat16 if _multiplies_bf16(device_of(config.device)) else torch.float32
    return getattr(torch, config.compute_dtype)


def rollout_dtype(config: Config) -> torch.dtype:
    """Type of the weights that generate."""
    if config.rollout.dtype == "auto":
        return compute_dtype(config.model)
    return getattr(torch, config.model.dtype if config.rollout.dtype == "same" else config.rollout.dtype)


def with_dtypes(config: Config) -> Config:
    """The same with what auto comes to on this device, so that the run's config.yaml says what was computed."""
    model, rollout = config.model, config.rollout
    if model.compute_dtype == "auto":
        model = replace(model, compute_dtype=_name(compute_dtype(model)))
    if rollout.dtype == "auto":
        rollout = replace(rollout, dtype=_name(rollout_dtype(config)))
    return replace(config, model=model, rollout=rollout)


def _name(dtype: torch.dtype) -> Any:
    return str(dtype).removeprefix("torch.")


def _multiplies_bf16(device: torch.device) -> bool:
    """Whether torch has matmuls for bf16 there that are worth it: on a CPU, those with AVX-512."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX512"


def device_of(name: str) -> torch.device:
    """The device of that name; "auto" takes the accelerator if there is one."""
    if name != "auto":
        return torch.device(name)
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
