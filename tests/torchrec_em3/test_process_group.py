"""Processes and devices: what is refused before a group is joined."""

import pytest
import torch

from torchrec_em3.errors import ConfigError
from torchrec_em3.process_group import process_group


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORLD_SIZE": "4", "RANK": "2", "LOCAL_RANK": "2"}, "LOCAL_RANK is 2, but this machine shows 2 CUDA devices"),
        ({"WORLD_SIZE": "2", "RANK": "1"}, "WORLD_SIZE is 2 and LOCAL_RANK is not set"),
    ],
)
def test_a_process_without_a_device_of_its_own_is_refused(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], message: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message), process_group():
        pass
