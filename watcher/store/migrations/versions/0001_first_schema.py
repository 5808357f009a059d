"""The first schema."""

import sqlalchemy as sa
from alembic import op

revision = '0001'
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table('attempt',
    sa.Column('id', sa.BigInteger().with_variant(sa.Integer(), 'sqlite'), autoincrement=True, nullable=False),
    sa.Column('delivery_seq', sa.BigInteger(), nullable=False),
    sa.Column('number', sa.Integer(), nullable=False),
    sa.Column('started_at', sa.BigInteger(), nullable=False),
    sa.Column('duration_ms', sa.Integer(), nullable=False),
    sa.Column('verdict', sa.String(), nullable=False),
    sa.Column('status_code', sa.Integer(), nullable=True),
    sa.Column('note', sa.Text(), nullable=False),
    sa.Column('answer', sa.LargeBinary(), nullable=False),
    sa.PrimaryKeyConstraint('id', name=op.f('pk_attempt'))
    )
    with op.batch_alter_table('attempt', schema=None) as batch_op:
        batch_op.create_index('ix_attempt_delivery_seq', ['delivery_seq'], unique=False)

    op.create_table('audit',
    sa.Column('id', sa.BigInteger().with_variant(sa.Integer(), 'sqlite'), autoincrement=True, nullable=False),
    sa.Column('at', sa.BigInteger(), nullable=False),
    sa.Column('actor', sa.Text(), nullable=False),
    sa.Column('action', sa.String(), nullable=False),
    sa.Column('subject', sa.Text(), nullable=False),
    sa.Column('note', sa.Text(), nullable=False),
    sa.PrimaryKeyConstraint('id', name=op.f('pk_audit'))
    )
    op.create_table('delivery',
    sa.Column('seq', sa.BigInteger().with_variant(sa.Integer(), 'sqlite'), autoincrement=True, nullable=False),
    sa.Column('id', sa.String(), nullable=False),
    sa.Column('item_seq', sa.BigInteger(), nullable=False),
    sa.Column('watcher_id', sa.BigInteger(), nullable=False),
    sa.Column('flow', sa.String(), nullable=False),
    sa.Column('lane', sa.LargeBinary(), nullable=False),
    sa.Column('status', sa.SmallInteger(), nullable=False),
    sa.Column('head', sa.Boolean(), nullable=False),
    sa.Column('attempts', sa.Integer(), nullable=False),
    sa.Column('starts', sa.Integer(), nullable=False),
    sa.Column('due_at', sa.BigInteger(), nullable=False),
    sa.Column('lease_until', sa.BigInteger(), nullable=True),
    sa.Column('token', sa.String(), nullable=True),
    sa.Column('first_failed_at', sa.BigInteger(), nullable=True),
    sa.Column('settled_at', sa.BigInteger(), nullable=True),
    sa.Column('verdict', sa.Text(), nullable=False),
    sa.Column('status_code', sa.Integer(), nullable=True),
    sa.Column('note', sa.Text(), nullable=False),
    sa.PrimaryKeyConstraint('seq', name=op.f('pk_delivery')),
    sa.UniqueConstraint('id', name=op.f('uq_delivery_id'))
    )
    with op.batch_alter_table('delivery', schema=None) as batch_op:
        batch_op.create_index('ix_delivery_dead', ['flow', 'seq'], unique=False, sqlite_where=sa.text('status = 2'), postgresql_where=sa.text('status = 2'))
        batch_op.create_index('ix_delivery_due', ['flow', 'due_at', 'seq'], unique=False, sqlite_where=sa.text('status = 0 AND head'), postgresql_where=sa.text('status = 0 AND head'))
        batch_op.create_index('ix_delivery_item_seq', ['item_seq'], unique=False)
        batch_op.create_index('ix_delivery_lane', ['flow', 'lane', 'seq'], unique=False, sqlite_where=sa.text('status = 0'), postgresql_where=sa.text('status = 0'))

    op.create_table('flow',
    sa.Column('name', sa.String(), nullable=False),
    sa.Column('held_since', sa.BigInteger(), nullable=True),
    sa.Column('held_reason', sa.Text(), nullable=False),
    sa.Column('probe_at', sa.BigInteger(), nullable=True),
    sa.Column('probes', sa.Integer(), nullable=False),
    sa.Column('paused_at', sa.BigInteger(), nullable=True),
    sa.Column('pause_reason', sa.Text(), nullable=False),
    sa.Column('delivered_at', sa.BigInteger(), nullable=True),
    sa.PrimaryKeyConstraint('name', name=op.f('pk_flow'))
    )
    op.create_table('item',
    sa.Column('seq', sa.BigInteger().with_variant(sa.Integer(), 'sqlite'), autoincrement=True, nullable=False),
    sa.Column('id', sa.String(), nullable=False),
    sa.Column('watcher_id', sa.BigInteger(), nullable=False),
    sa.Column('run_id', sa.BigInteger(), nullable=False),
    sa.Column('key', sa.Text(), nullable=False),
    sa.Column('key_hash', sa.LargeBinary(), nullable=False),
    sa.Column('change', sa.String(), nullable=False),
    sa.Column('revision', sa.Integer(), nullable=False),
    sa.Column('content', sa.LargeBinary(), nullable=False),
    sa.Column('payload', sa.LargeBinary(), nullable=False),
    sa.Column('sha256', sa.LargeBinary(), nullable=False),
    sa.Column('note', sa.Text(), nullable=False),
    sa.Column('found_at', sa.BigInteger(), nullable=False),
    sa.PrimaryKeyConstraint('seq', name=op.f('pk_item')),
    sa.UniqueConstraint('id', name=op.f('uq_item_id'))
    )
    with op.batch_alter_table('item', schema=None) as batch_op:
        batch_op.create_index('ix_item_run_id', ['run_id'], unique=False)
        batch_op.create_index('ix_item_watcher_id_key_hash', ['watcher_id', 'key_hash'], unique=False)

    op.create_table('job',
    sa.Column('id', sa.String(), nullable=False),
    sa.Column('kind', sa.String(), nullable=False),
    sa.Column('path', sa.String(), nullable=False),
    sa.Column('status', sa.String(), nullable=False),
    sa.Column('args', sa.LargeBinary(), nullable=False),
    sa.Column('result', sa.LargeBinary(), nullable=True),
    sa.Column('error', sa.Text(), nullable=False),
    sa.Column('detail', sa.Text(), nullable=False),
    sa.Column('step', sa.Integer(), nullable=False),
    sa.Column('results', sa.LargeBinary(), nullable=False),
    sa.Column('starts', sa.Integer(), nullable=False),
    sa.Column('logs', sa.Text(), nullable=False),
    sa.Column('created_at', sa.BigInteger(), nullable=False),
    sa.Column('started_at', sa.BigInteger(), nullable=True),
    sa.Column('finished_at', sa.BigInteger(), nullable=True),
    sa.Column('lease_until', sa.BigInteger(), nullable=True),
    sa.Column('owner', sa.String(), nullable=True),
    sa.Column('parent', sa.String(), nullable=True),
    sa.Column('root', sa.String(), nullable=True),
    sa.Column('cancel_reason', sa.String(), nullable=True),
    sa.Column('progress', sa.Integer(), nullable=True),
    sa.PrimaryKeyConstraint('id', name=op.f('pk_job'))
    )
    with op.batch_alter_table('job', schema=None) as batch_op:
        batch_op.create_index('ix_job_path_created_at', ['path', 'created_at'], unique=False)
        batch_op.create_index('ix_job_status_created_at', ['status', 'created_at'], unique=False)

    op.create_table('meta',
    sa.Column('name', sa.String(), nullable=False),
    sa.Column('value', sa.Text(), nullable=False),
    sa.PrimaryKeyConstraint('name', name=op.f('pk_meta'))
    )
    op.create_table('resource',
    sa.Column('path', sa.String(), nullable=False),
    sa.Column('resource_type', sa.String(), nullable=False),
    sa.Column('value', sa.LargeBinary(), nullable=False),
    sa.Column('sha256', sa.LargeBinary(), nullable=False),
    sa.Column('version', sa.Integer(), nullable=False),
    sa.Column('description', sa.Text(), nullable=False),
    sa.Column('created_by', sa.Text(), nullable=False),
    sa.Column('edited_at', sa.BigInteger(), nullable=False),
    sa.PrimaryKeyConstraint('path', name=op.f('pk_resource'))
    )
    op.create_table('resource_history',
    sa.Column('path', sa.String(), nullable=False),
    sa.Column('version', sa.Integer(), nullable=False),
    sa.Column('resource_type', sa.String(), nullable=False),
    sa.Column('value', sa.LargeBinary(), nullable=False),
    sa.Column('edited_at', sa.BigInteger(), nullable=False),
    sa.PrimaryKeyConstraint('path', 'version', name=op.f('pk_resource_history'))
    )
    op.create_table('resource_type',
    sa.Column('name', sa.String(), nullable=False),
    sa.Column('json_schema', sa.LargeBinary(), nullable=False),
    sa.Column('description', sa.Text(), nullable=False),
    sa.Column('edited_at', sa.BigInteger(), nullable=False),
    sa.PrimaryKeyConstraint('name', name=op.f('pk_resource_type'))
    )
    op.create_table('run',
    sa.Column('id', sa.BigInteger().with_variant(sa.Integer(), 'sqlite'), autoincrement=True, nullable=False),
    sa.Column('watcher_id', sa.BigInteger(), nullable=False),
    sa.Column('outcome', sa.String(), nullable=False),
    sa.Column('started_at', sa.BigInteger(), nullable=False),
    sa.Column('finished_at', sa.BigInteger(), nullable=False),
    sa.Column('tick_at', sa.BigInteger(), nullable=True),
    sa.Column('state_version', sa.BigInteger(), nullable=True),
    sa.Column('counts', sa.Text(), nullable=False),
    sa.Column('error_kind', sa.Text(), nullable=False),
    sa.Column('error', sa.Text(), nullable=False),
    sa.Column('detail', sa.Text(), nullable=False),
    sa.Column('logs', sa.Text(), nullable=False),
    sa.Column('gap', sa.Text(), nullable=False),
    sa.Column('warnings', sa.Text(), nullable=False),
    sa.Column('plan', sa.LargeBinary(), nullable=True),
    sa.PrimaryKeyConstraint('id', name=op.f('pk_run'))
    )
    with op.batch_alter_table('run', schema=None) as batch_op:
        batch_op.create_index('ix_run_finished_at', ['finished_at'], unique=False)
        batch_op.create_index('ix_run_watcher_id_id', ['watcher_id', 'id'], unique=False)

    op.create_table('seen',
    sa.Column('watcher_id', sa.BigInteger(), nullable=False),
    sa.Column('key_hash', sa.LargeBinary(), nullable=False),
    sa.Column('content', sa.LargeBinary(), nullable=False),
    sa.Column('revision', sa.Integer(), nullable=False),
    sa.Column('present', sa.Boolean(), nullable=False),
    sa.Column('listed_day', sa.Integer(), nullable=False),
    sa.Column('key', sa.Text(), nullable=True),
    sa.Column('value', sa.LargeBinary(), nullable=True),
    sa.PrimaryKeyConstraint('watcher_id', 'key_hash', name=op.f('pk_seen')),
    sqlite_with_rowid=False
    )
    op.create_table('state',
    sa.Column('watcher_id', sa.BigInteger(), nullable=False),
    sa.Column('version', sa.BigInteger(), nullable=False),
    sa.Column('body', sa.LargeBinary(), nullable=False),
    sa.Column('sha256', sa.LargeBinary(), nullable=False),
    sa.Column('run_id', sa.BigInteger(), nullable=True),
    sa.Column('at', sa.BigInteger(), nullable=False),
    sa.PrimaryKeyConstraint('watcher_id', name=op.f('pk_state'))
    )
    op.create_table('state_history',
    sa.Column('watcher_id', sa.BigInteger(), nullable=False),
    sa.Column('version', sa.BigInteger(), nullable=False),
    sa.Column('body', sa.LargeBinary(), nullable=False),
    sa.Column('sha256', sa.LargeBinary(), nullable=False),
    sa.Column('run_id', sa.BigInteger(), nullable=True),
    sa.Column('at', sa.BigInteger(), nullable=False),
    sa.Column('note', sa.Text(), nullable=False),
    sa.PrimaryKeyConstraint('watcher_id', 'version', name=op.f('pk_state_history'))
    )
    op.create_table('token',
    sa.Column('sha256', sa.LargeBinary(), nullable=False),
    sa.Column('prefix', sa.String(), nullable=False),
    sa.Column('label', sa.Text(), nullable=False),
    sa.Column('scopes', sa.Text(), nullable=False),
    sa.Column('job_id', sa.String(), nullable=True),
    sa.Column('created_at', sa.BigInteger(), nullable=False),
    sa.Column('expires_at', sa.BigInteger(), nullable=True),
    sa.Column('used_at', sa.BigInteger(), nullable=True),
    sa.PrimaryKeyConstraint('sha256', name=op.f('pk_token'))
    )
    op.create_table('variable',
    sa.Column('path', sa.String(), nullable=False),
    sa.Column('value', sa.Text(), nullable=False),
    sa.Column('is_secret', sa.Boolean(), nullable=False),
    sa.Column('description', sa.Text(), nullable=False),
    sa.Column('edited_at', sa.BigInteger(), nullable=False),
    sa.PrimaryKeyConstraint('path', name=op.f('pk_variable'))
    )
    op.create_table('watcher',
    sa.Column('id', sa.BigInteger().with_variant(sa.Integer(), 'sqlite'), autoincrement=True, nullable=False),
    sa.Column('name', sa.String(), nullable=False),
    sa.Column('origin', sa.String(), nullable=False),
    sa.Column('paused_at', sa.BigInteger(), nullable=True),
    sa.Column('pause_reason', sa.Text(), nullable=False),
    sa.Column('quarantined_at', sa.BigInteger(), nullable=True),
    sa.Column('quarantine_reason', sa.Text(), nullable=False),
    sa.Column('quarantine_run', sa.BigInteger(), nullable=True),
    sa.Column('failures', sa.Integer(), nullable=False),
    sa.Column('failing_since', sa.BigInteger(), nullable=True),
    sa.Column('last_error', sa.Text(), nullable=False),
    sa.Column('backoff_until', sa.BigInteger(), nullable=True),
    sa.Column('tick_at', sa.BigInteger(), nullable=True),
    sa.Column('checked_at', sa.BigInteger(), nullable=True),
    sa.Column('success_at', sa.BigInteger(), nullable=True),
    sa.Column('found_at', sa.BigInteger(), nullable=True),
    sa.Column('quiet_runs', sa.BigInteger(), nullable=False),
    sa.Column('skipped_ticks', sa.BigInteger(), nullable=False),
    sa.Column('missed_ticks', sa.BigInteger(), nullable=False),
    sa.Column('policy', sa.Text(), nullable=False),
    sa.Column('gone_at', sa.BigInteger(), nullable=True),
    sa.PrimaryKeyConstraint('id', name=op.f('pk_watcher')),
    sa.UniqueConstraint('name', name=op.f('uq_watcher_name'))
    )


