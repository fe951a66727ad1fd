"""What a run takes of a GPU's memory, found by rehearsing its steps on tensors without memory."""
