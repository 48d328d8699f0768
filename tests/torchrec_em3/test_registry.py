"""Registries: names, options, and what is said when something is unknown."""

import sys
from dataclasses import dataclass
from types import ModuleType

import pytest

from torchrec_em3.commands import parts
from torchrec_em3.errors import ConfigError
from torchrec_em3.parsing import parse_options
from torchrec_em3.parts import build_part, load_plugins
from torchrec_em3.registry import TOWERS, Registry


@dataclass(frozen=True, kw_only=True)
class Options:
    size: int = 1
    """Size."""


def registry() -> Registry:
    made = Registry("thing")

    @made.register("alpha", options=Options)
    class Alpha:
        def __init__(self, options: Options, *args: int) -> None:
            self.options, self.args = options, args

    return made


def test_a_part_is_built_from_its_options_and_arguments() -> None:
    part = build_part(registry(), "alpha", {"size": 3}, 1, 2)
    assert part.options == Options(size=3)
    assert part.args == (1, 2)


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"unknown thing 'alpa'; known: alpha\. Did you mean 'alpha'\?"):
        registry().get("alpa")


def test_an_unknown_option_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"thing 'alpha' has no option 'sise'; options: size\. Did you mean 'size'\?"):
        build_part(registry(), "alpha", {"sise": 3})


def test_a_taken_name_is_refused() -> None:
    made = registry()
    with pytest.raises(ConfigError, match="already registered"):

        @made.register("alpha")
        class Beta:
            pass


def test_options_must_be_a_dataclass() -> None:
    with pytest.raises(ConfigError, match="must be a dataclass"):
        registry().register("beta", options=dict)


def test_a_missing_plugin_module_is_one_line() -> None:
    with pytest.raises(ConfigError, match=r"--plugins no_such_package.module: no module 'no_such_package'"):
        load_plugins("no_such_package.module")


def test_parts_of_others_are_listed_though_they_say_little(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a docstring, and with an option that must be given."""

    @dataclass(frozen=True, kw_only=True)
    class Options:
        size: int
        names: tuple[str, ...] = ("a",)

    class Bare:
        pass

    monkeypatch.setattr(TOWERS, "_parts", dict(TOWERS._parts))
    TOWERS.register("bare", options=Options)(Bare)
    parts.main([])
    assert "  bare\n      size (required)\n      names = ('a',)\n" in capsys.readouterr().out


WRITTEN = """
from dataclasses import dataclass, field
from typing import Literal

@dataclass(frozen=True, kw_only=True)
class Written:
    hidden: int = 64
    widths: tuple[int, ...] = (8, 4)
    kind: Literal["a", "b"] = "a"
    rate: float | None = None
    names: list[str] = field(default_factory=list)
"""


def test_options_whose_source_is_nowhere_are_read_like_any_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a class that was typed in, which jsonargparse cannot find the text of."""
    module = ModuleType("typed_in")
    monkeypatch.setitem(sys.modules, "typed_in", module)
    exec(WRITTEN, vars(module))
    read = parse_options(module.Written, {"hidden": 32, "widths": [1, 2], "rate": "0.5"}, "model.content_options")
    assert read == module.Written(hidden=32, widths=(1, 2), rate=0.5)
    for wrong, message in ({"hidden": "many"}, "hidden"), ({"kind": "c"}, "kind"), ({"hiden": 1}, "'hidden'"):
        with pytest.raises(ConfigError, match=message):
            parse_options(module.Written, wrong, "model.content_options")
