"""The words of the model card: Markdown and metadata from `SentenceTransformerModelCardData` and a model.

Any text may be hostile to Markdown, HTML or YAML: it goes through `clean` and then `escape` (Markdown and HTML), `code`
(a code span) or a YAML dumper before it stands in the card.
"""

from __future__ import annotations

import html
import importlib.metadata
import json
import math
import platform
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from huggingface_hub import EvalResult, ModelCardData

if TYPE_CHECKING:
    from triton_st.model_card import SentenceTransformerModelCardData

LOG_ROWS_SHOWN = 100
PADDED_WIDTH = 60
SNIPPET_CHARACTERS = 200
EXAMPLES = ["A child plays in the park.", "Outside, a kid is playing.", "The train leaves at noon."]
SIMILARITY_NAMES = {
    "cosine": "Cosine Similarity",
    "dot": "Dot Product",
    "euclidean": "Euclidean Distance",
    "manhattan": "Manhattan Distance",
}
# A bracket matters where a link or a footnote could begin, an underscore where it does not stand within a word.
SPECIAL = re.compile(r"[\\`*~|$]|\[(?=\^)|\](?=[(\[:])|(?<![^\W_])_|_(?![^\W_])")
RUNTIME_METRICS = re.compile(r"_(runtime|(samples|steps|tokens)_per_second)$")


def render(data: SentenceTransformerModelCardData, model: Any) -> str:
    """The complete README.md."""
    name = data.model_name or _default_name(data)
    sections = [
        f"---\n{_metadata(data, name)}\n---",
        f"# {escape(name)}",
        _introduction(data, model),
        _details(data, model),
        _usage(data, model),
        _evaluation(data),
        _training(data),
        _citations(data),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


# Text in Markdown ---------------------------------------------------------------------------------------------------


def clean(text: Any) -> str:
    """Text that UTF-8 and YAML can hold: no lone surrogates, no control characters, plain line breaks."""
    text = str(text).encode("utf-8", errors="replace").decode("utf-8")
    text = re.sub(r"\r\n?|[\u0085\u2028\u2029]", "\n", text)
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ufeff\ufffe\uffff]", "", text)


def escape(text: Any) -> str:
    """Text that shows as itself in one line of Markdown, table cells and HTML: special characters as entities."""
    text = html.escape(clean(text).strip("\n"), quote=False)
    text = SPECIAL.sub(lambda match: f"&#{ord(match[0])};", text)
    return text.replace("\n", "<br>")


def code(text: Any) -> str:
    """Text as a code span."""
    shown = clean(text)
    return f"<code>{escape(shown)}</code>" if re.search(r"[`|\n]|^$", shown) else f"`{shown}`"


