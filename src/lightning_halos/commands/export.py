"""``lightning-halos export``: turns a Lightning checkpoint into a Hugging Face folder."""

from __future__ import annotations

import argparse

from lightning_halos.commands.inputs import given_path

SUMMARY = "Turn a Lightning checkpoint into a Hugging Face folder: weights, configurations, tokenizer and model card."
EXAMPLES = """\
examples:
  lightning-halos export checkpoints/last.ckpt my-model
      then AutoModelForCausalLM.from_pretrained("my-model")
  lightning-halos export last.ckpt my-model --config EleutherAI/pythia-70m --tokenizer EleutherAI/pythia-70m
      for a checkpoint from a training without the callback HuggingFaceCheckpoint
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments, and ``run``."""
    parser.set_defaults(run=_export)
    parser.add_argument(
        "checkpoint", type=given_path, help="the .ckpt file, from a training with the callback HuggingFaceCheckpoint"
    )
    parser.add_argument("output", type=given_path, help="the folder to write")
    parser.add_argument("--config", metavar="NAME_OR_FOLDER", help="the configuration, if the file has none")
    parser.add_argument("--tokenizer", metavar="NAME_OR_FOLDER", help="the tokenizer (default: the one in the file)")
    parser.add_argument("--submodule", metavar="NAME", help="the model, if the module has several, such as student")
    parser.add_argument(
        "--no-weights-only",
        dest="weights_only",
        action="store_false",
        help="unpickle any object in the file; only for files that you trust",
    )


def _export(arguments: argparse.Namespace) -> None:
    from lightning_halos.language.export import export_checkpoint

    output = export_checkpoint(
        arguments.checkpoint,
        arguments.output,
        config=arguments.config,
        tokenizer=arguments.tokenizer,
        submodule=arguments.submodule,
        weights_only=arguments.weights_only,
    )
    print(f"Wrote {output}: {', '.join(sorted(path.name for path in output.iterdir()))}")
    if not (output / "tokenizer_config.json").exists():
        print("The checkpoint has no tokenizer. Give one to the callback HuggingFaceCheckpoint, or here: --tokenizer")
