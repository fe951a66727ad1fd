"""The network and the folders it lives in: all that knows tensors of a checkpoint, and nothing of training."""

import logging

# on a CPU it warns at import, which PEFT does, about a faster kernel that nothing here needs
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
