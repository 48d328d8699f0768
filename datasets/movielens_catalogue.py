"""The movies of a MovieLens folder: titles, genres, plots and posters from whichever files are there."""

import logging
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np
import pyarrow as pa

from torchrec_em3.datasets.ids import check_distinct
from torchrec_em3.datasets.raw import RawItems
from torchrec_em3.datasets.tables import Layout, column_names, find_file, read_table
from torchrec_em3.errors import DataError

__all__ = ["movie_text", "read_catalogue"]

_FLAGS_100K = (
    *(
        "unknown",
        "Action",
        "Adventure",
        "Animation",
        "Children's",
        "Comedy",
        "Crime",
        "Documentary",
        "Drama",
        "Fantasy",
    ),
    *("Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western"),
)
_MOVIES_100K = Layout("|", names=("item_id", "title", "release", "video", "imdb", *_FLAGS_100K), latin1=True)
_MOVIES_1M = Layout("::", names=("item_id", "title", "genres"), latin1=True)
_MOVIES_CSV = Layout(",", quoted=True, renames=(("movieId", "item_id"),))
_MOVIES_RECBOLE = Layout(
    "\t", typed_header=True, renames=(("movie_title", "title"), ("class", "genres"), ("genre", "genres"))
)
_ITEMS_CSV = Layout(",", quoted=True, renames=(("movie_id", "item_id"),))

_POSTER_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp"})
_GENRE_WORDS = {"Sci-Fi": "science fiction", "Film-Noir": "film noir"}
_NO_GENRES = frozenset({"", "unknown", "(no genres listed)"})
_ARTICLE_LAST = re.compile(r"^(.+), (The|An?|L[ae]s?|L'|Il|El|Der|Die|Das)(?= \()")
_CONTROL = re.compile(r"[\x00-\x1f\x7f\s]+")
_MAX_TEXT = 2000  # characters; several times what any of the text encoders reads


@dataclass
class _Movie:
    title: str = ""
    genres: str = ""
    plot: str = ""
    abstract: str = ""
    poster: str = ""


def movie_text(title: str, genres: Iterable[str], plot: str, abstract: str) -> str:
    """Return what the text encoder reads about a movie, the most telling words first, because encoders cut off the end.

    Title with its year (and its article in front: "The Matrix (1999)"), genres as words, then the plot, or the abstract
    where there is no plot (abstracts are longer and begin with makers and dates). Empty parts are left out.

    Args:
        title: Publisher's title.
        genres: Publisher's genre names.
        plot: Plot summary or "".
        abstract: Encyclopaedia abstract or "".

    Returns:
        At most 2,000 characters without control characters; "" if nothing is known.
    """
    words = ", ".join(_GENRE_WORDS.get(genre, genre.lower()) for genre in genres)
    parts = (_ARTICLE_LAST.sub(lambda found: f"{found[2]} {found[1]}", title), words, plot or abstract)
    clean = (_CONTROL.sub(" ", part[: 2 * _MAX_TEXT]).strip() for part in parts)
    return " ".join(part if part[-1] in ".!?" else f"{part}." for part in clean if part)[:_MAX_TEXT]


def read_catalogue(source: Path, rated: Sequence[str]) -> RawItems:
    """Read every movie that a movies file, `items.csv` or the ratings name.

    Args:
        source: Folder of the data set.
        rated: Item ids of the ratings; those that no file describes get an empty entry.

    Returns:
        Movies in the order of the files. A field of `items.csv` stands above the movies file's where it is not empty.

    Raises:
        DataError: With file, row and field, if a file is malformed or names a movie twice.
    """
    movies = _read_movies(source)
    for item_id, extra in _read_items_csv(source).items():
        known = movies.setdefault(item_id, extra)
        for part in fields(extra):
            if getattr(extra, part.name):
                setattr(known, part.name, getattr(extra, part.name))
    undescribed = [item_id for item_id in sorted(rated) if item_id not in movies]
    if undescribed and movies:
        logging.getLogger(__name__).warning(
            "%s: %d rated movies (first: %s) are in no movies file; they have no text",
            source,
            len(undescribed),
            undescribed[0],
        )
    movies.update((item_id, _Movie()) for item_id in undescribed)
    _add_posters(source, movies)
    genres = [[genre for genre in movie.genres.split("|") if genre not in _NO_GENRES] for movie in movies.values()]
    texts = [movie_text(m.title, g, m.plot, m.abstract) for m, g in zip(movies.values(), genres, strict=True)]
    return RawItems(
        item_id=np.array(list(movies), dtype=object),
        title=np.array([_CONTROL.sub(" ", movie.title) for movie in movies.values()], dtype=object),
        text=np.array(texts, dtype=object),
        image=np.array([movie.poster for movie in movies.values()], dtype=object),
        category=np.array([found[0] if found else "" for found in genres], dtype=object),
    )


