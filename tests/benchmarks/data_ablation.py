"""What the data's variety brings: the same training on less varied data, scored on the held-out checks.

    python tests/benchmarks/data_ablation.py general_health --steps 100 --folder /tmp/ablation

Trains an adapter on each variant of the data with the same number of optimizer steps, and prints bits per byte and
recall of the GGUF files. A variant takes 6 to 9 minutes on 2 cores; what is done is not done again.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

from meetara_nb.hub import dataset, dedup, grounded
from meetara_nb.lab import Lab
from meetara_nb.runlog import table

FEWER_KINDS = ("answer", "steps", "follow_up", "pair", "mistake", "red_flag")


def one_wording(_: grounded.Composer, statement: Any) -> tuple[str, tuple[str, ...]]:
    return statement.say, (statement.say,)


class Repeating(grounded.Composer):
    """Proposes what has been said again."""

    def _new(self, kind: str, *about: Any) -> grounded.Draft | None:
        return self._makers[kind](*about)


VARIANTS: dict[str, tuple[dict[str, Any], list[tuple[Any, str, Any]]]] = {
    "full": ({}, []),
    "one wording a statement": ({}, [(grounded.Composer, "_worded", one_wording)]),
    "half the kinds": ({"data.kinds": dict.fromkeys(FEWER_KINDS, 10.0)}, []),
    "near-duplicates kept": (
        {},
        [(dataset, "Composer", Repeating), (dedup.NearDuplicates, "add", lambda *_: None)],
    ),
}


def scores(name: str, variant: str, steps: int, samples: int, folder: Path) -> Iterator[dict[str, Any]]:
    """Runs the stages of a variant; yields the figures of base and tuned."""
    overrides, patches = VARIANTS[variant]
    place = folder / variant.replace(" ", "_")
    with ExitStack() as stack:
        for target, attribute, value in patches:
            stack.enter_context(mock.patch.object(target, attribute, value))
        lab = Lab.open(
            [name],
            "fast",
            overrides={"data.samples": samples, "train.max_steps": steps, **overrides},
            data_root=str(place / "data"),
            models_root=str(place / "models"),
        )
        for stage in ("data", "train", "gguf", "evaluate"):
            for outcome in lab.run(stage):
                if outcome.state == "failed":
                    raise SystemExit(outcome.error)
        figures = json.loads(Path(lab.layout.figures(lab.domains[0].category, name)).read_text(encoding="utf-8"))
        yield from (next(iter(figures["files"].values()))[which] for which in ("base", "tuned"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("domain")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--samples", type=int, default=5_000)
    parser.add_argument("--folder", type=Path, default=Path("ablation"))
    parser.add_argument("--variants", nargs="*", choices=VARIANTS, default=list(VARIANTS))
    options = parser.parse_args()
    os.environ["MEETARA_WORK_ROOT"] = str((options.folder / "work").absolute())
    rows, by_topic = [], {}
    for variant in options.variants:
        base, tuned = scores(options.domain, variant, options.steps, options.samples, options.folder.absolute())
        if not rows:
            rows.append(["(base)", f"{base['bits_per_byte']:.3f}", f"{base['recall']:.0%}"])
        rows.append([variant, f"{tuned['bits_per_byte']:.3f}", f"{tuned['recall']:.0%}"])
        by_topic[variant] = [(b, t) for b, t in zip(base["checks"], tuned["checks"], strict=True)]
        print(table(rows, ["data", "bits per byte", "recall"]), flush=True)
    pairs = next(iter(by_topic.values()))
    topics = {}
    for b, t in pairs:
        topics.setdefault(b["topic"], []).append((b, t))
    rows = [
        [
            topic,
            len(found),
            *(f"{sum(c[i]['bits_per_byte'] for c in found) / len(found):.3f}" for i in (0, 1)),
            *(sum(c[i]["recalled"] for c in found) for i in (0, 1)),
        ]
        for topic, found in topics.items()
    ]
    print(f"\n{options.variants[0]}, by topic")
    print(table(rows, ["topic", "checks", "bits/byte base", "tuned", "recalled base", "tuned"]))


if __name__ == "__main__":
    main()
