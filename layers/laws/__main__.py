"""python -m layers.laws: which laws hold, how well, and why one does not apply."""

import argparse
import concurrent.futures
import os
import sys
import textwrap
import time
from typing import NamedTuple

from layers import laws
from layers.laws.examples import CASES, cases
from layers.models.build import get

WIDTH = 80
AT_ONCE = min(2, os.cpu_count() or 1)  # cases: the compiler works outside Python's lock


class Examined(NamedTuple):
    findings: list[laws.Finding]
    seconds: float

    @property
    def holds(self) -> bool:
        return all(finding.passed for finding in self.findings)


def cases_of(name: str) -> dict:
    """The examined instances of one layer, a name of LAYERS or the user's own class."""
    return cases(name, get(name))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m layers.laws",
        description=laws.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    choice = parser.add_mutually_exclusive_group(required=True)
    choice.add_argument("--layer", help="a name of LAYERS or a dotted path")
    choice.add_argument("--all", action="store_true", help="every layer of LAYERS")
    options, results, start = parser.parse_args(argv), {}, time.perf_counter()
    try:
        cases = CASES if options.all else cases_of(options.layer)
        layers = {name: make() for name, make in cases.items()}
        with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
            jobs = {
                name: pool.submit(_examined, layer) for name, layer in layers.items()
            }
            for name, job in jobs.items():
                results[name] = job.result()
                verdict = "holds" if results[name].holds else "FAILS"
                progress = f"{len(results)} of {len(cases)}"
                seconds = f"{results[name].seconds:.0f} s"
                print(f"{progress}: {name} {verdict}, {seconds}", flush=True)
    except ValueError as problem:
        parser.error(str(problem))
    print()
    if options.all:
        _print_matrix(results)
    else:
        for name, result in results.items():
            _print_layer(name, result.findings)
    _print_ends(results, time.perf_counter() - start)
    return int(not all(result.holds for result in results.values()))


def _examined(layer):
    start = time.perf_counter()
    findings = laws.examine(layer)
    return Examined(findings, time.perf_counter() - start)


def _print_layer(name, findings):
    """One line a law: its largest error of the limit, more where it fails."""
    print(f"{name}: largest error over largest value, of the limit")
    width = max(map(len, laws.LAWS))
    for finding in findings:
        if finding.error is None:
            verdict, text = "-", finding.reason
        elif finding.reason:
            verdict, text = "FAILS", finding.reason
        else:
            verdict = "holds" if finding.passed else "FAILS"
            text = _of_limit(finding) if finding.passed else _figures(finding)
        text = "; ".join(filter(None, (text, *finding.remarks)))
        _print_wrapped(f"  {finding.law:{width}} {verdict:6}", text)
    print()


def _of_limit(finding):
    if finding.limit == 0:
        return ""
    error = f"{finding.error:.0e}" if finding.error else "0"
    return f"{error} of {finding.limit:.0e}"


def _figures(finding):
    return f"error {finding.error:.0e}, limit {finding.limit:.0e}, {finding.where}"


def _print_matrix(results):
    """One line a case, one letter a law."""
    letters = {law: chr(ord("a") + i) for i, law in enumerate(laws.LAWS)}
    width = max(map(len, results))
    print(f"{'':{width}} {' '.join(letters.values())} time")
    for name, result in results.items():
        marks = " ".join(map(_mark, result.findings))
        print(f"{name:{width}} {marks} {result.seconds:3.0f}s")
    print("\n. holds   F fails   - does not apply")
    entries = [f"{letter} {law}" for law, letter in letters.items()]
    rows = -(-len(entries) // 3)
    for row in range(rows):
        print("".join(f"{entry:29}" for entry in entries[row::rows]).rstrip())
    print()
    _print_notes(
        results, "not applied", lambda f: [f.reason] if f.error is None else []
    )
    _print_notes(results, "remarks", lambda f: f.remarks)
    for name, result in results.items():
        for finding in result.findings:
            if not finding.passed:
                text = finding.reason or _figures(finding)
                text = "; ".join((text, *finding.remarks))
                _print_wrapped(f"FAILS {name}, {finding.law}:", text)


def _mark(finding):
    if finding.error is None:
        return "-"
    return "." if finding.passed else "F"


def _print_notes(results, title, notes):
    """Every note once, with the cases that have it."""
    cases = {}
    for name, result in results.items():
        for finding in result.findings:
            for note in notes(finding):
                cases.setdefault(note, {})[name] = None
    if cases:
        print(title)
    for note, names in cases.items():
        holders = "every case" if len(names) == len(results) else ", ".join(names)
        _print_wrapped(f"  {note}:", holders)
    if cases:
        print()


def _print_wrapped(head, text):
    indent = " " * 6
    for line in textwrap.wrap(f"{head} {text}", WIDTH, subsequent_indent=indent):
        print(line)


def _print_ends(results, seconds):
    failed = {
        name: [finding.law for finding in result.findings if not finding.passed]
        for name, result in results.items()
        if not result.holds
    }
    for name, names in failed.items():
        _print_wrapped(f"failed: {name}:", "; ".join(names))
    if not failed:
        print("every law holds")
    slowest = max(results, key=lambda name: results[name].seconds)
    _print_wrapped(
        f"cases: {len(results)} in {seconds:.0f} s,",
        f"{seconds / len(results):.0f} s a case, {AT_ONCE} at a time; the longest took "
        f"{results[slowest].seconds:.0f} s, {slowest}",
    )


if __name__ == "__main__":
    sys.exit(main())
