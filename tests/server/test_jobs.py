"""Finetuning jobs from creation to end, over an engine that dies, refuses and repeats itself."""

from __future__ import annotations

import asyncio
import base64
import datetime
import shutil
from pathlib import Path
from typing import Any

import pytest

from coserve.core import CapacityError, InvalidRequest, JobFailed, NotFound
from coserve.server.errors import Conflict, Forbidden
from coserve.server.link.messages import AdapterRef, JobHappened, Problem
from tests.server.conftest import Play
from tests.server.jobs_bench import Bench, until
from tests.tiny_directory import chat_lines, preference_lines


def test_a_job_from_creation_to_success(play: Play) -> None:
    async def story(bench: Bench) -> None:
        validation = await bench.upload(chat_lines(40)[30:])
        job = await bench.create(
            validation_file=validation, suffix="facts", seed=5, metadata={"team": "a"}, method={"type": "supervised"})
        shown = bench.jobs.describe(job)
        assert shown["status"] == "validating_files"
        assert shown["hyperparameters"]["n_epochs"] == "auto"
        running = await bench.status(job.id, "running")
        shown = bench.jobs.describe(running)
        assert shown["hyperparameters"] == {"n_epochs": 4, "batch_size": 2, "learning_rate_multiplier": 1.0}
        assert (shown["num_steps"], shown["step"], shown["estimated_finish"]) == (64, 0, None)
        await until(lambda: bool(bench.engine.starts))
        (start,) = bench.engine.starts
        tuned = f"ft:Base-1:coserve:facts:{job.id[-8:]}"
        assert (start["adapter"], start["tenant"], start["resume"]) == (f"me/{tuned}", "me", False)
        assert start["config"].checkpoint_steps == 16
        assert Path(start["training_file"]).is_file() and Path(start["validation_file"]).is_file()
        for step in (1, 2, 3):
            bench.engine.step(job.id, step, 64, valid=1.5 if step == 2 else None)
        await bench.settle()
        shown = bench.jobs.describe(bench.jobs.get("me", job.id))
        assert (shown["step"], shown["tokens_per_second"]) == (3, 50.0)
        assert shown["estimated_finish"] > running.created_at + 100
        bench.engine.checkpoint(job.id, 2)
        bench.engine.end(job.id, step=64)
        done = await bench.status(job.id, "succeeded")
        assert (done.fine_tuned_model, done.trained_tokens, done.step) == (tuned, 6400, 64)
        assert done.finished_at is not None and done.error is None
        assert await bench.models.prepare("me", tuned)
        assert not bench.engine.loads, "the engine holds it since the job's end"
        (checkpoint,), _ = bench.jobs.list_checkpoints("me", job.id, after=None, limit=10)
        assert checkpoint.model == f"{tuned}:ckpt-step-2" and checkpoint.id.startswith("ftckpt_")
        assert checkpoint.metrics["valid_loss"] == checkpoint.metrics["full_valid_loss"] == 1.5
        assert (await bench.models.prepare("me", checkpoint.model)).adapter == AdapterRef(name=f"me/{checkpoint.model}")
        assert bench.engine.loads == [(f"me/{checkpoint.model}", checkpoint.directory)]
        content = base64.b64decode(bench.files.path(bench.store.get_file("me", done.result_files[0])).read_bytes()).decode()
        assert content.splitlines()[:3] == [
            "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy,learning_rate,grad_norm,tokens,seconds",
            "1,4.0,0.5,,,0.0001,1.0,100,2.0", "2,2.0,0.5,1.5,0.4,0.0001,1.0,100,2.0"]
        messages = bench.messages(job.id)
        assert messages[0] == f"Created fine-tuning job: {job.id}"
        assert f"Validating training file: {job.training_file}" in messages
        assert messages[-1] == "The job has successfully completed"
        assert "Step 2/64: training loss=2.0000, validation loss=1.5000" in messages
        assert any("in facts.jsonl too" in message for message in messages), "overlap of training and validation data"
        metrics = [event for event in bench.events(job.id) if event.type == "metrics"]
        assert metrics[1].data == {
            "step": 2, "train_loss": 2.0, "train_mean_token_accuracy": 0.5, "valid_loss": 1.5, "full_valid_loss": 1.5,
            "valid_mean_token_accuracy": 0.4, "full_valid_mean_token_accuracy": 0.4, "learning_rate": 1e-4, "total_steps": 64}

    play(story)


