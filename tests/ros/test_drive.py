"""Simulator, bridge and explainer, each in its own process: one drive."""

from __future__ import annotations

import math
from itertools import pairwise

import live_support
import numpy as np
import pytest

live_support.workspace()

from carla_digr_msgs.msg import DriveEvent  # noqa: E402
from carla_digr_ros import conversion, topics  # noqa: E402
from carla_digr_ros.carla_bridge import HELD_FRAMES  # noqa: E402
from rclpy.qos import QoSProfile  # noqa: E402

from carla_digr.driving.control import commands_of  # noqa: E402
from carla_digr.explainer import Explainer  # noqa: E402
from carla_digr.live.composition import Process  # noqa: E402
from carla_digr.live.watchdog import FULL_BRAKE  # noqa: E402
from carla_digr.tasks.driving.drive import InProcessDrive  # noqa: E402

pytestmark = pytest.mark.alone

# Lockstep at 20 Hz. A publisher keeps ten frames for a subscriber: flat out these are 50 ms, and an observer that the
# machine holds up for longer misses some.
PACED = """
from carla_digr_ros.carla_bridge import CarlaBridge
decided = CarlaBridge._wait_for_the_decision
def paced(self, executor, going):
    decided(self, executor, going)
    self._wait_for_the_boundary(executor)
CarlaBridge._wait_for_the_decision = paced
"""

WITHOUT_STAMP = (
    topics.CLOCK,
    topics.DIAGNOSTICS,
    topics.OBSERVATION,
    topics.TRUST,
    topics.MANUAL,
    topics.TF,
    topics.TF_STATIC,
    topics.MARKERS,
    topics.EVENTS,
)  # or none in an ordinary drive
MAY_BE_LATE = (topics.INSTANCES, topics.VEHICLES, topics.OBJECTS)  # and is left out then
FRAME_TOPICS = [topic.name for topic in topics.TOPICS if topic not in WITHOUT_STAMP]


def stamp(message) -> float:
    return message.header.stamp.sec + message.header.stamp.nanosec * 1e-9


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A policy that steers along the lane: its decisions need the map on the bridge's side."""
    return live_support.make_weights(tmp_path_factory.mktemp("weights"), "lane")


@pytest.fixture(scope="module")
def drive(tmp_path_factory, weights):
    """What 200 frames in lockstep put on the topics: an observer."""
    from carla_digr.live.supervisor import free_domain

    directory = tmp_path_factory.mktemp("drive")
    port = live_support.free_port()
    with free_domain() as domain, live_support.stage(domain, directory) as start:
        observer = live_support.Observer(domain, *(t.name for t in topics.TOPICS), qos=QoSProfile(depth=1000))
        start(live_support.simulator(port))
        start(live_support.bridge(port, lockstep=True, seed=5, listeners=["observer"]), PACED)
        # The drive begins with the explainer: by then the observer must know the bridge, to miss no frame.
        driven = [topic.name for topic in topics.TOPICS if "carla_bridge" in topic.publishers]
        observer.until(lambda: all(observer.node.count_publishers(name) for name in driven))
        start(Process("explainer", parameters={"weights": str(weights)}))
        observer.until(lambda: len(observer.received[topics.OVERLAY.name]) >= 200)
        numbered = observer.received[topics.FRAME.name]  # topics come in no order
        observer.until(lambda: numbered[-1].frame >= observer.received[topics.DECISION.name][-1].frame)
        yield observer
        observer.close()


def test_every_message_about_a_frame_has_its_stamp(drive):
    stamps = {name: [stamp(message) for message in drive.received[name]] for name in FRAME_TOPICS}
    pictures = stamps[topics.IMAGE.name]
    assert np.allclose(np.diff(pictures), 0.05)
    last = min(times[-1] for times in stamps.values())  # the drive goes on while it is watched
    for name, times in stamps.items():
        assert len(set(times)) == len(times), name
        assert set(times) <= set(pictures) | {t for t in times if t > pictures[-1]}, name
        answered = {t for t in pictures if times[0] <= t <= last}
        if name in [topic.name for topic in MAY_BE_LATE]:
            assert len(answered & set(times)) >= 0.9 * len(answered), name
        else:
            assert answered <= set(times), name
    clock = [m.clock.sec + m.clock.nanosec * 1e-9 for m in drive.received[topics.CLOCK.name]]
    assert set(pictures) <= set(clock)


