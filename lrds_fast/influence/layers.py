"""Per-sample gradients of a model's layers, as the short factors that backpropagation leaves behind.

A linear layer that sample i meets at T positions has the gradient sum_t d_it (outer) a_it, d_it the gradient of its
loss in the layer's output and a_it the layer's input (with a 1 for the bias): T pairs of short vectors, never the O x I
matrix. Convolutions are linear layers over unfolded patches, one per group. What is called several times (shared
modules) has the positions of all its calls.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lrds_fast.influence.adapters import Classifier, classifier


class SampleGradients(ABC):
    """A layer's gradients of B samples."""

    @abstractmethod
    def dense(self) -> Tensor:
        """(B, P): every sample's gradient in the layer's parameters, flattened; what tests and small layers use."""

    @abstractmethod
    def squared_norm(self) -> Tensor:
        """(B,) |g_i|^2 over the layer's parameters."""

    def parts(self) -> Iterator[SampleGradients]:
        """The same gradients, some samples after the other, in pieces small enough to be worked on in the cache."""
        yield self


@dataclass(frozen=True)
class Outer(SampleGradients):
    """sum_t delta_t (outer) input_t in each of G groups: inputs (B, G, T, I), deltas (B, G, T, O)."""

    inputs: Tensor
    deltas: Tensor

    def dense(self) -> Tensor:
        """(B, G * O * I), the weight's layout with the bias as the last of the I columns."""
        return (self.deltas.transpose(2, 3) @ self.inputs).flatten(1)

    def squared_norm(self) -> Tensor:
        _, _, positions, width = self.inputs.shape
        if 2 * positions * positions <= width * self.deltas.shape[3]:
            # |sum_t d_t a_t^T|^2 = sum_tu (d_t . d_u)(a_t . a_u): two T x T products are smaller than the gradient.
            return _gram_product(self.inputs, self.deltas).sum(dim=1)
        return self.dense().square_().sum(dim=1)


def _gram_product(a: Tensor, d: Tensor) -> Tensor:
    """sum_tu (a_t . a_u)(d_t . d_u) over the positions of a (..., T, I) and d (..., T, O): (...).

    Both matrices are symmetric: halves of the positions with themselves, and once with each other, down to where
    products are too small to be quick.
    """
    positions = a.shape[-2]
    if positions <= 50:
        both: Tensor = (a @ a.mT) * (d @ d.mT)
        return both.sum(dim=(-2, -1))
    half = positions // 2
    a1, a2, d1, d2 = a[..., :half, :], a[..., half:, :], d[..., :half, :], d[..., half:, :]
    cross: Tensor = (a1 @ a2.mT) * (d1 @ d2.mT)
    return _gram_product(a1, d1) + _gram_product(a2, d2) + 2 * cross.sum(dim=(-2, -1))


@dataclass(frozen=True)
class Unfolded(SampleGradients):
    """An Outer whose inputs are many times larger than what they are made of: made some samples at a time.

    make: the Outer of a slice of samples. count: B. bytes_per_sample: of the inputs that `make` writes. sources: what
    they are made of, (B, ...) each.
    """

    make: Callable[[slice], Outer]
    count: int
    bytes_per_sample: int
    sources: tuple[Tensor, ...]

    def parts(self) -> Iterator[SampleGradients]:
        step = max(1, PART_BYTES // max(self.bytes_per_sample, 1))
        for start in range(0, self.count, step):
            yield self.make(slice(start, min(start + step, self.count)))

    def dense(self) -> Tensor:
        return torch.cat([part.dense() for part in self.parts()])

    def squared_norm(self) -> Tensor:
        return torch.cat([part.squared_norm() for part in self.parts()])


@dataclass(frozen=True)
class Lookup(SampleGradients):
    """Rows of a table of `size` entries: indices (B, T), deltas (B, T, E), those of padding zero."""

    indices: Tensor
    deltas: Tensor
    size: int

    def dense(self) -> Tensor:
        """(B, size * E)."""
        batch, _, width = self.deltas.shape
        table = self.deltas.new_zeros(batch, self.size, width)
        table.scatter_add_(1, self.indices[..., None].expand_as(self.deltas), self.deltas)
        return table.flatten(1)

    def squared_norm(self) -> Tensor:
        same = self.indices[:, :, None] == self.indices[:, None, :]
        return (same * (self.deltas @ self.deltas.transpose(1, 2))).sum(dim=(1, 2))


@dataclass(frozen=True)
class Direct(SampleGradients):
    """The gradients themselves, (B, P): layers with one parameter per channel."""

    gradients: Tensor

    def dense(self) -> Tensor:
        return self.gradients

    def squared_norm(self) -> Tensor:
        return self.gradients.square().sum(dim=1)


@dataclass(frozen=True)
class _Call:
    """One call of a layer: its input, and the gradient of its output once backward has been there."""

    input: Tensor
    delta: list[Tensor]


# What the patches of some samples may take: they stay in the cache, and a piece is memory that the last one has left
# (fresh pages cost several times the copy).
PART_BYTES = 4 << 20

Norm = nn.modules.batchnorm._BatchNorm | nn.LayerNorm | nn.GroupNorm | nn.RMSNorm
SUPPORTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_TRAINING_MATTERS = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)


