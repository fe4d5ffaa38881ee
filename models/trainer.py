"""The way to the trainer for who may not import torch before something is to be learned."""

from __future__ import annotations

from typing import TYPE_CHECKING

from graphwright.passes.errors import PassError

if TYPE_CHECKING:
    from graphwright.passes.base import PassContext, TrainingJob, Weights, WidthJob


def train(job: TrainingJob | WidthJob, ctx: PassContext) -> Weights:
    """`fit.train`, or `fit_widths.train` for a job about widths. Raises PassError where torch is not installed."""
    from graphwright.passes.base import WidthJob

    try:
        if isinstance(job, WidthJob):
            from . import fit_widths

            return fit_widths.train(job, ctx)
        from . import fit
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "torch":
            raise
        raise PassError(
            "training needs torch, which is not installed: run `pip install 'graphwright[models]'`"
        ) from error
    return fit.train(job, ctx)
