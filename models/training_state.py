"""What a training needs to go on from where it was interrupted, in one file. Importing this file imports torch."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

log = logging.getLogger("graphwright")


@dataclass(frozen=True)
class TrainingState:
    """fingerprint: of all that the weights follow from; a file of another one is of no use."""

    path: Path
    fingerprint: str
    model: nn.Module
    optimizer: torch.optim.Optimizer

    def restore(self) -> tuple[int, float]:
        """Take model and optimizer from the file: the step to go on from, and the seconds that were spent before.
        (0, 0) where the file is absent, damaged, or of something else."""
        if not self.path.is_file():
            return 0, 0.0
        try:
            found: dict[str, Any] = torch.load(self.path, weights_only=True)
            if found["fingerprint"] == self.fingerprint:
                self.model.load_state_dict(found["model"])
                self.optimizer.load_state_dict(found["optimizer"])
                return found["step"], found["seconds"]
        except Exception as error:  # whatever a damaged file raises
            log.info("%s: %s", self.path, error)
        log.warning("%s: is of another run; training starts anew", self.path)
        return 0, 0.0

    def save(self, step: int, seconds: float) -> None:
        """Replace the file, whole or not at all."""
        temporary = self.path.with_name(self.path.name + ".new")
        state = {"fingerprint": self.fingerprint, "step": step, "seconds": seconds, "model": self.model.state_dict(),
                 "optimizer": self.optimizer.state_dict()}  # fmt: skip
        torch.save(state, temporary)
        os.replace(temporary, self.path)
