"""What goes into training: data sets from files, batches without duplicates, and a tokenizer trained from scratch.

Training data has two or more text columns whose ORDER is their meaning, as in sentence-transformers: anchor, positive,
then any number of negatives. Scored pairs (STS) have sentence1, sentence2 and score.
"""

from __future__ import annotations

import csv
import json
import logging
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import Dataset, DatasetDict, DatasetInfo, IterableDataset, load_dataset, load_from_disk
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import BertTokenizer, PreTrainedTokenizerFast

from triton_st.sampler import DefaultBatchSampler, NoDuplicatesBatchSampler

__all__ = [
    "LABEL_COLUMNS",
    "DefaultBatchSampler",
    "NoDuplicatesBatchSampler",
    "decoded_lines",
    "load_sts_dataset",
    "load_training_dataset",
    "train_wordpiece_tokenizer",
]

logger = logging.getLogger(__name__)

LABEL_COLUMNS = ("label", "labels", "score", "scores")
"""Columns that sentence-transformers hands to the loss as labels instead of embedding them."""

_FILE_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
_HUB_ID = re.compile(r"\w[\w.-]*(/[\w.-]+)?(:[\w.-]+)?")
_NEGATIVE = re.compile(r"negative(?:_?(\d+))?")
_SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_ENDINGS = r"(?<=\p{L}{3})(?:ing|ed|es|e|(?<!s)s)$"
_MAX_ALPHABET = 1000  # the trainer's own default; beyond it, rare characters become [UNK]

Source: TypeAlias = Dataset | DatasetDict | str | Path


# --- data sets ---------------------------------------------------------------------------------------------------


def load_training_dataset(source: Source, *, split: str = "train", max_samples: int | None = None) -> Dataset:
    """Load (anchor, positive[, negative, ...]) rows, checked cell by cell.

    Columns keep the order they have in `source`, whatever their names: first the anchor, then its positive, then
    negatives. Only if they carry the names anchor, positive, negative, negative_1, ... in another order (as a JSON
    writer that sorts its keys leaves them) are they brought back into that one. Label columns (label, labels, score,
    scores) are left out: the ranking losses do not read them.

    Files are read into memory; nothing is cached beside them. A hub id goes through `datasets.load_dataset`.

    Args:
        source: a `Dataset`; a `DatasetDict`; a .jsonl, .json (JSON lines as well), .csv (with a header) or .parquet
            file; a folder written by `Dataset.save_to_disk`; or a hub id, "owner/name" or "owner/name:config".
        split: which split of a `DatasetDict` or of a hub data set.
        max_samples: keep the first so many rows; later ones are not even read.

    Raises:
        FileNotFoundError: `source` is neither a file here nor a data set the hub gives.
        TypeError: `source` is of another type.
        ValueError: anything wrong inside, with file, row (the line, counted from 1, in text files; the index, counted
            from 0, elsewhere) and column.
    """
    dataset, where = _open_source(source, split, max_samples)
    labels = [name for name in dataset.column_names if name in LABEL_COLUMNS]
    if len(dataset.column_names) - len(labels) < 2:
        raise ValueError(
            f"{where.name}: expected at least two text columns, anchor and positive (then any negatives), "
            f"got {_listed(dataset.column_names)}"
        )
    dataset = dataset.remove_columns(labels) if labels else dataset
    for column in dataset.column_names:
        where.check_text(dataset, column)
    by_name = sorted(dataset.column_names, key=_canonical_rank)
    if by_name != dataset.column_names and all(_canonical_rank(name)[0] < 3 for name in by_name):
        logger.warning("%s: columns %s taken as %s", where.name, _listed(dataset.column_names), _listed(by_name))
        dataset = dataset.select_columns(by_name)
    return dataset


