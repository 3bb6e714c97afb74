"""What a frame is in messages: images, exact for any row stride and byte order; the camera; the ego's motion; frames.

Where a ROS 2 installation has cv_bridge, its decoder is used; the wheels on PyPI have none (what is called cv-bridge
there is the ROS 1 package, which OpenCV 5 and numpy 2 break), and the few lines here give the same arrays.
"""

from __future__ import annotations

import array
import math
from collections.abc import Iterable

import numpy as np
import simplejpeg
from carla_digr_msgs.msg import Vehicle
from geometry_msgs.msg import Point, Pose, Quaternion, Transform, TransformStamped, Vector3
from nav_msgs.msg import Odometry
from numpy.typing import NDArray
from sensor_msgs.msg import CameraInfo, CompressedImage, Image
from std_msgs.msg import ColorRGBA, Header
from tf2_msgs.msg import TFMessage
from visualization_msgs.msg import Marker, MarkerArray

from carla_digr import images
from carla_digr.driving.control import CAMERA, DriveFrame
from carla_digr.images import ENCODINGS

try:
    from cv_bridge import CvBridge
    from cv_bridge.boost import cv_bridge_boost  # noqa: F401 - only the ROS 2 package has this extension
except ImportError:
    CvBridge = None


# REP 103 and 105: x forward, y left, z up; in the optical frame z forward, x right, y down.
MAP_FRAME, EGO_FRAME = "map", "ego_vehicle"
CAMERA_FRAME, OPTICAL_FRAME = "ego_vehicle/camera", "ego_vehicle/camera_optical"
JPEG_QUALITY = 90
EGO_SIZE = (4.79, 2.16, 1.49)  # m, the box of EGO_BLUEPRINT in CARLA 0.9.16
EGO_COLOUR, OTHERS_COLOUR = ColorRGBA(r=0.1, g=0.5, b=1.0, a=0.9), ColorRGBA(r=0.9, g=0.6, b=0.2, a=0.9)
# The simulator says exactly where the ego is, in float32: variances of (1 mm)2, (1 mrad)2 and those a second.
CERTAIN = [1e-6 if row == column else 0.0 for row in range(6) for column in range(6)]


def to_message(image: NDArray, encoding: str, header: Header) -> Image:
    """An image message without row padding, little-endian.

    Args:
        image: (H, W, channels), or (H, W) for one channel, of the encoding's element type.
        encoding: one of ENCODINGS.
        header: stamp and frame of the picture.

    Raises:
        ValueError: the array does not fit the encoding.
    """
    dtype, channels = ENCODINGS[encoding]
    if image.dtype != dtype or (image.shape[2:] or (1,)) != (channels,):
        raise ValueError(f"{encoding} needs {np.dtype(dtype)} (H, W, {channels}), not {image.dtype} {image.shape}")
    image = image.astype(np.dtype(dtype).newbyteorder("<"), copy=False)
    height, width = image.shape[:2]
    return Image(
        header=header,
        height=height,
        width=width,
        encoding=encoding,
        is_bigendian=0,
        step=width * channels * image.itemsize,
        # array.array is the one type that rclpy takes without a copy element by element.
        data=array.array("B", image.tobytes()),
    )


def to_jpeg(rgb: NDArray[np.uint8], header: Header) -> CompressedImage:
    """A picture (H, W, 3) as image_transport compresses it."""
    data = simplejpeg.encode_jpeg(np.ascontiguousarray(rgb), JPEG_QUALITY)
    return CompressedImage(header=header, format="rgb8; jpeg compressed bgr8", data=array.array("B", data))


def to_array(message: Image) -> NDArray:
    """As `images.to_array`."""
    if CvBridge is None:
        return images.to_array(message)
    images.check(message)
    return np.array(CvBridge().imgmsg_to_cv2(message), order="C")


def to_rgb(message: Image) -> NDArray[np.uint8]:
    """As `images.to_rgb`."""
    return images.to_rgb(message, to_array)


def camera_info(header: Header, fov: float, width: int, height: int) -> CameraInfo:
    """A pinhole without distortion; ``fov`` is the horizontal field of view in degrees, as CARLA has it."""
    focal = width / (2.0 * math.tan(math.radians(fov) / 2.0))
    cx, cy = width / 2.0, height / 2.0
    return CameraInfo(
        header=header,
        width=width,
        height=height,
        distortion_model="plumb_bob",
        d=[0.0] * 5,
        k=[focal, 0.0, cx, 0.0, focal, cy, 0.0, 0.0, 1.0],
        r=[1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0],
        p=[focal, 0.0, cx, 0.0, 0.0, focal, cy, 0.0, 0.0, 0.0, 1.0, 0.0],
    )


