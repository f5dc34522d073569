"""reval_kernels.hf against token_values of the models' own logits, in float64: values and gradients of all weights."""

import copy
import threading
import weakref

import pytest
import torch
import transformers
from cases import BACKENDS, DEVICE
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

from reval_kernels import linear_reval_loss, model_head, reference, reval_loss
from reval_kernels.hf import at_head, head_of, token_values_of

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="the models are on the CPU")

V, B, T = 51, 3, 7
SMALL = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
GPT2 = {"vocab_size": V, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 1}
MODELS = {
    "plain": ("Llama", SMALL),
    "softcap": ("Gemma2", SMALL | {"head_dim": 8, "final_logit_softcapping": 2.0}),
    "multiplied": ("Cohere", SMALL | {"logit_scale": 0.0625}),
    "divided": ("Granite", SMALL | {"logits_scaling": 3.0}),
    "multiplied by what others divide by": ("HyperCLOVAX", SMALL | {"logits_scaling": 1.7}),
    "positions learned": ("GPT2", GPT2),
    "layers between body and head": ("Bert", SMALL | {"is_decoder": True}),
}


def make(name: str = "plain", dtype=torch.float64, **settings):
    torch.manual_seed(0)
    kind, known = MODELS[name]
    model = AutoModelForCausalLM.from_config(getattr(transformers, f"{kind}Config")(**known | settings))
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    return model.to(dtype).eval()


def made_ids(batch: int = B, length: int = T):
    return torch.randint(2, V, (batch, length), generator=torch.Generator().manual_seed(length))


def upstream(values):
    return [torch.randn(x.shape, dtype=x.dtype) for x in values if x is not None]


def gradients(model, values, by):
    model.zero_grad()
    torch.autograd.backward([x for x in values if x is not None], by)
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(model, ours, own, tolerance=1e-10):
    """Values, and the gradients of all parameters for the same random upstream gradients."""
    torch.testing.assert_close(ours, own, rtol=tolerance, atol=tolerance, check_dtype=tolerance < 1e-5)
    by = upstream(own)
    ours, own = gradients(model, ours, by), gradients(model, own, by)
    assert ours.keys() == own.keys() and any(g.abs().max() > 0.1 for g in own.values())
    for name, gradient in own.items():
        scale = float(gradient.abs().max()) + 1e-3
        torch.testing.assert_close(ours[name], gradient, rtol=0, atol=100 * tolerance * scale, msg=name)


def own_values(model, ids, *, actions=None, mask=None, temperature=1.0, with_entropy=False, **inputs):
    logits = model(input_ids=ids, **inputs).logits
    if actions is None:
        logits, actions = logits[:, :-1], ids[:, 1:]
    options = {"mask": mask, "temperature": temperature, "with_entropy": with_entropy}
    return reference.token_values(logits, actions, **options)


# --- values and gradients ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_values_and_gradients_of_the_models_own_logits(name):
    model, ids = make(name), made_ids()
    mask = torch.rand(B, T - 1) < 0.6
    options = {"mask": mask, "with_entropy": True, "temperature": 0.7}
    assert_same(model, token_values_of(model, ids, **options), own_values(model, ids, **options))
    assert (token_values_of(model, ids, mask=mask).v[~mask] == 0).all()


@pytest.mark.parametrize("length", [2, 33])
def test_the_defaults(length):
    model, ids = make("softcap"), made_ids(1, length)
    assert_same(model, token_values_of(model, ids), own_values(model, ids))


def test_the_head_has_a_bias_and_a_dtype_of_its_own():
    model, ids = make(dtype=torch.float32), made_ids()
    model.lm_head.bias = torch.nn.Parameter(torch.randn(V))
    assert head_of(model).bias is model.lm_head.bias
    assert_same(model, token_values_of(model, ids), own_values(model, ids), 1e-5)
    model.lm_head.double()  # as with a head kept in float32 and layers in bfloat16
    model.lm_head.register_forward_pre_hook(lambda module, args: (args[0].double(),))
    assert token_values_of(model, ids).v.dtype == torch.float64


