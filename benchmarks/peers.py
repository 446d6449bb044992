"""kronfluence on a classifier, its factors handed to ours: for gates and benchmarks that need the package."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lrds_fast.influence import Factors
from lrds_fast.influence.factors import Block, fingerprint


class Kronfluence:
    """An analysis of `model` (left alone) in `folder`: EK-FAC factors fitted to `train` at damping 0.1 mean(Lambda)."""

    def __init__(self, model: nn.Module, layers: Sequence[str], train: TensorDataset, folder: Path, batch: int = 64):
        from kronfluence.analyzer import Analyzer, prepare_model
        from kronfluence.task import Task

        layers = list(layers)

        class Classification(Task):
            def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
                inputs, target = batch
                logits = model(inputs)
                if sample:
                    with torch.no_grad():
                        target = torch.multinomial(logits.softmax(dim=-1), 1).flatten()
                return F.cross_entropy(logits, target, reduction="sum")

            def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
                return self.compute_train_loss(batch, model)

            def get_influence_tracked_modules(self) -> list[str]:
                return layers

            def get_attention_mask(self, batch: Any) -> None:
                return None

        self.layers, self._train, self._batch = layers, train, batch
        self._original = model
        task = Classification()
        prepared = prepare_model(copy.deepcopy(model).eval(), task)
        self._analyzer = Analyzer(
            "peer", prepared, task, cpu=True, output_dir=str(folder), disable_tqdm=True, disable_model_save=True
        )

    def fit(self) -> None:
        self._analyzer.fit_all_factors(
            "factors", self._train, per_device_batch_size=self._batch, overwrite_output_dir=True
        )

    def factors(self) -> Factors:
        """What fit has found, as ours."""
        eigen = self._analyzer.load_eigendecomposition("factors")
        fitted = self._analyzer.load_lambda_matrices("factors")
        blocks, damping = {}, {}
        for name in self.layers:
            values = fitted["lambda_matrix"][name].double() / float(fitted["num_lambda_processed"][name])
            qg, qa = (eigen[f"{side}_eigenvectors"][name].double()[None] for side in ("gradient", "activation"))
            blocks[name] = Block(values[None], qg, qa)
            damping[name] = 0.1 * float(values.mean())
        return Factors("ekfac", blocks, damping, fingerprint(self._original, self.layers))

    def self_influence(self) -> Tensor:
        self._analyzer.compute_self_scores(
            "own",
            "factors",
            self._train,
            per_device_train_batch_size=self._batch,
            overwrite_output_dir=True,
            score_args=self._arguments(),
        )
        return self._analyzer.load_self_scores("own")["all_modules"].flatten()

    def pairwise(self, queries: TensorDataset, *, aggregate: bool = False) -> Tensor:
        """(Q, N); (1, N) with aggregate, the queries' gradients added up first."""
        self._analyzer.compute_pairwise_scores(
            "pairs",
            "factors",
            queries,
            self._train,
            per_device_query_batch_size=self._batch,
            per_device_train_batch_size=self._batch,
            overwrite_output_dir=True,
            score_args=self._arguments(aggregate_query_gradients=aggregate),
        )
        return self._analyzer.load_pairwise_scores("pairs")["all_modules"]

    @staticmethod
    def _arguments(**more: Any) -> Any:
        from kronfluence.arguments import ScoreArguments

        return ScoreArguments(damping_factor=None, **more)


def captum_last_layer(model: nn.Sequential, train: TensorDataset, batch: int) -> Any:
    """captum's TracInCPFast on a model's last module, one checkpoint of weight 1: products without the bias."""
    from captum.influence import TracInCPFast

    def load(_: nn.Module, __: str) -> float:
        return 1.0

    return TracInCPFast(model, model[-1], train, ["now"], load, nn.CrossEntropyLoss(reduction="sum"), batch_size=batch)


def has(package: str) -> bool:
    """Whether a peer can be imported."""
    return importlib.util.find_spec(package) is not None
