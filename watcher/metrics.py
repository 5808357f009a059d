"""The Prometheus metrics that the service counts; what the outbox holds is asked of the database at scrape time."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

registry = CollectorRegistry()

runs = Counter("watcher_runs", "Runs that ended.", ["watcher", "outcome"], registry=registry)
run_seconds = Histogram(
    "watcher_run_duration_seconds", "How long a run took.", registry=registry,
    buckets=(0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 60, 300),
)  # fmt: skip
items = Counter("watcher_items", "Items committed.", ["watcher", "change"], registry=registry)
last_success = Gauge(
    "watcher_last_success_timestamp_seconds", "When a watcher last succeeded.", ["watcher"], registry=registry
)
failing = Gauge("watcher_consecutive_failures", "Runs that failed in a row.", ["watcher"], registry=registry)
silent = Gauge(
    "watcher_silent", "Whether a watcher has found nothing for far longer than it ever did.", ["watcher"],
    registry=registry,
)  # fmt: skip
gaps = Counter("watcher_gaps", "Runs after which something may have slid by unseen.", ["watcher"], registry=registry)
deliveries = Counter("watcher_deliveries", "Attempts that ended.", ["flow", "outcome"], registry=registry)
delivery_seconds = Histogram(
    "watcher_delivery_duration_seconds", "How long a flow took to answer.", registry=registry,
    buckets=(0.005, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30),
)  # fmt: skip
schedule_lag = Histogram(
    "watcher_schedule_lag_seconds", "How late a tick was taken.", registry=registry,
    buckets=(0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 30),
)  # fmt: skip
missed_ticks = Counter("watcher_missed_ticks", "Ticks that nobody was there to take.", ["watcher"], registry=registry)
skipped_ticks = Counter(
    "watcher_skipped_ticks", "Ticks skipped because the run before still went on.", ["watcher"], registry=registry
)
reload_ok = Gauge(
    "watcher_config_last_reload_successful", "Whether the newest configuration is in force.", registry=registry
)
build_info = Gauge("watcher_build_info", "Always 1.", ["version"], registry=registry)


def forget_watcher(name: str) -> None:
    """Drop a removed watcher's series: a label lives for ever otherwise."""
    for metric in (runs, items, last_success, failing, silent, gaps, missed_ticks, skipped_ticks):
        for labels in [labels for labels in metric._metrics if labels[0] == name]:
            metric.remove(*labels)
