"""What a custom operator is: a name, a body of standard operators, an oracle and shapes to try it on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..errors import PassError

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

DOMAIN = "graphwright"
FUNCTIONS = 8  # first version of the ONNX format that has functions with attributes


@dataclass(frozen=True)
class Case:
    """One example: input shapes and attributes. `note` says what boundary it stands on, `booleans` which inputs hold
    truth values instead of numbers, `kinds` which hold whole numbers of a type that is given by ONNX's name."""

    shapes: tuple[tuple[int, ...], ...]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""
    booleans: tuple[int, ...] = ()
    kinds: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class CustomOp:
    """An operator of the domain `graphwright`, defined once.

    body: makes the function for one version of the standard operators, the one that the model imports, so that
    model and function never disagree. reference: the oracle, NumPy in float64, called as
    `reference(*arrays, **attributes)`. cases: shapes for the tests that every operator goes through.
    opset: first version of the standard operators that the body can be written in.
    """

    name: str
    version: int
    body: Callable[[int], ir.Function]
    reference: Callable[..., np.ndarray]
    cases: tuple[Case, ...]
    opset: int = 1
    domain: str = DOMAIN

    @property
    def identifier(self) -> tuple[str, str]:
        return self.domain, self.name

    def function(self, opset: int) -> ir.Function:
        """The body as a function of its own, importing version `opset` of the standard operators."""
        if opset < self.opset:
            raise PassError(
                f"{self.domain}.{self.name} needs opset {self.opset} or later, the model imports {opset}; "
                "run convert-opset first"
            )
        return self.body(opset)

    def add_to(self, model: ir.Model) -> None:
        """Put the function and the import of its domain into `model`, once however often it is called."""
        imports = model.graph.opset_imports
        imports[self.domain] = self.version
        if (*self.identifier, "") in model.functions:
            return
        if "" not in imports:  # all standard operators are inside functions
            known = [f.opset_imports.get("", 0) for f in model.functions.values()]
            imports[""] = max([self.opset, *known])
        function = self.function(imports[""])
        model.functions[function.identifier()] = function
        model.ir_version = max(model.ir_version, FUNCTIONS)
