"""The model card of an exported student: what it is, how it was trained, how good it is, how to load it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from lrds_fast.models.export import INPUT, ONNX, PROGRAM, WEIGHTS
from lrds_fast.models.student import Student
from lrds_fast.recipe.recipe import LossOptions, Recipe
from lrds_fast.report.runs import Run
from lrds_fast.train.checkpoint import Stored

#: What a licence that nobody has stated is called; Hugging Face knows it as a value of `license`.
UNKNOWN = "unknown"


def model_card(
    student: Student, run: Run, stored: Stored, differences: Mapping[str, float], licences: Mapping[str, str]
) -> str:
    """The card as Markdown, with a YAML head as Hugging Face reads it.

    stored: when the run stored the weights. differences: file name -> the largest difference of its logits from the
    network's, as a share of the largest. licences: of "weights", "data" and "teacher"; a missing one is unknown.
    """
    recipe = run.recipe
    record = next((record for record in run.records if record["epoch"] == stored.epoch), None)
    title = f"{student.description.model}, {_trained_by(recipe)} on {recipe.data.name}"
    parts = [
        _head(recipe, record, title, licences.get("weights", UNKNOWN)),
        f"# {title}",
        _facts(student, run, record),
        "## Numbers",
        _numbers(record, stored),
        "## How to load it",
        _loading(student, differences),
        "## Licences",
        _licences(recipe, licences),
    ]
    return "\n\n".join(parts) + "\n"


def _trained_by(recipe: Recipe) -> str:
    return f"distilled from {recipe.teacher.model}" if recipe.teacher.model else "trained on labels"


def _head(recipe: Recipe, record: Mapping[str, Any] | None, title: str, licence: str) -> str:
    tags = ["image-classification", *(["knowledge-distillation"] if recipe.teacher.model else [])]
    lines = [
        "---",
        f"license: {json.dumps(licence)}",
        "library_name: lrds-fast",
        "pipeline_tag: image-classification",
        f"tags: {json.dumps(tags)}",
        f"datasets: {json.dumps([recipe.data.name])}",
    ]
    if record is not None:
        lines += [
            "model-index:",
            f"- name: {json.dumps(title)}",
            "  results:",
            "  - task: {type: image-classification}",
            f"    dataset: {{type: {json.dumps(recipe.data.name)}, name: {json.dumps(recipe.data.name)}, split: test}}",
            f"    metrics: [{{type: accuracy, value: {json.dumps(record['test_acc'])}}}]",
        ]
    return "\n".join([*lines, "---"])


def _facts(student: Student, run: Run, record: Mapping[str, Any] | None) -> str:
    recipe, description = run.recipe, student.description
    size = " x ".join(map(str, description.input_size))
    parameters = sum(parameter.numel() for parameter in student.parameters())
    rows = {
        "network": f"`{description.model}`, {parameters:,} parameters, input {size} (channels, height, width)",
        "data": f"{recipe.data.name}, {run.last['rows']:,} training samples, {len(description.class_names)} classes",
        "teacher": f"`{recipe.teacher.model}`" if recipe.teacher.model else "none",
        "method": "; ".join(_method(recipe, record)),
        "training": f"{recipe.schedule.epochs} epochs, batch size {recipe.data.batch_size}, {recipe.optimizer.name}"
        f" with learning rate {recipe.optimizer.lr:g} ({recipe.schedule.name}), weight decay"
        f" {recipe.optimizer.weight_decay:g}, seed {recipe.seed}",
        "input": _input(student),
        "made with": ", ".join(f"{key} {value}" for key, value in _made(run).items()),
    }
    lines = ["| | |", "|---|---|"]
    lines += [f"| {key} | {value.replace('|', chr(92) + '|')} |" for key, value in rows.items() if value]
    return "\n".join(
        [*lines, "", "`recipe.json` has every value of the recipe, `student.json` the classes and the input."]
    )


def _made(run: Run) -> dict[str, str]:
    made = run.summary.get("made", {})
    return {key: made[key] for key in ("lrds-fast", "torch", "processor", "device") if key in made}


def _input(student: Student) -> str:
    transform = student.description.transform
    if transform is None:
        return ""
    kind = "RGB" if transform.channels == 3 else "grey"
    scaled, cut = (" x ".join(map(str, size)) for size in (transform.resize, transform.crop))
    return (
        f"{kind}, scaled to cover {scaled} pixels (bilinear, antialiased), the centre of {cut}, then (level / 255 -"
        f" mean) / std with mean {list(transform.mean)} and std {list(transform.std)}"
    )


def _method(recipe: Recipe, record: Mapping[str, Any] | None) -> list[str]:
    loss = recipe.loss
    smoothing = [f"label smoothing {loss.label_smoothing:g}"] if loss.label_smoothing else []
    if not recipe.teacher.model:
        return ["cross-entropy with the labels", *smoothing]
    parts = [_loss(loss), *smoothing]
    if loss.revise != "none":
        at = "that of the divergence" if loss.revise_temperature is None else f"{loss.revise_temperature:g}"
        parts.append(f"label revision `{loss.revise}` with eta {loss.eta:g} at temperature {at}")
    if recipe.selection.path or recipe.selection.after:
        kept = "" if record is None else f": {record['n_selected']:,} of {record['rows']:,} samples had the teacher"
        parts.append(f"data selection{kept}")
    if recipe.features.method:
        parts.append(f"feature loss `{recipe.features.method}`")
    if recipe.run.ema_decay:
        parts.append(f"moving average of the weights, decay {recipe.run.ema_decay:g}")
    return parts


def _loss(loss: LossOptions) -> str:
    name = f"divergence `{loss.divergence}`" if loss.method == "kd" else f"loss `{loss.method}`"
    temperature = ", ".join(f"{value:g}" for value in loss.temperatures or (loss.temperature,))
    standardized = " of standardized logits" if loss.standardize else ""
    end = "" if loss.ce_weight_end is None else f", at the end {loss.ce_weight_end:g}"
    return (
        f"{name}{standardized} at T = {temperature}, weight {loss.kd_weight:g}; cross-entropy, weight"
        f" {loss.ce_weight:g}{end}"
    )


def _numbers(record: Mapping[str, Any] | None, stored: Stored) -> str:
    if record is None:
        return "The weights were stored within an epoch, and were not evaluated. `lrds-fast eval` evaluates them."
    lines = ["| split | accuracy % | negative log-likelihood | expected calibration error |", "|---|---:|---:|---:|"]
    for split in ("test", "val"):
        if f"{split}_acc" in record:
            values = (record.get(f"{split}_{key}") for key in ("acc", "ce", "ece"))
            accuracy, nll, ece = ("-" if value is None else value for value in values)
            lines.append(f"| {split} | {_number(accuracy, 100, 2)} | {_number(nll, 1, 4)} | {_number(ece, 1, 4)} |")
    chosen = {
        "": f"After epoch {stored.epoch}.",
        "val_acc": f"After epoch {stored.epoch}, which has the best accuracy on held-out samples.",
        "test_acc": f"After epoch {stored.epoch}, which was chosen on the test split: its test accuracy is too high.",
    }[stored.chosen_by]
    return "\n".join([chosen, "", *lines])


def _number(value: Any, scale: float, digits: int) -> str:
    return value if isinstance(value, str) else f"{scale * value:.{digits}f}"


def _loading(student: Student, differences: Mapping[str, float]) -> str:
    size = ", ".join(map(str, student.description.input_size))
    images = f"images of shape (N, {size}), float32, normalised as above"
    parts = [
        f"With lrds-fast (`{WEIGHTS}`):",
        "```python\nimport lrds_fast\n\nstudent = lrds_fast.models.load(FOLDER)        # eval mode, on the CPU\n"
        'image = student.transform("picture.png")      # a tensor of the shape that the network takes\n'
        "name = student.class_names[int(student(image[None]).argmax())]\n```",
    ]
    if PROGRAM in differences:
        parts += [
            f"With torch alone (`{PROGRAM}`), for {images}:",
            f'```python\nimport torch\n\nlogits = torch.export.load("{PROGRAM}").module()(images)\n```',
        ]
    if ONNX in differences:
        parts += [
            f"With ONNX Runtime (`{ONNX}`), for the same images as a NumPy array:",
            "```python\nimport onnxruntime\n\n"
            f'(logits,) = onnxruntime.InferenceSession("{ONNX}").run(None, {{"{INPUT}": images}})\n```',
        ]
    checked = "; ".join(
        f"`{name}`: " + (f"largest difference {difference:.1e} of the largest logit" if difference else "equal logits")
        for name, difference in differences.items()
    )
    parts.append(f"Every file was read again and compared with the network: {checked}. N may be any number.")
    return "\n\n".join(parts)


def _licences(recipe: Recipe, licences: Mapping[str, str]) -> str:
    rows = {"these weights": "weights", f"the data, {recipe.data.name}": "data"}
    if recipe.teacher.model:
        rows[f"the teacher's weights, {recipe.teacher.model}"] = "teacher"
    lines = ["| of | licence |", "|---|---|", *(f"| {of} | {licences.get(key, UNKNOWN)} |" for of, key in rows.items())]
    return "\n".join([*lines, "", "The licences of the data and of the teacher may limit the use of these weights."])
