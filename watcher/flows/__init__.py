"""The kinds of flow: one preset per file, each a pure pair of request and judge."""

from __future__ import annotations

from watcher.flows import airflow, github, gitlab, http, kestra, n8n, prefect, slack, trigger_dev, windmill
from watcher.flows.preset import Preset

presets: dict[str, Preset] = {
    "http": http.preset,
    "windmill": windmill.preset,
    "n8n": n8n.preset,
    "prefect": prefect.preset,
    "kestra": kestra.preset,
    "airflow": airflow.preset,
    "github": github.preset,
    "gitlab": gitlab.preset,
    "trigger.dev": trigger_dev.preset,
    "slack": slack.preset,
}
