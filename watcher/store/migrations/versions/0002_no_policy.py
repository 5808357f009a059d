"""A column of the watchers that nothing reads goes away."""

import sqlalchemy as sa
from alembic import op

revision = '0002'
down_revision = '0001'
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table('watcher', schema=None) as batch_op:
        batch_op.drop_column('policy')


def downgrade() -> None:
    with op.batch_alter_table('watcher', schema=None) as batch_op:
        batch_op.add_column(sa.Column('policy', sa.Text(), nullable=False, server_default=''))
