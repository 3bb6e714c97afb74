"""carla_digr: a live driving explainer by policy distillation with selective input-gradient regularisation.

The public functions load their modules when they are first used, so that ``import carla_digr`` takes a millisecond and
no torch.
"""

TYPE_CHECKING = False  # as `typing` has it, whose import takes longer than all else here
if TYPE_CHECKING:
    from typing import Any

    from carla_digr.api import decide as decide
    from carla_digr.api import explain as explain
    from carla_digr.api import load_policy as load_policy
    from carla_digr.saliency import METHODS as METHODS
    from carla_digr.saliency.overlay import overlay as overlay

__version__ = "0.1.0"

# public name -> the module it stands in
_PUBLIC = {
    "load_policy": "carla_digr.api",
    "explain": "carla_digr.api",
    "decide": "carla_digr.api",
    "overlay": "carla_digr.saliency.overlay",
    "METHODS": "carla_digr.saliency",
}
__all__ = ["METHODS", "__version__", "decide", "explain", "load_policy", "overlay"]


def __getattr__(name: str) -> "Any":
    if name not in _PUBLIC:
        raise AttributeError(f"module 'carla_digr' has no attribute '{name}'")
    from importlib import import_module

    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
