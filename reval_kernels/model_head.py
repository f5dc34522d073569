"""The head of a model of transformers, and functions computed there, in the place of the logits.

A causal language model calls its head once: logits = head(hidden). `at_head` calls the model as it is, with the head's
`forward` replaced: the replacement computes the caller's function of the hidden states and the head's weight, and
returns stand-in logits of one state. So all that a model's call does, happens: FSDP2 gathers the weights and DDP
averages the gradients, autocast, gradient checkpointing, adapters and hooks act. What the model does between its body
and its head has happened to the hidden states already. What it does to the logits is seen on the stand-in (`measure`).

Nothing of transformers is imported: a model is what has `get_output_embeddings`.
"""

from __future__ import annotations

import contextlib
import inspect
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .checks import FLOATS
from .logit_transform import LogitTransform, measure, stand_in_logits

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Result = TypeVar("Result")


class OutputHead(NamedTuple):
    """logits = softcap(hidden @ weight.T + bias) / temperature.

    V is the size of the vocabulary, D the width of the hidden states.

    The fields are keyword arguments of the kernels: linear_token_values(hidden, actions=actions, **head._asdict()).
    """

    weight: Tensor
    """[V, D]"""
    bias: Tensor | None
    """[V]"""
    softcap: float | None
    """c in c * tanh(logits / c). None: no softcap."""
    temperature: float
    """The inverse of the model's logit scale. It belongs to the model and is not the sampling temperature."""
    precision: str = "exact"
    """The least precision of the products, as in `linear_token_values`."""


_measured: WeakKeyDictionary[nn.Module, dict[tuple[Any, ...], LogitTransform]] = WeakKeyDictionary()
"""What was measured for a model, by `_state_of` it."""

LOGIT_WORDS = ("logit", "softcap", "scale", "scaling", "multiplier")
"""Parts of the names of numbers with which models change their logits."""


def _state_of(inner: Any, layer: Any) -> tuple[Any, ...]:
    """What a measurement depends on: the head, its shape, and the numbers of the model and its configuration whose
    names speak of logits. A replaced head, or another softcap in the configuration, is measured again."""
    config = inner.config
    held = [getattr(x, "__dict__", {}) for x in (inner, config, getattr(config, "text_config", None))]
    numbers = [
        (name, x)
        for names in held
        for name, x in names.items()
        if isinstance(x, (int, float)) and any(word in name for word in LOGIT_WORDS)
    ]
    return weakref.ref(layer), tuple(layer.weight.shape), tuple(numbers)


def causal_lm(model: Any) -> Any:
    """The causal language model inside DistributedDataParallel, torch.compile and peft's wrappers.

    Raises TypeError for a module that is none, and for FSDP1.
    """
    inner = model
    while True:
        if type(inner).__name__ == "FullyShardedDataParallel":  # FSDP1, which passes every attribute on
            raise TypeError(
                "model must not be inside FullyShardedDataParallel (FSDP1), which gives the head no whole weight; got "
                "one. Shard it with FSDP2: torch.distributed.fsdp.fully_shard(model)"
            )
        if hasattr(inner, "_orig_mod"):  # torch.compile(model)
            inner = inner._orig_mod
        elif hasattr(inner, "get_base_model"):  # peft
            inner = inner.get_base_model()
        elif isinstance(inner, nn.parallel.DistributedDataParallel):
            inner = inner.module
        else:
            break
    if not (isinstance(inner, nn.Module) and hasattr(inner, "get_output_embeddings") and hasattr(inner, "config")):
        raise TypeError(
            "model must be a causal language model of transformers, or one inside DistributedDataParallel, "
            f"torch.compile or a PeftModel; got {type(inner).__name__}"
        )
    if getattr(inner.config, "is_encoder_decoder", False):
        raise TypeError(f"model must have a decoder alone; {type(inner).__name__} has an encoder too")
    return inner


