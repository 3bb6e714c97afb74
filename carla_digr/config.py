"""Configuration of the offline stages: frozen dataclasses read from one YAML file a task.

Keys and types are strict. An error names the file, the key and the nearest valid key. The settings of a task stand with
the task; ``carla_digr.tasks.load_config`` reads a whole file.
"""

from __future__ import annotations

import difflib
import re
import types
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from carla_digr.errors import UserError
from carla_digr.files import read_regular, shipped

YAML_BYTES = 1 << 18  # of the largest configuration that is read
YAML_VALUES = 100_000  # in it, those that stand in several places by an alias counted there too


# What no machine has room for is a slip, told before anything is taken.
MOST_ENVIRONMENTS = 4096
MOST_STATES = 10_000_000


def setting(
    default: Any = MISSING, *, minimum: float | None = None, maximum: float | None = None, empty: bool = False
) -> Any:
    """A dataclass field whose number, or every number in it, must lie in [minimum, maximum].

    ``empty`` allows a list without entries.
    """
    metadata = {"minimum": minimum, "maximum": maximum, "empty": empty}
    return field(metadata=metadata) if default is MISSING else field(default=default, metadata=metadata)


@dataclass(frozen=True)
class PolicyConfig:
    """The actor-critic network: three convolutions, one shared linear layer, two linear heads."""

    convolutions: tuple[tuple[int, int, int], ...] = setting(
        ((16, 8, 4), (32, 4, 2), (32, 3, 2)), minimum=1, maximum=4096
    )  # channels, kernel, stride
    features: int = setting(256, minimum=1, maximum=65_536)  # width of the shared linear layer
    activation: Literal["relu", "softplus"] = "relu"  # softplus has beta 10


@dataclass(frozen=True)
class TeacherConfig:
    """PPO. Defaults are the paper's Table 2 for Red-Fetch-Green."""

    start: str | None = None  # weights of a policy of the same network to begin from; none: new ones
    total_steps: int = setting(10_000_000, minimum=1)  # environment steps, all environments together
    environments: int = setting(16, minimum=1, maximum=MOST_ENVIRONMENTS)
    rollout_steps: int = setting(128, minimum=2, maximum=100_000)  # per environment
    epochs: int = setting(4, minimum=1)
    minibatch_size: int = setting(256, minimum=2, maximum=MOST_STATES)
    learning_rate: float = setting(1e-3, minimum=0)
    learning_rate_end: float = setting(1e-3, minimum=0)  # reached linearly at total_steps
    gamma: float = setting(0.99, minimum=0, maximum=1)
    gae_lambda: float = setting(0.95, minimum=0, maximum=1)
    clip_range: float = setting(0.2, minimum=0)
    entropy_coefficient: float = setting(0.01, minimum=0)
    entropy_coefficient_end: float = setting(0.01, minimum=0)  # reached linearly at total_steps
    value_coefficient: float = setting(0.5, minimum=0)
    max_gradient_norm: float = setting(0.5, minimum=0)
    target_kl: float | None = setting(None, minimum=0)  # epochs stop above 1.5 times this
    checkpoint_interval: int = setting(100_000, minimum=1)  # environment steps between saved states


@dataclass(frozen=True)
class SaliencyDatasetConfig:
    """Offline perturbation saliency maps (eq. 3) over states from the teacher's own episodes."""

    maps: int = setting(1000, minimum=2, maximum=MOST_STATES)
    radius: float = setting(4.0, minimum=0.5)  # standard deviation of the blend mask, pixels
    blur_sigma: float = setting(3.0, minimum=0.1)  # standard deviation of the blurred copy, pixels
    stride: int = setting(2, minimum=1)  # pixels between perturbed centres; logits between are interpolated
    score: Literal["kl", "logits"] = "kl"  # eq. 3, or Greydanus' distance of logits; see saliency/perturbation.py
    threshold: float = setting(0.1, minimum=0, maximum=1)  # lambda: saliency at or below it is penalised
    shard_size: int = setting(50, minimum=1, maximum=10_000)  # maps in one file
    state_interval: int = setting(4, minimum=1)  # environment steps between kept states of one episode
    environments: int = setting(16, minimum=1, maximum=MOST_ENVIRONMENTS)
    workers: int = setting(1, minimum=1, maximum=1024)  # processes, one torch thread each
    effects: bool = False  # also what each object does to the decision, if the task can take objects out of its world


