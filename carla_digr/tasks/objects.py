"""Objects of a state that can be taken out of it: the causal truth of an explanation is what happens without them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class SceneObject:
    """One thing in one state.

    Attributes:
        kind: such as "vehicle".
        name: which one, unique in its state.
        mask: bool (H, W), the pixels that show it.
        without: uint8 (C, H, W), the same instant if the thing were not there.
        named: whether it is one that a user asks for: was it this one that decided?
        nearness: of a named one, how near and how much in the agent's way it is, the larger the more: what a guess
            without the policy would name first.
        needed: whether it is one of those without which the task cannot be done.
    """

    kind: str
    name: str
    mask: NDArray[np.bool_]
    without: NDArray[np.uint8]
    named: bool = False
    nearness: float = 0.0
    needed: bool = False


class KnowsObjects(Protocol):
    """A batch whose task can take things out of the world.

    Attributes:
        named_objects: what the named ones are called together, such as "vehicles".
        least_named: named objects that a state must have for asking which of them decides.
        plays: how the student comes to states to ask in; "sampled" where greedy episodes repeat one another.
    """

    named_objects: str
    least_named: int
    plays: Literal["greedy", "sampled"]

    def objects(self) -> list[list[SceneObject]]:
        """Of each of the N present observations its objects."""
