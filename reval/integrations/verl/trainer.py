"""verl's synchronous trainer with replay: trainer.v1.trainer_mode=reval.

A step generates a batch, updates the actor on it, and admits its trajectories to the replay buffer with everything that
an update needs: the shaped rewards, and the values of the reference. Then it updates the actor on batches from the
buffer. Such an update costs one forward and one backward pass: no generation, no pass of the reference.

The trajectories stay in verl's TransferQueue, in a partition of their own. verl clears the partition "train" after a
step. verl saves and restores the queue with its checkpoints, so a resumed run has its buffer.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import transfer_queue as tq
from omegaconf import DictConfig, OmegaConf, open_dict
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.utils import need_critic
from verl.trainer.ppo.v1 import PPOTrainerSync, register_trainer
from verl.utils.debug import marked_timer
from verl.workers.utils.padding import response_from_nested

from ..replay import Entry, ReplayIndex

PARTITION = "reval_replay"
FIELDS = [
    *("input_ids", "position_ids", "prompts", "responses", "response_mask", "loss_mask"),
    *("old_log_probs", "ref_log_prob", "ref_state_values", "advantages"),
]
"""What verl's actor reads in an update with the policy loss `reval`."""


@dataclass
class ReplayConfig:
    """trainer.v1.reval: the settings of the replay buffer."""

    updates: int = 2
    """Updates in a step: one on the new batch, the others on replayed batches of as many trajectories. At least 1."""
    capacity: int = 5120
    """The most trajectories that the buffer holds."""
    max_staleness_versions: int | None = None
    """Trajectories that more versions of the weights lie behind are evicted. 0: no replay of earlier steps; null: no
    limit but the capacity. verl has a new version after each step."""
    seed: int = 0
    """Of the draws from the buffer."""
    parameter_sync_step: int = 1
    """verl's setting for every trainer; must be 1."""

    def __post_init__(self) -> None:
        allowed = {
            "updates": (self.updates, 1, ""),
            "capacity": (self.capacity, 1, ""),
            "max_staleness_versions": (self.max_staleness_versions, 0, " or null"),
            "seed": (self.seed, 0, ""),
        }
        for name, (value, least, other) in allowed.items():
            if not (value is None and other) and (type(value) is not int or value < least):
                raise ValueError(f"trainer.v1.reval.{name} must be a whole number >= {least}{other}, got {value!r}")
        if self.parameter_sync_step != 1:
            raise ValueError(f"trainer.v1.reval.parameter_sync_step must be 1, got {self.parameter_sync_step!r}")


