"""docs/serving.md: its server is started as it stands, asked as it says, and ended; every other command is one."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from looktwice.asking.answer import answer_of
from looktwice.cli import main
from looktwice.config import ServeConfig
from looktwice.rollout.trajectory import Trajectory
from looktwice.server import running
from looktwice.server.schema import ChatRequest, Looking

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^looktwice serve .*", TEXT, re.MULTILINE)
CURLS = re.findall(r"^curl .*", TEXT, re.MULTILINE)
PYTHON = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Where the first server of the page listens; it ends well after SIGTERM."""
    words = shlex.split(COMMANDS[0].replace("8000", "0"))
    command = [sys.executable, "-m", "looktwice", *words[1:], "--device", "cpu", "--batch_size", "2"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        lines: list[str] = []
        for line in server.stderr:
            lines.append(line)
            if line.startswith("http://"):
                break
        where = lines[-1].strip().removeprefix("http://")
        rest = threading.Thread(target=lambda: lines.extend(server.stderr or ()))
        rest.start()
        try:
            yield where
            server.send_signal(signal.SIGTERM)
            assert server.wait(20) == 0
        finally:
            server.kill()
            rest.join(5)
    assert "Traceback" not in "".join(lines) and any(" 200 " in line for line in lines)


def test_the_python_lines_run_as_they_stand(
    address: str, image: Image.Image, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]
) -> None:
    image.save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    asking, helper = PYTHON
    names: dict[str, object] = {}
    for block in (helper, asking.replace("localhost:8000", address)):
        exec(block, names)
    told = capsys.readouterr().out.splitlines()
    assert any(line in ('"3"', '"4"', '"none"') for line in told) and told[-1]


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_each_curl_gets_an_answer(address: str) -> None:
    assert len(CURLS) > 5
    for command in CURLS:
        words = shlex.split(command.replace("localhost:8000", address))
        told = subprocess.run(words, capture_output=True, text=True, timeout=60, check=True).stdout
        if "stream" in command:
            assert told.rstrip().endswith("data: [DONE]")
        elif "metrics" in command:
            assert "looktwice_requests_total" in told
        else:
            assert "error" not in json.loads(told) or "lora" in command


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_is_understood(command: str, monkeypatch, tmp_path: Path) -> None:
    for name in ("pictures", "outputs"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    heard: list[ServeConfig] = []
    monkeypatch.setattr(running, "serve", heard.append)
    monkeypatch.setattr("looktwice.cli.serve.locate", lambda name: name)
    assert main(shlex.split(command)[1:]) == 0
    [config] = heard
    given = {word.removeprefix("--") for word in shlex.split(command) if word.startswith("--")}
    assert given <= config.model_fields_set | {"adapters"}


def test_every_field_of_ours_and_every_key_of_a_trace_is_in_a_table() -> None:
    tables = " ".join(line for line in TEXT.splitlines() if line.startswith("|"))
    names = {*re.findall(r"`(\w+)`", tables)}
    own = {"crops", "max_crops", "crop_images", "thinking", "thinking_budget", "min_pixels", "max_pixels"}
    own |= {"return_token_ids", "max_seconds", "top_k", "min_p", "repetition_penalty"}
    assert own <= Looking.model_fields.keys() & names
    assert {*answer_of(Trajectory(prompt_ids=[]))} <= names
    written = {*re.findall(r"`([a-z_]+)[.`]", TEXT)}
    asked = {name for name, field in ChatRequest.model_fields.items() if field.description is None}
    assert asked <= written


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_the_unit_is_one(tmp_path: Path) -> None:
    text = (ROOT / "deploy" / "looktwice.service").read_text(encoding="utf-8")
    unit = tmp_path / "looktwice.service"
    # the program is not where the unit has it, but everything else is judged
    unit.write_text(re.sub(r"^ExecStart=\S+", f"ExecStart={sys.executable}", text, flags=re.MULTILINE))
    told = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, timeout=60)
    assert told.returncode == 0 and not told.stderr.strip(), told.stderr


def test_the_image_runs_a_command_that_is_understood(monkeypatch) -> None:
    text = (ROOT / "deploy" / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    steps = [line.split(maxsplit=1) for line in text.splitlines() if line.strip() and not line.startswith("#")]
    assert {step for step, _ in steps} <= {
        "FROM", "WORKDIR", "COPY", "RUN", "ENV", "USER", "EXPOSE", "HEALTHCHECK", "STOPSIGNAL", "ENTRYPOINT", "CMD"
    }  # fmt: skip
    for step, rest in steps:
        if step == "COPY" and not rest.startswith("--from"):
            assert all((ROOT / source).exists() for source in rest.split()[:-1])
    last = {step: rest for step, rest in steps}
    assert last["USER"] == "looktwice" and last["STOPSIGNAL"] == "SIGTERM"
    heard: list[ServeConfig] = []
    monkeypatch.setattr(running, "serve", heard.append)
    monkeypatch.setattr("looktwice.cli.serve.locate", lambda name: name)
    assert main([*json.loads(last["ENTRYPOINT"])[1:], *json.loads(last["CMD"])]) == 0
    assert heard[0].host == "0.0.0.0" and heard[0].api_key_file is not None