@dataclass(frozen=True)
class DistillConfig:
    """DIGR: policy distillation with selective input-gradient regularisation (eq. 5).

    Pairs are (start, end) of a geometric ramp over the iterations after the warm-up.
    """

    start: Literal["teacher", "random"] = "teacher"  # the student's first weights
    # What may keep saliency: where M_p is above the threshold, what the task knows to matter, or where both hold; with
    # effects, each object as much as it does to the teacher's decision
    supervision: Literal["perturbation", "annotation", "both", "effects"] = "perturbation"
    annotation_margin: int = setting(0, minimum=0)  # pixels around what the task knows, or an object, that are kept too
    effect_power: float = setting(1.0, minimum=0.1, maximum=10)  # an object's share is in proportion to effect ** this
    activation: Literal["relu", "softplus"] = "softplus"  # the student's
    # "effects" compares shares of the map with the objects' effects, the others what is kept with what is not
    loss: Literal["coverage", "log_ratio", "share", "paper", "effects", "none"] = "coverage"
    map: Literal["gradient", "linear"] = "gradient"  # that is regularised: eq. 2's or the linearised perturbation map
    # Of the linearised map's Jacobian; fewer than the actions less one give it in expectation; none: all of them
    map_rows: int | None = setting(None, minimum=1)
    regularisation_weight: tuple[float, float] = setting((0.05, 0.12), minimum=0)
    l1_weight: tuple[float, float] = setting((3e-3, 1.5e-2), minimum=0)
    l1_states: Literal["saliency", "all"] = "saliency"  # the dataset's, or those of the online buffer too
    distillation_weight: tuple[float, float] = setting((1.5, 2.0), minimum=0)  # alpha
    floor: tuple[float, float] = setting((0.03, 0.01), minimum=0)  # fl of the coverage and log-ratio losses
    warm_up: int = setting(0, minimum=0)  # first iterations by distillation alone
    iterations: int = setting(2500, minimum=1)
    optimiser: Literal["adam", "rmsprop"] = "adam"
    learning_rate: float = setting(3e-3, minimum=0)  # cosine decay to 0
    max_gradient_norm: float = setting(1.0, minimum=0)
    pcgrad: bool = False
    average_decay: float = setting(0.98, minimum=0, maximum=1)  # exponential moving average of the weights
    saliency_batch: int = setting(32, minimum=1, maximum=10_000)
    buffer_batch: int = setting(64, minimum=1, maximum=10_000)
    buffer_states: int = setting(10_000, minimum=1, maximum=MOST_STATES)
    # Share of the buffer's batch drawn in proportion to the divergence from the teacher, the rest evenly
    hard_states: float = setting(0.0, minimum=0, maximum=1)
    environments: int = setting(8, minimum=1, maximum=MOST_ENVIRONMENTS)  # in which the student is the control policy
    environment_steps: int = setting(4, minimum=1)  # per environment and iteration
    # Iterations between two looks at the same instants in another scenery, where it is to do the same; none: no looks
    scenery_interval: int | None = setting(None, minimum=1)
    held_out: float = setting(0.15, minimum=0.01, maximum=0.9)  # share of maps that choose the checkpoint
    validation_interval: int = setting(100, minimum=1)  # iterations
    checkpoint_interval: int = setting(100, minimum=1)  # iterations between saved states


@dataclass(frozen=True)
class EvaluationConfig:
    """What `evaluate` measures; a task that measures more has a class of its own, derived from this one."""

    episodes: int = setting(1000, minimum=1)
    environments: int = setting(16, minimum=1, maximum=MOST_ENVIRONMENTS)
    saliency_states: int = setting(500, minimum=1, maximum=MOST_STATES)
    examples: int = setting(6, minimum=1, maximum=1000)  # rows of the picture grid
    slow_states: int = setting(500, minimum=1, maximum=MOST_STATES)  # for the methods that take long
    table_states: int = setting(10_000, minimum=1, maximum=MOST_STATES)  # whose maps the task's notes judge
    # Which object decides, where the task can take objects out of its world
    causal_scenes: int = setting(500, minimum=1, maximum=MOST_STATES)
    causal_interval: int = setting(25, minimum=1)  # decisions between two scenes of an episode
    causal_environments: int = setting(8, minimum=1, maximum=MOST_ENVIRONMENTS)
    # Success under attack, where the task's report has it
    attack_episodes: int = setting(50, minimum=1)
    attack_epsilons: tuple[float, ...] = setting((0.01, 0.02, 0.04, 0.08), minimum=0, maximum=1)