@pytest.mark.parametrize(("content", "message"), [
    (b'{"messages": []}\n', "facts.jsonl, line 1: messages"),
    (b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n{"x": 1}\n',
     "facts.jsonl, line 2"),
    (b'{"messages": "' + b"x" * 10 + b'"}\n', "line 1: messages"),
])
def test_bad_lines_fail_the_job(play: Play, content: bytes, message: str) -> None:
    async def story(bench: Bench) -> None:
        job = await bench.create(training_file=await bench.upload(content))
        failed = await bench.status(job.id, "failed")
        assert failed.error is not None
        assert (failed.error["code"], failed.error["param"]) == ("invalid_training_file", "training_file")
        assert message in failed.error["message"]
        assert not bench.engine.starts
        with pytest.raises(Conflict):
            await bench.jobs.cancel("me", job.id)

    play(story)


def test_bad_validation_data_and_wrong_objective(play: Play) -> None:
    async def story(bench: Bench) -> None:
        job = await bench.create(validation_file=await bench.upload(b'{"messages": 1}\n'))
        failed = await bench.status(job.id, "failed")
        assert failed.error is not None
        assert (failed.error["code"], failed.error["param"]) == ("invalid_validation_file", "validation_file")
        pairs = await bench.upload(preference_lines(4))
        assert (await bench.status((await bench.create(training_file=pairs)).id, "failed")).error is not None
        job = await bench.create(training_file=pairs, method={"type": "dpo"})
        await bench.status(job.id, "running")
        assert any("4 examples only" in message for message in bench.messages(job.id))

    play(story)


def test_what_creation_refuses_at_once(play: Play) -> None:
    async def story(bench: Bench) -> None:
        theirs = await bench.upload(tenant="them")
        for fields, param in (
            ({"model": "nobody"}, "model"), ({"training_file": theirs}, "training_file"),
            ({"training_file": "file-none"}, "training_file"), ({"validation_file": theirs}, "validation_file"),
            ({"rank": 65}, "rank"),
        ):
            with pytest.raises((InvalidRequest, NotFound)) as caught:
                await bench.create(**fields)
            assert caught.value.param == param
        result = bench.files.save_result("me", "a.csv", b"x")
        with pytest.raises(InvalidRequest, match="fine-tune-results"):
            await bench.create(training_file=result.id)
        assert bench.jobs.list_jobs("me", after=None, limit=20, metadata=None) == ([], False)
        assert not list((bench.config.data_dir / "jobs").iterdir())

    play(story)


def test_tenants_see_their_own_jobs(play: Play) -> None:
    async def story(bench: Bench) -> None:
        mine = await bench.started()
        for call in (bench.jobs.cancel, bench.jobs.pause, bench.jobs.resume):
            with pytest.raises(NotFound):
                await call("them", mine)
        for read in (bench.jobs.list_events, bench.jobs.list_checkpoints):
            with pytest.raises(NotFound):
                read("them", mine, after=None, limit=1)
        with pytest.raises(NotFound):
            await bench.jobs.follow("them", mine, None)
        with pytest.raises(NotFound):
            bench.jobs.get("me", "ftjob-\x00")
        bench.engine.end(mine)
        tuned = (await bench.status(mine, "succeeded")).fine_tuned_model
        assert tuned is not None
        with pytest.raises(NotFound):
            await bench.create("them", model=tuned)
        with pytest.raises(NotFound):
            await bench.jobs.delete_model("them", tuned)
        assert [model.name for model in bench.models.list("them")] == ["some/Base-1"]

    play(story)


