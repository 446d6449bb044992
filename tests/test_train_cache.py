"""A recipe's soft labels: written by lrds-fast cache, opened for training, refused where they are another recipe's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lrds_fast.cli import main as cli
from lrds_fast.data import SoftLabels, answer_sources
from lrds_fast.models import create
from lrds_fast.recipe.recipe import Recipe
from lrds_fast.selection import Selection, dataset_fingerprint
from lrds_fast.train import run
from lrds_fast.train.cache import open_cache, teacher_facts, weights_sha256

SETTINGS = {
    "run.device": "cpu",
    "data.train_limit": 90,
    "data.augment": "crop-flip",
    "data.batch_size": 32,
    "teacher.model": "mlp",
    "teacher.checkpoint": "teacher.pt",
    "teacher.cache": "soft",
    "teacher.cache_views": 2,
}


@pytest.fixture(autouse=True)
def in_a_folder_with_a_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(3)
    torch.save(create("mlp", num_classes=10).state_dict(), "teacher.pt")
    Path("plain.toml").write_text('name = "plain"\n')


def recipe(**values: Any) -> Recipe:
    return Recipe().with_values(**(SETTINGS | values))


def opened(chosen: Recipe, selected: torch.Tensor | None = None) -> SoftLabels:
    data = run.load_data(chosen)
    teacher = run.build_teacher(chosen, data)
    assert teacher is not None
    return open_cache(chosen, data, teacher_facts(chosen, teacher), selected=selected)


def command(*extra: str, **values: Any) -> int:
    settings = [part for key, value in (SETTINGS | values).items() for part in ("--set", f"{key}={value}")]
    return cli.main(["cache", "plain.toml", "--quiet", *settings, *extra])


def test_training_opens_the_cache_of_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert command() == cli.OK
    assert capsys.readouterr().out == "180 soft labels, all of 10 classes, 2 views: 9.4 kB in soft\n"
    chosen = recipe()
    labels = opened(chosen)
    data = run.load_data(chosen)
    teacher = run.build_teacher(chosen, data)
    assert teacher is not None
    for epoch in range(3):
        for batch in data.train.epoch(epoch):
            with torch.inference_mode():
                wanted = teacher.eval()(batch.images)
            torch.testing.assert_close(labels.batch(epoch % 2, batch.indices), wanted.half(), rtol=2e-3, atol=1e-4)
    assert command() == cli.MISUSED
    error = capsys.readouterr().err
    assert error.startswith("lrds-fast: error: soft holds soft labels already;")
    assert error.count("\n") == 1
    assert command("--resume") == cli.OK
    assert command("--overwrite", **{"teacher.cache_top_k": 3}) == cli.OK
    assert "the 3 largest of 10 classes" in capsys.readouterr().out


def test_equal_views_are_noted(capsys: pytest.CaptureFixture[str]) -> None:
    text = "the 2 views are equal, because data.augment is none: set data.augment, or teacher.cache_views=1"
    assert command() == cli.OK
    assert "views are equal" not in capsys.readouterr().err
    assert command("--overwrite", **{"data.augment": "none"}) == cli.OK
    assert text in capsys.readouterr().err


def logged(chosen: Recipe) -> list[dict[str, Any]]:
    records = run.fit(chosen, progress=False).records
    return [{key: value for key, value in record.items() if key != "seconds"} for record in records]


def test_training_from_the_cache_is_training_with_the_teacher() -> None:
    """Bit for bit in float32 with a view an epoch; the teacher sees the same number of rows."""
    values: dict[str, Any] = {"schedule.epochs": 3, "teacher.cache_views": 3, "teacher.cache_dtype": "float32"}
    assert command(**{"teacher.cache_views": 3, "teacher.cache_dtype": "float32"}) == cli.OK
    online = logged(recipe(**(values | {"teacher.cache": "", "run.out": "online"})))
    assert logged(recipe(**(values | {"run.out": "cached"}))) == online
    with pytest.raises(FileNotFoundError, match="there is no cache of soft labels in absent"):
        run.fit(recipe(**(values | {"teacher.cache": "absent", "run.out": "not begun"})), progress=False)
    assert not Path("not begun").exists()


def test_training_on_a_selection_needs_only_selected_soft_labels() -> None:
    labels = run.load_data(recipe()).train.labels
    mask = torch.arange(len(labels)) % 3 != 1
    kept = Selection(mask, {"hand": -mask.float()}, labels, None, {"by": "hand"}, dataset_fingerprint(labels, 10), 10)
    kept.save("selection.parquet")
    values: dict[str, Any] = {"schedule.epochs": 2, "selection.path": "selection.parquet"}
    assert command("--selected", **{"selection.path": "selection.parquet"}) == cli.OK
    online = logged(recipe(**(values | {"teacher.cache": "", "run.out": "online"})))
    cached = logged(recipe(**(values | {"run.out": "cached"})))
    for a, b in zip(online, cached, strict=True):
        assert a["n_selected"] == b["n_selected"] == 60
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-4)
    with pytest.raises(ValueError, match="soft has no soft labels of sample 1 and 29 others that have the teacher"):
        run.fit(recipe(**(values | {"selection.compose": "mask", "run.out": "mask"})), progress=False)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", 1),
        ("data.augment", "shift"),
        ("data.train_limit", 89),
        ("data.split_seed", 1),
        ("data.mean", (0.5,)),
        ("teacher.amp", "bf16"),
        ("teacher.cache_views", 3),
        ("teacher.cache_top_k", 2),
        ("teacher.cache_dtype", "float32"),
    ],
)
def test_soft_labels_of_another_recipe_are_refused_naming_the_key(key: str, value: object) -> None:
    assert command() == cli.OK
    with pytest.raises(ValueError, match=rf"does not fit this run: .*its {key} is [^;]*, this run's is [^;]*;"):
        opened(recipe(**{key: value}))


def test_options_without_effect_on_pictures_may_differ() -> None:
    assert command() == cli.OK
    opened(recipe(**{"data.batch_size": 16, "data.eval_batch_size": 8, "loss.temperature": 2.0, "optimizer.lr": 1.0}))


def test_the_temperature_must_match_for_top_k_caches() -> None:
    assert command(**{"teacher.cache_top_k": 3}) == cli.OK
    opened(recipe(**{"teacher.cache_top_k": 3}))
    with pytest.raises(ValueError, match=r"its loss.temperature is 4.0, this run's is 2.0"):
        opened(recipe(**{"teacher.cache_top_k": 3, "loss.temperature": 2.0}))


def test_soft_labels_of_another_teacher_are_refused() -> None:
    assert command() == cli.OK
    other = create("mlp", num_classes=10)
    torch.save({"model": other.state_dict()}, "teacher.pt")
    with pytest.raises(ValueError, match=r"its teacher's weights is '[0-9a-f]{64}', this run's is '[0-9a-f]{64}'"):
        opened(recipe())


def test_weights_are_identified_by_their_contents() -> None:
    first, second = create("mlp", num_classes=10), create("mlp", num_classes=10)
    assert weights_sha256(first) != weights_sha256(second)
    second.load_state_dict(first.state_dict())
    assert weights_sha256(first) == weights_sha256(second)
    assert weights_sha256(first) != weights_sha256(second.half())
    with torch.no_grad():
        next(first.parameters()).view(-1)[5] += 1e-6
    assert weights_sha256(first) != weights_sha256(second.float())


def test_only_the_selected_samples_are_cached_on_request(capsys: pytest.CaptureFixture[str]) -> None:
    data = run.load_data(recipe())
    labels = data.train.labels
    mask = torch.arange(len(labels)) % 3 != 1
    fingerprint = dataset_fingerprint(labels, 10)
    Selection(mask, {}, labels, None, {"by": "hand"}, fingerprint, 10).save("selection.parquet")
    assert command("--selected") == cli.MISUSED
    assert "selection.path is empty" in capsys.readouterr().err
    assert command("--selected", **{"selection.path": "selection.parquet"}) == cli.OK
    assert capsys.readouterr().out.startswith("120 soft labels")
    found = opened(recipe(), selected=mask)
    assert torch.equal(found.cached(0), mask)
    with pytest.raises(ValueError, match=r"soft has no soft labels of sample 1 and 29 others that have the teacher"):
        opened(recipe())


def test_a_share_of_the_samples_gets_the_answer_to_another_one() -> None:
    """The teacher logits of training and scoring equal logits that are computed here, live and cached."""
    values: dict[str, Any] = {"data.augment": "none", "teacher.answer_noise": 0.3, "schedule.epochs": 2}
    live = recipe(**(values | {"teacher.cache": "", "run.out": "live", "data.val_fraction": 0.1}))
    data = run.load_data(live)
    teacher = run.build_teacher(live, data)
    assert teacher is not None
    with torch.no_grad():
        own = torch.cat([teacher(batch.images) for batch in data.score.epoch(0)]).argmax(dim=1)
    source = answer_sources(90, 0.3, seed=0)
    assert int((source != torch.arange(90)).sum()) == 27 and not torch.equal(own[source], own)
    result = run.fit(live, progress=False)
    assert result.teacher_pred is not None
    assert torch.equal(result.teacher_pred, own[source])
    assert result.records[-1]["n_revised"] == int((own[source] != data.train.labels).sum())
    scores = run.score(live, progress=False)
    assert torch.equal(scores["teacher_correct"] < 0.5, own[source] == data.train.labels)
    clean = run.score(live.with_values(**{"teacher.answer_noise": 0.0}), progress=False)
    assert torch.equal(clean["teacher_correct"] < 0.5, own == data.train.labels)

    values |= {"data.val_fraction": 0.1, "teacher.cache_dtype": "float32", "teacher.cache_views": 1}
    assert command(**values) == cli.OK
    cached = run.fit(recipe(**(values | {"run.out": "cached"})), progress=False)
    assert cached.teacher_pred is not None and torch.equal(cached.teacher_pred, own[source])
    for a, b in zip(result.records, cached.records, strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"teacher.model": ""}, r"answer_noise is 0.25, but there is no teacher; set teacher.model"),
        ({"teacher.answer_noise": 1.0}, r"teacher.answer_noise must be in \[0, 1\); got 1.0"),
        ({"data.augment": "shift"}, "stores one answer a sample, .*: set data.augment to 'none', or teacher.cache"),
        ({"data.erasing": 0.5}, "set data.erasing to 0.0, or teacher.cache"),
        (
            {"data.mixup": 0.5},
            "teacher.answer_noise has the logits of unmixed pictures: it cannot be combined with data.mixup",
        ),
        ({"selection.after": 1}, "selection.after scores with the teacher's own answers"),
        ({"features.method": "at"}, "features.method 'at' needs teacher.answer_noise=0.0; got 0.25"),
    ],
)
def test_answer_noise_without_stored_answers_is_refused(values: dict[str, Any], message: str) -> None:
    noisy: dict[str, Any] = {"teacher.cache": "", "teacher.answer_noise": 0.25, "data.augment": "none"}
    with pytest.raises(ValueError, match=message):
        recipe(**(noisy | values))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"teacher.model": ""}, "teacher.cache is 'soft', but teacher.model, whose logits it holds, is empty"),
        ({"teacher.cache_views": 0}, "teacher.cache_views must be above 0 and finite; got 0"),
        ({"teacher.cache_top_k": -1}, "teacher.cache_top_k must be at least 0 and finite; got -1"),
        ({"teacher.cache_dtype": "half"}, "teacher.cache_dtype must be one of float16, float32; got 'half'"),
        ({"teacher.cache_top_k": 3, "loss.method": "dist"}, "loss.method=dist needs the logits of all classes"),
        ({"teacher.cache_top_k": 3, "loss.temperatures": (1.0, 4.0)}, "loss.temperatures needs the logits of all"),
        ({"teacher.cache_top_k": 3, "loss.standardize": True}, "loss.standardize needs the logits of all classes"),
        (
            {"teacher.cache_top_k": 3, "loss.divergence": "mse_logits"},
            "loss.divergence=mse_logits needs the logits of all classes: set teacher.cache_top_k=0; got 3",
        ),
    ],
)
def test_contradictory_recipes_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recipe(**values)


def test_the_command_names_missing_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert command(**{"teacher.cache": '""'}) == cli.MISUSED
    assert "teacher.cache is empty: name the folder to write" in capsys.readouterr().err
    assert command(**{"teacher.cache": '""', "teacher.model": '""', "teacher.checkpoint": '""'}) == cli.MISUSED
    assert "teacher.model is empty" in capsys.readouterr().err
    with pytest.raises(
        FileNotFoundError, match=r"there is no cache of soft labels in soft; lrds-fast cache writes one"
    ):
        opened(recipe())
