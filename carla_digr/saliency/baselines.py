"""The paper's other gradient-based maps, by captum.

Each explains the functions that the policy's distribution names, by default f(s) = sum_a pi(a|s)^2 / 2, the function
whose gradient eq. 2 is, so that the methods differ in nothing else. Each takes a policy, float states (B, C, H, W) in
[0, 1] and perhaps a target, and returns raw maps, float (B, H, W), not negative: the maximum over channels of the
absolute attribution, as for eq. 2. Several functions, of a continuous policy, are attributed one by one.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from captum.attr import GuidedBackprop, IntegratedGradients, LayerAttribution, LayerGradCam, NoiseTunnel, Saliency
from torch import Tensor, nn

from carla_digr.distributions import DISTRIBUTIONS, combined
from carla_digr.errors import UserError
from carla_digr.policy import SOFTPLUS_BETA, ActorCritic, Policy

# Names in autograd's graph of activations that guided backpropagation is not defined for.
_OTHER_ACTIVATIONS = (
    "Softplus",
    "Tanh",
    "Sigmoid",
    "Elu",
    "Gelu",
    "Silu",
    "LeakyRelu",
    "Hardtanh",
    "Mish",
    "PreluKernel",
)


def guided_backpropagation(policy: Policy, states: Tensor, target: int | None = None) -> Tensor:
    """Springenberg et al. 2015: backward through ReLUs only where the gradient is positive, too.

    Of an ActorCritic with softplus the same: where the gradient is positive, times softplus' own derivative, which is
    ReLU's step for a beta without bound.

    Raises:
        UserError: a foreign network's activations are not all ReLU layers.
    """
    _refuse_unguided(policy, states)

    def attribute(model: _Explained, inputs: Tensor) -> Tensor:
        method, options = model.guided_method()
        return method.attribute(inputs, **options)

    return _attributed(policy, states, target, attribute).amax(dim=1)


def smooth_grad(
    policy: Policy,
    states: Tensor,
    target: int | None = None,
    sigma: float = 0.15,
    samples: int = 20,
    seed: int = 0,
) -> Tensor:
    """Smilkov et al. 2017 on guided backpropagation: the mean over noisy copies of the state.

    Raises:
        UserError: as ``guided_backpropagation``.
    """
    _refuse_unguided(policy, states)

    def attribute(model: _Explained, inputs: Tensor) -> Tensor:
        method, options = model.guided_method()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return NoiseTunnel(method).attribute(
                inputs, nt_type="smoothgrad", nt_samples=samples, stdevs=sigma, **options
            )

    return _attributed(policy, states, target, attribute).amax(dim=1)


def grad_cam(policy: Policy, states: Tensor, target: int | None = None) -> Tensor:
    """Selvaraju et al. 2017 on the last feature map, after its activation, bilinearly enlarged.

    Raises:
        UserError: the network has no layer that gives a feature map.
    """

    def attribute(model: _Explained, inputs: Tensor) -> Tensor:
        maps = LayerGradCam(model, model.last_feature_map(inputs)).attribute(inputs, relu_attributions=True)
        return LayerAttribution.interpolate(maps, states.shape[2:], "bilinear")[:, :1]

    return _attributed(policy, states, target, attribute)[:, 0]


def integrated_gradients(policy: Policy, states: Tensor, target: int | None = None, steps: int = 50) -> Tensor:
    """Sundararajan et al. 2017 from the black picture.

    The mean gradient is not multiplied by the input: black floor would be zero by that alone, while the paper's
    Table 1 has most of the map's mass there.
    """

    def attribute(model: _Explained, inputs: Tensor) -> Tensor:
        method = IntegratedGradients(model, multiply_by_inputs=False)
        return method.attribute(inputs, n_steps=steps, internal_batch_size=256)

    return _attributed(policy, states, target, attribute).amax(dim=1)


class _Explained(nn.Module):
    """The policy as modules, as captum's hooks need it, with one of its explained functions as the output, (B,)."""

    def __init__(self, policy: Policy, target: int | None, function: int):
        super().__init__()
        self.distribution, self.target, self.function = DISTRIBUTIONS[policy.output], target, function
        self.soft = isinstance(policy, ActorCritic) and policy.config.activation == "softplus"
        self.network: Any = _as_layers(policy) if isinstance(policy, ActorCritic) else policy

    def forward(self, states: Tensor) -> Tensor:
        outputs = self.network(states)
        outputs = outputs[0] if isinstance(outputs, tuple) else outputs
        return self.distribution.explained(outputs, self.target)[:, self.function]

    def guided_method(self) -> tuple[Any, dict[str, Any]]:
        """captum's method, and what it is called with besides."""
        if not self.soft:
            return GuidedBackprop(self), {}
        for layer in self.modules():
            if isinstance(layer, nn.Softplus):
                layer.register_forward_hook(lambda _, inputs, output: _PositiveGradient.apply(output))
        return Saliency(self), {"abs": False}

    def last_feature_map(self, states: Tensor) -> nn.Module:
        """The last layer of the decision's own, not of a critic beside it, whose output is a feature map.

        That is (B, channels, rows, columns).
        """
        seen: list[tuple[nn.Module, Tensor]] = []

        def notice(layer: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.ndim == 4 and output.requires_grad:
                seen.append((layer, output))

        hooks = [layer.register_forward_hook(notice) for layer in self.modules()]
        with torch.enable_grad():
            value = self(states[:1].detach().clone().requires_grad_(True)).sum()
        for hook in hooks:
            hook.remove()
        outputs = [output for _, output in seen]
        used = torch.autograd.grad(value, outputs, allow_unused=True) if outputs else ()
        found = [layer for (layer, _), gradient in zip(seen, used, strict=True) if gradient is not None]
        if not found:
            raise UserError("Grad-CAM needs a network with a layer that gives a feature map; use vg, ig or gb.")
        return found[-1]


class _PositiveGradient(torch.autograd.Function):
    """The identity, whose gradient is cut to what is positive."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.clamp(min=0)


def _as_layers(policy: ActorCritic) -> nn.Sequential:
    layers: list[nn.Module] = []
    for layer in [*policy.convolutions, policy.trunk]:
        if layer is policy.trunk:
            layers.append(nn.Flatten())
        layers += [layer, nn.ReLU() if policy.config.activation == "relu" else nn.Softplus(SOFTPLUS_BETA)]
    return nn.Sequential(*layers, policy.policy_head)


def _attributed(
    policy: Policy, states: Tensor, target: int | None, attribute: Callable[[_Explained, Tensor], Tensor]
) -> Tensor:
    """Attributions to every explained function, combined: float (B, C, H, W), not negative."""
    with torch.no_grad():
        importance = DISTRIBUTIONS[policy.output].importance(policy(states)[0], target)
    found = []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Setting backward hooks")  # on modules that live only here
        for function in range(importance.shape[1]):
            inputs = states.detach().clone().requires_grad_(True)
            found.append(attribute(_Explained(policy, target, function), inputs).detach())
    return combined(importance, torch.stack(found, dim=1))


def _refuse_unguided(policy: Policy, states: Tensor) -> None:
    """Refuse a policy whose activations hooks on ReLU layers do not all reach: the map would be the plain gradient.

    Raises:
        UserError: it is one.
    """
    if isinstance(policy, ActorCritic):
        return
    assert isinstance(policy, nn.Module)
    calls = Counter[str]()
    hooks = [
        layer.register_forward_hook(lambda *_: calls.update(["relu"]))
        for layer in policy.modules()
        if isinstance(layer, nn.ReLU)
    ]
    with torch.enable_grad():
        outputs = policy(states[:1].detach().clone().requires_grad_(True))[0]
    for hook in hooks:
        hook.remove()
    names = Counter(node.name().removesuffix("0").removesuffix("Backward") for node in _graph(outputs.grad_fn))
    others = sorted(name for name in names if name in _OTHER_ACTIVATIONS)
    if others or names["Relu"] > calls["relu"] or not calls["relu"]:
        reason = f"has {', '.join(others)}" if others else "has others, which no layer shows"
        raise UserError(
            f"Guided backpropagation, and SmoothGrad on it, need a network whose activations are all ReLU layers, and "
            f"this one {reason}; use vg, ig, gb or linear."
        )


def _graph(root: Any) -> Iterator[Any]:
    """The nodes of autograd's graph."""
    waiting, seen = [root], {root}
    while waiting:
        node = waiting.pop()
        yield node
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                waiting.append(following)
