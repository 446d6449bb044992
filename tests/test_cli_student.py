"""A trained student: stored by a run, loaded, evaluated, used on picture files, exported; the commands for it."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from test_data_transform import saved
from torch import Tensor, nn

import lrds_fast
from lrds_fast.cli import main as cli
from lrds_fast.data import in_memory, load
from lrds_fast.data.transform import Transform
from lrds_fast.files import read_records
from lrds_fast.models import export
from lrds_fast.models.catalogue import networks
from lrds_fast.models.predict import predict
from lrds_fast.models.student import DESCRIPTION, Description, Student
from lrds_fast.models.weights import safetensors_bytes
from lrds_fast.report.export import CARD, export_student
from lrds_fast.train import Recipe, fit, load_recipe, train
from lrds_fast.train.stored import assess

pytest.importorskip("PIL")
needs_onnx = pytest.mark.skipif(bool(export.missing_for_onnx()), reason=export.missing_for_onnx())

EPOCHS = 12
QUIET = ["--device", "cpu", "--quiet", "--set", "run.tensorboard=false", "--set", "data.test_limit=200"]
SMALL = [*QUIET, "--set", "data.train_limit=120"]


@pytest.fixture(autouse=True)
def in_one_thread(one_thread: None) -> None:
    """All tests of this file."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs `teacher` and `student`, the latter of EPOCHS epochs."""
    folder = tmp_path_factory.mktemp("runs")
    assert cli.main(["train", "digits_teacher", *QUIET, "--epochs", "4", "--out", str(folder / "teacher")]) == cli.OK
    arguments = ["--epochs", str(EPOCHS), "--seed", "3", "--out", str(folder / "student")]
    arguments += [
        "--set",
        "run.ema_decay=0.5",
        "--set",
        "loss.ce_weight_end=1",
        "--set",
        f"teacher.checkpoint={folder / 'teacher' / 'last.pt'}",
    ]
    assert cli.main(["train", "digits_kd_lr", *QUIET, *arguments]) == cli.OK
    return folder


def output(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = cli.OK) -> str:
    """What a command prints on stdout."""
    capsys.readouterr()
    assert cli.main(arguments) == code
    return capsys.readouterr().out


def fails(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = cli.MISUSED) -> str:
    """The one line on stderr of a command that must fail with `code`."""
    capsys.readouterr()
    assert cli.main(arguments) == code
    error = capsys.readouterr().err
    assert error.startswith("lrds-fast: error: ") and error.count("\n") == 1
    return error


def records(folder: Path) -> list[dict[str, Any]]:
    return read_records(folder / "log.jsonl")


# --- loading


def test_a_run_is_loaded_in_eval_mode_with_classes_and_transform(runs: Path) -> None:
    student = lrds_fast.models.load(runs / "student")
    assert isinstance(student, lrds_fast.models.Student) and not student.training and not student.network.training
    assert student.class_names == tuple(f"{number:02d}" for number in range(100))
    assert student.transform == Transform(1, (8, 16), (8, 16), (0.0,), (1.0,))
    assert student.description.model == "mlp_8x16_32" and student.description.input_size == (1, 8, 16)
    # The evaluated weights are the averaged ones.
    stored = torch.load(runs / "student" / "last.pt", weights_only=True)
    average = stored["parts"]["ema"]
    for name, value in student.network.state_dict().items():
        assert torch.equal(value, average[f"module.{name}"])
        assert not torch.equal(value, stored["student"][name])


