"""`python -m carla_digr_ros.security`: the SROS 2 policy of a drive, for exactly its nodes, topics and services.

The format is that of sros2's policy files, version 0.2.0: https://github.com/ros2/sros2, sros2/sros2/policy/schemas.
"""

from __future__ import annotations

import argparse
import sys
from xml.etree.ElementTree import Element, ElementTree, SubElement, indent

from carla_digr_ros import topics
from carla_digr_ros.topics import Topic

VERSION = "0.2.0"
# What each node hears; what it publishes stands in the table of topics.
HEARD: dict[str, tuple[Topic, ...]] = {
    "carla_bridge": (topics.DECISION, topics.MANUAL, topics.CMD_VEL, topics.ACKERMANN),
    "explainer": (topics.FRAME, topics.IMAGE, topics.INSTANCES, topics.VEHICLES),
    "viewer": (
        *(topics.FRAME, topics.ODOMETRY, topics.IMAGE, topics.DECISION, topics.OBSERVATION),
        *(topics.SALIENCY, topics.OBJECTS, topics.TRUST, topics.DIAGNOSTICS),
    ),
    "recorder": topics.TOPICS,
    "measure": (topics.FRAME, topics.IMAGE, topics.ODOMETRY, topics.DECISION, topics.SALIENCY, topics.OVERLAY),
    "player": (),
}
SERVICES = {
    "carla_bridge": ("pause", "step", "reset"),
    "explainer": ("set_policy",),
    "viewer": (),
    "recorder": (),
    "measure": (),
    "player": ("pause", "step"),
}
PARAMETERS = (
    *("describe_parameters", "get_parameter_types", "get_parameters", "get_type_description"),
    *("list_parameters", "set_parameters", "set_parameters_atomically"),
)
LIFE_CYCLE = (
    *("change_state", "get_available_states", "get_available_transitions", "get_state", "get_transition_graph"),
)
ASKED = {  # of others
    "explainer": ("carla_bridge/set_parameters",),
    "viewer": (
        *(f"carla_bridge/{service}" for service in SERVICES["carla_bridge"]),
        *("explainer/set_policy", "recorder/change_state", "recorder/get_state"),
        *(f"{node}/{service}" for node in ("carla_bridge", "explainer", "viewer") for service in PARAMETERS),
    ),
}
EVENTS = ("viewer",)  # who hears of others' parameters
UNMANAGED = ("measure",)
HUMAN = "operator"  # who may steer and call services


def policy(namespace: str = "") -> ElementTree:
    """The policy of a drive in a namespace, such as car2: an enclave a node, and one for who operates it."""
    root = Element("policy", version=VERSION)
    enclaves = SubElement(root, "enclaves")
    space = f"/{namespace.strip('/')}" if namespace.strip("/") else "/"
    under = space.rstrip("/")
    every = (*topics.TOPICS, topics.CMD_VEL, topics.ACKERMANN, topics.OVERLAY_JPEG)
    everything = []
    for node, heard in HEARD.items():
        published = [topic.relative for topic in every if node in topic.publishers]
        managed = () if node in UNMANAGED else LIFE_CYCLE
        own = [f"{node}/{service}" for service in (*PARAMETERS, *managed, *SERVICES[node])]
        everything += own
        published += [f"{node}/transition_event"] if managed else []
        profile = _profile(enclaves, under, node, space)
        events = ["parameter_events"] if node in EVENTS else []
        _grant(profile, "topics", "subscribe", [*(topic.relative for topic in heard), *events])
        _grant(profile, "topics", "publish", [*published, "rosout", "parameter_events"])
        _grant(profile, "services", "reply", own)
        _grant(profile, "services", "request", ASKED.get(node, ()))
    profile = _profile(enclaves, under, HUMAN, space)
    _grant(profile, "topics", "subscribe", [topic.relative for topic in every])
    commands = [topic.relative for topic in (topics.MANUAL, topics.CMD_VEL, topics.ACKERMANN)]
    _grant(profile, "topics", "publish", [*commands, "rosout", "parameter_events"])
    _grant(profile, "services", "request", everything)
    indent(root)
    return ElementTree(root)


def _profile(enclaves: Element, under: str, node: str, space: str) -> Element:
    enclave = SubElement(enclaves, "enclave", path=f"{under}/carla_digr/{node}")
    return SubElement(SubElement(enclave, "profiles"), "profile", ns=space, node=node)


def _grant(profile: Element, kind: str, verb: str, names: list[str] | tuple[str, ...]) -> None:
    if names:
        group = SubElement(profile, kind, {verb: "ALLOW"})
        for name in sorted(names):  # relative names are those of the profile's namespace
            SubElement(group, kind.removesuffix("s")).text = name


def main() -> int:
    """Write the policy to standard output."""
    parser = argparse.ArgumentParser(prog="python -m carla_digr_ros.security", description=__doc__)
    parser.add_argument("--namespace", default="", help="of the drive, such as car2")
    print('<?xml version="1.0" encoding="UTF-8"?>')
    policy(parser.parse_args().namespace).write(sys.stdout, encoding="unicode")
    print()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
