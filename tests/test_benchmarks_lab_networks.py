"""The laboratory on networks, on a handful of random pictures: its arms, its rows, resumption, and its page."""

from __future__ import annotations

import csv
import hashlib
import math
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import lrds_fast
from benchmarks import lab_networks as lab
from benchmarks import teachers_table
from benchmarks.lab_students import measures, revise_logits
from benchmarks.tables import stored_rows
from lrds_fast.data.cifar import MEAN, Pictures


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pictures:
    """A laboratory in which a training takes a second, with its files in tmp_path."""
    for name, value in {
        "SPLIT": (160, 96, 60),
        "BATCH": 32,
        "VIEWS": 2,
        "EPOCHS": 3,
        "TEACHER_EPOCHS": 2,
        "SELECT_AFTER": 1,
        "CONFIDENCE": 0.5,
        "STORED": tmp_path / "rows.csv",
        "GAINS": tmp_path / "gains.csv",
        "TEACHERS": tmp_path / "teachers",
    }.items():
        monkeypatch.setattr(lab, name, value)
    monkeypatch.setattr(lab, "precision", lambda: "off")
    random = torch.Generator().manual_seed(0)
    size = 50_000
    images = torch.randint(0, 256, (1, 3, 32, 32), generator=random, dtype=torch.uint8).expand(size, -1, -1, -1)
    labels = torch.randint(0, 100, (size,), generator=random)
    test = torch.randint(0, 256, (40, 3, 32, 32), generator=random, dtype=torch.uint8)
    return Pictures(images, labels, test, labels[:40])


@pytest.mark.parametrize("eta", [0.5, 0.8])
def test_revision_at_temperature_one(eta: float) -> None:
    random = torch.Generator().manual_seed(1)
    v = 4 * torch.randn(200, 10, generator=random, dtype=torch.float64)
    y = torch.randint(0, 10, (200,), generator=random)
    revised = revise_logits(v, y, 1.0, eta)
    torch.testing.assert_close(revised.softmax(1), lrds_fast.reference.revise_labels(v, y, temperature=1.0, eta=eta))
    others = F.one_hot(y, 10) == 0
    assert torch.equal(revised[others], v[others]), "only the label's logit moves"
    right = v.argmax(1) == y
    assert torch.equal(revised[right], v[right]) and not torch.equal(revised[~right], v[~right])


def test_the_weight_of_an_epoch() -> None:
    rise, fall = lab.ARMS["kd-rise"], lab.ARMS["kd-fall"]
    last = lab.EPOCHS - 1
    assert rise.ce_weight_at(0) == pytest.approx(0.1 * 10 ** (0.5 / lab.EPOCHS))
    assert fall.ce_weight_at(last) == pytest.approx(rise.ce_weight_at(0))
    assert rise.ce_weight_at(last) == pytest.approx(fall.ce_weight_at(0))
    assert lab.ARMS["kd-ce0.3"].ce_weight_at(last) == 0.3
    names = [lab.checkpoint(Path(), "clean", 0, 0, arm) for arm in (rise, fall, lab.ARMS["kd"], lab.ARMS["kd-ce1"])]
    assert len(set(names)) == 4, "arms whose first epochs differ share no checkpoint"


def test_augmentation_is_a_crop_of_the_padded_picture() -> None:
    random = torch.Generator().manual_seed(2)
    images = torch.randint(0, 256, (50, 3, 32, 32), generator=random, dtype=torch.uint8)
    found = lab.augmented(images, random)
    mean = torch.tensor([round(255 * value) for value in MEAN], dtype=torch.uint8).view(3, 1, 1)
    for image, view in zip(images, found, strict=True):
        padded = mean.repeat(1, 40, 40)
        padded[:, 4:36, 4:36] = image
        crops = [padded[:, top : top + 32, left : left + 32] for top in range(9) for left in range(9)]
        assert any(torch.equal(view, crop) or torch.equal(view, crop.flip(2)) for crop in crops)


def test_teachers_train_on_the_data_of_their_regime() -> None:
    labels = torch.randint(0, 100, (20_000,), generator=torch.Generator().manual_seed(3))
    keep, same = lab.teacher_labels("clean", 0, labels)
    assert keep.all() and torch.equal(same, labels)
    keep, same = lab.teacher_labels("unseen", 0, labels)
    assert len(labels[keep].unique()) == 75 and len(labels[~keep].unique()) == 25 and torch.equal(same, labels)
    keep, noisy = lab.teacher_labels("noise", 0, labels)
    assert keep.all() and float((noisy != labels).float().mean()) == pytest.approx(0.4, abs=0.01)
    assert set(lab.split_of(1).student.tolist()).isdisjoint(lab.split_of(1).teacher.tolist())
    assert set(lab.split_of(1).student.tolist()).isdisjoint(lab.split_of(1).held_out.tolist())


