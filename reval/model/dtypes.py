"""The device and the dtypes of a run: "auto" in the settings depends on the device."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from ..config import Config, ModelConfig


def compute_dtype(config: ModelConfig) -> torch.dtype:
    """The dtype in which the transformer's layers compute."""
    if config.dtype != "float32":
        return getattr(torch, config.dtype)
    if config.compute_dtype == "auto":
        return torch.bfloat16 if _multiplies_bf16(device_of(config.device)) else torch.float32
    return getattr(torch, config.compute_dtype)


def rollout_dtype(config: Config) -> torch.dtype:
    """The dtype of the weights that generate."""
    if config.rollout.dtype == "auto":
        return compute_dtype(config.model)
    return getattr(torch, config.model.dtype if config.rollout.dtype == "same" else config.rollout.dtype)


def head_precision(config: ModelConfig) -> Any:
    """The least precision of the head's products (`precision` of linear_token_values).

    With layers in bfloat16, "auto" is the fastest precision whose noise in the residual is small beside the noise that
    the layers have anyway: docs/kernels.md has the measurement.
    """
    if config.head_precision != "auto":
        return config.head_precision
    bf16 = compute_dtype(config) == torch.bfloat16 and device_of(config.device).type == "cuda"
    return "bf16x3" if bf16 else "exact"


def with_dtypes(config: Config) -> Config:
    """The settings with every "auto" dtype and precision replaced by those for this device.

    The config.yaml of the run then names what the run computed with.
    """
    model, rollout = config.model, config.rollout
    if model.compute_dtype == "auto":
        model = replace(model, compute_dtype=_name(compute_dtype(model)))
    model = replace(model, head_precision=head_precision(model))
    if rollout.dtype == "auto":
        rollout = replace(rollout, dtype=_name(rollout_dtype(config)))
    return replace(config, model=model, rollout=rollout)


def _name(dtype: torch.dtype) -> Any:
    return str(dtype).removeprefix("torch.")


def _multiplies_bf16(device: torch.device) -> bool:
    """Whether torch has bf16 matmuls on this device that are faster than fp32. On a CPU this takes AVX-512."""
    if device.type == "cuda" and torch.cuda.is_available():  # without a GPU, loading the model raises the error
        with torch.cuda.device(device):
            return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX512"


def device_of(name: str) -> torch.device:
    """The device of that name. "auto" is the accelerator if there is one, else the CPU."""
    if name != "auto":
        return torch.device(name)
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
