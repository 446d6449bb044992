"""Distillation in transformers' Trainer: label revision for classifiers and language models, data selection for
classifiers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lrds_fast.files import replacing
from lrds_fast.nn import KDLoss
from lrds_fast.selection.while_training import UpdatesAfterEpochs

try:
    from transformers import Trainer, TrainerCallback
    from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
except ImportError as error:
    raise ImportError(
        f"lrds_fast.compat.transformers needs transformers: pip install 'transformers[torch]' ({error})"
    ) from error


class LRDSTrainer(Trainer):
    """transformers' Trainer with KDLoss in place of the model's own loss.

    teacher: a model whose output has .logits. It is set to evaluation mode, gets no gradient, is no part of the
    checkpoints, and is moved to the device of the training. loss: default KDLoss(); reduction "mean". shift: whether
    logits are compared with the next label, None: where the student's own loss does so, as those of causal language
    models, also with LoRA. arguments: the Trainer's. Raises TypeError, ValueError.

    The loss is divided by the number of labels that it reads, over all micro-batches of a step and all processes; the
    cross-entropies by the sum of their class weights, if the loss has class_weight.
    Labels are class indices, ignored where they are the loss's ignore_index, or for classifiers probabilities (B, C). A
    batch may hold "selected", bool (B,) or of the labels' shape, as Selection.dataset adds it. Encoder-decoders get
    decoder_input_ids from the labels, as their own loss has them. The teacher is not wrapped for DeepSpeed or FSDP.
    """

    def __init__(
        self, *args: Any, teacher: nn.Module, loss: KDLoss | None = None, shift: bool | None = None, **arguments: Any
    ) -> None:
        self.kd = KDLoss() if loss is None else loss
        if self.kd.reduction != "mean":
            raise ValueError(f"loss must have reduction 'mean', which counts rows; got {self.kd.reduction!r}")
        super().__init__(*args, **arguments)
        if self.compute_loss_func is not None or self.args.label_smoothing_factor:
            raise ValueError(
                "LRDSTrainer computes the loss by `loss` alone: leave out compute_loss_func and label_smoothing_factor;"
                " loss=KDLoss(label_smoothing=...) smooths the labels"
            )
        self.teacher = teacher.eval().requires_grad_(False).to(self.args.device)
        self.kd.to(self.args.device)
        student = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        self._student = student.get_base_model() if hasattr(student, "get_base_model") else student
        self._config = getattr(self._student, "config", None)
        if getattr(self._config, "problem_type", None) == "multi_label_classification":
            raise ValueError(
                "the student's config.problem_type is 'multi_label_classification', whose classes do not exclude each"
                " other; LRDSTrainer distils softmax(logits): set problem_type to 'single_label_classification'"
            )
        self.shift = self._shifts_labels() if shift is None else shift
        self._weight_sum: Tensor | None = None
        # compute_loss divides by the labels of the whole step, so the Trainer must not divide again.
        self.loss_is_scaled_for_ga = self.model_accepts_loss_kwargs = True

    def _set_signature_columns_if_needed(self) -> None:
        """The columns that the Trainer keeps: those that the model takes, the labels, and "selected"."""
        super()._set_signature_columns_if_needed()
        if "selected" not in self._signature_columns:
            self._signature_columns.append("selected")

    def _shifts_labels(self) -> bool:
        """Whether the student's own loss compares its logits with the next label."""
        if getattr(self._config, "is_encoder_decoder", False):
            return False
        if LOSS_MAPPING.get(getattr(self._student, "loss_type", None)) is ForCausalLMLoss:
            return True
        names = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
        return any(base.__name__ in names for base in type(self._student).__mro__)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor | None:
        """The labels that all micro-batches of a step read, divided by the processes, whose gradients are averaged."""
        if not all("labels" in batch for batch in batch_samples):
            return None
        # float32 would round counts above 2^24.
        count = torch.zeros((), dtype=torch.int64, device=device)
        weights = torch.zeros((), device=device)
        for batch in batch_samples:
            labels = batch["labels"][..., 1:] if self.shift else batch["labels"]
            if labels.is_floating_point():
                count += len(labels)
                continue
            valid = labels.ne(self.kd.ignore_index)
            count += valid.sum().to(device)
            if self.kd.class_weight is not None:
                weights += self.kd.class_weight.to(labels.device)[labels[valid]].sum().to(device)
        processes = self.accelerator.num_processes
        if processes > 1 and self.args.average_tokens_across_devices:
            count = self.accelerator.gather(count).sum() / processes
            weights = self.accelerator.gather(weights).sum() / processes
        self._weight_sum = None if self.kd.class_weight is None else weights
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
        given = inputs.keys() & {"decoder_input_ids", "decoder_inputs_embeds"}
        if getattr(self._config, "is_encoder_decoder", False) and not given:
            inputs["decoder_input_ids"] = self._student.prepare_decoder_input_ids_from_labels(labels=labels)
        outputs = model(**inputs)
        with torch.no_grad():
            taught: Tensor = self.teacher(**inputs).logits
        logits: Tensor = outputs.logits
        if selected is not None and selected.dim() < labels.dim() and not labels.is_floating_point():
            selected = selected[:, None].expand(labels.shape)
        if self.shift:
            logits, taught, labels = logits[..., :-1, :], taught[..., :-1, :], labels[..., 1:]
            selected = None if selected is None else selected[..., 1:]
        weight_sum = None if num_items_in_batch is None else self._weight_sum
        loss = self.kd(logits, taught, labels, selected, num_valid=num_items_in_batch, weight_sum=weight_sum)
        return (loss, outputs) if return_outputs else loss


class UpdateSelection(UpdatesAfterEpochs, TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Calls selected.update(model) after the epochs in `after`.

    selected: the train_dataset. Its samples are dicts, so SelectedDataset needs
    batch=lambda samples: (samples["pixel_values"], samples["labels"]). after: numbers of finished epochs, each >= 1;
    nothing is updated after the last epoch of the training. If a training resumes from a checkpoint of an epoch's last
    step, the epoch's update comes when the next epoch starts.
    The flags are in the Trainer's checkpoints, in selected.pt; a training that resumes without them raises
    FileNotFoundError. Raises ValueError, TypeError.
    """

    def _path(self, args: Any, state: Any) -> Path:
        return Path(args.output_dir) / f"checkpoint-{state.global_step}" / "selected.pt"

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **context: Any) -> None:
        self.update_if_due(int(state.epoch + 1e-6), context["model"])  # resumed within an epoch, it has a fraction

    def on_epoch_end(self, args: Any, state: Any, control: Any, **context: Any) -> None:
        if state.global_step < state.max_steps:
            self.update_if_due(round(state.epoch), context["model"])

    def on_save(self, args: Any, state: Any, control: Any, **context: Any) -> None:
        if state.is_world_process_zero:
            with replacing(self._path(args, state)) as name:
                torch.save(self.state_dict(), name)

    def on_train_begin(self, args: Any, state: Any, control: Any, **context: Any) -> None:
        if state.global_step > 0:
            path = self._path(args, state)
            if not path.is_file():
                raise FileNotFoundError(
                    f"{path}, the samples' flags at step {state.global_step}, is missing: resume from a checkpoint in"
                    " output_dir that was written with this callback, or train without it"
                )
            self.load_state_dict(torch.load(path, weights_only=True))