def test_measures_are_those_of_a_known_case() -> None:
    p = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6], [0.4, 0.6]])
    acc, nll, ece, _ = measures(p.log(), torch.tensor([0, 1, 1, 1])).values()
    assert acc == pytest.approx(75.0)
    assert nll == pytest.approx(-(math.log(0.9) + math.log(0.1) + 2 * math.log(0.6)) / 4)
    assert ece == pytest.approx(100 * (0.5 * abs(0.5 - 0.9) + 0.5 * abs(1.0 - 0.6)), rel=1e-5)


def test_arms_share_initial_weights_and_runs_are_not_repeated(
    small: Pictures, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lab, "cifar", lambda *_: small)
    monkeypatch.setattr(lab, "jobs", lambda _: iter([("unseen", 0, 0, tuple(lab.ARMS))]))
    cache = tmp_path / "cache"
    monkeypatch.setattr("sys.argv", ["lab", "run", "--cache", str(cache)])
    lab.main()
    rows = stored_rows(lab.STORED)
    assert [row["arm"] for row in rows] == list(lab.ARMS)
    by_arm = {row["arm"]: row for row in rows}
    assert by_arm["ds"]["denied"] == by_arm["random"]["denied"] and 0 < int(by_arm["ds"]["denied"]) <= 10
    assert by_arm["ds-30%"]["denied"] == by_arm["random-30%"]["denied"]
    assert int(by_arm["ds"]["denied"]) < int(by_arm["ds-30%"]["denied"]) <= 29, "the arm's own limit holds"
    assert float(by_arm["lr-published"]["revised_label"]) > float(by_arm["lr"]["revised_label"])
    assert float(by_arm["lr"]["revised_label"]) > float(by_arm["kd"]["revised_label"])
    assert all(float(row["test_nll"]) > 0 for row in rows)
    before = lab.STORED.read_bytes()
    lab.main()
    assert lab.STORED.read_bytes() == before, "finished runs are not run again"

    monkeypatch.setattr("sys.argv", ["lab", "gains", "--cache", str(cache)])
    for _ in range(2):
        lab.main()
        scored = stored_rows(lab.GAINS)
        assert [row["arm"] for row in scored] == ["kd", "lr", "kd-ce0.3", "kd-ce1"]
    assert int(by_arm["ds-30%"]["denied"]) <= round(96 * float(scored[0]["harmful"]))
    assert "| unseen | kd-ce1 | 1 |" in lab.gains_table(scored)

    pair = lab.Pair("unseen", 0, 0, small, cache)
    student = lab.fresh("resnet8", "student", 0, 0).model

    # In the arms "harm" the teacher's own term, with one weight of the cross-entropy on both sides, is harmful, too.
    gain, term = (torch.randn(96, generator=torch.Generator().manual_seed(seed)) for seed in range(2))
    error = torch.full((96,), 0.5)
    with monkeypatch.context() as patched:
        patched.setattr(pair, "gain", lambda *_, calibrated, unselected=1.0: (gain if unselected == 1 else term, error))
        harmful = (gain > 0.5) & (term > 0)
        selected = pair.selection(lab.Arm(deny="harm", confidence=1.0, max_drop=1.0), student)
        assert torch.equal(~selected, harmful) and 0 < int(harmful.sum()) < int((gain > 0.5).sum())

    # Rows of the teacher that belong to other samples lose it in the arm "robust".
    pair.view_logits[lab.VIEWS] = lab.logits_of(student, pair.images) + 0.01
    assert pair.selection(lab.ARMS["robust"], student).all()
    pair.view_logits[lab.VIEWS, :10] = -pair.view_logits[lab.VIEWS, :10]
    assert (~pair.selection(lab.ARMS["robust"], student)).nonzero()[:, 0].tolist() == list(range(10))

    # An arm that continues another arm's checkpoint equals the arm trained from the start.
    (tmp_path / "another").mkdir()
    pair = lab.Pair("unseen", 0, 0, small, tmp_path / "another")
    alone = pair.run("ds")
    assert {key: str(alone[key]) for key in ("test_acc", "test_nll", "denied")} == {
        key: by_arm["ds"][key] for key in ("test_acc", "test_nll", "denied")
    }


