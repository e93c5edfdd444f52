"""What a model knows of its making, and the model card (README.md) told from it.

Follows the model card of sentence-transformers, section by section:
https://sbert.net/docs/package_reference/sentence_transformer/model_card.html (the data) and
https://huggingface.co/docs/hub/model-cards (the metadata block). `model_card_text` holds the words.
"""

from __future__ import annotations

import logging
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields
from enum import Enum
from typing import Any

from triton_st import model_card_text

logger = logging.getLogger(__name__)

STATISTICS_ROWS = 1_000
SAMPLE_ROWS = 3
SAMPLE_CHARACTERS = 1_000
WIDGET_CHARACTERS = 500
WIDGETS = 5
# Where a run was done, who may upload it and what its script meant to do say nothing about the model.
UNTOLD_ARGUMENTS = {
    "output_dir",
    "logging_dir",
    "run_name",
    "hub_token",
    "push_to_hub_token",
    "resume_from_checkpoint",
    "do_train",
    "do_eval",
    "do_predict",
}
# `datasets` names what it reads from files after the reader, which is no name of the data.
FILE_READERS = {"arrow", "csv", "generator", "json", "pandas", "parquet", "sql", "text", "webdataset"}
SENTENCE_BERT = """\
@inproceedings{reimers-2019-sentence-bert,
    title = "Sentence-{BERT}: Sentence Embeddings using {S}iamese {BERT}-Networks",
    author = "Reimers, Nils and Gurevych, Iryna",
    booktitle = "Proceedings of the 2019 Conference on Empirical Methods in Natural Language Processing",
    year = "2019",
    publisher = "Association for Computational Linguistics",
    url = "https://arxiv.org/abs/1908.10084",
}"""


