"""New weights for a running vLLM engine: the one place that knows how a version of vLLM takes them.

vLLM mixes `SyncExtension` into its worker (`worker_extension_cls`), so its methods run where the model lies, in every
worker of a tensor-parallel engine. Three things go wrong in silence otherwise, and none of them is an error to vLLM:
a weight that does not arrive keeps its old value (a warning); on a CPU the tied head keeps its packed old copy (a
warning that reads like the harmless ones); and keys and values of old weights stay in the prefix cache (nothing at
all; vllm.py resets it).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .weights import Index, read_weights

# the vLLM whose reload_weights(weights_iterator=...) this was written for, and run with on a CPU
TRIED = (0, 32)


class SyncExtension:
    """Methods that vLLM's worker gains; `self` is the worker."""

    def reval_load(self, path: str, index: Index, dtype: str) -> None:
        """Take the weights from a file that `write_weights` wrote."""
        self.reval_reload(read_weights(path, index, getattr(torch, dtype)))

    def reval_reload(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Take the weights, under their names in a checkpoint. Raises RuntimeError when one of the model's is missing.

        On a GPU, `reload_weights` copies in place as well, so CUDA graphs stay valid, and nothing needs packing. That
        path follows vLLM's documentation and source: it has not been run by this project, for want of a GPU.
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
        """On a CPU: make the head's packed copy again. A tied head loads nothing, so vLLM leaves the old copy."""
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
        from vllm.platforms import current_platform

        if not current_platform.is_cpu():
            return
        for layer in model.modules():
            if isinstance(layer, ParallelLMHead):
                layer.quant_method.process_weights_after_loading(layer)
