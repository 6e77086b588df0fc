"""Makes the questions of the local tasks in ``examples/tasks``, from text that the examples do not train on.

The text is English prose: the docstrings and comments in the packages (folders) of Python's standard library. The
examples train on its top-level modules (files). Passages with a sentence that occurs in both are left out. The
committed questions were made with Python 3.11.7 and seed 0::

    python examples/make_tasks.py

With ``--training-text``, the script instead writes similar text to train on, from the top-level modules and from the
language reference of ``help()``::

    python examples/make_tasks.py --training-text text.txt

The tasks have the formats of four common benchmarks of language models: HellaSwag, LAMBADA, WinoGrande and MMLU. The
correct answer is always the original text. docs/evaluation.md says what the real benchmarks test beyond that.
"""

import argparse
import ast
import json
import random
import re
import sysconfig
import tokenize
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

SUBJECTS = {
    "concurrency": ("asyncio", "concurrent", "multiprocessing"),
    "internet": ("email", "html", "http", "urllib", "wsgiref", "xml", "xmlrpc"),
    "tools": ("curses", "distutils", "importlib", "logging", "tkinter", "unittest", "zoneinfo"),
}

Row = dict[str, Any]
Passage = tuple[str, list[str]]  # a package, and consecutive sentences from it

_SENTENCE = re.compile(r"[A-Z`'\"(].{20,240}?[.!?](?= |$)")
_WORD = re.compile(r"(?<![\w.-])[A-Za-z]{4,}(?![\w(-]|\.\w)")  # no parts of identifiers
_PLAIN = re.compile(r"[A-Za-z0-9 ,;:.!?'\"()/_=*`-]+")
_NO_PROSE = re.compile(r">>>|X{3}|TO[D]O|FIX[M]E")  # examples of code, and the authors' notes to themselves
_COMMON = 150  # number of the most frequent words that are not used as answers: "with" fits nearly everywhere


def passages(package: str) -> Iterator[Passage]:
    """Reads the paragraphs of prose in the docstrings and comments of a package."""
    seen = set()
    for path in sorted((Path(sysconfig.get_path("stdlib")) / package).rglob("*.py")):
        if path.parent.name in ("test", "tests"):
            continue
        for paragraph in (*_docstrings(path), *_comments(path)):
            text = " ".join(paragraph.split())
            sentences = _SENTENCE.findall(text)
            is_prose = _PLAIN.fullmatch(text) and " ".join(sentences) == text and not _NO_PROSE.search(text)
            if is_prose and text not in seen:
                seen.add(text)
                yield package, sentences


def training_text() -> Iterator[str]:
    """Reads docstrings and comments of the library's top-level modules, and what ``help()`` knows of the language."""
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        yield from filter(str.strip, (*_docstrings(path), *_comments(path)))
    yield from topics.values()


def is_unseen(sentences: list[str], training: str) -> bool:
    """Whether none of the sentences occurs in the training text, even without its final punctuation mark."""
    return not any(sentence.rstrip(".!?") in training for sentence in sentences)


