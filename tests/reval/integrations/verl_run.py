"""A real run of verl's trainer `reval` on a CPU, but for the generation: python verl_run.py FOLDER STEPS

Real are Ray, TransferQueue, the worker groups with verl's FSDP2 engine for actor and reference, advantages, and
checkpoints. vLLM is not: `Uniform` stands in for verl's agent loops. It writes random responses into the queue in the
form in which verl's AgentLoopWorkerTQ does, and an off-policy loss may train on them. So no weights are sent to a
rollout engine.

It prints a line of JSON for each step: the metrics, and the keys of the trajectories of each update.
"""

import json
import math
import os
import sys
from pathlib import Path

import pandas
import ray
import torch
import transfer_queue as tq
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torch.distributed.fsdp import OffloadPolicy
from verl.trainer.ppo.v1 import get_trainer_cls
from verl.utils.tensordict_utils import list_of_dict_to_tensordict
from verl.workers.engine.fsdp import transformer_impl
from verl.workers.engine_workers import ActorRolloutRefWorker
from verl.workers.rollout.replica import RolloutReplicaRegistry
from verl_cpu import save_tiny_model

VOCABULARY, PROMPTS, RESPONSES = 40, 4, 2
PARTITION = "reval_replay"
ReValTrainer = get_trainer_cls("reval")
RolloutReplicaRegistry.register("none", lambda: object)  # verl looks up the class, and makes no instance


class Uniform:
    """Random responses. The reward is the share of tokens below 20."""

    def __init__(self, trainer):
        self.trainer = trainer

    def generate_sequences(self, prompts) -> None:
        step = self.trainer.global_steps
        g = torch.Generator().manual_seed(step)
        for uid in prompts["uid"]:
            rows = [self.trajectory(uid, i, g) for i in range(RESPONSES)]
            tags = [
                {"status": "success", "prompt_len": 4, "response_len": len(r["responses"])}
                | {"seq_len": len(r["input_ids"]), "global_steps": step}
                | {"min_global_steps": step - 1, "max_global_steps": step - 1}
                for r in rows
            ]
            keys = [f"{uid}_{i}_0" for i in range(RESPONSES)]
            tq.kv_batch_put(keys=keys, fields=list_of_dict_to_tensordict(rows), tags=tags, partition_id="train")
            tq.kv_put(key=uid, partition_id="train", tag={"status": "finished"})

    def trajectory(self, uid: str, session: int, g: torch.Generator) -> dict:
        prompt = torch.randint(3, VOCABULARY, (4,), generator=g)
        response = torch.randint(3, VOCABULARY, (int(torch.randint(2, 7, (), generator=g)),), generator=g)
        mask, scores = torch.ones_like(response), torch.zeros(len(response))
        scores[-1] = (response < 20).float().mean()
        ids = torch.cat([prompt, response])
        return {
            "uid": uid,
            "session_id": session,
            "prompts": prompt,
            "responses": response,
            "response_mask": mask,
            "loss_mask": mask,
            "input_ids": ids,
            "position_ids": torch.arange(len(ids)),
            "rm_scores": scores,
            "rollout_log_probs": torch.full(response.shape, -math.log(VOCABULARY - 3)),
            "num_turns": 2,
            "multi_modal_inputs": {},
        }


class GlooWorker(ActorRolloutRefWorker):
    """Two things that verl does for accelerators alone: it asks for process groups of the CPU and of the device, and it
    offloads the reference into pinned memory."""

    def __init__(self, *args, **kwargs):
        transformer_impl.CPUOffloadPolicy = lambda **_: OffloadPolicy()
        if not torch.distributed.is_initialized():
            torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        super().__init__(*args, **kwargs)