def test_cancelling(play: Play) -> None:
    async def story(bench: Bench) -> None:
        id = await bench.started()
        bench.engine.checkpoint(id, 1)
        done = await bench.jobs.cancel("me", id)
        assert done.status == "cancelled" and done.finished_at is not None
        assert bench.engine.acts == [(id, "cancel")]
        assert bench.store.get_job("me", id).status == "cancelled"
        bench.engine.step(id, 2)
        bench.engine.end(id, "cancelled", step=2)
        await bench.settle()
        job = bench.store.get_job("me", id)
        assert (job.status, job.step, job.trained_tokens, job.fine_tuned_model) == ("cancelled", 2, 200, None)
        assert bench.messages(id)[-1] == "The job was cancelled"
        assert len(bench.jobs.list_checkpoints("me", id, after=None, limit=10)[0]) == 1, "checkpoints stay"
        with pytest.raises(Conflict):
            await bench.jobs.pause("me", id)
        bench.engine.die()
        await bench.engine.rise()
        assert len(bench.engine.starts) == 1

    play(story)


def test_cancelling_while_the_engine_starts_the_job(play: Play) -> None:
    async def story(bench: Bench) -> None:
        bench.engine.gate.clear()
        job = await bench.create()
        await until(lambda: bool(bench.engine.starts))
        await bench.jobs.cancel("me", job.id)
        bench.engine.acts.clear()
        bench.engine.gate.set()
        await until(lambda: bench.engine.acts == [(job.id, "cancel")])
        assert bench.store.get_job("me", job.id).status == "cancelled"

    play(story)


def test_pausing_and_resuming(play: Play) -> None:
    async def story(bench: Bench) -> None:
        first = await bench.started()
        second = await bench.create()
        await bench.status(second.id, "queued")
        paused = await bench.jobs.pause("me", first)
        assert (paused.status, paused.paused) == ("running", True)
        assert bench.jobs.describe(paused)["paused"] is True
        assert bench.engine.acts == [(first, "pause")]
        await bench.status(second.id, "running")  # the first one's place is free
        assert not (await bench.jobs.resume("me", first)).paused
        assert bench.engine.acts == [(first, "pause"), (first, "resume")]
        assert (await bench.jobs.resume("me", first)).paused is False
        assert len(bench.engine.acts) == 2, "resuming what runs does nothing"
        assert [m for m in bench.messages(first) if "paused" in m or "resumed" in m] == [
            "The job was paused", "The job was resumed"]

    play(story, max_jobs=1)


def test_a_waiting_job_can_be_paused(play: Play) -> None:
    async def story(bench: Bench) -> None:
        first = await bench.started()
        second = await bench.create()
        await bench.status(second.id, "queued")
        await bench.jobs.pause("me", second.id)
        bench.engine.end(first)
        await bench.status(first, "succeeded")
        assert len(bench.engine.starts) == 1
        await bench.jobs.resume("me", second.id)
        await bench.status(second.id, "running")

    play(story, max_jobs=1)


def test_the_order_of_the_queue(play: Play) -> None:
    async def story(bench: Bench) -> None:
        running = await bench.started()
        made = {}
        for name, tenant, fields in (
            ("old", "me", {}), ("late", "me", {"deadline": 2000}), ("soon", "me", {"deadline": 1000}),
            ("urgent", "me", {"priority": -1}), ("other", "them", {"priority": 5}),
        ):
            made[name] = (await bench.create(tenant, **fields)).id
            await bench.status(made[name], "queued")
        order = []
        for _ in made:
            bench.engine.end(running)
            await bench.status(running, "succeeded")
            await until(lambda: bench.engine.starts[-1]["id"] != running)  # noqa: B023
            running = bench.engine.starts[-1]["id"]
            await until(lambda: (Path(bench.engine.starts[-1]["directory"]) / "job.json").exists())
            order.append(next(name for name, id in made.items() if id == running))
        assert order == ["urgent", "soon", "late", "old", "other"]

    play(story, max_jobs=1)


def test_the_tenant_with_fewer_running_jobs_is_next(play: Play) -> None:
    async def story(bench: Bench) -> None:
        first, second = await bench.started("me"), await bench.started("me")
        mine = await bench.create("me", priority=-9)
        theirs = await bench.create("them")
        for job in (mine, theirs):
            await bench.status(job.id, "queued")
        bench.engine.end(first)
        await bench.status(theirs.id, "running")
        bench.engine.end(second)
        await bench.status(mine.id, "running")

    play(story, max_jobs=2)