def _number(value: Any) -> str:
    """As sentence-transformers prints: floats rounded to four digits, NaN as `nan`."""
    return str(round(value, 4)) if isinstance(value, float) else escape(value)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown table; columns are padded for those who read the file itself, unless cells are too long for it."""
    rows = [list(header), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    if max(widths) > PADDED_WIDTH:
        widths = [max(len(cell), 3) for cell in header]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    lines.insert(1, "|" + "|".join(":" + "-" * (width + 1) for width in widths) + "|")
    return "\n".join(lines)


def _fenced(language: str, text: str) -> str:
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"


def _indented(text: str) -> str:
    return "\n".join("  " + line if line else line for line in text.splitlines())


def _parameters(config: Any) -> str:
    return _indented(_fenced("json", json.dumps(config, indent=4, ensure_ascii=False, default=str)))


def _folded(text: str, summary: str = "Click to expand") -> str:
    return f"<details><summary>{summary}</summary>\n\n{text}\n\n</details>"


def _joined(items: Sequence[str]) -> str:
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]


def _plural(word: str, items: Sequence[Any]) -> str:
    return word + "s" if len(items) > 1 else word


def _duration(seconds: float) -> str:
    for unit, size, limit in (("seconds", 1, 60), ("minutes", 60, 3600), ("hours", 3600, 86400)):
        if seconds < limit:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds / 86400:.1f} days"


def _hub_link(model_or_dataset: str, path: str = "") -> str:
    return f"[{escape(model_or_dataset)}](https://huggingface.co/{path}{quote(model_or_dataset)})"


# Metadata block -----------------------------------------------------------------------------------------------------


def _default_name(data: SentenceTransformerModelCardData) -> str:
    return f"SentenceTransformer based on {data.base_model}" if data.base_model else "SentenceTransformer"


def _metadata(data: SentenceTransformerModelCardData, name: str) -> str:
    """YAML of the metadata block. Metrics that are not finite are left out: no number, no valid result."""
    results = [
        EvalResult(
            task_type=record["description"].lower().replace(" ", "-"),
            task_name=clean(record["description"]),
            dataset_type=clean(record["name"]) or "unknown",
            dataset_name=clean(record["name"]).replace("_", " ").replace("-", " ") or "Unknown",
            metric_type=clean(key),
            metric_name=clean(key).replace("_", " ").title(),
            metric_value=value,
        )
        for record in data.evaluations
        for key, value in _unprefixed(record, _metrics(data, record)).items()
        if isinstance(value, (int, float)) and math.isfinite(value)
    ]
    datasets = dict.fromkeys(entry["id"] for entry in [*data.train_datasets, *data.eval_datasets] if entry.get("id"))
    return ModelCardData(
        language=_languages(data) or None,
        license=data.license,
        library_name="sentence-transformers",
        tags=[clean(tag) for tag in data.tags],
        base_model=data.base_model,
        datasets=list(datasets) or None,
        metrics=list(dict.fromkeys(result.metric_type for result in results)) or None,
        pipeline_tag="sentence-similarity",
        widget=data.widget or None,
        model_name=" ".join(clean(name).split()) if results else None,
        eval_results=results or None,
    ).to_yaml(line_break="\n")


def _languages(data: SentenceTransformerModelCardData) -> list[str]:
    return [data.language] if isinstance(data.language, str) else list(data.language or [])


def _metrics(data: SentenceTransformerModelCardData, record: dict[str, Any]) -> dict[str, Any]:
    """An evaluator's metrics of the weights that were kept: the latest, unless training went back to a step before."""
    best = data.best_model_step
    if best is not None and 0 <= record["step"] != best:
        logged = {key: value for entry in data.log_history if entry.get("step") == best for key, value in entry.items()}
        if all(f"eval_{key}" in logged for key in record["metrics"]):
            return {key: logged[f"eval_{key}"] for key in record["metrics"]}
    return record["metrics"]


def _unprefixed(record: dict[str, Any], by_key: dict[str, Any]) -> dict[str, Any]:
    """Values by metric, without the evaluator's name before each."""
    prefix = f"{record['name']}_"
    if record["name"] and all(key.startswith(prefix) for key in by_key):
        return {key[len(prefix) :]: value for key, value in by_key.items()}
    return by_key


# What it is ---------------------------------------------------------------------------------------------------------


def _dataset_names(data: SentenceTransformerModelCardData) -> list[str]:
    return [
        _hub_link(entry["id"], "datasets/") if entry.get("id") else escape(entry["name"])
        for entry in data.train_datasets
        if entry.get("id") or entry.get("name")
    ]


def _introduction(data: SentenceTransformerModelCardData, model: Any) -> str:
    origin = f", fine-tuned from {_hub_link(data.base_model)}" if data.base_model else ""
    names = _dataset_names(data)
    if names:
        on = f"{len(names)}" if len(names) > 5 else f"the {_joined(names)}"
        origin += f", {'' if data.base_model else 'trained '}on {on} {_plural('dataset', names)}"
    return (
        f"A sentence encoder in the format of [sentence-transformers](https://www.sbert.net){origin}. It turns a text "
        f"into a vector of {model.get_embedding_dimension()} dimensions, for {escape(data.task_name)}."
    )


