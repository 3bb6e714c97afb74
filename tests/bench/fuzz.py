"""Coverage-guided fuzzing of one parser until Ctrl-C: `python tests/bench/fuzz.py bag -max_total_time=600`.

Needs `pip install 'carla_digr[fuzz]'`. The parsers are those of tests/fuzz_targets.py; what follows the name goes to
libFuzzer. What ends it lies in a file ``crash-...`` then, and goes among the target's seeds once it is mended.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parents[1]))
with atheris.instrument_imports(include=["carla_digr", "rosbags", "mcap"]):
    from fuzz_targets import TARGETS


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in TARGETS:
        sys.exit(f"Name one of {', '.join(TARGETS)}.")
    with tempfile.TemporaryDirectory() as directory:
        target = TARGETS[name](Path(directory))
        corpus = Path(directory) / "corpus"
        corpus.mkdir()
        for number, seed in enumerate(target.seeds):
            (corpus / str(number)).write_bytes(seed)
        atheris.Setup([sys.argv[0], *sys.argv[2:], str(corpus)], target.run)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
