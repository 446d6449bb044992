"""Checkpoints: accepted formats, and one-line errors for all others."""

from __future__ import annotations

import argparse
import gzip
import io
import math
import pickle
import zipfile
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save, save_file
from torch import Tensor, nn

from lrds_fast import models
from lrds_fast.models.weights import load_weights
from lrds_fast.recipe.recipe import Recipe
from lrds_fast.train import checkpoint, fit, load_recipe


def quick(tmp_path: Path, name: str = "digits_alone", *more: str) -> Recipe:
    settings = ["schedule.epochs=1", "run.device=cpu", "data.train_limit=100", f"run.out={tmp_path / 'run'}", *more]
    return load_recipe(name, settings)


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    fit(quick(tmp_path), progress=False)
    return tmp_path / "run" / "last.pt"


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[key], b[key]) for key in a)


def prefixed(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{name}": value for name, value in state.items()}


def loaded(path: Path, model: nn.Module, weights: str = "average") -> dict[str, Tensor]:
    load_weights(model, path, key="teacher.checkpoint", weights=weights)
    return model.state_dict()


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "model.", "net.backbone."])
def test_weights_are_found_under_any_container_and_prefix(tmp_path: Path, prefix: str) -> None:
    source, target = models.create("mlp", num_classes=4), models.create("mlp", num_classes=4)
    beside = {"epoch": 3, "accuracy": torch.tensor(0.7), "optimizer": {"state": {0: {"step": torch.tensor(1)}}}}
    places = ["", "state_dict", "net", "model_state_dict", "any", "model.state_dict", "state_dict_ema", "ema.module"]
    for place in places:
        source.fc.bias.data += 1  # type: ignore[union-attr,operator]
        content: Any = prefixed(prefix, source.state_dict())
        for container in reversed(place.split(".") if place else []):
            content = {**beside, container: content}
        torch.save(content, tmp_path / "weights.pt")
        assert equal(loaded(tmp_path / "weights.pt", target), source.state_dict()), place


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pth"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_safetensors_are_recognised_by_their_content(tmp_path: Path, name: str, prefix: str) -> None:
    source = models.create("small_cnn", num_classes=4)
    save_file(prefixed(prefix, source.state_dict()), tmp_path / name)
    assert equal(loaded(tmp_path / name, models.create("small_cnn", num_classes=4)), source.state_dict())


