"""Stage 3: the student, by distillation with selective input-gradient regularisation (DIGR, eq. 5).

The student drives; the states that it meets fill an online buffer, on which it is pulled towards the teacher's action
distribution; by setting also on the same instants in another scenery, to which the teacher's answer is to be what it is
in their own. On the offline dataset its input gradient is penalised wherever the teacher's perturbation map M_p is at
or below the threshold. By setting it is not the gradient but the linearised perturbation map, and what it is held
against not M_p but what the task knows to matter, or what each object does to the teacher's decision. The checkpoint is
the one that does best on held-out maps.
"""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from carla_digr import checkpoint
from carla_digr.config import Config, DistillConfig
from carla_digr.distributions import eq2_weights, kl_divergence
from carla_digr.errors import UserError
from carla_digr.files import atomic_write
from carla_digr.policy import ActorCritic, InputRecipe, Policy, device_of, device_under, to_input
from carla_digr.saliency.gradient import (
    input_gradient,
    log_probability_weights,
)
from carla_digr.saliency.linear import differentiable_maps
from carla_digr.tasks import make_task
from carla_digr.training.effects import effects_loss
from carla_digr.training.gradient_surgery import project_conflicting
from carla_digr.training.progress import Progress
from carla_digr.training.rollout import load_policy, policy_logits, present, restore_batch, sample_actions, varied_task
from carla_digr.training.saliency_dataset import SaliencyDataset, load_dataset
from carla_digr.training.state import (
    check_same_job,
    load_state,
    only_job_in,
    pack_optimiser,
    save_state,
    unpack_optimiser,
)
from carla_digr.training.state_ring import StateRing
from carla_digr.training.supervision import (
    HELD_OUT,
    annotated,
    check_supervision,
    held_out_figures,
    saliency_loss,
    split,
    targets_of,
    with_effects,
)


def distill(config: Config, out: Path, teacher_path: Path, module: str | None = None) -> None:
    """Train the student, or go on training it, and write ``student.safetensors`` and ``.json``.

    ``OUT/distill`` holds the saved state, the online buffer and ``curve.csv``. The teacher may be any network; the
    student is an ActorCritic.

    Args:
        module: code of the teacher's own, see ``checkpoint.load``.

    Raises:
        UserError: teacher or dataset are missing, damaged or do not belong together, the saved state is of another
            configuration, or the student is to begin from the weights of a teacher of another architecture.
    """
    teacher, card = load_policy(teacher_path, make_task(config), module, config.device)
    dataset = load_dataset(out / "dataset", card["weights_sha256"])
    with only_job_in(out / "distill"):
        job = _Distillation(config, out, teacher, card, dataset)
        try:
            job.run()
        finally:
            job.env.close()
    print(f"{out / 'student.safetensors'}: {job.best}")