def _docstrings(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from re.split(r"\n\s*\n", ast.get_docstring(node) or "")


def _comments(path: Path) -> Iterator[str]:
    """Comments on lines of their own, those on consecutive lines together."""
    block: list[str] = []
    last = -1
    with path.open("rb") as file:
        for token in tokenize.tokenize(file.readline):
            if token.type != tokenize.COMMENT or not token.line.strip().startswith("#"):
                continue
            text = token.string.lstrip("#").strip()
            if token.start[0] != last + 1 or not text:
                yield " ".join(block)
                block = []
            block.append(text)
            last = token.start[0]
    yield " ".join(block)


def endings(texts: list[Passage], chance: random.Random) -> Iterator[Row]:
    """HellaSwag: which of four endings continues the text? The wrong ones end other paragraphs and are as long."""
    last = [(package, sentences[-1]) for package, sentences in texts]
    for package, sentences in texts:
        true = sentences[-1]
        others = [end for _, end in last if end != true and 0.8 < len(end) / len(true) < 1.25]
        if len(sentences) < 2 or len(others) < 3:
            continue
        choices = [true, *chance.sample(others, 3)]
        chance.shuffle(choices)
        yield {
            "activity_label": package,
            "ctx_a": " ".join(sentences[:-1]),
            "ctx_b": "",
            "endings": choices,
            "label": str(choices.index(true)),
        }


def last_words(texts: list[Passage]) -> Iterator[Row]:
    """LAMBADA: which word ends the text?"""
    for _, sentences in texts:
        for end in range(1, len(sentences) + 1):
            text = " ".join(sentences[max(0, end - 3) : end]).rstrip(".!?")
            *before, word = text.split(" ")
            if len(before) >= 12 and word.isalpha():
                yield {"text": text}
                break


def blanks(texts: list[Passage], common: set[str], chance: random.Random) -> Iterator[Row]:
    """WinoGrande: which of two words of the text fits the blank, given the text after it?"""
    for _, sentences in texts:
        text = " ".join(sentences[-2:])
        if "_" in text:
            continue
        words = [match for match in _WORD.finditer(text) if match.group() not in common and match.group().islower()]
        counts = Counter(match.group() for match in words)
        repeated = [match for index, match in enumerate(words) if match.group() in {m.group() for m in words[:index]}]
        repeated = [match for match in repeated if len(text[match.end() :].split()) >= 4]
        wrong = sorted(word for word, count in counts.items() if count == 1)
        if not repeated or not wrong:
            continue
        blank = chance.choice(repeated)
        wrong = [word for word in wrong if text.index(word) < blank.start()]
        if not wrong:
            continue
        options = [blank.group(), chance.choice(wrong)]
        chance.shuffle(options)
        yield {
            "sentence": f"{text[: blank.start()]}_{text[blank.end() :]}",
            "option1": options[0],
            "option2": options[1],
            "answer": str(options.index(blank.group()) + 1),
        }


def missing_words(subject: str, texts: list[Passage], common: set[str], chance: random.Random) -> Iterator[Row]:
    """MMLU: which of four words is missing? The wrong ones are as frequent in texts on the subject."""
    counts = Counter(word for _, sentences in texts for word in _words(sentences) if word not in common)
    ranked = [word for word, count in counts.most_common() if count > 1]
    for _, sentences in texts:
        sentence = chance.choice(sentences)
        candidates = [word for word in _words([sentence]) if word in ranked]
        if not candidates or len(sentence.split()) < 8:
            continue
        true = chance.choice(candidates)
        place = ranked.index(true)
        near = [word for word in ranked[max(0, place - 15) : place + 15] if word not in sentence]
        if len(near) < 3:
            continue
        choices = [true, *chance.sample(near, 3)]
        chance.shuffle(choices)
        gap = re.sub(rf"\b{true}\b", "____", sentence)
        yield {
            "question": f"Which word is missing?\n{gap}",
            "subject": subject,
            "choices": choices,
            "answer": choices.index(true),
        }


def _words(sentences: Iterable[str]) -> list[str]:
    return [word for sentence in sentences for word in _WORD.findall(sentence) if word.islower()]


def main() -> None:
    """Writes the questions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "tasks", help="the folder to write to")
    parser.add_argument("--questions", type=int, default=240, help="per task, where the text has so many")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--training-text", type=Path, metavar="FILE", help="write text to train on, and no questions")
    args = parser.parse_args()
    if args.training_text:
        args.training_text.parent.mkdir(parents=True, exist_ok=True)
        args.training_text.write_text("\n\n".join(training_text()), encoding="utf-8")
        return

    chance = random.Random(args.seed)
    training = " ".join(" ".join(training_text()).split())
    texts = {
        subject: [p for package in packages for p in passages(package) if is_unseen(p[1], training)]
        for subject, packages in SUBJECTS.items()
    }
    everything = [passage for subject in texts.values() for passage in subject]
    chance.shuffle(everything)
    frequent = Counter(word for _, sentences in everything for word in _words(sentences)).most_common(_COMMON)
    common = {word for word, _ in frequent}

    def write(name: str, rows: Iterable[Row], limit: int) -> None:
        chosen = list(rows)[:limit]
        lines = [json.dumps(row, ensure_ascii=False) for row in chosen]
        (args.output / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"{name}: {len(chosen)} questions")

    args.output.mkdir(parents=True, exist_ok=True)
    write("hellaswag.jsonl", endings(everything, chance), args.questions)
    write("lambada.jsonl", last_words(everything), 8 * args.questions)  # small models are seldom right
    write("winogrande.jsonl", blanks(everything, common, chance), args.questions)
    mmlu = {subject: list(missing_words(subject, some, common, chance)) for subject, some in texts.items()}
    for rows in mmlu.values():
        chance.shuffle(rows)
    per_subject = args.questions // len(SUBJECTS)
    write("mmlu_dev.jsonl", [row for rows in mmlu.values() for row in rows[:5]], args.questions)
    write("mmlu_test.jsonl", [row for rows in mmlu.values() for row in rows[5 : 5 + per_subject]], args.questions)


if __name__ == "__main__":
    main()
