"""Checkpoints: a run killed at any moment and resumed ends as if it had never been stopped, bit for bit."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from serving import threads
from training_runs import tiny_data, tiny_evaluator, tiny_model, trainer
from transformers import EarlyStoppingCallback, TrainerCallback

from triton_st.models import files
from triton_st.models.files import replacing_folder
from triton_st.training import checkpointing
from triton_st.training.checkpointing import CheckpointError, list_checkpoints, rotate_checkpoints

RUN: dict[str, Any] = {
    "num_train_epochs": 2.5,
    "gradient_accumulation_steps": 2,
    "logging_steps": 3,
    "eval_strategy": "steps",
    "eval_steps": 4,
    "save_strategy": "steps",
    "save_steps": 2,
    "save_total_limit": 2,
    "fp16": True,
}
WALL_CLOCK = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "tokens_per_second")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """On a model this small two threads only wait for each other."""
    with threads(1):
        yield


def run(folder: Path, resume: bool | str | None = None, **changes: Any) -> Any:
    settings = {**RUN, **changes}
    settings.setdefault("evaluator", tiny_evaluator(20))
    made = trainer(folder, eval_dataset=tiny_data(8), **settings)
    made.train(resume_from_checkpoint=resume)
    return made


def timeless(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in entry.items() if key not in WALL_CLOCK} for entry in entries]


def outcome(folder: Path) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]], list[dict[str, Any]], list[str]]:
    """Final weights, history and log without wall-clock times, card and evaluators' files, of a run that ended."""
    lines = (folder / "training_log.jsonl").read_text().splitlines()
    history = json.loads((folder / "history.json").read_text())
    card = (folder / "final" / "card.json").read_text()
    evaluations = [path.read_text() for path in sorted((folder / "eval").glob("*.csv"))]
    evaluations = [text[text.rindex("\n0,0,") :] for text in evaluations]  # since the last start from nothing
    assert evaluations
    weights = load_file(folder / "final" / "model.safetensors")
    return weights, timeless(history), timeless(map(json.loads, lines)), [card, *evaluations]


def assert_same_outcome(folder: Path, expected: Path) -> None:
    weights, history, log, card = outcome(folder)
    expected_weights, expected_history, expected_log, expected_card = outcome(expected)
    assert weights.keys() == expected_weights.keys()
    assert all(torch.equal(value, expected_weights[name]) for name, value in weights.items())
    assert history == expected_history
    assert log == expected_log
    assert card == expected_card
    leftovers = [path.name for path in folder.iterdir() if path.name.startswith((".", "tmp-"))]
    assert leftovers == []


# --- runs in processes of their own, which can be killed --------------------------------------------------------------


def finish(folder: Path, resume: bool, **changes: Any) -> None:
    made = run(folder, resume, **changes)
    made.model.save_pretrained(folder / "final", create_model_card=False)
    (folder / "history.json").write_text(json.dumps(made.state.log_history))
    card = made.model.model_card_data
    (folder / "final" / "card.json").write_text(json.dumps([card.evaluations, card.evaluation_log], default=str))


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_at(module: Any, name: str, call: int) -> None:
    """Replace a function by one that kills the process in its `call`-th call."""
    original, calls = getattr(module, name), [0]

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == call:
            die()
        return original(*args, **kwargs)

    setattr(module, name, counted)


def die_before_replacing(name: str) -> None:
    """Kill the process when the new file of this name is written and is about to take its place."""
    original = Path.replace

    def replace(self: Path, target: Path) -> Path:
        if target.name == name:
            die()
        return original(self, target)

    Path.replace = replace  # type: ignore[method-assign, assignment]


def train_and_die(folder: Path, resume: bool, how: tuple[str, Any]) -> None:
    """Train until `how` kills the process: at a call of a function or of a file, or after some seconds."""
    torch.set_num_threads(1)
    kind, when = how
    if kind == "seconds":
        timer = threading.Timer(when, die)
        timer.daemon = True
        timer.start()
    elif kind == "rename":
        die_at(Path, kind, when)
    elif kind == "replace":
        die_before_replacing(when)
    elif kind == "rmtree":
        die_at(shutil, "rmtree", when)
    elif kind == "_flush":
        die_at(files, kind, when)
    elif kind == "save_file":
        die_at(checkpointing, kind, when)
    elif kind == "model":
        from triton_st import SentenceTransformer

        die_at(SentenceTransformer, "save_pretrained", when)
    elif kind == "tokenizer":
        from triton_st.models import folder as folders

        die_at(folders, "write_json", when)
    elif kind == "optimizer":
        die_at(torch.optim.AdamW, "step", when)
    finish(folder, resume)


