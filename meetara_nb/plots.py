"""What the notebooks show: plots, saved beside the run as well, and texts to read."""

from __future__ import annotations

import io
import json
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

from .catalogue import Domain
from .hub.mixture import read_data
from .lab import Lab
from .runlog import duration, size
from .stages import STAGES

BLUE, ORANGE, GREY, DARK = "#2a6fbb", "#d9822b", "#b8bec6", "#1d2b3a"


def _done(lab: Lab, stage: str) -> Iterator[tuple[Domain, dict[str, Any]]]:
    """Domains for which the stage is done, with its facts."""
    for domain in lab.domains:
        if manifest := lab.manifest(STAGES[stage], domain):
            yield domain, manifest["facts"]


def _show(lab: Lab, figure: Any, name: str) -> None:
    """Saves a figure as PNG in the run's folder and shows it in the notebook."""
    from IPython.display import Image, display

    assert lab.log.folder is not None
    lab.log.folder.mkdir(parents=True, exist_ok=True)
    path = lab.log.folder / f"{name}.png"
    figure.savefig(path, dpi=110, bbox_inches="tight")
    display(Image(filename=str(path)))


def _figure(rows: int, width: float = 9.0, height: float = 2.8) -> tuple[Any, list[Any]]:
    """A figure with `rows` axes below one another, drawn without a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = [figure.add_subplot(rows, 1, row + 1) for row in range(rows)]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def funnel(lab: Lab) -> None:
    """What became of the composed samples, and the kinds that were kept."""
    done = list(_done(lab, "data"))
    if not done:
        return
    figure, axes = _figure(2 * len(done), height=2.4)
    for (domain, facts), above, below in zip(done, axes[::2], axes[1::2], strict=True):
        counts = {
            "composed": facts["generated"],
            **facts["dropped"],
            "near-duplicates": facts["near_duplicates"],
            "overlap with checks": facts["contaminated"],
            "kept": facts["kept"],
        }
        colours = [BLUE if name in ("composed", "kept") else GREY for name in counts]
        _bars(above, counts, colours)
        above.set_title(f"{domain.title}: {facts['kept']:,} of {facts['requested']:,} samples", loc="left")
        wanted = lab.params_of(domain).data.kinds
        kinds = {
            f"{kind.replace('_', ' ')} ({wanted.get(kind, 0) / sum(wanted.values()):.0%} asked for)": entry["kept"]
            for kind, entry in facts["by_kind"].items()
        }
        _bars(below, kinds, BLUE, [f"{count:,} ({count / facts['kept']:.0%})" for count in kinds.values()])
        below.set_title("kept, by kind", loc="left", fontsize=10)
    _show(lab, figure, "funnel")


def _bars(axis: Any, counts: dict[str, int], colour: Any, labels: list[str] | None = None) -> None:
    bars = axis.barh(list(counts), list(counts.values()), color=colour)
    axis.bar_label(bars, labels or [f"{count:,}" for count in counts.values()], padding=4)
    axis.invert_yaxis()
    axis.set_xticks([])
    axis.spines[["bottom"]].set_visible(False)
    axis.margins(x=0.12)


def coverage(lab: Lab) -> None:
    """How many samples of each kind there are on each topic, as a heat map."""
    for domain, facts in _done(lab, "data"):
        kinds = [kind for kind, entry in facts["by_kind"].items() if entry["kept"]]
        topics = [topic.id for topic in domain.topics]
        counts = Counter((sample["topic"], sample["kind"]) for sample in _samples(lab, domain))
        # Kinds that belong to no topic, such as red flags, have a row of their own.
        rows = [*topics, ""] if any(topic == "" for topic, _ in counts) else topics
        grid = [[counts[topic, kind] for kind in kinds] for topic in rows]
        figure, (axis,) = _figure(1, width=10, height=0.3 * len(rows) + 1.6)
        axis.imshow(grid, cmap="Blues", aspect="auto")
        most = max(map(max, grid))
        for y, row in enumerate(grid):
            for x, count in enumerate(row):
                colour = "white" if count > 0.6 * most else "#333" if count else "#bbb"
                axis.text(x, y, f"{count:,}", ha="center", va="center", fontsize=7, color=colour)
        axis.set_xticks(range(len(kinds)), [kind.replace("_", " ") for kind in kinds], rotation=35, ha="right")
        axis.set_yticks(range(len(rows)), [topic.replace("_", " ") or "(no topic)" for topic in rows])
        axis.spines[:].set_visible(False)
        uses = facts["uses_of_a_statement"]
        axis.set_title(
            f"{domain.title}: {facts['statements_used']} of {facts['statements']} statements used, "
            f"{uses['median']:g} times in the median, {uses['max']} at most",
            loc="left", fontsize=10,
        )  # fmt: skip
        _show(lab, figure, f"coverage_{domain.domain}")


def lengths(lab: Lab) -> None:
    """How long questions and answers are, in words."""
    done = list(_done(lab, "data"))
    if not done:
        return
    figure, axes = _figure(len(done), height=2.2)
    for (domain, _), axis in zip(done, axes, strict=True):
        samples = _samples(lab, domain)
        for role, colour in (("user", ORANGE), ("assistant", BLUE)):
            words = [
                sum(len(m["content"].split()) for m in sample["messages"] if m["role"] == role) for sample in samples
            ]
            label = f"{role}: median {sorted(words)[len(words) // 2]}, longest {max(words)}"
            axis.hist(words, bins=range(0, max(words) + 5, 4), color=colour, alpha=0.6, label=label)
        axis.set(xlabel="words in a sample", ylabel="samples")
        axis.set_title(domain.title, loc="left")
        axis.legend(frameon=False)
    _show(lab, figure, "lengths")


def _samples(lab: Lab, domain: Domain) -> list[dict[str, Any]]:
    return list(read_data(Path(lab.layout.training_data(domain.category, domain.domain)))["samples"])


SHOWN = 12


def browse(lab: Lab) -> None:
    """Kept samples of every kind and dropped drafts of every reason, to open and read; saved as a page, too."""
    from IPython.display import HTML, display

    for domain, facts in _done(lab, "data"):
        parts = [f"<h3>{escape(domain.title)}: kept</h3>"]
        samples = _samples(lab, domain)
        for kind, entry in facts["by_kind"].items():
            # The first in the file, which is the order of training.
            some = [sample for sample in samples if sample["kind"] == kind][:SHOWN]
            parts.append(_group(f"{kind.replace('_', ' ')} ({entry['kept']:,} samples)", some))
        dropped = _dropped(lab, domain)
        parts.append(f"<h3>{escape(domain.title)}: dropped</h3>" if dropped else "<p>Nothing was dropped.</p>")
        totals = Counter[str]()
        for entry in facts["by_kind"].values():
            totals.update({reason: count for reason, count in entry.items() if reason not in ("generated", "kept")})
        for reason, lost in dropped.items():
            parts.append(_group(f"{reason} ({totals[reason]:,} drafts)", lost[:SHOWN]))
        page = "\n".join(parts)
        assert lab.log.folder is not None
        lab.log.folder.mkdir(parents=True, exist_ok=True)
        head = f'<!doctype html><meta charset="utf-8"><title>{escape(domain.title)}</title>'
        (lab.log.folder / f"samples_{domain.domain}.html").write_text(head + page, encoding="utf-8")
        display(HTML(page))


def _dropped(lab: Lab, domain: Domain) -> dict[str, list[dict[str, Any]]]:
    path = Path(lab.layout.dropped(domain.category, domain.domain))
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            entry = json.loads(line)
            found[entry["reason"]].append(entry)
    return found


def _group(title: str, samples: list[dict[str, Any]]) -> str:
    rows = []
    for sample in samples:
        turns = "<br>".join(
            f"<b>{message['role']}</b> {escape(message['content'])}".replace("\n", "<br>")
            for message in sample["messages"][1:]
        )
        note = sample.get("id") or (f"like {sample['similar_to']}" if "similar_to" in sample else "")
        about = ", ".join(sample["statements"]) or sample["topic"]
        cells = "".join(f'<td style="text-align:left;vertical-align:top">{cell}</td>' for cell in (turns, about, note))
        rows.append(f"<tr>{cells}</tr>")
    shown = f", {len(samples)} shown" if samples else ""
    return f"<details><summary>{escape(title)}{shown}</summary><table>{''.join(rows)}</table></details>"


def losses(lab: Lab) -> None:
    """Training and held-out loss and the learning rate over the steps, when training is done."""
    done = list(_done(lab, "train"))
    if not done:
        return
    figure, axes = _figure(len(done))
    for (domain, facts), axis in zip(done, axes, strict=True):
        _curve(axis, facts["losses"], facts["held_out"])
        axis.set_title(
            f"{domain.title}: {facts['tokens']:,} tokens, {facts['epochs']:.1%} of an epoch, "
            f"{facts['tokens_per_s']:.0f} tokens/s, {size(facts['peak_memory_bytes'])} at most",
            loc="left",
        )
    _show(lab, figure, "losses")


def _curve(axis: Any, losses: list[list[float]], held_out: list[list[float]]) -> None:
    steps, values, rates = zip(*losses, strict=True)
    axis.plot(steps, values, color=GREY, linewidth=1, label="loss of a step")
    span = max(1, len(values) // 12)
    smooth = [sum(values[max(0, i - span) : i + 1]) / len(values[max(0, i - span) : i + 1]) for i in range(len(values))]
    axis.plot(steps, smooth, color=BLUE, linewidth=2, label=f"mean of the last {span + 1}")
    if held_out:
        axis.plot(*zip(*held_out, strict=True), color=DARK, marker="o", markersize=4, label="held-out loss")
    axis.set(xlabel="step", ylabel="loss (nats a token)")
    right = axis.twinx()
    right.plot(steps, rates, color=ORANGE, linewidth=1, label="learning rate (right)")
    right.spines[["top"]].set_visible(False)
    right.set_ylim(bottom=0)
    lines = [*axis.get_lines(), *right.get_lines()]
    axis.legend(lines, [line.get_label() for line in lines], frameon=False, loc="upper right")


class LiveCurve:
    """The loss while it trains, drawn anew every few seconds in the notebook's output, and saved as PNG at the end.

    It is an ordinary output that is replaced, not a widget: JupyterLab, Colab, VS Code and papermill all show it, and
    the executed notebook keeps the last one.

    Use it as a context around `lab.run("train")`.
    """

    def __init__(self, lab: Lab, every_s: float = 10.0) -> None:
        self.lab, self.every_s = lab, every_s
        self.handle: Any = None
        self._begin("")

    def __enter__(self) -> LiveCurve:
        self.lab.log.listeners.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        self.lab.log.listeners.remove(self)

    def _begin(self, domain: str) -> None:
        self.domain, self.losses, self.held_out = domain, list[list[float]](), list[list[float]]()
        self.drawn, self.folder = 0.0, self.lab.log.folder

    def __call__(self, event: dict[str, Any]) -> None:
        """Takes an event of the log."""
        if event["domain"] and event["domain"] != self.domain:
            self._begin(event["domain"])
            self.handle = None
        if event["event"] == "held out":
            self.held_out.append([event["step"], event["loss"]])
        elif event["event"] == "step":
            self.losses.append([event["step"], event["loss"], event["learning_rate"]])
            ended = event["step"] >= event["steps"]
            if ended or time.monotonic() - self.drawn >= self.every_s:
                self._draw(event)
                self.drawn = time.monotonic()

    def _draw(self, event: dict[str, Any]) -> None:
        from IPython.display import Image, display

        figure, (axis,) = _figure(1)
        _curve(axis, self.losses, self.held_out)
        axis.set_xlim(0, event["steps"])
        axis.set_title(
            f"{self.domain}: step {event['step']} of {event['steps']}, {event['tokens_per_s']} tokens/s, "
            f"{duration(event['left_s'])} left, {size(event['memory_bytes'])} of memory",
            loc="left",
        )
        content = io.BytesIO()
        figure.savefig(content, dpi=90, bbox_inches="tight")
        if self.handle is None:
            self.handle = display(Image(content.getvalue()), display_id=True)
        else:
            self.handle.update(Image(content.getvalue()))
        if self.folder is not None:
            (self.folder / f"loss_{self.domain}.png").write_bytes(content.getvalue())


def gate(lab: Lab) -> str:
    """What the integrity gate saw of every file."""
    parts = []
    for domain, facts in _done(lab, "gguf"):
        for file in facts["files"]:
            types = ", ".join(f"{count} {kind}" for kind, count in file["tensor_types"].items())
            lines = [f"{domain.domain}, {file['form']} {file['quant']}: {size(file['bytes'])}; tensors: {types}"]
            lines += [f"  ok  {check['check']}: {check['detail']}" for check in file["checks"]]
            parts.append("\n".join(lines))
    return "\n\n".join(parts)


def scores(lab: Lab) -> None:
    """Bits per byte by topic, base against tuned, with recall."""
    done = list(_done(lab, "evaluate"))
    if not done:
        return
    figure, axes = _figure(len(done), height=5.2)
    for (domain, _), axis in zip(done, axes, strict=True):
        figures = json.loads(Path(lab.layout.figures(domain.category, domain.domain)).read_text(encoding="utf-8"))
        name, result = next(iter(figures["files"].items()))
        topics = [topic.id for topic in domain.topics]
        for which, colour, offset in (("base", GREY, -0.2), ("tuned", BLUE, 0.2)):
            by_topic: dict[str, list[Any]] = defaultdict(list)
            for check in result[which]["checks"]:
                by_topic[check["topic"]].append(check)
            asked = [topic for topic in topics if by_topic[topic]]
            values = [sum(c["bits_per_byte"] for c in by_topic[t]) / len(by_topic[t]) for t in asked]
            places = [i + offset for i in range(len(asked))]
            total = result[which]
            label = f"{which}: {total['bits_per_byte']:.3f} bits per byte, recall {total['recall']:.0%}"
            bars = axis.barh(places, values, height=0.38, color=colour, label=label)
            recalled = [f"{sum(c['recalled'] for c in by_topic[t])}/{len(by_topic[t])}" for t in asked]
            axis.bar_label(bars, recalled, padding=3, fontsize=8, color="#555")
        axis.set_yticks(range(len(asked)), [topic.replace("_", " ") for topic in asked])
        axis.invert_yaxis()
        axis.set(xlabel="bits per byte of the good answers (lower is better); beside the bars: checks recalled")
        axis.set_title(f"{domain.title}, {name}", loc="left")
        axis.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=2)
    _show(lab, figure, "scores")


def answers(lab: Lab) -> str:
    """The shipped files' answers to held-out questions, beside the good ones."""
    parts = []
    for domain, facts in _done(lab, "evaluate"):
        for answer in facts["answers"]:
            end = "" if answer["stopped"] else " [cut: it did not end]"
            parts.append(
                f"{domain.domain}: {answer['question']}\n  model: {answer['text']}{end}\n  good:  {answer['expected']}"
            )
    return "\n\n".join(parts)


def metadata(lab: Lab) -> str:
    """The metadata files as they are."""
    paths = [Path(lab.layout.domain_metadata(domain.category, domain.domain)) for domain, _ in _done(lab, "metadata")]
    return "\n".join(f"{path} ({size(path.stat().st_size)})\n{path.read_text(encoding='utf-8')}" for path in paths)
