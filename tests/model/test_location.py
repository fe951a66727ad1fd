"""Model names: folders, the small model, and names of the hub, told at once where they cannot be had."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest
from huggingface_hub import constants

from looktwice.errors import CheckpointError, short
from looktwice.model import location
from looktwice.model.location import TINY_FOLDER, check_hub, locate, reach

NOBODY = "http://127.0.0.1:9"
"""Where nothing listens."""


@pytest.fixture(autouse=True)
def nothing_reached(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A hub that cannot be reached, and an empty cache."""
    reach.cache_clear()
    monkeypatch.setattr(constants, "ENDPOINT", NOBODY)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def server() -> Iterator[str]:
    """The address of a hub that knows nothing, but is there."""

    class Nothing(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(404)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    hub = HTTPServer(("127.0.0.1", 0), Nothing)
    Thread(target=hub.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{hub.server_port}"
    hub.shutdown()
    hub.server_close()


def refusal(name: str) -> str:
    with pytest.raises(CheckpointError) as caught:
        locate(name)
    return str(caught.value)


def test_a_folder_and_the_small_model_are_found(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert locate(str(model_folder)) == str(model_folder)
    assert locate("tiny") == str(TINY_FOLDER)
    monkeypatch.setenv("HOME", str(model_folder.parent))
    assert locate(f"~/{model_folder.name}") == str(model_folder)


def test_a_hub_that_cannot_be_reached_is_told_at_once() -> None:
    start = time.monotonic()
    message = refusal("someone/model")
    assert message.startswith("someone/model: no such model folder, no config.json in the hub's cache, and ")
    assert f"and {NOBODY} cannot be reached (" in message and message.endswith("; give a model folder, or tiny")
    assert time.monotonic() - start < location.CONNECT_SECONDS


def test_a_hub_that_is_silent_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr(location, "CONNECT_SECONDS", 0.2)
        assert " cannot be reached (" in refusal("someone/model")


def test_offline_nothing_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "in the hub's cache, and HF_HUB_OFFLINE is set; give a model folder" in refusal("someone/model")


def test_a_hub_that_answers_is_left_to_its_client(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", server)
    assert locate("someone/model") == "someone/model"
    check_hub("someone/model", ("model.safetensors",))


def test_what_is_in_the_cache_needs_no_hub(tmp_path: Path) -> None:
    repository = tmp_path / "cache" / "models--someone--model"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    assert locate("someone/model") == "someone/model"
    with pytest.raises(CheckpointError, match=r"no model\.safetensors in the hub's cache"):
        check_hub("someone/model", ("model.safetensors",))


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("some one/model", "some one/model: no such model folder, and no hub name; check the spelling"),
        ("./none", "./none: no such model folder; give a folder"),
        ("none", "none: no such model folder; give a folder"),
        ("x" * 5000, f"{short('x' * 5000)}: no such model folder; give a folder"),
    ],
)
def test_a_name_of_nothing_is_told(name: str, problem: str) -> None:
    assert refusal(name).startswith(problem)


@pytest.mark.parametrize("settings", [{"HF_ENDPOINT": NOBODY}, {"HTTPS_PROXY": NOBODY}, {"HF_HUB_OFFLINE": "1"}])
def test_the_command_tells_it_before_torch_is_imported(settings: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").touch()
    code = (
        "import sys\n"
        "from looktwice.cli import main\n"
        "assert main(['data', 'show', 'd.jsonl']) == 1\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)\n"
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path), **settings}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0 and done.stderr.startswith(
        "looktwice: AIDC-AI/Ovis2.5-9B: no such model folder, no conf"
    )


def test_a_file_is_told_from_a_folder_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(CheckpointError, match="no such model folder, but a file; name the folder that it lies in"):
        locate(str(tmp_path / "model.safetensors"))


def test_the_folder_of_a_run_names_the_model_in_it(tmp_path: Path) -> None:
    (tmp_path / "final_model").mkdir()
    with pytest.raises(CheckpointError, match=r"no weights .* in this folder; name .*/final_model$"):
        locate(str(tmp_path))