class Trainer(ReValTrainer):
    """Without a rollout engine, as verl's own trainers with rollouts elsewhere."""

    _enable_hybrid_replicas = False

    def _init_resource_pool_mgr(self):
        super()._init_resource_pool_mgr()
        self.role_worker_mapping = {role: ray.remote(GlooWorker) for role in self.role_worker_mapping}

    def on_init_end(self):
        pass

    def on_step_end(self):
        pass

    def _update_actor(self, batch, metrics):
        self.trained.append((batch.partition_id, list(batch.keys)))
        return super()._update_actor(batch, metrics)

    def step(self, metrics, timing_raw):
        self.trained: list = []
        batch = super().step(metrics, timing_raw)
        wanted = ("actor/loss", "actor/grad_norm", "actor/reval_residual_abs", "actor/lr", "replay/size")
        row = {
            "step": self.global_steps,
            "trained": self.trained,
            "stored": len((tq.kv_list() or {}).get(PARTITION, {})),
        }
        row |= {
            k: float(v) for k, v in metrics.items() if k.removeprefix("replay/") in wanted or k.startswith("replay")
        }
        print("ROW", json.dumps(row), flush=True)
        return batch


def settings(folder: Path, steps: int):
    save_tiny_model(str(folder / "model"), VOCABULARY)
    row = {"data_source": "none", "prompt": [{"role": "user", "content": "3 4"}], "reward_model": {"ground_truth": ""}}
    pandas.DataFrame([row | {"extra_info": {"index": i}} for i in range(64)]).to_parquet(folder / "prompts.parquet")
    overrides = [
        f"actor_rollout_ref.model.path={folder}/model",
        "+actor_rollout_ref.model.override_config.attn_implementation=sdpa",
        "actor_rollout_ref.model.use_remove_padding=false",
        "actor_rollout_ref.model.enable_gradient_checkpointing=false",
        *(f"data.{name}={folder}/prompts.parquet" for name in ("train_files", "val_files")),
        f"data.train_batch_size={PROMPTS}",
        "data.dataloader_num_workers=0",
        f"actor_rollout_ref.actor.ppo_mini_batch_size={PROMPTS}",
        *(f"actor_rollout_ref.{role}.use_torch_compile=false" for role in ("actor", "ref")),
        *(f"+actor_rollout_ref.{role}.fsdp_config.mixed_precision.param_dtype=fp32" for role in ("actor", "ref")),
        "actor_rollout_ref.ref.fsdp_config.model_dtype=fp32",
        "actor_rollout_ref.actor.optim.lr=1e-3",
        f"actor_rollout_ref.rollout.n={RESPONSES}",
        "reward.num_workers=1",
        "actor_rollout_ref.rollout.name=none",
        "actor_rollout_ref.rollout.nnodes=1",  # verl's check for rollouts elsewhere; nothing is started
        "transfer_queue.backend.SimpleStorage.num_data_storage_units=1",
        "trainer.device=cpu",
        "trainer.n_gpus_per_node=1",
        "trainer.v1.reval.updates=3",
        "trainer.v1.reval.max_staleness_versions=2",
        "trainer.logger=[console]",
        "trainer.val_before_train=false",
        f"trainer.total_training_steps={steps}",
        "trainer.save_freq=2",
        f"trainer.default_local_dir={folder}/checkpoints",
    ]
    with initialize_config_dir(str(Path(__file__).parents[3] / "examples" / "verl"), version_base=None):
        config = compose("reval", overrides=overrides)
    config.transfer_queue.enable = True
    OmegaConf.resolve(config)
    return config


def main() -> None:
    folder, steps = Path(sys.argv[1]), int(sys.argv[2])
    config = settings(folder, steps)
    ray.init(num_cpus=16, num_gpus=2, include_dashboard=False, runtime_env={"env_vars": {"OMP_NUM_THREADS": "1"}})
    tq.init(config.transfer_queue)
    trainer = Trainer(config)
    trainer.init()
    trainer.fit(Uniform(trainer))
    tq.close()
    ray.shutdown()


if __name__ == "__main__":
    assert os.environ["VERL_USE_EXTERNAL_MODULES"] == "verl_cpu"
    main()
