"""One look-twice answer: the rules of an episode, the crop tool, and what a rollout leaves behind."""
