"""`python -m carla_digr.cli`."""

import sys

from carla_digr.cli import main

if __name__ == "__main__":
    sys.exit(main())
