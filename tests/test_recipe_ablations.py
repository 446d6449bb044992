"""Grids around a recipe: every combination is a run in its own folder, and a grid resumes."""

from __future__ import annotations

from pathlib import Path

import pytest

from lrds_fast.cli import main as cli
from lrds_fast.recipe.ablations import ABLATIONS, ablation, cells, parse_axis
from lrds_fast.report.runs import read_run
from lrds_fast.train import load_recipe

PAIR = "cifar100/resnet56-resnet20"


def test_cells_are_the_product_of_the_axes() -> None:
    base = load_recipe(f"{PAIR}/kd+lr")
    found = cells(base, [parse_axis("loss.eta=0.5,.8"), parse_axis("loss.revise=lr, mft,swap")])
    assert [(cell.loss.eta, cell.loss.revise) for cell in found] == [
        (eta, revise) for eta in (0.5, 0.8) for revise in ("lr", "mft", "swap")
    ]
    assert found[1].name == f"{PAIR}/kd+lr@loss.eta=0.5,loss.revise=mft"
    assert found[1].out == Path(f"runs/{PAIR}/kd+lr@loss.eta=0.5,loss.revise=mft")
    assert len({cell.out for cell in found}) == 6
    # All but the cell's values is the recipe's.
    assert found[4].with_values(name=base.name, **{"loss.eta": base.loss.eta, "loss.revise": "lr"}) == base
    elsewhere = cells(load_recipe(f"{PAIR}/kd", ["run.out=elsewhere"]), [parse_axis("seed=1,2")])
    assert [str(cell.out) for cell in elsewhere] == ["elsewhere@seed=1", "elsewhere@seed=2"]
    assert cells(base, []) == [base]


def test_commas_within_a_value_do_not_divide() -> None:
    axis = parse_axis('score.scores=["kd_gain", "el2n"],["ce"]')
    assert axis.values == (["kd_gain", "el2n"], ["ce"])
    recipe = cells(load_recipe(f"{PAIR}/kd+ds"), [axis])[0]
    assert recipe.score.scores == ("kd_gain", "el2n")
    assert parse_axis("""data.root='a,b',c""").values == ("a,b", "c")


def test_mistakes_are_named() -> None:
    base = load_recipe(f"{PAIR}/kd+lr")
    for text in ("loss.eta", "=1,2", "loss.eta=", "loss.eta=0.5,,0.8"):
        with pytest.raises(ValueError, match="--grid takes KEY=VALUE,VALUE"):
            parse_axis(text)
    with pytest.raises(ValueError, match=r"--grid loss.eta has a value twice: 0.5,0.5"):
        parse_axis("loss.eta=0.5,0.5")
    with pytest.raises(ValueError, match="--grid has a key twice: seed, seed"):
        cells(base, [parse_axis("seed=0,1"), parse_axis("seed=2")])
    with pytest.raises(ValueError, match="unknown key 'loss.etta'; did you mean 'loss.eta'"):
        cells(base, [parse_axis("loss.etta=0.5,0.6")])
    with pytest.raises(ValueError, match=r"loss.eta must be in \(0, 1\); got 1.5"):
        cells(base, [parse_axis("loss.eta=0.5,1.5")])
    with pytest.raises(ValueError, match="--ablation must be one of eta, weights, lambdas, ratio, score; got 'etta'"):
        ablation("etta", base)


@pytest.mark.parametrize("name", ABLATIONS)
def test_ready_grids_vary_the_documented_keys(name: str) -> None:
    base = load_recipe(f"{PAIR}/revision" if name == "lambdas" else f"{PAIR}/kd+lr+ds")
    found = ablation(f"ablations/{name}", base)
    assert found == ablation(name, base)
    varied = {key for cell in found for key, value in cell.flat().items() if value != base.flat()[key]}
    keys = {axis.partition("=")[0] for axis in ABLATIONS[name].axes}
    assert varied - {"name"} == keys | ({"selection.ratio"} if name == "score" else set())
    assert len({cell.name for cell in found}) == len(found) >= 6
    sizes = {"eta": 6, "weights": 9, "lambdas": 16, "ratio": 10, "score": 13}
    assert len(found) == sizes[name]
    if name == "score":
        assert {cell.selection.ratio for cell in found} == {0.7}
        kept = ablation("score", base.with_values(**{"selection.ratio": 0.4}))
        assert {cell.selection.ratio for cell in kept} == {0.4}


def test_ready_grids_refuse_recipes_without_the_varied_keys() -> None:
    lacking = {"eta": "kd", "ratio": "kd+lr", "score": "kd", "weights": "revision", "lambdas": "kd+lr"}
    for name, recipe in lacking.items():
        with pytest.raises(
            ValueError, match=f"--ablation {name} needs a recipe with .*; {PAIR}/{recipe.split('+')[0]}"
        ):
            ablation(name, load_recipe(f"{PAIR}/{recipe}"))


def test_a_grid_is_swept_listed_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    small = ["--set", "data.train_limit=60", "--set", "run.device=cpu", "--set", "schedule.epochs=1", "--quiet"]
    sweep = ["sweep", "digits_alone", "--grid", "optimizer.lr=0.1,0.2", "--grid", "data.batch_size=16,32", *small]
    assert cli.main([*sweep, "--list"]) == cli.OK
    names = capsys.readouterr().out.split()
    assert len(names) == 4 and names[0] == "digits_alone@optimizer.lr=0.1,data.batch_size=16"
    assert not Path("runs").exists(), "listing trains nothing"
    assert cli.main([*sweep, "--seeds", "0", "1"]) == cli.OK
    out = capsys.readouterr().out
    assert all(f"{name}  " in out for name in names), "a row of the table per cell"
    run = read_run(Path("runs") / names[3] / "seed1")
    assert (run.recipe.optimizer.lr, run.recipe.data.batch_size, run.recipe.seed) == (0.2, 32, 1)
    assert cli.main([*sweep, "--seeds", "0", "1"]) == cli.OK
    assert capsys.readouterr().out.count("finished already") == 8
    assert cli.main(["sweep", "digits_alone", "--ablation", "eta", *small]) == cli.MISUSED
    assert "--ablation eta needs a recipe with label revision" in capsys.readouterr().err
