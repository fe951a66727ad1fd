"""`python -m looktwice` is the `looktwice` command."""

import sys

from looktwice.cli import main

sys.exit(main())
