"""Trying a flow with a sample, and watchers that wait for their backlog."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from tests.support.config import load, mistakes
from tests.support.outbox import Source, config, prepare
from tests.support.receiver import Receiver, answer
from watcher import operations
from watcher.engine.backlog import Backlog
from watcher.engine.embedded import Embedded
from watcher.flows.hours import parse
from watcher.log import mask
from watcher.operations import Operator
from watcher.schedule import Tick
from watcher.store import flows as flow_store
from watcher.store.db import Database
from watcher.values import Batch, Config, Flow, Watcher


def now() -> datetime:
    return datetime.now(UTC)


def operator(db: Database, config: Config) -> Operator:
    return Operator(lambda: config, db, now)


# --- samples ----------------------------------------------------------------------------------------------------------


async def test_a_sample_is_marked_and_its_answer_is_told(sqlite_db: Database) -> None:
    await prepare(sqlite_db, "news")
    async with Receiver(decide=lambda request: answer(422, b"no thanks, token s3cr3t-t0k3n")) as receiver:
        flow = Flow("hook", url=f"{receiver.url}/x", token="s3cr3t-t0k3n", headers={"X-Mine": "{{ item.title }}"})
        found = await operations.steering.sample_flow(operator(sqlite_db, config([flow])), "hook")
        (sent,) = receiver.received
        assert sent.headers["x-watcher-test"] == "true"
        assert sent.headers["x-mine"] == "A test event from watcher"
        assert sent.json()["data"]["item"]["watcher_test"] is True
        assert sent.json()["data"]["watcher"] == "watcher-test"
        assert (found["verdict"], found["status_code"], found["delivery"]) == ("item", 422, sent.id)


async def test_a_sample_may_be_ones_own_and_any_engines(sqlite_db: Database) -> None:
    await prepare(sqlite_db, "news")
    async with Receiver(decide=lambda request: answer(201, request.path.partition("job_id=")[2].encode())) as receiver:
        flow = Flow("hook", preset="windmill", url=receiver.url, settings={"path": "f/a/b"})
        found = await operations.steering.sample_flow(operator(sqlite_db, config([flow])), "hook", {"mine": 1})
        assert receiver.received[0].json() == {"mine": 1}
        assert found["verdict"] == "delivered"


async def test_a_flow_that_wants_lists_gets_a_list_of_one_sample(sqlite_db: Database) -> None:
    await prepare(sqlite_db, "news")
    async with Receiver(decide=lambda request: answer(200, b"thanks")) as receiver:
        flow = Flow("hook", url=f"{receiver.url}/x", batch=Batch(10, timedelta(minutes=1)))
        found = await operations.steering.sample_flow(operator(sqlite_db, config([flow])), "hook")
        (sent,) = receiver.received
        assert [each["data"]["item"]["watcher_test"] for each in sent.json()] == [True]
        assert sent.headers["x-watcher-test"] == "true"
        assert (found["verdict"], found["answer"]) == ("delivered", "thanks")


async def test_a_flow_that_is_not_there_or_runs_here_is_told(sqlite_db: Database) -> None:
    await prepare(sqlite_db, "news")
    op = operator(sqlite_db, config([Flow("hook", url="http://x.example"), Flow("local", steps=(Path("a.py"),))]))
    with pytest.raises(operations.Unknown, match="did you mean hook"):
        await operations.steering.sample_flow(op, "hok")
    with pytest.raises(operations.Unsuited, match="start the service"):
        await operations.steering.sample_flow(op, "local")


# --- why something waits ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hours", "zone", "now", "says"),
    [
        (
            "08:00-20:00",
            "UTC",
            datetime(2026, 3, 1, 21, tzinfo=UTC),
            "sends 08:00-20:00 (UTC): next at 2026-03-02 08:00",
        ),
        (
            "mon-fri 08:00-20:00",
            "Europe/Paris",
            datetime(2026, 3, 1, 21, tzinfo=UTC),  # a Sunday
            "sends mon,tue,wed,thu,fri 08:00-20:00 (Europe/Paris): next at 2026-03-02 08:00",
        ),
    ],
)
async def test_status_and_why_tell_of_hours_in_which_nothing_is_sent(
    db: Database, hours: str, zone: str, now: datetime, says: str
) -> None:
    await prepare(db, "news")
    flow = Flow("hook", url="http://127.0.0.1:9/", hours=parse(hours, zone))
    op = Operator(lambda: config([flow]), db, lambda: now)
    await Source(db, [flow], "news").commit([{"id": 1}])
    (shown,) = (await operations.looking.status(op))["flows"]
    assert (shown["condition"], shown["reason"], shown["pending"]) == ("closed", says, 1)
    (story,) = await operations.looking.why(op, "1")
    assert story["deliveries"][0]["waits"] == f"closed: {says}"
    op = Operator(lambda: config([flow]), db, lambda: now + timedelta(hours=15))
    (shown,) = (await operations.looking.status(op))["flows"]
    assert shown["condition"] == "ok"
    (story,) = await operations.looking.why(op, "1")
    assert story["deliveries"][0]["waits"] == ""


async def test_why_tells_that_a_flow_is_held_paused_or_gone(db: Database) -> None:
    await prepare(db, "news")
    flow = Flow("hook", url="http://127.0.0.1:9/")
    await Source(db, [flow], "news").commit([{"id": 1}])

    async def waits(*flows: Flow) -> str:
        (story,) = await operations.looking.why(operator(db, config(flows)), "1")
        return str(story["deliveries"][0]["waits"])

    assert await waits(flow) == ""
    assert await waits() == "gone: no longer in the configuration: its deliveries wait"
    assert await waits(replace(flow, enabled=False)) == "disabled: enabled = false"
    probe = datetime(2026, 3, 1, 12, 30, tzinfo=UTC)
    await db.write(lambda tx: flow_store.hold(tx, "hook", "answered 404", probe, now()))
    assert await waits(flow) == "held: answered 404; asked again at 2026-03-01 12:30:00Z"
    await db.write(lambda tx: flow_store.pause(tx, "hook", "for lunch", now()))
    assert await waits(flow) == "paused: for lunch"


# --- backlog ----------------------------------------------------------------------------------------------------------


async def test_a_watcher_whose_deliveries_pile_up_is_not_polled_until_they_go(db: Database) -> None:
    await prepare(db, "news", "other")
    flow = Flow("hook", url="http://127.0.0.1:9/")
    names = {name: Watcher(name, "x", Path("x.py"), ("hook",), max_backlog=5) for name in ("news", "other")}
    configured = replace(config([flow]), watchers=names)
    backlog = Backlog(db, lambda: configured)
    await Source(db, [flow], "news").commit([{"id": n} for n in range(5)])
    await Source(db, [flow], "other").commit([{"id": n} for n in range(4)])
    await backlog.look()
    assert backlog.waits == {"news": 5}
    ran: list[str] = []

    class Runner:
        async def run(self, name: str, *, tick_at: datetime | None = None) -> None:
            ran.append(name)

    engine = Embedded(Runner(), db, now, backlogged=backlog.holds)  # type: ignore[arg-type]
    for name in names:
        engine.tick(Tick(name, now()))
    await engine.drain(5)
    assert ran == ["other"]
    shown = {each["name"]: each for each in (await operations.looking.status(operator(db, configured)))["watchers"]}
    assert shown["news"]["condition"] == "waiting"
    assert "max_backlog is 5" in shown["news"]["reason"]
    assert shown["other"]["condition"] != "waiting"

    await db.write(_one_ends)
    await backlog.look()
    assert backlog.waits == {}


async def _one_ends(tx: AsyncConnection) -> None:
    await tx.execute(
        text("UPDATE delivery SET status = 2 WHERE seq = (SELECT min(seq) FROM delivery WHERE status = 0)")
    )


# --- the configuration ------------------------------------------------------------------------------------------------


def test_presets_hours_and_batches_are_read(tmp_path: Path) -> None:
    written = """