@pytest.mark.parametrize(("error", "code"), [
    (CapacityError("max_microbatch_tokens: too much", param="max_microbatch_tokens"), "insufficient_memory"),
    (InvalidRequest("content, line 1: bad", param="training_file"), "invalid_training_file"),
])
def test_the_engines_refusal_fails_the_job(play: Play, error: Any, code: str) -> None:
    async def story(bench: Bench) -> None:
        bench.engine.refusal = error
        job = await bench.create()
        failed = await bench.status(job.id, "failed")
        assert failed.error == {"code": code, "message": str(error), "param": error.param}
        bench.engine.refusal = None
        await bench.started()

    play(story)


def test_a_failing_job(play: Play) -> None:
    async def story(bench: Bench) -> None:
        id = await bench.started()
        problem = Problem(name=JobFailed.__name__, message="the loss is nan at step 3", param="learning_rate")
        bench.engine.adapters[bench.engine.starts[0]["adapter"]] = "published by a checkpoint"
        bench.engine.end(id, "failed", problem, step=2)
        failed = await bench.status(id, "failed")
        assert failed.error == {"code": "job_failed", "message": problem.message, "param": "learning_rate"}
        assert (failed.step, failed.trained_tokens, failed.fine_tuned_model) == (2, 200, None)
        assert bench.events(id)[-1].level == "error"
        await until(lambda: not bench.engine.adapters)

    play(story)


def test_old_checkpoints_go_with_their_models(play: Play) -> None:
    async def story(bench: Bench) -> None:
        id = await bench.started()
        bench.engine.step(id, 1)
        bench.engine.checkpoint(id, 1, keep=2)
        await bench.settle()
        first = bench.jobs.list_checkpoints("me", id, after=None, limit=10)[0][0].model
        await bench.models.prepare("me", first)
        for step in (2, 3):
            bench.engine.step(id, step)
            bench.engine.checkpoint(id, step, keep=2)
        await bench.settle()
        assert [c.step for c in bench.jobs.list_checkpoints("me", id, after=None, limit=10)[0]] == [3, 2]
        with pytest.raises(NotFound):
            bench.models.find("me", first)
        await until(lambda: f"me/{first}" not in bench.engine.adapters)

    play(story)


def test_the_engine_dies_and_jobs_go_on(play: Play) -> None:
    async def story(bench: Bench) -> None:
        running, paused, gone = [await bench.started() for _ in range(3)]
        bench.engine.step(running, 1)
        bench.engine.step(running, 2, loss=9.0)
        await bench.jobs.pause("me", paused)
        bench.engine.die()
        await bench.jobs.cancel("me", gone)
        waiting = await bench.create()
        await bench.status(waiting.id, "queued")
        starts = len(bench.engine.starts)
        await bench.engine.rise()
        await until(lambda: len(bench.engine.starts) == starts + 2)
        again = {start["id"]: start["resume"] for start in bench.engine.starts[starts:]}
        assert again == {running: True, waiting.id: False}
        assert any("engine has stopped" in message for message in bench.messages(running))
        bench.engine.step(running, 2, loss=2.0)  # the step runs again and says something else
        await bench.settle()
        metrics = [event for event in bench.events(running) if event.type == "metrics"]
        assert [(event.step, event.data["train_loss"]) for event in metrics if event.data] == [(1, 4.0), (2, 2.0)]
        await bench.jobs.resume("me", paused)
        await until(lambda: bench.engine.starts[-1]["id"] == paused)
        assert bench.engine.starts[-1]["resume"]
        assert bench.store.get_job("me", gone).status == "cancelled"

    play(story)


def test_the_engine_dies_while_it_starts_a_job(play: Play) -> None:
    async def story(bench: Bench) -> None:
        bench.engine.gate.clear()
        job = await bench.create()
        await until(lambda: len(bench.engine.starts) == 1)
        bench.engine.die()
        bench.engine.gate.set()
        await bench.engine.rise()
        await until(lambda: len(bench.engine.starts) == 2)
        await until(lambda: (Path(bench.engine.starts[-1]["directory"]) / "job.json").exists())
        bench.engine.end(job.id)
        await bench.status(job.id, "succeeded")
        assert len(bench.engine.starts) == 2

    play(story)