def _is_supported(module: nn.Module) -> bool:
    return isinstance(module, (*SUPPORTED, nn.modules.batchnorm._BatchNorm)) and not isinstance(
        module, nn.modules.lazy.LazyModuleMixin
    )


def layer_names(model: nn.Module, layers: str | Sequence[str] = "all") -> list[str]:
    """The layers that gradients are taken in: those named, "all" with trainable parameters, or the "last".

    "last" is the last registered Linear layer. A module that the model holds under several names has the first.
    Raises ValueError for a name that does not exist, a layer without trainable parameters, or one of a type whose
    per-sample gradients are not known here; with "all" also where such a layer has parameters of its own.
    """
    modules = dict(model.named_modules())
    trainable = {name: m for name, m in modules.items() if any(p.requires_grad for p in m.parameters(recurse=False))}
    if layers == "last":
        linear = [name for name, module in trainable.items() if isinstance(module, nn.Linear)]
        if not linear:
            raise ValueError("layers='last' needs a model with a trainable nn.Linear layer; this one has none")
        return linear[-1:]
    if isinstance(layers, str) and layers != "all":
        raise ValueError(f"layers must be 'last', 'all' or a list of names; got {layers!r}")
    names = list(trainable) if layers == "all" else list(dict.fromkeys(layers))
    for name in names:
        if name not in modules:
            raise ValueError(f"layers: the model has no module {name!r}; model.named_modules() lists them")
        if name not in trainable:
            raise ValueError(f"layers: module {name!r} has no trainable parameters of its own")
        if not _is_supported(modules[name]):
            kind = type(modules[name]).__name__
            raise ValueError(
                f"layers: {name!r} is a {kind}; per-sample gradients are known for Linear, Conv, Embedding and"
                " normalisation layers: freeze its parameters (requires_grad_(False)), or name the layers to use"
            )
    if not names:
        raise ValueError("layers: the model has no trainable parameters")
    owner: dict[int, str] = {}
    for name in names:
        own = list(modules[name].parameters(recurse=False))
        if not all(p.requires_grad for p in own):
            raise ValueError(f"layers: {name!r} is frozen in part; freeze all of its parameters, or none")
        for parameter in own:
            other = owner.setdefault(id(parameter), name)
            if other != name:
                raise ValueError(f"layers: {name!r} and {other!r} share a parameter; name only one of them")
    return names


