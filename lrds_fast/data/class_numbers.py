"""Class numbers as they are in data sets' files, turned into labels from 0."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

#: The largest number of classes that may be above the number of samples. Larger numbers are no class numbers but, for
#: example, WordNet offsets, and a network with so many classes would fill the memory.
MOST_CLASSES = 100_000


def numbered(
    numbers: Sequence[int], name: Callable[[int], str], classes: Sequence[str] | None = None, *, first: int = 0
) -> tuple[Tensor, list[str]]:
    """(labels (size,) int64 from 0, names of the classes) from the class numbers in the data.

    name: a sample's name by its index, for errors. classes: names in the order of the numbers; None for numbers as
    names. first: the number of the first class. ValueError for numbers below `first`, and for numbers that imply more
    classes than there are names or, without names, more than both the number of samples and MOST_CLASSES.
    """
    if numbers:
        low = min(range(len(numbers)), key=numbers.__getitem__)
        high = max(range(len(numbers)), key=numbers.__getitem__)
        count = numbers[high] - first + 1
        if numbers[low] < first:
            raise ValueError(
                f"{name(low)} has the class number {numbers[low]}, but the first class is {first}: set data.first_label"
                " to the number of the first class in the data"
            )
        if classes is not None and len(classes) < count:
            raise ValueError(
                f"there are {len(classes)} class names, but a sample has the class number {count - 1}: {name(high)};"
                " name every class in classes.txt, or set data.first_label to the number of the first class in the data"
            )
        if classes is None and count > max(len(numbers), MOST_CLASSES):
            raise ValueError(
                f"{name(high)} has the class number {numbers[high]}, which makes {count} classes; at most"
                f" {max(len(numbers), MOST_CLASSES)} are allowed for {len(numbers)} samples: number the classes"
                " consecutively or, in archives, name them all in classes.txt"
            )
    else:
        count = 0
    labels = torch.tensor([number - first for number in numbers], dtype=torch.int64)
    return labels, list(classes) if classes is not None else [str(k) for k in range(count)]
