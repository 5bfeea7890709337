# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Write rows as a dataset repository for the Hub: parquet or WebDataset files with the images inside."""

import io
import json
import shutil
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as parquet
from datasets import Dataset, Features, Image, IterableDataset
from datasets.utils import tqdm
from PIL import Image as PILImage

from .arrow_rows import batches, python_rows, python_values, rows_table
from .images import ImageError
from .output_files import write_text
from .rows import undecoded_images


ROWS_PER_GROUP = 100  # rows of a parquet row group; the dataset viewer reads whole groups
MAX_FILE_BYTES = 400 * 2**20
CARD = """---
configs:
- config_name: default
  data_files:
  - split: {split}
    path: "{pattern}"
---

{num_rows:,} rows with their images, written by `vtlmm data convert`.

```python
from vtlmm import load_rows

rows = load_rows("{name}", split="{split}")
```
"""


def write_dataset(
    rows: Dataset | IterableDataset,
    output: str | Path,
    to: Literal["parquet", "webdataset"] = "parquet",
    split: str = "train",
    card: str = CARD,
) -> Path:
    r"""
    Write rows and the bytes of their images into a folder that can be uploaded to the Hub as a dataset.

    The dataset viewer of the Hub shows the images. The column is `image` if no row has more than one image, else
    `images`. Image files are not decoded or changed, and only the names of the files are kept.

    Args:
        rows: rows of [`load_rows`], or others with a column `images` of lists of images.
        output (`str`): folder that does not exist or is empty.
        to (`str`, *optional*, defaults to `"parquet"`): or `"webdataset"`, tar files with one `.json` for each row.
        split (`str`, *optional*, defaults to `"train"`): name of the split.
        card (`str`, *optional*): the README with the fields of `CARD`.

    Returns:
        `Path`: the folder.

    Raises:
        `FileExistsError`: if `output` has files.
        `FileNotFoundError`, [`ImageError`]: for an image that cannot be read. The error names its row.
        `ValueError`: if there are no rows, or `to` is unknown.
    """
    if to not in ("parquet", "webdataset"):
        raise ValueError(f"`to` is {to!r}. It must be parquet or webdataset.")
    output = Path(output)
    require_new_folder(output)
    if isinstance(rows, IterableDataset):
        rows = Dataset.from_generator(rows.decode(False).__iter__, features=rows.features)
    if not len(rows):
        raise ValueError("There are no rows to write.")
    features, rows = rows.features, undecoded_images(rows)
    is_single = max(len(images) for images in _image_lists(rows)) <= 1
    draft = output.with_name(f".{output.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        embedded = _with_bytes(rows)
        if to == "parquet":
            _write_parquet(embedded, draft, split, features, is_single)
        else:
            _write_tar(embedded, draft, split)
        pattern = f"{split}-*.{'parquet' if to == 'parquet' else 'tar'}"
        readme = card.format(split=split, pattern=pattern, num_rows=len(rows), name=output.name)
        write_text(draft / "README.md", readme)
        if output.exists():
            output.rmdir()
        draft.rename(output)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return output


def require_new_folder(folder: Path) -> None:
    """
    Raises:
        `FileExistsError`: if `folder` has files.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and is not empty. Choose another folder, or delete it.")


def _image_lists(rows: Dataset) -> Iterator[list[Any]]:
    """Yield the images of each row, undecoded."""
    for table in rows.select_columns(["images"]).with_format("arrow").iter(batch_size=ROWS_PER_GROUP):
        yield from python_values(table["images"])


def _with_bytes(rows: Dataset) -> Iterator[dict]:
    """Yield rows whose images have their bytes and the name of their file."""
    number = 0
    with tqdm(total=len(rows), desc="Writing rows") as progress:
        for table in rows.with_format("arrow").iter(batch_size=ROWS_PER_GROUP):
            for row in python_rows(table):
                yield {**row, "images": [_image_bytes(image, number) for image in row["images"]]}
                number += 1
            progress.update(len(table))


def _image_bytes(image: dict, number: int) -> dict:
    path = image["path"]
    try:
        content = Path(path).read_bytes() if image["bytes"] is None else image["bytes"]
    except (OSError, TypeError, ValueError) as error:
        text = f"Row {number}: image {path!r} cannot be read. `vtlmm data check` lists all such rows."
        raise FileNotFoundError(text) from error
    return {"bytes": content, "path": None if path is None else Path(path).name}


def _write_parquet(rows: Iterable[dict], folder: Path, split: str, features: Features, is_single: bool) -> None:
    columns = {**features}
    images = columns.pop("images")
    columns = {"image": Image(), **columns} if is_single else {"images": images, **columns}
    written = Features({name: Image() if name == "image" else feature for name, feature in columns.items()})
    schema, writer, number, size = written.arrow_schema, None, 0, 0
    for batch in batches(rows, ROWS_PER_GROUP):
        if is_single:
            batch = [{**row, "image": next(iter(row.pop("images")), None)} for row in batch]
        table: pa.Table = rows_table(batch, written)
        if writer is None or size + table.nbytes > MAX_FILE_BYTES:
            if writer is not None:
                writer.close()
            writer, size = parquet.ParquetWriter(folder / f"{split}-{number:05}.parquet", schema), 0
            number += 1
        writer.write_table(table)
        size += table.nbytes
    if writer is not None:
        writer.close()


def _write_tar(rows: Iterable[dict], folder: Path, split: str) -> None:
    archive, number, size = None, 0, 0
    for index, row in enumerate(rows):
        images = row.pop("images")
        content = sum(len(image["bytes"]) for image in images)
        if archive is None or size + content > MAX_FILE_BYTES:
            if archive is not None:
                archive.close()
            archive, size = tarfile.open(folder / f"{split}-{number:05}.tar", "w"), 0  # noqa: SIM115
            number += 1
        size += content
        for position, image in enumerate(images):
            part = f".{position}" if len(images) > 1 else ""
            _add(archive, f"{index:08}{part}.{_suffix(image['bytes'], index)}", image["bytes"])
        _add(archive, f"{index:08}.json", json.dumps(row, ensure_ascii=False).encode())
    if archive is not None:
        archive.close()


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def _suffix(content: bytes, number: int) -> str:
    """Return the suffix of an image file from its content."""
    try:
        with PILImage.open(io.BytesIO(content)) as image:
            kind = str(image.format).lower()
    except Exception as error:  # Pillow raises many types
        raise ImageError(f"Row {number}: an image is not an image file. Run `vtlmm data check`.") from error
    return {"jpeg": "jpg", "mpo": "jpg", "jpeg2000": "jp2"}.get(kind, kind)
