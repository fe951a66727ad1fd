"""The small world: a task, a tiny model, its pretraining, and the demo."""
