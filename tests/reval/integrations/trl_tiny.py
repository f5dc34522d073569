"""A random model, a tokenizer of single letters, a data set and a reward for tests of trainers: nothing is loaded."""

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

WORDS = ["<pad>", "<eos>", "<unk>", *"abcdefgh"]


def tokenizer():
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


def model(seed=0, **kwargs):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64}
    special = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    return Qwen2ForCausalLM(Qwen2Config(vocab_size=len(WORDS), **(sizes | heads | special | kwargs)))


def prompts():
    """Prompts of different lengths, so that batches have padding on the left."""
    return Dataset.from_dict(
        {"prompt": ["a b", "a", "b a b", "d", "e f", "f g h a", "g", "h a"], "answer": list("cccccccc")}
    )


def share_of_c(completions, answer, **_):
    """A reward function of TRL: the share of the answer's letter in the completion."""
    return [text.split().count(a) / max(len(text.split()), 1) for text, a in zip(completions, answer, strict=True)]