@register_trainer("reval")
class ReValTrainer(PPOTrainerSync):
    """PPOTrainerSync with replay. Text only; the reference is the initial model in all steps."""

    def __init__(self, config: DictConfig):
        """
        Raises:
            ValueError: settings with which the policy loss `reval` cannot work.
        """
        given = OmegaConf.to_container(config.trainer.v1.get("reval") or OmegaConf.create())
        names = [field.name for field in fields(ReplayConfig)]
        if unknown := given.keys() - set(names):
            raise ValueError(f"trainer.v1.reval has no setting {min(unknown)}; it has {', '.join(names)}")
        self.options = ReplayConfig(**given)
        _check(config)
        self.replay = ReplayIndex(self.options.capacity, self.options.max_staleness_versions, self.options.seed)
        super().__init__(config)

    def _init_dataloader(self) -> None:
        """verl steps the learning rate once in each call of `_update_actor`."""
        super()._init_dataloader()
        with open_dict(self.config):
            self.config.actor_rollout_ref.actor.optim.total_training_steps *= self.options.updates

    def _load_checkpoint(self) -> None:
        super()._load_checkpoint()
        if self.processor is not None:
            raise ValueError("trainer_mode=reval replays text only, and this model has a processor for images")
        held = (tq.kv_list(PARTITION) or {}).get(PARTITION, {})
        self.replay.admit([entry_of(key, tag) for key, tag in sorted(held.items())])

    def _compute_ref_log_prob(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        """The reference's V too. The engine put it in the queue beside the log-probs."""
        batch = super()._compute_ref_log_prob(batch, metrics)
        data = tq.kv_batch_get(
            keys=batch.keys, partition_id=batch.partition_id, select_fields=["state_values", "response_mask"]
        )
        data["ref_state_values"] = response_from_nested(data.pop("state_values"), data["response_mask"])
        tq.kv_batch_put(keys=batch.keys, partition_id=batch.partition_id, fields=data.select("ref_state_values"))
        return batch

    def step(self, metrics: dict, timing_raw: dict) -> KVBatchMeta:
        batch = super().step(metrics, timing_raw)
        with marked_timer("replay", timing_raw):
            self._admit(batch)
            for update in range(1, self.options.updates):
                self._replay_update(update, metrics)
        version = self.global_steps - 1  # of the weights that generated the new batch
        metrics |= {"replay/size": len(self.replay), "replay/staleness_mean": self.replay.staleness(version)}
        return batch

    def _admit(self, batch: KVBatchMeta) -> None:
        """Copy the trajectories of `batch` into the buffer, and remove what is too old or too much."""
        real = [i for i, tag in enumerate(batch.tags) if not tag.get("is_padding", False)]
        keys, tags = [batch.keys[i] for i in real], [dict(batch.tags[i]) for i in real]
        data = tq.kv_batch_get(keys=keys, partition_id=batch.partition_id, select_fields=FIELDS)
        tq.kv_batch_put(keys=keys, partition_id=PARTITION, fields=data, tags=tags)
        self.replay.admit([entry_of(key, tag) for key, tag in zip(keys, tags, strict=True)])
        if evicted := self.replay.evict(self.global_steps - 1):
            tq.kv_clear(keys=evicted, partition_id=PARTITION)

    def _replay_update(self, update: int, metrics: dict) -> None:
        """One update of the actor on trajectories from the buffer, as many as in a new batch.

        Their number is rounded down to whole mini-batches of verl, whose workers check that the ranks divide these. So
        verl has nothing to pad: its padding would copy fields of another length.
        """
        rollouts, actor = self.config.actor_rollout_ref.rollout.n, self.config.actor_rollout_ref.actor
        multiple = actor.ppo_mini_batch_size * rollouts
        count = min(self.config.data.train_batch_size * rollouts, len(self.replay)) // multiple * multiple
        if count == 0:
            return
        chosen = self.replay.select(count, f"step {self.global_steps}, update {update}")
        batch = KVBatchMeta(partition_id=PARTITION, keys=[e.key for e in chosen], tags=[e.tag for e in chosen])
        batch.extra_info["temperature"] = self.config.actor_rollout_ref.rollout.temperature
        found: dict = {}
        self._update_actor(self._balance_batch(batch, found), found)
        metrics |= {f"replay/{name}": value for name, value in found.items()}


def _check(config: DictConfig) -> None:
    """
    Raises:
        ValueError: settings of verl that the trainer cannot work with.
    """
    both = config.actor_rollout_ref
    actor = both.actor
    if not actor.use_kl_loss or actor.kl_loss_coef != 0 or actor.kl_loss_type != "kl":
        raise ValueError(
            "trainer_mode=reval needs actor_rollout_ref.actor.use_kl_loss=true, kl_loss_coef=0 and "
            "kl_loss_type=kl: then verl loads the reference, and adds no KL term to a loss that has its own; got "
            f"{actor.use_kl_loss}, {actor.kl_loss_coef} and {actor.kl_loss_type}"
        )
    for role in ("actor", "ref"):
        if both[role].strategy not in ("fsdp", "fsdp2"):
            raise ValueError(
                f"trainer_mode=reval needs actor_rollout_ref.{role}.strategy=fsdp or fsdp2: other engines return no V; "
                f"got {both[role].strategy}"
            )
    if need_critic(config):
        raise ValueError(
            "trainer_mode=reval has no critic: set algorithm.adv_estimator=reval or grpo; "
            f"got {config.algorithm.adv_estimator}, and critic.enable={config.critic.enable}"
        )
    if config.trainer.critic_warmup != 0:
        raise ValueError(f"trainer_mode=reval needs trainer.critic_warmup=0, got {config.trainer.critic_warmup}")


def entry_of(key: str, tag: dict) -> Entry:
    """The buffer's entry for a trajectory of verl's queue. Its version is that of its first token's weights."""
    version = tag.get("min_global_steps")
    return Entry(key, tag["global_steps"] - 1 if version is None else version, tag)
