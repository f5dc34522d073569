"""Loads new weights into a running vLLM engine. Only this file depends on how a version of vLLM loads weights.

vLLM adds `SyncExtension` to the base classes of its worker (`worker_extension_cls`). So the methods below run in the
process that holds the model, in every worker of a tensor-parallel engine. This file and vllm.py prevent three mistakes
that vLLM does not report as errors:

- A weight that does not arrive keeps its old value. vLLM prints a warning.
- On a CPU, the tied head keeps its old packed copy. vLLM prints a warning that looks like harmless ones.
- The prefix cache keeps keys and values of old weights. vLLM prints nothing. vllm.py resets the cache.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .weights import Index, read_weights

# The versions of vLLM whose reload_weights(weights_iterator=...), sleep and wake_up(tags) work as this package needs:
# docs/rollouts.md says which were run and which were only read.
OLDEST, NEWEST = (0, 24), (0, 33)


def check_version(found: str) -> None:
    """Raise ValueError for a vLLM that is older than OLDEST. Warn about one that is newer than NEWEST.

    A newer version may work; the probe (rollout/mismatch_max) shows whether it does.
    """
    oldest, newest = (".".join(map(str, version)) for version in (OLDEST, NEWEST))
    major, minor = (int(part) for part in found.split(".")[:2])
    if (major, minor) < OLDEST:
        raise ValueError(f"rollout.engine=vllm needs vllm {oldest} to {newest}; installed is {found}")
    if (major, minor) > NEWEST:
        warnings.warn(
            f"vllm {found} is newer than the versions whose weight sync is known ({oldest} to {newest}): watch "
            "rollout/mismatch_max, docs/rollouts.md says what is normal",
            stacklevel=2,
        )


class SyncExtension:
    """Methods that vLLM's worker gets. `self` is the worker."""

    def reval_load(self, path: str, index: Index, dtype: str) -> None:
        """Load the weights from a file that `write_weights` wrote."""
        self.reval_reload(read_weights(path, index, getattr(torch, dtype)))

    def reval_reload(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Load (name in a checkpoint, weight) pairs. Raises RuntimeError if a weight of the model is missing.

        `reload_weights` copies into the existing tensors, on a GPU too, so CUDA graphs stay valid. On a GPU, no weight
        has a packed copy. The GPU path follows vLLM's documentation and source; this project has not run it, because it
        had no GPU.
        """
        worker: Any = self
        model = worker.model_runner.get_model()
        wanted = {name for name, _ in model.named_parameters()}
        loaded: set[str] = set()
        load = model.load_weights

        def load_and_note(weights: Iterable[tuple[str, Tensor]]) -> set[str]:
            names = load(weights)
            loaded.update(names or ())
            return names

        model.load_weights = load_and_note
        try:
            worker.reload_weights(weights_iterator=weights)
        finally:
            del model.load_weights
        if missing := sorted(wanted - loaded):
            shown = ", ".join(missing[:5])
            raise RuntimeError(f"vLLM loaded {len(loaded)} weights and left out {len(missing)}: {shown}, ...")
        self.reval_pack_head(model)

    def reval_pack_head(self, model: torch.nn.Module) -> None:
        """On a CPU: make the packed copy of the head's weight again.

        A tied head has no weight of its own to load, so vLLM keeps the old packed copy.
        """
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
        from vllm.platforms import current_platform

        if not current_platform.is_cpu():
            return
        for layer in model.modules():
            if isinstance(layer, ParallelLMHead):
                layer.quant_method.process_weights_after_loading(layer)