def by_part(state: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    parts: dict[str, dict[str, Tensor]] = {}
    for name, value in state.items():
        part, _, rest = name.partition(".")
        parts.setdefault(part, {})[rest] = value
    return parts


@pytest.mark.parametrize(
    "content",
    [
        lambda state: {"n_averaged": torch.tensor(7), **prefixed("module.", state)},
        lambda state: {name.replace("layer1.0.", "layer1.0._orig_mod."): value for name, value in state.items()},
        lambda state: {name: value for name, value in state.items() if "num_batches_tracked" not in name},
        lambda state: {
            "state_dict": {**prefixed("model.", state), "criterion.weight": torch.ones(4)},
            "pytorch-lightning_version": "2.5",
            "callbacks": {"ModelCheckpoint": {"current_score": torch.tensor(0.7), "best_k_models": {}}},
            "hyper_parameters": {"lr": 0.1},
        },
        lambda state: {**prefixed("student.", state), **prefixed("teacher.", models.create("resnet14").state_dict())},
        lambda state: {**prefixed("teacher.", state), **prefixed("student.", models.create("resnet8").state_dict())},
        lambda state: {**prefixed("model.", state), **prefixed("student.", state)},
        lambda state: {"model": by_part(state)},
        lambda state: [{"epoch": 1}, state],
        lambda state: {name: nn.Parameter(value, requires_grad=False) for name, value in state.items()},
        lambda state: {**state, "epoch": 3, "name": "resnet8"},
    ],
    ids=[
        "AveragedModel",
        "a compiled block",
        "before torch 0.4.1",
        "Lightning",
        "beside a teacher of another size",
        "beside a student of other classes",
        "one network under two names",
        "a dict per part",
        "a list",
        "parameters",
        "values beside the tensors",
    ],
)
def test_files_of_other_programs(tmp_path: Path, content: Any, capfd: pytest.CaptureFixture[str]) -> None:
    source = models.create("resnet8", num_classes=4)
    torch.save(content(source.state_dict()), tmp_path / "weights.pt")
    model = models.create("resnet8", num_classes=4)
    assert equal(loaded(tmp_path / "weights.pt", model), source.state_dict())
    assert "".join(capfd.readouterr()) == ""


@pytest.mark.parametrize(
    ("raw", "average"),
    [
        ("state_dict", "state_dict_ema"),  # timm
        ("model", "model_ema.module"),  # torchvision
        ("student", "parts.ema.module"),  # this trainer
        ("params", "params_ema"),
        ("net", "swa_model"),
        ("model", "modelEMA"),
        ("state_dict.model", "state_dict.model_averaged"),
        ("", "ema"),
        ("", "ema.module"),
    ],
)
def test_averaged_weights_are_preferred_to_raw_ones_with_a_note(
    tmp_path: Path, raw: str, average: str, capfd: pytest.CaptureFixture[str]
) -> None:
    both = [models.create("mlp", num_classes=3).state_dict() for _ in range(2)]
    content: dict[str, Any] = {}
    for place, state in zip((raw, average), both, strict=True):
        inner = content
        for container in place.split(".") if place else []:
            inner = inner.setdefault(container, {})
        inner |= state
    path = tmp_path / "weights.pt"
    torch.save(content, path)
    assert equal(loaded(path, models.create("mlp", num_classes=3)), both[1])
    assert capfd.readouterr().err == (
        f"lrds-fast: teacher.checkpoint: {path} contains raw and averaged weights: loaded the average ({average});"
        f" teacher.weights=raw loads the other ({raw or 'its top level'})\n"
    )
    assert equal(loaded(path, models.create("mlp", num_classes=3), weights="raw"), both[0])
    said = capfd.readouterr().err
    assert "loaded the raw" in said and "teacher.weights=average loads the other" in said


def test_absent_and_ambiguous_teacher_weights_are_refused(tmp_path: Path) -> None:
    first, second = (models.create("mlp", num_classes=3).state_dict() for _ in range(2))
    path = tmp_path / "t.pt"
    torch.save({"ema": first}, path)
    with pytest.raises(ValueError, match=r"t.pt contains only averaged weights \(ema\); set teacher.weights=average"):
        loaded(path, models.create("mlp", num_classes=3), weights="raw")
    for content, places in (
        ({"student": first, "teacher": second}, "student, teacher"),
        ({**first, **prefixed("teacher.", second)}, "its top level, teacher"),
        ({"ema": first, "swa": second, "model": first}, "ema, swa"),
    ):
        torch.save(content, path)
        with pytest.raises(ValueError, match=rf"several sets of weights that fit \({places}\); load the file"):
            loaded(path, models.create("mlp", num_classes=3))


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "before torch 1.6"])
@pytest.mark.parametrize("name", ["MobileNetV2", "resnet8x4", "wrn_16_1", "vgg8"])
def test_published_files_load_as_they_are(tmp_path: Path, name: str, legacy: bool) -> None:
    """The state under "model", beside it options, NumPy accuracies and an optimizer: RepDistiller, mdistiller."""
    source, target = models.create(name), models.create(name)
    optimizer = torch.optim.SGD(source.parameters(), lr=0.1, momentum=0.9)
    path = tmp_path / "ckpt_epoch_240.pth"
    content = {
        "opt": argparse.Namespace(model=name, lr_decay_epochs=[150, 180, 210], trial="1"),
        "epoch": 240,
        "model": source.state_dict(),
        "best_acc": np.float64(72.5),
        "accuracy": torch.tensor(72.4),
        "optimizer": optimizer.state_dict(),
    }
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    load_weights(target, path, key="teacher.checkpoint")
    assert equal(target.state_dict(), source.state_dict())


