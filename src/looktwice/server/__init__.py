"""Answering over HTTP: OpenAI's requests and answers, whoever may ask, and one thread that runs the engine."""
