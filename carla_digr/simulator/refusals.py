"""Calls of CARLA's protocol that the embedded highway refuses, and what to do instead.

Where CARLA declares a result, the answer's envelope carries the sentence to the client, which raises it.
"""

from __future__ import annotations

from typing import NamedTuple


class Refusal(NamedTuple):
    """A call that is not offered.

    Args:
        returns: whether CARLA declares a value as its result.
        instead: what is offered.
    """

    returns: bool
    instead: str


_LIGHTS = "the highway has no traffic lights"
_MAP = "the highway is one piece, all of which is there"
_LOOKS = "weather and seeds of the scenery change what cameras show"
_PARTS = "vehicles are rigid boxes with drawn bodies; get_transform and bounding_box say where they are"
_WALKERS = "walkers are a few boxes; they walk by controller.ai.walker and WalkerControl"
_PHYSICS = "vehicles follow a bicycle model; 'carla-digr simulator --like carla' has gears, springs and slow brakes"
_FILES = "nothing has to be loaded from this server; get_map_data has the map"
_ROS = "'carla-digr live' has ROS 2 topics"
_V2X = "sensors.other.gnss and get_snapshot tell where vehicles are"

REFUSED: dict[str, Refusal] = {
    **dict.fromkeys(
        (
            "set_traffic_light_state",
            "set_traffic_light_green_time",
            "set_traffic_light_yellow_time",
            "set_traffic_light_red_time",
            "freeze_traffic_light",
            "reset_traffic_light_group",
            "freeze_all_traffic_lights",
        ),
        Refusal(False, _LIGHTS),
    ),
    **dict.fromkeys(("get_group_traffic_lights", "get_light_boxes"), Refusal(True, _LIGHTS)),
    **dict.fromkeys(("load_map_layer", "unload_map_layer", "enable_environment_objects"), Refusal(False, _MAP)),
    "update_lights_state": Refusal(False, "there are no street lamps"),
    **dict.fromkeys(("apply_color_texture_to_objects", "apply_float_color_texture_to_objects"), Refusal(False, _LOOKS)),
    "get_gbuffer_token": Refusal(True, "cameras of depth, semantic_segmentation and instance_segmentation are offered"),
    **dict.fromkeys(
        (
            "get_actor_component_names",
            "get_actor_component_world_transform",
            "get_actor_component_relative_transform",
            "get_actor_bone_world_transforms",
            "get_actor_bone_relative_transforms",
            "get_actor_bone_names",
            "get_actor_socket_world_transforms",
            "get_actor_socket_relative_transforms",
            "get_actor_socket_names",
            "get_vehicle_bones_world_transforms",
        ),
        Refusal(True, _PARTS),
    ),
    **dict.fromkeys(("open_vehicle_door", "close_vehicle_door"), Refusal(False, _PARTS)),
    "get_bones_transform": Refusal(True, _WALKERS),
    **dict.fromkeys(("set_bones_transform", "blend_pose", "get_pose_from_animation"), Refusal(False, _WALKERS)),
    **dict.fromkeys(
        (
            "set_wheel_steer_direction",
            "enable_carsim",
            "use_carsim_road",
            "enable_chrono_physics",
            "restore_physx_physics",
            "show_vehicle_debug_telemetry",
        ),
        Refusal(False, _PHYSICS),
    ),
    "get_cache_file": Refusal(True, _FILES),
    **dict.fromkeys(("enable_sensor_for_ros", "disable_sensor_for_ros"), Refusal(False, _ROS)),
    "is_sensor_enabled_for_ros": Refusal(True, _ROS),
    "send": Refusal(False, _V2X),
    "console_command": Refusal(True, "there is no Unreal Engine behind this server"),
}


def refusal(name: str) -> str:
    """The sentence for a call that is not offered."""
    instead = f"; {REFUSED[name].instead}" if name in REFUSED else ""
    return f"the embedded highway does not offer {name:.60}{instead} (docs/embedded_server.md)"
