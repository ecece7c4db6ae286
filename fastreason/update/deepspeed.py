"""DeepSpeed behind the Updater protocol: ZeRO 0 to 3, bf16 with fp32 master weights. The only importer of deepspeed.

What was learned on DeepSpeed 0.19:

- on a CPU it would compile a shared-memory op at init; that op is declared incompatible first, gloo does its work;
- optimizers named in its config compile too, so the optimizer is a torch object;
- gradient accumulation boundaries are set by hand, because the number of micro-batches varies from update to update.
"""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from fastreason_kernels import PolicyLossOutput
from torch import Tensor, nn

from fastreason.config import TrainConfig
from fastreason.critic import ValueLoss
from fastreason.lora import Weight, adapter_weights, is_trained_in_part, merged_weights
from fastreason.losses.preference import PairSpec
from fastreason.packing import MicroBatch
from fastreason.policy import LossSpec, policy_spec, score_batch
from fastreason.update.dither import dither_, spread
from fastreason.update.layouts import MASTERS, layout_of, read_saved, saved_layout, write_into
from fastreason.update.schedule import learning_rate
from fastreason.update.updater import UpdateResult

log = logging.getLogger(__name__)

TAG = "state"  # the folder of DeepSpeed's files in a checkpoint's
MAX_BUCKET = 200_000_000  # elements per reduction
GATHER_BYTES = 512 << 20  # ZeRO-3: weights are gathered in buckets of about this size


def initialise_distributed(device: str, timeout_s: float = 1800.0) -> None:
    """Join the process group of the launcher (torch's elastic launcher, torchrun, deepspeed, Slurm).

    A rank that waits for another longer than `timeout_s` in a collective raises.
    """
    if device == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(
        dist_backend="gloo" if device == "cpu" else "nccl", verbose=False, timeout=timedelta(seconds=timeout_s)
    )


def deepspeed_config(
    train: TrainConfig, dtype: str, num_ranks: int, num_parameters: int = MAX_BUCKET
) -> dict[str, Any]:
    """DeepSpeed's own configuration of a run; gradient accumulation and the learning rate are not its business.

    bf16 at stage 0 runs as stage 1: without ZeRO, DeepSpeed sums the micro-batches in bf16, and makes an empty Adam step
    at the start that spoils the bias correction.
    """
    stage = train.zero_stage
    if dtype == "bfloat16" and stage == 0:
        log.warning(
            "train.zero_stage=0 with model.dtype=bfloat16 runs as stage 1: DeepSpeed has no fp32 sums without it"
        )
        stage = 1
    config = base_config(num_ranks, stage, num_parameters)
    config |= {"gradient_clipping": train.max_grad_norm, "zero_allow_untested_optimizer": True}
    if dtype == "bfloat16":
        config["bf16"] = {"enabled": True}
        # Summing micro-batches in bf16 loses what is smaller than 1/256 of the sum.
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    if train.offload != "none":
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": False}
        if train.offload == "cpu_weights":
            config["zero_optimization"]["offload_param"] = {"device": "cpu", "pin_memory": False}
        config["zero_force_ds_cpu_optimizer"] = False
    return config