def sample_gradients(
    model: nn.Module | Classifier,
    inputs: Tensor,
    logit_gradient: Callable[[Tensor], Tensor],
    layers: str | Sequence[str] = "all",
) -> tuple[Tensor, Mapping[str, SampleGradients]]:
    """The logits of a batch, and every layer's gradients of its samples' losses.

    model: in eval mode where that matters (BatchNorm, dropout). inputs: (B, ...), the samples first in every layer.
    logit_gradient: from logits (B, C) to each sample's loss gradient in its own logits, (B, C).
    Returns detached logits (B, C) and, by layer name, gradients in the order weight then bias. One forward and one
    backward pass; parameters' .grad is left alone. Raises ValueError naming the layer (and the sample) for layers in
    training mode, never called, or with non-finite activations.
    """
    outward = classifier(model)
    model = outward.module
    names = layer_names(model, layers)
    modules = dict(model.named_modules())
    for name, module in modules.items():
        if module.training and isinstance(module, _TRAINING_MATTERS):
            raise ValueError(
                f"{name!r} ({type(module).__name__}) is in training mode, where a sample's gradient depends on chance"
                " or on the other samples: call model.eval()"
            )
    calls: dict[str, list[_Call]] = {name: [] for name in names}
    roots: list[Tensor] = []

    def record(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def hook(_: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
            # A copy where the model may still write into it (ReLU(inplace=True) before or after).
            call = _Call(arguments[0].detach().clone(), [])
            calls[name].append(call)
            if not output.requires_grad:
                # Where the graph begins. A copy: what comes next may work in place, which a leaf does not allow.
                roots.append(output.requires_grad_())
                output = output.clone()
            # On the tensor of this moment: what an in-place operation makes of it later has another gradient.
            output.register_hook(call.delta.append)
            return output

        return hook

    handles = [modules[name].register_forward_hook(record(name)) for name in names]
    # Gradients flow from output to output; those of the parameters, a third of the work, are not computed.
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in parameters:
            parameter.requires_grad_(False)
        with torch.enable_grad():
            logits = outward(inputs.detach())
            if roots and logits.requires_grad:
                torch.autograd.grad(logits, roots, logit_gradient(logits.detach()), allow_unused=True)
    finally:
        for parameter in parameters:
            parameter.requires_grad_()
        for handle in handles:
            handle.remove()
    found = {}
    for name in names:
        if not any(call.delta for call in calls[name]):
            raise ValueError(f"layers: {name!r} has no part in the logits of this batch; leave it out")
        parts = [_gradients(modules[name], call.input, call.delta[0]) for call in calls[name] if call.delta]
        found[name] = _joined(parts)
        _check_finite(name, found[name])
    return logits.detach(), found


def _check_finite(name: str, gradients: SampleGradients) -> None:
    # A sum is finite unless one of its terms is not (or it overflows, which is as bad); it costs one read.
    found = gradients.sources if isinstance(gradients, Unfolded) else vars(gradients).values()
    parts = [tensor for tensor in found if isinstance(tensor, Tensor) and tensor.is_floating_point()]
    finite = torch.stack([torch.isfinite(part.flatten(1).sum(dim=1)) for part in parts]).all(dim=0)
    if not finite.all():
        sample = int((~finite).nonzero()[0])
        raise ValueError(f"layer {name!r}: the gradient of sample {sample} of the batch is not finite")


def _joined(parts: Sequence[SampleGradients]) -> SampleGradients:
    """The sum of a layer's calls."""
    first = parts[0]
    if len(parts) == 1:
        return first
    if isinstance(first, Outer):
        outer = [part for part in parts if isinstance(part, Outer)]
        return Outer(torch.cat([p.inputs for p in outer], dim=2), torch.cat([p.deltas for p in outer], dim=2))
    if isinstance(first, Unfolded):
        unfolded = [part for part in parts if isinstance(part, Unfolded)]

        def make(rows: slice) -> Outer:
            joined = _joined([part.make(rows) for part in unfolded])
            assert isinstance(joined, Outer)
            return joined

        size = sum(part.bytes_per_sample for part in unfolded)
        return Unfolded(make, first.count, size, tuple(t for part in unfolded for t in part.sources))
    if isinstance(first, Lookup):
        lookup = [part for part in parts if isinstance(part, Lookup)]
        indices = torch.cat([p.indices for p in lookup], dim=1)
        return Lookup(indices, torch.cat([p.deltas for p in lookup], dim=1), first.size)
    return Direct(torch.stack([part.dense() for part in parts]).sum(dim=0))


def _gradients(module: nn.Module, inputs: Tensor, delta: Tensor) -> SampleGradients:
    if isinstance(module, nn.Linear):
        a, d = (x.reshape(len(x), 1, -1, x.shape[-1]) for x in (inputs, delta))
        return Outer(_with_bias(a, module.bias), d)
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        positions = delta[0, 0].numel()
        width = module.weight[0].numel() * module.groups
        size = positions * width * inputs.element_size()

        def make(rows: slice) -> Outer:
            return _convolution(module, inputs[rows], delta[rows])

        return Unfolded(make, len(inputs), size, (inputs, delta))
    if isinstance(module, nn.Embedding):
        indices, d = inputs.reshape(len(inputs), -1), delta.reshape(len(delta), -1, delta.shape[-1])
        if module.padding_idx is not None:
            d = d * (indices != module.padding_idx)[..., None]
        return Lookup(indices, d, module.num_embeddings)
    return _normalisation(module, inputs, delta)


def _with_bias(a: Tensor, bias: Tensor | None) -> Tensor:
    return a if bias is None else torch.cat([a, a.new_ones(*a.shape[:-1], 1)], dim=-1)


def _convolution(module: nn.Conv1d | nn.Conv2d | nn.Conv3d, inputs: Tensor, delta: Tensor) -> Outer:
    """Patches (B, G, T, channels of a group * kernel) and deltas (B, G, T, outputs of a group)."""
    batch, groups, spatial = len(inputs), module.groups, len(module.kernel_size)
    if module.padding_mode != "zeros":
        inputs = F.pad(inputs, module._reversed_padding_repeated_twice, mode=module.padding_mode)
    elif isinstance(module.padding, str):
        inputs = F.pad(inputs, module._reversed_padding_repeated_twice)
    else:
        inputs = F.pad(inputs, [side for padding in reversed(module.padding) for side in (padding, padding)])
    patches = inputs
    for i in range(spatial):
        reach = module.dilation[i] * (module.kernel_size[i] - 1) + 1
        # (..., positions, reach) and of the reach every dilation-th element.
        patches = patches.unfold(2 + i, reach, module.stride[i])[..., :: module.dilation[i]]
    # (B, channels, *positions, *kernel) -> (B, G, channels of a group * kernel, positions), in one copy and with the
    # positions innermost, where they lie next to each other in the input too. Products take either as transposed.
    places, kernel = patches.shape[2 : 2 + spatial], patches.shape[2 + spatial :]
    grouped = patches.view(batch, groups, inputs.shape[1] // groups, *patches.shape[2:])
    order = [0, 1, 2, *range(3 + spatial, 3 + 2 * spatial), *range(3, 3 + spatial)]
    width, positions = grouped.shape[2] * kernel.numel(), places.numel()
    a = inputs.new_empty(batch, groups, width + (module.bias is not None), positions)
    a[:, :, :width].view(batch, groups, -1, *kernel, *places).copy_(grouped.permute(order))
    a[:, :, width:] = 1.0
    d = delta.reshape(batch, groups, -1, positions)
    return Outer(a.transpose(2, 3), d.transpose(2, 3))


def _normalisation(module: nn.Module, inputs: Tensor, delta: Tensor) -> Direct:
    """weight and bias of BatchNorm in eval mode, LayerNorm, GroupNorm, RMSNorm: sums of delta * normalised, delta."""
    batch = len(inputs)
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        if module.running_mean is None or module.running_var is None:
            raise ValueError(
                "BatchNorm without running statistics mixes the samples of a batch: its gradients are none"
            )
        normal = F.batch_norm(inputs, module.running_mean, module.running_var, eps=module.eps)
    elif isinstance(module, nn.GroupNorm):
        normal = F.group_norm(inputs, module.num_groups, eps=module.eps)
    elif isinstance(module, nn.LayerNorm):
        normal = F.layer_norm(inputs, module.normalized_shape, eps=module.eps)
    elif isinstance(module, nn.RMSNorm):
        normal = F.rms_norm(inputs, module.normalized_shape, eps=module.eps)
    else:
        raise TypeError(f"per-sample gradients of a {type(module).__name__} are not known")
    per_channel = isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.GroupNorm))

    def of_parameter(x: Tensor, size: int) -> Tensor:
        x = x.reshape(batch, size, -1).sum(dim=2) if per_channel else x.reshape(batch, -1, size).sum(dim=1)
        return x

    found = []
    for parameter, terms in (("weight", delta * normal), ("bias", delta)):
        value = getattr(module, parameter, None)
        if value is not None:
            found.append(of_parameter(terms, value.numel()))
    return Direct(torch.cat(found, dim=1))


def parameters_of(model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """The parameters behind the named layers by their full names, weight before bias."""
    modules = dict(model.named_modules())
    return {
        f"{name}.{kind}" if name else kind: parameter
        for name in names
        for kind, parameter in modules[name].named_parameters(recurse=False)
    }
