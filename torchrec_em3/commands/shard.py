"""`em3 shard`: events of a prepared folder as shards."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from torchrec_em3.datasets.prepared import PreparedData
from torchrec_em3.datasets.remote_folder import local_folder
from torchrec_em3.datasets.shards import split_into_shards
from torchrec_em3.errors import ConfigError
from torchrec_em3.parsing import CommandParser

DESCRIPTION = "Write the events of one split of a prepared folder as shards in the order of time, then the file _END."


def main(arguments: Sequence[str]) -> None:
    """Run `em3 shard`."""
    parser = CommandParser("shard", DESCRIPTION)
    parser.add_argument("data", type=str, help="Prepared folder, or its URL.")
    parser.add_argument("--out", type=str, required=True, help="Folder to write the shards to.")
    parser.add_argument("--split", type=Literal["train", "validation", "test"], default="test", help="Which events.")
    parser.add_argument("--count", type=int, default=5, help="How many shards.")
    values = parser.parse(arguments)
    if values.count < 1:
        raise ConfigError(f"--count is {values.count}, must be at least 1")
    paths = split_into_shards(
        PreparedData.open(local_folder(values.data)), values.split, values.count, Path(values.out)
    )
    print(f"wrote {len(paths)} shards to {values.out}; next: em3 follow --data {values.data} --shards {values.out} ...")