def head_layer(model: Any) -> Any:
    """The layer that computes the logits.

    Raises ValueError for a head with an adapter, and for what has no weight or one that is quantized or partitioned.
    """
    inner = causal_lm(model)
    layer, name = inner.get_output_embeddings(), type(inner).__name__
    if hasattr(layer, "modules_to_save"):  # peft trains a copy of the whole head
        active = list(layer.active_adapters)
        copies = not layer.disable_adapters and [layer.modules_to_save[a] for a in active if a in layer.modules_to_save]
        layer = copies[0] if copies else layer.original_module
    if hasattr(layer, "base_layer"):
        raise ValueError(
            f"the head of {name} is adapted ({type(layer).__module__}.{type(layer).__name__}); values come from the "
            "head's weight, which is not all of an adapted head. Leave the head ('lm_head') out of the adapter's "
            "target_modules, or train a copy of it: modules_to_save=['lm_head']"
        )
    if not isinstance(getattr(layer, "weight", None), Tensor):
        raise ValueError(
            f"{name} has no head with one weight (get_output_embeddings() is {type(layer).__name__}); values need a "
            "causal language model whose logits are hidden @ weight.T"
        )
    if hasattr(layer.weight, "ds_id"):
        raise ValueError(
            f"the head's weight of {name} is partitioned by DeepSpeed ZeRO-3, so no rank has it whole; take ZeRO-2, or "
            "FSDP2: torch.distributed.fsdp.fully_shard(model)"
        )
    if layer.weight.dtype not in FLOATS:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOATS)
        raise ValueError(
            f"the head's weight of {name} must be {allowed}; got {str(layer.weight.dtype).removeprefix('torch.')} "
            f"({type(layer).__name__}). Leave the head out of the quantization, for example by "
            "BitsAndBytesConfig(llm_int8_skip_modules=['lm_head'])"
        )
    return layer


def head_of(model: Any) -> OutputHead:
    """The head of a causal language model.

    The first call for a model runs it on a few tokens, to see what it does to its logits (`measure`).

    Args:
        model: a causal language model of transformers; also inside DistributedDataParallel, torch.compile or peft.

    Returns:
        OutputHead, whose weight and bias are the model's parameters. With FSDP2 they may be DTensors; inside `at_head`
        they are whole.

    Raises:
        TypeError, ValueError: the model is not a causal language model, or its head is none that OutputHead describes.
    """
    return describe(head_layer(model), transform_of(model))


def transform_of(model: Any) -> LogitTransform:
    """What a model does to the output of its head. The first call for a model runs it on a few tokens."""
    inner = causal_lm(model)
    layer = head_layer(inner)
    known = _measured.get(inner, {}).get(_state_of(inner, layer))
    if known is not None:
        return known
    # Two rows of two different tokens: a factor of each token or row gives the logits its shape, so it is refused.
    ids = torch.arange(4, device=layer.weight.device).reshape(2, 2) % layer.weight.shape[0]
    with torch.no_grad():
        return _run(model, lambda hidden, head, group: (), {"input_ids": ids})[1]


def note_transform(model: Any, transform: LogitTransform) -> None:
    """Say what a model does to the output of its head, so that it is not measured: another process has done so.

    All ranks of a wrapped model must know it, or none: a rank that measures may call the model once more.
    """
    _note(causal_lm(model), head_layer(model), transform)


def _note(inner: Any, layer: Any, transform: LogitTransform) -> None:
    _measured.setdefault(inner, {})[_state_of(inner, layer)] = transform


def describe(layer: Any, transform: LogitTransform) -> OutputHead:
    """The head, from the layer and what the model does to the layer's output."""
    weight, bias = layer.weight, getattr(layer, "bias", None)
    if transform.words is not None:
        weight, bias = weight[: transform.words], None if bias is None else bias[: transform.words]
    return OutputHead(weight, bias, transform.softcap, transform.temperature)