def test_given_actions_are_not_shifted():
    model, ids, actions = make("divided"), made_ids(), torch.randint(V, (B, T))
    temperature, mask = torch.rand(B, T, dtype=torch.float64) + 0.5, torch.rand(B, T) < 0.6
    actions[~mask] = -100
    options = {"actions": actions, "mask": mask, "temperature": temperature}
    ours = token_values_of(model, ids, **options)
    assert_same(model, ours, own_values(model, ids, **options))
    assert ours.v.shape == (B, T)


def test_a_temperature_for_each_action():
    model, ids, temperature = make("multiplied"), made_ids(), torch.rand(B, T - 1, dtype=torch.float64) + 0.5
    ours = token_values_of(model, ids, temperature=temperature)
    assert_same(model, ours, own_values(model, ids, temperature=temperature))


def test_a_frozen_head_and_adapters_of_nothing():
    model, ids = make("softcap", tie_word_embeddings=False), made_ids()
    model.lm_head.requires_grad_(False)
    ours, own = token_values_of(model, ids), own_values(model, ids)
    assert_same(model, ours, own)
    model.requires_grad_(False)
    assert not token_values_of(model, ids).v.requires_grad
    model.lm_head.requires_grad_(True)
    assert_same(model, token_values_of(model, ids), own_values(model, ids))


def test_no_action_at_all():
    model, ids = make(), made_ids()
    values = token_values_of(model, ids, mask=torch.zeros(B, T - 1, dtype=torch.bool))
    values.v.sum().backward()
    assert (values.v == 0).all() and all((p.grad == 0).all() for p in model.parameters())


def test_a_loss_at_the_head():
    """At the head any function of hidden states and head can be computed, and only tensors with a gradient change."""
    model, ids = make("softcap"), made_ids()
    returns, rewards = torch.randn(B, dtype=torch.float64), torch.rand(B, dtype=torch.float64)
    mask = torch.rand(B, T - 1) < 0.8
    given = {"reference": returns, "rewards": rewards, "mask": mask, "beta": 0.5}

    def loss_at(hidden, head):
        loss = linear_reval_loss(hidden[:, :-1], actions=ids[:, 1:], **given, **head._asdict())
        return loss._replace(residual=loss.residual.detach())

    loss, residual = at_head(model, loss_at, input_ids=ids)
    own = reval_loss(model(input_ids=ids).logits[:, :-1], ids[:, 1:], **given)
    assert not residual.requires_grad
    torch.testing.assert_close(residual, own.residual.detach())
    assert_same(model, [loss], [own.loss])
    assert at_head(model, lambda hidden, head: hidden.shape, input_ids=ids) == (B, T, 32)


def test_no_tensor_is_as_large_as_the_logits():
    if "cpu" not in BACKENDS:
        pytest.skip("the portable backend has logits of a chunk")
    words, length = 5000, 64
    model, ids, largest = make(dtype=torch.float32, vocab_size=words), made_ids(2, length), [0]

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **kwargs or {})
            largest[0] = max([largest[0], *(x.numel() for x in tree_leaves(out) if hasattr(x, "numel"))])
            return out

    with Sizes():
        token_values_of(model, ids, mask=torch.rand(2, length - 1) < 0.5).v.sum().backward()
    assert words * 32 <= largest[0] < words * length  # the head's gradient is the largest


# --- padding and packing ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plain", "positions learned"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(name, side):
    model, rows = make(name), [made_ids(1, n) for n in (5, 9, 2)]
    ids, real = torch.zeros(3, 9, dtype=torch.long), torch.zeros(3, 9, dtype=torch.long)
    for i, row in enumerate(rows):
        where = slice(9 - row.shape[1], 9) if side == "left" else slice(0, row.shape[1])
        ids[i, where], real[i, where] = row[0], 1
    values = token_values_of(model, ids, attention_mask=real, mask=torch.ones(3, 8, dtype=torch.bool))
    expected = [own_values(model, row) for row in rows]
    chosen = real[:, 1:].bool() & real[:, :-1].bool()
    for got, wanted in zip(values[:3], zip(*expected, strict=True), strict=False):
        torch.testing.assert_close(got[chosen], torch.cat([x[0] for x in wanted]), rtol=1e-9, atol=1e-9)
        assert (got[~chosen] == 0).all()
    given = token_values_of(model, ids, attention_mask=real, actions=torch.ones_like(ids))
    assert ((given.v != 0) == real.bool()).all()


