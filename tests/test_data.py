from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict, IterableDataset
from transformers import AutoTokenizer

from triton_st.data import load_sts_dataset, load_training_dataset, train_wordpiece_tokenizer
from triton_st.synthetic import synthetic_triplets

ROWS = {
    "anchor": ["A dog runs, fast.", 'He said "no".', "Zürich\nis big. 😀"],
    "positive": ["An animal moves.", "He refused.", "A city is large."],
    "negative": ["A dog sleeps.", "He said yes.", "Zürich is small."],
}
STS = {"sentence1": ["a b", "c d"], "sentence2": ["a c", "e f"], "score": [2.5, 0.0]}


def write(path: Path, columns: dict[str, list]) -> Path:
    dataset = Dataset.from_dict(columns)
    if path.suffix == ".csv":
        dataset.to_csv(path, index=False)
    elif path.suffix == ".parquet":
        dataset.to_parquet(path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in dataset), encoding="utf-8")
    return path


# --- training data -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_every_format_gives_the_rows_and_leaves_nothing_beside_the_file(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"train{suffix}", ROWS)
    for source in (path, str(path)):
        assert load_training_dataset(source).to_dict() == ROWS
        first = load_training_dataset(source, max_samples=2)
        assert first.to_dict() == {name: cells[:2] for name, cells in ROWS.items()}
    assert load_training_dataset(path, max_samples=99).num_rows == 3
    assert list(tmp_path.iterdir()) == [path]


def test_dataset_split_and_saved_folder(tmp_path: Path) -> None:
    dataset = Dataset.from_dict(ROWS)
    assert load_training_dataset(dataset).to_dict() == ROWS
    assert load_training_dataset(DatasetDict(train=dataset), max_samples=1).num_rows == 1
    with pytest.raises(ValueError, match="no split 'validation', only train"):
        load_training_dataset(DatasetDict(train=dataset), split="validation")
    dataset.save_to_disk(tmp_path / "saved")
    assert load_training_dataset(tmp_path / "saved").to_dict() == ROWS


@pytest.mark.parametrize(
    "names",
    [
        ["anchor", "positive"],
        ["query", "answer"],
        ["positive", "text"],  # no canonical set of names: the order decides, as in sentence-transformers
        ["anchor", "positive", "negative_1", "negative_2", "negative_3"],
    ],
)
def test_column_order_is_kept(names: list[str], tmp_path: Path) -> None:
    columns = {name: [f"{name} {row}" for row in range(2)] for name in names}
    assert load_training_dataset(write(tmp_path / "t.jsonl", columns)).column_names == names


