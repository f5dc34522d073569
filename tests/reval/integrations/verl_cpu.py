"""A CPU as a platform of verl, by verl's own registry of platforms. With it the real FSDP engine trains here.

Import it before verl's engines: verl looks up its platform once.
"""

import os
from contextlib import contextmanager
from types import SimpleNamespace

import torch
from verl.plugin.platform.platform_base import PlatformBase
from verl.plugin.platform.platform_manager import PlatformRegistry

os.environ["VERL_PLATFORM"] = "cpu"


@PlatformRegistry.register(platform="cpu")
class PlatformCPU(PlatformBase):
    device_name = "cpu"
    vendor_name = "cpu"
    device_module = SimpleNamespace(
        empty_cache=lambda: None,
        synchronize=lambda *_: None,
        max_memory_allocated=lambda: 0,
        max_memory_reserved=lambda: 0,
        memory_allocated=lambda: 0,
        memory_reserved=lambda: 0,
        mem_get_info=lambda: (0, 0),
        current_device=lambda: torch.device("cpu"),
        get_device_name=lambda *_: "CPU",
        get_rng_state=torch.get_rng_state,
        set_rng_state=torch.set_rng_state,
        ipc_collect=lambda: None,
        set_device=lambda *_: None,
        device_count=lambda: 1,
        is_available=lambda: True,
    )

    def is_available(self):
        return True

    def current_device(self):
        return torch.device("cpu")  # verl moves tensors .to() this

    def device_count(self):
        return 1

    def set_device(self, device_index):
        pass

    def synchronize(self, device_index=None):
        pass

    def manual_seed(self, seed):
        torch.manual_seed(seed)

    manual_seed_all = manual_seed

    def set_allocator_settings(self, settings):
        pass

    def empty_cache(self):
        pass

    def get_device_capability(self, device_index=0):
        return None, None

    def communication_backend_name(self):
        return "gloo"

    def visible_devices_envvar(self):
        return "CUDA_VISIBLE_DEVICES"

    @contextmanager
    def nvtx_range(self, msg):
        yield

    def profiler_start(self):
        pass

    def profiler_stop(self):
        pass

    def ray_resource_name(self):
        return "GPU"  # Ray counts these; ray.init(num_gpus=...) says how many

    def ray_noset_envvars(self):
        return []

    def is_ipc_supported(self):
        return False

    def cudart(self):
        raise RuntimeError("a CPU has no cudart")


def save_tiny_model(folder: str, vocabulary: int) -> None:
    """A random model of the shape of Qwen2 with 20 thousand weights, and a tokenizer with a word for each number."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    shape = dict(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1
    )
    torch.manual_seed(0)
    Qwen2ForCausalLM(Qwen2Config(vocab_size=vocabulary, tie_word_embeddings=False, **shape)).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({str(i): i for i in range(vocabulary)}, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="1", pad_token="2", unk_token="0").save_pretrained(folder)