def downgrade() -> None:
    op.drop_table('watcher')
    op.drop_table('variable')
    op.drop_table('token')
    op.drop_table('state_history')
    op.drop_table('state')
    op.drop_table('seen')
    with op.batch_alter_table('run', schema=None) as batch_op:
        batch_op.drop_index('ix_run_watcher_id_id')
        batch_op.drop_index('ix_run_finished_at')

    op.drop_table('run')
    op.drop_table('resource_type')
    op.drop_table('resource_history')
    op.drop_table('resource')
    op.drop_table('meta')
    with op.batch_alter_table('job', schema=None) as batch_op:
        batch_op.drop_index('ix_job_status_created_at')
        batch_op.drop_index('ix_job_path_created_at')

    op.drop_table('job')
    with op.batch_alter_table('item', schema=None) as batch_op:
        batch_op.drop_index('ix_item_watcher_id_key_hash')
        batch_op.drop_index('ix_item_run_id')

    op.drop_table('item')
    op.drop_table('flow')
    with op.batch_alter_table('delivery', schema=None) as batch_op:
        batch_op.drop_index('ix_delivery_lane', sqlite_where=sa.text('status = 0'), postgresql_where=sa.text('status = 0'))
        batch_op.drop_index('ix_delivery_item_seq')
        batch_op.drop_index('ix_delivery_due', sqlite_where=sa.text('status = 0 AND head'), postgresql_where=sa.text('status = 0 AND head'))
        batch_op.drop_index('ix_delivery_dead', sqlite_where=sa.text('status = 2'), postgresql_where=sa.text('status = 2'))

    op.drop_table('delivery')
    op.drop_table('audit')
    with op.batch_alter_table('attempt', schema=None) as batch_op:
        batch_op.drop_index('ix_attempt_delivery_seq')

    op.drop_table('attempt')