def test_sorted_keys_do_not_make_a_negative_of_the_positive(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "sorted.jsonl"
    path.write_text(json.dumps({"anchor": "a", "negative": "n", "negative_2": "m", "positive": "p"}), encoding="utf-8")
    assert load_training_dataset(path).column_names == ["anchor", "positive", "negative", "negative_2"]
    assert "anchor, negative, negative_2, positive taken as anchor, positive, negative, negative_2" in caplog.text


def test_label_columns_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "labelled.jsonl"
    path.write_text('{"a": "x", "label": 1, "b": "y"}\n{"a": "z", "label": "one", "b": "w"}\n', encoding="utf-8")
    assert load_training_dataset(path).to_dict() == {"a": ["x", "z"], "b": ["y", "w"]}


def test_blank_lines_and_byte_order_mark(tmp_path: Path) -> None:
    for suffix, text in (
        (".jsonl", '\ufeff{"a": "x", "b": "y"}\n\n{"a": "\u2028", "b": ""}\n'),
        (".csv", "\ufeffa,b\nx,y\n\nz,w"),
    ):
        path = tmp_path / f"t{suffix}"
        path.write_text(text, encoding="utf-8")
        dataset = load_training_dataset(path)
        assert dataset.column_names == ["a", "b"]
        assert dataset[0] == {"a": "x", "b": "y"}
        assert dataset.num_rows == 2


BAD_TRAINING_FILES = {
    "empty.jsonl": ("", r"empty\.jsonl: has no rows"),
    "blank.jsonl": ("\n \n", "has no rows"),
    "json.jsonl": ('{"anchor": "a", "positive": "b"}\n\n{"anchor": "a", ', r"json\.jsonl, line 3: is not JSON"),
    "list.jsonl": ('["a", "b"]', r"line 1: expected a JSON object .*got list"),
    "missing.jsonl": ('{"a": "1", "b": "2"}\n{"a": "1"}', "line 2: column 'b' is missing .*has a, b"),
    "extra.jsonl": ('{"a": "1", "b": "2"}\n{"a": "1", "b": "2", "c": "3"}', "line 2: column 'c' is not in the first"),
    "null.jsonl": ('{"a": "1", "b": "2"}\n{"a": "1", "b": null}', "line 2, column 'b': expected a string, got null"),
    "number.jsonl": ('{"a": "1", "b": 5}', "line 1, column 'b': expected a string, got int 5"),
    "true.jsonl": ('{"a": "1", "b": "2", "label": true}', "line 1, column 'label': expected a number, got bool True"),
    "nested.jsonl": ('{"a": "1", "b": ["2"]}', "line 1, column 'b': expected a string, got list"),
    "one.jsonl": ('{"anchor": "a", "score": 1}', "at least two text columns, .* got anchor, score"),
    "none.jsonl": ("{}", "line 1: expected a JSON object .*got dict {}"),
    "half.jsonl": ('{"a": "1", "b": "2"}\n{"a": "\\ud83d", "b": "2"}', "line 2, column 'a': is not valid Unicode"),
    "latin.jsonl": (b'{"a": "1", "b": "2"}\n{"a": "\xe9", "b": "2"}', r"latin\.jsonl, line 2: is not UTF-8"),
    "empty.csv": ("", r"empty\.csv: has no rows"),
    "header.csv": ("anchor,positive\n", r"header\.csv: has no rows"),
    "twice.csv": ("a,a\n1,2\n", "line 1: a column name stands twice in the header: a, a"),
    "short.csv": ('a,b\n"1\n2",3\n4\n', r"line 4: expected 2 cells \(a, b\), got 1"),
    "long.csv": ("a,b\n1,2,3\n", r"line 2: expected 2 cells \(a, b\), got 3"),
    "cell.csv": ('a,b\n"1\n2",3\n4,\n', "line 4, column 'b': the cell is empty"),
    "quote.csv": ('a,b\n1,"2\n', "line 2: is not CSV"),
    "latin.csv": (b"a,b\n1,2\n\xe9,2\n", r"latin\.csv, line 3: is not UTF-8"),
    "one.csv": ("anchor\nx\n", "at least two text columns, .* got anchor"),
    "bytes.parquet": ("not parquet", r"bytes\.parquet: is not a Parquet file"),
    "data.xml": ("<a/>", r"expected a file that ends in .*\.jsonl.*got '\.xml'"),
    "data": ("a", "got 'none'"),
}


@pytest.mark.parametrize("name", BAD_TRAINING_FILES)
def test_bad_files_say_where(tmp_path: Path, name: str) -> None:
    content, message = BAD_TRAINING_FILES[name]
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message) as error:
        load_training_dataset(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("as_file", [False, True])
def test_bad_cells_of_datasets_and_parquet(tmp_path: Path, as_file: bool) -> None:
    def load(columns: dict[str, list]) -> Dataset:
        return load_training_dataset(write(tmp_path / "t.parquet", columns) if as_file else Dataset.from_dict(columns))

    with pytest.raises(ValueError, match=r"row 1 \(from 0\), column 'positive': expected a string, got null"):
        load({"anchor": ["a", "b"], "positive": ["c", None]})
    with pytest.raises(ValueError, match=r"row 0 \(from 0\), column 'positive': expected a string, got int 3"):
        load({"anchor": ["a", "b"], "positive": [3, 4]})
    with pytest.raises(ValueError, match=r"row 0 \(from 0\), column 'positive': expected a string, got null"):
        load({"anchor": ["a", "b"], "positive": [None, None]})
    with pytest.raises(ValueError, match="has no rows"):
        load({"anchor": [], "positive": []})


def test_rows_after_max_samples_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"a": "1", "b": "2"}\nnot json', encoding="utf-8")
    assert load_training_dataset(path, max_samples=1).num_rows == 1