def test_frames_are_numbered_and_decisions_know_their_frame(drive):
    numbers = {stamp(m): m.frame for m in drive.received[topics.FRAME.name]}
    values = list(numbers.values())
    assert values == list(range(values[0], values[0] + len(values)))
    for message in drive.received[topics.DECISION.name]:
        assert message.frame == numbers[stamp(message)]
        assert not message.fallback


def test_the_drive_is_the_one_that_the_same_decisions_make_in_process(drive, weights):
    """Decision k acts on tick k+1 and on nothing else; seeds, held brake and restarts included."""
    explainer, simulation, seed = Explainer.from_checkpoint(weights), InProcessDrive(), 5
    facts = {m.frame: m for m in drive.received[topics.FRAME.name]}
    pictures = {stamp(m): m for m in drive.received[topics.IMAGE.name]}
    motions = {stamp(m): m for m in drive.received[topics.ODOMETRY.name]}
    frame, ended, episodes = simulation.reset(seed), 0, 1
    compared = 0
    for number, fact in sorted(facts.items()):
        if stamp(fact) not in pictures or stamp(fact) not in motions:
            break
        picture = conversion.to_rgb(pictures[stamp(fact)])
        np.testing.assert_array_equal(picture, frame.image, err_msg=f"frame {number}")
        motion = motions[stamp(fact)]
        assert motion.twist.twist.linear.x == frame.speed
        place = motion.pose.pose
        assert (place.position.x, place.position.y) == (frame.x, -frame.y)
        yaw = 2.0 * math.atan2(place.orientation.z, place.orientation.w)
        assert math.isclose(
            math.remainder(yaw + frame.yaw, 2.0 * math.pi), 0.0, abs_tol=1e-6
        )  # through float32 degrees
        turning = float(simulation.world.vehicle(simulation.ego)["yaw_rate"])
        assert motion.twist.twist.angular.z == pytest.approx(-turning, abs=1e-5)
        assert (fact.episode, fact.seed, fact.over) == (episodes, seed, bool(ended))
        assert (fact.collision, fact.off_road) == (frame.collision or "", frame.off_road)
        compared += 1
        if ended and number - ended >= HELD_FRAMES:
            seed, episodes, ended = seed + 1, episodes + 1, 0
            frame = simulation.reset(seed)
            continue
        frame = simulation.step(FULL_BRAKE if ended else commands_of(explainer.card)[explainer.decide(picture).action])
        if not ended and (frame.collision or frame.off_road):
            ended = number + 1
    assert compared >= 100
    assert episodes >= 2  # random weights leave the road within seconds


def test_the_camera_info_is_the_pinhole_of_the_camera(drive):
    info = drive.received[topics.CAMERA_INFO.name][0]
    assert (info.width, info.height, info.distortion_model) == (128, 128, "plumb_bob")
    focal = 64.0 / math.tan(math.radians(24.0))
    assert np.allclose(info.k, [focal, 0, 64, 0, focal, 64, 0, 0, 1])
    assert np.allclose(np.reshape(info.p, (3, 4))[:, :3].ravel(), info.k)


