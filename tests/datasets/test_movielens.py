"""MovieLens in every form it is shipped in, with what can be wrong with it."""

import gzip
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from torchrec_em3.datasets.movielens import read_movielens
from torchrec_em3.datasets.movielens_catalogue import movie_text
from torchrec_em3.datasets.raw import RawDataset
from torchrec_em3.errors import DataError

RATINGS = [
    ("1", "10", "5", "978300760"),
    ("2", "20", "3", "978300761"),
    ("1", "20", "4", "978300761"),
    ("3", "10", "1", "978300700"),
    ("3", "30", "2", "978300999"),
]
MOVIES = [
    ("10", "Matrix, The (1999)", ["Action", "Sci-Fi"]),
    ("20", "Misérables, Les (1995)", ["Drama"]),
    ("30", 'Say "Cheese": It\'s Fun, Too (1990)', []),
    ("40", "Never Rated (1980)", ["Children's"]),
]
USERS = [("1", "F", "1", "10"), ("2", "M", "45", "7"), ("3", "M", "25", "0")]
FLAGS = (
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


def put(path: Path, text: str, gz: bool = False, encoding: str = "utf-8") -> None:
    data = text.encode(encoding)
    if gz:
        path.with_name(path.name + ".gz").write_bytes(gzip.compress(data))
    else:
        path.write_bytes(data)


def lines(rows: Sequence[tuple[str, ...]], delimiter: str, header: str = "") -> str:
    return "".join(f"{line}\n" for line in ([header] if header else []) + [delimiter.join(row) for row in rows])


def write_100k(folder: Path, gz: bool = False) -> None:
    put(folder / "u.data", lines(RATINGS, "\t"), gz)
    rows = []
    for key, title, genres in MOVIES:
        flags = [str(int(flag in genres or (flag == "unknown" and not genres))) for flag in FLAGS]
        rows.append((key, title, "01-Jan-1995", "", "http://us.imdb.com/M/title-exact?x", *flags))
    put(folder / "u.item", lines(rows, "|") + "\n", gz, "latin-1")
    # The publisher gives years here, and words for the occupation.
    years = {"1": "9", "45": "49", "25": "25"}
    put(folder / "u.user", lines([(u, years[age], sex, job, "55117") for u, sex, age, job in USERS], "|"), gz)


def write_1m(folder: Path, gz: bool = False) -> None:
    put(folder / "ratings.dat", lines(RATINGS, "::"), gz)
    movies = [(key, title, "|".join(genres) or "unknown") for key, title, genres in MOVIES]
    put(folder / "movies.dat", lines(movies, "::"), gz, "latin-1")
    put(folder / "users.dat", lines([(*user, "48067-1234") for user in USERS], "::"), gz)


def write_csv(folder: Path, gz: bool = False) -> None:
    put(folder / "ratings.csv", lines(RATINGS, ",", "userId,movieId,rating,timestamp").replace("\n", "\r\n"), gz)
    movies = []
    for key, title, genres in MOVIES:
        quoted = '"' + title.replace('"', '""') + '"' if "," in title else title
        movies.append((key, quoted, "|".join(genres) or "(no genres listed)"))
    put(folder / "movies.csv", lines(movies, ",", "movieId,title,genres"), gz)


def write_recbole(folder: Path, gz: bool = False) -> None:
    header = "user_id:token\titem_id:token\trating:float\ttimestamp:float"
    put(folder / "ml-100k.inter", lines(RATINGS, "\t", header), gz)
    header = "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq"
    movies = [(key, title[:-7], title[-5:-1], " ".join(genres)) for key, title, genres in MOVIES]
    put(folder / "ml-100k.item", lines(movies, "\t", header), gz)
    header = "user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token"
    put(folder / "ml-100k.user", lines([(u, a, s, o, "85711") for u, s, a, o in USERS], "\t", header), gz)


FORMS = {"ml-100k": write_100k, "ml-1m": write_1m, "csv": write_csv, "recbole": write_recbole}


def events(raw: RawDataset) -> list[tuple[str, ...]]:
    columns = (raw.user_id, raw.item_id, raw.rating, raw.timestamp)
    return [(str(u), str(i), f"{r:g}", str(t)) for u, i, r, t in zip(*columns, strict=True)]


@pytest.mark.parametrize("gz", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_reads_to_the_same_data(tmp_path: Path, form: str, gz: bool) -> None:
    FORMS[form](tmp_path, gz)
    raw = read_movielens(tmp_path)
    assert events(raw) == RATINGS
    assert raw.rating.dtype == np.float32
    assert raw.timestamp.dtype == np.int64
    assert raw.items.item_id.tolist() == [movie[0] for movie in MOVIES]
    assert raw.items.title.tolist() == [movie[1] for movie in MOVIES]
    assert raw.items.category.tolist() == ["Action", "Drama", "", "Children's"]
    assert raw.items.text[0] == "The Matrix (1999). action, science fiction."
    assert raw.items.text[1] == "Les Misérables (1995). drama."
    if form == "csv":
        assert raw.user_features == {}
    else:
        assert raw.user_features["gender"] == {"1": "F", "2": "M", "3": "M"}
        assert raw.user_features["age"] == {"1": "1", "2": "45", "3": "25"}
        assert raw.user_features["occupation"] == {"1": "10", "2": "7", "3": "0"}
        assert "zip_code" not in raw.user_features


def test_items_csv_and_posters_stand_above_the_movies_file(tmp_path: Path) -> None:
    write_1m(tmp_path)
    rows = [
        "movie_id,title,genres,imdb_id,plot,abstract,poster",
        '10,The Matrix (1999),,1,"A hacker learns,\nto his ""surprise"", that all is simulated.",Two directors.,10.jpg',
        "20,,,2,,A film of 1995.,",
        "50,Only Here (2001),Comedy,3,,,gone.jpg",
    ]
    (tmp_path / "items.csv").write_text("\ufeff" + "\n".join(rows) + "\n", encoding="utf-8")
    (tmp_path / "posters").mkdir()
    for name in ("10.jpg", "20.jpg", "99.jpg", "README.txt"):
        (tmp_path / "posters" / name).write_bytes(b"")
    items = read_movielens(tmp_path).items
    assert items.item_id.tolist() == ["10", "20", "30", "40", "50"]
    assert items.text[0] == (
        'The Matrix (1999). action, science fiction. A hacker learns, to his "surprise", that all is simulated.'
    )
    assert items.text[1] == "Les Misérables (1995). drama. A film of 1995."
    assert items.image.tolist() == ["posters/10.jpg", "posters/20.jpg", "", "", "posters/gone.jpg"]
    assert items.category.tolist() == ["Action", "Drama", "", "Children's", "Comedy"]


def test_ratings_alone_are_enough(tmp_path: Path) -> None:
    put(tmp_path / "ratings.csv", lines(RATINGS, ",", "userId,movieId,rating,timestamp"))
    raw = read_movielens(tmp_path)
    assert sorted(raw.items.item_id.tolist()) == ["10", "20", "30"]
    assert set(raw.items.text.tolist()) == {""}
    assert raw.user_features == {}


@pytest.mark.parametrize("absolute", [False, True])
def test_ratings_file_of_another_name(tmp_path: Path, absolute: bool) -> None:
    write_1m(tmp_path)
    put(tmp_path / "first_half.dat", lines(RATINGS[:2], "::"), gz=True)
    name = Path("first_half.dat.gz")
    raw = read_movielens(tmp_path, tmp_path / name if absolute else name)
    assert events(raw) == RATINGS[:2]
    assert raw.name == f"{tmp_path.name} (first_half.dat.gz)"


def test_text_puts_the_most_telling_words_first_and_holds_no_control_characters() -> None:
    text = movie_text("American in Paris, An (1951)", ["Film-Noir"], "A\x00plot\twith\nbreaks!", "An abstract")
    assert text == "An American in Paris (1951). film noir. A plot with breaks!"
    assert movie_text("", [], "", "An abstract") == "An abstract."
    assert movie_text("", [], "", "") == ""
    assert len(movie_text("T", [], "word " * 2_000_000, "")) <= 2000


def edit(name: str, old: str, new: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        text = (folder / name).read_text(encoding="latin-1")
        assert old in text
        (folder / name).write_text(text.replace(old, new, 1), encoding="latin-1")

    return apply


DAT, CSV = "ratings.dat", "ratings.csv"
FAULTS = [
    ("ml-1m", edit(DAT, "::978300761", "::"), r"ratings\.dat row 2: timestamp is empty, which is not a whole number"),
    ("ml-1m", edit(DAT, "978300761", "yesterday"), r"ratings\.dat row 2: timestamp is 'yesterday'"),
    (
        "ml-1m",
        edit(DAT, "978300761", "978300761.5"),
        r"row 2: timestamp is '978300761\.5', which is not a whole number",
    ),
    ("ml-1m", edit(DAT, "978300761", "-978300761"), r"row 2: timestamp is -978300761, before 1970"),
    ("ml-1m", edit(DAT, "978300761", "978300761000"), r"row 2: timestamp is 978300761000, .*not milliseconds"),
    ("ml-1m", edit(DAT, "::3::", "::nan::"), r"ratings\.dat row 2: rating is nan, which is not a finite number"),
    ("ml-1m", edit(DAT, "::3::", "::6::"), r"ratings\.dat row 2: rating is 6\.0, outside 0\.5\.\.5"),
    ("ml-1m", edit(DAT, "::3::", "::good::"), r"ratings\.dat row 2: rating is 'good', which is not a number"),
    ("ml-1m", edit(DAT, "::3::", "::3::9::"), r"ratings\.dat row 2: 5 fields, expected 4 \(user_id, item_id, rating"),
    ("ml-1m", edit(DAT, "2::20", "\n2::20"), r"ratings\.dat row 2: user_id is empty|row 2: rating is empty"),
    ("ml-1m", edit(DAT, "2::20", "::20"), r"ratings\.dat row 2: user_id is empty"),
    (
        "ml-1m",
        edit(DAT, "3::10::1::978300700", "1::10::2::978300760"),
        r"row 4: .*user_id 1.*item_id 10.* repeat row 1",
    ),
    ("csv", edit(CSV, "timestamp", "time"), r"ratings\.csv row 1: no column 'timestamp' among .* Did you mean 'time'"),
    ("csv", edit(CSV, ",timestamp", ",timestamp,device"), r"ratings\.csv row 1: unknown column 'device'"),
    ("csv", edit(CSV, ",timestamp", ",timestamp,rating"), r"ratings\.csv row 1: column 'rating' stands there 2 times"),
    ("csv", edit(CSV, "1,10,5,978300760", '1,10,5,"978300760'), r"ratings\.csv"),
    ("csv", edit("movies.csv", "20,", "10,"), r"movies\.csv row 3: item_id '10' stands in row 2 already"),
    ("csv", edit("movies.csv", "Never", "N\xffver"), r"movies\.csv row 5: title is .*, which is not UTF-8 text"),
    ("ml-1m", edit("users.dat", "2::M", "1::M"), r"users\.dat row 2: user_id '1' stands in row 1 already"),
    ("ml-1m", edit("users.dat", "::45::", "::old::"), r"users\.dat row 2: age is 'old', which is not a whole number"),
    ("ml-100k", edit("u.item", "|01-Jan-1995", ""), r"u\.item row 1: 23 fields, expected 24"),
    ("recbole", edit("ml-100k.inter", "rating:float", "stars:float"), r"ml-100k\.inter row 1: no column 'rating'"),
]


@pytest.mark.parametrize(("form", "spoil", "message"), FAULTS, ids=[fault[2][:45] for fault in FAULTS])
def test_a_fault_is_named_by_file_row_and_field(
    tmp_path: Path, form: str, spoil: Callable[[Path], None], message: str
) -> None:
    FORMS[form](tmp_path)
    spoil(tmp_path)
    with pytest.raises(DataError, match=message) as caught:
        read_movielens(tmp_path)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("movie_id,title\n10,a\n10,b\n", r"items\.csv row 3: item_id '10' stands in row 2 already"),
        ("title,plot\na,b\n", r"items\.csv row 1: no column 'item_id'"),
        (
            "item_id,poster\n10,../../secret.jpg\n",
            r"items\.csv row 2: poster '\.\./\.\./secret\.jpg' must be a file name",
        ),
        ("item_id,title\n,a\n", r"items\.csv row 2: item_id is empty"),
        ("item_id,title\n10,a,b\n", r"items\.csv row 2: 3 fields, expected 2"),
        ("item_id,title\n", r"items\.csv: the file holds no rows"),
    ],
)
def test_faults_of_items_csv(tmp_path: Path, text: str, message: str) -> None:
    write_1m(tmp_path)
    (tmp_path / "items.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        read_movielens(tmp_path)


def test_a_ratings_file_without_timestamps_says_what_is_impossible(tmp_path: Path) -> None:
    put(tmp_path / "all.dat", lines([row[:3] for row in RATINGS], "::"), gz=True)
    put(tmp_path / "all.csv", lines([row[:3] for row in RATINGS], ",", "userId,movieId,rating"))
    for name in ("all.dat.gz", "all.csv"):
        with pytest.raises(DataError, match=r"timestamp is missing; .*temporal, leave_last, cold_items"):
            read_movielens(tmp_path, Path(name))


def test_files_that_cannot_be_used_at_all(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"looked for u\.data, \*\.inter, ratings\.dat, ratings\.csv"):
        read_movielens(tmp_path)
    (tmp_path / "ratings_part.dat").write_text("x")
    with pytest.raises(DataError, match=r"--ratings could name ratings_part\.dat"):
        read_movielens(tmp_path)
    with pytest.raises(DataError, match=r"is no MovieLens rating"):
        read_movielens(tmp_path, Path("ratings_part.dat"))
    with pytest.raises(DataError, match=r"no such ratings file"):
        read_movielens(tmp_path, Path("ratings_part.csv"))
    with pytest.raises(DataError, match=r"not a folder"):
        read_movielens(tmp_path / "ratings_part.dat")
    write_csv(tmp_path)
    (tmp_path / "ratings.csv").write_text("userId,movieId,rating,timestamp\n")
    with pytest.raises(DataError, match=r"ratings\.csv: the file holds no rows"):
        read_movielens(tmp_path)
    (tmp_path / "ratings.csv").write_text("")
    with pytest.raises(DataError, match=r"ratings\.csv: the file is empty"):
        read_movielens(tmp_path)
    write_1m(tmp_path)
    with pytest.raises(DataError, match=r"several ratings files \(ratings\.dat, ratings\.csv\)"):
        read_movielens(tmp_path)


def test_truncated_or_false_gzip_is_named(tmp_path: Path) -> None:
    whole = gzip.compress(os.urandom(3000).hex().encode())
    for data in (whole[: len(whole) // 2], whole[:5], b"<html>404</html>", whole[:40] + b"\xff" * 40 + whole[80:]):
        (tmp_path / "ratings.dat.gz").write_bytes(data)
        with pytest.raises(DataError, match=r"ratings\.dat\.gz: the gzip data is truncated or damaged"):
            read_movielens(tmp_path)


real = pytest.mark.skipif("EM3_REAL_DATA" not in os.environ, reason="EM3_REAL_DATA names no folder of real data")


@real
def test_real_ml_100k() -> None:
    raw = read_movielens(Path(os.environ["EM3_REAL_DATA"]) / "ml-100k")
    assert (len(raw.rating), len(np.unique(raw.user_id)), len(raw.items.item_id)) == (100_000, 943, 1682)
    assert (raw.timestamp.min(), raw.timestamp.max()) == (874724710, 893286638)
    root = raw.image_root
    assert sum((root / path).is_file() for path in raw.items.image if path) == 1476
    assert np.all(raw.items.text != "")


@real
def test_real_ml_1m_timed_half() -> None:
    source = Path(os.environ["EM3_REAL_DATA"]) / "ml-1m"
    raw = read_movielens(source, Path("ratings_users_1_to_2999.dat.gz"))
    assert (len(raw.rating), len(np.unique(raw.user_id)), len(np.unique(raw.item_id))) == (487_650, 2999, 3615)
    assert (raw.timestamp.min(), raw.timestamp.max()) == (970620734, 1046388675)
    assert len(raw.items.item_id) == 3883
    assert sum((source / path).is_file() for path in raw.items.image if path) == 3326
    assert "Misérables, Les (1995)" in raw.items.title
    with pytest.raises(DataError, match="timestamp is missing"):
        read_movielens(source, Path("ratings_all_no_timestamp.dat.gz"))
