"""The shapes of well-known models: sizes that determine the number of parameters.

This module imports neither torch nor transformers, so that `--dry-run` is fast on any machine.
"""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass
from pathlib import Path

RANDOM = "random:"
"""model.name=random:NAME is a model with random weights of the shape NAME. NAME is in SHAPES or a folder."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Sizes of a Llama or a Qwen: grouped-query attention, gated MLP, RMS norms.

    In the formulas: d = hidden, i = intermediate, q = heads * head_dim, kv = kv_heads * head_dim.
    """

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    context: int = 0
    """The largest number of tokens of a sequence. No other size depends on it."""
    tied: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False

    @property
    def queries(self) -> int:
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        """Width of the keys; the values are as wide."""
        return self.kv_heads * self.head_dim

    @property
    def linears(self) -> list[tuple[int, int]]:
        """(inputs, outputs) of the matrices of one layer: q, k, v, o, gate, up, down."""
        q, kv, d, i = self.queries, self.keys, self.hidden, self.intermediate
        return [(d, q), (d, kv), (d, kv), (q, d), (d, i), (d, i), (i, d)]

    @property
    def layer(self) -> int:
        """Number of parameters of one layer."""
        biases = (self.queries + 2 * self.keys) * self.qkv_bias
        norms = 2 * self.hidden + 2 * self.head_dim * self.qk_norm
        return sum(a * b for a, b in self.linears) + biases + norms

    @property
    def outside(self) -> int:
        """Number of parameters outside the layers: embedding, head and the last norm."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2) + self.hidden

    @property
    def parameters(self) -> int:
        return self.layers * self.layer + self.outside


def _qwen2(
    hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, vocabulary: int, context: int, tied: bool
) -> Shape:
    return Shape(
        hidden=hidden,
        intermediate=intermediate,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=hidden // heads,
        vocabulary=vocabulary,
        context=context,
        tied=tied,
        qkv_bias=True,
    )


def _qwen3(hidden: int, intermediate: int, layers: int, heads: int, tied: bool) -> Shape:
    return Shape(
        hidden=hidden,
        intermediate=intermediate,
        layers=layers,
        heads=heads,
        kv_heads=8,
        head_dim=128,
        vocabulary=151936,
        context=32768,
        tied=tied,
        qk_norm=True,
    )


def _llama3(hidden: int, intermediate: int, layers: int, heads: int, head_dim: int, tied: bool) -> Shape:
    return Shape(
        hidden=hidden,
        intermediate=intermediate,
        layers=layers,
        heads=heads,
        kv_heads=8,
        head_dim=head_dim,
        vocabulary=128256,
        context=131072,
        tied=tied,
    )


_QWEN_1_5B = (1536, 8960, 28, 12, 2, 151936)
_QWEN_7B = (3584, 18944, 28, 28, 4, 152064)
_QWEN_14B = (5120, 13824, 48, 40, 8, 152064)
_QWEN_32B = (5120, 27648, 64, 40, 8, 152064)

SHAPES = {
    "tiny": Shape(
        hidden=64,
        intermediate=128,
        layers=2,
        heads=4,
        kv_heads=2,
        head_dim=16,
        vocabulary=102,
        context=512,
        tied=True,
    ),
    "smollm2-135m-instruct": Shape(
        hidden=576,
        intermediate=1536,
        layers=30,
        heads=9,
        kv_heads=3,
        head_dim=64,
        vocabulary=49152,
        context=8192,
        tied=True,
    ),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": _qwen2(*_QWEN_1_5B, 131072, tied=False),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": _qwen2(*_QWEN_7B, 131072, tied=False),
    "deepseek-ai/DeepSeek-R1-Distill-Llama-8B": _llama3(4096, 14336, 32, 32, 128, tied=False),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-14B": _qwen2(*_QWEN_14B, 131072, tied=False),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-32B": _qwen2(*_QWEN_32B, 131072, tied=False),
    "Qwen/Qwen2.5-0.5B": _qwen2(896, 4864, 24, 14, 2, 151936, 32768, tied=True),
    "Qwen/Qwen2.5-1.5B": _qwen2(*_QWEN_1_5B, 32768, tied=True),
    "Qwen/Qwen2.5-Math-1.5B": _qwen2(*_QWEN_1_5B, 4096, tied=True),
    "Qwen/Qwen2.5-3B": _qwen2(2048, 11008, 36, 16, 2, 151936, 32768, tied=True),
    "Qwen/Qwen2.5-7B": _qwen2(*_QWEN_7B, 131072, tied=False),
    "Qwen/Qwen2.5-Math-7B": _qwen2(*_QWEN_7B, 4096, tied=False),
    "Qwen/Qwen2.5-14B": _qwen2(*_QWEN_14B, 131072, tied=False),
    "Qwen/Qwen2.5-32B": _qwen2(*_QWEN_32B, 131072, tied=False),
    "Qwen/Qwen3-0.6B": _qwen3(1024, 3072, 28, 16, tied=True),
    "Qwen/Qwen3-1.7B": _qwen3(2048, 6144, 28, 16, tied=True),
    "Qwen/Qwen3-4B": _qwen3(2560, 9728, 36, 32, tied=True),
    "Qwen/Qwen3-8B": _qwen3(4096, 12288, 36, 32, tied=False),
    "meta-llama/Llama-3.2-1B": _llama3(2048, 8192, 16, 32, 64, tied=True),
    "meta-llama/Llama-3.2-3B": _llama3(3072, 8192, 28, 24, 128, tied=True),
    "meta-llama/Llama-3.1-8B": _llama3(4096, 14336, 32, 32, 128, tied=False),
}
_BY_NAME = {full.rpartition("/")[2]: shape for full, shape in SHAPES.items()} | SHAPES


def named_shape(name: str) -> Shape | None:
    """The shape in SHAPES, with or without the organisation before `/` and `-Instruct` at the end. None: not there."""
    return _BY_NAME.get(name.removesuffix("-Instruct"))


def shape_of(name: str) -> Shape | None:
    """The shape of `model.name`: of a model in SHAPES or of a local folder with a config.json, also after `random:`.

    None if it is neither.
    """
    name = name.removeprefix(RANDOM)
    path = Path(name).expanduser() / "config.json"
    return named_shape(name) or (_of_file(path) if path.is_file() else None)


def _of_file(path: Path) -> Shape | None:
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings = settings.get("text_config") or settings
    kind = settings.get("model_type", "")
    try:
        heads = settings["num_attention_heads"]
        return Shape(
            hidden=settings["hidden_size"],
            intermediate=settings["intermediate_size"],
            layers=settings["num_hidden_layers"],
            heads=heads,
            kv_heads=settings.get("num_key_value_heads") or heads,
            head_dim=settings.get("head_dim") or settings["hidden_size"] // heads,
            vocabulary=settings["vocab_size"],
            context=settings.get("max_position_embeddings") or 0,
            tied=bool(settings.get("tie_word_embeddings", False)),
            qkv_bias=bool(settings.get("attention_bias", kind == "qwen2")),
            qk_norm=kind.startswith("qwen3"),
        )
    except KeyError:  # the model is not a Llama or a Qwen
        return None


def check_random(name: str) -> None:
    """Raise ValueError if `name` is random:NAME, and NAME is neither in SHAPES nor a folder with a config.json."""
    shape = name.removeprefix(RANDOM)
    if shape == name or named_shape(shape) or (Path(shape).expanduser() / "config.json").is_file():
        return
    if shape and Path(shape).expanduser().is_dir() or shape.startswith(("/", ".", "~")):
        raise ValueError(f"{RANDOM}FOLDER needs a folder with a config.json; there is no {Path(shape) / 'config.json'}")
    near = difflib.get_close_matches(shape, _BY_NAME, n=1, cutoff=0.5)
    hint = f"did you mean {RANDOM}{near[0]}?" if near else f"the known shapes are {', '.join(SHAPES)}"
    raise ValueError(f"{RANDOM}NAME needs a known shape or a folder with a config.json; got {name!r}; {hint}")
