"""Stage 2, R-GRPO; the same as `looktwice train --stage grpo`."""

import sys

from looktwice.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", "--stage", "grpo", *sys.argv[1:]]))
