"""Ask a trained model; the same as `looktwice ask`. `OvisInference` can be imported from here."""

import sys

from looktwice.cli import main
from looktwice.inference import OvisInference as OvisInference

if __name__ == "__main__":
    sys.exit(main(["ask", *sys.argv[1:]]))
