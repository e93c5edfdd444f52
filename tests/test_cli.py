"""The command line as a user meets it: every command once for real, and the mistakes people make."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from triton_st.__main__ import main

TINY = ("--max-train-samples", "96", "--batch-size", "32", "--hidden-size", "16", "--num-hidden-layers", "1")
TINY += ("--num-attention-heads", "2", "--intermediate-size", "32", "--vocab-size", "300", "--no-progress")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    assert main(["train", *TINY, "--fp16", "--eval-steps", "2", "--output-dir", str(folder)]) == 0
    return folder


def test_train_leaves_a_model_a_card_and_a_log(trained: Path) -> None:
    assert (trained / "final" / "model.safetensors").is_file()
    card = (trained / "final" / "README.md").read_text()
    assert "sts-dev" in card
    assert "sts-test" in card
    losses = [row["loss"] for line in (trained / "training_log.jsonl").open() if "loss" in (row := json.loads(line))]
    assert len(losses) == 3
    assert all(math.isfinite(loss) for loss in losses)


def test_train_prints_twenty_finite_metrics_before_and_after(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *TINY, "--output-dir", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    rows = [line.split() for line in printed.splitlines() if line.startswith(("pearson_", "spearman_"))]
    assert len(rows) == 10
    assert all(math.isfinite(float(cell)) for row in rows for cell in row[1:])
    assert all(len(row) == 5 for row in rows)
    assert printed.count("  -> ") == 3
    assert str(tmp_path / "final" / "README.md") in printed


def test_encode_writes_what_the_model_says(trained: Path, tmp_path: Path) -> None:
    from triton_st import SentenceTransformer

    texts = ["A cat sleeps.", "", "Zwei Männer 🎸 spielen."]
    source, target = tmp_path / "texts.txt", tmp_path / "out.npy"
    source.write_text("\n".join(texts) + "\n", encoding="utf-8")
    model = trained / "final"
    assert main(["encode", str(model), str(source), str(target), "--no-progress"]) == 0
    expected = SentenceTransformer(str(model)).encode(texts)
    np.testing.assert_array_equal(np.load(target), expected)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.npy", "texts.txt"]


def test_encode_ends_a_line_only_at_a_newline(trained: Path, tmp_path: Path) -> None:
    from triton_st import SentenceTransformer

    inner = "\x0b \x0c \x1c \x85 \u2028 \r"
    source, target = tmp_path / "texts.txt", tmp_path / "out.npy"
    source.write_bytes(f"\ufeffA cat sleeps.\r\na{inner}b\n\r\nlast".encode())
    model = str(trained / "final")
    assert main(["encode", model, str(source), str(target), "--no-progress"]) == 0
    expected = SentenceTransformer(model).encode(["A cat sleeps.", f"a{inner}b", "", "last"])
    np.testing.assert_array_equal(np.load(target), expected)


def test_encode_finds_an_output_that_cannot_be_written_before_it_loads_the_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "folder.npy").mkdir()
    (tmp_path / "texts.txt").write_text("one\n")
    for target in ("folder.npy", "absent/out.npy"):
        arguments = ["encode", str(tmp_path / "no model"), str(tmp_path / "texts.txt"), str(tmp_path / target)]
        fails(arguments, capsys, "cannot write to", target)


def test_metrics_that_are_not_defined_are_null_in_json(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = tmp_path / "pairs.csv"
    pairs.write_text("score,sentence1,sentence2\n1,a,a\n1,a,a\n")
    assert main(["evaluate", str(trained / "final"), "--sts", str(pairs), "--json"]) == 0
    printed = capsys.readouterr().out
    assert set(json.loads(printed[printed.index("{") :]).values()) == {None}


def test_train_on_pairs_without_neighbours(tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.csv"
    pairs.write_text("score,sentence1,sentence2\n1,a,a\n1,a,a\n")
    sts = ["--sts-dev", str(pairs), "--sts-test", str(pairs)]
    assert main(["train", *TINY, *sts, "--max-steps", "1", "--output-dir", str(tmp_path / "run")]) == 0
    after = json.loads((tmp_path / "run" / "metrics.json").read_text(), parse_constant=pytest.fail)["after"]
    assert set(after["dev"].values()) == {None}


@pytest.mark.parametrize("value", ["0", "-1", "1.5", "many"])
@pytest.mark.parametrize("flag", ["--max-train-samples", "--hidden-size", "--num-attention-heads", "--max-seq-length"])
def test_sizes_are_positive_whole_numbers(
    flag: str, value: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["train", f"{flag}={value}", "--output-dir", str(tmp_path / "run")])
    assert f"argument {flag}: expected a whole number of at least 1, got '{value}'" in capsys.readouterr().err


@pytest.mark.parametrize(("flag", "value"), [("learning_rate", "nan"), ("seed", str(10**20)), ("warmup_steps", "-1")])
def test_wrong_settings_fail_before_anything_is_written(
    flag: str, value: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["train", f"--{flag.replace('_', '-')}={value}", "--output-dir", str(tmp_path / "run")]
    fails(arguments, capsys, f"`{flag}`: expected", value[:2])
    assert not (tmp_path / "run").exists()


def test_evaluate_prints_json(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(trained / "final"), "--json"]) == 0
    printed = capsys.readouterr().out
    metrics = json.loads(printed[printed.index("{") :])
    assert len(metrics) == 10
    assert all(-1 <= value <= 1 for value in metrics.values())


def test_build_and_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["build"]) == 0
    assert Path(capsys.readouterr().out.strip()).is_file()
    assert main(["info"]) == 0
    assert "served by cpp" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["train", "encode", "evaluate", "build", "info"])
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    assert "usage: triton_st " + command in capsys.readouterr().out


def fails(arguments: list[str], capsys: pytest.CaptureFixture[str], *expected: str) -> None:
    assert main(arguments) == 1
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("triton_st: error: ")
    for part in expected:
        assert part in message


def test_train_refuses_to_overwrite_an_earlier_run(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (trained / "final" / "model.safetensors").read_bytes()
    fails(["train", *TINY, "--output-dir", str(trained)], capsys, "earlier run", "--overwrite-output-dir")
    assert (trained / "final" / "model.safetensors").read_bytes() == before


def test_train_resumes_a_finished_run_to_the_same_weights(trained: Path) -> None:
    before = (trained / "final" / "model.safetensors").read_bytes()
    arguments = ["train", *TINY, "--fp16", "--eval-steps", "2", "--output-dir", str(trained), "--resume"]
    assert main(arguments) == 0
    assert (trained / "final" / "model.safetensors").read_bytes() == before


def test_an_output_folder_that_cannot_be_written_fails_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("in the way")
    fails(["train", *TINY, "--output-dir", str(blocker / "run")], capsys, "cannot write", str(blocker))


def test_missing_model_and_file(tmp_path: Path, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("one\n")
    fails(["encode", str(tmp_path / "nowhere"), str(texts), str(tmp_path / "o.npy")], capsys, "nowhere")
    model = str(trained / "final")
    fails(["encode", model, str(tmp_path / "absent.txt"), str(tmp_path / "o.npy")], capsys, "absent.txt")
    fails(["encode", model, str(texts), str(tmp_path / "o.txt")], capsys, ".npy")
    texts.write_bytes(b"fine\n\xff\xfe\n")
    fails(["encode", model, str(texts), str(tmp_path / "o.npy")], capsys, "line 2", "UTF-8")
    assert [p.name for p in tmp_path.iterdir()] == ["texts.txt"]


def test_a_training_file_without_texts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"anchor": "a", "positive": "b"}\n{"anchor": "a", "positive": null}\n')
    fails(
        ["train", "--train-file", str(bad), "--output-dir", str(tmp_path / "run")], capsys, "bad.jsonl", "2", "positive"
    )
