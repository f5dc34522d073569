"""The calls that VLLMRollout makes, and their order, recorded by a fake vllm module that checks what a GPU would check:
only memory that is awake is used, and only memory that sleeps is woken. test_rollout_vllm.py runs the real engine."""

from __future__ import annotations

import sys
import types
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from reval import loop
from reval.rollout import RolloutError
from reval.rollout.vllm import VLLMRollout, make_vllm
from reval.rollout.vllm_worker import check_version
from reval.rollout.weights import expected_weights
from reval.scoring import NOTHING
from reval.waiting import Waiting

BOTH = {"weights", "kv_cache"}


class FakeLLM:
    def __init__(self, **arguments):
        self.arguments, self.calls, self.asleep = arguments, [], set()
        self.model_config, self.llm_engine = SimpleNamespace(max_model_len=64), SimpleNamespace()
        self.fail = False

    def sleep(self, level):
        assert self.arguments["enable_sleep_mode"] and not self.asleep
        self.calls.append(f"sleep {level}")
        self.asleep = set(BOTH)

    def wake_up(self, tags):
        assert tags and self.asleep >= set(tags)
        self.calls.append("wake " + " ".join(tags))
        self.asleep -= set(tags)

    def collective_rpc(self, method, args):
        assert "weights" not in self.asleep
        self.calls.append(method)
        if method == "reval_reload":
            list(args[0])
        if self.fail:
            raise RuntimeError("left out 1")

    def reset_prefix_cache(self):
        self.calls.append("reset")
        return True

    def generate(self, prompts, params, use_tqdm):
        assert not self.asleep
        self.calls.append("generate" if params[0].logprobs is None else "probe")
        return [SimpleNamespace(outputs=[completion(p)]) for p in params]


def completion(params):
    [allowed] = params.allowed_token_ids or [7]
    return SimpleNamespace(token_ids=[7], finish_reason="stop", logprobs=[{allowed: SimpleNamespace(logprob=-1.0)}])


class FakeParams:
    def __init__(self, logprobs=None, allowed_token_ids=None, **rest):
        self.logprobs, self.allowed_token_ids = logprobs, allowed_token_ids


