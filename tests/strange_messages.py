"""What a stranger in the ROS domain may send; import it after `live_support.workspace`."""

from __future__ import annotations

from carla_digr_msgs.msg import DrivingDecision, ExplainedObjects, Vehicle, Vehicles
from carla_digr_ros import topics
from rclpy.serialization import serialize_message
from sensor_msgs.msg import Image


def nonsense(topic, header) -> list:
    """What is no message of a topic at all, and messages that no node can use, with a frame's header."""
    whole = serialize_message(topic.type())
    # Three bytes less would do where no transport pads to four: such a message of zeros is one, and a human's.
    found = [b"", b"\0\1\0\3", whole[:7], whole[:20], whole[:-5], whole[:4] + b"\xff" * (len(whole) - 8)]
    if topic.type is Image:
        shapes = ("mono8", 8, 8, 8), ("rgb8", 8, 8, 24), ("16UC1", 8, 8, 16), ("32FC1", 8, 8, 32), ("", 8, 8, 8)
        for encoding, height, width, step in shapes:
            for rows in (height, 0, 2**31):
                fields = {"encoding": encoding, "height": rows, "width": width, "step": step}
                found += [Image(header=header, data=bytes(size), **fields) for size in (0, height * step - 1)]
            if topic is topics.SALIENCY and encoding != "32FC1":
                found.append(Image(header=header, data=bytes(height * step), **{**fields, "height": height}))
    elif topic is topics.DECISION:
        many = {"action_names": ["x"] * 2000, "probabilities": [0.0] * 2000}
        found += [DrivingDecision(header=header, **many), DrivingDecision(header=header, policy_hash="x" * 100_000)]
    elif topic is topics.VEHICLES:
        found.append(Vehicles(header=header, vehicles=[Vehicle()] * 2000))
    elif topic is topics.OBJECTS:
        found.append(ExplainedObjects(header=header, sentence="x" * 100_000))
    return found
