"""The network and the folders it lives in: all that knows tensors of a checkpoint, and nothing of training."""
