"""Numbers as arguments: of Python and NumPy, and arrays and tensors of shape ()."""

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

    A tensor must be on the CPU and require no gradient. Raises TypeError, "`name` must be `what`", for anything else.
    """
    if type(value) is float:  # the common case costs one comparison
        return value
    found = value if type(value) is int else _python(name, value)
    if isinstance(found, bool) or not isinstance(found, (int, float)):
        raise TypeError(f"{name} must be {what}; got {value!r}")
    return found


def integer(name: str, value: Any, what: str = "an int") -> int:
    """`value` as a Python int. As number(), but floats are a TypeError, whole ones too."""
    found = value if type(value) is int else _python(name, value)
    if isinstance(found, bool) or not isinstance(found, int):
        raise TypeError(f"{name} must be {what}; got {value!r}")
    return found