def in_process(target: Callable[..., None], *args: Any) -> int | None:
    process = PROCESSES.Process(target=target, args=args)
    process.start()
    process.join(120)
    assert not process.is_alive()
    return process.exitcode


# Processes are forked from one that has imported everything and computed nothing: quick, and safe with OpenMP.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["training_runs", "triton_st.training"])


@pytest.fixture(scope="module")
def never_stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("never-stopped")
    assert in_process(train_and_die, folder, False, ("never", None)) == 0
    return folder


@pytest.mark.parametrize(
    "deaths",
    [
        [("optimizer", 1)],  # before any checkpoint: nothing to resume from
        [("optimizer", 4), ("optimizer", 3)],
        [("model", 2), ("tokenizer", 3)],
        [("save_file", 2), ("_flush", 5)],
        [("rename", 2), ("rename", 6)],
        [("replace", "training_log.jsonl"), ("replace", "training.png")],
        [("rmtree", 7), ("rmtree", 17)],
    ],
    ids=lambda deaths: "-".join(f"{kind}{when}" for kind, when in deaths),
)
def test_killed_runs_end_as_the_one_never_stopped(
    tmp_path: Path, never_stopped: Path, deaths: list[tuple[str, Any]]
) -> None:
    for death in deaths:
        resume = bool(list_checkpoints(tmp_path))
        assert in_process(train_and_die, tmp_path, resume, death) == -signal.SIGKILL
        assert not (tmp_path / "history.json").exists()
    assert in_process(train_and_die, tmp_path, bool(list_checkpoints(tmp_path)), ("never", None)) == 0
    assert_same_outcome(tmp_path, never_stopped)


def test_runs_killed_at_random_moments_end_as_the_one_never_stopped(tmp_path: Path, never_stopped: Path) -> None:
    moments = random.Random()
    seed = moments.randrange(10**6)
    moments.seed(seed)
    print(f"seed of the moments: {seed}")
    longest, kills = 2.0, 0
    while kills < 4:
        resume = bool(list_checkpoints(tmp_path))
        if in_process(train_and_die, tmp_path, resume, ("seconds", moments.uniform(0.0, longest))) != 0:
            kills += 1
        elif kills:
            break
        else:  # it was done before its time had come
            longest /= 2
            shutil.rmtree(tmp_path)
    if not (tmp_path / "history.json").exists():
        assert in_process(train_and_die, tmp_path, bool(list_checkpoints(tmp_path)), ("never", None)) == 0
    assert_same_outcome(tmp_path, never_stopped)


def test_resuming_a_finished_run_trains_no_further(tmp_path: Path, never_stopped: Path) -> None:
    shutil.copytree(never_stopped, tmp_path / "copy")
    (tmp_path / "copy" / "history.json").unlink()
    assert in_process(train_and_die, tmp_path / "copy", True, ("optimizer", 1)) == 0
    assert_same_outcome(tmp_path / "copy", never_stopped)


# --- in this process --------------------------------------------------------------------------------------------------