def _read_movies(source: Path) -> dict[str, _Movie]:
    readers: dict[str, Callable[[Path], dict[str, _Movie]]] = {
        "u.item": _read_100k,
        "movies.dat": partial(_read_titles_and_genres, layout=_MOVIES_1M),
        "movies.csv": partial(_read_titles_and_genres, layout=_MOVIES_CSV),
        "*.item": _read_recbole,
    }
    for pattern, reader in readers.items():
        if path := find_file(source, pattern):
            return reader(path)
    return {}


def _columns(
    path: Path, layout: Layout, names: Iterable[str], known: tuple[str, ...] | None = ()
) -> dict[str, list[str]]:
    table = read_table(path, layout, dict.fromkeys(names, pa.string()), known=known)
    columns: dict[str, list[str]] = table.to_pydict()
    check_distinct(columns["item_id"], path, "item_id", first_row=1 if layout.names else 2)
    return columns


def _read_100k(path: Path) -> dict[str, _Movie]:
    columns = _columns(path, _MOVIES_100K, ("item_id", "title", *_FLAGS_100K), known=None)
    flags = np.array([columns[name] for name in _FLAGS_100K]) == "1"
    genres = ["|".join(np.array(_FLAGS_100K)[has]) for has in flags.T]
    return {key: _Movie(*row) for key, *row in zip(columns["item_id"], columns["title"], genres, strict=True)}


def _read_titles_and_genres(path: Path, layout: Layout) -> dict[str, _Movie]:
    columns = _columns(path, layout, ("item_id", "title", "genres"))
    return {key: _Movie(*row) for key, *row in zip(*columns.values(), strict=True)}


def _read_recbole(path: Path) -> dict[str, _Movie]:
    columns = _columns(path, _MOVIES_RECBOLE, ("item_id", "title", "release_year", "genres"))
    years = columns["release_year"]
    titles = [f"{title} ({year})" if year else title for title, year in zip(columns["title"], years, strict=True)]
    genres = [names.replace(" ", "|") for names in columns["genres"]]
    return {key: _Movie(*row) for key, *row in zip(columns["item_id"], titles, genres, strict=True)}


def _read_items_csv(source: Path) -> dict[str, _Movie]:
    path = find_file(source, "items.csv")
    if path is None:
        return {}
    names = column_names(path, _ITEMS_CSV)
    wanted = [part.name for part in fields(_Movie) if part.name in names]
    unused = [name for name in names if name not in ("item_id", *wanted)]
    if unused:
        logging.getLogger(__name__).info("%s: columns not used: %s", path, ", ".join(unused))
    columns = _columns(path, _ITEMS_CSV, ("item_id", *wanted), known=None)
    movies = {}
    for row, item_id in enumerate(columns["item_id"]):
        movie = _Movie(**{name: columns[name][row].strip() for name in wanted})
        if movie.poster:
            poster = PurePosixPath(movie.poster)
            if poster.is_absolute() or ".." in poster.parts or "\\" in movie.poster:
                raise DataError(f"{path} row {row + 2}: poster '{movie.poster}' must be a file name inside posters/")
            movie.poster = f"posters/{poster}"
        movies[item_id] = movie
    return movies


def _add_posters(source: Path, movies: dict[str, _Movie]) -> None:
    folder = source / "posters"
    if not folder.is_dir():
        return
    for path in sorted(folder.iterdir()):
        movie = movies.get(path.stem)
        if movie is not None and not movie.poster and path.suffix.lower() in _POSTER_SUFFIXES:
            movie.poster = f"posters/{path.name}"
