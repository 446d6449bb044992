"""Numbers as arguments: Python's, NumPy's, and arrays and tensors of shape ()."""

from __future__ import annotations

from typing import Any


def _python(name: str, value: Any) -> Any:
    """The Python scalar in an array or tensor of shape (); anything else as it is."""
    if getattr(value, "shape", None) != ():
        return value
    if getattr(value, "requires_grad", False):
        raise TypeError(f"{name} must not require a gradient: pass its .item(); got {value!r}")
    if getattr(value, "is_cuda", False):
        raise TypeError(f"{name} must be on the CPU; got {value!r}: pass its .item(), which synchronises with the GPU")
    return value.item()


def number(name: str, value: Any, what: str = "a number") -> float:
    """`value` as a Python int or float: a number of Python or NumPy, or an array or tensor of shape ().

    A tensor must be on the CPU and require no gradient. Anything else raises TypeError: "`name` must be `what`; got x".
    """
    if type(value) is float:  # the common case costs one comparison
        return value
    scalar = value if type(value) is int else _python(name, value)
    if isinstance(scalar, bool) or not isinstance(scalar, (int, float)):
        raise TypeError(f"{name} must be {what}; got {value!r}")
    return scalar


def integer(name: str, value: Any, what: str = "an int") -> int:
    """`value` as a Python int. Like number(), but any float raises TypeError."""
    scalar = value if type(value) is int else _python(name, value)
    if isinstance(scalar, bool) or not isinstance(scalar, int):
        raise TypeError(f"{name} must be {what}; got {value!r}")
    return scalar
