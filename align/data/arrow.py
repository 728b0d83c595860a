"""Arrow tables, as Parquet files and hub data sets hold them: rows without the nulls that only fill up structs.

All values of a column are of one type. Where one row has an object with the key `town` and another one with `number`,
both come out with both keys, and null under the one that was never written. Such a null is left out. A null that was
written cannot be told from it, with one exception: the schema keys `default` and `const`, where the file has nothing
but null under them. Nulls in lists and maps are no padding and stay, as do those in columns of JSON text.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from align.data.lines import Record
from align.recipe.errors import UserError

WRITTEN = ("default", "const")  # keys of JSON schemas that may say null


def parquet(path: Path) -> Iterator[Record]:
    """Numbered rows of a Parquet file."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            batches = table.iter_batches(batch_size=256)
            rows = (row for batch in batches for row in batch.to_pylist(maps_as_pydicts="strict"))
            yield from enumerate((unpadded(row, table.schema_arrow) for row in rows), 1)
    except (pyarrow.ArrowException, OSError, ValueError, KeyError) as error:
        raise UserError(f"{path}: cannot be read as Parquet: {error}") from error


def unpadded(row: dict[str, Any], schema: Any = None) -> dict[str, Any]:
    """The row's columns, all of them, without the padding inside; `schema` is their Arrow schema, if it is known."""
    kinds = {field.name: field.type for field in schema} if schema is not None else {}
    return {name: _without_padding(value, kinds.get(name)) for name, value in row.items()}


def _without_padding(value: Any, kind: Any) -> Any:
    from pyarrow import types

    if isinstance(value, list):
        inner = kind.value_type if kind is not None and hasattr(kind, "value_type") else None
        return [_without_padding(item, inner) for item in value]
    if not isinstance(value, dict):
        return value
    if kind is not None and types.is_map(kind):
        return {key: _without_padding(item, kind.item_type) for key, item in value.items()}
    known = {kind[i].name: kind[i].type for i in range(kind.num_fields)} if kind is not None else {}
    return {
        key: _without_padding(item, known.get(key))
        for key, item in value.items()
        if item is not None or (key in WRITTEN and key in known and types.is_null(known[key]))
    }
