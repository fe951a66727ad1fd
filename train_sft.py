"""Stage 1, supervised fine-tuning: `looktwice train --stage sft` with the documented defaults."""

import sys

from looktwice.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", "--as_documented", "--stage", "sft", *sys.argv[1:]]))
