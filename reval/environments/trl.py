"""Environments written for TRL's GRPOTrainer(environment_factory=...): the model calls methods as tools."""

import asyncio
import inspect
import json
from collections.abc import Callable
from typing import Any

from reval.environments.protocol import EnvironmentFault, Message
from reval.user_code import find

# The words of Qwen's chat templates: models that were trained for this format know them.
_TOOLS = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{schemas}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""
# The format of these calls, for the parser of transformers, which TRL uses too.
_CALLS = {
    "start_anchor": "<|im_start|>assistant\n",
    "defaults": {"role": "assistant"},
    "fields": {
        "reasoning_content": {"open": "<think>", "close_pattern": r"</think>\s*", "content": "text"},
        "tool_calls": {
            "open": "<tool_call>",
            "close_pattern": r"</tool_call>\s*",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"content": "text"},
    },
}


class Trl:
    """An environment of TRL: `reset(**row)`, and public methods that the model calls as tools.

    A completion with calls is answered with their results, one message of the role tool for each. An exception of a
    tool becomes its result. A completion without calls, or with one that is no JSON, ends the trajectory. The reward is
    that of the environment's `get_reward()` and of `reward` together; a step gives what it has changed.

    Args:
        factory: "file.py:Class" or "module:Class"; it is called without arguments.
        reward: "file.py:function" or "module:function": a reward function of TRL.
        describe_tools: put the tools into the system message. false: data.chat_template_kwargs.tools holds them.
        response_template: how to read calls, as `tokenizer.response_template` of transformers. Default: JSON between
            <tool_call> and </tool_call>.

    Raises EnvironmentFault if `factory` is no environment of TRL, a tool has no type hints or description, or nothing
    gives a reward.
    """

    def __init__(
        self,
        factory: str,
        reward: str | None = None,
        describe_tools: bool = True,
        response_template: dict[str, Any] | None = None,
    ):
        self._environment: Any = find(factory, "TRL environment", [], EnvironmentFault)()
        methods = {name for name, _ in inspect.getmembers(type(self._environment), inspect.isfunction)}
        if "reset" not in methods:
            raise EnvironmentFault(f"environment.options.factory={factory!r} must have a method reset; it has none")
        own = [self._environment.get_reward] if "get_reward" in methods else []
        self._rewards: list[Callable[[], Any]] = own
        if reward is not None:
            self._function = find(reward, "reward function", [], EnvironmentFault)
            self._rewards = [*own, self._call_function]
        if not self._rewards:
            raise EnvironmentFault(
                f"environment.options.factory={factory!r} has no method get_reward, so environment.options.reward must "
                "name a reward function"
            )
        names = sorted(name for name in methods - {"reset", "get_reward"} if not name.startswith("_"))
        self._tools = {name: getattr(self._environment, name) for name in names}
        self._schemas: list[Any] = [_schema(tool) for tool in self._tools.values()]
        self._describe_tools, self._format = describe_tools, response_template or _CALLS
        self._runner = asyncio.Runner()
        self._score = 0.0

    def reset(self, problem: dict[str, Any]) -> list[Message]:
        """The prompt of the row. A text that the environment's reset returns is appended to the last message."""
        prompt = problem["prompt"]
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(m) for m in prompt]
        self._row = problem | {"prompt": messages}
        told = self._environment.reset(**self._row)
        if told is not None and not isinstance(told, str):
            raise EnvironmentFault(f"reset of a TRL environment must return text or None, but returned {told!r:.200}")
        self._prompt = [*messages[:-1], messages[-1] | {"content": messages[-1]["content"] + (told or "")}]
        self._said: list[Message] = []
        self._score = 0.0
        if not self._describe_tools or not self._schemas:
            return self._prompt
        schemas = "\n".join(json.dumps(schema, ensure_ascii=False) for schema in self._schemas)
        tools = _TOOLS.format(schemas=schemas)
        if self._prompt[0]["role"] != "system":
            return [{"role": "system", "content": tools}, *self._prompt]
        first = self._prompt[0]
        return [first | {"content": f"{first['content']}\n\n{tools}"}, *self._prompt[1:]]

    def step(self, completion: str) -> tuple[list[Message], float, bool]:
        """See Environment.step."""
        message = self._parse(completion)
        answers = [self._answer(call) for call in message.get("tool_calls", [])]
        self._said += [message, *answers]
        # Every step is scored, because a limit of turns or tokens may end the trajectory after any of them.
        scores = [self._wait(reward()) for reward in self._rewards]
        score = float(sum(score for score in scores if score is not None))  # TRL leaves out None too
        gained, self._score = score - self._score, score
        return answers, gained, not answers

    def close(self) -> None:
        """Close the event loop."""
        self._runner.close()

    def _parse(self, completion: str) -> Message:
        """The assistant's message; with the key `tool_calls` if there are calls."""
        from transformers.utils.chat_parsing import parse_response

        try:
            message = parse_response(completion, self._format, prefix="", tools=self._schemas)
            for call in message.get("tool_calls", []):
                if not isinstance(call["function"]["name"], str):
                    raise TypeError("the name of a tool must be text")
                call["function"]["arguments"] = call["function"].get("arguments") or {}
        except (ValueError, TypeError, KeyError):
            return {"role": "assistant", "content": completion}
        return message | {"content": message.get("content", "")}

    def _answer(self, call: dict[str, Any]) -> Message:
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        try:
            if name not in self._tools:
                raise ValueError(f"Tool {name} not found.")
            result = self._wait(self._tools[name](**arguments))
        except Exception as error:  # the model may give any arguments
            result = {"error": str(error)}
        return {"role": "tool", "name": name, "content": str(result)}

    def _call_function(self) -> Any:
        """The score of the reward function, which scores a batch of one."""
        columns = {key: [value] for key, value in self._row.items() if key != "prompt"}
        own = {"prompts": [self._prompt], "completions": [self._said], "environments": [self._environment]}
        ignored = {"log_extra": _ignore, "log_metric": _ignore}

        async def first() -> Any:
            scores = self._function(**columns | own | ignored)
            return (await scores if inspect.isawaitable(scores) else scores)[0]

        return first()

    def _wait(self, result: Any) -> Any:
        """The result of a method, which may be asynchronous."""
        return self._runner.run(result) if inspect.iscoroutine(result) else result


def _schema(tool: Callable[..., Any]) -> dict[str, Any]:
    """The JSON schema of a tool, from its type hints and its docstring."""
    from transformers.utils import get_json_schema

    try:
        return get_json_schema(tool)
    except Exception as error:  # transformers has several exceptions of its own
        name = getattr(tool, "__name__", "?")
        raise EnvironmentFault(
            f"the tool {name!r} needs type hints and a Google-style docstring that describes every argument: {error}"
        ) from error


def _ignore(*_: Any) -> None:
    """TRL's reward functions may log; here is no log for it."""