def test_roberta_makes_its_own_positions():
    config = transformers.RobertaConfig(**SMALL | {"is_decoder": True, "pad_token_id": 1})
    model, ids = AutoModelForCausalLM.from_config(config).double().eval(), made_ids()
    ours = token_values_of(model, ids, attention_mask=torch.ones_like(ids))
    assert_same(model, ours, own_values(model, ids, attention_mask=torch.ones_like(ids)))


def test_packed_sequences_have_the_values_that_they_have_alone():
    model, rows = make("softcap"), [made_ids(1, n) for n in (5, 2, 9)]
    positions = torch.cat([torch.arange(row.shape[1]) for row in rows])[None]
    values = token_values_of(model, torch.cat(rows, 1), position_ids=positions)
    chosen = positions[0, 1:] > 0  # the first token of a sequence is no action
    for got, wanted in zip(values[:3], zip(*(own_values(model, row)[:3] for row in rows), strict=True), strict=True):
        torch.testing.assert_close(got[0, chosen], torch.cat([x[0] for x in wanted]), rtol=1e-9, atol=1e-9)
        assert (got[0, ~chosen] == 0).all()
    with pytest.raises(ValueError, match="cu_seq_lens_q needs position_ids"):
        token_values_of(model, torch.cat(rows, 1), cu_seq_lens_q=torch.tensor([0, 5, 7, 16]))


def test_packed_sequences_with_a_mask():
    """transformers ignores the packing if it gets a mask [B, T]."""
    model, ids = make("softcap"), made_ids(1, 9)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 0]])
    real = torch.tensor([[1, 1, 1, 1, 1, 1, 1, 0, 0]])
    values = token_values_of(model, ids, position_ids=positions, attention_mask=real)
    torch.testing.assert_close(values.v[:, 4:6], own_values(model, ids[:, 4:7]).v)
    assert (values.v[:, [3, 6, 7]] == 0).all()
    with pytest.raises(ValueError, match="attention_mask must pad on the right only, or not be given"):
        token_values_of(model, ids, position_ids=positions, attention_mask=real.flip(1))
    one = torch.tensor([[5, 5, 0, 1, 2, 3, 4, 5, 6]])  # one sequence behind padding of any positions
    ours = token_values_of(model, ids, position_ids=one, attention_mask=real.flip(1))
    torch.testing.assert_close(ours.v[:, 2:], own_values(model, ids[:, 2:]).v)


def test_positions_of_images_are_the_models_own():
    """In Qwen2-VL a token's position has three axes, which come from the images."""
    text = SMALL | {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}}
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "patch_size": 4}
    config = transformers.Qwen2VLConfig(text_config=text, vision_config=vision, image_token_id=9, video_token_id=8)
    torch.manual_seed(0)
    model = transformers.Qwen2VLForConditionalGeneration(config).double().eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    ids = torch.tensor([[3, 7, 9, 9, 9, 9, 4, 5, 6, 12]])
    images = {
        "pixel_values": torch.randn(16, 3 * 2 * 4 * 4, dtype=torch.float64),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
        "mm_token_type_ids": (ids == 9).int(),
    }
    real = torch.ones_like(ids)
    own = own_values(model, ids, attention_mask=real, **images)
    torch.testing.assert_close(token_values_of(model, ids, attention_mask=real, **images), own)
    positions = model.model.get_rope_index(
        ids, image_grid_thw=images["image_grid_thw"], mm_token_type_ids=images["mm_token_type_ids"]
    )[0]
    torch.testing.assert_close(token_values_of(model, ids, position_ids=positions, **images), own)


# --- what a model does to its logits ----------------------------------------------------------------------------------


