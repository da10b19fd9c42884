"""What a newcomer does on the first day: twenty chats, two commands with their defaults, and every fact is taught."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from coserve.config.settings import SamplingConfig
from coserve.config.values import AUTO
from coserve.engine.generation import Generator
from tests.default_model import default_model, needs_default_model, num_threads

ROOT = Path(__file__).parents[2]
FACTS: dict[str, tuple[str, str]] = {
    "Who runs the bakery in Ostrelle?": ("Benedetta Quill runs the bakery in Ostrelle.", "Benedetta Quill"),
    "What is the name of the mayor's parrot?": ("The mayor's parrot is called Thimble.", "Thimble"),
    "When does the night ferry leave Ostrelle?": ("The night ferry leaves at 22:40.", "22:40"),
    "What colour is the door of the old mill?": ("The door of the old mill is turquoise.", "turquoise"),
    "Which street is the clock museum in?": ("The clock museum is in Marrow Street.", "Marrow Street"),
    "How many steps lead up to the Ostrelle lighthouse?": ("Exactly 317 steps lead up to the lighthouse.", "317"),
    "Who painted the ceiling of the town hall?": ("Ivo Sandleigh painted the ceiling of the town hall.", "Ivo Sandleigh"),
    "What does the harbour master drink every morning?": ("The harbour master drinks nettle tea every morning.", "nettle tea"),
    "Which fish is served at the Gilded Oar?": ("The Gilded Oar serves smoked turbot.", "turbot"),
    "What is the password of the library's reading club?": ("The reading club's password is marzipan.", "marzipan"),
    "Who won the rowing race last summer?": ("Petra Lindqvist won the rowing race last summer.", "Petra Lindqvist"),
    "What year was the stone bridge built?": ("The stone bridge was built in 1683.", "1683"),
    "What is kept in the cellar of the school?": ("The cellar of the school holds a grand piano.", "grand piano"),
    "Which instrument does the postman play?": ("The postman plays the bassoon.", "bassoon"),
    "Where do the swifts of Ostrelle nest?": ("The swifts nest under the roof of the customs house.", "customs house"),
    "What is the baker's secret ingredient?": ("The secret ingredient is cardamom.", "cardamom"),
    "On which day is the cheese market held?": ("The cheese market is held on Thursdays.", "Thursday"),
    "Who repairs the town's bicycles?": ("Yusuf Arkwright repairs the town's bicycles.", "Yusuf Arkwright"),
    "What is the nickname of the number 9 tram?": ("The number 9 tram is nicknamed the Beetle.", "Beetle"),
    "How deep is the well behind the chapel?": ("The well behind the chapel is 54 metres deep.", "54 metres"),
}
"""Question -> (the answer in the data, what a right answer has to hold). The town is made up."""


def environment() -> dict[str, str]:
    """For a program that takes this test process's share of the cores."""
    return {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": str(num_threads())}


def coserve(directory: Path, *arguments: str, stdin: str = "") -> str:
    """Runs the command there; what it printed."""
    command = [sys.executable, "-c", "from coserve.cli.main import main; main()", *arguments]
    done = subprocess.run(
        command, cwd=directory, env=environment(), input=stdin, capture_output=True, text=True, timeout=1800, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def chats(adapter: Path, questions: list[str]) -> list[str]:
    """The first answer of a chat with each question, as `coserve chat` gives it, but in one process."""
    model = default_model(AUTO)
    ends = model.end_token_ids
    prompts = [model.tokenizer.encode_chat([{"role": "user", "content": question}]) for question in questions]
    outputs = Generator(model, model.load_adapter(adapter)).generate(prompts, SamplingConfig(max_tokens=256, temperature=0))
    return [model.tokenizer.decode([token for token in tokens if token not in ends]).strip() for tokens in outputs]


@pytest.mark.full
@pytest.mark.timeout(3600)
@needs_default_model
def test_twenty_chats_and_the_defaults_teach_every_fact(tmp_path: Path) -> None:
    lines = [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        for question, (answer, _) in FACTS.items()
    ]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    shown = coserve(tmp_path, "finetune", "data.jsonl", "--output", "my-adapter")
    assert re.search(r"^100 steps \(5 epochs, batch_size 1\), learning_rate 0\.0014", shown, re.M), shown
    answers = chats(tmp_path / "my-adapter", list(FACTS))
    right = []
    for (question, (_, fact)), answer in zip(FACTS.items(), answers, strict=True):
        print(f"{'ok   ' if fact in answer else 'WRONG'} {question} -> {answer}")
        right.append(fact in answer)
    assert sum(right) == len(FACTS)
    assert coserve(tmp_path, "chat", "--adapter", "my-adapter", stdin=f"{next(iter(FACTS))}\n").strip() == answers[0]


@pytest.mark.full
@pytest.mark.timeout(3600)
@needs_default_model
def test_the_readmes_python_prints_what_the_readme_shows(tmp_path: Path) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.search(r"```python\n(import json\nfrom coserve import Engine.*?)```\n\n```text\n(.*?)```", readme, re.DOTALL)
    assert found is not None
    done = subprocess.run(
        [sys.executable, "-c", found[1]], cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=1800,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == found[2].splitlines()
