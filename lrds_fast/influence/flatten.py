"""Gradients by parameter name, and the same flattened layer by layer in the order of SampleGradients.dense."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

# Their weight gradient is a matrix with the bias as its last column; other layers' parameters follow one another.
_MATRIX_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def flatten_by_layer(model: nn.Module, layers: Sequence[str], gradient: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """(P,) by layer name. gradient: by the parameters' full names, in the parameters' shapes."""
    flat = {}
    for layer in layers:
        module = model.get_submodule(layer)
        parts = {kind: gradient[_full_name(layer, kind)] for kind, _ in module.named_parameters(recurse=False)}
        if isinstance(module, _MATRIX_LAYERS):
            columns = [parts["weight"].flatten(1)] + ([parts["bias"][:, None]] if "bias" in parts else [])
            flat[layer] = torch.cat(columns, dim=1).flatten()
        else:
            flat[layer] = torch.cat([tensor.flatten() for tensor in parts.values()])
    return flat


def unflatten_by_layer(model: nn.Module, flat: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of flatten_by_layer, in each parameter's shape and dtype."""
    gradient = {}
    for layer, vector in flat.items():
        module = model.get_submodule(layer)
        parameters = dict(module.named_parameters(recurse=False))
        parts: dict[str, Tensor] = {}
        if isinstance(module, _MATRIX_LAYERS):
            matrix = vector.reshape(len(parameters["weight"]), -1)
            width = parameters["weight"][0].numel()
            parts["weight"] = matrix[:, :width]
            if "bias" in parameters:
                parts["bias"] = matrix[:, width]
        else:
            start = 0
            for kind, parameter in parameters.items():
                parts[kind] = vector[start : start + parameter.numel()]
                start += parameter.numel()
        for kind, part in parts.items():
            parameter = parameters[kind]
            gradient[_full_name(layer, kind)] = part.reshape(parameter.shape).to(parameter.dtype).contiguous()
    return gradient


def _full_name(layer: str, kind: str) -> str:
    return f"{layer}.{kind}" if layer else kind
