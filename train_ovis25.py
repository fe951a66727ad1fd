"""Train Ovis2.5 in one or both stages: `looktwice train` with the documented defaults."""

import sys

from looktwice.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", "--as_documented", *sys.argv[1:]]))
