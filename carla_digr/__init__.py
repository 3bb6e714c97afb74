"""carla_digr: a live driving explainer by policy distillation with selective input-gradient regularisation.

The public functions load their modules when they are first used, so that ``import carla_digr`` takes a millisecond and
no torch. After it ``gymnasium.make("carla_digr/Driving-v0")`` works.
"""

import sys

TYPE_CHECKING = False  # as `typing` has it, whose import takes longer than all else here
if TYPE_CHECKING:
    from types import ModuleType
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


class _RegisterWithGymnasium:
    """Enters the environments into gymnasium's registry as soon as somebody imports gymnasium, which takes 0.1 s.

    A finder on `sys.meta_path`: it lets the others find gymnasium and adds a step to its execution.
    """

    def find_spec(self, name: str, path: "Any" = None, target: "Any" = None) -> "Any":
        if name != "gymnasium":
            return None
        others = [finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec")]
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: "ModuleType") -> None:
            execute(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
                _register_environments()

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def _register_environments() -> None:
    from carla_digr.tasks import register_environments

    register_environments()


if "gymnasium" in sys.modules:
    _register_environments()
else:
    sys.meta_path.insert(0, _RegisterWithGymnasium())
