"""Token store: what frozen encoders make of a whole catalogue, written once, read by catalogue row during training.

That is their output, or the rows at which they were cut (see `components.interfaces.CuttableEncoder`).

Shape letters: N catalogue rows, U rows asked for, n rows of a chunk, T tokens of an item at most, D width of a token.
"""

import json
import logging
import mmap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib.format import open_memmap
from torch import Tensor
from tqdm import tqdm

from torchrec_em3.batch import ModalityTokens
from torchrec_em3.components.interfaces import TokenEncoder
from torchrec_em3.datasets.catalogue_rows import checked_rows
from torchrec_em3.datasets.encoder_record import stored_form
from torchrec_em3.datasets.images import ImageTally, load_image
from torchrec_em3.errors import ConfigError, DataError
from torchrec_em3.registry import ENCODERS

__all__ = ["TokenStore", "TokenSummary", "write_tokens"]

logger = logging.getLogger(__name__)

# Rows copied at a time: their fp16 form stays in the cache while it is widened, which halves the memory traffic.
GATHER_ROWS = 64
NOT_FINITE = "encoder output is not finite"


@dataclass(frozen=True)
class TokenSummary:
    """What became of the items of one modality; the three numbers add up to the items (row 0 is not one).

    Attributes:
        present: Items with tokens.
        missing: Items for which the catalogue names nothing, an empty text, or a file that is not there.
        broken: Items whose file or encoding is unusable.
        reasons: Items by kind of fault, for what is not simply absent from the catalogue.
    """

    present: int
    missing: int
    broken: int
    reasons: Mapping[str, int] = field(default_factory=dict)


