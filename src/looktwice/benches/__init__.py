"""Public benchmarks: how their files become questions, what is asked, and how an answer is scored."""
