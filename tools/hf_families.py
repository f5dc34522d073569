"""python tools/hf_families.py: which causal language models of transformers does reval_kernels.hf support?

For every architecture of AutoModelForCausalLM it builds a tiny model with random weights, and compares
`token_values_of` with `token_values` of the model's own logits: values, and the gradients of all weights, in float32.
Then it compares rows with padding on the left, and two sequences packed into one row, with each sequence alone.

    python tools/hf_families.py                          # all, 2 minutes
    python tools/hf_families.py llama gemma2             # some
    python tools/hf_families.py --out families.json      # the results as JSON
    python tools/hf_families.py --page docs/huggingface.md   # write the table between the markers of the page
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import CONFIG_MAPPING, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as ARCHITECTURES

from reval_kernels import TokenValues, token_values
from reval_kernels.hf import head_of, token_values_of

WORDS, TOKENS = 67, 8
MOST = 40_000_000
"""Parameters of a model that is tiny enough."""
SMALL: dict[str, Any] = {
    "vocab_size": WORDS, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "sep_token_id": 2,
    "hidden_size": 32, "n_embd": 32, "d_model": 32, "n_embed": 32, "embedding_size": 32, "dim_model": 32, "emb_dim": 32,
    "word_embed_proj_dim": 32, "intermediate_size": 48, "ffn_dim": 48, "d_inner": 48, "n_inner": 48, "d_ff": 48,
    "dim_ff": 48, "dff": 48, "decoder_ffn_dim": 48, "encoder_ffn_dim": 48, "ffn_hidden_size": 48,
    "num_hidden_layers": 2, "n_layer": 2, "n_layers": 2, "num_layers": 2, "decoder_layers": 2, "encoder_layers": 2,
    "num_decoder_layers": 2, "num_encoder_layers": 2,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4, "decoder_attention_heads": 4,
    "encoder_attention_heads": 4, "num_decoder_attention_heads": 4, "num_encoder_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "dim_head": 8, "d_kv": 8, "rotary_dim": 8,
    "max_position_embeddings": 128, "n_positions": 128, "n_ctx": 128, "max_seq_len": 128, "seq_length": 128,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24, "moe_k": 2, "n_group": 1, "topk_group": 1,
    "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "kv_lora_rank": 16, "q_lora_rank": 16,
    "is_decoder": True, "use_cache": False,
    "final_logit_softcapping": 2.0, "logits_soft_cap": 2.0, "output_logit_soft_cap": 2.0, "logit_scale": 0.3,
    "logits_scaling": 1.7, "lm_head_multiplier": 0.3, "logits_mup_width_multiplier": 1.7,
}  # fmt: skip
"""Settings of a tiny model; a configuration takes those that it has. What acts on logits differs from 1."""
LATENT: dict[str, Any] = {"num_key_value_heads": 4, "head_dim": 16}
"""Multi-head latent attention: queries and keys have a part with positions and a part without."""
OWN: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("axk1", "axk2", "deepseek_v3", "youtu", "glm4_moe_lite"), LATENT | {"head_dim": 8}),
    **dict.fromkeys(("deepseek_v2", "minicpm3"), LATENT | {"head_dim": 8}),
    **dict.fromkeys(
        ("deepseek_v32", "glm_moe_dsa"), LATENT | {"index_topk": 4, "index_n_heads": 4, "index_head_dim": 16}
    ),
    "kimi_linear": {"num_experts_per_token": 2},
    "gemma3n_text": {"layer_types": ["sliding_attention", "full_attention"], "vocab_size_per_layer_input": WORDS},
    "gemma4_text": {"vocab_size_per_layer_input": WORDS, "global_head_dim": 8},
    "xmod": {"default_language": "en_XX"},
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "attn_layer_indices": [1]},
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8},
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 2},
    "zaya": {"num_experts_per_tok": 1},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "reformer": {"axial_pos_embds": False, "attn_layers": ["local", "local"], "attention_head_size": 8},
}
"""Settings that single architectures need in addition."""


def config_of(kind: str) -> Any:
    """A tiny configuration of a kind of model."""
    return _small(CONFIG_MAPPING[kind], OWN.get(kind, {}))


def _small(config_class: Any, own: dict[str, Any]) -> Any:
    with contextlib.redirect_stdout(io.StringIO()):
        names = config_class().to_dict()
    given = {name: x for name, x in SMALL.items() if name in names}
    parts = {name: _small(part, {}) for name, part in config_class.sub_configs.items() if hasattr(part, "sub_configs")}
    return config_class(**given | {name: part.to_dict() for name, part in parts.items()} | own)


def model_of(kind: str) -> PreTrainedModel:
    """A tiny random model. Raises whatever its classes raise, and ValueError if it is not tiny."""
    model_class, config = getattr(transformers, ARCHITECTURES[kind]), config_of(kind)
    if not isinstance(config, model_class.config_class):
        config = config.get_text_config(decoder=True)
    with torch.device("meta"):
        size = sum(p.numel() for p in model_class(config).parameters())
    if size > MOST:
        raise ValueError(f"{size / 1e6:.0f} million parameters")
    torch.manual_seed(0)
    model = model_class(config).float().eval()
    for name, weight in model.named_parameters():
        if "bias" in name and weight.dim() == 1:
            torch.nn.init.normal_(weight, std=0.3)
    head = model.get_output_embeddings()
    if isinstance(getattr(head, "weight", None), Tensor):
        torch.nn.init.normal_(head.weight, std=0.7)
    return model


class Found:
    """What was found about one kind of model."""

    def __init__(self, kind: str, state: str, why: str = "", transform: str = "", left: str = "", packed: str = ""):
        self.kind, self.name, self.state, self.why = kind, ARCHITECTURES[kind], state, why
        self.transform, self.left, self.packed = transform, left, packed


def check(kind: str) -> Found:
    """Build a model of a kind and compare."""
    try:
        model = model_of(kind)
    except Exception as error:  # what the classes of transformers raise is unknown
        return Found(kind, "not built", _line(error))
    ids = torch.randint(3, WORDS, (2, TOKENS), generator=torch.Generator().manual_seed(1))
    try:
        logits = model(input_ids=ids).logits
        own = token_values(logits[:, :-1], ids[:, 1:], with_entropy=True)
        own_gradients = gradients(model, own)
    except Exception as error:
        return Found(kind, "not built", f"it does not compute logits of input_ids alone: {_line(error)}")
    try:
        ours = token_values_of(model, ids, with_entropy=True)
    except (TypeError, ValueError) as error:
        return Found(kind, "refused", _line(error))
    softcap, temperature = head_of(model)[2:4]
    does = [] if softcap is None else [f"softcap {softcap:g}"]
    does += [] if temperature == 1 else [f"scale {1 / temperature:.4g}"]
    off = max(distance(a, b) for a, b in zip(ours, own, strict=True))
    off = max(off, *(distance(a, b) for a, b in zip(gradients(model, ours), own_gradients, strict=True)))
    state, why = ("supported", "") if off < 1e-4 else ("WRONG", f"off by {off:.2g}")
    with torch.no_grad():
        return Found(kind, state, why, ", ".join(does), left_padding(model, ids), packing(model, ids))


def gradients(model: PreTrainedModel, values: TokenValues) -> list[Tensor]:
    """The gradients of all parameters, for random gradients of the values."""
    generator = torch.Generator().manual_seed(2)
    upstream = [torch.randn(x.shape, generator=generator) for x in values if x is not None]
    trained = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad([x for x in values if x is not None], trained, upstream, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(found, trained, strict=True)]


def distance(a: Tensor | None, b: Tensor | None) -> float:
    """The largest difference, relative to the largest entry where that is above 1."""
    if a is None or b is None:
        return 0.0 if a is b else float("inf")
    error = float((a - b).abs().max() / b.abs().max().clamp(min=1))
    return error if error == error else float("inf")


def left_padding(model: PreTrainedModel, ids: Tensor) -> str:
    """Whether a sequence has the same values behind padding."""
    alone = token_values_of(model, ids[:1])
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids[:1]], 1)
    other = torch.cat([ids[1:], ids[1:, :3]], 1)
    real = torch.ones(2, TOKENS + 3, dtype=torch.long)
    real[0, :3] = 0
    try:
        found = token_values_of(model, torch.cat([padded, other]), attention_mask=real)
    except Exception as error:
        return f"no: {type(error).__name__}"
    near = all(distance(a[:1, 3:], b) < 1e-3 for a, b in zip(found[:3], alone[:3], strict=True))
    return "yes" if near else "no"


def packing(model: PreTrainedModel, ids: Tensor) -> str:
    """Whether two sequences in one row, with position_ids that start again, have the values that they have alone."""
    alone = token_values_of(model, ids)
    positions = torch.arange(TOKENS).repeat(2)[None]
    try:
        found = token_values_of(model, ids.flatten()[None], position_ids=positions)
    except Exception as error:
        return f"no: {type(error).__name__}"
    rows = [torch.stack([x[0, : TOKENS - 1], x[0, TOKENS:]]) for x in found[:3]]
    return "yes" if all(distance(a, b) < 1e-3 for a, b in zip(rows, alone[:3], strict=True)) else "no"


def _line(error: Exception) -> str:
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) < 160 else text[:157] + "..."


BEGIN, END = "<!-- families: begin -->", "<!-- families: end -->"


def table(found: list[Found]) -> str:
    """The results as Markdown: a row for each architecture that was built, then what was not built."""
    rows = [
        "| model type | class | token values | what it does to its logits | left padding | packed |",
        "|---|---|---|---|---|---|",
    ]
    for x in found:
        if x.state != "not built":
            state = x.state if not x.why else f"{x.state}: {x.why}"
            rows.append(f"| {x.kind} | {x.name} | {state} | {x.transform} | {x.left} | {x.packed} |")
    counts = Counter(x.state for x in found)
    missing = ", ".join(x.kind for x in found if x.state == "not built")
    told = ", ".join(f"{count} {state}" for state, count in counts.most_common())
    return f"transformers {transformers.__version__}: {told}.\n\n" + "\n".join(rows) + f"\n\nNot built: {missing}.\n"


def arguments(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", metavar="MODEL_TYPE", help="default: all")
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    parser.add_argument("--page", type=Path, help=f"write the table between {BEGIN} and {END} of this page")
    args = parser.parse_args(words)
    for kind in set(args.kinds) - set(ARCHITECTURES):
        parser.error(f"transformers {transformers.__version__} has no causal language model {kind!r}")
    return args


def main(words: list[str] | None = None) -> int:
    args, found = arguments(words), []
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore")
    for kind in args.kinds or ARCHITECTURES:
        found.append(check(kind))
        x = found[-1]
        print(f"{x.state:10} {x.kind:24} {x.transform:14} {x.left:5} {x.packed:5} {x.why}".rstrip(), flush=True)
    if args.out:
        args.out.write_text(json.dumps([vars(x) for x in found], indent=1) + "\n", encoding="utf-8")
    if args.page:
        before, _, rest = args.page.read_text(encoding="utf-8").partition(BEGIN)
        args.page.write_text(f"{before}{BEGIN}\n\n{table(found)}\n{END}{rest.partition(END)[2]}", encoding="utf-8")
    return int(any(x.state == "WRONG" for x in found))


if __name__ == "__main__":
    sys.exit(main())
