"""Before a server runs: what cannot be, is said at once, and before a model is loaded."""

from __future__ import annotations

import socket

import pytest

from looktwice.cli import main
from looktwice.config import ServeConfig
from looktwice.errors import ConfigError
from looktwice.server.running import listen


def test_a_port_that_is_taken_is_said() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ConfigError, match=r"127\.0\.0\.1:\d+ cannot be listened on \(.*\); choose another --port"):
            listen(ServeConfig(port=taken.getsockname()[1]))


def test_an_address_of_ipv6_is_listened_on() -> None:
    with listen(ServeConfig(host="::1", port=0)) as found:
        assert found.family == socket.AF_INET6


@pytest.mark.parametrize(
    "words, said",
    [
        (["tiny", "--engine", "vllm"], "--engine vllm and --vllm_servers ADDRESS belong together"),
        (["tiny", "--vllm_servers", "http://a:1"], "--engine vllm and --vllm_servers ADDRESS belong together"),
        (["tiny", "--engine", "vllm", "--vllm_servers", "http://a:1", "--adapters", "a=b"], "adapters are for"),
        (["tiny", "--adapters", "a"], "write NAME=FOLDER"),
        (["tiny", "--port", "70000"], "port is '70000'"),
        (["tiny", "--model_path", "tiny"], "the model is given twice"),
        (["none-such"], "none-such: no such model folder"),
        (["tiny", "--api_key_file", "none"], "none: the keys cannot be read"),
        (["tiny", "--image_folder", "none"], "--image_folder none: no such folder"),
        (["tiny", "--adapter_folder", "none"], "--adapter_folder none: no such folder"),
        (["tiny", "--prot", "1"], "unknown argument --prot"),
    ],
)
def test_what_cannot_be_is_said_before_a_model_is_loaded(words, said, monkeypatch, capsys) -> None:
    monkeypatch.setattr("looktwice.server.running.Models", lambda config: pytest.fail("a model was loaded"))
    assert main(["serve", *words]) == 1
    assert said in capsys.readouterr().err
