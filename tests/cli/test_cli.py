"""The command line on a tiny model: whole runs, and every bad input as one line, exit code 2 and nothing left behind."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from coserve.config.settings import BottleneckConfig, IA3Config, LoraConfig, SamplingConfig
from coserve.core import CapacityError, ConfigError
from coserve.engine.generation import Generator
from coserve.finetune.job import JobEvent, MetricsTable
from coserve.model.architecture import read_architecture
from coserve.model.memory import GIB
from coserve.planning.budget import shape_adapter
from coserve.runtime.loaded import load_model
from coserve.runtime.plans import training_plans
from coserve.training import finetuning as finetuning_engine
from coserve.training.finetuning import finetune
from tests.commands import Ran, Run, config_of
from tests.tiny_directory import build_tiny_directory, chat_line, chat_lines, preference_lines, write_lines
from tests.tiny_models import build_tiny_model
from tests.tiny_tokenizer import build_tiny_tokenizer

SOURCE = Path(__file__).parents[2] / "src"
RESULT_FILES = {
    "adapter_config.json", "adapter_model.safetensors", "checkpoints", "coserve.json", "job.json", "loss.png", "metrics.csv",
}


@dataclass(frozen=True)
class Place:
    """What every test has: a model, 11 examples, and an empty directory."""

    model: Path
    data: Path
    tmp: Path

    @property
    def out(self) -> Path:
        return self.tmp / "out"

    def lines(self, *lines: dict[str, Any], name: str = "bad.jsonl") -> Path:
        return write_lines(self.tmp / name, lines)

    def file(self, text: str, name: str = "bad.jsonl") -> Path:
        (self.tmp / name).write_text(text)
        return self.tmp / name


@pytest.fixture(autouse=True, scope="module")
def no_cuda() -> Iterator[None]:
    """`--device auto` is the processor, on every machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        yield


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cli")
    build_tiny_directory(root / "model")
    write_lines(root / "data.jsonl", chat_lines(11))
    return root


@pytest.fixture
def place(shared: Path, tmp_path: Path) -> Place:
    return Place(shared / "model", shared / "data.jsonl", tmp_path)


