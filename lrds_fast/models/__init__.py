"""Networks by name (CIFAR's, small ones, torchvision's and timm's), and trained students."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lrds_fast.models.classifier import Classifier
from lrds_fast.models.external import External
from lrds_fast.models.registry import create, names

if TYPE_CHECKING:
    from lrds_fast.models.student import Student, load

__all__ = ["Classifier", "External", "Student", "create", "load", "names"]


def __getattr__(name: str) -> Any:
    """Loads Student and load on first use: they import lrds_fast.data, which takes longer than the networks."""
    if name not in ("Student", "load"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from lrds_fast.models import student

    globals().update(Student=student.Student, load=student.load)
    return globals()[name]
