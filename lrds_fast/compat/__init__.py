"""Adapters to other libraries; each module needs the library that it is named after."""

from __future__ import annotations

from lrds_fast.divergences import JSD


def generalized_jsd(beta: float) -> str | JSD:
    """The divergence that TRL and Liger call beta: 0 is KL(teacher || student), 1 the reverse, between them the JSD."""
    return {0.0: "kl", 1.0: "rkl"}.get(float(beta)) or JSD(weight=beta)
