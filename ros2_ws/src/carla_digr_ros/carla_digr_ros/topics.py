"""The one table of the drive's topics: name, type, rate, quality of service, publisher.

Every message about a frame carries that frame's stamp (simulation time). All publishers are reliable, so reliable and
best-effort subscribers both match. Names are remapped like any ROS name's.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from carla_digr_msgs.msg import DriveFrame, DrivingDecision, VehicleControl
from diagnostic_msgs.msg import DiagnosticArray
from nav_msgs.msg import Odometry
from rclpy.node import Node
from rclpy.publisher import Publisher
from rclpy.qos import DurabilityPolicy, HistoryPolicy, QoSProfile, ReliabilityPolicy
from rclpy.subscription import Subscription
from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import CameraInfo, Image

FRAME_RATE = 20.0  # Hz, one message per tick
# Half a second of frames: what a subscriber that was held up still gets, late but complete.
QOS = QoSProfile(
    history=HistoryPolicy.KEEP_LAST,
    depth=10,
    reliability=ReliabilityPolicy.RELIABLE,
    durability=DurabilityPolicy.VOLATILE,
)


@dataclass(frozen=True)
class Topic:
    """One row of the table; ``rate`` in Hz, ``publishers`` are executables of this package."""

    name: str
    type: Any
    publishers: tuple[str, ...]
    rate: float = FRAME_RATE
    qos: QoSProfile = field(default_factory=lambda: QOS)

    def publisher(self, node: Node) -> Publisher:
        """A publisher of this topic."""
        return node.create_publisher(self.type, self.name, self.qos)

    def subscribe(self, node: Node, callback: Any) -> Subscription:
        """A subscription with the table's quality of service."""
        return node.create_subscription(self.type, self.name, callback, self.qos)


CLOCK = Topic("/clock", Clock, ("carla_bridge",))
FRAME = Topic("/carla_digr/frame", DriveFrame, ("carla_bridge",))
ODOMETRY = Topic("/carla_digr/ego/odometry", Odometry, ("carla_bridge",))
CAMERA_INFO = Topic("/carla_digr/camera/camera_info", CameraInfo, ("carla_bridge",))
IMAGE = Topic("/carla_digr/camera/image", Image, ("carla_bridge",))  # rgb8
# The explainer decides; where the bridge had to brake instead, it says so with `fallback`.
DECISION = Topic("/carla_digr/decision", DrivingDecision, ("explainer", "carla_bridge"))
SALIENCY = Topic("/carla_digr/saliency", Image, ("explainer",))  # 32FC1 in [0, 1]
OVERLAY = Topic("/carla_digr/overlay", Image, ("explainer",))  # rgb8
OBSERVATION = Topic("/carla_digr/observation", Image, ("explainer",))  # rgb8: what the policy saw, during an attack
MANUAL = Topic("/carla_digr/manual_control", VehicleControl, ())  # from a human
DIAGNOSTICS = Topic(
    "/diagnostics", DiagnosticArray, ("carla_bridge", "explainer", "viewer", "recorder", "player"), rate=1.0
)

TOPICS = (CLOCK, FRAME, ODOMETRY, CAMERA_INFO, IMAGE, DECISION, SALIENCY, OVERLAY, OBSERVATION, MANUAL, DIAGNOSTICS)
