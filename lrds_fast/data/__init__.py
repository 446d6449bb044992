"""Data sets as loaders: tensors in memory, folders of pictures, archives; and a teacher's cached logits.

`load` opens a data set by its name or by a recipe's DataOptions. A data set of another kind implements Loader.
"""

from lrds_fast.data.dali import DaliLoader
from lrds_fast.data.folder import FolderLoader
from lrds_fast.data.loader import Batch, Data, Loader, batch_count, derived_seed, epoch_batches, generator, prefix_rows
from lrds_fast.data.memory import MemoryLoader, digits, from_npz, two_digit_numbers
from lrds_fast.data.noise import answer_sources, mislabelled
from lrds_fast.data.soft_labels import SoftLabels, write_soft_labels
from lrds_fast.data.sources import Source, open_split
from lrds_fast.data.splits import DIGITS_TEST_FRACTION, hold_out, in_memory, load
from lrds_fast.data.strong import Strong, TwoViews

__all__ = [
    "DIGITS_TEST_FRACTION",
    "Batch",
    "DaliLoader",
    "Data",
    "FolderLoader",
    "Loader",
    "MemoryLoader",
    "SoftLabels",
    "Source",
    "Strong",
    "TwoViews",
    "answer_sources",
    "batch_count",
    "derived_seed",
    "digits",
    "epoch_batches",
    "from_npz",
    "generator",
    "hold_out",
    "in_memory",
    "load",
    "mislabelled",
    "open_split",
    "prefix_rows",
    "two_digit_numbers",
    "write_soft_labels",
]