class Stop(TrainerCallback):
    """Ends a run after a step, as something outside of it would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise InterruptedError


def stopped(folder: Path, step: int, **changes: Any) -> None:
    with pytest.raises(InterruptedError):
        run(folder, callbacks=[Stop(step)], **changes)


@pytest.mark.parametrize(
    "settings", [{"fp16": False, "optim": "adamw_torch"}, {"bf16": True, "fp16": False, "full_determinism": True}]
)
def test_other_settings_resume_bit_for_bit(tmp_path: Path, settings: dict[str, Any]) -> None:
    whole = run(tmp_path / "whole", **settings)
    stopped(tmp_path / "parts", 5, **settings)
    parts = run(tmp_path / "parts", str(tmp_path / "parts" / "checkpoint-4"), **settings)
    assert timeless(parts.state.log_history) == timeless(whole.state.log_history)
    states = whole.model.state_dict(), parts.model.state_dict()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_resume_restores_the_loss_scale_and_a_callback(tmp_path: Path) -> None:
    stopping = EarlyStoppingCallback(early_stopping_patience=9)
    quiet = {"learning_rate": 0.0, "load_best_model_at_end": True, "save_steps": 4, "callbacks": [stopping]}
    first = run(tmp_path, **quiet)
    assert stopping.early_stopping_patience_counter == 1  # at steps 4 and 8 of 8
    saved = json.loads((tmp_path / "checkpoint-8" / "resume.json").read_text())
    assert saved["scaler"] == first._run.scaler.state_dict()
    fresh = EarlyStoppingCallback(early_stopping_patience=9)
    second = run(tmp_path, True, **{**quiet, "callbacks": [fresh]})
    assert fresh.early_stopping_patience_counter == 1
    assert second._run.scaler.state_dict() == saved["scaler"]
    assert second.state.best_metric == first.state.best_metric


def test_a_callback_that_ended_the_run_still_has_after_a_resume(tmp_path: Path) -> None:
    def patient() -> EarlyStoppingCallback:
        return EarlyStoppingCallback(early_stopping_patience=1)

    settings = {"learning_rate": 0.0, "load_best_model_at_end": True, "eval_steps": 2, "save_steps": 2}
    assert run(tmp_path, callbacks=[patient()], **settings).state.global_step == 4
    assert run(tmp_path, True, callbacks=[patient()], **settings).state.global_step == 4


def test_interrupt_ends_the_step_saves_and_can_be_resumed(tmp_path: Path) -> None:
    class PressCtrlC(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 4:
                os.kill(os.getpid(), signal.SIGINT)

    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", callbacks=[PressCtrlC])
    assert signal.getsignal(signal.SIGINT) is handler
    assert [path.name for path in list_checkpoints(tmp_path / "parts")] == ["checkpoint-4", "checkpoint-5"]
    parts, whole = run(tmp_path / "parts", True), run(tmp_path / "whole")
    assert timeless(parts.state.log_history) == timeless(whole.state.log_history)


def test_trainer_state_is_transformers(tmp_path: Path) -> None:
    run(tmp_path)
    state = json.loads((tmp_path / "checkpoint-8" / "trainer_state.json").read_text())
    assert (state["global_step"], state["max_steps"], state["epoch"]) == (8, 8, pytest.approx(8 / 3, abs=0.01))
    assert state["log_history"][0]["step"] == 0
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-6", "checkpoint-8"]
    names = {path.name for path in (tmp_path / "checkpoint-8").iterdir()}
    assert {"model.safetensors", "config.json", "modules.json", "optimizer.safetensors"} <= names
    assert not any(name.endswith((".bin", ".pt", ".pth")) for name in names)  # nothing that is unpickled


def test_nothing_to_resume_from(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="No valid checkpoint found in output directory"):
        run(tmp_path, True)
    with pytest.raises(CheckpointError, match="nowhere: no such folder"):
        run(tmp_path, str(tmp_path / "nowhere"))
    stopped(tmp_path / "model-only", 3, save_only_model=True)
    with pytest.raises(CheckpointError, match=r"checkpoint-2: incomplete, .*save_only_model"):
        run(tmp_path / "model-only", True)


def test_damaged_checkpoints_are_named(tmp_path: Path) -> None:
    stopped(tmp_path / "run", 3)

    def damaged(name: str, content: bytes | None) -> str:
        folder = tmp_path / name / "checkpoint-2"
        shutil.copytree(tmp_path / "run" / "checkpoint-2", folder, dirs_exist_ok=True)
        (folder / name).unlink() if content is None else (folder / name).write_bytes(content)
        return str(folder)

    with pytest.raises(CheckpointError, match=r"checkpoint-2: incomplete, optimizer\.safetensors is missing"):
        run(tmp_path / "run", damaged("optimizer.safetensors", None))
    with pytest.raises(CheckpointError, match=r"checkpoint-2: damaged"):
        run(tmp_path / "run", damaged("resume.json", b"{"))
    with pytest.raises(CheckpointError, match=r"checkpoint-2: its model cannot be loaded"):
        run(tmp_path / "run", damaged("model.safetensors", b"\x10" + b"\0" * 20))
    with pytest.raises(CheckpointError, match=r"checkpoint-2: does not fit this run"):
        run(tmp_path / "run", damaged("trainer_state.json", b"[]"))
    with pytest.raises(CheckpointError, match=r"checkpoint-2: damaged"):
        run(tmp_path / "run", damaged("trainer_state.json", b'{"epoch": '))
    folder = tmp_path / "run" / "checkpoint-2"
    tensors = load_file(folder / "optimizer.safetensors")
    tensors["optimizer.unknown:exp_avg"] = torch.zeros(1)
    save_file(tensors, folder / "optimizer.safetensors")
    with pytest.raises(CheckpointError, match=r"does not fit this run .*unknown"):
        run(tmp_path / "run", True)


def test_resuming_another_run_is_refused(tmp_path: Path) -> None:
    stopped(tmp_path, 3)
    with pytest.raises(CheckpointError, match="was trained on other data"):
        run(tmp_path, True, train_dataset=tiny_data(40))
    with pytest.raises(CheckpointError, match="per_device_train_batch_size was 8, now 4"):
        run(tmp_path, True, per_device_train_batch_size=4)
    with pytest.raises(CheckpointError, match="seed was 42, now 1"):
        run(tmp_path, True, seed=1)
    with pytest.raises(CheckpointError, match=r"(?s)its model cannot be loaded.*size mismatch"):
        run(tmp_path, True, model=tiny_model(intermediate_size=96))
    with pytest.warns(UserWarning, match=r"apply from here on: learning_rate was 0\.001, now 0\.002"):
        resumed = run(tmp_path, True, learning_rate=0.002)
    expected = [resumed._run.scheduler.lr_lambdas[0](step) * 0.002 for step in (2, 5)]  # two steps of warm-up, of 8
    assert [entry["learning_rate"] for entry in resumed.state.log_history if "loss" in entry] == expected


def test_leftovers_of_a_kill_are_ignored_and_removed(tmp_path: Path) -> None:
    stopped(tmp_path, 3)
    for name in (".checkpoint-4.77.tmp", ".old-checkpoint-2.77.tmp", "..checkpoint-4.77.tmp.77.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"half")
    (tmp_path / "tmp-notes").mkdir()  # someone's own
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-2"]
    run(tmp_path, True)
    assert sorted(path.name for path in tmp_path.iterdir() if "tmp" in path.name) == ["tmp-notes"]


def test_a_failed_write_leaves_the_earlier_folder(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-1"
    with replacing_folder(folder, whole=True) as temporary:
        (temporary / "a").write_text("old")

    def fail() -> None:
        with replacing_folder(folder, whole=True) as temporary:
            (temporary / "a").write_text("new")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    assert (folder / "a").read_text() == "old"
    with replacing_folder(folder, whole=True) as temporary:
        (temporary / "b").write_text("newer")
    assert [path.name for path in folder.iterdir()] == ["b"]


def test_evaluations_after_the_checkpoint_are_forgotten(tmp_path: Path) -> None:
    header, rows = "epoch,steps,spearman\r\n", ["0.0,0,0.1\r\n", "0.5,4,0.2\r\n", "1.0,8,0.3\r\n"]
    evaluations, notes = tmp_path / "sts.csv", tmp_path / "notes.csv"
    notes.write_bytes(b"a,b\n1,99\n")
    for step, kept in ((8, 3), (7, 2), (4, 2), (3, 1), (0, 1)):
        earlier = header + "1.0,79,0.5\r\n"  # of an earlier run, further than this one
        evaluations.write_bytes((earlier + "".join(rows)).encode() + b"1.5,1")
        checkpointing.forget_evaluations(tmp_path, step)
        assert evaluations.read_bytes().decode() == earlier + "".join(rows[:kept])
    assert notes.read_bytes() == b"a,b\n1,99\n"
    assert {path.name for path in tmp_path.iterdir()} == {"sts.csv", "notes.csv"}


def test_the_cards_times_are_those_of_all_processes(tmp_path: Path) -> None:
    stopped(tmp_path, 5)
    path = tmp_path / "checkpoint-4" / "resume.json"
    state = json.loads(path.read_text())
    assert 0 < state["clock"]["evaluation"] < state["clock"]["seconds"]
    path.write_text(json.dumps({**state, "clock": {"seconds": 5000.0, "evaluation": 4000.0}}))
    card = run(tmp_path, True).model.model_card_data
    assert 5000 < card.training_time < 5100
    assert 4000 < card.evaluation_time < 4100


def test_rotation_keeps_the_best_and_the_newest(tmp_path: Path) -> None:
    for step in (2, 10, 4, 8):
        (tmp_path / f"checkpoint-{step}").mkdir()
    rotate_checkpoints(tmp_path, None, None)
    assert len(list_checkpoints(tmp_path)) == 4
    rotate_checkpoints(tmp_path, 2, str(tmp_path / "checkpoint-4"))
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-4", "checkpoint-10"]
    rotate_checkpoints(tmp_path, 1, None)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-10"]


def test_a_new_run_starts_a_new_log(tmp_path: Path) -> None:
    run(tmp_path, save_strategy="no")
    lines = (tmp_path / "training_log.jsonl").read_text().splitlines()
    run(tmp_path, save_strategy="no")
    assert len((tmp_path / "training_log.jsonl").read_text().splitlines()) == len(lines)


def test_a_lost_log_is_rewritten_from_the_history(tmp_path: Path) -> None:
    stopped(tmp_path, 5)
    (tmp_path / "training_log.jsonl").unlink()
    resumed = run(tmp_path, True)
    lines = [json.loads(line) for line in (tmp_path / "training_log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [entry["step"] for entry in resumed.state.log_history]
    assert [line.get("loss") for line in lines] == [entry.get("loss") for entry in resumed.state.log_history]
