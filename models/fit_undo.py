"""What blocks have learned by themselves, taken back where it does the whole harm.

A block learns to give what it gives in the teacher, on the teacher's inputs. In the student its inputs have the errors
of the blocks in front, and errors that used to cancel may add up: then the outputs are further off though every block
is nearer.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from graphwright.passes.base import Block
    from torch import Tensor

Arrays: TypeAlias = "dict[str, Tensor]"


def helpful(
    blocks: Sequence[Block], at_first: Arrays, learned: Arrays, before: float, drop: Callable[[Arrays], float],
    say: Callable[[str], None],
) -> dict[str, Any]:  # fmt: skip
    """{"sites": blocks whose learned weights bring the outputs nearer, "drop": of the outputs with them}.

    Blocks are tried in the order given, each beside those that were taken before it, so the drop only falls: from
    `before`, that of `at_first`, by one measurement a block.
    """
    sites, least = list[str](), before
    for block in blocks:
        say(f"what {block.site} learned")
        found = drop(mixed(blocks, at_first, learned, [*sites, block.site]))
        if found < least:
            sites, least = [*sites, block.site], found
    return {"sites": sites, "drop": least}


def mixed(blocks: Sequence[Block], at_first: Arrays, learned: Arrays, sites: Collection[str]) -> Arrays:
    """Weights that the blocks at `sites` have learned, and all others as they were."""
    names = {name for block in blocks if block.site in sites for name in block.weights}
    return {name: learned[name] if name in names else tensor for name, tensor in at_first.items()}
