"""One look-twice answer: the rules of an episode, the crop tool, and the engine that samples."""
