"""Fetch a data set from its publisher, with a checksum, and unpack it as if the archive were hostile."""

import logging
import re
import secrets
import shutil
import stat
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import pooch
import requests
from tqdm import tqdm

from torchrec_em3.errors import DataError
from torchrec_em3.registry import closest

__all__ = ["SOURCES", "Source", "download", "extract"]

BASE_URL = "https://files.grouplens.org/datasets/movielens/"
TIMEOUT_SECONDS = 30
RETRIES = 2

# An archive beyond any of these is refused before a byte of it is written; ml-32m unpacks to less than 1.2 GB.
MAX_MEMBERS = 1000
MAX_TOTAL_BYTES = 4 << 30
MAX_RATIO = 200
_SMALL_MEMBER_BYTES = 1 << 20  # the ratio says nothing about small files
_ARCHIVE_SUFFIXES = frozenset({".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar"})

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """One archive of the publisher.

    Attributes:
        megabytes: Size of the archive, about.
        md5: The publisher's checksum of an archive that never changes; None if it changes, and then the checksum is
            fetched from beside the archive.
    """

    megabytes: int
    md5: str | None


SOURCES: Mapping[str, Source] = {
    "ml-100k": Source(5, "0e33842e24a9c977be4e0107933c0723"),
    "ml-1m": Source(6, "c4d9eecfca2ab87c1945afe126590906"),
    "ml-20m": Source(199, "cd245b17a1ae2cc31bb14903e1204af3"),
    "ml-25m": Source(262, "6b51fb2759a8657d3bfcbfc42b592ada"),
    "ml-32m": Source(239, "d472be332d4daa821edc399621853b57"),
    "ml-latest-small": Source(1, None),
}


def download(name: str, cache: Path, base_url: str = BASE_URL) -> Path:
    """Return the folder of a MovieLens data set, fetched and unpacked into `cache` unless it is there already.

    Args:
        name: One of `SOURCES`.
        cache: Folder for data sets; made if need be. Nothing incomplete ever stands under its final name.
        base_url: Where the archives are, with a slash at the end.

    Returns:
        `cache / name`, to be given to `read_movielens`.

    Raises:
        DataError: If the name is unknown; the archive cannot be fetched (the message says how to go on without network)
            or differs from its checksum, each after three tries; or the archive is unsafe or damaged.
    """
    if name not in SOURCES:
        raise DataError(f"unknown data set '{name}'; known: {', '.join(SOURCES)}.{closest(name, list(SOURCES))}")
    target = cache / name
    if target.is_dir():
        logger.info("%s is there already; delete it to fetch it again", target)
        return target
    source = SOURCES[name]
    archive = f"{name}.zip"
    logger.info(
        "fetching %s%s (%d MB): for research, not to be redistributed; the README inside has terms and citation",
        *(base_url, archive, source.megabytes),
    )
    cache.mkdir(parents=True, exist_ok=True)
    path = cache / archive
    try:
        md5 = source.md5 or _published_md5(base_url + archive + ".md5")
        _fetch(base_url + archive, md5, path, source.megabytes)
    except requests.RequestException as error:
        raise DataError(
            f"cannot fetch {base_url}{archive} ({_reason(error)}); fetch that address on a machine with a network, "
            "unpack it, and give the unpacked folder with --source DIR"
        ) from error
    except ValueError as error:
        raise DataError(
            f"{base_url}{archive} differs from its checksum in {RETRIES + 1} tries: {_reason(error)}; try again later, "
            "or fetch and unpack it yourself and give the folder with --source DIR"
        ) from error
    try:
        extract(path, target)
    finally:
        path.unlink(missing_ok=True)
    return target


