"""`em3 score`: the score of each row of a Parquet file."""

from collections.abc import Sequence
from pathlib import Path

from torchrec_em3.errors import DataError
from torchrec_em3.parsing import CommandParser
from torchrec_em3.serving.batch import score_file
from torchrec_em3.serving.scorer import Scorer

DESCRIPTION = "Score each row of a Parquet file (columns user, history, item, features) with a package."


def main(arguments: Sequence[str]) -> None:
    """Run `em3 score`."""
    parser = CommandParser("score", DESCRIPTION)
    parser.add_argument("package", type=str, help="Folder that `em3 export` wrote.")
    parser.add_argument("source", type=str, help="Parquet file to read.")
    parser.add_argument(
        "target",
        type=str,
        help="Parquet file to write: the same columns and `score`, and `score_NAME` of each further task.",
    )
    values = parser.parse(arguments)
    source, target = Path(values.source), Path(values.target)
    if not source.is_file():
        raise DataError(f"{source} is not a file; give a Parquet file with the columns user, history and item")
    scorer = Scorer.load(Path(values.package))
    rows = score_file(scorer, source, target)
    print(f"wrote {target}: {rows} rows scored by {scorer.config.version}")
