"""What a student's maps are held against: supervision, losses of the regularisation, held-out figures."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from carla_digr.config import DistillConfig
from carla_digr.distributions import kl_divergence
from carla_digr.errors import UserError
from carla_digr.policy import ActorCritic, Policy, device_under, to_input
from carla_digr.saliency.gradient import normalise, vanilla_gradient
from carla_digr.saliency.linear import linear_maps
from carla_digr.saliency.metrics import widened
from carla_digr.training.effects import LEAST_EFFECT, effects_loss, target_shares
from carla_digr.training.saliency_dataset import SaliencyDataset

HELD_OUT = ("share", "penalised", "effects", "kl")


def annotated(dataset: SaliencyDataset, task: str, margin: int = 0, above: float | None = None) -> SaliencyDataset:
    """The dataset with masks of the pixels that the task knows to matter in place of its perturbation maps.

    Args:
        margin: pixels around what matters that are kept too.
        above: of these pixels keep those alone whose perturbation map is larger; None: all.

    Raises:
        UserError: the task does not know them.
    """
    if dataset.importance is None:
        raise UserError(f"The task {task} does not know which pixels matter; set distill.supervision to perturbation.")
    kept = torch.from_numpy(widened(dataset.importance.numpy(), margin) == 1)
    masks = (kept if above is None else kept & (dataset.maps > above)).half()
    return replace(dataset, maps=masks, largest=masks.amax(dim=(1, 2)).float())


def with_effects(dataset: SaliencyDataset, margin: int = 0) -> SaliencyDataset:
    """The dataset without the states in which no object decides anything.

    Args:
        margin: pixels around an object's mask that count as its own.

    Raises:
        UserError: the dataset knows no effects.
    """
    if dataset.objects is None:
        raise UserError(
            "The saliency dataset does not know what objects do; set saliency_dataset.effects: true and run "
            "make-dataset in a new --out directory."
        )
    totals = dataset.objects.totals(len(dataset.states))
    decided = torch.where(totals >= LEAST_EFFECT, totals, torch.zeros_like(totals))
    return replace(dataset, largest=decided, objects=dataset.objects.widened(margin, dataset.states.shape[3]))


def check_supervision(settings: DistillConfig) -> None:
    """Refuse a loss that cannot use the supervision.

    Raises:
        UserError: it cannot.
    """
    if settings.loss != "none" and (settings.supervision == "effects") != (settings.loss == "effects"):
        raise UserError(
            f"The loss of effects needs their supervision, and that needs this loss, but distill.supervision is "
            f"{settings.supervision} and distill.loss {settings.loss}; set both to effects or neither."
        )


def split(dataset: SaliencyDataset, held_out: float) -> tuple[SaliencyDataset, SaliencyDataset]:
    """Training and held-out part, by time of collection; states without saliency are left out of both."""
    usable = torch.nonzero(dataset.largest > 0).squeeze(1)
    count = round(len(usable) * (1 - held_out))
    if not 0 < count < len(usable):
        raise UserError(
            f"The saliency dataset has {len(usable)} maps with saliency, too few to hold {held_out:.0%} out; "
            f"raise saliency_dataset.maps."
        )
    return dataset.part(usable[:count]), dataset.part(usable[count:])


def saliency_loss(kind: str, g: Tensor, penalised: Tensor, floor: float) -> Tensor:
    """The regularisation of the input gradient, mean over states.

    "paper" is eq. 4. The others replace its division by the maximum, which one spike satisfies, by a comparison of the
    gradient mass inside and outside of the kept pixels:

    share      sum_J m / sum m
    log_ratio  log(sum_J m + fl sum_U m) - log(sum_U m)
    coverage   log(sum_J m / n + fl mu) - mean_U log(m + 0.02 mu), which keeps small objects alive

    with m the maximum over channels of g, J the penalised pixels, U the n others, mu the mean of m over U; the terms
    with fl and 0.02 are constants in the differentiation.

    Args:
        kind: one of the four names.
        g: float (B, C, H, W), abs of eq. 2's sum, not normalised.
        penalised: bool (B, H, W), J.
        floor: fl.
    """
    pixels = (1, 2)
    if kind == "paper":
        largest = g.amax(dim=(1, 2, 3), keepdim=True)
        return (g / largest.clamp(min=1e-30) * penalised[:, None]).mean()
    m = g.amax(dim=1)
    outside = (m * penalised).sum(dim=pixels)
    inside = (m * ~penalised).sum(dim=pixels)
    if kind == "share":
        return (outside / (outside + inside).clamp(min=1e-30)).mean()
    if kind == "log_ratio":
        return (torch.log(outside + floor * inside.detach() + 1e-30) - torch.log(inside + 1e-30)).mean()
    n = (~penalised).sum(dim=pixels)
    mu = (inside / n).detach()
    logs = torch.log(m + 0.02 * mu[:, None, None] + 1e-30)
    kept = (logs * ~penalised).sum(dim=pixels) / n
    return (torch.log(outside / n + floor * mu + 1e-30) - kept).mean()


def held_out_figures(
    student: ActorCritic,
    teacher: Policy,
    dataset: SaliencyDataset,
    threshold: float,
    settings: DistillConfig | None = None,
) -> dict[str, float]:
    """What chooses the checkpoint, means over the dataset's states, of the map that is regularised.

    share: of the map's mass on penalised pixels; penalised: eq. 4 on the map that is shown; in place of both, for the
    loss of that name, effects: its value with the last floor. kl: to the teacher; score: their sum.

    Args:
        settings: None: the defaults.
    """
    settings = settings or DistillConfig()
    maps_of = linear_maps if settings.map == "linear" else vanilla_gradient
    parts: dict[str, list[Tensor]] = {name: [] for name in HELD_OUT}
    for rows in torch.arange(len(dataset.states)).split(64):
        states = to_input(dataset.states[rows].to(device_under(student)))
        raw = maps_of(student, states)
        if settings.loss == "effects":
            targets = targets_of(dataset.part(rows), settings.effect_power, raw.device)
            parts["effects"].append(effects_loss(raw, *targets, settings.floor[1]))
        else:
            outside = dataset.maps[rows].to(raw.device) <= threshold
            parts["share"].append((raw * outside).sum(dim=(1, 2)) / raw.sum(dim=(1, 2)).clamp(min=1e-30))
            parts["penalised"].append((normalise(raw)[0] * outside).mean(dim=(1, 2)))
        with torch.no_grad():
            parts["kl"].append(kl_divergence(teacher(states)[0], student(states)[0]))
    figures = {name: float(torch.cat(values).mean()) for name, values in parts.items() if values}
    return {**figures, "score": sum(figures.values())}


def targets_of(dataset: SaliencyDataset, power: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """``target_shares`` of all states of a dataset with effects, on a device."""
    assert dataset.objects is not None
    shares, masks = target_shares(dataset.objects, len(dataset.states), dataset.states.shape[3], power)
    return shares.to(device), masks.to(device)
