"""Amazon files for the tests in the format of each year: made-up shops, users and products."""

import gzip
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

HOUR = 3600
START = 1_400_000_000

# user, item, rating, seconds; the last two repeat the first in user and item, one of them in the second as well.
EVENTS = [
    ("AANNA000001", "B00MADEUP1", 5.0, START),
    ("ABEN0000002", "B00MADEUP2", 3.0, START + HOUR),
    ("AANNA000001", "B00MADEUP2", 4.0, START + 2 * HOUR),
    ("ACEM0000003", "0000MADEX3", 1.0, START + 3 * HOUR),
    ("AANNA000001", "B00MADEUP1", 2.0, START),
    ("AANNA000001", "B00MADEUP1", 2.0, START + 9 * HOUR),
]
KEPT = [event for row, event in enumerate(EVENTS) if row != 4]

META_2014: list[dict[str, Any]] = [
    {
        "asin": "B00MADEUP1",
        "title": "Don't Panic &amp; Relax Bath Salt",
        "brand": "Quietly",
        "categories": [["Beauty", "Bath &amp; Body", "Bath Salts"], ["Beauty", "Gifts"]],
        "description": "Sea salt with <b>lavender</b>.",
        "imUrl": "http://pictures.invalid/images/I/one.jpg",
        "salesRank": {"Beauty": 3},
    },
    {"asin": "B00MADEUP2", "imUrl": "http://pictures.invalid/images/I/two.png", "categories": [["Beauty"]]},
    {"asin": "B00NOBODY9", "title": "Reviewed by nobody", "categories": [["Beauty"]]},
]
META_2018: list[dict[str, Any]] = [
    {
        "asin": "B00MADEUP1",
        "title": "Don&#39;t Panic &amp;amp; Relax Bath Salt",
        "brand": "Quietly",
        "category": ["Beauty", "Bath & Body", "Bath Salts"],
        "feature": ["Dissolves in seconds", "<span>500 g</span>"],
        "description": ["Sea salt with <b>lavender</b>.", ""],
        "imageURL": ["https://pictures.invalid/images/I/one._SR38,50_.jpg"],
        "imageURLHighRes": ["https://pictures.invalid/images/I/one.jpg"],
    },
    {"asin": "B00MADEUP2", "title": "var aPageStart = (new Date()).getTime();", "imageURL": [], "category": []},
    {"asin": "B00MADEUP1", "title": "The same line again, later"},
]
META_2023: list[dict[str, Any]] = [
    {
        "main_category": "All Beauty",
        "title": "Don't Panic & Relax Bath Salt",
        "store": "Quietly",
        "categories": ["Beauty", "Bath & Body", "Bath Salts"],
        "features": ["Dissolves in seconds", "500 g"],
        "description": ["Sea salt with lavender."],
        "images": [
            {"variant": "PT01", "large": "https://pictures.invalid/images/I/side.jpg", "hi_res": None, "thumb": "t"},
            {"variant": "MAIN", "large": "https://pictures.invalid/images/I/one.jpg", "hi_res": None, "thumb": "t"},
        ],
        "parent_asin": "B00MADEUP1",
        "details": {"Item Weight": "500 g"},
    },
    {"title": "", "store": None, "categories": [], "images": [], "parent_asin": "B00MADEUP2"},
]


def put(path: Path, text: str, gz: bool = False) -> Path:
    path = path.with_name(path.name + ".gz") if gz else path
    path.write_bytes(gzip.compress(text.encode()) if gz else text.encode())
    return path


def json_lines(records: Sequence[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def reviews_2018(events: Sequence[tuple[str, str, float, int]] = EVENTS) -> str:
    return json_lines(
        [
            {
                "overall": rating,
                "verified": True,
                "reviewerID": user,
                "asin": item,
                "reviewerName": "Made Up",
                "reviewText": "Fine,\nreally",
                "unixReviewTime": time,
            }
            for user, item, rating, time in events
        ]
    )


def reviews_2023() -> str:
    return json_lines(
        [
            {
                "rating": rating,
                "title": "Fine",
                "text": "Really<br />",
                "images": [],
                "asin": f"{item[:-1]}V",
                "parent_asin": item,
                "user_id": user,
                "timestamp": time * 1000 + 7,
                "verified_purchase": True,
            }
            for user, item, rating, time in EVENTS
        ]
    )


def write_2014(folder: Path, gz: bool = False) -> None:
    put(folder / "reviews_Beauty_5.json", reviews_2018(), gz)
    # The publisher wrote Python's own form of a dict, with single quotes.
    put(folder / "meta_Beauty.json", "".join(f"{record!r}\n" for record in META_2014), gz)


def write_2018(folder: Path, gz: bool = False) -> None:
    put(folder / "Beauty_5.json", reviews_2018(), gz)
    put(folder / "meta_Beauty.json", json_lines(META_2018), gz)


def write_2023(folder: Path, gz: bool = False) -> None:
    put(folder / "Beauty.jsonl", reviews_2023(), gz)
    put(folder / "meta_Beauty.jsonl", json_lines(META_2023), gz)


def ratings_csv(order: str, header: str = "", milliseconds: bool = False) -> str:
    rows = [f"{header}\n"] if header else []
    for user, item, rating, time in EVENTS:
        when = time * 1000 + 7 if milliseconds else time
        fields = {"user": user, "item": item, "rating": rating, "time": when}
        rows.append(",".join(str(fields[name]) for name in order.split()) + "\n")
    return "".join(rows)


def write_csv_2014(folder: Path, gz: bool = False) -> None:
    put(folder / "ratings_Beauty.csv", ratings_csv("user item rating time"), gz)


def write_csv_2018(folder: Path, gz: bool = False) -> None:
    put(folder / "Beauty.csv", ratings_csv("item user rating time").replace("\n", "\r\n"), gz)


def write_csv_2023(folder: Path, gz: bool = False) -> None:
    header = "user_id,parent_asin,rating,timestamp"
    put(folder / "Beauty.csv", ratings_csv("user item rating time", header, milliseconds=True), gz)


FORMS: dict[str, Callable[[Path, bool], None]] = {
    "2014": write_2014,
    "2018": write_2018,
    "2023": write_2023,
    "csv 2014": write_csv_2014,
    "csv 2018": write_csv_2018,
    "csv 2023": write_csv_2023,
}
