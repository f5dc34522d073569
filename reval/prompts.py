"""Prompts: from the text or the chat messages of a row to the token ids that the model gets."""

from __future__ import annotations

import datetime
from typing import Any

from transformers import PreTrainedTokenizerBase

from .config import DataConfig

Prompt = str | list[dict[str, Any]]
"""Text, or chat messages: {"role": ..., "content": ...} and further keys that the chat template may read."""

ROLES = ("system", "developer", "user", "assistant", "tool")
# Chat templates that print the date get this one, the date in Llama's templates. With the date of today, a run that is
# resumed tomorrow would train on other prompts.
ANSWER = "reval-answer-of-the-model"  # stands for an answer in a conversation that is formatted for what follows it
DATE = datetime.datetime(2024, 7, 26)


def make_prompt(given: str | list[Any], config: DataConfig, chat: bool) -> Prompt:
    """The prompt of a row, in data.template and with data.system_prompt.

    Args:
        given: a text, or chat messages. data.template is applied to the last user message.
        chat: the model has a chat template. Without one, a text stays text.

    Raises ValueError for messages of another shape, and for settings that cannot be applied to the messages.
    """
    if isinstance(given, str):
        if not given.strip():
            raise ValueError("`prompt` must not be empty")
        text = config.template.replace("{question}", given)
        if not chat:
            return text if config.system_prompt is None else f"{config.system_prompt}\n\n{text}"
        messages = [{"role": "user", "content": text}]
    else:
        messages = [_message(number, message) for number, message in enumerate(given, 1)]
        users = [message for message in messages if message["role"] == "user"]
        if not users and config.template != "{question}":
            raise ValueError("`prompt` has no user message, which data.template is for")
        for message in users[-1:]:
            message["content"] = config.template.replace("{question}", message["content"])
    if config.system_prompt is None:
        return messages
    if any(message["role"] in ("system", "developer") for message in messages):
        raise ValueError("`prompt` has a system message of its own; data.system_prompt must be null")
    return [{"role": "system", "content": config.system_prompt}, *messages]


def _message(number: int, message: Any) -> dict[str, Any]:
    """A copy of a chat message without keys that are null. Raises ValueError for another shape."""
    form = '{"role": ..., "content": ...}'
    if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
        got = f"the keys {', '.join(map(str, message))}" if isinstance(message, dict) else repr(message)[:80]
        raise ValueError(f"`prompt`, message {number}: must be {form}; got {got}")
    role, content = message["role"], message["content"]
    if role not in ROLES:
        raise ValueError(f"`prompt`, message {number}: `role` must be one of {', '.join(ROLES)}; got {role!r}")
    if not isinstance(content, str):
        raise ValueError(f"`prompt`, message {number}: `content` must be text; got {content!r:.80}")
    if not content.strip() and role != "system":  # an empty system message replaces the default of a chat template
        raise ValueError(f"`prompt`, message {number}: `content` must not be empty")
    return {key: value for key, value in message.items() if value is not None}


def encode(
    prompt: Prompt, tokenizer: PreTrainedTokenizerBase, template_kwargs: dict[str, Any] | None = None
) -> list[int]:
    """The token ids of a prompt. Messages are formatted with the chat template; text is encoded as it is.

    The model continues the last message if it is the assistant's. Otherwise the prompt ends where the assistant's
    message begins.

    Args:
        template_kwargs: variables of the chat template (data.chat_template_kwargs).

    Raises ValueError for a prompt that the chat template refuses or that cannot be encoded.
    """
    if isinstance(prompt, str):
        return _without_end(_encodable(prompt), tokenizer)
    if tokenizer.chat_template is None:
        raise ValueError(
            "the tokenizer has no chat template, so it cannot encode chat messages; give prompts as text (a JSONL file "
            "whose `prompt` is a string), or set tokenizer.chat_template"
        )
    text = _encodable(_rendered(prompt, tokenizer, template_kwargs or {}))
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def encode_turn(
    messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, template_kwargs: dict[str, Any] | None = None
) -> list[int]:
    """The token ids between the text of one answer of the model and the text of its next answer.

    They end the model's message, hold `messages`, and begin the model's next message. The conversation before is not
    encoded again: its tokens stay those that the model has read and sampled.

    Example: for one message "no" of the user, with the chat template of SmolLM2: the tokens of
    "<|im_end|>\\n<|im_start|>user\\nno<|im_end|>\\n<|im_start|>assistant\\n".

    Raises ValueError for messages that the chat template refuses or that cannot be encoded.
    """
    before = [{"role": "user", "content": "?"}, {"role": "assistant", "content": ANSWER}]
    text = _rendered([*before, *messages], tokenizer, template_kwargs or {})
    head, answer, rest = text.partition(ANSWER)
    if not answer:
        raise ValueError("the model's chat template leaves out the assistant's messages")
    return tokenizer(_encodable(rest), add_special_tokens=False)["input_ids"]


def _rendered(messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, variables: dict[str, Any]) -> str:
    if "strftime_now" in str(tokenizer.chat_template):
        variables = variables | {"strftime_now": DATE.strftime}
    prefilled = messages[-1]["role"] == "assistant"
    try:
        text = str(
            tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=not prefilled,
                continue_final_message=prefilled,
                **variables,
            )
        )
    except Exception as error:  # a template is a program: it may raise anything
        roles = ", ".join(message["role"] for message in messages)
        raise ValueError(
            f"the model's chat template refuses the messages ({roles}): {type(error).__name__}: {error}"
        ) from None
    for number, message in enumerate(messages, 1):
        # Templates change the assistant's messages (they drop thoughts) and tool messages (they write JSON).
        if message["role"] not in ("assistant", "tool") and message["content"].strip() not in text:
            raise ValueError(f"the model's chat template leaves out message {number} ({message['role']})")
    return text


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the prompt is not Unicode text: {error}") from None
    return text


def _without_end(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token ids with the special tokens that the tokenizer puts in front, and without those that it appends: an
    end-of-sequence token there would tell the model that everything is said."""
    whole, bare = tokenizer(text)["input_ids"], tokenizer(text, add_special_tokens=False)["input_ids"]
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return whole[: start + len(bare)]
    return whole
