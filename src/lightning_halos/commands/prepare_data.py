"""``lightning-halos prepare-data``: tokenizes text and writes the tokens to disk."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import get_args

from lightning_halos.commands.inputs import check_folder, given_path, refuse
from lightning_halos.core.checks import check_count

SUMMARY = "Tokenize text into Megatron's format: PREFIX.idx and PREFIX.bin, with the tokenizer in PREFIX-tokenizer."
EXAMPLES = """\
examples:
  lightning-halos prepare-data books/*.txt --output tokens/books --tokenizer EleutherAI/pythia-70m
      one sequence per document: MegatronDataModule("tokens/books", context=...) packs them to any context
  lightning-halos prepare-data '/usr/lib/python3*/**/*.py' --output tokens/python --train-tokenizer 4096 --context 256
      trains a tokenizer on the text; the sequences are packed and shuffled, ready to be read in order
  lightning-halos prepare-data --dataset wikitext --config wikitext-103-raw-v1 --output tokens/wikitext \\
      --tokenizer EleutherAI/pythia-70m
      a dataset of the Hugging Face hub
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments, and ``run``."""
    from lightning_halos.data.corpora import SampleBy

    parser.set_defaults(run=_prepare)
    text = parser.add_argument_group("the text")
    text.add_argument("files", nargs="*", metavar="INPUT", help="text, .jsonl or .parquet files, globs, or folders")
    text.add_argument("--dataset", metavar="NAME", help="instead of files, a dataset of the Hugging Face hub")
    text.add_argument("--config", metavar="NAME", help="the dataset's configuration")
    text.add_argument("--split", metavar="NAME", help="the dataset's split (default: train)")
    text.add_argument("--streaming", action="store_true", help="read the dataset without keeping a copy of it")
    text.add_argument("--field", metavar="NAME", help="field that has the text, except in text files (default: text)")
    text.add_argument(
        "--sample-by",
        choices=get_args(SampleBy),
        help="what counts as a document in text files (default: document, the complete file)",
    )
    how = parser.add_argument_group("the tokenizer").add_mutually_exclusive_group(required=True)
    how.add_argument("--tokenizer", metavar="NAME", help="a folder, or a name on the Hugging Face hub")
    how.add_argument("--train-tokenizer", type=int, metavar="SIZE", help="train a byte-level BPE with SIZE tokens")
    what = parser.add_argument_group("what to write")
    what.add_argument("--output", required=True, metavar="PREFIX", help="path of the files, without .idx and .bin")
    what.add_argument(
        "--context",
        type=int,
        metavar="N",
        help="pack the documents into sequences of N + 1 tokens (default: a sequence for each document)",
    )
    what.add_argument(
        "--shuffle",
        action=argparse.BooleanOptionalAction,
        help="whether to shuffle the packed sequences (default: yes)",
    )
    what.add_argument("--seed", type=int, help="seed of the shuffling (default: 0)")
    what.add_argument("--threads", type=int, metavar="N", help="threads of the tokenizer (default: one per core)")


def _prepare(arguments: argparse.Namespace) -> None:
    for name in ("context", "threads"):
        if getattr(arguments, name) is not None:
            check_count(f"--{name}", getattr(arguments, name))
    if arguments.threads is not None:
        os.environ["RAYON_NUM_THREADS"] = str(arguments.threads)  # read when the tokenizer first runs

    from lightning_halos.data.corpora import Corpus
    from lightning_halos.data.megatron import without_suffix
    from lightning_halos.data.tokenization import write_tokens
    from lightning_halos.data.tokenizers import load_tokenizer, train_tokenizer

    if bool(arguments.files) == bool(arguments.dataset):
        raise ValueError("give either INPUT files or --dataset NAME.")
    if arguments.files:
        refuse(arguments, "INPUT files are no dataset", "config", "split", "streaming")
    shuffle = arguments.shuffle is not False
    if arguments.context is None:
        if arguments.shuffle is not None:
            raise ValueError("only packed sequences (--context) are shuffled: leave --shuffle and --no-shuffle out.")
        refuse(arguments, "only packed sequences (--context) are shuffled", "seed")
    if not shuffle:
        refuse(arguments, "nothing is shuffled with --no-shuffle", "seed")
    names = ("files", "dataset", "config", "split", "field", "sample_by", "streaming")
    given = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    corpus = Corpus(**given)
    if corpus.is_text:
        refuse(arguments, "text files have no fields", "field")
    else:
        refuse(arguments, "--sample-by is for text files", "sample_by")
    prefix = without_suffix(given_path(arguments.output), "--output")
    check_folder("--output", prefix.parent)
    check_folder("--output", folder := Path(f"{prefix}-tokenizer"))
    if arguments.tokenizer:
        tokenizer = load_tokenizer(arguments.tokenizer)
    else:
        tokenizer = train_tokenizer(corpus.documents(), arguments.train_tokenizer)
    seed = (arguments.seed or 0) if shuffle else None
    summary = write_tokens(corpus.documents(), tokenizer, prefix, arguments.context, seed)
    tokenizer.save_pretrained(folder)
    length = f" of {arguments.context + 1} tokens" if arguments.context else ""
    print(f"documents        {summary.documents:,}")
    print(f"tokens           {summary.tokens:,}")
    print(f"bytes per token  {summary.text_bytes / summary.tokens:.3f}")
    print(f"sequences        {summary.sequences:,}{length}")
    print(f"vocabulary       {len(tokenizer):,}")
    print(f"\n{prefix}.idx, {prefix}.bin, {folder}/")