def load_sts_dataset(source: Source, *, split: str = "validation", max_samples: int | None = None) -> Dataset:
    """Load scored sentence pairs as columns sentence1, sentence2 (string) and score (float64).

    The score column is the one called score, scores, label or labels; the sentences are the columns sentence1 and
    sentence2, or the two that are left, in their order. Scores stay on the scale they come in (0-5 in STS-Benchmark):
    correlations, which is all that `EmbeddingSimilarityEvaluator` computes, do not depend on it. A loss that compares
    scores with cosines wants them in [0, 1]: divide by 5, as the examples of sentence-transformers do.

    Arguments and errors are those of `load_training_dataset`.
    """
    dataset, where = _open_source(source, split, max_samples)
    names = dataset.column_names
    score = next((name for name in ("score", "scores", "label", "labels") if name in names), None)
    pair = ["sentence1", "sentence2"]
    if not set(pair) <= set(names):
        pair = [name for name in names if name not in LABEL_COLUMNS]
    if score is None or len(pair) != 2:
        raise ValueError(f"{where.name}: expected columns sentence1, sentence2 and score, got {_listed(names)}")
    for column in pair:
        where.check_text(dataset, column)
    scores = where.parse_scores(dataset, score)
    table = dataset.select_columns(pair).with_format("arrow")[:]
    return Dataset.from_dict(
        {
            "sentence1": table.column(pair[0]),
            "sentence2": table.column(pair[1]),
            "score": pa.array(scores, pa.float64()),
        }
    )


def _canonical_rank(column: str) -> tuple[int, int]:
    """Where a column called `column` belongs by its name; (3, 0) for a name that says nothing."""
    if column in ("anchor", "positive"):
        return (("anchor", "positive").index(column), 0)
    if match := _NEGATIVE.fullmatch(column):
        return (2, int(match[1] or 0))
    return (3, 0)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "no columns"


class _Origin:
    """Where rows come from, to say so in an error: a name, and the line of each row for text files."""

    def __init__(self, name: str, lines: list[int] | None = None) -> None:
        self.name = name
        self.lines = lines

    def at(self, row: int, column: str) -> str:
        place = f"line {self.lines[row]}" if self.lines is not None else f"row {row} (from 0)"
        return f"{self.name}, {place}, column {column!r}"

    def check_text(self, dataset: Dataset, column: str) -> None:
        """Raise ValueError unless every cell of `column` is a string."""
        if getattr(dataset.features[column], "dtype", None) not in ("string", "large_string"):
            raise ValueError(f"{self.at(0, column)}: expected a string, got {_shown(dataset[0][column])}")
        cells = dataset.select_columns([column]).with_format("arrow")[:].column(column)
        if cells.null_count:
            row = pc.index(pc.is_null(cells), pa.scalar(True)).as_py()
            raise ValueError(f"{self.at(row, column)}: expected a string, got null")

    def parse_scores(self, dataset: Dataset, column: str) -> list[float]:
        """The cells of `column` as finite floats; ValueError at the first that is none."""
        scores = []
        for row, cell in enumerate(dataset[column]):
            try:
                value = math.nan if cell is None or isinstance(cell, bool) else float(cell)
            except (TypeError, ValueError):
                value = math.nan
            if not math.isfinite(value):
                raise ValueError(f"{self.at(row, column)}: expected a finite number, got {_shown(cell)}")
            scores.append(value)
        return scores


def _shown(cell: Any) -> str:
    if cell is None:
        return "null"
    if cell == "":
        return "an empty cell"
    text = repr(cell)
    return f"{type(cell).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


def _broken(cell: Any) -> bool:
    return isinstance(cell, str) and any("\ud800" <= character <= "\udfff" for character in cell)


