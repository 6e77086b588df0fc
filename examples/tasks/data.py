"""Reads the questions of the local tasks from the files in this folder, independently of the working directory.

lm-eval's own functions for the benchmarks turn a question into requests.
"""

from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict
from lm_eval.tasks.hellaswag.utils import process_docs
from lm_eval.tasks.winogrande.preprocess_winogrande import doc_to_choice, doc_to_target, doc_to_text

__all__ = ["doc_to_choice", "doc_to_target", "doc_to_text", "load", "process_docs"]


def load(files: dict[str, str], subject: str | None = None, **_: Any) -> DatasetDict:
    """Returns the splits of a task.

    Args:
        files: The file of JSON lines of each split.
        subject: Keep only the questions on this subject.
        **_: The task's metadata, which lm-eval also passes.
    """
    splits = {}
    for split, file in files.items():
        rows = Dataset.from_json(str(Path(__file__).with_name(file)))
        splits[split] = rows if subject is None else rows.filter(lambda row: row["subject"] == subject)
    return DatasetDict(splits)