def base_config(num_ranks: int, stage: int, num_parameters: int) -> dict[str, Any]:
    """What every engine of a run has in common, whether it trains or not."""
    # DeepSpeed allocates its buckets whole, 500 million elements each unless told otherwise.
    bucket = max(1_000_000, min(MAX_BUCKET, num_parameters // 8))
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "train_batch_size": num_ranks,
        "zero_optimization": {"stage": stage, "reduce_bucket_size": bucket, "allgather_bucket_size": bucket},
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
    }


class Trained:
    """One DeepSpeed engine around a module that is trained; `num_updates` is the length of the learning-rate schedule."""

    def __init__(self, module: nn.Module, train: TrainConfig, dtype: str, num_updates: int) -> None:
        self._train, self._num_updates = train, num_updates
        self.rank, self.num_ranks = dist.get_rank(), dist.get_world_size()
        self.num_done = 0
        device = next(module.parameters()).device
        num_parameters = sum(getattr(p, "ds_numel", p.numel()) for p in module.parameters())
        optimizer = torch.optim.AdamW(
            decay_groups(module, train.weight_decay),
            lr=train.lr,
            betas=(train.adam_beta1, train.adam_beta2),
            eps=train.adam_eps,
            fused=device.type in ("cpu", "cuda") and train.offload == "none",
        )
        # Of each group, what a checkpoint must not bring back: it may go on with other values.
        keys = ("weight_decay", "betas", "eps")
        self._settings = [{key: group[key] for key in keys} for group in optimizer.param_groups]
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=module, optimizer=optimizer, config=deepspeed_config(train, dtype, self.num_ranks, num_parameters)
        )
        self._device = device
        self._in_part = is_trained_in_part(module)
        if self._in_part:
            module.register_state_dict_post_hook(drop_frozen)
        self._unwrapped = self.engine.optimizer is optimizer
        if train.dither and dtype == "bfloat16":
            self._dither()

    def _dither(self) -> None:
        """Spread the fp32 master weights over the cells that round to the weights; a checkpoint brings its own."""
        masters = next(getattr(self.optimizer, name) for name in MASTERS if hasattr(self.optimizer, name))
        generator = torch.Generator(masters[0].device).manual_seed(self.rank)
        for master in masters:
            dither_(master.data, generator)

    def _update(
        self, batches: list[MicroBatch], forward: Callable[[MicroBatch], tuple[Tensor, Any]], denominator: float
    ) -> tuple[list[Any], UpdateResult]:
        """One optimizer update from the losses that `forward` sums over a micro-batch, with what else it returns of each."""
        rate = self._rate()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        outputs: list[Any] = []
        total, norm = torch.zeros((), dtype=torch.float64), math.nan
        for number, batch in enumerate(batches):
            self.engine.set_gradient_accumulation_boundary(number == len(batches) - 1)
            loss_sum, output = forward(batch.to(self._device))
            # DeepSpeed averages gradients over the ranks; the loss is a sum over them.
            self.engine.backward(loss_sum * (self.num_ranks / denominator))
            if self._unwrapped and number == len(batches) - 1:
                norm = self._step_unwrapped()
            else:
                self.engine.step()
            outputs.append(output)
            total += loss_sum.detach().double().cpu()
        if self.num_ranks > 1:
            dist.all_reduce(total)
        self.num_done += 1
        if not self._unwrapped:
            norm = float(self.engine.get_global_grad_norm())
        finite = math.isfinite(norm)
        loss = float(total) / denominator
        return outputs, UpdateResult(outputs=[], loss=loss, grad_norm=norm, lr=rate, applied=finite)

    def skip(self) -> UpdateResult:
        rate = self._rate()
        self.num_done += 1
        return UpdateResult(outputs=[], loss=0.0, grad_norm=0.0, lr=rate, applied=True, empty=True)

    def _rate(self) -> float:
        """The learning rate of the update at hand."""
        train = self._train
        warmup = train.warmup_steps or math.ceil(train.warmup_share * self._num_updates)
        return learning_rate(train.lr, train.lr_schedule, self.num_done, self._num_updates, warmup)

    def _step_unwrapped(self) -> float:
        """Step where DeepSpeed leaves the optimizer bare (fp32 at stage 0) and keeps no norm; skip what is not finite."""
        gradients = [p.grad for p in self.engine.module.parameters() if p.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients))
        if math.isfinite(norm):
            self.engine.step()
        else:
            self.engine.zero_grad()
        return norm

    def save(self, folder: Path) -> None:
        # What rests is not saved: it is in the model's folder.
        self.engine.save_checkpoint(
            str(folder),
            tag=TAG,
            client_state={"num_done": self.num_done},
            save_latest=False,
            exclude_frozen_parameters=self._in_part,
        )

    def load(self, folder: Path) -> None:
        layout, there = layout_of(self.engine.config, self.num_ranks), saved_layout(folder / TAG)[0]
        if layout != there:
            log.info("reading a checkpoint of %s into %s", there, layout)
            self._load_other(folder / TAG)
            return
        path, client_state = self.engine.load_checkpoint(str(folder), tag=TAG, load_module_strict=not self._in_part)
        if path is None:
            raise FileNotFoundError(f"DeepSpeed found no state in {folder}")
        self.num_done = client_state["num_done"]
        self._keep_settings()

    def _keep_settings(self) -> None:
        """Undo that DeepSpeed's load brings back the optimizer's settings of the run before, as it does weights and moments."""
        for group, own in zip(self.optimizer.param_groups, self._settings, strict=True):
            group.update(own)
        if hasattr(self.optimizer, "clip_grad"):
            self.optimizer.clip_grad = self._train.max_grad_norm

    def _load_other(self, folder: Path) -> None:
        """Go on from a checkpoint of another number of ranks, ZeRO stage or precision."""
        module = self.engine.module
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        order = [names[id(p)] for group in decay_groups(module, 0.0) for p in group["params"]]
        saved = read_saved(folder, order)
        gather = partial(deepspeed.zero.GatheredParameters, modifier_rank=0)
        write_into(saved, module, self.optimizer, self.rank, gather)
        self.num_done = saved.model_state["num_done"]
        self.engine.global_steps = saved.model_state["global_steps"]
        self.engine.skipped_steps = saved.model_state["skipped_steps"]