def test_loading_prints_nothing(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lrds_fast.models.load(runs / "student")
    assert capsys.readouterr() == ("", "")


def test_a_file_of_weights_is_loaded_beside_its_description(runs: Path) -> None:
    best = lrds_fast.models.load(runs / "student" / "best.safetensors")
    assert best.description.weights == "best.safetensors"
    images = torch.rand(3, 1, 8, 16, generator=torch.Generator().manual_seed(0))
    assert best(images).shape == (3, 100)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ("no folder", FileNotFoundError, "there is no .*; name the folder of a run"),
        ("no description", FileNotFoundError, "has no student.json, .* lrds-fast train RECIPE --resume"),
        ("no weights", FileNotFoundError, "has no last.pt yet: finish an epoch"),
        ("{", ValueError, "student.json does not describe a student"),
        ('{"format": 7}', ValueError, "its format is 7, this version reads 1"),
        ('{"format": 1, "model": "mlp"}', ValueError, "does not describe a student"),
        ("escaping", ValueError, "weights must be the name of a file beside it; got '../last.pt'"),
        ("transform", ValueError, "a transform must have 1 or 3 channels"),
        ("other network", ValueError, "last.pt is for another model"),
    ],
)
def test_what_cannot_be_loaded_is_named(
    runs: Path, tmp_path: Path, change: str, error: type[Exception], message: str
) -> None:
    description = Description.read(runs / "student")
    values = json.loads((runs / "student" / DESCRIPTION).read_text())
    folder = tmp_path / "absent"
    if change != "no folder":
        folder.mkdir()
    if change not in ("no folder", "no weights"):
        (folder / "last.pt").write_bytes((runs / "student" / "last.pt").read_bytes())
    if change == "no weights":
        description.write(folder)
    elif change == "other network":
        (folder / DESCRIPTION).write_text(json.dumps(values | {"model": "small_cnn"}))
    elif change == "escaping":
        (folder / DESCRIPTION).write_text(json.dumps(values | {"weights": "../last.pt"}))
    elif change == "transform":
        (folder / DESCRIPTION).write_text(json.dumps(values | {"transform": values["transform"] | {"channels": 2}}))
    elif change.startswith("{"):
        (folder / DESCRIPTION).write_text(change)
    with pytest.raises(error, match=message):
        lrds_fast.models.load(folder)


# --- eval


