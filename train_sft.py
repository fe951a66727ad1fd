"""Stage 1, supervised fine-tuning; the same as `looktwice train --stage sft`."""

import sys

from looktwice.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", "--stage", "sft", *sys.argv[1:]]))
