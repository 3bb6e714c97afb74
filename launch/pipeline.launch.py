"""The offline stages of a task, each beginning when the one before has succeeded.

The node `stages` runs them, `run_stage` asks for one after the other and logs how far each is. Ctrl-C stops; the same
launch resumes.
"""

from carla_digr_ros.launching import STAGE_ARGUMENTS, STAGE_NAMES, composed, run_stages

from carla_digr.errors import UserError
from carla_digr.live.composition import Argument

STAGES = Argument("stages", ",".join(STAGE_NAMES), "the stages to run, in this order")


def generate_launch_description():
    return composed((*STAGE_ARGUMENTS, STAGES), pipeline)


def pipeline(values):
    names = values["stages"].split(",")
    if not set(names) <= set(STAGE_NAMES):
        raise UserError(f"The argument stages must be some of {','.join(STAGE_NAMES)}, not {values['stages']!r}.")
    return run_stages(names, values)
