"""The names of the drive's topics, and the names of their types: what stands in a recording. No ROS in here.

The ROS package's topics.py takes the names from here and adds message classes, rates and quality of service.
"""

from __future__ import annotations

CLOCK = "/clock"
TF = "/tf"
TF_STATIC = "/tf_static"
FRAME = "/carla_digr/frame"
ODOMETRY = "/carla_digr/ego/odometry"
CAMERA_INFO = "/carla_digr/camera/camera_info"
IMAGE = "/carla_digr/camera/image"
INSTANCES = "/carla_digr/camera/instances"  # what the picture's pixels show: label, low and high byte of the id
VEHICLES = "/carla_digr/vehicles"  # whose ids these are
MARKERS = "/carla_digr/markers"  # ego and vehicles as boxes
EVENTS = "/carla_digr/events"  # collisions, changes of the lane, ends of the road
DECISION = "/carla_digr/decision"
SALIENCY = "/carla_digr/saliency"
OVERLAY = "/carla_digr/overlay"
OBSERVATION = "/carla_digr/observation"  # what the policy saw in place of the camera's picture, during an attack
OBJECTS = "/carla_digr/objects"
TRUST = "/carla_digr/trust"  # of the map, every few seconds
MANUAL = "/carla_digr/manual_control"
DIAGNOSTICS = "/diagnostics"
FACTS_TOPIC = "/carla_digr/recording"  # the recording's first message, std_msgs/String: JSON, who drove

PICTURE_TYPE = "sensor_msgs/msg/Image"
COMPRESSED_TYPE = "sensor_msgs/msg/CompressedImage"
DECISION_TYPE = "carla_digr_msgs/msg/DrivingDecision"
OBJECT_TYPE = "carla_digr_msgs/msg/ExplainedObject"
TYPES = {
    CLOCK: "rosgraph_msgs/msg/Clock",
    TF: "tf2_msgs/msg/TFMessage",
    TF_STATIC: "tf2_msgs/msg/TFMessage",
    FRAME: "carla_digr_msgs/msg/DriveFrame",
    ODOMETRY: "nav_msgs/msg/Odometry",
    CAMERA_INFO: "sensor_msgs/msg/CameraInfo",
    IMAGE: PICTURE_TYPE,
    INSTANCES: PICTURE_TYPE,
    VEHICLES: "carla_digr_msgs/msg/Vehicles",
    MARKERS: "visualization_msgs/msg/MarkerArray",
    EVENTS: "carla_digr_msgs/msg/DriveEvent",
    DECISION: DECISION_TYPE,
    SALIENCY: PICTURE_TYPE,
    OVERLAY: PICTURE_TYPE,
    OBSERVATION: PICTURE_TYPE,
    OBJECTS: "carla_digr_msgs/msg/ExplainedObjects",
    TRUST: "carla_digr_msgs/msg/MapTrust",
    MANUAL: "carla_digr_msgs/msg/VehicleControl",
    DIAGNOSTICS: "diagnostic_msgs/msg/DiagnosticArray",
    FACTS_TOPIC: "std_msgs/msg/String",
}