def test_the_engines_warnings_are_passed_on(play: Play) -> None:
    async def story(bench: Bench) -> None:
        id = await bench.started()
        bench.engine.say(JobHappened(id=id, level="warn", message="step-00000004 is damaged; using the one before", time_s=1.0))
        await bench.settle()
        last = bench.events(id)[-1]
        assert (last.level, last.type, "damaged" in last.message) == ("warn", "message", True)

    play(story)


def test_a_new_server_goes_on(play: Play) -> None:
    ids: dict[str, str] = {}

    async def before(bench: Bench) -> None:
        ids["running"] = await bench.started()
        bench.engine.step(ids["running"], 1)
        ids["paused"], ids["queued"] = (await bench.create()).id, (await bench.create()).id
        await bench.status(ids["queued"], "queued")
        await bench.jobs.pause("me", ids["paused"])
        assert len(bench.engine.starts) == 1

    async def after(bench: Bench) -> None:
        await until(lambda: len(bench.engine.starts) == 2)
        assert {start["id"]: start["resume"] for start in bench.engine.starts} == {ids["running"]: True, ids["queued"]: False}
        assert bench.store.get_job("me", ids["paused"]).paused
        bench.engine.end(ids["running"])
        assert (await bench.status(ids["running"], "succeeded")).result_files

    play(before, max_jobs=1)
    play(after, max_jobs=3)


def test_a_job_that_was_being_validated_is_validated_again(play: Play) -> None:
    made: list[str] = []

    async def before(bench: Bench) -> None:
        await bench.jobs._reader._room.acquire()
        bench.jobs._reader._room._value = 0  # nobody's turn comes
        made.append((await bench.create()).id)
        assert bench.store.get_job("me", made[0]).status == "validating_files"

    async def after(bench: Bench) -> None:
        await bench.status(made[0], "running")

    play(before, after)


def test_a_lost_index_is_rebuilt(play: Play, tmp_path: Path) -> None:
    ids: dict[str, Any] = {}

    async def before(bench: Bench) -> None:
        ids["done"] = await bench.started(metadata={"k": "v"}, deadline=123)
        bench.engine.step(ids["done"], 1, valid=2.5)
        bench.engine.checkpoint(ids["done"], 1)
        bench.engine.end(ids["done"], step=1)
        ids["record"] = await bench.status(ids["done"], "succeeded")
        ids["running"] = await bench.started()
        bench.engine.checkpoint(ids["running"], 3)
        await bench.settle()

    async def after(bench: Bench) -> None:
        record = bench.jobs.get("me", ids["done"])
        assert record == ids["record"]
        (checkpoint,), _ = bench.jobs.list_checkpoints("me", record.id, after=None, limit=10)
        assert (checkpoint.step, checkpoint.metrics["valid_loss"]) == (1, 2.5)
        for name in (record.fine_tuned_model, checkpoint.model):
            assert (await bench.models.prepare("me", name)).name == name
        assert [event.step for event in bench.events(record.id) if event.type == "metrics"] == [1]
        await until(lambda: len(bench.engine.starts) == 1)
        assert (bench.engine.starts[0]["id"], bench.engine.starts[0]["resume"]) == (ids["running"], True)
        assert [c.step for c in bench.jobs.list_checkpoints("me", ids["running"], after=None, limit=10)[0]] == [3]

    play(before)
    for path in (tmp_path / "data").glob("coserve.db*"):
        path.unlink()
    play(after)


def test_a_damaged_manifest_harms_nobody_else(play: Play, tmp_path: Path) -> None:
    ids: list[str] = []

    async def before(bench: Bench) -> None:
        for _ in range(2):
            ids.append(await bench.started())
            bench.engine.end(ids[-1])
            await bench.status(ids[-1], "succeeded")

    async def after(bench: Bench) -> None:
        assert [job.id for job in bench.jobs.list_jobs("me", after=None, limit=20, metadata=None)[0]] == [ids[1]]

    play(before)
    (tmp_path / "data" / "jobs" / ids[0] / "request.json").write_text('{"schema_version": 1, "job": {}}')
    for path in (tmp_path / "data").glob("coserve.db*"):
        path.unlink()
    play(after)


