"""What `import hero_jax` costs beside `import jax, optax`, and which modules it is.

    python -m examples.experiments.speed.import_time --rounds 20

starts fresh processes by turns, one for each import, and prints the medians of the
seconds, the median of the rounds' ratios with the range of its middle half, and what
`python -X importtime` says of the modules that come in addition, the least of three
runs for each. Compiled Python files and the machine's file cache are warm after the
first round, which does not count.
"""

import argparse
import collections
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from typing import NamedTuple

BASE = "import jax, optax"
OWN = "import hero_jax"
MARK = "-- from here on --"


class Cost(NamedTuple):
    """Of a module: its own code, without what it imports.

    Attributes:
      name: of the module.
      milliseconds: it took.
    """

    name: str
    milliseconds: float


def seconds(statement: str) -> float:
    """Return how long an import takes in a process of its own."""
    program = (
        "import time; start = time.perf_counter();"
        f"{statement}; print(time.perf_counter() - start)"
    )
    return float(_run("-c", program).stdout)


def added(runs: int = 3) -> list[Cost]:
    """Return the least cost in some runs of each module that is new after the base."""
    program = f"import sys; {BASE}; print({MARK!r}, file=sys.stderr); {OWN}"
    costs: dict[str, float] = {}
    for _ in range(runs):
        text = _run("-X", "importtime", "-c", program).stderr
        for line in text.partition(MARK)[2].splitlines():
            kind, _, rest = line.partition(":")
            if kind == "import time":
                own, _, name = (part.strip() for part in rest.split("|"))
                costs[name] = min(int(own) / 1000, costs.get(name, math.inf))
    return [Cost(*item) for item in costs.items()]


def by_package(costs: Sequence[Cost]) -> list[Cost]:
    """Add up the costs: of hero_jax by module, of others by package; largest first."""
    totals: dict[str, float] = collections.defaultdict(float)
    for name, milliseconds in costs:
        package = name.partition(".")[0]
        totals[name if package == "hero_jax" else package] += milliseconds
    return sorted((Cost(*item) for item in totals.items()), key=lambda x: -x[1])


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python, which keeps what it compiles, as it does for an installed package."""
    kept = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        check=True,
        env=kept,
    )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read and check the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=20, help="that are timed")
    parser.add_argument("--modules", type=int, default=10, help="lines of the table")
    options = parser.parse_args(arguments)
    for name in ("rounds", "modules"):
        if getattr(options, name) < 2:
            parser.error(f"--{name} must be at least 2, got {getattr(options, name)}")
    return options


def main(arguments: Sequence[str] | None = None) -> float:
    """Print the tables and return the median ratio."""
    options = parse(arguments)
    times = [(seconds(BASE), seconds(OWN)) for _ in range(options.rounds + 1)][1:]
    ratios = [own / base for base, own in times]
    low, ratio, high = statistics.quantiles(ratios, n=4, method="inclusive")
    print("| import | seconds, median | ratio, median (quartiles) |")
    print("|---|---|---|")
    for statement, values, of_base in (
        (BASE, [base for base, _ in times], "1"),
        (OWN, [own for _, own in times], f"{ratio:.2f} ({low:.2f} to {high:.2f})"),
    ):
        print(f"| `{statement}` | {statistics.median(values):.2f} | {of_base} |")

    costs = added()
    total = sum(cost.milliseconds for cost in costs)
    print(f"\n{len(costs)} modules in addition, {total:.0f} ms (-X importtime)\n")
    print("| module or package | ms |\n|---|---|")
    for name, milliseconds in by_package(costs)[: options.modules]:
        print(f"| `{name}` | {milliseconds:.1f} |")
    return ratio


if __name__ == "__main__":
    main()
