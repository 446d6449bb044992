"""Selections: rules, the file format, and errors."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from html_page import Page
from hypothesis import given, settings
from hypothesis import strategies as st
from influence_oracle import make_case
from matplotlib.colors import to_hex
from torch.utils.data import DataLoader, TensorDataset

import lrds_fast
from lrds_fast import influence
from lrds_fast.pages import charts
from lrds_fast.selection import Selection, dataset_fingerprint, prefix, select
from lrds_fast.selection.report import overlap, threshold


@pytest.fixture
def scores() -> influence.Scores:
    return influence.last_layer_scores(
        **make_case(0).arguments(torch.float32),
        scores=("kd_gain", "param_shift:kd", "teacher_correct", "el2n", "random"),
    )


def kept(values: list[float], **options: Any) -> list[int]:
    indices: list[int] = select({"s": torch.tensor(values)}, "s", **options).indices.tolist()
    return indices


def test_ratio_keeps_the_lowest_rounding_half_up() -> None:
    values = [5.0, 1.0, 4.0, 2.0, 3.0]
    assert kept(values, ratio=0.0) == []
    assert kept(values, ratio=0.09) == []
    assert kept(values, ratio=0.1) == [1]
    assert kept(values, ratio=0.3) == [1, 3]
    assert kept(values, ratio=0.5) == [1, 3, 4]
    assert kept(values, ratio=1.0) == [0, 1, 2, 3, 4]


def test_largest_keeps_the_highest() -> None:
    values = [5.0, 1.0, 4.0, 2.0, 3.0]
    assert kept(values, ratio=0.4, largest=True) == [0, 2]
    assert kept(values, threshold=3.0, largest=True) == [0, 2]


def test_threshold_is_strict() -> None:
    values = [-1.0, -0.0, 0.0, 1.0, -math.inf, math.inf]
    assert kept(values, threshold=0) == [0, 4]
    assert kept(values, threshold=math.inf) == [0, 1, 2, 3, 4]
    # 0.1 is not a float32: the comparison must not round it to the score's precision.
    assert kept([float(torch.tensor(0.1))], threshold=0.1) == []
    assert kept([float(torch.tensor(0.7))], threshold=0.7) == [0]


@pytest.mark.parametrize("largest", [False, True])
def test_ties_go_to_the_lower_index(largest: bool) -> None:
    assert kept([1.0] * 40, ratio=0.5, largest=largest) == list(range(20))
    assert kept([0.0, -0.0] * 20, ratio=0.25, largest=largest) == list(range(10))


def test_per_class_keeps_the_share_of_each_class() -> None:
    values = torch.tensor([3.0, 1.0, 2.0, 9.0, 8.0, 7.0, 6.0, 5.0])
    labels = [0, 0, 0, 4, 4, 4, 4, 2]
    chosen = select({"s": values}, "s", ratio=0.5, per_class=True, labels=labels)
    assert chosen.indices.tolist() == [1, 2, 5, 6, 7]
    assert chosen.indices.dtype == torch.int64
    plain = select({"s": values}, "s", ratio=0.5)
    assert plain.indices.tolist() == [0, 1, 2, 7]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from([-1.5, 0.0, 0.25, 7.0]), st.integers(0, 2)), max_size=40),
    st.floats(0, 1),
    st.booleans(),
    st.booleans(),
)
def test_selection_is_the_sorted_definition(
    rows: list[tuple[float, int]], ratio: float, per_class: bool, largest: bool
) -> None:
    values = torch.tensor([value for value, _ in rows], dtype=torch.float64)
    labels = torch.tensor([label for _, label in rows], dtype=torch.int64)
    chosen = select({"s": values}, "s", ratio=ratio, per_class=per_class, largest=largest, labels=labels)
    expected: list[int] = []
    for group in {0, 1, 2} if per_class else {None}:
        members = [i for i, (_, label) in enumerate(rows) if group in (None, label)]
        members.sort(key=lambda i: (-rows[i][0] if largest else rows[i][0], i))
        expected += members[: math.floor(ratio * len(members) + 0.5)]
    assert chosen.indices.tolist() == sorted(expected)
    assert chosen.mask.nonzero()[:, 0].tolist() == sorted(expected)


def test_hysteresis_by_threshold() -> None:
    """A sample enters below 1 and leaves at 2; in between its state does not change."""
    scores = {"s": torch.tensor([0.5, 1.0, 1.5, 2.0, 0.5, 1.0, 1.5, 2.0])}
    before = torch.tensor([True] * 4 + [False] * 4)
    chosen = select(scores, "s", threshold=1.0, leave=2.0, previous=before)
    assert chosen.indices.tolist() == [0, 1, 2, 4]
    assert chosen.policy["leave"] == 2.0
    assert select(scores, "s", threshold=1.0, leave=2.0).indices.tolist() == [0, 4]
    assert "leave" not in select(scores, "s", threshold=1.0).policy
    turned = {"s": -scores["s"]}
    again = select(turned, "s", threshold=-1.0, leave=-2.0, largest=True, previous=chosen)
    assert again.indices.tolist() == [0, 1, 2, 4]


@pytest.mark.parametrize("per_class", [False, True])
def test_hysteresis_by_ratio(per_class: bool) -> None:
    """The lowest half enters; a kept sample stays while it is in the lowest three quarters."""
    draws = torch.Generator().manual_seed(0)
    labels = torch.arange(400) % 2
    values = torch.rand(400, generator=draws) + labels
    before = torch.rand(400, generator=draws) < 0.5
    options: dict[str, Any] = {"per_class": per_class, "labels": labels}
    chosen = select({"s": values}, "s", ratio=0.5, leave=0.75, previous=before, **options)
    half, most = (select({"s": values}, "s", ratio=ratio, **options).mask for ratio in (0.5, 0.75))
    assert torch.equal(chosen.mask, half | (before & most))
    assert int(half.sum()) < int(chosen.mask.sum()) < int(most.sum())
    # Nothing changes while the scores do not.
    assert torch.equal(select({"s": values}, "s", ratio=0.5, leave=0.75, previous=chosen, **options).mask, chosen.mask)


def test_hysteresis_reduces_changes_from_noise() -> None:
    """Scores around the threshold, measured ten times with noise: fewer samples change sides."""
    draws = torch.Generator().manual_seed(1)
    truth = torch.randn(2000, generator=draws)
    changes = {}
    for leave in (0.0, 0.6):
        mask: torch.Tensor | None = None
        changes[leave] = 0
        for _ in range(10):
            noisy = {"s": truth + 0.2 * torch.randn(2000, generator=draws)}
            following = select(noisy, "s", threshold=0.0, leave=leave, previous=mask).mask
            changes[leave] += 0 if mask is None else int((following != mask).sum())
            mask = following
    assert changes[0.6] < 0.35 * changes[0.0]


def test_a_previous_selection_of_other_data_is_refused(scores: influence.Scores) -> None:
    other = select({"s": torch.rand(60)}, "s", ratio=0.5, dataset=dataset_fingerprint([0] * 60, 5))
    with pytest.raises(ValueError, match="previous was made for another dataset than the scores"):
        select(scores, threshold=0.0, leave=1.0, previous=other)


def test_scores_bring_labels_predictions_and_fingerprint(scores: influence.Scores) -> None:
    chosen = select(scores, threshold=0.0)
    assert torch.equal(chosen.mask, scores["kd_gain"] < 0)
    assert 0 < int(chosen.mask.sum()) < len(chosen)
    assert chosen.labels is not None
    assert torch.equal(chosen.labels, scores.target)
    assert chosen.fingerprint == dataset_fingerprint(scores.target, 5)
    assert chosen.policy["threshold"] == 0.0
    assert "60 samples" in repr(chosen)
    by_class = select(scores, "el2n", ratio=0.5, per_class=True)
    for label in range(5):
        size = int((scores.target == label).sum())
        assert int(by_class.mask[scores.target == label].sum()) == math.floor(size / 2 + 0.5)


def test_fingerprint_is_the_documented_hash() -> None:
    labels = [3, 1, 2]
    raw = struct.pack("<5q", 3, 10, *labels)
    assert dataset_fingerprint(labels, 10) == hashlib.sha256(raw).hexdigest()
    assert dataset_fingerprint(torch.tensor(labels, dtype=torch.int32), 10) == dataset_fingerprint(labels, 10)
    assert dataset_fingerprint([3, 2, 1], 10) != dataset_fingerprint(labels, 10)
    assert dataset_fingerprint(labels, 11) != dataset_fingerprint(labels, 10)


def test_save_and_load_are_inverse(scores: influence.Scores, tmp_path: Path) -> None:
    chosen = select(scores, ratio=0.4, per_class=True)
    chosen.save(tmp_path / "d_t.parquet")
    loaded = Selection.load(tmp_path / "d_t.parquet", dataset=chosen.fingerprint)
    assert torch.equal(loaded.mask, chosen.mask)
    assert torch.equal(loaded.indices, chosen.indices)
    assert list(loaded.scores) == list(chosen.scores)
    for name, values in chosen.scores.items():
        assert loaded.scores[name].dtype == values.dtype
        assert torch.equal(loaded.scores[name], values)
    assert chosen.labels is not None
    assert loaded.labels is not None
    assert torch.equal(loaded.labels, chosen.labels)
    assert chosen.teacher_pred is not None
    assert loaded.teacher_pred is not None
    assert torch.equal(loaded.teacher_pred, chosen.teacher_pred)
    assert (loaded.policy, loaded.fingerprint, loaded.num_classes, loaded.meta) == (
        chosen.policy,
        chosen.fingerprint,
        chosen.num_classes,
        chosen.meta,
    )
    assert os.listdir(tmp_path) == ["d_t.parquet"]


def test_a_selection_of_bare_scores_is_saved_too(tmp_path: Path) -> None:
    path = tmp_path / "bare.parquet"
    chosen = select({"mine": torch.arange(4).half(), "ints": torch.arange(4)}, "mine", ratio=0.5)
    chosen.save(path)
    loaded = Selection.load(path)
    assert loaded.indices.tolist() == [0, 1]
    assert loaded.labels is None
    assert loaded.teacher_pred is None
    assert loaded.fingerprint is None
    with pytest.raises(ValueError, match="does not say which dataset"):
        Selection.load(path, dataset=dataset_fingerprint([0, 1, 0, 1], 2))
    empty = select({"mine": torch.empty(0)}, "mine", ratio=0.5)
    empty.save(path)
    assert len(Selection.load(path)) == 0


def test_pandas_reads_the_table(scores: influence.Scores, tmp_path: Path) -> None:
    chosen = select(scores, threshold=0.0)
    chosen.save(tmp_path / "d_t.parquet")
    frame = pd.read_parquet(tmp_path / "d_t.parquet")
    assert list(frame.columns) == ["index", "label", "teacher_pred", *scores, "kd_gain_standard_error", "selected"]
    assert frame["index"].tolist() == list(range(60))
    assert frame["label"].tolist() == scores.target.tolist()
    assert frame["teacher_pred"].tolist() == scores.teacher_pred.tolist()
    assert frame["kd_gain"].dtype == "float32"
    assert torch.equal(torch.tensor(frame["kd_gain"].to_numpy()), scores["kd_gain"])
    assert frame.loc[frame["selected"], "index"].tolist() == chosen.indices.tolist()
    # Arithmetic a user would do there agrees with select.
    assert frame.nsmallest(24, "kd_gain").index.sort_values().tolist() == (select(scores, ratio=0.4).indices.tolist())


def test_metadata_records_the_provenance(scores: influence.Scores, tmp_path: Path) -> None:
    select(scores, ratio=0.5).save(tmp_path / "d_t.parquet")
    facts = json.loads(pq.read_schema(tmp_path / "d_t.parquet").metadata[b"lrds_fast.selection"])
    assert facts["fingerprint"] == dataset_fingerprint(scores.target, 5)
    assert facts["policy"] == {
        "by": "kd_gain",
        "ratio": 0.5,
        "threshold": None,
        "per_class": False,
        "largest": False,
    }
    assert facts["library_version"]
    assert facts["meta"]["curvature"] == "ekfac"


def test_a_failed_save_leaves_the_old_file(
    scores: influence.Scores, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "d_t.parquet"
    select(scores, ratio=0.5).save(path)
    before = path.read_bytes()

    def full_disk(table: pa.Table, where: str, **options: object) -> None:
        Path(where).write_bytes(b"PAR1 half a fi")
        raise OSError("No space left on device")

    monkeypatch.setattr(pq, "write_table", full_disk)
    with pytest.raises(OSError, match="No space left"):
        select(scores, ratio=0.9).save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["d_t.parquet"]


def test_numpy_numbers_are_numbers(scores: influence.Scores, tmp_path: Path) -> None:
    chosen = select(scores, ratio=np.float32(0.5))
    assert int(chosen.mask.sum()) == 30
    chosen.save(tmp_path / "d_t.parquet")
    wanted = dataset_fingerprint(scores.target.tolist(), np.int64(5))
    assert Selection.load(tmp_path / "d_t.parquet", dataset=wanted).policy["ratio"] == 0.5


def test_save_into_a_missing_folder_is_named(scores: influence.Scores, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no folder .*nowhere"):
        select(scores, ratio=0.5).save(tmp_path / "nowhere" / "d_t.parquet")


def rewrite(path: Path, change: Any) -> None:
    """Applies `change` to the saved table and keeps its metadata."""
    table = pq.read_table(path)
    metadata = table.schema.metadata
    pq.write_table(change(table).replace_schema_metadata(metadata), path)


def without_metadata(path: Path) -> None:
    pd.read_parquet(path).to_parquet(path)


def of_another_format(path: Path) -> None:
    table = pq.read_table(path)
    facts = json.loads(table.schema.metadata[b"lrds_fast.selection"]) | {"format": 99}
    pq.write_table(table.replace_schema_metadata({b"lrds_fast.selection": json.dumps(facts)}), path)


def relabelled(table: pa.Table) -> pa.Table:
    labels = table["label"].to_pylist()
    labels[0] = (labels[0] + 1) % 5
    return table.set_column(1, "label", pa.array(labels, pa.int64()))


def half_labelled(table: pa.Table) -> pa.Table:
    return table.set_column(1, "label", pa.array([None, *table["label"].to_pylist()[1:]], pa.int64()))


DAMAGE: dict[str, tuple[Any, str]] = {
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-100]), "truncated, damaged or not Parquet"),
    "cut in half": (lambda path: path.write_bytes(path.read_bytes()[:700]), "truncated, damaged or not Parquet"),
    "empty": (lambda path: path.write_bytes(b""), "truncated, damaged or not Parquet"),
    "text": (lambda path: path.write_text("index,selected\n0,True\n" * 9), "not Parquet"),
    "another table": (without_metadata, "is Parquet but not a selection"),
    "another format": (of_another_format, "selection format 99, this version reads 1"),
    "no mask": (lambda path: rewrite(path, lambda t: t.drop_columns(["selected"])), "not a complete selection"),
    "no score": (lambda path: rewrite(path, lambda t: t.drop_columns(["el2n"])), "not a complete selection"),
    "missing label": (lambda path: rewrite(path, half_labelled), "not a complete selection"),
    "rows dropped": (lambda path: rewrite(path, lambda t: t.slice(0, 40)), "reordered, added or dropped"),
    "rows sorted": (lambda path: rewrite(path, lambda t: t.sort_by("kd_gain")), "reordered, added or dropped"),
    "labels edited": (lambda path: rewrite(path, relabelled), "labels are not those it was saved with"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_refused_in_one_line(damage: str, scores: influence.Scores, tmp_path: Path) -> None:
    path = tmp_path / "d_t.parquet"
    select(scores, ratio=0.5).save(path)
    apply, message = DAMAGE[damage]
    apply(path)
    with pytest.raises(ValueError, match=message) as raised:
        Selection.load(path)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_flipped_bytes_do_not_pass_silently(scores: influence.Scores, tmp_path: Path) -> None:
    """Wherever a byte is damaged, load refuses or returns what was saved; it never crashes in another way."""
    path = tmp_path / "d_t.parquet"
    chosen = select(scores, ratio=0.5)
    chosen.save(path)
    good = path.read_bytes()
    refusals: list[str] = []
    places = range(0, len(good), 17)
    for place in places:
        damaged = bytearray(good)
        damaged[place] ^= 0xFF
        path.write_bytes(bytes(damaged))
        try:
            loaded = Selection.load(path, dataset=chosen.fingerprint)
        except ValueError as error:
            refusals.append(str(error))
            continue
        assert torch.equal(loaded.mask, chosen.mask)
        assert all(torch.equal(loaded.scores[name], scores[name]) for name in scores)
    assert len(refusals) > len(places) / 4
    assert not any("\n" in refusal for refusal in refusals)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no selection at .*gone.parquet"):
        Selection.load(tmp_path / "gone.parquet")
    with pytest.raises(ValueError, match="is not a file"):
        Selection.load(tmp_path)


def test_another_dataset_is_refused(scores: influence.Scores, tmp_path: Path) -> None:
    path = tmp_path / "d_t.parquet"
    select(scores, ratio=0.5).save(path)
    labels = scores.target.tolist()
    same = SimpleNamespace(targets=labels, classes=list("abcde"))
    assert len(Selection.load(path, dataset=same)) == 60
    by_name = SimpleNamespace(fingerprint=dataset_fingerprint(labels, 5))
    assert len(Selection.load(path, dataset=by_name)) == 60
    for other in (
        SimpleNamespace(targets=labels[::-1], classes=list("abcde")),
        SimpleNamespace(targets=labels, classes=list("abcdef")),
        SimpleNamespace(targets=labels[:-1], classes=list("abcde")),
        dataset_fingerprint([0], 2),
    ):
        with pytest.raises(ValueError, match="made for another dataset.*score this dataset") as raised:
            Selection.load(path, dataset=other)
        assert "\n" not in str(raised.value)
    with pytest.raises(TypeError, match="dataset must be a fingerprint"):
        Selection.load(path, dataset=3)
    with pytest.raises(ValueError, match="64 hex digits; got 'cifar100'"):
        Selection.load(path, dataset="cifar100")


def test_targets_identify_the_dataset(scores: influence.Scores, tmp_path: Path) -> None:
    path = tmp_path / "d_t.parquet"
    select(scores, ratio=0.5, dataset=SimpleNamespace(targets=scores.target)).save(path)
    labels = scores.target.tolist()
    assert len(Selection.load(path, dataset=SimpleNamespace(targets=labels))) == 60
    with pytest.raises(ValueError, match="made for another dataset"):
        Selection.load(path, dataset=SimpleNamespace(targets=labels[::-1]))
    with pytest.raises(ValueError, match=r"d_t.parquet cannot be compared .*: labels must lie in \[0, 5\)"):
        Selection.load(path, dataset=SimpleNamespace(targets=[9] * 60))
    with pytest.raises(
        TypeError, match=r"list lacks `targets`: pass dataset=.*dataset_fingerprint\(labels, num_classes"
    ):
        Selection.load(path, dataset=labels)
    with pytest.raises(TypeError, match="SimpleNamespace lacks `classes`"):
        select({"s": torch.rand(60)}, "s", ratio=0.5, dataset=SimpleNamespace(targets=labels))


def test_a_dataset_yields_the_selection_flag(scores: influence.Scores) -> None:
    chosen = select(scores, ratio=0.4)
    x, y = torch.arange(60.0)[:, None], scores.target
    flagged: Any = chosen.dataset(TensorDataset(x, y))
    assert len(flagged) == 60 and flagged[3][2] is bool(chosen.mask[3]) and torch.equal(flagged[3][0], x[3])
    with_index = chosen.dataset([(x[i], int(y[i]), i) for i in range(60)])
    assert with_index[-1][2:] == (59, bool(chosen.mask[59]))
    dicts = chosen.dataset([{"image": x[i], "label": int(y[i])} for i in range(60)])
    assert dicts[7] == {"image": x[7], "label": int(y[7]), "selected": bool(chosen.mask[7])}
    (_, _, flags) = next(iter(DataLoader(flagged, 60)))
    assert flags.dtype == torch.bool and torch.equal(flags, chosen.mask)

    class Labelled(TensorDataset):
        targets = y.flip(0).tolist()

    with pytest.raises(ValueError, match="the selection was made for another dataset"):
        chosen.dataset(Labelled(x, y))
    with pytest.raises(ValueError, match="the selection is for 60 samples, the dataset has 59"):
        chosen.dataset(TensorDataset(x[:59], y[:59]))
    with pytest.raises(TypeError, match="of must be a map-style Dataset.*; got generator"):
        chosen.dataset(i for i in range(60))
    with pytest.raises(TypeError, match="samples must be .*; got Tensor at 0"):
        chosen.dataset(x)[0]


def test_prefix_puts_the_selected_first() -> None:
    selected = torch.tensor([False, True, False, True, True, False])
    x, y = torch.arange(12.0).reshape(6, 2), torch.arange(6)
    front, labels, k = prefix(x, y, selected)
    assert k == 3 and labels.tolist() == [1, 3, 4, 0, 2, 5] and torch.equal(front, x[labels])
    assert prefix(y, ~torch.ones(6, dtype=torch.bool))[1] == 0
    torch.manual_seed(0)
    z, v = torch.randn(6, 5), torch.randn(6, 5)
    expected = lrds_fast.kd_loss(z, v, y % 5, selected=selected)
    student, teacher, target, k = prefix(z, v, y % 5, selected)
    taught = torch.arange(6) < k
    torch.testing.assert_close(lrds_fast.kd_loss(student, teacher, target, selected=taught), expected)
    for parts, error, message in (
        ((x, y), TypeError, r"must be selected, \(B,\) bool; got torch.int64 \(6,\)"),
        ((), TypeError, "must be selected"),
        (([1] * 6, selected), TypeError, "the parts of a batch must be tensors; got list"),
        ((x[:5], selected), ValueError, r"must have selected's 6 rows; got shape \(5, 2\)"),
    ):
        with pytest.raises(error, match=message):
            prefix(*parts)


def test_scores_of_another_dataset_are_refused(scores: influence.Scores) -> None:
    with pytest.raises(ValueError, match="computed for another dataset"):
        select(scores, ratio=0.5, dataset=dataset_fingerprint([0, 1], 2))
    with pytest.raises(ValueError, match="labels differ from scores.target"):
        select(scores, ratio=0.5, labels=scores.target.flip(0))
    bare = {"s": torch.rand(3)}
    wanted = dataset_fingerprint([0, 1, 1], 2)
    assert select(bare, "s", ratio=0.5, labels=[0, 1, 1], dataset=wanted).fingerprint == wanted


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no criterion": ({}, ValueError, "exactly one of confidence, outliers, ratio and threshold"),
    "two criteria": (
        {"ratio": 0.5, "threshold": 0.0},
        ValueError,
        "exactly one of confidence, outliers, ratio and threshold",
    ),
    "ratio above 1": ({"ratio": 1.5}, ValueError, r"ratio must lie in \[0, 1\]; got 1.5"),
    "nan ratio": ({"ratio": math.nan}, ValueError, r"ratio must lie in \[0, 1\]"),
    "nan threshold": ({"threshold": math.nan}, ValueError, "threshold must be a number"),
    "ratio in words": ({"ratio": "half"}, TypeError, "ratio must be a number; got 'half'"),
    "ratio true": ({"ratio": True}, TypeError, "ratio must be a number; got True"),
    "unknown score": ({"by": "kd", "ratio": 0.5}, ValueError, "by must be one of the computed scores, s; got 'kd'"),
    "scores of no kind": ({"scores": torch.rand(4), "ratio": 0.5}, TypeError, "scores must be Scores or a mapping"),
    "nan score": (
        {"scores": {"s": torch.tensor([1.0, math.nan])}, "ratio": 0.5},
        ValueError,
        "score 's' is NaN at sample 1",
    ),
    "matrix score": ({"scores": {"s": torch.rand(2, 2)}, "ratio": 0.5}, ValueError, r"score 's' must be real"),
    "words for scores": ({"scores": {"s": ["a"]}, "ratio": 0.5}, TypeError, "score 's' must be a tensor of numbers"),
    "column of its own": (
        {"scores": {"s": torch.rand(2), "label": torch.rand(2)}, "ratio": 0.5},
        ValueError,
        "names other than index, label, teacher_pred, selected; got 'label'",
    ),
    "uneven scores": (
        {"scores": {"s": torch.rand(2), "t": torch.rand(3)}, "ratio": 0.5},
        ValueError,
        "every score must have the 2 samples of 's'; 't' has 3",
    ),
    "classes unknown": ({"ratio": 0.5, "per_class": True}, ValueError, "per_class=True needs labels="),
    "labels too short": (
        {"ratio": 0.5, "labels": [0, 1]},
        ValueError,
        "labels must have one entry per sample, 4; got 2",
    ),
    "labels in words": ({"ratio": 0.5, "labels": list("abcd")}, TypeError, "labels must hold integers"),
    "leave inside": ({"ratio": 0.5, "leave": 0.4}, ValueError, r"leave must lie in \[ratio, 1\], 0.5 to 1; got 0.4"),
    "leave below": ({"threshold": 0.5, "leave": 0.4}, ValueError, "leave must be >= threshold, 0.5; got 0.4"),
    "leave above": (
        {"threshold": 0.5, "leave": 0.6, "largest": True},
        ValueError,
        "leave must be <= threshold, 0.5; got 0.6",
    ),
    "leave nan": ({"threshold": 0.5, "leave": math.nan}, ValueError, "leave must be >= threshold, 0.5; got nan"),
    "leave in words": ({"threshold": 0.5, "leave": "late"}, TypeError, "leave must be a number; got 'late'"),
    "previous alone": (
        {"ratio": 0.5, "previous": torch.ones(4, dtype=torch.bool)},
        ValueError,
        "previous needs leave=, the limit at which its samples leave",
    ),
    "previous of others": (
        {"ratio": 0.5, "leave": 0.6, "previous": torch.ones(5, dtype=torch.bool)},
        ValueError,
        r"previous must be a Selection, or bool of shape \(4,\)",
    ),
    "soft labels": ({"ratio": 0.5, "labels": torch.rand(4)}, ValueError, "labels must be integers"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_named(what: str) -> None:
    change, error, message = BAD[what]
    arguments = {"scores": {"s": torch.arange(4.0)}, "by": "s", **change}
    with pytest.raises(error, match=message) as raised:
        select(**arguments)
    assert "\n" not in str(raised.value)


def test_fingerprint_refuses_invalid_labels() -> None:
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 3\); got values from 0 to 3"):
        dataset_fingerprint([0, 3], 3)
    with pytest.raises(ValueError, match="num_classes must be an int >= 1; got 0"):
        dataset_fingerprint([0], 0)


def page_of(chosen: Selection, folder: Path, **options: Any) -> Page:
    chosen.report(folder / "report.html", **options)
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def test_report_is_one_page_with_counts(scores: influence.Scores, tmp_path: Path) -> None:
    chosen = select(scores, threshold=0.0)
    page = page_of(chosen, tmp_path)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.headings[0] == f"{int(chosen.mask.sum())} of 60 samples keep the teacher"
    assert "<p>by = kd_gain, threshold = 0.</p>" in text
    assert "by='kd_gain', threshold=0.0)" in repr(chosen)
    assert page.headings[1] == "kd_gain" and set(scores) <= set(page.headings)
    for label, row in enumerate(page.table("class", "samples")):
        members = scores.target == label
        kept = int((members & chosen.mask).sum())
        assert row == [str(label), str(int(members.sum())), str(kept), f"{kept / int(members.sum()):.0%}"]
    right = scores.teacher_pred == scores.target
    assert f"on {float(right[chosen.mask].double().mean()):.1%} of the kept" in text


def test_report_survives_odd_scores(tmp_path: Path) -> None:
    odd = {"<b>": torch.tensor([1.0, 1.0, math.inf]), "nan": torch.full((3,), math.nan)}
    page = page_of(select(odd, "<b>", ratio=0.5), tmp_path)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.headings[1:3] == ["<b>", "nan"] and "<b>" not in text
    assert "1 infinite or NaN left out" in text and "No finite value" in text


def test_report_draws_thresholds_and_standard_errors(tmp_path: Path, figures: dict[str, Any]) -> None:
    values = torch.linspace(-1, 1, 200)
    table = {"kd_gain": values, "kd_gain_standard_error": torch.full((200,), 0.25)}
    chosen = dataclasses.replace(select(table, "kd_gain", ratio=0.8), policy={"by": "kd_gain", "confidence": 2.0})
    page = page_of(chosen, tmp_path)
    cut = float(values[159] + values[160]) / 2
    assert threshold(chosen) == pytest.approx(cut)
    assert "kd_gain_standard_error" not in page.headings, "it is no score of its own"
    (histogram,) = figures["samples by kd_gain"].axes
    assert histogram.lines[0].get_xdata()[0] == pytest.approx(cut) and histogram.get_xlabel() == "kd_gain"
    heights = {colour: 0.0 for colour in charts.SERIES[:2]}
    for bar in histogram.patches:
        heights[to_hex(bar.get_facecolor())] += bar.get_height()
        left, right = bar.get_x(), bar.get_x() + bar.get_width()
        assert right <= cut + 1e-6 or left >= cut - 1e-6, "no bin has both sides of the threshold"
    assert heights == {charts.SERIES[0]: 160, charts.SERIES[1]: 40}
    (ranks,) = figures["kd_gain with standard errors, by rank"].axes
    bars = [segment for part in ranks.containers for segment in part[2][0].get_segments()]
    assert len(bars) == 60 and all(bar[1][1] - bar[0][1] == pytest.approx(1.0) for bar in bars), "2 errors each side"
    assert sum(float(bar[0][0]) for bar in bars) / 60 == pytest.approx(100.5, abs=1), "ranks 1 to 200"
    assert "± 2 standard errors" in ranks.get_ylabel()


def test_thresholds_that_parts_overlap_at_are_none() -> None:
    scores = {"s": torch.tensor([0.0, 1.0, 2.0, 3.0])}
    assert threshold(select(scores, "s", ratio=0.5)) == 1.5
    assert threshold(select(scores, "s", ratio=0.5, largest=True)) == 1.5
    assert threshold(select(scores, "s", threshold=2.5)) == 2.5
    assert threshold(select(scores, "s", ratio=1.0)) is None
    mixed = dataclasses.replace(select(scores, "s", ratio=0.5), mask=torch.tensor([True, False, True, False]))
    assert threshold(mixed) is None


def test_overlap_is_jaccard_and_kappa() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    draws = torch.Generator().manual_seed(5)
    one, other = torch.rand(4000, generator=draws) < 0.3, torch.rand(4000, generator=draws) < 0.6
    found = overlap(one, other)
    assert found.jaccard == pytest.approx(metrics.jaccard_score(one, other))
    assert found.kappa == pytest.approx(metrics.cohen_kappa_score(one, other), abs=1e-12)
    assert found.chance == pytest.approx(found.jaccard, abs=0.02), "these are independent"
    assert found.kept == pytest.approx(float(one.double().mean() + other.double().mean()) / 2)
    same = overlap(one, one)
    assert same.jaccard == same.kappa == 1
    everything = torch.ones(4, dtype=torch.bool)
    assert math.isnan(overlap(everything, everything).kappa)
    assert math.isnan(overlap(~everything, ~everything).jaccard)


class Pictures:
    """A dataset of (picture, label)."""

    def __init__(self, make: Any) -> None:
        self._make = make
        self.reads: set[int] = set()

    def __len__(self) -> int:
        return 60

    def __getitem__(self, index: int) -> tuple[Any, int]:
        self.reads.add(index)
        return self._make(index), 0


def _pil(index: int) -> Any:
    from PIL import Image

    return Image.new("RGB", (4, 3), (index, 0, 0))


@pytest.mark.parametrize(
    "make",
    [
        lambda index: torch.full((3, 4, 1), index, dtype=torch.uint8),
        lambda index: torch.full((3, 4), index, dtype=torch.uint8),
        lambda index: np.full((3, 4, 3), index, dtype=np.uint8),
        lambda index: torch.full((3, 5, 4), index, dtype=torch.uint8),
        lambda index: torch.rand(1, 5, 4) * (index + 1) - 0.5,
        _pil,
    ],
    ids=["(H, W, 1)", "(H, W)", "array", "(3, H, W)", "normalised", "PIL"],
)
def test_report_shows_both_ends(make: Any, scores: influence.Scores, tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    chosen, pictures = select(scores, threshold=0.0), Pictures(make)
    chosen.report(tmp_path / "report.html", pictures=pictures, class_names=["ant & bee", "b", "c", "d", "e"])  # type: ignore[arg-type]
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    order = scores["kd_gain"].argsort(stable=True)
    assert pictures.reads == set(order[:24].tolist()) | set(order[-24:].tolist())
    assert page.count('<img src="data:image/png;base64,') == 48
    helpful, harmful = page.index("Most helpful teacher, by kd_gain"), page.index("Most harmful teacher, by kd_gain")
    assert helpful < page.index(f"#{int(order[0])}: ") < harmful < page.index(f"#{int(order[-1])}: ")
    assert "label ant &amp; bee" in page
    assert Page(page).tags["img"] == 48
    chosen.report(tmp_path / "called.html", pictures=lambda index: make(index))
    assert (tmp_path / "called.html").read_text(encoding="utf-8").count("<img") == 48


def test_report_refuses_invalid_pictures(scores: influence.Scores, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"pictures must give \(H, W\).* got \(7,\) for"):
        select(scores, threshold=0.0).report(tmp_path / "r.html", pictures=lambda _: torch.rand(7))
    assert list(tmp_path.iterdir()) == []


def test_report_measures_agreement(tmp_path: Path) -> None:
    """Against scipy, ties included; and the overlap of the selections of two scores."""
    from scipy.stats import spearmanr

    draws = torch.Generator().manual_seed(3)
    a = torch.randn(500, generator=draws)
    table = {"a": a, "b": (a + torch.randn(500, generator=draws)).round(), "flat": torch.ones(500)}
    chosen = select(table, "a", ratio=0.4)
    rows = [row for table in page_of(chosen, tmp_path).tables if table[0] == ["", "a", "b"] for row in table[1:]]
    cells = [cell for row in rows for cell in row[1:]]
    rho = spearmanr(table["a"].numpy(), table["b"].numpy()).statistic
    both = chosen.mask & select(table, "b", ratio=0.4).mask
    assert cells == ["1.00", f"{rho:.2f}", f"{rho:.2f}", "1.00", "100%", *[f"{int(both.sum()) / 200:.0%}"] * 2, "100%"]


def test_report_shows_how_the_score_is_spread_in_every_class(
    scores: influence.Scores, tmp_path: Path, figures: dict[str, Any]
) -> None:
    chosen = select(scores, threshold=0.0)
    page_of(chosen, tmp_path, class_names=["ant", "bee", "cat", "dog", "eel"])
    (axis,) = figures["kd_gain by class"].axes
    names = [text.get_text() for text in axis.get_yticklabels()]
    shares = {n: float(chosen.mask[scores.target == k].double().mean()) for k, n in enumerate(sorted(names))}
    assert names == sorted(names, key=lambda name: (shares[name], name))
    medians = {line.get_ydata()[0]: line.get_xdata()[0] for line in axis.lines if len(line.get_xdata()) == 1}
    for place, name in enumerate(names):
        members = scores["kd_gain"][scores.target == sorted(names).index(name)]
        assert medians[place] == pytest.approx(float(members.double().quantile(0.5)))