def extract(archive: Path, target: Path) -> None:
    """Unpack a zip archive whose members all lie in one folder; that folder becomes `target`.

    Args:
        archive: The zip file.
        target: Must not exist. It appears only when all of it is written.

    Raises:
        DataError: If the archive is damaged, or has an absolute path, `..`, a drive letter, a link or another special
            file, a name twice (capital or small letters), an archive in it, an encrypted member, or more
            members, bytes or compression than any data set has. Nothing is left behind.
    """
    part = target.with_name(f".{target.name}.{secrets.token_hex(4)}.new")
    try:
        with zipfile.ZipFile(archive) as opened:
            members = _check_members(archive, opened.infolist())
            for member in members:
                _write_member(opened, member, part)
        tops = list(part.iterdir())
        if len(tops) != 1 or not tops[0].is_dir():
            raise DataError(f"{archive}: {len(tops)} entries at its top, expected one folder; fetch it again")
        tops[0].rename(target)
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, EOFError) as error:
        raise DataError(f"{archive}: not a readable zip archive ({error}); fetch it again") from error
    except OSError as error:
        if not target.is_dir():  # else another process was faster
            raise DataError(f"{target}: cannot be written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _published_md5(url: str) -> str:
    response = requests.get(url, timeout=TIMEOUT_SECONDS)
    response.raise_for_status()
    found = re.search(r"\b[0-9a-f]{32}\b", response.text[:1000].lower())
    if found is None:
        raise DataError(f"{url} holds no MD5 but {response.text[:40]!r}; try again later")
    return found[0]


def _fetch(url: str, md5: str, path: Path, megabytes: int) -> None:
    fetcher = pooch.create(
        path.parent, "", registry={path.name: f"md5:{md5}"}, urls={path.name: url}, retry_if_failed=RETRIES
    )
    pooch.get_logger().setLevel(logging.WARNING)
    # pooch writes to a temporary file and renames it once the checksum agrees.
    with tqdm(total=megabytes * 10**6, desc=path.name, unit="B", unit_scale=True, disable=None) as bar:
        fetcher.fetch(
            path.name, downloader=pooch.HTTPDownloader(progressbar=bar, chunk_size=1 << 16, timeout=TIMEOUT_SECONDS)
        )


def _reason(error: Exception) -> str:
    if isinstance(error, (requests.ConnectionError, requests.Timeout)):
        return "no connection"
    return " ".join(str(error).split())[:200]


def _check_members(archive: Path, members: list[zipfile.ZipInfo]) -> list[zipfile.ZipInfo]:
    """Refuse the whole archive for one bad member; return the files in it."""
    total = sum(member.file_size for member in members)
    if len(members) > MAX_MEMBERS or total > MAX_TOTAL_BYTES:
        limits = f"limits are {MAX_MEMBERS} and {MAX_TOTAL_BYTES}"
        raise DataError(f"{archive}: {len(members)} members of {total} bytes in all, {limits}; not unpacked")
    seen: set[str] = set()
    for member in members:
        fault = _fault(member)
        key = member.filename.rstrip("/").casefold()
        if fault is None and key in seen:
            fault = "is there twice"
        if fault is not None:
            raise DataError(f"{archive}: member {member.orig_filename[:80]!r} {fault}; not unpacked")
        seen.add(key)
    return [member for member in members if not member.is_dir()]


def _fault(member: zipfile.ZipInfo) -> str | None:
    # The name as the archive spells it: zipfile has already cut it at a NUL byte.
    name = member.orig_filename
    path = PurePosixPath(name)
    kind = stat.S_IFMT(member.external_attr >> 16)
    faults = {
        "has an absolute or outside path": path.is_absolute() or ".." in path.parts,
        "has a name that is not portable": bool(re.search(r'[\\:\x00-\x1f<>"|?*]', name)) or not path.parts,
        "is a link or a special file": kind not in (0, stat.S_IFREG, stat.S_IFDIR),
        "is encrypted": bool(member.flag_bits & 1),
        "is an archive itself": path.suffix.lower() in _ARCHIVE_SUFFIXES,
        f"is compressed more than {MAX_RATIO} times": member.file_size > _SMALL_MEMBER_BYTES
        and member.file_size > MAX_RATIO * max(member.compress_size, 1),
    }
    return next((fault for fault, found in faults.items() if found), None)


def _write_member(opened: zipfile.ZipFile, member: zipfile.ZipInfo, folder: Path) -> None:
    path = folder / member.filename
    path.parent.mkdir(parents=True, exist_ok=True)
    # zipfile reads no more than the declared size, which the limits have been held against, and checks the CRC.
    with opened.open(member) as source, path.open("xb") as out:
        shutil.copyfileobj(source, out, 1 << 20)
