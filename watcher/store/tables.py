"""The tables of `watcher.models` as SQLAlchemy Core sees them."""

from watcher.models import metadata

_tables = metadata.tables

meta = _tables["meta"]
watcher = _tables["watcher"]
state = _tables["state"]
state_history = _tables["state_history"]
seen = _tables["seen"]
run = _tables["run"]
item = _tables["item"]
delivery = _tables["delivery"]
attempt = _tables["attempt"]
flow = _tables["flow"]
job = _tables["job"]
resource = _tables["resource"]
resource_history = _tables["resource_history"]
resource_type = _tables["resource_type"]
variable = _tables["variable"]
token = _tables["token"]
audit = _tables["audit"]