def test_an_interrupted_teacher_goes_on(small: Pictures, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = lab.teacher_of("noise", 0, small, tmp_path).state_dict()
    monkeypatch.setattr(lab, "TEACHERS", tmp_path / "others")
    trained = lab.one_epoch

    def fails_in_the_second(state: lab.Trained, *rest: object) -> lab.Trained:
        if state.epoch == 1:
            raise KeyboardInterrupt
        return trained(state, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(lab, "one_epoch", fails_in_the_second)
    with pytest.raises(KeyboardInterrupt):
        lab.teacher_of("noise", 0, small, tmp_path)
    monkeypatch.setattr(lab, "one_epoch", trained)
    resumed = lab.teacher_of("noise", 0, small, tmp_path).state_dict()
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


def test_the_page_has_the_paired_differences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accuracy: dict[str, list[float]] = {
        "kd": [30, 32, 34],
        "lr+ds": [31, 33.5, 35.1],
        "kd-ce0.3": [29, 33, 30],
        "kd-ce1": [28, 30, 36],
    }
    held_out = {"kd": [5, 1, 1], "lr+ds": [0, 0, 0], "kd-ce0.3": [1, 5, 1], "kd-ce1": [1, 1, 5]}
    path = tmp_path / "rows.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, lab.FIELDS, restval="1")
        writer.writeheader()
        for arm, values in accuracy.items():
            for teacher, value in enumerate(values):
                own = {"test_acc": value, "val_acc": held_out[arm][teacher], "test_nll": value / 10}
                writer.writerow({"regime": "unseen", "teacher": teacher, "student": 0, "arm": arm, **own})
    found = lab.results_of(stored_rows(path), "unseen")
    assert lab.differences(found, "lr+ds", "kd", "test_acc") == pytest.approx([1.0, 1.5, 1.1])
    assert lab.differences(found, "lr+ds", lab.TUNED, "test_acc") == pytest.approx([1.0, 0.5, -0.9])
    # Mean 1.2, standard deviation .2646, t(2) at 97.5%: 4.3027.
    assert lab.signed([1.0, 1.5, 1.1], 2) == "**+1.20 ± 0.66**"
    page = lab.render(path, tmp_path)
    assert page == tmp_path / "method.md"
    text = page.read_text(encoding="utf-8")
    assert "accuracy **+1.20 ± 0.66**" in text and "3 of 8 pairs" in text and "Registered before" in text
    for name in ("acc", "nll"):
        assert "lr+ds" in (tmp_path / f"method_networks_{name}.svg").read_text()
    (tmp_path / "bare.md").write_text("# no marks")
    monkeypatch.setattr(lab, "PAGE", tmp_path / "bare.md")
    with pytest.raises(ValueError, match="must have"):
        lab.render(path, tmp_path)


def test_the_teachers_page_lists_every_file() -> None:
    """`python -m benchmarks.teachers_table` mends it."""
    listed = teachers_table.listed(teachers_table.README.read_text(encoding="utf-8"))
    stored = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in lab.TEACHERS.glob("*.safetensors")}
    assert listed == stored


def test_the_teachers_table_follows_the_folder(
    small: Pictures, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "teachers"
    lab.teacher_of("noise", 0, small, tmp_path)
    shutil.copy(folder / "resnet20_noise_0.safetensors", folder / "resnet20_clean_11.safetensors")
    monkeypatch.setattr(teachers_table, "STORED", tmp_path / "rows.csv")
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, lab.FIELDS, restval="1")
        writer.writeheader()
        for number, accuracy in ((0, 34.5), (1, 20), (0, 34.5)):
            writer.writerow({"regime": "noise", "teacher": number, "teacher_test_acc": accuracy})
    page = folder / "README.md"
    page.write_text(f"before {teachers_table.BEGIN} old {teachers_table.END} after")
    assert teachers_table.write(page) == page
    text = page.read_text()
    assert text.startswith("before ") and text.endswith(" after") and "old" not in text
    first, second = (line.split(" | ") for line in text.splitlines() if ".safetensors" in line)
    assert first[0] == "| resnet20_clean_11.safetensors" and first[2] == "11" and first[5:7] == ["-", "float16"]
    assert second[2] == "0" and "--regimes noise" in second[3] and second[5:7] == ["34.50", "float16"]
    assert teachers_table.listed(text) == dict.fromkeys(
        ("resnet20_clean_11.safetensors", "resnet20_noise_0.safetensors"), first[8].strip("` |")
    )
    page.write_text("no marks")
    with pytest.raises(ValueError, match="must have"):
        teachers_table.write(page)
    (folder / "resnet20_noise_0.safetensors").rename(folder / "other.safetensors")
    with pytest.raises(ValueError, match="must be resnet20_REGIME_NUMBER or resnet20_60_epochs"):
        teachers_table.table(folder)
