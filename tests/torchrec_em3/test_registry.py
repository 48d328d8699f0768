"""Registries: names, options, and what is said when something is unknown."""

from dataclasses import dataclass

import pytest

from torchrec_em3.errors import ConfigError
from torchrec_em3.parts import build_part, load_plugins
from torchrec_em3.registry import Registry


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
