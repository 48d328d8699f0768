"""Options of single tables: which ids a table is looked up by, and what the planner may do with it."""

import dataclasses

from torchrec_em3.config import EmbeddingConfig, TableConfig
from torchrec_em3.errors import ConfigError
from torchrec_em3.parsing import parse_options
from torchrec_em3.schema import FeatureSchema, IdSpec

__all__ = ["ITEM_TABLE", "USER_TABLE", "table_options", "uses_raw_ids", "with_id_tables"]

USER_TABLE = "user_table"
ITEM_TABLE = "item_table"


def table_options(options: EmbeddingConfig, name: str) -> TableConfig:
    """Return the options of one table.

    Raises:
        ConfigError: If they have an unknown name or a value that does not fit.
    """
    return parse_options(TableConfig, options.tables.get(name, {}), f"embeddings.tables.{name}")


def uses_raw_ids(options: EmbeddingConfig, name: str) -> bool:
    """Return whether a table is looked up by raw ids in place of catalogue rows."""
    return table_options(options, name).ids != "fixed"


def with_id_tables(schema: FeatureSchema, options: EmbeddingConfig) -> FeatureSchema:
    """Return the schema with the ids of the user and the item table as the options say.

    Raises:
        ConfigError: If another table shall have raw ids: its values are a vocabulary.
    """
    for name in options.tables:
        if name not in (USER_TABLE, ITEM_TABLE) and uses_raw_ids(options, name):
            raise ConfigError(
                f"--embeddings.tables.{name}: ids is {table_options(options, name).ids}, which only "
                f"{USER_TABLE} and {ITEM_TABLE} can be; leave it out"
            )
    return dataclasses.replace(
        schema,
        user_ids=_spec(table_options(options, USER_TABLE)),
        item_ids=_spec(table_options(options, ITEM_TABLE)),
    )


def _spec(table: TableConfig) -> IdSpec:
    return IdSpec(table.ids, table.rows, table.eviction or "lfu")