class _Distillation:
    """The job's state and its loop."""

    def __init__(self, config: Config, out: Path, teacher: Policy, card: dict[str, Any], dataset: SaliencyDataset):
        self.config, self.settings, self.out = config, config.distill, out
        self.teacher = teacher
        self.teacher_sha256 = card["weights_sha256"]
        check_supervision(self.settings)
        if self.settings.supervision == "effects":
            dataset = with_effects(dataset, self.settings.annotation_margin)
        elif self.settings.supervision != "perturbation":
            above = config.saliency_dataset.threshold if self.settings.supervision == "both" else None
            dataset = annotated(dataset, config.task, self.settings.annotation_margin, above)
        self.train_set, self.held_out = split(dataset, config.distill.held_out)
        self.threshold = config.saliency_dataset.threshold
        self.student = make_student(config, teacher).to(device_of(config.device))
        self.average = copy.deepcopy(self.student).requires_grad_(False)
        self.best_model = copy.deepcopy(self.average)
        self.best: dict[str, float] = {}
        self.history: list[dict[str, float]] = []
        self.recent_returns: list[float] = []
        self.iteration = 0
        self.optimiser = make_optimiser(self.settings, self.student)
        seed = config.seed + 2_000_003  # the stages see different episodes
        self.rng = np.random.default_rng(seed)
        settings = self.settings
        self.env: Any = varied_task(config).make_vec_env(settings.environments, seed)
        if settings.scenery_interval and not hasattr(self.env, "in_other_scenery"):
            raise UserError(f"The task {config.task} cannot show another scenery; leave distill.scenery_interval out.")
        most = settings.environments * (settings.environment_steps + (settings.scenery_interval is not None))
        slack = most * (settings.checkpoint_interval + 1)  # of what is written between two saved states
        directory = out / "distill"
        self.state_path = directory / "state.safetensors"
        resuming = self.state_path.exists()
        self.buffer = StateRing(
            directory / "buffer.bin", self.student.input_shape, settings.buffer_states, slack, resuming, teacher.actions
        )
        if resuming:
            self._restore()
        else:
            self.observations = np.asarray(self.env.reset())
            while self.buffer.written < min(10 * settings.buffer_batch, settings.buffer_states):
                self._drive(1)

    def run(self) -> None:
        """Iterate to the end, validate, and write the best student."""
        settings = self.settings
        progress = Progress(total=settings.iterations, initial=self.iteration, unit="it", desc="distill")
        with progress:
            if not self.history:
                self._validate()
            while self.iteration < settings.iterations:
                losses = self._iterate()
                self.iteration += 1
                last = self.iteration == settings.iterations
                if self.iteration % settings.validation_interval == 0 or last:
                    self._validate(losses)
                    progress.set_postfix(self.best, refresh=False)
                if self.iteration % settings.checkpoint_interval == 0 or last:
                    self._save()
                progress.update()
        card = {
            "task": self.config.task,
            "role": "student",
            "action_names": list(make_task(self.config).action_names),
            "seed": self.config.seed,
            "steps": int(self.best["iteration"]),
            "metrics": {f"held_out_{name}": self.best[name] for name in HELD_OUT if name in self.best},
            "teacher_sha256": self.teacher_sha256,
            "config": self.config.to_dict(),
        }
        checkpoint.save(self.out / "student.safetensors", self.best_model, card)

    def _iterate(self) -> dict[str, float]:
        """One step of the optimiser on both objectives."""
        settings = self.settings
        self._drive(settings.environment_steps)
        if settings.scenery_interval and self.iteration % settings.scenery_interval == 0:
            self._look_elsewhere()
        done = max(0, self.iteration - settings.warm_up) / max(1, settings.iterations - settings.warm_up)
        ramp = {name: ramped(getattr(settings, name), done) for name in _RAMPED}
        rows = self.rng.integers(len(self.train_set.states), size=settings.saliency_batch)
        n = len(rows)
        slots = self.buffer.draw(self.rng, settings.buffer_batch, settings.hard_states)
        images = torch.cat([self.train_set.states[rows], torch.from_numpy(self.buffer.states(slots))])
        states = to_input(images.to(device_under(self.student)))
        with torch.no_grad():
            teacher_logits, teacher_values = self.teacher(states)
        answers = torch.from_numpy(self.buffer.answers[slots]).to(states.device)
        teacher_logits[n:] = torch.where(answers.isnan(), teacher_logits[n:], answers)
        logits, _, hidden = self.student.trace(states)
        divergence = kl_divergence(teacher_logits, logits)
        self.buffer.hardness[slots] = divergence[n:].detach().cpu().numpy()
        kl = divergence.mean()
        distillation = ramp["distillation_weight"] * kl
        if teacher_values is not None:
            # The critic is for display: it learns the teacher's value from the student's features without changing them
            values = self.student.value_head(self.student.activation(hidden[-1].detach())).squeeze(-1)
            distillation = distillation + (values - teacher_values).square().mean()
        losses = {"loss_kl": kl.item()}

        regularisation = torch.zeros(())
        hidden_n, logits_n = [item[:n] for item in hidden], logits[:n]
        if self.iteration >= settings.warm_up:
            if settings.loss != "none":
                saliency = self._saliency_loss(rows, states[:n], logits_n, hidden_n, ramp["floor"])
                regularisation = regularisation + ramp["regularisation_weight"] * saliency
                losses["loss_saliency"] = saliency.item()
            if settings.l1_weight[1] > 0:
                of = n if settings.l1_states == "saliency" else len(states)
                weights = log_probability_weights(logits[:of])
                gradient = input_gradient(self.student, [item[:of] for item in hidden], weights)
                l1 = gradient.abs().sum(dim=(1, 2, 3)).mean()
                regularisation = regularisation + ramp["l1_weight"] * l1
                losses["loss_l1"] = l1.item()
        self._step(regularisation, distillation)
        return losses

    def _saliency_loss(
        self, rows: NDArray[np.int64], states: Tensor, logits: Tensor, hidden: list[Tensor], floor: float
    ) -> Tensor:
        """The regularisation of the student's maps of the training set's states ``rows``."""
        settings, actions = self.settings, logits.shape[1]
        if settings.map == "gradient":
            g = input_gradient(self.student, hidden, eq2_weights(logits)).abs()
        else:
            signs = None
            if settings.map_rows is not None and settings.map_rows < actions - 1:
                drawn = self.rng.choice(np.array([-1, 1], np.float32), (len(rows), actions - settings.map_rows))
                signs = torch.from_numpy(drawn).to(states.device)
            g = differentiable_maps(self.student, states, logits, signs)[:, None]
        if settings.loss == "effects":
            targets = targets_of(self.train_set.part(torch.from_numpy(rows)), settings.effect_power, g.device)
            return effects_loss(g.amax(dim=1), *targets, floor).mean()
        return saliency_loss(settings.loss, g, self.train_set.maps[rows].to(g.device) <= self.threshold, floor)

    def _step(self, regularisation: Tensor, distillation: Tensor) -> None:
        settings, optimiser = self.settings, self.optimiser
        optimiser.zero_grad()
        if settings.pcgrad and regularisation.requires_grad:
            parameters = list(self.student.parameters())
            first = torch.autograd.grad(regularisation, parameters, retain_graph=True, materialize_grads=True)
            second = torch.autograd.grad(distillation, parameters, materialize_grads=True)
            for parameter, g in zip(parameters, project_conflicting(list(first), list(second)), strict=True):
                parameter.grad = g
        else:
            (regularisation + distillation).backward()
        torch.nn.utils.clip_grad_norm_(optimiser.param_groups[0]["params"], settings.max_gradient_norm)
        rate = settings.learning_rate * 0.5 * (1 + math.cos(math.pi * self.iteration / settings.iterations))
        for group in optimiser.param_groups:
            group["lr"] = rate
        optimiser.step()
        with torch.no_grad():
            for average, parameter in zip(self.average.parameters(), self.student.parameters(), strict=True):
                average.lerp_(parameter, 1 - settings.average_decay)

    def _drive(self, steps: int) -> None:
        """The student is the control policy; the buffer gets the states that it meets."""
        for _ in range(steps):
            logits = policy_logits(self.student, self.observations)
            hardness = None  # costs a pass of the teacher
            if self.settings.hard_states > 0:
                hardness = kl_divergence(policy_logits(self.teacher, self.observations), logits).numpy()
            observations, _, dones, infos = self.env.step(sample_actions(logits, self.rng))
            there = present(self.env)
            self.buffer.add(self.observations[there], None if hardness is None else hardness[there])
            self.observations = np.asarray(observations)
            for i in np.flatnonzero(dones):
                if "is_success" in infos[i]:
                    self.recent_returns = [*self.recent_returns[-99:], float(infos[i]["is_success"])]

    def _look_elsewhere(self) -> None:
        """The buffer gets the present pictures in another scenery, with what the teacher says to them in this one."""
        pictures = self.env.in_other_scenery(self.rng)
        answers = policy_logits(self.teacher, self.observations)
        hardness = kl_divergence(answers, policy_logits(self.student, pictures)).numpy()
        self.buffer.add(pictures, hardness, answers.numpy())

    def _validate(self, losses: dict[str, float] | None = None) -> None:
        """Measure the averaged student on the held-out maps; keep it if it is the best so far.

        A student that is to learn nothing from maps is not chosen by them either: the last one is kept.
        """
        figures = held_out_figures(self.average, self.teacher, self.held_out, self.threshold, self.settings)
        if not math.isfinite(figures["score"]):
            raise UserError(
                f"The student diverged at iteration {self.iteration} of distill; lower distill.learning_rate or the "
                f"weights, and delete {self.state_path.parent}."
            )
        row = {"iteration": float(self.iteration), **figures}
        if not self.best or row["score"] < self.best["score"] or self.settings.loss == "none":
            self.best = row
            self.best_model.load_state_dict(self.average.state_dict())
        success = float(np.mean(self.recent_returns)) if self.recent_returns else math.nan
        self.history.append({**row, "success": success, **(losses or {})})

    def _save(self) -> None:
        optimiser, groups = pack_optimiser(self.optimiser)
        tensors = {
            **{f"{name}.{key}": value for name in _MODELS for key, value in getattr(self, name).state_dict().items()},
            **optimiser,
            "observations": torch.from_numpy(self.observations),
            "hardness": torch.from_numpy(self.buffer.hardness),
            "answers": torch.from_numpy(self.buffer.answers),
        }
        get_state = getattr(self.env, "get_state", None)
        if get_state is not None:
            tensors |= {f"env.{name}": torch.from_numpy(value) for name, value in get_state().items()}
        values = {
            "config": self._sections(),
            "optimiser_groups": groups,
            "random": self.rng.bit_generator.state,
            "buffer_written": self.buffer.written,
            **{name: getattr(self, name) for name in _PLAIN},
        }
        self.buffer.flush()
        save_state(self.state_path, tensors, values)
        _write_curve(self.state_path.with_name("curve.csv"), self.history)

    def _restore(self) -> None:
        tensors, values = load_state(self.state_path)
        check_same_job(self.state_path, values["config"], self._sections())
        for name in _MODELS:
            getattr(self, name).load_state_dict(_without_prefix(tensors, f"{name}."))
        unpack_optimiser(self.optimiser, tensors, values["optimiser_groups"])
        for name in _PLAIN:
            setattr(self, name, values[name])
        self.rng.bit_generator.state = values["random"]
        self.buffer.written = values["buffer_written"]
        self.buffer.hardness[:] = tensors["hardness"].numpy()
        if "answers" in tensors:  # not in states of before there were any
            self.buffer.answers[:] = tensors["answers"].numpy()
        self.observations = np.asarray(self.env.reset())
        env_state = {name: value.numpy() for name, value in _without_prefix(tensors, "env.").items()}
        if env_state:
            self.observations, _ = restore_batch(self.env, env_state, tensors["observations"].numpy())

    def _sections(self) -> dict[str, Any]:
        values = self.config.to_dict()
        kept = {key: values[key] for key in ("task", "seed", "environment", "distill")}
        if not isinstance(self.teacher, ActorCritic):
            kept["policy"] = values["policy"]  # the student's layers
        return {**kept, "threshold": self.threshold, "teacher_sha256": self.teacher_sha256}