def test_scalars_of_numpy_1_are_read(tmp_path: Path) -> None:
    """Their pickles name numpy.core.multiarray, which NumPy 2 has moved."""
    source, target = models.create("mlp", num_classes=3), models.create("mlp", num_classes=3)
    path = tmp_path / "old.pth"
    torch.save({"model": source.state_dict(), "best_acc": np.float64(0.5)}, path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    assert b"numpy._core.multiarray" in content or b"numpy.core.multiarray" in content
    for new, old in ((b"numpy._core.multiarray", b"numpy.core.multiarray"),):
        # Pickle protocol 2 ends module names with a newline: their length is not stored.
        path.write_bytes(content.replace(new, old))
    load_weights(target, path, key="teacher.checkpoint")
    assert equal(target.state_dict(), source.state_dict())


def test_own_checkpoints_load_as_teachers(trained: Path) -> None:
    model = models.create("mlp_8x16_32", num_classes=100)
    load_weights(model, trained, key="teacher.checkpoint")
    assert equal(model.state_dict(), torch.load(trained, weights_only=True)["student"])


def test_a_saved_moving_average_is_loaded(tmp_path: Path) -> None:
    fit(quick(tmp_path, "digits_alone", "run.ema_decay=0.9"), progress=False)
    model = models.create("mlp_8x16_32", num_classes=100)
    load_weights(model, tmp_path / "run" / "last.pt", key="teacher.checkpoint")
    state = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert torch.equal(model.fc.weight, state["parts"]["ema"]["module.fc.weight"])  # type: ignore[union-attr,arg-type]
    assert not torch.equal(model.fc.weight, state["student"]["fc.weight"])  # type: ignore[union-attr,arg-type]


# Into the zip's header, into the pickle, into the tensors, and just before the central directory ends.
@pytest.mark.parametrize("keep", [0.0, 0.01, 0.3, 0.7, 0.999])
def test_a_truncated_checkpoint_is_named(tmp_path: Path, trained: Path, keep: float) -> None:
    content = trained.read_bytes()
    trained.write_bytes(content[: int(keep * len(content))])
    with pytest.raises(ValueError, match=r"last.pt is (damaged|empty|a truncated)") as raised:
        fit(quick(tmp_path), resume=True, progress=False)
    assert "\n" not in str(raised.value)


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "was here",)

    path = tmp_path / "evil.pt"
    torch.save({"model": Payload()}, path)
    with pytest.raises(ValueError, match="not a checkpoint of tensors alone"):
        load_weights(nn.Linear(1, 1), path, key="teacher.checkpoint")
    path.write_bytes(pickle.dumps(Payload(), protocol=2))
    with pytest.raises(ValueError, match=r"evil.pt is"):
        load_weights(nn.Linear(1, 1), path, key="teacher.checkpoint")
    assert not (tmp_path / "was here").exists()


def test_a_checkpoint_of_another_model_is_named(trained: Path) -> None:
    with pytest.raises(
        ValueError,
        match=r"teacher.checkpoint: .*last.pt is for another model: it lacks 'conv1.weight', 'bn1.weight', 'bn1.bias'"
        r" and \d+ more and has 'hidden.weight', 'hidden.bias', which the model does not have; the file contains 4"
        r" tensors in student \('hidden.weight', ...\), .*; set the model",
    ):
        # MLP and ResNet share no names but fc's.
        load_weights(models.create("resnet8", num_classes=10), trained, key="teacher.checkpoint")
    with pytest.raises(
        ValueError,
        match=r"fc.weight has shape \(100, 32\), the model's has \(10, 32\), and 1 more differ;"
        " the class counts differ: the file has 100 classes, the model 10; use weights",
    ):
        load_weights(models.create("mlp_8x16_32", num_classes=10), trained, key="teacher.checkpoint")
    torch.save(nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2)).state_dict(), trained)
    with pytest.raises(
        ValueError, match=r"0.weight has shape \(5, 3\), the model's has \(7, 3\), and 2 more differ; the widths or the"
    ):
        loaded(trained, nn.Sequential(nn.Linear(3, 7), nn.Linear(7, 2)))