def quaternion(roll: float, pitch: float, yaw: float) -> Quaternion:
    """Of angles in CARLA's left-handed axes (rad): pitch and yaw change sign."""
    cr, sr = math.cos(roll / 2.0), math.sin(roll / 2.0)
    cp, sp = math.cos(-pitch / 2.0), math.sin(-pitch / 2.0)
    cy, sy = math.cos(-yaw / 2.0), math.sin(-yaw / 2.0)
    return Quaternion(
        x=sr * cp * cy - cr * sp * sy,
        y=cr * sp * cy + sr * cp * sy,
        z=cr * cp * sy - sr * sp * cy,
        w=cr * cp * cy + sr * sp * sy,
    )


def odometry(header: Header, frame: DriveFrame) -> Odometry:
    """The ego's motion in ROS's right-handed axes (REP 103): CARLA's y, pitch and yaw change sign."""
    message = Odometry(child_frame_id=EGO_FRAME)
    message.header.stamp = header.stamp
    message.header.frame_id = MAP_FRAME
    pose, twist = message.pose.pose, message.twist.twist
    pose.position = Point(x=float(frame.x), y=-float(frame.y), z=float(frame.z))
    pose.orientation = quaternion(frame.roll, frame.pitch, frame.yaw)
    twist.linear = Vector3(x=float(frame.speed), y=-float(frame.sideways), z=float(frame.upwards))
    twist.angular.z = -float(frame.yaw_rate)
    message.pose.covariance = message.twist.covariance = CERTAIN
    return message


def ego_transform(motion: Odometry) -> TFMessage:
    """map -> ego_vehicle, as the odometry has it."""
    pose = motion.pose.pose
    place = Vector3(x=pose.position.x, y=pose.position.y, z=pose.position.z)
    transform = Transform(translation=place, rotation=pose.orientation)
    return TFMessage(transforms=[TransformStamped(header=motion.header, child_frame_id=EGO_FRAME, transform=transform)])


def camera_transforms() -> TFMessage:
    """ego_vehicle -> camera -> camera_optical, from the table of the driving task."""
    angles = (math.radians(CAMERA[name]) for name in ("roll", "pitch", "yaw"))
    mounted = Transform(translation=Vector3(x=CAMERA["x"], y=-CAMERA["y"], z=CAMERA["z"]), rotation=quaternion(*angles))
    optical = Transform(rotation=Quaternion(x=-0.5, y=0.5, z=-0.5, w=0.5))
    rows = ((EGO_FRAME, CAMERA_FRAME, mounted), (CAMERA_FRAME, OPTICAL_FRAME, optical))
    return TFMessage(
        transforms=[
            TransformStamped(header=Header(frame_id=parent), child_frame_id=child, transform=transform)
            for parent, child, transform in rows
        ]
    )


def markers(header: Header, vehicles: Iterable[Vehicle]) -> MarkerArray:
    """The ego and the other vehicles as boxes in the ego's frame; those of the frame before are cleared."""
    here = Header(stamp=header.stamp, frame_id=EGO_FRAME)
    length, width, height = EGO_SIZE
    ego = Vehicle(length=length, width=width, height=height)
    boxes = [_box(here, "ego", ego, EGO_COLOUR)]
    boxes += [_box(here, "vehicles", vehicle, OTHERS_COLOUR) for vehicle in vehicles if vehicle.length > 0.0]
    return MarkerArray(markers=[Marker(header=here, ns="vehicles", action=Marker.DELETEALL), *boxes])


def _box(header: Header, name: str, vehicle: Vehicle, colour: ColorRGBA) -> Marker:
    place = Point(x=float(vehicle.ahead), y=-float(vehicle.right), z=vehicle.height / 2.0)
    return Marker(
        header=header,
        ns=name,
        id=vehicle.id & 0x7FFFFFFF,
        type=Marker.CUBE,
        action=Marker.ADD,
        pose=Pose(position=place, orientation=quaternion(0.0, 0.0, -vehicle.heading)),
        scale=Vector3(x=float(vehicle.length), y=float(vehicle.width), z=float(vehicle.height)),
        color=colour,
    )