def _details(data: SentenceTransformerModelCardData, model: Any) -> str:
    similarity = model.similarity_fn_name or "cosine"
    facts = ["- **Model Type:** Sentence Transformer"]
    if data.base_model:
        revision = f" at revision {code(data.base_model_revision)}" if data.base_model_revision else ""
        facts.append(f"- **Base Model:** {_hub_link(data.base_model)}{revision}")
    facts += [
        f"- **Maximum Sequence Length:** {model.max_seq_length} tokens",
        f"- **Output Dimensionality:** {model.get_embedding_dimension()} dimensions",
        f"- **Similarity Function:** {SIMILARITY_NAMES.get(similarity, escape(similarity))}",
        f"- **Parameters:** {sum(parameter.numel() for parameter in model.parameters()):,}",
        "- **Supported Modality:** Text",
    ]
    if names := _dataset_names(data):
        facts += [f"- **{_plural('Training Dataset', names)}:**", *(f"    - {name}" for name in names)]
    if languages := _languages(data):
        facts.append(f"- **{_plural('Language', languages)}:** {escape(', '.join(languages))}")
    if data.license:
        facts.append(f"- **License:** {escape(data.license)}")
    return "\n\n".join(
        [
            "## Model Details",
            "### Model Description",
            "\n".join(facts),
            "### Model Sources",
            "- **Documentation:** [sbert.net](https://sbert.net)\n"
            "- **Repository:** [sentence-transformers](https://github.com/huggingface/sentence-transformers)\n"
            "- **Hugging Face:** [other models of this kind]"
            "(https://huggingface.co/models?library=sentence-transformers)",
            "### Full Model Architecture",
            _fenced("", str(model)),
        ]
    )


# How to use it ------------------------------------------------------------------------------------------------------


def _usage(data: SentenceTransformerModelCardData, model: Any) -> str:
    texts = [clean(text) for text in data.usage_examples or EXAMPLES]
    texts = [text if len(text) <= SNIPPET_CHARACTERS else text[:SNIPPET_CHARACTERS] + "..." for text in texts]
    shown = ["print(similarities.shape)", f"# torch.Size([{len(texts)}, {len(texts)}])"]
    if data.generate_widget_examples:
        shown = ["print(similarities)", *(f"# {line}" for line in _similarities(model, texts).splitlines())]
    lines = [
        f"model = SentenceTransformer({clean(data.model_id or 'path/to/this/model')!r})",
        "sentences = [",
        *(f"    {text!r}," for text in texts),
        "]",
        "embeddings = model.encode(sentences)",
        "print(embeddings.shape)",
        f"# ({len(texts)}, {model.get_embedding_dimension()})",
        "",
        "similarities = model.similarity(embeddings, embeddings)",
        *shown,
    ]

    def snippet(package: str) -> str:
        return _fenced("python", "\n".join([f"from {package} import SentenceTransformer", "", *lines]))

    return "\n\n".join(
        [
            "## Usage",
            "### Direct Usage (triton_st)",
            "On fused kernels and with no padding:",
            _fenced("bash", "pip install triton_st"),
            snippet("triton_st"),
            "### Direct Usage (Sentence Transformers)",
            "The same folder loads in sentence-transformers and gives the same embeddings:",
            _fenced("bash", "pip install sentence-transformers"),
            snippet("sentence_transformers"),
        ]
    )


def _similarities(model: Any, texts: list[str]) -> str:
    """The similarity matrix of `texts`, as torch prints one."""
    embeddings = model.encode(texts, convert_to_tensor=True, show_progress_bar=False)
    rows = model.similarity(embeddings, embeddings).tolist()
    printed = ",\n        ".join("[" + ", ".join(f"{value:.4f}" for value in row) + "]" for row in rows)
    return f"tensor([{printed}])"


# How good it is -----------------------------------------------------------------------------------------------------


