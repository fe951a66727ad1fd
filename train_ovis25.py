"""Train Ovis2.5 in one or both stages; the same as `looktwice train`."""

import sys

from looktwice.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
