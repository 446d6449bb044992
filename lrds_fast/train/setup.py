"""PyTorch objects from a recipe's options: precision, optimizer, learning rate, loss arguments."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import math
import platform
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lrds_fast.nn import KDLoss
from lrds_fast.notes import note
from lrds_fast.recipe.recipe import LossOptions, OptimizerOptions, Recipe, ScheduleOptions
from lrds_fast.reference import default_ce_weight_unselected


def lr_factor(schedule: ScheduleOptions, epoch: float) -> float:
    """The learning rate at `epoch` (fractions count) as a multiple of the base rate."""
    if epoch < schedule.warmup_epochs:
        return (epoch + 1e-3) / schedule.warmup_epochs
    if schedule.name == "cosine":
        progress = (epoch - schedule.warmup_epochs) / max(schedule.epochs - schedule.warmup_epochs, 1e-9)
        return 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))
    if schedule.name == "step":
        return schedule.gamma ** sum(epoch >= milestone for milestone in schedule.milestones)
    if schedule.name == "exponential":
        return schedule.gamma ** math.floor(epoch / schedule.decay_epochs + 1e-9)
    return 1.0


def build_optimizer(options: OptimizerOptions, model: nn.Module) -> torch.optim.Optimizer:
    """The recipe's optimizer for all parameters of the model; ImportError for timm's without timm."""
    if options.name in ("rmsprop", "lamb"):
        try:
            optim: Any = importlib.import_module("timm.optim")
        except ImportError as error:
            raise ImportError(f"optimizer.name {options.name!r} needs timm: pip install timm ({error})") from error
        optimizer: torch.optim.Optimizer = (
            optim.Lamb(model.parameters(), lr=options.lr, weight_decay=options.weight_decay)
            if options.name == "lamb"
            else optim.RMSpropTF(
                model.parameters(),
                lr=options.lr,
                alpha=0.9,
                eps=1e-3,
                momentum=options.momentum,
                weight_decay=options.weight_decay,
            )
        )
        return optimizer
    if options.name == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=options.lr, weight_decay=options.weight_decay, fused=True)
    return torch.optim.SGD(
        model.parameters(),
        lr=options.lr,
        momentum=options.momentum,
        nesterov=options.nesterov,
        weight_decay=options.weight_decay,
        # One kernel for all parameters: 12.0 -> 5.2 ms for ResNet-18's on a CPU core.
        fused=True,
    )


def moving_average(model: nn.Module, decay: float) -> AveragedModel | None:
    """The exponential moving average of parameters and buffers; None for decay 0."""
    if decay == 0:
        return None
    average: Any = get_ema_multi_avg_fn
    return AveragedModel(model, multi_avg_fn=average(decay), use_buffers=True)


def available_amp(amp: str, device: torch.device, *, emulated: bool = False) -> str:
    """`amp`, or "off" with a note on a CPU without instructions for the 16-bit type.

    Without them PyTorch's convolutions are about ten times slower in 16 bits than in float32. emulated: always `amp`.
    """
    if amp == "off" or emulated or device.type != "cpu" or _computes(amp):
        return amp
    _note_fall_back(amp)
    return "off"


def _computes(amp: str) -> bool:
    """Whether this CPU has instructions for products of bfloat16 or float16."""
    if not torch._C._has_mkldnn:
        return False
    if amp == "bf16" and platform.machine() in ("x86_64", "AMD64"):
        # oneDNN also reports support on AVX-512 CPUs without these instructions.
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    supported: Any = getattr(torch.ops.mkldnn, f"_is_mkldnn_{amp}_supported")
    return bool(supported())


@functools.cache
def _note_fall_back(amp: str) -> None:
    needs = "AVX512_BF16 or AMX" if amp == "bf16" else "AVX512_FP16"
    note(
        f"this CPU has no instructions for run.amp={amp} ({needs}): computing in float32, which is faster;"
        f" to compute in {amp} anyway, set run.amp_emulated=true"
    )


def autocast_factory(amp: str, device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    """A function that returns a new autocast context; for amp "off" the context does nothing."""
    if amp == "off":
        return nullcontext
    dtype = torch.bfloat16 if amp == "bf16" else torch.float16
    return lambda: torch.autocast(device.type, dtype=dtype)


def in_epoch(options: LossOptions, epoch: int | None, epochs: int) -> LossOptions:
    """The options with the weights that hold in `epoch`, counted from 0, of a training of `epochs` epochs.

    epoch None stands for the end of the training. With ce_weight_end the cross-entropy's weight is
    ce_weight * (ce_weight_end / ce_weight)^t, where t = (epoch + 0.5) / epochs, and 1 at the end. ce_weight_unselected
    becomes a number that neither ce_weight_end nor kd_warmup_epochs changes.
    """
    ce_weight = options.ce_weight
    if options.ce_weight_end is not None:
        ce_weight *= (options.ce_weight_end / ce_weight) ** (1.0 if epoch is None else (epoch + 0.5) / epochs)
    return dataclasses.replace(
        options,
        ce_weight=ce_weight,
        ce_weight_end=None,
        kd_weight=options.kd_weight * (1.0 if epoch is None else kd_factor(options, epoch)),
        ce_weight_unselected=ce_weight_unselected(options),
    )


def kd_factor(options: LossOptions, epoch: int) -> float:
    """The factor of kd_weight in `epoch`, counted from 0: below 1 while it warms up."""
    return min((epoch + 1) / options.kd_warmup_epochs, 1.0) if options.kd_warmup_epochs else 1.0


def ce_weight_unselected(options: LossOptions) -> float:
    """The cross-entropy weight of samples without teacher. Its default depends on ce_weight and on the full kd_weight,
    also while they change."""
    weight = options.ce_weight_unselected
    return default_ce_weight_unselected(options.ce_weight, options.kd_weight) if weight is None else weight


def resolved(recipe: Recipe) -> Recipe:
    """The recipe with computed defaults as numbers, so that a run's files stay right if a default changes."""
    return recipe.with_values(**{"loss.ce_weight_unselected": ce_weight_unselected(recipe.loss)})


def scored_loss(recipe: Recipe, epoch: int | None = None) -> KDLoss:
    """The loss by which influence scores samples: kd_loss with the weights that hold in `epoch`, counted from 0; None
    stands for the end of the training.

    For loss.method "dist", "mlkd" and "revision" it is kd_loss with their weights, temperature and revision: these
    losses compare rows with each other, so that one sample's teacher contributes no separate term.
    """
    return KDLoss(**loss_arguments(in_epoch(recipe.loss, epoch, recipe.schedule.epochs)))


def loss_arguments(options: LossOptions) -> dict[str, Any]:
    """Keywords for lrds_fast.kd_loss, kd_loss_parts and KDLoss."""
    return {
        "temperature": options.temperatures or options.temperature,
        "ce_weight": options.ce_weight,
        "kd_weight": options.kd_weight,
        "ce_weight_unselected": ce_weight_unselected(options),
        "revise": options.revise,
        "eta": options.eta,
        "revise_temperature": options.revise_temperature,
        "label_smoothing": options.label_smoothing,
        "divergence": options.chosen_divergence(),
        "standardize": options.standardize,
    }