@dataclass(frozen=True)
class Config:
    """Everything one task's stages need.

    ``environment`` is the task's own dataclass, its class attribute ``Settings``.
    """

    task: str
    environment: Any
    seed: int = setting(0, minimum=0, maximum=2**31 - 1)
    device: Literal["cpu", "auto", "cuda"] = "cpu"  # where networks compute; auto: on a GPU if there is one
    policy: PolicyConfig = PolicyConfig()
    teacher: TeacherConfig = TeacherConfig()
    saliency_dataset: SaliencyDatasetConfig = SaliencyDatasetConfig()
    distill: DistillConfig = DistillConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    def to_dict(self) -> dict[str, Any]:
        """The whole configuration as plain JSON-ready values, as the cards keep it."""
        return _plain(asdict(self))


CONFIGS_DIRECTORY = Path(__file__).parent / "configs"


def shipped_configs() -> dict[str, Path]:
    """The configurations of tasks that ship, by name."""
    found = {path.stem: path for path in sorted(CONFIGS_DIRECTORY.glob("*.yaml"))}
    return {name: path for name, path in found.items() if "\ntask:" in f"\n{path.read_text(encoding='utf-8')}"}


def find_config(name: str | Path) -> Path:
    """The file of this path if there is one, else the configuration of this bare name that ships, such as "driving"."""
    return shipped(name, CONFIGS_DIRECTORY, ".yaml")


def read_yaml(path: str | Path) -> Any:
    """The plain values of a YAML file, or of one that ships by its name.

    Raises:
        UserError: the file is missing, not YAML, or larger or more deeply nested than anything that was meant. What
            stands in it is not quoted: the path may be another user's, the file of any kind.
    """
    path = find_config(path)
    try:
        text = read_regular(path, YAML_BYTES).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not a text file"
        bare = not path.suffix and path.name == str(path) and not path.exists()
        hint = _nearest(path, sorted(file.stem for file in CONFIGS_DIRECTORY.glob("*.yaml"))) if bare else ""
        raise UserError(f"Cannot read the configuration {path}: {reason}{hint}.") from error
    try:
        values = yaml.load(text, Loader=_StrictLoader)  # noqa: S506  (a SafeLoader)
        _count(values, {})
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {_where(error)}.") from error
    except (ValueError, OverflowError) as error:  # of a number or a date that is none
        raise UserError(f"{path} is not valid YAML: {error}.") from error
    except RecursionError as error:
        raise UserError(f"{path} is not a configuration: it is nested too deeply.") from error
    return values


def _where(error: yaml.YAMLError) -> str:
    """What is wrong, and the place, without the text that stands there."""
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return str(getattr(error, "problem", None) or getattr(error, "reason", None) or "it cannot be read")
    return f"{error.problem}, line {error.problem_mark.line + 1}, column {error.problem_mark.column + 1}"


def _count(value: Any, known: dict[int, int]) -> int:
    """How many values a value has in it; raises ValueError where there are more than YAML_VALUES."""
    if not isinstance(value, (dict, list, tuple, set)):
        return 1
    if id(value) not in known:
        known[id(value)] = YAML_VALUES  # of one that holds itself
        inner = [*value.keys(), *value.values()] if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_count(item, known) for item in inner)
    if known[id(value)] > YAML_VALUES:
        raise ValueError(f"it holds more than {YAML_VALUES} values")
    return known[id(value)]


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses duplicate keys and reads 1e-3 as a number, as YAML 1.2 does."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str) and key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key '{key}' is given twice", key_node.start_mark)
            seen.add(key) if isinstance(key, str) else None
        return super().construct_mapping(node, deep)


