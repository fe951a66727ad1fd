"""What a server tells Prometheus of itself; no label holds anything that a request wrote."""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from looktwice.asking.answer import Answer

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)

RECENT = 16


class ServerMetrics:
    """The counters of one server, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        options: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter("looktwice_requests", "HTTP requests answered", ["endpoint", "status"], **options)
        self.request_seconds = Histogram(
            "looktwice_request_seconds", "seconds of an HTTP request", ["endpoint"], buckets=SECONDS, **options
        )
        self.first_token_seconds = Histogram(
            "looktwice_first_token_seconds",
            "seconds from when a question is begun until its first token",
            buckets=SECONDS,
            **options,
        )
        self.answer_seconds = Histogram(
            "looktwice_answer_seconds", "seconds from when a question is begun to its end", buckets=SECONDS, **options
        )
        self.mean_answer_seconds = 0.0
        """A running mean, the latest answers counting most."""
        self.tokens = Counter("looktwice_tokens", "tokens by kind: prompt, written, crops", ["kind"], **options)
        self.crops = Counter("looktwice_crops", "crop calls by what came of them: cut, refused", ["result"], **options)
        self.answers = Counter("looktwice_answers", "answers by why they ended", ["stop_reason"], **options)
        self.running = Gauge("looktwice_running_answers", "answers that advance together now", **options)
        self.waiting = Gauge("looktwice_waiting_answers", "answers that wait for a place", **options)
        self.cache_bytes = Gauge("looktwice_cache_bytes", "bytes of keys and values that are held", **options)
        self.cache_pages = Gauge("looktwice_cache_pages_used", "pages of keys and values in use", **options)
        self.steps = Counter("looktwice_steps", "passes of the model", **options)
        self.crashes = Counter("looktwice_engine_crashes", "times that the engine was begun anew", **options)

    def note_answer(self, answer: Answer) -> None:
        """Count a finished answer."""
        self.answers.labels(answer.stop_reason).inc()
        self.tokens.labels("written").inc(answer.tokens.written)
        self.tokens.labels("crops").inc(answer.tokens.crops)
        self.tokens.labels("prompt").inc(answer.tokens.prompt)
        for crop in answer.crops:
            self.crops.labels("cut" if crop.error is None else "refused").inc()
        if answer.seconds is not None:
            self.answer_seconds.observe(answer.seconds.total)
            self.mean_answer_seconds += (answer.seconds.total - self.mean_answer_seconds) / RECENT
            if answer.seconds.first is not None:
                self.first_token_seconds.observe(answer.seconds.first)

    def text(self) -> bytes:
        """All of them in Prometheus's text format."""
        return generate_latest(self.registry)
