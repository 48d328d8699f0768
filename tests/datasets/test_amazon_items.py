"""What becomes of a line of metadata of each year."""

from pathlib import Path
from typing import Any

import pytest

from tests.datasets.amazon_data import META_2014, META_2018, META_2023, json_lines, put
from torchrec_em3.datasets.amazon_items import Product, describe_product, read_products
from torchrec_em3.errors import DataError


@pytest.mark.parametrize(
    ("record", "features"),
    [
        (META_2014[0], ""),
        (META_2018[0], " Dissolves in seconds. 500 g."),
        (META_2023[0], " Dissolves in seconds. 500 g."),
    ],
    ids=["2014", "2018", "2023"],
)
def test_each_year_says_the_same(record: dict[str, Any], features: str) -> None:
    product = describe_product(record)
    assert product.title == "Don't Panic & Relax Bath Salt"
    text = f"Don't Panic & Relax Bath Salt. Quietly. Bath & Body, Bath Salts.{features} Sea salt with lavender."
    assert product.text == text
    assert product.category == "Bath & Body"
    assert product.picture.endswith("/images/I/one.jpg")


def test_what_is_not_there_or_useless_is_empty() -> None:
    assert describe_product({"asin": "x"}) == Product()
    assert describe_product(META_2018[1]) == Product()
    assert describe_product(META_2023[1]) == Product()
    assert describe_product({"title": None, "category": 7, "feature": {"a": 1}, "images": "x"}) == Product()
    assert describe_product(META_2014[1]).category == "Beauty"


def test_a_brand_that_the_title_names_is_not_repeated() -> None:
    assert describe_product({"title": "ACME anvil, 5 kg", "brand": "Acme"}).text == "ACME anvil, 5 kg."


def test_pictures_in_the_columns_of_the_parquet_form_are_no_pictures_but_no_fault() -> None:
    assert describe_product({"images": {"large": ["https://pictures.invalid/a.jpg"]}}).picture == ""
    assert describe_product({"images": [None, {"variant": "MAIN", "hi_res": "https://h"}]}).picture == "https://h"
    assert describe_product({"imageURL": ["https://small"], "imageURLHighRes": []}).picture == "https://small"


def test_length_is_bounded() -> None:
    record = {"title": "word " * 1000, "description": ["<p>more</p> " * 500_000] * 20}
    assert len(describe_product(record).text) <= 2000


def test_only_wanted_items_are_kept_and_the_first_line_counts(tmp_path: Path) -> None:
    path = put(tmp_path / "meta.json", json_lines(META_2018))
    products = read_products(path, ["B00MADEUP1", "B00ELSEWHE"])
    assert list(products) == ["B00MADEUP1"]
    assert products["B00MADEUP1"].title.startswith("Don't Panic")


def test_python_literals_are_data_and_nothing_else(tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    path = put(tmp_path / "meta.json", f"{{'asin': __import__('pathlib').Path({str(mark)!r}).touch()}}\n")
    with pytest.raises(DataError, match=r"meta\.json row 1: not a Python dict of literals"):
        read_products(path, ["x"])
    assert not mark.exists()