def test_eval_gives_the_numbers_of_the_log(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = runs / "student"
    last = records(folder)[-1]
    for split in ("test", "val"):
        printed = json.loads(output(capsys, "eval", str(folder), "--split", split, "--json", "--device", "cpu"))
        assert printed["accuracy"] == last[f"{split}_acc"] and printed["ece"] == last[f"{split}_ece"]
        assert printed["cross_entropy"] == last[f"{split}_ce"]
        assert (printed["split"], printed["weights"], printed["model"]) == (split, "last.pt", "mlp_8x16_32")
        assert sum(entry["rows"] for entry in printed["classes"]) == printed["rows"]
        right = sum(entry["right"] for entry in printed["classes"])
        assert right / printed["rows"] == pytest.approx(printed["accuracy"])
        for entry in printed["classes"]:
            assert entry["accuracy"] == (entry["right"] / entry["rows"] if entry["rows"] else None)
    summary = json.loads((folder / "summary.json").read_text())
    test = json.loads(output(capsys, "eval", str(folder), "--json"))
    assert [[entry["rows"], entry["right"]] for entry in test["classes"]] == summary["test"]["classes"]
    table = output(capsys, "eval", str(folder))
    assert f"accuracy {last['test_acc']:.2%}, negative log-likelihood {last['test_ce']:.4f}" in table
    assert f"expected calibration error {last['test_ece']:.4f}" in table and "mlp_8x16_32, last.pt, 200 test" in table
    rows = [line.split() for line in table.splitlines()[2:102]]
    assert [row[:3] for row in rows] == [[e["class"], str(e["rows"]), str(e["right"])] for e in test["classes"]]
    assert last["test_acc"] > 0.1, "the student has learnt something, so that the columns differ"


def test_eval_of_the_best_weights_gives_the_numbers_of_their_epoch(tmp_path: Path) -> None:
    """With a learning rate so high that a later epoch is worse than the best one."""
    recipe = load_recipe(
        "digits_alone",
        [f"run.out={tmp_path}/run", "run.device=cpu", "data.train_limit=120", "data.test_limit=300", "seed=1"],
    ).with_values(**{"schedule.epochs": 8, "schedule.name": "constant", "optimizer.lr": 1.0})
    fit(recipe, progress=False)
    log = records(tmp_path / "run")
    best = max(log, key=lambda record: record["val_acc"] if "val_acc" in record else record["test_acc"])
    evaluation = assess(tmp_path / "run" / "best.safetensors").evaluation
    assert (evaluation.accuracy, evaluation.cross_entropy) == (best["test_acc"], best["test_ce"])
    assert evaluation.cross_entropy != log[-1]["test_ce"]


def test_eval_on_other_settings_and_its_errors(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(runs / "student")
    fewer = json.loads(output(capsys, "eval", run, "--json", "--set", "data.test_limit=50"))
    assert fewer["rows"] == 50
    assert "data 'digits' has 10 classes, the student 100" in fails(
        capsys, "eval", run, "--set", "data.name=digits", "--set", "data.test_limit=0", "--set", "data.train_limit=0"
    )
    assert "held out no samples (data.val_fraction=0): take --split test" in fails(
        capsys, "eval", run, "--split", "val", "--set", "data.val_fraction=0"
    )
    assert "there is no absent; name the folder of a run" in fails(capsys, "eval", "absent")
    assert "unknown key 'data.tset_limit'" in fails(capsys, "eval", run, "--set", "data.tset_limit=1")


# --- predict


def numbers(folder: Path) -> tuple[list[Path], Tensor]:
    """Files of three test pictures, and their images as training has them."""
    data = load("two_digit_numbers")
    (batch, *_) = data.test.epoch(0)
    folder.mkdir(exist_ok=True)
    images = batch.images[:3]
    levels = (images * 255).round().to(torch.uint8)
    return [saved(pixels, folder / f"{i}.png") for i, pixels in enumerate(levels)], images


def test_predict_gives_the_networks_probabilities(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths, images = numbers(tmp_path)
    arguments = ("predict", str(runs / "student"), *map(str, paths), "--device", "cpu", "--top", "3")
    printed = json.loads(output(capsys, *arguments, "--json"))
    student = lrds_fast.models.load(runs / "student")
    with torch.inference_mode():
        expected = student(torch.stack([student.transform(path) for path in paths])).softmax(dim=1)
        close = student(images).softmax(dim=1)  # before their levels were rounded to 8 bits
    torch.testing.assert_close(expected, close, rtol=0.02, atol=1e-4)
    assert [entry["picture"] for entry in printed] == list(map(str, paths))
    for row, entry in zip(expected, printed, strict=True):
        best = row.topk(3)
        assert [found["label"] for found in entry["classes"]] == best.indices.tolist()
        assert [found["class"] for found in entry["classes"]] == [f"{k:02d}" for k in best.indices.tolist()]
        assert [found["probability"] for found in entry["classes"]] == pytest.approx(best.values.tolist(), rel=1e-5)
    line = output(capsys, *arguments).splitlines()[0]
    first = printed[0]["classes"]
    assert line == f"{paths[0]}: " + ", ".join(f"{found['class']} {found['probability']:.2%}" for found in first)


def test_an_unreadable_picture_does_not_stop_the_others(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths, _ = numbers(tmp_path)
    paths[1].write_bytes(paths[1].read_bytes()[:40])
    capsys.readouterr()
    code = cli.main(["predict", str(runs / "student"), *map(str, paths), "absent.png", str(tmp_path), "--json"])
    printed, error = capsys.readouterr()
    assert code == cli.FAILED
    found = json.loads(printed)
    assert [bool(entry["classes"]) for entry in found] == [True, False, True, False, False]
    assert "1.png is not a readable picture" in found[1]["error"]
    lines = error.splitlines()
    assert len(lines) == 3 and all(line.startswith("lrds-fast: error: ") for line in lines)
    assert "1.png is not a readable picture" in lines[0] and "replace it or leave it out" in lines[0]
    assert "there is no picture absent.png" in lines[1] and "Is a directory" in lines[2]


def test_many_pictures_are_predicted_in_order(tmp_path: Path) -> None:
    """More than one batch, with unreadable ones among them: the class is the picture's level."""

    class Level(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(255.0))

        def forward(self, images: Tensor) -> Tensor:
            return nn.functional.one_hot((images[:, 0, 0, 0] * self.scale).round().long(), 200).float() * 50

    names = tuple(f"level {k}" for k in range(200))
    transform = Transform(1, (2, 2), (2, 2), (0.0,), (1.0,))
    student = Student(Level(), Description("level", names, (1, 2, 2), transform, "none"))
    paths = [saved(torch.full((1, 2, 2), k, dtype=torch.uint8), tmp_path / f"{k}.png") for k in range(150)]
    for k in (0, 70, 149):
        paths[k].write_bytes(b"broken")
    found = list(predict(student, paths, top=1))
    assert [entry.picture for entry in found] == paths
    assert [entry.labels for entry in found] == [() if k in (0, 70, 149) else (k,) for k in range(150)]
    assert found[5].names == ("level 5",) and bool(found[0].error) and not found[1].error
    assert len(next(predict(student, paths[1:2], top=1000)).labels) == 200
    with pytest.raises(ValueError, match="top must be at least 1; got 0"):
        next(predict(student, paths, top=0))


def test_predict_on_a_device_that_is_not_there(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    error = fails(capsys, "predict", str(runs / "student"), "a.png", "--device", "tpu9")
    assert "device must be auto, cpu, cuda or cuda:N; got 'tpu9'" in error and "run.device" not in error


def test_a_student_without_picture_files_says_so(tmp_path: Path) -> None:
    images, labels = torch.rand(40, 2, 4, 4), torch.arange(40) % 3
    data = in_memory(images, labels, images, labels, num_classes=3)
    assert data.transform is None
    recipe = Recipe().with_values(**{"schedule.epochs": 1, "run.device": "cpu", "student.model": "small_cnn"})
    from lrds_fast.models.small import SmallCNN

    train(recipe, data, SmallCNN(3, channels=2, size=4), out=tmp_path, progress=False)
    description = Description.read(tmp_path)
    assert description.transform is None and description.input_size == (2, 4, 4)
    assert description.class_names == ("0", "1", "2")
    student = Student(SmallCNN(3, channels=2, size=4), description)
    with pytest.raises(ValueError, match="the student takes images of 2 x 4 x 4, and pictures have 1 or 3"):
        next(predict(student, [tmp_path / "a.png"]))


# --- export


@pytest.fixture(scope="module")
def exported(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "student"
    arguments = ["--license", "cc-by-4.0", "--teacher-license", "mit"]
    assert cli.main(["export", str(runs / "student"), "--out", str(folder), "--formats", "pt2", *arguments]) == cli.OK
    return folder


def probes(count: int) -> Tensor:
    return torch.rand(count, 1, 8, 16, generator=torch.Generator().manual_seed(count))


def test_an_exported_student_is_the_runs(runs: Path, exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sorted(path.name for path in exported.iterdir()) == [
        CARD,
        export.PROGRAM,
        export.WEIGHTS,
        "recipe.json",
        DESCRIPTION,
    ]
    original, again = lrds_fast.models.load(runs / "student"), lrds_fast.models.load(exported)
    assert again.class_names == original.class_names and again.transform == original.transform
    for count in (1, 7):
        assert torch.equal(original(probes(count)), again(probes(count)))
    printed = json.loads(output(capsys, "eval", str(exported), "--json"))
    assert printed["accuracy"] == records(runs / "student")[-1]["test_acc"]
    assert printed["weights"] == export.WEIGHTS


def test_the_program_runs_in_a_fresh_process_without_this_library(runs: Path, exported: Path, tmp_path: Path) -> None:
    torch.save({count: probes(count) for count in (1, 2, 9)}, tmp_path / "images.pt")
    code = """
import sys, torch
program = torch.export.load(sys.argv[1]).module()
images = torch.load(sys.argv[2])
torch.save({count: program(image) for count, image in images.items()}, sys.argv[3])
assert not any(name.startswith("lrds_fast") for name in sys.modules)
"""
    arguments = [str(exported / export.PROGRAM), str(tmp_path / "images.pt"), str(tmp_path / "logits.pt")]
    subprocess.run([sys.executable, "-c", code, *arguments], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    student = lrds_fast.models.load(runs / "student")
    for count, logits in torch.load(tmp_path / "logits.pt").items():
        torch.testing.assert_close(logits, student(probes(count)), rtol=0, atol=1e-5)


@needs_onnx
def test_onnx_runtime_gives_the_same_logits(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed = output(capsys, "export", str(runs / "student"), "--out", str(tmp_path))
    assert f"{export.ONNX}: " in printed, "by default too"
    onnxruntime: Any = importlib.import_module("onnxruntime")
    session = onnxruntime.InferenceSession(str(tmp_path / export.ONNX))
    student = lrds_fast.models.load(runs / "student")
    for count in (1, 2, 9):
        (logits,) = session.run(None, {"images": probes(count).numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), student(probes(count)), rtol=1e-4, atol=1e-5)
    assert "onnxruntime.InferenceSession" in (tmp_path / CARD).read_text()


def test_without_the_packages_of_onnx_the_other_formats_are_written(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "ONNX_PACKAGES", ("onnx_absent", "onnxruntime_absent"))
    line = "ONNX needs onnx_absent, onnxruntime_absent: pip install onnx_absent onnxruntime_absent"
    out = tmp_path / "out"
    assert line in fails(
        capsys, "export", str(runs / "student"), "--out", str(out), "--formats", "onnx", code=cli.FAILED
    )
    assert not out.exists()
    capsys.readouterr()
    assert cli.main(["export", str(runs / "student"), "--out", str(out)]) == cli.OK
    assert line in capsys.readouterr().err
    assert (out / export.PROGRAM).exists() and not (out / export.ONNX).exists()
    assert line not in fails(capsys, "export", str(runs / "student"), "--out", str(out)), "nothing was left out"


def test_the_card_has_the_runs_numbers(runs: Path, exported: Path) -> None:
    text = (exported / CARD).read_text()
    last = records(runs / "student")[-1]
    assert f"| test | {100 * last['test_acc']:.2f} | {last['test_ce']:.4f} | {last['test_ece']:.4f} |" in text
    assert f"| val | {100 * last['val_acc']:.2f} |" in text and f"After epoch {EPOCHS}." in text
    assert "| teacher | `mlp_8x16_128` |" in text and "label revision `lr` with eta 0.8 at temperature 1" in text
    assert "cross-entropy, weight 0.1, at the end 1;" in text
    assert "moving average of the weights, decay 0.5" in text and f"{EPOCHS} epochs, batch size 32, sgd" in text
    assert "| these weights | cc-by-4.0 |" in text and "| the teacher's weights, mlp_8x16_128 | mit |" in text
    assert "| the data, two_digit_numbers | unknown |" in text
    yaml = pytest.importorskip("yaml")
    head = yaml.safe_load(text.split("---\n")[1])
    assert head["license"] == "cc-by-4.0" and head["datasets"] == ["two_digit_numbers"]
    metric = head["model-index"][0]["results"][0]["metrics"][0]
    assert metric == {"type": "accuracy", "value": last["test_acc"]}


def test_the_cards_code_runs(exported: Path, tmp_path: Path) -> None:
    paths, _ = numbers(tmp_path)
    blocks = [part.split("```")[0] for part in (exported / CARD).read_text().split("```python\n")[1:]]
    first = blocks[0].replace("FOLDER", repr(str(exported))).replace("picture.png", str(paths[0]))
    found: dict[str, Any] = {}
    exec(first, found)
    assert found["name"] in found["student"].class_names
    second: dict[str, Any] = {"images": found["image"][None]}
    exec(blocks[1].replace(export.PROGRAM, str(exported / export.PROGRAM)), second)
    torch.testing.assert_close(second["logits"], found["student"](second["images"]), rtol=0, atol=1e-5)


def test_the_card_says_how_the_epoch_was_chosen(runs: Path, tmp_path: Path) -> None:
    export_student(runs / "student" / "best.safetensors", tmp_path, formats=())
    log = records(runs / "student")
    best = max(log, key=lambda record: record["val_acc"])
    text = (tmp_path / CARD).read_text()
    assert f"After epoch {best['epoch']}, which has the best accuracy on held-out samples." in text
    assert f"| test | {100 * best['test_acc']:.2f} | {best['test_ce']:.4f} |" in text


def test_an_older_export_is_replaced_only_on_demand(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = str(runs / "student"), str(tmp_path)
    assert cli.main(["export", run, "--out", out, "--formats", "pt2"]) == cli.OK
    again = ("export", run, "--out", out, "--formats", "pt2")
    assert "holds an exported student already; replace it (--overwrite)" in fails(capsys, *again)
    assert cli.main(["export", run, "--out", out, "--formats", "--overwrite"]) == cli.OK
    assert not (tmp_path / export.PROGRAM).exists(), "a program of the older export would not be the card's"
    assert "is the folder of a run; export to another folder" in fails(
        capsys, "export", run, "--out", str(runs / "teacher"), "--formats", "pt2"
    )
    assert (runs / "teacher" / DESCRIPTION).exists()


@pytest.mark.parametrize("what", ["weights", "program"])
def test_a_file_that_gives_other_logits_is_an_error_and_not_written(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """As if the library that writes the file had a fault: one weight of the copy is moved."""

    def moved(network: nn.Module) -> nn.Module:
        with torch.no_grad():
            next(network.parameters()).view(-1)[:50] += 0.01
        return network

    if what == "weights":
        content = safetensors_bytes
        student = lrds_fast.models.load(runs / "student")
        monkeypatch.setattr(export, "safetensors_bytes", lambda *_: content(moved(student.network), {}))
    else:
        loaded = torch.export.load

        class Program:
            def __init__(self, file: Any) -> None:
                self._program = loaded(file)

            def module(self) -> nn.Module:
                return moved(self._program.module())

        monkeypatch.setattr(torch.export, "load", Program)
    with pytest.raises(RuntimeError, match="gives other logits than the network: they differ by .* it was not"):
        export_student(runs / "student", tmp_path, formats=["pt2"])
    left = {path.name for path in tmp_path.iterdir()}
    assert left == (set() if what == "weights" else {export.WEIGHTS}), "nothing that can be loaded"


@pytest.mark.parametrize("name", ["resnet8", "ShuffleV1", "wrn_16_1", "vgg8", "MobileNetV2"])
def test_networks_with_batch_norm_are_exported(tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    network = lrds_fast.models.create(name, num_classes=4)
    with torch.no_grad():
        network(torch.randn(8, 3, 32, 32))  # gives the batch norms statistics
    description = Description(name, ("a", "b", "c", "d"), (3, 32, 32), None, "none")
    student = Student(network, description)
    assert export.write_weights(student, tmp_path / export.WEIGHTS, {}) == 0.0
    assert export.write_program(student, tmp_path / export.PROGRAM) <= export.TOLERANCE[export.PROGRAM]


@needs_onnx
@pytest.mark.parametrize("name", ["resnet8", "ShuffleV2", "timm:mobilenetv3_small_050"])
def test_networks_with_batch_norm_become_onnx(tmp_path: Path, name: str) -> None:
    if name.startswith("timm"):
        pytest.importorskip("timm")
    torch.manual_seed(0)
    network = lrds_fast.models.create(name, num_classes=4)
    with torch.no_grad():
        network(torch.randn(8, 3, 32, 32))
    student = Student(network, Description(name, ("a", "b", "c", "d"), (3, 32, 32), None, "none"))
    assert 0 <= export.write_onnx(student, tmp_path / export.ONNX) <= export.TOLERANCE[export.ONNX]


def test_a_network_that_cannot_be_exported_is_one_line(tmp_path: Path) -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 2)

        def forward(self, images: Tensor) -> Tensor:
            flat = images.flatten(1)
            logits: Tensor = self.fc(flat)
            return logits if float(flat.sum()) > 0 else -logits

    student = Student(Branches(), Description("branches", ("a", "b"), (1, 2, 2), None, "none"))
    message = r"branches cannot be exported by torch.export \(.*leave .* --formats"
    with pytest.raises(RuntimeError, match=message) as raised:
        export.write_program(student, tmp_path / export.PROGRAM)
    assert "\n" not in str(raised.value) and list(tmp_path.iterdir()) == []


# --- models


def test_models_lists_names_parameters_and_sizes(capsys: pytest.CaptureFixture[str]) -> None:
    printed = {entry["name"]: entry for entry in json.loads(output(capsys, "models", "--json", "--classes", "10"))}
    assert sorted(printed) == lrds_fast.models.names()
    for name, entry in printed.items():
        if name.startswith(("mlp", "small", "resnet8", "Shuffle")):
            network = lrds_fast.models.create(name, num_classes=10).eval()
            assert entry["parameters"] == sum(parameter.numel() for parameter in network.parameters())
        assert entry["library"] == "lrds_fast"
    for name in ("mlp", "mlp_8x16_32", "small_cnn", "resnet20", "vgg8"):
        network = lrds_fast.models.create(name, num_classes=10).eval()
        assert network(torch.rand(2, *printed[name]["input_size"])).shape == (2, 10)
    assert printed["resnet20"]["parameters"] == 278324 - 90 * 65
    table = output(capsys, "models")
    assert "\nresnet56 " in table and "timm:NAME" in table


def test_models_of_other_libraries_by_pattern(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torchvision")
    pytest.importorskip("timm")
    found = {entry.name: entry for entry in networks(["torchvision:resnet1*", "timm:resnet10*"], num_classes=1000)}
    assert found["torchvision:resnet18"] == ("torchvision:resnet18", 11689512, (3, 224, 224), "torchvision")
    assert found["timm:resnet10t"].input_size == (3, 176, 176)
    (inception,) = networks(["torchvision:inception_v3"], num_classes=1000)
    assert inception.input_size == (3, 299, 299)
    assert "no network matches 'timm:resnt*'" in fails(capsys, "models", "timm:resnt*")
    assert "unknown model library 'keras'" in fails(capsys, "models", "keras:*")
    assert "num_classes must be at least 1" in fails(capsys, "models", "mlp", "--classes", "0")


# --- shorthands and the dry run


@pytest.mark.parametrize(
    ("command", "arguments", "settings"),
    [
        (
            "train",
            ["--seed", "3", "--epochs", "5", "--device", "cpu", "--out", "runs/1"],
            ["seed=3", "schedule.epochs=5", 'run.device="cpu"', 'run.out="runs/1"'],
        ),
        ("train", ["--set", "seed=1", "--seed", "2"], ["seed=1", "seed=2"]),
        ("train", ["--seed", "2", "--set", "seed=1"], ["seed=2", "seed=1"]),
        ("score", ["--seed", "3", "--device", "cuda:1"], ["seed=3", 'run.device="cuda:1"']),
        ("cache", ["--seed", "3", "--device", "cpu"], ["seed=3", 'run.device="cpu"']),
        (
            "sweep",
            ["--epochs", "2", "--out", "o", "--device", "cpu"],
            ["schedule.epochs=2", 'run.out="o"', 'run.device="cpu"'],
        ),
        ("demo", ["--epochs", "2"], ["schedule.epochs=2"]),
        ("eval", ["--device", "cpu"], ['run.device="cpu"']),
    ],
)
def test_shorthands_are_settings(
    monkeypatch: pytest.MonkeyPatch, command: str, arguments: Sequence[str], settings: Sequence[str]
) -> None:
    seen: list[list[str]] = []

    def noted(options: Any) -> int:
        seen.append(options.settings)
        return cli.OK

    module = next(module for module in cli.COMMANDS if module.__name__.endswith(f".{command}"))
    monkeypatch.setattr(module, "run", noted)
    recipe = [] if command == "demo" else ["digits_alone"]
    assert cli.main([command, *recipe, *arguments]) == cli.OK
    assert cli.main([command, *recipe]) == cli.OK
    assert seen == [list(settings), []], "a later call does not have the earlier call's settings"


@pytest.mark.parametrize("folder", ["1", "a b", "true", 'quo"te', "ß", "1.5"])
def test_a_folder_of_any_name_is_text(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from lrds_fast.cli import train as command

    seen: list[str] = []

    def noted(options: Any) -> int:
        seen.append(load_recipe("digits_alone", options.settings).run.out)
        return cli.OK

    monkeypatch.setattr(command, "run", noted)
    assert cli.main(["train", "digits_alone", "--out", folder]) == cli.OK
    assert seen == [folder]


def test_a_dry_run_checks_everything_and_writes_nothing(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    teacher = ["--set", f"teacher.checkpoint={runs / 'teacher' / 'last.pt'}"]
    capsys.readouterr()
    assert cli.main(["train", "digits_kd_lr", *SMALL, *teacher, "--seed", "5", "--dry-run"]) == cli.OK
    printed, note = capsys.readouterr()
    recipe = json.loads(printed)
    assert recipe["seed"] == 5 and recipe["run"]["device"] == "cpu" and recipe["data"]["train_limit"] == 120
    assert recipe["loss"]["ce_weight_unselected"] == 1.0, "computed defaults are numbers"
    assert "nothing was trained: mlp_8x16_32 of 7,428 parameters, teacher mlp_8x16_128" in note
    assert "120 training" in note and "200 test samples" in note and "into runs/digits_kd_lr" in note
    dry = ("--dry-run", *SMALL)
    assert "there is no file runs/digits_teacher/last.pt" in fails(capsys, "train", "digits_kd_lr", *dry)
    assert "unknown model 'mpl'" in fails(capsys, "train", "digits_alone", *dry, "--set", "student.model=mpl")
    assert "data.root: there is no file c.npz" in fails(
        capsys, "train", "digits_alone", *dry, "--set", "data.name=npz", "--set", "data.root=c.npz"
    )
    assert "does not take images" in fails(capsys, "train", "digits_alone", *dry, "--set", "student.model=resnet8")
    assert list(tmp_path.iterdir()) == []
    assert "holds a run already" in fails(capsys, "train", "digits_alone", *dry, "--out", str(runs / "student"))
    assert cli.main(["train", "digits_alone", *dry, "--out", str(runs / "student"), "--overwrite"]) == cli.OK
    assert (runs / "student" / "last.pt").exists()


def test_mistyped_options_have_a_hint(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["train", "digits_alone", "--dryrun"], "unknown argument --dryrun; did you mean '--dry-run'?"),
        (["exprot", "runs/a"], "there is no command 'exprot'; did you mean 'export'?"),
        (["evaluate", "runs/a"], "there is no command 'evaluate'; did you mean 'eval'?"),
        (["train", "digits_alone", "--epochs", "two"], "argument --epochs: invalid int value: 'two'"),
        (["export", "runs/a"], "the following arguments are required: --out"),
    ):
        with pytest.raises(SystemExit) as raised:
            cli.main(arguments)
        assert raised.value.code == cli.MISUSED
        assert message in capsys.readouterr().err
