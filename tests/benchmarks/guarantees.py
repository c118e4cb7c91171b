"""How often guarantees are broken, what they save, and what cross-fitting gains: many splits of outputs whose truth is known.

    python tests/benchmarks/guarantees.py [SPLITS] [PROCESSES] [RUN SPLIT]

Every split draws n images, with replacement, from a population, so the risk on new images is that of the population: 100,000
synthetic images, or those of a split of shards as a trained run sees them.
"""

import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from dist_train.prediction import budget, crossfit
from dist_train.prediction.risk import RISKS, Outputs, Target, certify, losses
from dist_train.prediction.search import Search
from tests.dist_train.prediction import synthetic

IMAGES = (200, 1000, 5000)
DELTA = 0.05


def truth_of(run, split):
    """The outputs of a run on a split of its shards."""
    from dist_train import evaluate

    report = evaluate(run, split)
    samples = report.samples
    return synthetic.Outputs(
        samples["max_probability"], samples["prediction"], samples.labels, np.array(report.costs["multiply_adds"])
    )


SPLITS, PROCESSES, *RUN = (*sys.argv[1:], *("1000", "1")[len(sys.argv) - 1 :])
TRUTH = truth_of(*RUN) if RUN else synthetic.population(images=100_000)
OUTPUTS = Outputs(TRUTH.scores, TRUTH.predictions, TRUTH.labels)
COSTS = TRUTH.costs / TRUTH.costs[-1]
EPSILON = {
    "gap": 0.01,
    "consistency": 0.01,
    "error": round(1 - float(TRUTH.correct[:, -1].mean()) + 0.01, 2),
    "cost": round(0.75 * float(COSTS[0]) + 0.25, 2),
}
BUDGETS = np.linspace(TRUTH.costs[0], TRUTH.costs[-1], 8)[1:-1].tolist()


def risk(name, thresholds):
    return float(losses(name, OUTPUTS, OUTPUTS.exits(thresholds), TRUTH.costs).mean())


def hindsight():
    """By risk: what the best thresholds save of the last exit's cost; of cost, their accuracy."""
    found = {}
    for name, epsilon in EPSILON.items():
        same = TRUTH.predictions == TRUTH.predictions[:, -1:]
        way = Search(TRUTH.scores, same if name == "consistency" else TRUTH.correct, TRUTH.costs).curve(300)
        allowed = [row for row in way if risk(name, row) <= epsilon]
        found[name] = 1 - min(risk("error" if name == "cost" else "cost", row) for row in allowed)
    return found


def guarantees(task):
    """One split: by risk, whether it is broken, and what is saved (of cost: the accuracy)."""
    images, seed = task
    drawn = TRUTH.draw(np.random.default_rng([images, seed]), images)
    rows = []
    for name in RISKS:
        found = certify(
            Outputs(drawn.scores, drawn.predictions, drawn.labels), drawn.costs, [Target(name, EPSILON[name])], DELTA
        ).thresholds
        if found is None:
            rows.append((False, np.nan if name == "cost" else 0.0))
        else:
            rows.append((risk(name, found) > EPSILON[name], 1 - risk("error" if name == "cost" else "cost", found)))
    return rows


def known(rows):
    found = [budget.outcome(TRUTH.scores, TRUTH.correct, TRUTH.costs, row) for row in rows]
    return np.array([one.accuracy for one in found]), np.array([one.cost for one in found])


def fits(task):
    """One split: cross-fitted and old thresholds at the budgets, and geometric ones at their costs; [2, 3, B]."""
    images, seed = task
    drawn = TRUTH.draw(np.random.default_rng([images, seed, 1]), images)
    accuracies, spent = known(budget.geometric(drawn.scores, range(1, 40, 2)))
    order = np.argsort(spent)
    fitted = crossfit.fit(lambda _: drawn.scores, drawn.correct, drawn.costs, BUDGETS)
    old = budget.optimal(drawn.scores, drawn.correct, drawn.costs, BUDGETS)
    promised = [
        np.array([one.hits / images for one in fitted]),
        np.array([budget.outcome(drawn.scores, drawn.correct, drawn.costs, row).accuracy for row in old]),
    ]
    found = []
    for rows, promise in zip(([one.thresholds for one in fitted], old), promised):
        accuracy, cost = known(rows)
        gain = accuracy - np.interp(cost, spent[order], accuracies[order])
        found.append([gain, cost / BUDGETS - 1, promise - accuracy, accuracy])
    return found


def main():
    splits, processes = int(SPLITS), int(PROCESSES)
    print("correct", TRUTH.correct.mean(axis=0), "costs", COSTS, "epsilon", EPSILON)
    best = hindsight()
    # Spawned: a fork of a process that has evaluated would wait for the locks of its threads.
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        for images in IMAGES:
            found = np.array(list(pool.map(guarantees, [(images, seed) for seed in range(splits)], chunksize=10)))
            limit = DELTA + 2 * np.sqrt(DELTA * (1 - DELTA) / splits)
            for name, column in zip(RISKS, found.transpose(1, 0, 2)):
                print(
                    f"n {images:>5}  {name:<12} broken {column[:, 0].mean():.4f} (limit {limit:.4f})  "
                    f"{'accuracy' if name == 'cost' else 'saved'} {np.nanmean(column[:, 1]):.4f} of {best[name]:.4f} in hindsight: "
                    f"{np.nanmean(column[:, 1]) / best[name]:.3f}",
                    flush=True,
                )
        for images in IMAGES:
            count = max(1, splits // 5)
            found = np.array(list(pool.map(fits, [(images, seed) for seed in range(count)], chunksize=5)))
            for name, rows in zip(("cross-fitted", "old"), found.transpose(1, 2, 0, 3)):
                gain, over, optimism, accuracy = rows
                print(
                    f"n {images:>5}  {name:<12} against geometric at its cost, points: mean {100 * gain.mean():+.3f} worst budget "
                    f"{100 * gain.mean(axis=0).min():+.3f} ± {100 * gain.std(axis=0).max() / np.sqrt(count):.3f}; accuracy "
                    f"{100 * accuracy.mean():.2f}; above budget in {100 * (over > 0).mean():.1f} % (worst {100 * over.max():+.1f} %); "
                    f"promise less truth {100 * optimism.mean():+.2f} points",
                    flush=True,
                )


if __name__ == "__main__":
    main()
