"""The command line. The only place that ends the process."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .errors import MeetaraError

EXAMPLES = """\
examples:
  python -m meetara_nb list                                    the domains there are
  python -m meetara_nb plan --domains general_health           what a run would make, and how large
  python -m meetara_nb run --domains general_health            data, training, GGUF, evaluation, metadata
  python -m meetara_nb run --domains general_health,entrepreneurship --max-minutes 10
  python -m meetara_nb run --domains general_health --form merged --quant Q4_K_M,Q8_0
  python -m meetara_nb run --params params/runs/first_run.yaml
  python -m meetara_nb validate params/domains/healthcare/general_health.yaml

`run` again is always safe: it does only what is missing or changed, and goes on where it was interrupted.
"""


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="python -m meetara_nb",
        description="From a domain written in YAML to a checked GGUF file.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")

    listing = add("list", "the domains, by category, with their statements and checks, or the base models")
    listing.add_argument("--bases", action="store_true", help="the base models of params/bases.yaml instead")
    listing.set_defaults(work=_list)
    for name, text, work in (
        ("run", "make training data, model, GGUF, evaluation and metadata of domains", _run),
        ("plan", "what `run` would make with these options: parameters, sizes, what is already done", _plan),
    ):
        command = add(name, text)
        _selection(command)
        command.set_defaults(work=work)
        if name == "run":
            command.add_argument(
                "--batch-size", type=int, default=0, metavar="N",
                help="domains that go through all stages before the next begin (default: all at once)",
            )  # fmt: skip
            command.add_argument(
                "--until", default="", metavar="STAGE",
                help="stop after this stage: data, train, gguf, evaluate or metadata (default: metadata)",
            )  # fmt: skip
    data = add("data", "how varied the training data is that was made: funnel, wording, use of the statements")
    data.add_argument("domains", nargs="*", metavar="DOMAIN", help="domains (default: all that have training data)")
    data.add_argument("--across", action="store_true", help="also count answers that nearly repeat another domain's")
    _roots(data)
    data.set_defaults(work=_data)
    validate = add("validate", "check domain specs and run files, and report every fault")
    validate.add_argument("files", nargs="*", type=Path, help="YAML files (default: every domain and run file)")
    validate.set_defaults(work=_validate)
    status = add("status", "what there is of every domain: which stages are done, sizes and scores")
    _roots(status)
    status.set_defaults(work=_status)
    lab = add("lab", "open JupyterLab on the notebooks; options that this does not know go to `jupyter lab`")
    lab.set_defaults(work=_lab)
    return top


def _roots(command: argparse.ArgumentParser) -> None:
    for root in ("data", "models"):
        command.add_argument(
            f"--{root}-root", default="", metavar="FOLDER",
            help=f"where {root}/ is (default: $MEETARA_{root.upper()}_ROOT, or {root}/ in the project)",
        )  # fmt: skip


def _selection(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--domains", default="", metavar="A[,B]", help="domains, separated by commas; `all` for all that have a spec")
    add("--params", type=Path, metavar="FILE", help="a run file that names domains, tier, base and overrides")
    add("--tier", default="", help="how much data and training: smoke, fast, balanced, quality (default: by category)")
    add("--base", default="", help="a base model of params/bases.yaml, or the path of a model folder or GGUF file")
    add("--max-minutes", type=float, metavar="N", help="training time for each domain (default on a CPU: 6)")
    add("--run-minutes", type=float, metavar="N", help="training time for all domains together, shared equally")
    add("--max-steps", type=int, metavar="N", help="train exactly so many steps instead of planning by time")
    add("--samples", type=int, metavar="N", help="training samples to keep for each domain")
    add("--quant", metavar="Q[,Q]", help="quantisation levels, for example Q4_K_M,Q8_0 (default: Q4_K_M)")
    add("--form", choices=("adapter", "merged", "both"), help="8 MB beside a shared base, or a standalone model")
    add(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="settings",
        help="any parameter that `plan` shows, for example --set train.learning_rate=0.0005",
    )  # fmt: skip
    _roots(command)


def _overrides(options: argparse.Namespace) -> dict[str, Any]:
    import yaml

    overrides: dict[str, Any] = {}
    for setting in options.settings:
        key, equals, text = setting.partition("=")
        if not equals:
            raise MeetaraError(f"{setting!r} is no setting", where="--set", remedy="write KEY=VALUE")
        try:
            overrides[key.strip()] = yaml.safe_load(text)
        except yaml.YAMLError:
            raise MeetaraError(f"the value {text!r} cannot be read", where=f"--set {key}") from None
    flags = {
        "train.max_minutes": options.max_minutes,
        "train.run_minutes": options.run_minutes,
        "train.max_steps": options.max_steps,
        "data.samples": options.samples,
        "gguf.quants": [q.strip() for q in options.quant.split(",")] if options.quant else None,
        "gguf.form": options.form,
    }
    return overrides | {key: value for key, value in flags.items() if value is not None}


def _opened(options: argparse.Namespace) -> Any:
    from .catalogue import Catalogue
    from .lab import Lab
    from .params import RunFile, load_run_file

    file = load_run_file(options.params) if options.params else RunFile(domains=[])
    named = [name.strip() for name in options.domains.split(",") if name.strip()]
    if named == ["all"]:
        named = list(Catalogue().files)
    return Lab.open(
        domains=named or file.domains,
        tier=options.tier or file.tier,
        base=options.base or file.base,
        overrides={**file.overrides, **_overrides(options)},
        data_root=options.data_root,
        models_root=options.models_root,
    )


def _run(options: argparse.Namespace) -> int:
    from . import chain

    lab = _opened(options)
    failed = chain.run(lab, batch_size=options.batch_size, until=options.until)
    print("\n" + (chain.data_summary(lab) if options.until == "data" else chain.summary(lab, failed)))
    files = [str(path) for path in chain.files_of(lab)]
    if files:
        print("\nModels\n" + "\n".join(f"  {path}" for path in files))
    if failed:
        print(f"\n{len(failed)} of {len(lab.domains)} domains failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def _plan(options: argparse.Namespace) -> int:
    from . import plan

    print(plan.describe(_opened(options)))
    return 0


def _list_bases() -> int:
    from .params import HubSource, bases
    from .runlog import table

    rows = []
    for name, base in bases().items():
        source = base.source
        where = f"Hub, {source.revision[:12]}" if isinstance(source, HubSource) else "comes along"
        rows.append(
            [name, f"{base.parameters / 1e6:,.0f} M", base.shape.architecture, base.licence, base.origin, where]
        )
    print(table(rows, ["base", "parameters", "architecture", "licence", "origin", "weights"]))
    print("\n--base also takes the path of a folder as transformers saves it, or of a GGUF file (llama architecture).")
    return 0


def _list(options: argparse.Namespace) -> int:
    from .catalogue import Catalogue
    from .runlog import table

    if options.bases:
        return _list_bases()
    catalogue, rows = Catalogue(), []
    for name in sorted(catalogue.files, key=lambda name: (catalogue.category(name), name)):
        domain = catalogue.load(name)
        count = sum(1 for _ in domain.statements)
        rows.append([domain.category, name, len(domain.topics), count, len(domain.checks), domain.title])
    print(table(rows, ["category", "domain", "topics", "statements", "checks", "title"]))
    return 0


def _data(options: argparse.Namespace) -> int:
    from .catalogue import Catalogue
    from .hub import measures
    from .lab import layout_of

    layout, catalogue = layout_of(options.data_root, options.models_root), Catalogue()
    files = {}
    for name in options.domains or catalogue.files:
        path = Path(layout.training_data(catalogue.category(name), name))
        if path.exists() or options.domains:
            files[name] = path
    if not files:
        raise MeetaraError("there is no training data yet", where=layout.data_root, remedy="run 01_generate_data first")
    print(measures.report(files, across=options.across))
    return 0


def _validate(options: argparse.Namespace) -> int:
    from .catalogue import Catalogue, load_domain
    from .errors import Fault
    from .layout import PARAMS
    from .params import bases, load_run_file, scopes, tiers

    faults: list[Fault] = []
    checked = 0
    files = options.files or [*Catalogue().files.values(), *sorted((PARAMS / "runs").glob("*.yaml"))]
    steps: list[tuple[Any, tuple[Any, ...]]] = [] if options.files else [(tiers, ()), (bases, ()), (scopes, ())]
    for path in files:
        resolved = path.resolve()
        steps.append((load_run_file if resolved.parent.name == "runs" else load_domain, (resolved,)))
    for step, arguments in steps:
        try:
            step(*arguments)
            checked += 1
        except MeetaraError as error:
            faults += error.faults
    if faults:
        raise MeetaraError.of(faults)
    print(f"{checked} files are valid")
    return 0


def _status(options: argparse.Namespace) -> int:
    from . import plan
    from .catalogue import Catalogue
    from .lab import layout_of

    print(plan.status(Catalogue(), layout_of(options.data_root, options.models_root)))
    return 0


def _lab(options: argparse.Namespace) -> int:
    import subprocess

    from .environment import kernel_environment
    from .layout import NOTEBOOKS

    # Jupyter refuses to run as root unless told, and in a container one is root.
    root = ["--allow-root"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    command = [sys.executable, "-m", "jupyter", "lab", "--notebook-dir", str(NOTEBOOKS), *root, *options.passed_on]
    with kernel_environment():
        return subprocess.call(command)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command. Returns 0; 1 where a domain failed; 2 for a wrong input; 130 when interrupted."""
    options, passed_on = parser().parse_known_args(arguments)
    if passed_on and options.command != "lab":
        parser().error(f"unrecognized arguments: {' '.join(passed_on)}")
    options.passed_on = passed_on
    try:
        return int(options.work(options))
    except MeetaraError as error:
        for fault in error.faults:
            print(f"error: {fault}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted: `run` again goes on from here", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
