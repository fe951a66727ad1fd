"""The network and the folders it lives in: all that knows tensors of a checkpoint, and nothing of training."""

import logging

# warns at import, which PEFT does, about a faster kernel for CPUs that nothing here needs
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
# warns of each layer in each forward that int8 computes in float16
logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