@dataclass
class SentenceTransformerModelCardData:
    """Facts for the model card: those given here, and those that evaluators and the trainer add.

    Everything public in it is plain JSON-able data; `to_state` and `from_state` carry it over an interruption. Nothing
    is ever looked up on the network.

    Args:
        language: Code or codes of the model's languages, such as "en".
        license: Licence identifier, such as "apache-2.0".
        model_name: Title of the card.
        model_id: Hub id ("owner/name"), for the usage examples.
        train_datasets: One `{"name": ..., "id": ...}` per training data set, in order; the trainer adds the rest.
        eval_datasets: The same of the evaluation data sets.
        task_name: What the model is for, in words.
        tags: Tags of the metadata block; the trainer adds to them.
        local_files_only: Taken for sentence-transformers' sake, and always so.
        generate_widget_examples: Show sentences of the data, and their similarities, in the card.
    """

    language: str | list[str] | None = None
    license: str | None = None
    model_name: str | None = None
    model_id: str | None = None
    train_datasets: list[dict[str, Any]] = field(default_factory=list)
    eval_datasets: list[dict[str, Any]] = field(default_factory=list)
    task_name: str = "semantic similarity and search, paraphrase mining, clustering and classification"
    tags: list[str] = field(
        default_factory=lambda: ["sentence-transformers", "sentence-similarity", "feature-extraction", "dense"]
    )
    local_files_only: bool = True
    generate_widget_examples: bool = True

    base_model: str | None = field(default=None, init=False)
    base_model_revision: str | None = field(default=None, init=False)
    # One entry per evaluator, the latest: class_name, name, description, config, primary_metric, step, metrics.
    evaluations: list[dict[str, Any]] = field(default_factory=list, init=False)
    # One entry per evaluation, in order: epoch, step, metrics (the primary one).
    evaluation_log: list[dict[str, Any]] = field(default_factory=list, init=False)
    log_history: list[dict[str, Any]] = field(default_factory=list, init=False)
    hyperparameters: dict[str, Any] = field(default_factory=dict, init=False)
    non_default_hyperparameters: dict[str, Any] = field(default_factory=dict, init=False)
    citations: dict[str, str] = field(default_factory=lambda: {"Sentence Transformers": SENTENCE_BERT}, init=False)
    widget: list[dict[str, Any]] = field(default_factory=list, init=False)
    usage_examples: list[str] = field(default_factory=list, init=False)
    training_time: float | None = field(default=None, init=False)
    evaluation_time: float | None = field(default=None, init=False)
    hardware: str | None = field(default=None, init=False)
    best_model_step: int | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if self.model_id is not None and self.model_id.count("/") != 1:
            raise ValueError(f"model_id must be a hub id 'owner/name', got {self.model_id!r}")
        # Data sets whose statistics need a tokenizer, which only to_card has.
        self._without_statistics: list[tuple[dict[str, Any], Any]] = []

    def add_tags(self, tags: str | Iterable[str]) -> None:
        """Add tags that are not there yet."""
        for tag in [tags] if isinstance(tags, str) else tags:
            if tag not in self.tags:
                self.tags.append(tag)

    def set_base_model(self, model_id: str, revision: str | None = None) -> None:
        """Say which hub model this one was made from."""
        self.base_model, self.base_model_revision = model_id, revision

    def set_best_model_step(self, step: int) -> None:
        """Say which step's weights are the ones kept; the training log shows that row in bold."""
        self.best_model_step = step

    def set_evaluation_metrics(
        self, evaluator: Any, metrics: Mapping[str, Any], epoch: float = 0, step: int = 0
    ) -> None:
        """Keep an evaluator's metrics: the latest for the evaluation section, the primary one for the training log.

        `evaluator` is anything with sentence-transformers' evaluator attributes; `step` -1 is outside of training.
        """
        plain = {key: _number(value) for key, value in metrics.items()}
        name, primary = getattr(evaluator, "name", "") or "", getattr(evaluator, "primary_metric", None)
        record = {
            "class_name": f"{type(evaluator).__module__}.{type(evaluator).__qualname__}",
            "name": name,
            "description": getattr(evaluator, "description", type(evaluator).__name__),
            "config": getattr(evaluator, "get_config_dict", dict)(),
            "primary_metric": primary,
            "step": step,
            "metrics": plain,
        }
        for position, known in enumerate(self.evaluations):
            if (known["class_name"], known["name"]) == (record["class_name"], name):
                self.evaluations[position] = record
                break
        else:
            self.evaluations.append(record)
        if primary in plain:
            self.evaluation_log.append({"epoch": epoch, "step": step, "metrics": {primary: plain[primary]}})

    def set_training_run(
        self,
        *,
        args: Any,
        train_dataset: Any,
        eval_dataset: Any = None,
        loss: Any,
        log_history: Iterable[Mapping[str, Any]],
        training_time: float | None = None,
        evaluation_time: float | None = None,
        hardware: str | None = None,
    ) -> None:
        """Describe the training; called again (after a resume, at a checkpoint), the later call counts.

        Args:
            args: Dataclass of training arguments with `to_dict()`.
            train_dataset: `datasets.Dataset`, a dict of them by name, or None.
            eval_dataset: The same for the evaluation loss.
            loss: The loss module; its `get_config_dict()` and `citation` are used where it has them.
            log_history: The trainer's log, as transformers keeps it.
            training_time: Seconds of training, evaluation included, if known.
            evaluation_time: Seconds of these that were evaluation, if known.
            hardware: Kind of processor it ran on, if it is to be told.
        """
        self.add_tags("generated_from_trainer")
        self._set_hyperparameters(args)
        described_loss = _describe_loss(loss)
        self._without_statistics = []
        self.train_datasets = self._describe_datasets(train_dataset, self.train_datasets, described_loss)
        self.eval_datasets = self._describe_datasets(eval_dataset, self.eval_datasets, described_loss)
        self.tags = [tag for tag in self.tags if not tag.startswith("dataset_size:")]
        if size := sum(entry.get("size", 0) for entry in self.train_datasets):
            self.add_tags(f"dataset_size:{size}")
        self.add_tags(f"loss:{type(loss).__name__}")
        citation = getattr(loss, "citation", None)
        if isinstance(citation, str) and citation.strip():
            self.citations[type(loss).__name__] = citation.strip()
        if self.generate_widget_examples and not self.widget:
            self._set_widget(eval_dataset if eval_dataset is not None else train_dataset)
        self.evaluation_log = _evaluations_of_this_run(self.evaluation_log, first=not self.log_history)
        self.log_history = [{key: _number(value) for key, value in entry.items()} for entry in log_history]
        self.training_time, self.evaluation_time, self.hardware = training_time, evaluation_time, hardware

    def to_card(self, model: Any) -> str:
        """The complete text of README.md for `model`, whose shape, similarities and token counts it shows."""
        for entry, dataset in self._without_statistics:
            entry["statistics"] = _statistics(dataset, model)
        self._without_statistics = []
        return model_card_text.render(self, model)

    def to_state(self) -> dict[str, Any]:
        """All facts as strictly JSON-able data; NaN and infinities are strings."""
        return {each.name: _to_json(getattr(self, each.name)) for each in fields(self)}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> SentenceTransformerModelCardData:
        """The card data that `to_state` gave `state` for."""
        names = {each.name for each in fields(cls)}
        if unknown := set(state) - names:
            raise ValueError(f"state must hold the fields of {cls.__name__}, got {sorted(unknown)} beside them")
        data = cls()
        for name, value in state.items():
            setattr(data, name, _from_json(value))
        return data

    def _set_hyperparameters(self, args: Any) -> None:
        values = {key: value for key, value in args.to_dict().items() if key not in UNTOLD_ARGUMENTS}
        defaults = _default_arguments(type(args))
        self.hyperparameters = {key: _to_json(value) for key, value in values.items()}
        self.non_default_hyperparameters = {
            key: value for key, value in self.hyperparameters.items() if key not in defaults or defaults[key] != value
        }

    def _describe_datasets(self, given: Any, known: list[dict[str, Any]], loss: dict[str, Any]) -> list[dict[str, Any]]:
        """One entry per data set: what its user said of it (name, id), and what it shows itself."""
        if given is None:
            return known
        named: list[tuple[str | None, Any]] = [(None, given)] if not isinstance(given, Mapping) else [*given.items()]
        if known and len(known) != len(named):
            logger.warning(
                "the model card data names %d data sets, training has %d: names dropped", len(known), len(named)
            )
        if len(known) != len(named):
            known = [{} for _ in named]
        entries = []
        for (name, dataset), before in zip(named, known, strict=True):
            said = before.get("said", before)
            fingerprint = getattr(dataset, "_fingerprint", None)
            entry = {**_origin(dataset, name), **said, "said": said, "fingerprint": fingerprint, "loss": loss}
            if _has_rows(dataset):
                entry |= {"size": len(dataset), "columns": list(dataset.column_names), "samples": _samples(dataset)}
                if fingerprint is not None and before.get("fingerprint") == fingerprint and "statistics" in before:
                    entry["statistics"] = before["statistics"]
                else:
                    self._without_statistics.append((entry, dataset))
            entries.append(entry)
        return entries

    def _set_widget(self, given: Any) -> None:
        """Example queries: a row's first text against its others and those of another row, from short rows."""
        dataset = next(iter(given.values()), None) if isinstance(given, Mapping) else given
        rows = [row for row in _text_rows(dataset) if all(row)] if _has_rows(dataset) else []
        rows.sort(key=lambda row: (sum(map(len, row)), row))
        # Spread over the shorter half: the very shortest rows are seldom sentences.
        picked = [rows[len(rows) * (index + 1) // (2 * WIDGETS + 1)] for index in range(WIDGETS)] if rows else []
        for row, other in zip(picked, picked[1:] + picked[:1], strict=True):
            source, *sentences = dict.fromkeys([*row, *other[1:], other[0]])
            if sentences and all(source != widget["source_sentence"] for widget in self.widget):
                self.widget.append({"source_sentence": source, "sentences": sentences[:4]})
        if self.widget:
            self.usage_examples = [self.widget[0]["source_sentence"], *self.widget[0]["sentences"]][:3]


def _evaluations_of_this_run(log: list[dict[str, Any]], first: bool) -> list[dict[str, Any]]:
    """The log without what belongs to an earlier training of the model (there, steps count up to where it ended).

    An evaluation outside of training (step -1) that came before it is of the same weights as one at step 0.
    """
    begin, last = 0, -1
    for position, entry in enumerate(log):
        if 0 <= entry["step"] < last:
            begin = position
        if entry["step"] >= 0:
            last = entry["step"]
    while begin > 0 and log[begin - 1]["step"] < 0:
        begin -= 1
    log = log[begin:]
    inside = next((position for position, entry in enumerate(log) if entry["step"] >= 0), len(log) if first else 0)
    return [{**entry, "epoch": 0, "step": 0} for entry in log[:inside]] + log[inside:]


def _number(value: Any) -> Any:
    """A plain int, float, bool or None from whatever number this is; anything else as text."""
    if hasattr(value, "item"):
        value = value.item()
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def _to_json(value: Any) -> Any:
    if isinstance(value, Enum):
        value = value.value
    if isinstance(value, float) and not math.isfinite(value):
        return {"non-finite": repr(value)}
    if isinstance(value, Mapping):
        return {str(key): _to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [_to_json(item) for item in value]
    return _number(value)


def _from_json(value: Any) -> Any:
    if isinstance(value, Mapping):
        if set(value) == {"non-finite"}:
            return float(value["non-finite"])
        return {key: _from_json(item) for key, item in value.items()}
    return [_from_json(item) for item in value] if isinstance(value, list) else value


def _default_arguments(kind: type) -> dict[str, Any]:
    """The arguments of a run that sets none, as `to_dict` shows them: with what the class derives from its defaults."""
    try:
        defaults = kind().to_dict()
    except TypeError:  # A class with required arguments has defaults for its other fields only.
        defaults = {each.name: each.default for each in fields(kind) if each.default is not MISSING}
        for each in fields(kind):
            if each.default_factory is not MISSING:
                defaults[each.name] = each.default_factory()
    return {key: _to_json(value) for key, value in defaults.items()}


def _describe_loss(loss: Any) -> dict[str, Any]:
    described = {"class_name": f"{type(loss).__module__}.{type(loss).__qualname__}"}
    config: dict[str, Any] = getattr(loss, "get_config_dict", dict)()
    return described | (
        {"config": _to_json({key: _callable_name(value) for key, value in config.items()})} if config else {}
    )


def _callable_name(value: Any) -> Any:
    return getattr(value, "__name__", type(value).__name__) if callable(value) else value


def _has_rows(dataset: Any) -> bool:
    """Whether rows can be had by position; a streamed data set would be used up by looking."""
    return hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__") and len(dataset) > 0


def _origin(dataset: Any, name: str | None) -> dict[str, Any]:
    """Name of a data set; hub id and revision where it was downloaded from the hub."""
    origin: dict[str, Any] = {}
    info = getattr(dataset, "info", None)
    found = name or getattr(info, "dataset_name", None)
    if found and found not in FILE_READERS:
        origin["name"] = found
    for source in getattr(info, "download_checksums", None) or {}:
        if match := re.match(r"hf://datasets/([^@]+)@([0-9a-f]{40})/", source):
            origin |= {"id": match[1], "revision": match[2]}
            break
    return origin


def _samples(dataset: Any) -> list[dict[str, Any]]:
    rows = (dataset[row] for row in range(min(SAMPLE_ROWS, len(dataset))))
    return [{column: _shorten(row[column], SAMPLE_CHARACTERS) for column in dataset.column_names} for row in rows]


def _text_rows(dataset: Any) -> Iterator[list[str]]:
    columns = dataset[: min(STATISTICS_ROWS, len(dataset))]
    texts = [values for values in columns.values() if all(isinstance(value, str) for value in values)]
    for row in zip(*texts, strict=True):
        # One line each: a widget's field holds no line break.
        yield [_shorten(" ".join(model_card_text.clean(text).split()), WIDGET_CHARACTERS) for text in row]


def _shorten(value: Any, characters: int) -> Any:
    if isinstance(value, str):
        return value if len(value) <= characters else value[:characters] + "..."
    return _to_json(value)


def _statistics(dataset: Any, model: Any) -> dict[str, dict[str, Any]]:
    """Type and spread of each column's first values: tokens as the model sees them, shares of labels, or numbers."""
    columns = dataset[: min(STATISTICS_ROWS, len(dataset))]
    return {column: _column_statistics(values, model) for column, values in columns.items()}


def _column_statistics(values: list[Any], model: Any) -> dict[str, Any]:
    values = [value for value in values if value is not None]
    first = values[0] if values else None
    if isinstance(first, str):
        counts = model.tokenize(values)["cu_seqlens"].diff().tolist()
        return {"type": "string", **_spread(counts, "tokens")}
    if isinstance(first, (bool, int)):
        shares = Counter(values)
        return {
            "type": type(first).__name__,
            **{str(key): f"{shares[key] / len(values):.2%}" for key in sorted(shares)},
        }
    if isinstance(first, float):
        return {"type": "float", **_spread(values, "")}
    if isinstance(first, list):
        return {"type": "list", **_spread([len(value) for value in values], "elements")}
    return {"type": type(first).__name__}


def _spread(values: list[float], unit: str) -> dict[str, str]:
    numbers = {"min": min(values), "mean": sum(values) / len(values), "max": max(values)}
    return {key: f"{round(value, 2)} {unit}".rstrip() for key, value in numbers.items()}
