"""Code store: the semantic codes of a whole catalogue, written once, read by catalogue row during training.

Shape letters: N catalogue rows, U rows asked for, L levels.
"""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchrec_em3.batch import ItemCodes
from torchrec_em3.datasets.catalogue_rows import checked_rows
from torchrec_em3.datasets.raw import RawCodes
from torchrec_em3.errors import DataError

__all__ = ["CodeStore", "write_codes"]

_MAX_CODE = np.iinfo(np.int32).max - 1

logger = logging.getLogger(__name__)


def write_codes(folder: Path, raw: RawCodes, raw_ids: Sequence[str]) -> dict[str, Any]:
    """Write the codes of a catalogue.

    Args:
        folder: Where the arrays go, `.../codes/<name>`; made if need be.
        raw: The codes by item id; ids that the catalogue lacks are left out.
        raw_ids: Item id of each catalogue row; row 0 is "unknown".

    Returns:
        What meta.json says of them: source, levels, codes_per_level (one more than the largest code), and how many
        items are `present` and `missing`.

    Raises:
        DataError: If no item of the catalogue has codes, two differ in their number of levels, or a code is negative or
            too large.
    """
    rows = [row for row, raw_id in enumerate(raw_ids) if row and raw_id in raw.of_item]
    if not rows:
        raise DataError(
            f"codes {raw.source}: none of its {len(raw.of_item)} items is in the catalogue, such as '{raw_ids[-1]}'; "
            "give codes by the item ids of the data"
        )
    levels = len(raw.of_item[raw_ids[rows[0]]])
    codes_NL = np.zeros((len(raw_ids), levels), dtype=np.int32)
    present_N = np.zeros(len(raw_ids), dtype=np.bool_)
    for row in rows:
        codes = raw.of_item[raw_ids[row]]
        if len(codes) != levels or not codes:
            raise DataError(f"codes {raw.source} item '{raw_ids[row]}': {len(codes)} levels, others have {levels}")
        if not all(0 <= code <= _MAX_CODE for code in codes):
            raise DataError(f"codes {raw.source} item '{raw_ids[row]}': {list(codes)}, outside 0..{_MAX_CODE}")
        codes_NL[row], present_N[row] = codes, True
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "codes.npy", codes_NL)
    np.save(folder / "present.npy", present_N)
    meta = {"source": raw.source, "levels": levels, "codes_per_level": int(codes_NL.max()) + 1}
    (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
    missing = len(raw_ids) - 1 - len(rows)
    logger.info("codes %s: %d present, %d missing", folder.name, len(rows), missing)
    return meta | {"present": len(rows), "missing": missing}


class _Codes:
    """The open arrays of one quantiser; they stay on disk and are mapped into memory page by page."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
            # "c": pages are private copies, so that torch accepts the array; the file is never written.
            codes = np.load(folder / "codes.npy", mmap_mode="c", allow_pickle=False)
            present = np.load(folder / "present.npy", mmap_mode="c", allow_pickle=False)
            announced = (len(present), meta["levels"])
            self.codes_per_level = int(meta["codes_per_level"])
        except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise DataError(f"code store {folder} cannot be read ({reason}); run em3 prepare again") from error
        if codes.dtype != np.int32 or present.dtype != np.bool_ or codes.shape != announced or present.ndim != 1:
            raise DataError(
                f"code store {folder}: codes are {codes.dtype} {codes.shape}, present is {present.dtype}; meta.json "
                f"says int32 {announced} and bool; run em3 prepare again"
            )
        self.codes_NL, self.present_N = torch.from_numpy(codes), torch.from_numpy(present)

    def gather(self, items_U: Tensor, device: torch.device) -> ItemCodes:
        """Return the rows `items_U` (CPU, in range) on `device`; a code out of range would read another level's row."""
        present_U = self.present_N.index_select(0, items_U)
        codes_UL = torch.where(present_U[:, None], self.codes_NL.index_select(0, items_U), 0)
        bad_UL = (codes_UL < 0) | (codes_UL >= self.codes_per_level)
        if bad_UL.any():
            place, level = bad_UL.nonzero()[0].tolist()
            raise DataError(
                f"code store {self.folder} row {int(items_U[place])}: code {int(codes_UL[place, level])} of level "
                f"{level} is outside 0..{self.codes_per_level - 1}; run em3 prepare again"
            )
        return ItemCodes(codes_UL.long().to(device), present_U.to(device))


class CodeStore:
    """Semantic codes of a prepared catalogue by catalogue row, all its quantisers.

    Attributes:
        num_rows: Catalogue rows, row 0 included; 0 where there are no codes.
    """

    def __init__(self, codes_folder: Path) -> None:
        """Open the store.

        Args:
            codes_folder: `codes/` of a prepared folder; it need not exist.

        Raises:
            DataError: If arrays are damaged, of another type or shape than announced, or of different catalogues.
        """
        self._folder = Path(codes_folder)
        names = sorted(path.parent.name for path in self._folder.glob("*/meta.json"))
        self._parts = {name: _Codes(self._folder / name) for name in names}
        sizes = {name: len(part.present_N) for name, part in self._parts.items()}
        if len(set(sizes.values())) > 1:
            raise DataError(f"code store {self._folder}: codes differ in rows {sizes}; run em3 prepare again")
        self.num_rows = next(iter(sizes.values()), 0)

    def __reduce__(self) -> tuple[type["CodeStore"], tuple[Path]]:
        """Send the folder to another process, never the codes."""
        return CodeStore, (self._folder,)

    def fetch(self, items_U: Tensor, device: torch.device | str | None = None) -> dict[str, ItemCodes]:
        """Return the codes of some items.

        Args:
            items_U: Catalogue rows, integer, any device; row 0 and items without codes come back as not present.
            device: Where the result goes; None: where `items_U` is.

        Returns:
            By name: codes [U, L], int64, and present [U].

        Raises:
            DataError: If a row is outside the catalogue, or a code outside its range.
        """
        target = items_U.device if device is None else torch.device(device)
        if not self._parts:
            return {}
        rows_U = checked_rows(items_U, self.num_rows, "code", self._folder)
        return {name: part.gather(rows_U, target) for name, part in self._parts.items()}
