"""Arrow tables, as Parquet files and hub data sets hold them: rows without the nulls that only fill up structs.

All values of a column are of one type. Where one row has an object with the key `town` and another one with `number`,
both come out with both keys, and null under the one that was never written. Such a null is left out. A null that was
written cannot be told from it, with one exception: the schema keys `default` and `const`, where the file has nothing
but null under them. Nulls in lists, maps and JSON are no padding and stay.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from align.data.files.lines import Record
from align.recipe.errors import UserError

WRITTEN = {"default", "const"}  # keys of JSON schemas that may say null


def parquet(path: Path) -> Iterator[Record]:
    """Numbered rows of a Parquet file."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            clean = unpadded(table.schema_arrow)
            batches = table.iter_batches(batch_size=256)
            rows = (row for batch in batches for row in batch.to_pylist(maps_as_pydicts="strict"))
            yield from enumerate(map(clean, rows), 1)
    except (pyarrow.ArrowException, OSError, ValueError, KeyError) as error:
        raise UserError(f"{path}: cannot be read as Parquet: {error}") from error


def unpadded(schema: Any = None) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """What takes the padding out of a row's columns, none of which it drops; `schema`: their Arrow schema, if any."""
    columns = {} if schema is None else {field.name: _clean(field.type) for field in schema}
    return lambda row: {name: columns.get(name, _without_nulls)(value) for name, value in row.items()}


def _without_nulls(value: Any) -> Any:
    """A value of unknown type without the nulls of its objects."""
    if isinstance(value, dict):
        return {name: _without_nulls(inner) for name, inner in value.items() if inner is not None}
    return list(map(_without_nulls, value)) if isinstance(value, list) else value


def _clean(kind: Any) -> Callable[[Any], Any]:
    from pyarrow import JsonType, types

    if isinstance(kind, JsonType):  # as `datasets` stores objects whose keys differ from row to row
        return lambda text: text and json.loads(text)
    if types.is_struct(kind):
        inside = {kind[i].name: _clean(kind[i].type) for i in range(kind.num_fields)}
        written = {kind[i].name for i in range(kind.num_fields) if types.is_null(kind[i].type)} & WRITTEN
        return lambda struct: (
            struct
            and {name: inside[name](value) for name, value in struct.items() if value is not None or name in written}
        )
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        item = _clean(kind.value_type)
        return lambda values: values and list(map(item, values))
    if types.is_map(kind):
        item = _clean(kind.item_type)
        return lambda pairs: pairs and {name: item(value) for name, value in pairs.items()}
    return lambda value: value
