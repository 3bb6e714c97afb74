"""What a frame is in messages: images, exact for any row stride and byte order; the camera; the ego's motion.

Where a ROS 2 installation has cv_bridge, its decoder is used; the wheels on PyPI have none (what is called cv-bridge
there is the ROS 1 package, which OpenCV 5 and numpy 2 break), and the few lines here give the same arrays.
"""

from __future__ import annotations

import array
import math

import numpy as np
from nav_msgs.msg import Odometry
from numpy.typing import NDArray
from sensor_msgs.msg import CameraInfo, Image
from std_msgs.msg import Header

from carla_digr import images
from carla_digr.driving.control import DriveFrame
from carla_digr.images import ENCODINGS

try:
    from cv_bridge import CvBridge
    from cv_bridge.boost import cv_bridge_boost  # noqa: F401 - only the ROS 2 package has this extension
except ImportError:
    CvBridge = None


MAP_FRAME, EGO_FRAME, CAMERA_FRAME = "map", "ego_vehicle", "ego_vehicle/camera"


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


def odometry(header: Header, frame: DriveFrame) -> Odometry:
    """The ego's motion in ROS's right-handed axes (REP 103): CARLA's y and yaw change sign."""
    message = Odometry(child_frame_id=EGO_FRAME)
    message.header.stamp = header.stamp
    message.header.frame_id = MAP_FRAME
    pose = message.pose.pose
    pose.position.x, pose.position.y = float(frame.x), -float(frame.y)
    pose.orientation.z = math.sin(-frame.yaw / 2.0)
    pose.orientation.w = math.cos(-frame.yaw / 2.0)
    message.twist.twist.linear.x = float(frame.speed)
    return message
