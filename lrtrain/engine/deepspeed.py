"""DeepSpeed's ZeRO (Rajbhandari et al., 2020, arXiv 1910.02054), sharding by ranges of entries.

DeepSpeed gathers parameters, reduces gradients and keeps this process's range of the float32 parameters in one flat
tensor. lrtrain's optimizer steps that tensor, through `FlatShard`s, which are views of it.
"""

from collections.abc import Callable
from typing import Any, Literal

import hydra
import torch
from pydantic import NonNegativeInt
from torch import Tensor, nn
from transformers import PreTrainedModel

from lrtrain.config.dtypes import Dtype, compute_dtype
from lrtrain.config.schema import Config
from lrtrain.distributed.flat_shard import FlatShard
from lrtrain.distributed.sharding import local, take_over, twin, whole
from lrtrain.distributed.world import World
from lrtrain.engine.base import Engine, Spread
from lrtrain.engine.zero_state import allocate, flat_gradients, flat_ranges, import_deepspeed, refresh
from lrtrain.errors import ConfigError
from lrtrain.layers.base import FactorizedLinear
from lrtrain.model.init import fill
from lrtrain.model.structure import blocks, factorized_layers


class DeepSpeedEngine(Engine):
    """ZeRO over all processes.

    Args:
        zero_stage: 1, 2 or 3.
        offload_optimizer, offload_parameters: keep these in host memory.
        persist_below: parameters with fewer entries are not sharded in stage 3.
        reduce_dtype: dtype in which gradients are reduced, fp32 or bf16.
    """

    def __init__(
        self,
        world: World,
        dtype: torch.dtype,
        compile: bool,
        recompute_every: int,
        recompute_keep: str,
        zero_stage: Literal[1, 2, 3],
        offload_optimizer: bool,
        offload_parameters: bool,
        persist_below: NonNegativeInt,
        reduce_dtype: Dtype,
    ):
        super().__init__(world, dtype, compile, recompute_every, recompute_keep)
        self.stage = zero_stage
        host = {"device": "cpu", "pin_memory": world.device.type == "cuda"}
        zero = {
            "stage": zero_stage,
            "overlap_comm": world.device.type == "cuda",
            "memory_efficient_linear": False,  # it would replace torch's linear in the whole process
            "stage3_param_persistence_threshold": persist_below,
            "stage3_gather_16bit_weights_on_model_save": False,
        }
        self.settings: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 1,  # required by DeepSpeed, but without effect here
            "gradient_accumulation_steps": 1,  # `forward_backward` decides where a step ends
            "gradient_clipping": 0.0,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "zero_optimization": zero
            | ({"offload_optimizer": host} if offload_optimizer else {})
            | ({"offload_param": host} if offload_parameters else {}),
            "communication_data_type": reduce_dtype,
            "data_types": {"grad_accum_dtype": "fp32"},
            "bf16": {"enabled": dtype == torch.bfloat16},
            "steps_per_print": None,
        }

    @classmethod
    def check(cls, config: Config, world_size: int) -> None:
        engine, optim, dtype = config.engine, config.optim, config.train.dtype
        if engine["offload_parameters"] and engine["zero_stage"] != 3:
            raise ConfigError(
                f"engine.offload_parameters=true is for engine.zero_stage=3, not {engine['zero_stage']}, which keeps "
                f"whole parameters"
            )
        optimizer = hydra.utils.get_object(optim["_target_"])
        if isinstance(optimizer, type) and not optimizer.steps_ranges(optim):  # pyright: ignore
            raise ConfigError(
                f"optim={optim['name']} needs whole rows of matrices, but engine=deepspeed shards by entries; use "
                f"engine=fsdp or engine=ddp, or optim=adamw"
            )
        if optim["in_backward"]:
            raise ConfigError(
                "optim.in_backward=true steps before engine=deepspeed has summed the gradients; use engine=fsdp"
            )
        if dtype == "bf16_sr":
            raise ConfigError(
                "train.dtype=bf16_sr keeps no float32 parameters, which engine=deepspeed always does; use "
                "train.dtype=bf16 or engine=fsdp"
            )
        bf16 = compute_dtype(config, torch.device("cuda" if torch.cuda.is_available() else "cpu")) == torch.bfloat16
        if bf16 and engine["zero_stage"] == 1:
            raise ConfigError(f"engine.zero_stage=1 does not support train.dtype={dtype}; use engine.zero_stage=2")
        param = config.param["_target_"] and hydra.utils.get_object(config.param["_target_"])
        if bf16 and "frozen" in getattr(param, "roles", {}).values():
            raise ConfigError(
                f"param={config.param['name']} has frozen parameters, which engine=deepspeed keeps only in bfloat16 "
                f"with train.dtype={dtype}; use train.dtype=fp32 or engine=fsdp"
            )

    @classmethod
    def check_model(cls, config: Config, model: nn.Module) -> None:
        super().check_model(config, model)
        if config.engine["zero_stage"] != 3:
            return
        for name, p in model.named_parameters():
            if not p.numel():
                raise ConfigError(
                    f"{name} of shape {'×'.join(map(str, p.shape))} has no entries, which engine.zero_stage=3 cannot "
                    f"gather; use engine.zero_stage=2 or engine=fsdp"
                )

    @classmethod
    def spread(cls, config: Config, world_size: int) -> Spread:
        stage = config.engine["zero_stage"]
        return Spread(world_size if stage == 3 else 1, world_size if stage > 1 else 1, world_size, masters=True)

    # --- the model ---------------------------------------------------------------------------------------------------

    def _distribute(self, model: PreTrainedModel, seed: int, fresh: bool) -> PreTrainedModel:
        deepspeed = import_deepspeed(self.world)
        buffers = allocate(model, self.world.device, self.dtype, deepspeed, self.settings if self.stage == 3 else None)
        if self.stage == 3:
            for unit in (*blocks(model), *self.loss.heads(), *factorized_layers(model).values()):
                deepspeed.utils.set_z3_leaf_module(unit, True)  # gathered as one
        trained = [p for p in model.parameters() if p.requires_grad]
        bare = twin(model, lambda p: p)  # DeepSpeed adds attributes and hooks to modules
        self.deepspeed, self.zero, *_ = deepspeed.initialize(
            model=self.loss,
            optimizer=Stepper(trained, self._step_flat),
            config=self.settings,
            dist_init_required=False,
        )
        for module, kept in buffers.items():  # DeepSpeed would cast buffers to bfloat16 too
            module._buffers.update(kept)
        self.flat_ranges = flat_ranges(self.zero, model, self.stage, self.world.device)
        self.flat = {p: place.shard() for p, place in self.flat_ranges.items()}
        shards = twin(bare, lambda p: self.flat.get(p, p))  # p itself if it is not sharded
        fill(shards, seed, fresh)
        refresh(self.zero, self.stage)
        return shards

    def _publish(self) -> None:
        refresh(self.zero, self.stage)

    # --- a step ----------------------------------------------------------------------------------------------------

    def forward_backward(self, rows: Tensor, tokens: int, last: bool = True) -> Tensor:
        self.deepspeed.set_gradient_accumulation_boundary(last)
        losses = self.deepspeed(rows.to(self.world.device, non_blocking=True))
        self.deepspeed.backward(losses[0] * (self.world.size / tokens), scale_wrt_gas=False)  # DeepSpeed averages
        if last:
            for p, gradient in flat_gradients(self.zero, self.flat_ranges, self.stage):
                self.flat[p].grad = gradient
        return losses.detach()

    def _update(self, finite: bool) -> None:
        self.optimizer.zero_grad()  # DeepSpeed has the gradients
        self.finite = finite
        self.deepspeed.step()

    def _step_flat(self, flat: Tensor) -> None:
        """The optimizer's step on a flat float32 tensor, which has its gradient now.

        No step if the gradient is not finite: DeepSpeed then copies the same parameters back."""
        if not self.finite:
            return
        for p, place in self.flat_ranges.items():
            if place.flat is flat:
                self.flat[p].grad = place.gradient()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _add_penalties(self) -> None:
        for layer in self.layers:
            if layer.penalized:
                complete = gathered_layer(layer)
                for p in complete.parameters():
                    p.grad = torch.zeros_like(p)
                complete.add_penalty()
                for shard, p in zip(layer.parameters(), complete.parameters(), strict=True):
                    if isinstance(shard.grad, FlatShard) and p.grad is not None:
                        local(shard.grad).add_(shard.grad.cut(p.grad))

    @torch.no_grad()
    def _after_step(self) -> None:
        for layer in self.layers:
            if layer.constrained:
                complete = gathered_layer(layer)
                complete.after_step()
                take_over(layer, dict(complete.named_parameters()))
        if any(layer.constrained for layer in self.layers):
            self._publish()


class Stepper(torch.optim.Optimizer):
    """The optimizer that DeepSpeed sees: calls `step` with each flat tensor."""

    def __init__(self, parameters: list[nn.Parameter], step: Callable[[Tensor], None]):
        super().__init__(parameters, {"lr": 0.0})
        self.step_flat = step

    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            for flat in group["params"]:
                self.step_flat(flat)


def gathered_layer(layer: FactorizedLinear) -> FactorizedLinear:
    """A twin of the layer with unsharded parameters on every process; a collective."""
    return twin(layer, lambda p: whole(p).clone())
