"""Checkpoints: what is accepted, and one line for everything that is not."""

from __future__ import annotations

import argparse
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lrds_fast import models
from lrds_fast.train import checkpoint, fit, load_recipe
from lrds_fast.train.recipe import Recipe


def quick(tmp_path: Path, name: str = "digits_alone", *more: str) -> Recipe:
    settings = ["schedule.epochs=1", "run.device=cpu", "data.train_limit=100", f"run.out={tmp_path / 'run'}", *more]
    return load_recipe(name, settings)


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    fit(quick(tmp_path), progress=False)
    return tmp_path / "run" / "last.pt"


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("form", ["plain", "model", "state_dict", "module.", "safetensors"])
def test_the_forms_in_which_weights_are_exchanged(tmp_path: Path, form: str) -> None:
    source, target = models.create("small_cnn", num_classes=4), models.create("small_cnn", num_classes=4)
    state = source.state_dict()
    path = tmp_path / ("weights.safetensors" if form == "safetensors" else "weights.pt")
    if form == "safetensors":
        save_file(state, path)
    elif form == "module.":
        torch.save({f"module.{key}": value for key, value in state.items()}, path)
    else:
        torch.save(state if form == "plain" else {form: state, "epoch": 3}, path)
    assert not equal(target.state_dict(), state)
    checkpoint.load_weights(target, path, key="teacher.checkpoint")
    assert equal(target.state_dict(), state)


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
    checkpoint.load_weights(target, path, key="teacher.checkpoint")
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
    checkpoint.load_weights(target, path, key="teacher.checkpoint")
    assert equal(target.state_dict(), source.state_dict())


def test_own_checkpoints_load_as_teachers(trained: Path) -> None:
    model = models.create("mlp", num_classes=10)
    checkpoint.load_weights(model, trained, key="teacher.checkpoint")
    assert equal(model.state_dict(), torch.load(trained, weights_only=True)["student"])


def test_a_kept_moving_average_is_what_loads(tmp_path: Path) -> None:
    fit(quick(tmp_path, "digits_alone", "run.ema_decay=0.9"), progress=False)
    model = models.create("mlp", num_classes=10)
    checkpoint.load_weights(model, tmp_path / "run" / "last.pt", key="teacher.checkpoint")
    state = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert torch.equal(model.fc.weight, state["parts"]["ema"]["module.fc.weight"])  # type: ignore[union-attr,arg-type]
    assert not torch.equal(model.fc.weight, state["student"]["fc.weight"])  # type: ignore[union-attr,arg-type]


# Into the zip's header, into the pickle, into the tensors, and just before the central directory ends.
@pytest.mark.parametrize("keep", [0.0, 0.01, 0.3, 0.7, 0.999])
def test_a_truncated_checkpoint_is_named(tmp_path: Path, trained: Path, keep: float) -> None:
    content = trained.read_bytes()
    trained.write_bytes(content[: int(keep * len(content))])
    with pytest.raises(ValueError, match=r"last.pt is (damaged|not a checkpoint)") as raised:
        fit(quick(tmp_path), resume=True, progress=False)
    assert "\n" not in str(raised.value)


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "was here",)

    path = tmp_path / "evil.pt"
    torch.save({"model": Payload()}, path)
    with pytest.raises(ValueError, match="not a checkpoint of tensors alone"):
        checkpoint.load_weights(nn.Linear(1, 1), path, key="teacher.checkpoint")
    path.write_bytes(pickle.dumps(Payload(), protocol=2))
    with pytest.raises(ValueError, match=r"evil.pt is"):
        checkpoint.load_weights(nn.Linear(1, 1), path, key="teacher.checkpoint")
    assert not (tmp_path / "was here").exists()


def test_a_checkpoint_of_another_model_is_named(trained: Path) -> None:
    with pytest.raises(
        ValueError, match=r"last.pt is of another model: it lacks 'conv1.weight' and has 'hidden.weight'"
    ):
        # MLP and ResNet share no names but fc's.
        checkpoint.load_weights(models.create("resnet8", num_classes=10), trained, key="teacher.checkpoint")
    with pytest.raises(
        ValueError, match=r"fc.weight has shape \(10, 32\), the model's has \(100, 32\); the class counts"
    ):
        checkpoint.load_weights(models.create("mlp", num_classes=100), trained, key="teacher.checkpoint")


def test_a_refused_checkpoint_leaves_the_model_as_it_was(trained: Path) -> None:
    model = models.create("mlp", num_classes=100)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="of another model"):
        checkpoint.load_weights(model, trained, key="teacher.checkpoint")
    assert equal(model.state_dict(), before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("student.model=small_cnn", r"its student.model is 'mlp', this one's is 'small_cnn'"),
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


def test_weights_of_someone_else_are_not_a_run_to_resume(tmp_path: Path, trained: Path) -> None:
    torch.save(models.create("mlp", num_classes=10).state_dict(), trained)
    with pytest.raises(ValueError, match=r"is not a checkpoint of lrds-fast train \(format 2\)"):
        fit(quick(tmp_path), resume=True, progress=False)


def test_files_without_a_state_dict_are_named(tmp_path: Path) -> None:
    path = tmp_path / "list.pt"
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match=r"teacher.checkpoint: .*list.pt holds no state dict"):
        checkpoint.load_weights(nn.Linear(1, 1), path, key="teacher.checkpoint")
    with pytest.raises(FileNotFoundError, match=r"student.checkpoint: there is no file .*absent.pt"):
        checkpoint.load_weights(nn.Linear(1, 1), tmp_path / "absent.pt", key="student.checkpoint")
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(b"\x08\0\0\0\0\0\0\0{")
    with pytest.raises(ValueError, match=r"damaged.safetensors is damaged"):
        checkpoint.load_weights(nn.Linear(1, 1), damaged, key="student.checkpoint")


def test_tied_weights_are_saved(tmp_path: Path) -> None:
    tied = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    checkpoint.save_weights(tmp_path / "best.safetensors", tied, {"epoch": "1"})
    again = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    checkpoint.load_weights(again, tmp_path / "best.safetensors", key="teacher.checkpoint")
    assert torch.equal(again[1].weight, tied[0].weight)
