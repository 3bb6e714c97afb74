"""Processes of ours: what they say is read without waiting, whole lines at a time, and sorted."""

from __future__ import annotations

import os
import select
import sys

from carla_digr.live.child import Child


def read_all(child: Child) -> list[str]:
    lines = []
    while not child.closed:
        assert select.select([child.output], [], [], 60.0)[0], "nothing came"
        lines += child.read()
    assert child.process.wait() == 0
    child.close()
    return lines


def test_lines_are_whole_and_sorted_whatever_the_writer_does():
    script = (
        "import os, time\n"
        "os.write(1, b'first\\r\\n\\n{\"a\": 1}\\ncarla-')\n"
        "time.sleep(0.2)\n"
        "os.write(2, b'digr: A reas\\xc3')\n"
        "time.sleep(0.2)\n"
        "os.write(1, b'\\xb6n.\\nlast\\n\\xff without end')\n"
    )
    child = Child([sys.executable, "-c", script])
    assert read_all(child) == [
        "first",
        "",
        '{"a": 1}',
        "carla-digr: A reasön.",
        "last",
        "\N{REPLACEMENT CHARACTER} without end",
    ]
    assert (child.sentence, child.data) == ("A reasön.", '{"a": 1}')
    assert child.last_words == "\N{REPLACEMENT CHARACTER} without end"


def test_reading_never_waits_and_the_child_has_a_session_of_its_own():
    child = Child([sys.executable, "-c", "import signal; signal.pause()"])
    try:
        assert child.read() == [] and not child.closed
        assert os.getsid(child.process.pid) == child.process.pid
    finally:
        child.process.kill()
        child.process.wait()
        child.close()