def _evaluation(data: SentenceTransformerModelCardData) -> str:
    if not data.evaluations:
        return ""
    parts = ["## Evaluation", "### Metrics"]
    for record in data.evaluations:
        class_name = record["class_name"].rpartition(".")[2]
        evaluator = f"* Evaluated with {code(record['class_name'])}"
        if class_name == "EmbeddingSimilarityEvaluator":
            evaluator = (
                "* Evaluated with [<code>EmbeddingSimilarityEvaluator</code>](https://sbert.net/docs/package_reference/"
                "sentence_transformer/evaluation.html#embeddingsimilarityevaluator)"
            )
        if record["config"]:
            evaluator += f" with these parameters:\n{_parameters(record['config'])}"
        lines = [f"* Dataset: {code(record['name'])}"] if record["name"] else []
        metrics = _metrics(data, record)
        names = _unprefixed(record, {key: key for key in metrics})
        rows = []
        for name, key in names.items():
            bold = "**" if key == record["primary_metric"] else ""
            rows.append((f"{bold}{escape(name)}{bold}", f"{bold}{_number(metrics[key])}{bold}"))
        parts += [
            f"#### {escape(record['description'])}",
            "\n".join([*lines, evaluator]),
            _table(("Metric", "Value"), rows),
        ]
    return "\n\n".join(parts)


# How it was made ----------------------------------------------------------------------------------------------------


def _training(data: SentenceTransformerModelCardData) -> str:
    parts = ["## Training Details"]
    for kind, entries in (("training", data.train_datasets), ("evaluation", data.eval_datasets)):
        if entries:
            parts.append(f"### {_plural(f'{kind.title()} Dataset', entries)}")
            parts += [_dataset(entry, kind) for entry in entries]
    parts += [_hyperparameters(data), _training_logs(data), _environment(data)]
    return "\n\n".join(part for part in parts if part)


def _dataset(entry: dict[str, Any], kind: str) -> str:
    name = entry.get("name") or entry.get("id") or "Unnamed Dataset"
    lines = []
    if "id" in entry:
        at = ""
        if revision := entry.get("revision"):
            at = f" at [{escape(revision[:7])}](https://huggingface.co/datasets/{quote(entry['id'])}/tree/{quote(revision)})"
        lines.append(f"* Dataset: {_hub_link(entry['id'], 'datasets/')}{at}")
    elif "name" in entry:
        lines.append(f"* Dataset: {escape(name)}")
    if "size" in entry:
        lines.append(f"* Size: {entry['size']:,} {kind} samples")
    if columns := entry.get("columns"):
        lines.append(f"* Columns: {_joined([f'<code>{escape(column)}</code>' for column in columns])}")
        header = ["", *map(escape, columns)]
        if statistics := entry.get("statistics"):
            types = ["type", *(escape(statistics[column]["type"]) for column in columns)]
            details = ["details", *(_html_list(statistics[column]) for column in columns)]
            counted = min(entry["size"], 1000)
            lines += [
                f"* Approximate statistics based on the first {counted:,} samples:",
                _indented(_table(header, [types, details])),
            ]
        samples = [[f"<code>{escape(row[column])}</code>" for column in columns] for row in entry["samples"]]
        lines += ["* Samples:", _indented(_table(header[1:], samples))]
    if loss := entry.get("loss"):
        shown = f"* Loss: <code>{escape(loss['class_name'].rpartition('.')[2])}</code>"
        if loss["class_name"].startswith(("triton_st.", "sentence_transformers.")):
            anchor = loss["class_name"].rpartition(".")[2]
            page = "https://sbert.net/docs/package_reference/sentence_transformer/losses.html"
            shown = f"* Loss: [<code>{anchor}</code>]({page}#{anchor.lower()})"
        lines.append(shown + (f" with these parameters:\n{_parameters(loss['config'])}" if "config" in loss else ""))
    return f"#### {escape(name)}\n\n" + "\n".join(lines)


def _html_list(statistics: dict[str, Any]) -> str:
    items = [f"<li>{escape(key)}: {escape(value)}</li>" for key, value in statistics.items() if key != "type"]
    return f"<ul>{''.join(items)}</ul>" if items else ""