@pytest.mark.parametrize("change", ["missing", "surplus", "twice"])
def test_weights_must_not_be_missing_surplus_or_ambiguous(tmp_path: Path, change: str) -> None:
    state: dict[str, Any] = {"model": models.create("resnet8", num_classes=3).state_dict()}
    if change == "missing":
        del state["model"]["bn1.running_var"]
    else:
        state["model"]["extra" if change == "surplus" else "fc._orig_mod.bias"] = torch.ones(3)
    torch.save(state, tmp_path / "t.pt")
    message = {"missing": "it lacks 'bn1.running_var'; ", "surplus": "it has 'extra', ", "twice": "it has 'fc.bias', "}
    with pytest.raises(ValueError, match=f"is for another model: {message[change]}"):
        loaded(tmp_path / "t.pt", models.create("resnet8", num_classes=3))


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    state = models.create("mlp", num_classes=10).state_dict()
    name = next(iter(state))
    state[name][0] = math.nan
    torch.save(state, tmp_path / "nan.pt")
    with pytest.raises(ValueError, match=f"NaN or infinite numbers in '{name}'"):
        loaded(tmp_path / "nan.pt", models.create("mlp", num_classes=10))


def test_a_refused_checkpoint_leaves_the_model_as_it_was(trained: Path) -> None:
    model = models.create("mlp", num_classes=100)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="for another model"):
        load_weights(model, trained, key="teacher.checkpoint")
    assert equal(model.state_dict(), before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("student.model=mlp_8x16_128", r"its student.model is 'mlp_8x16_32', this one's is 'mlp_8x16_128'"),
        ("optimizer.lr=0.2", r"its optimizer.lr is 0.1, this one's is 0.2"),
        ("seed=4", r"its seed is 0, this one's is 4"),
        ("data.label_noise=0.1", r"its data.label_noise is 0.0, this one's is 0.1"),
    ],
)
def test_resuming_another_run_is_refused(tmp_path: Path, trained: Path, change: str, message: str) -> None:
    before = trained.read_bytes()
    with pytest.raises(ValueError, match=message):
        fit(quick(tmp_path, "digits_alone", change), resume=True, progress=False)
    assert trained.read_bytes() == before


def test_resuming_with_a_teacher_trained_again_is_refused(tmp_path: Path) -> None:
    weights, last = tmp_path / "teacher.pt", tmp_path / "run" / "last.pt"
    teacher = models.create("mlp_8x16_128", num_classes=100)
    torch.save(teacher.state_dict(), weights)
    chosen = quick(tmp_path, "digits_kd", f"teacher.checkpoint={weights}")
    fit(chosen, progress=False)
    torch.save({"student": teacher.state_dict()}, weights)  # the same weights in another file
    fit(chosen, resume=True, progress=False)
    teacher.fc.bias.data += 1  # type: ignore[union-attr,operator]
    torch.save(teacher.state_dict(), weights)
    before = last.read_bytes()
    with pytest.raises(ValueError, match=r"its teacher's sha256 is \w{64}, this one's is \w{64}; .* data and teacher"):
        fit(chosen, resume=True, progress=False)
    assert last.read_bytes() == before
    # A checkpoint of an older version does not say which teacher it had.
    state = torch.load(last, weights_only=True)
    del state["facts"]["teacher's sha256"]
    torch.save(state, last)
    fit(chosen, resume=True, progress=False)


def test_weights_of_someone_else_are_not_a_run_to_resume(tmp_path: Path, trained: Path) -> None:
    torch.save(models.create("mlp", num_classes=10).state_dict(), trained)
    with pytest.raises(ValueError, match=r"is not a checkpoint of lrds-fast train \(format 2\)"):
        fit(quick(tmp_path), resume=True, progress=False)


def test_files_without_a_state_dict_are_named(tmp_path: Path) -> None:
    path = tmp_path / "list.pt"
    for content, outline in (
        ([1, 2], "an object of type list"),
        (torch.ones(2), "an object of type Tensor"),
        ({"epoch": 3, "history": []}, "a dict of 'epoch', 'history'"),
    ):
        torch.save(content, path)
        with pytest.raises(ValueError, match=rf"teacher.checkpoint: .*list.pt contains no state dict .* {outline}"):
            load_weights(nn.Linear(1, 1), path, key="teacher.checkpoint")
    with pytest.raises(FileNotFoundError, match=r"student.checkpoint: there is no file .*absent.pt"):
        load_weights(nn.Linear(1, 1), tmp_path / "absent.pt", key="student.checkpoint")
    with pytest.raises(ValueError, match=r"student.checkpoint: .* must be a file of weights; it is a folder"):
        load_weights(nn.Linear(1, 1), tmp_path, key="student.checkpoint")


