"""The live drive: simulator (unless a CARLA server is used), bridge, explainer, web page, RViz.

The same composition as `carla-digr live`; see carla_digr/live/composition.py. The death of simulator, bridge or
explainer ends the launch; who only watches is started again a few times.
"""

from carla_digr_ros.launching import composed, included

from carla_digr.live.composition import ARGUMENTS, live


def generate_launch_description():
    description = composed(ARGUMENTS, live)
    description.add_action(included("rviz"))
    return description
