"""Ask a trained model; the same as `looktwice ask`. `OvisInference` can be imported from here."""

import sys

if __name__ == "__main__":
    from looktwice.cli import main

    sys.exit(main(["ask", *sys.argv[1:]]))
else:  # as a command it judges its arguments before anything heavy is imported
    from looktwice.inference import OvisInference as OvisInference
