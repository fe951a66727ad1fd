"""What samples: tokens, caches and pictures in, segments out; it knows nothing of calls, boxes or answers."""