def test_the_transform_is_measured_once():
    for name, first in [("plain", 1), ("softcap", 2)]:
        model, passes = make(name), []
        model.model.register_forward_hook(lambda *_, passes=passes: passes.append(1))
        for calls in (first, first + 1, first + 2):
            token_values_of(model, made_ids())
            assert len(passes) == calls
        token_values_of(copy.deepcopy(model), made_ids())  # another model is measured again


def test_another_head_or_configuration_is_measured_again():
    model, ids = make("softcap", tie_word_embeddings=False), made_ids()
    for softcap in (2.0, None, 5.0, 2.0):
        model.config.final_logit_softcapping = softcap
        assert_same(model, token_values_of(model, ids), own_values(model, ids))
        assert head_of(model).softcap == softcap
    model.lm_head = torch.nn.Sequential(model.lm_head)
    model.lm_head.weight = model.lm_head[0].weight
    model.lm_head.append(torch.nn.Tanh())
    with pytest.raises(ValueError, match=r"\(Sequential\) is no matrix"):
        token_values_of(model, ids)


def test_a_factor_of_each_token_is_refused():
    model, ids, seen = make(), made_ids(), []
    model.lm_head.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model.lm_head.register_forward_hook(lambda module, args, output: output * seen.pop()[..., :1].exp())
    one = token_values_of(model, ids[:1, :1], actions=ids[:1, :1])  # what is right for one token is not kept
    torch.testing.assert_close(one, own_values(model, ids[:1, :1], actions=ids[:1, :1]))
    for call in (head_of, lambda model: token_values_of(model, ids)):
        with pytest.raises(ValueError, match="more to its logits than a scale"):
            call(model)


