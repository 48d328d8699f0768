"""docs/examples/torchrec_ranker.py trains under torchrun, and docs/your-own-model.md quotes it as it stands."""

import re
import subprocess
import sys

import pytest

from tests.documents import ROOT

SCRIPT = ROOT / "docs" / "examples" / "torchrec_ranker.py"
PAGE = (ROOT / "docs" / "your-own-model.md").read_text(encoding="utf-8")


def test_the_page_quotes_the_example() -> None:
    source = SCRIPT.read_text(encoding="utf-8")
    quoted = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    assert len(quoted) >= 4
    assert [block for block in quoted if block not in source] == []


@pytest.mark.slow
def test_content_ranks_new_items_and_ids_do_not() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(SCRIPT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    printed = re.findall(r"^(.+?) +AUC on known items ([\d.]+), on new items ([\d.]+)$", done.stdout, re.MULTILINE)
    (ids_name, known_by_ids, new_by_ids), (both_name, known, new) = printed
    assert (ids_name, both_name) == ("IDs", "IDs and content")
    assert abs(float(new_by_ids) - 0.5) < 0.05
    assert float(known) > float(known_by_ids) + 0.05
    assert float(new) > 0.7
