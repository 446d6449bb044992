"""From scores to D_t, the samples that keep their teacher: choosing, saving, loading and reporting."""

from __future__ import annotations

from lrds_fast.selection.choose import select, select_jointly
from lrds_fast.selection.flagged import prefix
from lrds_fast.selection.shrinkage import shrinkage_weights
from lrds_fast.selection.table import Selection, dataset_fingerprint
from lrds_fast.selection.while_training import SelectedDataset

__all__ = [
    "SelectedDataset",
    "Selection",
    "dataset_fingerprint",
    "prefix",
    "select",
    "select_jointly",
    "shrinkage_weights",
]
