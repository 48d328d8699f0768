"""Product pictures from the addresses that a catalogue names: over https, within limits, and resumable.

What cannot be fetched is counted by reason and left out; it is asked for again the next time.
"""

import logging
import re
import secrets
import threading
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

import requests
import urllib3
from requests.adapters import HTTPAdapter
from tqdm import tqdm

from torchrec_em3.datasets.images import load_image
from torchrec_em3.errors import ConfigError, DataError

__all__ = ["PICTURE_SUFFIXES", "PictureLimits", "download_pictures", "local_pictures", "secure_address"]

PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")

SCHEME = "https"
TIMEOUT_SECONDS = 30
RETRIES = 2
MIN_SIDE = 8
"""Smaller pictures are the blanks that image servers send for pictures they no longer have."""

FETCHED, LIMIT = "fetched", "not asked for, a limit was reached"
# What an item's file may be called; the ids come from files nobody vouches for.
_PLAIN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class PictureLimits:
    """How much is fetched at most; a run that stops at a limit is continued by the next one."""

    max_pictures: int = 100_000
    """Pictures asked for, the items with most events first."""

    max_picture_bytes: int = 5_000_000
    """Bytes of one picture."""

    max_total_bytes: int = 5_000_000_000
    """Bytes of all pictures of one run."""

    max_seconds: float = 3600
    """Seconds that one run takes."""

    connections: int = 8
    """Pictures fetched at a time."""

    def __post_init__(self) -> None:
        """Check each limit."""
        for name, value in vars(self).items():
            if not value > 0:
                raise ConfigError(f"option download.{name} is {value}, must be above 0")


class _Budget:
    """The limits of one run, shared by all connections."""

    def __init__(self, limits: PictureLimits) -> None:
        self.limits = limits
        self._bytes = 0
        self._deadline = time.monotonic() + limits.max_seconds
        self._lock = threading.Lock()

    def spend(self, count: int) -> bool:
        """Count bytes and return whether everything is still within the limits."""
        with self._lock:
            self._bytes += count
            return self._bytes <= self.limits.max_total_bytes and time.monotonic() < self._deadline

    def stop(self) -> None:
        """Let everything that is under way end at its next piece."""
        self._deadline = 0.0


def local_pictures(folder: Path) -> dict[str, str]:
    """Return the file name of each picture in `folder` by its name without suffix."""
    if not folder.is_dir():
        return {}
    return {path.stem: path.name for path in sorted(folder.iterdir()) if path.suffix.lower() in PICTURE_SUFFIXES}


def secure_address(address: str) -> str | None:
    """Return a web address as https, whatever it was; None if it is no web address."""
    try:
        parts = urlsplit(address)
    except ValueError:
        return None
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username is not None:
        return None
    return parts._replace(scheme=SCHEME).geturl()


def download_pictures(addresses: Mapping[str, str], folder: Path, limits: PictureLimits) -> Counter[str]:
    """Fetch the pictures that `folder` lacks into `folder/<item>.<suffix>`.

    Args:
        addresses: Address of the picture by item id, the most wanted first.
        folder: Made if need be. A file appears there only when it is complete and has been decoded as a picture.
        limits: When to stop.

    Returns:
        How many items came to which end: `FETCHED`, `LIMIT`, or a fault.

    Raises:
        DataError: If the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{folder}: cannot be made ({error.strerror}); name another folder with --images") from error
    there = local_pictures(folder)
    wanted = {item: address for item, address in addresses.items() if item not in there}
    asked = dict(islice(wanted.items(), limits.max_pictures))
    logger.info("%s: %d pictures are there, asking for %d", folder, len(addresses) - len(wanted), len(asked))
    counts = Counter({LIMIT: len(wanted) - len(asked)})
    first: dict[str, str] = {}
    for item, outcome in zip(asked, _fetch_all(asked, folder, limits), strict=True):
        counts[outcome] += 1
        first.setdefault(outcome, item)
    for outcome, count in sorted(counts.items()):
        if count and outcome != FETCHED:
            example = first.get(outcome, "")
            logger.warning("%d pictures %s%s", count, outcome, f", first: {asked[example]}" if example else "")
    return +counts


def _fetch_all(asked: Mapping[str, str], folder: Path, limits: PictureLimits) -> Iterable[str]:
    budget = _Budget(limits)
    own = threading.local()

    def open_session() -> None:
        own.session = requests.Session()
        # A server's wish to be asked again in an hour is not followed; the next run asks again.
        retry = urllib3.Retry(
            RETRIES,
            status_forcelist=(429, 500, 502, 503, 504),
            backoff_factor=0.5,
            respect_retry_after_header=False,
            raise_on_status=False,
        )
        own.session.mount(f"{SCHEME}://", HTTPAdapter(max_retries=retry))

    with ThreadPoolExecutor(limits.connections, initializer=open_session) as pool:
        try:
            found = pool.map(lambda item: _fetch(own.session, folder, item, asked[item], budget), asked)
            yield from tqdm(found, total=len(asked), desc="fetch pictures", unit="picture", disable=None)
        finally:
            budget.stop()


def _fetch(session: requests.Session, folder: Path, item: str, address: str, budget: _Budget) -> str:
    """Fetch one picture and return what became of it."""
    url = secure_address(address)
    if url is None:
        return "have no web address"
    if not _PLAIN_ID.fullmatch(item):
        return "belong to ids that cannot be file names"
    if not budget.spend(0):
        return LIMIT
    try:
        with session.get(
            url,
            stream=True,
            timeout=TIMEOUT_SECONDS,
            allow_redirects=False,
            headers={"Accept-Encoding": "identity"},
        ) as response:
            if response.status_code != requests.codes.ok:
                return f"answered with status {response.status_code}"
            body = bytearray()
            for piece in response.iter_content(1 << 16):
                body += piece
                if len(body) > budget.limits.max_picture_bytes:
                    return f"larger than {budget.limits.max_picture_bytes} bytes"
                if not budget.spend(len(piece)):
                    return LIMIT
    except (requests.RequestException, urllib3.exceptions.HTTPError, ValueError) as error:
        return f"not fetched ({type(error).__name__})"
    suffix = PurePosixPath(urlsplit(url).path).suffix.lower()
    return _keep(bytes(body), folder / f"{item}{suffix if suffix in PICTURE_SUFFIXES else '.jpg'}")


def _keep(body: bytes, path: Path) -> str:
    """Write `body` to `path` if it is a picture."""
    part = path.with_name(f".{path.stem}.{secrets.token_hex(4)}.part")
    try:
        part.write_bytes(body)
        loaded = load_image(part)
        if loaded.image is None:
            return f"unusable ({loaded.reason})"
        if min(loaded.image.size) < MIN_SIDE:
            return "blank"
        part.rename(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror}); name another folder with --images") from error
    finally:
        part.unlink(missing_ok=True)
    return FETCHED
