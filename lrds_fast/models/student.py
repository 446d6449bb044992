"""A trained student with all that it needs to be used: its network, the names of its classes, its transform."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lrds_fast.data.transform import Transform
from lrds_fast.files import write_text
from lrds_fast.models.registry import create
from lrds_fast.models.weights import load_weights
from lrds_fast.ranks import pick_device

#: The file that describes a student, in the folder of a run and in an exported folder.
DESCRIPTION = "student.json"
#: The version of its form.
FORMAT = 1


@dataclass(frozen=True)
class Description:
    """What a student is, without its weights.

    model: its name for models.create. class_names: of the classes 0, 1, .... input_size: (channels, height, width) of
    its images. transform: from a picture file to such an image; None where no file can have its form. weights: the
    name of the file of weights beside the description.
    """

    model: str
    class_names: tuple[str, ...]
    input_size: tuple[int, int, int]
    transform: Transform | None
    weights: str

    def write(self, folder: Path) -> None:
        """Writes folder/student.json."""
        values = {
            "format": FORMAT,
            "model": self.model,
            "class_names": list(self.class_names),
            "input_size": list(self.input_size),
            "transform": None if self.transform is None else self.transform.to_mapping(),
            "weights": self.weights,
        }
        write_text(folder / DESCRIPTION, json.dumps(values, indent=2) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Description:
        """Reads folder/student.json. FileNotFoundError without it, ValueError for a damaged one."""
        path = folder / DESCRIPTION
        if not path.is_file():
            raise FileNotFoundError(
                f"{folder} has no {DESCRIPTION}, so it holds no student: name the folder of a run or of lrds-fast"
                " export; a run of an older version gets the file by lrds-fast train RECIPE --resume"
            )
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            return cls._of(values)
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path} does not describe a student ({error}); restore it from a copy") from error

    @classmethod
    def _of(cls, values: Mapping[str, Any]) -> Description:
        if values["format"] != FORMAT:
            raise ValueError(f"its format is {values['format']!r}, this version reads {FORMAT}")
        channels, height, width = map(int, values["input_size"])
        transform = values["transform"]
        weights = str(values["weights"])
        if Path(weights).name != weights:
            raise ValueError(f"weights must be the name of a file beside it; got {weights!r}")
        return cls(
            model=str(values["model"]),
            class_names=tuple(map(str, values["class_names"])),
            input_size=(channels, height, width),
            transform=None if transform is None else Transform.from_mapping(transform),
            weights=weights,
        )


class Student(nn.Module):
    """A trained network in eval mode: student(images) gives the (N, classes) logits of images (N, channels, height,
    width).

    network: the module itself, a Classifier or External. class_names: of the logits 0, 1, ...; decimal numbers where
    the data has no names. transform: gives a picture file the form of an image. description: the student's description,
    with model name and input size.
    """

    def __init__(self, network: nn.Module, description: Description) -> None:
        super().__init__()
        self.network = network
        self.description = description
        self.eval()

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes 0, 1, ...."""
        return self.description.class_names

    @property
    def transform(self) -> Transform:
        """From a picture file or a PIL image to an image, (channels, height, width) float32.

        ValueError where no picture can have the form of the student's images."""
        if self.description.transform is None:
            channels, height, width = self.description.input_size
            raise ValueError(
                f"the student takes images of {channels} x {height} x {width}, and pictures have 1 or 3 channels: pass"
                " it tensors"
            )
        return self.description.transform

    def forward(self, images: Tensor) -> Tensor:
        """(N, classes) logits of images (N, channels, height, width)."""
        logits: Tensor = self.network(images)
        return logits


def load(path: str | Path, *, device: str = "cpu") -> Student:
    """A trained student in eval mode.

    path: the folder of a run of lrds-fast train, whose last checkpoint is loaded; a folder that lrds-fast export wrote;
    or a file of weights in one of these, such as RUN/best.safetensors. With run.ema_decay the weights are the averaged
    ones, which the run evaluates. device: cpu, cuda, cuda:N, or auto: CUDA where there is one. Raises FileNotFoundError
    where the folder holds no student or no weights, and ValueError for damaged files and for a missing device.
    """
    path = Path(path)
    chosen = pick_device(device, "device")
    if not path.exists():
        raise FileNotFoundError(
            f"there is no {path}; name the folder of a run, such as runs/digits_kd, or a file of weights in it"
        )
    folder = path if path.is_dir() else path.parent
    description = Description.read(folder)
    weights = folder / description.weights if path.is_dir() else path
    if not weights.is_file():
        raise FileNotFoundError(
            f"{folder} has no {weights.name} yet: finish an epoch of the run, or restore the file from a copy"
        )
    network = create(description.model, num_classes=len(description.class_names))
    load_weights(network, weights, key="student", announce=False)
    return Student(network, replace(description, weights=weights.name)).to(chosen)