def at_head(model: Any, function: Callable[[Tensor, OutputHead], Result], **inputs: Any) -> Result:
    """Call model(**inputs) up to its head, and return function(hidden, head).

    The function runs inside the model's call, where FSDP2 has gathered the head's weight, and outside of autocast. Its
    results are differentiable, and a backward through them is a backward through the model's output.

        at_head(model, lambda hidden, head: linear_token_values(hidden, actions=a, **head._asdict()), input_ids=ids)

    Args:
        model: a causal language model of transformers; also inside DistributedDataParallel, torch.compile or peft.
        function: takes the input of the head, [B, T, D], and an OutputHead. It returns a tensor or a (named) tuple of
            tensors, numbers, strings and None.
        inputs: the arguments of the model. use_cache is false if it is not given.

    The first call for a model measures what it does to its logits. If it does something, the model is called again.

    Returns:
        What the function returns.

    Raises:
        TypeError: `model` is no causal language model, or the function returns something else.
        ValueError: the model or its head is none that OutputHead describes.
    """
    return at_sharded_head(model, lambda hidden, head, group: function(hidden, _unsharded(model, head, group)), inputs)


def _unsharded(model: Any, head: OutputHead, group: ProcessGroup | None) -> OutputHead:
    if group is not None:
        raise ValueError(
            f"the head of {type(causal_lm(model)).__name__} is split over {group.size()} ranks by tensor parallelism; "
            "of the functions here token_values_of alone computes with such a head"
        )
    return head


def at_sharded_head(
    model: Any, function: Callable[[Tensor, OutputHead, ProcessGroup | None], Result], inputs: dict[str, Any]
) -> Result:
    """`at_head` with a function of (hidden, head, process group). There is a group if each rank of it has a slice of
    the head's words."""
    return _run(model, function, inputs)[0]


def _run(model: Any, function: Callable[..., Any], inputs: dict[str, Any]) -> tuple[Any, LogitTransform]:
    """The result of `at_sharded_head`, and what the model does to its logits."""
    inner = causal_lm(model)
    for name in ("labels", "logits_to_keep", "num_logits_to_keep"):
        if inputs.get(name) is not None:
            raise ValueError(f"{name} must not be given: the model computes no logits here, so it has no use for them")
    if "use_cache" in inspect.signature(type(inner).forward).parameters:
        inputs = {"use_cache": False} | inputs
    layer = head_layer(inner)
    known = _measured.get(inner, {}).get(_state_of(inner, layer))
    try:
        call = _Call(layer, type(inner).__name__, function, known or LogitTransform(), known is None)
        logits = call.run(model, inputs)
        if known is None:
            known = measure(call.name, layer.weight.shape[0], logits, split=call.split)
            if call.lasting:
                _note(inner, layer, known)
        if known != call.transform:
            del call, logits  # with them goes the first graph, before the second is built
            call = _Call(layer, type(inner).__name__, function, known)
            logits = call.run(model, inputs)
        return _passed_through(call.result, logits), known
    finally:
        if not torch.is_grad_enabled():
            _reshard(model)


def _reshard(model: nn.Module) -> None:
    """Free the weights that FSDP2 keeps for a backward. Without this, zero_grad() and the optimizer would see gathered
    weights as the model's parameters after a pass without gradient, and the next gradients would be lost."""
    module: Any
    for module in model.modules():
        if hasattr(module, "reshard") and hasattr(module, "unshard"):
            module.reshard()