def _hyperparameters(data: SentenceTransformerModelCardData) -> str:
    if not data.hyperparameters:
        return ""

    def listed(values: dict[str, Any]) -> str:
        return "\n".join(f"- `{name}`: {escape(value)}" for name, value in values.items())

    parts = ["### Training Hyperparameters"]
    if data.non_default_hyperparameters:
        parts += ["#### Non-Default Hyperparameters", listed(data.non_default_hyperparameters)]
    parts += ["#### All Hyperparameters", _folded(listed(data.hyperparameters))]
    return "\n\n".join(parts)


def _training_logs(data: SentenceTransformerModelCardData) -> str:
    """One row per step that logged a loss or was evaluated; what was evaluated outside of training comes last."""
    primary = dict.fromkeys(key for entry in data.evaluation_log for key in entry["metrics"])
    rows: dict[int, dict[str, Any]] = {}
    for entry in data.log_history:
        shown = {"Training Loss": entry.get("loss"), "Validation Loss": entry.get("eval_loss")}
        for key, value in entry.items():
            name = key.removeprefix("eval_")
            known = name in primary or (key.startswith("eval_") and not primary and not RUNTIME_METRICS.search(key))
            if known and key != "eval_loss" and isinstance(value, (int, float)):
                shown[name] = value
        shown = {key: value for key, value in shown.items() if value is not None}
        if shown and "step" in entry:
            rows.setdefault(entry["step"], {"Epoch": entry.get("epoch", "-")}).update(shown)
    for entry in data.evaluation_log:
        rows.setdefault(entry["step"], {"Epoch": entry["epoch"]}).update(entry["metrics"])
    if not rows:
        return ""
    present = dict.fromkeys([*primary, *(key for row in rows.values() for key in row)])
    first = [key for key in ("Epoch", "Training Loss", "Validation Loss") if key in present]
    columns = [*first[:1], "Step", *first[1:], *(key for key in present if key not in first)]
    cells = []
    for step in sorted(rows, key=lambda step: (step < 0, step)):
        row = {**rows[step], "Step": step}
        bold = "**" if step == data.best_model_step else ""
        cells.append([f"{bold}{_number(row[key]) if key in row else '-'}{bold}" for key in columns])
    text = _table([escape(column) for column in columns], cells)
    if data.best_model_step in rows:
        text += "\n\n* The bold row is the checkpoint that was saved."
    return "### Training Logs\n\n" + (_folded(text) if len(cells) > LOG_ROWS_SHOWN else text)


def _environment(data: SentenceTransformerModelCardData) -> str:
    parts = []
    if data.hardware:
        parts += ["### Training Hardware", f"- **Hardware:** {escape(data.hardware)}"]
    if data.training_time is not None:
        times = [f"- **Training:** {_duration(data.training_time - (data.evaluation_time or 0.0))}"]
        if data.evaluation_time:
            times += [
                f"- **Evaluation:** {_duration(data.evaluation_time)}",
                f"- **Total:** {_duration(data.training_time)}",
            ]
        parts += ["### Training Time", "\n".join(times)]
    parts += ["### Framework Versions", "\n".join(f"- {name}: {version}" for name, version in _versions().items())]
    return "\n\n".join(parts)


def _versions() -> dict[str, str]:
    from triton_st import __version__

    versions = {"Python": platform.python_version(), "triton_st": __version__}
    packages = {"PyTorch": "torch", "Triton": "triton", "Transformers": "transformers", "Tokenizers": "tokenizers"}
    for name, package in {**packages, "Datasets": "datasets"}.items():
        try:
            versions[name] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _citations(data: SentenceTransformerModelCardData) -> str:
    # Losses of one paper share its entry.
    names: dict[str, list[str]] = {}
    for name, entry in data.citations.items():
        names.setdefault(entry.strip(), []).append(name)
    entries = [f"#### {escape(_joined(sharing))}\n\n{_fenced('bibtex', entry)}" for entry, sharing in names.items()]
    return "\n\n".join(["## Citation", "### BibTeX", *entries])