[flows.a]
preset = "github"
repository = "o/n"
[flows.b]
url = "https://x.example/"
deliver_between = "mon-fri 08:00-18:00"
timezone = "Europe/Paris"
batch = { size = 100 }
[flows.c]
preset = "slack"
url = "https://hooks.slack.com/services/T/B/X"
"""
    flows = load(tmp_path, written).config.flows
    assert flows["a"].url == "https://api.github.com"
    hours, batch = flows["b"].hours, flows["b"].batch
    assert hours
    assert batch
    assert (hours.timezone, hours.days, batch.size, batch.within) == (
        "Europe/Paris", (0, 1, 2, 3, 4), 100, timedelta(seconds=5),
    )  # fmt: skip
    assert flows["c"].rate == (1, timedelta(seconds=1))


@pytest.mark.parametrize(
    ("flow", "says"),
    [
        ('preset = "n8n"\nurl = "https://x.example"', "`path` is required"),
        ('preset = "n8n"\nurl = "https://x.example"\npath = "webhook-test/x"', "two minutes"),
        ('preset = "prefect"\nurl = "https://x.example"\ndeployment = "a/b/c"', "must match"),
        (
            'preset = "prefect"\nurl = "https://x.example"\ndeployment = "a/b"\nformat = "cloudevents"',
            "cannot send that",
        ),
        ('preset = "slack"\nurl = "https://x.example"\nformat = "plain"', "cannot send that"),
        ('preset = "slack"', "`url` is required"),
        ('preset = "github"\nrepository = "a"', "must match"),
        ('preset = "trigger"\ntask = "x"', "no such preset"),
        ('url = "https://x.example"\ndeliver_between = "8-20"', "not hours"),
        ('url = "https://x.example"\ntimezone = "Europe/Paris"', "means nothing without"),
        ('url = "https://x.example"\ndeliver_between = "08:00-09:00"\ntimezone = "Paris"', "no such time zone"),
        ('url = "https://x.example"\nbatch = { size = 1 }', "must be 2 or more"),
        ('url = "https://x.example"\nbatch = { size = 3, sise = 3 }', "no such option"),
        ('url = "https://x.example"\nbatch = { size = 3 }\norder = "watcher"', "never share a request"),
        ('url = "https://x.example"\nbatch = { size = 3 }\nformat = "cloudevents"', "headers of one event"),
        ('url = "https://x.example"\nbatch = { size = 3 }\nheaders = { X = "{{ key }}" }', "no template headers"),
        ('preset = "gitlab"\nproject = "1"\nbatch = { size = 3 }', "only the preset http"),
    ],
)
def test_what_a_flow_cannot_be_is_told(tmp_path: Path, flow: str, says: str) -> None:
    found = mistakes(tmp_path, f"[flows.x]\n{flow}\n")
    assert any(says in f"{each.message} {each.hint}" for each in found), found


def test_secrets_of_presets_are_never_shown(tmp_path: Path) -> None:
    written = """
[flows.a]
preset = "kestra"
url = "https://k.example"
namespace = "n"
flow_id = "f"
webhook_key = "4wjtkzwVGBM9yKnjm3yv8r"
[flows.b]
preset = "slack"
url = "https://hooks.slack.com/services/T0/B0/verysecretpart"
"""
    load(tmp_path, written)
    for shown in (
        "https://k.example/api/v1/main/executions/webhook/n/f/4wjtkzwVGBM9yKnjm3yv8r: no answer within 30 s",
        "https://hooks.slack.com/services/T0/B0/verysecretpart: connection refused",
    ):
        assert "4wjtk" not in mask(shown)
        assert "verysecretpart" not in mask(shown)
