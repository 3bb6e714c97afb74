"""Types of messages: those that are known, and those that a recording defines, within bounds."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path
from typing import Any

from rosbags.interfaces import Nodetype
from rosbags.typesys import Stores, get_types_from_idl, get_types_from_msg, get_typestore
from rosbags.typesys.store import Typestore

MESSAGES = Path(__file__).parent / "msg"  # a link to those of carla_digr_msgs
TYPE_NAME = re.compile(r"[A-Za-z]\w*/(msg|srv|action)/[A-Za-z]\w*", re.ASCII)
STATEMENTS = 2500  # in the definition of a type: its compilation takes 1 ms for each
ALL_STATEMENTS = 20_000  # in all definitions of a recording
DEFINITION_BYTES = 1 << 18
ARRAYS = (Nodetype.ARRAY, Nodetype.SEQUENCE)
DEPTH = 50  # of types in types
IDL_STATEMENT = 5  # times as long to read as one of a .msg


def typestore(messages: Path = MESSAGES) -> Typestore:
    """The standard message types and carla_digr_msgs's, from its .msg files."""
    store = get_typestore(Stores.ROS2_KILTED)
    for path in sorted(messages.glob("*.msg")):
        store.register(get_types_from_msg(path.read_text(), f"carla_digr_msgs/msg/{path.stem}"))
    return store


def definition(store: Typestore, message_type: str) -> str:
    """The text that defines a type and all types in it."""
    return store.generate_msgdef(message_type, ros_version=2)[0]


def is_idl(text: str) -> bool:
    """Whether a definition is IDL, not msg: joined as rosbag2 does it, or plain."""
    return text.startswith("=" * 80 + "\nIDL: ") or re.search(r"^\s*module\s+\w+\s*\{", text, re.MULTILINE) is not None


@lru_cache(maxsize=64)  # parsing is slow, and every recording has the same
def types_of(message_type: str, text: str) -> Typestore:
    """The types that a definition names, or the known ones where it is empty.

    Raises:
        Exception: the definition cannot be read; rosbags documents none of what it raises then.
    """
    if not TYPE_NAME.fullmatch(message_type):
        raise ValueError("it has no type's name")
    if not text:
        return typestore()
    idl = is_idl(text)
    check_definition(text, idl)
    if idl:
        types = get_types_from_idl(re.sub(r"^=+\nIDL: .*$", "", text, flags=re.MULTILINE))
    else:
        types = get_types_from_msg(text, message_type)
    return _registered(types, message_type)


def _registered(types: Any, message_type: str) -> Typestore:
    """A store of some types, of which the one of this name is whole.

    Raises:
        Exception: of the library, where a type is missing or holds itself.
    """
    check_types(types)
    store = get_typestore(Stores.EMPTY)
    store.register(types)
    definition(store, message_type)
    return store


@lru_cache(maxsize=64)
def ros1_types(message_type: str, text: str) -> Typestore:
    """The types of a ROS 1 definition, with ROS 2's header, in which there is no sequence number.

    Raises:
        Exception: as `types_of`.
    """
    known = get_typestore(Stores.ROS2_KILTED)
    check_definition(text, idl=False)
    types = get_types_from_msg(text, message_type)
    names = ("std_msgs/msg/Header", "builtin_interfaces/msg/Time", "builtin_interfaces/msg/Duration")
    return _registered(types | {name: known.fielddefs[name] for name in names}, message_type)


def statements(text: str) -> int:
    """How long a definition takes to read, in lines of a .msg."""
    return text.count("\n") + 1 + IDL_STATEMENT * text.count(";")


def check_definition(text: str, idl: bool) -> None:
    """Refuse what rosbags' parsers take minutes for: many fields, and expressions in IDL.

    Raises:
        ValueError: it is such.
    """
    if len(text) > DEFINITION_BYTES or statements(text) > STATEMENTS:
        raise ValueError("it is too long")
    if idl:
        bare = re.sub(r'"(?:\\"|[^"])*"', "", text)
        if re.search(r"\([^)]*\(|<<|>\s*>", bare):
            raise ValueError("it has nested expressions")


def check_types(types: dict[str, Any]) -> None:
    """Refuse types with long arrays of types or texts, for each of whose places rosbags writes code, and types that
    hold others so often that naming all their fields takes long, or hold themselves.

    Args:
        types: as rosbags' parsers give them.

    Raises:
        ValueError: they are such.
        LookupError: a type is missing.
    """
    places, sizes = 0, dict[str, int]()

    def size(name: str, depth: int) -> int:
        """How many fields there are in a type, those of types in it each time."""
        if depth > DEPTH:
            raise ValueError("its types are nested too deeply")
        if name not in sizes:
            kinds = [detail[0] if kind in ARRAYS else (kind, detail) for _, (kind, detail) in types[name][1]]
            sizes[name] = sum(size(inner, depth + 1) if kind == Nodetype.NAME else 1 for kind, inner in kinds)
        if sizes[name] > STATEMENTS:
            raise ValueError("its types are in each other too often")
        return sizes[name]

    for name, (_, fields) in types.items():
        size(name, 0)
        for _, (kind, detail) in fields:
            if kind == Nodetype.ARRAY and (detail[0][0] == Nodetype.NAME or detail[0][1][0] == "string"):
                places += detail[1]
    if places > STATEMENTS:
        raise ValueError("its arrays are too long")
