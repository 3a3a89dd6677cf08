"""Speed of the hub: samples a second at each step, memory, and near-duplicates against datasketch in the same run.

    pip install --constraint constraints.txt 'datasketch>=1.6'
    python tests/benchmarks/hub.py --copies 20

Takes the shipped specs under other names, composes 5,000 samples for each, and says what 62 domains would take.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections import defaultdict
from itertools import cycle, islice

from meetara_nb.catalogue import Catalogue, Domain
from meetara_nb.hub.dataset import Judge, to_json
from meetara_nb.hub.dataset import compose as whole
from meetara_nb.hub.dedup import PERMUTATIONS, SHINGLE, NearDuplicates, ngrams, words_of
from meetara_nb.hub.filters import FILTERS
from meetara_nb.hub.grounded import Composer
from meetara_nb.params import DataParams
from meetara_nb.runlog import table


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def steps(domain: Domain, params: DataParams) -> list[list[str]]:
    """Each step alone, over the drafts of one domain."""
    spent: dict[str, float] = defaultdict(float)

    def timed(name: str, start: float) -> None:
        spent[name] += time.perf_counter() - start

    start = time.perf_counter()
    stream = Composer(domain, params.seed, params.kinds, params.misspelt).drafts()
    drafts = list(islice(stream, params.samples))
    timed("compose", start)
    judge = Judge(domain, params)
    for check in FILTERS:
        start = time.perf_counter()
        for draft in drafts:
            check(draft, judge.rules)
        timed(f"filter: {check.__name__}", start)
    start = time.perf_counter()
    for draft in drafts:
        judge._contamination.found_in(words_of(draft.answer))
        judge._contamination.found_in(words_of(draft.question))
    timed("decontaminate", start)
    near_duplicates = NearDuplicates(params.near_duplicate)
    start = time.perf_counter()
    for draft in drafts:
        near_duplicates.add(words_of(draft.answer))
    timed("near-duplicates", start)
    data = whole(domain, params)
    start = time.perf_counter()
    to_json(domain, params, data)
    timed("write", start)
    total = sum(spent.values())
    return [
        [name, f"{params.samples / seconds:,.0f}", f"{1e6 * seconds / params.samples:.0f}", f"{seconds / total:.0%}"]
        for name, seconds in spent.items()
    ]


def against_datasketch(domain: Domain, params: DataParams) -> list[list[str]]:
    """The same texts, threshold and permutations through both."""
    from datasketch import MinHash, MinHashLSH

    drafts = islice(Composer(domain, params.seed, params.kinds).drafts(), params.samples)
    texts = [words_of(draft.answer) for draft in drafts]
    texts += texts[:500]  # so that there is something to find
    rows = []
    for name in ("rensa", "datasketch", "rensa", "datasketch"):
        start, found = time.perf_counter(), 0
        if name == "rensa":
            seen = NearDuplicates(params.near_duplicate)
            found = sum(seen.add(words) is not None for words in texts)
        else:
            lsh = MinHashLSH(threshold=params.near_duplicate, num_perm=PERMUTATIONS)
            for number, words in enumerate(texts):
                minhash = MinHash(num_perm=PERMUTATIONS)
                minhash.update_batch([gram.encode() for gram in ngrams(words, SHINGLE)])
                if lsh.query(minhash):
                    found += 1
                else:
                    lsh.insert(number, minhash)
        seconds = time.perf_counter() - start
        rows.append([name, f"{len(texts) / seconds:,.0f}", f"{1e6 * seconds / len(texts):.0f}", str(found)])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--copies", type=int, default=20)
    parser.add_argument("--samples", type=int, default=5_000)
    options = parser.parse_args()
    params, catalogue = DataParams(samples=options.samples), Catalogue()
    originals = [catalogue.load(name) for name in ("general_health", "entrepreneurship")]
    print(table(steps(originals[0], params), ["step", "samples/s", "us a sample", "share"]), "\n")
    rows = against_datasketch(originals[0], params)
    print(table(rows, ["near-duplicates", "texts/s", "us a text", "found"]), "\n")
    rows = []
    for samples in (5_000, 10_000, 15_000):
        start = time.perf_counter()
        whole(originals[0], DataParams(samples=samples))
        seconds = time.perf_counter() - start
        rows.append([f"{samples:,}", f"{seconds:.1f}", f"{samples / seconds:,.0f}"])
    print(table(rows, ["samples of one domain", "seconds", "samples/s"]), "\n")
    start = time.perf_counter()
    written = 0
    for number, domain in enumerate(islice(cycle(originals), options.copies)):
        copy = domain.model_copy(update={"domain": f"{domain.domain}_{number}"})
        written += len(to_json(copy, params, whole(copy, params)).encode())
    seconds = time.perf_counter() - start
    print(
        f"{options.copies} domains x {options.samples:,}: {seconds:.1f} s, {written / 1e6:.0f} MB written, "
        f"peak memory {peak_mb():,.0f} MB; 62 domains at this rate: {62 * seconds / options.copies:.0f} s on one core"
    )


if __name__ == "__main__":
    main()
