"""Files of a student for other programs: weights, a torch.export program, ONNX; each is read again and compared."""

from __future__ import annotations

import importlib
import importlib.util
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lrds_fast.files import replacing
from lrds_fast.models.registry import create
from lrds_fast.models.student import Student
from lrds_fast.models.weights import load_weights, safetensors_bytes

#: File names in an exported folder.
WEIGHTS, PROGRAM, ONNX = "model.safetensors", "model.pt2", "model.onnx"
#: The largest accepted difference of logits from the network's, as a share of its largest absolute logit. The weights
#: must give equal logits; a program may be computed in another order, and ONNX Runtime folds batch norms into
#: convolutions.
TOLERANCE = {WEIGHTS: 0.0, PROGRAM: 1e-5, ONNX: 1e-4}
#: The packages that writing and comparing an ONNX file needs.
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
#: Names of the input and the output of an ONNX file.
INPUT, OUTPUT = "images", "logits"
#: The batch size that is traced, and those that are compared: another one must give the same logits.
_TRACED, _COMPARED = 2, (1, 5)


def missing_for_onnx() -> str:
    """What to install for ONNX, in one line; "" where nothing is missing."""
    missing = [package for package in ONNX_PACKAGES if importlib.util.find_spec(package) is None]
    return f"ONNX needs {', '.join(missing)}: pip install {' '.join(missing)}" if missing else ""


def write_weights(student: Student, path: Path, facts: Mapping[str, str]) -> float:
    """Writes the weights as safetensors; facts: its metadata. Returns the largest difference of the logits, 0.

    The file is read into a new network before it gets its name; RuntimeError where the logits differ.
    """
    with replacing(path) as temporary:
        Path(temporary).write_bytes(safetensors_bytes(student.network, facts))
        again = create(student.description.model, num_classes=len(student.class_names))
        load_weights(again, Path(temporary), key=str(path))
        return _compared(student, again.eval(), path)


def write_program(student: Student, path: Path) -> float:
    """Writes a torch.export program, for any batch size. Returns the largest difference of the logits, as a share.

    torch.export.load(path).module() runs it where torch is installed, without this library. Raises RuntimeError where
    the network cannot be exported, or where the logits of the program as read again differ by more than TOLERANCE.
    """
    program = _program(student)
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    with replacing(path) as temporary:
        Path(temporary).write_bytes(buffer.getvalue())
        with open(temporary, "rb") as file:
            again = torch.export.load(file).module()
        return _compared(student, again, path)


def write_onnx(student: Student, path: Path) -> float:
    """Writes an ONNX file, for any batch size: the input `images`, the output `logits`. Returns the largest difference
    of the logits, as a share.

    Raises ImportError where a package is missing, RuntimeError where the network cannot be exported, or where ONNX
    Runtime's logits differ by more than TOLERANCE.
    """
    missing = missing_for_onnx()
    if missing:
        raise ImportError(missing)
    onnxruntime = importlib.import_module("onnxruntime")
    with _quiet(), _named(student, "ONNX"):
        converted: Any = torch.onnx.export(
            _program(student), input_names=[INPUT], output_names=[OUTPUT], dynamo=True, verbose=False
        )
    with replacing(path) as temporary:
        with _quiet(), _named(student, "ONNX"):
            converted.save(temporary, external_data=False)
        session = onnxruntime.InferenceSession(temporary, providers=["CPUExecutionProvider"])

        def again(images: Tensor) -> Tensor:
            (logits,) = session.run([OUTPUT], {INPUT: images.numpy()})
            return torch.from_numpy(logits)

        return _compared(student, again, path)


def _program(student: Student) -> torch.export.ExportedProgram:
    """The student's network with a batch dimension of any size."""
    images = _images(student, _TRACED)
    batch = torch.export.Dim("batch")
    with _quiet(), _named(student, "torch.export"), torch.no_grad():
        return torch.export.export(student.network.cpu().eval(), (images,), dynamic_shapes=({0: batch},))


def _images(student: Student, count: int) -> Tensor:
    """(count, channels, height, width) normal numbers, as normalised pictures have them."""
    draws = torch.Generator().manual_seed(count)
    return torch.randn(count, *student.description.input_size, generator=draws)


def _compared(student: Student, again: Callable[[Tensor], Tensor], path: Path) -> float:
    """The largest difference of `again`'s logits from the network's, as a share of its largest absolute logit.
    RuntimeError where it is above the file's tolerance."""
    worst = 0.0
    for count in _COMPARED:
        images = _images(student, count)
        with torch.inference_mode():
            expected, found = student.network(images), again(images)
        if found.shape != expected.shape or not bool(found.isfinite().all()):
            raise RuntimeError(
                f"{path} gives {tuple(found.shape)} logits, {int((~found.isfinite()).sum())} of them not finite, and"
                f" the network {tuple(expected.shape)}; it was not written"
            )
        share = float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-30))
        worst = max(worst, share)
    if worst > TOLERANCE[path.name]:
        raise RuntimeError(
            f"{path} gives other logits than the network: they differ by {worst:.1e} of the largest logit, and"
            f" {TOLERANCE[path.name]:g} is accepted; it was not written: leave this format out with --formats"
        )
    return worst


@contextmanager
def _named(student: Student, how: str) -> Iterator[None]:
    """Turns errors of the exporters, which have many types and many lines, into one line that names the network."""
    try:
        yield
    except (ImportError, MemoryError):
        raise
    except Exception as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise RuntimeError(
            f"{student.description.model} cannot be exported by {how} ({reason}); leave this format out with --formats"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings and log lines of the exporters, which are about their own insides."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
