"""Prompts. A row is put to the model exactly as it is and as the settings say, or it is refused with the reason."""

from __future__ import annotations

import pytest
from tokenizers.processors import TemplateProcessing

from reval.config import DataConfig, ModelConfig
from reval.model.loading import load_model
from reval.prompts import encode, encode_turn, make_prompt


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str | None) -> dict:
    return {"role": "assistant", "content": text}


SYSTEM = {"role": "system", "content": "S"}


@pytest.mark.parametrize(
    ("given", "settings", "expected"),
    [
        ("2+2", {}, [user("2+2")]),
        ("2+2", {"system_prompt": "S", "template": "Q: {question}"}, [SYSTEM, user("Q: 2+2")]),
        ([SYSTEM, user("2+2")], {"template": "Q: {question}"}, [SYSTEM, user("Q: 2+2")]),
        ([user("2+2")], {"system_prompt": "S"}, [SYSTEM, user("2+2")]),
        ([{"role": "system", "content": ""}, user("2+2")], {}, [{"role": "system", "content": ""}, user("2+2")]),
        (
            [user("1+1"), {"role": "assistant", "content": "2"}, user("2+2"), {"role": "assistant", "content": "It"}],
            {"template": "Q: {question}"},
            [
                user("1+1"),
                {"role": "assistant", "content": "2"},
                user("Q: 2+2"),
                {"role": "assistant", "content": "It"},
            ],
        ),
        # a parquet file has null for the keys that only other messages have
        ([user("2+2") | {"name": None, "thought": "t"}], {}, [user("2+2") | {"thought": "t"}]),
    ],
)
def test_a_row_becomes_this_prompt(given, settings, expected):
    assert make_prompt(given, DataConfig(**settings), chat=True) == expected


def test_a_model_without_a_chat_template_gets_text():
    assert make_prompt("2+2", DataConfig(system_prompt="S", template="Q: {question}"), chat=False) == "S\n\nQ: 2+2"


@pytest.mark.parametrize(
    ("given", "settings", "message"),
    [
        ([{"from": "human", "value": "2+2"}], {}, "message 1: must be .* got the keys from, value"),
        (["2+2"], {}, "message 1: must be .* got '2\\+2'"),
        ([user("a"), assistant(None)], {}, "message 2: `content` must be text; got None"),
        ([{"role": "user", "content": [{"type": "text", "text": "a"}]}], {}, r"`content` must be text; got \[\{'type'"),
        ([{"role": "human", "content": "a"}], {}, "`role` must be one of system, .*; got 'human'"),
        ([user("  ")], {}, "message 1: `content` must not be empty"),
        (" \n", {}, "`prompt` must not be empty"),
        ([SYSTEM, user("a")], {"system_prompt": "T"}, "a system message of its own; data.system_prompt must be null"),
        ([SYSTEM], {"template": "Q: {question}"}, "no user message, which data.template is for"),
    ],
)
def test_messages_of_another_shape_are_refused(given, settings, message):
    with pytest.raises(ValueError, match=message):
        make_prompt(given, DataConfig(**settings), chat=True)


def test_messages_are_formatted_by_the_chat_template_and_text_is_not(tiny):
    _, tokenizer = tiny
    assert tokenizer.decode(encode([user("1+1")], tokenizer)) == "<|user|>1+1<|end|><|assistant|>"
    tokenizer.chat_template = None
    assert tokenizer.decode(encode("1+1", tokenizer)) == "1+1"
    with pytest.raises(ValueError, match="no chat template"):
        encode([user("1+1")], tokenizer)


def test_the_model_continues_an_assistant_message(tiny):
    _, tokenizer = tiny
    ids = encode([user("1+1"), assistant("It is ")], tokenizer)
    assert tokenizer.decode(ids) == "<|user|>1+1<|end|><|assistant|>It is "


def test_a_token_that_the_tokenizer_appends_does_not_end_the_prompt(tiny):
    _, tokenizer = tiny
    tokenizer.chat_template = None
    ends = ("<|end|>", tokenizer.eos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<|end|> $A <|end|>", special_tokens=[ends])
    assert tokenizer.decode(tokenizer("1+1")["input_ids"]) == "<|end|>1+1<|end|>"
    assert tokenizer.decode(encode("1+1", tokenizer)) == "<|end|>1+1"
    assert tokenizer.decode(encode("1+1<|end|>", tokenizer)) == "<|end|>1+1<|end|>"


def test_variables_reach_the_chat_template(tiny):
    _, tokenizer = tiny
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}{% if not think %}/no{% endif %}"
    assert tokenizer.decode(encode([user("1")], tokenizer)) == "1/no"
    assert tokenizer.decode(encode([user("1")], tokenizer, {"think": True})) == "1"


def test_a_chat_template_prints_the_same_date_every_day(tiny):
    _, tokenizer = tiny
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}: {{ messages[0].content }}"
    assert tokenizer.decode(encode([user("1")], tokenizer)) == "26 Jul 2024: 1"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('System role not supported') }}", r"refuses the messages \(system, user\): .*System role"),
        ("{% for m in messages %}{{ m.content }", "refuses the messages .*TemplateSyntaxError"),
        ("{{ messages[0].content + none }}", "refuses the messages .*TypeError"),
        ("{{ messages[1].content }}", r"leaves out message 1 \(system\)"),
    ],
)
def test_a_chat_template_that_does_not_fit_is_refused(tiny, template, message):
    _, tokenizer = tiny
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=message):
        encode([SYSTEM, user("1+1")], tokenizer)


@pytest.mark.parametrize("prompt", ["1\ud800", [user("1\ud800")]])
def test_half_a_character_is_refused(tiny, prompt):
    with pytest.raises(ValueError, match="not Unicode text"):
        encode(prompt, tiny[1])


@pytest.mark.parametrize("answer", ["7", "", "I think <calc>1</calc>"])
@pytest.mark.parametrize("name", ["tiny", "smollm2-135m-instruct"])
def test_the_tokens_of_a_turn_continue_the_conversation(name, answer):
    """A prompt, an answer with its end token, and the tokens of the next turn are the tokens of the conversation."""
    _, tokenizer = load_model(ModelConfig(name=name))
    begun = [user("2+2"), {"role": "assistant", "content": answer}, user("no"), user("again")]
    turn = encode_turn(begun[2:], tokenizer)
    assert turn[0] == tokenizer.eos_token_id  # ends the model's message
    own = tokenizer(answer, add_special_tokens=False)["input_ids"]
    assert encode(begun[:1], tokenizer) + own + turn == encode(begun, tokenizer)


def test_a_turn_that_the_chat_template_refuses(tiny):
    tokenizer = tiny[1]
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}{{ raise_exception('no') }}"
    with pytest.raises(ValueError, match="refuses the messages"):
        encode_turn([user("no")], tokenizer)
    tokenizer.chat_template = "{{ messages[-1].content }}"
    with pytest.raises(ValueError, match="leaves out"):
        encode_turn([user("no")], tokenizer)
