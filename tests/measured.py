"""What commands say, take and need, each in a process of its own that is forked from one with everything loaded."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import NamedTuple

# Reads lines of JSON, each a command's arguments; writes [exit status, MB at most, a processor's seconds] for each.
RUN = """
import json, os, sys
from contextlib import closing
import cv2, torch
torch.set_num_threads(1)
import carla_digr.recordings.explain, carla_digr.recordings.repair, carla_digr.live.viewer.recorded
for name in sys.argv[1:]:
    __import__(name)
from carla_digr.cli import main
from carla_digr.errors import SENTENCE, tell
from pathlib import Path

def view(path):
    "What `view` does before and after it serves."
    with closing(carla_digr.live.viewer.recorded.Recorded([Path(path)])) as recorded:
        description = json.dumps(recorded.description())
        print("ignored:", *recorded.description()["ignored"])
        for index in range(min(3, len(recorded.sides[0].drive.frames))):
            try:
                recorded.message(0, index)
            except carla_digr.errors.UserError as error:
                print(error)

for line in sys.stdin:
    arguments, output = json.loads(line)
    child = os.fork()
    if not child:
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT), 1)
        os.dup2(1, 2)
        status = 1
        try:
            if arguments[0] == "view":
                try:
                    status = view(arguments[1]) or 0
                except Exception as error:
                    status = tell(error)
            else:
                status = main(arguments)
        except SystemExit as end:
            status = end.code
        except BaseException:
            import traceback
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(status)
    _, status, usage = os.wait4(child, 0)
    seconds = usage.ru_utime + usage.ru_stime
    print(json.dumps([os.waitstatus_to_exitcode(status), usage.ru_maxrss / 1000, seconds]), flush=True)
"""


class Outcome(NamedTuple):
    """A command's exit status, the most memory in MB, s of a processor, and all that it said."""

    status: int
    megabytes: float
    seconds: float
    said: str


class Commands:
    """Runs commands, one after the other; ``modules`` are those that they need."""

    def __init__(self, directory, *modules: str):
        self._directory, self._count = directory, 0
        pipe = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._process = subprocess.Popen([sys.executable, "-c", RUN, *modules], text=True, **pipe)

    def __call__(self, *arguments) -> Outcome:
        self._count += 1
        said = self._directory / f"said-{self._count}"
        said.touch()
        self._process.stdin.write(json.dumps([[str(argument) for argument in arguments], str(said)]) + "\n")
        self._process.stdin.flush()
        return Outcome(*json.loads(self._process.stdout.readline()), said.read_text(errors="replace")[:20_000])

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
