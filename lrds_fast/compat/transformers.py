"""Distillation in transformers' Trainer: label revision for classifiers and language models, data selection for
classifiers."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lrds_fast.files import replacing
from lrds_fast.nn import KDLoss
from lrds_fast.selection import SelectedDataset
from lrds_fast.selection.while_training import checked_epochs

try:
    from transformers import Trainer, TrainerCallback
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
except ImportError as error:
    raise ImportError(
        f"lrds_fast.compat.transformers needs transformers: pip install 'transformers[torch]' ({error})"
    ) from error


class LRDSTrainer(Trainer):
    """transformers' Trainer with KDLoss in place of the model's own loss.

    teacher: a model whose output has .logits. It is set to evaluation mode, gets no gradient, is no part of the
    checkpoints, and is moved to the device of the training. loss: default KDLoss(); reduction "mean". shift: whether
    logits are compared with the next label, None: where the student is one of transformers' causal language models.
    arguments: the Trainer's. Raises TypeError, ValueError.

    The loss is divided by the number of labels that it reads, over all micro-batches of a step and all processes.
    Labels are class indices, ignored where they are the loss's ignore_index. A batch may hold "selected", bool (B,) or
    of the labels' shape, as Selection.dataset adds it. The teacher is not wrapped for DeepSpeed or FSDP.
    """

    def __init__(
        self, *args: Any, teacher: nn.Module, loss: KDLoss | None = None, shift: bool | None = None, **arguments: Any
    ) -> None:
        self.kd = KDLoss() if loss is None else loss
        if self.kd.reduction != "mean":
            raise ValueError(f"loss must have reduction 'mean', which counts rows; got {self.kd.reduction!r}")
        super().__init__(*args, **arguments)
        self.teacher = teacher.eval().requires_grad_(False).to(self.args.device)
        causal = type(self.accelerator.unwrap_model(self.model)).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
        self.shift = causal if shift is None else shift
        # compute_loss divides by the labels of the whole step, so the Trainer must not divide again.
        self.loss_is_scaled_for_ga = self.model_accepts_loss_kwargs = True

    def _set_signature_columns_if_needed(self) -> None:
        """The columns that the Trainer keeps: those that the model takes, the labels, and "selected"."""
        super()._set_signature_columns_if_needed()
        if "selected" not in self._signature_columns:
            self._signature_columns.append("selected")

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor | None:
        """The labels that all micro-batches of a step read, divided by the processes, whose gradients are averaged."""
        if not all("labels" in batch for batch in batch_samples):
            return None
        count = torch.zeros((), dtype=torch.int64, device=device)
        for batch in batch_samples:
            labels = batch["labels"][..., 1:] if self.shift else batch["labels"]
            count += labels.ne(self.kd.ignore_index).sum().to(device)
        processes = self.accelerator.num_processes
        if processes > 1 and self.args.average_tokens_across_devices:
            total: Tensor = self.accelerator.gather(count).sum()
            count = total / processes
        return count

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """The distillation loss of a micro-batch, its share of the step's mean; with return_outputs (loss, outputs)."""
        inputs = dict(inputs)
        labels: Tensor = inputs.pop("labels")
        selected: Tensor | None = inputs.pop("selected", None)
        outputs = model(**inputs)
        with torch.no_grad():
            taught: Tensor = self.teacher(**inputs).logits
        logits: Tensor = outputs.logits
        if selected is not None and selected.dim() < labels.dim():
            selected = selected[:, None].expand(labels.shape)
        if self.shift:
            logits, taught, labels = logits[..., :-1, :], taught[..., :-1, :], labels[..., 1:]
            selected = None if selected is None else selected[..., 1:]
        loss = self.kd(logits, taught, labels, selected, num_valid=num_items_in_batch)
        return (loss, outputs) if return_outputs else loss


class UpdateSelection(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Calls selected.update(model) after the epochs in `after`.

    selected: the train_dataset. Its samples are dicts, so SelectedDataset needs
    batch=lambda samples: (samples["pixel_values"], samples["labels"]). after: numbers of finished epochs, each >= 1;
    nothing is updated after the last epoch of the training.
    The flags are in the Trainer's checkpoints, in selected.pt; a training that resumes without them raises
    FileNotFoundError. Raises ValueError, TypeError.
    """

    def __init__(self, selected: SelectedDataset, after: Collection[int]) -> None:
        self.selected, self.after = selected, checked_epochs(after)

    def _path(self, args: Any, state: Any) -> Path:
        return Path(args.output_dir) / f"checkpoint-{state.global_step}" / "selected.pt"

    def on_epoch_end(self, args: Any, state: Any, control: Any, **context: Any) -> None:
        epoch = round(state.epoch)
        if epoch in self.after and epoch < args.num_train_epochs:
            self.selected.update(context["model"])

    def on_save(self, args: Any, state: Any, control: Any, **context: Any) -> None:
        if state.is_world_process_zero:
            with replacing(self._path(args, state)) as name:
                torch.save(self.selected.state_dict(), name)

    def on_train_begin(self, args: Any, state: Any, control: Any, **context: Any) -> None:
        if state.global_step > 0:
            path = self._path(args, state)
            if not path.is_file():
                raise FileNotFoundError(
                    f"{path}, the samples' flags at step {state.global_step}, is missing: resume from a checkpoint in"
                    " output_dir that was written with this callback, or train without it"
                )
            self.selected.load_state_dict(torch.load(path, weights_only=True))
