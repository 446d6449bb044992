"""The Hessian of all layers together, solved by conjugate gradients that EK-FAC preconditions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.func import functional_call, jvp, vjp, vmap

from lrds_fast.influence.adapters import Classifier
from lrds_fast.influence.factors import Factors, HessianBatch
from lrds_fast.influence.flatten import flatten_by_layer, unflatten_by_layer
from lrds_fast.influence.solve import conjugate_gradients
from lrds_fast.ranks import Ranks

#: The relative residual at which a solution counts as exact, by the dtype of the model's products.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-3}
#: The most iterations, each of which reads the training set once.
ITERATIONS = 500


class WholeHessian:
    """H = 1/N sum_i J_i^T (sum_t w_it J(softmax(z_i / T_t))) J_i + damping, over all parameters of several layers.

    J_i is the Jacobian of sample i's logits in the parameters. This is the Gauss-Newton form of the objective's
    Hessian, with the products between layers that K-FAC and EK-FAC leave out. It is never formed: a product with it
    takes a forward-mode and a backward pass over the training set. factors: EK-FAC's, of the same layers; their damping
    is H's, their inverse the preconditioner. batches: this process's, called for every pass.
    """

    def __init__(
        self, classifier: Classifier, factors: Factors, batches: Callable[[], Iterator[HessianBatch]], ranks: Ranks
    ) -> None:
        self._classifier, self._factors, self._batches, self._ranks = classifier, factors, batches, ranks
        self._layers = factors.layers
        self._model = classifier.module

    def solve(self, gradients: Sequence[Mapping[str, Tensor]]) -> list[dict[str, Tensor]]:
        """solve_by_layer for gradients by parameter name, in the parameters' shapes and dtypes."""
        flat = [flatten_by_layer(self._model, self._layers, gradient) for gradient in gradients]
        return [unflatten_by_layer(self._model, solution) for solution in self.solve_by_layer(flat)]

    def solve_by_layer(
        self, gradients: Sequence[Mapping[str, Tensor]], tolerance: float | None = None
    ) -> list[dict[str, Tensor]]:
        """H^-1 g for each gradient, flattened (P,) by layer name, float64.

        tolerance: on |H x - g| / |g|; None: that of TOLERANCE. Raises RuntimeError where ITERATIONS do not reach it.
        """
        if tolerance is None:
            dtype = next(self._model.parameters()).dtype
            tolerance = TOLERANCE.get(dtype, TOLERANCE[torch.float32])
        damping = self._factors.damping.values()
        solutions = conjugate_gradients(
            self._products,
            lambda vector: self._joined(self._factors.solve(self._by_layer(vector))),
            [self._joined(gradient).double() for gradient in gradients],
            tolerance=tolerance,
            iterations=ITERATIONS,
            ranks=self._ranks,
            damping=f"{min(damping):.3g} to {max(damping):.3g}",
        )
        return [self._by_layer(vector) for vector in solutions]

    def _joined(self, by_layer: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([by_layer[name].flatten() for name in self._layers])

    def _by_layer(self, vector: Tensor) -> dict[str, Tensor]:
        sizes = [self._factors.inverse(name).numel() for name in self._layers]
        return dict(zip(self._layers, vector.split(sizes), strict=True))

    @torch.no_grad()
    def _products(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """H v for each vector (P,), float64; one pass over the samples."""
        directions = [unflatten_by_layer(self._model, self._by_layer(vector)) for vector in vectors]
        stacked = {name: torch.stack([direction[name] for direction in directions]) for name in directions[0]}
        totals = [torch.zeros_like(vector) for vector in vectors]
        count = torch.zeros((), dtype=torch.float64, device=vectors[0].device)
        for batch in self._batches():
            count += len(batch.x)
            products = self._batch_products(batch, stacked)
            for number, total in enumerate(totals):
                product = {name: tensor[number] for name, tensor in products.items()}
                total += self._joined(flatten_by_layer(self._model, self._layers, product))
        self._ranks.sum(count)
        damping = self._joined(
            {name: torch.full_like(self._factors.inverse(name), self._factors.damping[name]) for name in self._layers}
        )
        return [
            self._ranks.sum(total) / count + damping * vector for total, vector in zip(totals, vectors, strict=True)
        ]

    def _batch_products(self, batch: HessianBatch, directions: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """sum_i J_i^T (sum_t w_it J(softmax(z_i / T_t))) J_i d over the batch, for K directions by parameter name.

        directions, and the result: (K, ...) in the parameters' shapes.
        """
        parameters = {name: p.detach() for name, p in self._model.named_parameters() if name in directions}

        def logits_of(moved: dict[str, Tensor]) -> Tensor:
            return self._classifier.read(functional_call(self._model, moved, (batch.x,)), len(batch.x))

        made = vjp(logits_of, parameters)
        logits, pull_back = made[0], made[1]
        terms = [
            (weight[:, None], torch.softmax(logits / temperature, dim=1)) for weight, temperature in batch.terms(logits)
        ]

        def product(direction: dict[str, Tensor]) -> dict[str, Tensor]:
            moved = jvp(logits_of, (parameters,), (direction,))[1]
            curved = torch.zeros_like(moved)
            for weight, p in terms:
                curved = curved + weight * p * (moved - torch.linalg.vecdot(p, moved)[:, None])
            gradient: dict[str, Tensor] = pull_back(curved)[0]
            return gradient

        if len(next(iter(directions.values()))) == 1:  # without vmap, which not every model supports
            return {name: tensor[None] for name, tensor in product({n: d[0] for n, d in directions.items()}).items()}
        several: dict[str, Tensor] = vmap(product)(dict(directions))
        return several
