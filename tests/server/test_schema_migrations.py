"""An index that an older coserve has made, on SQLite and PostgreSQL, and indexes that other versions use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine, inspect, text

from coserve.core import ConfigError
from coserve.server.index import database, tables
from coserve.server.index.store import Store

pytest_plugins = ["tests.server.postgres"]
SEQ = {"sqlite": "INTEGER NOT NULL", "postgresql": "BIGSERIAL NOT NULL"}
VERSION_1 = """
CREATE TABLE adapters (seq SEQ, tenant TEXT NOT NULL, name TEXT NOT NULL, directory TEXT NOT NULL, created_at BIGINT NOT NULL,
 job TEXT, PRIMARY KEY (seq), UNIQUE (tenant, name));
CREATE TABLE files (seq SEQ, id TEXT NOT NULL, tenant TEXT NOT NULL, filename TEXT NOT NULL, purpose TEXT NOT NULL,
 bytes BIGINT NOT NULL, sha256 TEXT NOT NULL, created_at BIGINT NOT NULL, PRIMARY KEY (seq), UNIQUE (id));
CREATE INDEX files_of_tenant ON files (tenant, created_at, seq);
CREATE TABLE jobs (seq SEQ, id TEXT NOT NULL, tenant TEXT NOT NULL, created_at BIGINT NOT NULL, base TEXT NOT NULL,
 training_file TEXT NOT NULL, config JSON NOT NULL, method JSON NOT NULL, status TEXT NOT NULL, paused BOOLEAN NOT NULL,
 validation_file TEXT, start TEXT, suffix TEXT, seed BIGINT NOT NULL, fine_tuned_model TEXT, finished_at BIGINT,
 started_at BIGINT, error JSON, trained_tokens BIGINT, step BIGINT NOT NULL, num_steps BIGINT NOT NULL,
 result_files JSON NOT NULL, integrations JSON NOT NULL, metadata JSON NOT NULL, settings JSON NOT NULL,
 priority BIGINT NOT NULL, weight FLOAT NOT NULL, deadline BIGINT, PRIMARY KEY (seq), UNIQUE (id));
CREATE INDEX jobs_by_status ON jobs (status);
CREATE INDEX jobs_of_tenant ON jobs (tenant, created_at, seq);
CREATE TABLE keys (seq SEQ, id TEXT NOT NULL, tenant TEXT NOT NULL, prefix TEXT NOT NULL, digest TEXT NOT NULL,
 created_at BIGINT NOT NULL, revoked_at BIGINT, PRIMARY KEY (seq), UNIQUE (id), UNIQUE (digest));
CREATE TABLE removed (list TEXT NOT NULL, owner TEXT NOT NULL, id TEXT NOT NULL, place JSON NOT NULL,
 removed_at BIGINT NOT NULL, PRIMARY KEY (list, owner, id));
CREATE TABLE schema_version (version INTEGER NOT NULL);
CREATE TABLE checkpoints (id TEXT NOT NULL, job TEXT NOT NULL, created_at BIGINT NOT NULL, step BIGINT NOT NULL,
 model TEXT NOT NULL, directory TEXT NOT NULL, metrics JSON NOT NULL, UNIQUE (job, step), UNIQUE (id),
 FOREIGN KEY(job) REFERENCES jobs (id) ON DELETE CASCADE);
CREATE TABLE events (id TEXT NOT NULL, job TEXT NOT NULL, seq BIGINT NOT NULL, created_at BIGINT NOT NULL, level TEXT NOT NULL,
 type TEXT NOT NULL, message TEXT NOT NULL, data JSON, step BIGINT, UNIQUE (job, seq), UNIQUE (id),
 FOREIGN KEY(job) REFERENCES jobs (id) ON DELETE CASCADE);
CREATE UNIQUE INDEX one_metrics_event_per_step ON events (job, step) WHERE type = 'metrics';
INSERT INTO schema_version VALUES (1);
INSERT INTO jobs (id, tenant, created_at, base, training_file, config, method, status, paused, seed, step, num_steps,
 result_files, integrations, metadata, settings, priority, weight)
 VALUES ('ftjob-1', 'me', 5, 'tiny', 'file-1', '{"r": 4}', '{"type": "dpo"}', 'running', false, 7, 3, 9, '["file-2"]', '[]',
 '{}', '{}', 0, 1.5);