@pytest.fixture
def on_a_gpu(monkeypatch):
    """Installs the fake module. Returns its platform, which can become a CPU."""
    platform = SimpleNamespace(cpu=False, is_cpu=lambda: platform.cpu)
    vllm = types.ModuleType("vllm")
    vllm.__dict__.update(__version__="0.24.0", LLM=FakeLLM, SamplingParams=FakeParams)
    vllm.__spec__ = SimpleNamespace()  # what importlib.util.find_spec returns for a loaded module
    platforms = types.ModuleType("vllm.platforms")
    platforms.current_platform = platform
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setitem(sys.modules, "vllm.platforms", platforms)
    for name in ("WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    return platform


MODEL = torch.nn.Linear(2, 2)


def rollout(sleep):
    settings = {"dtype": "float32", "ends": [7], "batch_size": 4, "gpu_memory": 0.5, "options": {}}
    return VLLMRollout("folder", **settings, sleep=sleep, expected=expected_weights(MODEL))


def generate(engine, prompts=((1, 2),)):
    return engine.generate([list(p) for p in prompts], responses=1, max_new_tokens=2, temperature=1.0, seed=0)


def calls(engine, action):
    engine._llm.calls.clear()
    action()
    return engine._llm.calls


def test_an_engine_sleeps_from_the_end_of_a_generation_to_the_next_sync(on_a_gpu):
    engine = rollout(sleep=True)

    def sync():
        engine.sync(MODEL.named_parameters())

    assert calls(engine, sync) == ["reval_reload", "reset"]
    assert calls(engine, lambda: generate(engine)) == ["generate", "sleep 1"]
    for _ in range(2):  # an iteration of the loop: training, sync, probe, then the next generation
        assert calls(engine, sync) == ["wake weights", "reval_reload", "reset", "wake kv_cache"]
        assert calls(engine, lambda: engine.log_probs([[1, 2, 3]], [1])) == ["probe"]
        assert calls(engine, lambda: generate(engine)) == ["generate", "sleep 1"]


def test_a_generation_without_a_sync_wakes_the_old_weights_too(on_a_gpu):
    """With rollout.sync_every > 1, or after an evaluation."""
    engine = rollout(sleep=True)
    engine.load("path", [])
    generate(engine)
    assert calls(engine, lambda: generate(engine)) == ["wake weights", "wake kv_cache", "generate", "sleep 1"]
    assert calls(engine, lambda: engine.log_probs([[1, 2]], [1])) == ["wake weights", "wake kv_cache", "probe"]
    assert calls(engine, lambda: engine.load("path", [])) == ["reval_load", "reset"]


def test_a_process_without_a_prompt_of_its_own_sleeps_too(on_a_gpu):
    engine = rollout(sleep=True)
    engine.load("path", [])
    assert calls(engine, lambda: generate(engine, [])) == ["sleep 1"]
    assert calls(engine, lambda: generate(engine, [])) == []


def test_after_a_failed_sync_the_next_sync_wakes_what_still_sleeps(on_a_gpu):
    engine = rollout(sleep=True)
    engine.load("path", [])
    generate(engine)
    engine._llm.fail = True
    with pytest.raises(RolloutError, match="could not take the weights: left out 1"):
        engine.load("path", [])
    with pytest.raises(RolloutError, match="has no weights"):
        generate(engine)
    assert engine._llm.asleep == {"kv_cache"}
    engine._llm.fail = False
    assert calls(engine, lambda: engine.load("path", [])) == ["reval_load", "reset", "wake kv_cache"]


def test_an_engine_that_does_not_sleep_never_calls_sleep_or_wake_up(on_a_gpu):
    engine = rollout(sleep=False)
    engine.load("path", [])
    assert calls(engine, lambda: generate(engine)) == ["generate"]
    assert not engine._llm.arguments["enable_sleep_mode"]


@pytest.mark.parametrize(
    ("settings", "device", "sleeps"),
    [
        ({}, "cuda", True),
        ({"ahead": 1}, "cuda", False),
        ({}, "cpu", False),
        ({"vllm_sleep": False}, "cuda", False),
    ],
)
def test_a_colocated_engine_on_a_gpu_sleeps_unless_it_works_ahead(
    on_a_gpu, tiny, tiny_config, settings, device, sleeps
):
    on_a_gpu.cpu = device == "cpu"
    chosen = replace(tiny_config.rollout, engine="vllm", vllm_mode="colocated", **settings)
    config = replace(tiny_config, rollout=chosen)
    engine = make_vllm(config, *tiny, torch.float32, torch.device(device))
    assert engine._llm.arguments["enable_sleep_mode"] == sleeps


@pytest.mark.parametrize(("engine", "emptied"), [("vllm", [True]), ("hf", [])])
def test_training_hands_its_unused_memory_back_before_the_engine_wakes(monkeypatch, tiny_config, engine, emptied):
    calls = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append(True))
    config = replace(tiny_config, rollout=replace(tiny_config.rollout, engine=engine, vllm_sleep=True))
    run = SimpleNamespace(config=config, buffer=SimpleNamespace(sample=lambda *_: []), rng=None)
    loop._update(run, NOTHING, loop.Clock(Waiting()))
    assert calls == emptied


def test_sleep_without_a_gpu_is_refused(on_a_gpu, tiny, tiny_config):
    config = replace(tiny_config, rollout=replace(tiny_config.rollout, engine="vllm", vllm_sleep=True))
    with pytest.raises(ValueError, match="rollout.vllm_sleep must be null or false without a GPU"):
        make_vllm(config, *tiny, torch.float32, torch.device("cpu"))


def test_an_old_vllm_is_refused_and_a_new_one_comes_with_a_warning(recwarn):
    with pytest.raises(ValueError, match="needs vllm 0.24 to 0.33; installed is 0.23.1"):
        check_version("0.23.1")
    check_version("0.24.0+cpu")
    check_version("0.33.0")
    assert not recwarn
    with pytest.warns(UserWarning, match="vllm 0.34.0 is newer .* rollout/mismatch_max"):
        check_version("0.34.0")