class DeepSpeedUpdater(Trained):
    """The policy's: implements Updater."""

    name = "deepspeed"

    @torch.no_grad()
    def logprobs(self, batches: list[MicroBatch], spec: LossSpec, temperature: float) -> list[Tensor]:
        # In training mode and with the update's own spec, so that they agree with the update's to the last bit.
        if isinstance(spec, PairSpec):
            return [self.engine(batch.to(self._device), None, temperature)[0] for batch in batches]
        found = []
        for batch in batches:
            same = score_batch(batch).to(self._device)
            found.append(self.engine(same, policy_spec(batch, spec), temperature).logp)
        return found

    def update(self, batches: list[MicroBatch], spec: LossSpec, temperature: float, denominator: float) -> UpdateResult:
        def forward(batch: MicroBatch) -> tuple[Tensor, PolicyLossOutput]:
            output = self.engine(batch, spec, temperature)
            return output.loss_sum, output

        outputs, result = self._update(batches, forward, denominator)
        return replace(result, outputs=outputs)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        yield from self._gather(merged_weights(self.engine.module.model, spread if self._train.dither else None))

    def adapter(self) -> Iterator[tuple[str, Tensor]]:
        yield from self._gather(adapter_weights(self.engine.module.model))

    def _gather(self, weights: list[Weight]) -> Iterator[tuple[str, Tensor]]:
        if self._train.zero_stage < 3:
            if self.rank == 0:
                for weight in weights:
                    yield weight.name, weight.make().cpu()
            return
        for bucket in _buckets(weights):
            with deepspeed.zero.GatheredParameters([p for weight in bucket for p in weight.parameters]):
                whole = [(weight.name, weight.make().cpu().clone()) for weight in bucket] if self.rank == 0 else []
            yield from whole


class DeepSpeedCritic(Trained):
    """The critic's engine: a `critic.ValueModel` with an optimizer of its own; implements critic.Values."""

    @torch.no_grad()
    def values(self, batches: list[MicroBatch]) -> list[Tensor]:
        return [self.engine(batch.to(self._device)).float().cpu() for batch in batches]

    def fit(self, batches: list[MicroBatch], loss: ValueLoss, denominator: float) -> UpdateResult:
        def forward(batch: MicroBatch) -> tuple[Tensor, None]:
            return loss(self.engine(batch), batch), None

        return self._update(batches, forward, denominator)[1]


def divided_scorer(
    scorer: nn.Module, dtype: str
) -> tuple[Any, Callable[[Sequence[nn.Parameter]], AbstractContextManager[Any]]]:
    """(engine, gather) of a model that is not trained, its weights divided among the ranks as ZeRO-3 does."""
    num_parameters = sum(p.numel() for p in scorer.parameters())
    config = base_config(dist.get_world_size(), 3, num_parameters)
    if dtype == "bfloat16":
        config["bf16"] = {"enabled": True}
    engine, *_ = deepspeed.initialize(model=scorer, config=config)
    engine.eval()
    return engine, lambda parameters: deepspeed.zero.GatheredParameters(list(parameters))


def decay_groups(policy: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups of what is trained: matrices decay, vectors (norms, biases) do not."""
    matrices: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    for parameter in filter(lambda each: each.requires_grad, policy.parameters()):
        # Under ZeRO-3 a partitioned parameter is empty; its true shape is in ds_shape.
        shape = getattr(parameter, "ds_shape", parameter.shape)
        (matrices if len(shape) >= 2 else vectors).append(parameter)
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]  # an adapter has no vectors


def drop_frozen(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """A hook that leaves what is not trained out of a module's state, under each of its names."""
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if not parameter.requires_grad:
            state.pop(prefix + name, None)


def _buckets(weights: list[Weight]) -> Iterator[list[Weight]]:
    bucket: list[Weight] = []
    size = 0
    for weight in weights:
        num_bytes = sum(math.prod(getattr(p, "ds_shape", p.shape)) * p.element_size() for p in weight.parameters)
        if bucket and size + num_bytes > GATHER_BYTES:
            yield bucket
            bucket, size = [], 0
        bucket.append(weight)
        size += num_bytes
    if bucket:
        yield bucket