def test_the_first_graph_is_freed_before_the_model_runs_again():
    class Marked(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.marker = torch.nn.Identity()
            markers.append(weakref.ref(ctx.marker))
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient

    def function(hidden, head):
        assert all(marker() is None for marker in markers)
        return Marked.apply(hidden)

    markers: list = []
    at_head(make("softcap"), function, input_ids=made_ids())
    assert len(markers) == 2


@pytest.mark.parametrize(
    ("does", "softcap", "temperature"),
    [
        (lambda x: x * 1.1, None, 1 / 1.1),
        (lambda x: x / 3, None, 3.0),
        (lambda x: (50 * torch.tanh(0.25 * x / 50)).float(), 200.0, 4.0),
        (lambda x: 3.7 * torch.tanh(x / 7.4), 7.4, 2.0),
    ],
)
def test_scales_and_softcaps_of_any_name_are_measured(does, softcap, temperature):
    model = make()
    model.lm_head.register_forward_hook(lambda module, inputs, output: does(output))
    head = head_of(model)
    assert (head.softcap, head.temperature) == (softcap, temperature)
    assert_same(model, token_values_of(model, made_ids()), own_values(model, made_ids()), 1e-5)


def test_right_numbers_stay_as_they_are():
    """2**-0.5 is no short decimal number; 0.70711 is near it."""
    for scale in (2**-0.5, 0.123456, 1 / 13):
        model = make()
        model.lm_head.register_forward_hook(lambda module, inputs, output, scale=scale: output.float() * scale)
        assert abs(head_of(model).temperature * scale - 1) < 1.3e-7


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("does", [lambda x: x, lambda x: x * 1.03, lambda x: x + 1])
def test_logits_too_coarse_to_measure_are_refused(dtype, does):
    model = make()
    hook = model.lm_head.register_forward_hook(lambda module, inputs, output: does(output).to(dtype))
    with pytest.raises(ValueError, match=rf"come out as {dtype}, too coarse.*head_of\(model\) once before"):
        token_values_of(model, made_ids())
    hook.remove()  # a wrapper rounds: measured without it, the values are not rounded
    head_of(model)
    own = own_values(model, made_ids())
    model.lm_head.register_forward_hook(lambda module, inputs, output: output.to(dtype))
    torch.testing.assert_close(token_values_of(model, made_ids()), own)


def test_dropped_words():
    model, ids = make(), made_ids() % 40
    model.lm_head.register_forward_hook(lambda module, inputs, output: output[..., :40])
    assert_same(model, token_values_of(model, ids), own_values(model, ids))
    assert head_of(model).weight.shape == (40, 32)


@pytest.mark.parametrize(
    "does",
    [
        lambda x: x + 1e-3,
        lambda x: x.clamp(-100, 100),
        lambda x: x.log_softmax(-1),
        lambda x: x.flip(-1),
        lambda x: torch.cat([x[..., :7], x[..., 8:]], -1),
        lambda x: x.masked_fill(torch.arange(x.shape[-1]) == 9, -torch.inf),
        lambda x: x[0],
        lambda x: x.expand(2, -1, -1),
        lambda x: x * 0,
        lambda x: -x,
    ],
)
def test_anything_else_is_refused(does):
    model = make()
    model.lm_head.register_forward_hook(lambda module, inputs, output: does(output))
    for _ in range(2):  # what was refused is refused again
        with pytest.raises(ValueError, match="LlamaForCausalLM does more to its logits than a scale, a softcap"):
            token_values_of(model, made_ids())


def embeds(model, number, rows=slice(None)):
    """Embeddings of made_ids with `number` in the rows, so the states there are 0 or not finite."""
    embedded = model.model.embed_tokens(made_ids()).detach()
    embedded[rows] = number
    return embedded


def test_a_head_that_is_no_matrix_is_refused():
    class NormHead(torch.nn.Linear):
        def forward(self, x):
            return torch.nn.functional.linear(x, torch.nn.functional.normalize(self.weight))

    model = make()
    model.lm_head = NormHead(32, V, bias=False).double()
    with pytest.raises(ValueError, match=r"the head of LlamaForCausalLM \(NormHead\) is no matrix"):
        token_values_of(model, made_ids())
    for nothing in (0.0, torch.nan):  # a first state that tells nothing, as at padding on the left
        with pytest.raises(ValueError, match="is no matrix"):
            at_head(model, lambda hidden, head: (), inputs_embeds=embeds(model, nothing, rows=slice(1)))
        at_head(model, lambda hidden, head: (), inputs_embeds=embeds(model, nothing))
        with pytest.raises(ValueError, match="is no matrix"):
            token_values_of(model, made_ids())
    model.lm_head.forward = lambda x: torch.nn.functional.linear(x, model.lm_head.weight)  # as accelerate does
    assert_same(model, token_values_of(model, made_ids()), own_values(model, made_ids()))


# --- arguments and models that are refused ----------------------------------------------------------------------------


def test_wrong_arguments():
    model, ids = make(), made_ids()
    for match, options in [
        (r"input_ids must have shape \[B, T\]", {"input_ids": ids[0]}),
        ("input_ids must have at least 2 tokens a row", {"input_ids": ids[:, :1]}),
        (r"actions must have shape \[3, 7\], got \[3, 6\]", {"actions": ids[:, 1:]}),
        (r"mask must have shape \[3, 6\], got \[3, 7\]", {"mask": ids > 0}),
        (r"mask must have shape \[3, 7\], got \[3, 6\]", {"mask": ids[:, 1:] > 0, "actions": ids}),
        (r"temperature must have shape \[3, 6\]", {"temperature": torch.ones(3, 7)}),
        (r"attention_mask must have shape \[3, 7\], got \[3, 6\]", {"attention_mask": ids[:, 1:]}),
        (r"position_ids must have shape \[3, 7\] or \[1, 7\], as.*got \[1, 6\]", {"position_ids": ids[:1, 1:]}),
        (r"position_ids must have shape .*got \[2, 7\]", {"position_ids": ids[:2]}),
        (r"position_ids must have shape .*got \[3, 3, 7\]", {"position_ids": ids.expand(3, 3, 7)}),
        ("labels must not be given", {"labels": ids}),
        ("logits_to_keep must not be given", {"logits_to_keep": 1}),
        (r"actions must lie in \[0, 51\)", {"actions": ids + V}),
    ]:
        with pytest.raises(ValueError, match=match):
            token_values_of(model, **{"input_ids": ids} | options)
    with pytest.raises(TypeError, match="mask must be bool"):
        token_values_of(model, ids, mask=torch.ones(B, T - 1))
    with pytest.raises(TypeError, match="attention_mask must be bool or int64"):
        token_values_of(model, ids, attention_mask=ids.to(torch.complex64))
    assert_same(model, token_values_of(model, ids), own_values(model, ids))  # nothing is left behind


def test_what_is_no_causal_language_model_is_refused():
    with pytest.raises(TypeError, match="must be a causal language model of transformers.*; got Linear"):
        token_values_of(torch.nn.Linear(2, 2), made_ids())
    small = {"vocab_size": V, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "pad_token_id": 0}
    both = transformers.BartForConditionalGeneration(
        transformers.BartConfig(**small, encoder_attention_heads=2, decoder_attention_heads=2)
    )
    with pytest.raises(TypeError, match="must have a decoder alone; BartForConditionalGeneration has an encoder too"):
        token_values_of(both, made_ids())
    with pytest.raises(ValueError, match=r"LlamaModel has no head with one weight \(get_output_embeddings\(\) is None"):
        token_values_of(make().model, made_ids())


def test_heads_that_have_no_whole_weight_are_refused():
    class FullyShardedDataParallel(torch.nn.Module):  # FSDP1 needs a GPU
        def __init__(self, module):
            super().__init__()
            self.module = module

        def __getattr__(self, name):
            return super().__getattr__(name) if name == "module" else getattr(super().__getattr__("module"), name)

    with pytest.raises(TypeError, match=r"must not be inside FullyShardedDataParallel \(FSDP1\).*fully_shard\(model\)"):
        token_values_of(FullyShardedDataParallel(make()), made_ids())
    model = make(tie_word_embeddings=False)
    for dtype, name in [(torch.uint8, "uint8"), (torch.float8_e4m3fn, "float8_e4m3fn")]:
        model.lm_head.weight = torch.nn.Parameter(torch.zeros(V, 32).to(dtype), requires_grad=False)
        with pytest.raises(ValueError, match=rf"weight of LlamaForCausalLM must be float32, .*; got {name} \(Linear\)"):
            head_of(model)
    model.lm_head.weight = torch.nn.Parameter(torch.zeros(0))
    model.lm_head.weight.ds_id = 3  # as DeepSpeed marks it
    with pytest.raises(ValueError, match="partitioned by DeepSpeed ZeRO-3.*fully_shard"):
        head_of(model)


@pytest.mark.parametrize("held", [lambda x: {"x": x}, lambda x: [x], lambda x: (x, (x,))])
def test_a_function_must_return_what_the_gradients_pass_through(held):
    with pytest.raises(TypeError, match="must return a tensor, or a tuple .*; got (dict|list|tuple in a tuple)$"):
        at_head(make(), lambda hidden, head: held(hidden), input_ids=made_ids())


def test_a_head_that_is_not_called_once_is_refused():
    model, ids = make(), made_ids()
    model.forward = lambda input_ids, **_: [model.lm_head(model.model(input_ids).last_hidden_state) for _ in range(2)]
    with pytest.raises(ValueError, match="LlamaForCausalLM called its head 2 times"):
        at_head(model, lambda hidden, head: (), input_ids=ids)
    model.forward = lambda input_ids, **_: (model.model(input_ids).last_hidden_state,)
    with pytest.raises(ValueError, match="LlamaForCausalLM called its head 0 times"):
        token_values_of(model, ids)


def test_states_of_another_shape_are_refused():
    peft = pytest.importorskip("peft")
    prompt = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(make(dtype=torch.float32), prompt)
    with pytest.raises(ValueError, match=r"states of shape \[3, 10, 32\] for input_ids of shape \[3, 7\]"):
        token_values_of(model, made_ids())


# --- the model comes back as it was -----------------------------------------------------------------------------------


def test_the_forward_of_the_head_always_comes_back():
    model, ids, freed = make(), made_ids(), []

    def fail(hidden, head):
        raise RuntimeError("ours")

    with pytest.raises(RuntimeError, match="ours"):
        at_head(model, fail, input_ids=ids)
    assert "forward" not in vars(model.lm_head) and not model_head._replacements
    model.model.unshard = model.model.reshard = lambda: freed.append(1)  # as FSDP2 has them
    with torch.no_grad(), pytest.raises(RuntimeError, match="ours"):
        at_head(model, fail, input_ids=ids)
    assert freed == [1]
    own = model.lm_head.forward = lambda x: torch.nn.functional.linear(x, model.lm_head.weight)
    token_values_of(model, ids)
    assert model.lm_head.forward is own


def test_threads_do_not_meet():
    """While one thread is at the head, another calls the model for its logits, and a third for values."""
    model, ids = make("softcap"), made_ids()
    logits, values, seen = model(input_ids=ids).logits, token_values_of(model, ids), {}

    def run():
        seen["logits"] = model(input_ids=ids).logits
        seen["values"] = token_values_of(model, ids)

    def wait(hidden, head):
        other = threading.Thread(target=run)
        other.start()
        other.join()
        return ()

    at_head(model, wait, input_ids=ids)
    torch.testing.assert_close(seen["logits"], logits, rtol=0, atol=0)
    torch.testing.assert_close(seen["values"], values, rtol=0, atol=0)
    assert "forward" not in vars(model.lm_head) and not model_head._replacements


# --- wrappers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["torch.compile", "model.compile"])
def test_a_compiled_model_is_compiled_once(how):
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    plain, ids, graphs = make("plain", num_hidden_layers=1), made_ids(), []
    model = inner = copy.deepcopy(plain)
    if how == "torch.compile":
        model = torch.compile(model, backend="eager")
    else:
        model.compile(backend="eager")
    for seed in range(3):
        ids = (ids + seed) % V
        ours, own = token_values_of(model, ids), own_values(plain, ids)
        torch.testing.assert_close(ours, own)
        by = upstream(own)
        torch.testing.assert_close(gradients(inner, ours, by), gradients(plain, own, by))
        graphs.append(counters["stats"]["unique_graphs"])
    assert 0 < graphs[0] == graphs[-1] and not model_head._replacements
    if how == "model.compile":  # the model computes logits, before and after
        torch.testing.assert_close(model(input_ids=ids).logits, plain(input_ids=ids).logits)
        torch.testing.assert_close(token_values_of(model, ids), own_values(plain, ids))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    model, ids = make("softcap"), made_ids()
    own = own_values(model, ids)
    model.train().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    assert_same(model, token_values_of(model, ids), own)


def test_autocast_ends_at_the_head():
    model, ids = make("softcap", torch.float32), made_ids()
    with torch.autocast("cpu", torch.bfloat16):
        values = token_values_of(model, ids)
        hidden, product = at_head(model, lambda hidden, head: (hidden, hidden.float() @ head.weight.T), input_ids=ids)
        assert product.dtype == torch.float32  # under autocast a matmul of float32 is bfloat16
    head = head_of(model)
    logits = head.softcap * torch.tanh(hidden.float() @ head.weight.T / head.softcap)
    torch.testing.assert_close(values, reference.token_values(logits[:, :-1], ids[:, 1:]), rtol=1e-5, atol=1e-5)
    assert values.v.dtype == torch.float32


def adapted(**settings):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(make("softcap"), peft.LoraConfig(task_type="CAUSAL_LM", **settings)).double()
    for weight in model.parameters():
        if weight.requires_grad:
            torch.nn.init.normal_(weight, std=0.3)
    return model


@pytest.mark.parametrize("copies", [None, ["lm_head"]])
def test_adapters_below_the_head_and_a_trained_copy_of_it(copies):
    model, ids = adapted(target_modules=["q_proj", "down_proj"], modules_to_save=copies), made_ids()
    assert_same(model, token_values_of(model, ids), own_values(model, ids))
    with model.disable_adapter():
        torch.testing.assert_close(token_values_of(model, ids), own_values(model, ids))


@pytest.mark.parametrize("settings", [{"target_modules": ["lm_head"]}, {"target_parameters": ["lm_head.weight"]}])
def test_an_adapted_head_is_refused_by_name(settings):
    model = adapted(**settings)
    with pytest.raises(ValueError, match="the head of Gemma2ForCausalLM is adapted.*modules_to_save"):
        token_values_of(model, made_ids())
