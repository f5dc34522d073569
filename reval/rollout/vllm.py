"""Rollouts by vLLM, in this process (colocated) or in a separate process (server.py).

The engine gets only the config of the model and starts with random weights. It gets all weights from `sync`. So it
always generates with the weights of the policy, no matter which checkpoint the training started from.

An engine that sleeps gives its GPU memory to training. It falls asleep at the end of `generate`, because training comes
next, and wakes up in the next call. A sync needs only the memory of the weights, so the cache comes back after it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..config import Config
from .protocol import Response, RolloutEngine, RolloutError, end_tokens
from .vllm_worker import check_version
from .weights import Expected, Index, checked, expected_weights

INSTALL = (
    "set rollout.engine=hf, or pip install vllm on a machine with GPUs, `make test-vllm` for a CPU (docs/rollouts.md)"
)
# Variables that are set before vllm is imported. A variable that the user has set keeps its value.
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # runs the engine's core in the calling process
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",  # hides warnings about loading weights; vllm_worker.py checks the loading itself
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # binding vLLM's threads to cores would also bind the trainer's threads
}


def make_vllm(
    config: Config, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype, device: torch.device
) -> RolloutEngine:
    """The vllm engine that the settings describe. `device` is the device of the policy.

    Raises ValueError if vllm is not installed or the settings do not fit together.
    """
    settings = config.rollout
    if importlib.util.find_spec("vllm") is None:
        raise ValueError(f"rollout.engine=vllm needs the package vllm, which is not installed: {INSTALL}")
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if settings.vllm_mode == "colocated" and world > 1:
        raise ValueError(
            f"rollout.vllm_mode must be server when {world} processes train: vLLM would take over their process group"
        )
    if settings.vllm_mode == "colocated" and settings.vllm_devices is not None:
        raise ValueError(
            "rollout.vllm_devices must be null with rollout.vllm_mode=colocated, which uses this process's own GPU; "
            f"got {settings.vllm_devices!r}"
        )
    if settings.vllm_sleep and device.type == "cpu":
        raise ValueError("rollout.vllm_sleep must be null or false without a GPU, because vLLM sleeps on GPUs only")
    devices, tensor_parallel = engine_devices(settings.vllm_devices, device.index, os.environ)
    folder = tempfile.TemporaryDirectory(prefix="reval-vllm-")
    model.config.save_pretrained(folder.name)
    expected = expected_weights(model)
    arguments: dict[str, Any] = {
        "folder": folder.name,
        "dtype": str(dtype).removeprefix("torch."),
        "ends": end_tokens(model, tokenizer),
        "batch_size": settings.batch_size,
        "gpu_memory": settings.vllm_gpu_memory,
        "sleep": settings.sleeps and device.type != "cpu",
        "options": settings.vllm_options | {"tensor_parallel_size": tensor_parallel},
    }
    if settings.vllm_mode == "colocated":
        with folder:
            return VLLMRollout(**arguments, expected=expected)
    from .client import ServerRollout

    threads = {"OMP_NUM_THREADS": str(config.run.threads)} if config.run.threads else {}
    with folder:
        return ServerRollout(
            "reval.rollout.vllm:VLLMRollout",
            arguments,
            expected=expected,
            dtype=dtype,
            timeout=settings.timeout,
            environment=threads | devices,
        )


def engine_devices(devices: str | None, gpu: int | None, environment: Mapping[str, str]) -> tuple[dict[str, str], int]:
    """The variable CUDA_VISIBLE_DEVICES for the engine of this training process, and the engine's number of GPUs.

    Args:
        devices: rollout.vllm_devices.
        gpu: index of the policy's GPU; None if the policy's device has no index.
        environment: environment with the variables of torchrun and CUDA_VISIBLE_DEVICES.

    Example: devices "4,5,6,7" and two training processes give rank 1 the GPUs "6,7" and the number 2.
    Raises ValueError if the GPUs cannot be divided evenly among the training processes.
    """
    rank, world = int(environment.get("LOCAL_RANK", "0")), int(environment.get("LOCAL_WORLD_SIZE", "1"))
    if devices is None:
        own, visible = rank if gpu is None else gpu, environment.get("CUDA_VISIBLE_DEVICES")
        if visible is None:
            return {"CUDA_VISIBLE_DEVICES": str(own)}, 1
        names = visible.split(",")
        # %: some launchers show each process only its own GPU, so `names` has one entry and `own` may be larger.
        return {"CUDA_VISIBLE_DEVICES": names[own % len(names)]}, 1
    given = devices.split(",")
    share, rest = divmod(len(given), world)
    if rest:
        raise ValueError(
            f"rollout.vllm_devices must hold a multiple of {world} GPUs, the number of training processes on this "
            f"machine; got {len(given)} ({devices})"
        )
    return {"CUDA_VISIBLE_DEVICES": ",".join(given[rank * share : (rank + 1) * share])}, share


class VLLMRollout:
    """vLLM's engine in this process.

    Args:
        folder: folder with the model's config.json. Nothing else is read from it.
        dtype: data type of the weights, by its name in torch, for example "bfloat16".
        ends: ids of the tokens that end a response.
        batch_size: number of sequences decoded at the same time.
        gpu_memory: fraction of the GPU's memory to use.
        sleep: free the GPU's memory after each `generate`, until the next call.
        options: further arguments of vllm.LLM.
        expected: names and shapes of the weights that `sync` must contain. None in a server process, where the sender
            has checked the weights and only `load` is called.

    Raises ValueError if the installed vLLM is too old or cannot do what the options say.
    """

    shares_weights = False

    def __init__(
        self,
        folder: str,
        *,
        dtype: str,
        ends: list[int],
        batch_size: int,
        gpu_memory: float,
        sleep: bool,
        options: dict[str, Any],
        expected: Expected | None = None,
    ):
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        import vllm
        from vllm.platforms import current_platform

        check_version(vllm.__version__)
        if current_platform.is_cpu():
            # On a CPU:
            # - compiling the model gains no speed, so enforce_eager is on;
            # - a prompt processed in chunks would rewind the random generator of its response, which fails on a CPU
            #   ("CPU Generator does not use offset"), so chunked prefill is off;
            # - the default cache would take half of the memory, so the cache is 1 GiB.
            options = {"enforce_eager": True, "enable_chunked_prefill": False} | options
            os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        self._dtype, self._ends, self._expected = dtype, ends, expected
        self._sleep, self._asleep = sleep, set[str]()  # _asleep: the tags of the memory that is freed now
        self._synced = False
        self.progress: Callable[[int, int], None] | None = None
        """See RolloutEngine. It counts the tokens of finished responses only, because vLLM tells no others."""
        self._lock = threading.RLock()
        self._vllm = vllm
        self._llm = vllm.LLM(
            **{"seed": 0} | options,
            model=folder,
            skip_tokenizer_init=True,
            dtype=dtype,
            load_format="dummy",
            generation_config="vllm",
            logprobs_mode="raw_logprobs",
            max_num_seqs=batch_size,
            gpu_memory_utilization=gpu_memory,
            enable_sleep_mode=sleep,
            worker_extension_cls="reval.rollout.vllm_worker.SyncExtension",
        )
        self._context = self._llm.model_config.max_model_len

    def generate(
        self, prompts: list[list[int]], *, responses: int, max_new_tokens: int, temperature: float, seed: int
    ) -> list[list[Response]]:
        """See RolloutEngine.generate."""
        longest = max((len(p) for p in prompts), default=0)
        if longest + max_new_tokens > self._context:
            raise ValueError(
                f"a prompt of {longest} tokens and rollout.max_new_tokens={max_new_tokens} exceed the {self._context} "
                "tokens that vLLM was started for; raise rollout.vllm_options.max_model_len"
            )
        params = [
            self._vllm.SamplingParams(
                temperature=temperature,
                max_tokens=max_new_tokens,
                stop_token_ids=self._ends,
                detokenize=False,
                seed=request_seed(seed, i, j),
            )
            for i in range(len(prompts))
            for j in range(responses)
        ]
        with self._lock:
            outputs = self._run([p for p in prompts for _ in range(responses)], params)
            self._fall_asleep()
        flat = [self._response(o) for o in outputs]
        return [flat[i * responses : (i + 1) * responses] for i in range(len(prompts))]

    def log_probs(self, sequences: list[list[int]], starts: list[int]) -> list[list[float]]:
        """See RolloutEngine.log_probs.

        Each token is one request, in which only this token is allowed. The request uses the prefix cache and the
        sampler as generation does. vLLM's prompt_logprobs would not use the prefix cache.
        """
        where = [(ids, i) for ids, start in zip(sequences, starts, strict=True) for i in range(start, len(ids))]
        params = [
            self._vllm.SamplingParams(
                temperature=0.0, max_tokens=1, logprobs=0, allowed_token_ids=[ids[i]], detokenize=False
            )
            for ids, i in where
        ]
        outputs = self._run([ids[:i] for ids, i in where], params)
        flat = [o.outputs[0].logprobs[0][ids[i]].logprob for o, (ids, i) in zip(outputs, where, strict=True)]
        values = iter(flat)
        return [[next(values) for _ in ids[start:]] for ids, start in zip(sequences, starts, strict=True)]

    def sync(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """See RolloutEngine.sync."""
        assert self._expected is not None, "only the sender of load() checks the weights"
        dtype = getattr(torch, self._dtype)
        with self._lock, closing(checked(weights, self._expected)) as pairs:
            # Copy each weight: vLLM keeps the tensors until a layer is complete, and the caller may reuse their memory.
            self._take("reval_reload", ((name, w.detach().to(dtype, copy=True)) for name, w in pairs))

    def load(self, path: str, index: Index) -> None:
        """Load the weights from a file that `write_weights` wrote."""
        self._take("reval_load", path, index, self._dtype)

    def close(self) -> None:
        """Free the engine. A second call does nothing."""
        if self._llm is not None:
            self._llm.llm_engine.engine_core.shutdown()
            self._llm = None

    def _take(self, method: str, *args: Any) -> None:
        self._synced = False  # after an error, the engine holds a mixture of old and new weights
        self._wake_up("weights")
        try:
            self._llm.collective_rpc(method, args=args)
        except RuntimeError as error:
            raise RolloutError(f"vLLM could not take the weights: {error}") from error
        if not self._llm.reset_prefix_cache():
            raise RolloutError("vLLM did not reset its prefix cache, which now holds keys and values of old weights")
        self._wake_up("kv_cache")
        self._synced = True

    def _fall_asleep(self) -> None:
        """Free the GPU's memory. Level 1 keeps the weights in main memory, since the next call may be a `generate`
        without a sync. Level 2 would discard them."""
        if self._sleep and not self._asleep:
            self._llm.sleep(level=1)
            self._asleep = {"weights", "kv_cache"}

    def _wake_up(self, *tags: str) -> None:
        """Take back the memory with these tags, if it is freed."""
        for tag in tags:
            if tag in self._asleep:
                self._llm.wake_up(tags=[tag])
                self._asleep.remove(tag)

    def _run(self, prompts: list[list[int]], params: list[Any]) -> list[Any]:
        if not self._synced:
            raise RolloutError("the vllm engine has no weights: it takes them from sync(), which must come first")
        if not prompts:
            return []
        with self._lock, _reporting(self._llm.llm_engine, self.progress, len(prompts)):
            self._wake_up("weights", "kv_cache")
            return self._llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)

    def _response(self, output: Any) -> Response:
        [completion] = output.outputs
        ids, reason = list(completion.token_ids), completion.finish_reason
        if reason not in ("stop", "length") or not ids:
            raise RolloutError(f"vLLM ended a response of {len(ids)} tokens with finish_reason={reason!r}")
        return Response(ids, finished=reason == "stop")


@contextmanager
def _reporting(engine: Any, progress: Callable[[int, int], None] | None, left: int) -> Iterator[None]:
    """Within the block, `progress` gets about once a second the tokens of the finished requests, and how many are left.

    vLLM has only a progress bar for that. So each step of its engine is counted.
    """
    if progress is None:
        yield
        return
    step, tokens, reported = engine.step, 0, time.monotonic()

    def counted() -> Any:
        nonlocal tokens, left, reported
        outputs = step()
        done = [output for output in outputs if output.finished]
        tokens, left = tokens + sum(len(output.outputs[0].token_ids) for output in done), left - len(done)
        if time.monotonic() - reported >= 1.0:
            reported = time.monotonic()
            progress(tokens, left)
        return outputs

    engine.step = counted
    try:
        yield
    finally:
        engine.step = step


def request_seed(seed: int, prompt: int, response: int) -> int:
    """The seed of one response: 63 bits of a hash, so that the seeds of neighbouring responses are unrelated."""
    digest = hashlib.blake2b(f"{seed} {prompt} {response}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