INSERT INTO events VALUES ('ftevent-1', 'ftjob-1', 1, 6, 'info', 'metrics', 'Step 3/9', '{"step": 3}', 3);
INSERT INTO checkpoints VALUES ('ftckpt_1', 'ftjob-1', 7, 3, 'm:ckpt-step-3', '/jobs/step-3', '{"step": 3}');
INSERT INTO adapters (tenant, name, directory, created_at, job) VALUES ('me', 'm:ckpt-step-3', '/jobs/step-3', 7, 'ftjob-1')
"""
"""What coserve made before it had replicas, and what it wrote there."""


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "postgresql":
        return str(request.getfixturevalue("postgres_url"))
    return f"sqlite:///{tmp_path}/old.db"


def _engine(url: str) -> Engine:
    return create_engine(url.replace("postgresql://", "postgresql+psycopg://"))


def _make_old(url: str) -> None:
    engine = _engine(url)
    with engine.begin() as connection:
        for statement in VERSION_1.replace("SEQ", SEQ[engine.dialect.name]).split(";\n"):
            connection.exec_driver_sql(statement.replace("%", "%%"))
    engine.dispose()


def _shape(url: str) -> dict[str, Any]:
    """Columns, keys and indexes of all tables."""
    engine, found = _engine(url), {}
    look = inspect(engine)
    for table in look.get_table_names():
        columns = {column["name"]: (str(column["type"]), column["nullable"]) for column in look.get_columns(table)}
        unique = sorted(tuple(item["column_names"]) for item in look.get_unique_constraints(table))
        indexes = sorted(str(index["name"]) for index in look.get_indexes(table))
        found[table] = (columns, look.get_pk_constraint(table)["constrained_columns"], unique, indexes)
    engine.dispose()
    return found


def test_an_index_of_version_1_is_brought_up_to_date(url: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    _make_old(url)
    store = Store(url)
    job = store.get_job("me", "ftjob-1")
    assert (job.status, job.step, job.config, job.result_files, job.weight) == ("running", 3, {"r": 4}, ("file-2",), 1.5)
    assert [event.message for event in store.list_events("ftjob-1")[0]] == ["Step 3/9"]
    (checkpoint,), (adapter,) = store.list_checkpoints("ftjob-1")[0], store.list_adapters("me")
    assert (checkpoint.epoch, checkpoint.sha256, checkpoint.bytes, checkpoint.directory) == (0, "", 0, "/jobs/step-3")
    assert (adapter.version, adapter.sha256, adapter.epoch, adapter.bytes) == (0, "", 0, 0)
    store.add_event("ftjob-1", level="info", type="metrics", message="again", step=3, created_at=9)
    assert [event.message for event in store.list_events("ftjob-1")[0]] == ["again"]
    store.close()
    new = f"sqlite:///{tmp_path}/new.db"
    if not url.startswith("sqlite"):
        engine = _engine(url)
        with engine.execution_options(isolation_level="AUTOCOMMIT").connect() as connection:
            connection.exec_driver_sql("DROP DATABASE IF EXISTS fresh")
            connection.exec_driver_sql("CREATE DATABASE fresh")
        engine.dispose()
        new = url.replace("coserve@/" + url.partition("coserve@/")[2].partition("?")[0], "coserve@/fresh")
    Store(new).close()
    old_shape, new_shape = _shape(url), _shape(new)
    assert old_shape == new_shape


def test_an_index_that_replicas_of_an_older_coserve_use_is_left_alone(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    Store(postgres_url).close()
    engine = _engine(postgres_url)

    def seen(ago: float) -> None:
        with engine.begin() as connection:
            connection.execute(text("DELETE FROM members"))
            connection.execute(text(
                "INSERT INTO members VALUES ('engine-1', 'engine', 'tcp://a', 'k', 'n', '{}', 0, "
                "extract(epoch FROM clock_timestamp()) - :ago)"), {"ago": ago})

    changes: list[int] = []
    known = (*tables.MIGRATIONS, lambda connection: changes.append(1))
    monkeypatch.setattr(database, "prepare_schema", lambda connection: tables.prepare_schema(connection, known))
    seen(5)
    with pytest.raises(ConfigError, match=r"in use by 1 processes of an older coserve \(engine-1\): stop them first") as error:
        Store(postgres_url)
    assert error.value.param == "database_url" and not changes
    seen(100)
    Store(postgres_url).close()
    assert changes
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="schema version 4, this coserve knows versions up to 3: use the newer coserve"):
        Store(postgres_url)
    engine.dispose()
