"""Influence scores of a classifier from other packages, and from this one in the same shape.

Tests and benchmarks that compare packages use them: pip install -e '.[peers]'.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lrds_fast.influence import Factors, pairwise
from lrds_fast.influence.factors import Block, fingerprint


def pairwise_scores(
    model: nn.Module, queries: TensorDataset, train: TensorDataset, factors: Factors, **keywords: Any
) -> Tensor:
    """(Q, N) by lrds_fast.influence.pairwise: the influence of every training sample on every query. keywords: its."""
    scores = pairwise(model, queries, train, factors=factors, progress=False, **keywords)
    assert isinstance(scores, Tensor), "without top_k the result is a tensor"
    return scores


class Kronfluence:
    """kronfluence's EK-FAC scores of a copy of `model`, with damping 0.1 mean(Lambda).

    layers: names of the modules in the analysis. train: what the factors are fitted to, and the samples that are
    scored. folder: where kronfluence writes factors and scores. batch: samples a forward pass.
    """

    def __init__(self, model: nn.Module, layers: Sequence[str], train: TensorDataset, folder: Path, batch: int = 64):
        from kronfluence.analyzer import Analyzer, prepare_model
        from kronfluence.task import Task

        names = list(layers)

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
                return names

            def get_attention_mask(self, batch: Any) -> None:
                return None

        self.layers, self._train, self._batch = names, train, batch
        self._original = model
        task = Classification()
        prepared = prepare_model(copy.deepcopy(model).eval(), task)
        self._analyzer = Analyzer(
            "peer", prepared, task, cpu=True, output_dir=str(folder), disable_tqdm=True, disable_model_save=True
        )

    def fit(self) -> None:
        """Fits the factors; every other method needs them."""
        self._analyzer.fit_all_factors(
            "factors", self._train, per_device_batch_size=self._batch, overwrite_output_dir=True
        )

    def factors(self) -> Factors:
        """The fitted factors in this library's form."""
        eigen = self._analyzer.load_eigendecomposition("factors")
        fitted = self._analyzer.load_lambda_matrices("factors")
        blocks, damping = {}, {}
        for name in self.layers:
            values = fitted["lambda_matrix"][name].double() / float(fitted["num_lambda_processed"][name])
            qg, qa = (eigen[f"{side}_eigenvectors"][name].double()[None] for side in ("gradient", "activation"))
            blocks[name] = Block(values[None], qg, qa)
            damping[name] = 0.1 * float(values.mean())
        return Factors("ekfac", blocks, damping, fingerprint(self._original))

    def self_influence(self) -> Tensor:
        """(N,) of every training sample."""
        self._analyzer.compute_self_scores(
            "self",
            "factors",
            self._train,
            per_device_train_batch_size=self._batch,
            overwrite_output_dir=True,
            score_args=self._arguments(),
        )
        scores: Tensor = self._analyzer.load_self_scores("self")["all_modules"]
        return scores.flatten()

    def pairwise(self, queries: TensorDataset, *, aggregate: bool = False) -> Tensor:
        """(Q, N) of every training sample on every query; with aggregate (1, N) on the sum of the queries."""
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
        scores: Tensor = self._analyzer.load_pairwise_scores("pairs")["all_modules"]
        return scores

    @staticmethod
    def _arguments(**more: Any) -> Any:
        from kronfluence.arguments import ScoreArguments

        return ScoreArguments(damping_factor=None, **more)


def captum_last_layer(model: nn.Sequential, train: TensorDataset, batch: int) -> Any:
    """captum's TracInCPFast on a model's last module, with one checkpoint of weight 1: products of the gradients of the
    weight, without the bias. `influence((inputs, targets))` of the result gives (Q, N)."""
    from captum.influence import TracInCPFast

    def load(_: nn.Module, __: str) -> float:
        return 1.0

    return TracInCPFast(model, model[-1], train, ["now"], load, nn.CrossEntropyLoss(reduction="sum"), batch_size=batch)


def dattri_ekfac(model: nn.Module, train: TensorDataset, queries: TensorDataset, batch: int = 200) -> Tensor:
    """(Q, N) from dattri's EK-FAC over the Linear layers, damped by 0.1 times the mean of Lambda over all of them."""
    from dattri.algorithm.influence_function import IFAttributorEKFAC
    from dattri.task import AttributionTask

    model = copy.deepcopy(model)

    def loss(parameters: Any, data: Any) -> Tensor:
        inputs, target = data
        if inputs.dim() == 1:  # one sample, under vmap
            inputs, target = inputs[None], target.reshape(1)
        return F.cross_entropy(torch.func.functional_call(model, parameters, inputs), target)

    task = AttributionTask(loss_func=loss, model=model, checkpoints=model.state_dict())
    loaders = [DataLoader(data, batch_size=batch) for data in (train, queries)]
    peer = IFAttributorEKFAC(task)
    with _without_progress_bars():
        peer.cache(loaders[0])
        peer.damping = 0.1 * float(torch.cat([values.flatten() for values in peer.cached_lambdas.values()]).mean())
        scores: Tensor = peer.attribute(*loaders)
    return scores.detach().T


def trak(
    models: Sequence[nn.Module], train: TensorDataset, queries: TensorDataset, folder: Path, *, dims: int = 256
) -> Tensor:
    """(Q, N) from TRAK over several models, with its projection in PyTorch (the fast one needs CUDA).

    dims: of the projection. TRAK inverts the Gram matrix of the projected gradients, so dims must be well below the
    number of samples: for 1200 samples 512 gives worse scores than 256, and 128 about the same.
    """
    from trak import TRAKer
    from trak.projectors import BasicProjector, ProjectionType

    model = copy.deepcopy(models[0])
    size = sum(parameter.numel() for parameter in model.parameters())
    # In two blocks: TRAK frees a single block after its first use and does not draw it again.
    projector = BasicProjector(size, dims, 0, ProjectionType.rademacher, torch.device("cpu"), block_size=dims // 2)
    peer = TRAKer(
        model=model,
        task="image_classification",
        train_set_size=len(train),
        save_dir=str(folder),
        device="cpu",
        projector=projector,
        proj_dim=dims,
        use_half_precision=False,
    )
    states = [each.state_dict() for each in models]
    with _without_progress_bars():
        for number, state in enumerate(states):
            peer.load_checkpoint(state, model_id=number)
            for batch in DataLoader(train, batch_size=200):
                peer.featurize(batch=batch, num_samples=len(batch[0]))
        peer.finalize_features()
        for number, state in enumerate(states):
            peer.start_scoring_checkpoint("queries", state, model_id=number, num_targets=len(queries))
            for batch in DataLoader(queries, batch_size=200):
                peer.score(batch=batch, num_samples=len(batch[0]))
        scores = peer.finalize_scores(exp_name="queries")
    return torch.as_tensor(scores).T.float()


@contextlib.contextmanager
def _without_progress_bars() -> Iterator[None]:
    """Discards what Python code writes to stderr."""
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stderr(nowhere):
        yield


def has(package: str) -> bool:
    """Whether a package can be imported."""
    return importlib.util.find_spec(package) is not None