def _open_source(source: Source, split: str, max_samples: int | None) -> tuple[Dataset, _Origin]:
    """The rows of `source`, never none, and where they come from."""
    if max_samples is not None and (isinstance(max_samples, bool) or not isinstance(max_samples, int)):
        raise TypeError(f"max_samples: expected an int or None, got {type(max_samples).__name__}")
    if max_samples is not None and max_samples < 1:
        raise ValueError(f"max_samples: expected at least 1, got {max_samples}")
    if isinstance(source, (str, Path)):
        dataset, origin = _open_path_or_hub_id(source, split, max_samples)
    elif isinstance(source, (Dataset, DatasetDict)):
        dataset, origin = source, _Origin(f"the given {type(source).__name__}")
    else:
        hint = (
            " (an IterableDataset has no length: make a Dataset of it)" if isinstance(source, IterableDataset) else ""
        )
        raise TypeError(f"source: expected a datasets.Dataset, a file or a hub id, got {type(source).__name__}{hint}")
    if isinstance(dataset, DatasetDict):
        if split not in dataset:
            raise ValueError(f"{origin.name}: no split {split!r}, only {_listed(dataset)}")
        dataset, origin = dataset[split], _Origin(f"{origin.name}, split {split!r}")
    if len(dataset) == 0:
        raise ValueError(f"{origin.name}: has no rows")
    if max_samples is not None and max_samples < len(dataset):
        dataset = dataset.select(range(max_samples))
    return dataset, origin


def _open_path_or_hub_id(
    source: str | Path, split: str, max_samples: int | None
) -> tuple[Dataset | DatasetDict, _Origin]:
    path = Path(source).expanduser()
    name = str(path)
    if path.is_dir():
        if not any((path / marker).is_file() for marker in ("state.json", "dataset_dict.json")):
            raise ValueError(
                f"{name}: a folder that Dataset.save_to_disk did not write; give a file "
                f"({', '.join(_FILE_SUFFIXES)}) instead"
            )
        return load_from_disk(name), _Origin(name)
    if path.exists():
        suffix = path.suffix.lower()
        if suffix == ".parquet":
            return _read_parquet(path, max_samples), _Origin(name)
        if suffix not in _FILE_SUFFIXES:
            raise ValueError(
                f"{name}: expected a file that ends in {', '.join(_FILE_SUFFIXES)}, got {suffix or 'none'!r}"
            )
        columns, lines = _read_csv(path, max_samples) if suffix == ".csv" else _read_jsonl(path, max_samples)
        origin = _Origin(name, lines)
        try:
            return Dataset.from_dict(columns, info=DatasetInfo(dataset_name=path.stem)), origin
        except UnicodeEncodeError:  # JSON can spell half a surrogate pair, which no encoding can hold
            column, row = next((c, r) for c, cells in columns.items() for r, text in enumerate(cells) if _broken(text))
            raise ValueError(
                f"{origin.at(row, column)}: is not valid Unicode, got {_shown(columns[column][row])}"
            ) from None
    looks_like_file = isinstance(source, Path) or path.suffix.lower() in _FILE_SUFFIXES
    if looks_like_file or not _HUB_ID.fullmatch(str(source)):
        raise FileNotFoundError(f"{name}: no such file (looked in {Path.cwd()})")
    hub_id, _, config = str(source).partition(":")
    try:
        return load_dataset(hub_id, config or None, split=split), _Origin(f"{source}, split {split!r}")
    except Exception as error:  # datasets and huggingface_hub raise a dozen unrelated types here
        raise FileNotFoundError(
            f"{source}: no such file (looked in {Path.cwd()}), and as a hub data set it could not be loaded: "
            f"{type(error).__name__}: {error}"
        ) from error


def decoded_lines(file: Iterable[bytes], name: str | Path) -> Iterator[str]:
    """The lines of a binary file as text, with their ends; a byte order mark is dropped.

    Only a newline ends a line: text mode would also split at a lone carriage return, `str.splitlines` at form feeds
    and the separators of Unicode, all of which may stand inside a text.

    Raises:
        ValueError: a line is not UTF-8, naming it.
    """
    for number, raw in enumerate(file, start=1):
        try:
            yield raw.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{name}, line {number}: is not UTF-8 ({error.reason}, byte {error.start + 1} of the line)"
            ) from None