def matrix(transform) -> np.ndarray:
    """A geometry_msgs/Transform, written down once more: the rotation matrix of a unit quaternion."""
    x, y, z, w = (getattr(transform.rotation, name) for name in "xyzw")
    rotation = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
        [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
        [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
    ]
    place = transform.translation
    return np.vstack([np.column_stack([rotation, [place.x, place.y, place.z]]), [0, 0, 0, 1]])


def test_the_frames_lead_from_a_vehicle_to_its_pixels(drive):
    """What the boxes of the markers are in the picture's frame is where the segmentation shows the vehicles."""
    (static,) = drive.received[topics.TF_STATIC.name]
    links = {(t.header.frame_id, t.child_frame_id): matrix(t.transform) for t in static.transforms}
    assert set(links) == {("ego_vehicle", "ego_vehicle/camera"), ("ego_vehicle/camera", "ego_vehicle/camera_optical")}
    to_ego = np.linalg.multi_dot(list(links.values()))
    info = drive.received[topics.CAMERA_INFO.name][0]
    assert info.header.frame_id == "ego_vehicle/camera_optical"
    boxes = {stamp(m.markers[0]): m.markers for m in drive.received[topics.MARKERS.name]}
    labels = {stamp(m): m for m in drive.received[topics.INSTANCES.name]}
    seen = 0
    for message in drive.received[topics.VEHICLES.name]:
        if stamp(message) not in boxes or stamp(message) not in labels:
            continue
        there = {m.id: m for m in boxes[stamp(message)] if m.ns == "vehicles" and m.action == m.ADD}
        assert set(there) == {vehicle.id for vehicle in message.vehicles}
        picture = conversion.to_rgb(labels[stamp(message)]).astype(int)
        numbers = picture[..., 1] | picture[..., 2] << 8
        for vehicle in message.vehicles:
            rows, columns = np.nonzero((numbers == vehicle.id & 0xFFFF) & (picture[..., 0] >= 12))
            if len(rows) < 30 or not 8.0 < vehicle.ahead < 60.0:
                continue
            box, pose = there[vehicle.id], there[vehicle.id].pose
            assert box.scale.x == pytest.approx(vehicle.length) and 2.0 < box.scale.x < 20.0 and vehicle.type
            x, y, depth = (np.linalg.inv(to_ego) @ [pose.position.x, pose.position.y, pose.position.z, 1.0])[:3]
            scale = picture.shape[0] / info.height
            u, v = (scale * (info.k[0] * x / depth + info.k[2]), scale * (info.k[4] * y / depth + info.k[5]))
            slack = 0.5 * scale * info.k[0] * vehicle.length / depth  # the box's middle, seen over its length
            assert columns.min() - slack <= u <= columns.max() + slack
            assert rows.min() - slack <= v <= rows.max() + slack
            seen += 1
    assert seen >= 20


def test_the_ego_is_where_tf_has_it_and_events_are_told_once(drive):
    motions = {stamp(m): m for m in drive.received[topics.ODOMETRY.name]}
    transforms = [m.transforms[0] for m in drive.received[topics.TF.name]]
    assert len(transforms) >= 100
    for link in transforms:
        assert (link.header.frame_id, link.child_frame_id) == ("map", "ego_vehicle")
        if stamp(link) in motions:
            pose = motions[stamp(link)].pose.pose
            place = link.transform.translation
            assert (place.x, place.y, place.z) == (pose.position.x, pose.position.y, pose.position.z)
            assert link.transform.rotation == pose.orientation
    covariance = np.reshape(motions.popitem()[1].pose.covariance, (6, 6))
    assert (np.diag(covariance) > 0).all() and not (covariance - np.diag(np.diag(covariance))).any()
    facts = drive.received[topics.FRAME.name]
    left = [b.frame for a, b in pairwise(facts) if b.off_road and not a.off_road]
    hit = [b.frame for a, b in pairwise(facts) if b.collision and not a.collision]
    events = drive.received[topics.EVENTS.name]
    numbers = {fact.frame for fact in facts}

    def told(kind):
        return [event.frame for event in events if event.kind == kind and event.frame in numbers]

    assert told(DriveEvent.OFF_ROAD) == left and told(DriveEvent.COLLISION) == hit
    assert left or hit  # random weights leave the road within seconds
    assert all(event.lanes in (-1, 1) for event in events if event.kind == DriveEvent.LANE_CHANGE)


def test_only_the_nodes_of_the_table_publish(drive):
    for topic in topics.TOPICS:
        publishers = {info.node_name for info in drive.node.get_publishers_info_by_topic(topic.name)}
        assert publishers <= set(topic.publishers), topic.name
        here = set(topic.publishers) - {"viewer"}  # this drive has none
        assert topic.name == topics.DIAGNOSTICS.name or publishers == here, topic.name
