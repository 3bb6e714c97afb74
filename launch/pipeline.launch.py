"""The offline stages of a task, each beginning when the one before has succeeded.

The node `stages` runs them, `run_stage` asks for one after the other and logs how far each is. Ctrl-C stops; the same
launch resumes.
"""

from carla_digr_ros.launching import composed

from carla_digr.config import shipped_configs
from carla_digr.errors import UserError
from carla_digr.live.composition import Argument, Process, whole_number
from carla_digr.training import STAGES

NAMES = [stage.name.replace("-", "_") for stage in STAGES]
ARGUMENTS = (
    Argument("task", "red_fetch_green", "the configuration that ships which is used", tuple(shipped_configs())),
    Argument("config", "", "a YAML file to use instead of one that ships"),
    Argument("out", "", "directory of results and saved states (empty: runs/<task>)"),
    Argument("seed", "", "replaces the configuration's seed (empty: does not)"),
    Argument("stages", ",".join(NAMES), "the stages to run, in this order"),
)


def generate_launch_description():
    return composed(ARGUMENTS, pipeline)


def pipeline(values):
    parameters = {"config": values["config"] or values["task"], "out": values["out"]}
    if values["seed"]:
        parameters["seed"] = whole_number("seed", values["seed"], 0, 2**31 - 1)
    processes = [Process("stages")]
    for stage in values["stages"].split(","):
        if stage not in NAMES:
            raise UserError(f"The argument stages must be some of {','.join(NAMES)}, not {values['stages']!r}.")
        processes.append(Process("run_stage", parameters={**parameters, "stage": stage}, finite=True))
    return processes
