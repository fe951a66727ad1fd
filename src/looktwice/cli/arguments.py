"""Arguments of the command line: flags derived from the config classes, and what all verbs do alike."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin

from looktwice.config import Config, bare_value, flag_of, takes_several
from looktwice.errors import ConfigError, nearest, short
from looktwice.other_trainers import called_here
from looktwice.paths import write_result

Command = Callable[[Sequence[str]], int | None]
"""Gives its exit code, None for 0."""
Argument = tuple[tuple[str, ...], dict[str, Any]]
"""Names and options of an argument that no config field stands for, as `add_argument` takes them."""
AnyConfig = TypeVar("AnyConfig", bound=Config)
TRUTH = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
"""Words that may stand behind a switch."""


class Parser(argparse.ArgumentParser):
    """Raises ConfigError instead of leaving; an unknown flag names the nearest one."""

    def __init__(self, program: str, **options: Any) -> None:
        super().__init__(program, epilog="Of a flag that is given twice the last one holds.", **options)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see {self.prog} --help")

    def _print_message(self, message: str, file: Any = None) -> None:
        print(message, end="", file=file)  # argparse's own says nothing when it cannot

    def parse_strictly(self, arguments: Sequence[str]) -> dict[str, Any]:
        """The flags that were given; `--verify-with` is read as `--verify_with`."""
        end = [*arguments, "--"].index("--")  # behind it are no flags
        flags = self._with_switches([_with_underscores(argument) for argument in arguments[:end]])
        written = [*flags, *arguments[end:]]
        known, unknown = self.parse_known_args(written)
        if unknown:
            # a word without a dash may be the value of an unknown flag
            words = [word for word in unknown if word.startswith("-")] or unknown[:1]
            raise ConfigError(*map(self._unknown, words))
        return vars(known)

    def _unknown(self, word: str) -> str:
        name = word.split("=")[0]
        flags = [flag for action in self._actions for flag in action.option_strings]
        hint = called_here(name, flags) or nearest(name, flags) or f" See {self.prog} --help."
        return f"unknown argument {short(name)}.{hint}"

    def _with_switches(self, words: Sequence[str]) -> list[str]:
        """`--bf16 true` and `--bf16=false`, as other trainers write switches, as `--bf16` and `--no-bf16`."""
        switches = {
            flag
            for action in self._actions
            if isinstance(action, argparse.BooleanOptionalAction)
            for flag in action.option_strings
        }
        written: list[str] = []
        for word in words:
            flag, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
            if not flag and written and written[-1] in switches and value.lower() in TRUTH:
                flag = written.pop()
            if flag in switches and (equals or value):
                if value.lower() not in TRUTH:
                    raise ConfigError(f"{flag} is {value!r}; write {flag} or {_opposite(flag)}")
                word = flag if TRUTH[value.lower()] else _opposite(flag)
            written.append(word)
        return written


def _opposite(switch: str) -> str:
    name = switch.removeprefix("--")
    return f"--{name.removeprefix('no-')}" if name.startswith("no-") else f"--no-{name}"


def _with_underscores(argument: str) -> str:
    if not argument.startswith("--"):
        return argument
    flag, equals, value = argument.partition("=")
    start = "--no-" if flag.startswith("--no-") else "--"
    return f"{start}{flag.removeprefix(start).replace('-', '_')}{equals}{value}"


def run_one(program: str, commands: Mapping[str, Command], arguments: Sequence[str], *, also: str = "") -> int:
    """Run the command that the first argument names, or say which there are, and give its exit code."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"usage: {program} {{{','.join(commands)}}} [--help] ...{also}\n")
        width = max(map(len, commands))
        for name, command in commands.items():
            print(f"  {name:{width}} {(command.__doc__ or '').splitlines()[0]}")
        return 0
    if arguments[0] not in commands:
        hint = nearest(arguments[0], commands) or f" There are {', '.join(commands)}."
        raise ConfigError(f'unknown command "{arguments[0]}".{hint}')
    return commands[arguments[0]](arguments[1:]) or 0


def argument(*names: str, **options: Any) -> Argument:
    return names, options


MODEL = argument("--model", dest="model_name", default=argparse.SUPPRESS, help="short for --model_name")


def read_command(
    command: Command, name: str, arguments: str, words: Sequence[str], config_class: type[AnyConfig], *own: Argument
) -> tuple[dict[str, Any], AnyConfig]:
    """The arguments of a command that are its own, and the settings its flags make.

    `name` is what stands after `looktwice`, `arguments` its positional ones as the usage shows them.
    """
    program = f"looktwice {name}"
    parser = Parser(
        program,
        usage=" ".join(filter(None, [program, arguments, "[options]"])),
        description=command.__doc__,
        allow_abbrev=False,
    )
    for names, options in own:
        parser.add_argument(*names, **options)
    add_flags(parser, config_class, list(config_class.model_fields))
    given = parser.parse_strictly(words)
    fields = {flag_of(config_class, name): name for name in config_class.model_fields}
    settings = {fields[flag]: given.pop(flag) for flag in fields if flag in given}
    return given, config_class(**settings)


def add_flags(
    parser: argparse.ArgumentParser,
    config_class: type[Config],
    names: Sequence[str],
    *,
    prefix: str = "",
    title: str | None = None,
) -> None:
    """One flag a field; only flags that are given appear in the parsed values. The title is by default the class's."""
    group = parser.add_argument_group(title or (config_class.__doc__ or "").splitlines()[0].removesuffix("."))
    for name in names:
        field = config_class.model_fields[name]
        words = ",".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
        default = "" if words in (None, "", {}) else f" ({words})"
        help_text = f"{field.description}{default}".replace("%", "%%")
        flag = f"--{prefix}{flag_of(config_class, name)}"
        if field.annotation in (bool, bool | None):
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=help_text)
        else:
            kinds = _kinds_of(field.annotation)
            choices = [kind for kind in kinds if isinstance(kind, str)]
            metavar = "N" if {int, float} & {*kinds} else name.upper().split("_")[-1]
            metavar = "{" + ",".join(choices) + "}" if choices else metavar
            options: dict[str, Any] = {"default": argparse.SUPPRESS, "metavar": metavar, "help": help_text}
            if bare := bare_value(config_class, name):
                group.add_argument(flag, f"--{prefix}{name}", nargs="?", const=bare, **options)
            else:
                group.add_argument(flag, nargs="+" if takes_several(config_class, name) else None, **options)


def _kinds_of(annotation: Any) -> list[Any]:
    """The types or the literal values a field takes, behind Optional and Annotated."""
    if get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    if get_origin(annotation) in (Union, UnionType):
        return [kind for choice in get_args(annotation) for kind in _kinds_of(choice)]
    return [*get_args(annotation)] if get_origin(annotation) is Literal else [annotation]


def write_json(path: Path, record: dict[str, Any]) -> None:
    write_result(path, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
