"""influence.score: scores of a classifier's training samples from its models and its data."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lrds_fast._version import __version__
from lrds_fast.influence.adapters import BatchHook, LogitsHook, evaluation_mode
from lrds_fast.influence.batches import BatchReader, Data, ReadOptions
from lrds_fast.influence.factors import Factors, fingerprint, tensors_fingerprint
from lrds_fast.influence.head import score_head
from lrds_fast.influence.inputs import check_folds, check_selected
from lrds_fast.influence.layers import layer_names
from lrds_fast.influence.objective import TrainingObjective
from lrds_fast.influence.options import FOLDS, HELD_OUT, CurvatureOptions, ScoreOptions
from lrds_fast.influence.scores import Scores
from lrds_fast.influence.shards import Shards, load_scores
from lrds_fast.influence.task import ScoreTask, teacher_logits
from lrds_fast.influence.whole import score_layers
from lrds_fast.nn import KDLoss
from lrds_fast.ranks import Ranks


def score(
    student: nn.Module,
    teacher: nn.Module | Tensor,
    train_data: Data,
    val_data: Data | None = None,
    *,
    layers: str | Sequence[str] = "last",
    scores: str | Sequence[str] = ("teacher_harm", "kd_gain"),
    curvature: str = "ekfac",
    damping: float | None = None,
    damping_scale: float = 0.1,
    hessian: str = "objective",
    folds: int | None = None,
    labels: int | str = 1,
    selected: Tensor | None = None,
    loss: KDLoss | None = None,
    factors: Factors | None = None,
    batch_size: int = 256,
    batch: BatchHook | None = None,
    logits: LogitsHook | None = None,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: bool | None = None,
) -> Scores:
    """Scores every sample by what its teacher does to the student's layers. LOWER = keep the teacher.

    layers="last" is last_layer_scores from the models and the data: one forward pass of each model, then the closed
    form. Over more layers, kd_gain and teacher_harm cost one forward-mode pass (a JVP) per batch and no per-sample
    gradient: -(ddelta_i . dz_i), dz_i the change of sample i's logits when the parameters move by H^-1 g_val.
    self_influence, param_shift and grand add up over the layers.

    student, teacher: from inputs (B, ...) to logits (B, C); both are put into eval mode and restored. The device of the
    student's parameters is where everything runs. teacher may instead be the teacher's logits, (N, C) floating, in the
    order of train_data. train_data, val_data: a Dataset of (input, target, ...) samples (or a list of them), read in
    order in batches of batch_size, or an iterable of such batches (a DataLoader without shuffling); targets are
    integers in [0, C). val_data, held out of the training set and never the test set, is needed by kd_gain,
    teacher_harm and kd_gain_ns. Data are read up to three times (four for mismatch over more layers than the last) and
    must give exactly the same tensors each time: pass them with the evaluation transform, never with random
    augmentation. To check this, the first 16 samples of a dataset, or the first batch of other data, are read twice
    (with `out` once more); ValueError if they differ. batch: a function from a loader's batch to (inputs, targets),
    needed unless batches are (inputs, targets, ...): batch=lambda b: (b["pixel_values"], b["labels"]). logits: a
    function from a model's output to its logits (B, C), for student and teacher alike: logits=lambda out: out[0]. None:
    a tensor, or the `logits` of an object that has them.
    layers: "last" (the last nn.Linear, whose output must be the logits), "all" with trainable parameters, or a list of
    module names. Linear, Conv (groups, dilation, any padding), Embedding and normalisation layers; ValueError naming
    any other.
    scores: the names of last_layer_scores; kd_gain_ns with layers="last" only. curvature: "identity", "kfac", "ekfac",
    a block per layer; "exact": over more layers than the last, for kd_gain and teacher_harm, conjugate gradients on the
    Gauss-Newton matrix of all layers together, which EK-FAC preconditions. Each step reads the training set once;
    RuntimeError where 500 do not suffice. labels: how H sees the model's own labels: a number of draws per sample (seed
    0), or "all" (exact, C backward passes a batch); the last layer has them all, in closed form.
    damping: >= 0, added to every eigenvalue; None: damping_scale times each layer's mean eigenvalue, which is an error
    where the curvature is zero up to rounding (a student that has memorised its training set).
    hessian, selected, loss: as in last_layer_scores; selected (N,) in the order of train_data.
    folds: as in last_layer_scores, for standard errors; None: 10 for the last layer, 0 for more layers,
    where each part costs a JVP per batch.
    factors: from Factors.fit or .load for this student, instead of fitting them here; they determine layers, curvature,
    damping, damping_scale, hessian and labels.
    out: a folder for the scores, one Parquet file per shard of the data (load_scores and any Parquet reader take it as
    one table). resume=True goes on with a run that was killed, to the same result. ValueError for a run of other
    models, options or data; data are compared by their counts, their first samples and, for a TensorDataset or a list
    of batches, all targets. Without `out` the last layer's rows, d + 2 C numbers a sample, are held in memory; with it
    they are on disk while needed.
    progress: bars with the time left; None: where stderr is a terminal.

    Under torchrun (an initialised torch.distributed) every process makes this call: the data's batches are divided
    among them, the factors are summed over all, and every process gets all scores. All processes must see the folder
    `out`.

    Returns Scores on the CPU, float32 (float64 for a float64 student). Raises ValueError or TypeError naming the
    argument, the layer, or the sample whose gradient or score is not finite.
    """
    head = layers == "last" and factors is None
    parameter = next(student.parameters())
    options = ScoreOptions(
        CurvatureOptions(curvature, damping, damping_scale, labels),
        TrainingObjective.of(loss, hessian),
        selected,
        torch.float64 if parameter.dtype == torch.float64 else torch.float32,
        scores,
        check_folds(folds, FOLDS if head else 0),
    )
    layer_list = layer_names(student, layers) if factors is None else factors.layers_of(student, layers)
    _check_supported(options, head, val_data is not None)
    ranks = Ranks.current()
    read = ReadOptions(batch_size, batch, logits, progress if ranks.first else False)
    train = read.reader(train_data, parameter, name="train_data")
    held_out = None if val_data is None else read.reader(val_data, parameter, name="val_data")
    check_selected(selected, train.samples)
    meta = _meta(options, layer_list, head, factors)
    facts = _facts(options, meta, student, teacher, train, held_out, factors)
    if out is not None:
        facts |= ranks.agree(_data_facts(train, held_out) if ranks.first else {})
    shards = Shards(out, facts, resume=resume, batches=train.count, ranks=ranks)
    if shards.complete and out is not None:
        return load_scores(out)
    teacher_of = teacher_logits(teacher, read, train)
    with evaluation_mode(*(model for model in (student, teacher) if isinstance(model, nn.Module))):
        if not head:
            options = options.normalised(ranks, train.targets(ranks))
        task = ScoreTask(read.classifier(student, "student"), teacher_of, layer_list, train, held_out, shards, options)
        more = score_head(task) if head else score_layers(task, factors)
    samples = more["num_samples"]
    assert isinstance(samples, int)
    check_selected(selected, samples)
    return shards.finish({**meta, **more})


def _check_supported(options: ScoreOptions, head: bool, held_out: bool) -> None:
    """ValueError for scores and curvatures of the last layer alone, and for kd_gain without held-out samples."""
    if not head and options.include(("kd_gain_ns",)):
        raise ValueError("kd_gain_ns is a score of the last layer alone: pass layers='last'")
    if not head and options.curvature.curvature == "exact" and options.include(("self_influence", "param_shift")):
        raise ValueError(
            "self_influence and param_shift need the inverse for every sample's gradient, which curvature 'exact' has"
            " for the last layer alone: pass layers='last', or curvature='ekfac'"
        )
    if options.include(HELD_OUT) and not held_out:
        raise ValueError(f"{options.those_of(HELD_OUT)[0]} needs val_data, a slice held out of the training set")


def _meta(options: ScoreOptions, layers: Sequence[str], head: bool, factors: Factors | None) -> dict[str, object]:
    """The part of Scores.meta that is known before scoring."""
    return {
        "layers": layers,
        "curvature": options.curvature.curvature if factors is None else factors.curvature,
        "hessian": options.objective.hessian,
        "labels": "all" if head else options.curvature.labels,
        "loss": options.objective.loss_facts(),
        "library_version": __version__,
    }


def _facts(
    options: ScoreOptions,
    meta: dict[str, object],
    student: nn.Module,
    teacher: nn.Module | Tensor,
    train: BatchReader,
    held_out: BatchReader | None,
    factors: Factors | None,
) -> dict[str, object]:
    """What the scores depend on; the folder of a run with other facts is refused."""
    selected = options.selected
    teacher_tensors = {"logits": teacher} if isinstance(teacher, Tensor) else teacher.state_dict()
    return {
        **meta,
        "scores": [name.key for name in options.names],
        "damping": options.curvature.damping,
        "damping_scale": options.curvature.damping_scale,
        "folds": options.folds,
        "dtype": str(options.dtype),
        "student": fingerprint(student),
        "teacher": tensors_fingerprint(teacher_tensors),
        "selected": None if selected is None else tensors_fingerprint({"selected": selected}),
        "factors": None if factors is None else factors.fingerprint,
        "train_samples": train.samples,
        "val_samples": None if held_out is None else held_out.samples,
        "batches": train.count,
    }


def _data_facts(train: BatchReader, held_out: BatchReader | None) -> dict[str, str]:
    """Fingerprints of what is known of the data without a pass over it."""
    return {
        f"{name}_{part}": tensors_fingerprint({part: tensor})
        for name, reader in (("train", train), ("val", held_out))
        if reader is not None
        for part, tensor in reader.known().items()
    }
