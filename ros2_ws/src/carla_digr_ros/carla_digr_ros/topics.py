"""The one table of the drive's topics: name, which is the library's, type, rate, quality of service, publisher.

Every message about a frame carries that frame's stamp (simulation time). All publishers are reliable, so reliable and
best-effort subscribers both match. Names are relative to a node's namespace and remapped like any ROS name's; ``name``
is that in the root namespace, and in recordings.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ackermann_msgs.msg import AckermannDriveStamped
from carla_digr_msgs.msg import (
    DriveEvent,
    DriveFrame,
    DrivingDecision,
    ExplainedObjects,
    MapTrust,
    VehicleControl,
    Vehicles,
)
from diagnostic_msgs.msg import DiagnosticArray
from geometry_msgs.msg import Twist
from nav_msgs.msg import Odometry
from rclpy.node import Node
from rclpy.publisher import Publisher
from rclpy.qos import DurabilityPolicy, HistoryPolicy, QoSProfile, ReliabilityPolicy
from rclpy.subscription import Subscription
from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import CameraInfo, CompressedImage, Image
from tf2_msgs.msg import TFMessage
from visualization_msgs.msg import MarkerArray

from carla_digr.driving.control import TICK
from carla_digr.recordings import topics as names

FRAME_RATE = 1.0 / TICK  # Hz, one message per tick
# Two seconds of frames: what a subscriber that was held up still gets, late but complete; and room for a stranger's
# burst, behind which the middleware would drop the frame itself.
QOS = QoSProfile(
    history=HistoryPolicy.KEEP_LAST,
    depth=40,
    reliability=ReliabilityPolicy.RELIABLE,
    durability=DurabilityPolicy.VOLATILE,
)
PICTURE = 2**27  # bytes: 4096x4096 pixels of 32 bits, twice
# Five seconds of frames: what a publisher keeps for a subscriber whose process was stopped, such as the recorder's.
KEPT = 100
LATCHED = QoSProfile(
    history=HistoryPolicy.KEEP_LAST,
    depth=1,
    reliability=ReliabilityPolicy.RELIABLE,
    durability=DurabilityPolicy.TRANSIENT_LOCAL,
)


@dataclass(frozen=True)
class Topic:
    """One row of the table; ``rate`` in Hz, ``publishers`` are executables of this package.

    ``largest``: bytes (CDR) of a message that a node reads; of more it says so without looking into them.
    """

    name: str
    type: Any
    publishers: tuple[str, ...]
    rate: float = FRAME_RATE
    qos: QoSProfile = field(default_factory=lambda: QOS)
    largest: int = 2**18

    @property
    def type_name(self) -> str:
        """The type as recordings name it."""
        return names.TYPES[self.name]

    @property
    def relative(self) -> str:
        """The name in the namespace of a node."""
        return self.name[1:]

    def of(self, node: Node) -> str:
        """The whole name that a node has for it."""
        return node.resolve_topic_name(self.relative)

    @property
    def offered(self) -> QoSProfile:
        """A publisher's quality of service: the table's, but deeper."""
        latched = self.qos.durability is DurabilityPolicy.TRANSIENT_LOCAL
        return QoSProfile(depth=self.qos.depth if latched else KEPT, durability=self.qos.durability)

    def publisher(self, node: Node) -> Publisher:
        """A publisher of this topic."""
        return node.create_publisher(self.type, self.relative, self.offered)

    def subscribe(self, node: Node, callback: Any) -> Subscription:
        """A subscription with the table's quality of service to the messages as they are sent, CDR bytes."""
        return node.create_subscription(self.type, self.relative, callback, self.qos, raw=True)


CLOCK = Topic(names.CLOCK, Clock, ("carla_bridge",))
FRAME = Topic(names.FRAME, DriveFrame, ("carla_bridge",))
ODOMETRY = Topic(names.ODOMETRY, Odometry, ("carla_bridge",))
TF = Topic(names.TF, TFMessage, ("carla_bridge",))  # map -> ego_vehicle
TF_STATIC = Topic(names.TF_STATIC, TFMessage, ("carla_bridge",), rate=0.0, qos=LATCHED)  # the camera on the ego
CAMERA_INFO = Topic(names.CAMERA_INFO, CameraInfo, ("carla_bridge",))
IMAGE = Topic(names.IMAGE, Image, ("carla_bridge",), largest=PICTURE)  # rgb8
# rgb8; where the server has such a camera
INSTANCES = Topic(names.INSTANCES, Image, ("carla_bridge",), largest=PICTURE)
VEHICLES = Topic(names.VEHICLES, Vehicles, ("carla_bridge",), largest=2**15)  # a thousand take ten milliseconds to read
MARKERS = Topic(names.MARKERS, MarkerArray, ("carla_bridge",))  # the ego, and what VEHICLES has
EVENTS = Topic(names.EVENTS, DriveEvent, ("carla_bridge",), rate=0.0)  # when something happens
# The explainer decides; where the bridge had to brake instead, it says so with `fallback`.
DECISION = Topic(names.DECISION, DrivingDecision, ("explainer", "carla_bridge"))
SALIENCY = Topic(names.SALIENCY, Image, ("explainer",), largest=PICTURE)  # 32FC1 in [0, 1]
OVERLAY = Topic(names.OVERLAY, Image, ("explainer",), largest=PICTURE)  # rgb8
# rgb8: what the policy saw, during an attack
OBSERVATION = Topic(names.OBSERVATION, Image, ("explainer",), largest=PICTURE)
OBJECTS = Topic(names.OBJECTS, ExplainedObjects, ("explainer",), largest=2**20)  # those that come late are left out
TRUST = Topic(names.TRUST, MapTrust, ("explainer",), rate=0.2)  # at most, where a core is free for it
MANUAL = Topic(names.MANUAL, VehicleControl, ("viewer",))  # from a human
PAGE = "page"  # frame_id of a manual command that comes from the web page
# Beside the drive's own topics, neither recorded nor replayed: what a user's teleop sends, and pictures for a slow
# network, made while somebody listens.
CMD_VEL = Topic("/cmd_vel", Twist, ())
ACKERMANN = Topic("/ackermann_cmd", AckermannDriveStamped, ())
OVERLAY_JPEG = Topic(f"{names.OVERLAY}/compressed", CompressedImage, ("explainer",))
# Stamped by the wall clock: who watches it wants to know whether a node still speaks, whatever the drive's time does.
DIAGNOSTICS = Topic(
    names.DIAGNOSTICS, DiagnosticArray, ("carla_bridge", "explainer", "viewer", "recorder", "player"), rate=1.0
)

TOPICS = (
    *(CLOCK, FRAME, ODOMETRY, TF, TF_STATIC, CAMERA_INFO, IMAGE, INSTANCES, VEHICLES, MARKERS, EVENTS),
    *(DECISION, SALIENCY, OVERLAY, OBSERVATION, OBJECTS, TRUST, MANUAL, DIAGNOSTICS),
)