def test_an_end_that_only_the_manifest_knows(play: Play) -> None:
    made: list[str] = []

    async def before(bench: Bench) -> None:
        made.append(await bench.started())
        bench.engine.end(made[0])
        await bench.status(made[0], "succeeded")
        adapter = bench.models.find_record("me", bench.store.get_job("me", made[0]).fine_tuned_model or "")
        bench.models.remove(adapter)  # as if killed between the manifest and the index
        bench.store.update_job(made[0], status="running", fine_tuned_model=None, finished_at=None)

    async def after(bench: Bench) -> None:
        job = bench.store.get_job("me", made[0])
        assert job.status == "succeeded" and job.fine_tuned_model
        assert bench.models.find("me", job.fine_tuned_model)
        assert not bench.engine.starts, "no job runs twice"

    play(before, after)


def test_continuing_a_tuned_model(play: Play) -> None:
    async def story(bench: Bench) -> None:
        first = await bench.started()
        bench.engine.end(first)
        tuned = (await bench.status(first, "succeeded")).fine_tuned_model
        assert tuned is not None
        second = await bench.started(model=tuned, suffix="more")
        start = Path(bench.engine.starts[-1]["start"])
        assert start.is_dir() and start != Path(bench.engine.starts[0]["directory"])
        assert bench.engine.starts[-1]["adapter"].startswith("me/ft:Base-1:coserve:more:")
        assert bench.jobs.get("me", second).base == tuned
        await bench.jobs.delete_model("me", tuned)
        assert (start / "adapter_model.safetensors").is_file(), "the job has a copy of its own"

    play(story)


def test_a_deleted_result_takes_the_checkpoint_with_its_weights(play: Play, tmp_path: Path) -> None:
    names: list[str] = []

    async def before(bench: Bench) -> None:
        id = await bench.started()
        for step in (5, 10):
            bench.engine.step(id, step)
            bench.engine.checkpoint(id, step)
        bench.engine.end(id, step=10)
        tuned = (await bench.status(id, "succeeded")).fine_tuned_model or ""
        await bench.settle()
        checkpoints, _ = bench.jobs.list_checkpoints("me", id, after=None, limit=10)
        last, first = (checkpoint.model for checkpoint in checkpoints)
        assert await bench.jobs.delete_model("me", tuned) == [tuned, last]
        names.extend([tuned, last, first])

    async def after(bench: Bench) -> None:
        for name in names[:2]:
            with pytest.raises(NotFound):
                bench.models.find("me", name)
        assert bench.models.find("me", names[2]).name == names[2], "other weights stay"

    play(before)
    for path in (tmp_path / "data").glob("coserve.db*"):
        path.unlink()
    play(after)


def test_deleting_models(play: Play, tmp_path: Path) -> None:
    ids: dict[str, str] = {}

    async def before(bench: Bench) -> None:
        id = await bench.started()
        bench.engine.step(id, 1)
        bench.engine.checkpoint(id, 1)
        await bench.settle()
        (checkpoint,), _ = bench.jobs.list_checkpoints("me", id, after=None, limit=10)
        with pytest.raises(Conflict):
            await bench.jobs.delete_model("me", checkpoint.model)
        bench.engine.end(id)
        tuned = (await bench.status(id, "succeeded")).fine_tuned_model or ""
        ids.update(tuned=tuned, checkpoint=checkpoint.model)
        await bench.models.prepare("me", checkpoint.model)
        bench.jobs._runner.ending[id] = bench.jobs.get("me", id)  # as just after the index got it: what is shown counts
        for name in (tuned, checkpoint.model):
            await bench.jobs.delete_model("me", name)
            with pytest.raises(NotFound):
                bench.models.find("me", name)
        assert not bench.engine.adapters
        assert not Path(checkpoint.directory).exists()
        with pytest.raises(Forbidden):
            await bench.jobs.delete_model("me", "some/Base-1")

    async def after(bench: Bench) -> None:
        for name in ids.values():
            with pytest.raises(NotFound):
                bench.models.find("me", name)

    play(before)
    for path in (tmp_path / "data").glob("coserve.db*"):
        path.unlink()
    play(after)


