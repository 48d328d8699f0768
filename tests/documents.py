"""Commands in the documents, checked against the parsers that they are for; nothing that they would do is done."""

import contextlib
import io
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from jsonargparse import capture_parser
from torch.distributed.run import get_args_parser

from tests.torchx_specs.components import arguments_of, component
from torchrec_em3.cli import run
from torchrec_em3.parsing import CommandParser

__all__ = ["ROOT", "Command", "commands", "documents", "problem"]

ROOT = Path(__file__).parents[1]
PROGRAMS = ("em3", "torchrun", "torchx", "python", "make", "pip", "docker", "kubectl", "export", ".")
MARK = "Not run"
"""How the paragraph behind a block begins whose commands no test can check."""


@dataclass(frozen=True)
class Command:
    """One command of a document.

    Attributes:
        text: As it stands, continued lines joined.
        usage: Whether it shows a form ("[--out FILE]", "...") or a part of a command rather than one to be typed.
        marked: Whether the paragraph behind its block says that it was not run.
    """

    text: str
    usage: bool
    marked: bool = False


def documents() -> list[Path]:
    """Return every page that shows commands."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "benchmarks").rglob("*.md"))]


def commands(page: str) -> Iterator[Command]:
    """Find the commands of a page: in inline code, and in blocks without a language that begin with a program."""
    blocks = re.compile(r"^```(\S*)\n(.*?)^```\n(?=\n?((?:[^`\n][^\n]*\n)*))", re.MULTILINE | re.DOTALL)
    for language, block, behind in blocks.findall(page):
        lines = block.replace("\\\n", " ").splitlines()
        if language in ("", "sh", "bash") and _starts_a_command(lines[0]):
            yield from (Command(line, _is_usage(line), behind.startswith(MARK)) for line in lines if line.strip())
    for code in re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```", "", page, flags=re.MULTILINE | re.DOTALL)):
        if " " in code and _starts_a_command(code):
            yield Command(" ".join(code.split()), usage=True)


def _starts_a_command(line: str) -> bool:
    return re.sub(r"^([A-Z_]+=\S+ )*", "", line).split(" ")[0] in PROGRAMS


def _is_usage(line: str) -> bool:
    return re.search(r" \[|\.\.\.|\bOPTIONS\b|\|", re.sub(r"'[^']*'", "", line)) is not None


def problem(command: Command) -> str | None:
    """Return what is wrong with a command, or None."""
    words = shlex.split(command.text, comments=True)
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words = words[1:]
    program, arguments = words[0], words[1:]
    checks = {"em3": _em3, "torchrun": _torchrun, "torchx": _torchx, "python": _python, "make": _make, "pip": _pip}
    if program in checks:
        return checks[program](arguments, command.usage)
    if program in ("export", "."):
        return None
    return (
        None
        if command.marked
        else f"{program} cannot be checked here, and the paragraph behind it does not begin with '{MARK}'"
    )


class _Parsed(Exception):
    """The way out of a command once its arguments are read; carries its parser."""


def _em3(arguments: list[str], usage: bool) -> str | None:
    if arguments[:1] == ["prepare"] and (len(arguments) == 1 or arguments[1].startswith("-")):
        arguments = ["prepare", "movielens", *arguments[1:]]
    accept = CommandParser.parse

    def parse(parser: CommandParser, given: list[str]) -> Any:
        if usage:
            raise _Parsed(parser)
        resolves = "--print_config" in parser._known() and "--plugins" not in given
        values = accept(parser, [*given, "--print_config"] if resolves else given)
        if not resolves:
            raise _Parsed(parser)
        return values  # what reads it resolves the options of parts, prints the config and stops

    said = io.StringIO()
    try:
        with patch.object(CommandParser, "parse", parse), _silence(said):
            code = run(arguments)
    except _Parsed as parsed:
        return _unknown_options(parsed.args[0], arguments) if usage else None
    except SystemExit as stop:
        code = int(stop.code or 0)
    return said.getvalue().strip() if code else None


def _silence(said: io.StringIO) -> contextlib.ExitStack:
    stack = contextlib.ExitStack()
    stack.enter_context(contextlib.redirect_stderr(said))
    stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
    return stack


def _unknown_options(parser: Any, arguments: list[str]) -> str | None:
    """Name an option that the parser lacks; what a dict takes behind its own name is free."""
    known = {flag for action in parser._actions for flag in action.option_strings} | {"--run_folder"}
    for option in re.findall(r"--[\w.]+", " ".join(arguments)):
        if not any(option == flag or option.startswith(flag + ".") for flag in known):
            return f"{parser.prog} has no option {option}"
    return None


def _torchrun(arguments: list[str], usage: bool) -> str | None:
    said = io.StringIO()
    try:
        with _silence(said):
            launched = get_args_parser().parse_args(arguments)
    except SystemExit:
        return said.getvalue().strip()
    if not launched.module:
        return None if (ROOT / launched.training_script).is_file() else f"{launched.training_script} is not there"
    if launched.training_script != "torchrec_em3":
        return f"torchrun starts {launched.training_script}, not torchrec_em3"
    return _em3(launched.training_script_args, usage)


def _torchx(arguments: list[str], usage: bool) -> str | None:
    place = next((place for place, word in enumerate(arguments) if word.startswith("torchx_specs/")), None)
    if arguments[0] != "run" or place is None:
        return "no component of torchx_specs/"
    file, name = arguments[place].removeprefix("torchx_specs/").split(".py:")
    said = io.StringIO()
    try:
        with _silence(said):
            app, _ = component(file, name, arguments[place + 1 :])
    except SystemExit as stop:
        return said.getvalue().strip() if stop.code else None
    except Exception as error:
        return f"{name}: {error}"
    # A config on another machine's volume cannot be read here.
    started = [word for word in arguments_of(app) if not word.startswith(("/em3", "/shared"))]
    return _em3(started, usage or started != arguments_of(app))


def _python(arguments: list[str], usage: bool) -> str | None:
    if arguments[0] == "-m":
        target, given = arguments[1], arguments[2:]
        parser = capture_parser(lambda: runpy.run_module(target, run_name="__main__"))
    else:
        script, given = ROOT / arguments[0], arguments[1:]
        if not script.is_file():
            return f"{script} is not there"
        with patch.object(sys, "path", [str(script.parent), *sys.path]):
            parser = capture_parser(lambda: runpy.run_path(str(script), run_name="__main__"))
    if usage:
        return _unknown_options(parser, given)
    said = io.StringIO()
    try:
        with _silence(said):
            parser.parse_args(given)
    except SystemExit as stop:
        return said.getvalue().strip() if stop.code else None
    return None


def _make(arguments: list[str], usage: bool) -> str | None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    return None if arguments[0] in targets else f"the Makefile has no target {arguments[0]}"


def _pip(arguments: list[str], usage: bool) -> str | None:
    wanted = re.findall(r"torchrec-em3\[([\w,]+)\]", " ".join(arguments))
    known = set(re.findall(r'^        "(\w+)": \[', (ROOT / "setup.py").read_text(encoding="utf-8"), re.MULTILINE))
    missing = {extra for names in wanted for extra in names.split(",")} - known
    return f"setup.py has no extra {', '.join(sorted(missing))}" if missing else None
