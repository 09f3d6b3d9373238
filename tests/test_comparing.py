"""Rows of benchmarks beside each other."""

from __future__ import annotations

from comparing import add_ratios, in_order


def test_rows_are_compared_with_those_of_the_same_sizes():
    def row(batch, way, sparsity, ms):
        return {"batch": batch, "way": way, "sparsity": sparsity, "ms": ms}

    rows = [row(2, "ours", 0.7, 1.0), row(2, "ours", 0.5, 2.0), row(2, "dense", None, 3.0), row(1, "ours", 0.7, 0.5)]
    ordered = in_order(rows, ["batch"], ["dense", "ours"])
    add_ratios(ordered, ["batch"], over_dense={"way": "dense", "sparsity": None}, over_hf={"way": "hf"})
    told = [(x["batch"], x["way"], x["sparsity"], x.get("over_dense")) for x in ordered]
    assert told == [(1, "ours", 0.7, None), (2, "dense", None, 1.0), (2, "ours", 0.5, 1.5), (2, "ours", 0.7, 3.0)]
    assert all("over_hf" not in x for x in ordered)
