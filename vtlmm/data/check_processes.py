# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Check the rows of a dataset in blocks, in several processes. The memory does not grow with the number of rows."""

import os
import pickle
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from datasets.utils import tqdm

from .arrow_rows import ROWS_PER_BATCH
from .row_checker import RowChecker


ROWS_PER_BLOCK = 5000
# A larger dataset, pickled, has its rows in memory and is not opened again
MAX_PICKLED = 2**20


class BlockChecker:
    """
    Check a block of rows.

    An open file counts as memory once its rows were read, so a dataset of files is opened again for each block.

    Args:
        dataset (`Dataset`): rows in the format `"arrow"`.
        checker ([`RowChecker`])
        num_rows (`int`): rows of a block.
    """

    def __init__(self, dataset: Dataset, checker: RowChecker, num_rows: int):
        self.dataset, self.checker, self.num_rows = dataset, checker, num_rows
        self.pickled = pickle.dumps(dataset) if dataset.cache_files else b""

    def __call__(self, start: int) -> pa.Table:
        """Return a table of `RESULT_FEATURES` for the block that begins at row `start`."""
        is_file = 0 < len(self.pickled) < MAX_PICKLED
        dataset = pickle.loads(self.pickled) if is_file else self.dataset
        stop = min(start + self.num_rows, len(dataset))
        parts = [(first, min(first + ROWS_PER_BATCH, stop)) for first in range(start, stop, ROWS_PER_BATCH)]
        return _with_one_unknown([self.checker.check_table(dataset[first:last]) for first, last in parts])


def _with_one_unknown(tables: list[pa.Table]) -> pa.Table:
    """Return the tables as one, with the first of the unknown answers. The report shows one of all rows."""
    table = pa.concat_tables(tables).combine_chunks()
    texts = table["unknown_answer"]
    is_first = np.zeros(len(table), dtype=bool)
    is_first[int(np.argmax(pc.not_equal(texts, "").to_numpy()))] = True
    column = table.column_names.index("unknown_answer")
    return table.set_column(column, table.field(column), pc.if_else(pa.array(is_first), texts, ""))


def check_blocks(dataset: Dataset, checker: RowChecker, num_proc: int) -> list[pa.Table]:
    """
    Return tables of `RESULT_FEATURES` for all rows of a dataset in the format `"arrow"`, in order.

    Raises:
        `ChildProcessError`: if a process was killed.
    """
    num_rows = max(1, min(ROWS_PER_BLOCK, -(-len(dataset) // (4 * num_proc))))
    check, starts = BlockChecker(dataset, checker, num_rows), range(0, len(dataset), num_rows)
    tables = []
    with tqdm(total=len(dataset), desc="Checking rows") as progress:

        def collect(results) -> None:
            for table in results:
                tables.append(table)
                progress.update(len(table))

        if num_proc == 1:
            collect(map(check, starts))
        else:
            # `multiprocessing.Pool` would wait forever for the rows of a killed process.
            with ProcessPoolExecutor(num_proc, initializer=_start_process, initargs=(check,)) as executor:
                try:
                    collect(executor.map(_check_block, starts))
                except BrokenProcessPool:
                    raise ChildProcessError(
                        "A process that checks rows was killed, usually because the memory was full. Free memory, "
                        "and start again."
                    ) from None
    return tables


_process_check: BlockChecker | None = None


def _start_process(check: BlockChecker) -> None:
    global _process_check
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes share the cores already
    _process_check = check


def _check_block(start: int) -> pa.Table:
    assert _process_check is not None
    return _process_check(start)