def saved(content: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


def zipped(*names: str) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name in names:
            archive.writestr(name, "x")
    return file.getvalue()


NOT_WEIGHTS: dict[str, tuple[Callable[[], bytes], str]] = {
    "nothing": (lambda: b"", "is empty (0 bytes); copy or download it again"),
    "HTML": (
        lambda: b"\n<!DOCTYPE html><p>Sign in",
        "is a web page (HTML or XML), not weights; download",
    ),
    "LFS": (
        lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 94\n",
        "is a git-LFS pointer instead of the weights; fetch them: git lfs pull",
    ),
    "text": (
        lambda: b"root:x:0:0:root:/root:/bin/sh\n",
        "is a text file, which begins 'root:x:0:0:root:/root:/bin/",
    ),
    "gzip": (lambda: gzip.compress(b"weights"), "is a gzip archive: unpack it, and name the file in it"),
    "zip": (lambda: zipped("a.txt", "w.pt"), "is a zip archive of other files ('a.txt', 'w.pt'); unpack it"),
    "TorchScript": (lambda: zipped("net/constants.pkl", "net/data.pkl"), "is a TorchScript program, not a checkpoint"),
    "module": (
        lambda: saved(models.create("mlp")),
        "it holds a whole pickled module, which needs the code of lrds_fast.models.small.MLP, and code in a file is"
        " not run; in the program that made it, save the weights alone: torch.save(model.state_dict(), FILE)",
    ),
    "module before torch 1.6": (
        lambda: saved({"model": models.create("mlp")}, _use_new_zipfile_serialization=False),
        "it holds a whole pickled module, which needs the code of lrds_fast.models.small.MLP, and code in a file",
    ),
    "object": (
        lambda: saved({**models.create("mlp").state_dict(), "path": Fraction(1, 2)}),
        "it holds a pickled object, which needs the code of fractions.Fraction, and code in a file",
    ),
    "plain pickle": (lambda: pickle.dumps({"fc.weight": [1.0]}), "is a plain pickle, not a file of torch.save; in the"),
    "protocol 4": (lambda: saved(models.create("mlp").state_dict(), pickle_protocol=4), "is not a checkpoint of"),
    "cut zip": (
        lambda: saved(models.create("mlp").state_dict())[:-30],
        "is a truncated zip archive; copy or download it again",
    ),
    "cut file before torch 1.6": (
        lambda: saved(models.create("mlp").state_dict(), _use_new_zipfile_serialization=False)[:-300],
        "is damaged, truncated, or neither a file of torch.save nor safetensors; copy or download",
    ),
    "cut safetensors": (
        lambda: save(models.create("mlp").state_dict())[:-9],
        "is a damaged or truncated safetensors file",
    ),
    "cut head of safetensors": (lambda: b"\x80" + bytes(7) + b"{", "is a damaged or truncated safetensors file; copy"),
    "noise": (lambda: bytes(range(256)), "is damaged, truncated, or neither a file of torch.save nor safetensors;"),
}


@pytest.mark.parametrize("kind", list(NOT_WEIGHTS))
def test_a_file_without_weights_is_described_in_the_error(
    tmp_path: Path, kind: str, capfd: pytest.CaptureFixture[str]
) -> None:
    make, message = NOT_WEIGHTS[kind]
    for path in (tmp_path / "file.pth", tmp_path / "file.safetensors"):
        path.write_bytes(make())
        with pytest.raises(ValueError, match="^teacher.checkpoint: ") as raised:
            load_weights(nn.Linear(1, 1), path, key="teacher.checkpoint")
        said = str(raised.value)
        assert f"{path} " in said and message in said
        assert said.isprintable() and "weights_only" not in said
    assert "".join(capfd.readouterr()) == ""


def test_tied_weights_are_saved(tmp_path: Path) -> None:
    tied = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    checkpoint.save_weights(tmp_path / "best.safetensors", tied, {"epoch": "1"})
    again = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    load_weights(again, tmp_path / "best.safetensors", key="teacher.checkpoint")
    assert torch.equal(again.get_parameter("1.weight"), tied.get_parameter("0.weight"))
