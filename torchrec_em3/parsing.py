"""Command lines and YAML files to typed configs. The only module that knows jsonargparse."""

import dataclasses
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace, set_parsing_settings

import torchrec_em3
from torchrec_em3.config import NONE, Config, ModelConfig
from torchrec_em3.errors import ConfigError
from torchrec_em3.parts import load_builtin_parts, load_plugins
from torchrec_em3.registry import ALIGNMENTS, HISTORIES, RANKERS, TOWERS, Registry, closest

__all__ = ["CommandParser", "dump_config", "parse_config", "parse_options", "preset", "read_config", "resolve_parts"]

set_parsing_settings(docstring_parse_attribute_docstrings=True)

Options = TypeVar("Options")
_PARTS: dict[str, Registry] = {"content": TOWERS, "history": HISTORIES, "alignment": ALIGNMENTS, "ranker": RANKERS}


class CommandParser(ArgumentParser):
    """A parser whose errors are ConfigErrors of one line that name the nearest known option."""

    def __init__(self, command: str, description: str) -> None:
        """Create the parser of `em3 <command>`."""
        super().__init__(prog=f"em3 {command}", description=description, exit_on_error=False, print_config=None)

    def parse(self, arguments: Sequence[str]) -> Namespace:
        """Return the values of `arguments`.

        Raises:
            ConfigError: If an option or a key of a config file is unknown or ill-typed.
        """
        try:
            return self.parse_args(list(arguments))
        except ArgumentError as error:
            raise ConfigError(_explain(str(error), self._known(), self.prog)) from error

    def build(self, values: Namespace) -> Any:
        """Return `values` with its dataclasses built, whose own checks raise ConfigError."""
        return self.instantiate(values)

    def _known(self) -> list[str]:
        return [flag for action in self._actions for flag in action.option_strings if flag.startswith("--")]


def _explain(message: str, flags: list[str], prog: str) -> str:
    """Put the parser's message on one line and add the nearest known option."""
    line = " ".join(message.split())
    hint = ""
    unknown_flag = re.search(r"nrecognized arguments: (--[^\s=]+)", line)
    unknown_key = re.search(
        r"(?:Group|Key|option) '([^']*)' does not accept (?:nested )?(?:option|key) '([^']+)'", line
    )
    if unknown_flag:
        hint = closest(unknown_flag.group(1), flags)
    elif unknown_key:
        hint = closest("--" + ".".join(filter(None, unknown_key.groups())), flags)
    return f"{line.rstrip('.')}.{hint} See `{prog} --help`."


def preset(name: str) -> Path:
    """Return the path of a YAML preset that comes with the package, such as "movielens"."""
    folders = [Path(folder) / "configs" for folder in torchrec_em3.__path__]
    found = [folder / f"{name}.yaml" for folder in folders if (folder / f"{name}.yaml").is_file()]
    if not found:
        known = sorted({path.stem for folder in folders for path in folder.glob("*.yaml")})
        raise ConfigError(f"no preset '{name}'; presets: {', '.join(known)}.{closest(name, known)}")
    return found[0]


def parse_config(
    command: str,
    description: str,
    arguments: Sequence[str],
    extend: Callable[[CommandParser], None] | None = None,
) -> tuple[Config, Namespace]:
    """Read `--config FILE` and overrides into a Config, options of the chosen parts included.

    Args:
        command: Name of the command, for messages.
        description: First line of its help.
        arguments: Command line after the command's name.
        extend: Adds the command's own arguments to the parser.

    Returns:
        The config with every option of every part filled in, and the raw values of the command's own arguments.
    """
    parser = CommandParser(command, description)
    parser.add_argument("--config", action="config", help="YAML file with any of the options below; may be repeated.")
    parser.add_argument(
        "--print_config",
        action="store_true",
        help="Print the resolved config as YAML and stop; it is a valid --config.",
    )
    if extend is not None:
        extend(parser)
    parser.add_class_arguments(Config)
    parser.epilog = "Options of parts: see `em3 parts`."
    values = parser.parse([re.sub(r"^--run_folder(?==|$)", "--run", argument) for argument in arguments])
    config = resolve_parts(_as_config(parser, values))
    if values.print_config:
        sys.stdout.write(dump_config(config))
        raise SystemExit(0)
    return config, values


def read_config(path: Path) -> Config:
    """Read a resolved config, such as a run folder's `config.yaml`."""
    config, _ = parse_config("train", "", ["--config", str(path)])
    return config


def dump_config(config: Config) -> str:
    """Return the config as YAML that `--config` accepts."""
    return yaml.safe_dump(_plain(config.as_dict()), sort_keys=False)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value


def _as_config(parser: CommandParser, values: Namespace) -> Config:
    built = parser.build(values)
    return Config(**{field.name: getattr(built, field.name) for field in dataclasses.fields(Config)})


def resolve_parts(config: Config) -> Config:
    """Load plug-ins, check each chosen part's options against its types and fill in the defaults.

    Raises:
        ConfigError: If a part or one of its options is unknown or ill-typed.
    """
    load_builtin_parts()
    load_plugins(config.plugins)
    resolved: dict[str, Any] = {}
    for kind, registry in _PARTS.items():
        name, options = getattr(config.model, kind), getattr(config.model, f"{kind}_options")
        off = name == NONE or (kind in ("history", "alignment") and not config.uses_content)
        if name == NONE and kind in ("ranker", "alignment"):
            raise ConfigError(
                f"--model.{kind} cannot be none" + ("; use --model.alignment_weight 0" if kind == "alignment" else "")
            )
        if off:
            resolved[f"{kind}_options"] = {}
            continue
        part = registry.get(name)
        checked = parse_options(part.options, options, f"model.{kind}_options")
        resolved[f"{kind}_options"] = dataclasses.asdict(checked)
        idle = kind == "alignment" and not config.model.alignment_weight
        if idle and (name != ModelConfig.alignment or checked != part.options()):
            raise ConfigError(
                f"--model.alignment {name}, or an option of it, is chosen, but --model.alignment_weight is 0, so it "
                "has no effect; give it a weight, such as 0.01"
            )
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **resolved))


def parse_options(options: type[Options], values: Mapping[str, Any], where: str) -> Options:
    """Build an options dataclass from plain values, refusing unknown names and wrong types.

    Raises:
        ConfigError: Naming the key, its value and the nearest known key.
    """
    known = [field.name for field in dataclasses.fields(options)]  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            listed = ", ".join(known) or "none"
            raise ConfigError(
                f"--{where}.{key} is not an option of {options.__name__}; options: {listed}.{closest(key, known)}"
            )
    parser = ArgumentParser(exit_on_error=False)
    types = get_type_hints(options)
    # Not add_class_arguments: it reads the source of the class, and where there is none it may find no options at all.
    for field in dataclasses.fields(options):  # type: ignore[arg-type]
        parser.add_argument(f"--{field.name}", type=types[field.name], **_default(field))
    try:
        parsed = parser.parse_object(dict(values))
    except ArgumentError as error:
        raise ConfigError(f"--{where}: {' '.join(str(error).split())}") from error
    return options(**{name: getattr(parsed, name) for name in known})


def _default(field: dataclasses.Field[Any]) -> dict[str, Any]:
    """Return what an argument is told of a field that may be left out, or must not be."""
    if field.default is not dataclasses.MISSING:
        return {"default": field.default}
    if field.default_factory is not dataclasses.MISSING:
        return {"default": field.default_factory()}
    return {"required": True}