def test_wrong_arguments(tmp_path: Path) -> None:
    dataset = Dataset.from_dict(ROWS)
    with pytest.raises(ValueError, match="max_samples: expected at least 1, got 0"):
        load_training_dataset(dataset, max_samples=0)
    with pytest.raises(TypeError, match="max_samples: expected an int or None, got float"):
        load_training_dataset(dataset, max_samples=1.0)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="got list"):
        load_training_dataset([{"anchor": "a"}])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="IterableDataset has no length"):
        load_training_dataset(IterableDataset.from_generator(lambda: iter([])))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"a folder that Dataset\.save_to_disk did not write"):
        load_training_dataset(tmp_path)


@pytest.mark.parametrize("source", ["missing.jsonl", "./data", "/no/such/file", "~/x.csv", "a/b/c", "owner/data.csv"])
def test_missing_file_is_not_looked_for_on_the_hub(source: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"no such file \(looked in [^)]*\)$"):
        load_training_dataset(source)
    with pytest.raises(FileNotFoundError, match=r"no such file \(looked in [^)]*\)$"):
        load_training_dataset(Path("owner/name"))


def test_hub_id_that_cannot_be_loaded() -> None:
    with pytest.raises(
        FileNotFoundError, match=r"owner/no-such-set:config: no such file .* as a hub data set it could not"
    ):
        load_training_dataset("owner/no-such-set:config")


