"""What a user gets: one version, everything in the source archive, readable errors from the build."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

import lrds_fast
from lrds_fast import _ops

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
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


@in_checkout
def test_source_archive_holds_what_a_build_needs(tmp_path: Path) -> None:
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


def test_another_torch_is_named_with_the_way_out() -> None:
    _ops.check_torch_version("2.15.0+cu132", "2.15.1+cpu")  # patch releases share an ABI
    with pytest.raises(
        ImportError, match=r"built with torch 2\.14\.0 but torch 2\.15\.0.*--no-build-isolation"
    ) as caught:
        _ops.check_torch_version("2.14.0", "2.15.0")
    assert "\n" not in str(caught.value)


def setup_py(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("LRDS_", "CUDA_"))}
    return subprocess.run(
        [sys.executable, "setup.py", *arguments], cwd=ROOT, env={**clean, **env}, capture_output=True, text=True
    )


@in_checkout
def test_a_wish_that_is_no_wish() -> None:
    done = setup_py("--version", LRDS_FAST_CUDA="yes")
    assert done.returncode != 0
    assert "LRDS_FAST_CUDA must be 0, 1 or unset; got 'yes'" in done.stderr


@in_checkout
def test_forbidden_cuda_says_so() -> None:
    done = setup_py("--version", LRDS_FAST_CUDA="0")
    assert done.returncode == 0
    assert lrds_fast.__version__ in done.stdout
    assert "CPU only (LRDS_FAST_CUDA=0)" in done.stderr


@in_checkout
@pytest.mark.parametrize("wish", ["1", ""])
def test_without_nvcc_one_line_says_how_to_get_it(wish: str, tmp_path: Path) -> None:
    if torch.version.cuda is None:
        pytest.skip("this torch is CPU-only: the missing piece is torch, not nvcc")
    # The search is asked in a process where no place has an nvcc.
    script = (
        "import runpy, sys, pathlib;"
        "real = pathlib.Path.is_file;"
        "pathlib.Path.is_file = lambda self: False if self.name == 'nvcc' else real(self);"
        "sys.argv = ['setup.py', '--version'];"
        "runpy.run_path('setup.py', run_name='__main__')"
    )
    env = {key: value for key, value in os.environ.items() if not key.startswith(("LRDS_", "CUDA_"))}
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env={**env, "LRDS_FAST_CUDA": wish} if wish else env,
        capture_output=True,
        text=True,
    )
    lines = [line for line in done.stderr.splitlines() if "nvcc" in line]
    assert len(lines) == 1, done.stderr
    assert "nvidia-cuda-nvcc" in lines[0]
    assert (done.returncode == 0) == (wish == "")


@in_checkout
def test_shell_scripts_parse() -> None:
    for script in [ROOT / ".ci" / "run", *sorted((ROOT / "tools").glob("*.sh"))]:
        subprocess.run(["bash", "-n", str(script)], check=True)
        assert os.access(script, os.X_OK), script
