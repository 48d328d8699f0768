"""Full-catalogue ranking on Amazon 2014: `python -m benchmarks.amazon_topk run`, then `table`; see README.md."""

import sys

from jsonargparse import auto_cli, set_parsing_settings

from benchmarks.amazon_topk.runs import run
from benchmarks.amazon_topk.table import table
from torchrec_em3.errors import EM3Error

if __name__ == "__main__":
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    try:
        auto_cli([run, table], as_positional=False)
    except EM3Error as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