def test_loads_where_the_home_folder_cannot_be_written(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", ROWS)
    code = f"from triton_st.data import load_training_dataset as f; print(f({str(path)!r}).num_rows)"
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "XDG_"))}
    environment |= {"HOME": "/proc/no-home", "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "3"
    assert list(tmp_path.iterdir()) == [path]


def test_real_training_data(shared_data: Path) -> None:
    dataset = load_training_dataset(shared_data / "nli_train.jsonl", max_samples=10_112)
    assert dataset.column_names == ["anchor", "positive", "negative"]
    assert dataset.num_rows == 10_112


# --- scored pairs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
@pytest.mark.parametrize("order", [["sentence1", "sentence2", "score"], ["score", "sentence2", "sentence1"]])
def test_sts_columns_by_name(tmp_path: Path, suffix: str, order: list[str]) -> None:
    dataset = load_sts_dataset(write(tmp_path / f"sts{suffix}", {name: STS[name] for name in order}))
    assert dataset.to_dict() == STS
    assert dataset.column_names == ["sentence1", "sentence2", "score"]


def test_sts_columns_by_order(tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    path.write_text("label,left,right\n4,a,b\n.5,c,d\n", encoding="utf-8")
    assert load_sts_dataset(path).to_dict() == {"sentence1": ["a", "c"], "sentence2": ["b", "d"], "score": [4.0, 0.5]}


@pytest.mark.parametrize("cell", ["", "NaN", "inf", "high", "null"])
def test_sts_bad_scores(tmp_path: Path, cell: str) -> None:
    path = tmp_path / "sts.csv"
    path.write_text(f"score,sentence1,sentence2\n5,a,b\n{cell},a,b\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"sts\.csv, line 3, column 'score': "):
        load_sts_dataset(path)
    with pytest.raises(ValueError, match=r"row 1 \(from 0\), column 'score': expected a finite number, got null"):
        load_sts_dataset(Dataset.from_dict({**STS, "score": [1.0, None]}))


def test_sts_wrong_columns() -> None:
    message = "expected columns sentence1, sentence2 and score, got "
    with pytest.raises(ValueError, match=message + "sentence1, sentence2"):
        load_sts_dataset(Dataset.from_dict({"sentence1": ["a"], "sentence2": ["b"]}))
    with pytest.raises(ValueError, match=message + "a, b, c, score"):
        load_sts_dataset(Dataset.from_dict({"a": ["a"], "b": ["b"], "c": ["c"], "score": [1]}))


@pytest.mark.parametrize(("split", "rows"), [("train", 5749), ("dev", 1500), ("test", 1379)])
def test_real_sts(shared_data: Path, split: str, rows: int) -> None:
    dataset = load_sts_dataset(shared_data / f"stsb_{split}.csv")
    assert dataset.num_rows == rows
    assert min(dataset["score"]) == 0.0
    assert max(dataset["score"]) == 5.0


# --- tokenizer ---------------------------------------------------------------------------------------------------

TEXTS = [
    f"The {a} {b} is {c}ing in Paris, Über-fast?"
    for a in ("old", "new")
    for b in ("Cat", "dog")
    for c in ("walk", "talk")
]


def test_tokenizer_is_cased_and_complete() -> None:
    tokenizer = train_wordpiece_tokenizer(TEXTS, vocab_size=90, max_length=16)
    assert len(tokenizer) <= 90
    assert tokenizer.convert_ids_to_tokens(range(5)) == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert sorted(tokenizer.all_special_ids) == [0, 1, 2, 3, 4]
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.unk_token_id not in ids
        assert (ids[0], ids[-1]) == (tokenizer.cls_token_id, tokenizer.sep_token_id)
        assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == text.replace(" ", "")
    assert tokenizer.tokenize("Cat") != tokenizer.tokenize("cat")
    assert "Über" in tokenizer.decode(tokenizer("Über")["input_ids"])  # accents stay
    assert len(tokenizer("dog " * 99, truncation=True)["input_ids"]) == 16


def test_pieces_are_not_special_in_text() -> None:
    tokenizer = train_wordpiece_tokenizer([*TEXTS, "a # b ## c ##e"], vocab_size=200)
    assert tokenizer.tokenize("##e") == ["#", "#", "e"]


def test_vocabulary_size_is_met_exactly(shared_data: Path) -> None:
    dataset = load_training_dataset(shared_data / "nli_train.jsonl", max_samples=3000)
    assert len(train_wordpiece_tokenizer(list(dataset["anchor"]), vocab_size=2000)) == 2000


def test_more_characters_than_vocabulary() -> None:
    rare = [chr(code) for code in range(0x4E00, 0x4E00 + 500)]
    tokenizer = train_wordpiece_tokenizer(["abc abc", *rare], vocab_size=64)
    assert len(tokenizer) <= 64
    assert tokenizer.tokenize("abc") == ["abc"]


def test_saved_tokenizer_loads_with_the_same_ids(tmp_path: Path) -> None:
    tokenizer = train_wordpiece_tokenizer(TEXTS, vocab_size=100, max_length=128)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    texts = [*TEXTS, "", "unseen wörds 日本 😀", "THE cat [SEP] ##e"]
    assert loaded(texts)["input_ids"] == tokenizer(texts)["input_ids"]
    assert loaded.model_max_length == 128
    assert loaded.get_vocab() == tokenizer.get_vocab()


def test_same_vocabulary_in_every_process() -> None:
    code = (
        "import json\n"
        "from triton_st.data import train_wordpiece_tokenizer\n"
        "from triton_st.synthetic import synthetic_triplets\n"
        "texts = synthetic_triplets(300)['anchor']\n"
        "print(json.dumps(train_wordpiece_tokenizer(texts, vocab_size=600).get_vocab()))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    here = train_wordpiece_tokenizer(list(synthetic_triplets(300)["anchor"]), vocab_size=600)
    assert json.loads(done.stdout) == here.get_vocab()


def test_tokenizer_bad_input() -> None:
    with pytest.raises(ValueError, match="expected at least one word, got 0 texts"):
        train_wordpiece_tokenizer([])
    with pytest.raises(ValueError, match="expected at least one word, got 2 texts"):
        train_wordpiece_tokenizer(["", "  "])
    with pytest.raises(TypeError, match=r"texts\[1\]: expected a string, got null"):
        train_wordpiece_tokenizer(["a", None])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="a list of strings"):
        train_wordpiece_tokenizer("a text")
    with pytest.raises(ValueError, match="vocab_size: expected at least 7, got 5"):
        train_wordpiece_tokenizer(["a"], vocab_size=5)


def test_a_file_s_name_is_its_data_set_s_name(tmp_path: Path) -> None:
    path = tmp_path / "my_triplets.jsonl"
    path.write_text('{"anchor": "a", "positive": "b"}\n')
    assert load_training_dataset(path).info.dataset_name == "my_triplets"
    load_training_dataset(path).to_parquet(tmp_path / "other.parquet")
    assert load_training_dataset(tmp_path / "other.parquet").info.dataset_name == "other"