_MODELS = ("student", "average", "best_model")
_PLAIN = ("iteration", "best", "history", "recent_returns")
_RAMPED = ("regularisation_weight", "l1_weight", "distillation_weight", "floor")


def make_student(config: Config, teacher: Policy) -> ActorCritic:
    """A student of the teacher's layers, or of the configuration's where the teacher is another network.

    Its weights are the teacher's, or orthogonal random ones of the configuration's seed.

    Raises:
        UserError: it is to begin from the weights of another network.
    """
    if config.distill.start == "teacher" and not isinstance(teacher, ActorCritic):
        raise UserError(
            "The teacher is another network than the student, so that its weights cannot be the student's first ones; "
            "set distill.start: random."
        )
    layers = teacher.config if isinstance(teacher, ActorCritic) else config.policy
    recipe = InputRecipe(teacher.recipe.colour, teacher.recipe.stack)
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        student = ActorCritic(
            replace(layers, activation=config.distill.activation),
            *teacher.input_shape,
            actions=teacher.actions,
            recipe=recipe,
        )
    if config.distill.start == "teacher":
        student.load_state_dict(teacher.state_dict())
    return student


def make_optimiser(settings: DistillConfig, student: ActorCritic) -> torch.optim.Optimizer:
    """Two groups: what acts, whose gradient is clipped, and the critic."""
    critic = list(student.value_head.parameters())
    actor = [p for p in student.parameters() if all(p is not c for c in critic)]
    groups = [{"params": actor}, {"params": critic}]
    kind = torch.optim.Adam if settings.optimiser == "adam" else torch.optim.RMSprop
    return kind(groups, lr=settings.learning_rate)


def ramped(ends: tuple[float, float], done: float) -> float:
    """Geometric from the first to the second; linear if one is 0."""
    first, last = ends
    if first > 0 and last > 0:
        return first * (last / first) ** done
    return first + (last - first) * done


def _without_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}


def _write_curve(path: Path, history: list[dict[str, float]]) -> None:
    columns = list(dict.fromkeys(key for row in history for key in row))
    lines = [columns, *([f"{row[c]:.6g}" if c in row else "" for c in columns] for row in history)]
    with atomic_write(path) as file:
        file.write("".join(",".join(line) + "\n" for line in lines).encode())