class _Writer:
    """The arrays of one modality on disk, and what could not be encoded."""

    def __init__(self, folder: Path, rows: int, encoder: TokenEncoder, cut: int | None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        form = stored_form(encoder, _name(encoder), cut)
        shape = (rows, form.encoder.max_tokens, form.encoder.dim)
        # A new file reads as zeros without taking space, so rows that are never written need nothing.
        dtype = form.record.get("dtype", "float16")
        self.tokens_NTD = open_memmap(folder / "tokens.npy", mode="w+", dtype=dtype, shape=shape)
        self.lengths_N = np.zeros(rows, dtype=np.int32)
        self.present_N = np.zeros(rows, dtype=np.bool_)
        self.not_finite = 0
        self.folder, self.encoder, self.form = folder, encoder, form

    def add(self, rows: Sequence[int], inputs: Sequence[Any]) -> None:
        """Encode `inputs` into `rows`; an output that fp16 cannot hold is left out and counted."""
        tokens, lengths = self.form.encoder.encode(inputs)
        expected = (len(inputs), *self.tokens_NTD.shape[1:])
        if tuple(tokens.shape) != expected or tuple(lengths.shape) != expected[:1]:
            raise ConfigError(
                f"encoder {_name(self.encoder)} returned tokens {tuple(tokens.shape)} and lengths "
                f"{tuple(lengths.shape)} instead of {expected} and {expected[:1]}; correct its dim and max_tokens"
            )
        tokens_nTD = tokens.to(self.form.dtype)
        finite_n = tokens_nTD.isfinite().flatten(1).all(1).numpy()
        kept = np.asarray(rows)[finite_n]
        self.tokens_NTD[kept] = tokens_nTD.numpy()[finite_n]
        self.lengths_N[kept] = lengths.numpy()[finite_n]
        self.present_N[kept] = True
        self.not_finite += len(rows) - len(kept)

    def close(self) -> None:
        """Write what is not yet on disk."""
        self.tokens_NTD.flush()
        np.save(self.folder / "lengths.npy", self.lengths_N)
        np.save(self.folder / "present.npy", self.present_N)
        meta = {"encoder": _name(self.encoder), "source": self.encoder.source, **self.form.record}
        (self.folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")


def _name(encoder: TokenEncoder) -> str:
    """Return the registered name, or the class name of an encoder that is not registered."""
    return next((part.name for part in ENCODERS if part.build is type(encoder)), type(encoder).__name__)


def _read(value: str | Path | None, modality: str, tally: ImageTally) -> Any:
    """Return what the encoder reads, or None for a missing or broken input; files are counted in `tally`."""
    if value is None or value == "":
        return None
    if modality == "image":
        loaded = load_image(Path(value))
        tally.add(Path(value), loaded)
        return loaded.image
    text = str(value)
    return text if any(character.isprintable() and not character.isspace() for character in text) else None


def write_tokens(
    folder: Path,
    encoder: TokenEncoder,
    inputs: Sequence[str | Path | None],
    batch_size: int = 64,
    cut: int | None = None,
) -> TokenSummary:
    """Encode a catalogue into `folder` batch by batch; the whole store is never in memory.

    An item without a usable input becomes a masked row: nothing is encoded for it, and nothing stops.

    Args:
        folder: Where the arrays go, `.../tokens/<modality>`; made if need be.
        encoder: Frozen encoder; its `modality` says whether inputs are texts or picture files.
        inputs: One a catalogue row; None or "" where there is none. Row 0 is "unknown" and must have none.
        batch_size: Items a batch, >= 1.
        cut: Store what layer `cut` hands to the next one, 0 for raw inputs; None stores the encoder's output.

    Returns:
        Counts of items, row 0 left out.

    Raises:
        ConfigError: If the encoder cannot be cut there, or returns another shape than it announced.
        DataError: If row 0 has an input.
    """
    if len(inputs) and inputs[0]:
        raise DataError(
            f"row 0 of the catalogue is 'unknown' but has {encoder.modality} {inputs[0]!r}; start items at row 1"
        )
    writer = _Writer(folder, len(inputs), encoder, cut)
    tally = ImageTally()
    with tqdm(total=len(inputs), desc=f"encode {encoder.modality}", unit="item", disable=None) as bar:
        for start in range(0, len(inputs), batch_size):
            batch = range(start, min(start + batch_size, len(inputs)))
            found = {row: _read(inputs[row], encoder.modality, tally) for row in batch}
            usable = {row: value for row, value in found.items() if value is not None}
            if usable:
                writer.add(list(usable), list(usable.values()))
            bar.update(len(batch))
    writer.close()
    tally.log()
    return _summary(writer, tally)


def _summary(writer: _Writer, tally: ImageTally) -> TokenSummary:
    """Count what was written and what was not."""
    reasons = {reason: count for (status, reason), count in tally.counts.items() if status != "present"}
    broken = writer.not_finite + sum(count for (status, _), count in tally.counts.items() if status == "broken")
    if writer.not_finite:
        reasons[NOT_FINITE] = writer.not_finite
        logger.warning("%d items: %s (encoder %s); left out", writer.not_finite, NOT_FINITE, _name(writer.encoder))
    present = int(writer.present_N.sum())
    items = max(len(writer.present_N) - 1, 0)
    return TokenSummary(present, items - present - broken, broken, reasons)


class _Modality:
    """The open arrays of one modality; tokens stay on disk until a row is asked for."""

    def __init__(self, folder: Path) -> None:
        try:
            meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
            # "c": pages are private copies, so that torch accepts the array; the file is never written.
            tokens = np.load(folder / "tokens.npy", mmap_mode="c", allow_pickle=False)
            # Rows are read in no order: without this the kernel maps ten times the pages that a step asks for.
            tokens._mmap.madvise(mmap.MADV_RANDOM)
            lengths = np.load(folder / "lengths.npy", allow_pickle=False)
            present = np.load(folder / "present.npy", allow_pickle=False)
            announced = (len(lengths), meta["max_tokens"], meta["dim"])
            dtype = meta.get("dtype", "float16")
        except (OSError, ValueError, KeyError, EOFError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise DataError(f"token store {folder} cannot be read ({reason}); run em3 prepare again") from error
        if tokens.dtype != dtype or tokens.shape != announced or present.shape != lengths.shape:
            raise DataError(
                f"token store {folder}: tokens are {tokens.dtype} {tokens.shape}, lengths and meta.json say {dtype} "
                f"{announced}; run em3 prepare again"
            )
        self.tokens_NTD = torch.from_numpy(tokens)
        self.lengths_N = torch.from_numpy(np.where(present, lengths, 0).astype(np.int64))

    def gather(self, items_U: Tensor, device: torch.device) -> ModalityTokens:
        """Return the rows `items_U` (CPU, in range) on `device`, widened there; integers stay what they are."""
        length_U = self.lengths_N[items_U]
        count = self._longest(length_U)
        valid_UT = torch.arange(count) < length_U[:, None]
        kept_NTD = self.tokens_NTD[:, :count]
        if device.type != "cpu" or not self.tokens_NTD.is_floating_point():
            rows_UTD = kept_NTD.index_select(0, items_U).to(device)
            rows_UTD = rows_UTD.float() if rows_UTD.is_floating_point() else rows_UTD
            return ModalityTokens(rows_UTD, valid_UT.to(device))
        tokens_UTD = torch.empty(len(items_U), *kept_NTD.shape[1:])
        for target_nTD, items_n in zip(
            torch.split(tokens_UTD, GATHER_ROWS), torch.split(items_U, GATHER_ROWS), strict=True
        ):
            target_nTD.copy_(kept_NTD.index_select(0, items_n))
        return ModalityTokens(tokens_UTD, valid_UT)

    def _longest(self, length_U: Tensor) -> int:
        """Return how many tokens an item's row needs: those beyond the longest item asked for would be filler alone."""
        longest = int(length_U.max()) if len(length_U) else 0
        # The layers above an image encoder's cut take rows of a whole picture, also where no item has one.
        return longest or self.tokens_NTD.shape[1]


class TokenStore:
    """Tokens of all modalities of a prepared catalogue, by catalogue row.

    Attributes:
        num_rows: Catalogue rows, row 0 included.
        token_dims: Width of a token by modality.
        token_counts: Largest number of tokens of an item by modality.
    """

    def __init__(self, tokens_folder: Path, modalities: Sequence[str] | None = None) -> None:
        """Open the store; tokens stay on disk and are mapped into memory page by page.

        Args:
            tokens_folder: `tokens/` of a prepared folder.
            modalities: Which to open, in this order; None opens all, in alphabetical order.

        Raises:
            DataError: If a modality is not there, or its arrays are damaged or of different sizes.
        """
        self._folder = Path(tokens_folder)
        known = sorted(path.parent.name for path in self._folder.glob("*/meta.json"))
        names = known if modalities is None else list(modalities)
        for name in names:
            if name not in known:
                raise DataError(
                    f"{self._folder} has no tokens for modality '{name}', only {known}; run em3 prepare with it"
                )
        self._parts = {name: _Modality(self._folder / name) for name in names}
        sizes = {name: len(part.lengths_N) for name, part in self._parts.items()}
        if len(set(sizes.values())) > 1:
            raise DataError(f"token store {self._folder}: modalities differ in rows {sizes}; run em3 prepare again")
        self.num_rows = next(iter(sizes.values()), 0)
        self.token_dims = {name: int(part.tokens_NTD.shape[2]) for name, part in self._parts.items()}
        self.token_counts = {name: int(part.tokens_NTD.shape[1]) for name, part in self._parts.items()}

    def __reduce__(self) -> tuple[type["TokenStore"], tuple[Path, list[str]]]:
        """Send folder and names to another process, never the tokens."""
        return TokenStore, (self._folder, list(self._parts))

    def fetch(self, items_U: Tensor, device: torch.device | str | None = None) -> dict[str, ModalityTokens]:
        """Return the tokens of some items.

        Args:
            items_U: Catalogue rows, integer, any device; row 0 and rows without the modality come back all invalid.
            device: Where the result goes; None: where `items_U` is.

        Returns:
            By modality: tokens [U, T, D], float32 (raw inputs: the integers that are stored), and valid [U, T], true at
            the item's own tokens. T is the number of tokens of the longest of these items; as stored if none has any.

        Raises:
            DataError: If a row is outside the catalogue.
        """
        target = items_U.device if device is None else torch.device(device)
        if not self._parts:
            return {}
        rows_U = checked_rows(items_U, self.num_rows, "token", self._folder)
        return {name: part.gather(rows_U, target) for name, part in self._parts.items()}
