"""THE table of saliency methods: command, page, ROS nodes, evaluation and report read it.

A package adds a method by an entry point of the group ``carla_digr.methods`` whose value is a `Method`:

    [project.entry-points."carla_digr.methods"]
    occlusion = "my_package:OCCLUSION"

Nothing heavy is imported here; a method's own module is when its first map is made.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from carla_digr.errors import UserError
from carla_digr.registry import Registry, load

if TYPE_CHECKING:
    from torch import Tensor

    from carla_digr.policy import Policy
    from carla_digr.saliency.perturbation import Perturbation

Need = Literal["logits", "gradient", "layers"]
OFFERS: tuple[Need, ...] = ("logits", "gradient", "layers")  # each includes those before it


@dataclass(frozen=True)
class Method:
    """One saliency method.

    Attributes:
        title: in tables and figures, such as "Vanilla Gradient".
        summary: what it is, for help texts: a phrase without a full stop.
        speed: "frame" fits into a frame of a live drive (50 ms); "slow" takes twenty passes of the network or more.
        function: (policy, states, target=None) -> raw maps, or "module:name" of it, imported with the first map. States
            are float (B, C, H, W) in [0, 1], maps float (B, H, W), not negative, not normalised; ``target`` is an
            action's index, or a dimension's, that is to be explained instead of the decision.
        needs: what the policy must offer: its outputs ("logits"), also their gradient, or the layers themselves.
        perturbs: whether the function takes ``perturbation``, the settings of eq. 3, too.
        student: in evaluations it explains the student, as DIGR does, not the teacher.
    """

    title: str
    summary: str
    speed: Literal["frame", "slow"]
    function: str | Callable[..., Tensor] = field(repr=False)
    needs: Need = "gradient"
    perturbs: bool = False
    student: bool = False

    def __call__(
        self,
        policy: Policy,
        states: Tensor,
        target: int | None = None,
        perturbation: Perturbation | None = None,
    ) -> Tensor:
        """Maps of states; the same input gives the same bytes.

        Args:
            policy: the policy to explain.
            states: float (B, C, H, W) in [0, 1], no inference tensor.
            target: an action's index, or a dimension's of a continuous one, to be explained; None: the decision.
            perturbation: settings of eq. 3 for methods that perturb; None: the default ones.

        Returns:
            float (B, H, W), not negative, not normalised.

        Raises:
            UserError: there is no such action, the policy does not offer what the method needs, or the method needs a
                package that is not installed.
        """
        if target is not None and not 0 <= target < policy.actions:
            raise UserError(f"There is no action {target}: the policy has the actions 0 to {policy.actions - 1}.")
        self.check(policy)
        options: dict[str, Any] = {}
        if target is not None:
            options["target"] = target
        if self.perturbs:
            from carla_digr.saliency.perturbation import Perturbation

            options["perturbation"] = perturbation or Perturbation()
        return self._function()(policy, states, **options)

    def check(self, policy: Policy) -> None:
        """Refuse a policy that does not offer what the method needs.

        Raises:
            UserError: it does not; the sentence names the methods that can explain it.
        """
        if not self.can_explain(policy):
            able = ", ".join(name for name, method in METHODS.loadable().items() if method.can_explain(policy))
            raise UserError(
                f"{self.title} needs the policy's {self.needs}, and this one gives no more than its {policy.offers}; "
                f"use one of {able}."
            )

    def can_explain(self, policy: Policy) -> bool:
        """Whether the policy offers what the method needs."""
        return OFFERS.index(self.needs) <= OFFERS.index(policy.offers)

    def _function(self) -> Callable[..., Tensor]:
        return load(self.function) if isinstance(self.function, str) else self.function


DEFAULT = "linear"
"""The method where none is named: the truest of those that keep up with a drive, by the causal tables of the docs."""

# In the order of the paper's Table 1, whose names the titles are; then ours.
METHODS: Registry[Method] = Registry(
    "saliency method",
    "carla_digr.methods",
    {
        "vg": Method(
            "Vanilla Gradient",
            "vanilla gradient, eq. 2 too: the same map under its name for other policies",
            "frame",
            "carla_digr.saliency.gradient:vanilla_gradient",
        ),
        "gbp": Method(
            "Guided Backpropagation",
            "guided backpropagation",
            "frame",
            "carla_digr.saliency.baselines:guided_backpropagation",
            needs="layers",
        ),
        "gradcam": Method(
            "Grad-CAM",
            "Grad-CAM on the last convolution",
            "frame",
            "carla_digr.saliency.baselines:grad_cam",
            needs="layers",
        ),
        "smoothgrad": Method(
            "SmoothGrad",
            "SmoothGrad on guided backpropagation",
            "slow",
            "carla_digr.saliency.baselines:smooth_grad",
            needs="layers",
        ),
        "ig": Method(
            "Integrated Gradients",
            "integrated gradients from the black picture",
            "slow",
            "carla_digr.saliency.baselines:integrated_gradients",
        ),
        "gb": Method(
            "Gaussian-Blur Perturbation",
            "Gaussian-blur perturbation, eq. 3",
            "slow",
            "carla_digr.saliency.perturbation:perturbation_maps",
            needs="logits",
            perturbs=True,
        ),
        "sarfa": Method(
            "SARFA",
            "SARFA on the same perturbation",
            "slow",
            "carla_digr.saliency.perturbation:sarfa_maps",
            needs="logits",
            perturbs=True,
        ),
        "digr": Method(
            "DIGR",
            "gradient of eq. 2, for which a DIGR student is trained",
            "frame",
            "carla_digr.saliency.gradient:vanilla_gradient",
            student=True,
        ),
        "linear": Method(
            "Linearised Perturbation",
            "the perturbation of eq. 3 by one Jacobian between the picture and its blur",
            "frame",
            "carla_digr.saliency.linear:linear_maps",
        ),
    },
)
