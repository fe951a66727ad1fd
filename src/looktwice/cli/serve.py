"""`looktwice serve`: a model behind OpenAI's HTTP API, crops and thinking included."""

from __future__ import annotations

from collections.abc import Sequence

from looktwice.cli.arguments import argument, read_command
from looktwice.cli.ask import THINKING
from looktwice.config import ServeConfig
from looktwice.errors import ConfigError
from looktwice.model.location import locate


def run(words: Sequence[str]) -> None:
    """Serve a model over HTTP: looktwice serve outputs/grpo/final_model --port 8000."""
    given, config = read_command(
        run,
        "serve",
        "MODEL",
        words,
        ServeConfig,
        argument("model", nargs="?", help="model folder or hub name; `tiny` is the built-in small model"),
        THINKING,
    )
    if given["model"]:
        if "model_path" in config.model_fields_set:
            raise ConfigError("the model is given twice, with --model_path and without; leave one out")
        config = ServeConfig(**{**config.model_dump(exclude_unset=True), "model_path": given["model"]})
    locate(config.model_path)
    for flag, folder in (("--image_folder", config.image_folder), ("--adapter_folder", config.adapter_folder)):
        if folder is not None and not folder.is_dir():
            raise ConfigError(f"{flag} {folder}: no such folder")
    try:
        from looktwice.server.running import serve
    except ImportError as error:
        raise ConfigError(f"{error.name} is not installed; pip install 'looktwice[serve]'") from error
    serve(config)