@pytest.fixture(scope="module")
def trained(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output directory of a run whose adapter speaks differently from the base."""
    directory = tmp_path_factory.mktemp("trained") / "out"
    settings = config_of(None, {"max_steps": 6, "batch_size": 6, "learning_rate": 0.02, "rank": 4, "checkpoint_steps": 2})
    finetune(shared / "data.jsonl", directory, model=str(shared / "model"), config=settings)
    return directory


def settings_of(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "job.json").read_text())["settings"]


def losses(directory: Path) -> list[float]:
    return [row.train_loss for row in MetricsTable(directory / "metrics.csv").rows()]


def last_logits(model: Any, ids: Sequence[int]) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.tensor([list(ids)])).logits[0]


# --- finetune: whole runs ---


def test_finetune_end_to_end(place: Place, run: Run) -> None:
    result = run(
        "finetune", place.model, place.data, "-o", place.out, "--epochs", 8, "--batch-size", 6, "--learning-rate", 0.01,
        "--checkpoint-steps", 5, "--dtype", "float32",
    )
    assert (result.code, result.err) == (0, "")
    assert {path.name for path in place.out.iterdir()} == RESULT_FILES
    assert [path.name for path in place.tmp.iterdir()] == ["out"]
    rows = MetricsTable(place.out / "metrics.csv").rows()
    assert [row.step for row in rows] == list(range(1, 17))
    assert rows[-1].train_loss < rows[0].train_loss - 0.5
    assert all(row.valid_loss is None for row in rows)
    last = place.out / "checkpoints" / "step-00000016"
    for name in ("adapter_config.json", "adapter_model.safetensors", "coserve.json"):
        assert (place.out / name).read_bytes() == (last / name).read_bytes()
    png = (place.out / "loss.png").read_bytes()
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    assert png[12:16] == b"IHDR"
    assert min(int.from_bytes(png[16:20], "big"), int.from_bytes(png[20:24], "big")) > 100
    assert "11 examples" in result.out
    progress = r"^step (\d+): loss \d+\.\d+, \d+ tokens/s, \d+\.\d+ GiB peak, step \1 of 16$"
    assert len(re.findall(progress, result.out, re.M)) == 16
    assert f"coserve chat {place.model} --adapter {place.out}" in result.out

    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(place.model), str(place.out))
    ours = load_model(str(place.model), dtype="float32")
    ids = list(range(3, 60))
    found = Generator(ours, ours.load_adapter(place.out)).logits(ids)
    torch.testing.assert_close(found, last_logits(theirs, ids), rtol=1e-4, atol=1e-4)
    assert (found - Generator(ours).logits(ids)).abs().max() > 0.1


def test_a_real_process_writes_nothing_to_stderr(place: Place) -> None:
    result = in_a_process("finetune", place.model, place.data, "-o", place.out, "--max-steps", 2)
    assert (result.code, result.err) == (0, "")
    assert {path.name for path in place.out.iterdir()} == RESULT_FILES


def test_a_real_process_refuses_in_one_line(place: Place) -> None:
    bad = place.file('{"messages": [\n')
    assert_refused(in_a_process("finetune", place.model, bad, "-o", place.out), place, r"bad\.jsonl, line 1: JSON")


def in_a_process(*args: object) -> Ran:
    command = [sys.executable, "-c", "from coserve.cli.main import main; main()", *map(str, args)]
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)
    return Ran(done.returncode, done.stdout, done.stderr)


def test_every_option_reaches_its_setting(place: Place, run: Run) -> None:
    options: dict[str, tuple[object, str, object]] = {
        "--objective": ("sft", "objective", "sft"), "--dpo-beta": (0.3, "dpo_beta", 0.3), "--epochs": (2.5, "epochs", 2.5),
        "--max-steps": (2, "max_steps", 2), "--batch-size": (3, "batch_size", 3),
        "--max-microbatch-tokens": (300, "max_microbatch_tokens", 300), "--window-tokens": (64, "window_tokens", 64),
        "--activation-memory": ("0.9", "activation_memory", "0.9"),
        "--max-length": (200, "max_length", 200), "--too-long": ("drop", "too_long", "drop"),
        "--learning-rate": (0.003, "optimizer.learning_rate", 0.003), "--schedule": ("cosine", "optimizer.schedule", "cosine"),
        "--warmup-steps": (1, "optimizer.warmup_steps", 1), "--weight-decay": (0.01, "optimizer.weight_decay", 0.01),
        "--max-grad-norm": (0.5, "optimizer.max_grad_norm", 0.5), "--rank": (3, "lora.r", 3), "--alpha": (9, "lora.alpha", 9.0),
        "--dropout": (0.1, "lora.dropout", 0.1),
        "--target-modules": ("q_proj, up_proj", "lora.target_modules", ["q_proj", "up_proj"]),
        "--rank-pattern": ("q_proj=2", "lora.rank_pattern", {"q_proj": 2}),
        "--alpha-pattern": ("q_proj=1.5, up_proj=4", "lora.alpha_pattern", {"q_proj": 1.5, "up_proj": 4.0}),
        "--seed": (5, "seed", 5), "--checkpoint-steps": (1, "checkpoint_steps", 1),
        "--validation-steps": (1, "validation_steps", 1),
    }
    given = [str(part) for option, (value, _, _) in options.items() for part in (option, value)]
    result = run("finetune", place.model, place.data, "-o", place.out, *given, "--use-rslora", "--deterministic")
    assert (result.code, result.err) == (0, "")
    settings = settings_of(place.out)
    for option, (_, path, expected) in options.items():
        value: Any = settings
        for key in path.split("."):
            value = value[key]
        assert value == expected, option
    assert settings["lora"]["use_rslora"] is True
    assert settings["deterministic"] is True
    config = json.loads((place.out / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (3, 9, {"q_proj": 2})
    assert not torch.are_deterministic_algorithms_enabled(), "a run leaves no global setting behind"


def test_command_line_goes_over_toml_and_toml_over_defaults(place: Place, run: Run) -> None:
    toml = place.file(
        "batch_size = 2\nmax_steps = 1\nseed = 7\ndeterministic = true\n"
        '[lora]\nr = 4\nalpha = 8\nuse_rslora = true\ntarget_modules = ["q_proj"]\n[lora.rank_pattern]\nq_proj = 2\n'
        "[optimizer]\nlearning_rate = 0.5\nschedule = 'constant'\n", "settings.toml",
    )
    result = run(
        "finetune", place.model, place.data, "-o", place.out, "--config", toml, "--batch-size", 3, "--rank", 5,
        "--learning-rate", 0.25,
    )
    assert (result.code, result.err) == (0, "")
    settings = settings_of(place.out)
    assert (settings["batch_size"], settings["lora"]["r"], settings["optimizer"]["learning_rate"]) == (3, 5, 0.25)
    assert (settings["max_steps"], settings["seed"], settings["deterministic"]) == (1, 7, True)
    assert (settings["lora"]["alpha"], settings["lora"]["use_rslora"]) == (8, True)
    assert (settings["lora"]["target_modules"], settings["lora"]["rank_pattern"]) == (["q_proj"], {"q_proj": 2})
    assert (settings["optimizer"]["schedule"], settings["optimizer"]["beta2"]) == ("constant", 0.999)


def test_validation_loss_is_measured_and_shown(place: Place, run: Run) -> None:
    held_out = place.lines(*chat_lines(3), name="held_out.jsonl")
    result = run(
        "finetune", place.model, place.data, "-o", place.out, "--batch-size", 6, "--epochs", 2, "--validation", held_out
    )
    assert (result.code, result.err) == (0, "")
    rows = MetricsTable(place.out / "metrics.csv").rows()
    assert [row.step for row in rows if row.valid_loss is not None] == [2, 4]
    shown = re.findall(r"validation loss (\d+\.\d+)", result.out)
    assert shown == [f"{row.valid_loss:.4f}" for row in rows if row.valid_loss is not None]


def test_dpo(place: Place, run: Run) -> None:
    pairs = place.lines(*preference_lines(6), name="pairs.jsonl")
    result = run(
        "finetune", place.model, pairs, "-o", place.out, "--objective", "dpo", "--batch-size", 3, "--epochs", 5,
        "--learning-rate", 0.01,
    )
    assert (result.code, result.err) == (0, "")
    found = losses(place.out)
    assert found[0] == pytest.approx(math.log(2), abs=1e-5), "the policy starts as its reference"
    assert found[-1] < found[0] - 0.1
    assert "reward_margin" in result.out
    assert "reward_accuracy" in result.out


def test_continuing_from_an_adapter(place: Place, run: Run, trained: Path) -> None:
    result = run(
        "finetune", place.model, place.data, "-o", place.out, "--adapter", trained, "--max-steps", 1, "--batch-size", 11,
        "--learning-rate", 1e-30, "--dtype", "float32",
    )
    assert (result.code, result.err) == (0, "")
    before, after = (load_file(path / "adapter_model.safetensors") for path in (trained, place.out))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert settings_of(place.out)["lora"]["r"] == 4
    fresh = run("finetune", place.model, place.data, "-o", place.tmp / "fresh", "--max-steps", 1, "--batch-size", 11)
    assert fresh.code == 0
    assert losses(place.out)[0] < losses(place.tmp / "fresh")[0] - 0.3


@pytest.mark.parametrize(("kind", "args", "fields"), [
    ("ia3", ("--target-modules", "v_proj,up_proj,down_proj"), {"peft_type": "IA3", "feedforward_modules": ["down_proj"]}),
    pytest.param("dora", ("--rank", 4), {"peft_type": "LORA", "use_dora": True, "r": 4}, marks=pytest.mark.full),
    ("bottleneck", ("--size", 8, "--placement", "houlsby", "--activation", "gelu"),
     {"peft_type": "COSERVE_BOTTLENECK", "size": 8, "placement": "houlsby", "activation": "gelu"}),
])
def test_other_kinds_of_adapter(
    place: Place, run: Run, kind: str, args: tuple[object, ...], fields: dict[str, object]
) -> None:
    """Trained, resumed, written, and continued from."""
    command = ("finetune", place.model, place.data, "--kind", kind, "--batch-size", 4, "--learning-rate", 0.02, *args)
    result = run(*command, "-o", place.out, "--max-steps", 3, "--checkpoint-steps", 2)
    assert (result.code, result.err) == (0, "")
    saved = json.loads((place.out / "adapter_config.json").read_text())
    assert fields.items() <= saved.items()
    tensors = load_file(place.out / "adapter_model.safetensors")
    shutil.rmtree(place.out / "checkpoints" / "step-00000003")
    again = run(*command, "-o", place.out, "--max-steps", 3, "--checkpoint-steps", 2, "--resume")
    assert (again.code, again.err) == (0, "")
    for name, tensor in load_file(place.out / "adapter_model.safetensors").items():
        torch.testing.assert_close(tensor, tensors[name])
    more = run("finetune", place.model, place.data, "--adapter", place.out, "-o", place.tmp / "more", "--max-steps", 1)
    assert (more.code, more.err) == (0, "")
    assert fields.items() <= json.loads((place.tmp / "more" / "adapter_config.json").read_text()).items()


def test_a_settings_file_chooses_the_kind(place: Place) -> None:
    path = place.tmp / "settings.toml"
    path.write_text('[bottleneck]\nsize = 5\nactivation = "gelu"\n')
    assert config_of(path, {"placement": "houlsby"}).adapter == BottleneckConfig(
        size=5, activation="gelu", placement="houlsby"
    )
    with pytest.raises(ConfigError, match=r"kind: it is ia3, but the settings file has a table \[bottleneck\]"):
        config_of(path, {}, "ia3")
    path.write_text('[ia3]\ntarget_modules = ["k_proj", "up_proj"]\n')
    assert config_of(path, {}).adapter == IA3Config(target_modules=("k_proj", "up_proj"))
    path.write_text('[ia3]\nfeedforward_modules = ["up_proj"]\n')
    with pytest.raises(ConfigError, match="feedforward_modules: up_proj must be among target_modules"):
        config_of(path, {})


def test_a_settings_file_limits_memory_by_number_or_text(place: Place) -> None:
    path = place.tmp / "settings.toml"
    for written, expected in (("0.5", 0.5), ("12_500_000", 12_500_000), ('"800MiB"', "800MiB"), ('"auto"', "auto")):
        path.write_text(f"activation_memory = {written}\n")
        assert config_of(path, {}).activation_memory == expected
        assert config_of(path, {"activation_memory": "1GB"}).activation_memory == "1GB"


def test_overriding_lora_settings_by_an_adapter_warns(place: Place, trained: Path) -> None:
    def warnings(**given: Any) -> list[str]:
        events: list[JobEvent] = []
        shutil.rmtree(place.out, ignore_errors=True)
        config = config_of(None, {"max_steps": 1, **given})
        finetune(place.data, place.out, model=str(place.model), config=config, start=trained, listen=events.append)
        return [event.message for event in events if event.level == "warn"]

    assert warnings() == []
    (message,) = warnings(rank=2, dropout=0.5)
    assert str(trained) in message
    assert "adapter's settings" in message


@pytest.mark.parametrize(("choice", "num_examples"), [("drop", 2), ("truncate", 3)])
def test_too_long_examples_are_dropped_or_cut_and_reported(
    place: Place, run: Run, choice: str, num_examples: int
) -> None:
    data = place.lines(chat_line("Hi?", "Yes."), chat_line("Hi?", "well, " * 40), chat_line("You?", "No."))
    args = ("finetune", place.model, data, "-o", place.out, "--max-length", 60, "--max-steps", 1)
    result = run(*args, "--too-long", choice)
    assert (result.code, result.err) == (0, "")
    assert f"{num_examples} examples" in result.out
    assert "1 too long examples were " + {"drop": "dropped", "truncate": "truncated"}[choice] in result.out


def test_the_data_may_leave_out_the_end_of_line(place: Place, run: Run) -> None:
    data = place.file(json.dumps(chat_lines(1)[0]) + "\r\n\n" + json.dumps(chat_lines(2)[1]))
    assert run("finetune", place.model, data, "-o", place.out, "--max-steps", 1).code == 0


def test_an_empty_output_directory_is_taken(place: Place, run: Run) -> None:
    place.out.mkdir()
    assert run("finetune", place.model, place.data, "-o", place.out, "--max-steps", 1).code == 0
    assert {path.name for path in place.out.iterdir()} == RESULT_FILES


def test_paths_are_shown_as_they_are(place: Place, run: Run) -> None:
    """Neither cut into lines of 80 characters nor read as markup."""
    out = place.tmp / ("[bold]" + "long" * 20)
    result = run("finetune", place.model, place.data, "-o", out, "--max-steps", 1)
    assert (result.code, result.err) == (0, "")
    assert f"talk to it: coserve chat {place.model} --adapter {out}\n" in result.out


# --- finetune: --resume ---


def test_resume_goes_on_from_the_newest_checkpoint(place: Place, run: Run) -> None:
    args = ("finetune", place.model, place.data, "-o", place.out, "--max-steps", 5, "--checkpoint-steps", 2, "--deterministic")
    assert run(*args).code == 0
    adapter, rows = (place.out / "adapter_model.safetensors").read_bytes(), losses(place.out)
    shutil.rmtree(place.out / "checkpoints" / "step-00000005")
    for name in RESULT_FILES - {"checkpoints", "job.json", "metrics.csv"}:
        (place.out / name).unlink()
    result = run(*args, "--resume")
    assert (result.code, result.err) == (0, "")
    assert "resumed after step 4 from step-00000004" in result.out
    assert re.findall(r"^step (\d+): ", result.out, re.M) == ["5"]
    assert (place.out / "adapter_model.safetensors").read_bytes() == adapter
    assert losses(place.out) == rows
    assert {path.name for path in place.out.iterdir()} == RESULT_FILES


@pytest.fixture
def started(place: Place, trained: Path) -> Place:
    """A copy of the trained run, to be resumed."""
    shutil.copytree(trained, place.out)
    return place


SAME = ("--max-steps", 6, "--batch-size", 6, "--learning-rate", 0.02, "--rank", 4, "--checkpoint-steps", 2)
OTHERS: dict[str, tuple[Callable[[Place], Sequence[object]], str]] = {
    "learning rate": (lambda p: (p.model, p.data, *SAME, "--learning-rate", 0.5), "settings.optimizer.learning_rate"),
    "rank": (lambda p: (p.model, p.data, *SAME, "--rank", 5), "settings.lora.r"),
    "steps": (lambda p: (p.model, p.data, *SAME, "--max-steps", 7), "settings.max_steps"),
    "data": (lambda p: (p.model, p.lines(*chat_lines(10)), *SAME), "data_digest"),
    "base": (lambda p: (build_tiny_directory(p.tmp / "base", seed=1), p.data, *SAME), "base_fingerprint"),
    "adapter": (lambda p: (p.model, p.data, *SAME, "--adapter", p.out), "start"),
}


@pytest.mark.parametrize("checkpoints", [True, False], ids=["with checkpoints", "before the first"])
@pytest.mark.parametrize(("args", "field"), OTHERS.values(), ids=OTHERS.keys())
def test_resume_refuses_another_job(
    started: Place, run: Run, args: Callable[[Place], Sequence[object]], field: str, checkpoints: bool
) -> None:
    if not checkpoints:
        shutil.rmtree(started.out / "checkpoints")
    before = contents(started.out)
    result = run("finetune", *args(started), "-o", started.out, "--resume")
    assert_one_line(result, rf"^error: resume: {re.escape(field)} has changed")
    assert contents(started.out) == before


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_resuming_a_finished_run_changes_nothing(started: Place, run: Run) -> None:
    before = contents(started.out)
    result = run("finetune", started.model, started.data, "-o", started.out, *SAME, "--resume")
    assert (result.code, result.err) == (0, "")
    after = contents(started.out)
    assert "loss.png" in after
    assert {**before, "loss.png": after["loss.png"]} == after


def test_resume_refuses_a_damaged_job_file(started: Place, run: Run) -> None:
    (started.out / "job.json").write_text('{"model": ')
    result = run("finetune", started.model, started.data, "-o", started.out, *SAME, "--resume")
    assert_one_line(result, r"^error: output: .*job\.json can't be read")


# --- finetune: bad input ---


def assert_one_line(result: Ran, message: str) -> None:
    assert result.code == 2
    (line,) = result.err.splitlines()
    assert line.startswith("error: ")
    assert re.search(message, line), line
    assert "Traceback" not in result.out + result.err


def assert_refused(result: Ran, place: Place, message: str) -> None:
    assert_one_line(result, message)
    assert not place.out.exists(), "the output directory is made only for a job that can run"
    assert not list(place.tmp.glob(".*")), "no temporary directory is left"


def chat_roles(*roles: str, **extra: Any) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": "Yes.", **extra} for role in roles]}


GOOD = chat_lines(1)[0]
BAD_DATA: dict[str, tuple[Callable[[Place], Path], str]] = {
    "broken JSON": (lambda p: p.file(json.dumps(GOOD) + "\n{'a': 1}\n"), r"bad\.jsonl, line 2: JSON: .*column 2"),
    "cut JSON": (lambda p: p.file("\n\n" + json.dumps(GOOD)[:-5]), r"bad\.jsonl, line 3: JSON"),
    "no object": (lambda p: p.file("[1, 2]\n"), r"bad\.jsonl, line 1: line: a JSON object is expected"),
    "empty": (lambda p: p.file(""), r"bad\.jsonl: the file is empty"),
    "blank": (lambda p: p.file("\n \n"), r"bad\.jsonl: the file is empty"),
    "missing": (lambda p: p.tmp / "none.jsonl", r"no such file: .*none\.jsonl"),
    "directory": (lambda p: p.tmp, r"no such file"),
    "no assistant turn": (lambda p: p.lines(GOOD, chat_roles("system", "user")), r"line 2: messages: no assistant message"),
    "no last assistant turn": (
        lambda p: p.lines(chat_roles("user", "assistant", "user")), r"line 1: messages\[2\]\.role: the last message"
    ),
    "no trained turn": (
        lambda p: p.lines({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]}),
        r"line 1: messages: no trained token",
    ),
    "unknown role": (lambda p: p.lines(chat_roles("user", "robot")), r'line 1: messages\[1\]\.role: "robot" is unknown'),
    "unknown key of a message": (
        lambda p: p.lines(chat_roles("user", "assistant", mood="glad")), r'line 1: messages\[0\]\."mood": unknown key'
    ),
    "no known key": (lambda p: p.lines({"question": "a", "answer": "b"}), r'line 1: keys: "question", "answer": no known'),
    "content is no text": (
        lambda p: p.lines({"messages": [{"role": "user", "content": 3}]}), r"line 1: messages\[0\]\.content: a string"
    ),
    "preference pairs": (lambda p: p.lines(*preference_lines(1)), r"line 1: .*objective dpo.*set the objective to dpo"),
    "too long": (
        lambda p: p.lines(GOOD, chat_line("Hi?", "well " * 700)), r"line 2: messages: \d+ tokens, more than max_length 512"
    ),
}


@pytest.mark.parametrize("role", ["training", "validation"])
@pytest.mark.parametrize(("data", "message"), BAD_DATA.values(), ids=BAD_DATA.keys())
def test_bad_data(place: Place, run: Run, data: Callable[[Place], Path], message: str, role: str) -> None:
    path = data(place)
    files = (path,) if role == "training" else (place.data, "--validation", path)
    assert_refused(run("finetune", place.model, *files, "-o", place.out), place, message)


def other_adapter(place: Place) -> Path:
    """An adapter of another base with the same shapes."""
    base = build_tiny_directory(place.tmp / "other", seed=1)
    config = config_of(None, {"max_steps": 1})
    return finetune(place.data, place.tmp / "other-adapter", model=str(base), config=config).directory


def only_pickles(place: Place) -> Path:
    directory = Path(shutil.copytree(place.model, place.tmp / "pickled"))
    torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()
    return directory


def without_tokenizer(place: Place) -> Path:
    return build_tiny_model("llama", place.tmp / "bare")


def too_many_tokens(place: Place) -> Path:
    """A model with fewer embeddings than the tokenizer has tokens."""
    return build_tiny_tokenizer(build_tiny_model("llama", place.tmp / "narrow"))


def truncated(place: Place) -> Path:
    directory = Path(shutil.copytree(place.model, place.tmp / "truncated"))
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    return directory


def toml(text: str) -> Callable[[Place], Sequence[object]]:
    return lambda place: ("--config", place.file(text, "settings.toml"))


def options(*args: object) -> Callable[[Place], Sequence[object]]:
    return lambda place: args


BAD_OPTIONS: dict[str, tuple[Callable[[Place], Sequence[object]], str]] = {
    "example longer than max_length": (
        options("--max-length", 20), r"line 1: messages: \d+ tokens, more than max_length 20.*too_long"
    ),
    "unknown target": (
        options("--target-modules", "q_proj,w_proj"), r"target_modules: .*'w_proj'.*q_proj, k_proj, .*down_proj"
    ),
    "no target": (options("--target-modules", ","), r"target_modules: name at least one"),
    "objective": (options("--objective", "ppo"), r"objective: must be sft or dpo, got 'ppo'"),
    "dpo on conversations": (options("--objective", "dpo"), r"line 1: messages: .*objective sft"),
    "schedule": (options("--schedule", "steps"), r"schedule: must be constant, linear or cosine, got 'steps'"),
    "too_long": (options("--too-long", "wrap"), r"too_long: must be error, drop or truncate"),
    "rank": (options("--rank", 0), r"r: rank must be at least 1"),
    "alpha": (options("--alpha", -1), r"alpha: must be positive"),
    "activation_memory": (options("--activation-memory", "lots"), r"activation_memory: write bytes \(.*12\.5GB.*got 'lots'"),
    "activation_memory that no plan meets": (
        options("--activation-memory", "2kB"), r"activation_memory: a micro-batch of \d+ tokens takes at least \d+ bytes"
    ),
    "kind": (options("--kind", "prefix"), r"kind: must be one of lora, dora, ia3, bottleneck, got 'prefix'"),
    "dropout": (options("--dropout", 1), r"dropout: must be in \[0, 1\)"),
    "epochs": (options("--epochs", 0), r"epochs: must be positive"),
    "epochs nan": (options("--epochs", "nan"), r"epochs: must be a finite number"),
    "max_steps": (options("--max-steps", 0), r"max_steps: must be at least 1"),
    "batch_size": (options("--batch-size", 0), r"batch_size: must be at least 1"),
    "learning_rate": (options("--learning-rate", "nan"), r"learning_rate: must be a finite number"),
    "max_length above a micro-batch": (
        options("--max-length", 300, "--max-microbatch-tokens", 200), r"max_length: 300 is more than 200.*max_microbatch_tokens"
    ),
    "max_length above the model": (options("--max-length", 513), r"max_length: 513 is more than 512"),
    "rank_pattern without value": (options("--rank-pattern", "q_proj"), r"rank_pattern: .*'q_proj'"),
    "rank_pattern without number": (options("--rank-pattern", "q_proj=two"), r"rank_pattern: .*'q_proj=two'"),
    "rank_pattern of zero": (options("--rank-pattern", "q_proj=0"), r"rank_pattern: rank of 'q_proj' must be a whole"),
    "alpha_pattern without number": (options("--alpha-pattern", "q_proj=x"), r"alpha_pattern: .*'q_proj=x'"),
    "device": (options("--device", "tpu"), r"device: must be auto, cpu or cuda, got 'tpu'"),
    "dtype": (options("--dtype", "int4"), r"dtype: must be auto or one of .*, got 'int4'"),
    "adapter of another base": (
        lambda p: ("--adapter", other_adapter(p)), r"adapter: .*other-adapter was trained on another base"
    ),
    "adapter that does not exist": (lambda p: ("--adapter", p.tmp / "nothing"), r"adapter: there is no directory .*nothing"),
    "adapter without config": (lambda p: ("--adapter", p.tmp), r"adapter: .* has no adapter_config\.json"),
    "nothing to resume": (options("--resume"), r"output: .* holds no job to resume"),
    "unknown setting": (toml("batchsize = 3"), r"batchsize: unknown setting.*batch_size"),
    "unknown LoRA setting": (toml("[lora]\nrank = 3"), r"rank: unknown setting of LoraConfig; here it is called r"),
    "unknown table": (toml("[lorra]\nr = 3"), r"lorra: unknown setting"),
    "a table that is none": (toml("lora = 3"), r"lora: .*table"),
    "a setting out of range": (toml("[optimizer]\nlearning_rate = -1"), r"learning_rate: must be positive"),
    "broken TOML": (toml("batch_size = "), r"config: .*settings\.toml can't be read as TOML"),
    "missing TOML": (lambda p: ("--config", p.tmp / "none.toml"), r"config: .*none\.toml can't be read"),
    "broken TOML and an option": (lambda p: ("--config", p.tmp / "none.toml", "--rank", 3), r"config: .*none\.toml"),
}


@pytest.mark.parametrize(("args", "message"), BAD_OPTIONS.values(), ids=BAD_OPTIONS.keys())
def test_bad_options(place: Place, run: Run, args: Callable[[Place], Sequence[object]], message: str) -> None:
    assert_refused(run("finetune", place.model, place.data, "-o", place.out, *args(place)), place, rf"^error: .*{message}")


BAD_MODELS: dict[str, tuple[Callable[[Place], object], str]] = {
    "no such directory": (lambda p: p.tmp / "nowhere", r"model .*nowhere: no such directory"),
    "no such name": (lambda p: "nowhere", r"model 'nowhere': no such directory"),
    "a file of another kind": (lambda p: p.file("x", "model.txt"), r"model\.txt is neither"),
    "an empty directory": (lambda p: p.tmp, r"config\.json"),
    "only pickled weights": (only_pickles, r"only pickled weights \(pytorch_model\.bin\)"),
    "truncated weights": (truncated, r"model\.safetensors is not a readable safetensors file"),
    "no tokenizer": (without_tokenizer, r"no tokenizer in .*bare"),
    "a tokenizer of another model": (too_many_tokens, r"model: .*narrow.*token \d+.*97"),
}


@pytest.mark.parametrize(("model", "message"), BAD_MODELS.values(), ids=BAD_MODELS.keys())
def test_bad_models(place: Place, run: Run, model: Callable[[Place], object], message: str) -> None:
    assert_refused(run("finetune", model(place), place.data, "-o", place.out), place, message)


def test_an_output_directory_that_exists_is_left_alone(place: Place, run: Run) -> None:
    place.out.mkdir()
    (place.out / "thesis.txt").write_text("mine")
    result = run("finetune", place.model, place.data, "-o", place.out)
    assert_one_line(result, rf"^error: output: {re.escape(str(place.out))} exists; .*--resume")
    assert contents(place.out) == {"thesis.txt": b"mine"}


def test_an_output_that_is_a_file_or_below_one(place: Place, run: Run) -> None:
    path = place.file("mine", "file")
    assert_one_line(run("finetune", place.model, place.data, "-o", path), r"^error: output: .*file exists")
    assert_one_line(run("finetune", place.model, place.data, "-o", path / "out", "--max-steps", 1), r"^error: .*file")
    assert path.read_text() == "mine"


def test_too_many_arguments(place: Place, run: Run) -> None:
    assert_refused(run("finetune", place.model, place.data, place.data, "-o", place.out), place, r"^error: data: .*3 arguments")


def test_cuda_without_a_device(place: Place, run: Run) -> None:
    result = run("finetune", place.model, place.data, "-o", place.out, "--device", "cuda")
    assert_refused(result, place, r"^error: device: no CUDA device was found; use --device cpu")


@pytest.mark.parametrize("loaded", [False, True])
def test_too_little_memory(place: Place, run: Run, monkeypatch: pytest.MonkeyPatch, loaded: bool) -> None:
    model = load_model(str(place.model)) if loaded else None
    monkeypatch.setattr(finetuning_engine, "available_bytes", lambda device: 3 << 10)
    if model is not None:
        with pytest.raises(CapacityError, match=r"not enough memory: .* max_microbatch_tokens"):
            finetune(place.data, place.out, model=model)
        assert not place.out.exists()
        return
    result = run("finetune", place.model, place.data, "-o", place.out)
    numbers = rf"not enough memory: \d+\.\d\d GiB are needed \(weights .*\) and {(3 << 10) / GIB:.2f} GiB are available"
    assert_refused(result, place, rf"^error: {numbers}.*max_microbatch_tokens")


def test_a_loss_that_explodes_fails_the_job_in_one_line(place: Place, run: Run) -> None:
    result = run(
        "finetune", place.model, place.data, "-o", place.out, "--learning-rate", 1e9, "--max-grad-norm", 0, "--max-steps", 20,
        "--dtype", "float32",
    )
    assert_one_line(result, r"^error: the (loss|gradient's norm) is (nan|inf) at step \d+; a lower learning rate may help")
    assert not (place.out / "adapter_model.safetensors").exists()


# --- plan ---


def test_plan_counts_what_is_kept(place: Place, run: Run) -> None:
    only_config = place.tmp / "config"
    only_config.mkdir()
    shutil.copy(place.model / "config.json", only_config)
    result = run("plan", only_config, "--rank", 4, "--target-modules", "q_proj,v_proj", "--dtype", "bfloat16")
    assert (result.code, result.err) == (0, "")
    arch = read_architecture(place.model)
    lora = config_of(None, {"rank": 4, "target_modules": ["q_proj", "v_proj"]}).lora
    plan = training_plans(arch, shape_adapter(arch, lora), itemsize=2).plan()
    assert f"whole model: {plan.arena_bytes} bytes kept per token" in result.out
    assert f"{plan.work_bytes} bytes of workspace per row" in result.out
    assert "kept value" in result.out
    wider = run("plan", only_config, "--rank", 4, "--dtype", "float32")
    assert int(re.findall(r"whole model: (\d+)", wider.out)[0]) > plan.arena_bytes


@pytest.mark.parametrize(("args", "message"), [
    (("--adapter", "vera"), r"^error: adapter: must be one of lora, dora, ia3, bottleneck, got 'vera'"),
    (("--adapter", "ia3", "--rank", 4), r"^error: rank: ia3 adapters have no such setting; they have target_modules"),
    (("--adapter", "dora", "--dropout", 0.1), r"^error: dropout: must be 0 for DoRA"),
    (("--dtype", "int8"), r"^error: dtype: must be"), (("--rank", 0), r"^error: r: rank"),
    (("--target-modules", "w_proj"), r"^error: target_modules: .*w_proj"), (("--dropout", 2), r"^error: dropout: must be"),
])
def test_bad_plans(place: Place, run: Run, args: tuple[object, ...], message: str) -> None:
    assert_one_line(run("plan", place.model, *args), message)


@pytest.mark.parametrize(("kind", "args", "kept"), [
    ("ia3", (), "ia3_out"), ("dora", ("--rank", 4), "dora"), ("bottleneck", ("--rank", 4), "relu"),
])
def test_plan_of_other_kinds(place: Place, run: Run, kind: str, args: tuple[object, ...], kept: str) -> None:
    result = run("plan", place.model, "--adapter", kind, *args)
    assert (result.code, result.err) == (0, "")
    assert kept in result.out


def test_plan_of_a_model_that_does_not_exist(place: Place, run: Run) -> None:
    assert_one_line(run("plan", place.tmp / "nowhere"), r"^error: model .*nowhere")


# --- chat ---


def reply(place: Place, messages: list[dict[str, str]], adapter: Path | None = None, **sampling: Any) -> str:
    model = load_model(str(place.model))
    generator = Generator(model, None if adapter is None else model.load_adapter(adapter))
    settings = SamplingConfig(**{"max_tokens": 6, "temperature": 0.0, **sampling})
    (tokens,) = generator.generate([model.tokenizer.encode_chat(messages)], settings)
    return model.tokenizer.decode(tokens)


def test_chat_from_a_pipe_keeps_the_conversation(place: Place, run: Run, trained: Path) -> None:
    for adapter, system in ((None, None), (trained, None), (None, "Be brief.")):
        args = [] if adapter is None else ["--adapter", adapter]
        args += [] if system is None else ["--system", system]
        result = run("chat", place.model, "--max-tokens", 6, *args, stdin="Where is the mill?\n\n  \nAnd the bridge?\n")
        assert (result.code, result.err) == (0, "")
        messages = [{"role": "system", "content": system}] if system else []
        expected = ""
        for question in ("Where is the mill?", "And the bridge?"):
            messages.append({"role": "user", "content": question})
            answer = reply(place, messages, adapter)
            messages.append({"role": "assistant", "content": answer})
            expected += answer + "\n"
        assert result.out == expected


def test_the_adapter_changes_the_answer(place: Place, trained: Path) -> None:
    question = [{"role": "user", "content": "Where is the mill?"}]
    assert reply(place, question) != reply(place, question, trained)


def test_sampling_options_reach_the_sampler(place: Place, run: Run) -> None:
    question = [{"role": "user", "content": "Hi"}]
    chosen = {"temperature": 3.0, "top_p": 0.9, "seed": 11}
    args = [part for name, value in chosen.items() for part in ("--" + name.replace("_", "-"), value)]
    result = run("chat", place.model, "--max-tokens", 6, *args, stdin="Hi\n")
    assert result.out == reply(place, question, **chosen) + "\n"
    assert result.out != reply(place, question) + "\n"


def test_chat_shows_text_as_the_model_wrote_it(place: Place, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "a\tb [bold]x[/bold] :warning: [/] " + "word " * 40 + "\x08é🙂"

    def generate(self: Generator, prompts: Any, sampling: Any, *, on_token: Callable[[int, int], None]) -> None:
        for token in self.model.tokenizer.encode(text):
            on_token(0, token)

    monkeypatch.setattr(Generator, "generate", generate)
    assert run("chat", place.model, stdin="Hi\n").out == text + "\n"


def test_a_conversation_that_grew_too_long_starts_again(place: Place, run: Run) -> None:
    result = run("chat", place.model, "--max-tokens", 6, stdin=f"{'word ' * 500}\nHi\n")
    assert (result.code, result.err) == (0, "")
    assert "exceed the model's 512" in " ".join(result.out.split())
    assert result.out.endswith(reply(place, [{"role": "user", "content": "Hi"}]) + "\n")


@pytest.mark.parametrize(("args", "message"), [
    (("--temperature", -1), r"^error: temperature: must be 0 or more"), (("--top-p", 0), r"^error: top_p: must be in"),
    (("--max-tokens", 0), r"^error: max_tokens: must be at least 1"),
    (("--adapter", "/nowhere/a"), r"^error: adapter: there is no directory a$"),
    (("--device", "tpu"), r"^error: device: must be"),
])
def test_bad_chats(place: Place, run: Run, args: tuple[object, ...], message: str) -> None:
    assert_one_line(run("chat", place.model, *args, stdin="Hi\n"), message)


# --- demo ---


def test_demo_never_deletes_a_strangers_directory(place: Place, run: Run) -> None:
    place.out.mkdir()
    (place.out / "thesis.txt").write_text("mine")
    assert_one_line(run("demo", "-o", place.out), r"^error: output: .* holds no earlier demo")
    assert contents(place.out) == {"thesis.txt": b"mine"}


# --- finetune: settings files and defaults ---


FLAT = (
    'max-steps = 2\nlearning_rate = 0.003\nrank = 3\nalpha = 5\ntarget_modules = "q_proj,v_proj"\nschedule = "cosine"\n'
    'rank_pattern = "q_proj=2"\nseed = 4\n'
)


def test_a_settings_file_takes_the_flags_names_at_the_top_level(place: Place, run: Run) -> None:
    held_out = place.lines(*chat_lines(2), name="held_out.jsonl")
    toml = place.file(f'{FLAT}validation = "{held_out}"\ndtype = "float64"\nkind = "lora"\n', "flat.toml")
    result = run("finetune", place.model, place.data, "-o", place.out, "--config", toml, "--alpha", 7)
    assert (result.code, result.err) == (0, "")
    settings = settings_of(place.out)
    assert (settings["max_steps"], settings["seed"]) == (2, 4)
    assert (settings["optimizer"]["learning_rate"], settings["optimizer"]["schedule"]) == (0.003, "cosine")
    assert (settings["lora"]["r"], settings["lora"]["alpha"]) == (3, 7)
    assert (settings["lora"]["target_modules"], settings["lora"]["rank_pattern"]) == (["q_proj", "v_proj"], {"q_proj": 2})
    assert "validation loss" in result.out


@pytest.mark.parametrize(("text", "message"), [
    ("rank = 3\n[lora]\nr = 4", r"rank: is 3 at the top level of .* and 4 in its table; leave one out"),
    ("learning_rate = 1e-3\n[optimizer]\nlearning_rate = 1e-4", r"learning_rate: is 0\.001 at the top level"),
    ("max_steps = 1\nmax-steps = 2", r"max_steps: is given twice"),
    ('kind = "ia3"\nrank = 4', r"rank: ia3 adapters have no such setting, lora do"),
    ('kind = "ia3"\n[lora]\nr = 4', r"kind: it is ia3, but the settings file has a table \[lora\]"),
    ("[ia3]\n[lora]\nr = 16", r"lora: the settings file has a table \[ia3\] too"),
    ('kind = ["lora"]', r"kind: must be one of"), ("validation = 3", r"validation: must be a text"),
    ('resume = "yes"', r"resume: must be true or false"), ('output = "x"', r"output: give it on the command line"),
    ("[optimizer]\nrank = 3", r"rank: unknown setting of OptimizerConfig; it belongs in lora; "),
    ("[lora]\nlearning_rate = 3", r"learning_rate: unknown setting of LoraConfig; it belongs in optimizer; "),
    ("[lora]\nbatch_size = 3", r"batch_size: unknown setting of LoraConfig; it belongs at the top level; "),
    ("batch_siez = 3", r"batch_siez: unknown setting of FinetuneConfig; did you mean batch_size\? "),
])
def test_bad_settings_files(place: Place, run: Run, text: str, message: str) -> None:
    toml = place.file(text, "settings.toml")
    assert_refused(run("finetune", place.model, place.data, "-o", place.out, "--config", toml), place, rf"^error: {message}")


def test_the_same_value_twice_in_a_settings_file_is_fine(place: Place) -> None:
    config = config_of(place.file("rank = 4\n[lora]\nr = 4\n", "settings.toml"), {})
    assert config.lora == LoraConfig(r=4)


def test_defaults_come_from_the_data_and_are_shown(place: Place, run: Run) -> None:
    data = place.lines(*chat_lines(2), name="two.jsonl")
    result = run("finetune", place.model, data, "-o", place.out, "--max-steps", 1)
    assert (result.code, result.err) == (0, "")
    assert "1 steps (max_steps, batch_size 1), learning_rate 0.002 (linear), checkpoint_steps 2; lora of rank 16" in result.out
    assert settings_of(place.out)["epochs"] == 25


@pytest.mark.parametrize(("flags", "expected"), [
    ((), None), (("--rank", 4), None), (("--kind", "lora"), None), (("--dropout", 0), None),
    (("--rank", 16), "rank 16 (it has 4)"), (("--kind", "ia3"), "kind ia3 (it is lora)"),
])
def test_only_flags_that_were_given_are_said_to_be_unused(
    place: Place, run: Run, trained: Path, flags: tuple[object, ...], expected: str | None
) -> None:
    result = run("finetune", place.model, place.data, "-o", place.out, "--adapter", trained, "--max-steps", 1, *flags)
    assert (result.code, result.err) == (0, "")
    found = re.findall(r"not used: (.*)$", result.out, re.M)
    assert found == ([] if expected is None else [expected])
