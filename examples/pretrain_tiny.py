"""From text to an evaluated language model: runs the commands of docs/pretraining.md, one after the other.

It trains a tokenizer and a small GPT-NeoX on the prose in Python's standard library, the model with 4 workers in 2
regions under HALoS. Then it exports the model, and compares it with the untrained model on lm-eval's questions::

    python examples/pretrain_tiny.py

Everything is written to the folder ``tiny``. The script fails unless the trained model is better at predicting the last
word of a passage, in accuracy and in perplexity, by more than three standard errors.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parent
TASKS = ("local_hellaswag", "local_lambada", "local_winogrande", "local_mmlu")
STANDARD_ERRORS = 3.0


def run(*command: object) -> None:
    """Prints a command and runs it."""
    words = [str(word) for word in command]
    print(f"\n$ {shlex.join(words)}", flush=True)
    program = Path(sys.executable).with_name(words[0])
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    subprocess.run([program, *words[1:]], check=True, env=environment)


def save_untrained(trained: Path, output: Path) -> None:
    """Saves a model of the same configuration with random weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(trained)).save_pretrained(output)
    AutoTokenizer.from_pretrained(trained).save_pretrained(output)


def improvements(comparison: Path) -> dict[str, float]:
    """Returns the improvement of the trained model, in standard errors, for each metric of the last-word task."""
    found = {}
    for row in json.loads(comparison.read_text())["comparisons"]:
        if row["task"] == "local_lambada":
            difference = row["minus untrained"]["trained"]
            errors = abs(difference["value"]) / difference["stderr"] if difference["stderr"] else 0.0
            found[row["metric"]] = errors if difference["better"] else -errors
    return found


def main() -> None:
    """Runs all steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("tiny"), help="the folder of everything that is made")
    parser.add_argument("--max-steps", type=int, default=500, help="global steps of the training")
    parser.add_argument("--limit", type=int, help="answer only so many questions of each task")
    args = parser.parse_args()
    out: Path = args.output
    tokens, logs, trained, untrained = out / "tokens", out / "run", out / "trained", out / "untrained"
    limit = [] if args.limit is None else ["--limit", args.limit]

    run("python", EXAMPLES / "make_tasks.py", "--training-text", out / "text.txt")
    run(
        *("lightning-halos", "prepare-data", out / "text.txt", "--output", tokens),
        *("--train-tokenizer", 2048, "--context", 64),
    )
    run(
        *("python", EXAMPLES / "pretrain_pythia.py", "fit", "--config", EXAMPLES / "pythia/tiny.yaml"),
        *("--data.prefix", tokens, "--trainer.logger.init_args.save_dir", logs, "--trainer.max_steps", args.max_steps),
    )
    run("lightning-halos", "export", logs / "checkpoints/last.ckpt", trained)
    save_untrained(trained, untrained)
    run(
        *("lightning-halos", "evaluate", "--compare", untrained, trained, "--tasks", ",".join(TASKS)),
        *("--include-path", EXAMPLES / "tasks", "--output", out / "evaluation", *limit),
    )
    better = improvements(out / "evaluation/comparison.json")
    for metric, errors in better.items():
        print(f"last-word {metric}: better by {errors:.1f} standard errors")
    if len(better) != 2 or min(better.values()) <= STANDARD_ERRORS:
        sys.exit(f"The trained model is not better by more than {STANDARD_ERRORS:g} standard errors: {better}")


if __name__ == "__main__":
    main()