def _decoded_lines(path: Path) -> Iterator[str]:
    with path.open("rb") as file:
        yield from decoded_lines(file, path)


def _read_jsonl(path: Path, max_samples: int | None) -> tuple[dict[str, list[Any]], list[int]]:
    """Columns of a JSON-lines file, and the line of each row. Blank lines are skipped."""
    columns: dict[str, list[Any]] = {}
    lines: list[int] = []
    for number, text in enumerate(_decoded_lines(path), start=1):
        if not text.strip():
            continue
        at = f"{path}, line {number}"
        try:
            row = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{at}: is not JSON ({error.msg} at character {error.pos + 1})") from None
        except RecursionError:
            raise ValueError(f"{at}: is nested too deeply for rows of texts") from None
        if not isinstance(row, dict) or not row:
            raise ValueError(f"{at}: expected a JSON object with a string for each column, got {_shown(row)}")
        if not lines:
            columns = {name: [] for name in row}
        for name in columns:
            if name not in row:
                raise ValueError(f"{at}: column {name!r} is missing (the first row has {_listed(columns)})")
        for name, cell in row.items():
            if name not in columns:
                raise ValueError(f"{at}: column {name!r} is not in the first row, which has {_listed(columns)}")
            is_number = isinstance(cell, (int, float)) and not isinstance(cell, bool)
            if not isinstance(cell, str) and not (is_number and name in LABEL_COLUMNS):
                expected = "a number" if name in LABEL_COLUMNS else "a string"
                raise ValueError(f"{at}, column {name!r}: expected {expected}, got {_shown(cell)}")
            columns[name].append(cell)
        lines.append(number)
        if len(lines) == max_samples:
            break
    if not lines:
        raise ValueError(f"{path}: has no rows")
    for name in set(columns) & set(LABEL_COLUMNS):  # the only columns whose cells can be of several types
        if any(isinstance(cell, str) for cell in columns[name]):
            columns[name] = [str(cell) for cell in columns[name]]
    return columns, lines


def _read_csv(path: Path, max_samples: int | None) -> tuple[dict[str, list[Any]], list[int]]:
    """Columns of a CSV file with a header, and the first line of each row. An empty cell is a missing one."""
    reader = csv.reader(_decoded_lines(path), strict=True)
    columns: dict[str, list[Any]] = {}
    lines: list[int] = []
    try:
        header = next(reader, [])
        columns = {name: [] for name in header}
        if len(columns) < len(header):
            raise ValueError(f"{path}, line 1: a column name stands twice in the header: {_listed(header)}")
        first_line = reader.line_num + 1
        for row in reader:
            at, line, first_line = f"{path}, line {first_line}", first_line, reader.line_num + 1
            if not row:
                continue
            if len(row) != len(header):
                raise ValueError(f"{at}: expected {len(header)} cells ({_listed(header)}), got {len(row)}")
            for name, cell in zip(header, row, strict=True):
                if not cell:
                    raise ValueError(f"{at}, column {name!r}: the cell is empty")
                columns[name].append(cell)
            lines.append(line)
            if len(lines) == max_samples:
                break
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: is not CSV ({error})") from None
    if not lines:
        raise ValueError(f"{path}: has no rows")
    return columns, lines


def _read_parquet(path: Path, max_samples: int | None) -> Dataset:
    try:
        with pq.ParquetFile(path) as file:
            batches, rows = [], 0
            for batch in file.iter_batches():
                batches.append(batch)
                rows += len(batch)
                if max_samples is not None and rows >= max_samples:
                    break
            table = pa.Table.from_batches(batches, schema=file.schema_arrow)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: is not a Parquet file that can be read ({error})") from None
    columns = {name: table.column(name) for name in table.column_names}
    for name, cells in columns.items():
        if pa.types.is_dictionary(cells.type):
            columns[name] = cells.cast(cells.type.value_type)
    return Dataset.from_dict(columns, info=DatasetInfo(dataset_name=path.stem))


