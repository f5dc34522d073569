"""Functions of other libraries for the same work, called as their documentation says. None of them returns V.

Most of these functions compute less than ours. The column `computes` of the results names the outputs of each.

Letters: N tokens, D width.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .ops import Function, Tensors
from .providers import Provider, wide


def needs(module: str, *names: str, device: str = "") -> Callable[[str], str | None]:
    """A `Provider.missing` function: checks the device type, the module's import and the names in the module."""

    def missing(here: str) -> str | None:
        if device and here != device:
            return f"its kernels need a GPU, this is the {here}"
        try:
            found = importlib.import_module(module)
        except Exception as error:  # an import may fail with any exception, and the exception is the reason
            return f"{module} does not import: {type(error).__name__}: {error}; see make bench, which installs it"
        absent = [name for name in names if not hasattr(found, name)]
        return f"{module} has no {', '.join(absent)} in this version" if absent else None

    return missing


def by_token(loss: Callable[..., Tensor]) -> Function:
    """A provider function for log_prob, from a cross entropy per token of (hidden [N, D], weight, actions [N])."""

    def run(hidden: Tensor, weight: Tensor, actions: Tensor) -> Tensors:
        return {"log_prob": -loss(hidden.flatten(0, 1), weight, actions.flatten(), reduction="none").view_as(actions)}

    return run


def mean(loss: Callable[..., Tensor]) -> Function:
    """A provider function for the mean cross entropy of the tokens, from the same kind of loss."""

    def run(hidden: Tensor, weight: Tensor, actions: Tensor, returns: Tensor, rewards: Tensor) -> Tensors:
        return {"loss": loss(hidden.flatten(0, 1), weight, actions.flatten(), reduction="mean")}

    return run


# --- cross entropy of (hidden, weight, actions) ----------------------------------------------------------------------


def torch_loss(hidden: Tensor, weight: Tensor, actions: Tensor, reduction: str) -> Tensor:
    return F.linear_cross_entropy(hidden, weight, actions, reduction=reduction)


def torch_chunked_loss(hidden: Tensor, weight: Tensor, actions: Tensor, reduction: str) -> Tensor:
    """With options, torch chooses chunks and accumulation by device and dtype."""
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(hidden, weight, actions, reduction=reduction, options=options)


def cce_loss(**options) -> Callable[..., Tensor]:
    def loss(hidden: Tensor, weight: Tensor, actions: Tensor, reduction: str) -> Tensor:
        from cut_cross_entropy import linear_cross_entropy

        return linear_cross_entropy(hidden, weight, actions, reduction=reduction, **options)

    return loss


def liger_loss(hidden: Tensor, weight: Tensor, actions: Tensor, reduction: str) -> Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(hidden, weight, actions, reduction=reduction)


def liger_scaled_loss(hidden: Tensor, weight: Tensor, actions: Tensor, reduction: str) -> Tensor:
    """Liger's loss for each token: on Hopper in CuTe, on other GPUs in PyTorch."""
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction

    loss = LigerFusedLinearScaledCrossEntropyFunction.apply(hidden, weight, actions)
    return loss if reduction == "none" else loss.mean()


def quack_loss(hidden: Tensor, weight: Tensor, actions: Tensor, reduction: str) -> Tensor:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return chunked_linear_cross_entropy(hidden, weight, actions, reduction=reduction)


def trl_loss(hidden: Tensor, weight: Tensor, actions: Tensor, reduction: str) -> Tensor:
    """TRL's function with its trainers' arguments: vocabulary chunks of 32,768 and no optional output."""
    from trl.kernels import ChunkedLogProbFunction

    log_prob = ChunkedLogProbFunction.apply(hidden, weight, None, actions, 1.0, 32768, None, 1.0, ())[0]
    return -log_prob if reduction == "none" else -log_prob.mean()


# --- log_prob of (logits, actions) -----------------------------------------------------------------------------------


def trl_token_values(logits: Tensor, actions: Tensor) -> Tensors:
    from trl.trainer.utils import selective_log_softmax

    return {"log_prob": selective_log_softmax(logits, actions)}


def log_softmax_token_values(logits: Tensor, actions: Tensor) -> Tensors:
    """Plain PyTorch with log_softmax. In eager mode it is faster than "torch eager", the more common code."""
    z, own = wide(logits), actions[..., None]
    q, log_prob = z.gather(-1, own)[..., 0], F.log_softmax(z, -1).gather(-1, own)[..., 0]
    return {"q": q, "v": q - log_prob, "log_prob": log_prob}


def liger_token_values(logits: Tensor, actions: Tensor) -> Tensors:
    from liger_kernel.transformers.functional import liger_cross_entropy

    return {"log_prob": -liger_cross_entropy(logits, actions, reduction="none")}


def quack_token_values(logits: Tensor, actions: Tensor) -> Tensors:
    from quack.cross_entropy import cross_entropy

    return {"log_prob": -cross_entropy(logits, actions, reduction="none")}


# --- the list --------------------------------------------------------------------------------------------------------


def linear(name: str, loss: Callable[..., Tensor], missing: Callable[[str], str | None], **options) -> list[Provider]:
    return [
        Provider(name, "linear_token_values", "log_prob", lambda: by_token(loss), missing, **options),
        Provider(name, "linear_reval_loss", "cross entropy", lambda: mean(loss), missing, **options),
    ]


TORCH = needs("torch.nn.functional", "linear_cross_entropy")
CCE, CCE_GPU = needs("cut_cross_entropy"), needs("cut_cross_entropy", device="cuda")
LIGER_SCALED = needs("liger_kernel.ops", "LigerFusedLinearScaledCrossEntropyFunction", device="cuda")
LIGER = needs("liger_kernel.transformers.functional", device="cuda")
TRL = needs("trl.trainer.utils", "selective_log_softmax")

PEERS = [
    *linear("F.linear_cross_entropy", torch_loss, TORCH),
    *linear("F.linear_cross_entropy options", torch_chunked_loss, TORCH),
    *linear("cut-cross-entropy", cce_loss(impl="cce"), CCE_GPU),
    # without filter_eps=None, cut-cross-entropy drops small gradients
    *linear("cut-cross-entropy unfiltered", cce_loss(impl="cce", filter_eps=None), CCE_GPU),
    *linear("cut-cross-entropy torch_compile", cce_loss(impl="torch_compile"), CCE, compiled=True),
    *linear("Liger", liger_loss, LIGER),
    *linear(
        "Liger scaled", liger_scaled_loss, LIGER_SCALED, note="; sums the weight's gradient in the dtype of the weight"
    ),
    Provider(
        "quack",
        "linear_reval_loss",
        "cross entropy",
        lambda: mean(quack_loss),
        needs("quack.linear_cross_entropy", "chunked_linear_cross_entropy", device="cuda"),
    ),
    *linear("TRL fused head", trl_loss, needs("trl.kernels", "ChunkedLogProbFunction")),
    Provider("torch eager log_softmax", "token_values", "token values", lambda: log_softmax_token_values),
    Provider("TRL selective_log_softmax", "token_values", "log_prob", lambda: trl_token_values, TRL),
    Provider("Liger", "token_values", "log_prob", lambda: liger_token_values, LIGER, overwrites="logits"),
    Provider(
        "quack",
        "token_values",
        "log_prob",
        lambda: quack_token_values,
        needs("quack.cross_entropy", "cross_entropy", device="cuda"),
    ),
]
