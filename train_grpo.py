"""Stage 2, R-GRPO: `looktwice train --stage grpo` with the documented defaults."""

import sys

from looktwice.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", "--as_documented", "--stage", "grpo", *sys.argv[1:]]))
