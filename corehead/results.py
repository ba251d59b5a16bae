"""Where notebooks write: tables to data/results/<profile>/, figures to figures/."""

from __future__ import annotations

import os
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).resolve().parent.parent
P_VALUE = r"(.*_)?(p|holm|bonferroni)"  # names of columns


def output(*parts: str) -> Path:
    """A folder for what notebooks write, made if it is missing.

    The environment variable COREHEAD_OUTPUT takes the place of the repository, so that tests overwrite nothing.
    """
    folder = Path(os.environ.get("COREHEAD_OUTPUT", ROOT), *parts)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def results(profile: str) -> Path:
    """The folder of a profile's tables."""
    return output("data", "results", profile)


def save(table: pd.DataFrame, name: str, profile: str = "testbed") -> pd.DataFrame:
    """Round a table to what is reported, write it as CSV, and return it as it was written.

    Figures are drawn from what is returned, so that the last digits of another processor do not reach them.

    Parameters
    ----------
    table : DataFrame
        An index with a name becomes columns.
    name, profile : str
        Of the file and its folder.

    Returns
    -------
    DataFrame
        p-values with three significant digits, all other numbers with four decimals.
    """
    table = table.reset_index(drop=table.index.names == [None])
    rounded = table.round(4)
    # four decimals would make many a p-value zero
    for column in table.columns[table.columns.str.fullmatch(P_VALUE)]:
        rounded[column] = table[column].map("{:.3g}".format).astype(float)
    rounded.to_csv(results(profile) / f"{name}.csv", index=False)
    return rounded