_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def parse_section(cls: type, values: Any, source: str, prefix: str) -> Any:
    """Build one section's dataclass ``cls`` from plain values; ``prefix`` is the section's key in errors.

    Raises:
        UserError: a key or value is wrong.
    """
    if not isinstance(values, dict):
        what = f"key '{prefix}'" if prefix else "the configuration"
        raise UserError(f"{source}: {what} must be a mapping, not {kind_of(values)}.")
    known = {item.name: item for item in fields(cls)}
    for key in values:
        if key not in known:
            raise UserError(f"{source}: unknown key '{_join(prefix, key)}'{_nearest(key, known)}.")
    hints = get_type_hints(cls)
    arguments = {}
    for name, item in known.items():
        key = _join(prefix, name)
        if name in values:
            arguments[name] = _convert(hints[name], values[name], item.metadata, source, key)
        elif item.default is MISSING and item.default_factory is MISSING:
            raise UserError(f"{source}: key '{key}' is missing.")
    return cls(**arguments)


def _convert(kind: Any, value: Any, limits: Any, source: str, key: str) -> Any:
    """``value`` as the annotated type ``kind``; ints are accepted as floats, lists as tuples."""
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if isinstance(kind, type) and is_dataclass(kind):
        if isinstance(value, kind):
            return value
        return parse_section(kind, value if value is not None else {}, source, key)
    if origin in (Union, types.UnionType):
        if value is None:
            return None
        return _convert(next(a for a in arguments if a is not type(None)), value, limits, source, key)
    if origin is Literal:
        if value not in arguments:
            raise UserError(f"{source}: key '{key}' must be one of {listed(arguments)}, not {shown(value)}.")
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise UserError(f"{source}: key '{key}' must be a list, not {shown(value)}.")
        if arguments[-1] is Ellipsis:
            if not value and not limits.get("empty"):
                raise UserError(f"{source}: key '{key}' must not be an empty list.")
            arguments = (arguments[0],) * len(value)
        if len(value) != len(arguments):
            raise UserError(f"{source}: key '{key}' must have {len(arguments)} entries, not {len(value)}.")
        return tuple(
            _convert(a, v, limits, source, f"{key}[{i}]") for i, (a, v) in enumerate(zip(arguments, value, strict=True))
        )
    if origin is dict:
        if not isinstance(value, dict):
            raise UserError(f"{source}: key '{key}' must be a mapping, not {shown(value)}.")
        return value
    accepted = (int, float) if kind is float else kind
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        wanted = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[kind]
        raise UserError(f"{source}: key '{key}' must be {wanted}, not {shown(value)}.")
    if kind in (int, float):
        minimum, maximum = limits.get("minimum"), limits.get("maximum")
        low = "-inf" if minimum is None else minimum
        high = "inf" if maximum is None else maximum
        if not float(low) <= value <= float(high) or value in (float("inf"), float("-inf")):
            raise UserError(f"{source}: key '{key}' must lie in [{low}, {high}], not {shown(value)}.")
    return kind(value)


def _join(prefix: str, key: Any) -> str:
    return f"{prefix}.{key}" if prefix else str(key)


def listed(names: Any) -> str:
    """Names for an error."""
    return ", ".join(str(name) for name in names)


def _nearest(name: Any, valid: Any) -> str:
    close = difflib.get_close_matches(str(name), [str(v) for v in valid], n=1, cutoff=0.4)
    if close:
        return f" (did you mean '{close[0]}'?)"
    return f" (valid: {listed(valid)})" if valid else " (none is known here)"


def kind_of(value: Any) -> str:
    """What a wrong value is, for an error that does not quote it."""
    kinds = {dict: "a mapping", list: "a list", tuple: "a list", str: "text", bool: "true or false"}
    return "nothing" if value is None else kinds.get(type(value), "a number")


def shown(value: Any) -> str:
    """A wrong value for an error."""
    return kind_of(value) if value is None or isinstance(value, (dict, list, tuple)) else f"{value!r:.60}"


def _plain(value: Any) -> Any:
    """Tuples as lists, so that a value equals itself after JSON."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
