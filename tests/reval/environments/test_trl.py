"""The adapter for environments of TRL. The format of the messages is compared with TRL's own where TRL is installed."""

import json
from pathlib import Path

import pytest

from reval.environments import Conversation, EnvironmentFault, EnvironmentPool
from reval.environments.trl import _CALLS, Trl

FILE = str(Path(__file__).with_name("trl_tasks.py"))
COUNTER = f"{FILE}:Counter"


def call(name="add", /, **arguments):
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def begun(factory="Counter", problem=None, **options):
    task = Trl(f"{FILE}:{factory}", **options)
    task.reset({"prompt": "Count."} | (problem or {}))
    return task


def test_the_model_calls_methods():
    task = begun()
    assert task.step(call(amount=1)) == ([{"role": "tool", "name": "add", "content": "1"}], 0.0, False)
    assert task.step("Two more. " + call(amount=1, times=2))[0][0]["content"] == "3"
    assert task.step("Done.") == ([], 0.0, True)


def test_rewards_are_changes_so_a_trajectory_that_is_cut_off_has_its_score():
    task = begun()
    assert [task.step(call(amount=n))[1] for n in (3, 1, -1)] == [1.0, -1.0, 1.0]
    task.reset({"prompt": "Count."})
    assert task.step(call(amount=3))[1] == 1.0


def test_several_calls_in_one_completion_and_asynchronous_tools():
    task = begun()
    messages, _, done = task.step(f"<think>hm</think>\n{call(amount=2)}\n{call('look')}")
    assert [m["content"] for m in messages] == ["2", "{'number': 2}"] and not done
    assert task._said[0]["content"] == "" and task._said[0]["reasoning_content"] == "hm"
    task.close()


@pytest.mark.parametrize(
    ("completion", "result"),
    [
        (call("sub", amount=1), "{'error': 'Tool sub not found.'}"),
        (call("_hidden"), "{'error': 'Tool _hidden not found.'}"),
        (call("get_reward"), "{'error': 'Tool get_reward not found.'}"),
        (call("reset"), "{'error': 'Tool reset not found.'}"),
        (call(amount=101), "{'error': 'too large'}"),
        (call(amount="2"), "2"),  # the schema says that it is a number
        ('<tool_call>{"name": "look"}', "{'number': 0}"),  # cut off by the end of the message
    ],
)
def test_what_a_call_gives(completion, result):
    messages, _, done = begun().step(completion)
    assert [m["content"] for m in messages] == [result] and not done


@pytest.mark.parametrize("arguments", [{}, {"amount": 1, "x": 2}])
def test_wrong_arguments_are_an_error_of_the_tool(arguments):
    messages, _, done = begun().step(call(**arguments))
    assert messages[0]["content"].startswith("{'error': ") and "argument" in messages[0]["content"] and not done


@pytest.mark.parametrize(
    "completion",
    [
        "3",
        "",
        '<tool_call>{"name": "look"</tool_call>',
        "<tool_call>[1]</tool_call>",
        "<tool_call>7</tool_call>",
        '<tool_call>{"name": 7}</tool_call>',
        '<tool_call>{"arguments": {}}</tool_call>',
        call("look") + "<tool_call>{</tool_call>",
        "<think>" + call("look"),
    ],
)
def test_a_completion_without_a_call_is_the_last(completion):
    assert begun().step(completion) == ([], 0.0, True)


def test_the_first_messages():
    task = Trl(COUNTER)
    first = task.reset({"prompt": "Count. ", "told": "To 3."})
    assert [m["role"] for m in first] == ["system", "user"] and first[1]["content"] == "Count. To 3."
    assert first[0]["content"].startswith("# Tools\n") and '"name": "add"' in first[0]["content"]
    assert all(hidden not in first[0]["content"] for hidden in ("_hidden", "get_reward", "reset"))
    prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Count."}]
    first = task.reset({"prompt": prompt, "other": 1})
    assert [m["role"] for m in first] == ["system", "user"] and first[0]["content"].startswith("Be brief.\n\n# Tools")
    assert prompt[0]["content"] == "Be brief." and task._environment.row == {"prompt": prompt, "other": 1}
    assert Trl(COUNTER, describe_tools=False).reset({"prompt": prompt}) == prompt


def test_a_reward_function_of_trl():
    task = begun("Counter", {"bonus": 0.5, "other": "x"}, reward=f"{FILE}:length")
    assert task.step(call(amount=3))[1] == 1.0 + 2.5
    assert task.step("Done.")[1] == 1.0
    assert begun("Unrewarded", reward=f"{FILE}:nothing").step("x") == ([], 0.0, True)


def test_another_format_of_calls():
    content = {"fields": _CALLS["fields"] | {"tool_calls": _CALLS["fields"]["tool_calls"] | {"open": "<call>"}}}
    task = begun(response_template=_CALLS | content)
    assert task.step(call("look").replace("<tool_call>", "<call>"))[0][0]["content"] == "{'number': 0}"


@pytest.mark.parametrize(
    ("factory", "options", "message"),
    [
        ("NoReset", {}, "must have a method reset"),
        ("Unrewarded", {}, "environment.options.reward must name a reward function"),
        ("Undescribed", {}, "the tool 'jump' needs type hints"),
        ("Countr", {}, "did you mean 'Counter'"),
        ("Counter", {"reward": f"{FILE}:lenght"}, "did you mean 'length'"),
    ],
)
def test_what_is_no_environment_of_trl(factory, options, message):
    with pytest.raises(EnvironmentFault, match=message):
        Trl(f"{FILE}:{factory}", **options)


def test_content_blocks_are_refused():
    with pytest.raises(EnvironmentFault, match="must return text or None"):
        begun("Lists")


def test_conversations_in_the_workers():
    with EnvironmentPool("trl", {"factory": COUNTER}, workers=1, timeout=60) as pool:
        pool.start()
        talks = [Conversation({"prompt": "Count.", "target": n}) for n in (1, 2)]
        pool.advance(talks)
        for completion in (call(amount=1), "Done."):
            for talk in talks:
                talk.completions.append(completion)
            pool.advance(talks)
        assert [(t.error, t.reward, t.done) for t in talks] == [("", 1.0, True), ("", 0.0, True)]


def test_the_format_is_that_of_trl():
    """The system message is what TRL's template for Qwen2.5 writes, and calls are read as TRL reads those of Qwen3."""
    templates = pytest.importorskip("trl.chat_template_utils")
    from transformers.utils.chat_template_utils import render_jinja_template

    task = Trl(COUNTER)
    prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Count."}]
    tools = [task._environment.add, task._environment.look]
    template = templates.qwen2_5_chat_template

    def rendered(messages, **variables):
        return render_jinja_template([messages], chat_template=template, **variables)[0][0]

    assert rendered(task.reset({"prompt": prompt})) == rendered(prompt, tools=tools)
    theirs = templates.qwen3_template
    assert theirs["fields"] | {"content": _CALLS["fields"]["content"]} == _CALLS["fields"]
    assert {key: theirs[key] for key in ("start_anchor", "defaults")} == {
        key: _CALLS[key] for key in theirs if key != "fields"
    }