def test_following_events(play: Play) -> None:
    async def story(bench: Bench) -> None:
        id = await bench.started()
        bench.engine.step(id, 1)
        await bench.settle()
        heard: list[str] = []

        async def follow(after: str | None = None) -> None:
            async for event in await bench.jobs.follow("me", id, after):
                heard.append(event.message)

        task = asyncio.create_task(follow())
        await until(lambda: len(heard) >= 5)
        bench.engine.step(id, 2)
        bench.engine.end(id, step=2)
        await asyncio.wait_for(task, 10)
        assert heard == bench.messages(id)
        assert len(set(heard)) == len(heard)
        known = bench.events(id)
        heard.clear()
        await asyncio.wait_for(follow(known[2].id), 10)
        assert heard == [event.message for event in known[3:]]
        with pytest.raises(InvalidRequest):
            await bench.jobs.follow("me", id, "ftevent-none")

    play(story)


def test_a_followers_stream_ends_with_the_server(play: Play) -> None:
    tasks: list[asyncio.Task[None]] = []

    async def story(bench: Bench) -> None:
        id = await bench.started()

        async def follow() -> None:
            async for _ in await bench.jobs.follow("me", id, None):
                pass

        tasks.append(asyncio.create_task(follow()))
        await asyncio.sleep(0.05)
        await bench.jobs.stop()
        await asyncio.wait_for(tasks[0], 5)

    play(story)


def test_what_the_engine_says_at_its_end_is_not_the_jobs(play: Play) -> None:
    made: list[str] = []

    async def before(bench: Bench) -> None:
        made.append(await bench.started())
        bench.engine.end(made[0], "cancelled")  # a closing engine cancels what it has
        await bench.settle()
        assert bench.store.get_job("me", made[0]).status == "running"
        await bench.jobs.stop()
        bench.engine.end(made[0], "cancelled")

    async def after(bench: Bench) -> None:
        await until(lambda: len(bench.engine.starts) == 1)
        assert bench.engine.starts[0]["resume"]

    play(before, after)


def test_a_full_disk_at_creation_leaves_nothing(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(bench: Bench) -> None:
        def refuse(*_: object) -> None:
            raise CapacityError("no space left")

        with monkeypatch.context() as patch:
            patch.setattr("coserve.server.jobs.service.write_manifest", refuse)
            with pytest.raises(CapacityError):
                await bench.create()
        assert not list((bench.config.data_dir / "jobs").iterdir())
        await bench.started()

    play(story)


def test_a_full_disk_at_the_end_is_waited_for(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(bench: Bench) -> None:
        id = await bench.started()
        monkeypatch.setattr("coserve.server.jobs.journal.RETRY_S", 0.01)
        refused: list[int] = []

        def refuse(*_: object) -> None:
            refused.append(1)
            raise CapacityError("no space left")

        with monkeypatch.context() as patch:
            patch.setattr("coserve.server.jobs.runner.write_manifest", refuse)
            bench.engine.end(id)
            await until(lambda: len(refused) > 2)
            assert bench.store.get_job("me", id).status == "running"
        assert len((await bench.status(id, "succeeded")).result_files) == 1
        assert bench.messages(id).count("The job has successfully completed") == 1

    play(story)


def test_a_directory_without_manifest_is_no_job(play: Play, tmp_path: Path) -> None:
    async def nothing(bench: Bench) -> None:
        assert bench.jobs.list_jobs("me", after=None, limit=20, metadata=None)[0] == []

    directory = tmp_path / "data" / "jobs" / ("ftjob-" + "0" * 24)
    directory.mkdir(parents=True)
    play(nothing)
    shutil.rmtree(directory)


def test_the_data_of_a_job_is_read_as_of_its_creation_and_remarked_on_once(play: Play) -> None:
    async def scene(bench: Bench) -> None:
        id = await bench.started(training_file=await bench.upload([{**line, "colour": 1} for line in chat_lines(32)]))
        job = bench.store.get_job(None, id)
        day = datetime.date.fromtimestamp(job.created_at).isoformat()
        (start,) = bench.engine.starts
        assert (job.config["template_date"], start["config"].template_date) == (day, day)
        remark = 'columns that no layout has are ignored: "colour"'
        for message in (remark, "something else", "something else"):
            bench.engine.say(JobHappened(id=id, level="warn", message=message, time_s=1.0))
        await bench.settle()
        warned = [event.message for event in bench.events(id) if event.level == "warn"]
        assert len([message for message in warned if message.endswith(remark)]) == 1
        assert warned.count("something else") == 2

    play(scene)