class _Call:
    """One call of a model whose head does not compute logits."""

    def __init__(
        self, layer: Any, name: str, function: Callable[..., Any], transform: LogitTransform, probing: bool = False
    ):
        self.layer, self.name, self.function, self.transform = layer, name, function, transform
        self.probing = probing
        self.result: Any = None
        self.calls = 0
        self.split = False
        """Whether this rank has a slice of the words."""
        self.lasting = False
        """Whether what is measured in this call holds for other calls."""

    def run(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """The stand-in logits, as they come out of the model."""
        token = _current.set(self)
        try:
            with _replaced(self.layer):
                out = model(**inputs)
        finally:
            _current.reset(token)
        if self.calls != 1:
            raise ValueError(
                f"{self.name} called its head {self.calls} times in a forward pass; values need a model that calls it "
                "once, with the states of all tokens"
            )
        logits = out.logits if hasattr(out, "logits") else out[0]
        return logits.full_tensor() if hasattr(logits, "full_tensor") else logits

    def head(self, hidden: Tensor) -> Tensor:
        """What the head computes in this call: keep function(hidden, head), return stand-in logits [1, 1, V]."""
        self.calls += 1
        given = hidden
        hidden, weight, bias, group, mesh = _local(self.name, self.layer, hidden)
        self.split = group is not None
        with torch.autocast(hidden.device.type, enabled=False):
            if self.probing:
                # what a model does to the logits of one token alone, it may do by a factor of that token
                self.lasting = _is_linear(self.name, self.layer, given, weight) and hidden.shape[:-1].numel() > 1
            head = describe(types.SimpleNamespace(weight=weight, bias=bias), self.transform)
            result = _checked(self.function(hidden, head, group))
        words = self.layer.weight.shape[0]
        stand_in = stand_in_logits(words, hidden.device) if self.probing else _zeros(words, hidden.device)
        self.result, stand_in = _joined(result, stand_in)
        if mesh is None:
            return stand_in
        from torch.distributed.tensor import DTensor, Replicate

        return DTensor.from_local(stand_in, mesh, [Replicate()])


_current: ContextVar[_Call | None] = ContextVar("reval_call", default=None)
_lock = threading.Lock()
_replacements: dict[nn.Module, tuple[int, Any]] = {}
"""The heads with a replaced forward: the number of calls now running, and the `forward` that the instance had."""


@contextlib.contextmanager
def _replaced(layer: Any) -> Iterator[None]:
    """Within the block `layer.forward` is `_forward`. Blocks may overlap, in one thread or several."""
    with _lock:
        count, own = _replacements.get(layer, (0, vars(layer).get("forward")))
        _replacements[layer] = (count + 1, own)
        layer.forward = types.MethodType(_forward, layer)
    try:
        yield
    finally:
        with _lock:
            count, own = _replacements.pop(layer)
            if count > 1:
                _replacements[layer] = (count - 1, own)
            elif own is None:
                del layer.forward
            else:
                layer.forward = own


@torch.compiler.disable
def _forward(layer: Any, hidden: Tensor, *args: Any, **options: Any) -> Tensor:
    call = _current.get()
    if call is not None and call.layer is layer and not args and not options:
        return call.head(hidden)
    return _own_forward(layer)(hidden, *args, **options)


def _own_forward(layer: Any) -> Any:
    """The forward that the layer has outside of `_replaced`."""
    own = _replacements.get(layer, (0, None))[1]
    return types.MethodType(type(layer).forward, layer) if own is None else own


def _local(name: str, layer: Any, hidden: Any) -> tuple[Tensor, Tensor, Tensor | None, Any, Any]:
    """hidden, weight and bias as this rank has them, the group that shares the vocabulary, and the mesh of a DTensor.

    Raises ValueError for a DTensor that is not split by words over one dimension.
    """
    weight, bias = layer.weight, getattr(layer, "bias", None)
    if not hasattr(weight, "placements"):
        return hidden, weight, bias, None, None
    placements, mesh = weight.placements, weight.device_mesh
    hidden_placements = getattr(hidden, "placements", None)
    split = len(placements) == 1 and placements[0].is_shard(0)
    if not (split or all(p.is_replicate() for p in placements)) or any(
        not p.is_replicate() for p in hidden_placements or ()
    ):
        raise ValueError(
            f"the head of {name} is a DTensor with placements {placements} while it computes, and its input has "
            f"{hidden_placements}; values need a whole head (FSDP2 gathers it if the wrapped model itself is called), "
            "or tensor parallelism over one dimension with a head split by words (Shard(0)) and a replicated input: "
            "ColwiseParallel(output_layouts=Replicate())"
        )
    if hidden_placements is not None:
        hidden = hidden.to_local()
    weight, bias = weight.to_local(), None if bias is None else bias.to_local()
    return hidden, weight, bias, mesh.get_group() if split else None, mesh if hidden_placements is not None else None


def _zeros(words: int, device: torch.device) -> Tensor:
    return torch.zeros(1, 1, words, dtype=torch.float64, device=device)


@torch.no_grad()
def _is_linear(name: str, layer: Any, hidden: Any, weight: Tensor) -> bool:
    """Whether the layer's output for a state is hidden @ weight.T + bias. False if no state or weight can tell.

    Raises ValueError if it is not.
    """
    states = hidden.to_local() if hasattr(hidden, "to_local") else hidden
    telling = states.isfinite().all(-1) & (states != 0).any(-1)
    if not telling.any():
        return False
    row = hidden[tuple(slice(i, i + 1) for i in telling.nonzero()[0].tolist())].to(weight.dtype)
    own, plain = _own_forward(layer)(row), nn.functional.linear(row, layer.weight, getattr(layer, "bias", None))
    own, plain = (x.full_tensor() if hasattr(x, "full_tensor") else x for x in (own, plain))
    bound = 64 * torch.finfo(weight.dtype).eps * float(plain.abs().max())
    if not 0 < bound < float("inf"):
        return False
    close = own.shape == plain.shape and torch.allclose(own.double(), plain.double(), rtol=0, atol=bound)
    if not close:
        raise ValueError(
            f"the head of {name} ({type(layer).__name__}) is no matrix: its output differs from hidden @ weight.T + "
            "bias. reval_kernels.token_values takes any logits: token_values(model(...).logits, ...)"
        )
    return True


# --- gradients through the model's output ----------------------------------------------------------------------------


class _Joint(torch.autograd.Function):
    """The identity of several tensors as one node of the graph: no gradient passes before all of them have come."""

    @staticmethod
    def forward(ctx, carrier, *tensors):
        ctx.set_materialize_grads(False)
        ctx.carrier = carrier.shape, carrier.dtype, carrier.device
        return carrier.clone(), *(x.clone() for x in tensors)

    @staticmethod
    def backward(ctx, d_carrier, *gradients):
        if d_carrier is None:
            shape, dtype, device = ctx.carrier
            d_carrier = torch.zeros(shape, dtype=dtype, device=device)
        return d_carrier, *gradients


def _checked(result: Any) -> Any:
    """`result`. Raises TypeError if it may hold tensors where `_joined` does not look, so no gradient passes."""
    for x in result if isinstance(result, tuple) else (result,):
        if not (x is None or isinstance(x, (Tensor, int, float, str))):
            raise TypeError(
                "the function at the head must return a tensor, or a tuple (or NamedTuple) of tensors, numbers, "
                f"strings and None; got {type(x).__name__}{' in a tuple' if isinstance(result, tuple) else ''}"
            )
    return result


def _joined(result: Any, carrier: Tensor) -> tuple[Any, Tensor]:
    """`result` and `carrier` behind one node. Only tensors of `result` that need a gradient change."""
    items = list(result) if isinstance(result, tuple) else [result]
    where = [i for i, x in enumerate(items) if isinstance(x, Tensor) and x.requires_grad]
    if not where or not torch.is_grad_enabled():
        return result, carrier
    carrier, *tensors = _Joint.apply(carrier, *(items[i] for i in where))
    for i, x in zip(where, tensors, strict=True):
        items[i] = x
    if not isinstance(result, tuple):
        return items[0], carrier
    return (type(result)(*items) if hasattr(result, "_fields") else tuple(items)), carrier


def _passed_through(result: Any, logits: Tensor) -> Any:
    """`result`, whose backward first goes through the model's output.

    FSDP2 gathers weights for the backward when a gradient reaches the output of the module that they belong to, and DDP
    finds unused parameters from there. The stand-in logits carry a gradient of zeros on this way.
    """
    return _joined(result, logits)[0]