# --- tokenizer ---------------------------------------------------------------------------------------------------


def train_wordpiece_tokenizer(
    texts: Iterable[str],
    vocab_size: int = 2000,
    max_length: int = 512,
    *,
    lowercase: bool = False,
    split_endings: bool = False,
) -> PreTrainedTokenizerFast:
    """Train a WordPiece tokenizer on `texts`, as BERT's (Devlin et al., 2018); by default it keeps case.

    The same texts give the same vocabulary and the same ids in every process.

    Args:
        texts: the training sentences; kept in memory.
        vocab_size: tokens in the vocabulary, the five special ones included; fewer if the texts do not yield so many
            pieces that occur twice.
        max_length: longest sequence, in tokens, that the tokenizer truncates to.
        lowercase: lower-case texts and strip accents, as BERT's uncased models do.
        split_endings: cut English words before -s, -es, -e, -ed and -ing, so that the forms of a word share its stem.

    Returns:
        A transformers fast tokenizer: `save_pretrained` writes a folder that `AutoTokenizer` loads with equal ids.

    Raises:
        ValueError: no text, nothing but blanks, or a vocabulary too small for a single character.
        TypeError: `texts` is one string, or one of them is none.
    """
    if isinstance(texts, str):
        raise TypeError("texts: expected a list of strings, got one string")
    texts = list(texts)
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"texts[{index}]: expected a string, got {_shown(text)}")
    if vocab_size < len(_SPECIAL_TOKENS) + 2:
        raise ValueError(f"vocab_size: expected at least {len(_SPECIAL_TOKENS) + 2}, got {vocab_size}")
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase, strip_accents=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    if split_endings:
        endings = pre_tokenizers.Split(Regex(_ENDINGS), behavior="isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([tokenizer.pre_tokenizer, endings])

    alphabet, continuations = _alphabet(tokenizer, texts, vocab_size)
    # The trainer numbers "##x" pieces in the order of a randomly seeded hash map and breaks ties between equally
    # frequent pairs by those numbers. Named as special tokens, they are numbered first, in our order, which makes the
    # training repeatable; the tokenizer returned is built from the vocabulary alone, so they are not special in it.
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[*_SPECIAL_TOKENS, *continuations],
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    bert = BertTokenizer(
        vocab=tokenizer.get_vocab(), do_lower_case=lowercase, strip_accents=lowercase, model_max_length=max_length
    )
    if not split_endings:
        return bert
    bert.backend_tokenizer.pre_tokenizer = tokenizer.pre_tokenizer
    return PreTrainedTokenizerFast(  # a BertTokenizer that is loaded makes a pre-tokenizer of its own
        tokenizer_object=bert.backend_tokenizer,
        model_max_length=max_length,
        model_input_names=bert.model_input_names,
        **bert.special_tokens_map,
    )


def _alphabet(tokenizer: Tokenizer, texts: list[str], vocab_size: int) -> tuple[list[str], list[str]]:
    """The commonest characters and the "##" pieces of those found inside words, each in a fixed order."""
    words: Counter[str] = Counter()
    for text in texts:
        words.update(
            word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(tokenizer.normalizer.normalize_str(text))
        )
    characters: Counter[str] = Counter()
    inner: Counter[str] = Counter()
    for word, count in words.items():
        for position, character in enumerate(word):
            characters[character] += count
            if position:
                inner[character] += count
    if not characters:
        raise ValueError(f"texts: expected at least one word, got {len(texts)} texts without any")
    limit = min(_MAX_ALPHABET, (vocab_size - len(_SPECIAL_TOKENS)) // 2)
    alphabet = sorted(sorted(characters), key=characters.__getitem__, reverse=True)[:limit]
    return alphabet, [f"##{character}" for character in sorted(alphabet) if character in inner]
