"""A recording as if it were a live drive: player, explainer (to explain anew), web page, RViz.

The same composition as `carla-digr replay`; see carla_digr/live/composition.py. The end of the recording ends the
launch.
"""

from carla_digr_ros.launching import composed, included

from carla_digr.live.composition import REPLAY_ARGUMENTS, replay


def generate_launch_description():
    description = composed(REPLAY_ARGUMENTS, replay)
    description.add_action(included("rviz"))
    return description
